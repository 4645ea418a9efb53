"""Recipes: merges written down in a file.

A `Recipe` is a method with the places of base and experts, whichever form it was written in. Reading one opens no
checkpoint; running one is a call of `merge_checkpoint`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxmerge.errors import RecipeError
from jaxmerge.methods.method import Method
from jaxmerge.streaming.merge_checkpoint import DEFAULT_BUDGET, merge_checkpoint, plan_merge
from jaxmerge.streaming.plan import Plan
from jaxmerge.streaming.report import StreamReport
from jaxmerge.trees.info import Rules


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A merge as a value: what to merge, from where, and how.

    Attributes:
        source: where the recipe was read from, for messages.
        method: the method.
        experts: name → path or URL of a checkpoint. Relative paths start at the current folder.
        base: path or URL of the base, or None.
        seed: seed of the key for methods that draw.
        dtype: floating-point dtype of the result, which lets the inputs have different ones: they are merged in
            float32 at least, and rounded once. None: that of the inputs.
        rules: how tensor names are read.
    """

    source: str
    method: Method
    experts: dict[str, str]
    base: str | None = None
    seed: int = 0
    dtype: str | None = None
    rules: Rules = Rules()

    def run(
        self,
        out: str | Path,
        *,
        memory_budget: int | str = DEFAULT_BUDGET,
        overwrite: bool = False,
        progress: bool | None = None,
    ) -> StreamReport:
        """Merges, from disk to disk.

        Args:
            out: a local folder; it gets the side files (config, tokenizer, …) of the base, or of the first expert.
            memory_budget: bytes (or text such as "1GiB") that the work may take beside Python and its libraries.
            overwrite: replace what stands at `out`, when the merge is complete.
            progress: show a progress bar; by default in a terminal or notebook.

        Returns:
            What it took.

        Raises:
            MergeError: as `merge_checkpoint` does; `out` is then as it was.
        """
        return merge_checkpoint(
            self.method,
            self.experts,
            base=self.base,
            out=out,
            key=self.seed,
            rules=self.rules,
            dtype=self.dtype,
            memory_budget=memory_budget,
            overwrite=overwrite,
            progress=progress,
        )

    def plan(self, *, memory_budget: int | str = DEFAULT_BUDGET) -> Plan:
        """Checks recipe and checkpoints as `run` does, and plans the work. No tensor is read and nothing is written.

        Args:
            memory_budget: bytes, or text such as "1GiB".

        Returns:
            What would be read, written and held in memory.

        Raises:
            MergeError: as `run` does.
        """
        return plan_merge(
            self.method,
            self.experts,
            base=self.base,
            key=self.seed,
            rules=self.rules,
            dtype=self.dtype,
            memory_budget=memory_budget,
        )


def name_models(paths: Sequence[str]) -> dict[str, str]:
    """Names for models given as a list: the last part of each path, or the whole path where that is not unique.

    Draws depend on the name of an expert, so a model keeps its name when a folder of models is moved as a whole.

    Raises:
        RecipeError: a path is there twice.
    """
    if twice := [path for path in paths if list(paths).count(path) > 1]:
        raise RecipeError(f"the model {twice[0]!r} is there twice; remove one")
    last = [path.rstrip("/").rpartition("/")[2] or path for path in paths]
    return {name if last.count(name) == 1 else path: path for name, path in zip(last, paths, strict=True)}


def load_recipe(recipe: str | Path) -> Recipe:
    """Reads a recipe. No checkpoint is opened.

    Args:
        recipe: a path, or the text itself if it has more than one line. YAML in our own form (with `method`), or in
            mergekit's (with `merge_method`).

    Returns:
        The recipe, whose `run(out=…)` merges, and whose `method`, `experts` and `base` can be used by themselves.

    Raises:
        RecipeError: it cannot be read, is no recipe, or is not one that can work; the message points at the line.
    """
    # Late, because they import libraries that nothing else needs.
    from jaxmerge.cli.mergekit import read_mergekit
    from jaxmerge.cli.nodes import parse
    from jaxmerge.cli.own_form import read_own_form

    if isinstance(recipe, str) and "\n" in recipe:
        root = parse(recipe, "recipe")
    else:
        try:
            root = parse(Path(recipe).read_text(encoding="utf-8"), str(recipe))
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise RecipeError(f"{recipe}: the recipe cannot be read: {reason}") from None
    return read_mergekit(root) if "merge_method" in root.entries() else read_own_form(root)
