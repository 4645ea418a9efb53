"""A small vision transformer in Flax NNX, with classification by fixed class embeddings.

The backbone maps an image to a unit vector, and a class is scored by the cosine with its embedding, as in CLIP. The
embeddings belong to a task, are never trained and never merged: experts differ in the backbone alone, and one merged
backbone answers under every task's embeddings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

if TYPE_CHECKING:
    from jaxtyping import Array, Float

IMAGE, PATCH, EMBED = 8, 2, 32
"""Width of an image and of a patch in pixels, and length of the vector that an image becomes."""


class Attention(nnx.Module):
    """Self-attention over the patches, with separate query, key, value and output projections."""

    def __init__(self, dim: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.query = nnx.Linear(dim, dim, rngs=rngs)
        self.key = nnx.Linear(dim, dim, rngs=rngs)
        self.value = nnx.Linear(dim, dim, rngs=rngs)
        self.out = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "batch patches dim"]) -> Float[Array, "batch patches dim"]:
        per_head = (*x.shape[:2], self.heads, -1)
        query, key, value = (layer(x).reshape(per_head) for layer in (self.query, self.key, self.value))
        return self.out(jax.nn.dot_product_attention(query, key, value).reshape(x.shape))


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, rngs: nnx.Rngs):
        self.attn_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.attn = Attention(dim, heads, rngs)
        self.mlp_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.mlp_in = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "batch patches dim"]) -> Float[Array, "batch patches dim"]:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(x))))


class VisionTransformer(nnx.Module):
    """Patches, learned positions, transformer blocks, mean over the patches, projection to a unit vector."""

    def __init__(self, rngs: nnx.Rngs, dim: int = 96, depth: int = 3, heads: int = 4):
        patches = (IMAGE // PATCH) ** 2
        self.patch_embed = nnx.Linear(PATCH * PATCH, dim, rngs=rngs)
        self.pos_embed = nnx.Param(0.5 * jax.random.normal(rngs.params(), (patches, dim)))
        self.blocks = nnx.List([Block(dim, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.proj = nnx.Linear(dim, EMBED, use_bias=False, rngs=rngs)

    def __call__(self, images: Float[Array, "batch 8 8"]) -> Float[Array, "batch embed"]:
        side = IMAGE // PATCH
        patches = (2 * images - 1).reshape(-1, side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4)
        x = self.patch_embed(patches.reshape(-1, side * side, PATCH * PATCH)) + self.pos_embed[None]
        for block in self.blocks:
            x = block(x)
        features = self.proj(self.norm(x.mean(axis=1)))
        return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
