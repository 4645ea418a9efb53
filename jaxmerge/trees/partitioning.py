"""Which part of each tensor goes to which device: shardings from rules, and checks that say what does not fit.

Rules are patterns on tensor names, or Flax's logical axis rules for parameters that carry names of axes. What does not
fit (a dimension that cannot be cut evenly, an axis that the mesh lacks, …) is found here, tensor by tensor, before
anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxmerge.errors import RecipeError, StructureError
from jaxmerge.trees.paths import Params, match_rules, named_leaves, with_leaves

MeshAxes = str | tuple[str, ...] | None
"""What one dimension is cut along: an axis of the mesh, several, or nothing."""

PartitionRules = Mapping[str, PartitionSpec] | Sequence[tuple[str, MeshAxes]]
"""`{pattern on names: PartitionSpec}`, or Flax's `[(logical axis, mesh axis)]`."""

_SHOWN = 3


def partition_shardings(params: Params, mesh: Mesh, rules: PartitionRules) -> Params:
    """The sharding of every tensor, by rules.

    Args:
        params: a tree with shapes: arrays, lazy tensors or `jax.ShapeDtypeStruct` (from `jax.eval_shape` or
            `nnx.eval_shape`).
        mesh: the devices.
        rules: `{pattern: PartitionSpec}`, where the first pattern that matches the whole name wins, as everywhere; or
            Flax's logical axis rules `[(logical axis, mesh axis or None)]` for parameters whose boxes name their axes
            (`nnx.with_partitioning`, `nn.with_logical_partitioning`). As in Flax, a dimension takes the first rule for
            its name whose mesh axis no other dimension has taken, and what names no axes is on every device. Names
            without a rule must be axes of the mesh.

    Returns:
        A tree like `params`, with a `NamedSharding` at every leaf.

    Raises:
        RecipeError: a pattern matches nothing or never wins, a tensor or a logical axis has no rule, a spec has more
            entries than the tensor has dimensions, the mesh lacks an axis, an axis is used twice, or a dimension
            cannot be cut into equal parts.
    """
    leaves = named_leaves(params)
    if isinstance(rules, Mapping):
        chosen = _winning_patterns(rules, leaves)
        specs = {name: (rules[chosen[name]], f"the rule {chosen[name]!r}") for name in leaves}
    else:
        specs = _logical_specs(params, list(leaves), mesh, rules)
    shardings = {}
    for name, (spec, origin) in specs.items():
        _check_spec(name, tuple(leaves[name].shape), spec, mesh, origin)
        shardings[name] = NamedSharding(mesh, spec)
    return with_leaves(params, shardings)


def shardings_of(params: Params, shardings: Any) -> dict[str, Sharding | None]:
    """The sharding of every tensor by name, when each can hold its tensor.

    Args:
        params: a tree with shapes.
        shardings: one for all tensors, a tree of them with the names of `params` (boxes do not matter), or None.

    Returns:
        A sharding for every name, or None for every name.

    Raises:
        StructureError: the tree lacks a tensor, or has one too many.
        RecipeError: a leaf is no sharding, or does not fit its tensor.
    """
    leaves = named_leaves(params)
    if shardings is None or isinstance(shardings, Sharding):
        result = dict.fromkeys(leaves, shardings)
    else:
        result = named_leaves(shardings)
        check_same_names(result, leaves, "the tree of shardings", "jm.partition_shardings gives one for every tensor")
    for name, sharding in result.items():
        if sharding is None and shardings is None:
            continue
        if not isinstance(sharding, Sharding):
            raise RecipeError(
                f"tensor {name!r}: found {type(sharding).__name__} as its sharding, expected a jax.sharding.Sharding; "
                "a PartitionSpec becomes one with jax.sharding.NamedSharding(mesh, spec)"
            )
        _check_sharding(name, tuple(leaves[name].shape), sharding)
    return {name: result[name] for name in leaves}


def check_same_names(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str, remedy: str) -> None:
    """Checks that a tree has a leaf for every tensor that is wanted, and no other.

    Raises:
        StructureError: it has not.
    """
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    if missing or extra:
        problems = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(extra)} besides"] * bool(extra)
        raise StructureError(f"{what} {' and '.join(problems)}, of {len(wanted)} tensors that are expected; {remedy}")


def _winning_patterns(rules: Mapping[str, PartitionSpec], leaves: Mapping[str, Any]) -> dict[str, str]:
    """The pattern that each tensor falls under; every pattern has one."""
    chosen = {name: pattern for name, pattern in match_rules(rules, leaves).items() if pattern is not None}
    for pattern in rules:
        if pattern not in chosen.values():
            name = next(name for name, hit in match_rules([pattern], leaves).items() if hit)
            raise RecipeError(
                f"the rule {pattern!r} never applies: all that it matches, such as {name!r}, falls under rules before "
                f"it, there {chosen[name]!r}; put it first, or leave it out"
            )
    without = [name for name in leaves if name not in chosen]
    if without:
        raise RecipeError(
            f"no rule matches {_some(without)}; add one, or '.*': PartitionSpec() as the last, which puts whatever is "
            "left on every device"
        )
    return chosen


