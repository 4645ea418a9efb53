"""Models made of layer ranges of models: pruned, repeated and stacked layers, renumbered. Nothing is read.

A layer is what `Rules` says it is: by default the tensors whose name has the same number in its first numbered part,
`model.layers.3.…`, `blocks/3/…` or `Block_3/…`; in scanned models a slice of the leaves that are declared as stacked.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.errors import DTypeError, RecipeError, ShapeError, StructureError
from jaxmerge.trees.info import Place, Rules, layer_place
from jaxmerge.trees.lazy import ArrayTensor, LazyTensor, StackedTensor
from jaxmerge.trees.paths import Params, match_rules, named_leaves

Layers = tuple[int, int] | range | list[int]
"""Which layers: `(start, stop)`, or a range or list of their numbers in the order wanted."""


def renumbered(name: str, layer: int, pattern: str | None = None) -> str:
    """The tensor's name in another layer; unchanged for a tensor outside any stack."""
    place = layer_place(name, pattern)
    return name if place is None else f"{name[: place.start]}{layer}{name[place.stop :]}"


class LayeredParams:
    """A model's tensors by layer.

    Attributes:
        count: number of layers.
        outside: the tensors outside the stack, by name.
        stacked: the leaves that hold one tensor per layer, by name.
        stacks: what comes before the layer number in names.
    """

    def __init__(self, params: Params, rules: Rules = Rules(), what: str = "the model"):
        leaves = named_leaves(params)
        self.what, self._rules = what, rules
        matched = match_rules(rules.stacked, leaves)
        self.stacked = {name: leaf for name, leaf in leaves.items() if matched[name] is not None}
        self._places: dict[str, Place] = {}
        if rules.layer is not None or not self.stacked:
            found = {n: layer_place(n, rules.layer) for n in leaves if n not in self.stacked}
            self._places = {name: place for name, place in found.items() if place is not None}
        self._numbered = {name: leaves[name] for name in self._places}
        self.outside = {n: x for n, x in leaves.items() if n not in self._numbered and n not in self.stacked}
        counts: dict[str, int] = {}
        for place in self._places.values():
            counts[place.stack] = max(counts.get(place.stack, 0), place.layer + 1)
        self.stacks = set(counts)
        if len(counts) > 1 and rules.layer is None:
            shown = ", ".join(f"{stack}* ({n} layers)" for stack, n in counts.items())
            raise StructureError(
                f"{what} has several stacks of layers: {shown}; say which with rules=jm.Rules(layer=…), a pattern "
                "whose last group is the layer number"
            )
        for name, leaf in self.stacked.items():
            if not leaf.shape:
                raise RecipeError(f"{name!r} is a scalar and cannot be stacked; correct the rule {matched[name]!r}")
            counts[name] = leaf.shape[0]
        if not counts:
            raise StructureError(
                f"{what} has no numbered layers among its {len(leaves)} tensors; say how names are read with "
                "rules=jm.Rules(layer=…), or which leaves hold one tensor per layer with jm.Rules(stacked=…)"
            )
        self.count = min(counts.values())

    def numbers(self, layers: Layers) -> list[int]:
        """The numbers of the layers that are meant.

        Raises:
            RecipeError: none are, or one does not exist.
        """
        if isinstance(layers, tuple):
            start, stop = layers
            layers = range(start, stop)
        ends = (layers[0], layers[-1]) if isinstance(layers, range) and layers else layers
        if not layers or min(ends) < 0 or max(ends) >= self.count:
            raise RecipeError(
                f"{self.what} has layers 0 to {self.count - 1}, and {_shown(layers)} were asked for; "
                f"give start and stop with 0 <= start < stop <= {self.count}"
            )
        return list(layers)

    def numbered(self, numbers: Sequence[int], first: int = 0) -> dict[str, tuple[int, Any]]:
        """The tensors of these layers by their new names, numbered from `first`: the old number and the leaf.

        Raises:
            StructureError: there is no tensor in one of the layers.
        """
        by_layer: dict[int, list[str]] = {}
        for name, place in self._places.items():
            by_layer.setdefault(place.layer, []).append(name)
        result = {}
        for new, old in enumerate(numbers, first):
            if self._places and old not in by_layer:
                raise StructureError(f"{self.what} has no tensor in layer {old}, though there are later layers")
            for name in by_layer.get(old, ()):
                result[renumbered(name, new, self._rules.layer)] = (old, self._numbered[name])
        return result


