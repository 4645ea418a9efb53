"""Concrete masks (arXiv 2312.06173): one soft mask that all experts share, with a logit to be learned for every entry.

This is the masking given the logits. `jm.learn_concrete` and `jm.learn_dam` learn them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, UInt32

from jaxmerge.errors import NonFiniteError, ShapeError, StructureError
from jaxmerge.methods.coefficients import Coefficient, at_tensor, check_range, coefficient
from jaxmerge.methods.dropping import random_words
from jaxmerge.methods.method import pytree
from jaxmerge.methods.stages import Stage, TaskVectors
from jaxmerge.methods.task_arithmetic import nonzero
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import Params, named_leaves


@pytree
class ConcreteMask(Stage):
    """See `concrete_mask`."""

    logits: Any
    temperature: Any = 0.5
    seed: Any = None

    whole_tensor = True
    """The logits of a tensor are there as a whole, and so is the mean of its mask."""

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> ConcreteMask:
        return dataclasses.replace(
            self,
            logits=_of_tensor(self.logits, info),
            temperature=at_tensor(self.temperature, info),
            seed=None if self.seed is None else self.seed ^ _words(_place(info)),
        )

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        logits = self.logits.astype(vectors.weights.dtype)
        uniform = None if self.seed is None else uniform_draws(self.seed, logits.shape, info).astype(logits.dtype)
        mask = soft_mask(logits, self.temperature, uniform)
        mask = mask / nonzero(jnp.mean(mask))
        if vectors.merged is not None:
            return vectors.replace(merged=mask * vectors.merged)
        return vectors.replace(deltas=tuple(mask * delta for delta in vectors.deltas))

    def __repr__(self) -> str:
        temperature = f", temperature={self.temperature!r}" if self.temperature != 0.5 else ""
        sampled = "" if self.seed is None else ", sampled"
        count = len(self.logits) if isinstance(self.logits, dict) else 1
        return f"concrete_mask({count} tensors{temperature}{sampled})"


def soft_mask(
    logits: Float[Array, "*shape"], temperature: Any, uniform: Float[Array, "*shape"] | None = None
) -> Float[Array, "*shape"]:
    r"""The mask $\sigma((\operatorname{logit} u + z) / T)$, not rescaled; $u = 1/2$ where no draws are given."""
    noise = 0 if uniform is None else jnp.log(uniform) - jnp.log1p(-uniform)
    return jax.nn.sigmoid((noise + logits) / temperature)


def uniform_draws(seed: UInt32[Array, "2"], shape: tuple[int, ...], info: TensorInfo) -> Float[Array, "..."]:
    """Independent draws from the open interval (0, 1), fixed by the seed and each entry's position."""
    # 23 bits and a half: with 24 the largest would round to 1.
    return ((random_words(seed, shape, info) >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)


def concrete_mask(logits: Params, *, temperature: Coefficient = 0.5, seed: int | None = None) -> Stage:
    r"""Stage: multiplies task vectors, or the merged one, by a soft mask that all experts share.

    $m = \sigma((\operatorname{logit} u + z) / T)$ for every entry, divided by its mean over the tensor.

    Args:
        logits: $z$, a tree like the parameters, in memory or opened from a checkpoint.
        temperature: $T$; small ones make masks of zeros and ones.
        seed: draws $u$ uniformly, keyed by tensor name and position, as the published code does to evaluate too.
            None takes $u = 1/2$, the median of the masks, so that nothing is random.

    Equal logits without a seed change nothing. A mask that is zero everywhere stays so. Source: Concrete subspace
    learning, arXiv 2312.06173.

    Raises:
        StructureError: a leaf is no array; or a tensor has no logits (when merging).
        ShapeError, NonFiniteError: logits of another shape, or NaN (when merging).
    """
    check_range("temperature", coefficient(temperature), 0.0, float("inf"), open_low=True)
    leaves = named_leaves(logits)
    for name, leaf in leaves.items():
        if not hasattr(leaf, "shape"):
            raise StructureError(
                f"the logits of tensor {name!r}: found {type(leaf).__name__}, expected an array; files are opened with "
                "jm.open_checkpoint(path).params"
            )
    return ConcreteMask(leaves, coefficient(temperature), None if seed is None else _words(str(seed)))


def _of_tensor(logits: dict[str, Any], info: TensorInfo) -> Any:
    """The logits of a tensor, or of one layer of a tensor that is layer-stacked; lazy ones are read."""
    if info.name not in logits:
        raise StructureError(
            f"there are no logits for tensor {info.name!r}; learn them with the parameters that are merged, rename "
            "them (jm.renamed), or mask other tensors only (jm.masked)"
        )
    leaf = logits[info.name]
    stacked = info.layer is not None and tuple(leaf.shape) == (info.num_layers, *info.shape)
    if not stacked and tuple(leaf.shape) != info.shape:
        raise ShapeError(
            f"the logits of tensor {info.name!r}: found shape {tuple(leaf.shape)}, expected {info.shape}; learn them "
            "with the parameters that are merged"
        )
    value = leaf[info.layer] if stacked else np.asarray(leaf) if isinstance(leaf, LazyTensor) else leaf
    if not isinstance(value, Tracer) and np.isnan(np.asarray(value)).any():
        raise NonFiniteError(f"the logits of tensor {info.name!r}: found NaN, expected numbers; learn them anew")
    return value


def _place(info: TensorInfo) -> str:
    return info.name if info.layer is None else f"{info.name}/{info.layer}"


def _words(name: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], "<u4")
