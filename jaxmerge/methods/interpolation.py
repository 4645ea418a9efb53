"""Interpolation between two models: SLERP (Shoemake 1985) and NearSwap.

The two models are the base and the one expert, or, without a base, two experts in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Coefficient, coefficient
from jaxmerge.methods.measurements import Scope, Total
from jaxmerge.methods.method import Method, pytree
from jaxmerge.methods.task_arithmetic import nonzero
from jaxmerge.trees.info import TensorInfo


class _Pair(Method):
    def check(self, experts: tuple[str, ...], has_base: bool, tensors: Sequence[str]) -> None:
        super().check(experts, has_base, tensors)
        if len(experts) + has_base != 2:
            found = f"{'a base and ' if has_base else ''}{len(experts)} expert{'s' * (len(experts) != 1)}"
            raise RecipeError(
                f"{self!r} goes between two models: found {found}, expected a base and one expert, or two experts"
            )


@pytree
class Slerp(_Pair):
    """See `slerp`."""

    t: Any

    @property
    def passes(self) -> tuple[Scope, ...]:
        return ("tensor",)

    def measure(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Total:
        a, b = _pair(base, experts)
        return Total((jnp.sum(a * a), jnp.sum(a * b), jnp.sum(b * b)))

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        a, b = _pair(base, experts)
        aa, ab, bb = stats[0]
        # A vector of norm 1e-8 or less is not normalised, as in mergekit and FusionBench.
        lengths = jnp.where(aa > 1e-16, jnp.sqrt(nonzero(aa)), 1) * jnp.where(bb > 1e-16, jnp.sqrt(nonzero(bb)), 1)
        cosine = ab / lengths
        straight = jnp.abs(cosine) > 0.9995
        angle = jnp.arccos(jnp.where(straight, 0, jnp.clip(cosine, -1, 1)))
        of_a = jnp.where(straight, 1 - self.t, jnp.sin((1 - self.t) * angle) / jnp.sin(angle))
        of_b = jnp.where(straight, self.t, jnp.sin(self.t * angle) / jnp.sin(angle))
        return of_a * a + of_b * b


@pytree
class Nearswap(_Pair):
    """See `nearswap`."""

    t: Any

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        a, b = _pair(base, experts)
        share = jnp.clip(self.t / jnp.maximum(jnp.abs(a - b), 1e-6), 0, 1)
        return share * b + (1 - share) * a


def _pair(base: Any, experts: list[Any]) -> tuple[Any, Any]:
    return (experts[0], experts[1]) if base is None else (base, experts[0])


def slerp(t: Coefficient = 0.5) -> Method:
    r"""Spherical interpolation of two models, each tensor as one vector.

    With $\varphi$ the angle between the tensors: $\theta = [\sin((1-t)\varphi)\, a + \sin(t\varphi)\, b] /
    \sin\varphi$, and a straight line where $|\cos\varphi| > 0.9995$ (which most tensors of fine-tuned siblings meet).

    Args:
        t: 0 gives the base (or first expert), 1 the other.

    Source: Shoemake 1985; thresholds as in mergekit and FusionBench. Norms are computed in float32.
    """
    return Slerp(coefficient(t))


def nearswap(t: Coefficient) -> Method:
    r"""Moves towards the second model where both are already close.

    Entry by entry: $\theta = r b + (1 - r) a$ with $r = \min(t / |a - b|, 1)$.

    Args:
        t: distance, in units of the weights, up to which an entry becomes the second model's.

    Source: mergekit `nearswap` (no paper). Distances below 1e-6 count as 1e-6.
    """
    return Nearswap(coefficient(t))
