"""Structure checks: do base and experts hold the same tensors? Decided by name, before anything is read or computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.errors import DTypeError, RecipeError, ShapeError, StructureError
from jaxmerge.trees.paths import Params, named_leaves, with_leaves

_SHOWN = 3


def name_experts(experts: Sequence[Params] | Mapping[str, Params]) -> dict[str, Params]:
    """Experts by name: a dict as it is, a list as `expert_0`, `expert_1`, …

    Raises:
        RecipeError: there are no experts, or `experts` is neither a list nor a dict of parameter trees.
    """
    if isinstance(experts, Mapping):
        named = {str(name): expert for name, expert in experts.items()}
        arrays = [name for name, expert in named.items() if hasattr(expert, "shape")]
        if arrays:
            raise RecipeError(
                "experts must be a list of parameter trees or a dict of them by name, but "
                f"{arrays[0]!r} is one tensor; for a single expert pass [params]"
            )
    elif isinstance(experts, Sequence) and not isinstance(experts, str | bytes):
        named = {f"expert_{i}": expert for i, expert in enumerate(experts)}
    else:
        raise RecipeError(f"experts must be a list or a dict of parameter trees, not {type(experts).__name__}")
    if not named:
        raise RecipeError("there are no experts to merge; give at least one")
    return named


def check_same_tensors(
    reference: Mapping[str, Any], experts: Mapping[str, Mapping[str, Any]], reference_name: str
) -> None:
    """Checks that every expert has the reference's tensors, with the same shapes and dtypes.

    Args:
        reference: the leaves by name that the result will look like.
        experts: expert name → its leaves by name.
        reference_name: what the reference is called in messages (`the base`, or the first expert's name).

    Raises:
        StructureError: a tensor is missing or extra.
        ShapeError: a tensor has another shape.
        DTypeError: a tensor has another dtype.
    """
    for name, leaf in reference.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise DTypeError(
                f"{reference_name}, tensor {name!r}: found {type(leaf).__name__}, expected an array; "
                "take such leaves out of the tree before merging"
            )
    for expert, leaves in experts.items():
        missing = [name for name in reference if name not in leaves]
        extra = [name for name in leaves if name not in reference]
        if missing or extra:
            found = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(extra)} besides"] * bool(extra)
            raise StructureError(
                f"expert {expert!r} {' and '.join(found)}, compared with {reference_name} ({len(reference)} tensors); "
                "rename, add or drop tensors so that all have the same names (jm.renamed, or a sub-tree)"
            )
        for name, leaf in reference.items():
            other = leaves[name]
            if tuple(np.shape(other)) != tuple(leaf.shape):
                raise ShapeError(
                    f"expert {expert!r}, tensor {name!r}: found shape {tuple(np.shape(other))}, expected "
                    f"{tuple(leaf.shape)} as in {reference_name}; transpose, slice or drop the tensor before merging"
                )
            if getattr(other, "dtype", None) != leaf.dtype:
                raise DTypeError(
                    f"expert {expert!r}, tensor {name!r}: found dtype {getattr(other, 'dtype', type(other).__name__)}, "
                    f"expected {leaf.dtype} as in {reference_name}; cast one of them (jm.cast) before merging"
                )


def is_mergeable(leaf: Any) -> bool:
    """Whether a leaf holds floating-point numbers; integers, booleans and PRNG keys are copied from the base."""
    dtype = leaf.dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return False
    return jnp.issubdtype(dtype, np.floating)


def cast(params: Params, dtype: Any) -> Params:
    """`params` with every floating-point leaf cast to `dtype`; lazy leaves are cast when they are read.

    Args:
        params: any parameter tree.
        dtype: a floating-point dtype or its name, such as `"bfloat16"`.
    """
    dtype = jnp.dtype(dtype)
    leaves = named_leaves(params)
    cast_once = {id(x): x.astype(dtype) if is_mergeable(x) else x for x in leaves.values()}  # tied leaves stay tied
    return with_leaves(params, {name: cast_once[id(x)] for name, x in leaves.items()})


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more tensors"
