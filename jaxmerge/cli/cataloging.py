"""`jaxmerge catalog` and `jaxmerge plan`: statistics of models, and merges within an I/O budget."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxmerge.cli.output import print_table
from jaxmerge.cli.recipe import Recipe, name_models
from jaxmerge.errors import CheckpointError, RecipeError
from jaxmerge.streaming.budget import AccessPlan
from jaxmerge.streaming.catalog import open_catalog
from jaxmerge.streaming.merge_checkpoint import merge_checkpoint, plan_merge
from jaxmerge.streaming.report import StreamReport
from jaxmerge.streaming.sizes import format_bytes


def merge_within(
    recipe: Recipe, out: str, overwrite: bool, options: dict[str, Any], plan: str | None = None
) -> StreamReport:
    """Merges as a recipe says, within an I/O budget.

    Args:
        recipe: the recipe.
        out: a local folder, or an `s3://` or `gs://` URL.
        overwrite: replace what stands there.
        options: `io_budget`, `catalog`, `policy` and `memory_budget` of `merge_checkpoint`, as far as they are given.
        plan: file with an access plan, in place of `io_budget`.

    Raises:
        MergeError: as `merge_checkpoint` does.
    """
    if plan is not None:
        options = {**options, "io_budget": AccessPlan.load(plan)}
    return merge_checkpoint(
        recipe.method, recipe.experts, out=out, overwrite=overwrite, **_arguments(recipe), **options
    )


def plan_within(recipe: Recipe, options: dict[str, Any]) -> AccessPlan:
    """Plans which blocks the merge of a recipe reads.

    Args:
        recipe: the recipe.
        options: `io_budget`, `catalog` and `policy` of `plan_merge`, as far as they are given.

    Raises:
        MergeError: as `plan_merge` does.
    """
    plan = plan_merge(recipe.method, recipe.experts, **_arguments(recipe), **options).io_plan
    assert plan is not None
    return plan


def run_action(options: argparse.Namespace) -> bool:
    """Does what `jaxmerge catalog` is asked for, and prints it.

    Args:
        options: `action` (add, list, verify or gc), `catalog`, and what belongs to the action.

    Returns:
        Whether all is well: false when `verify` has found a model that is missing or has changed.

    Raises:
        MergeError: the catalog or a model cannot be read.
    """
    if options.action != "add" and not Path(options.catalog).exists():
        raise CheckpointError(f"there is no catalog {options.catalog}; begin one with jaxmerge catalog add")
    with open_catalog(options.catalog) as catalog:
        if options.action == "add":
            read = catalog.add(options.base, name_models(options.experts), block_bytes=options.block)
            print_table(
                f"read for {options.catalog}", ("model", "read"), [(k, format_bytes(n)) for k, n in read.items()]
            )
        elif options.action == "list":
            entries = catalog.list()
            if options.json:
                print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=1))
                return True
            head = ("model", "state", "parameters", "size", "relative to")
            rows = [(x.path, x.state, f"{x.parameters:,}", format_bytes(x.bytes), ", ".join(x.bases)) for x in entries]
            print_table(f"{options.catalog}: {len(entries)} models", head, rows)
        elif options.action == "verify":
            wrong = catalog.verify()
            for entry in wrong:
                print(f"{entry.path}: {entry.state}")
            print(f"{len(catalog.list()) - len(wrong)} models are as they were, {len(wrong)} are not")
            return not wrong
        else:
            print(f"{catalog.gc()} models forgotten")
    return True


def _arguments(recipe: Recipe) -> dict[str, Any]:
    """The arguments that running a recipe gives to `merge_checkpoint`, besides method and experts."""
    if recipe.slices or recipe.tokenizer or recipe.chat_template:
        raise RecipeError(
            f"{recipe.source}: a recipe with slices, a tokenizer or a chat template cannot be merged within an I/O "
            "budget; leave the budget out"
        )
    return {"base": recipe.base, "key": recipe.seed, "rules": recipe.rules, "dtype": recipe.dtype}
