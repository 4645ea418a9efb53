"""`jaxmerge plan RECIPE --mesh …`: what a merge would cost on devices that need not be here."""

from __future__ import annotations

import contextlib

from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.cli.recipe import Recipe
from jaxmerge.errors import RecipeError
from jaxmerge.streaming.costs import MergeCost, estimate_cost
from jaxmerge.trees.checks import cast


def cost_on_mesh(recipe: Recipe, mesh: str, processes: int) -> MergeCost:
    """The cost of a recipe on a mesh. Only headers are read.

    Args:
        recipe: the recipe. Where it names a dtype, inputs count as if they had it.
        mesh: the axes, such as "data=16,model=8".
        processes: that share the reading and writing.

    Raises:
        MergeError: a checkpoint cannot be opened, or the recipe does not fit; the mesh cannot be read.
    """
    if recipe._is_assembled:
        raise RecipeError(
            f"{recipe.source}: costs on a mesh are told for one method over whole models; leave out slices, tokenizer "
            "and chat_template"
        )
    shape = mesh_shape(mesh)
    with contextlib.ExitStack() as opened:

        def params(path: str) -> object:
            tree = opened.enter_context(open_checkpoint(path)).params
            return tree if recipe.dtype is None else cast(tree, recipe.dtype)

        experts = {name: params(path) for name, path in recipe.experts.items()}
        base = None if recipe.base is None else params(recipe.base)
        return estimate_cost(
            recipe.method,
            experts,
            base=base,
            mesh=shape,
            processes=processes,
            key=recipe.seed,
            rules=recipe.rules,
        )


def mesh_shape(text: str) -> dict[str, int]:
    """The sizes of a mesh's axes, from text such as "data=16,model=8".

    Raises:
        RecipeError: it is no such text.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name.strip() or name.strip() in axes or not size.strip().isdigit() or int(size) < 1:
            raise RecipeError(f"--mesh: found {text!r}, expected sizes of axes with different names: data=16,model=8")
        axes[name.strip()] = int(size)
    return axes
