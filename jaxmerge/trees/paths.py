"""Names of the leaves of a parameter pytree, and trees rebuilt with other leaves.

Every part of the library addresses a tensor by its name, `blocks/3/attn/kernel`: the key path joined by `/`. A flat
dict `{name: array}` keeps its names as they are. Boxes around arrays (`nnx.Variable`, Linen's `Partitioned`) are
opened, so an `nnx.State`, its pure dict and Linen's boxed and unboxed parameters have the same names; they are closed
again around new leaves, so that a result comes in the container that was given.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxmerge.errors import RecipeError, StructureError

Params = Any
"""A pytree of parameters."""


def named_leaves(params: Params) -> dict[str, Any]:
    """The leaves of a parameter tree by name, in the tree's order.

    Args:
        params: any pytree whose key paths can be written as text: nested dicts, `FrozenDict`, `nnx.State`, dataclasses,
            flat `{name: array}`. Leaves may be arrays, `jax.ShapeDtypeStruct` or `LazyTensor`.

    Returns:
        `{name: leaf}` with boxes opened.

    Raises:
        StructureError: two leaves share a name, or `params` is an `nnx.Module` (mapping over a module breaks its ties).
    """
    leaves: dict[str, Any] = {}
    for path, leaf in _flatten(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise StructureError(f"two tensors are both named {name!r}; rename one of them")
        leaves[name] = _unboxed(leaf)
    return leaves


def with_leaves(params: Params, leaves: Mapping[str, Any]) -> Params:
    """`params` with the leaf of each name replaced: same container, same boxes.

    Args:
        params: the tree that gives the structure.
        leaves: a leaf for every name of `named_leaves(params)`.
    """
    pairs, treedef = _flatten(params)
    new = []
    for path, leaf in pairs:
        value = leaves[jax.tree_util.keystr(path, simple=True, separator="/")]
        new.append(_boxed(leaf, value))
    return jax.tree_util.tree_unflatten(treedef, new)


def renamed(params: Params, rules: Mapping[str, str]) -> dict[str, Any]:
    r"""The leaves under new names, as a flat dict; nothing is read.

    Args:
        params: any parameter tree.
        rules: `{pattern: replacement}`; the first pattern that matches a whole name rewrites it (`re.sub` syntax, so
            `\1` is the first group); a name that no pattern matches stays.

    Raises:
        RecipeError: a pattern matches nothing.
        StructureError: two tensors end up with one name.
    """
    leaves = named_leaves(params)
    matched = match_rules(rules, leaves)
    result: dict[str, Any] = {}
    for name, leaf in leaves.items():
        pattern = matched[name]
        new = name if pattern is None else re.fullmatch(pattern, name).expand(rules[pattern])  # pyright: ignore[reportOptionalMemberAccess]
        if new in result:
            raise StructureError(f"renaming {name!r} gives {new!r}, a name that another tensor has already")
        result[new] = leaf
    return result


def match_rules(patterns: Iterable[str], names: Iterable[str]) -> dict[str, str | None]:
    """Which rule each name falls under: the first pattern that matches the whole name, or None.

    Print the result to see what a set of rules does before it runs.

    Args:
        patterns: regular expressions on whole names; a plain name matches itself.
        names: tensor names.

    Raises:
        RecipeError: a pattern is no regular expression, or matches no name at all.
    """
    names = list(names)
    known = set(names)
    compiled: dict[str, re.Pattern[str]] = {}
    used: set[str] = set()
    for pattern in patterns:
        try:
            compiled[pattern] = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise RecipeError(f"the rule {pattern!r} is no regular expression: {error}") from None
    result: dict[str, str | None] = {}
    for name in names:
        hits = [p for p, c in compiled.items() if p == name or c.fullmatch(name)]
        result[name] = hits[0] if hits else None
        used.update(hits)
    for pattern in compiled:
        if pattern not in used and pattern not in known:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise RecipeError(f"the rule {pattern!r} matches no tensor; the nearest names are {', '.join(near)}")
    return result


def _flatten(params: Params) -> tuple[list[tuple[Any, Any]], Any]:
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(params, nnx.Module):
        raise StructureError(
            f"{type(params).__name__} is an nnx.Module; merge its parameters, nnx.state(model, nnx.Param), "
            "and put the result back with nnx.update(model, merged)"
        )
    return jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_box)


# Flax is never imported here (it costs seconds): a tree can only hold Flax's boxes when the user has imported it.
def _is_box(leaf: Any) -> bool:
    nnx, meta = sys.modules.get("flax.nnx"), sys.modules.get("flax.core.meta")
    return (nnx is not None and isinstance(leaf, nnx.Variable)) or (
        meta is not None and isinstance(leaf, meta.AxisMetadata)
    )


def _unboxed(leaf: Any) -> Any:
    if not _is_box(leaf):
        return leaf
    return leaf.get_value() if hasattr(leaf, "get_value") else leaf.unbox()


def _boxed(box: Any, value: Any) -> Any:
    if not _is_box(box):
        return value
    return box.replace(value) if hasattr(box, "get_value") else box.replace_boxed(value)
