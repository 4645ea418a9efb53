"""TALL masks and Consensus merging (arXiv 2405.07813): which entries of a merged task vector each expert needs.

An expert needs an entry where its own task vector outweighs what the others added to it. Its TALL mask recovers the
expert from the merged task vector; entries that too few experts need only get in the way of all, and Consensus merging
drops them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxmerge.errors import RecipeError
from jaxmerge.methods.assignment import ExpertTrees
from jaxmerge.methods.coefficients import Coefficient, coefficient, per_expert
from jaxmerge.methods.masked_experts import MaskedExperts, mask_experts
from jaxmerge.methods.method import pytree, static
from jaxmerge.methods.stages import Chain, Stage, TaskVectors, chain
from jaxmerge.methods.task_arithmetic import Scale, total
from jaxmerge.trees.checks import name_experts
from jaxmerge.trees.info import TensorInfo, tensor_infos
from jaxmerge.trees.paths import Params, named_leaves


@pytree
class _TallMasks(Stage):
    """What both stages here share: the K masks of a merged task vector."""

    threshold: Any = 0.4

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> _TallMasks:
        return dataclasses.replace(self, threshold=per_expert(self.threshold, info, experts, "thresholds"))

    def masks(self, vectors: TaskVectors) -> list[Any]:
        """Where each expert needs the merged task vector."""
        merged = vectors.merged
        if merged is None:
            raise RecipeError(f"{self!r} masks the merged task vector; put a stage such as total() before it")
        return [_needed(d, merged, t) for d, t in zip(vectors.original, self.threshold, strict=True)]


@pytree
class KeepConsensus(_TallMasks):
    """See `keep_consensus`."""

    minimum: int = static(default=2)

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        votes = [mask.astype(jnp.int32) for mask in self.masks(vectors)]
        return vectors.replace(merged=jnp.where(sum(votes[1:], votes[0]) >= self.minimum, vectors.merged, 0))


@pytree
class KeepNeeded(_TallMasks):
    """See `keep_needed`."""

    expert: str = static(default="")
    _index: int = static(default=0)

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> KeepNeeded:
        if self.expert not in experts:
            raise RecipeError(f"{self!r}: no expert is named {self.expert!r}; there are {', '.join(experts)}")
        thresholds = per_expert(self.threshold, info, experts, "thresholds")
        return dataclasses.replace(self, threshold=thresholds, expert="", _index=experts.index(self.expert))

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        return vectors.replace(merged=jnp.where(self.masks(vectors)[self._index], vectors.merged, 0))


def _needed(delta: Any, merged: Any, threshold: Any) -> Any:
    return jnp.abs(delta) > threshold * jnp.abs(merged - delta)


def keep_consensus(minimum: int = 2, *, threshold: Coefficient = 0.4) -> Stage:
    r"""Stage: zeroes the entries of the merged task vector that fewer than `minimum` experts need.

    Expert $i$ needs an entry where $|\tau_i| > \lambda_i\, |\tau - \tau_i|$, with $\tau$ the merged task vector and
    $\tau_i$ the expert's before the first stage.

    Args:
        minimum: how many experts must need an entry; 0 keeps all, more than there are experts none.
        threshold: $\lambda_i$, one for all or one per expert; 0.2 to 0.6 in the paper, by validation.

    Source: arXiv 2405.07813, §4.
    """
    return KeepConsensus(coefficient(threshold), minimum)


def keep_needed(expert: str, *, threshold: Coefficient = 0.4) -> Stage:
    """Stage: zeroes the entries of the merged task vector that one expert does not need: its TALL mask.

    Args:
        expert: the expert's name.
        threshold: as for `keep_consensus`.

    Source: arXiv 2405.07813, §3.
    """
    return KeepNeeded(coefficient(threshold), expert)


def consensus(scale: Coefficient = 0.3, *, minimum: int = 2, threshold: Coefficient = 0.4) -> Chain:
    r"""Consensus merging: task arithmetic on the entries that at least `minimum` experts need.

    With $m_i = \mathbb 1[|\tau_i| > \lambda_i |\tau - \tau_i|]$ and $\tau = \sum_i \tau_i$:
    $\theta = \theta_0 + \alpha\, \mathbb 1[\sum_i m_i \ge k] \odot \tau$.

    Args:
        scale: $\alpha$, tuned as in task arithmetic.
        minimum: $k$; 2 drops what no expert or a single one needs.
        threshold: $\lambda_i$, one for all or one per expert; 0.2 to 0.6 in the paper, by validation.

    Source: arXiv 2405.07813. Other merges are masked alike: `chain(*ties().stages, keep_consensus(), scale(0.3))`.
    """
    return chain(total(), keep_consensus(minimum, threshold=threshold), Scale(coefficient(scale)))


def tall_mask(expert: str, *, threshold: Coefficient = 0.4) -> Chain:
    r"""The approximation of one expert by its TALL mask: $\theta_0 + m_i \odot \sum_j \tau_j$.

    Args:
        expert: the expert's name.
        threshold: as for `consensus`.

    Source: arXiv 2405.07813, §3. `tall_experts` holds the approximations of all experts in little more than the memory
    of one.
    """
    return chain(total(), keep_needed(expert, threshold=threshold))


def tall_experts(
    experts: ExpertTrees, *, base: Params, threshold: Coefficient = 0.4, unify: Chain | None = None
) -> MaskedExperts:
    """Experts compressed to one task vector and their TALL masks, in memory.

    Args:
        experts: parameter trees with the same tensors, a list or a dict by name.
        base: what they were tuned from.
        threshold: as for `consensus`.
        unify: merges the task vectors; their sum when None.

    Returns:
        `approximation(name, base)` of it is what `merge(tall_mask(name), experts, base=base)` gives.

    Source: arXiv 2405.07813, §3.
    """
    infos = tensor_infos({name: tuple(leaf.shape) for name, leaf in named_leaves(base).items()})
    names, thresholds = tuple(name_experts(experts)), coefficient(threshold)

    def by_expert(name: str) -> list[Any]:
        return per_expert(thresholds, infos[name], names, "thresholds")

    return mask_experts(chain(total()) if unify is None else unify, experts, base, _needed, by_expert)[0]
