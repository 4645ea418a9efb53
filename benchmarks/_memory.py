"""What the compiler says an operator needs in memory, in units of one tensor."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import jaxmerge as jm
from jaxmerge.methods.assignment import assign
from jaxmerge.methods.measurements import Total, begin_search
from jaxmerge.methods.programs import count_whole, measure_whole, merge_whole


@dataclasses.dataclass(frozen=True)
class WorkingSet:
    """Memory of the programs that merge one whole tensor, each number divided by the tensor's bytes.

    Attributes:
        inputs: the base, where there is one, and the experts.
        output: the merged tensor.
        temporary: what the program that needs most holds while it runs, beside inputs and output. LAPACK's own
            workspace is not counted by the compiler.
    """

    inputs: float
    output: float
    temporary: float

    @property
    def total(self) -> float:
        return self.inputs + self.output + self.temporary


def working_set(
    method: jm.Method, experts: int, shape: tuple[int, ...], *, with_base: bool = True, name: str = "kernel"
) -> WorkingSet:
    """The working set of `method` on one float32 tensor; nothing is computed.

    Args:
        method: a merge method.
        experts: how many.
        shape: the tensor's.
        with_base: whether the method is given a base.
        name: the tensor's.
    """
    tensor = jax.ShapeDtypeStruct(shape, jnp.float32)
    job = assign(method, [{name: tensor}] * experts, {name: tensor} if with_base else None, 0, jm.Rules())
    task = job.tasks[name]
    method, info = jax.tree.map(jnp.asarray, (task.method, task.info.for_program()))
    operands = (method, task.base, task.experts, info)

    known: dict[int, Any] = {}
    programs = []
    for number, scope in enumerate(method.passes):
        if scope != "model":
            continue
        programs.append(measure_whole.lower(*operands, known))
        part = jax.eval_shape(measure_whole, *operands, known)
        if isinstance(part, Total):
            known[number] = part.value
        else:
            search = jax.eval_shape(lambda ranks: begin_search(ranks, jnp.float32), part.ranks)
            programs.append(count_whole.lower(*operands, known, search))
            known[number] = jax.ShapeDtypeStruct(part.ranks.shape[:2], jnp.float32)
    programs.append(merge_whole.lower(*operands, known))

    # XLA:CPU reports no memory of its own, but what its buffers take.
    needed: list[Any] = [program.compile().memory_analysis() for program in programs]
    merge = needed[-1]
    return WorkingSet(
        merge.argument_size_in_bytes / (tensor.size * 4),
        merge.output_size_in_bytes / (tensor.size * 4),
        max(each.temp_size_in_bytes for each in needed) / (tensor.size * 4),
    )