def _logical_specs(
    params: Params, names: list[str], mesh: Mesh, rules: Sequence[tuple[str, MeshAxes]]
) -> dict[str, tuple[PartitionSpec, str]]:
    boxes = jax.tree.leaves(params, is_leaf=_names_axes)
    axes_of = {name: _logical_axes(box) for name, box in zip(names, boxes, strict=True)}
    if not any(axes_of.values()):
        raise RecipeError(
            "these parameters name no logical axes, so logical axis rules cannot tell their sharding; give "
            "{pattern: PartitionSpec}, or as target= the abstract parameters of a Flax model that names its axes"
        )
    known = {axis for axis, _ in rules}
    specs = {}
    for name, axes in axes_of.items():
        # What has no rule may name the mesh's axes itself.
        entries: list[MeshAxes] = [None if axis in known else axis for axis in axes]
        for axis, mesh_axes in rules:
            if axis in axes and entries[axes.index(axis)] is None and not _taken(mesh_axes, entries):
                entries[axes.index(axis)] = mesh_axes
        for axis in axes:
            if isinstance(axis, str) and axis not in known and axis not in mesh.shape:
                raise RecipeError(
                    f"tensor {name!r} has a logical axis {axis!r}, for which there is no rule (there are rules for "
                    f"{', '.join(sorted(known)) or 'none'}); add ({axis!r}, None) if it is to stay whole"
                )
        specs[name] = (PartitionSpec(*entries), f"{axes}, its logical axes,")
    return specs


def _names_axes(box: Any) -> bool:
    """Whether this is one of Flax's boxes, which may name the axes of what they hold."""
    return hasattr(box, "get_metadata") or hasattr(box, "get_partition_spec")


def _logical_axes(box: Any) -> tuple[MeshAxes, ...]:
    found = box.get_metadata().get("out_sharding") if hasattr(box, "get_metadata") else getattr(box, "names", None)
    return tuple(getattr(found, "spec", found) or ())


def _taken(axes: MeshAxes, entries: Sequence[MeshAxes]) -> bool:
    return bool(set(_each(axes)) & {axis for entry in entries for axis in _each(entry)})


def _each(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _check_spec(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Any, origin: str) -> None:
    """Checks that a tensor can be cut as a spec says; `origin` tells where the spec comes from."""
    sizes = dict(mesh.shape)
    about = f"tensor {name!r} of shape {shape}: {origin} gives {spec}"
    if len(spec) > len(shape):
        raise RecipeError(
            f"{about}, which has {len(spec)} entries for {len(shape)} dimensions; shorten it, or give tensors of that "
            "rank a rule of their own"
        )
    used: dict[str, int] = {}
    for dimension, entry in enumerate(spec):
        if entry is PartitionSpec.UNCONSTRAINED:
            raise RecipeError(f"{about}, which leaves dimension {dimension} open; name an axis, or None")
        for axis in _each(entry):
            if axis not in sizes:
                raise RecipeError(
                    f"{about}, and the mesh has no axis {axis!r}: it has {_sizes(sizes)}; make the mesh with that axis "
                    "(of size 1, if need be), or correct the rule"
                )
            if axis in used:
                raise RecipeError(
                    f"{about}, which uses the axis {axis!r} twice, for dimensions {used[axis]} and {dimension}; a "
                    "mesh axis can cut one dimension only"
                )
            used[axis] = dimension
        parts = math.prod(sizes[axis] for axis in _each(entry))
        if shape[dimension] % parts:
            raise RecipeError(
                f"{about}, but dimension {dimension} has {shape[dimension]} entries, which {parts} devices along "
                f"{_sizes({axis: sizes[axis] for axis in _each(entry)})} cannot share evenly; cut another dimension, "
                "use a smaller axis, or None to leave it whole"
            )


def _check_sharding(name: str, shape: tuple[int, ...], sharding: Sharding) -> None:
    if isinstance(sharding, NamedSharding):
        if not isinstance(sharding.mesh, Mesh):
            raise RecipeError(f"tensor {name!r}: its sharding has no devices ({sharding}); use a jax.sharding.Mesh")
        _check_spec(name, shape, sharding.spec, sharding.mesh, "its sharding")
        return
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise RecipeError(f"tensor {name!r} of shape {shape} does not fit its sharding: {error}") from None


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={n}" for axis, n in sizes.items()) or "none"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more tensors"
