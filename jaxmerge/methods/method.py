"""What a merge method is: an immutable pytree whose leaves are its coefficients.

A method sees one tensor (or a chunk of it) at a time, as float32 arrays: the base tensor, the list of K expert tensors,
what is known about the tensor, and what was measured. To write a new one, subclass `Method` (or, for an operation on
task vectors, `jaxmerge.methods.stages.Stage`), decorate it with `@pytree`, and give it a function with keyword
arguments.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
from jaxtyping import Array, Float

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import at_tensor, check_rules
from jaxmerge.methods.measurements import Measurement, Scope
from jaxmerge.trees.info import TensorInfo

T = TypeVar("T")


class Granularity(enum.Enum):
    """How much of a model a method must see at once."""

    ELEMENT = "element"
    TENSOR = "tensor"
    MODEL = "model"


def static(default: Any) -> Any:
    """A dataclass field that is part of a method's structure, not a coefficient."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[T]) -> type[T]:
    """Makes a class an immutable dataclass and a pytree: fields are leaves unless declared with `static`."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, repr=False)(cls))


class Value:
    """What methods and stages share: coefficients that are resolved per tensor, and a readable `repr`."""

    whole_tensor: bool = False
    """True when the operation needs a tensor whole, with its axes; false when any chunk will do once measured."""
    in_one_place: bool = False
    """True when a device that computes any of the result needs all of the tensor: it is factorised or sorted. Where
    tensors are sharded, each is then merged by one device, and different ones at the same time."""
    draws: bool = False
    """True when the operation draws random numbers and needs a key."""
    spreads_nonfinite: bool = False
    """True when NaN or infinity in any input makes the entry NaN or infinite in the result, also with a weight of 0:
    then the result tells whether the inputs are finite, and nobody needs to look at them."""

    def at(self: T, info: TensorInfo, experts: tuple[str, ...]) -> T:
        """The same operation with its coefficients made plain numbers for one tensor."""
        changed = {f.name: at_tensor(getattr(self, f.name), info) for f in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        return dataclasses.replace(self, **changed)  # pyright: ignore[reportArgumentType, reportType]

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        shown = [(f, getattr(self, f.name)) for f in fields if not f.name.startswith("_")]
        given = [f"{f.name}={value!r}" for f, value in shown if not _is_default(value, f.default)]
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()
        return f"{name}({', '.join(given)})"


class Method(Value):
    """A merge method. Subclasses override `merge_tensor` and whatever else differs from the defaults here."""

    needs_base: bool = False
    """True when the method is defined relative to a base model."""

    @property
    def passes(self) -> tuple[Scope, ...]:
        """The scope of each measuring pass, in order."""
        return ()

    @property
    def granularity(self) -> Granularity:
        """`MODEL` if a measurement spans the model, else `TENSOR` if a tensor is needed whole, else `ELEMENT`."""
        if "model" in self.passes:
            return Granularity.MODEL
        return Granularity.TENSOR if self.whole_tensor else Granularity.ELEMENT

    def for_tensor(self, info: TensorInfo) -> Method:
        """The method that merges this tensor: itself, unless it chooses among others by name."""
        return self

    def check(self, experts: tuple[str, ...], has_base: bool, tensors: Sequence[str]) -> None:
        """Checks that the method can merge these experts.

        Args:
            experts: names of the experts.
            has_base: whether there is a base.
            tensors: names of all tensors to be merged.

        Raises:
            RecipeError: a base is missing, the number of experts does not fit, or a rule matches no tensor.
        """
        check_rules(self, tensors, experts)
        if self.needs_base and not has_base:
            raise RecipeError(
                f"{self!r} works on task vectors; pass the model that the experts were tuned from as base="
            )

    def measure(
        self,
        base: Float[Array, "..."] | None,
        experts: list[Float[Array, "..."]],
        info: TensorInfo,
        stats: tuple[Any, ...],
    ) -> Measurement:
        """Measurement number `len(stats)` of a chunk, given the results of those before it."""
        raise NotImplementedError(f"{type(self).__name__} declares measuring passes but does not measure")

    def merge_tensor(
        self,
        base: Float[Array, "..."] | None,
        experts: list[Float[Array, "..."]],
        info: TensorInfo,
        stats: tuple[Any, ...],
    ) -> Float[Array, "..."]:
        """The merged chunk in the arithmetic dtype of its inputs, which the caller casts once."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to merge a tensor")

    def notes(
        self,
        base: Float[Array, "..."] | None,
        experts: list[Float[Array, "..."]],
        info: TensorInfo,
        stats: tuple[Any, ...],
    ) -> dict[str, Array]:
        """Numbers for the report, by name: counts and sums that add up over chunks, scalars or one per expert."""
        return {}


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, int | float | str | None) and value == default)
