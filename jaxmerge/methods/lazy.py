"""Merging lazy parameters: leaves that read and compute only the slice they are asked for.

What a lazily merged tensor and the streaming engine share is here too: a tensor's inputs in chunks, and measurements
gathered over chunks, whoever reads them. Results of measurements are kept, so a tensor is measured once, however it is
sliced afterwards.

The invariant: a chunk is all that a method sees, and any cut into chunks gives the same result. The chunk of a method
that needs tensors whole is the whole tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Int, Num

from jaxmerge.errors import NonFiniteError, StructureError
from jaxmerge.methods.assignment import Assignment, TensorTask
from jaxmerge.methods.chunk_programs import measure_chunk, merge_checked_chunk, merge_chunk
from jaxmerge.methods.given import read_given
from jaxmerge.methods.measurements import Measurement, OrderStatistic, Total
from jaxmerge.methods.method import Method
from jaxmerge.methods.selection import OrderStatisticSearch
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.lazy import ArrayTensor, Box, LazyTensor, StackedTensor
from jaxmerge.trees.paths import Params, with_leaves
from jaxmerge.trees.task_vectors import accumulation_dtype

T = TypeVar("T")

CHUNK = 1 << 19
"""Entries per chunk: enough to make the cost of a call small, few enough for the inputs of a chunk to stay in cache."""

SEARCH_BYTES = 6 << 20
"""What one search for an order statistic takes at most."""

_SHORTER = (1 << 14, 1 << 17)  # the other lengths that programs are compiled for: small tensors and the ends of others
_SAMPLED_POPULATION = 1 << 20  # smaller ones are searched without a sample
_SAMPLE = 1 << 17  # entries of a sample at most
_PIECES = 64  # pieces of a sample, for each of the first 16 tensors


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A run of a tensor's row-major flattened entries in every input, or, for a method that needs it, the whole tensor.

    Attributes:
        start: flat position of the first entry.
        size: number of entries; flat arrays may be longer, padded with zeros, which no measurement notices.
        base: `[≥ size]`, or of the tensor's shape, in the tensor's dtype; None without a base.
        experts: K arrays like it.
    """

    start: int
    size: int
    base: Num[np.ndarray, "..."] | None
    experts: list[Num[np.ndarray, "..."]]


class Reader:
    """How the inputs of a merge are read while it is measured: here one chunk after the other, into fresh arrays.

    The streaming engine has readers that read in parallel, and into memory that it reuses.

    Attributes:
        chunk: entries per chunk.
        samples: whether a sample may be taken, which reads some entries twice.
    """

    chunk: int = CHUNK
    samples: bool = True

    def visit(self, tasks: Sequence[TensorTask], function: Callable[[TensorTask, Chunk], T]) -> list[T]:
        """Calls a function for every chunk of the tensors, maybe from several threads; results are in order."""
        return [function(task, chunk) for task in tasks for chunk in read_chunks(task)]

    def sample(self, task: TensorTask, starts: Sequence[int], run: int) -> Chunk:
        """The runs of `run` entries from each of `starts` on, joined into one chunk."""
        chunk = empty_chunk(task, 0, run * len(starts), self.chunk)
        for source, array in inputs(task, chunk):
            for i, start in enumerate(starts):
                source.read_flat(start, array[i * run : (i + 1) * run])
        return chunk

    def combine(self, totals: list[Any], search: Search) -> list[Any]:
        """Adds what other processes have found in their shares of the chunks; here there are none.

        Args:
            totals: for each chunk the leaves of its `Total`, or None; also None for a chunk of another process.
            search: the `Search` that was fed; it gets the others' counts.

        Returns:
            The totals of all chunks.
        """
        return totals


_READER = Reader()


