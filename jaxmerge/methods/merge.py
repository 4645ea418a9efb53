"""`merge`: one call for parameters in memory, under jit, and for lazy parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.errors import NonFiniteError, RecipeError, StructureError
from jaxmerge.methods.assignment import Assignment, ExpertTrees, TensorTask, assign
from jaxmerge.methods.lazy import disagreement_message, merge_lazily, nonfinite_message
from jaxmerge.methods.measurements import Total, begin_search, next_round, search_result, search_rounds
from jaxmerge.methods.method import Method
from jaxmerge.methods.programs import ModelStats, count_whole, measure_whole, merge_whole
from jaxmerge.methods.report import MergeReport, TensorReport
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

    Args:
        method: what to do, such as `jm.ties(density=0.2)`.
        experts: parameter trees with the same tensors, a list or a dict by name (names appear in reports and errors and
            key the random draws). Lists are named `expert_0`, `expert_1`, …
        base: parameters that the experts were tuned from; task-vector methods need it.
        key: PRNG key (or an integer seed) for methods that draw.
        rules: how tensor names are read, where the defaults guess wrong; which leaves are layer-stacked.
        allow_nonfinite: let NaN and infinity pass. Under a transformation they always do.
        return_report: also return a `MergeReport` of what happened to each tensor.

    Returns:
        Parameters in the base's container (the first expert's without a base), with its shapes, dtypes and shardings;
        or that and a report. Leaves that are not floating point are the base's.

    Raises:
        StructureError, ShapeError, DTypeError: experts and base differ.
        NonFiniteError: NaN or infinity in an input.
        RecipeError: the method does not fit these experts, or lacks a base, a key or a value for some tensor.
    """
    job = assign(method, experts, base, key, rules)
    leaves = job.leaves()
    traced = any(isinstance(x, jax.core.Tracer) for x in (*leaves, *jax.tree.leaves((method, key))))
    if return_report and (traced or any(isinstance(x, LazyTensor) for x in leaves)):
        raise RecipeError(
            "return_report=True needs arrays in memory outside of jax transformations; merge_checkpoint reports too"
        )
    if any(isinstance(x, LazyTensor) for x in leaves):
        return merge_lazily(job, allow_nonfinite)

    _check_copied(job, traced)
    model_stats = _measure_model(job, traced)
    merged: dict[str, Any] = {name: reference for name, (reference, _) in job.copied.items()}
    finite, notes = {}, {}
    for name, task in job.tasks.items():
        merged[name], finite[name], notes[name] = merge_whole(
            *_operands(task),
            model_stats[task.group],
            stacked=task.stacked,
            noted=return_report,
            sharding=None if traced else _target_sharding(task),
        )
    if not (traced or allow_nonfinite):
        _check_finite(job, jax.device_get(finite))
    result = with_leaves(job.reference, merged)
    return (result, _report(job, jax.device_get(notes))) if return_report else result


def _check_finite(job: Assignment, finite: dict[str, Any]) -> None:
    """Raises the error for the first input that is not finite; `finite` has a row of flags per tensor name."""
    for name, flags in finite.items():
        for index, good in enumerate(flags):
            if not good:
                raise NonFiniteError(nonfinite_message(job.source_name(index), name))


def _operands(task: TensorTask) -> tuple[Any, ...]:
    """What a program is given: coefficients on the device, put there explicitly, and reshard experts as the base is."""
    method, info = jax.tree.map(_on_device, (task.method, task.info.for_program()))
    if task.stacked:
        info = jax.tree.map(lambda x: jnp.broadcast_to(x, (task.info.num_layers,)) if x.ndim == 0 else x, info)
    sharding = _target_sharding(task)
    experts = [x if sharding is None or x.sharding == sharding else jax.device_put(x, sharding) for x in task.experts]
    return method, task.base, experts, info


def _on_device(value: Any) -> Any:
    if isinstance(value, jax.Array):
        return value
    return jax.device_put(np.asarray(value, None if isinstance(value, int) or hasattr(value, "dtype") else np.float32))


def _target_sharding(task: TensorTask) -> Any:
    """The sharding that the result must keep, when there is more than one device to speak of."""
    target = task.experts[0] if task.base is None else task.base
    if (
        isinstance(target, jax.Array)
        and not isinstance(target, jax.core.Tracer)
        and len(target.sharding.device_set) > 1
    ):
        return target.sharding
    return None


def _check_copied(job: Assignment, traced: bool) -> None:
    for name, (reference, others) in job.copied.items():
        if traced or jax.dtypes.issubdtype(reference.dtype, jax.dtypes.extended):
            continue
        for expert, other in zip(job.experts, others, strict=True):
            if other is not reference and not np.array_equal(jax.device_get(reference), jax.device_get(other)):
                raise StructureError(disagreement_message(expert, name, reference.dtype))


def _measure_model(job: Assignment, traced: bool) -> dict[int, ModelStats]:
    """Takes every measurement over the model, group by group and pass by pass; one program per shape and pass."""
    stats: dict[int, ModelStats] = {task.group: {} for task in job.tasks.values()}
    for group, known in stats.items():
        tasks = [task for task in job.tasks.values() if task.group == group]
        numbers = [number for number, scope in enumerate(tasks[0].method.passes) if scope == "model"]
        operands = [_operands(task) for task in tasks] if numbers else []
        for number in numbers:
            parts = [measure_whole(*o, known, stacked=t.stacked) for t, o in zip(tasks, operands, strict=True)]
            if isinstance(parts[0], Total):
                known[number] = jax.tree.map(lambda *x: sum(x[1:], x[0]), *[part.value for part in parts])
                continue

            def round_of(_: Any, search: Any, tasks: Any = tasks, operands: Any = operands, known: Any = known) -> Any:
                each = zip(tasks, operands, strict=True)
                return next_round(search, [count_whole(*o, known, search, stacked=t.stacked) for t, o in each])

            dtype = accumulation_dtype(tasks[0].experts[0].dtype)
            search = begin_search(parts[0].ranks, dtype)
            if traced:  # one round in the program, whatever the number of rounds
                search = jax.lax.fori_loop(0, search_rounds(dtype), round_of, search)
            else:
                for i in range(search_rounds(dtype)):
                    search = round_of(i, search)
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
