"""What a merge costs: bytes, operations, collectives and memory, from shapes alone.

Nothing is read, and no weights need exist: the merge is traced on abstract tensors, so its operations are counted in
the definition that runs, and what must be read and measured is what the method says of itself. `docs/scaling.md` gives
the formulas and how far they are from what was measured.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmerge.checkpoints.base import Checkpoint
from jaxmerge.errors import RecipeError
from jaxmerge.methods.assignment import ExpertTrees, TensorTask, assign
from jaxmerge.methods.chunk_programs import measure_chunk
from jaxmerge.methods.lazy import chunk_info
from jaxmerge.methods.measurements import Total, search_rounds
from jaxmerge.methods.merge import merge
from jaxmerge.methods.method import Method
from jaxmerge.methods.programs import merge_whole
from jaxmerge.streaming.placing import AT_ONCE
from jaxmerge.streaming.sizes import format_bytes
from jaxmerge.trees.checks import name_experts
from jaxmerge.trees.info import Rules
from jaxmerge.trees.paths import Params, named_leaves


@dataclasses.dataclass(frozen=True)
class MergeCost:
    """What a merge costs. Bytes and operations are totals over all devices and processes, unless they say otherwise.

    Attributes:
        parameters: entries of one model.
        experts: number of experts.
        devices: number of devices that share the merge.
        processes: number of processes that read and write.
        model_bytes: of one model.
        read_bytes: fetched, where a tensor fits into memory and no two processes need the same entries.
        written_bytes: written by `merge_checkpoint`.
        operations: arithmetic operations on entries, factorisations included.
        collective_bytes: what one device receives from the others.
        device_memory: bytes of one device while the largest tensor is merged, with its share of the result.
        host_memory: bytes that one process holds of what `load_merged` reads; `merge_checkpoint` keeps to its budget.
    """

    parameters: int
    experts: int
    devices: int
    processes: int
    model_bytes: int
    read_bytes: int
    written_bytes: int
    operations: float
    collective_bytes: float
    device_memory: int
    host_memory: int

    def rows(self) -> list[tuple[str, str]]:
        """A table: what, and how much."""
        share = f", {format_bytes(self.read_bytes // self.processes)} by each of {self.processes} processes"
        each = share if self.processes > 1 else ""
        moved = format_bytes(int(self.collective_bytes)) if self.collective_bytes else "nothing"
        return [
            ("parameters of a model", f"{self.parameters:,} ({format_bytes(self.model_bytes)})"),
            ("experts", str(self.experts)),
            ("devices", str(self.devices)),
            ("to read", f"{format_bytes(self.read_bytes)}{each}"),
            ("to write, disk to disk", format_bytes(self.written_bytes)),
            ("operations", f"{self.operations:.2e}, {self.operations / self.devices:.2e} by each device"),
            ("each device receives", moved),
            ("memory of each device", format_bytes(self.device_memory)),
            ("memory of each host", f"{format_bytes(self.host_memory)} beside the libraries"),
        ]

    def __repr__(self) -> str:
        return "\n".join(f"{what:24} {value}" for what, value in self.rows())


def estimate_cost(
    method: Method,
    experts: ExpertTrees | Mapping[str, Checkpoint] | list[Checkpoint],
    *,
    base: Params | Checkpoint | None = None,
    mesh: Mapping[str, int] = types.MappingProxyType({}),
    processes: int = 1,
    key: Any = 0,
    rules: Rules = Rules(),
) -> MergeCost:
    """What a merge would cost on so many devices, without reading a weight.

    Args:
        method: what to do.
        experts: parameter trees, a list or a dict by name. Leaves may be `jax.ShapeDtypeStruct`, so that models which
            exist nowhere can be planned; or opened checkpoints.
        base: parameters that the experts were tuned from, or None.
        mesh: sizes of the axes of the mesh over whose devices every tensor is spread evenly; one device by default.
        processes: that read and write, one for each host.
        key: PRNG key for methods that draw; its value does not matter.
        rules: how tensor names are read; which leaves are layer-stacked.

    Returns:
        The cost. Tensors are taken to be spread over all devices, matrices that are factorised to be spread whole.

    Raises:
        StructureError, ShapeError, DTypeError: experts and base differ.
        RecipeError: the method does not fit these experts, or a number of devices or processes is below 1.
    """
    devices = math.prod(mesh.values())
    if min(mesh.values(), default=1) < 1 or processes < 1 or processes > devices:
        raise RecipeError(
            f"found the mesh {dict(mesh)} and {processes} processes, expected axes of 1 device or more, at least one "
            "process, and no more processes than devices"
        )
    trees = {name: _abstract(tree) for name, tree in name_experts(experts).items()}
    base_tree = None if base is None else _abstract(base)

    def merged(trees: Any, base: Any) -> Any:
        return merge(method, trees, base=base, key=key, rules=rules)

    operations = count_operations(jax.make_jaxpr(merged)(trees, base_tree).jaxpr)
    job = assign(method, trees, base_tree, key, rules)
    count = len(trees) + (base is not None)
    leaves = list(next(iter(trees.values())).values())
    model_bytes = sum(_nbytes(leaf) for leaf in leaves)
    read = count * sum(_nbytes(reference) for reference, _ in job.copied.values())
    alone: Counter[Any] = Counter()
    received, largest_slice, working, programs = 0.0, 0, 0, {}
    for task in job.tasks.values():
        size, tensors = _nbytes(task.experts[0]), 1
        if task.stacked:
            tensors, task = task.info.num_layers, _layer(task)
        read += count * size * (1 + task.method.passes.count("model"))
        largest_slice = max(largest_slice, math.ceil(size / devices))
        one = _nbytes(task.experts[0])
        # What decides about a program; equal ones are looked at once.
        kind = (jax.tree.structure((task.method, task.info.for_program())), task.info.shape, task.experts[0].dtype)
        if kind not in programs:
            told, stats = _measured(task)
            share = math.ceil(one / (1 if task.method.in_one_place else devices))
            programs[kind] = (count + 1) * share + _temporary(task, stats, devices), told
        working = max(working, programs[kind][0])
        if task.method.in_one_place:
            alone[kind, one] += tensors
        elif devices > 1:  # a sum over all devices is a scatter and a gather
            received += tensors * 2 * (devices - 1) / devices * programs[kind][1]
    for (_, one), tensors in alone.items():
        # Each goes to a device and its result back, in one step for each axis; devices without one get a copy.
        steps = sum((size - 1) / size for size in mesh.values())
        received += math.ceil(tensors / devices) * (count + 1) * one * steps
    return MergeCost(
        parameters=sum(math.prod(leaf.shape) for leaf in leaves),
        experts=len(trees),
        devices=devices,
        processes=processes,
        model_bytes=model_bytes,
        read_bytes=read,
        written_bytes=model_bytes,
        operations=operations,
        collective_bytes=received,
        device_memory=math.ceil(model_bytes / devices) + working,
        host_memory=AT_ONCE * largest_slice,
    )


def count_operations(jaxpr: Any) -> float:
    """Operations of a traced program.

    One for each entry that arithmetic gives, and the usual counts of products, sorts and factorisations. Moving and
    casting entries is none.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, [_count_within(value) for value in equation.params.values()]
        if name == "cond":
            total += max(inner)
        elif sum(inner):
            total += sum(inner) * (equation.params["length"] if name == "scan" else 1)
        elif name not in _MOVES:
            total += _operations(name, equation)
    return total


