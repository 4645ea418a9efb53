"""What is known about the blocks of a task vector: norms, largest entries, zeros and sketches, from one reading of it.

A block is a run of a tensor's row-major flattened entries. Statistics are of the task vector `expert - base`, not of
the weights: those of a fine-tuned model are nearly the base's. Differences and their squares are float64, so that
nothing overflows or vanishes on the way; sketches are float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt16

from jaxmerge.checkpoints.orbax import OrbaxTensor
from jaxmerge.checkpoints.stored import StoredTensor
from jaxmerge.checkpoints.stores import FileSource, KvSource
from jaxmerge.errors import BudgetError, NonFiniteError
from jaxmerge.methods.lazy import CHUNK, padded_size
from jaxmerge.streaming.content import ContentHash
from jaxmerge.trees.checks import is_mergeable
from jaxmerge.trees.lazy import CastTensor, LazyTensor

SKETCH = 64
"""Bins of a sketch. The cosine that two sketches give has a standard error of about 1/8 per block."""

BLOCK_BYTES = 1 << 20
"""Size of a block, unless another is asked for."""

MAGNITUDES = 1 << 11
"""Bins of magnitudes, eight to each power of two: the upper bits of a float32, which count upwards as numbers do."""

_BIN_BITS = 20  # that are left away


@dataclasses.dataclass(frozen=True)
class BlockStatistics:
    """The blocks of one tensor of a task vector.

    Attributes:
        size: entries of the tensor.
        block: entries per block; the last block may be shorter.
        norms: `[B]` L2 norm of each block.
        largest: `[B]` largest magnitude.
        zeros: `[B]` number of entries that are zero.
        touched: `[B]` number of entries in which expert and base differ, also where only in the sign of a zero.
        sketches: `[B, 64]` count sketches: each entry is added, with a pseudo-random sign, to one of 64 bins. The inner
            product of two experts' sketches is an unbiased estimate of that of their blocks.
        magnitudes: `[2048]` how many entries of the tensor lie in each bin of magnitudes; None where that is not asked.
    """

    size: int
    block: int
    norms: Float[np.ndarray, " B"]
    largest: Float[np.ndarray, " B"]
    zeros: Int[np.ndarray, " B"]
    touched: Int[np.ndarray, " B"]
    sketches: Float[np.ndarray, "B 64"]
    magnitudes: Int[np.ndarray, "2048"] | None = None

    def regrouped(self, block: int) -> BlockStatistics:
        """The same for blocks of another size: a multiple of this one, or the whole tensor."""
        if block == self.block or not len(self.norms):
            return dataclasses.replace(self, block=block)
        starts = np.arange(0, len(self.norms), -(-block // self.block))

        def joined(values: Any, join: Any = np.add) -> Any:
            return join.reduceat(values, starts, axis=0)

        return BlockStatistics(
            self.size,
            block,
            np.sqrt(joined(self.norms**2)),
            joined(self.largest, np.maximum),
            joined(self.zeros),
            joined(self.touched),
            joined(self.sketches),
            self.magnitudes,
        )


def between(magnitudes: Int[np.ndarray, "2048"], rank: int) -> tuple[float, float]:
    """The lowest and highest number of the bin that holds the rank-th largest magnitude, from 1."""
    reaching = np.cumsum(magnitudes[::-1])
    code = MAGNITUDES - 1 - int(np.searchsorted(reaching, rank))
    ends = np.array([code << _BIN_BITS, (code + 1 << _BIN_BITS) - 1], np.uint32).view(np.float32)
    return float(ends[0]), float(ends[1])


def default_block(tensor: LazyTensor, block_bytes: int) -> int:
    """Entries per block of a stored tensor: a power of two of at most so many bytes, or what can be fetched alone."""
    grain, power = smallest_read(tensor), entries_within(block_bytes, tensor.dtype)
    return power if grain == 1 else min(grain * -(-power // grain), max(tensor.size, 1))


def entries_within(block_bytes: int, dtype: np.dtype) -> int:
    """The largest power of two of entries that take no more bytes; at least one."""
    return 1 << max(block_bytes // dtype.itemsize, 1).bit_length() - 1


def smallest_read(tensor: LazyTensor) -> int:
    """How many entries are fetched when one is asked for: 1 where a tensor is stored as one run of plain entries.

    For an Orbax array whose chunks are runs of rows it is such a chunk, for other arrays the whole tensor.

    Raises:
        BudgetError: the tensor is compressed as a whole, so that no part of it can be fetched alone.
    """
    if isinstance(tensor, CastTensor):
        return smallest_read(tensor.source)
    if isinstance(tensor, StoredTensor):
        if not isinstance(tensor.source, FileSource | KvSource):
            raise BudgetError(
                f"{tensor.label} is compressed, so no part of it can be read alone; save the checkpoint again, "
                "uncompressed (jm.save_checkpoint), to read it within an I/O budget"
            )
        return 1
    if isinstance(tensor, OrbaxTensor) and tensor.shape and tensor._chunk[1:] == tensor.shape[1:]:
        return math.prod(tensor._chunk)
    return max(tensor.size, 1)


def measure(
    name: str, base: LazyTensor, experts: Mapping[str, LazyTensor], block: int, hashes: Mapping[str, ContentHash]
) -> dict[str, BlockStatistics]:
    """Reads a tensor of a base and of experts once, in order.

    Args:
        name: the tensor's name, for messages.
        base: the base's tensor.
        experts: the experts' tensors by name, of the same shape; none just hashes the base's.
        block: entries per block.
        hashes: hashes to be fed with the entries as they are stored, by the expert's name, `""` for the base.

    Returns:
        The statistics by expert; nothing for a tensor that is not floating point, which is hashed only.

    Raises:
        NonFiniteError: NaN or infinity in one of the tensors.
    """
    floating = is_mergeable(base)
    sources = {key: x for key, x in {"": base, **experts}.items() if floating or key in hashes}
    tallies = {key: Tally(name, base.size, block) for key in experts} if floating else {}
    buffers = {key: piece_buffer(block, x.dtype) for key, x in sources.items()}
    for at, n in pieces(base.size, block):
        for key, source in sources.items():
            source.read_flat(at, buffers[key][:n])
            buffers[key][n:] = np.zeros((), source.dtype)
            if key in hashes:
                hashes[key].update(buffers[key][:n].view(np.uint8))
        for key, tally in tallies.items():
            tally.add(at, n, buffers[""], buffers[key], f"expert {key!r}")
    return {key: tally.statistics() for key, tally in tallies.items()}


class Tally:
    """The statistics of one tensor of a task vector, added up from its pieces. Needs JAX's x64 to be on.

    Args:
        name: the tensor's name, for messages.
        size: its number of entries.
        block: entries per block.
    """

    def __init__(self, name: str, size: int, block: int):
        self._name, self._size, self._block = name, size, block
        count = -(-size // block)
        self._sums = np.zeros((4, count))
        self._sketches = np.zeros((count, SKETCH), np.float32)
        self._magnitudes = np.zeros(MAGNITUDES, np.int64)

    def add(self, at: int, n: int, base: Shaped[np.ndarray, " m"], expert: Shaped[np.ndarray, " m"], who: str) -> None:
        """Adds one of the tensor's `pieces`; they come in order.

        Args:
            at: its first entry.
            n: how many entries it has.
            base: the base's entries, followed by zeros; a `piece_buffer`.
            expert: the expert's.
            who: what the expert is called in messages.

        Raises:
            NonFiniteError: NaN or infinity in one of the two.
        """
        b = at // self._block
        found = _measured(base, expert, np.uint32(at & 0xFFFFFFFF))
        # This waits: the memory of both is used again.
        square, largest, zeros, touched, table, codes = map(np.asarray, found)
        if not np.isfinite(square):
            wrong = not np.isfinite(base.astype(np.float64)).all()
            raise NonFiniteError(
                f"{'the base' if wrong else who}, tensor {self._name!r}: found NaN or infinity (or a "
                "difference too large to be squared), expected finite numbers; repair or leave out that model"
            )
        self._sums[:, b] += np.array([square, 0, zeros - (len(expert) - n), touched])
        self._sums[1, b] = max(self._sums[1, b], largest)
        self._sketches[b] += np.bincount(_BINS, table.reshape(-1), SKETCH).astype(np.float32)
        self._magnitudes += np.bincount(codes[:n], minlength=MAGNITUDES)

    def statistics(self) -> BlockStatistics:
        """The statistics, once all pieces were added."""
        square, largest, zeros, touched = self._sums
        return BlockStatistics(
            self._size,
            self._block,
            np.sqrt(square),
            largest,
            zeros.astype(np.int64),
            touched.astype(np.int64),
            self._sketches,
            self._magnitudes,
        )


def piece_buffer(block: int, dtype: np.dtype) -> Shaped[np.ndarray, " m"]:
    """Memory for one piece of a tensor that is cut into such blocks."""
    return np.empty(padded_size(min(block, CHUNK), CHUNK), dtype)


def pieces(size: int, block: int) -> Iterator[tuple[int, int]]:
    """The pieces in which a tensor is measured: first entry and number of entries. None is in two blocks."""
    for start in range(0, size, block):
        stop = min(start + block, size)
        for at in range(start, stop, CHUNK):
            yield at, min(CHUNK, stop - at)


# Which bin the entry in row r and column c of a 64 x 64 table goes to. The columns of each row are shifted by another
# amount, lest a column of a matrix, whose entries are a multiple of 64 apart, always meets the same bin.
_SHIFTS = np.random.Generator(np.random.PCG64(0)).permutation(SKETCH)
_BINS = ((np.arange(SKETCH)[None, :] + _SHIFTS[:, None]) % SKETCH).reshape(-1)


@jax.jit
def _measured(
    base: Float[Any, " n"], expert: Float[Any, " n"], start: Any
) -> tuple[Array, Array, Array, Array, Float[Array, "64 64"], UInt16[Array, " n"]]:
    """Sum of squares, largest magnitude, zeros and touched entries of a run; a table of sums; bins of magnitudes."""
    x, y = expert.astype(jnp.float64), base.astype(jnp.float64)
    delta = x - y
    word = jax.lax.iota(jnp.uint32, delta.size) + start
    for factor in (0x7FEB352D, 0x846CA68B):  # a hash of the position, whose highest bit is the sign
        word = (word ^ (word >> 16)) * jnp.uint32(factor)
    small = delta.astype(jnp.float32)
    signed = jnp.where(word >> 31 == 1, -small, small)
    return (
        jnp.sum(delta * delta),
        jnp.max(jnp.abs(delta)),
        jnp.sum(delta == 0),
        jnp.sum((x != y) | (jnp.signbit(x) != jnp.signbit(y))),
        jnp.sum(signed.reshape(-1, SKETCH, SKETCH), axis=0),
        (jax.lax.bitcast_convert_type(jnp.abs(small), jnp.uint32) >> _BIN_BITS).astype(jnp.uint16),
    )
