"""Exact order statistics: the k-th largest of many non-negative floats, in memory and streamed.

The invariant: both ways give the same float, bit for bit, and it is the one that a full sort gives. Both rest on one
fact: the bit patterns of non-negative floats, read as unsigned integers, are ordered as the floats are. Finding the
k-th largest is then finding the largest pattern that at least k entries reach, and counting adds up over tensors,
shards and chunks where sorting does not. Ties need no rule (they have one pattern), NaN counts as larger than
infinity, and the ends are defined: rank 0 gives infinity (`>=` keeps none that is finite), a rank beyond the
population gives 0 (`>=` keeps all). Numbers of either sign are searched by their `ordered_keys`.

* `kth_largest` (in memory, pure JAX) fixes two bits of the answer per pass. A pass counts three thresholds in one
  variadic reduction: three separate sums would read the values three times on XLA:CPU, and one threshold per pass
  needs twice as many passes. Sharded values stay where they are: only counts travel.
* `OrderStatisticSearch` (streamed, NumPy on host memory) counts what lies above a window of patterns and keeps what
  lies inside. A small sample places the window, so that one pass nearly always ends the search; a sample that
  misleads costs passes, never exactness.

`ranks_along_last` ranks all entries of a fibre, for methods that need more than a few order statistics.

Milliseconds for the 20 % cut of 16.8 M float32 magnitudes (medians of one run of `python benchmarks/selection.py` on
two cores that other work shared, so the ratios count; "bfloat16" are differences of bfloat16 numbers, full of ties):

    way                                          normal   bfloat16
    jnp.sort                                       5940       4130
    lax.top_k                                      5600       2600
    bisection, one bit a pass                       371        151
    kth_largest                                     106         63
    np.bincount, two passes                          78         64
    np.partition (whole array in memory, a copy)     23         22
    OrderStatisticSearch, without a sample          112         61
    OrderStatisticSearch                             24         14
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, Shaped, UInt

_COUNTABLE = 1 << 32  # one uint32 counter counts fewer entries than this


def rank_words(rank: int | float | Num[np.ndarray, "*ranks"] | Num[Array, "*ranks"]) -> UInt[Any, "*ranks 2"]:
    """Ranks as their high and low 32 bits: exact for large populations too, without 64-bit integers in JAX.

    Args:
        rank: concrete or traced, an integer or a float (rounded down; the way to trace a rank above 2^32). Negative
            ranks count as 0.

    Returns:
        uint32 words, as a NumPy array when `rank` is concrete.
    """
    xp: Any = jnp if isinstance(rank, jax.Array) else np
    ranks = xp.maximum(xp.asarray(rank), 0)
    if not xp.issubdtype(ranks.dtype, xp.integer):
        high = xp.floor(ranks / 2.0**32)
        low = ranks - high * 2.0**32
    elif ranks.dtype.itemsize > 4:
        high, low = ranks >> 32, ranks & 0xFFFFFFFF
    else:
        high, low = xp.zeros_like(ranks), ranks
    return xp.stack([high.astype(np.uint32), low.astype(np.uint32)], axis=-1)


def ordered_keys(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Floats whose bit patterns, read as unsigned integers, are ordered as `values`, of either sign, are.

    So order statistics of signed numbers are had from their keys. Numbers too small to be normal count as zero, which
    leaves no NaN among the keys of finite numbers. `from_ordered_keys` is the inverse.
    """
    values = jnp.where(jnp.abs(values) < jnp.finfo(values.dtype).tiny, 0, values)
    patterns, sign_bit = _patterns_and_sign_bit(values)
    keys = jnp.where(patterns >= sign_bit, ~patterns, patterns | sign_bit)
    return lax.bitcast_convert_type(keys, values.dtype)


def from_ordered_keys(keys: Float[Array, "..."]) -> Float[Array, "..."]:
    """The numbers that have these `ordered_keys`."""
    patterns, sign_bit = _patterns_and_sign_bit(keys)
    values = jnp.where(patterns >= sign_bit, patterns ^ sign_bit, ~patterns)
    return lax.bitcast_convert_type(values, keys.dtype)


def _patterns_and_sign_bit(values: Any) -> tuple[Any, Any]:
    unsigned = jnp.dtype(f"uint{8 * values.dtype.itemsize}").type
    return lax.bitcast_convert_type(lax.stop_gradient(values), unsigned), unsigned(1 << (8 * values.dtype.itemsize - 1))


