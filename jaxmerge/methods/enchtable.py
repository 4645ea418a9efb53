"""EnchTable (arXiv 2511.09880): adds a safety task vector to a fine-tuned model, less where the two interfere."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Coefficient, check_range, coefficient
from jaxmerge.methods.factorisation import dot, leading_svd
from jaxmerge.methods.measurements import Scope, Total
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.spectral import Factored, as_matrix, is_factored, unsharded
from jaxmerge.methods.task_arithmetic import nonzero
from jaxmerge.trees.info import TensorInfo


@pytree
class Enchtable(Method):
    """See `enchtable`."""

    beta: Any = 0.1
    gain: Any = 200.0
    safety: str = static(default="safety")
    rank_share: float = static(default=0.5)
    factored: Factored = static(default="matrices")
    _index: int = static(default=1)

    needs_base = True
    whole_tensor = True
    in_one_place = True

    @property
    def passes(self) -> tuple[Scope, ...]:
        return () if self.beta is None else ("model",)

    def check(self, experts: tuple[str, ...], has_base: bool, tensors: Sequence[str]) -> None:
        super().check(experts, has_base, tensors)
        if len(experts) != 2:
            raise RecipeError(f"enchtable merges a task model and a safety model: found {len(experts)}, expected 2")
        if self.safety not in experts:
            raise RecipeError(
                f"enchtable: no expert is named {self.safety!r}; there are {', '.join(experts)}; name the safety model "
                "with safety="
            )

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Enchtable:
        return dataclasses.replace(super().at(info, experts), safety="", _index=experts.index(self.safety))

    def measure(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Total:
        return Total(jnp.stack([jnp.sum(delta * delta) for delta in self._vectors(base, experts)]))

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        task, safety = self._vectors(base, experts)
        if self.beta is not None:
            of_task, of_safety = stats[0]
            safety = self.beta * jnp.where(of_task > 0, jnp.sqrt(nonzero(of_task) / nonzero(of_safety)), 0) * safety
        if is_factored(info, self.factored):
            a, b = (as_matrix(unsharded(delta), info) for delta in (task, safety))
            safety = jnp.exp(-self.gain * interference(a, b, self.rank_share)) * safety
        return base + task + safety

    def _vectors(self, base: Any, experts: list[Any]) -> tuple[Any, Any]:
        """The task vectors of the task model and the safety model."""
        return experts[1 - self._index] - base, experts[self._index] - base


def interference(a: Float[Array, "m n"], b: Float[Array, "m n"], rank_share: float) -> Float[Array, ""]:
    r"""How much the leading singular directions of two matrices interfere, in the units of the matrices.

    $\mathrm{mean}\,|(U^\top U - 1)\, \Sigma\, (V^\top V - 1)|$ with the leading singular triplets of both side by side
    in $U$, $\Sigma$ and $V$. Those of one matrix are orthogonal, so only products between the two are computed.

    Args:
        a: a matrix.
        b: another.
        rank_share: share of the min(m, n) singular values that lead.
    """
    rank = int(rank_share * min(a.shape))
    (u, s, v), (w, t, z) = (leading_svd(matrix, rank) for matrix in (a, b))
    left, right = dot(u.T, w), dot(v.T, z)
    crossed = jnp.sum(jnp.abs(dot(left * t[None, :], right.T))) + jnp.sum(jnp.abs(dot(left.T * s[None, :], right)))
    return crossed / max(2 * rank, 1) ** 2


def enchtable(
    beta: Coefficient = 0.1,
    *,
    safety: str = "safety",
    rank_share: float = 0.5,
    gain: Coefficient = 200.0,
    factored: Factored = "matrices",
) -> Method:
    r"""EnchTable: a task model plus a safety task vector, damped in each matrix by how much the two interfere.

    $\tau_s' = \beta\, \frac{\lVert\tau_t\rVert}{\lVert\tau_s\rVert}\, \tau_s$ with norms over the model; in a matrix
    $I = \mathrm{mean}\,|(U^\top U - 1)\, \Sigma\, (V^\top V - 1)|$ over the leading singular triplets of $\tau_t$ and
    $\tau_s'$ side by side; $\theta = \theta_0 + \tau_t + e^{-g I} \tau_s'$. Other tensors are not damped.

    Args:
        beta: $\beta$, the size of the safety task vector relative to that of the task; 0.1 in the published code.
            None leaves it as it is, which is the published code with its adaptive size switched off.
        safety: the name of the expert that is the safety model; the other one is the task model.
        rank_share: share of the singular triplets that lead.
        gain: $g$; 200 is fixed in the published code. $I$ has the units of the weights, so it is not free of scale.
        factored: as for `tsv_m`.

    Merges two experts. The safety model is made by other means. Source: arXiv 2511.09880; formulas are those of its
    published code.
    """
    check_range("rank_share", rank_share, 0.0, 1.0)
    return Enchtable(coefficient(beta), coefficient(gain), safety, rank_share, factored)
