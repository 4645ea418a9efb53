"""Lazy tensors: leaves that know their shape and dtype and read only the slice they are asked for.

A `LazyTensor` is an ordinary (opaque) leaf of a parameter pytree. Everything that is read from a checkpoint is one,
and so is everything derived from such a leaf without reading it: renamed, transposed, cast, sliced, stacked and merged
tensors. An engine that reads a derived tensor needs to know only this one interface.

Two ways to read, because two kinds of callers exist:

* `read(index)` – a box of the tensor, as a new array (users, per-device shards);
* `read_flat(start, out)` – a run of the row-major flattened tensor into memory that the caller owns and reuses
  (the streaming engine; a fresh large buffer costs more than the copy into it).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from types import EllipsisType

import numpy as np
from jaxtyping import Shaped

from jaxmerge.errors import DTypeError, ShapeError

Index = int | slice | EllipsisType
Box = tuple[slice, ...]


class LazyTensor(abc.ABC):
    """A tensor that is read when it is sliced.

    Attributes:
        shape: the shape, known without reading.
        dtype: the NumPy dtype (bfloat16 and the float8 kinds are those of `ml_dtypes`).
        label: where the tensor comes from, for messages: a file and a name.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    label: str

    @abc.abstractmethod
    def read(self, box: Box) -> Shaped[np.ndarray, "..."]:
        """Reads a box: one slice `start:stop` with step 1 per axis, already within bounds. Returns a new array."""

    def read_flat(self, start: int, out: Shaped[np.ndarray, " n"]) -> None:
        """Fills the 1-D array `out` (this dtype) with the entries `start ... start + len(out)` in row-major order."""
        for box, at in covering_boxes(self.shape, start, start + out.size):
            piece = self.read(box).reshape(-1)
            out[at - start : at - start + piece.size] = piece

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as this dtype (not of what must be read to get it)."""
        return self.size * self.dtype.itemsize

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Shaped[np.ndarray, "..."]:
        """Reads the slice: integers, slices with step 1 and an ellipsis. Only the bytes needed are read."""
        box, squeezed = normalize_index(index, self.shape, self.label)
        at = tuple(0 if axis in squeezed else slice(None) for axis in range(self.ndim))
        return self.read(box)[(*at, ...)]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"{self.label}: a lazy tensor cannot become an array without reading it")
        value = self.read(tuple(slice(0, n) for n in self.shape))
        return value if dtype is None else value.astype(dtype)

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"{type(self).__name__}({self.dtype.name}[{shape}], {self.label})"

    def astype(self, dtype: np.typing.DTypeLike) -> LazyTensor:
        """The same tensor in another dtype, cast when it is read."""
        return self if np.dtype(dtype) == self.dtype else CastTensor(self, np.dtype(dtype))

    def transpose(self, *axes: int) -> LazyTensor:
        """The same tensor with its axes permuted (reversed when none are given)."""
        order = tuple(axes) or tuple(reversed(range(self.ndim)))
        return TransposedTensor(self, tuple(axis % self.ndim for axis in order))

    @property
    def T(self) -> LazyTensor:
        """The transpose."""
        return self.transpose()

    def window(self, *index: Index) -> LazyTensor:
        """The slice as a lazy tensor: what `self[index]` reads, read later."""
        return SlicedTensor(self, *normalize_index(index, self.shape, self.label))


class ArrayTensor(LazyTensor):
    """An array in memory in the guise of a lazy tensor, so that mixtures of both can be merged lazily."""

    def __init__(self, array: Shaped[np.ndarray, "..."], label: str = "array in memory"):
        self.array = np.asarray(array)
        self.shape, self.dtype, self.label = self.array.shape, self.array.dtype, label

    def read(self, box: Box) -> np.ndarray:
        return np.array(self.array[box])

    def read_flat(self, start: int, out: np.ndarray) -> None:
        if self.array.flags.c_contiguous:
            out[...] = self.array.reshape(-1)[start : start + out.size]
        else:
            super().read_flat(start, out)


class CastTensor(LazyTensor):
    """A tensor in another dtype."""

    def __init__(self, source: LazyTensor, dtype: np.dtype):
        self.source, self.shape, self.dtype, self.label = source, source.shape, dtype, source.label

    def read(self, box: Box) -> np.ndarray:
        return self.source.read(box).astype(self.dtype)

    def read_flat(self, start: int, out: np.ndarray) -> None:
        raw = np.empty(out.shape, self.source.dtype)
        self.source.read_flat(start, raw)
        out[...] = raw.astype(self.dtype)


class TransposedTensor(LazyTensor):
    """A tensor with permuted axes: axis i is axis `axes[i]` of the source."""

    def __init__(self, source: LazyTensor, axes: tuple[int, ...]):
        if sorted(axes) != list(range(source.ndim)):
            raise ShapeError(f"{source.label}: axes {axes} are no permutation of the {source.ndim} axes of {source}")
        self.source, self.axes, self.dtype, self.label = source, axes, source.dtype, source.label
        self.shape = tuple(source.shape[axis] for axis in axes)

    def read(self, box: Box) -> np.ndarray:
        of_source: list[slice] = [slice(0)] * self.ndim
        for here, there in enumerate(self.axes):
            of_source[there] = box[here]
        return self.source.read(tuple(of_source)).transpose(self.axes)


class SlicedTensor(LazyTensor):
    """A box of a tensor; axes indexed by an integer are gone."""

    def __init__(self, source: LazyTensor, box: Box, squeezed: frozenset[int]):
        self.source, self.box, self.squeezed = source, box, squeezed
        self.dtype, self.label = source.dtype, source.label
        self.kept = [axis for axis in range(source.ndim) if axis not in squeezed]
        self.shape = tuple(box[axis].stop - box[axis].start for axis in self.kept)

    def read(self, box: Box) -> np.ndarray:
        of_source = list(self.box)
        for axis, piece in zip(self.kept, box, strict=True):
            start = self.box[axis].start
            of_source[axis] = slice(start + piece.start, start + piece.stop)
        shape = tuple(piece.stop - piece.start for piece in box)
        return self.source.read(tuple(of_source)).reshape(shape)

    def read_flat(self, start: int, out: np.ndarray) -> None:
        if out.size == 0:
            return
        first = self.first
        if first is None:
            super().read_flat(start, out)
        else:
            self.source.read_flat(first + start, out)

    @property
    def first(self) -> int | None:
        """Where in the flattened source the tensor begins, if it is one run of it; else None."""
        # A run of whole rows (one layer of a stack, say) is a run of the source too.
        whole = [n == piece.stop - piece.start for n, piece in zip(self.source.shape, self.box, strict=True)]
        cut = whole.index(False) if False in whole else 0
        if not all(piece.stop - piece.start == 1 for piece in self.box[:cut]) or not all(whole[cut + 1 :]):
            return None
        return int(np.ravel_multi_index([piece.start for piece in self.box], self.source.shape)) if self.box else 0


class StackedTensor(LazyTensor):
    """Equal-shaped tensors along a new leading axis: how a scanned model holds its layers."""

    def __init__(self, sources: Sequence[LazyTensor]):
        if not sources:
            raise ShapeError("nothing to stack: give at least one tensor")
        first = sources[0]
        for source in sources:
            if source.shape != first.shape:
                raise ShapeError(f"cannot stack {source} on {first}: the shapes differ")
            if source.dtype != first.dtype:
                raise DTypeError(f"cannot stack {source} on {first}: the dtypes differ; cast one with .astype()")
        self.sources, self.dtype = tuple(sources), first.dtype
        self.shape = (len(sources), *first.shape)
        self.label = f"stack of {len(sources)} from {first.label}"

    def read(self, box: Box) -> np.ndarray:
        pieces = [source.read(box[1:]) for source in self.sources[box[0]]]
        if not pieces:
            return np.empty([piece.stop - piece.start for piece in box], self.dtype)
        return np.stack(pieces)

    def read_flat(self, start: int, out: np.ndarray) -> None:
        each, done = math.prod(self.shape[1:]), 0
        while done < out.size:
            layer, at = divmod(start + done, each)
            n = min(each - at, out.size - done)
            self.sources[layer].read_flat(at, out[done : done + n])
            done += n


def normalize_index(index: Index | tuple[Index, ...], shape: tuple[int, ...], label: str) -> tuple[Box, frozenset[int]]:
    """`index` as one bounded slice per axis, and the axes that an integer index removes.

    Raises:
        IndexError: too many indices, an integer out of range, a step other than 1, or an unsupported kind.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    if len(dots) > 1 or len(items) - len(dots) > len(shape):
        raise IndexError(f"{label}: index {index!r} does not fit the shape {shape}")
    where = dots[0] if dots else len(items)
    fill = [slice(None)] * (len(shape) - len(items) + len(dots))
    items[where : where + len(dots)] = fill
    box, squeezed = [], set()
    for axis, (item, n) in enumerate(zip(items, shape, strict=True)):
        if isinstance(item, slice):
            start, stop, step = item.indices(n)
            if step != 1:
                raise IndexError(f"{label}: a lazy tensor is sliced with step 1, not {step}; read, then stride")
            box.append(slice(start, max(start, stop)))
        elif isinstance(item, int | np.integer):
            at = int(item) + (n if item < 0 else 0)
            if not 0 <= at < n:
                raise IndexError(f"{label}: index {item} is out of bounds for axis {axis} of size {n}")
            box.append(slice(at, at + 1))
            squeezed.add(axis)
        else:
            raise IndexError(f"{label}: {item!r} is no index of a lazy tensor; use integers, slices and ...")
    return tuple(box), frozenset(squeezed)


def covering_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """Boxes that make up the row-major run `start:stop`, each with the flat position of its first entry."""
    if start >= stop:
        return
    if not shape:
        yield (), start
        return
    inner = math.prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    whole = tuple(slice(0, n) for n in shape[1:])
    row = first
    while row <= last:
        row_start = row * inner
        if start <= row_start and stop >= row_start + inner:  # as many whole rows as fit, in one box
            end = min(last + 1, stop // inner)
            yield (slice(row, end), *whole), row_start
            row = end
        else:
            low, high = max(start, row_start), min(stop, row_start + inner)
            for box, at in covering_boxes(shape[1:], low - row_start, high - row_start):
                yield (slice(row, row + 1), *box), row_start + at
            row += 1