class LazyMerge:
    """A merge of lazy parameters: its tensors, and what has been measured so far. Several threads may use it.

    Attributes:
        job: the assignment.
        tasks: tensor name → the tasks that merge it: one, or one per layer for a stacked leaf. All inputs are lazy.
        allow_nonfinite: NaN and infinity may pass.
    """

    def __init__(self, job: Assignment, allow_nonfinite: bool):
        self.job, self.allow_nonfinite = job, allow_nonfinite
        self.tasks = {name: _lazy_tasks(task) for name, task in job.tasks.items()}
        self._groups: dict[int, list[TensorTask]] = {}
        for task in (task for tasks in self.tasks.values() for task in tasks):
            self._groups.setdefault(task.group, []).append(task)
        self._stats: dict[int, list[Any]] = {id(task): [] for group in self._groups.values() for task in group}
        self._memory: dict[Any, int] = {}
        self._task_locks = {key: threading.RLock() for key in self._stats}
        self._group_locks = {group: threading.RLock() for group in self._groups}

    def group(self, task: TensorTask) -> list[TensorTask]:
        """The tasks that share measurements over the model with this one, which is among them."""
        return self._groups[task.group]

    def stats(self, task: TensorTask, reader: Reader = _READER) -> tuple[Any, ...]:
        """The results of all measurements of a task, taken now where they are not known yet.

        Args:
            task: one of `tasks`.
            reader: how to read.
        """
        self._measure(task, len(task.method.passes), reader)
        return tuple(self._stats[id(task)])

    def _measure(self, task: TensorTask, count: int, reader: Reader) -> None:
        """Takes the first `count` measurements."""
        known = self._stats[id(task)]
        for number, scope in enumerate(task.method.passes[:count]):
            # Who holds a task's lock waits for no lock of this merge, so there is no deadlock.
            with self._task_locks[id(task)] if scope == "tensor" else self._group_locks[task.group]:
                if number < len(known):
                    continue
                together = [task] if scope == "tensor" else self.group(task)
                for other in together:
                    if other is not task:
                        self._measure(other, number, reader)
                result = self._measured(together, reader)
                for other in together:
                    self._stats[id(other)].append(result)

    def _measured(self, tasks: Sequence[TensorTask], reader: Reader) -> Any:
        """The next measurement, over all entries of these tensors together."""
        search, structure = Search(sum(task.info.size for task in tasks)), None

        def take(task: TensorTask, chunk: Chunk) -> Any:
            nonlocal structure
            measurement = self._measure_chunk(task, chunk)
            if isinstance(measurement, Total):
                leaves, structure = jax.tree.flatten(measurement.value)
                return [np.asarray(x, np.float64) for x in leaves]
            search.update(measurement, chunk.size)
            return None

        large = search.population >= _SAMPLED_POPULATION
        if large and reader.samples and not any(task.method.whole_tensor for task in tasks):
            run, samples = _sample_places(tasks, reader.chunk)
            pieces = [(self._measure_chunk(task, reader.sample(task, at, run)), len(at)) for task, at in samples]
            search.sample(pieces, run)
        while not search.done:
            totals = reader.combine(reader.visit(tasks, take), search)
            if totals[0] is not None:
                total = [functools.reduce(np.add, parts) for parts in zip(*totals, strict=True)]
                total = [np.asarray(x, accumulation_dtype(tasks[0].experts[0].dtype)) for x in total]
                return jax.tree.unflatten(structure or self._structure(tasks[0]), total)
            search.end_pass()
        return search.result

    def _structure(self, task: TensorTask) -> Any:
        """The structure of the next measurement of a task, which is a total, where no chunk of it was measured here."""
        shape = task.info.shape if task.method.whole_tensor else (_SHORTER[0],)
        base = None if task.base is None else jax.ShapeDtypeStruct(shape, task.base.dtype)
        experts = [jax.ShapeDtypeStruct(shape, expert.dtype) for expert in task.experts]
        method, stats = jax.tree.map(_unread, task.method), tuple(self._stats[id(task)])
        measurement = measure_chunk.shape(method, base, experts, chunk_info(task.info, 0), stats)[0]
        return jax.tree.structure(measurement.value)

    def _measure_chunk(self, task: TensorTask, chunk: Chunk) -> Measurement:
        stats = tuple(self._stats[id(task)])
        info = chunk_info(task.info, chunk.start)
        measurement, finite = measure_chunk(read_given(task.method), chunk.base, chunk.experts, info, stats)
        self._check_finite(task, finite)
        return measurement

    def merge(self, task: TensorTask, chunk: Chunk, stats: tuple[Any, ...]) -> Num[np.ndarray, "..."]:
        """The merged entries of a chunk, shaped like its arrays (padding included).

        The computation is over when this returns. The result may be one of the chunk's arrays: use it before those are
        used again.

        Raises:
            NonFiniteError: an input holds NaN or infinity.
        """
        program = merge_chunk if self.allow_nonfinite else merge_checked_chunk
        info = chunk_info(task.info, chunk.start)
        merged, finite = program(read_given(task.method), chunk.base, chunk.experts, info, stats)
        if not np.asarray(finite):
            self._check_finite(task, [np.isfinite(x).all() for x in (chunk.base, *chunk.experts) if x is not None])
        return np.asarray(merged)  # waits

    def memory(self, task: TensorTask, length: int) -> int:
        """Bytes needed to measure and merge a chunk beside its arrays, at most; nothing is read.

        Args:
            task: one of `tasks`.
            length: entries of the chunk, ignored for a method that needs tensors whole.
        """
        shape = task.info.shape if task.method.whole_tensor else (length,)
        base = None if task.base is None else jax.ShapeDtypeStruct(shape, task.base.dtype)
        experts = [jax.ShapeDtypeStruct(shape, expert.dtype) for expert in task.experts]
        given = [leaf for leaf in jax.tree.leaves(task.method) if isinstance(leaf, LazyTensor)]
        method = jax.tree.map(_unread, task.method)
        operands = (method, base, experts, chunk_info(task.info, 0))
        key = (jax.tree.structure(operands), shape, experts[0].dtype, tuple(leaf.shape for leaf in given))
        if key not in self._memory:
            self._memory[key] = self._program_memory(method, operands)
        return self._memory[key] + sum(leaf.nbytes for leaf in given)

    def _program_memory(self, method: Method, operands: tuple[Any, ...]) -> int:
        stats, needed, searches = (), 0, 0
        for _ in method.passes:
            needed = max(needed, measure_chunk.memory(*operands, stats))
            measurement = measure_chunk.shape(*operands, stats)[0]
            if isinstance(measurement, Total):
                stats += (measurement.value,)
            else:
                stats += (jax.ShapeDtypeStruct(measurement.ranks.shape[:2], measurement.values[0].dtype),)
                searches = max(searches, math.prod(measurement.ranks.shape[:2]) * SEARCH_BYTES)
        return max(needed, merge_checked_chunk.memory(*operands, stats)) + searches

    def _check_finite(self, task: TensorTask, finite: Any) -> None:
        """Raises the error for the first input that is not finite. Waits for the program that tells."""
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
        out = np.empty([piece.stop - piece.start for piece in box], self.dtype)
        if out.size == 0:
            return out
        stats = self.merge.stats(self.task)
        if self.task.method.whole_tensor:
            (chunk,) = read_chunks(self.task)
            out[...] = self.merge.merge(self.task, chunk, stats)[box]
            return out
        for here in _split_rows(box):
            base = None if self.task.base is None else self.task.base.read(here)
            experts = [expert.read(here) for expert in self.task.experts]
            start = int(np.ravel_multi_index([piece.start for piece in here], self.shape)) if here else 0
            merged = self.merge.merge(self.task, Chunk(start, experts[0].size, base, experts), stats)
            rows = (slice(here[0].start - box[0].start, here[0].stop - box[0].start),) if here else ()
            out[rows] = merged
        return out

    def read_flat(self, start: int, out: np.ndarray) -> None:
        if out.size == 0:
            return
        stats = self.merge.stats(self.task)
        if self.task.method.whole_tensor:
            (chunk,) = read_chunks(self.task)
            out[...] = self.merge.merge(self.task, chunk, stats).reshape(-1)[start : start + out.size]
            return
        for chunk in read_chunks(self.task, start, start + out.size):
            at = chunk.start - start
            out[at : at + chunk.size] = self.merge.merge(self.task, chunk, stats)[: chunk.size]