def _count_within(value: Any) -> float:
    """Operations of the programs that a parameter of an equation holds."""
    if isinstance(value, tuple | list):
        return max((_count_within(item) for item in value), default=0.0)
    inner = getattr(value, "jaxpr", value)
    return count_operations(inner) if hasattr(inner, "eqns") else 0.0


def _operations(name: str, equation: Any) -> float:
    given, result = (variables[0].aval for variables in (equation.invars, equation.outvars))
    size = float(math.prod(result.shape))
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * size * math.prod(given.shape[axis] for axis in contracted)
    if name in _FACTORISATIONS:
        *batch, m, n = given.shape
        return math.prod(batch) * _FACTORISATIONS[name](max(m, n), min(m, n))
    if name == "sort":
        entries = float(math.prod(given.shape))
        return entries * math.log2(max(2, given.shape[equation.params["dimension"]]))
    if name.startswith(("reduce", "cum", "arg")):
        return float(math.prod(given.shape))
    return size


# Golub and Van Loan, Matrix Computations, 4th edition: §8.6.3 for singular values with thin vectors by way of a
# triangular factor, §8.3 for all eigenvectors, §5.2 for the triangular factor.
_FACTORISATIONS = {
    "svd": lambda m, n: 6 * m * n**2 + 20 * n**3,
    "eigh": lambda m, n: 9 * n**3,
    "qr": lambda m, n: 2 * m * n**2,
    "geqrf": lambda m, n: 2 * m * n**2,
    "householder_product": lambda m, n: 2 * m * n**2,
    "cholesky": lambda m, n: n**3 / 3,
    "lu": lambda m, n: 2 * n**3 / 3,
    "triangular_solve": lambda m, n: m * n**2,
}

