"""AdaMerging (arXiv 2310.02575): task arithmetic whose coefficients are learned, per task or per tensor and task.

This is the merge given its coefficients. `jm.learn` learns them, with `jm.entropy` as the paper's objective.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Coefficient, learnable
from jaxmerge.methods.method import pytree
from jaxmerge.methods.stages import Chain, Stage, TaskVectors, chain
from jaxmerge.methods.task_arithmetic import total, weigh
from jaxmerge.methods.ties import elect_sign, trim
from jaxmerge.trees.info import TensorInfo


@pytree
class KeepElected(Stage):
    """See `keep_elected`."""

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        sign = vectors.sign
        if sign is None:
            raise RecipeError(f"{self!r} keeps the entries that agree with an elected sign; put elect_sign() before it")
        return vectors.replace(deltas=tuple(jnp.where(jnp.sign(d) == sign, d, 0) for d in vectors.deltas))


def keep_elected() -> Stage:
    """Stage: zeroes the entries of each task vector whose sign is not the elected one, and combines nothing yet.

    Source: AdaMerging++, arXiv 2310.02575, which takes TIES' election without its mean.
    """
    return KeepElected()


def adamerging(
    coefficients: Coefficient = 0.3,
    *,
    per: Literal["tensor", "task"] = "tensor",
    density: Coefficient = None,
) -> Chain:
    r"""AdaMerging: task arithmetic with a coefficient for every task, or for every tensor and task, to be learned.

    $\theta^l = \theta_0^l + \sum_i \lambda_i^l \tau_i^l$, with $l$ a parameter tensor. Before `jm.learn` has learned
    the coefficients this is task arithmetic with the number given.

    Args:
        coefficients: the number that all start from, or one per task to start from; or coefficients that are known,
            which are then fixed: `{tensor name: [one per task]}` and whatever else a coefficient may be.
        per: one coefficient for every `"tensor"` and task (the paper's layer-wise form), or for every `"task"`.
        density: AdaMerging++: each $\tau_i$ keeps only this share of its largest entries over the model, and of these
            the ones whose sign is elected as in TIES. The paper keeps 0.2; None keeps all.

    Source: arXiv 2310.02575. Where elected totals are zero the sign is that of the majority, as in TIES' code.
    """
    plain = isinstance(coefficients, int | float) or (
        isinstance(coefficients, list | tuple) and all(isinstance(x, int | float) for x in coefficients)
    )
    if per not in ("tensor", "task"):
        raise RecipeError(f"per is {per!r}, expected 'tensor' or 'task'")
    weights = learnable(coefficients, per_tensor=per == "tensor") if plain else coefficients
    select = () if density is None else (trim(density), elect_sign(zero="majority"), keep_elected())
    return chain(*select, weigh(weights), total())
