"""Following parameters through a model: where each one is multiplied with inputs, and what those inputs are.

A model is any function of parameters, so its layers are found in its trace and not among the classes of a library: a
kernel is a parameter that is contracted with something else, in `dot_general` or in a convolution. The trace of Linen
and NNX modules, of attention and of plain functions all looks alike there. Casts, transpositions, calls (`jit`,
`remat`, custom derivatives) and `scan` on the way are followed; what else a parameter goes through, such as a sum with
another one, ends the pursuit. Control flow other than `scan` is not looked into.

Several models of one architecture can be followed at once: every product is then taken with each model's kernel, and
the products are combined. That is exact for whatever is linear in the kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxmerge.trees.checks import is_mergeable
from jaxmerge.trees.paths import Params, named_leaves, with_leaves


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter on its way through the trace.

    Attributes:
        name: of the parameter.
        values: it, in each of the models.
        axes: axis i of the values is axis `axes[i]` of the parameter (of one layer of it, within a scan).
        stacked: a scan goes over the parameter's first axis, and these are the values of one layer.
    """

    name: str
    values: tuple[Any, ...]
    axes: tuple[int, ...]
    stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Product:
    """A kernel that meets inputs.

    Attributes:
        weight: the kernel.
        axes: those of the parameter that the product sums over, in ascending order.
        rows: makes the inputs `[rows, in]`, with `in` in the row-major order of those axes.
    """

    weight: Weight
    axes: tuple[int, ...]
    rows: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Sighting:
    """What was noted of a product.

    Attributes:
        name: of the kernel.
        stacked: the note has a leading axis of layers.
        note: what `visit` gave, a pytree of arrays.
    """

    name: str
    stacked: bool
    note: Any


def follow(
    apply: Callable[[Params, Any], Any],
    models: Sequence[Params],
    inputs: Any,
    *,
    combine: Callable[[tuple[Any, ...]], Any] = lambda values: values[0],
    visit: Callable[[Product], Any] = lambda product: None,
) -> tuple[Any, list[Sighting]]:
    """Runs a model and looks at its kernels.

    Args:
        apply: `(params, inputs) -> outputs`.
        models: parameters of the same tensors, usually one.
        inputs: what the model is given.
        combine: makes one value of one per model: a parameter, or a product with it.
        visit: called for every product; what it gives is noted, arrays added up over the steps of a scan. None is not.

    Returns:
        The model's outputs, and what was noted in the order of the program.
    """
    leaves = [named_leaves(model) for model in models]
    names = list(leaves[0])

    def flat(values: list[Any], inputs: Any) -> Any:
        return apply(with_leaves(models[0], dict(zip(names, values, strict=True))), inputs)

    first = [leaves[0][name] for name in names]
    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(first, inputs)
    weights = [
        Weight(name, tuple(model[name] for model in leaves), tuple(range(jnp.ndim(leaf))))
        if is_mergeable(leaf)
        else leaf
        for name, leaf in zip(names, first, strict=True)
    ]
    run = _Run(combine, visit)
    outputs = run.program(closed.jaxpr, closed.consts, [*weights, *jax.tree.leaves(inputs)])
    return jax.tree.unflatten(jax.tree.structure(shapes), run.plain(outputs)), run.seen


