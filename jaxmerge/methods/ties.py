"""TIES merging (arXiv 2306.01708): trim each task vector, elect one sign per entry, average the entries that agree."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Coefficient, check_range, check_same_everywhere, coefficient, per_expert
from jaxmerge.methods.measurements import Count, OrderStatistic, Scope, Total, kept_count
from jaxmerge.methods.method import pytree, static
from jaxmerge.methods.selection import rank_words
from jaxmerge.methods.stages import Chain, Stage, TaskVectors, chain
from jaxmerge.methods.task_arithmetic import Scale, nonzero, weigh
from jaxmerge.trees.info import TensorInfo

Election = Literal["total", "count"]
ZeroSign = Literal["positive", "negative", "majority"]
Divisor = Literal["weights", "count"]


@pytree
class Trim(Stage):
    """See `trim`."""

    density: Any
    scope: Scope = static(default="model")
    inclusive: bool = static(default=False)
    count: Count = static(default="kept")
    _ranks: Any = None

    @property
    def measures(self) -> Scope:
        return self.scope

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Trim:
        if self.scope == "model":
            check_same_everywhere("density", self.density, experts)
        densities = per_expert(self.density, info, experts, "densities")
        size = info.group_size if self.scope == "model" else info.size
        ranks = [rank_words(kept_count(d, size, inclusive=self.inclusive, count=self.count)) for d in densities]
        return dataclasses.replace(self, density=None, _ranks=ranks)

    def measure(self, vectors: TaskVectors, info: TensorInfo) -> OrderStatistic:
        magnitudes = tuple(jnp.abs(delta) for delta in vectors.deltas)
        return OrderStatistic(magnitudes, jnp.stack([jnp.asarray(rank) for rank in self._ranks])[:, None])

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        deltas = [jnp.where(jnp.abs(d) >= limit[0], d, 0) for d, limit in zip(vectors.deltas, measured, strict=True)]
        return vectors.replace(deltas=tuple(deltas))


@pytree
class Rescale(Stage):
    """See `rescale`."""

    measures = "tensor"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def measure(self, vectors: TaskVectors, info: TensorInfo) -> Total:
        norms = [[jnp.sum(jnp.abs(d)) for d in deltas] for deltas in (vectors.original, vectors.deltas)]
        return Total(jnp.stack([jnp.stack(row) for row in norms]))

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        before, after = measured
        factors = jnp.where((before < 1e-7) | (after < 1e-7), 1, before / nonzero(after))
        return vectors.replace(deltas=tuple(f * d for f, d in zip(factors, vectors.deltas, strict=True)))


@pytree
class ElectSign(Stage):
    """See `elect_sign`."""

    by: Election = static(default="total")
    zero: ZeroSign = static(default="positive")
    scope: Scope = static(default="model")

    @property
    def measures(self) -> Scope | None:
        return self.scope if self.zero == "majority" else None

    def _tally(self, vectors: TaskVectors) -> Any:
        votes = vectors.deltas if self.by == "total" else [jnp.sign(d) for d in vectors.deltas]
        return sum(votes[1:], votes[0])

    def measure(self, vectors: TaskVectors, info: TensorInfo) -> Total:
        return Total(jnp.sum(jnp.sign(self._tally(vectors))))

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        tally = self._tally(vectors)
        one = jnp.ones((), tally.dtype)
        if measured is None:
            at_zero = one if self.zero == "positive" else -one
        else:
            at_zero = jnp.where(measured >= 0, one, -one)
        return vectors.replace(sign=jnp.where(tally > 0, one, jnp.where(tally < 0, -one, at_zero)))


@pytree
class Disjoint(Stage):
    """See `disjoint_mean`, `disjoint_sum` and `disjoint_max`."""

    reduction: Literal["mean", "sum", "max"] = static(default="mean")
    divisor: Divisor = static(default="weights")

    combines = True

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        sign = vectors.sign
        if sign is None:
            raise RecipeError(f"{self!r} keeps the entries that agree with an elected sign; put elect_sign() before it")
        agree = [jnp.sign(delta) == sign for delta in vectors.deltas]
        kept = [jnp.where(a, d, 0) for a, d in zip(agree, vectors.deltas, strict=True)]
        if self.reduction == "max":
            merged = sign * _over(jnp.maximum, [jnp.abs(d) for d in kept])
        else:
            merged = _over(jnp.add, kept)
        if self.reduction == "mean":
            weights = vectors.weights if self.divisor == "weights" else jnp.ones_like(vectors.weights)
            merged = merged / nonzero(_over(jnp.add, [jnp.where(a, w, 0) for a, w in zip(agree, weights, strict=True)]))
        return vectors.replace(merged=merged)

    def __repr__(self) -> str:
        divisor = "" if self.divisor == "weights" else f"divisor={self.divisor!r}"
        return f"disjoint_{self.reduction}({divisor})"


def _over(combine: Any, arrays: list[Any]) -> Any:
    """Reduces a list of K arrays entry by entry, unrolled over K."""
    result = arrays[0]
    for array in arrays[1:]:
        result = combine(result, array)
    return result


def trim(
    density: Coefficient,
    *,
    scope: Scope = "model",
    inclusive: bool = False,
    count: Count = "kept",
) -> Stage:
    """Stage: keeps the largest entries of each task vector by magnitude and zeroes the rest.

    Args:
        density: share of entries kept, in (0, 1]; one for all or one per expert. At least one entry is kept, and every
            entry tied with the smallest kept one (in half precision there are many), so the result depends on no order.
        scope: `"model"` trims over all tensors at once (the paper and its code), `"tensor"` each tensor by itself
            (mergekit, MergeLLM).
        inclusive: keep one entry more: the published code compares with the first dropped entry by `>=`.
        count: whether `int()` is taken of the number `"kept"`, or of the number `"dropped"` (MergeLLM).

    Raises:
        RecipeError: a density outside (0, 1].

    Source: arXiv 2306.01708, §3.1.
    """
    check_range("density", density, 0.0, 1.0, open_low=True)
    return Trim(coefficient(density), scope, inclusive, count)


def rescale() -> Stage:
    """Stage: scales each task vector of each tensor to the L1 norm that it had before the first stage.

    Norms below 1e-7 leave it as it is. This is mergekit's `rescale`, for trimmed and for randomly dropped entries.
    """
    return Rescale()


def elect_sign(by: Election = "total", *, zero: ZeroSign = "positive", scope: Scope = "model") -> Stage:
    """Stage: elects one sign for each entry.

    Args:
        by: `"total"`: the sign of the summed task vectors; `"count"`: the sign that more experts have (mergekit's
            `count`, PEFT's `frequency`).
        zero: the sign where the total is zero: `"positive"` (mergekit, PEFT), `"negative"` (EMR), or the `"majority"`
            of all elected signs (the published code). It matters only where entries cancel exactly.
        scope: what the majority is counted over: the `"model"` or each `"tensor"` (MergeLLM).

    Source: arXiv 2306.01708, §3.2, which does not say what happens at zero.
    """
    return ElectSign(by, zero, scope)


def disjoint_mean(divisor: Divisor = "weights") -> Stage:
    """Stage: combines the experts by averaging, entry by entry, those that agree with the elected sign.

    Args:
        divisor: divide by the sum of the agreeing experts' `"weights"` (mergekit) or by their `"count"` (the paper,
            PEFT). They are the same without weights. Entries where nobody agrees are zero.

    Source: arXiv 2306.01708, §3.3.
    """
    return Disjoint("mean", divisor)


def disjoint_sum() -> Stage:
    """Stage: combines the experts by summing those that agree with the elected sign (FusionBench's default)."""
    return Disjoint("sum")


def disjoint_max() -> Stage:
    """Stage: combines the experts by the largest magnitude among those that agree with the elected sign."""
    return Disjoint("max")


def ties(
    density: Coefficient = 0.2,
    *,
    scale: Coefficient = 1.0,
    weights: Coefficient = None,
    scope: Scope = "model",
    elect: Election = "total",
    normalize: bool = True,
) -> Chain:
    r"""TIES: trim, elect sign, disjoint mean.

    With $\hat\tau_i$ the trimmed task vectors, $\gamma = \mathrm{sgn} \sum_i w_i \hat\tau_i$ and $A$ the experts whose
    entry has that sign: $\theta = \theta_0 + \lambda \sum_{i \in A} w_i \hat\tau_i / \sum_{i \in A} w_i$.

    Args:
        density: share of entries kept per expert, in (0, 1]. The paper keeps 0.2.
        scale: $\lambda$; 1 where nothing can be validated (paper).
        weights: $w_i$, one per expert; 1 each by default (the paper has none).
        scope: trim over the whole `"model"` (paper) or each `"tensor"` (mergekit).
        elect: election by `"total"` (paper) or by `"count"`.
        normalize: divide by the agreeing weights; without it agreeing entries are summed (mergekit's `normalize:
            false`).

    Source: arXiv 2306.01708. For the published code's counting (one entry more, zero totals by majority) build the
    chain from its stages: `chain(trim(0.2, inclusive=True), elect_sign(zero="majority"), disjoint_mean())`.
    """
    combine = disjoint_mean() if normalize else disjoint_sum()
    stages = [trim(density, scope=scope), elect_sign(elect), combine]
    if weights is not None:
        stages.insert(1, weigh(weights))
    if not (isinstance(scale, float | int) and scale == 1):
        stages.append(Scale(coefficient(scale)))
    return chain(*stages)
