"""`average_checkpoints`: the mean of any number of checkpoints, from disk to disk, in the memory of one chunk.

`merge_checkpoint(jm.linear(), …)` gives the same for a few: it holds a chunk of every checkpoint, compiles a program
with an input for each, and keeps all files open. Here each chunk is averaged by one small program that takes a few
checkpoints after the other, and files beyond half of what the system allows are opened when they are read.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, Shaped

from jaxmerge.checkpoints.base import Checkpoint, open_checkpoint
from jaxmerge.checkpoints.stored import StoredTensor
from jaxmerge.checkpoints.stores import ByteCounter, ByteSource, FileSource
from jaxmerge.errors import CheckpointError, NonFiniteError, RecipeError
from jaxmerge.methods.assignment import Assignment, assign
from jaxmerge.methods.averaging import linear
from jaxmerge.methods.checkpoint_averages import moved
from jaxmerge.methods.coefficients import check_range
from jaxmerge.methods.lazy import CopiedTensor, as_lazy, nonfinite_message, padded_size
from jaxmerge.streaming.report import StreamReport
from jaxmerge.streaming.saving import DEFAULT_BUDGET, save_lazily
from jaxmerge.streaming.sources import Source
from jaxmerge.trees.checks import name_experts
from jaxmerge.trees.info import Rules
from jaxmerge.trees.lazy import Box, LazyTensor, StackedTensor
from jaxmerge.trees.paths import Params, named_leaves, with_leaves
from jaxmerge.trees.task_vectors import accumulation_dtype

_TOGETHER = 8  # checkpoints that one call of the program takes
_RUN = 1 << 17  # entries, so that what is read of those and the mean stay in cache


def average_checkpoints(
    checkpoints: Sequence[Source] | Mapping[str, Source],
    *,
    out: str | Path,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    decay: float = 1.0,
    format: str | None = None,
    memory_budget: int | str = DEFAULT_BUDGET,
    max_shard_bytes: int | str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: bool | None = None,
    processes: Literal["all", "own"] = "all",
) -> StreamReport:
    r"""Averages checkpoints into a checkpoint, disk to disk; memory and compilation do not grow with their number.

    $\theta = \sum_i w_i d^{K-i} \theta_i / \sum_i w_i d^{K-i}$, in float32 with the rounding errors kept, rounded once
    to the dtype of the checkpoints. `jm.running_average` gives the same from parameters in memory.

    Args:
        checkpoints: a list or a dict by name, in the order of training: paths or URLs, opened checkpoints, or trees.
        out: a local path: a folder, or a file with the suffix `.safetensors` or `.npz`.
        weights: $w_i$, not negative, in order or by name, such as those of `jm.weights_from_metric`; equal by default.
        decay: $d$: 1 for the mean; below 1 for an exponential moving average, in which the last checkpoint counts most.
        format: as for `merge_checkpoint`.
        memory_budget: as for `merge_checkpoint`.
        max_shard_bytes: as for `merge_checkpoint`.
        overwrite: replace what stands at `out`, when everything is written.
        allow_nonfinite: let NaN and infinity in the inputs pass.
        progress: show what will be read and written, and a bar; by default in a terminal or notebook.
        processes: as for `merge_checkpoint`.

    Returns:
        What it took; `bytes_read` has one entry for all checkpoints together.

    Raises:
        CheckpointError: an input cannot be opened or read, or the output cannot be written.
        StructureError, ShapeError, DTypeError: the checkpoints differ.
        NonFiniteError: NaN or infinity in an input.
        RecipeError: a weight is negative, all are zero, or there are not as many as checkpoints.
        BudgetError, ConflictError: as for `merge_checkpoint`.
    """
    named = name_experts(checkpoints)
    rates = _rates(weights, decay, tuple(named))
    with contextlib.ExitStack() as stack:
        opened = _Opened(stack)
        trees = {name: opened.params(name, source) for name, source in named.items()}
        job = assign(linear(), trees, None, None, Rules())
        reference = opened.checkpoints.get(next(iter(named)))
        averaged = _averaged(job, rates, allow_nonfinite)
        is_folder = format in (None, "safetensors") and Path(out).suffix not in (".safetensors", ".npz")
        already_read = opened.bytes_read
        report = save_lazily(
            averaged,
            out,
            format=format,
            metadata=None if reference is None else reference.metadata,
            side_files=reference.side_files if reference and is_folder else None,
            memory_budget=memory_budget,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            progress=progress,
            sources=opened.checkpoints,
            processes=processes,
        )
        read = opened.bytes_read - already_read
    leaves = {id(leaf): leaf for leaf in named_leaves(averaged).values()}.values()
    merged = sum(isinstance(leaf, AveragedTensor) for leaf in leaves)
    return dataclasses.replace(report, merged=merged, bytes_read={f"{len(named)} checkpoints": read})


class AveragedTensor(LazyTensor):
    """The weighted mean of tensors, read one after the other.

    Attributes:
        tensors: what is averaged.
        rates: by what share of its distance each moves the mean.
        names: of the checkpoints they are from, for messages; None lets NaN and infinity pass.
        source: the tensors as what this one reads, for those who plan memory and reading.
    """

    def __init__(self, name: str, tensors: Sequence[LazyTensor], rates: Sequence[float], names: tuple[str, ...] | None):
        first = tensors[0]
        self.name, self.tensors, self.rates, self.names = name, tensors, rates, names
        self.shape, self.dtype = first.shape, first.dtype
        self.label = f"average of {len(tensors)} checkpoints, tensor {name!r}"
        self._wide = jax.dtypes.canonicalize_dtype(accumulation_dtype(self.dtype))
        self.source = StackedTensor([tensor.astype(accumulation_dtype(self.dtype)) for tensor in tensors])

    def read(self, box: Box) -> Shaped[np.ndarray, "..."]:
        out = np.empty([piece.stop - piece.start for piece in box], self.dtype)

        def read(tensor: LazyTensor, into: Shaped[np.ndarray, " n"]) -> None:
            into[...] = tensor.read(box).reshape(-1)

        self._average(read, out.reshape(-1))
        return out

    def read_flat(self, start: int, out: Shaped[np.ndarray, " n"]) -> None:
        for at in range(0, out.size, _RUN):
            self._average(lambda tensor, into, at=at: tensor.read_flat(start + at, into), out[at : at + _RUN])

    def _average(
        self, read: Callable[[LazyTensor, Shaped[np.ndarray, " n"]], None], out: Shaped[np.ndarray, " n"]
    ) -> None:
        """Fills `out` with the mean of what `read` reads."""
        length = padded_size(out.size, max(out.size, _RUN))
        values = [np.zeros(length, self.dtype) for _ in range(min(_TOGETHER, len(self.tensors)))]
        mean, rest = jnp.zeros(length, self._wide), jnp.zeros(length, self._wide)
        for first in range(0, len(self.tensors), len(values)):
            tensors = self.tensors[first : first + len(values)]
            rates = np.zeros(len(values), self._wide)  # 0 for those that are missing from the last group
            rates[: len(tensors)] = self.rates[first : first + len(values)]
            for tensor, into in zip(tensors, values, strict=False):
                read(tensor, into[: out.size])
            mean, rest = _move(mean, rest, values, rates)
            jax.block_until_ready(rest)  # the program computes from the memory that is read into next
        if self.names is not None and not np.isfinite(mean).all():
            self._check_finite(read, values[0][: out.size])
        out[...] = np.asarray(mean)[: out.size].astype(self.dtype)

    def _check_finite(self, read: Callable[[LazyTensor, Any], None], into: Shaped[np.ndarray, " n"]) -> None:
        """Raises the error for the first checkpoint that is not finite, reading again."""
        for name, tensor in zip(self.names or (), self.tensors, strict=True):
            read(tensor, into)
            if not np.isfinite(into).all():
                raise NonFiniteError(nonfinite_message(f"checkpoint {name!r}", self.name))


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _move(
    mean: Float[Array, " n"], rest: Any, values: list[Num[Array, " n"]], rates: Float[Array, " K"]
) -> tuple[Float[Array, " n"], Any]:
    """A mean moved by some values in turn."""
    for i, value in enumerate(values):
        mean, rest = moved(mean, rest, value, rates[i])
    return mean, rest


def _averaged(job: Assignment, rates: Sequence[float], allow_nonfinite: bool) -> Params:
    """The averages as lazy leaves; tensors that are tied in all checkpoints are tied in the result."""
    leaves: dict[str, LazyTensor] = {name: CopiedTensor(job, name) for name in job.copied}
    tied: dict[tuple[int, ...], LazyTensor] = {}
    for name, task in job.tasks.items():
        key = tuple(map(id, task.experts))
        if key not in tied:
            tensors = [as_lazy(x) for x in task.experts]
            tied[key] = AveragedTensor(name, tensors, rates, None if allow_nonfinite else job.experts)
        leaves[name] = tied[key]
    return with_leaves(job.reference, leaves)


def _rates(weights: Sequence[float] | Mapping[str, float] | None, decay: float, names: tuple[str, ...]) -> list[float]:
    """By what share of its distance each checkpoint moves the mean."""
    check_range("decay", decay, 0, 1, open_low=True)
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise RecipeError(f"weights are given for {sorted(weights)}, but the checkpoints are {list(names)}")
        weights = [weights[name] for name in names]
    numbers = [1.0] * len(names) if weights is None else [float(w) for w in weights]
    check_range("weight", numbers, 0, float("inf"))
    if len(numbers) != len(names):
        raise RecipeError(f"found {len(numbers)} weights, expected {len(names)}, one per checkpoint")
    if not any(numbers):
        raise RecipeError("every weight is 0; expected one that is positive")
    total, rates = 0.0, []
    for weight in numbers:
        total = decay * total + weight
        rates.append(weight / total if weight else 0.0)
    return rates


class _Opened:
    """The checkpoints, of which a limited number stays open.

    Attributes:
        checkpoints: those given by location or opened, by name; some are closed again.
    """

    def __init__(self, stack: contextlib.ExitStack):
        self.checkpoints: dict[str, Checkpoint] = {}
        self._stack, self._files, self._late = stack, 0, ByteCounter()
        self._kept_open = files_kept_open()

    @property
    def bytes_read(self) -> int:
        """Bytes fetched from all of them so far, without headers."""
        return self._late.total + sum(checkpoint.bytes_read for checkpoint in self.checkpoints.values())

    def params(self, name: str, source: Source) -> Params:
        """The parameters of one more."""
        if isinstance(source, Checkpoint):
            self.checkpoints[name] = source
            return source.params
        if not isinstance(source, str | Path):
            return source
        checkpoint = self.checkpoints[name] = open_checkpoint(source)
        leaves = named_leaves(checkpoint.params)
        sources = {id(leaf.source): leaf.source for leaf in leaves.values() if isinstance(leaf, StoredTensor)}
        self._files += len(sources)
        late = {id(leaf): self._late_tensor(leaf, checkpoint) for leaf in leaves.values()}
        if self._files <= self._kept_open or None in late.values():
            self._stack.enter_context(checkpoint)
            return checkpoint.params
        checkpoint.close()
        return with_leaves(checkpoint.params, {tensor: late[id(leaf)] for tensor, leaf in leaves.items()})

    def _late_tensor(self, leaf: LazyTensor, checkpoint: Checkpoint) -> LazyTensor | None:
        """A tensor whose file is opened for each read; None for one that is no run of a local file."""
        if not (isinstance(leaf, StoredTensor) and isinstance(leaf.source, FileSource)):
            return None
        path = Path(checkpoint.path)
        file = path / leaf.source.label if path.is_dir() else path
        late = copy.copy(leaf)
        late.source = LateSource(file, leaf.source.size, self._late)
        return late if file.is_file() else None


class LateSource(ByteSource):
    """A local file that is open only while it is read."""

    gap = 0

    def __init__(self, path: Path, size: int, counter: ByteCounter):
        self._path, self.size, self.label, self._counter = path, size, path.name, counter

    def read_into(self, offset: int, out: np.ndarray) -> None:
        try:
            source = FileSource(self._path, self._counter)
        except OSError as error:
            raise CheckpointError(f"cannot read {self._path}: {error.strerror}; was it moved meanwhile?") from error
        try:
            source.read_into(offset, out)
        finally:
            source.close()

    def ends_at(self, offset: int) -> bool:
        return self.size == offset


def files_kept_open() -> int:
    """How many files of inputs may stay open: half of those that the process may open still."""
    return (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/dev/fd"))) // 2
