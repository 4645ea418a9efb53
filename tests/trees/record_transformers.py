"""What transformers computes in PyTorch for tiny models of each family: recorded once, compared with in tests.

Run with transformers 5.23.0 and PyTorch 2.13.0 (CPU), which nothing else needs, from the root of the repository:

    python tests/trees/record_transformers.py

For each model it writes config.json and the names and shapes of the tensors as transformers saves them, and the logits
that transformers gets for weights made from those names, loaded from a safetensors file. The weights are not stored:
`weights` makes the same ones again.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data" / "transformers.npz"

# Widths are chosen so that queries and output projection are square in some models, where a transpose has no other
# shape, and limits, windows and rotary bases so that each of them changes the logits.
_SMALL = dict(
    vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
_LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
}
_ALTERNATING = ["sliding_attention", "full_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(num_key_value_heads=2, rope_parameters=_LLAMA3)),
    "mistral": ("Mistral", dict(num_key_value_heads=2, sliding_window=4)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=1)),
    "qwen3": (
        "Qwen3",
        dict(
            num_key_value_heads=2, head_dim=6, tie_word_embeddings=True, attention_bias=True,
            use_sliding_window=True, sliding_window=4, max_window_layers=1,
        ),
    ),
    "gemma": ("Gemma", dict(num_key_value_heads=1, head_dim=6)),
    "gemma2": (
        "Gemma2",
        dict(
            num_key_value_heads=2, head_dim=6, query_pre_attn_scalar=7, sliding_window=4, layer_types=_ALTERNATING,
            attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        ),
    ),
    "gemma3": (
        "Gemma3",
        dict(
            num_key_value_heads=2, head_dim=6, query_pre_attn_scalar=7, sliding_window=4, layer_types=_ALTERNATING,
            rope_parameters=_GEMMA3_ROPE,
        ),
    ),
    "vit": (
        "ViT",
        dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8,
            patch_size=4, num_labels=5,
        ),
    ),
}  # fmt: skip


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers between -1/2 and 1/2 that depend on a name, the same with every version of NumPy."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape, dtype=np.int64)))
    return ((np.asarray(raw) >> np.uint64(40)) / 2.0**24 - 0.5).astype(np.float32).reshape(shape)


def weights(shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    """A model's weights by name, those of norms around 1."""
    return {name: values(name, tuple(shape)) + ("norm.weight" in name) for name, shape in shapes.items()}


TOKENS = (np.arange(18).reshape(2, 9) * 7 + 3) % 29
IMAGES = values("images", (2, 8, 8, 3))


def _record(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    import safetensors.numpy
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    if kind == "ViT":
        config, model_class = transformers.ViTConfig(**options), transformers.ViTForImageClassification
        inputs = {"pixel_values": torch.tensor(IMAGES.transpose(0, 3, 1, 2).copy())}
    else:
        config_name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
        config = getattr(transformers, config_name)(**{**_SMALL, **options})
        model_class, inputs = getattr(transformers, f"{kind}ForCausalLM"), {"input_ids": torch.tensor(TOKENS)}
    with tempfile.TemporaryDirectory() as folder:
        model_class(config).save_pretrained(folder)
        (path,) = Path(folder).glob("*.safetensors")
        shapes = {name: tensor.shape for name, tensor in sorted(safetensors.numpy.load_file(path).items())}
        safetensors.numpy.save_file(weights(shapes), path, metadata={"format": "pt"})
        model, info = model_class.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            logits = model.eval()(**inputs).logits.numpy()
        config_json = json.dumps(json.loads(Path(folder, "config.json").read_text()))
    return {"config": config_json, "shapes": json.dumps(shapes), "logits": logits}


if __name__ == "__main__":
    recorded = {name: _record(*model) for name, model in MODELS.items()}
    DATA.parent.mkdir(exist_ok=True)
    np.savez_compressed(DATA, **{f"{name}/{key}": x for name, made in recorded.items() for key, x in made.items()})
