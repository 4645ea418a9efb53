"""WIDEN (arXiv 2408.03092): weighs experts that moved by very different amounts, by ranks within each expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from jaxmerge.methods.coefficients import Coefficient, coefficient
from jaxmerge.methods.method import Method, pytree
from jaxmerge.methods.sharding import on_whole
from jaxmerge.methods.task_arithmetic import nonzero
from jaxmerge.trees.info import TensorInfo

if TYPE_CHECKING:
    from jaxtyping import Array


@pytree
class Widen(Method):
    """See `widen`."""

    ratio: Any = 1.0
    calibration: Any = 1.0

    needs_base = True
    whole_tensor = True
    in_one_place = True

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        deltas = [x - base for x in experts]
        if base.ndim < 2:
            sizes = [jnp.abs(d) for d in deltas]
            weights = self._scores(sizes, [jnp.mean(s) for s in sizes])
        else:
            by_length, by_direction = zip(*[_changes(base, x, info.output_axes) for x in experts], strict=True)
            weights = [(a + b) / 2 for a, b in zip(self._by_rank(by_length), self._by_rank(by_direction), strict=True)]
        merged = base
        for weight, delta in zip(weights, deltas, strict=True):
            merged = merged + weight * delta
        return merged

    def _by_rank(self, changes: tuple[Any, ...]) -> list[Any]:
        size = changes[0].size
        ranks = [on_whole(_ranks, c) / size for c in changes]
        return self._scores(ranks, [(size - 1) / (2 * size)] * len(ranks))

    def _scores(self, significance: list[Any], means: list[Any]) -> list[Any]:
        """Softmax over the experts, and the calibration value where an expert is far above its own mean."""
        exponentials = [jnp.exp(s) for s in significance]
        total = sum(exponentials[1:], exponentials[0])
        return [
            jnp.where(s > mean * self.ratio, self.calibration, e / total)
            for s, e, mean in zip(significance, exponentials, means, strict=True)
        ]


def _changes(base: Any, expert: Any, axes: tuple[int, ...]) -> tuple[Any, Any]:
    """How far length and direction of each column, which runs along `axes`, have changed."""
    aa, ab, bb = (jnp.sum(x * y, axes, keepdims=True) for x, y in ((base, base), (base, expert), (expert, expert)))
    lengths = [jnp.where(square > 0, jnp.sqrt(nonzero(square)), 0) for square in (aa, bb)]
    return jnp.abs(lengths[1] - lengths[0]), 1 - ab / nonzero(lengths[0] * lengths[1])


def _ranks(changes: Any) -> Any:
    """The rank of each entry among all, from 0; equal ones by position."""
    return jnp.argsort(jnp.argsort(changes, axis=None)).reshape(changes.shape).astype(changes.dtype)


def widen(ratio: Coefficient = 1.0, *, calibration: Coefficient = 1.0) -> Method:
    r"""WIDEN: merges by how much each input column's length and direction changed, ranked within each expert.

    For each column of a matrix: $\Delta m = |\,\|W_i\| - \|W_0\|\,|$ and $\Delta d = 1 - \cos(W_i, W_0)$, as ranks
    $0, 1/n, …$ among the columns of the expert. The scores are the softmax of the ranks over the experts, and the
    calibration value where a rank is above its mean times the ratio; $w_i$ is the mean of both scores and
    $\theta = \theta_0 + \sum_i w_i \tau_i$. In vectors $|\tau_i|$ itself takes the place of the rank.

    Args:
        ratio: how far above the mean a rank must be for its column to be taken with the calibration value.
        calibration: the weight of such columns, 1 for all of the expert's change.

    Columns belong to inputs: tokens for an embedding. Equal changes are ranked by position. Source: arXiv 2408.03092.
    """
    return Widen(coefficient(ratio), coefficient(calibration))
