"""What streaming a tree of lazy tensors takes, decided before any of it is read.

The tree is cut into parts, each for one worker: runs of a tensor where any cut will do, a whole tensor where it must be
measured first or merged whole. For each part is known what memory it needs beside the libraries, so that the parts in
work at the same time fit into the budget together; a part that fits only alone is done alone.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from jaxmerge.errors import BudgetError
from jaxmerge.methods.lazy import CHUNK, MergedTensor, padded_size
from jaxmerge.streaming.budget import AccessPlan
from jaxmerge.streaming.budgeted import BudgetedTensor, bytes_to_fetch
from jaxmerge.streaming.content import BLOCK_BYTES
from jaxmerge.streaming.sizes import format_bytes
from jaxmerge.trees.lazy import ArrayTensor, CastTensor, LazyTensor, SlicedTensor, StackedTensor

_SMALLEST_CHUNK = 1 << 14
_MOST_WORKERS = 8


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of entries of one leaf, for one worker.

    Attributes:
        name: the tensor of the output.
        at: flat position in that tensor of the leaf's first entry (not 0 in layer-stacked tensors).
        leaf: what is read, or merged.
        dtype: of the output; entries are cast to it.
        start: the first entry of the leaf that is in the part.
        stop: the first that is not.
        keep: the inputs are read whole and kept, since they are needed more than once, or at once.
        memory: bytes needed while it is worked on.
    """

    name: str
    at: int
    leaf: LazyTensor
    dtype: np.dtype
    start: int
    stop: int
    keep: bool
    memory: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a tree is streamed.

    Attributes:
        shared: the parts that several workers take in turn.
        alone: the parts that need more than a worker's share of the memory; one worker takes them.
        workers: how many there are.
        chunk: entries that are read and computed at a time.
        memory: bytes needed at most, beside the libraries.
        to_read: bytes of tensors that are to be read from checkpoints, if each measurement takes one pass.
        to_write: bytes of tensors that are to be written.
        io_plan: the blocks that are to be read from the experts within an I/O budget; None without one.
    """

    shared: Sequence[Part]
    alone: Sequence[Part]
    workers: int
    chunk: int
    memory: int
    to_read: int
    to_write: int
    io_plan: AccessPlan | None = None

    def without(self, done: Mapping[str, Collection[int]]) -> Plan:
        """The plan for what is left. Nothing else changes, chunks above all: sums are taken as they were.

        Args:
            done: the numbers of the blocks that are there already, by tensor: all blocks of a tensor, or some if each
                of its entries can be merged without the others.
        """
        if not any(done.values()):
            return self
        shared, alone = (
            [rest for part in parts for rest in _left_of(part, done.get(part.name, ()))]
            for parts in (self.shared, self.alone)
        )
        parts = (*shared, *alone)
        to_write = sum((part.stop - part.start) * part.dtype.itemsize for part in parts)
        return dataclasses.replace(self, shared=shared, alone=alone, to_read=_parts_to_read(parts), to_write=to_write)

    def shares(self, count: int, names: Sequence[str]) -> list[Plan]:
        """The plan cut into shares of about equal work, one for each of several processes.

        A share is a run of the output: its files are written, and those of the inputs mostly read, from one place on.
        Within an I/O budget a tensor is not cut, because a block that was fetched is kept by one process.

        Args:
            count: how many.
            names: the tensors in the order in which they are written.
        """
        position = {name: i for i, name in enumerate(names)}
        parts = sorted((*self.shared, *self.alone), key=lambda part: (position[part.name], part.at + part.start))
        read = {leaf: _to_read(leaf, keep) for leaf, keep in {part.leaf: part.keep for part in parts}.items()}
        work = [
            read[part.leaf] * (part.stop - part.start) // part.leaf.size
            + (part.stop - part.start) * part.dtype.itemsize
            for part in parts
        ]
        total, done, owner = max(sum(work), 1), 0, {}
        together = [part.name if is_budgeted(part.leaf) else i for i, part in enumerate(parts)]
        for _, run in itertools.groupby(range(len(parts)), key=together.__getitem__):
            run = list(run)
            here = sum(work[i] for i in run)
            for i in run:
                owner[id(parts[i])] = min((2 * done + here) * count // (2 * total), count - 1)
            done += here
        shares = []
        for process in range(count):
            shared, alone = ([x for x in parts if owner[id(x)] == process] for parts in (self.shared, self.alone))
            to_write = sum((part.stop - part.start) * part.dtype.itemsize for part in (*shared, *alone))
            to_read = sum(n for n, part in zip(work, parts, strict=True) if owner[id(part)] == process) - to_write
            shares.append(dataclasses.replace(self, shared=shared, alone=alone, to_read=to_read, to_write=to_write))
        return shares


def make_plan(tensors: Mapping[str, LazyTensor], budget: int, cores: int | None = None) -> Plan:
    """Cuts tensors into parts.

    Args:
        tensors: what is to be written, by name.
        budget: bytes of memory.
        cores: how many workers there may be; None for those of this machine.

    Raises:
        BudgetError: one of the tensors needs more memory than that.
    """
    leaves = [leaf for name, tensor in tensors.items() for leaf in _leaves(name, tensor, tensor.dtype)]
    workers, chunk = _workers_and_chunk([leaf for _, _, leaf, _ in leaves], budget, cores or os.cpu_count() or 1)
    share = budget // workers
    shared, alone = [], []
    for name, at, leaf, dtype in leaves:
        whole = _is_whole(leaf)
        needed = _memory(leaf, chunk, keep=whole)
        if whole and needed > budget:
            raise BudgetError(
                f"tensor {name!r} ({leaf.dtype.name}{list(leaf.shape)}) must be merged whole, which needs "
                f"{format_bytes(needed)} of memory, and the budget is {format_bytes(budget)}; raise memory_budget, or "
                "choose a variant of the method that works element by element"
            )
        measured = any("tensor" in merged.task.method.passes for merged in merges_within(leaf))
        kept = _memory(leaf, chunk, keep=True) if measured else needed
        keep = whole or (measured and isinstance(leaf, MergedTensor) and kept <= share)
        step = leaf.size if whole or measured else chunk
        for start in range(0, leaf.size, step):
            part = Part(name, at, leaf, dtype, start, min(start + step, leaf.size), keep, kept if keep else needed)
            (shared if part.memory <= share else alone).append(part)
    # Measured tensors first, large ones before small ones, so that the workers finish together; runs in order.
    shared.sort(key=lambda part: -max(part.stop - part.start, chunk))
    together = sum(sorted((part.memory for part in shared), reverse=True)[:workers])
    return Plan(
        shared,
        alone,
        workers,
        chunk,
        max([together, *(part.memory for part in alone)]),
        _parts_to_read((*shared, *alone)),
        sum(tensor.nbytes for tensor in tensors.values()),
    )


def merges_within(leaf: LazyTensor) -> list[MergedTensor]:
    """The merged tensors that a leaf is or reads, inner ones first."""
    inner = [merged for source in _sources(leaf) for merged in merges_within(source)]
    return [*inner, leaf] if isinstance(leaf, MergedTensor) else inner


def _leaves(
    name: str, tensor: LazyTensor, dtype: np.dtype, at: int = 0
) -> Iterator[tuple[str, int, LazyTensor, np.dtype]]:
    """The leaves that make up a tensor, each with its flat position in it and the dtype to cast to at the end."""
    if isinstance(tensor, StackedTensor):
        for i, source in enumerate(tensor.sources):
            yield from _leaves(name, source, dtype, at + i * source.size)
    elif isinstance(tensor, CastTensor) and isinstance(tensor.source, MergedTensor | StackedTensor):
        yield from _leaves(name, tensor.source, dtype, at)
    elif tensor.size:
        yield name, at, tensor, dtype


def _workers_and_chunk(leaves: Sequence[LazyTensor], budget: int, cores: int) -> tuple[int, int]:
    """As many workers and as large chunks as the budget allows, smaller chunks rather than fewer workers."""
    cut = [leaf for leaf in leaves if not _is_whole(leaf)]
    needed, largest = 0, None
    for workers in range(min(max(cores, 2), _MOST_WORKERS), 0, -1):
        chunk = CHUNK
        while chunk >= _SMALLEST_CHUNK:
            needed, largest = max(((_memory(leaf, chunk), leaf) for leaf in cut), key=lambda x: x[0], default=(0, None))
            if workers * needed <= budget:
                return workers, chunk
            chunk //= 4
    assert largest is not None
    raise BudgetError(
        f"{largest.label} ({largest.dtype.name}{list(largest.shape)}) needs at least {format_bytes(needed)} of memory, "
        f"and the budget is {format_bytes(budget)}; raise memory_budget"
    )


def _is_whole(leaf: LazyTensor) -> bool:
    """Whether a leaf should be read at once, because a part of it costs as much as the whole."""
    return any(merged.task.method.whole_tensor for merged in merges_within(leaf))


def is_budgeted(leaf: LazyTensor) -> bool:
    """Whether a leaf reads only chosen blocks of its inputs."""
    return isinstance(leaf, BudgetedTensor) or any(is_budgeted(source) for source in _sources(leaf))


def _sources(leaf: LazyTensor) -> list[LazyTensor]:
    """The tensors that a derived tensor reads."""
    if isinstance(leaf, MergedTensor):
        return [source for source in (leaf.task.base, *leaf.task.experts) if source is not None]
    if isinstance(leaf, StackedTensor):
        return list(leaf.sources)
    source = getattr(leaf, "source", None)
    return [source] if isinstance(source, LazyTensor) else []


def _memory(leaf: LazyTensor, chunk: int, keep: bool = False) -> int:
    """Bytes that a worker needs to process a leaf, by chunks or with its inputs kept whole."""
    if not isinstance(leaf, MergedTensor):
        n = leaf.size if keep else min(chunk, leaf.size)
        return n * leaf.dtype.itemsize + _reading(leaf, n)
    length = padded_size(min(leaf.size, chunk), chunk)
    held = leaf.size if leaf.task.method.whole_tensor else leaf.size + chunk if keep else length
    sources = _sources(leaf)
    held += length if leaf.task.method.passes else 0  # a sample
    inner = max(_reading(source, leaf.size if keep else min(chunk, leaf.size)) for source in sources)
    return len(sources) * held * leaf.dtype.itemsize + leaf.merge.memory(leaf.task, length) + inner


def _reading(leaf: LazyTensor, n: int) -> int:
    """Bytes that reading a run of n entries needs beside the run itself."""
    if isinstance(leaf, MergedTensor):
        return _memory(leaf, CHUNK, keep=leaf.task.method.whole_tensor)
    if isinstance(leaf, BudgetedTensor):
        return leaf.scratch_bytes + max(_reading(leaf.expert, n), _reading(leaf.base, n))
    return max((2 * n * source.dtype.itemsize + _reading(source, n) for source in _sources(leaf)), default=0)


def _left_of(part: Part, done: Collection[int]) -> list[Part]:
    """The runs of a part that are in none of the blocks that are done."""
    if not done:
        return [part]
    step, left = BLOCK_BYTES // part.dtype.itemsize, []
    for block in range((part.at + part.start) // step, -(-(part.at + part.stop) // step)):
        start, stop = max(block * step - part.at, part.start), min((block + 1) * step - part.at, part.stop)
        if block not in done:
            if left and left[-1].stop == start:
                start = left.pop().start
            left.append(dataclasses.replace(part, start=start, stop=stop))
    return left


def _parts_to_read(parts: Sequence[Part]) -> int:
    """Bytes that must be read for parts; where only some of a tensor are among them, its share."""
    entries, kept = collections.Counter(), {}
    for part in parts:
        entries[part.leaf] += part.stop - part.start
        kept[part.leaf] = part.keep
    return sum(_to_read(leaf, kept[leaf]) * n // leaf.size for leaf, n in entries.items())


def _to_read(leaf: LazyTensor, keep: bool) -> int:
    """Bytes that must be read from checkpoints to process a leaf."""
    if isinstance(leaf, MergedTensor):
        passes = leaf.task.method.passes
        visits = 1 + sum(scope == "model" or not keep for scope in passes)
        restricted = {source: bytes_to_fetch(source, visits) for source in _sources(leaf)}
        return sum(visits * _to_read(x, keep=False) if n is None else n for x, n in restricted.items())
    if isinstance(leaf, SlicedTensor) and not merges_within(leaf):
        return _to_read(leaf.source, keep) * leaf.size // max(leaf.source.size, 1)
    sources = _sources(leaf)
    if sources:
        return sum(_to_read(source, keep) for source in sources)
    return 0 if isinstance(leaf, ArrayTensor) else leaf.nbytes
