"""LiNeS (arXiv 2410.17146): scale the merged task vector with depth, so that shallow layers stay near the base."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Coefficient, at_tensor, coefficient
from jaxmerge.methods.measurements import Scope, Total
from jaxmerge.methods.method import pytree, static
from jaxmerge.methods.stages import Chain, Stage, TaskVectors, chain
from jaxmerge.methods.task_arithmetic import nonzero, task_arithmetic
from jaxmerge.trees.info import TensorInfo


@pytree
class ScaleByDepth(Stage):
    """See `scale_by_depth`."""

    alpha: Any
    beta: Any
    num_layers: int | None = static(default=None)
    _depth: Any = None

    @property
    def measures(self) -> Scope | None:
        return "model" if self.alpha is None else None

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> ScaleByDepth:
        count = self.num_layers or info.num_layers
        depth = 0.0 if info.layer is None or count < 2 else info.layer / (count - 1)
        alpha = None if self.alpha is None else at_tensor(self.alpha, info)
        return dataclasses.replace(self, alpha=alpha, beta=at_tensor(self.beta, info), _depth=depth)

    def measure(self, vectors: TaskVectors, info: TensorInfo) -> Total:
        original = sum(vectors.original[1:], vectors.original[0])
        return Total((jnp.sum(jnp.abs(original)), jnp.sum(jnp.abs(_combined(self, vectors)))))

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        alpha = self.alpha
        if measured is not None:
            summed, merged = measured
            alpha = summed / nonzero(len(vectors.deltas) * merged)
        return vectors.replace(merged=(alpha + self.beta * self._depth) * _combined(self, vectors))


def _combined(stage: Stage, vectors: TaskVectors) -> Array:
    if vectors.merged is None:
        raise RecipeError(f"{stage!r} scales the merged task vector; put it after the stage that combines the experts")
    return vectors.merged


def scale_by_depth(alpha: Coefficient = None, beta: Coefficient = 1.0, *, num_layers: int | None = None) -> Stage:
    r"""Stage: multiplies the merged task vector by $\alpha + \beta\, \ell / (L - 1)$ in layer $\ell$ of $L$.

    Tensors outside any stack of layers, and stacks of one layer, get $\alpha$.

    Args:
        alpha: factor at the first layer. None measures it over the model:
            $\lVert \sum_i \tau_i \rVert_1 / (K \lVert \tau_{merged} \rVert_1)$.
        beta: what the last layer gets besides.
        num_layers: $L$, where it cannot be told from the names.

    Source: arXiv 2410.17146, equations 3 to 5. The layer is read from the structure of the name; the published code
    searches for `.0.`, `.1.`, … anywhere, so numbered sub-blocks can steal the index there.
    """
    return ScaleByDepth(None if alpha is None else coefficient(alpha), coefficient(beta), num_layers)


def lines(
    method: Chain | None = None,
    *,
    alpha: Coefficient = None,
    beta: Coefficient = 1.0,
    num_layers: int | None = None,
) -> Chain:
    """LiNeS on top of another task-vector method.

    Args:
        method: the method whose merged task vector is scaled; the plain sum of task vectors by default. With one expert
            and `alpha`, `beta = 1 - alpha` this is LiNeS for a single model.
        alpha: factor at the first layer; None measures it.
        beta: what the last layer gets besides; tuned like the scale of the base method.
        num_layers: number of layers, where it cannot be told from the names.

    Source: arXiv 2410.17146.
    """
    return chain(task_arithmetic(1.0) if method is None else method, scale_by_depth(alpha, beta, num_layers=num_layers))
