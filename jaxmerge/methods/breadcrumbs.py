"""Model Breadcrumbs (arXiv 2312.06795): remove each task vector's smallest entries and its largest outliers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import (
    Coefficient,
    check_range,
    check_same_everywhere,
    coefficient,
    is_plain_number,
    per_expert,
)
from jaxmerge.methods.measurements import Count, OrderStatistic, Scope, kept_count
from jaxmerge.methods.method import pytree, static
from jaxmerge.methods.selection import rank_words
from jaxmerge.methods.sharding import on_whole
from jaxmerge.methods.stages import Chain, Stage, TaskVectors, chain
from jaxmerge.methods.task_arithmetic import Scale, total, weigh
from jaxmerge.methods.ties import disjoint_mean, disjoint_sum, elect_sign
from jaxmerge.trees.info import TensorInfo

Order = Literal["outliers_first", "small_first"]


@pytree
class KeepMiddle(Stage):
    """See `keep_middle`."""

    density: Any
    gamma: Any
    scope: Scope = static(default="tensor")
    inclusive: bool = static(default=False)
    count: Count = static(default="kept")
    _ranks: Any = None

    @property
    def measures(self) -> Scope:
        return self.scope

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> KeepMiddle:
        if self.scope == "model":
            check_same_everywhere("density", self.density, experts)
            check_same_everywhere("gamma", self.gamma, experts)
        size = info.group_size if self.scope == "model" else info.size
        densities = per_expert(self.density, info, experts, "densities")
        gammas = per_expert(self.gamma, info, experts, "gammas")
        ranks = []
        for density, gamma in zip(densities, gammas, strict=True):
            outliers, last = self._cuts(density, gamma, size)
            ranks.append((rank_words(outliers + 1), rank_words(last)))
        return dataclasses.replace(self, density=None, gamma=None, _ranks=ranks)

    def _cuts(self, density: Any, gamma: Any, size: int) -> tuple[Any, Any]:
        """How many of the largest entries go (fewer if density needs them), and the rank of the last entry kept."""
        kept = kept_count(density, size, inclusive=self.inclusive, count=self.count)
        if self.count == "kept":
            outliers = _floor(gamma, size)
        else:  # those dropped in all, less the smallest
            outliers = kept_count(density + gamma, size, count="dropped") - kept_count(density, size, count="dropped")
        known = is_plain_number(kept) and is_plain_number(outliers)
        outliers = (min if known else jnp.minimum)(outliers, size - kept)
        return outliers, outliers + kept

    def measure(self, vectors: TaskVectors, info: TensorInfo) -> OrderStatistic:
        ranks = jnp.stack([jnp.stack([jnp.asarray(rank) for rank in cuts]) for cuts in self._ranks])
        return OrderStatistic(tuple(jnp.abs(delta) for delta in vectors.deltas), ranks)

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        deltas = []
        for delta, (largest, smallest) in zip(vectors.deltas, measured, strict=True):
            size = jnp.abs(delta)
            deltas.append(jnp.where((size <= largest) & (size >= smallest), delta, 0))
        return vectors.replace(deltas=tuple(deltas))


@pytree
class KeepMiddleOfFibres(Stage):
    """See `keep_middle` with an axis."""

    density: Any
    gamma: Any
    axis: int = static(default=-1)
    order: Order = static(default="outliers_first")
    _kept: Any = None
    _removed: Any = None

    whole_tensor = True
    in_one_place = True

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> KeepMiddleOfFibres:
        length = info.shape[self.axis if len(info.shape) > 1 else -1] if info.shape else 1
        densities = per_expert(self.density, info, experts, "densities")
        gammas = per_expert(self.gamma, info, experts, "gammas")
        kept, removed = ([_floor(share, length) for share in shares] for shares in (densities, gammas))
        return dataclasses.replace(self, density=None, gamma=None, _kept=kept, _removed=removed)

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        deltas = []
        for delta, kept, removed in zip(vectors.deltas, self._kept, self._removed, strict=True):
            if delta.ndim == 0:
                deltas.append(delta)
                continue
            # Outliers zeroed first rank last afterwards, so they fill the count of entries kept with zeros.
            for limit in (removed, kept) if self.order == "outliers_first" else (kept, removed):
                axis = self.axis if delta.ndim > 1 else -1
                rank = on_whole(functools.partial(_rank_from_top, axis=axis), delta)
                delta = jnp.where(rank < limit if limit is kept else rank >= limit, delta, 0)
            deltas.append(delta)
        return vectors.replace(deltas=tuple(deltas))


def _rank_from_top(delta: Any, axis: int) -> Any:
    """0 for the largest magnitude of a fibre, then 1, …; equal magnitudes by position."""
    order = jnp.argsort(-jnp.abs(delta), axis=axis, stable=True)
    return jnp.argsort(order, axis=axis, stable=True).astype(delta.dtype)


def _floor(share: Any, size: int) -> Any:
    return float(int(float(share) * size)) if is_plain_number(share) else jnp.floor(share * size * (1 + 2.0**-22))


def keep_middle(
    density: Coefficient,
    *,
    gamma: Coefficient = 0.01,
    scope: Scope = "tensor",
    inclusive: bool = False,
    count: Count = "kept",
    axis: int | None = None,
    order: Order = "outliers_first",
) -> Stage:
    r"""Stage: drops the `int(gamma * n)` largest entries by magnitude and keeps the `int(density * n)` next largest.

    Args:
        density: $\beta$, the share kept, in (0, 1]; one for all or one per expert. Ties at either cut are kept.
        gamma: $\gamma$, the share of outliers removed, in [0, 1); fewer go where `density + gamma` exceeds 1.
        scope: shares are of each `"tensor"` (mergekit, MergeLLM) or of the whole `"model"`.
        inclusive: keep one entry more at the lower cut, as MergeLLM does.
        count: whether integer parts are taken of the numbers `"kept"` and removed as said above, or of the numbers
            `"dropped"`: `int((1 - density) * n)` in all, `int((1 - density - gamma) * n)` of them the smallest
            (MergeLLM).
        axis: shares are of each fibre along this axis instead (the published code: -1); needs whole tensors, equal
            magnitudes are ranked by position.
        order: with an axis: remove outliers first, which then count among the kept as zeros (the published default), or
            `"small_first"`: keep the largest, then remove outliers.

    Source: arXiv 2312.06795, §3. mergekit 0.1.4 loses a tensor's whole task vector where `int(gamma * n)` is 0; we do
        not.
    """
    check_range("density", density, 0.0, 1.0, open_low=True)
    check_range("gamma", gamma, 0.0, 1.0)
    if axis is None:
        return KeepMiddle(coefficient(density), coefficient(gamma), scope, inclusive, count)
    if inclusive or count != "kept":
        raise RecipeError("keep_middle counts other than by default over tensors and models only; leave out axis")
    return KeepMiddleOfFibres(coefficient(density), coefficient(gamma), axis, order)


def breadcrumbs(
    density: Coefficient = 0.9,
    *,
    gamma: Coefficient = 0.01,
    scale: Coefficient = 0.3,
    weights: Coefficient = None,
    normalize: bool = False,
    axis: int | None = None,
) -> Chain:
    r"""Breadcrumbs: $\theta = \theta_0 + \alpha \sum_i w_i\, m_i \odot \tau_i$ with masks $m_i$ from `keep_middle`.

    Args:
        density: $\beta$, share of entries kept; 0.85 to 0.9 in the paper.
        gamma: $\gamma$, share of the largest entries removed; about 0.01 in the paper.
        scale: $\alpha$, tuned in the paper (about 0.3).
        weights: one per expert; 1 each by default.
        normalize: divide by the sum of the weights.
        axis: masks per tensor (None) or per fibre along this axis (-1 in the published code).

    Source: arXiv 2312.06795.
    """
    middle = keep_middle(density, gamma=gamma, axis=axis)
    return chain(middle, weigh(weights), total(normalize=normalize), Scale(coefficient(scale)))


def breadcrumbs_ties(
    density: Coefficient = 0.9,
    *,
    gamma: Coefficient = 0.01,
    scale: Coefficient = 1.0,
    weights: Coefficient = None,
    normalize: bool = True,
    axis: int | None = None,
) -> Chain:
    """Breadcrumbs' masks, then TIES' election and disjoint mean (mergekit's `breadcrumbs_ties`).

    Args are those of `breadcrumbs`; `normalize` divides by the agreeing weights, otherwise agreeing entries are summed.
    """
    combine = disjoint_mean() if normalize else disjoint_sum()
    middle = keep_middle(density, gamma=gamma, axis=axis)
    return chain(middle, weigh(weights), elect_sign(), combine, Scale(coefficient(scale)))
