"""A small vision transformer whose checkpoints are flat safetensors files with PyTorch's names, in Flax NNX.

A backbone maps a 28x28 image to a unit vector; each task scores its classes by fixed embeddings, which are neither
trained nor merged. The folder with the weights and the folder with the images are arguments: neither comes with the
library. `python -m examples.vision_experts FOLDER` checks the port against the features that are recorded there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxmerge as jm

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8

TASKS = ("mnist", "kannada", "oracle", "quickdraw", "gtsrb", "signdigits", "spoken", "pneumonia")


class Config(NamedTuple):
    """Sizes of the network, as in the folder's `config.json`."""

    image: int = 28
    patch: int = 7
    dim: int = 128
    depth: int = 6
    heads: int = 4
    mlp: int = 512
    embed: int = 64
    scale: float = 16.0


class Attention(nnx.Module):
    """Self-attention over all tokens."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.heads = config.heads
        self.q, self.k, self.v, self.out = (nnx.Linear(config.dim, config.dim, rngs=rngs) for _ in range(4))

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        query, key, value = (layer(x).reshape(*x.shape[:2], self.heads, -1) for layer in (self.q, self.k, self.v))
        return self.out(jax.nn.dot_product_attention(query, key, value).reshape(x.shape))


class Mlp(nnx.Module):
    """Two layers with the exact GELU between them."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(config.dim, config.mlp, rngs=rngs)
        self.fc2 = nnx.Linear(config.mlp, config.dim, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.ln1, self.ln2 = (nnx.LayerNorm(config.dim, epsilon=1e-5, rngs=rngs) for _ in range(2))
        self.attn, self.mlp = Attention(config, rngs), Mlp(config, rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class VisionTransformer(nnx.Module):
    """Patches, a class token, learned positions, blocks, and a projection of the class token to a unit vector."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.side, self.patch = config.image // config.patch, config.patch
        self.patch_embed = nnx.Linear(config.patch**2, config.dim, rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros(config.dim))
        self.pos_embed = nnx.Param(jnp.zeros((self.side**2 + 1, config.dim)))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.depth)])
        self.ln_post = nnx.LayerNorm(config.dim, epsilon=1e-5, rngs=rngs)
        self.proj = nnx.Linear(config.dim, config.embed, use_bias=False, rngs=rngs)

    def __call__(self, images: UInt8[Array, "batch height width"]) -> Float[Array, "batch embed"]:
        pixels = images.astype(jnp.float32) / 127.5 - 1
        grid = pixels.reshape(-1, self.side, self.patch, self.side, self.patch).transpose(0, 1, 3, 2, 4)
        patches = self.patch_embed(grid.reshape(-1, self.side**2, self.patch**2))
        token = jnp.broadcast_to(self.cls_token[...], (len(patches), 1, patches.shape[-1]))
        x = jnp.concatenate([token, patches], axis=1) + self.pos_embed[...][None]
        for block in self.blocks:
            x = block(x)
        features = self.proj(self.ln_post(x[:, 0]))
        return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


class Experts(NamedTuple):
    """What the folder holds.

    Attributes:
        config: sizes.
        graph: the network without its parameters: `nnx.merge(graph, params)(images)`.
        base: the base's parameters.
        experts: task → parameters.
        heads: task → class embeddings `[classes, embed]`.
    """

    config: Config
    graph: nnx.GraphDef
    base: nnx.State
    experts: dict[str, nnx.State]
    heads: dict[str, Any]

    def features(self, params: nnx.State, images: Any) -> Array:
        """Unit vectors `[batch, embed]` of images `[batch, 28, 28]`."""
        return nnx.merge(self.graph, params)(images)

    def logits(self, params: nnx.State, images: Mapping[str, Any]) -> dict[str, Array]:
        """Scores of the classes, by task, of each task's images; all of them go through the network together."""
        tasks = list(images)
        sizes = np.cumsum([len(images[task]) for task in tasks])[:-1]
        parts = jnp.split(self.features(params, jnp.concatenate([images[task] for task in tasks])), sizes)
        return {t: self.config.scale * part @ self.heads[t].T for t, part in zip(tasks, parts, strict=True)}


def load(folder: Path) -> Experts:
    """Reads the network, the base, every expert and the heads."""
    config = Config(**json.loads((folder / "config.json").read_text()))
    graph, params = nnx.split(nnx.eval_shape(lambda: VisionTransformer(config, nnx.Rngs(0))), nnx.Param)
    read = {name: from_torch(jm.open_checkpoint(folder / f"{name}.safetensors").params) for name in ("base", *TASKS)}
    states = {name: filled(params, tensors) for name, tensors in read.items()}
    heads = {
        name: jnp.asarray(head[...]) for name, head in jm.open_checkpoint(folder / "heads.safetensors").params.items()
    }
    return Experts(config, graph, states.pop("base"), states, heads)


def from_torch(tensors: Mapping[str, Any]) -> dict[str, Array]:
    """Tensors under the names of this module's parameters: linear weights become kernels, which are transposed."""
    renamed = {}
    for name, tensor in tensors.items():
        value, path = jnp.asarray(np.asarray(tensor)), name.replace(".", "/")
        if re.search(r"(^|/)ln\w*/weight$", path):
            path = path.removesuffix("weight") + "scale"
        elif path.endswith("/weight"):
            path, value = path.removesuffix("weight") + "kernel", value.T
        renamed[path] = value
    return renamed


def filled(params: nnx.State, tensors: Mapping[str, Array]) -> nnx.State:
    """The parameters with values by name."""

    def value(path: Any, leaf: Any) -> Array:
        tensor = tensors[jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")]
        if tensor.shape != leaf.shape:
            raise ValueError(f"{path}: found shape {tensor.shape}, expected {leaf.shape}")
        return tensor

    return jax.tree_util.tree_map_with_path(value, params)


def accuracy(model: Experts, params: nnx.State, task: str, images: Any, labels: Any, batch: int = 500) -> float:
    """Share of right answers of one model on one task."""
    right = 0
    for at in range(0, len(labels), batch):
        scores = _scores(model.graph, params, model.heads[task], images[at : at + batch])
        right += int((np.asarray(scores).argmax(axis=1) == labels[at : at + batch]).sum())
    return right / len(labels)


def _scores_of(graph: nnx.GraphDef, params: nnx.State, head: Any, images: Any) -> Array:
    return nnx.merge(graph, params)(images) @ head.T


_scores = jax.jit(_scores_of, static_argnums=0)


def parity(folder: Path) -> float:
    """The largest difference of a feature from those recorded in `check.npz`, over the base and all experts."""
    model = load(folder)
    features = jax.jit(model.features)
    with np.load(folder / "check.npz") as check:
        images = check["images"]
        apart = [np.abs(features(model.base, images) - check["base_features"]).max()]
        for task, recorded in zip(TASKS, check["expert_features"], strict=True):
            apart.append(np.abs(features(model.experts[task], images) - recorded).max())
    return float(max(apart))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="base, experts, heads, config.json and check.npz")
    parser.add_argument("--images", type=Path, help="folder with TASK.npz (x_test, y_test): also prints accuracies")
    arguments = parser.parse_args()
    apart = parity(arguments.folder)
    print(f"largest difference from the recorded features: {apart:.1e}")
    if apart > 1e-4:
        raise SystemExit("this is another network than the one that was recorded; expected at most 1e-4")
    if arguments.images:
        model = load(arguments.folder)
        for task in TASKS:
            with np.load(arguments.images / f"{task}.npz") as data:
                images, labels = data["x_test"], data["y_test"]
            alone, zero = (accuracy(model, p, task, images, labels) for p in (model.experts[task], model.base))
            print(f"{task:12} base {zero:.4f}   expert {alone:.4f}")


if __name__ == "__main__":
    main()
