"""Many experts in little more than the memory of one: a unified task vector, and a mask and a number for each."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from jaxmerge.errors import RecipeError
from jaxmerge.methods.assignment import ExpertTrees
from jaxmerge.methods.merge import merge
from jaxmerge.methods.stages import Chain
from jaxmerge.trees.checks import is_mergeable, name_experts
from jaxmerge.trees.paths import Params, named_leaves, with_leaves
from jaxmerge.trees.task_vectors import apply_task_vector, task_vector


@dataclasses.dataclass(frozen=True)
class MaskedExperts:
    """Approximations of K experts: made by `emr_experts` and `tall_experts`, a pytree.

    Attributes:
        names: of the experts.
        unified: the unified task vector, a tree like the base in float32.
        masks: tensor name → `[K, ceil(n / 8)]`, one bit per entry in row-major order, first entry in the highest bit.
        rescalers: `[K]`, what the masked task vector of each expert is multiplied by.
    """

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    unified: Params
    masks: dict[str, UInt8[Array, "K bytes"]]
    rescalers: Float[Array, " K"]

    @property
    def nbytes(self) -> int:
        """Bytes of everything held."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def mask(self, expert: str) -> dict[str, Array]:
        """An expert's masks by tensor name: booleans in the tensor's shape.

        Args:
            expert: its name.

        Raises:
            RecipeError: there is no such expert.
        """
        index, leaves = self._index(expert), named_leaves(self.unified)
        return {name: _unpacked(bits, index, leaves[name].shape) for name, bits in self.masks.items()}

    def approximation(self, expert: str, base: Params) -> Params:
        """The approximation of one expert.

        Args:
            expert: its name.
            base: the base that the experts were tuned from.

        Returns:
            Parameters like the base.

        Raises:
            RecipeError: there is no such expert.
        """
        leaves = dict(named_leaves(self.unified))
        for name, mask in self.mask(expert).items():
            leaves[name] = jnp.where(mask, leaves[name], 0)
        return apply_task_vector(base, with_leaves(self.unified, leaves), self.rescalers[self._index(expert)])

    def _index(self, expert: str) -> int:
        if expert not in self.names:
            raise RecipeError(f"no expert is named {expert!r}; there are {', '.join(self.names)}")
        return self.names.index(expert)


jax.tree_util.register_dataclass(MaskedExperts)


@functools.partial(jax.jit, static_argnames="shape")
def _unpacked(bits: UInt8[Array, "K bytes"], index: Any, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    return jnp.unpackbits(bits[index], count=math.prod(shape)).astype(bool).reshape(shape)


@functools.partial(jax.jit, static_argnames="mask")
def _packed(mask: Callable[..., Any], deltas: list[Any], unified: Any, numbers: Any) -> UInt8[Array, "K bytes"]:
    """The masks of all experts; one program for every shape."""
    masks = [mask(delta, unified, number) for delta, number in zip(deltas, numbers, strict=True)]
    return jnp.stack([jnp.packbits(each) for each in masks])


def mask_experts(
    unify: Chain,
    experts: ExpertTrees,
    base: Params,
    mask: Callable[[Any, Any, Any], Any],
    numbers: Callable[[str], list[Any]],
) -> tuple[MaskedExperts, list[dict[str, Any]]]:
    """Merges experts and masks the merged task vector for each, with rescalers of 1.

    Args:
        unify: merges the task vectors.
        experts: parameter trees, a list or a dict by name.
        base: the base.
        mask: a function at module level of a task vector, the unified one and a number, to booleans.
        numbers: gives, for a tensor by name, that number for each expert.

    Returns:
        The masked experts, and the experts' task vectors by tensor name.
    """
    trees = name_experts(experts)
    vectors = {name: task_vector(tree, base) for name, tree in trees.items()}
    unified = merge(unify, vectors, base=jax.tree.map(jnp.zeros_like, next(iter(vectors.values()))))
    deltas = [named_leaves(vector) for vector in vectors.values()]
    masks = {}
    for name, leaf in named_leaves(unified).items():
        if is_mergeable(leaf):
            each = [jnp.asarray(number, leaf.dtype) for number in numbers(name)]
            masks[name] = _packed(mask, [delta[name] for delta in deltas], leaf, each)
    return MaskedExperts(tuple(trees), unified, masks, jnp.ones(len(trees))), deltas
