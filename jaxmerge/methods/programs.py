"""The compiled programs: one tensor (or chunk) of one shape each, shared by every tensor of that shape.

A method arrives here with its coefficients already resolved for one tensor (`method.at(info)`), as traced numbers, and
`info` without the tensor's name, so that a program depends on shapes, dtypes and the method's structure only. Inputs
are widened to the arithmetic dtype here and the result is cast once, here.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxmerge.methods.measurements import BitSearch, Measurement, OrderStatistic, Scope, Total, measured_here
from jaxmerge.methods.method import Method
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.task_vectors import accumulation_dtype

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Num

ModelStats = dict[int, Any]
"""Results of the measurements over the model that are known so far, by number of the pass."""


@functools.partial(jax.jit, static_argnames=("stacked", "noted", "sharding"))
def merge_whole(
    method: Method,
    base: Num[Array, "..."] | None,
    experts: list[Num[Array, "..."]],
    info: TensorInfo,
    model_stats: ModelStats,
    *,
    stacked: bool = False,
    noted: bool = False,
    sharding: Any = None,
) -> tuple[Array, Bool[Array, " K+1"], dict[str, Array]]:
    """Measures and merges one whole tensor.

    Args:
        method: resolved for this tensor; for a stacked leaf every coefficient has a leading layer axis.
        base: the base tensor, or None.
        experts: K tensors.
        info: of the tensor (of one layer for a stacked leaf).
        model_stats: results of measurements over the model.
        stacked: axis 0 holds one tensor per layer.
        noted: also return what a report shows.
        sharding: constraint on the result, or None.

    Returns:
        The merged tensor in the inputs' dtype; whether base (first) and experts are finite; notes for the report.
    """
    given = [x for x in (base, *experts) if x is not None]
    dtype = given[0].dtype

    def one(method: Method, base: Any, experts: list[Any], info: TensorInfo) -> tuple[Array, dict[str, Array]]:
        method, base, experts = _widened(method, base, experts)
        stats = _all_stats(method, base, experts, info, model_stats)
        merged = method.merge_tensor(base, experts, info, stats)
        notes = _notes(method, base, experts, info, stats, merged) if noted else {}
        return merged.astype(dtype), notes

    merged, notes = (jax.vmap(one) if stacked else one)(method, base, experts, info)
    if sharding is not None:
        merged = jax.lax.with_sharding_constraint(merged, sharding)
    finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in given])
    return merged, finite, {name: jnp.sum(note, axis=0) if stacked else note for name, note in notes.items()}


@functools.partial(jax.jit, static_argnames=("stacked",))
def measure_whole(
    method: Method, base: Any, experts: list[Any], info: TensorInfo, model_stats: ModelStats, *, stacked: bool = False
) -> Measurement:
    """This tensor's part of the next measurement over the model; of an order statistic only the ranks."""
    measurement = _model_measurement(method, base, experts, info, model_stats, stacked)
    return measurement if isinstance(measurement, Total) else OrderStatistic((), measurement.ranks)


@functools.partial(jax.jit, static_argnames=("stacked",))
def count_whole(
    method: Method,
    base: Any,
    experts: list[Any],
    info: TensorInfo,
    model_stats: ModelStats,
    search: BitSearch,
    *,
    stacked: bool = False,
) -> Any:
    """This tensor's counts for the next round of an order statistic over the model."""
    measurement = _model_measurement(method, base, experts, info, model_stats, stacked)
    assert isinstance(measurement, OrderStatistic)
    return search.count(measurement.values)


@jax.jit
def merge_chunk(
    method: Method, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]
) -> tuple[Array, Bool[Array, " K+1"]]:
    """Merges a chunk of a tensor whose measurements are all known.

    Returns:
        The merged chunk in the inputs' dtype, and whether base (first) and experts are finite.
    """
    given = [x for x in (base, *experts) if x is not None]
    method, base, experts = _widened(method, base, experts)
    merged = method.merge_tensor(base, experts, info, stats).astype(given[0].dtype)
    return merged, jnp.stack([jnp.all(jnp.isfinite(x)) for x in given])


@jax.jit
def measure_chunk(
    method: Method, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]
) -> tuple[Measurement, Bool[Array, " K+1"]]:
    """Measurement number `len(stats)` of a chunk, and whether base and experts are finite."""
    given = [x for x in (base, *experts) if x is not None]
    method, base, experts = _widened(method, base, experts)
    return method.measure(base, experts, info, stats), jnp.stack([jnp.all(jnp.isfinite(x)) for x in given])


def _model_measurement(
    method: Method, base: Any, experts: list[Any], info: TensorInfo, model_stats: ModelStats, stacked: bool
) -> Measurement:
    number = next(i for i, scope in enumerate(method.passes) if scope == "model" and i not in model_stats)

    def one(method: Method, base: Any, experts: list[Any], info: TensorInfo) -> Measurement:
        method, base, experts = _widened(method, base, experts)
        stats = _all_stats(method, base, experts, info, model_stats, method.passes[:number])
        return method.measure(base, experts, info, stats)

    if not stacked:
        return one(method, base, experts, info)
    each = jax.vmap(one)(method, base, experts, info)
    if isinstance(each, Total):
        return Total(jax.tree.map(lambda x: jnp.sum(x, axis=0), each.value))
    return OrderStatistic(each.values, each.ranks[0])


def _all_stats(
    method: Method,
    base: Any,
    experts: list[Any],
    info: TensorInfo,
    model_stats: ModelStats,
    passes: tuple[Scope, ...] | None = None,
) -> tuple[Any, ...]:
    """Results of the passes, those over the tensor measured here and those over the model as given."""
    stats: tuple[Any, ...] = ()
    for number, scope in enumerate(method.passes if passes is None else passes):
        known = scope == "model"
        stats += (model_stats[number] if known else measured_here(method.measure(base, experts, info, stats)),)
    return stats


def _widened(method: Method, base: Any, experts: list[Any]) -> tuple[Method, Any, list[Any]]:
    dtype = accumulation_dtype(experts[0].dtype)

    def widen(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    method = jax.tree.map(lambda x: widen(jnp.asarray(x)), method)
    return method, None if base is None else widen(base), [widen(x) for x in experts]


def _notes(
    method: Method, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...], merged: Any
) -> dict[str, Array]:
    reference = experts[0] if base is None else base
    squares = jnp.stack([jnp.sum((x - reference) ** 2) for x in experts])
    return {
        "squared_norms": squares,
        "squared_merged_norm": jnp.sum((merged - reference) ** 2),
        **method.notes(base, experts, info, stats),
    }
