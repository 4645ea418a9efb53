"""Different methods for different tensors: `partition` and `masked`, and `passthrough`, which copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Array

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Coefficient, Table, at_tensor, coefficient
from jaxmerge.methods.method import Granularity, Method, pytree, static
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.paths import match_rules


@pytree
class Passthrough(Method):
    """See `passthrough`."""

    scale: Any = 1.0
    source: str | None = static(default=None)
    _index: int | None = static(default=None)

    def check(self, experts: tuple[str, ...], has_base: bool, tensors: Sequence[str]) -> None:
        super().check(experts, has_base, tensors)
        if self.source is None and len(experts) != 1:
            raise RecipeError(f"passthrough copies one model: found {len(experts)} experts; name one with source=")
        if self.source == "base" and not has_base:
            raise RecipeError("passthrough(source='base') needs a base; pass base=")
        if self.source not in (None, "base", *experts):
            raise RecipeError(f"passthrough: no expert is named {self.source!r}; there are {', '.join(experts)}")

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Passthrough:
        index = None if self.source == "base" else 0 if self.source is None else experts.index(self.source)
        return dataclasses.replace(self, scale=at_tensor(self.scale, info), source=None, _index=index)

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        return self.scale * (base if self._index is None else experts[self._index])


@pytree
class Partition(Method):
    """See `partition`."""

    names: tuple[str, ...] = static(default=())
    methods: tuple[Method, ...] = ()
    labels: Callable[[TensorInfo], str] | tuple[tuple[str, str], ...] = static(default=())

    def check(self, experts: tuple[str, ...], has_base: bool, tensors: Sequence[str]) -> None:
        if not callable(self.labels):
            match_rules([pattern for pattern, _ in self.labels], tensors)
        for method in self.methods:
            method.check(experts, has_base, tensors)

    def for_tensor(self, info: TensorInfo) -> Method:
        rules = self.labels
        label = rules(info) if callable(rules) else Table(*zip(*rules, strict=True)).at(info)
        if label not in self.names:
            raise RecipeError(f"tensor {info.name!r} is labelled {label!r}, but there are methods for {self.names}")
        return self.methods[self.names.index(label)].for_tensor(info)

    @property
    def granularity(self) -> Granularity:
        """The coarsest of the methods'."""
        found = {method.granularity for method in self.methods}
        return next(g for g in (Granularity.MODEL, Granularity.TENSOR, Granularity.ELEMENT) if g in found)

    def __repr__(self) -> str:
        return f"partition({dict(zip(self.names, self.methods, strict=True))!r})"


def passthrough(scale: Coefficient = 1.0, *, source: str | None = None) -> Method:
    """Copies one model, times a number.

    Args:
        scale: the number.
        source: the expert's name, or `"base"`; may be left out when there is one expert.
    """
    return Passthrough(coefficient(scale), source)


def partition(methods: Mapping[str, Method], labels: Mapping[str, str] | Callable[[TensorInfo], str]) -> Method:
    """Different methods for different tensors.

    Args:
        methods: label → method.
        labels: `{pattern: label}`, first match wins; or a function from a tensor's `TensorInfo` (name, kind, shape,
            layer, …) to its label.

    Measurements over the model are taken over the tensors that share a method.

    Raises:
        RecipeError: a label without a method; a pattern or tensor that matches nothing (when merging).
    """
    if not callable(labels):
        for label in labels.values():
            if label not in methods:
                raise RecipeError(f"the label {label!r} has no method; there are methods for {', '.join(methods)}")
        labels = tuple(labels.items())  # pyright: ignore[reportAssignmentType]
    return Partition(tuple(methods), tuple(methods.values()), labels)  # pyright: ignore[reportArgumentType]


def masked(
    method: Method, tensors: str | Sequence[str] | Callable[[TensorInfo], bool], *, otherwise: Method | None = None
) -> Method:
    """A method for some tensors only.

    Args:
        method: merges the tensors chosen.
        tensors: a pattern, several patterns, or a function of a tensor's `TensorInfo`.
        otherwise: merges the rest; the base is kept when None.
    """
    rest = passthrough(source="base") if otherwise is None else otherwise
    methods = {"chosen": method, "rest": rest}
    if callable(tensors):
        choose = tensors
        return partition(methods, lambda info: "chosen" if choose(info) else "rest")
    patterns = [tensors] if isinstance(tensors, str) else tensors
    return partition(methods, {**dict.fromkeys(patterns, "chosen"), ".*": "rest"})
