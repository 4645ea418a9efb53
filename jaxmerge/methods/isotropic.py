"""Isotropic merging (arXiv 2502.04959): the merged matrices move equally far in each of their directions.

Iso-C flattens the spectrum of the summed task vectors; Iso-CTS first replaces the weakest directions of the sum by the
strongest directions that each task has outside of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmerge.methods.coefficients import Coefficient, check_range, coefficient
from jaxmerge.methods.factorisation import dot, leading_svd, polar
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.spectral import Factored, Others, Spectral
from jaxmerge.methods.task_arithmetic import nonzero
from jaxmerge.trees.info import TensorInfo


@pytree
class IsoC(Spectral):
    """See `iso_c`."""

    def merge_matrices(self, deltas: list[Float[Array, "m n"]]) -> Float[Array, "m n"]:
        return self._flattened(deltas)[0]

    def notes(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> dict[str, Array]:
        """`directions`: how many have been flattened, the numerical rank; `directions_at_most`: min(m, n)."""
        deltas = self.matrices(base, experts, info)
        count = self._flattened(deltas)[1]
        return {"directions": count, "directions_at_most": jnp.asarray(min(deltas[0].shape), jnp.int32)}

    def _flattened(self, deltas: list[Any]) -> tuple[Any, Any]:
        """The merged matrix, and how many singular values it has."""
        total = sum(deltas[1:], deltas[0])
        factor = polar(total)
        count = jnp.round(jax.lax.stop_gradient(jnp.sum(factor * factor)))
        mean = jnp.sum(factor * total) / nonzero(count)  # the inner product with the polar factor is the sum of them
        return mean * factor, count.astype(jnp.int32)


@pytree
class IsoCts(IsoC):
    """See `iso_cts`."""

    common: float = static(default=0.8)

    def _flattened(self, deltas: list[Any]) -> tuple[Any, Any]:
        total: Any = sum(deltas[1:], deltas[0])
        size, experts = min(total.shape), len(deltas)
        own = min(round((size - int(self.common * size)) / experts), size // experts)  # directions of each task
        shared = size - own * experts
        parts = [leading_svd(total, shared)]
        common = parts[0][0]
        for delta in deltas if own else ():
            rest, norm = delta - dot(common, dot(common.T, delta)), jnp.sqrt(nonzero(jnp.sum(delta * delta)))
            parts.append(leading_svd(rest, own, norm))
        u, s, v = (jnp.concatenate(each, axis=-1) for each in zip(*parts, strict=True))
        count = jnp.sum(s > 0)
        mean = jnp.sum(s) / nonzero(count.astype(s.dtype))
        return mean * dot(polar(u), polar(v).T), count.astype(jnp.int32)


def iso_c(
    scale: Coefficient = 1.0, *, weights: Coefficient = None, factored: Factored = "matrices", others: Others = "mean"
) -> Method:
    r"""Iso-C: the sum of task vectors with all singular values of a matrix replaced by their mean.

    $\sum_i w_i \tau_i = U S V^\top$ and $\theta = \theta_0 + \alpha\, \bar s\, U V^\top$, over the numerical rank.

    Args:
        scale: $\alpha$; 1, or tuned on held-out data, up to 3 in the published code.
        weights: $w_i$, factors of the task vectors; 1 by default.
        factored: as for `tsv_m`.
        others: as for `tsv_m`.

    Singular values up to `16 eps` of the largest count as zero, and $\bar s$ is the mean of those above. The
    published code gives the mean over min(m, n) to all directions, also to the arbitrary ones of a sum without full
    rank (of a few low-rank adapters, say). A report notes the `directions` kept. Source: arXiv 2502.04959.
    """
    return IsoC(coefficient(scale), 1.0 if weights is None else coefficient(weights), factored, others)


def iso_cts(
    common: float = 0.8,
    scale: Coefficient = 1.0,
    *,
    weights: Coefficient = None,
    factored: Factored = "matrices",
    others: Others = "mean",
) -> Method:
    r"""Iso-CTS: Iso-C on the strongest directions of the sum and, outside of them, the strongest of each task.

    With $n = \min$ of the matrix's sides, the $n - K q$ leading directions of $\sum_i w_i \tau_i$ are kept, where
    $q = \mathrm{round}((n - \lfloor f n \rfloor) / K)$; each task adds the $q$ leading ones of what it has outside of
    their left space. $\theta = \theta_0 + \alpha\, \bar s\, \mathrm{polar}(U)\, \mathrm{polar}(V)^\top$.

    Args:
        common: $f$, the share of common directions; part of the method's structure, not a coefficient. 1 is Iso-C.
        scale: as for `iso_c`.
        weights: as for `iso_c`.
        factored: as for `tsv_m`.
        others: as for `tsv_m`.

    Only the left common space, that of outputs, is projected out, as published. Directions without a singular value
    get nothing, as in `iso_c`, where the published code lets an expert without a change add arbitrary ones.
    Source: arXiv 2502.04959.
    """
    check_range("common", common, 0.0, 1.0)
    return IsoCts(coefficient(scale), 1.0 if weights is None else coefficient(weights), factored, others, common)
