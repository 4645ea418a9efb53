"""Tensors that are measured while they are written, so that an expert need not be read again for its statistics."""

from __future__ import annotations

import threading
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from jaxmerge.methods.lazy import as_lazy
from jaxmerge.streaming.content import ContentHash
from jaxmerge.streaming.statistics import BlockStatistics, Tally, piece_buffer, pieces
from jaxmerge.trees.checks import is_mergeable
from jaxmerge.trees.lazy import Box, LazyTensor


class WatchedTensor(LazyTensor):
    """A tensor whose task vector is measured while it is read from start to end by `read_flat`, once.

    Attributes:
        base: the base's tensor, of the same shape, which is read alongside.
        block: entries per block.
        blocks: hashes of its blocks, and
        base_blocks: of the base's, once all were read; None before.
        statistics: of its blocks, likewise; None for tensors that are not floating point.
    """

    def __init__(self, leaf: Any, name: str, base: LazyTensor, block: int):
        self.shape, self.dtype, self.label = tuple(leaf.shape), np.dtype(leaf.dtype), name
        self.base, self.block = base, block
        self.blocks: bytes | None = None
        self.base_blocks: bytes | None = None
        self.statistics: BlockStatistics | None = None
        self._leaf, self._lock, self._next = leaf, threading.Lock(), 0
        self._hashes = ContentHash(), ContentHash()
        self._tally = Tally(name, self.size, block) if is_mergeable(base) else None
        self._pieces = pieces(self.size, block)
        self._piece, self._filled = next(self._pieces, None), 0
        self._buffers: tuple[np.ndarray, np.ndarray] | None = None
        if self._piece is None:
            self._finish()

    def read(self, box: Box) -> Shaped[np.ndarray, "..."]:
        return as_lazy(self._leaf).read(box)

    def read_flat(self, start: int, out: Shaped[np.ndarray, " n"]) -> None:
        as_lazy(self._leaf).read_flat(start, out)
        with self._lock:
            # What comes in another order is not measured here, and read again by who needs it.
            if start == self._next and self.blocks is None:
                self._next += out.size
                self._take(out)

    def _take(self, values: Shaped[np.ndarray, " n"]) -> None:
        """Fills piece after piece with the entries that come next, and measures those that are full."""
        self._hashes[0].update(np.ascontiguousarray(values).view(np.uint8))
        while values.size and self._piece is not None:
            if self._buffers is None:
                self._buffers = piece_buffer(self.block, self.base.dtype), piece_buffer(self.block, self.dtype)
            _, wanted = self._piece
            n = min(wanted - self._filled, values.size)
            self._buffers[1][self._filled : self._filled + n] = values[:n]
            self._filled, values = self._filled + n, values[n:]
            if self._filled == wanted:
                self._measure(*self._piece, *self._buffers)
                self._piece, self._filled = next(self._pieces, None), 0
        if self._piece is None:
            self._finish()

    def _measure(self, at: int, n: int, base: np.ndarray, expert: np.ndarray) -> None:
        self.base.read_flat(at, base[:n])
        self._hashes[1].update(base[:n].view(np.uint8))
        if self._tally is not None:
            base[n:], expert[n:] = np.zeros((), base.dtype), np.zeros((), expert.dtype)
            with jax.enable_x64(True):  # for this thread
                self._tally.add(at, n, base, expert, "the model that is saved")

    def _finish(self) -> None:
        self.blocks, self.base_blocks = (x.blocks() for x in self._hashes)
        self.statistics = None if self._tally is None else self._tally.statistics()
        self._buffers = None