def merge_lazily(job: Assignment, allow_nonfinite: bool) -> Params:
    """The merged parameters as lazy leaves; leaves that are not floating point are the reference's.

    Tensors that are tied in all inputs (one object under several names) are tied in the result.

    Raises:
        StructureError: when it is read, a leaf that is not floating point differs between the models.
    """
    merge = LazyMerge(job, allow_nonfinite)
    leaves: dict[str, Any] = {name: CopiedTensor(job, name) for name in job.copied}
    tied: dict[tuple[int, ...], LazyTensor] = {}
    for name, tasks in merge.tasks.items():
        given = job.tasks[name]
        merged = [MergedTensor(merge, task) for task in tasks]
        leaf = StackedTensor(merged) if given.stacked else merged[0]
        leaves[name] = tied.setdefault((id(given.base), *map(id, given.experts)), leaf)
    return with_leaves(job.reference, leaves)


class CopiedTensor(LazyTensor):
    """A tensor that is not floating point: the reference's, compared with the experts' as it is read."""

    def __init__(self, job: Assignment, name: str):
        reference, others = job.copied[name]
        self.name, self.job, self.source, self.others = name, job, as_lazy(reference), [as_lazy(x) for x in others]
        self.shape, self.dtype, self.label = self.source.shape, self.source.dtype, self.source.label

    def read(self, box: Box) -> np.ndarray:
        value = self.source.read(box)
        for expert, other in zip(self.job.experts, self.others, strict=True):
            if other is not self.source and not np.array_equal(other.read(box), value):
                raise StructureError(disagreement_message(expert, self.name, self.dtype))
        return value


