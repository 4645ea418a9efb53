"""The compiled programs: one tensor (or chunk) of one shape each, shared by every tensor of that shape.

A method arrives here with its coefficients already resolved for one tensor (`method.at(info)`), as traced numbers, and
`info` without the tensor's name, so that a program depends on shapes, dtypes and the method's structure only. Inputs
are widened to the arithmetic dtype here and the result is cast once, here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Num

from jaxmerge.methods.measurements import BitSearch, Measurement, OrderStatistic, Scope, Total, measured_here
from jaxmerge.methods.method import Method
from jaxmerge.methods.sharding import along_layers, spread, with_sharding
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.task_vectors import accumulation_dtype

Batch = Literal["vmap", "map", "spread"]
"""How equal-shaped tensors along axis 0 are merged: all at once (layers that a model holds stacked, whose stacking axis
may be sharded), one after the other (tensors stacked for the sake of one program, in the memory of one), or each whole
on one device, at the same time on all (tensors that would be needed whole on every device)."""

ModelStats = dict[int, Any]
"""Results of the measurements over the model that are known so far, by number of the pass."""


@functools.partial(jax.jit, static_argnames=("batch", "noted", "sharding"))
def merge_whole(
    method: Method,
    base: Num[Array, "..."] | None,
    experts: list[Num[Array, "..."]],
    info: TensorInfo,
    model_stats: ModelStats,
    *,
    batch: Batch | None = None,
    noted: bool = False,
    sharding: Any = None,
) -> tuple[Array, Bool[Array, "..."], dict[str, Array]]:
    """Measures and merges one whole tensor.

    Args:
        method: resolved for this tensor; for a batch every coefficient has a leading axis.
        base: the base tensor, or None.
        experts: K tensors.
        info: of the tensor; for a batch, of one of its tensors, with a leading axis on whatever is no shape.
        model_stats: results of measurements over the model.
        batch: axis 0 holds equal-shaped tensors that are merged each by itself.
        noted: also return what a report shows.
        sharding: constraint on the result, or None.

    Returns:
        The merged tensor in the inputs' dtype; whether base (first) and experts are finite, or one flag for all where
        the result tells (false also where the cast overflows); notes for the report. For tensors that are spread, flags
        and notes have a row for each.
    """
    given = [x for x in (base, *experts) if x is not None]
    dtype = given[0].dtype

    def one(method: Method, base: Any, experts: list[Any], info: TensorInfo, known: Any) -> Any:
        method, base, experts = widened(method, base, experts)
        stats = _all_stats(method, base, experts, info, known)
        merged = method.merge_tensor(base, experts, info, stats)
        notes = _notes(method, base, experts, info, stats, merged) if noted else {}
        return merged.astype(dtype), notes

    merged, notes = _for_each(one, batch)(method, base, experts, info, model_stats)
    if sharding is not None:
        merged = with_sharding(merged, sharding)
    tells = method.spreads_nonfinite and (base is None or method.needs_base)
    if batch == "spread":
        return merged, jax.vmap(finite_inputs)(base, experts), notes
    finite = _is_finite(merged) if tells else finite_inputs(base, experts)
    return merged, finite, _summed(notes, batch)


@functools.partial(jax.jit, static_argnames="batch")
def measure_whole(
    method: Method,
    base: Any,
    experts: list[Any],
    info: TensorInfo,
    model_stats: ModelStats,
    *,
    batch: Batch | None = None,
) -> Measurement:
    """This tensor's part of the next measurement over the model; of an order statistic only the ranks."""

    def one(*operands: Any) -> Measurement:
        measurement = _model_measurement(*operands)
        return measurement if isinstance(measurement, Total) else OrderStatistic((), measurement.ranks)

    operands = (method, base, experts, info, model_stats)
    if batch == "spread" and not isinstance(jax.eval_shape(_for_each(one, "map"), *operands), Total):
        batch = "map"  # ranks are no reason to move tensors
    measurement = _for_each(one, batch)(*operands)
    if isinstance(measurement, Total):
        return Total(_summed(measurement.value, batch))
    # The ranks are equal in all tensors; the first of an axis that is sharded is no slice that explicit axes allow.
    return measurement if batch is None else OrderStatistic((), jnp.max(measurement.ranks, axis=0))


@functools.partial(jax.jit, static_argnames="batch")
def count_whole(
    method: Method,
    base: Any,
    experts: list[Any],
    info: TensorInfo,
    model_stats: ModelStats,
    search: BitSearch,
    *,
    batch: Batch | None = None,
) -> Any:
    """This tensor's counts for the next round of an order statistic over the model."""

    def one(*operands: Any) -> Array:
        measurement = _model_measurement(*operands)
        assert isinstance(measurement, OrderStatistic)
        return search.count(measurement.values)

    # Counting is done where the entries are, and many times.
    each = _for_each(one, "map" if batch == "spread" else batch)
    return _summed(each(method, base, experts, info, model_stats), batch)


def _for_each(function: Callable[..., Any], batch: Batch | None) -> Callable[..., Any]:
    """`function`, or the same over the leading axis of every operand but the last."""
    if batch is None:
        return function
    if batch == "map":
        return lambda *operands: jax.lax.map(lambda o: function(*o, operands[-1]), operands[:-1])
    if batch == "spread":
        return lambda *operands: spread(function, operands[:-1], operands[-1], like=operands[2][0])

    def over_layers(method: Method, base: Any, experts: list[Any], info: TensorInfo, known: Any) -> Any:
        method, info = along_layers((method, info), like=experts[0])
        return jax.vmap(function, in_axes=(0, 0, 0, 0, None))(method, base, experts, info, known)

    return over_layers


def _summed(parts: Any, batch: Batch | None) -> Any:
    """A pytree of parts that add up, summed over the tensors of a batch."""
    return parts if batch is None else jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), parts)


def _model_measurement(
    method: Method, base: Any, experts: list[Any], info: TensorInfo, model_stats: ModelStats
) -> Measurement:
    """The first measurement over the model whose result is not among `model_stats`."""
    number = next(i for i, scope in enumerate(method.passes) if scope == "model" and i not in model_stats)
    method, base, experts = widened(method, base, experts)
    stats = _all_stats(method, base, experts, info, model_stats, method.passes[:number])
    return method.measure(base, experts, info, stats)


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


def widened(method: Method, base: Any, experts: list[Any]) -> tuple[Method, Any, list[Any]]:
    """Coefficients and inputs in the dtype that arithmetic is done in."""
    dtype = accumulation_dtype(experts[0].dtype)

    def widen(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    method = jax.tree.map(lambda x: widen(jnp.asarray(x)), method)
    return method, None if base is None else widen(base), [widen(x) for x in experts]


def _is_finite(x: Num[Any, "..."]) -> Bool[Array, ""]:
    # 0 * x is 0 or NaN; a sum is vectorised, a logical reduction is not.
    return jnp.sum(0 * x.astype(accumulation_dtype(x.dtype))) == 0


def finite_inputs(base: Num[Any, "..."] | None, experts: list[Num[Any, "..."]]) -> Bool[Array, " inputs"]:
    """Whether base (if there is one) and experts are finite, in one pass over all.

    A reduction for each takes XLA:CPU several times longer.
    """
    flags = tuple(jnp.isfinite(x) for x in (base, *experts) if x is not None)
    axes = tuple(range(experts[0].ndim))
    finite = lax.reduce(flags, (True,) * len(flags), lambda a, b: tuple(x & y for x, y in zip(a, b, strict=True)), axes)
    return jnp.stack(finite)


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
