"""EMR-Merging (arXiv 2405.17461): elect a unified task vector, then mask and rescale it for each expert.

The unified vector has, in every entry, the elected sign and the largest magnitude among the experts that have it. An
expert is approximated by the entries on which it agrees, rescaled to its own mean magnitude.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmerge.errors import RecipeError
from jaxmerge.methods.assignment import ExpertTrees
from jaxmerge.methods.masked_experts import MaskedExperts, mask_experts
from jaxmerge.methods.measurements import Scope, Total
from jaxmerge.methods.method import pytree, static
from jaxmerge.methods.stages import Chain, Stage, TaskVectors, chain
from jaxmerge.methods.task_arithmetic import nonzero
from jaxmerge.methods.ties import disjoint_max, elect_sign
from jaxmerge.trees.checks import name_experts
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.paths import Params, named_leaves

Average = Literal["tensor", "model"]


@pytree
class Recover(Stage):
    """See `recover`."""

    expert: str = static(default="")
    average: Average = static(default="tensor")
    _index: int = static(default=0)

    @property
    def measures(self) -> Scope:
        return "model"

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Recover:
        if self.expert not in experts:
            raise RecipeError(f"{self!r}: no expert is named {self.expert!r}; there are {', '.join(experts)}")
        return dataclasses.replace(self, expert="", _index=experts.index(self.expert))

    def measure(self, vectors: TaskVectors, info: TensorInfo) -> Total:
        weight = 1 / max(info.size, 1) if self.average == "tensor" else 1.0
        sums = [jnp.sum(jnp.abs(x)) for x in (vectors.original[self._index], self._masked(vectors))]
        return Total(weight * jnp.stack(sums))

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        own, masked = measured
        return vectors.replace(merged=own / nonzero(masked) * self._masked(vectors))

    def _masked(self, vectors: TaskVectors) -> Any:
        if vectors.merged is None:
            raise RecipeError(f"{self!r} masks the merged task vector; put disjoint_max() before it")
        return jnp.where(agreement(vectors.original[self._index], vectors.merged), vectors.merged, 0)


def agreement(delta: Any, unified: Any) -> Any:
    """Where a task vector has the sign of the unified one: the mask of its expert."""
    return (jnp.sign(delta) == jnp.sign(unified)) & (delta != 0)


def recover(expert: str, *, average: Average = "tensor") -> Stage:
    r"""Stage: turns the merged task vector into one expert's approximation, by its mask and its rescaler.

    Args:
        expert: the expert's name.
        average: the rescaler is a ratio of mean magnitudes, either means over each `"tensor"`, added up so that every
            tensor counts the same, or one mean over the `"model"`. The authors have published both.

    An expert that agrees nowhere is not rescaled. Source: arXiv 2405.17461, §3.
    """
    return Recover(expert, average)


def emr(expert: str | None = None, *, average: Average = "tensor") -> Chain:
    r"""EMR-Merging: the unified model, or the approximation of one expert.

    $\gamma = \mathrm{sgn} \sum_i \tau_i$, $m_i = \mathbb 1[\tau_i \gamma > 0]$,
    $\tau = \gamma \odot \max_i (m_i \odot |\tau_i|)$; expert $i$ is approximated by
    $\theta_0 + \lambda_i\, m_i \odot \tau$, where $\lambda_i$ restores the mean magnitude of $\tau_i$.

    Args:
        expert: an expert's name; None gives the unified model $\theta_0 + \tau$.
        average: as for `recover`.

    Source: arXiv 2405.17461. Nothing is tuned. `emr_experts` holds the approximations of all experts in little more
    than the memory of one.
    """
    unified = [elect_sign(zero="negative"), disjoint_max()]
    return chain(*unified) if expert is None else chain(*unified, recover(expert, average=average))


def emr_experts(experts: ExpertTrees, *, base: Params, average: Average = "tensor") -> MaskedExperts:
    """EMR-Merging as a value: the unified task vector with every expert's mask and rescaler, in memory.

    Args:
        experts: parameter trees with the same tensors, a list or a dict by name.
        base: what they were tuned from.
        average: as for `recover`.

    Returns:
        `approximation(name, base)` of it is what `merge(emr(name), experts, base=base)` gives.

    Source: arXiv 2405.17461.
    """
    count = len(name_experts(experts))
    held, deltas = mask_experts(emr(), experts, base, _agrees, lambda name: [0.0] * count)
    unified = named_leaves(held.unified)
    rescalers = []
    for expert, delta in zip(held.names, deltas, strict=True):
        sums = jnp.zeros(2)
        for name, mask in held.mask(expert).items():
            weight = 1 / max(mask.size, 1) if average == "tensor" else 1.0
            sums = sums + weight * _sizes(delta[name], unified[name], mask)
        rescalers.append(sums[0] / nonzero(sums[1]))
    return dataclasses.replace(held, rescalers=jnp.stack(rescalers))


def _agrees(delta: Any, unified: Any, number: Any) -> Any:
    return agreement(delta, unified)


@jax.jit
def _sizes(delta: Any, unified: Any, mask: Any) -> Any:
    """Sums of magnitudes: of a task vector, and of the unified one where the mask is."""
    return jnp.stack([jnp.sum(jnp.abs(delta)), jnp.sum(jnp.where(mask, jnp.abs(unified), 0))])
