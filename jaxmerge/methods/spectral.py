"""What the methods that factorise task vectors share: which tensors are factorised, and what becomes of the others.

A matrix is (out, in) here, as in the papers: a Flax kernel is transposed on its way in and back, so both layouts give
the same result. Embeddings are taken as (token, feature).

The treatment of everything else is one parameter with one default across the family, because published code disagrees:
`others="mean"` adds the scaled mean of the task vectors to biases, norms and whatever else is not factorised
(FusionBench), `"sum"` their scaled sum, `"base"` leaves those tensors as they are in the base (WUDI, OptMerge and DOGE
in their authors' experiments). `factored="matrices"` factorises every tensor with two axes, embeddings included
(FusionBench); `"kernels"` factorises what is a kernel by name and rank: convolutions and fused attention kernels too,
with their window and input axes joined (ours), but no embeddings. Other choices, by name, are `jm.partition`'s.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxmerge.methods.choosing import passthrough
from jaxmerge.methods.coefficients import per_expert
from jaxmerge.methods.method import Method, Value, pytree, static
from jaxmerge.methods.sharding import explicit_sharding
from jaxmerge.methods.task_arithmetic import task_arithmetic
from jaxmerge.trees.info import TensorInfo

Factored = Literal["matrices", "kernels"]
Others = Literal["mean", "sum", "base"]
M = TypeVar("M", bound="Spectral")


@pytree
class Spectral(Method):
    """A method that merges the matrices of task vectors; subclasses say how in `merge_matrices`.

    Attributes:
        scale: factor of the merged task vector.
        weights: factors of the experts' task vectors, applied before anything else.
        factored: which tensors are factorised.
        others: what becomes of the rest.
    """

    scale: Any = 1.0
    weights: Any = 1.0
    factored: Factored = static(default="matrices")
    others: Others = static(default="mean")

    needs_base = True
    whole_tensor = True
    in_one_place = True

    def for_tensor(self, info: TensorInfo) -> Method:
        if is_factored(info, self.factored):
            return self
        if self.others == "base":
            return passthrough(source="base")
        return task_arithmetic(self.scale, weights=self.weights, normalize=self.others == "mean")

    def at(self: M, info: TensorInfo, experts: tuple[str, ...]) -> M:
        weights = per_expert(self.weights, info, experts, "weights")
        resolved: Any = Value.at(dataclasses.replace(self, weights=1.0), info, experts)
        return dataclasses.replace(resolved, weights=tuple(weights))

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        with jax.default_matmul_precision("highest"):  # accelerators would round float32 in products
            merged = from_matrix(self.merge_matrices(self.matrices(base, experts, info)), info)
        return base + self.scale * sharded_like(merged, base)

    def matrices(self, base: Any, experts: list[Any], info: TensorInfo) -> list[Any]:
        """The experts' weighted task vectors of one tensor, as matrices."""
        weighted = [jnp.asarray(w, x.dtype) * (x - base) for w, x in zip(self.weights, experts, strict=True)]
        return [as_matrix(unsharded(delta), info) for delta in weighted]

    def merge_matrices(self, deltas: list[Float[Array, "m n"]]) -> Float[Array, "m n"]:
        """The merged task vector of one matrix, from those of the experts."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to merge matrices")


def is_factored(info: TensorInfo, factored: Factored) -> bool:
    """Whether a tensor is one that the family factorises. Empty ones are not."""
    kernel = info.kind == "kernel" and bool(info.input_axes)
    return info.size > 0 and (len(info.shape) == 2 if factored == "matrices" else kernel)


def matrix_shape(info: TensorInfo) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix."""
    if info.kind == "embedding" or not info.output_axes:
        return info.shape[0], info.size // info.shape[0]
    rows = math.prod(info.shape[axis] for axis in info.output_axes)
    return rows, info.size // rows


def as_matrix(x: Float[Array, "..."], info: TensorInfo) -> Float[Array, "m n"]:
    """A tensor with its output axes joined to rows and all others, in order, to columns; an embedding as it is."""
    if info.kind == "embedding" or not info.output_axes:
        return x.reshape(matrix_shape(info))
    return jnp.transpose(x, _rows_first(info)).reshape(matrix_shape(info))


def from_matrix(matrix: Float[Array, "m n"], info: TensorInfo) -> Float[Array, "..."]:
    """The tensor that `as_matrix` makes this matrix of."""
    if info.kind == "embedding" or not info.output_axes:
        return matrix.reshape(info.shape)
    order = _rows_first(info)
    moved = matrix.reshape([info.shape[axis] for axis in order])
    return jnp.transpose(moved, [order.index(axis) for axis in range(len(order))])


def _rows_first(info: TensorInfo) -> list[int]:
    columns = [axis for axis in range(len(info.shape)) if axis not in info.output_axes]
    return [*info.output_axes, *columns]


def unsharded(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array whole on every device of a mesh with explicit axes, where factorising a sharded one is an error."""
    sharding = explicit_sharding(x)
    return x if sharding is None else jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def sharded_like(x: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array sharded as another on a mesh with explicit axes."""
    sharding = explicit_sharding(like)
    return x if sharding is None else jax.sharding.reshard(x, sharding)