def select_layers(params: Params, layers: Layers, *, rules: Rules = Rules()) -> dict[Any, Any]:
    """A model with some of its layers, renumbered from 0; everything outside the layers stays. Nothing is read.

    Args:
        params: any parameter tree, of arrays or of lazy tensors.
        layers: `(start, stop)`, or a range or list of layer numbers in the order wanted; a number may come again.
        rules: how layer numbers are found in names (`layer`), and which leaves hold one tensor per layer (`stacked`).

    Returns:
        Nested dicts for nested dicts, and a flat dict by name for anything else.

    Raises:
        RecipeError: a layer does not exist.
        StructureError: there is no stack of layers, or there are several.
    """
    return stack_layers([(params, layers)], rules=rules)


def stack_layers(
    pieces: Sequence[tuple[Params, Layers]], *, outside: Params | None = None, rules: Rules = Rules()
) -> dict[Any, Any]:
    """A model made of layers of models, one piece upon the other, renumbered from 0. Nothing is read.

    Ranges may overlap, also within one model: each layer of the result is a tensor of its own, so that it is stored.
    What is tied within a model and used once stays tied.

    Args:
        pieces: models, each with `(start, stop)` or a range or list of the numbers of its layers.
        outside: the model whose tensors outside the layers (embeddings, head, final norm) are taken; the first piece's
            by default.
        rules: how layer numbers are found in names (`layer`), and which leaves hold one tensor per layer (`stacked`).

    Returns:
        Nested dicts where the first piece is nested dicts, and a flat dict by name otherwise.

    Raises:
        RecipeError: there are no pieces, or a layer does not exist.
        StructureError: a model has no stack of layers, several, or other stacks than the first piece.
        ShapeError, DTypeError: layer-stacked leaves differ between the pieces.
    """
    if not pieces:
        raise RecipeError("there is nothing to stack; give at least one (params, (start, stop))")
    models = [LayeredParams(params, rules, f"piece {i}") for i, (params, _) in enumerate(pieces)]
    chosen = [model.numbers(layers) for model, (_, layers) in zip(models, pieces, strict=True)]
    for model in models[1:]:
        if (model.stacks, set(model.stacked)) != (models[0].stacks, set(models[0].stacked)):
            raise StructureError(
                f"{model.what} has its layers in {_named(model)}, piece 0 in {_named(models[0])}; rename one of them"
            )
    rest = models[0] if outside is None else LayeredParams(outside, rules, "the model for outside=")
    result = dict(rest.outside)
    repeats, first = _Repeats(), 0
    for model, numbers in zip(models, chosen, strict=True):
        for name, (old, leaf) in model.numbered(numbers, first).items():
            layer = layer_place(name, rules.layer)
            assert layer is not None
            result[name] = repeats.leaf(leaf, old, layer.layer)
        first += len(numbers)
    for name in models[0].stacked:
        parts = [(model.stacked[name], numbers) for model, numbers in zip(models, chosen, strict=True)]
        result[name] = _restacked(name, parts)
    return _nested(result, [pieces[0][0], outside], rules)


class _Repeats:
    """Gives each layer that is used again leaves of its own, since one leaf under two names means tied tensors."""

    def __init__(self):
        self._first_use: dict[tuple[int, int], int] = {}
        self._copies: dict[tuple[int, int, int], Any] = {}

    def leaf(self, leaf: Any, old: int, new: int) -> Any:
        """The leaf of layer `old` for layer `new`."""
        if self._first_use.setdefault((id(leaf), old), new) == new:
            return leaf
        return self._copies.setdefault((id(leaf), old, new), _another(leaf))


