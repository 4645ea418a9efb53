"""The vision transformer of `google/vit-…` as a plain Flax NNX module.

Its parameters have the names and axes that `jm.naming("vit")` gives to Hugging Face checkpoints. Images are
(batch, height, width, channel), as everywhere in Flax; in PyTorch the channel comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Config = Mapping[str, Any]
"""The contents of config.json."""


def _linear(config: Config, rngs: nnx.Rngs, inner: str = "hidden_size", outer: str = "hidden_size") -> nnx.Linear:
    return nnx.Linear(config[inner], config[outer], rngs=rngs)


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config["hidden_size"], epsilon=config["layer_norm_eps"], rngs=rngs)


class Dense(nnx.Module):
    """A linear layer under the name `dense`."""

    def __init__(self, linear: nnx.Linear):
        self.dense = linear

    def __call__(self, x: Array) -> Array:
        return self.dense(x)


class SelfAttention(nnx.Module):
    """Attention of all patches to all patches, without the output projection."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.heads = config["num_attention_heads"]
        self.query, self.key, self.value = (_linear(config, rngs) for _ in range(3))

    def __call__(self, x: Float[Array, "batch n dim"]) -> Float[Array, "batch n dim"]:
        heads = (*x.shape[:2], self.heads, -1)
        query, key, value = (layer(x).reshape(heads) for layer in (self.query, self.key, self.value))
        return jax.nn.dot_product_attention(query, key, value).reshape(x.shape)


class Attention(nnx.Module):
    """Attention with its output projection."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention = SelfAttention(config, rngs)
        self.output = Dense(_linear(config, rngs))

    def __call__(self, x: Float[Array, "batch n dim"]) -> Float[Array, "batch n dim"]:
        return self.output(self.attention(x))


class Layer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.intermediate = Dense(_linear(config, rngs, outer="intermediate_size"))
        self.output = Dense(_linear(config, rngs, inner="intermediate_size"))
        self.layernorm_before, self.layernorm_after = _norm(config, rngs), _norm(config, rngs)
        self.activation = partial(jax.nn.gelu, approximate=False)

    def __call__(self, x: Float[Array, "batch n dim"]) -> Float[Array, "batch n dim"]:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(self.activation(self.intermediate(self.layernorm_after(x))))


class PatchEmbeddings(nnx.Module):
    """Patches of an image, row by row."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        size = (config["patch_size"],) * 2
        self.projection = nnx.Conv(
            config.get("num_channels", 3), config["hidden_size"], size, strides=size, padding="VALID", rngs=rngs
        )

    def __call__(self, images: Float[Array, "batch height width channel"]) -> Float[Array, "batch n dim"]:
        x = self.projection(images)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Embeddings(nnx.Module):
    """The class token, then the patches, each with its position."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        patches = (config["image_size"] // config["patch_size"]) ** 2
        self.cls_token = nnx.Param(jnp.zeros((1, 1, config["hidden_size"])))
        self.position_embeddings = nnx.Param(jnp.zeros((1, patches + 1, config["hidden_size"])))
        self.patch_embeddings = PatchEmbeddings(config, rngs)

    def __call__(self, images: Float[Array, "batch height width channel"]) -> Float[Array, "batch n dim"]:
        x = self.patch_embeddings(images)
        first = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, x.shape[-1]))
        return jnp.concatenate([first, x], axis=1) + self.position_embeddings[...]


class Encoder(nnx.Module):
    """The layers."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.layer = nnx.List([Layer(config, rngs) for _ in range(config["num_hidden_layers"])])

    def __call__(self, x: Float[Array, "batch n dim"]) -> Float[Array, "batch n dim"]:
        for layer in self.layer:
            x = layer(x)
        return x


class Backbone(nnx.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs)
        self.encoder = Encoder(config, rngs)
        self.layernorm = _norm(config, rngs)

    def __call__(self, images: Float[Array, "batch height width channel"]) -> Float[Array, "batch n dim"]:
        return self.layernorm(self.encoder(self.embeddings(images)))


class VisionTransformer(nnx.Module):
    """A classifier of images: a linear layer on the class token."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.vit = Backbone(config, rngs)
        self.classifier = nnx.Linear(config["hidden_size"], len(config["id2label"]), rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width channel"]) -> Float[Array, "batch label"]:
        return self.classifier(self.vit(images)[:, 0])
