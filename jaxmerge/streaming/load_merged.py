"""`load_merged`: from checkpoints on disk to a merged model on devices, with no checkpoint in between."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxmerge.errors import DTypeError, RecipeError, ShapeError
from jaxmerge.methods.assignment import Assignment
from jaxmerge.methods.lazy import CopiedTensor, merge_lazily
from jaxmerge.methods.method import Method
from jaxmerge.streaming.fingerprint import digest
from jaxmerge.streaming.manifest import versions
from jaxmerge.streaming.placing import Placer
from jaxmerge.streaming.processes import facts_of, working
from jaxmerge.streaming.progress import showing
from jaxmerge.streaming.report import peak_memory
from jaxmerge.streaming.sizes import format_bytes
from jaxmerge.streaming.sources import Source, opened_merge
from jaxmerge.trees.checks import cast
from jaxmerge.trees.info import Rules
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.partitioning import PartitionRules, check_same_names, partition_shardings, shardings_of
from jaxmerge.trees.paths import Params, named_leaves, with_leaves


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """A model that was merged while it was loaded, as one process saw it.

    Attributes:
        tensors: number of tensors, tied ones counted once.
        copied: how many of them are not floating point, and were copied.
        bytes_read: bytes that this process fetched from each checkpoint that was given by path or opened, by the
            expert's name (`"the base"` for the base).
        nbytes: bytes of the tensors on the devices of this process, with those that several devices hold counted once.
        seconds: wall time by phase: `open` (and check), `load` (read, merge, put on devices).
        host_peak: bytes of slices that were on the host at one time, at most.
        memory_peak: largest resident memory of this process since it started, in bytes.
    """

    tensors: int
    copied: int
    bytes_read: Mapping[str, int]
    nbytes: int
    seconds: Mapping[str, float]
    host_peak: int
    memory_peak: int

    def rows(self) -> list[tuple[str, str]]:
        """The table: what, how much."""
        return [
            ("tensors", f"{self.tensors - self.copied} merged, {self.copied} copied"),
            *((f"read from {name}", format_bytes(n)) for name, n in self.bytes_read.items()),
            ("on this process's devices", format_bytes(self.nbytes)),
            ("seconds", ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in self.seconds.items())),
            ("slices on the host at one time", format_bytes(self.host_peak)),
            ("peak memory of the process", format_bytes(self.memory_peak)),
        ]

    def __str__(self) -> str:
        width = max(len(what) for what, _ in self.rows())
        return "\n".join(f"{what:<{width}}  {how_much}" for what, how_much in self.rows())


def load_merged(
    method: Method,
    experts: Sequence[Source] | Mapping[str, Source],
    *,
    base: Source | None = None,
    shardings: Any = None,
    mesh: Mesh | None = None,
    partition: PartitionRules | None = None,
    target: Params | None = None,
    names: Callable[[Params], Params] | None = None,
    key: Any = None,
    rules: Rules = Rules(),
    dtype: str | None = None,
    allow_nonfinite: bool = False,
    return_report: bool = False,
    progress: bool | None = None,
) -> Any:
    """Merges checkpoints into arrays on devices, tensor by tensor, each device's part read on its own.

    The result is that of `jm.merge` on the loaded checkpoints in these shardings, but no model is ever whole on the
    host: it holds at most four slices at one time, each the part of one input tensor that one device holds. The devices
    hold the inputs of one tensor beside the result (of one layer, for a stacked tensor). What no device of this process
    needs is not read, so several processes (`jax.distributed`; all must call this alike) read each input once between
    them where nothing is replicated. Methods that measure over the whole model read it once or twice before that, by
    chunks and on the host (whole tensors, for methods that need them whole).

    Args:
        method: what to do, such as `jm.ties(density=0.2)`.
        experts: a list or a dict by name of checkpoints: paths or URLs, opened checkpoints, or parameter trees.
        base: the checkpoint that the experts were tuned from; task-vector methods need it.
        shardings: one `jax.sharding.Sharding` for all tensors, or a tree of them with the names of the result, such as
            `nnx.get_named_sharding` or `jm.partition_shardings` give. By default those that the leaves of `target`
            have, if they have any, and otherwise the default device.
        mesh: with `partition`, in place of `shardings`.
        partition: rules for `jm.partition_shardings`: `{pattern: PartitionSpec}` on the names of the result, or logical
            axis rules for a `target` that names its axes.
        target: the parameters to be filled, abstract (`jax.eval_shape`, `nnx.eval_shape`) or not: an `nnx.State`,
            Linen's parameters, any tree. The result comes in that container and must have its names, shapes and dtypes.
        names: turns the checkpoints' names and layouts into those of the result, such as `jm.naming("llama")`: it is
            given the merged tree, with lazy leaves. Coefficients by name and random draws go by the checkpoints' names.
        key: PRNG key (or an integer seed) for methods that draw.
        rules: how the checkpoints' names are read, where the defaults guess wrong.
        dtype: floating-point dtype of the result, which lets the inputs have different ones: they are merged in float32
            at least, and rounded once. None: that of the inputs.
        allow_nonfinite: let NaN and infinity in the inputs pass.
        return_report: also return a `LoadReport`.
        progress: show a bar; by default in a terminal or notebook, by the first process.

    Returns:
        The merged parameters, with `jax.Array` leaves; or those and a report.

    Raises:
        CheckpointError: an input cannot be opened or read.
        StructureError, ShapeError, DTypeError: experts and base differ, or result and target do.
        NonFiniteError: NaN or infinity in an input.
        RecipeError: the method does not fit these experts, or the shardings do not fit the tensors.
    """
    started = time.perf_counter()
    several = _several(shardings, mesh, target)
    with working("all" if several else "own") as processes, contextlib.ExitStack() as opened:
        sources, _, job = opened_merge(opened, method, experts, base, key, rules, dtype)
        _check_in_reach(job)
        merged = merge_lazily(job, allow_nonfinite)
        merged = merged if dtype is None else cast(merged, dtype)
        merged = merged if names is None else names(merged)
        aims, container = _aims(merged, shardings, mesh, partition, target)
        leaves = named_leaves(merged)
        processes.agree(lambda: {**facts_of(sources), "what is merged, or its shardings": _fact(job, leaves, aims)})
        before = {name: source.bytes_read for name, source in sources.items()}
        opening = time.perf_counter() - started

        progress = False if progress is None and jax.process_index() > 0 else progress
        shown = opened.enter_context(showing(progress))
        placer = opened.enter_context(Placer(processes))
        for name, sharding in aims.items():
            placer.expect(leaves[name], sharding)
            placer.measure(leaves[name], shown)
        nbytes = {name: _local_bytes(leaf, aims[name]) for name, leaf in leaves.items()}
        shown.begin("merging", sum(nbytes.values()))
        arrays = {}
        for name, sharding in aims.items():
            arrays[name] = placer.place(leaves[name], sharding)
            shown.advance(nbytes[name])
        placer.settle()
        result = with_leaves(container, arrays)
        if not return_report:
            return result
        once = {id(leaf): (leaf, nbytes[name]) for name, leaf in leaves.items()}
        report = LoadReport(
            tensors=len(once),
            copied=sum(isinstance(leaf, CopiedTensor) for leaf, _ in once.values()),
            bytes_read={name: source.bytes_read - before[name] for name, source in sources.items()},
            nbytes=sum(n for _, n in once.values()),
            seconds={"open": opening, "load": time.perf_counter() - started - opening},
            host_peak=placer.host_peak,
            memory_peak=peak_memory(),
        )
        return result, report


def _check_in_reach(job: Assignment) -> None:
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in job.leaves()):
        raise RecipeError(
            "an expert or the base is in memory already, on the devices of several processes; merge such arrays "
            "with jm.merge, for which jm.materialize loads the others in the same shardings"
        )


def _aims(
    merged: Params, shardings: Any, mesh: Mesh | None, partition: PartitionRules | None, target: Params | None
) -> tuple[dict[str, Sharding | None], Params]:
    """The sharding of each tensor, in the order in which they are loaded, and the container of the result."""
    container = merged if target is None else target
    if (mesh is None) != (partition is None):
        raise RecipeError("mesh and partition belong together: the rules say along which axes of the mesh to cut")
    if partition is not None and shardings is not None:
        raise RecipeError("shardings were given twice, as shardings= and as partition=; leave one out")
    leaves = named_leaves(merged)
    if target is not None:
        _check_target(leaves, named_leaves(target))
    if partition is not None:
        assert mesh is not None
        shardings = partition_shardings(container, mesh, partition)
    if shardings is None and target is not None:
        shardings = _own_shardings(named_leaves(target))
    found = shardings_of(container, shardings)
    return {name: found[name] for name in leaves}, container


def _check_target(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Checks that the merged tensors are those that the target has a place for."""
    remedy = (
        "names= turns the checkpoints' names into the target's (jm.naming, jm.renamed); a target has parameters only "
        "(nnx.state(model, nnx.Param))"
    )
    check_same_names(found, wanted, "the merged model", remedy)
    for name, leaf in wanted.items():
        shape, dtype = tuple(found[name].shape), jax.dtypes.canonicalize_dtype(found[name].dtype)
        if shape != tuple(leaf.shape):
            raise ShapeError(
                f"the merged model, tensor {name!r}: found shape {shape}, expected {tuple(leaf.shape)} as in the "
                "target; names= can turn tensors (jm.naming), and the target must be made with the checkpoints' sizes"
            )
        if dtype != leaf.dtype:
            raise DTypeError(
                f"the merged model, tensor {name!r}: found dtype {dtype}, expected {leaf.dtype} as in the target; "
                "pass dtype= to cast the result, or make the target in that dtype"
            )