def read_chunks(task: TensorTask, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
    """A tensor's inputs (or a run of them) in chunks of `CHUNK` entries, read one after the other into fresh arrays."""
    stop = task.info.size if stop is None else stop
    step = task.info.size if task.method.whole_tensor else CHUNK
    for at in range(start, stop, max(step, 1)):
        chunk = empty_chunk(task, at, min(step, stop - at))
        for source, array in inputs(task, chunk):
            source.read_flat(at, array.reshape(-1)[: chunk.size])
        yield chunk


def empty_chunk(task: TensorTask, start: int, size: int, full: int = CHUNK) -> Chunk:
    """A chunk of fresh arrays that are still to be filled; their padding (up to a `full` chunk) is zero."""
    arrays: list[Any] = []
    for source in (task.base, *task.experts):
        if source is None:
            arrays.append(None)
        elif task.method.whole_tensor:
            arrays.append(np.empty(task.info.shape, source.dtype))
        else:
            arrays.append(np.empty(padded_size(size, full), source.dtype))
            arrays[-1][size:] = 0
    return Chunk(start, size, arrays[0], arrays[1:])


def inputs(task: TensorTask, chunk: Chunk) -> Iterator[tuple[LazyTensor, Num[np.ndarray, "..."]]]:
    """Each input of a tensor, the base first if there is one, with its array in the chunk."""
    if chunk.base is not None:
        yield task.base, chunk.base
    yield from zip(task.experts, chunk.experts, strict=True)


def padded_size(count: int, full: int) -> int:
    """How long the arrays of a chunk of `count` entries are: of few lengths, so that few programs are compiled."""
    return next((length for length in _SHORTER if count <= length < full), full)


def chunk_info(info: TensorInfo, start: int) -> TensorInfo:
    """What a program is told about a chunk that starts at a flat position."""
    return dataclasses.replace(info.for_program(), offset=np.array([start >> 32, start & 0xFFFFFFFF], np.uint32))


def nonfinite_message(source: str, tensor: str) -> str:
    """What is said of an input that is not finite."""
    return (
        f"{source}, tensor {tensor!r}: found NaN or infinity, expected finite numbers; "
        "repair or leave out that model, or pass allow_nonfinite=True"
    )


def disagreement_message(expert: str, tensor: str, dtype: Any) -> str:
    """What is said of a tensor that is to be copied and is not the same everywhere."""
    return (
        f"expert {expert!r}, tensor {tensor!r}: found other values than in the reference, expected equal ones, since "
        f"tensors of dtype {dtype} are copied, not merged; drop the tensor or make them agree"
    )


class Search:
    """The searches for an order statistic of K experts with R ranks each; several threads may feed them."""

    def __init__(self, population: int):
        self.population = population
        self._lock = threading.Lock()
        self._rows: list[tuple[threading.Lock, list[OrderStatisticSearch]]] = []

    @property
    def done(self) -> bool:
        searches = [search for _, row in self._rows for search in row]
        return bool(searches) and all(search.done for search in searches)

    @property
    def result(self) -> Float[np.ndarray, "K R"]:
        return np.array([[search.result for search in row] for _, row in self._rows])

    def update(self, measurement: OrderStatistic, size: int) -> None:
        """Takes in the first `size` entries of a chunk's values."""
        self._prepare(measurement)
        for (lock, row), values in zip(self._rows, measurement.values, strict=True):
            entries = np.asarray(values).reshape(-1)[:size]
            with lock:
                for search in row:
                    if not search.done:
                        search.update(entries)

    def sample(self, measurements: Sequence[tuple[Measurement, int]], run: int) -> None:
        """Guesses from chunks that hold so many runs each. Sums need no guess."""
        statistics = [(measurement, n) for measurement, n in measurements if isinstance(measurement, OrderStatistic)]
        if not statistics:
            return
        self._prepare(statistics[0][0])
        for i, (_, row) in enumerate(self._rows):
            pieces = [
                piece
                for statistic, count in statistics
                for piece in np.asarray(statistic.values[i])[: count * run].reshape(count, run)
            ]
            for search in row:
                search.sample(pieces)

    def end_pass(self) -> None:
        for _, row in self._rows:
            for search in row:
                if not search.done:
                    search.end_pass()

    def counts(self) -> dict[str, np.ndarray]:
        """What the pass has counted so far, and what is searched, as plain arrays; empty before anything was fed."""
        if not self._rows:
            return {}
        searches = [search for _, row in self._rows for search in row]
        ranks = np.array([[search.rank for search in row] for _, row in self._rows], np.int64)
        told: dict[str, np.ndarray] = {"ranks": ranks, "of": np.empty(0, searches[0].dtype)}
        for i, search in enumerate(search for search in searches if not search.done):
            told |= {f"{i}/{name}": array for name, array in search.counts().items()}
        return told

    def take_counts(self, parts: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Puts what several processes have counted in their shares of one pass in the place of this one's counts."""
        parts = [part for part in parts if part]
        if not parts:
            return
        self._begin(parts[0]["ranks"], parts[0]["of"].dtype)
        open_searches = [search for _, row in self._rows for search in row if not search.done]
        for i, search in enumerate(open_searches):
            names = ("counted", "offsets", "counts")
            search.take_counts([{name: part[f"{i}/{name}"] for name in names} for part in parts])

    def _prepare(self, measurement: OrderStatistic) -> None:
        with self._lock:
            if not self._rows:
                words = np.asarray(measurement.ranks).astype(np.int64)
                self._begin(words[..., 0] << 32 | words[..., 1], measurement.values[0].dtype)

    def _begin(self, ranks: Int[np.ndarray, "K R"], dtype: np.dtype) -> None:
        if not self._rows:
            for row in ranks:
                searches = [OrderStatisticSearch(int(rank), self.population, dtype) for rank in row]
                self._rows.append((threading.Lock(), searches))


def _sample_places(tasks: Sequence[TensorTask], chunk: int) -> tuple[int, list[tuple[TensorTask, list[int]]]]:
    """Where to sample tensors as one population: the length of a run, and the starts of the runs in each tensor."""
    population = sum(task.info.size for task in tasks)
    count = _PIECES * min(len(tasks), 16)
    run = min(population // 64, _SAMPLE, chunk) // count
    stride = population // count
    # The golden ratio moves the runs about in their strides, lest they all meet the same columns of a matrix.
    places = [int((i + i * 0.6180339887 % 1) * stride) for i in range(count)]
    samples, end = [], 0
    for task in tasks:
        first, end = end, end + task.info.size
        starts = [min(place, end - run) - first for place in places if first <= place < end]
        if starts and task.info.size >= run:
            samples.append((task, starts))
    return run, samples


def _split_rows(box: Box) -> list[Box]:
    """A box cut along its first axis into pieces of about `CHUNK` entries."""
    if not box:
        return [box]
    first, row = box[0], math.prod(piece.stop - piece.start for piece in box[1:])
    step = max(1, CHUNK // row)
    return [(slice(at, min(at + step, first.stop)), *box[1:]) for at in range(first.start, first.stop, step)]


def _lazy_tasks(task: TensorTask) -> list[TensorTask]:
    """The task with lazy inputs and its numbers on the host; one task per layer for a stacked leaf."""
    base = None if task.base is None else as_lazy(task.base)
    experts = [as_lazy(expert) for expert in task.experts]
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


def as_lazy(leaf: Any) -> LazyTensor:
    """A leaf as a lazy tensor."""
    return leaf if isinstance(leaf, LazyTensor) else ArrayTensor(np.asarray(jax.device_get(leaf)))


def _unread(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, LazyTensor) else leaf


def _on_host(value: Any) -> Any:
    if isinstance(value, LazyTensor):  # a statistic: read when its tensor is merged
        return value
    value = np.asarray(jax.device_get(value))
    return value.astype(np.float32) if value.dtype == np.float64 else value
