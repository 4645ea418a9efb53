"""Task singular vectors (arXiv 2412.00081): merging them without interference (TSV-M), and keeping few of them (TSV-C).

The singular vectors of a task vector's matrices are few and belong to the task. TSV-M takes the leading ones of every
task, makes them orthogonal across tasks and adds them up; TSV-C keeps the leading ones of one task as its compressed
form.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmerge.errors import RecipeError, StructureError
from jaxmerge.methods.coefficients import Coefficient, Table, check_range, check_rules, coefficient, is_plain_number
from jaxmerge.methods.factorisation import dot, leading_svd, polar
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.spectral import Factored, Others, Spectral, as_matrix, from_matrix, is_factored, matrix_shape
from jaxmerge.trees.checks import check_same_tensors, is_mergeable
from jaxmerge.trees.info import Rules, TensorInfo, tensor_infos
from jaxmerge.trees.paths import Params, named_leaves, with_leaves
from jaxmerge.trees.task_vectors import accumulation_dtype


@pytree
class TsvM(Spectral):
    """See `tsv_m`. Resolved for a tensor, `rank` is a number of singular values."""

    rank: Any = static(default=None)

    def check(self, experts: tuple[str, ...], has_base: bool, tensors: Sequence[str]) -> None:
        super().check(experts, has_base, tensors)
        check_rules(self.rank, tensors, experts)

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> TsvM:
        resolved = super().at(info, experts)
        size = min(matrix_shape(info))
        count = max(size // len(experts), 1) if resolved.rank is None else _count(resolved.rank, size)
        return dataclasses.replace(resolved, rank=count)

    def merge_matrices(self, deltas: list[Float[Array, "m n"]]) -> Float[Array, "m n"]:
        parts = [leading_svd(delta, self.rank) for delta in deltas]
        u, s, v = (jnp.concatenate(each, axis=-1) for each in zip(*parts, strict=True))
        return dot(polar(u) * s[None, :], polar(v).T)


def tsv_m(
    scale: Coefficient = 1.0,
    *,
    weights: Coefficient = None,
    rank: Any = None,
    factored: Factored = "matrices",
    others: Others = "mean",
) -> Method:
    r"""TSV-M: the leading singular vectors of every task, made orthogonal across tasks and summed.

    $w_i \tau_i \approx U_i \Sigma_i V_i^\top$ with $r$ singular values each; $U = [U_1 \dots U_K]$, $V$ and $\Sigma$
    likewise; $\theta = \theta_0 + \alpha\, \mathrm{polar}(U)\, \Sigma\, \mathrm{polar}(V)^\top$.

    Args:
        scale: $\alpha$; 1 is close to the best in the paper.
        weights: $w_i$, factors of the task vectors; 1 by default. With `rank` it is what a variant with weights and
            ranks by task and matrix sets, such as R-TSVM (arXiv 2502.06876), whose formulas are not here.
        rank: $r$, a number of singular values or a share (a float in (0, 1]) of all min(m, n); or `{pattern: rank}`.
            None: min(m, n) // K. Part of the method's structure, not a coefficient. At least one is kept.
        factored: `"matrices"` factorises every tensor with two axes; `"kernels"` every kernel, with the window and
            input axes of convolutions joined, and no embedding.
        others: what becomes of the rest: their `"mean"` or `"sum"` task vector times `scale`, or the `"base"`.

    Raises:
        RecipeError: a rank is neither a positive number of singular values nor a share.

    With more experts than min(m, n) the published code keeps no singular value and loses the matrix's update. An
    expert that did not change a matrix adds no direction to it. Source: arXiv 2412.00081.
    """
    rank = coefficient(rank)
    for value in rank.values if isinstance(rank, Table) else () if rank is None else (rank,):
        if not is_plain_number(value):
            raise RecipeError(f"rank is {value!r}, expected a plain number, or {{pattern: number}}: it decides shapes")
        _count(value, 1)
    return TsvM(coefficient(scale), 1.0 if weights is None else coefficient(weights), factored, others, rank)


def _count(rank: Any, size: int) -> int:
    """The number of singular values that a rank, as users give it, is of a matrix with `size` of them."""
    if isinstance(rank, int | np.integer):
        if rank < 1:
            raise RecipeError(f"rank is {rank}, expected at least 1 singular value, or a share as a float in (0, 1]")
        return min(int(rank), size)
    check_range("rank", rank, 0.0, 1.0, open_low=True)
    return max(int(rank * size), 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class LowRankTaskVector:
    """A task vector whose matrices are kept as products of two factors: made by `compress_tsv`, a pytree.

    `jm.save_checkpoint` saves it like parameters, `from_params` takes what was read, and `jm.cast` makes the factors
    half as large.

    Attributes:
        left: tensor name → `[m, r]`, left singular vectors times singular values; m counts outputs, or tokens. A
            layer-stacked leaf has such a factor per layer, `[L, m, r]`.
        right: tensor name → `[r, n]`, right singular vectors.
        whole: tensor name → the task vector of a tensor that is not factorised.
    """

    left: dict[str, Any]
    right: dict[str, Any]
    whole: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of everything held."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def restore(self, base: Params, scale: float | Float[Array, ""] = 1.0, *, rules: Rules = Rules()) -> Params:
        """The expert again, but for what was left out: `base + scale * task vector`.

        Args:
            base: the base that it was compressed against.
            scale: a factor of the task vector.
            rules: how names are read, as for `compress_tsv`.

        Returns:
            Parameters like the base. Leaves that are not floating point are the base's.

        Raises:
            StructureError: the base has other tensors.
        """
        leaves = dict(named_leaves(base))
        mergeable = {name for name, leaf in leaves.items() if is_mergeable(leaf)}
        held = {*self.left, *self.whole}
        if mergeable != held:
            raise StructureError(
                f"the compressed task vector lacks {sorted(mergeable - held)} and has {sorted(held - mergeable)} "
                "besides, compared with the base; give the base that it was compressed against"
            )
        infos = tensor_infos({name: tuple(leaves[name].shape) for name in leaves}, rules)
        for name in mergeable:
            leaf = jnp.asarray(leaves[name])
            dtype = accumulation_dtype(leaf.dtype)
            if name in self.left:
                delta = _product(self.left[name].astype(dtype), self.right[name].astype(dtype), infos[name])
            else:
                delta = self.whole[name].astype(dtype)
            leaves[name] = (leaf.astype(dtype) + jnp.asarray(scale, dtype) * delta).astype(leaf.dtype)
        return with_leaves(base, leaves)

    @classmethod
    def from_params(cls, params: Params) -> LowRankTaskVector:
        """The compressed task vector from parameters as they were read from a checkpoint.

        Args:
            params: `jm.open_checkpoint(path).params`, in which each part has its place (`left/NAME`, …).

        Raises:
            StructureError: there is a leaf that belongs to no compressed task vector, or a factor without the other.
        """
        parts: dict[str, dict[str, Any]] = {"left": {}, "right": {}, "whole": {}}
        for name, leaf in named_leaves(params).items():
            part, _, tensor = name.partition("/")
            if part not in parts:
                raise StructureError(f"tensor {name!r}: found no part of a compressed task vector, expected {[*parts]}")
            parts[part][tensor] = jnp.asarray(leaf[...])
        alone = sorted(parts["left"].keys() ^ parts["right"].keys())
        if alone:
            raise StructureError(f"tensor {alone[0]!r} has only one of its two factors; read all of the checkpoint")
        return cls(**parts)

    def __repr__(self) -> str:
        ranks = sorted(x.shape[-1] for x in self.left.values())
        of_rank = f" of rank {'-'.join(map(str, sorted({ranks[0], ranks[-1]})))}" if ranks else ""
        return (
            f"LowRankTaskVector({len(ranks)} matrices{of_rank}, {len(self.whole)} tensors whole, {self.nbytes:,} bytes)"
        )


def compress_tsv(
    expert: Params,
    base: Params,
    rank_share: float = 0.1,
    *,
    factored: Factored = "matrices",
    rules: Rules = Rules(),
) -> LowRankTaskVector:
    """TSV-C: keeps the leading singular vectors of every matrix of a task vector.

    Args:
        expert: parameters of the fine-tuned model.
        base: parameters of the model that it was fine-tuned from.
        rank_share: share of the singular values of each matrix that are kept, in (0, 1]; at least one is.
        factored: which tensors are factorised, as for `tsv_m`.
        rules: how names are read; layer-stacked leaves are factorised layer by layer.

    Returns:
        The compressed task vector, in float32. What is not factorised, and a matrix whose factors would be larger than
        itself, is kept whole.

    Raises:
        StructureError, ShapeError, DTypeError: the trees differ.
        RecipeError: the share is no share.

    Source: arXiv 2412.00081.
    """
    check_range("rank_share", rank_share, 0.0, 1.0, open_low=True)
    base_leaves, leaves = named_leaves(base), named_leaves(expert)
    check_same_tensors(base_leaves, {"expert": leaves}, "the base")
    infos = tensor_infos({name: tuple(leaf.shape) for name, leaf in base_leaves.items()}, rules)
    left, right, whole = {}, {}, {}
    for name, leaf in base_leaves.items():
        if not is_mergeable(leaf):
            continue
        delta = _difference(jnp.asarray(leaves[name]), jnp.asarray(leaf))
        whole[name], info = delta, infos[name]
        if is_factored(info, factored):
            rows, columns = matrix_shape(info)
            rank = _count(float(rank_share), min(rows, columns))
            if rank * (rows + columns) < info.size:
                left[name], right[name] = _factors(whole.pop(name), info.for_program(), rank)
    return LowRankTaskVector(left, right, whole)


@jax.jit
def _difference(expert: Any, base: Any) -> Any:
    dtype = accumulation_dtype(base.dtype)
    return expert.astype(dtype) - base.astype(dtype)


@functools.partial(jax.jit, static_argnames=("info", "rank"))
def _factors(delta: Any, info: TensorInfo, rank: int) -> tuple[Any, Any]:
    def one(delta: Any) -> tuple[Any, Any]:
        u, s, v = leading_svd(as_matrix(delta, info), rank)
        return u * s[None, :], v.T

    return _by_layer(one, delta.ndim - len(info.shape))(delta)


def _product(left: Any, right: Any, info: TensorInfo) -> Any:
    return _by_layer(lambda left, right: from_matrix(dot(left, right), info), left.ndim - 2)(left, right)


def _by_layer(function: Any, stacked: int) -> Any:
    """A function of one tensor for leaves that hold one (0), or one per layer along their first axis (1)."""
    return jax.vmap(function) if stacked else function
