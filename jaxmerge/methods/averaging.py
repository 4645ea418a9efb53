"""Averages of weights: linear averaging (model soups, arXiv 2203.05482) and Model Stock (arXiv 2403.19522)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Coefficient, coefficient, per_expert
from jaxmerge.methods.measurements import Scope, Total
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.task_arithmetic import nonzero
from jaxmerge.trees.info import TensorInfo


@pytree
class Linear(Method):
    """See `linear`."""

    weights: Any = 1.0
    normalize: bool = static(default=True)

    spreads_nonfinite = True

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Linear:
        return dataclasses.replace(self, weights=per_expert(self.weights, info, experts, "weights"))

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        first = experts[0]
        weights = [jnp.asarray(w, first.dtype) for w in self.weights]
        if not self.normalize:
            return sum([w * x for w, x in zip(weights, experts, strict=True)], jnp.zeros_like(first))
        # Relative to the first expert, so that the mean of identical models is that model bit for bit.
        share = 1 / nonzero(sum(weights[1:], weights[0]), below=1e-8)
        moved = sum(
            (w * share * (x - first) for w, x in zip(weights[1:], experts[1:], strict=True)), jnp.zeros_like(first)
        )
        return first + moved


@pytree
class ModelStock(Method):
    """See `model_stock`."""

    average: Literal["cosine", "angle"] = static(default="cosine")
    axis: int | None = static(default=None)
    clip: bool = static(default=False)

    needs_base = True

    @property
    def whole_tensor(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.axis is not None

    @property
    def passes(self) -> tuple[Scope, ...]:
        return () if self.axis is not None else ("tensor",)

    def check(self, experts: tuple[str, ...], has_base: bool, tensors: Sequence[str]) -> None:
        super().check(experts, has_base, tensors)
        if len(experts) < 2:
            raise RecipeError(f"model_stock compares experts with each other: found {len(experts)}, expected 2 or more")

    def measure(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Total:
        return Total(_gram([x - base for x in experts], None))

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        deltas = [x - base for x in experts]
        axis = self.axis if base.ndim > 1 else None  # a vector is one group
        gram = stats[0] if stats else _gram(deltas, axis)
        t = self._interpolation(gram)
        mean = sum(deltas[1:], deltas[0]) / len(deltas)
        return base + t * mean

    def _interpolation(self, gram: list[list[Any]]) -> Any:
        """How far from the base to the mean to go, from the inner products of the task vectors."""
        count = len(gram)
        norms = [jnp.where(gram[i][i] > 0, jnp.sqrt(nonzero(gram[i][i])), 0) for i in range(count)]
        pairs = [(i, j) for i in range(count) for j in range(i)]
        cosines = [jnp.clip(gram[i][j] / nonzero(norms[i] * norms[j]), -1, 1) for i, j in pairs]
        if self.average == "angle":
            angles = [jnp.arccos(c) for c in cosines]
            cosine = jnp.cos(sum(angles[1:], angles[0]) / len(pairs))
        else:
            cosine = sum(cosines[1:], cosines[0]) / len(pairs)
        t = count * cosine / nonzero(1 + (count - 1) * cosine)
        return jnp.clip(t, 0, 1) if self.clip else t


def _gram(deltas: list[Any], axis: int | None) -> list[list[Any]]:
    """Lower triangle of the inner products of K task vectors, over everything or along one axis."""
    return [
        [jnp.sum(a * b) if axis is None else jnp.sum(a * b, axis, keepdims=True) for b in deltas[: i + 1]]
        for i, a in enumerate(deltas)
    ]


def linear(weights: Coefficient = None, *, normalize: bool = True) -> Method:
    r"""Weighted average of the experts: $\theta = \sum_i w_i \theta_i / \sum_i w_i$. No base is needed.

    Args:
        weights: $w_i$, one per expert, in order or `{expert name: weight}`; equal by default. May be negative.
        normalize: divide by the sum of the weights; a sum below 1e-8 in size counts as 1.

    Source: model soups, arXiv 2203.05482. The mean of identical models is that model bit for bit.
    """
    return Linear(1.0 if weights is None else coefficient(weights), normalize)


def model_stock(
    *, average: Literal["cosine", "angle"] = "cosine", axis: int | None = None, clip: bool = False
) -> Method:
    r"""Model Stock: pull the mean towards the base by what the angles between task vectors suggest.

    With $c$ the average cosine over pairs, $t = K c / (1 + (K - 1) c)$ and
    $\theta = \theta_0 + t\,(\bar\theta - \theta_0)$.

    Args:
        average: average the pairs' `"cosine"` (mergekit, MergeLLM) or their `"angle"` (FusionBench).
        axis: one angle per tensor (None), or per fibre along this axis (mergekit's `filter_wise` is -1). The paper has
            one per layer.
        clip: keep $t$ within [0, 1]. Without it obtuse angles extrapolate, without limit as $1 + (K-1) c \to 0$.

    Needs two or more experts. A zero task vector has cosine 0 with every other. Source: arXiv 2403.19522, equation 6.
    """
    return ModelStock(average, axis, clip)