def _another(leaf: Any) -> Any:
    if isinstance(leaf, LazyTensor):
        return leaf.window(...)
    return leaf.copy() if hasattr(leaf, "copy") else copy.copy(leaf)


def _restacked(name: str, parts: Sequence[tuple[Any, Sequence[int]]]) -> Any:
    """The layers of several stacked leaves as one."""
    first = parts[0][0]
    for i, (leaf, _) in enumerate(parts):
        if tuple(leaf.shape[1:]) != tuple(first.shape[1:]):
            raise ShapeError(
                f"piece {i}, tensor {name!r}: found shape {tuple(leaf.shape)}, expected layers of shape "
                f"{tuple(first.shape[1:])} as in piece 0; only layers of one size can be stacked"
            )
        if leaf.dtype != first.dtype:
            raise DTypeError(
                f"piece {i}, tensor {name!r}: found dtype {leaf.dtype}, expected {first.dtype} as in piece 0; "
                "cast one of them (jm.cast) before stacking"
            )
    if any(isinstance(leaf, LazyTensor) for leaf, _ in parts):
        lazy = [(x if isinstance(x, LazyTensor) else ArrayTensor(np.asarray(x)), numbers) for x, numbers in parts]
        return StackedTensor([leaf.window(number) for leaf, numbers in lazy for number in numbers])
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf, _ in parts):
        return jax.ShapeDtypeStruct((sum(len(numbers) for _, numbers in parts), *first.shape[1:]), first.dtype)
    taken = [leaf[np.asarray(numbers)] for leaf, numbers in parts]
    if all(isinstance(leaf, np.ndarray) for leaf in taken):
        return np.concatenate(taken)
    return jnp.concatenate(taken)


def _nested(leaves: Mapping[str, Any], likes: Sequence[Params | None], rules: Rules) -> dict[Any, Any]:
    """The leaves in nested dicts with the keys of the models, if these are nested dicts."""
    paths: dict[str, tuple[Any, ...]] = {}
    for like in likes:
        for path in _key_paths(like) if isinstance(like, Mapping) else ():
            paths.setdefault(_slot("/".join(map(str, path)), rules), path)
    if max(map(len, paths.values()), default=1) == 1 or not all(_slot(name, rules) in paths for name in leaves):
        return dict(leaves)
    result: dict[Any, Any] = {}
    for name, leaf in leaves.items():
        path = paths[_slot(name, rules)]
        here = result
        for key in _keys_of(name, path)[:-1]:
            here = here.setdefault(key, {})
        here[_keys_of(name, path)[-1]] = leaf
    return result


def _slot(name: str, rules: Rules) -> str:
    """A name that is the same in all layers."""
    place = layer_place(name, rules.layer)
    return name if place is None else f"{name[: place.start]}\0{name[place.stop :]}"


def _key_paths(tree: Mapping[Any, Any]) -> list[tuple[Any, ...]]:
    return [
        (key, *path)
        for key, value in tree.items()
        for path in (_key_paths(value) if isinstance(value, Mapping) else [()])
    ]


def _keys_of(name: str, path: tuple[Any, ...]) -> list[Any]:
    """The keys of a name that is nested like `path`, whose keys may hold a `/` and be integers."""
    parts, keys = name.split("/"), []
    for key in path:
        count = str(key).count("/") + 1
        part, parts = "/".join(parts[:count]), parts[count:]
        keys.append(int(part) if isinstance(key, int) else part)
    return keys


def _shown(layers: Any) -> str:
    if isinstance(layers, range) and layers.step == 1:
        return f"layers {layers.start} to {layers.stop} (not included)"
    return f"layers {layers!r:.80}"


def _named(model: LayeredParams) -> str:
    return ", ".join(sorted({f"{stack}*" for stack in model.stacks} | set(model.stacked)))
