"""Names and axes of one framework as those of another: Hugging Face checkpoints for Flax models, and back.

A naming is a value: rules as data, applied to a tree of parameters without reading it. Lazy tensors become lazy
transposes, arrays are transposed, and `jax.ShapeDtypeStruct` leaves show what will come out.

The Flax side follows the Flax models that transformers used to have: the same module names, a linear layer's `kernel`
is (in, out), a convolution's is (height, width, in, out), a table of embeddings is `embedding`, a LayerNorm's weight
is `scale` and an RMSNorm's stays `weight`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.errors import DTypeError, RecipeError, ShapeError, StructureError
from jaxmerge.trees.lazy import ArrayTensor, LazyTensor, StackedTensor
from jaxmerge.trees.naming_tables import FAMILIES, MODEL_TYPES
from jaxmerge.trees.paths import Params, named_leaves

_SHOWN = 3


class NameRule(NamedTuple):
    r"""One rule of a naming. Parts of names are separated by dots on both sides, as in `model.layers.3.mlp`.

    Attributes:
        pattern: a regular expression on the whole name (`re.fullmatch`).
        replacement: the new name (`\1` is the pattern's first group); None leaves the tensor out.
        axes: axis i of the new tensor is axis `axes[i]` of the old one; None keeps a tensor of any rank as it is.
    """

    pattern: str
    replacement: str | None
    axes: tuple[int, ...] | None = None

    def inverse(self) -> NameRule:
        """The rule that undoes this one.

        Raises:
            RecipeError: the pattern is more than plain text and groups, each of which the replacement uses once.
        """
        if self.replacement is None:
            raise RecipeError(f"the rule {self.pattern!r} leaves tensors out, and these cannot be brought back")
        parts = _text_and_groups(self.pattern)
        plain = re.sub(r"\\([1-9]\d?)", r"\\g<\1>", self.replacement)
        template = re.split(r"\\g<(\d+)>", plain)  # text, number, text, number, …, text
        numbers = [int(number) for number in template[1::2]]
        if sorted(numbers) != list(range(1, len(parts[1::2]) + 1)) or "\\" in "".join(template[::2]):
            raise RecipeError(
                f"the rule {self.pattern!r} cannot be inverted: its replacement {self.replacement!r} must use each of "
                f"its {len(parts[1::2])} groups once, as \\1, \\2, …"
            )
        pattern = re.escape(template[0])
        for number, text in zip(numbers, template[2::2], strict=True):
            pattern += parts[2 * number - 1] + re.escape(text)
        replacement = parts[0]
        for position, text in enumerate(parts[2::2], 1):
            number = numbers.index(position) + 1
            replacement += (f"\\g<{number}>" if text[:1].isdigit() else f"\\{number}") + text
        axes = None if self.axes is None else tuple(self.axes.index(axis) for axis in range(len(self.axes)))
        return NameRule(pattern, replacement, axes)


@dataclasses.dataclass(frozen=True, repr=False)
class Naming:
    r"""A renaming of a model's tensors: call it with parameters. Nothing is read; printing it shows its rules.

    ```python
    naming = jm.Naming(rules=((r"(dense\d+)\.weight", r"\1.kernel", (1, 0)), (r"(dense\d+\.bias)", r"\1")))
    ```

    Attributes:
        rules: `(pattern, replacement, axes)` each, see `NameRule`; the first whose pattern matches a whole name wins.
        stacks: what comes before the layer number in new names, such as `"model.layers"`.
        stacked: make the layers of each stack one leaf with a leading layer axis, and leave their number out of its
            name, as scanned models have it.
        to: `"flax"` answers in nested dicts, with integers as keys where all keys of a dict are numbers, as in
            `nnx.to_pure_dict`. `"huggingface"` splits the layers of stacked leaves first and answers in a flat dict.
        name: the family, for messages.
    """

    rules: tuple[Any, ...]
    stacks: tuple[str, ...] = ()
    stacked: bool = False
    to: Literal["flax", "huggingface"] = "flax"
    name: str = ""

    def __post_init__(self):
        rules = tuple(_rule(rule) for rule in self.rules)
        for rule in rules:
            try:
                re.compile(rule.pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise RecipeError(f"the rule {rule.pattern!r} is no regular expression: {error}") from None
            if rule.axes is not None and sorted(rule.axes) != list(range(len(rule.axes))):
                raise RecipeError(f"the rule {rule.pattern!r} has axes {rule.axes}, which are no permutation")
        object.__setattr__(self, "rules", rules)

    def __call__(self, params: Params) -> dict[Any, Any]:
        """The parameters under new names, with permuted axes.

        Args:
            params: any parameter tree of arrays, lazy tensors or `jax.ShapeDtypeStruct`.

        Returns:
            Nested dicts (to Flax) or a flat dict with dots in its names (to Hugging Face). An object that stands under
            two names (a tied tensor) stays one object; where the rules give its names different axes, as with a
            tied embedding and head, it is kept under the name of the earlier rule only.

        Raises:
            RecipeError: no rule matches a tensor's name; the message says which family fits.
            StructureError: two tensors get the same name, or a layer of a stack is missing.
            ShapeError, DTypeError: a tensor's rank is not the rule's, or layers that are stacked differ.
        """
        leaves = _dotted(params)
        if self.stacked and self.to == "huggingface":
            leaves = self._split(leaves)
        chosen = {name: self._choose(name) for name in leaves}
        unmatched = [name for name, hit in chosen.items() if hit is None]
        if unmatched:
            raise RecipeError(self._no_rule(unmatched, list(leaves)))
        earliest: dict[int, int] = {}  # the earliest rule for any name of an object
        for name, hit in chosen.items():
            earliest[id(leaves[name])] = min(hit[0], earliest.get(id(leaves[name]), hit[0]))  # pyright: ignore[reportOptionalSubscript]
        result: dict[str, Any] = {}
        came_from: dict[str, str] = {}
        made: dict[tuple[int, Any], Any] = {}
        for name, leaf in leaves.items():
            number, new = chosen[name]  # pyright: ignore[reportGeneralTypeIssues]
            axes, kept = self.rules[number].axes, self.rules[earliest[id(leaf)]].axes
            # Equal descriptions of tensors are no ties: one `ShapeDtypeStruct` may well describe many tensors.
            if new is None or (axes != kept and not isinstance(leaf, jax.ShapeDtypeStruct)):
                continue
            if new in result:
                raise StructureError(
                    f"{came_from[new]!r} and {name!r} both become {new!r}; correct {self.rules[number]}"
                )
            if (id(leaf), axes) not in made:
                made[id(leaf), axes] = _transposed(leaf, axes, name)
            result[new], came_from[new] = made[id(leaf), axes], name
        if self.to == "huggingface":
            return result
        return _nested(self._stack(result) if self.stacked else result)

    def inverse(self) -> Naming:
        """The naming back. Rules that leave tensors out have none; every other rule must be invertible.

        Inverse rules are tried in the same order, so rules of one's own should give names that tell them apart.

        Raises:
            RecipeError: a rule is no plain text with groups, see `NameRule.inverse`.
        """
        rules = tuple(rule.inverse() for rule in self.rules if rule.replacement is not None)
        to = "huggingface" if self.to == "flax" else "flax"
        return dataclasses.replace(self, rules=rules, to=to)

    def matches(self, params: Params) -> dict[NameRule | None, dict[str, str | None]]:
        """What the naming would do: for each rule, in order, the names that it takes and what they become.

        Args:
            params: any parameter tree.

        Returns:
            `{rule: {name: new name}}`, before layers are stacked; under None the names that no rule takes.
        """
        leaves = _dotted(params)
        if self.stacked and self.to == "huggingface":
            leaves = self._split(leaves)
        result: dict[NameRule | None, dict[str, str | None]] = {rule: {} for rule in self.rules}
        for name in leaves:
            hit = self._choose(name)
            result.setdefault(None if hit is None else self.rules[hit[0]], {})[name] = None if hit is None else hit[1]
        return result

    def __repr__(self) -> str:
        width = max((len(rule.pattern) for rule in self.rules), default=0)
        lines = [
            f"  {rule.pattern:<{width}} -> {'left out' if rule.replacement is None else rule.replacement}"
            + ("" if rule.axes is None else f"  axes {rule.axes}")
            for rule in self.rules
        ]
        return "\n".join([self._label(), *lines])

    def _label(self) -> str:
        made = f"naming({self.name!r}{', stacked=True' * self.stacked})" if self.name else "Naming(…)"
        return f"jm.{made}{'.inverse()' * (self.to == 'huggingface')}"

    def _choose(self, name: str) -> tuple[int, str | None] | None:
        """The number of the rule for a name and the new name; None if there is none."""
        for number, rule in enumerate(self.rules):
            hit = re.fullmatch(rule.pattern, name)
            if hit is not None:
                try:
                    return number, None if rule.replacement is None else hit.expand(rule.replacement)
                except (re.error, IndexError) as error:
                    raise RecipeError(f"the rule {rule} cannot be applied to {name!r}: {error}") from None
        return None

    def _no_rule(self, unmatched: list[str], names: list[str]) -> str:
        candidates = [family for name in FAMILIES for family in (naming(name), naming(name).inverse())]
        counts = [sum(family._choose(name) is not None for name in names) for family in candidates]
        best = max(range(len(candidates)), key=counts.__getitem__)
        found = f"{self._label()} has no rule for {_some(unmatched)}, of {len(names)} tensors; "
        if counts[best] == len(names):
            return found + f"{candidates[best]._label()} has one for each of them"
        return found + (
            f"nearest is {candidates[best]._label()} with rules for {counts[best]}: print a naming to see its rules, "
            "add some with jm.Naming(rules=(*naming.rules, …)), or take the tensors out of the tree"
        )

    def _place(self, name: str) -> tuple[str, str] | None:
        """A name inside a stack as the stack and the rest; None outside."""
        for stack in self.stacks:
            if name.startswith(f"{stack}."):
                return stack, name[len(stack) + 1 :]
        return None

    def _stack(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The layers of each stack as one leaf, where the first of them was."""
        layers: dict[str, dict[int, Any]] = {}
        result: dict[str, Any] = {}
        for name, leaf in leaves.items():
            place = self._place(name)
            number, _, rest = place[1].partition(".") if place else ("", "", "")
            if place is None or not number.isdecimal():
                result[name] = leaf
                continue
            new = f"{place[0]}.{rest}"
            layers.setdefault(new, {})[int(number)] = leaf
            result.setdefault(new, None)
        count = max((len(each) for each in layers.values()), default=0)
        for name, each in layers.items():
            missing = sorted(set(range(count)) - set(each))
            if missing or len(each) != count:
                raise StructureError(f"{name!r} cannot be stacked: it is in layers {sorted(each)} of 0 to {count - 1}")
            result[name] = _stacked(name, [each[number] for number in range(count)])
        return result

    def _split(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The layers of stacked leaves on their own."""
        result: dict[str, Any] = {}
        counts: dict[str, int] = {}
        for name, leaf in leaves.items():
            place = self._place(name)
            if place is None or place[1].partition(".")[0].isdecimal():
                result[name] = leaf
                continue
            stack, rest = place
            count = leaf.shape[0] if leaf.shape else 0
            if counts.setdefault(stack, count) != count:
                raise ShapeError(
                    f"tensor {name!r}: found shape {tuple(leaf.shape)}, expected {counts[stack]} layers along axis 0 "
                    f"as in the other tensors of {stack!r}"
                )
            for number in range(count):
                result[f"{stack}.{number}.{rest}"] = _layer(leaf, number)
        return result


def naming(family: str, *, stacked: bool = False) -> Naming:
    r"""The naming from Hugging Face checkpoints to Flax models, for a family of models.

    `model.layers.3.mlp.up_proj.weight`, (out, in), becomes `model/layers/3/mlp/up_proj/kernel`, (in, out). Values are
    not changed: Gemma's norms, whose factor is one plus the weight, keep their weight.

    Args:
        family: `"llama"` (also Mistral), `"qwen2"`, `"qwen3"`, `"gemma"`, `"gemma2"`, `"gemma3"` (the language model)
            or `"vit"`. Each has rules for the causal language model (the image classifier) and for the model without
            a head, and for nothing else: a tensor without a rule is an error.
        stacked: make the layers one leaf with a leading layer axis, for models that scan over their layers.

    Returns:
        A callable on parameters; `naming(…).inverse()` leads back to names and axes that transformers loads.

    Raises:
        RecipeError: there is no such family.
    """
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1) or sorted(FAMILIES)
        raise RecipeError(f"there is no naming {family!r}, perhaps {near[0]!r}; there are {', '.join(FAMILIES)}")
    rules, stacks = FAMILIES[family]
    return Naming(rules, stacks, stacked, name=family)


def naming_for(source: Any, *, stacked: bool = False) -> Naming:
    """The naming for a model, judged by `model_type` in its config.json.

    Args:
        source: an opened checkpoint, the path of a Hugging Face folder, or the contents of config.json as a dict.
        stacked: as for `naming`.

    Raises:
        RecipeError: there is no config.json, it is none of a model, or no family has the model's type.
    """
    config = source if isinstance(source, Mapping) else _config(source)
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if kind not in MODEL_TYPES:
        raise RecipeError(
            f"no naming is known for the model type {kind!r}, only for {', '.join(MODEL_TYPES)}; "
            "choose one with jm.naming(…) or write one with jm.Naming(rules=…)"
        )
    return naming(MODEL_TYPES[kind], stacked=stacked)


def _config(source: Any) -> Any:
    files: Mapping[str, Any] = (
        {"config.json": Path(source, "config.json")} if isinstance(source, str | Path) else source.side_files
    )
    content = files.get("config.json")
    try:
        return json.loads(content.read_text() if isinstance(content, Path) else content)  # pyright: ignore[reportArgumentType]
    except (OSError, TypeError, ValueError) as error:
        raise RecipeError(f"{source} has no config.json that can be read ({error}); use jm.naming(…)") from None


def _rule(rule: Any) -> NameRule:
    try:
        pattern, replacement, axes = (*rule, None) if len(rule) == 2 else rule
        return NameRule(pattern, replacement, None if axes is None else tuple(axes))
    except (TypeError, ValueError):
        raise RecipeError(f"a rule of a naming is (pattern, replacement, axes), and {rule!r} is not one") from None


def _dotted(params: Params) -> dict[str, Any]:
    """The leaves by names whose parts are separated by dots."""
    leaves: dict[str, Any] = {}
    for name, leaf in named_leaves(params).items():
        dotted = name.replace("/", ".")
        if dotted in leaves:
            raise StructureError(f"two tensors are both named {dotted!r}, one of them as {name!r}; rename it")
        leaves[dotted] = leaf
    return leaves


def _text_and_groups(pattern: str) -> list[str]:
    """A pattern as text, group, text, group, …, text.

    Raises:
        RecipeError: the pattern holds something else at its top level, or groups within groups.
    """
    parts, text, at = [], "", 0
    while at < len(pattern):
        char = pattern[at]
        if char == "(" and pattern[at + 1 : at + 2] != "?":
            stop = _group_end(pattern, at)
            parts += [text, pattern[at:stop]]
            text, at = "", stop
        elif char == "\\" and not pattern[at + 1 : at + 2].isalnum():
            text, at = text + pattern[at + 1 : at + 2], at + 2
        elif char in "\\.^$*+?{}[]|()":
            break
        else:
            text, at = text + char, at + 1
    if at < len(pattern) or re.compile(pattern).groups != len(parts) // 2:
        raise RecipeError(
            f"the rule {pattern!r} cannot be inverted; make its pattern plain text and groups that stand side by side, "
            r"such as (layers\.\d+\.(?:up|down)_proj)\.weight"
        )
    return [*parts, text]


def _group_end(pattern: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`; the pattern is known to compile."""
    depth, in_class, at = 0, False, start
    while True:
        char = pattern[at]
        if char == "\\":
            at += 1
        elif in_class:
            in_class = char != "]" or pattern[at - 1] == "["
        elif char == "[":
            in_class = True
        else:
            depth += (char == "(") - (char == ")")
        at += 1
        if depth == 0:
            return at


def _transposed(leaf: Any, axes: tuple[int, ...] | None, name: str) -> Any:
    if axes is None:
        return leaf
    if len(leaf.shape) != len(axes):
        raise ShapeError(
            f"tensor {name!r}: found shape {tuple(leaf.shape)}, expected {len(axes)} axes, which the rule orders as "
            f"{axes}; is the tensor quantised, fused or stacked? Write a rule for it with jm.Naming(rules=…)"
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(leaf.shape[axis] for axis in axes), leaf.dtype)
    return leaf.transpose(*axes)


def _stacked(name: str, layers: Sequence[Any]) -> Any:
    first = layers[0]
    for number, leaf in enumerate(layers):
        if tuple(leaf.shape) != tuple(first.shape):
            raise ShapeError(
                f"{name!r}, layer {number}: found shape {tuple(leaf.shape)}, expected {tuple(first.shape)} as in "
                "layer 0; such a model cannot be scanned, use stacked=False"
            )
        if leaf.dtype != first.dtype:
            raise DTypeError(
                f"{name!r}, layer {number}: found dtype {leaf.dtype}, expected {first.dtype} as in layer 0; "
                "cast one of them (jm.cast)"
            )
    if any(isinstance(leaf, LazyTensor) for leaf in layers):
        return StackedTensor([x if isinstance(x, LazyTensor) else ArrayTensor(np.asarray(x)) for x in layers])
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in layers):
        return jax.ShapeDtypeStruct((len(layers), *first.shape), first.dtype)
    if all(isinstance(leaf, np.ndarray) for leaf in layers):
        return np.stack(layers)
    return jnp.stack(layers)


def _layer(leaf: Any, number: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf.window(number) if isinstance(leaf, LazyTensor) else leaf[number]


def _nested(leaves: Mapping[str, Any]) -> dict[Any, Any]:
    """Nested dicts, with integers as keys where all keys of a dict are numbers."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        here = tree
        for part in path:
            here = here.setdefault(part, _Branch())
            if not isinstance(here, _Branch):
                raise StructureError(f"{name!r} lies below another tensor, {part!r}; correct the rules")
        if last in here:
            raise StructureError(f"{name!r} is a tensor, and others lie below it; correct the rules")
        here[last] = leaf
    return _numbered(tree)


class _Branch(dict[str, Any]):
    """A dict of the tree that is being built, to tell it from a leaf."""


def _numbered(tree: Mapping[str, Any]) -> dict[Any, Any]:
    numbers = all(key.isdecimal() and str(int(key)) == key for key in tree)
    return {
        int(key) if numbers else key: _numbered(value) if isinstance(value, _Branch) else value
        for key, value in tree.items()
    }


def _some(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
