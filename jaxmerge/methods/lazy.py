"""Merging lazy parameters: leaves that read and compute only the slice they are asked for.

What a lazily merged tensor and the streaming engine share is here too: a tensor's inputs in chunks, and measurements
gathered over chunks, whoever reads them. Results of measurements are kept, so a tensor is measured once, however it is
sliced afterwards.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxmerge.errors import NonFiniteError, StructureError
from jaxmerge.methods.assignment import Assignment, TensorTask
from jaxmerge.methods.measurements import Total
from jaxmerge.methods.programs import measure_chunk, merge_chunk, merge_whole
from jaxmerge.methods.selection import OrderStatisticSearch
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.lazy import ArrayTensor, Box, LazyTensor, StackedTensor
from jaxmerge.trees.paths import Params, with_leaves
from jaxmerge.trees.task_vectors import accumulation_dtype

if TYPE_CHECKING:
    from jaxtyping import Num

CHUNK = 1 << 20
"""Entries per chunk where nobody gives a budget: a few MiB per input, the sweet spot of readers and caches."""

_SAMPLED = 1 << 20  # populations below this are searched without a sample
_SAMPLE_STRIDE, _SAMPLE_RUN = 1 << 18, 1 << 12  # one run of entries sampled per stride


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A run of a tensor's row-major flattened entries, in every input.

    Attributes:
        start: flat position of the first entry.
        size: number of entries; the arrays may be longer, padded with zeros, which no measurement notices.
        base: `[≥ size]` in the tensor's dtype, or None without a base.
        experts: K arrays like it.
    """

    start: int
    size: int
    base: Num[np.ndarray, " n"] | None
    experts: list[Num[np.ndarray, " n"]]


Chunks = Callable[[TensorTask], Iterable[Chunk]]
"""Gives a tensor's inputs from first entry to last, anew at each call. Arrays may be reused once the next is asked for."""


class LazyMerge:
    """A merge of lazy parameters: its tensors, and what has been measured so far.

    Attributes:
        job: the assignment.
        tasks: tensor name → the tasks that merge it: one, or one per layer for a stacked leaf. All inputs are lazy.
    """

    def __init__(self, job: Assignment, allow_nonfinite: bool):
        self.job, self.allow_nonfinite = job, allow_nonfinite
        self.tasks = {name: _lazy_tasks(task) for name, task in job.tasks.items()}
        self._stats: dict[int, tuple[Any, ...]] = {}
        self._lock = threading.RLock()

    def stats(self, task: TensorTask, chunks: Chunks | None = None) -> tuple[Any, ...]:
        """The results of all measurements of a task, taken now where they are not known yet.

        Args:
            task: one of `tasks`.
            chunks: how to read; by default one chunk after the other.
        """
        with self._lock:
            for number, scope in enumerate(task.method.passes):
                if number < len(self._stats.get(id(task), ())):
                    continue
                together = [task]
                if scope == "model":
                    together = [t for tasks in self.tasks.values() for t in tasks if t.group == task.group]
                    for other in together:  # what comes before this pass must be known of all
                        if other is not task and len(self._stats.get(id(other), ())) < number:
                            self._measure_up_to(other, number, chunks or read_chunks)
                result = self._measured(together, chunks or read_chunks)
                for other in together:
                    self._stats[id(other)] = (*self._stats.get(id(other), ()), result)
            return self._stats.get(id(task), ())

    def _measure_up_to(self, task: TensorTask, number: int, chunks: Chunks) -> None:
        while len(self._stats.get(id(task), ())) < number:
            result = self._measured([task], chunks)
            self._stats[id(task)] = (*self._stats.get(id(task), ()), result)

    def _measured(self, tasks: Sequence[TensorTask], chunks: Chunks) -> Any:
        """One measurement over all entries of these tensors."""
        total: Any = None
        searches: list[list[OrderStatisticSearch]] | None = None
        population = sum(task.info.size for task in tasks)
        if population >= _SAMPLED:
            for task in tasks:
                for chunk in _sample(task):
                    measurement = self._measure_chunk(task, chunk)
                    if isinstance(measurement, Total):
                        break
                    searches = searches or _searches(measurement, population)
                    _each(searches, measurement, chunk.size, lambda search, values: search.sample([values]))
        while True:
            for task in tasks:
                for chunk in chunks(task):
                    measurement = self._measure_chunk(task, chunk)
                    if isinstance(measurement, Total):
                        part = jax.tree.map(lambda x: np.asarray(x, np.float64), measurement.value)
                        total = part if total is None else jax.tree.map(np.add, total, part)
                    else:
                        searches = searches or _searches(measurement, population)
                        _each(searches, measurement, chunk.size, lambda search, values: search.update(values))
            if searches is None:
                dtype = accumulation_dtype(tasks[0].experts[0].dtype)
                return jax.tree.map(lambda x: np.asarray(x, dtype), total)
            for row in searches:
                for search in row:
                    if not search.done:
                        search.end_pass()
            if all(search.done for row in searches for search in row):
                return np.stack([np.stack([search.result for search in row]) for row in searches])

    def _measure_chunk(self, task: TensorTask, chunk: Chunk) -> Any:
        stats = self._stats.get(id(task), ())
        measurement, finite = measure_chunk(
            task.method, chunk.base, chunk.experts, chunk_info(task.info, chunk.start), stats
        )
        self.check_finite(task, finite)
        return measurement

    def merge(self, task: TensorTask, chunk: Chunk, stats: tuple[Any, ...]) -> jax.Array:
        """The merged entries of a chunk (and of its padding). The result does not alias the chunk's arrays."""
        merged, finite = merge_chunk(task.method, chunk.base, chunk.experts, chunk_info(task.info, chunk.start), stats)
        self.check_finite(task, finite)
        return merged

    def check_finite(self, task: TensorTask, finite: Any) -> None:
        """Raises the error for the first input that is not finite."""
        flags = np.asarray(finite)
        if not (self.allow_nonfinite or flags.all()):
            source = self.job.source_name(int(np.argmin(flags)))
            raise NonFiniteError(nonfinite_message(source, task.info.name))