_COUNTS_BYTES = 3 * 2 * 4  # three counts of two words for each rank, in a round that fixes two bits

_MOVES = frozenset(
    """bitcast_convert_type broadcast_in_dim concatenate convert_element_type copy dynamic_slice dynamic_update_slice
    gather iota pad reshape rev scatter slice split squeeze stack stop_gradient transpose unstack""".split()  # noqa: SIM905
)


def _layer(task: TensorTask) -> TensorTask:
    """The task of one layer of a stacked leaf."""

    def first(leaf: Any) -> Any:
        return None if leaf is None else jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)

    return dataclasses.replace(
        task,
        info=dataclasses.replace(task.info, seeds=None if task.info.seeds is None else task.info.seeds[0]),
        method=jax.tree.map(lambda x: x[0], task.method),
        base=first(task.base),
        experts=[first(x) for x in task.experts],
        stacked=False,
    )


def _measured(task: TensorTask) -> tuple[int, tuple[Any, ...]]:
    """Bytes that the devices tell each other about a tensor's measurements, and the abstract results of these.

    A total is told once, an order statistic as the counts of every round of the search.
    """
    stats, told = (), 0
    for _ in task.method.passes:
        measurement = measure_chunk.shape(task.method, task.base, task.experts, chunk_info(task.info, 0), stats)[0]
        if isinstance(measurement, Total):
            told += sum(_nbytes(leaf) for leaf in jax.tree.leaves(measurement.value))
            stats += (measurement.value,)
        else:
            (count, ranks), dtype = measurement.ranks.shape[:2], measurement.values[0].dtype
            told += search_rounds(dtype) * count * ranks * _COUNTS_BYTES
            stats += (jax.ShapeDtypeStruct((count, ranks), dtype),)
    return told, stats


def _temporary(task: TensorTask, stats: tuple[Any, ...], devices: int) -> int:
    """Bytes that the compiler says the program of a device takes beside inputs and result."""
    method, info = jax.tree.map(_abstract_number, (task.method, task.info.for_program()))
    known = {number: stats[number] for number, scope in enumerate(task.method.passes) if scope == "model"}
    whole = task.method.whole_tensor
    shape = task.info.shape if whole else (math.ceil(task.info.size / devices),)
    base, *experts = (x and jax.ShapeDtypeStruct(shape, x.dtype) for x in (task.base, *task.experts))
    found: Any = merge_whole.lower(method, base, experts, info, known).compile().memory_analysis()
    spread = devices if whole and not task.method.in_one_place else 1
    return math.ceil(found.temp_size_in_bytes / spread)


def _abstract_number(value: Any) -> jax.ShapeDtypeStruct:
    """A coefficient as the program is given it."""
    array = value if hasattr(value, "dtype") else np.asarray(value, None if isinstance(value, int) else np.float32)
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _abstract(params: Params | Checkpoint) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes by name."""
    leaves = named_leaves(params.params if isinstance(params, Checkpoint) else params)
    return {name: _shape_of(x) for name, x in leaves.items() if hasattr(x, "shape")}


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
