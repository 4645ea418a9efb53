"""T3 (arXiv 2510.27265): a generalist and a specialist mixed anew for every input, by how much they disagree on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmerge.errors import RecipeError, ShapeError
from jaxmerge.learning.layers import follow
from jaxmerge.trees.checks import check_same_tensors, is_mergeable
from jaxmerge.trees.paths import Params, named_leaves, with_leaves
from jaxmerge.trees.task_vectors import accumulation_dtype


def jensen_shannon(logits: Float[Any, "*batch classes"], other: Float[Any, "*batch classes"]) -> Float[Array, "*batch"]:
    r"""The Jensen-Shannon divergence of the softmaxes of two arrays of logits, in nats: from 0 to $\ln 2$.

    Args:
        logits: of one model.
        other: of the other.
    """
    logits, other = (jnp.asarray(x, accumulation_dtype(x.dtype)) for x in (logits, other))
    log_p, log_q = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(other, axis=-1)
    log_m = jnp.logaddexp(log_p, log_q) - math.log(2)

    def to_middle(log_p: Any) -> Any:
        impossible = log_p == -jnp.inf  # 0 log 0 is 0
        return jnp.sum(jnp.where(impossible, 0, jnp.exp(log_p) * (log_p - jnp.where(impossible, 0, log_m))), axis=-1)

    return jnp.clip((to_middle(log_p) + to_middle(log_q)) / 2, 0, math.log(2))


def t3_weights(
    generalist: Float[Any, "batch ..."],
    specialist: Float[Any, "batch ..."],
    *,
    gamma: float | None = None,
    centre: float = 0.0,
    low: float = 0.0,
    high: float = 1.0,
) -> Float[Array, " batch"]:
    r"""The interpolation weights of T3: $\lambda = \lambda_0 + (\lambda_1 - \lambda_0)\, s(D)$, one per example.

    $D$ is the Jensen-Shannon divergence of the two models' predictions, averaged over an example's predictions.

    Args:
        generalist: logits of one model, `[B, …, classes]`.
        specialist: logits of the other.
        gamma: with a number, $s(D) = \sigma(\gamma\, (D - c))$, as published for $c = 0$. None takes $s(D) = D / \ln 2$
            (ours), which uses the whole range.
        centre: $c$.
        low: $\lambda_0$.
        high: $\lambda_1$.

    The published $\gamma = 0.5$ hardly mixes: $D \le \ln 2$, so $s$ runs from 0.5 to 0.586 only, and never below 0.5
    for any $\gamma > 0$. It is therefore no default. Source: arXiv 2510.27265, formula by the authors' description.
    """
    if generalist.shape != specialist.shape:
        raise ShapeError(
            f"logits of shapes {generalist.shape} and {specialist.shape}, expected the same from both models"
        )
    divergence = jensen_shannon(generalist, specialist)
    divergence = jnp.mean(divergence.reshape(divergence.shape[0], -1), axis=1)
    share = divergence / math.log(2) if gamma is None else jax.nn.sigmoid(gamma * (divergence - centre))
    return low + (high - low) * share


def t3(
    apply: Callable[[Params, Any], Any],
    generalist: Params,
    specialist: Params,
    inputs: Any,
    *,
    weighs: Literal["generalist", "specialist"],
    per: Literal["batch", "sample"] = "batch",
    gamma: float | None = None,
    centre: float = 0.0,
    low: float = 0.0,
    high: float = 1.0,
) -> tuple[Any, Float[Array, " batch"]]:
    r"""T3: predicts with weights that are interpolated anew for every batch or example, without training.

    Both models predict; their disagreement gives $\lambda$ (`t3_weights`); the model
    $\lambda\,\theta_a + (1 - \lambda)\,\theta_b$ predicts again, where `weighs` says which one $\theta_a$ is.

    Args:
        apply: `(params, inputs) -> logits`, `[B, …, classes]`.
        generalist: parameters of the pre-trained model.
        specialist: parameters of the fine-tuned one.
        inputs: arrays with the examples along the first axis.
        weighs: which model $\lambda$ weighs, so which one is leant on where both disagree. The paper's text speaks for
            `"generalist"`; the formula that we know does not say it, so there is no default.
        per: one mean $\lambda$ for the `"batch"`, as one merged model; or one per `"sample"`, without a model for each:
            a product with mixed kernels is the mix of the products,
            $x(\lambda W_a + (1-\lambda) W_b) = \lambda\, xW_a + (1-\lambda)\, xW_b$, at twice the arithmetic.
        gamma: as for `t3_weights`, like the three that follow.
        centre: $c$.
        low: $\lambda_0$.
        high: $\lambda_1$.

    Returns:
        The logits and $\lambda$ `[B]` (equal numbers per batch). It is a JAX function of models and inputs.

    Raises:
        StructureError, ShapeError, DTypeError: the models differ.
        RecipeError: `weighs` or `per` is none of those, or the bounds are not in [0, 1].

    Source: arXiv 2510.27265. The authors' code was not to be had, so this is not compared with it.
    """
    if weighs not in ("generalist", "specialist"):
        raise RecipeError(f"weighs is {weighs!r}, expected 'generalist' or 'specialist'")
    if per not in ("batch", "sample"):
        raise RecipeError(f"per is {per!r}, expected 'batch' or 'sample'")
    if not 0 <= low <= high <= 1:
        raise RecipeError(f"low is {low} and high is {high}, expected 0 <= low <= high <= 1")
    own, other = named_leaves(generalist), named_leaves(specialist)
    check_same_tensors(own, {"specialist": other}, "the generalist")
    logits = [apply(model, inputs) for model in (generalist, specialist)]
    weights = t3_weights(*logits, gamma=gamma, centre=centre, low=low, high=high)
    pair = (generalist, specialist) if weighs == "generalist" else (specialist, generalist)

    if per == "batch":
        weight = jnp.mean(weights)
        a, b = map(named_leaves, pair)
        mixed = {name: _mix(weight, (x, b[name])) if is_mergeable(x) else own[name] for name, x in a.items()}
        return apply(with_leaves(generalist, mixed), inputs), jnp.broadcast_to(weight, weights.shape)

    def of_example(weight: Any, example: Any) -> Any:
        one = jax.tree.map(lambda x: x[None], example)
        return follow(apply, pair, one, combine=lambda values: _mix(weight, values))[0][0]

    return jax.vmap(of_example)(weights, jax.tree.map(jnp.asarray, inputs)), weights


def _mix(weight: Any, values: tuple[Any, ...]) -> Any:
    """`weight * a + (1 - weight) * b` in float32 at least and cast back. At 0 and 1 it is one of them, bit for bit."""
    a, b = values
    dtype = accumulation_dtype(a.dtype)
    weight = weight.astype(dtype)
    return (weight * a.astype(dtype) + (1 - weight) * b.astype(dtype)).astype(a.dtype)
