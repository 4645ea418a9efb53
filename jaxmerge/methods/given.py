"""Statistics that a method is given: one tree per expert, kept by tensor name, and found again when a tensor is merged.

Whoever made them (`jm.fisher`, `jm.gram`, a checkpoint, another program), they are pytrees of arrays or lazy tensors,
and within a method they are leaves: they are traced, sharded and differentiated like its coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmerge.errors import NonFiniteError, RecipeError, ShapeError, StructureError
from jaxmerge.trees.checks import name_experts
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import Params, named_leaves

M = TypeVar("M")

Given = dict[str, dict[str, Any]] | tuple[dict[str, Any], ...]
"""Statistics by tensor name: of every expert by name, or in the experts' order."""


def given_statistics(trees: Sequence[Params] | Mapping[str, Params], what: str) -> Given:
    """The trees by tensor name.

    Args:
        trees: one per expert, a list or a dict by the experts' names.
        what: what they are called in messages.

    Raises:
        RecipeError: there are none, or a leaf is no array.
    """
    named = {expert: named_leaves(tree) for expert, tree in name_experts(trees).items()}
    for expert, leaves in named.items():
        for name, leaf in leaves.items():
            if not hasattr(leaf, "shape"):
                raise RecipeError(
                    f"the {what} of expert {expert!r}, tensor {name!r}: found {type(leaf).__name__}, expected an "
                    "array; files are opened with jm.open_checkpoint(path).params"
                )
    return named if isinstance(trees, Mapping) else tuple(named.values())


def check_given(given: Given, experts: tuple[str, ...], what: str) -> None:
    """Checks that there are statistics for these experts.

    Raises:
        RecipeError: there are some for other experts, or too few or too many.
    """
    if isinstance(given, dict) and set(given) != set(experts):
        raise RecipeError(f"the {what}s are those of {', '.join(given)}, but the experts are {', '.join(experts)}")
    if len(given) != len(experts):
        raise RecipeError(f"found the {what}s of {len(given)} models, expected {len(experts)}: {', '.join(experts)}")


def of_experts(given: Given, experts: tuple[str, ...]) -> list[dict[str, Any]]:
    """The statistics in the experts' order."""
    return [given[expert] for expert in experts] if isinstance(given, dict) else list(given)


def of_tensor(
    given: Given, info: TensorInfo, shape: tuple[int, ...], experts: tuple[str, ...], what: str
) -> tuple[Any, ...]:
    """The statistics of one tensor, one per expert; of one layer, for a tensor that is layer-stacked.

    Values that are known now are checked. Lazy ones are left to `read_given`, unless they are layer-stacked.

    Args:
        given: the statistics.
        info: of the tensor.
        shape: what a statistic's shape must be.
        experts: names of the experts.
        what: what statistics are called in messages.

    Raises:
        StructureError: an expert has none for this tensor.
        ShapeError: one has another shape.
        NonFiniteError: NaN or infinity.
    """
    found = []
    for expert, leaves in zip(experts, of_experts(given, experts), strict=True):
        if info.name not in leaves:
            raise StructureError(
                f"the {what} of expert {expert!r} has nothing for tensor {info.name!r}; compute it with the parameters "
                "that are merged, or rename its tensors (jm.renamed)"
            )
        leaf = leaves[info.name]
        stacked = tuple(leaf.shape) == (info.num_layers, *shape) and info.layer is not None
        if not stacked and tuple(leaf.shape) != shape:
            raise ShapeError(
                f"the {what} of expert {expert!r}, tensor {info.name!r}: found shape {tuple(leaf.shape)}, expected "
                f"{shape}; compute it with the parameters that are merged"
            )
        value = leaf[info.layer] if stacked else leaf
        if not isinstance(value, Tracer | LazyTensor) and not jax.device_get(_is_finite(value)):
            raise NonFiniteError(
                f"the {what} of expert {expert!r}, tensor {info.name!r}: found NaN or infinity, expected finite "
                "numbers; look at the batches that it was computed from"
            )
        found.append(value)
    return tuple(found)


def read_given(method: M) -> M:
    """A method that is resolved for one tensor, with its lazy leaves read: to be called when the tensor is merged.

    Raises:
        NonFiniteError: NaN or infinity.
    """

    def read(leaf: Any) -> Any:
        if not isinstance(leaf, LazyTensor):
            return leaf
        value = np.asarray(leaf)
        if not np.isfinite(value).all():
            raise NonFiniteError(f"{leaf.label}: found NaN or infinity in a statistic, expected finite numbers")
        return value

    return jax.tree.map(read, method)


def _is_finite(value: Any) -> Any:
    return np.isfinite(value).all() if isinstance(value, np.ndarray) else _all_finite(value)


@jax.jit
def _all_finite(value: Any) -> Any:
    return jnp.all(jnp.isfinite(value))