class MergedTensor(LazyTensor):
    """A tensor that is merged when it is read.

    Attributes:
        merge: the merge that it belongs to.
        task: what merges it.
    """

    def __init__(self, merge: LazyMerge, task: TensorTask):
        self.merge, self.task = merge, task
        self.shape, self.dtype = task.info.shape, np.dtype(task.experts[0].dtype)
        self.label = f"merge of {len(task.experts)} experts, tensor {task.info.name!r}"

    def read(self, box: Box) -> np.ndarray:
        if self.task.method.whole_tensor:
            return self._whole()[box].copy()
        stats = self.merge.stats(self.task)
        if not all(piece.stop > piece.start for piece in box):
            return np.empty([piece.stop - piece.start for piece in box], self.dtype)
        pieces = []
        for here in _split_rows(box):
            base, *experts = [None if x is None else x.read(here) for x in (self.task.base, *self.task.experts)]
            start = int(np.ravel_multi_index([piece.start for piece in here], self.shape)) if here else 0
            pieces.append(self.merge.merge(self.task, Chunk(start, experts[0].size, base, experts), stats))
        return np.concatenate(pieces) if box else np.array(pieces[0])

    def read_flat(self, start: int, out: np.ndarray) -> None:
        if self.task.method.whole_tensor:
            out[...] = self._whole().reshape(-1)[start : start + out.size]
            return
        stats = self.merge.stats(self.task)
        for chunk in read_chunks(self.task, start, start + out.size):
            at = chunk.start - start
            out[at : at + chunk.size] = np.asarray(self.merge.merge(self.task, chunk, stats))[: chunk.size]

    def _whole(self) -> np.ndarray:
        """The merged tensor of a method that needs it whole."""
        everything = tuple(slice(0, n) for n in self.shape)
        base, *experts = [None if x is None else x.read(everything) for x in (self.task.base, *self.task.experts)]
        passes = enumerate(self.task.method.passes)
        stats = self.merge.stats(self.task)
        known = {number: stats[number] for number, scope in passes if scope == "model"}
        merged, finite, _ = merge_whole(self.task.method, base, experts, self.task.info.for_program(), known)
        self.merge.check_finite(self.task, finite)
        return np.asarray(merged)


def merge_lazily(job: Assignment, allow_nonfinite: bool) -> Params:
    """The merged parameters as lazy leaves; leaves that are not floating point are the reference's.

    Raises:
        StructureError: a leaf that is not floating point differs between the models.
    """
    merge = LazyMerge(job, allow_nonfinite)
    leaves: dict[str, Any] = {name: CopiedTensor(job, name) for name in job.copied}
    for name, tasks in merge.tasks.items():
        merged = [MergedTensor(merge, task) for task in tasks]
        leaves[name] = StackedTensor(merged) if job.tasks[name].stacked else merged[0]
    return with_leaves(job.reference, leaves)


class CopiedTensor(LazyTensor):
    """A tensor that is not floating point: the reference's, compared with the experts' as it is read."""

    def __init__(self, job: Assignment, name: str):
        reference, others = job.copied[name]
        self.name, self.job, self.source, self.others = name, job, _lazy(reference), [_lazy(x) for x in others]
        self.shape, self.dtype, self.label = self.source.shape, self.source.dtype, self.source.label

    def read(self, box: Box) -> np.ndarray:
        value = self.source.read(box)
        for expert, other in zip(self.job.experts, self.others, strict=True):
            if other is not self.source and not np.array_equal(other.read(box), value):
                raise StructureError(disagreement_message(expert, self.name, self.dtype))
        return value


