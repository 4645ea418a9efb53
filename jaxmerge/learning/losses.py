"""What coefficients may be learned by, and within which bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Loss = Callable[[Any, Any], Any]
"""`(params, batch) -> scalar`."""

Constraint = Callable[[Any], Any]
"""An array of coefficients, `[tensors, experts]` or smaller, to the nearest one that is allowed."""


def entropy(apply: Callable[[Any, Any], Any], *, normalize: bool = False) -> Loss:
    r"""A loss that needs no labels: how undecided a classifier is, summed over tasks.

    $\sum_t \mathrm{mean}_x H(\mathrm{softmax} f_t(x))$ with $H(p) = -\sum_c p_c \log p_c$, from log-softmax, so nothing
    underflows. A class whose logit is $-\infty$ does not take part.

    Args:
        apply: `(params, batch) -> logits` `[..., classes]`, or a dict (any pytree) of such arrays, one per task.
        normalize: divide each task's entropy by the logarithm of its number of classes, so that tasks with many classes
            do not outweigh the others (not in the paper).

    Returns:
        A loss for `learn`: a function `(params, batch) -> scalar`.

    Source: AdaMerging, arXiv 2310.02575, §3.2. FusionBench adds 1e-8 within the logarithm, which moves the result by
    less than that times the number of classes.
    """

    def loss(params: Any, batch: Any) -> Any:
        tasks = jax.tree.leaves(apply(params, batch))
        parts = [mean_entropy(x) / (math.log(x.shape[-1]) if normalize and x.shape[-1] > 1 else 1) for x in tasks]
        return sum(parts[1:], parts[0])

    return loss


def mean_entropy(logits: Float[Array, "*batch classes"]) -> Float[Array, ""]:
    """The mean entropy of the distributions that logits stand for, in float32 at least."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_p = jax.nn.log_softmax(logits, axis=-1)
    impossible = log_p == -jnp.inf  # 0 log 0 is 0
    terms = jnp.exp(log_p) * jnp.where(impossible, 0, log_p)
    return -jnp.mean(jnp.sum(terms, axis=-1))


def box(low: float = 0.0, high: float = 1.0) -> Constraint:
    """A constraint for `learn`: every coefficient within an interval.

    The published code of AdaMerging clamps to [0, 1] when it merges, and lets what it optimises wander outside; this
    one moves back what is optimised.

    Args:
        low: the least.
        high: the greatest.
    """
    return lambda values: jnp.clip(values, low, high)


def simplex(total: float = 1.0) -> Constraint:
    """A constraint for `learn`: the coefficients of a tensor are not negative and add up to a number.

    The nearest such point is found by sorting. Arrays without an axis of experts must not be constrained by it.

    Args:
        total: what the last axis adds up to.
    """

    def project(values: Float[Array, "*tensors experts"]) -> Float[Array, "*tensors experts"]:
        ordered = jnp.flip(jnp.sort(values, axis=-1), axis=-1)
        excess = jnp.cumsum(ordered, axis=-1) - total
        count = jnp.arange(1, values.shape[-1] + 1, dtype=values.dtype).reshape((1,) * (values.ndim - 1) + (-1,))
        kept = jnp.sum(ordered * count > excess, axis=-1, keepdims=True)
        shift = jnp.take_along_axis(excess, kept - 1, axis=-1) / kept.astype(values.dtype)
        return jnp.maximum(values - shift, 0)

    return project
