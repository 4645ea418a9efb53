"""`merge`: one call for parameters in memory, under jit, and for lazy parameters."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge.errors import NonFiniteError, RecipeError, StructureError
from jaxmerge.methods.assignment import Assignment, ExpertTrees, TensorTask, assign
from jaxmerge.methods.given import read_given
from jaxmerge.methods.lazy import disagreement_message, merge_lazily, nonfinite_message
from jaxmerge.methods.measurements import Total, begin_search, next_round, search_result, search_rounds
from jaxmerge.methods.method import Method
from jaxmerge.methods.programs import Batch, ModelStats, count_whole, finite_inputs, measure_whole, merge_whole
from jaxmerge.methods.report import MergeReport, TensorReport
from jaxmerge.methods.sharding import spreading_mesh
from jaxmerge.trees.info import Rules
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import Params, with_leaves
from jaxmerge.trees.task_vectors import accumulation_dtype


def merge(
    method: Method,
    experts: ExpertTrees,
    *,
    base: Params | None = None,
    key: Any = None,
    rules: Rules = Rules(),
    allow_nonfinite: bool = False,
    return_report: bool = False,
) -> Any:
    """Merges experts into one set of parameters.

    Pure, and a JAX function of everything in it: it runs under `jax.jit`, `jax.grad` and `jax.vmap` with respect to the
    method's coefficients and the parameters, and keeps the sharding of its inputs. Outside of a transformation it
    compiles one program per distinct tensor shape. If any leaf is a `LazyTensor` the result is lazy too: nothing is
    read until a slice of it is asked for.

    Sharded tensors stay where they are; of what is measured, sums and counts travel. A method that factorises or sorts
    needs a matrix whole: equal-shaped ones are then spread over the devices, each merged by one. Inside of a trace that
    takes arguments that are sharded on a mesh with axes of one type, automatic or explicit; the compiler gathers the
    matrix on every device otherwise, and where no other has its shape. `jax.jit(..., donate_argnums=…)` around a merge
    has the result take the place of a donated model.

    Args:
        method: what to do, such as `jm.ties(density=0.2)`.
        experts: parameter trees with the same tensors, a list or a dict by name (names appear in reports and errors and
            key the random draws). Lists are named `expert_0`, `expert_1`, … As an argument of a jitted function a dict
            comes out sorted by name, as JAX sorts all dicts: give coefficients by name there, or a list of experts.
        base: parameters that the experts were tuned from; task-vector methods need it.
        key: PRNG key (or an integer seed) for methods that draw.
        rules: how tensor names are read, where the defaults guess wrong; which leaves are layer-stacked.
        allow_nonfinite: let NaN and infinity pass. Under a transformation they always do.
        return_report: also return a `MergeReport` of what happened to each tensor.

    Returns:
        Parameters in the base's container (the first expert's without a base), with its shapes, dtypes and shardings;
        or that and a report. Leaves that are not floating point are the base's.

    Raises:
        StructureError, ShapeError, DTypeError: experts and base differ, or are on different devices.
        NonFiniteError: NaN or infinity in an input.
        RecipeError: the method does not fit these experts, or lacks a base, a key or a value for some tensor.
    """
    job = assign(method, experts, base, key, rules)
    leaves = job.leaves()
    traced = any(isinstance(x, Tracer) for x in (*leaves, *jax.tree.leaves((method, key))))
    if return_report and (traced or any(isinstance(x, LazyTensor) for x in leaves)):
        raise RecipeError(
            "return_report=True needs arrays in memory outside of jax transformations; merge_checkpoint reports too"
        )
    if any(isinstance(x, LazyTensor) for x in leaves):
        return merge_lazily(job, allow_nonfinite)

    if not traced:
        _check_devices(job)
    _check_copied(job, traced)
    buckets = _buckets(job, traced)
    model_stats = _measure_model(buckets, traced)
    merged: dict[str, Any] = {name: reference for name, (reference, _) in job.copied.items()}
    told = []
    for bucket in buckets:
        known, batch, sharding = model_stats[bucket.group], bucket.batch, bucket.sharding
        result, flags, noted = bucket.in_turn(
            merge_whole(*bucket.operands, known, batch=batch, noted=return_report, sharding=sharding)
        )
        merged.update(zip(bucket.names, jnp.unstack(result) if len(bucket.names) > 1 else [result], strict=True))
        told.append((flags, noted))
    result = with_leaves(job.reference, merged)
    if traced or (allow_nonfinite and not return_report):
        return result
    finite, notes = _by_tensor(buckets, jax.device_get(told))
    if not allow_nonfinite:
        _check_finite(job, finite)
    return (result, _report(job, notes)) if return_report else result


def _by_tensor(buckets: list[_Bucket], told: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flags and notes by tensor name, of which the program of tensors that are spread gives a row for each."""
    finite, notes = {}, {}
    for bucket, (flags, noted) in zip(buckets, told, strict=True):
        if bucket.batch == "spread" and len(bucket.names) == 1:  # the rows are layers of one
            flags, noted = flags.all(axis=0), jax.tree.map(lambda x: x.sum(axis=0, dtype=x.dtype), noted)
        several = len(bucket.names) > 1
        for row, name in enumerate(bucket.names):
            own = jax.tree.map(operator.itemgetter(row), (flags, noted)) if several else (flags, noted)
            finite[name], notes[name] = own
    return finite, notes


