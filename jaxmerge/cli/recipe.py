"""Recipes: merges written down in a file.

A `Recipe` is a method with the places of base and experts, whichever form it was written in. Reading one opens no
checkpoint; running one is a call of `merge_checkpoint`, or, where layers are taken from here and there or vocabularies
differ, of what `jaxmerge.cli.assembly` makes of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxmerge.errors import RecipeError
from jaxmerge.methods.method import Method
from jaxmerge.streaming.merge_checkpoint import merge_checkpoint, plan_merge
from jaxmerge.streaming.plan import Plan
from jaxmerge.streaming.report import StreamReport
from jaxmerge.streaming.saving import DEFAULT_BUDGET
from jaxmerge.trees.info import Rules
from jaxmerge.trees.vocabulary import TokenRule


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some layers of the output, and what they are merged from. Slices follow each other in the output.

    The first slice also holds what comes before the layers (embeddings), the last one all else outside of them.

    Attributes:
        method: the method.
        layers: path of each model that takes part → `(start, stop)` of its layers, as many in each; None for all layers
            and everything outside of them.
        base: path of the base, which is one of them, or None.
    """

    method: Method
    layers: Mapping[str, tuple[int, int] | None]
    base: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenizerSection:
    """The vocabulary of the output, when those of the models differ.

    Attributes:
        source: "union", "base" or the path of the model whose tokenizer is taken.
        tokens: rules for the rows of single tokens; models are named by path. Unknown tokens are added.
        pad_to_multiple_of: the number of rows is rounded up to a multiple of this.
        base: path of the model whose rows come first where a model lacks a token; a slice's base comes before it.
    """

    source: str = "union"
    tokens: Mapping[str, TokenRule] = dataclasses.field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    base: str | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A merge as a value: what to merge, from where, and how.

    Attributes:
        source: where the recipe was read from, for messages.
        method: the method; with slices, that of the first.
        experts: name → path or URL of a checkpoint. Relative paths start at the current folder. With slices these are
            all models, the base too.
        base: path or URL of the base, or None.
        seed: seed of the key for methods that draw.
        dtype: floating-point dtype of the result, which lets the inputs have different ones: they are merged in
            float32 at least, and rounded once. None: that of the inputs.
        rules: how tensor names are read.
        slices: what the layers of the output are merged from; empty for all layers of all models at once.
        tokenizer: the vocabulary of the output; None where all models have the same.
        chat_template: a template that the output's tokenizer gets, or "auto" for the most frequent one of the models'.
    """

    source: str
    method: Method
    experts: dict[str, str]
    base: str | None = None
    seed: int = 0
    dtype: str | None = None
    rules: Rules = Rules()
    slices: tuple[Slice, ...] = ()
    tokenizer: TokenizerSection | None = None
    chat_template: str | None = None

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
            out: a local folder, or an `s3://` or `gs://` URL; it gets the side files (config, tokenizer, …) of the
                base, or of the first expert.
            memory_budget: bytes (or text such as "1GiB") that the work may take beside Python and its libraries.
            overwrite: replace what stands at `out`, when the merge is complete.
            progress: show a progress bar; by default in a terminal or notebook.

        Returns:
            What it took.

        Raises:
            MergeError: as `merge_checkpoint` does; `out` is then as it was.
        """
        if self._is_assembled:
            from jaxmerge.cli.assembly import assemble_to

            return assemble_to(self, out, memory_budget=memory_budget, overwrite=overwrite, progress=progress)
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
        if self._is_assembled:
            from jaxmerge.cli.assembly import plan_assembly

            return plan_assembly(self, memory_budget=memory_budget)
        return plan_merge(
            self.method,
            self.experts,
            base=self.base,
            key=self.seed,
            rules=self.rules,
            dtype=self.dtype,
            memory_budget=memory_budget,
        )

    @property
    def _is_assembled(self) -> bool:
        return bool(self.slices) or self.tokenizer is not None or self.chat_template is not None


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
