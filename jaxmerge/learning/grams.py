"""Gram matrices of the inputs of linear layers, found in the trace of the model; and those that RegMean++ takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.errors import RecipeError, ShapeError
from jaxmerge.learning.batches import cached, check_finite, each_batch
from jaxmerge.learning.layers import Product, follow
from jaxmerge.methods.assignment import ExpertTrees
from jaxmerge.methods.averaging import linear
from jaxmerge.methods.merge import merge
from jaxmerge.methods.method import Method
from jaxmerge.methods.regmean import regmean
from jaxmerge.trees.checks import is_mergeable, name_experts
from jaxmerge.trees.info import Rules, TensorInfo, layer_place, tensor_infos
from jaxmerge.trees.paths import Params, match_rules, named_leaves, with_leaves

Grams = dict[str, Any]
"""Kernel's name → `[in, in]` (`[L, in, in]` for a layer-stacked kernel)."""


def gram(
    apply: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    *,
    tensors: str | Sequence[str] | None = None,
    inputs: bool = False,
    normalize: bool = True,
    rules: Rules = Rules(),
    progress: bool | None = None,
) -> Grams:
    r"""Gram matrices $G = \frac1N \sum_x x x^\top$ of the inputs of every linear layer, in one pass, without labels.

    Layers are found in the trace of `apply`, whatever library they are of: dense layers, `einsum`, fused attention
    projections, layers in a scan, and convolutions, whose inputs are patches. A row is one application of a kernel to
    one vector: a token, a patch. Not found are kernels that differ per example, in grouped convolutions, under `cond`
    and `while`, or computed from other parameters first (LoRA before it is merged in). Embedding tables are left out.

    Args:
        apply: `(params, inputs) -> anything`.
        params: the parameters, or those of a sub-tree that `apply` takes.
        batches: what `apply` takes beside the parameters. Gone through once; another shape compiles another program.
        tensors: a pattern, or several, of the kernels to collect for; all by default.
        inputs: the escape hatch: `apply` itself returns `{kernel's name: its inputs, [..., *in]}`. Padding, which
            counts as input otherwise, can be left out this way.
        normalize: divide by the number N of rows; False gives the sums, which weigh experts by their rows.
        rules: how tensor names are read, as for `merge`; scanned leaves must be named with `Rules(stacked=…)`.
        progress: show a bar; by default in a terminal or notebook.

    Returns:
        `{kernel's name: [in, in]}` in float32: axes of the kernel that are summed over are joined in order. It is a
        pytree that can be saved with `jm.save_checkpoint`, and what `jm.regmean` takes.

    Raises:
        RecipeError: no batch, no linear layer, a pattern that matches nothing, or a kernel that is not applied along
            the axes that its name suggests.
        ShapeError: inputs that were given do not fit their kernel.
        NonFiniteError: NaN or infinity in the inputs of a layer.

    Source: arXiv 2212.09849.
    """
    infos = _infos(params, rules)
    if tensors is not None:
        matched = match_rules([tensors] if isinstance(tensors, str) else tensors, infos)
        infos = {name: info for name, info in infos.items() if matched[name] is not None}
    collect = cached(_given_inputs if inputs else _traced)(apply, tuple(infos.values()))
    return _collected(collect, params, batches, normalize, progress)


