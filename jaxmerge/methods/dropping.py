"""Random dropping of task-vector entries: DARE (arXiv 2311.03099) and DELLA (arXiv 2406.11617).

Whether an entry survives is a hash of (key, expert name, tensor name, position of the entry): a mask depends on neither
chunking nor sharding nor the order of experts, and costs far less than a stateful generator. The hash is two rounds of
a 32-bit finaliser over the position, mixed with 64 bits of seed: good enough for masks, not for cryptography.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Coefficient, check_range, coefficient, is_plain_number, per_expert
from jaxmerge.methods.method import pytree, static
from jaxmerge.methods.selection import ranks_along_last
from jaxmerge.methods.sharding import on_whole
from jaxmerge.methods.stages import Chain, Stage, TaskVectors, chain
from jaxmerge.methods.task_arithmetic import Scale, total, weigh
from jaxmerge.methods.ties import disjoint_mean, disjoint_sum, elect_sign, rescale, trim
from jaxmerge.trees.info import TensorInfo

Restore = Literal["density", "l1"] | None


@pytree
class Drop(Stage):
    """See `drop`."""

    density: Any
    restore: bool = static(default=True)

    draws = True

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Drop:
        return dataclasses.replace(self, density=per_expert(self.density, info, experts, "densities"))

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        deltas = []
        for i, (delta, density) in enumerate(zip(vectors.deltas, self.density, strict=True)):
            kept = jnp.where(keep_mask(info.seeds[i], delta.shape, info, density), delta, 0)
            deltas.append(kept / density if self.restore else kept)
        return vectors.replace(deltas=tuple(deltas))


@pytree
class Magprune(Stage):
    """See `magprune`."""

    density: Any
    epsilon: Any
    restore: bool = static(default=True)
    axis: Literal["input", "tensor"] | int = static(default="input")

    draws = True
    whole_tensor = True
    in_one_place = True

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Magprune:
        densities = per_expert(self.density, info, experts, "densities")
        epsilons = per_expert(self.epsilon, info, experts, "epsilons")
        for density, epsilon in zip(densities, epsilons, strict=True):
            known = is_plain_number(density) and is_plain_number(epsilon)
            if known and density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                raise RecipeError(
                    f"density {density} with epsilon {epsilon} gives keep probabilities outside (0, 1); "
                    f"choose epsilon below {min(density, 1 - density):g}"
                )
        return dataclasses.replace(self, density=densities, epsilon=epsilons)

    def keep_probability(self, delta: Float[Array, "..."], expert: int, info: TensorInfo) -> Float[Array, "..."]:
        """The probability that each entry of one expert's task vector survives."""
        density, epsilon = self.density[expert], self.epsilon[expert]
        axes = _fibre_axes(delta.ndim, self.axis, info)
        length = math.prod(delta.shape[a] for a in axes)
        ranks = on_whole(functools.partial(_magnitude_ranks, axes=axes), delta)
        share = ranks / (length - 1) if length > 1 else 0.5
        probability = density - epsilon + 2 * epsilon * share + jnp.zeros_like(delta)
        return jnp.where(jnp.asarray(density) >= 1, jnp.ones_like(delta), probability)

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        deltas = []
        for i, delta in enumerate(vectors.deltas):
            probability = self.keep_probability(delta, i, info)
            kept = jnp.where(keep_mask(info.seeds[i], delta.shape, info, probability), delta, 0)
            deltas.append(kept / probability if self.restore else kept)
        return vectors.replace(deltas=tuple(deltas))


