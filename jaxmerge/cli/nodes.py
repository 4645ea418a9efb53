"""YAML as data with line numbers, for error messages that point at the line.

A recipe may come from anywhere, so reading one builds nothing but text, numbers, booleans, lists and mappings, of
limited size and depth (an alias counts each time it is used), and every way to be wrong is a `RecipeError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Collection
from typing import Any

import yaml

from jaxmerge.errors import RecipeError

MAX_TEXT = 1 << 20
"""The longest recipe, in characters."""
MAX_NODES = 20_000
"""The most values in a recipe, with aliases written out."""
MAX_DEPTH = 40
"""How deep values may be nested."""

_TAG = "tag:yaml.org,2002:"
# YAML 1.1 reads 1e-4 as text, for want of a point; dates, `=` and the like mean nothing here and are text.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_TEXT_TAGS = {_TAG + "str", _TAG + "timestamp", _TAG + "value"}


@dataclasses.dataclass(frozen=True)
class Node:
    """A value of a recipe and where it stands.

    Attributes:
        value: None, a boolean, a finite number, text, a list of nodes, or a dict of them.
        source: what the recipe is called in messages.
        line: from 1; for an entry of a mapping the line of its key.
    """

    value: Any
    source: str
    line: int

    def error(self, message: str) -> RecipeError:
        """The error to raise about this value."""
        return RecipeError(f"{self.source}:{self.line}: {message}")

    def plain(self) -> Any:
        """The value without line numbers."""
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return self.value

    def entries(self, known: Collection[str] | None = None) -> dict[str, Node]:
        """The entries of a mapping.

        Raises:
            RecipeError: it is no mapping, or has a key that is not among the known ones.
        """
        if not isinstance(self.value, dict):
            raise self.error(f"found {self}, expected a mapping (key: value)")
        for key, node in self.value.items():
            if known is not None and key not in known:
                raise node.error(f"unknown key {key!r}{suggestion(key, known)}")
        return self.value

    def items(self) -> list[Node]:
        """The items of a list.

        Raises:
            RecipeError: it is no list.
        """
        if not isinstance(self.value, list):
            raise self.error(f"found {self}, expected a list")
        return self.value

    def text(self) -> str:
        """The value as text, which it must be.

        Raises:
            RecipeError: it is not, or is empty.
        """
        if not isinstance(self.value, str) or not self.value:
            raise self.error(f"found {self}, expected text")
        return self.value

    def number(self) -> float:
        """The value as a number, which it must be.

        Raises:
            RecipeError: it is not.
        """
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.error(f"found {self}, expected a number")
        return float(self.value)

    def __str__(self) -> str:
        if isinstance(self.value, list | dict):
            kind = "a list" if isinstance(self.value, list) else "a mapping"
            return f"{kind} of {len(self.value)}"
        return "nothing" if self.value is None else repr(self.value)


def suggestion(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def parse(text: str, source: str) -> Node:
    """Reads a YAML document.

    Args:
        text: the document.
        source: what it is called in messages, such as the name of its file.

    Raises:
        RecipeError: the text is no YAML document, or has something in it that recipes must not have.
    """
    if len(text) > MAX_TEXT:
        raise RecipeError(f"{source}: found {len(text)} characters, expected a recipe of at most {MAX_TEXT}")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise RecipeError(f"{source}:{line}: this is no YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{source}: this is no YAML that can be read: {type(error).__name__}") from None
    if root is None:
        raise RecipeError(f"{source}: the recipe is empty")
    return _Reader(source).read(root, root.start_mark.line + 1, 0)


class _Reader:
    """Turns YAML's nodes into ours and counts them."""

    def __init__(self, source: str):
        self.source, self.left = source, MAX_NODES
        self.scalars = yaml.constructor.SafeConstructor()

    def read(self, node: yaml.Node, line: int, depth: int) -> Node:
        self.left -= 1
        if self.left < 0 or depth > MAX_DEPTH:
            limit = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{MAX_NODES} values"
            raise RecipeError(f"{self.source}:{line}: the recipe has more than {limit}, with aliases written out")
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            items = [self.read(item, item.start_mark.line + 1, depth + 1) for item in node.value]
            return Node(items, self.source, line)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return Node(self._entries(node, depth), self.source, line)
        if isinstance(node, yaml.ScalarNode):
            return Node(self._scalar(node, line), self.source, line)
        raise self._unknown(node, line)

    def _entries(self, node: yaml.MappingNode, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _TAG + "merge":
                raise RecipeError(f"{self.source}:{line}: found a key that is a list, a mapping or <<, expected text")
            if key_node.value in entries:
                raise RecipeError(f"{self.source}:{line}: the key {key_node.value!r} is there twice; remove one")
            entries[key_node.value] = self.read(value, line, depth + 1)
        return entries

    def _scalar(self, node: yaml.ScalarNode, line: int) -> Any:
        number = node.tag in _TEXT_TAGS and node.style is None and _EXPONENT.fullmatch(node.value)
        if node.tag in _TEXT_TAGS and not number:
            return node.value
        if node.tag not in _TEXT_TAGS | {_TAG + kind for kind in ("null", "bool", "int", "float")}:
            raise self._unknown(node, line)
        try:
            value = float(node.value) if number else self.scalars.construct_object(node)
            finite = value is None or math.isfinite(value)
        except (ValueError, KeyError, OverflowError):
            finite = False
        if not finite:
            found = repr(node.value[:40])
            raise RecipeError(f"{self.source}:{line}: found {found}, expected a finite number, true or false")
        return value

    def _unknown(self, node: yaml.Node, line: int) -> RecipeError:
        return RecipeError(f"{self.source}:{line}: found the tag {node.tag!r}; recipes have plain values only")