def sequential_grams(
    apply: Callable[[Params, Any], Any],
    experts: ExpertTrees,
    batches: Sequence[Sequence[Any]] | Mapping[str, Sequence[Any]],
    *,
    method: Callable[[Mapping[str, Grams]], Method] = regmean,
    rules: Rules = Rules(),
    progress: bool | None = None,
) -> dict[str, Grams]:
    """The Gram matrices of RegMean++: of the inputs that layers get once everything below them is merged.

    Blocks are taken in the order in which the model runs. In each, every expert's block is given its own batches as
    they come out of the merged blocks below, Gram matrices are taken, and the block is merged. What is returned are the
    matrices: `jm.merge(jm.regmean(grams), experts)` is RegMean++, in memory or streamed.

    Args:
        apply: `(params, inputs) -> anything`.
        experts: parameter trees, a list or a dict by name.
        batches: a list of batches for every expert, in the same order or by the same names.
        method: makes the method that merges a block of its Gram matrices, such as
            `lambda grams: jm.regmean(grams, off_diagonal=0.95)`; use the same for the final merge.
        rules: how tensor names are read, as for `merge`. Scanned leaves cannot be merged one layer after the other.
        progress: show bars; by default in a terminal or notebook.

    Returns:
        Expert's name → `{kernel's name: [in, in]}`.

    Raises:
        RecipeError: experts and batches do not belong together, leaves are layer-stacked, or as for `gram`.

    A block is what shares a layer number, or outside of numbered layers a parent. Tensors of blocks without linear
    layers are averaged at the start. Each block takes a pass over all batches up to it, with a program of its own: that
    is simpler than to keep activations, and takes about half as many passes through the model as it has blocks.
    Source: RegMean++ in FusionBench, where inputs are computed anew through the merged lower layers; that it goes by
    these blocks is our reading.
    """
    trees = name_experts(experts)
    if isinstance(batches, Mapping):
        given = {str(name): part for name, part in batches.items()}
    else:
        given = dict(zip(trees, batches, strict=True)) if len(batches) == len(trees) else {}
    if set(given) != set(trees):
        there = ", ".join(map(str, batches)) if isinstance(batches, Mapping) else f"{len(batches)} lists"
        raise RecipeError(f"batches: found {there}, expected a list of batches for each of {', '.join(trees)}")
    if rules.stacked:
        raise RecipeError(
            "layers of a scanned leaf cannot be merged one after the other; unroll the model, or use gram"
        )
    first = next(iter(trees.values()))
    infos = _infos(first, rules)
    for name, part in given.items():
        if not part:
            raise RecipeError(f"the list of batches of expert {name!r} is empty; give at least one batch")
    order = _call_order(apply, first, next(iter(given.values()))[0], infos)
    blocks: dict[str, list[str]] = {}
    for kernel in order:
        blocks.setdefault(_block(kernel, rules), []).append(kernel)

    current = named_leaves(merge(linear(), trees, rules=rules))
    leaves = {name: named_leaves(tree) for name, tree in trees.items()}
    found: dict[str, Grams] = {name: {} for name in trees}
    for block, kernels in blocks.items():
        own = [name for name in current if _block(name, rules) == block]
        collect = _traced(apply, tuple(infos[name] for name in kernels))
        for name, part in given.items():
            params = with_leaves(first, {**current, **{n: leaves[name][n] for n in own}})
            found[name] |= _collected(collect, params, part, True, progress)
        here = {name: {n: leaves[name][n] for n in own} for name in trees}
        grams = {name: {n: found[name][n] for n in kernels} for name in trees}
        current |= merge(method(grams), here, rules=rules)
    return found


def _infos(params: Params, rules: Rules) -> dict[str, TensorInfo]:
    floating = {name: leaf for name, leaf in named_leaves(params).items() if is_mergeable(leaf)}
    return tensor_infos({name: tuple(leaf.shape) for name, leaf in floating.items()}, rules)


def _block(name: str, rules: Rules) -> str:
    """What is merged together: a numbered layer, or a module outside of them."""
    place = layer_place(name, rules.layer)
    return name[: place.stop] if place is not None else name.rpartition("/")[0] or name.rpartition(".")[0]


def _summed_axes(info: TensorInfo) -> tuple[int, ...]:
    """The axes of a kernel that a layer sums over: all but those of its outputs."""
    return tuple(axis for axis in range(len(info.shape)) if axis not in info.output_axes)


def _is_wanted(product: Product, infos: Mapping[str, TensorInfo]) -> bool:
    """Whether a product is the application of a kernel that is collected for.

    Raises:
        RecipeError: it is one along other axes than the kernel's name suggests.
    """
    name = product.weight.name
    if name not in infos or infos[name].kind == "embedding":
        return False
    info, scanned = infos[name], product.weight.stacked
    layered = len(info.shape) < len(product.weight.axes) + scanned  # the info is one of a layer
    if scanned == layered and product.axes == _summed_axes(info):
        return True
    if scanned and not layered:
        raise RecipeError(
            f"tensor {name!r} is scanned over its first axis; say so with rules=jm.Rules(stacked=({name!r},))"
        )
    raise RecipeError(
        f"tensor {name!r} of shape {info.shape} is summed over its axes {product.axes} where it is applied, expected "
        f"{_summed_axes(info)}, judged by its name; correct the names' layout with rules=jm.Rules(layout=…), or leave "
        "it out with tensors="
    )


