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

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmerge.methods.coefficients import per_expert
from jaxmerge.methods.method import Method, Value, pytree, static
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

    def for_tensor(self, info: TensorInfo) -> Method:
        if is_factored(info, self.factored):
            return self
        scale = 0.0 if self.others == "base" else self.scale
        return task_arithmetic(scale, weights=self.weights, normalize=self.others == "mean")

    def at(self: M, info: TensorInfo, experts: tuple[str, ...]) -> M:
        weights = per_expert(self.weights, info, experts, "weights")
        resolved: Any = Value.at(dataclasses.replace(self, weights=1.0), info, experts)
        return dataclasses.replace(resolved, weights=tuple(weights))

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        weighted = [weight * (x - base) for weight, x in zip(self.weights, experts, strict=True)]
        merged = self.merge_matrices([as_matrix(delta, info) for delta in weighted])
        return base + self.scale * from_matrix(merged, info)

    def merge_matrices(self, deltas: list[Float[Array, "m n"]]) -> Float[Array, "m n"]:
        """The merged task vector of one matrix, from those of the experts."""
        raise NotImplementedError


def is_factored(info: TensorInfo, factored: Factored) -> bool:
    """Whether a tensor is one that the family factorises. Empty ones are not."""
    kernel = info.kind == "kernel" and bool(info.input_axes)
    return info.size > 0 and (len(info.shape) == 2 if factored == "matrices" else kernel)


def as_matrix(x: Float[Array, "..."], info: TensorInfo) -> Float[Array, "m n"]:
    """A tensor with its output axes joined to rows and all others, in order, to columns; an embedding as it is."""
    if info.kind == "embedding" or not info.output_axes:
        return x.reshape(x.shape[0], -1)
    rows = math.prod(x.shape[axis] for axis in info.output_axes)
    return jnp.transpose(x, _rows_first(info)).reshape(rows, -1)


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
