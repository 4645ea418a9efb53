"""SCE (arXiv 2408.07990): select what varies between experts, calculate weights from energies, erase minority signs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmerge.methods.coefficients import Coefficient, check_range, coefficient
from jaxmerge.methods.measurements import Measurement, OrderStatistic, Total
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.selection import rank_words
from jaxmerge.methods.task_arithmetic import nonzero
from jaxmerge.trees.info import TensorInfo


@pytree
class Sce(Method):
    """See `sce`."""

    density: Any
    scale: Any = 1.0
    min_energy: float = static(default=0.0)

    needs_base = True
    passes = ("tensor", "tensor", "tensor")  # pyright: ignore[reportAssignmentType]

    def measure(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Measurement:
        deltas = [x - base for x in experts]
        if len(stats) == 2:
            return Total(jnp.stack([jnp.sum(d * d) for d in self._selected(deltas, stats)]))
        variance = _variance(deltas)
        if not stats:
            return Total(jnp.sum(variance != 0, dtype=jnp.int32))
        # Rounded to a float also where the sum over chunks is exact, so that the rank is the same either way.
        varying = stats[0].astype(variance.dtype)
        rank = jnp.floor(varying * jax.lax.stop_gradient(self.density) * (1 + 2.0**-22))
        return OrderStatistic((variance,), rank_words(rank)[None, None])

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        deltas = self._selected([x - base for x in experts], stats)
        energies = stats[2]
        total = jnp.sum(energies)
        shares = jnp.where(total / info.size > self.min_energy, energies / nonzero(total), 1 / len(deltas))
        positive = sum(deltas[1:], deltas[0]) >= 0
        agree = [jnp.where(positive, d > 0, d < 0) for d in deltas]
        kept = [jnp.where(a, share, 0) for a, share in zip(agree, shares, strict=True)]
        merged = sum((w * d for w, d in zip(kept, deltas, strict=True)), jnp.zeros_like(base))
        return base + self.scale * merged / nonzero(sum(kept[1:], kept[0]))

    def _selected(self, deltas: list[Any], stats: tuple[Any, ...]) -> list[Any]:
        select = (_variance(deltas) >= stats[1][0, 0]) | (self.density >= 1)
        return [jnp.where(select, d, 0) for d in deltas]


def _variance(deltas: list[Any]) -> Any:
    """Over the experts, of each entry: exactly 0 where all agree, since it is taken relative to the first."""
    shifts = [d - deltas[0] for d in deltas]
    mean = sum(shifts[1:], shifts[0]) / len(deltas)
    squares = [(shift - mean) ** 2 for shift in shifts]
    return sum(squares[1:], squares[0]) / len(deltas)


def sce(density: Coefficient = 0.1, *, scale: Coefficient = 1.0, min_energy: float = 0.0) -> Method:
    r"""SCE: keeps the entries in which experts differ most, and merges them by energy and majority sign.

    With $\hat\tau_i$ the task vectors at the entries of the largest variance over the experts, $\gamma$ the sign of
    $\sum_i \hat\tau_i$, $A$ the experts that have it, and $\rho_i \propto \|\hat\tau_i\|^2$ for each tensor:
    $\theta = \theta_0 + \lambda \sum_{i \in A} \rho_i \hat\tau_i / \sum_{i \in A} \rho_i$.

    Args:
        density: share of a tensor's entries kept, of those that vary between the experts at all; in [0, 1]. The paper
            keeps 0.1. At 1 every entry is kept, also those in which all experts agree.
        scale: $\lambda$; the paper has none.
        min_energy: where the mean square of the kept entries, summed over the experts, does not exceed this, all
            experts weigh the same. mergekit has 1e-6, which most fine-tuning stays below.

    All entries that tie at the cut are kept. Source: arXiv 2408.07990, FuseChat.
    """
    check_range("density", density, 0.0, 1.0)
    return Sce(coefficient(density), coefficient(scale), min_energy)
