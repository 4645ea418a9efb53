"""Arcee Fusion: takes from the second model the entries that changed much, in fibres whose softmax profile moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.errors import RecipeError
from jaxmerge.methods.measurements import OrderStatistic
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.selection import rank_words
from jaxmerge.methods.spherical import Fibres, fibre_axes
from jaxmerge.trees.info import TensorInfo

if TYPE_CHECKING:
    from jaxtyping import Array


@pytree
class ArceeFusion(Method):
    """See `arcee_fusion`."""

    axis: Fibres = static(default="input")

    needs_base = True
    whole_tensor = True
    passes = ("tensor",)  # pyright: ignore[reportAssignmentType]

    def check(self, experts: tuple[str, ...], has_base: bool, tensors: Sequence[str]) -> None:
        super().check(experts, has_base, tensors)
        if len(experts) != 1:
            raise RecipeError(f"{self!r} fuses one expert into the base: found {len(experts)} experts, expected 1")

    def measure(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> OrderStatistic:
        quartiles = [info.size - int(q * (info.size - 1)) for q in (0.25, 0.5, 0.75)]
        ranks = jnp.asarray(rank_words(np.array(quartiles)))
        return OrderStatistic((self._importance(base, experts[0], info),), ranks[None])

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        first, median, third = stats[0][0]
        chosen = self._importance(base, experts[0], info) >= median + 1.5 * (third - first)
        return jnp.where(chosen, experts[0], base)

    def _importance(self, base: Any, expert: Any, info: TensorInfo) -> Any:
        axes = fibre_axes(self.axis, info)
        return jnp.abs(expert - base) * _divergence(base, expert, axes)


_ADDED = 1e-8  # to every probability, as in mergekit


def _divergence(base: Any, expert: Any, axes: tuple[int, ...] | None) -> Any:
    """KL(P || Q) of the softmax of the expert, P, and of the base, Q, along the axes, which are kept.

    Both are nearly equal, so the sum of P log(P / Q) would be the rounding of terms that cancel. With r = P / Q - 1 it
    is the sum of Q ((1 + r) log(1 + r) - r), none of whose terms is negative.
    """
    p, q = (jax.nn.softmax(x, axes) for x in (expert, base))
    raised = q + _ADDED
    r = (p - q) / raised
    near = jnp.abs(r) < 0.1
    series = r * r * (1 / 2 - r * (1 / 6 - r * (1 / 12 - r / 20)))
    far = jnp.where(near, 0, r)
    return jnp.sum(raised * jnp.where(near, series, (1 + far) * jnp.log1p(far) - far), axes, keepdims=True)


def arcee_fusion(*, axis: Fibres = "input") -> Method:
    r"""Arcee Fusion: swaps in the entries of an expert that stand out.

    With $P$ and $Q$ the softmax of the expert and of the base along each fibre, an entry's importance is
    $|\theta_1 - \theta_0| \cdot \mathrm{KL}(P \,\|\, Q)$. Entries of a tensor whose importance reaches the median plus
    1.5 times the distance between the quartiles are the expert's, the others the base's.

    Args:
        axis: along what a fibre runs: the `"input"` axes (one fibre per output unit), the `"output"` axes, an axis by
            number (-1 as in mergekit), or None for the whole tensor. Vectors are one fibre.

    Quartiles are entries, of index $\lfloor q (n - 1) \rfloor$ in ascending order. mergekit samples the importance of
    more than a million entries, and sums divergences so that small changes are mostly rounding; here every entry
    counts, and divergences keep their digits. Source: mergekit `arcee_fusion` (no paper).
    """
    return ArceeFusion(axis)
