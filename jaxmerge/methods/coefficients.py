"""Coefficients that vary: by depth, by tensor name, by expert.

Wherever a method takes a number it also takes one of these. They are pytree nodes whose leaves are the numbers, so a
varying coefficient can be swept, differentiated and sharded like a plain one. `method.at(info)` turns each into the
plain value for one tensor, outside any compiled program.

* a number or an array: the same for every tensor;
* `jm.by_depth([first, …, last])`: interpolated over the layers;
* `{pattern: value}`: the first pattern that matches the whole tensor name (an exact name beats every pattern);
* for coefficients that belong to experts, additionally a list in the experts' order, or `{expert name: value}`;
* `jm.learnable(start)`: a number that `jm.learn` replaces by one number per tensor and expert.
"""

from __future__ import annotations

import dataclasses
import difflib
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


@dataclasses.dataclass(frozen=True, repr=False)
class Learnable(Table):
    """Numbers to be learned, kept in one array so that a model of hundreds of tensors is one leaf; see `learnable`.

    Rows and columns are found by name, never by position: the order of tensors is no part of what was learned.

    Attributes:
        keys: the tensors that have a row each; empty as long as there is one row for all.
        values: `[T, K]`, `[T]`, `[K]` or one number; or the T rows as a tuple.
        experts: the experts that have a column each; empty as long as there is one for all.
        per_tensor: `spread` gives every tensor a row.
        per_expert: `spread` gives every expert a column.
    """

    values: Any
    experts: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    per_tensor: bool = dataclasses.field(default=True, metadata={"static": True})
    per_expert: bool = dataclasses.field(default=True, metadata={"static": True})

    def at(self, info: TensorInfo) -> Any:
        """The tensor's row."""
        if not self.keys:
            return self.values
        if info.name not in self.keys:
            raise RecipeError(f"no coefficient was learned for tensor {info.name!r}; {_nearest(info.name, self.keys)}")
        return self.values[self.keys.index(info.name)]

    def for_experts(self, info: TensorInfo, experts: tuple[str, ...], what: str) -> Any:
        """The tensor's row with one number per expert, in their order."""
        row = self.at(info)
        if not self.experts:
            return [row] * len(experts) if np.ndim(row) == 0 else row
        if set(self.experts) != set(experts):
            raise RecipeError(
                f"{what} were learned for the experts {', '.join(self.experts)}, but these are {', '.join(experts)}; "
                "name them as they were named then"
            )
        return row if self.experts == experts else row[np.array([self.experts.index(name) for name in experts])]

    def spread(self, tensors: Sequence[str], experts: Sequence[str]) -> Learnable:
        """The same with a row for every tensor and a column for every expert, where they are to have their own."""
        if self.keys or self.experts:
            return self
        start = np.asarray(self.values, np.float32)
        rows, columns = tuple(tensors) * self.per_tensor, tuple(experts) * self.per_expert
        shape = (len(rows),) * self.per_tensor + (start.shape or (len(columns),) * self.per_expert)
        return dataclasses.replace(self, keys=rows, values=np.array(np.broadcast_to(start, shape)), experts=columns)

    def __repr__(self) -> str:
        if isinstance(self.values, int | float):
            given = [repr(self.values)]
            given += [f"{name}=False" for name in ("per_tensor", "per_expert") if not getattr(self, name)]
            return f"learnable({', '.join(given)})"
        sizes = [f"{len(self.keys)} tensors"] * bool(self.keys) + [f"{len(self.experts)} experts"] * bool(self.experts)
        return f"learned({' x '.join(sizes) or 'one number'})"


for _node in (ByDepth, Table, Learnable):
    jax.tree_util.register_dataclass(_node)


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


def learnable(start: float | Sequence[float] = 0.3, *, per_tensor: bool = True, per_expert: bool = True) -> Learnable:
    """A coefficient to be learned by `jm.learn`: until then one number, afterwards one for every tensor and expert.

    In a method that has one, it alone is learned; everything else is a setting. It may stand wherever a method takes a
    coefficient: `jm.task_arithmetic(jm.learnable(0.3, per_expert=False))` learns one scale per tensor.

    Args:
        start: the number that every coefficient starts from; for coefficients of experts also one per expert, in order.
        per_tensor: learn one for every tensor, by name.
        per_expert: learn one for every expert, by name; must be False where the number does not belong to experts.
    """
    values = tuple(float(x) for x in start) if isinstance(start, Sequence) else start
    if isinstance(values, tuple) and not per_expert:
        raise RecipeError(f"learnable starts from {len(values)} numbers, one per expert, but per_expert is False")
    return Learnable(
        (), np.array(values, np.float32) if isinstance(values, tuple) else values, (), per_tensor, per_expert
    )


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
        if isinstance(value, Learnable) and value.experts:
            raise RecipeError(
                f"{value!r} stands where a coefficient belongs to no expert; build it with per_expert=False"
            )
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
    while isinstance(value, ByDepth | Table) and not isinstance(value, Learnable):
        value = value.at(info)
    value = value.for_experts(info, experts, what) if isinstance(value, Learnable) else at_tensor(value, info)
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
        RecipeError: a pattern matches nothing, or a number was learned for a tensor that is not there; the message
            suggests the nearest names.
    """

    def visit(node: Any) -> bool:
        if isinstance(node, Learnable):
            for key in sorted(set(node.keys) - set(names)):
                raise RecipeError(f"a coefficient was learned for {key!r}, which is no tensor; {_nearest(key, names)}")
        elif isinstance(node, Table):
            if not set(node.keys) & set(experts):
                match_rules(node.keys, names)
            for value in node.values:
                jax.tree.leaves(value, is_leaf=visit)
        return False

    jax.tree.leaves(method, is_leaf=visit)


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or list(names[:3])
    return f"the nearest names are {', '.join(near)}; rename one of them (jm.renamed)"


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
