"""Task vectors as trees: what fine-tuning added to the base (arXiv 2212.04089), and its application."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.trees.checks import check_same_tensors, is_mergeable
from jaxmerge.trees.paths import Params, named_leaves, with_leaves


def accumulation_dtype(dtype: Any) -> jnp.dtype:
    """The dtype that arithmetic on a tensor is done in: float64 for float64, float32 for everything else."""
    return jnp.dtype(jnp.float64) if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def task_vector(expert: Params, base: Params) -> Params:
    """The task vector `expert - base`, in float32 (float64 for float64 parameters).

    Args:
        expert: parameters of the fine-tuned model.
        base: parameters of the model that it was fine-tuned from; same names, shapes and dtypes.

    Returns:
        A tree in the base's container. Leaves that are not floating point become zeros of their own dtype
        (PRNG keys stay), so that applying the task vector leaves them as they are.

    Raises:
        StructureError, ShapeError, DTypeError: the trees differ.

    Source: arXiv 2212.04089. Differences are never rounded to a half-precision dtype: fine-tuning moves most weights by
    less than one unit in the last place of bfloat16 would show.
    """
    base_leaves, leaves = named_leaves(base), named_leaves(expert)
    check_same_tensors(base_leaves, {"expert": leaves}, "the base")
    deltas = {}
    for name, leaf in base_leaves.items():
        if is_mergeable(leaf):
            dtype = accumulation_dtype(leaf.dtype)
            deltas[name] = jnp.asarray(leaves[name]).astype(dtype) - jnp.asarray(leaf).astype(dtype)
        else:
            deltas[name] = leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) else jnp.zeros_like(leaf)
    return with_leaves(base, deltas)


def apply_task_vector(base: Params, vector: Params, scale: float | jax.Array = 1.0) -> Params:
    """`base + scale * vector`, cast once to the base's dtypes.

    Args:
        base: parameters.
        vector: a task vector with the base's names and shapes.
        scale: a number; negative to forget the task.

    Raises:
        StructureError, ShapeError: the trees differ.
    """
    leaves, deltas = named_leaves(base), named_leaves(vector)
    same_dtype = {n: jax.ShapeDtypeStruct(d.shape, leaves[n].dtype) if n in leaves else d for n, d in deltas.items()}
    check_same_tensors(leaves, {"task vector": same_dtype}, "the base")
    merged = {}
    for name, leaf in leaves.items():
        if is_mergeable(leaf):
            delta = deltas[name]
            merged[name] = (jnp.asarray(leaf).astype(delta.dtype) + jnp.asarray(scale, delta.dtype) * delta).astype(
                leaf.dtype
            )
        else:
            merged[name] = leaf
    return with_leaves(base, merged)