def read_chunks(task: TensorTask, start: int = 0, stop: int | None = None, size: int = CHUNK) -> Iterator[Chunk]:
    """A tensor's inputs in chunks of `size` entries, read one after the other into fresh arrays."""
    stop = task.info.size if stop is None else stop
    for at in range(start, stop, size):
        count = min(size, stop - at)
        yield _read_run(task, at, count, padded_size(count, size))


def padded_size(count: int, full: int) -> int:
    """How long the arrays of a chunk of `count` entries are: few lengths, so that few programs are compiled."""
    return full if count == full else min(full, max(1 << 12, 1 << (count - 1).bit_length()))


def chunk_info(info: TensorInfo, start: int) -> TensorInfo:
    """What a program is told about a chunk that starts at a flat position."""
    return dataclasses.replace(info.for_program(), offset=np.array([start >> 32, start & 0xFFFFFFFF], np.uint32))


def nonfinite_message(source: str, tensor: str) -> str:
    return (
        f"{source}, tensor {tensor!r}: found NaN or infinity, expected finite numbers; "
        "repair or leave out that model, or pass allow_nonfinite=True"
    )


def disagreement_message(expert: str, tensor: str, dtype: Any) -> str:
    return (
        f"expert {expert!r}, tensor {tensor!r}: found other values than in the reference, expected equal ones, since "
        f"tensors of dtype {dtype} are copied, not merged; drop the tensor or make them agree"
    )


def _split_rows(box: Box) -> list[Box]:
    """A box cut along its first axis into pieces of about `CHUNK` entries."""
    if not box:
        return [box]
    first, row = box[0], math.prod(piece.stop - piece.start for piece in box[1:])
    step = max(1, CHUNK // row)
    return [(slice(at, min(at + step, first.stop)), *box[1:]) for at in range(first.start, first.stop, step)]


def _read_run(task: TensorTask, start: int, count: int, length: int) -> Chunk:
    arrays: list[Any] = []
    for source in (task.base, *task.experts):
        if source is None:
            arrays.append(None)
            continue
        array = np.empty(length, source.dtype)
        source.read_flat(start, array[:count])
        array[count:] = 0
        arrays.append(array)
    return Chunk(start, count, arrays[0], arrays[1:])


def _sample(task: TensorTask) -> Iterator[Chunk]:
    """A small part of a tensor, spread evenly; nothing of tensors that are small themselves."""
    for start in range(0, task.info.size - _SAMPLE_STRIDE + 1, _SAMPLE_STRIDE):
        yield _read_run(task, start + (start // 7) % (_SAMPLE_STRIDE - _SAMPLE_RUN), _SAMPLE_RUN, _SAMPLE_RUN)


def _searches(measurement: Any, population: int) -> list[list[OrderStatisticSearch]]:
    dtype = measurement.values[0].dtype
    ranks = np.asarray(measurement.ranks).astype(np.int64)
    return [
        [OrderStatisticSearch((int(high) << 32) + int(low), population, dtype) for high, low in row] for row in ranks
    ]


def _each(
    searches: list[list[OrderStatisticSearch]],
    measurement: Any,
    size: int,
    feed: Callable[[OrderStatisticSearch, np.ndarray], None],
) -> None:
    for row, values in zip(searches, measurement.values, strict=True):
        entries = np.asarray(values).reshape(-1)[:size]
        for search in row:
            if not search.done:
                feed(search, entries)


def _lazy_tasks(task: TensorTask) -> list[TensorTask]:
    """The task with lazy inputs and its numbers on the host; one task per layer for a stacked leaf."""
    base, *experts = [None if x is None else _lazy(x) for x in (task.base, *task.experts)]
    method, info = jax.tree.map(_on_host, (task.method, task.info))
    if not task.stacked:
        return [dataclasses.replace(task, method=method, info=info, base=base, experts=experts)]
    tasks = []
    for layer in range(info.num_layers):
        tasks.append(
            dataclasses.replace(
                task,
                method=jax.tree.map(lambda x, layer=layer: x[layer], method),
                info=dataclasses.replace(info, layer=layer, seeds=None if info.seeds is None else info.seeds[layer]),
                base=None if base is None else base.window(layer),
                experts=[expert.window(layer) for expert in experts],
                stacked=False,
            )
        )
    return tasks


def _lazy(leaf: Any) -> LazyTensor:
    return leaf if isinstance(leaf, LazyTensor) else ArrayTensor(np.asarray(jax.device_get(leaf)))


def _on_host(value: Any) -> np.ndarray:
    value = np.asarray(jax.device_get(value))
    return value.astype(np.float32) if value.dtype == np.float64 else value
