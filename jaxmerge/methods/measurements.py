"""What methods may measure: sums and order statistics, and how both are had in memory.

A measurement describes one chunk of a tensor. Both kinds add up over chunks, tensors and devices (an order statistic by
counting, see `selection`), so the same definition serves a tensor in memory, a sharded one, a whole model, and chunks
read from disk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxmerge.methods.selection import at_least, count_reaching, kth_largest

Scope = Literal["tensor", "model"]
"""Whether a measurement is taken over each tensor or over all tensors that the method merges."""


@dataclasses.dataclass(frozen=True)
class Total:
    """Numbers that add up over chunks: a pytree of arrays."""

    value: Any


@dataclasses.dataclass(frozen=True)
class OrderStatistic:
    """The `ranks[i][r]`-th largest of `values[i]`, for each expert i and rank r.

    Attributes:
        values: K arrays of non-negative numbers (or `selection.ordered_keys`) of one dtype, any shape.
        ranks: `[K, R, 2]` uint32, each rank from 1 as two words (`selection.rank_words`).
    """

    values: tuple[Any, ...]
    ranks: Any


Measurement = Total | OrderStatistic
for _kind in (Total, OrderStatistic):
    jax.tree_util.register_dataclass(_kind)


Count = Literal["kept", "dropped"]
"""Whether a share becomes a whole number of entries by rounding down those kept or those dropped."""


def kept_count(density: Any, size: int, *, inclusive: bool = False, count: Count = "kept") -> Any:
    """How many of `size` entries a density keeps: at least 1, at most all.

    Args:
        density: share of entries kept. A plain number gives `int(density * size)` in float64 and an exact integer; a
            traced one is computed in float32, rounded up where the product is an integer but for rounding.
        size: number of entries.
        inclusive: the entry at the cut is kept too: one more.
        count: whether the integer part is taken of the number kept or of the number dropped.
    """
    extra = 1 if inclusive else 0
    if isinstance(density, int | float | np.number):
        # 1 - 0.8 is a little less than 0.2
        dropped = int((1 - float(density)) * size + size * 2.0**-50)
        kept = int(float(density) * size) if count == "kept" else size - dropped
        return min(max(kept + extra, 1), size)
    density, entries = jax.lax.stop_gradient(density), float(size)  # large models have more entries than an int32 holds
    nudge = entries * 2.0**-22
    exact = density * entries
    kept = jnp.floor(exact + density * nudge) if count == "kept" else entries - jnp.floor(entries - exact + nudge)
    return jnp.clip(kept + extra, 1.0, entries)


def measured_here(measurement: Measurement) -> Any:
    """The result of a measurement whose one chunk is everything, inside a program: `[K, R]` for an order statistic."""
    if isinstance(measurement, Total):
        return measurement.value
    return jnp.stack([kth_largest([x], rank) for x, rank in zip(measurement.values, measurement.ranks, strict=True)])


@dataclasses.dataclass(frozen=True)
class BitSearch:
    """The state of finding order statistics by counting, two bits of the answers per round.

    Used where the population is spread over many programs, as a whole model is: every program counts what it holds, and
    `next_round` adds the counts and fixes two bits.

    Attributes:
        ranks: as in `OrderStatistic`.
        found: `[K, R]` bit patterns, right down to the bits being decided.
        shift: position of the lower of those two bits.
    """

    ranks: Any
    found: Any
    shift: Any

    def count(self, values: Sequence[Array]) -> UInt32[Array, "K R 3 2"]:
        """How many entries reach the patterns with 1, 2 and 3 in place of the bits being decided (`count_reaching`)."""
        rows = []
        for value, found in zip(values, self.found, strict=True):
            patterns = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(value), found.dtype)
            digits = jnp.arange(1, 4, dtype=found.dtype) << self.shift
            thresholds = (found[:, None] + digits[None, :]).reshape(-1)
            counts = count_reaching(patterns, [thresholds[i] for i in range(thresholds.size)])
            rows.append(counts.reshape(found.size, 3, 2))
        return jnp.stack(rows)


jax.tree_util.register_dataclass(BitSearch)


@functools.partial(jax.jit, static_argnames="dtype")
def begin_search(ranks: UInt32[Array, "K R 2"], dtype: Any) -> BitSearch:
    """A search among numbers of this dtype; it takes `search_rounds(dtype)` rounds."""
    word = jnp.uint64 if dtype == jnp.float64 else jnp.uint32
    return BitSearch(ranks, jnp.zeros(ranks.shape[:2], word), jnp.asarray(jnp.dtype(dtype).itemsize * 8 - 2, word))


def search_rounds(dtype: Any) -> int:
    """Number of rounds: one for every two bits."""
    return jnp.dtype(dtype).itemsize * 4


@jax.jit
def next_round(search: BitSearch, counts: Sequence[UInt32[Array, "K R 3 2"]]) -> BitSearch:
    """The search with two more bits fixed, given the counts of every program."""
    reached = at_least(sum(counts[1:], counts[0]), search.ranks[:, :, None, :])
    digit = jnp.sum(reached, axis=-1, dtype=search.found.dtype)
    return BitSearch(search.ranks, search.found + (digit << search.shift), search.shift - jnp.asarray(2, digit.dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def search_result(search: BitSearch, dtype: Any) -> Float[Array, "K R"]:
    """The order statistics."""
    return jax.lax.bitcast_convert_type(search.found, dtype)
