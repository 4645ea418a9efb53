"""Coefficients that vary: by depth, by tensor name, by expert.

Wherever a method takes a number it also takes one of these. They are pytree nodes whose leaves are the numbers, so a
varying coefficient can be swept, differentiated and sharded like a plain one. `method.at(info)` turns each into the
plain value for one tensor, outside any compiled program.

* a number or an array: the same for every tensor;
* `jm.by_depth([first, …, last])`: interpolated over the layers;
* `{pattern: value}`: the first pattern that matches the whole tensor name (an exact name beats every pattern);
* for coefficients that belong to experts, additionally a list in the experts' order, or `{expert name: value}`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge.errors import RecipeError
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.paths import match_rules

Coefficient = Any
"""A number, an array, `by_depth(...)`, or a mapping from names to any of these."""


@dataclasses.dataclass(frozen=True)
class ByDepth:
    """A coefficient interpolated linearly over depth, from `values[0]` at a stack's first layer to `values[-1]`."""

    values: Any
    outside: Any

    def at(self, info: TensorInfo) -> Any:
        if info.depth is None:
            return self.outside
        position = info.depth * (len(self.values) - 1)
        low = min(int(position), len(self.values) - 2) if len(self.values) > 1 else 0
        share = position - low
        if share == 0:  # exact at the given points, also where the next value is infinite
            return self.values[low]
        return self.values[low] * (1 - share) + self.values[low + 1] * share


@dataclasses.dataclass(frozen=True)
class Table:
    """Values by key, in order: keys are tensor names or patterns on them, or names of experts."""

    keys: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    values: tuple[Any, ...]

    def at(self, info: TensorInfo) -> Any:
        if info.name in self.keys:
            return self.values[self.keys.index(info.name)]
        for key, value in zip(self.keys, self.values, strict=True):
            if re.fullmatch(key, info.name):
                return value
        raise RecipeError(f"no rule gives a value for tensor {info.name!r}; add one, for instance '.*', as the last")


jax.tree_util.register_dataclass(ByDepth)
jax.tree_util.register_dataclass(Table)


def by_depth(values: Sequence[Coefficient] | jax.Array, *, outside: Coefficient = None) -> ByDepth:
    """A coefficient that changes with depth, interpolated linearly over the layers.

    Args:
        values: at least one value, from the first layer to the last; numbers, or one vector per point for coefficients
            that belong to experts.
        outside: the value for tensors outside any stack of layers (embeddings, heads); the first of `values` when None.

    Returns:
        A coefficient to be given wherever a method takes a number.
    """
    if len(values) == 0:
        raise RecipeError("by_depth needs at least one value")
    kept = coefficient(list(values) if isinstance(values, Sequence) else values)
    return ByDepth(kept, kept[0] if outside is None else coefficient(outside))


def coefficient(value: Coefficient) -> Any:
    """`value` as a pytree that keeps the order of its rules (a plain dict would be sorted by key)."""
    if isinstance(value, Mapping):
        return Table(tuple(str(key) for key in value), tuple(coefficient(v) for v in value.values()))
    if isinstance(value, list | tuple):
        return tuple(coefficient(v) for v in value)
    return value


def at_tensor(value: Any, info: TensorInfo) -> Any:
    """The plain value of a coefficient for one tensor."""
    while isinstance(value, ByDepth | Table):
        value = value.at(info)
    return value


def per_expert(value: Any, info: TensorInfo, experts: tuple[str, ...], what: str) -> Any:
    """The plain values of a coefficient for one tensor, one per expert: a list of K numbers, or an array `[K]`.

    Raises:
        RecipeError: there are more or fewer values than experts.
    """
    if isinstance(value, Table) and set(value.keys) & set(experts):
        if set(value.keys) != set(experts):
            raise RecipeError(f"{what} are given for experts {list(value.keys)}, but the experts are {list(experts)}")
        value = tuple(value.values[value.keys.index(name)] for name in experts)
    value = at_tensor(value, info)
    if isinstance(value, tuple):
        value = [at_tensor(v, info) for v in value]
        found = len(value)
    else:
        shape = np.shape(value)
        if len(shape) > 1:
            raise RecipeError(f"{what} must be one number, or one per expert, not an array of shape {shape}")
        if not shape:
            return [value] * len(experts)
        found = shape[0]
    if found != len(experts):
        raise RecipeError(
            f"{what}: found {found} values, expected {len(experts)}, one per expert ({', '.join(experts)})"
        )
    return value


def check_same_everywhere(what: str, value: Any, experts: tuple[str, ...]) -> None:
    """Checks that a coefficient is the same for every tensor, as one that counts entries of the whole model must be.

    Raises:
        RecipeError: it varies by depth or by tensor name.
    """
    of_experts = isinstance(value, Table) and set(value.keys) & set(experts)
    if isinstance(value, ByDepth | Table) and not of_experts:
        raise RecipeError(
            f"{what} over the whole model cannot differ between tensors, but {value!r} does; give one number (or one "
            "per expert), take shares of each tensor with scope='tensor', or use jm.partition"
        )
    for part in value.values if of_experts else value if isinstance(value, tuple) else ():
        check_same_everywhere(what, part, experts)


def check_rules(method: Any, names: Sequence[str], experts: tuple[str, ...]) -> None:
    """Checks that every rule inside a method matches a tensor.

    Raises:
        RecipeError: a pattern matches nothing; the message suggests the nearest names.
    """

    def visit(node: Any) -> bool:
        if isinstance(node, Table):
            if not set(node.keys) & set(experts):
                match_rules(node.keys, names)
            for value in node.values:
                jax.tree.leaves(value, is_leaf=visit)
        return False

    jax.tree.leaves(method, is_leaf=visit)


def is_plain_number(value: Any) -> bool:
    """Whether a value is a number known now, not a tracer or an array on a device."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def check_range(what: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Checks every number inside a coefficient that is known now.

    Raises:
        RecipeError: one lies outside `[low, high]` (`(low, high]` with `open_low`) or is NaN.
    """
    for number in jax.tree.leaves(value):
        if is_plain_number(number) and not ((low < number if open_low else low <= number) and number <= high):
            raise RecipeError(f"{what} is {number}, expected a number in {'(' if open_low else '['}{low:g}, {high:g}]")
