"""Our own form of a recipe: a method by name with its parameters, a base and experts.

The form has no list of methods or parameters of its own: names are those of `list_methods()`, and what a parameter
may be follows from the annotation in the constructor's signature. So a new method works in recipes at once.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import msgspec

from jaxmerge.cli.nodes import Node, suggestion
from jaxmerge.cli.recipe import Recipe, name_models
from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import by_depth
from jaxmerge.methods.method import Method
from jaxmerge.methods.registry import list_methods
from jaxmerge.methods.stages import Stage
from jaxmerge.trees.info import Rules

KEYS = ("method", "parameters", "base", "experts", "seed", "dtype", "rules")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def read_own_form(root: Node) -> Recipe:
    """Reads a recipe in our own form.

    Raises:
        RecipeError: it is not one that can work; the message points at the line.
    """
    entries = root.entries(KEYS)
    for key in ("method", "experts"):
        if key not in entries:
            raise root.error(f"the recipe has no {key!r}")
    experts = entries["experts"]
    if isinstance(experts.value, dict):
        paths = {name: node.text() for name, node in experts.value.items()}
    else:
        paths = name_models([node.text() for node in experts.items()])
    if not paths:
        raise experts.error("there are no experts to merge; give at least one")
    return Recipe(
        source=root.source,
        method=_top_method(entries),
        experts=paths,
        base=entries["base"].text() if "base" in entries else None,
        seed=_convert(entries["seed"], int) if "seed" in entries else 0,
        dtype=read_dtype(entries["dtype"]) if "dtype" in entries else None,
        rules=_rules(entries["rules"]) if "rules" in entries else Rules(),
    )


def read_dtype(node: Node) -> str:
    """The name of a floating-point dtype.

    Raises:
        RecipeError: it is none of `DTYPES`.
    """
    if node.text() not in DTYPES:
        raise node.error(f"unknown dtype {node.value!r}{suggestion(node.value, DTYPES)}")
    return node.value


def _top_method(entries: Mapping[str, Node]) -> Method:
    node = entries["method"]
    if "parameters" not in entries:
        method = _method(node)
    elif isinstance(node.value, str):
        method = _call(node, node.value, entries["parameters"])
    else:
        example = "`method: {ties: {density: 0.2}}`"
        raise entries["parameters"].error(f"a nested method has its parameters inside, as in {example}")
    if not isinstance(method, Method):
        raise node.error(f"{method!r} is a stage, not a method; put it into a chain: `chain: [..., {method!r}]`")
    return method


def _method(node: Node) -> Method | Stage:
    """`name`, `{name: first parameter}` or `{name: {parameter: value, …}}`."""
    if isinstance(node.value, str):
        return _call(node, node.value, None)
    entries = node.entries()
    if len(entries) != 1:
        raise node.error(f"found {node}, expected one method, as in `ties` or `ties: {{density: 0.2}}`")
    ((name, arguments),) = entries.items()
    return _call(arguments, name, arguments)


def _call(node: Node, name: str, arguments: Node | None) -> Method | Stage:
    table = list_methods()
    if name not in table:
        raise node.error(f"unknown method {name!r}{suggestion(name, list(table))}")
    return _build(node, table[name].constructor, arguments)


def _build(node: Node, constructor: Callable[..., Any], arguments: Node | None) -> Any:
    """Calls a constructor: a mapping gives parameters by name, anything else is the first, a list all of `*stages`."""
    name = constructor.__name__
    parameters = inspect.signature(constructor).parameters
    hints = typing.get_type_hints(constructor)
    first = next(iter(parameters.values()), None)
    variadic = first is not None and first.kind is first.VAR_POSITIONAL
    positional: list[Any] = []
    if arguments is None or arguments.value is None:
        named = {}
    elif isinstance(arguments.value, dict):
        named = arguments.value
    elif first is None:
        raise arguments.error(f"{name} has no parameters, found {arguments}")
    elif variadic:
        named, positional = {}, [_argument(item, hints[first.name], first) for item in arguments.items()]
    else:
        named = {first.name: arguments}
    for key, value in named.items():
        if key not in parameters or variadic:
            raise value.error(f"{name} has no parameter {key!r}{suggestion(key, parameters)}")
    values = {key: _argument(value, hints[key], parameters[key]) for key, value in named.items()}
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in values]
    if missing and not variadic:
        raise node.error(f"{name} needs a value for {missing[0]!r}")
    try:
        return constructor(*positional, **values)
    except RecipeError as error:  # messages begin with the name of the parameter that they are about, if it is one
        at = next((value for key, value in named.items() if re.match(rf"{re.escape(key)}\b", str(error))), node)
        raise at.error(str(error)) from None


def _argument(node: Node, hint: Any, parameter: inspect.Parameter) -> Any:
    """A value of what the annotation allows: a coefficient, methods, or plain data."""
    if node.value is None and (parameter.default is None or types.NoneType in _members(hint)):
        return None
    kinds = [kind for kind in _members(hint) if kind not in (types.NoneType, jax.Array) and not _is_function(kind)]
    if Any in kinds:
        return _coefficient(node)
    if kinds == [Sequence[Any]]:
        return [_coefficient(item) for item in node.items()]
    if kinds == [Mapping[str, Method]]:
        return {key: _instance(value, (Method,)) for key, value in node.entries().items()}
    classes = tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Method | Stage))
    if classes:
        return _instance(node, classes)
    return _convert(node, typing.Union[tuple(kinds)])  # noqa: UP007


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_function(kind: Any) -> bool:
    return typing.get_origin(kind) is Callable


def _instance(node: Node, classes: tuple[type, ...]) -> Method | Stage:
    built = _method(node)
    if not isinstance(built, classes):
        raise node.error(f"{built!r} does not go here; expected a {' or '.join(c.__name__.lower() for c in classes)}")
    return built


def _coefficient(node: Node) -> Any:
    """A number; a list, one per expert; `{by_depth: […]}`; or a mapping from patterns or experts to any of these."""
    if isinstance(node.value, list):
        return [_coefficient(item) for item in node.value]
    if isinstance(node.value, dict):
        if node.value.keys() == {"by_depth"}:
            return _build(node, by_depth, node.value["by_depth"])
        return {key: _coefficient(value) for key, value in node.value.items()}
    return node.number()


def _convert(node: Node, kind: Any) -> Any:
    """Plain data of a type that an annotation names."""
    try:
        return msgspec.convert(node.plain(), kind)
    except msgspec.ValidationError:
        raise node.error(f"found {node}, expected {_describe(kind)}") from None


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    words = {bool: "true or false", int: "a whole number", str: "text"}
    return " or ".join(words.get(k, "a list") if k is kind else _describe(k) for k in _members(kind))


def _rules(node: Node) -> Rules:
    entries = node.entries()
    for pattern in [node for key in ("layer", "stacked") if key in entries for node in _one_or_more(entries[key])]:
        try:
            re.compile(pattern.text())
        except (re.error, OverflowError, RecursionError) as error:
            raise pattern.error(f"{pattern.value!r} is no regular expression: {error}") from None
    return _build(node, Rules, node)


def _one_or_more(node: Node) -> list[Node]:
    return node.value if isinstance(node.value, list) else [node]
