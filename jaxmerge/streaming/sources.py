"""What goes into a merge: models by path, opened or in memory, and what they are called."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmerge.checkpoints.base import Checkpoint, open_checkpoint
from jaxmerge.methods.assignment import Assignment, assign
from jaxmerge.methods.method import Method
from jaxmerge.streaming.access import BASE
from jaxmerge.trees.checks import cast, is_mergeable, name_experts
from jaxmerge.trees.info import Rules
from jaxmerge.trees.paths import Params, named_leaves

Source = str | Path | Checkpoint | Params
"""A checkpoint by path or URL, an opened one, or a parameter tree (with lazy leaves, in memory, or both)."""


def opened_merge(
    opened: contextlib.ExitStack,
    method: Method,
    experts: Sequence[Source] | Mapping[str, Source],
    base: Source | None,
    key: Any,
    rules: Rules,
    dtype: str | None,
) -> tuple[dict[str, Checkpoint], Checkpoint | None, Assignment]:
    """The checkpoints by name, the one that gives metadata and side files, and the merge."""
    sources: dict[str, Checkpoint] = {}

    def params_of(name: str, source: Source) -> Params:
        if isinstance(source, str | Path):
            source = opened.enter_context(open_checkpoint(source))
        if isinstance(source, Checkpoint):
            sources[name] = source
            return source.params
        return source

    base_params = None if base is None else params_of(BASE, base)
    trees = {name: params_of(name, source) for name, source in name_experts(experts).items()}
    if dtype is not None and _other_dtypes((base_params, *trees.values()), dtype):
        wide = "float64" if dtype == "float64" else "float32"
        base_params, trees = cast(base_params, wide), {name: cast(tree, wide) for name, tree in trees.items()}
    reference = sources.get(next(iter(trees)) if base is None else BASE)
    return sources, reference, assign(method, trees, base_params, key, rules)


def described(name: str, source: Source, sources: Mapping[str, Checkpoint]) -> tuple[str | None, Checkpoint | None]:
    """The path of a model as it was given, and the opened model; both None for a tree."""
    checkpoint = sources.get(name)
    return (None if checkpoint is None else str(source if isinstance(source, str | Path) else source.path)), checkpoint


def _other_dtypes(trees: Sequence[Params], dtype: str) -> bool:
    leaves = [leaf for tree in trees for leaf in named_leaves(tree).values()]
    return any(is_mergeable(leaf) and leaf.dtype.name != dtype for leaf in leaves)
