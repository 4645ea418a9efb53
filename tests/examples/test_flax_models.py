"""The example models compute what transformers computes in PyTorch, on weights that `jm.naming` renamed."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmerge as jm
from examples.flax_models.decoder import Decoder
from examples.flax_models.decoder_config import decoder_config
from examples.flax_models.vit import VisionTransformer
from tests.trees.record_transformers import DATA, IMAGES, MODELS, TOKENS, weights

# Rules in place of a family's own that give tensors of the same shapes and must not give the same logits.
LAYER = r"(model\.layers\.\d+\.{})\.weight"
WRONG: dict[str, list[tuple[tuple[Any, ...], ...]]] = {
    "llama": [
        ((LAYER.format(r"self_attn\.q_proj"), r"\1.kernel"),),
        ((LAYER.format(r"self_attn\.o_proj"), r"\1.kernel"),),
        (
            (LAYER.format("mlp").replace(")", r")\.gate_proj"), r"\1.up_proj.kernel", (1, 0)),
            (LAYER.format("mlp").replace(")", r")\.up_proj"), r"\1.gate_proj.kernel", (1, 0)),
        ),
    ],
    "gemma3": [
        (
            (r"(.*)\.post_attention_layernorm\.weight", r"\1.pre_feedforward_layernorm.weight"),
            (r"(.*)\.pre_feedforward_layernorm\.weight", r"\1.post_attention_layernorm.weight"),
        ),
        ((r"(.*)\.q_norm\.weight", r"\1.k_norm.weight"), (r"(.*)\.k_norm\.weight", r"\1.q_norm.weight")),
    ],
    "vit": [
        ((r"(.*\.query)\.weight", r"\1.kernel"),),
        ((r"(.*\.projection)\.weight", r"\1.kernel", (3, 2, 1, 0)),),
    ],
}


@nnx.jit
def apply(model, inputs):
    return model(inputs)


def recorded(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]:
    """config.json, weights as transformers saves them, and its logits."""
    with np.load(DATA) as data:
        config, shapes, logits = (data[f"{name}/{key}"] for key in ("config", "shapes", "logits"))
    return json.loads(str(config)), weights(json.loads(str(shapes))), logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
    config, params, expected = recorded(name)
    naming = jm.naming_for(config)
    if name == "vit":
        model, inputs = nnx.eval_shape(lambda: VisionTransformer(config, nnx.Rngs(0))), IMAGES
    else:
        model, inputs = nnx.eval_shape(lambda: Decoder(decoder_config(config), nnx.Rngs(0))), TOKENS.astype(np.int32)
    shapes = {leaf: x.shape for leaf, x in jm.named_leaves(nnx.state(model, nnx.Param)).items()}

    def logits(naming: jm.Naming):
        renamed = naming(params)
        assert {leaf: x.shape for leaf, x in jm.named_leaves(renamed).items()} == shapes
        nnx.update(model, jax.tree.map(jnp.asarray, renamed))
        return np.asarray(apply(model, inputs))

    # Both compute in float32 and add up in another order: 2 layers of some 10 roundings each, on logits of size 1 to 7.
    np.testing.assert_allclose(logits(naming), expected, rtol=1e-4, atol=3e-5)
    for rules in WRONG.get(name, []):  # each must be off by ten times what is let pass above
        difference = np.abs(logits(jm.Naming((*rules, *naming.rules))) - expected).max()
        assert difference > 0.01, f"{name} cannot tell {rules} from the right rules"


def test_scanned_model_computes_the_same():
    config, params, expected = recorded("gemma3")  # layers that differ in window and rotary base
    model = nnx.eval_shape(lambda: Decoder(decoder_config(config), nnx.Rngs(0), stacked=True))
    nnx.update(model, jax.tree.map(jnp.asarray, jm.naming("gemma3", stacked=True)(params)))
    logits = apply(model, TOKENS.astype(np.int32))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=3e-5)


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD = {  # what transformers 5 writes in another way, as earlier versions wrote it
    "llama": {"rope_theta": 100.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
    "mistral": {"rope_theta": 10000.0},
    "qwen3": {"rope_theta": 10000.0},
    "gemma2": {"rope_theta": 10000.0},
    "gemma3": {
        "rope_theta": 1000.0,
        "rope_local_base_freq": 10.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "sliding_window_pattern": 2,
    },
}


@pytest.mark.parametrize("name", OLD)
def test_older_configurations_say_the_same(name):
    config = recorded(name)[0]
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types")} | OLD[name]
    assert decoder_config(old) == decoder_config(config)
