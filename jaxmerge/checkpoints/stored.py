"""Tensors that lie in a file as one contiguous run of raw entries, row-major."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Shaped

from jaxmerge.checkpoints.stores import PIECE_BYTES, ByteSource
from jaxmerge.trees.lazy import Box, LazyTensor


class StoredTensor(LazyTensor):
    """A tensor in a file: reading a slice reads the bytes of that slice and no others.

    (From a URL, the short gaps between the rows of a slice are read too: one request costs more than they do.)
    """

    def __init__(self, source: ByteSource, name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int):
        self.source, self.name, self.offset = source, name, offset
        self.shape, self.dtype, self.label = shape, dtype, f"{source.label}: {name}"

    def read_flat(self, start: int, out: Shaped[np.ndarray, " n"]) -> None:
        if out.dtype != self.dtype or not 0 <= start <= start + out.size <= self.size:
            raise IndexError(f"{self}: entries {start} to {start + out.size} as {out.dtype} were asked for")
        self.source.read_into(self.offset + start * self.dtype.itemsize, out.view(np.uint8))

    def read(self, box: Box) -> Shaped[np.ndarray, "..."]:
        out = np.empty([piece.stop - piece.start for piece in box], self.dtype)
        if out.size == 0:
            return out
        starts, run = _runs(self.shape, box)
        starts = starts * self.dtype.itemsize + self.offset
        rows = out.reshape(len(starts), run).view(np.uint8)
        width = rows.shape[1]
        for first, last in _groups(starts, width, self.source.gap):
            if last == first + 1:
                self.source.read_into(int(starts[first]), rows[first])
            else:
                begin = starts[first]
                together = np.empty(starts[last - 1] + width - begin, np.uint8)
                self.source.read_into(int(begin), together)
                for i in range(first, last):
                    rows[i] = together[starts[i] - begin :][:width]
        return out


def _runs(shape: tuple[int, ...], box: Box) -> tuple[np.ndarray, int]:
    """The contiguous runs of which a box consists: flat positions of their first entries, and their common length."""
    axis, run = len(shape), 1  # the axes from `axis` on are taken whole
    while axis > 0 and box[axis - 1] == slice(0, shape[axis - 1]):
        axis -= 1
        run *= shape[axis]
    if axis > 0:
        axis -= 1
        run *= box[axis].stop - box[axis].start
    stride = math.prod(shape[axis:])
    starts = np.zeros(1, np.int64)
    if axis < len(shape):
        starts += box[axis].start * math.prod(shape[axis + 1 :])
    for outer in reversed(range(axis)):
        along = np.arange(box[outer].start, box[outer].stop, dtype=np.int64) * stride
        starts = (along[:, None] + starts[None, :]).reshape(-1)
        stride *= shape[outer]
    return starts, run


def _groups(starts: np.ndarray, width: int, gap: int) -> list[tuple[int, int]]:
    """Runs to be read together, as ranges of their numbers: close to each other, and not too many bytes at once."""
    if gap == 0:
        return [(i, i + 1) for i in range(len(starts))]
    groups, first = [], 0
    for i in range(1, len(starts) + 1):
        if i == len(starts) or starts[i] - starts[i - 1] - width > gap or starts[i] - starts[first] > PIECE_BYTES:
            groups.append((first, i))
            first = i
    return groups
