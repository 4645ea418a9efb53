"""Experts of which only some blocks are read: elsewhere they are the base.

Such an expert is the base plus its task vector on the chosen blocks. To everything else it is a lazy tensor like any
other, so every method merges it, in memory and streamed.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Bool, Shaped

from jaxmerge.errors import CheckpointError
from jaxmerge.trees.lazy import Box, LazyTensor, SlicedTensor


class BudgetedTensor(LazyTensor):
    """The expert's entries in the chosen blocks, the base's entries everywhere else.

    Attributes:
        expert: the expert's tensor.
        base: the base's tensor, of the same shape and dtype.
        chosen: `[B]`, the blocks that are read from the expert.
        block: entries per block.
        scratch: where blocks are kept that were fetched, so that each is fetched once and whole; None reads from the
            expert each time, and no more than is asked for.
    """

    def __init__(
        self,
        expert: LazyTensor,
        base: LazyTensor,
        chosen: Bool[np.ndarray, " B"],
        block: int,
        scratch: Scratch | None = None,
    ):
        self.expert, self.base, self.chosen, self.block = expert, base, chosen, block
        self.shape, self.dtype, self.label = expert.shape, expert.dtype, expert.label
        self._kept = None if scratch is None else KeptBlocks(scratch, expert, chosen, block)

    @property
    def fetches_once(self) -> bool:
        """Whether what was fetched is kept, however often it is read."""
        return self._kept is not None

    def chosen_within(self, start: int, stop: int) -> int:
        """How many of the entries `start ... stop` are in chosen blocks."""
        if start >= stop:
            return 0
        first, last = start // self.block, (stop - 1) // self.block
        whole = int(self.chosen[first : last + 1].sum()) * self.block
        before, after = start - first * self.block, (last + 1) * self.block - stop
        return whole - before * bool(self.chosen[first]) - after * bool(self.chosen[last])

    @property
    def scratch_bytes(self) -> int:
        """Bytes of memory that a read needs besides its result."""
        return 0 if self._kept is None else min(self.block, self.size) * self.dtype.itemsize

    def read_flat(
        self, start: int, out: Shaped[np.ndarray, " n"], base: Shaped[np.ndarray, " n"] | None = None
    ) -> None:
        """Fills `out` with the entries from `start` on; `base` are the base's entries there, if they are known."""
        for first, last, chosen in self._runs(start, start + out.size):
            piece = out[first - start : last - start]
            if not chosen and base is not None:
                piece[...] = base[first - start : last - start]
            elif not chosen:
                self.base.read_flat(first, piece)
            elif self._kept is None:
                self.expert.read_flat(first, piece)
            else:
                self._kept.read(first, piece)

    def read(self, box: Box) -> Shaped[np.ndarray, "..."]:
        out = np.empty([piece.stop - piece.start for piece in box], self.dtype)
        if out.size == 0:
            return out
        axis = self.ndim  # the axes from here on are taken whole
        while axis > 0 and box[axis - 1] == slice(0, self.shape[axis - 1]):
            axis -= 1
        outer = out.shape[: max(axis - 1, 0)]
        runs = out.reshape(math.prod(outer), -1)
        for number, index in enumerate(np.ndindex(*outer)):
            corner = [piece.start for piece in box]
            corner[: len(index)] = [piece.start + i for piece, i in zip(box, index, strict=False)]
            self.read_flat(int(np.ravel_multi_index(corner, self.shape)) if corner else 0, runs[number])
        return out

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """The longest pieces of a run of entries that are all chosen, or all not."""
        if start >= stop:
            return
        first = start // self.block
        chosen = self.chosen[first : (stop - 1) // self.block + 1]
        changes = np.flatnonzero(chosen[1:] != chosen[:-1]) + 1
        edges = [0, *changes.tolist(), len(chosen)]
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            begin, end = (first + low) * self.block, (first + high) * self.block
            yield max(begin, start), min(end, stop), bool(chosen[low])


def read_beside_base(
    source: LazyTensor, base: LazyTensor | None, start: int, out: np.ndarray, values: np.ndarray | None
) -> None:
    """Reads a run of entries of an input of a merge whose base has been read already.

    Args:
        source: the input.
        base: the base's tensor.
        start: the first entry.
        out: is filled.
        values: the base's entries there.
    """
    tensor, offset = _unsliced(source)
    if isinstance(tensor, BudgetedTensor) and base is not None and _unsliced(base) == (tensor.base, offset):
        tensor.read_flat(offset + start, out, values)
    else:
        source.read_flat(start, out)


def bytes_to_fetch(leaf: LazyTensor, visits: int) -> int | None:
    """Bytes (in its dtype) that reading a leaf so often takes from its expert; None if that is not restricted."""
    tensor, offset = _unsliced(leaf)
    if not isinstance(tensor, BudgetedTensor):
        return None
    entries = tensor.chosen_within(offset, offset + leaf.size)
    return entries * leaf.dtype.itemsize * (1 if tensor.fetches_once else visits)


def _unsliced(tensor: LazyTensor) -> tuple[LazyTensor, int]:
    """The tensor of which this one is a layer, and the flat position there of its first entry."""
    if isinstance(tensor, SlicedTensor) and tensor.squeezed == {0} and tensor.shape == tensor.source.shape[1:]:
        return tensor.source, tensor.box[0].start * tensor.size
    return tensor, 0


class Scratch:
    """A temporary file without a name, which the system removes however the process ends."""

    def __init__(self, folder: Path):
        self._folder, self._size = folder, 0
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()

    def reserve(self, n: int) -> int:
        """The position of `n` bytes for the caller."""
        self._size += n
        return self._size - n

    def write(self, position: int, values: Shaped[np.ndarray, " n"]) -> None:
        """Writes entries.

        Raises:
            CheckpointError: the disk is full.
        """
        data = values.view(np.uint8)
        try:
            with self._lock:
                if self._file is None:
                    self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 – it lives as long as this
            done = 0
            while done < data.size:
                done += os.pwrite(self._file.fileno(), data[done:].data, position + done)
        except OSError as error:
            raise CheckpointError(
                f"cannot keep fetched blocks in a temporary file in {self._folder}: {error.strerror}; a method that "
                "measures needs free space there of up to the I/O budget"
            ) from error

    def read(self, position: int, out: Shaped[np.ndarray, " n"]) -> None:
        """Reads entries that were written."""
        assert self._file is not None
        data, done = out.view(np.uint8), 0
        while done < data.size:
            done += os.preadv(self._file.fileno(), [data[done:].data], position + done)

    def close(self) -> None:
        """Removes the file."""
        if self._file is not None:
            self._file.close()


_ABSENT, _COMING, _HERE = range(3)


class KeptBlocks:
    """The chosen blocks of a tensor, each fetched when it is first needed. Several threads may read."""

    def __init__(self, scratch: Scratch, source: LazyTensor, chosen: Bool[np.ndarray, " B"], block: int):
        self._scratch, self._source, self._block = scratch, source, block
        self._rank = np.cumsum(chosen) - 1
        self._state = np.full(int(chosen.sum()), _ABSENT, np.uint8)
        self._changed = threading.Condition()
        self._position = scratch.reserve(self._state.size * block * source.dtype.itemsize)

    def read(self, start: int, out: Shaped[np.ndarray, " n"]) -> None:
        """Fills `out` with the entries from `start` on, which are all in chosen blocks."""
        done = 0
        while done < out.size:
            number, within = divmod(start + done, self._block)
            n = min(self._block - within, out.size - done)
            self._read(number, within, out[done : done + n])
            done += n

    def _read(self, number: int, within: int, out: np.ndarray) -> None:
        rank, itemsize = self._rank[number], self._source.dtype.itemsize
        position = self._position + int(rank) * self._block * itemsize
        with self._changed:
            self._changed.wait_for(lambda: self._state[rank] != _COMING)
            here = self._state[rank] == _HERE
            if not here:
                self._state[rank] = _COMING
        if here:
            self._scratch.read(position + within * itemsize, out)
            return
        outcome = _ABSENT
        try:
            start = number * self._block
            values = np.empty(min(self._block, self._source.size - start), self._source.dtype)
            self._source.read_flat(start, values)
            self._scratch.write(position, values)
            out[...] = values[within : within + out.size]
            outcome = _HERE
        finally:
            with self._changed:
                self._state[rank] = outcome
                self._changed.notify_all()
