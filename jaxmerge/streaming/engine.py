"""The engine: workers that read, compute and write the parts of a plan.

Each worker does one part after another: while one waits for bytes, another computes or writes. Nothing is handed from
thread to thread, so a worker owns its memory, and the rule that makes reusing it safe holds in one place: JAX computes
straight from the memory that was read into (on the CPU it makes no copy, and its result may even be that memory), so a
chunk is computed, waited for and written before the next one is read.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num, Shaped

from jaxmerge.checkpoints.writer import CheckpointWriter
from jaxmerge.errors import CheckpointError
from jaxmerge.methods.assignment import TensorTask
from jaxmerge.methods.lazy import Chunk, MergedTensor, Reader, Search, empty_chunk, inputs, padded_size
from jaxmerge.streaming.budgeted import read_beside_base
from jaxmerge.streaming.content import BLOCK_BYTES
from jaxmerge.streaming.journal import Journal
from jaxmerge.streaming.manifest import BlockHashes
from jaxmerge.streaming.plan import Part, Plan, is_budgeted, merges_within
from jaxmerge.streaming.processes import ALONE, Processes, as_bytes, from_bytes
from jaxmerge.streaming.progress import Progress
from jaxmerge.streaming.reuse import Known
from jaxmerge.trees.lazy import SlicedTensor

Item = TypeVar("Item")
Result = TypeVar("Result")

_LARGE_BLOCK = 31 << 20  # just below the size from which malloc learns nothing
_ALIGNMENT = 4096  # a page; JAX takes memory without a copy from 64 on


class Worker:
    """What one thread works with: memory that it reuses, and the time that it spends.

    Attributes:
        chunk: entries read at a time.
        seconds: time by activity.
    """

    def __init__(self, chunk: int, stop: threading.Event):
        self.chunk, self._stop = chunk, stop
        self.seconds: dict[str, float] = {"read": 0.0, "compute": 0.0, "hash": 0.0, "write": 0.0}
        self._memory = np.empty(0, np.uint8)

    @contextlib.contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Adds the time that the block takes; before that, gives up if another worker has failed."""
        if self._stop.is_set():
            raise _StoppedError
        start = time.perf_counter()
        yield
        self.seconds[activity] += time.perf_counter() - start

    def arrays(self, count: int, length: int, dtype: np.dtype) -> list[Shaped[np.ndarray, " n"]]:
        """Arrays in the worker's memory; those of the call before are overwritten."""
        each = -(-length * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if self._memory.size < count * each:
            self.release()
            memory = np.empty(count * each + _ALIGNMENT, np.uint8)
            offset = -memory.ctypes.data % _ALIGNMENT
            self._memory = memory[offset : offset + count * each]
        return [self._memory[i * each :][: length * dtype.itemsize].view(dtype) for i in range(count)]

    def release(self) -> None:
        """Frees the memory."""
        self._memory = np.empty(0, np.uint8)


class Workers:
    """A pool of threads that share out work; the first error ends it and is raised.

    Attributes:
        workers: one for each thread.
    """

    def __init__(self, count: int, chunk: int):
        # Each chunk's results are fresh memory. Once glibc's malloc has seen a large block come and go, it keeps what
        # is freed for the next chunk, instead of having the system take it away and zero it again.
        np.empty(_LARGE_BLOCK, np.uint8)
        self._stop = threading.Event()
        self.workers = [Worker(chunk, self._stop) for _ in range(count)]

    @property
    def seconds(self) -> dict[str, float]:
        """Time by activity, summed over the workers."""
        return {name: sum(worker.seconds[name] for worker in self.workers) for name in self.workers[0].seconds}

    def run(
        self, function: Callable[[Worker, Item], Result], items: Sequence[Item], alone: bool = False
    ) -> list[Result]:
        """Calls a function for every item, in turn by the workers (or by the first of them); results are in order."""
        results: list[Any] = [None] * len(items)
        errors: list[BaseException] = []
        remaining = iter(range(len(items)))
        lock = threading.Lock()
        wide = jnp.result_type(float) == jnp.float64  # x64 may be on for the calling thread only

        def work(worker: Worker) -> None:
            try:
                with jax.enable_x64(wide):
                    while not self._stop.is_set():
                        with lock:
                            i = next(remaining, None)
                        if i is None:
                            return
                        results[i] = function(worker, items[i])
            except _StoppedError:
                pass
            except BaseException as error:
                errors.append(error)
                self._stop.set()

        workers = self.workers[:1] if alone else self.workers
        with ThreadPoolExecutor(len(workers), "jaxmerge") as threads:
            try:
                wait([threads.submit(work, worker) for worker in workers])
            except BaseException:  # Ctrl-C
                self._stop.set()
                raise
        if errors:
            raise errors[0]
        return results

    def release(self) -> None:
        """Frees the workers' memory."""
        for worker in self.workers:
            worker.release()


class _StoppedError(Exception):
    """Another worker has failed."""


class _Inputs(Reader):
    """The inputs of one tensor in a worker's memory: kept whole from the start, or read chunk by chunk each time."""

    def __init__(self, worker: Worker, task: TensorTask, keep: bool):
        self.chunk, self._worker, self._task = worker.chunk, worker, task
        self._sources = [source for source in (task.base, *task.experts) if source is not None]
        self._kept: list[np.ndarray] | None = None
        if keep:
            size, padding = task.info.size, 0 if task.method.whole_tensor else worker.chunk
            self._kept = worker.arrays(len(self._sources), size + padding, self._sources[0].dtype)
            self._read(0, size, self._kept)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        """The chunks of a run of the tensor; asking for the next one overwrites what is not kept."""
        task, stop = self._task, self._task.info.size if stop is None else stop
        if task.method.whole_tensor:
            assert self._kept is not None
            yield self._as_chunk(0, stop, [array.reshape(task.info.shape) for array in self._kept])
            return
        for at in range(start, stop, self.chunk):
            n = min(self.chunk, stop - at)
            length = padded_size(n, self.chunk)
            if self._kept is not None:
                arrays = [array[at : at + length] for array in self._kept]
            else:
                arrays = self._worker.arrays(len(self._sources), length, self._sources[0].dtype)
                self._read(at, n, arrays)
            yield self._as_chunk(at, n, arrays)

    def visit(self, tasks: Sequence[TensorTask], function: Callable[[TensorTask, Chunk], Result]) -> list[Result]:
        results = []
        for chunk in self.chunks():
            with self._worker.timed("compute"):
                results.append(function(self._task, chunk))
        return results

    def sample(self, task: TensorTask, starts: Sequence[int], run: int) -> Chunk:
        if self._kept is None:
            with self._worker.timed("read"):
                return super().sample(task, starts, run)
        chunk = empty_chunk(task, 0, run * len(starts), self.chunk)
        for (_, array), kept in zip(inputs(task, chunk), self._kept, strict=True):
            for i, start in enumerate(starts):
                array[i * run : (i + 1) * run] = kept[start : start + run]
        return chunk

    def _read(self, start: int, n: int, arrays: Sequence[Shaped[np.ndarray, " n"]]) -> None:
        base = self._task.base
        for source, array in zip(self._sources, arrays, strict=True):
            with self._worker.timed("read"):
                # The base is the first of them, so what an expert takes from it is here already.
                read_beside_base(source, base, start, array[:n], arrays[0][:n] if source is not base else None)
                array[n:] = 0

    def _as_chunk(self, start: int, n: int, arrays: list[Num[np.ndarray, "..."]]) -> Chunk:
        base = None if self._task.base is None else arrays[0]
        return Chunk(start, n, base, arrays if base is None else arrays[1:])


class AllWorkers(Reader):
    """Reads for a measurement over the model: every worker of every process takes chunks of all tensors."""

    def __init__(self, workers: Workers, progress: Progress, shares: Sequence[Plan], together: Processes):
        self.chunk, self._workers, self._progress = shares[0].chunk, workers, progress
        self._together = together
        if together.count > 1:
            self._owners = _owners(shares)
            # A block that is fetched for a sample, within an I/O budget, would be fetched again by its owner.
            self.samples = not any(is_budgeted(part.leaf) for share in shares for part in (*share.shared, *share.alone))

    def visit(self, tasks: Sequence[TensorTask], function: Callable[[TensorTask, Chunk], Result]) -> list[Any]:
        whole = tasks[0].method.whole_tensor
        items: list[tuple[TensorTask, int, int]] = []
        for task in tasks:
            step = task.info.size if whole else self.chunk
            items += [(task, at, min(at + step, task.info.size)) for at in range(0, task.info.size, max(step, 1))]

        def measure(worker: Worker, item: tuple[TensorTask, int, int]) -> Result:
            task, start, stop = item
            (chunk,) = _Inputs(worker, task, keep=whole).chunks(start, stop)
            with worker.timed("compute"):
                result = function(task, chunk)
            self._progress.advance((stop - start) * task.experts[0].dtype.itemsize)
            return result

        mine = [i for i in range(len(items)) if self._is_mine(i, *items[i])]
        total = sum((stop - at) * task.experts[0].dtype.itemsize for task, at, stop in (items[i] for i in mine))
        self._progress.begin("measuring", total)
        results: list[Any] = [None] * len(items)
        for i, result in zip(mine, self._workers.run(measure, [items[i] for i in mine], alone=whole), strict=True):
            results[i] = result
        return results

    def _is_mine(self, number: int, task: TensorTask, start: int, stop: int) -> bool:
        """Whether this process measures a chunk: the one that will merge it does, so that it fetches blocks once."""
        if self._together.count == 1:
            return True
        owners = self._owners.get(_identity(task))
        if owners is None:  # it is not merged now
            return number % self._together.count == self._together.index
        return owners[max(bisect.bisect_right(owners, (start, self._together.count)) - 1, 0)][1] == self._together.index

    def combine(self, totals: list[Any], search: Search) -> list[Any]:
        if self._together.count == 1:
            return totals
        mine = [i for i, total in enumerate(totals) if total is not None]
        found = {f"search/{name}": array for name, array in search.counts().items()}
        if mine:
            found["chunks"] = np.array(mine, np.int64)
            parts = zip(*(totals[i] for i in mine), strict=True)
            found |= {f"total/{number}": np.stack(values) for number, values in enumerate(parts)}
        everyone = [from_bytes(data) for data in self._together.exchange("measured", as_bytes(found))]
        for told in everyone:
            leaves = [told[f"total/{number}"] for number in range(sum(name.startswith("total/") for name in told))]
            for row, i in enumerate(told.get("chunks", ())):
                totals[i] = [leaf[row] for leaf in leaves]
        search.take_counts(
            [{n.removeprefix("search/"): x for n, x in told.items() if n.startswith("search/")} for told in everyone]
        )
        return totals


def _owners(shares: Sequence[Plan]) -> dict[Any, list[tuple[int, int]]]:
    """For each task the first entries of the runs in which it is shared out, each with the process that has it."""
    found: dict[Any, dict[int, int]] = {}
    for process, share in enumerate(shares):
        for part in (*share.shared, *share.alone):
            for merged in merges_within(part.leaf):
                start = part.start if merged is part.leaf else 0
                found.setdefault(_identity(merged.task), {}).setdefault(start, process)
    return {task: sorted(owners.items()) for task, owners in found.items()}


def _identity(task: TensorTask) -> Any:
    """What the tasks of tied tensors have in common: one of them is merged, and all are measured."""
    inputs = [tensor for tensor in (task.base, *task.experts) if tensor is not None]
    return tuple((id(x.source), str(x.box)) if isinstance(x, SlicedTensor) else (id(x), "") for x in inputs)


def restore(
    known: Mapping[str, Known],
    workers: int,
    writer: CheckpointWriter,
    progress: Progress,
    hashes: BlockHashes | None = None,
    journal: Journal | None = None,
) -> tuple[dict[str, set[int]], dict[str, float]]:
    """Takes over tensors and blocks whose bytes are known, from an earlier output or from the files of a killed writer.

    Args:
        known: the tensors.
        workers: how many threads do it.
        writer: where they go.
        progress: told what is done.
        hashes: told their hashes.
        journal: told what has been copied.

    Returns:
        The numbers of the blocks that are there now, by tensor; the others did not have the hashes that they should
        have. A tensor that was known whole is there whole, or not at all. And seconds by activity, summed over the
        workers.
    """

    def take(worker: Worker, name: str) -> set[int]:
        spec, found = writer.specs[name], known[name]
        step, here = BLOCK_BYTES // spec.dtype.itemsize, set()
        for number, start in enumerate(range(0, spec.size, step)):
            if not found.blocks[number]:
                continue
            (values,) = worker.arrays(1, min(step, spec.size - start), spec.dtype)
            try:
                with worker.timed("read"):
                    if found.source is None:
                        writer.read_back(name, start, values)
                    else:
                        found.source.read_flat(start, values)
                with worker.timed("hash"):
                    same = hashlib.sha256(values.view(np.uint8).data).hexdigest() == found.blocks[number]
            except CheckpointError:  # it is truncated
                same = False
            if not same and found.is_whole:
                writer.discard(name)
                return set()
            if not same:
                continue
            if found.source is not None:
                with worker.timed("write"):
                    writer.write(name, start, values)
            here.add(number)
            progress.advance(values.nbytes)
        if hashes is not None:
            for number in here:
                hashes.take_over(name, number, found.blocks[number])
        if found.source is None:
            writer.take_over(name)
        elif journal is not None and found.is_whole:
            journal.note(name, found.blocks)
        return here

    progress.begin("taking over", sum(found.nbytes_of(writer.specs[name]) for name, found in known.items()))
    pool = Workers(workers, BLOCK_BYTES)
    names = list(known)
    taken = pool.run(take, names)
    return dict(zip(names, taken, strict=True)), pool.seconds


def stream(
    plan: Plan,
    writer: CheckpointWriter,
    progress: Progress,
    hashes: BlockHashes | None = None,
    journal: Journal | None = None,
    together: Processes = ALONE,
) -> dict[str, float]:
    """Does the work of a plan, or this process's share of it.

    Args:
        plan: what to do.
        writer: where the tensors go; it is neither finished nor aborted here.
        progress: told what is done.
        hashes: told what is written.
        journal: told which tensors are complete; it needs the hashes.
        together: the processes that share the work.

    Returns:
        Seconds by activity, summed over the workers.
    """
    workers = Workers(plan.workers, plan.chunk)
    parts = (*plan.shared, *plan.alone)
    shares = [plan] if together.count == 1 else plan.shares(together.count, list(writer.specs))
    for merged in dict.fromkeys(merged for part in parts for merged in merges_within(part.leaf)):
        if "model" in merged.task.method.passes:
            merged.merge.stats(merged.task, AllWorkers(workers, progress, shares, together))

    def process(worker: Worker, part: Part) -> None:
        leaf = part.leaf
        pieces = _merged(worker, leaf, part) if isinstance(leaf, MergedTensor) else _copied(worker, part)
        for start, values in pieces:
            values = values.astype(part.dtype, copy=False)
            if hashes is not None:
                with worker.timed("hash"):
                    hashes.add(part.name, part.at + start, values)
            with worker.timed("write"):
                complete = writer.write(part.name, part.at + start, values)
            if complete and journal is not None and hashes is not None:
                with worker.timed("write"):
                    journal.note(part.name, hashes.blocks(part.name))
            progress.advance(values.size * part.dtype.itemsize)

    share = shares[together.index]
    if parts:
        progress.begin("merging", share.to_write)
    workers.run(process, share.shared)
    workers.release()
    workers.run(process, share.alone, alone=True)
    return workers.seconds


def _merged(worker: Worker, leaf: MergedTensor, part: Part) -> Iterator[tuple[int, Shaped[np.ndarray, " n"]]]:
    """The merged entries of a part, piece by piece."""
    merge, task = leaf.merge, leaf.task
    given = _Inputs(worker, task, part.keep)
    stats = merge.stats(task, given)
    for chunk in given.chunks(part.start, part.stop):
        with worker.timed("compute"):
            merged = merge.merge(task, chunk, stats)
        yield chunk.start, merged.reshape(-1)[: chunk.size]


def _copied(worker: Worker, part: Part) -> Iterator[tuple[int, Shaped[np.ndarray, " n"]]]:
    """The entries of a part that is only read."""
    step = part.stop - part.start if part.keep else worker.chunk
    for start in range(part.start, part.stop, step):
        (values,) = worker.arrays(1, min(step, part.stop - start), part.leaf.dtype)
        with worker.timed("read"):
            part.leaf.read_flat(start, values)
        yield start, values
