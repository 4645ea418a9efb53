"""From a merge and a budget to a plan, and from a plan to experts that are read accordingly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmerge.checkpoints.base import Checkpoint
from jaxmerge.errors import CheckpointError, RecipeError
from jaxmerge.methods.assignment import Assignment, TensorTask
from jaxmerge.methods.averaging import Linear
from jaxmerge.methods.choosing import Passthrough
from jaxmerge.methods.lines import ScaleByDepth
from jaxmerge.methods.method import Method
from jaxmerge.methods.stages import Chain
from jaxmerge.methods.task_arithmetic import Scale, Total, Weigh
from jaxmerge.streaming.budget import AccessPlan, TensorBlocks, plan_access
from jaxmerge.streaming.budgeted import BudgetedTensor, Scratch
from jaxmerge.streaming.catalog import Catalog, paired
from jaxmerge.streaming.fingerprint import Fingerprint, fingerprint, stored_tensor
from jaxmerge.streaming.sizes import parse_share
from jaxmerge.streaming.statistics import BlockStatistics, smallest_read
from jaxmerge.trees.info import TensorInfo

BASE = "the base"
"""What the base is called among the opened checkpoints."""

_SUMS = (Weigh, Total, Scale, ScaleByDepth)


def plan_job(
    job: Assignment,
    sources: Mapping[str, Checkpoint],
    catalog: Catalog,
    budget: int | str | AccessPlan,
    policy: str = "greedy_value",
    floors: tuple[int, int] = (0, 0),
    progress: bool | None = None,
) -> tuple[AccessPlan, dict[str, int]]:
    """Plans what a merge reads from its experts.

    Args:
        job: the merge.
        sources: its checkpoints by name, base included.
        catalog: gives the statistics; what it lacks is gathered first.
        budget: bytes, text such as "2GiB", or a share of all that the experts hold, such as "10%"; or a plan that was
            made before for the same merge of the same models.
        policy: how blocks are chosen.
        floors: blocks of each expert, and of each tensor, that are chosen before all others.
        progress: show that statistics are gathered; by default in a terminal or notebook.

    Returns:
        The plan, and the bytes that were read to gather statistics, from each checkpoint by name.

    Raises:
        RecipeError: there is no base, a model is not a checkpoint, the budget is none, or the plan is of another merge.
        BudgetError: the floors do not fit, or a tensor cannot be read by blocks.
        CheckpointError: a checkpoint cannot be read.
    """
    if not job.has_base:
        raise RecipeError("an I/O budget needs a base, which stands in for what is not read; pass base=")
    if BASE in job.experts or "" in job.experts:
        raise RecipeError(f"an expert is named {BASE!r}, or has an empty name; give it another one")
    for name in (BASE, *job.experts):
        if name not in sources:
            raise RecipeError(f"an I/O budget is about checkpoints, and {name} was given as a tree; pass its path")
    states = {name: fingerprint(source) for name, source in sources.items()}
    known, contents = _known(catalog, sources, job.experts, states)
    missing = {
        name: sources[name] for name in job.experts if known[name] is None or None in (contents[name], contents[BASE])
    }
    analysed = catalog.add(sources[BASE], missing, progress=progress) if missing else {}
    if missing:
        states = {name: fingerprint(source) for name, source in sources.items()}
        known, contents = _known(catalog, sources, job.experts, states)
    statistics: dict[str, dict[str, BlockStatistics]] = {}
    for name, found in known.items():
        if found is None:
            raise CheckpointError(f"{sources[name].path} was changed while it was read; try again when it is complete")
        statistics[name] = found
    tensors = list(_tensor_blocks(job, sources, statistics, states).values())
    models = {name: contents[name] or "" for name in job.experts}
    method = _as_data(job, contents)
    if isinstance(budget, AccessPlan):
        plan = budget
        _check_same(plan, tensors, models, contents[BASE], method)
    else:
        total = sum(int(tensor.costs.sum()) for tensor in tensors)
        limit = parse_share(budget, total, "io_budget")
        plan = plan_access(
            tensors, models, base=contents[BASE] or "", method=method, budget=limit, policy=policy, floors=floors
        )
    return plan, {name: n for name, n in analysed.items() if n}


def _known(
    catalog: Catalog, sources: Mapping[str, Checkpoint], experts: Sequence[str], states: Mapping[str, Fingerprint]
) -> tuple[dict[str, dict[str, BlockStatistics] | None], dict[str, str | None]]:
    """What a catalog knows: of each expert its statistics, of each model its content; None for what it does not."""
    base = sources[BASE]
    return (
        {name: catalog.statistics(base, sources[name], (states[BASE], states[name])) for name in experts},
        {name: catalog.content(source, states[name]) for name, source in sources.items()},
    )


def _check_same(
    plan: AccessPlan, tensors: Sequence[TensorBlocks], experts: Mapping[str, str], base: str | None, method: Any
) -> None:
    """Checks that a plan was made for this merge."""
    differing = [f"expert {name!r}" for name in experts if plan.experts.get(name) != experts[name]]
    differing += [f"expert {name!r}" for name in plan.experts if name not in experts]
    differing += ["the base"] * (plan.base != base)
    differing += ["the method or a coefficient"] * (plan.method != method)
    differing += ["the blocks"] * (dict(plan.blocks) != {x.name: (x.size, x.block) for x in tensors})
    if differing:
        raise RecipeError(f"the access plan was made for another merge ({differing[0]} differs); make it again")


def restricted(job: Assignment, plan: AccessPlan, scratch: Scratch) -> Assignment:
    """A merge that reads from its experts what a plan has chosen; elsewhere the base stands in for them.

    Tensors that are not floating point are the base's; they are not compared with the experts'.

    Args:
        job: the merge that was planned.
        plan: the plan.
        scratch: where fetched blocks are kept if they are needed again, or can only be fetched whole.
    """
    made: dict[tuple[int, ...], list[Any]] = {}
    tasks = {}
    for name, task in job.tasks.items():
        key = _identity(task)
        if key not in made:  # tied tensors stay tied
            block = plan.blocks[name][1]
            made[key] = []
            for expert, leaf in zip(job.experts, task.experts, strict=True):
                again = bool(task.method.passes) or smallest_read(leaf) > 1
                chosen = plan.chosen[expert][name]
                made[key].append(BudgetedTensor(leaf, task.base, chosen, block, scratch if again else None))
        tasks[name] = dataclasses.replace(task, experts=made[key])
    copied = {name: (leaf, [leaf] * len(others)) for name, (leaf, others) in job.copied.items()}
    return dataclasses.replace(job, tasks=tasks, copied=copied)


def sum_weights(method: Method, info: TensorInfo, count: int) -> Float[np.ndarray, " K"] | None:
    """The coefficients of the task vectors, where a method adds their multiples to the base; None for other methods.

    Args:
        method: resolved for a tensor.
        info: of the tensor.
        count: number of experts.
    """
    is_chain = isinstance(method, Chain) and all(isinstance(stage, _SUMS) for stage in method.stages)
    if not (is_chain or isinstance(method, Linear | Passthrough)) or method.passes:
        return None
    # The method itself tells: entry k of this merge is what it makes of expert k's unit task vector.
    method = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), method)
    units: list[Any] = list(np.eye(count, dtype=np.float32))
    merged = method.merge_tensor(jnp.zeros(count), units, dataclasses.replace(info, shape=(count,)), ())
    return np.asarray(merged, np.float64)


def _tensor_blocks(
    job: Assignment,
    sources: Mapping[str, Checkpoint],
    statistics: Mapping[str, Mapping[str, BlockStatistics]],
    states: Mapping[str, Fingerprint],
) -> dict[str, TensorBlocks]:
    """What the planner is told of each tensor; tied ones once."""
    # Statistics go by the name that a tensor has in its pair of checkpoints, where it may be tied differently.
    names: dict[str, dict[tuple[int, int], str]] = {}
    for expert in job.experts:
        pairs = paired(sources[BASE], sources[expert], (states[BASE], states[expert]))
        names[expert] = {(id(one), id(other)): name for name, (one, other) in pairs.items()}
    leaves = {name: state.leaves for name, state in states.items()}
    weights = _weights(job)
    result: dict[tuple[int, ...], TensorBlocks] = {}
    for name, task in job.tasks.items():
        if _identity(task) in result:
            continue
        stored = [leaves[expert][name] for expert in job.experts]  # task.experts may be casts of these
        found = [
            statistics[expert][names[expert][id(leaves[BASE][name]), id(leaf)]]
            for expert, leaf in zip(job.experts, stored, strict=True)
        ]
        size = found[0].size
        block = min(math.lcm(*(x.block for x in found)), max(size, *(x.block for x in found)))
        found = [x.regrouped(block) for x in found]
        entries = np.minimum(block, size - block * np.arange(len(found[0].norms)))
        itemsize = [stored_tensor(leaf).dtype.itemsize for leaf in stored]
        merged, of_sum = None, weights[name]
        if of_sum is not None:
            combined = np.zeros(found[0].sketches.shape, np.float32)
            for w, x in zip(of_sum, found, strict=True):
                combined += np.float32(w) * x.sketches
            merged = float(np.sum(np.square(combined), dtype=np.float64))
        result[_identity(task)] = TensorBlocks(
            name,
            size,
            block,
            np.stack([x.norms for x in found]),
            np.stack([x.touched > 0 for x in found]),
            np.stack([entries * n for n in itemsize]).astype(np.int64),
            of_sum,
            merged,
        )
    return {blocks.name: blocks for blocks in result.values()}


def _weights(job: Assignment) -> dict[str, Float[np.ndarray, " K"] | None]:
    """The coefficients of each tensor; of a layer-stacked one, the largest of its layers."""
    known: dict[Any, Any] = {}

    def of(method: Method, info: TensorInfo) -> Any:
        leaves, structure = jax.tree.flatten(method)
        key = (structure, *(np.asarray(x).tobytes() for x in leaves))
        if key not in known:
            known[key] = sum_weights(method, info, len(job.experts))
        return known[key]

    result = {}
    for name, task in job.tasks.items():
        if not task.stacked:
            result[name] = of(task.method, task.info)
            continue
        layers = [of(jax.tree.map(lambda x, i=i: x[i], task.method), task.info) for i in range(task.info.num_layers)]
        result[name] = None if any(x is None for x in layers) else np.max(np.abs(layers), axis=0)
    return result


def _as_data(job: Assignment, contents: Mapping[str, str | None]) -> Any:
    """The method as plain data: for each tensor its structure and coefficients, those of experts by content."""
    order = sorted(range(len(job.experts)), key=lambda i: (contents[job.experts[i]], job.experts[i]))

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = [f.name for f in dataclasses.fields(value)]
            return [type(value).__name__, {name: plain(getattr(value, name)) for name in fields}]
        if isinstance(value, list | tuple):
            values = [plain(x) for x in value]
            return [values[i] for i in order] if isinstance(value, list) and len(values) == len(order) else values
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            values = np.asarray(value)
            if values.shape[:1] == (len(order),):
                values = values[order]
            return [repr(x) for x in values.reshape(-1).tolist()]
        return repr(value) if isinstance(value, float) else value if isinstance(value, int | None) else str(value)

    told: dict[str, Any] = {}
    for name, task in job.tasks.items():
        told[name] = plain(task.method)
    return told


def _identity(task: TensorTask) -> tuple[int, ...]:
    """What tied tensors have in common."""
    return (id(task.base), *map(id, task.experts))
