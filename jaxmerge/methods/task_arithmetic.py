"""Task arithmetic (arXiv 2212.04089): the base plus a scaled, weighted sum of task vectors.

Also the stages that every task-vector method shares: `weigh`, `total` and `scale`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Coefficient, coefficient, per_expert
from jaxmerge.methods.method import pytree, static
from jaxmerge.methods.stages import Chain, Stage, TaskVectors, chain
from jaxmerge.trees.info import TensorInfo


@pytree
class Weigh(Stage):
    """See `weigh`."""

    weights: Any = None

    spreads_nonfinite = True

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Weigh:
        return dataclasses.replace(self, weights=per_expert(self.weights, info, experts, "weights"))

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        weights = jnp.stack([jnp.asarray(w, vectors.weights.dtype) for w in self.weights])
        deltas = tuple(w * delta for w, delta in zip(weights, vectors.deltas, strict=True))
        return vectors.replace(deltas=deltas, weights=vectors.weights * weights)


@pytree
class Total(Stage):
    """See `total`."""

    normalize: bool = static(default=False)

    combines = True
    spreads_nonfinite = True

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        merged = sum(vectors.deltas[1:], vectors.deltas[0])
        if self.normalize:
            merged = merged / nonzero(jnp.sum(vectors.weights), below=1e-8)
        return vectors.replace(merged=merged)


@pytree
class Scale(Stage):
    """See `scale`."""

    factor: Any

    spreads_nonfinite = True

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Scale:
        if isinstance(self.factor, tuple):
            raise RecipeError(
                f"the scale is {list(self.factor)!r:.100}, expected one number, which counts for all experts; one for "
                "each expert is given as weights"
            )
        return super().at(info, experts)

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        if vectors.merged is not None:
            return vectors.replace(merged=self.factor * vectors.merged)
        return vectors.replace(deltas=tuple(self.factor * delta for delta in vectors.deltas))


def weigh(weights: Coefficient = None) -> Stage:
    """Stage: multiplies each task vector by its expert's weight, which later stages may divide by again.

    Before `elect_sign` the weights take part in the election (mergekit), after it they do not (PEFT).

    Args:
        weights: one per expert, in order or `{expert name: weight}`, each a coefficient; or one number for all.
            None: 1 for every expert.
    """
    return Weigh(1.0 if weights is None else coefficient(weights))


def total(*, normalize: bool = False) -> Stage:
    """Stage: combines the experts by the sum of their task vectors.

    Args:
        normalize: divide by the sum of the weights; a sum below 1e-8 in size counts as 1 (as in mergekit).
    """
    return Total(normalize)


def scale(factor: Coefficient) -> Stage:
    """Stage: multiplies the merged task vector (or, before the experts are combined, each one) by a coefficient.

    Args:
        factor: the number; at depth, by name, … as every coefficient.
    """
    return Scale(coefficient(factor))


def task_arithmetic(scale: Coefficient = 0.3, *, weights: Coefficient = None, normalize: bool = False) -> Chain:
    r"""Task arithmetic: $\theta = \theta_0 + \lambda \sum_i w_i (\theta_i - \theta_0)$.

    Args:
        scale: $\lambda$, tuned on held-out data in the paper; 0.3 is the usual start for eight tasks. Negative forgets.
        weights: $w_i$, one per expert (1 each by default). A negative weight forgets that expert's task.
        normalize: divide by $\sum_i w_i$ (mergekit's `normalize`; not in the paper).

    Source: arXiv 2212.04089, equations of §2 and §3. Sums are taken in float32.
    """
    return chain(weigh(weights), total(normalize=normalize), Scale(coefficient(scale)))


def nonzero(value: Any, *, below: float = 0.0) -> Any:
    """`value`, or 1 where its size does not exceed `below`: a divisor that is safe to divide by."""
    return jnp.where(jnp.abs(value) > below, value, jnp.ones_like(value))
