"""Positions among task vectors: directions that add up to one, and how far to go along their mix."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import learnable, per_expert
from jaxmerge.methods.method import pytree
from jaxmerge.methods.stages import Chain, Stage, TaskVectors, chain
from jaxmerge.methods.task_arithmetic import Scale, total
from jaxmerge.trees.info import TensorInfo


@pytree
class WeighSoftmax(Stage):
    """Weighs task vectors by the softmax of numbers."""

    logits: Any = 0.0

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> WeighSoftmax:
        return dataclasses.replace(self, logits=per_expert(self.logits, info, experts, "logits"))

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        weights = jax.nn.softmax(jnp.stack([jnp.asarray(x, vectors.weights.dtype) for x in self.logits]))
        deltas = tuple(w * delta for w, delta in zip(weights, vectors.deltas, strict=True))
        return vectors.replace(deltas=deltas, weights=vectors.weights * weights)


def self_positioning(scale: float = 1.0, *, per: Literal["task", "tensor"] = "task") -> Chain:
    r"""A position among the experts, to be learned from a small probe set: a mix of task vectors, and how far to go.

    $\theta = \theta_0 + \lambda \sum_i \alpha_i \tau_i$ with $\alpha = \mathrm{softmax}(a)$, which starts at the mean.
    `jm.learn` learns $a$ and $\lambda$ by any loss.

    Args:
        scale: $\lambda$ to start from.
        per: one $\alpha_i$ per `"task"`, or per `"tensor"` and task.

    Source: Self-Positioning, arXiv 2410.15035, of which we have read the abstract only; the softmax is ours.
    """
    if per not in ("task", "tensor"):
        raise RecipeError(f"per is {per!r}, expected 'task' or 'tensor'")
    distance = learnable(scale, per_tensor=False, per_expert=False)
    return chain(WeighSoftmax(learnable(0.0, per_tensor=per == "tensor")), total(), Scale(distance))