class _Run:
    """One evaluation of a trace."""

    def __init__(self, combine: Callable[..., Any], visit: Callable[..., Any]):
        self.combine, self.visit = combine, visit
        self.seen: list[Sighting] = []

    def plain(self, values: Sequence[Any]) -> list[Any]:
        """Values with weights combined."""
        return [self.combine(x.values) if isinstance(x, Weight) else x for x in values]

    def program(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """The outputs, weights among them where they went through unchanged."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else known[atom]

        for equation in jaxpr.eqns:
            results = self.equation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, given: list[Any]) -> list[Any]:
        weights = [i for i, x in enumerate(given) if isinstance(x, Weight)]
        kind = equation.primitive.name
        if not weights:
            return _bind(equation, given)
        if kind in ("convert_element_type", "copy", "stop_gradient", "transpose"):
            (weight,) = given
            values = tuple(_bind(equation, [value])[0] for value in weight.values)
            order = equation.params["permutation"] if kind == "transpose" else range(len(weight.axes))
            return [dataclasses.replace(weight, values=values, axes=tuple(weight.axes[i] for i in order))]
        if kind == "scan":
            return self.scan(equation, given)
        if kind in _CALLS:
            inner = next(equation.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in equation.params)
            closed = isinstance(inner, jex.ClosedJaxpr)
            return self.program(inner.jaxpr if closed else inner, inner.consts if closed else (), given)
        if len(weights) == 1 and (kind == "dot_general" or (kind == "conv_general_dilated" and weights == [1])):
            return self.product(equation, given, weights[0])
        return _bind(equation, self.plain(given))

    def product(self, equation: Any, given: list[Any], at: int) -> list[Any]:
        weight, other = given[at], given[1 - at]
        describe = _of_dot if equation.primitive.name == "dot_general" else _of_convolution
        found = describe(equation.params, weight, other, at)
        if found is not None:
            note = self.visit(found)
            if note is not None:
                self.seen.append(Sighting(weight.name, weight.stacked, note))
        operands = ([value, other] if at == 0 else [other, value] for value in weight.values)
        return [self.combine(tuple(_bind(equation, pair)[0] for pair in operands))]

    def scan(self, equation: Any, given: list[Any]) -> list[Any]:
        params = equation.params
        body = params["jaxpr"]
        n, m = _scan_parts(equation, body)
        consts, carry, xs = given[:n], self.plain(given[n:m]), given[m:]
        # Only a scan over the first axis of a parameter itself is one over its layers.
        layered = [isinstance(x, Weight) and not x.stacked and x.axes[:1] == (0,) for x in xs]
        sliced = [x if on_layers else self.plain([x])[0] for x, on_layers in zip(xs, layered, strict=True)]
        seen: list[Sighting] = []

        def step(carry: Any, layer: list[Any]) -> Any:
            run = _Run(self.combine, self.visit)
            here = [
                Weight(x.name, tuple(part), tuple(axis - 1 for axis in x.axes[1:]), True) if on_layers else part
                for x, part, on_layers in zip(sliced, layer, layered, strict=True)
            ]
            out = run.plain(run.program(body.jaxpr, body.consts, [*consts, *carry, *here]))
            seen[:] = run.seen
            return out[: m - n], (out[m - n :], [sighting.note for sighting in run.seen])

        parts = [x.values if on_layers else x for x, on_layers in zip(sliced, layered, strict=True)]
        carry, (ys, notes) = lax.scan(
            step, carry, parts, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
        )
        own = {x.name for x, on_layers in zip(sliced, layered, strict=True) if on_layers}
        for sighting, note in zip(seen, notes, strict=True):
            if sighting.name not in own:  # the same kernel in every step
                note = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), note)
            self.seen.append(dataclasses.replace(sighting, note=note))
        return [*carry, *ys]


_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
    | {"custom_vjp_call_jaxpr"}
)


def _scan_parts(equation: Any, body: Any) -> tuple[int, int]:
    """Where the constants of a scan end among its inputs, and where the carry does.

    By ranks, since versions of JAX differ in how they write it down: what is scanned over has an axis more outside.
    """

    def scanned(outer: Any, inner: Any) -> int:
        return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outer, inner, strict=True))

    end = len(equation.invars) - scanned(equation.invars, body.jaxpr.invars)
    return end - (len(equation.outvars) - scanned(equation.outvars, body.jaxpr.outvars)), end


def _bind(equation: Any, values: Sequence[Any]) -> list[Any]:
    """The results of an equation of the trace."""
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # JAX before 0.10 gives both
    with equation.ctx.manager:
        result = equation.primitive.bind(*functions, *values, **params)
    return list(result) if equation.primitive.multiple_results else [result]


def _of_dot(params: Any, weight: Weight, other: Any, at: int) -> Product | None:
    """The product of a kernel with inputs; None for one kernel per example, or a kernel whose axes all remain."""
    contracted, batched = params["dimension_numbers"]
    if batched[0] or not contracted[0]:
        return None
    pairs = sorted(zip([weight.axes[axis] for axis in contracted[at]], contracted[1 - at], strict=True))

    def rows() -> Any:
        summed = [axis for _, axis in pairs]
        free = [axis for axis in range(other.ndim) if axis not in summed]
        width = _size(other.shape[axis] for axis in summed)
        return jnp.transpose(other, (*free, *summed)).reshape(-1, width)

    return Product(weight, tuple(axis for axis, _ in pairs), rows)


def _of_convolution(params: Any, weight: Weight, other: Any, at: int) -> Product | None:
    """The product of a kernel with the patches that it is moved over; None for grouped convolutions."""
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    _, channel, *window = numbers.rhs_spec
    shape = weight.values[0].shape

    def rows() -> Any:
        sizes = [shape[axis] for axis in window]
        patches = lax.conv_general_dilated_patches(
            jnp.transpose(other, numbers.lhs_spec),
            sizes,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            precision=lax.Precision.HIGHEST,  # patches are copies, and must not be rounded
        )
        # [batch, channel and window, position…], channels outermost
        patches = jnp.moveaxis(patches, 1, -1).reshape(-1, shape[channel], *sizes)
        order = sorted(range(1 + len(window)), key=lambda i: weight.axes[[channel, *window][i]])
        return jnp.transpose(patches, (0, *(1 + i for i in order))).reshape(patches.shape[0], -1)

    return Product(weight, tuple(sorted(weight.axes[axis] for axis in (channel, *window))), rows)


def _size(lengths: Any) -> int:
    size = 1
    for length in lengths:
        size *= length
    return size