def _check_finite(job: Assignment, finite: dict[str, Any]) -> None:
    """Raises the error for the first input that is not finite; `finite` has what `merge_whole` tells, by name."""
    for name, flags in finite.items():
        if flags.ndim == 0:
            if flags:
                continue
            task = job.tasks[name]
            flags = jax.device_get(jax.jit(finite_inputs)(task.base, task.experts))
        for index, good in enumerate(flags):
            if not good:
                raise NonFiniteError(nonfinite_message(job.source_name(index), name))


@dataclasses.dataclass(frozen=True)
class _Bucket:
    """Tensors that one call of a program merges: one, or inside a trace all that could share a program.

    Attributes:
        names: of the tensors.
        group: the group of tensors that share measurements over the model.
        parts: method, base, experts and info, of each tensor or of all stacked.
        batch: how the operands' leading axis is to be understood.
        sharding: what the result must be constrained to, or None.
    """

    names: list[str]
    group: int
    parts: list[tuple[Any, ...]]
    batch: Batch | None
    sharding: Any

    @property
    def operands(self) -> tuple[Any, ...]:
        """What the program is given. Stacked when it is needed, so that a copy of a few tensors is held at a time."""
        return self.parts[0] if len(self.parts) == 1 else jax.tree.map(_stacked, *self.parts)

    def in_turn(self, result: Any) -> Any:
        """`result`, computed where it must be: on CPU devices the collectives of two programs at once may deadlock."""
        if self.sharding is not None and next(iter(self.sharding.device_set)).platform == "cpu":
            jax.block_until_ready(result)
        return result


def _buckets(job: Assignment, traced: bool) -> list[_Bucket]:
    """The calls that make up the merge.

    Outside of a trace each tensor is a call, and equal shapes share a compiled program. Inside one, a program would
    hold a copy of the computation per tensor, so equal-shaped tensors are stacked and merged in a loop, unless the
    method is plain arithmetic, which compiles fast and is best fused with what surrounds it. Tensors that must each be
    in one place are spread over the devices in both cases; outside of a trace, as many at a time as there are devices.
    """
    alike: dict[Any, list[tuple[str, TensorTask]]] = {}
    for name, task in job.tasks.items():
        plain = not (task.method.passes or task.method.whole_tensor or task.method.draws)
        structure = jax.tree.structure((task.method, task.info.for_program()))
        single = task.stacked or plain or not (traced or _spreading_mesh(task))
        program = name if single else (structure, jax.typeof(_target(task)), _target_sharding(task))
        alike.setdefault((task.group, program), []).append((name, task))
    buckets, placed = [], {}
    for (group, _), members in alike.items():
        mesh = _spreading_mesh(members[0][1])
        many = len(members) if traced or mesh is None else mesh.size
        for start in range(0, len(members), many):
            names, tasks = zip(*members[start : start + many], strict=True)
            parts = [_operands(task, traced, placed) for task in tasks]
            sharding = None if traced else _target_sharding(tasks[0])
            batch: Batch | None = "vmap" if tasks[0].stacked else None
            if len(parts) > 1:
                parts = [jax.tree.map(_stacked, *parts)] if traced else parts
                batch = "map" if mesh is None else "spread"
                sharding = sharding and NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
            elif tasks[0].stacked and mesh is not None:
                batch = "spread"
            buckets.append(_Bucket(list(names), group, parts, batch, sharding))
    return buckets


def _spreading_mesh(task: TensorTask) -> Any:
    """The mesh over whose devices this tensor is spread, together with others or layer by layer, or None."""
    if not task.method.in_one_place or len(task.info.shape) < 2:
        return None
    target = _target(task)
    known = (jax.typeof(target).sharding, _target_sharding(task)) if task.stacked else ()
    if any(isinstance(s, NamedSharding) and tuple(s.spec)[:1] not in ((), (None,)) for s in known):
        return None  # the layers are on different devices as they are
    return spreading_mesh(target)


def _operands(task: TensorTask, traced: bool, placed: dict[Any, jax.Array]) -> tuple[Any, ...]:
    """What a program is given: coefficients as arrays, and experts sharded as the base is."""
    method, info = jax.tree.map(_as_array, (read_given(task.method), task.info.for_program()))
    if task.stacked:
        info = jax.tree.map(lambda x: np.broadcast_to(x, (task.info.num_layers,)) if x.ndim == 0 else x, info)
    sharding = _target_sharding(task)
    if not traced:  # explicitly, so that a transfer guard sees no accident; layers where the layers of the tensors are
        by_layer = task.stacked and isinstance(sharding, NamedSharding)
        layers = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1])) if by_layer else None
        method, info = jax.tree.map(lambda x: _placed(x, layers, placed), (method, info))
    in_place = [sharding is None or getattr(x, "sharding", None) == sharding for x in task.experts]
    experts = [x if there else jax.device_put(x, sharding) for x, there in zip(task.experts, in_place, strict=True)]
    return method, task.base, experts, info


