"""Weighted sums whose weights change along a tensor: what crossovers of models at split points add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Table
from jaxmerge.methods.dropping import positions
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.trees.info import TensorInfo

_LARGEST = 1 << 32


@pytree
class Segments(Method):
    """See `segments`."""

    weights: Any  # by tensor, then for one tensor: [S, K]
    starts: Any = static(default=())  # likewise: S flat positions
    experts: tuple[str, ...] = static(default=())

    def check(self, experts: tuple[str, ...], has_base: bool, tensors: Sequence[str]) -> None:
        super().check(experts, has_base, tensors)
        if set(experts) != set(self.experts):
            raise RecipeError(
                f"segments has weights for the experts {', '.join(self.experts)}, but these are {', '.join(experts)}; "
                "name them as they were named then"
            )

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Segments:
        if info.size >= _LARGEST:
            raise RecipeError(f"segments reaches 2^32 entries of a tensor; {info.name!r} has {info.size}")
        columns = np.array([self.experts.index(name) for name in experts])
        keys = self.weights.keys
        starts = self.starts[keys.index(info.name)] if info.name in keys else (0,)
        return Segments(self.weights.at(info)[:, columns], starts, experts)

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        first = experts[0]
        weights = jnp.asarray(self.weights, first.dtype)
        if len(self.starts) == 1:
            shares = list(weights[0])
        else:
            place = positions(first.shape, info)[0]
            segment = jnp.searchsorted(jnp.asarray(self.starts[1:], jnp.uint32), place, side="right")
            shares = [column[segment] for column in weights.T]
        return sum((w * x for w, x in zip(shares, experts, strict=True)), jnp.zeros_like(first))


def segments(tensors: Mapping[str, Sequence[tuple[int, Sequence[float]]]], *, experts: Sequence[str]) -> Method:
    r"""A weighted sum of the experts, with weights that change along each tensor.

    Entry $j$ of a tensor, which lies in segment $s(j)$, is $\theta_j = \sum_i w_{s(j),i}\, \theta_{i,j}$.

    `jm.evolve` gives its best model in this form, so that it can be merged again from the experts, streamed from disk,
    or have its weights learned.

    Args:
        tensors: for every tensor by name its segments: the flat position (row-major) of the first entry, and one weight
            per expert. The first segment starts at 0, positions grow.
        experts: the names of the experts that the weights belong to, in order.

    Raises:
        RecipeError: positions do not grow from 0, or there are not as many weights as experts.

    Source: crossover with split points, arXiv 2508.16204. That crossovers of crossovers add up to one weighted sum per
    segment is our observation: a spherical interpolation is a weighted sum once its angle is known.
    """
    names = tuple(experts)
    for tensor, runs in tensors.items():
        starts = [start for start, _ in runs]
        if starts[:1] != [0] or any(b <= a for a, b in zip(starts[:-1], starts[1:], strict=True)):
            raise RecipeError(f"segments of {tensor!r} start at {starts}, expected positions that grow from 0")
        for start, weights in runs:
            if len(weights) != len(names):
                raise RecipeError(
                    f"segment {start} of {tensor!r} has {len(weights)} weights, expected {len(names)}, one per expert "
                    f"({', '.join(names)})"
                )
    weights = Table(tuple(tensors), tuple(np.array([w for _, w in runs], np.float32) for runs in tensors.values()))
    return Segments(weights, tuple(tuple(int(s) for s, _ in runs) for runs in tensors.values()), names)
