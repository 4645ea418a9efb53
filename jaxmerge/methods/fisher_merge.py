"""Fisher merging (arXiv 2111.09832): a mean in which every entry counts by how sure its expert is of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Coefficient, check_range, coefficient, per_expert
from jaxmerge.methods.given import check_given, given_statistics, of_tensor
from jaxmerge.methods.measurements import Scope, Total
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.task_arithmetic import nonzero
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.paths import Params

_WHAT = "Fisher information"


@pytree
class FisherMerge(Method):
    """See `fisher_merge`."""

    fishers: Any = ()
    weights: Any = 1.0
    floor: Any = 1e-6
    raises: Literal["add", "max"] = static(default="add")
    normalize: bool = static(default=False)

    whole_tensor = True
    """The statistics of a tensor are there as a whole, so the tensor is too."""

    @property
    def passes(self) -> tuple[Scope, ...]:
        return ("model",) if self.normalize else ()

    def check(self, experts: tuple[str, ...], has_base: bool, tensors: Sequence[str]) -> None:
        super().check(experts, has_base, tensors)
        check_given(self.fishers, experts, _WHAT)

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> FisherMerge:
        return dataclasses.replace(
            self,
            fishers=of_tensor(self.fishers, info, info.shape, experts, _WHAT),
            weights=tuple(per_expert(self.weights, info, experts, "weights")),
            floor=tuple(per_expert(self.floor, info, experts, "floors")),
        )

    def measure(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Total:
        return Total(jnp.stack([jnp.sum(jnp.square(fisher.astype(experts[0].dtype))) for fisher in self.fishers]))

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        first = experts[0]
        weights = [jnp.asarray(w, first.dtype) for w in self.weights]
        if stats:
            norms = [jnp.sqrt(nonzero(square)) for square in stats[0]]
            weights = [w / norm for w, norm in zip(weights, norms, strict=True)]
        raised = jnp.add if self.raises == "add" else jnp.maximum
        precisions = [
            w * raised(fisher.astype(first.dtype), floor)
            for w, fisher, floor in zip(weights, self.fishers, self.floor, strict=True)
        ]
        total, plain = sum(precisions[1:], precisions[0]), nonzero(sum(weights[1:], weights[0]))
        known = total > 0
        moved = jnp.zeros_like(first)
        for w, precision, x in zip(weights[1:], precisions[1:], experts[1:], strict=True):
            moved = moved + jnp.where(known, precision / jnp.where(known, total, 1), w / plain) * (x - first)
        return first + moved  # relative to the first, so that equal entries stay what they are

    def __repr__(self) -> str:
        return repr(dataclasses.replace(self, fishers=())) if self.fishers else super().__repr__()


def fisher_merge(
    fishers: Sequence[Params] | Mapping[str, Params],
    weights: Coefficient = None,
    *,
    floor: Coefficient = 1e-6,
    raises: Literal["add", "max"] = "add",
    normalize: bool = False,
) -> Method:
    r"""Fisher merging: averages every entry by the experts' diagonal Fisher information there.

    $\theta = \sum_i w_i F_i \odot \theta_i / \sum_i w_i F_i$: the mode of the product of the experts' diagonal Laplace
    approximations. The base plays no part.

    Args:
        fishers: $F_i \ge 0$, a tree like the parameters for every expert, a list or a dict by name: what `jm.fisher`
            gives, in memory or opened from a checkpoint.
        weights: $w_i \ge 0$, one per expert; equal by default.
        floor: what the entries of $F_i$ are raised by, one for all or one per expert.
        raises: `"add"` the floor to all entries (FusionBench), or take the larger of both, `"max"` (the authors, for
            the target model alone: `floor={"target": 1e-6, "donor": 0.0}`).
        normalize: divide each $F_i$ by its norm over the whole model, so that $w_i$ alone says how it counts.

    Where all are zero, floor included, an entry is the weighted mean. Source: arXiv 2111.09832.

    Raises:
        RecipeError: a weight or a floor is negative, or statistics and experts do not belong together (when merging).
        StructureError, ShapeError, NonFiniteError: a statistic does not fit its tensor (when merging).
    """
    if raises not in ("add", "max"):
        raise RecipeError(f"raises is {raises!r}, expected 'add' or 'max'")
    weights = 1.0 if weights is None else coefficient(weights)
    check_range("a weight", weights, 0, float("inf"))
    check_range("a floor", coefficient(floor), 0, float("inf"))
    return FisherMerge(given_statistics(fishers, _WHAT), weights, coefficient(floor), raises, normalize)