def kth_largest(values: Sequence[Float[Array, "..."]], ranks: UInt[Any, "*ranks 2"]) -> Float[Array, "*ranks"]:
    """The entries of given rank among all `values` together, exactly.

    Works under `jit`, `vmap` and `grad` (the gradient is zero) and on sharded arrays, whose entries are not moved.

    Args:
        values: arrays of any shapes and one floating dtype that count as one population; no entry has its sign bit
            set, unless they are `ordered_keys`. An array of 2^32 entries or more must have at most 2^16 rows (first
            axis), of fewer entries than that.
        ranks: from 1 for the largest, as `rank_words`.

    Returns:
        One entry per rank, in the dtype of the values; infinity for rank 0, 0 for a rank beyond the population.
    """
    return _kth_largest([lax.stop_gradient(value) for value in values], jnp.asarray(ranks))


@jax.jit
def _kth_largest(values: list[Float[Array, "..."]], ranks: UInt[Array, "*ranks 2"]) -> Float[Array, "*ranks"]:
    if ranks.ndim > 1:
        return jax.vmap(_kth_largest, (None, 0))(values, ranks)
    bits = values[0].dtype.itemsize * 8
    unsigned = jnp.dtype(f"uint{bits}").type
    patterns = [lax.bitcast_convert_type(value, unsigned) for value in values]

    def fix_two_bits(step: Int[Array, ""], answer: UInt[Array, ""]) -> UInt[Array, ""]:
        shift = unsigned(bits - 2) - unsigned(2) * step.astype(unsigned)
        reached = _reached(patterns, [answer + (unsigned(digit) << shift) for digit in (1, 2, 3)], ranks)
        return answer + (sum(reach.astype(unsigned) for reach in reached) << shift)

    answer = lax.fori_loop(0, bits // 2, fix_two_bits, jnp.zeros((), unsigned))
    largest = lax.bitcast_convert_type(answer, values[0].dtype)
    return jnp.where(jnp.any(ranks), largest, jnp.inf)


def _reached(
    patterns: list[UInt[Array, "..."]], thresholds: list[UInt[Array, ""]], rank: UInt[Array, " 2"]
) -> list[Bool[Array, ""]]:
    """Whether at least `rank` (as words) entries reach each threshold, in one pass over the patterns."""
    counts = [count_reaching(pattern, thresholds) for pattern in patterns]
    reached = at_least(sum(counts[1:], counts[0]), rank)
    return [reached[i] for i in range(len(thresholds))]


def count_reaching(patterns: UInt[Array, "..."], thresholds: Sequence[UInt[Array, ""]]) -> UInt[Array, "T 2"]:
    """How many patterns reach each threshold, in one pass over them.

    Returns:
        uint32 digits of base 2^16, high and low: sums over 2^16 arrays stay below 2^32.
    """
    zero = jnp.zeros((), jnp.uint32)
    kept_axes = 1 if patterns.size >= _COUNTABLE else 0
    counts = lax.reduce(
        tuple((patterns >= threshold).astype(jnp.uint32) for threshold in thresholds),
        (zero,) * len(thresholds),
        lambda left, right: tuple(a + b for a, b in zip(left, right, strict=True)),
        tuple(range(kept_axes, patterns.ndim)),
    )
    digits = [[jnp.sum(count >> 16, dtype=jnp.uint32), jnp.sum(count & 0xFFFF, dtype=jnp.uint32)] for count in counts]
    return jnp.stack([jnp.stack([high + (low >> 16), low & 0xFFFF]) for high, low in digits])


def at_least(counts: UInt[Array, "*counts 2"], ranks: UInt[Array, "*ranks 2"]) -> Bool[Array, "*both"]:
    """Whether counts (sums of `count_reaching`) reach ranks (as words); shapes are broadcast."""
    high, low = counts[..., 0] + (counts[..., 1] >> 16), counts[..., 1] & 0xFFFF
    rank_high, rank_low = ranks[..., 0] << 16 | ranks[..., 1] >> 16, ranks[..., 1] & 0xFFFF
    return (high > rank_high) | ((high == rank_high) & (low >= rank_low))


def ranks_along_last(values: Float[Array, "*fibres n"]) -> UInt[Array, "*fibres n"]:
    """The rank of each entry within its fibre along the last axis: 0 for the smallest, equal ones by position.

    As `argsort(argsort(values))`, in a fifth of its time on XLA:CPU, which sorts plain integers several times faster
    than anything that carries a second operand. So each key holds as many bits of the value as fit beside a position,
    and there is one sort for each such digit, the lowest first: two for fibres of up to 2^16 float32 entries.

    Args:
        values: no entry has its sign bit set.
    """
    bits = values.dtype.itemsize * 8
    unsigned = jnp.dtype(f"uint{bits}").type
    for_position = max((values.shape[-1] - 1).bit_length(), 1)
    width = bits - for_position
    patterns = lax.bitcast_convert_type(lax.stop_gradient(values), unsigned)
    position = lax.broadcasted_iota(unsigned, values.shape, values.ndim - 1)
    order = None
    for shift in range(0, bits - 1, width):
        digit = patterns >> unsigned(shift) & unsigned((1 << width) - 1)
        if order is not None:
            digit = jnp.take_along_axis(digit, order, -1, mode="promise_in_bounds")
        found = lax.sort(digit << unsigned(for_position) | position) & unsigned((1 << for_position) - 1)
        order = found if order is None else jnp.take_along_axis(order, found, -1, mode="promise_in_bounds")
    assert order is not None
    return jnp.put_along_axis(order, order, position, -1, inplace=False, mode="promise_in_bounds")


_BLOCK = 1 << 17  # entries scanned at a time: the temporaries stay in the cache
_HELD = 1 << 18  # entries held before equal ones are counted together; bounds the memory of a search
_SPREAD = 5.0  # standard errors of the sample to either side of the window


class OrderStatisticSearch:
    """The exact `rank`-th largest of a population that is fed in chunks, in bounded memory.

    A search holds at most some 3 MB, and 30 MB for a moment while it counts equal entries.

    ```python
    search = OrderStatisticSearch(rank=k, total=n)
    search.sample(pieces)                 # optional: a few pieces spread over the population
    while not search.done:
        for chunk in chunks:              # any order and sizes, all of the population in each pass
            search.update(chunk)
        search.end_pass()
    search.result
    ```

    One pass suffices with a representative sample. Without one, or with a misleading one, two or three do (two more
    for float64). Searches are independent: several ranks or experts are several searches, and since NumPy releases
    the interpreter lock, threads may each drive their own.

    Attributes:
        done: whether `result` is known.
    """

    def __init__(self, rank: int, total: int, dtype: np.typing.DTypeLike = np.float32):
        """Starts a search.

        Args:
            rank: from 1; 0 gives infinity, more than `total` gives 0, both without a pass.
            total: how many entries a pass feeds.
            dtype: the floating dtype of the entries.
        """
        self.rank, self.total, self.dtype = rank, total, np.dtype(dtype)
        self._unsigned = np.dtype(f"uint{8 * self.dtype.itemsize}")
        # The answer lies in [_low, _high) for certain; the window that a pass looks into may be a guess.
        self._low, self._high = 0, 1 << (8 * self.dtype.itemsize)
        if rank < 1:
            self._low = int(np.array(np.inf, self.dtype).view(self._unsigned))
            self._high = self._low + 1
        elif rank > total:
            self._high = 1
        self._start_pass(self._low, self._high)

    @property
    def done(self) -> bool:
        return self._high - self._low == 1

    @property
    def result(self) -> np.floating:
        """The answer, a scalar of the dtype.

        Raises:
            ValueError: it is not known yet.
        """
        if not self.done:
            raise ValueError(f"the entry of rank {self.rank} is not known yet; feed another pass")
        return self._unsigned.type(self._low).view(self.dtype)

    def sample(self, pieces: Sequence[Float[np.ndarray, "..."]]) -> None:
        """Guesses from a sample where the answer lies. To be called before the first pass, at most once.

        Entries of one piece may resemble each other: how much the pieces differ sets the width of the window. Some
        2^18 entries in hundreds of pieces, spread evenly over the population, serve well.

        Args:
            pieces: entries of the population; none at all leave the search as it is.
        """
        if self.done or not sum(piece.size for piece in pieces):
            return
        patterns = np.sort(np.concatenate([self._as_patterns(piece) for piece in pieces]))
        at = patterns.size * (1 - self.rank / self.total)  # where the answer would be in the sorted sample
        guess = patterns[np.clip(int(at), 0, patterns.size - 1)]
        above = np.array([np.count_nonzero(self._as_patterns(piece) >= guess) for piece in pieces])
        sizes = np.array([piece.size for piece in pieces])
        excess = above - sizes * (above.sum() / sizes.sum())
        margin = _SPREAD * np.sqrt(np.sum(excess.astype(np.float64) ** 2) + patterns.size / 4)
        first, last = int(np.floor(at - margin)), int(np.ceil(at + margin))
        self._start_pass(
            int(patterns[first]) if first >= 0 else self._low,
            int(patterns[last]) + 1 if last < patterns.size else self._high,
        )

    def update(self, values: Float[np.ndarray, "..."]) -> None:
        """Takes in a chunk of the population; it is neither kept nor changed.

        Args:
            values: entries of the search's dtype, of any shape; no sign bit is set. Contiguous arrays are not copied.
        """
        patterns = self._as_patterns(values)
        self._seen += patterns.size
        width = self._window_high - self._window_low
        for start in range(0, patterns.size, _BLOCK):
            block = patterns[start : start + _BLOCK]
            self._above += np.count_nonzero(block >= self._window_high)
            if width == 1:  # all ties (a tensor that no training touched is all zeros): nothing to tell apart
                self._counts += np.count_nonzero(block == self._window_low)
                continue
            offsets = block - self._window_low  # wraps around below the window, so that one comparison tells
            inside = np.compress(offsets < width, offsets)
            self._held.append(inside)
            self._held_size += inside.size
            if self._held_size > _HELD:
                self._tally()
                self._coarsen()

    def counts(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """What the pass has counted so far, for a search elsewhere that was begun alike; plain arrays."""
        self._tally()
        counted = np.array([self._seen, self._above, self._shift], np.int64)
        return {"counted": counted, "offsets": self._offsets, "counts": self._counts}

    def take_counts(self, parts: Sequence[Mapping[str, Shaped[np.ndarray, "..."]]]) -> None:
        """Puts what several searches have counted, each in its share of one pass, in the place of this one's counts.

        Args:
            parts: the `counts` of searches with the same window, this one's among them.
        """
        self._start_pass(self._window_low, self._window_high)
        self._shift = max(int(part["counted"][2]) for part in parts)
        for part in parts:
            seen, above, shift = (int(n) for n in part["counted"])
            self._seen, self._above = self._seen + seen, self._above + above
            offsets = part["offsets"].astype(self._unsigned) >> self._unsigned.type(self._shift - shift)
            self._offsets, self._counts = _merged(
                np.concatenate([self._offsets, offsets]), np.concatenate([self._counts, part["counts"]])
            )
        self._coarsen()

    def end_pass(self) -> None:
        """Narrows the search down to what the pass has shown; afterwards `done` tells whether another one is needed.

        Raises:
            ValueError: the pass fed more or fewer entries than `total`.
        """
        if self._seen != self.total:
            raise ValueError(f"the pass fed {self._seen} entries of {self.total}; feed each entry once in every pass")
        self._tally()
        reaching = self._above + np.cumsum(self._counts[::-1])  # how many entries reach each offset, from the largest
        if self.rank <= self._above:
            self._low = self._window_high
        elif not reaching.size or self.rank > reaching[-1]:
            self._high = self._window_low
        else:
            offset = int(self._offsets[::-1][np.searchsorted(reaching, self.rank)]) << self._shift
            self._low = self._window_low + offset
            self._high = min(self._window_high, self._low + (1 << self._shift))
        self._start_pass(self._low, self._high)

    def _start_pass(self, low: int, high: int) -> None:
        self._window_low, self._window_high = low, high
        self._seen = self._above = self._held_size = self._shift = 0
        self._held: list[np.ndarray] = []
        distinct = 1 if high - low == 1 else 0  # how many offsets are told apart so far
        self._offsets, self._counts = np.zeros(distinct, self._unsigned), np.zeros(distinct, np.int64)

    def _tally(self) -> None:
        """Counts the held entries by their offset into the window and holds them no longer."""
        held = np.concatenate([np.empty(0, self._unsigned), *self._held])
        offsets, counts = np.unique(held >> self._shift, return_counts=True)
        self._offsets, self._counts = _merged(
            np.concatenate([self._offsets, offsets]), np.concatenate([self._counts, counts])
        )
        self._held, self._held_size = [], 0

    def _coarsen(self) -> None:
        # Too many to tell apart are counted in ranges of 2^shift offsets. That many distinct ones span a window at
        # least 2^9 times as wide as such a range, so every pass gains at least 9 bits.
        while self._offsets.size > _HELD // 2:
            self._shift += 8
            self._offsets, self._counts = _merged(self._offsets >> 8, self._counts)

    def _as_patterns(self, values: Float[np.ndarray, "..."]) -> UInt[np.ndarray, " n"]:
        if values.dtype != self.dtype:
            raise TypeError(f"the search is over {self.dtype} entries, not {values.dtype}; cast them first")
        return values.reshape(-1).view(self._unsigned)


def _merged(
    offsets: UInt[np.ndarray, " n"], counts: Int[np.ndarray, " n"]
) -> tuple[UInt[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """The distinct offsets in ascending order and the summed counts of each."""
    order = np.argsort(offsets, kind="stable")  # linear where sorted runs meet, as they do here
    offsets = offsets[order]
    starts = np.flatnonzero(np.append(True, offsets[1:] != offsets[:-1])[: offsets.size])
    return offsets[starts], np.add.reduceat(counts[order], starts) if starts.size else counts
