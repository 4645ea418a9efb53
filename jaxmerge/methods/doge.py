"""DOGE (arXiv 2501.01230), also called AdaptivePGD: task arithmetic after a correction that all experts share.

One correction for each matrix lessens the conflict of the weighted sum with every task vector, found by gradient
descent whose gradients are kept out of the directions that the experts share.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Coefficient, check_range, check_same_everywhere, coefficient, per_expert
from jaxmerge.methods.factorisation import dot, leading_svd
from jaxmerge.methods.measurements import OrderStatistic, Scope, kept_count
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.selection import rank_words
from jaxmerge.methods.spectral import Factored, Others, Spectral, from_matrix, sharded_like
from jaxmerge.methods.task_arithmetic import nonzero
from jaxmerge.methods.wudi import descend
from jaxmerge.trees.info import TensorInfo


@pytree
class Doge(Spectral):
    """See `doge`."""

    eta: Any = 0.07
    density: Any = 0.3
    learning_rate: Any = 1e-4
    subspace: int = static(default=6)
    steps: int = static(default=400)
    scope: Scope = static(default="model")
    inclusive: bool = static(default=False)
    _ranks: Any = None

    @property
    def passes(self) -> tuple[Scope, ...]:
        return (self.scope,)

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Doge:
        if self.scope == "model":
            check_same_everywhere("density", self.density, experts)
        size = info.group_size if self.scope == "model" else info.size
        densities = per_expert(self.density, info, experts, "densities")
        ranks = [rank_words(kept_count(d, size, inclusive=self.inclusive)) for d in densities]
        return dataclasses.replace(super().at(info, experts), density=None, _ranks=ranks)

    def measure(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> OrderStatistic:
        ranks = jnp.stack([jnp.asarray(rank) for rank in self._ranks])[:, None]
        return OrderStatistic(tuple(jnp.abs(x - base) for x in experts), ranks)

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        deltas = [x - base for x in experts]
        shared = sharded_like(from_matrix(self.correction(self.matrices(base, experts, info)), info), base)
        merged = jnp.zeros_like(base)
        for factor, delta, limit in zip(self.factors(deltas), deltas, stats[0], strict=True):
            merged = merged + factor * jnp.where(jnp.abs(delta) >= limit[0], delta + shared, 0)
        return base + self.scale * merged

    def factors(self, deltas: list[Any]) -> list[Any]:
        """What each task vector is multiplied by, so that all have one norm in every tensor."""
        squares = [jnp.sum(delta * delta) for delta in deltas]
        return [jnp.where(square > 0, self.eta / jnp.sqrt(nonzero(square)), 0) for square in squares]

    def correction(self, deltas: list[Any]) -> Any:
        """The correction of one matrix, from the task vectors as (out, in)."""
        factors = self.factors(deltas)
        total = sum(factors[1:], factors[0])
        weighted = sum([f * d for f, d in zip(factors[1:], deltas[1:], strict=True)], factors[0] * deltas[0])
        conflicts = [jnp.sum(d * (d - weighted), axis=1, keepdims=True) for d in deltas]
        directions = shared_directions(deltas, min(deltas[0].shape) // self.subspace)

        def gradient(shared: Any) -> Any:
            slopes = [
                (conflict - total * jnp.sum(d * shared, axis=1, keepdims=True)) * d
                for conflict, d in zip(conflicts, deltas, strict=True)
            ]
            full = -2 * total * sum(slopes[1:], slopes[0])
            return full - dot(directions, dot(directions.T, full))

        return descend("adam", self.learning_rate, gradient, jnp.zeros_like(deltas[0]), self.steps)


def shared_directions(deltas: list[Any], count: int) -> Any:
    """Orthonormal columns, at most `count`, that the leading left singular vectors of all task vectors have most of.

    A column without a singular value would be arbitrary, and is zero.
    """
    rank = min(deltas[0].shape) // len(deltas)
    leading = jnp.concatenate([leading_svd(delta, rank)[0] for delta in deltas], axis=1)
    return leading_svd(leading, min(count, leading.shape[1]))[0] if rank else leading


def doge(
    scale: Coefficient = 1.0,
    *,
    eta: Coefficient = 0.07,
    density: Coefficient = 0.3,
    subspace: int = 6,
    steps: int = 400,
    learning_rate: Coefficient = 1e-4,
    scope: Scope = "model",
    inclusive: bool = False,
    factored: Factored = "matrices",
    others: Others = "mean",
) -> Method:
    r"""DOGE: task arithmetic with adaptive coefficients, after a shared correction by projected gradient descent.

    For each matrix, as (out, in), $c_i = \eta / \|\tau_i\|_F$; a correction $\delta$ starts at zero and takes steps of
    Adam down $\sum_j \|\operatorname{rowsum}(\tau_j \odot (\tau_j - \sum_i c_i (\tau_i + \delta)))\|^2$ with
    gradients $g - Q Q^\top g$; $\theta = \theta_0 + \lambda \sum_i c_i\, m_i \odot (\tau_i + \delta)$.

    Args:
        scale: $\lambda$, 1 as published; also of the tensors that are not factorised.
        eta: $\eta$, the norm that each task vector is brought to in each matrix.
        density: share of entries that the masks $m_i$ keep, the largest of $\tau_i$; in (0, 1], one or one per expert.
        subspace: $Q$ holds this fraction's share of the directions: the first $\lfloor \min(m, n) / 6 \rfloor$ left
            singular vectors of the experts' first $\lfloor \min(m, n) / K \rfloor$ ones, side by side.
        steps: how many steps of Adam.
        learning_rate: of Adam.
        scope: masks are cut over all factorised tensors of the `"model"` (as published) or over each `"tensor"`.
        inclusive: masks keep one entry more, as the published code does.
        factored: which tensors are matrices: `"matrices"`, or `"kernels"` (as for `tsv_m`).
        others: what becomes of the rest: their `"mean"` or `"sum"` task vector times `scale`, or the `"base"`.

    Raises:
        RecipeError: a density outside (0, 1], or numbers of steps or of the subspace that are too small.

    The published code merges the encoder's weights and leaves all else at the base. Derivatives take the cuts for
    constants. Source: arXiv 2501.01230; defaults are FusionBench's.
    """
    check_range("density", density, 0.0, 1.0, open_low=True)
    if steps < 0 or subspace < 1:
        raise RecipeError(
            f"doge: found steps={steps} and subspace={subspace}, expected 0 or more steps and a subspace of 1 or more"
        )
    return Doge(
        coefficient(scale),
        1.0,
        factored,
        others,
        coefficient(eta),
        coefficient(density),
        coefficient(learning_rate),
        subspace,
        steps,
        scope,
        inclusive,
    )
