"""Against drift: entropy keeps falling when the answers no longer get better. Parts for `learn`, to be combined."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    import optax


def pull_to_start(strength: float) -> optax.GradientTransformation:
    r"""An optimizer's part that pulls coefficients back to where they started, as weight decay pulls to zero.

    It adds $s\,(\lambda - \lambda_0)$ to the gradient: `optimizer=optax.chain(jm.pull_to_start(0.1), optax.adam(1e-3))`
    minimises the loss plus $\frac{s}{2} \|\lambda - \lambda_0\|^2$. The start is kept in the optimizer's state, so a
    resumed run is pulled to the same place. Our own addition; no paper.

    Args:
        strength: $s$.
    """
    import optax

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("pull_to_start needs the coefficients; call update(gradients, state, params)")
        pulled = jax.tree.map(lambda g, p, s: g + jnp.asarray(strength, p.dtype) * (p - s), updates, params, state)
        return pulled, state

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.array, params), update)


def stop_when_flat(window: int = 50, tolerance: float = 1e-3) -> Callable[[int, float, Any], bool]:
    """A stopping rule without labels, for `on_step`: stop when the loss of unseen batches no longer falls.

    It compares the mean loss of the last `window` steps with that of the `window` before. Batches should come from
    data that is not repeated within a window. Our own rule; no paper.

    Args:
        window: number of steps to average over.
        tolerance: the least relative fall of the mean that is worth going on for.

    Returns:
        A function `(step, loss, state) -> whether to stop`, for one run.
    """
    losses: list[float] = []

    def flat(step: int, loss: float, state: Any) -> bool:
        losses.append(loss)
        del losses[: -2 * window]
        if len(losses) < 2 * window:
            return False
        before, after = sum(losses[:window]), sum(losses[window:])
        return before - after < tolerance * abs(before)

    return flat
