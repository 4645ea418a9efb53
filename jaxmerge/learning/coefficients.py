"""What is learned of a method: its coefficients by name, out of the method and back into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Learnable
from jaxmerge.methods.lazy import LazyMerge
from jaxmerge.methods.method import Method, pytree
from jaxmerge.methods.stages import Chain, Stage, TaskVectors
from jaxmerge.trees.info import TensorInfo

Values = dict[str, Any]
"""Coefficients by name, such as `stages/0/weights`."""


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """The coefficients of a method that are learned.

    They are its `learnable` ones or, where it has none, all of its floating-point leaves.

    Attributes:
        method: the method, with a row for every tensor and a column for every expert where they are to have one.
        names: of the coefficients, in the order of the leaves.
        learnable: whether they are `Learnable` nodes.
    """

    method: Method
    names: tuple[str, ...]
    learnable: bool

    @classmethod
    def of(
        cls, method: Method, tensors_of: Callable[[Method], Sequence[str]], experts: tuple[str, ...]
    ) -> Coefficients:
        """Finds what is to be learned.

        Args:
            method: the method.
            tensors_of: the tensors that one of its parts merges.
            experts: names of the experts.

        Raises:
            RecipeError: there is nothing to learn.
        """
        has_learnable = any(isinstance(x, Learnable) for x in jax.tree.leaves(method, is_leaf=_is_learnable))

        def spread(part: Any) -> Any:
            """The part with its tables; the methods within it, as a partition has them, merge other tensors."""
            if _is_learnable(part):
                return part.spread(tensors_of(owner[-1]), experts)
            if not isinstance(part, Method):
                return part
            owner.append(part)
            part = jax.tree.map(
                spread, part, is_leaf=lambda x: x is not owner[-1] and isinstance(x, Method | Learnable)
            )
            owner.pop()
            return part

        owner: list[Method] = []

        method = spread(method)
        names = tuple(name for name, leaf in _named(method) if _is_learned(leaf, has_learnable))
        if not names:
            raise RecipeError(f"{method!r} has no coefficient to learn; give it one with jm.learnable(start)")
        return cls(method, names, has_learnable)

    @property
    def values(self) -> Values:
        """The coefficients as arrays, in float32 at least."""
        found = {}
        for name, leaf in _named(self.method):
            if _is_learned(leaf, self.learnable):
                value = leaf.values if _is_learnable(leaf) else leaf
                wide = getattr(value, "dtype", None) == np.float64 and jax.config.read("jax_enable_x64")
                found[name] = jnp.asarray(value, jnp.float64 if wide else jnp.float32)
        return found

    def put(self, values: Mapping[str, Any], method: Method | None = None, *, rows: bool = False) -> Method:
        """The method with other coefficients.

        Args:
            values: by name.
            method: another method of the same structure to put them into.
            rows: split tables into their rows, which costs one operation here and spares one per tensor later.
        """
        method = self.method if method is None else method
        leaves, treedef = jax.tree.flatten(method, is_leaf=_is_learnable)
        new, left = [], iter(self.names)
        for leaf in leaves:
            if not _is_learned(leaf, self.learnable):
                new.append(leaf)
                continue
            value = values[next(left)]
            if _is_learnable(leaf):
                split = tuple(jnp.unstack(value)) if rows and leaf.keys else value
                new.append(dataclasses.replace(leaf, values=split))
            else:
                new.append(value)
        return jax.tree.unflatten(treedef, new)

    def in_rows(self, tensors: Sequence[str]) -> Coefficients:
        """The same with a row for every tensor also where one is shared by all; `rows_of` gives its values.

        XLA compiles the derivative of one number by hundreds of tensors for minutes, that of a row each in seconds.
        """
        keys = tuple(tensors)

        def spread(node: Any) -> Any:
            shared = _is_learnable(node) and not node.keys
            return dataclasses.replace(node, keys=keys, values=self._rows(node.values, keys)) if shared else node

        method = jax.tree.map(spread, self.method, is_leaf=_is_learnable)
        return dataclasses.replace(self, method=method)

    def rows_of(self, values: Values, tensors: Sequence[str]) -> Values:
        """Values of these coefficients as those of `in_rows`."""
        return {name: self._rows(value, tensors) if self._is_shared(name) else value for name, value in values.items()}

    def rows_added(self, rows: Values) -> Values:
        """Derivatives by the values of these coefficients, from those by their rows."""

        def added(x: Any) -> Any:  # a product with ones, since XLA would fuse a sum with all that it adds up
            return jnp.einsum("t,t...->...", jnp.ones(len(x), x.dtype), x, precision="highest")

        return {name: added(x) if self._is_shared(name) else x for name, x in rows.items()}

    def _is_shared(self, name: str) -> bool:
        node = self.node(name)
        return node is not None and not node.keys

    @staticmethod
    def _rows(value: Any, tensors: Sequence[str]) -> Any:
        return jnp.broadcast_to(jnp.asarray(value), (len(tensors), *jnp.shape(value)))

    def node(self, name: str) -> Learnable | None:
        """The node of a coefficient, or None where it is a plain number."""
        node = dict(_named(self.method))[name]
        return node if _is_learnable(node) else None


@pytree
class Measured(Stage):
    """A stage whose measurement has been taken already, so that it costs what plain arithmetic costs."""

    stage: Any
    result: Any

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Measured:
        return Measured(self.stage.at(info, experts), self.result)

    @property
    def whole_tensor(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.stage.whole_tensor

    @property
    def in_one_place(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.stage.in_one_place

    @property
    def draws(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.stage.draws

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        return self.stage.apply(vectors, info, self.result)


def measured_once(coefficients: Coefficients, merge: Callable[[], LazyMerge]) -> Coefficients:
    """The same with measurements over the model taken now, where what is learned cannot change them.

    They cannot if nothing is learned in a chain up to the last stage that measures over the model, as in AdaMerging++.

    Args:
        coefficients: of the method.
        merge: the merge that measures, made when it is needed.
    """
    method = coefficients.method
    if not (isinstance(method, Chain) and "model" in method.passes):
        return coefficients
    last = max(i for i, stage in enumerate(method.stages) if stage.measures == "model")
    if any(
        _is_learned(x, coefficients.learnable)
        for x in jax.tree.leaves(method.stages[: last + 1], is_leaf=_is_learnable)
    ):
        return coefficients
    lazily = merge()
    results = iter(lazily.stats(next(iter(lazily.tasks.values()))[0]))
    stages: list[Stage] = []
    for stage in method.stages:
        result = None if stage.measures is None else next(results)
        stages.append(Measured(stage, result) if stage.measures == "model" else stage)
    measured = Chain(tuple(stages))
    names = tuple(name for name, leaf in _named(measured) if _is_learned(leaf, coefficients.learnable))
    assert names == coefficients.names
    return Coefficients(measured, names, coefficients.learnable)


def by_path(method: Method, learned: Coefficients) -> dict[str, Any]:
    """Every learned number by name: tensor, then expert, as far as they have their own."""
    found: dict[str, Any] = {}
    for name, leaf in _named(method):
        if not _is_learned(leaf, learned.learnable):
            continue
        values = np.asarray(jax.device_get(leaf.values if _is_learnable(leaf) else leaf))
        if not _is_learnable(leaf):
            found[name] = values[()] if values.ndim else float(values)
            continue
        named = _labelled(values, *(labels for labels in (leaf.keys, leaf.experts) if labels))
        found[name] = named
    only = next(iter(found.values()))
    return only if len(found) == 1 and isinstance(only, dict) else found


def _labelled(values: Any, *labels: tuple[str, ...]) -> Any:
    if not labels:
        return float(values) if np.ndim(values) == 0 else values
    return {label: _labelled(row, *labels[1:]) for label, row in zip(labels[0], values, strict=True)}


def _named(method: Any) -> list[tuple[str, Any]]:
    pairs = jax.tree_util.tree_flatten_with_path(method, is_leaf=_is_learnable)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in pairs]


def _is_learnable(x: Any) -> bool:
    return isinstance(x, Learnable)


def _is_learned(leaf: Any, learnable: bool) -> bool:
    if learnable:
        return _is_learnable(leaf)
    return isinstance(leaf, float) or (hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.floating)))