def _placed(value: Any, sharding: Any, placed: dict[Any, jax.Array]) -> jax.Array:
    """A coefficient on the device. Most are the same for all tensors and experts, and each is put there once."""
    if isinstance(value, jax.Array):
        return jax.device_put(value, sharding)
    key = (value.tobytes(), value.shape, value.dtype, sharding)
    if key not in placed:
        placed[key] = jax.device_put(value, sharding)
    return placed[key]


def _as_array(value: Any) -> Any:
    """A coefficient as an array: plain numbers are float32, or integers of their own kind."""
    if isinstance(value, jax.Array):
        return value
    return np.asarray(value, None if isinstance(value, int) or hasattr(value, "dtype") else np.float32)


def _stacked(*values: Any) -> Any:
    """Arrays along a new leading axis; what is known now is stacked now, into one constant of the program."""
    return (jnp if any(isinstance(x, jax.Array) for x in values) else np).stack(values)


def _target(task: TensorTask) -> Any:
    """What the result looks like: the base, or without one the first expert."""
    return task.experts[0] if task.base is None else task.base


def _target_sharding(task: TensorTask) -> Any:
    """The sharding that the result must keep, when there is more than one device to speak of."""
    target = _target(task)
    if isinstance(target, jax.Array) and not isinstance(target, Tracer) and len(target.sharding.device_set) > 1:
        return target.sharding
    return None


def _check_devices(job: Assignment) -> None:
    """Checks that no expert was put on devices that the result will not be on; moving it may be what nobody wants."""
    for name, task in job.tasks.items():
        target = _target(task)
        wanted = getattr(target, "sharding", None)
        for expert, x in zip(job.experts, task.experts, strict=True):
            found = getattr(x, "sharding", None)
            if found is None or wanted is None or found == wanted or not (x.committed and target.committed):
                continue
            if not found.device_set <= wanted.device_set:
                model = f"expert {job.experts[0]!r}" if task.base is None else "the base"
                raise StructureError(
                    f"tensor {name!r} of expert {expert!r}: found on {_devices(found)}, expected on devices of "
                    f"{model}, which are {_devices(wanted)}; move one of both with jax.device_put"
                )


def _devices(sharding: Any) -> str:
    devices = sorted(sharding.device_set, key=lambda device: device.id)
    shown = ", ".join(str(device) for device in devices[:4])
    return shown if len(devices) <= 4 else f"{shown} and {len(devices) - 4} more"


def _check_copied(job: Assignment, traced: bool) -> None:
    for name, (reference, others) in job.copied.items():
        if traced or jnp.issubdtype(reference.dtype, jax.dtypes.extended):
            continue
        for expert, other in zip(job.experts, others, strict=True):
            if other is not reference and not np.array_equal(jax.device_get(reference), jax.device_get(other)):
                raise StructureError(disagreement_message(expert, name, reference.dtype))


def _measure_model(buckets: list[_Bucket], traced: bool) -> dict[int, ModelStats]:
    """Takes every measurement over the model, group by group and pass by pass."""
    stats: dict[int, ModelStats] = {bucket.group: {} for bucket in buckets}
    for group, known in stats.items():
        members = [bucket for bucket in buckets if bucket.group == group]
        method, _, experts, _ = members[0].parts[0]
        dtype = accumulation_dtype(experts[0].dtype)
        for number, scope in enumerate(method.passes):
            if scope != "model":
                continue
            parts = [b.in_turn(measure_whole(*b.operands, known, batch=b.batch)) for b in members]
            if isinstance(parts[0], Total):
                known[number] = jax.tree.map(lambda *x: sum(x[1:], x[0]), *[part.value for part in parts])
                continue

            def count(_: Any, search: Any, members: Any = members, known: Any = known) -> Any:
                counts = [b.in_turn(count_whole(*b.operands, known, search, batch=b.batch)) for b in members]
                return next_round(search, counts)

            search = begin_search(parts[0].ranks, dtype)
            if traced:  # the rounds share one copy of the computation
                search = jax.lax.fori_loop(0, search_rounds(dtype), count, search)
            else:
                for round_number in range(search_rounds(dtype)):
                    search = count(round_number, search)
            known[number] = search_result(search, dtype)
    return stats


def _report(job: Assignment, notes: dict[str, dict[str, Any]]) -> MergeReport:
    tensors = [
        TensorReport(name, tuple(leaf.shape), str(leaf.dtype), "copied", {}) for name, (leaf, _) in job.copied.items()
    ]
    for name, task in job.tasks.items():
        leaf = task.experts[0]
        tensors.append(TensorReport(name, tuple(leaf.shape), str(leaf.dtype), "merged", notes[name]))
    return MergeReport(job.experts, tensors)