def _gram(rows: Any) -> tuple[Any, Any]:
    """The Gram matrix of rows, in float32, and how many there are."""
    rows = rows.astype(jnp.float32)
    return jnp.matmul(rows.T, rows, precision="highest"), jnp.asarray(rows.shape[0], jnp.int32)


Collect = Callable[[Params, Any], dict[str, tuple[Any, Any]]]
"""`(params, batch) -> {name: (Gram matrix, rows)}`."""


def _traced(apply: Callable[[Params, Any], Any], tensors: tuple[TensorInfo, ...]) -> Collect:
    infos = {info.name: info for info in tensors}

    def collect(params: Params, batch: Any) -> dict[str, tuple[Any, Any]]:
        def visit(product: Product) -> Any:
            return _gram(product.rows()) if _is_wanted(product, infos) else None

        found: dict[str, tuple[Any, Any]] = {}
        for sighting in follow(apply, [params], batch, visit=visit)[1]:
            known = found.get(sighting.name)
            note = sighting.note
            found[sighting.name] = note if known is None else jax.tree.map(jnp.add, known, note)
        if not found:
            raise RecipeError(
                "no kernel is applied to inputs in the trace of apply; check that it uses the parameters that it is "
                "given, and tensors=; inputs that apply returns itself are taken with inputs=True"
            )
        return found

    return jax.jit(collect)


def _given_inputs(inputs: Callable[[Params, Any], Any], tensors: tuple[TensorInfo, ...]) -> Collect:
    infos = {info.name: info for info in tensors}

    def collect(params: Params, batch: Any) -> dict[str, tuple[Any, Any]]:
        found = {}
        for name, x in inputs(params, batch).items():
            match_rules([name], infos)
            info = infos[name]
            shape = tuple(info.shape[axis] for axis in _summed_axes(info))
            if not shape or tuple(x.shape[-len(shape) :]) != shape:
                raise ShapeError(f"inputs of {name!r}: found shape {tuple(x.shape)}, expected [..., {shape}]")
            found[name] = _gram(x.reshape(-1, math.prod(shape)))
        return found

    return jax.jit(collect)


def _call_order(
    apply: Callable[[Params, Any], Any], params: Params, batch: Any, infos: Mapping[str, TensorInfo]
) -> list[str]:
    """The kernels in the order in which the model applies them."""
    order: list[str] = []

    def visit(product: Product) -> None:
        if _is_wanted(product, infos):
            order.append(product.weight.name)

    jax.eval_shape(lambda params, batch: follow(apply, [params], batch, visit=visit)[0], params, batch)
    return list(dict.fromkeys(order))


def _collected(
    collect: Collect, params: Params, batches: Iterable[Any], normalize: bool, progress: bool | None
) -> Grams:
    """The sums over batches, or means over rows."""
    sums: Grams = {}
    flags, rows = [], []
    for _, batch in each_batch(batches, "Gram matrices", progress):
        found = collect(params, batch)
        grams = {name: matrix for name, (matrix, _) in found.items()}
        sums, finite = _added(sums or jax.tree.map(jnp.zeros_like, grams), grams)
        flags.append(finite)
        rows.append({name: count for name, (_, count) in found.items()})
    check_finite(flags, list(sums), "its inputs")
    if not normalize:
        return sums
    counted = jax.device_get(rows)
    totals = {name: np.float32(sum(int(np.max(row[name])) for row in counted)) for name in sums}
    return {name: matrix / totals[name] for name, matrix in sums.items()}


@jax.jit
def _added(sums: Grams, grams: Grams) -> tuple[Grams, Any]:
    new = jax.tree.map(jnp.add, sums, grams)
    return new, jnp.stack([jnp.all(jnp.isfinite(x)) for x in new.values()])
