"""PCB-Merging (arXiv 2410.02396): parameter competition balancing.

Every entry of a task vector is scored by its magnitude among the entries of its own expert and by its agreement with
the other experts; low scores are dropped, and the task vectors are averaged with the scores as weights.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxmerge.methods.coefficients import Coefficient, at_tensor, check_range, coefficient, per_expert
from jaxmerge.methods.measurements import OrderStatistic, Scope, kept_count
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.selection import from_ordered_keys, ordered_keys, rank_words
from jaxmerge.methods.task_arithmetic import nonzero
from jaxmerge.trees.info import TensorInfo

if TYPE_CHECKING:
    from jaxtyping import Array

Agreement = Literal["raw", "normalized"]


@pytree
class Pcb(Method):
    """See `pcb`."""

    density: Any
    weights: Any = 1.0
    agreement: Agreement = static(default="raw")
    tails: float = static(default=1e-4)
    scope: Scope = static(default="model")
    _tail_ranks: Any = None
    _score_ranks: Any = None

    needs_base = True

    @property
    def passes(self) -> tuple[Scope, ...]:
        return (self.scope, self.scope)

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Pcb:
        size = info.group_size if self.scope == "model" else info.size
        tails = [size - int(size * self.tails), size - max(int(size * (1 - self.tails) - 1), 0)]
        kept = kept_count(at_tensor(self.density, info), size, count="dropped")
        return dataclasses.replace(
            self,
            density=None,
            weights=per_expert(self.weights, info, experts, "weights"),
            _tail_ranks=rank_words(np.array(tails)),
            _score_ranks=[rank_words(rank) for rank in (kept, 1)],
        )

    def measure(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> OrderStatistic:
        deltas = [x - base for x in experts]
        if not stats:
            ranks = jnp.broadcast_to(jnp.asarray(self._tail_ranks), (len(deltas), 2, 2))
            return OrderStatistic(tuple(jnp.abs(d) for d in deltas), ranks)
        keys = tuple(ordered_keys(score) for score in self._scores(deltas, stats[0]))
        ranks = jnp.stack([jnp.asarray(rank) for rank in self._score_ranks])
        return OrderStatistic(keys, jnp.broadcast_to(ranks, (len(deltas), 2, 2)))

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        deltas = [x - base for x in experts]
        limits = from_ordered_keys(stats[1])
        merged, total = jnp.zeros_like(base), jnp.zeros_like(base)
        for i, (delta, score) in enumerate(zip(deltas, self._scores(deltas, stats[0]), strict=True)):
            cut, top = limits[i]
            share = (jnp.maximum(score, cut) - cut) / nonzero(top - cut)
            low, high = stats[0][i]
            merged = merged + self.weights[i] * share * jnp.sign(delta) * jnp.clip(jnp.abs(delta), low, high)
            total = total + share
        return base + merged / nonzero(total, below=1e-12)

    def _scores(self, deltas: list[Any], tails: Any) -> list[Any]:
        sizes = [
            (jnp.clip(jnp.abs(d), low, high) - low) / nonzero(high - low)
            for d, (low, high) in zip(deltas, tails, strict=True)
        ]
        votes = deltas if self.agreement == "raw" else [jnp.sign(d) * s for d, s in zip(deltas, sizes, strict=True)]
        total = sum(votes[1:], votes[0])
        return [jnp.exp(len(deltas) * s * s) * jnp.tanh(d * total) for d, s in zip(deltas, sizes, strict=True)]


def pcb(
    density: Coefficient = 0.1,
    *,
    weights: Coefficient = None,
    agreement: Agreement = "raw",
    tails: float = 1e-4,
    scope: Scope = "model",
) -> Method:
    r"""PCB-Merging: averages task vectors with weights that balance what competes within and between experts.

    With $a_i$ the magnitudes of $\tau_i$ clamped at their tails and $a'_i$ those mapped to [0, 1]: the score
    $\beta_i = e^{K a_i'^2} \odot \tanh(\tau_i \odot \sum_j \tau_j)$, with all but its largest $d$ share set to the cut,
    is mapped to $s_i$ in [0, 1], and
    $\theta = \theta_0 + \sum_i \lambda_i s_i\, \mathrm{sgn}(\tau_i)\, a_i / \sum_i s_i$.

    Args:
        density: $d$, in (0, 1]; 0.1 and 0.05 in the published code.
        weights: $\lambda_i$, one for all or one per expert; 1.2 in one published script, a search in [0.8, 1.3] in the
            paper.
        agreement: what is summed over the experts: `"raw"` task vectors, or `"normalized"` signed magnitudes
            $\mathrm{sgn}(\tau_j)\, a'_j$. The authors have published both.
        tails: share of the smallest and of the largest magnitudes that are clamped to the next; 1e-4, or 1e-2 in the
            script with normalized agreement.
        scope: magnitudes and scores are ranked over the `"model"` (as published) or each `"tensor"`.

    Derivatives take the cuts for constants. Source: arXiv 2410.02396.
    """
    check_range("density", density, 0.0, 1.0, open_low=True)
    check_range("tails", tails, 0.0, 0.5)
    return Pcb(coefficient(density), 1.0 if weights is None else coefficient(weights), agreement, tails, scope)