def keep_mask(seed: UInt32[Array, 2], shape: tuple[int, ...], info: TensorInfo, density: Any) -> Bool[Array, "..."]:
    """Independent draws that are true with probability `density`, fixed by the seed and each entry's position.

    Args:
        seed: two words.
        shape: shape of the chunk: one axis for a flattened run, or the tensor's number of axes for a box of it.
        info: gives the tensor's shape and the flat position of the chunk's first entry.
        density: probability, one number or one per entry; 1 keeps everything. Its resolution is 2^-24.
    """
    uniform = (random_words(seed, shape, info) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
    return uniform < jnp.asarray(density, jnp.float32)


def random_words(seed: UInt32[Array, "2"], shape: tuple[int, ...], info: TensorInfo) -> UInt32[Array, "..."]:
    """32 random bits for each entry of a chunk, fixed by the seed and the entry's position.

    Args:
        seed: two words.
        shape: shape of the chunk, as for `keep_mask`.
        info: gives the tensor's shape and the flat position of the chunk's first entry.
    """
    low, high = positions(shape, info)
    return _mix(_mix(low ^ seed[0]) + seed[1] + high * jnp.uint32(0x9E3779B9))


def positions(shape: tuple[int, ...], info: TensorInfo) -> tuple[Any, Any]:
    """Flat positions of a chunk's entries as low and high words, without reshaping (a sharded array keeps its axes)."""
    offset = jnp.asarray(info.offset, jnp.uint32)
    start_high, start_low = jnp.unstack(offset) if offset.ndim else (jnp.uint32(0), offset)
    low, high = jnp.broadcast_to(start_low, shape), jnp.broadcast_to(start_high, shape)
    within = info.shape if len(shape) == len(info.shape) else shape
    stride = 1
    for axis in reversed(range(len(shape))):
        # One axis at a time, with a carry, since a position can need more than 32 bits.
        step_high, step_low = _wide_product(jax.lax.broadcasted_iota(jnp.uint32, shape, axis), stride)
        low = low + step_low
        high = high + step_high + (low < step_low).astype(jnp.uint32)
        stride *= within[axis]
    return low, high


def _wide_product(index: Any, stride: int) -> tuple[Any, Any]:
    """`index * stride` as high and low words; both fit 32 bits, or the axis has one entry and the product is zero."""
    stride_high, stride_low = stride >> 32, stride & 0xFFFFFFFF
    a, b = index & 0xFFFF, index >> 16
    c, d = jnp.uint32(stride_low & 0xFFFF), jnp.uint32(stride_low >> 16)
    middle = (a * c >> 16) + (a * d & 0xFFFF) + (b * c & 0xFFFF)
    low = index * jnp.uint32(stride_low)
    high = (a * d >> 16) + (b * c >> 16) + b * d + (middle >> 16) + index * jnp.uint32(stride_high)
    return high, low


def _mix(x: Any) -> Any:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _fibre_axes(ndim: int, axis: Literal["input", "tensor"] | int, info: TensorInfo) -> tuple[int, ...]:
    """The axes of a fibre: the group of entries that are ranked among each other."""
    if isinstance(axis, int) and ndim > 1:
        return (axis % ndim,)
    return info.input_axes if axis == "input" and info.input_axes else tuple(range(ndim))


def _magnitude_ranks(delta: Array, axes: tuple[int, ...]) -> Array:
    """Rank of each entry's magnitude (0 the smallest) within its fibre."""
    order = (*(a for a in range(delta.ndim) if a not in axes), *axes)
    moved = jnp.abs(delta).transpose(order)
    fibres = moved.reshape(*moved.shape[: delta.ndim - len(axes)], math.prod(delta.shape[a] for a in axes))
    ranks = ranks_along_last(fibres).astype(delta.dtype)
    return ranks.reshape(moved.shape).transpose(tuple(order.index(a) for a in range(delta.ndim)))


def drop(density: Coefficient, *, restore: bool = True) -> Stage:
    r"""Stage: keeps each entry with probability `density` and divides the survivors by it.

    Args:
        density: probability to keep, $1 - p$ of the paper, in (0, 1]; one for all or one per expert. 1 keeps
            everything.
        restore: divide by `density`, which makes every entry right on average.

    Source: arXiv 2311.03099, equations 2 to 4. mergekit restores the tensor's L1 norm instead: `drop(d, restore=False)`
    followed by `rescale()`.
    """
    check_range("density", density, 0.0, 1.0, open_low=True)
    return Drop(coefficient(density), restore)


def magprune(
    density: Coefficient,
    *,
    epsilon: Coefficient = 0.07,
    restore: bool = True,
    axis: Literal["input", "tensor"] | int = "input",
) -> Stage:
    r"""Stage: keeps entries with probabilities that grow with the rank of their magnitude.

    With rank $r$ from 0 (smallest) to $n - 1$ within a fibre, $p = d - \epsilon + 2 \epsilon r / (n - 1)$. Equal
    magnitudes are ranked by position; a fibre of one entry has $p = d$.

    Args:
        density: $d$, the mean probability to keep, in (0, 1].
        epsilon: $\epsilon$, half the published code's window; $d \pm \epsilon$ must lie inside (0, 1). Unused where d
            is 1.
        restore: divide survivors by their probability (published code); mergekit restores the L1 norm instead
            (`restore=False`, then `rescale()`).
        axis: ranks run over a tensor's `"input"` axes for each output, over the whole `"tensor"`, or along one axis by
            number (the published code and mergekit: axis 1 whatever the tensor). Vectors are one fibre.

    Source: arXiv 2406.11617, §3.1.
    """
    check_range("density", density, 0.0, 1.0, open_low=True)
    check_range("epsilon", epsilon, 0.0, 0.5)
    return Magprune(coefficient(density), coefficient(epsilon), restore, axis)


def dare(
    density: Coefficient = 0.5,
    *,
    scale: Coefficient = 1.0,
    weights: Coefficient = None,
    normalize: bool = False,
    restore: Restore = "density",
) -> Chain:
    r"""DARE, then task arithmetic (`dare_linear` elsewhere).

    With random masks $m_i$: $\theta = \theta_0 + \lambda \sum_i w_i\, m_i \odot \tau_i / d$.

    Args:
        density: probability $d$ to keep an entry, in (0, 1].
        scale: $\lambda$.
        weights: $w_i$, one per expert; 1 each by default.
        normalize: divide by the sum of the weights.
        restore: what makes up for the dropped entries: `"density"` divides by $d$ (paper), `"l1"` restores each
            tensor's L1 norm (mergekit), None nothing.

    Needs `key=` when merging. Source: arXiv 2311.03099.
    """
    return chain(*_dropped(density, restore), weigh(weights), total(normalize=normalize), Scale(coefficient(scale)))


def dare_ties(
    density: Coefficient = 0.5,
    *,
    scale: Coefficient = 1.0,
    weights: Coefficient = None,
    normalize: bool = True,
    restore: Restore = "density",
    trim_density: Coefficient = None,
) -> Chain:
    """DARE, then TIES' election and disjoint mean.

    Args:
        density: probability to keep an entry, in (0, 1].
        scale: factor on the merged task vector.
        weights: one per expert; 1 each by default.
        normalize: divide by the agreeing weights; otherwise sum.
        restore: as for `dare`.
        trim_density: also trim what is left, over the whole model (FusionBench: 0.2); None does not (mergekit, PEFT).

    Needs `key=` when merging. Source: arXiv 2311.03099 with arXiv 2306.01708.
    """
    trimmed = [] if trim_density is None else [trim(trim_density)]
    return chain(*_dropped(density, restore), *trimmed, weigh(weights), *_consensus(normalize, scale))


def della(
    density: Coefficient = 0.5,
    *,
    epsilon: Coefficient = 0.07,
    scale: Coefficient = 1.0,
    weights: Coefficient = None,
    normalize: bool = True,
    restore: Restore = "density",
    axis: Literal["input", "tensor"] | int = "input",
) -> Chain:
    r"""DELLA: drop by magnitude rank (MagPrune), then elect signs and average those that agree.

    Args:
        density: mean probability to keep an entry, in (0, 1].
        epsilon: half the spread of the probabilities; the published example uses 0.07.
        scale: $\lambda$; the published example uses 1.1.
        weights: one per expert; 1 each by default.
        normalize: divide by the agreeing weights; otherwise sum.
        restore: `"density"` divides by each entry's probability (published code), `"l1"` restores the L1 norm
            (mergekit).
        axis: what ranks run over, see `magprune`.

    Needs `key=` when merging. Source: arXiv 2406.11617.
    """
    return chain(*_pruned(density, epsilon, restore, axis), weigh(weights), *_consensus(normalize, scale))


def della_linear(
    density: Coefficient = 0.5,
    *,
    epsilon: Coefficient = 0.07,
    scale: Coefficient = 1.0,
    weights: Coefficient = None,
    normalize: bool = False,
    restore: Restore = "density",
    axis: Literal["input", "tensor"] | int = "input",
) -> Chain:
    """DELLA's dropping, then task arithmetic (mergekit's `della_linear`); arguments as for `della`."""
    pruned = _pruned(density, epsilon, restore, axis)
    return chain(*pruned, weigh(weights), total(normalize=normalize), Scale(coefficient(scale)))


def _dropped(density: Coefficient, restore: Restore) -> list[Stage]:
    return [drop(density, restore=restore == "density"), *([rescale()] if restore == "l1" else [])]


def _pruned(density: Coefficient, epsilon: Coefficient, restore: Restore, axis: Any) -> list[Stage]:
    stage = magprune(density, epsilon=epsilon, restore=restore == "density", axis=axis)
    return [stage, *([rescale()] if restore == "l1" else [])]


def _consensus(normalize: bool, scale: Coefficient) -> list[Stage]:
    return [elect_sign(), disjoint_mean() if normalize else disjoint_sum(), Scale(coefficient(scale))]
