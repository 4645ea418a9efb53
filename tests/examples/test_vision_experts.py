"""The port of the vision transformer computes what the files mean, on a network small enough to do by hand."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from examples import vision_experts

SIZES = {"image": 4, "patch": 2, "dim": 4, "depth": 1, "heads": 2, "mlp": 6, "embed": 3, "scale": 16.0}
SHAPES = {
    "patch_embed.weight": (4, 4), "patch_embed.bias": (4,), "cls_token": (4,), "pos_embed": (5, 4),
    **{f"blocks.0.{ln}.{part}": (4,) for ln in ("ln1", "ln2") for part in ("weight", "bias")},
    **{f"blocks.0.attn.{x}.weight": (4, 4) for x in "qkv"}, **{f"blocks.0.attn.{x}.bias": (4,) for x in "qkv"},
    "blocks.0.attn.out.weight": (4, 4), "blocks.0.attn.out.bias": (4,),
    "blocks.0.mlp.fc1.weight": (6, 4), "blocks.0.mlp.fc1.bias": (6,),
    "blocks.0.mlp.fc2.weight": (4, 6), "blocks.0.mlp.fc2.bias": (4,),
    "ln_post.weight": (4,), "ln_post.bias": (4,), "proj.weight": (3, 4),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, rng):
    """A folder of random weights in the layout of the real one."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    for name in ("base", *vision_experts.TASKS):
        tensors = {n: rng.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
        if name == "base":
            base = {n: x.astype(np.float64) for n, x in tensors.items()}
    save_file(
        {t: rng.normal(size=(5, 3)).astype(np.float32) for t in vision_experts.TASKS}, tmp_path / "heads.safetensors"
    )
    return tmp_path, base


def by_hand(w: dict[str, np.ndarray], image: np.ndarray) -> np.ndarray:
    """One image, in float64."""

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(axis=-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    pixels = image / 127.5 - 1
    patches = [pixels[r : r + 2, c : c + 2].ravel() for r in (0, 2) for c in (0, 2)]
    x = np.vstack([w["cls_token"], linear("patch_embed", np.array(patches))]) + w["pos_embed"]
    q, k, v = (linear(f"blocks.0.attn.{part}", norm("blocks.0.ln1", x)) for part in "qkv")
    heads = []
    for at in (slice(0, 2), slice(2, 4)):
        scores = np.exp(q[:, at] @ k[:, at].T / math.sqrt(2))
        heads.append(scores / scores.sum(axis=1, keepdims=True) @ v[:, at])
    x = x + linear("blocks.0.attn.out", np.hstack(heads))
    hidden = linear("blocks.0.mlp.fc1", norm("blocks.0.ln2", x))
    hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
    x = x + linear("blocks.0.mlp.fc2", hidden)
    feature = norm("ln_post", x[0]) @ w["proj.weight"].T
    return feature / np.linalg.norm(feature)


def test_features_and_scores(folder, rng):
    path, weights = folder
    model = vision_experts.load(path)
    images = {task: rng.integers(0, 256, (2, 4, 4), np.uint8) for task in ("kannada", "gtsrb")}
    found = jax.jit(model.logits)(model.base, images)
    for task, given in images.items():
        features = np.array([by_hand(weights, image) for image in given])
        np.testing.assert_allclose(found[task], 16 * features @ np.asarray(model.heads[task]).T, rtol=1e-4, atol=1e-4)