def _own_shardings(leaves: Mapping[str, Any]) -> dict[str, Any] | None:
    """The shardings that leaves have; None if they have none."""
    found = {name: getattr(leaf, "sharding", None) for name, leaf in leaves.items()}
    if not any(found.values()):
        return None
    mesh = next(x.mesh for x in found.values() if isinstance(x, NamedSharding))
    return {name: NamedSharding(mesh, PartitionSpec()) if x is None else x for name, x in found.items()}


def _several(shardings: Any, mesh: Mesh | None, target: Params | None) -> bool:
    """Whether devices of other processes are meant, as far as one can tell before anything is opened."""
    if jax.process_count() == 1:
        return False
    given = [shardings] if isinstance(shardings, Sharding) else list(named_leaves(shardings or {}).values())
    if mesh is not None:
        given.append(NamedSharding(mesh, PartitionSpec()))
    given += [getattr(leaf, "sharding", None) for leaf in named_leaves({} if target is None else target).values()]
    return any(isinstance(x, Sharding) and not x.is_fully_addressable for x in given)


def _fact(job: Assignment, leaves: Mapping[str, Any], aims: Mapping[str, Any]) -> str:
    """What must be the same in all processes, as a digest: versions, coefficients, seeds, tensors and shardings."""
    told: list[Any] = [versions(), job.has_base, list(job.experts)]
    for name, task in job.tasks.items():
        numbers = [x for x in jax.tree.leaves((task.method, task.info)) if not isinstance(x, LazyTensor)]
        values = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.device_get(numbers))).hexdigest()
        told.append([name, type(task.method).__name__, values])
    return digest(told + [[name, list(x.shape), str(x.dtype), str(aims[name])] for name, x in leaves.items()])


def _local_bytes(leaf: Any, sharding: Sharding | None) -> int:
    """Bytes of the parts of a tensor that devices of this process hold, each counted once."""
    if sharding is None:
        return leaf.size * leaf.dtype.itemsize
    indices = {str(index) for index in sharding.addressable_devices_indices_map(tuple(leaf.shape)).values()}
    shard = sharding.shard_shape(tuple(leaf.shape))
    return len(indices) * leaf.dtype.itemsize * math.prod(shard)
