"""Chains of stages: how task-vector methods are built.

The state that flows through a chain is a `TaskVectors`: K task vectors `expert - base` in float32, their weights, and
what the stages so far have decided. A stage changes that state; a chain runs its stages in order and adds the merged
task vector to the base. `chain(trim(0.2), elect_sign(), disjoint_mean())` is TIES.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmerge.errors import RecipeError
from jaxmerge.methods.measurements import Measurement, Scope
from jaxmerge.methods.method import Method, Value, pytree
from jaxmerge.trees.info import TensorInfo


@dataclasses.dataclass(frozen=True)
class TaskVectors:
    """The state of a chain for one tensor, or for a chunk of it.

    Attributes:
        deltas: K task vectors as the stages so far have left them.
        original: the K task vectors before the first stage.
        weights: `[K]`, the experts' weights; ones until a stage weighs.
        sign: the elected sign of each entry (+1 or -1), or None before the election.
        merged: the merged task vector, or None before a stage has combined the experts.
    """

    deltas: tuple[Any, ...]
    original: tuple[Any, ...]
    weights: Any
    sign: Any = None
    merged: Any = None

    def replace(self, **changes: Any) -> TaskVectors:
        """The state with some attributes changed."""
        return dataclasses.replace(self, **changes)


jax.tree_util.register_dataclass(TaskVectors)


class Stage(Value):
    """One step of a chain."""

    combines: bool = False
    """True for the stage that turns K task vectors into one."""

    @property
    def measures(self) -> Scope | None:
        """The scope of what the stage must measure before it can act; None if nothing."""
        return None

    def measure(self, vectors: TaskVectors, info: TensorInfo) -> Measurement:
        """What the stage measures on a chunk of its input."""
        raise NotImplementedError(f"{type(self).__name__} declares a measurement but does not measure")

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        """The state after the stage; `measured` is the result of its measurement, or None."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does")


@pytree
class Chain(Method):
    """Stages run one after another; see `chain`."""

    stages: tuple[Stage, ...]

    needs_base = True

    @property
    def passes(self) -> tuple[Scope, ...]:
        return tuple(stage.measures for stage in self.stages if stage.measures is not None)

    @property
    def whole_tensor(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(stage.whole_tensor for stage in self.stages)

    @property
    def in_one_place(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(stage.in_one_place for stage in self.stages)

    @property
    def draws(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(stage.draws for stage in self.stages)

    @property
    def spreads_nonfinite(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(stage.spreads_nonfinite for stage in self.stages)

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Chain:
        return Chain(tuple(stage.at(info, experts) for stage in self.stages))

    def measure(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Measurement:
        return self._run(base, experts, info, stats, measuring=len(stats))

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        return base + self._run(base, experts, info, stats).merged

    def notes(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> dict[str, Array]:
        """`kept`: entries per expert that the stages did not zero; `conflicts`: entries whose signs then differ."""
        vectors = self._run(base, experts, info, stats)
        positive = sum((d > 0).astype(jnp.int32) for d in vectors.deltas)
        negative = sum((d < 0).astype(jnp.int32) for d in vectors.deltas)
        return {
            "kept": jnp.stack([jnp.sum(d != 0, dtype=jnp.int32) for d in vectors.deltas]),
            "conflicts": jnp.sum((positive > 0) & (negative > 0), dtype=jnp.int32),
        }

    def _run(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...], measuring: int = -1) -> Any:
        """The state after the last stage, or measurement number `measuring`."""
        deltas = tuple(expert - base for expert in experts)
        vectors = TaskVectors(deltas, deltas, jnp.ones(len(deltas), base.dtype))
        results = iter(enumerate(stats))
        for stage in self.stages:
            measured = None
            if stage.measures is not None:
                number, measured = next(results, (measuring, None))
                if number == measuring:
                    return stage.measure(vectors, info)
            vectors = stage.apply(vectors, info, measured)
        return vectors

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.stages))})"


def chain(*stages: Stage | Chain) -> Chain:
    """A method from stages on task vectors, run in order.

    Args:
        *stages: stages, or other chains whose stages are taken over. Exactly one stage must combine the experts
            (`total`, `disjoint_mean`, …); stages after it act on the merged task vector.

    Returns:
        A method: `base + merged task vector`.

    Raises:
        RecipeError: no stage combines the experts, more than one does, or something else than a stage was given.
    """
    flat: list[Stage] = []
    for stage in stages:
        if isinstance(stage, Chain):
            flat.extend(stage.stages)
        elif isinstance(stage, Stage):
            flat.append(stage)
        else:
            raise RecipeError(f"a chain is made of stages on task vectors, and {stage!r} is not one")
    combining = [stage for stage in flat if stage.combines]
    if len(combining) != 1:
        found = f"{len(combining)} stages do ({', '.join(map(repr, combining))})" if combining else "none does"
        raise RecipeError(
            f"exactly one stage of a chain combines the experts, such as total() or disjoint_mean(); {found}"
        )
    return Chain(tuple(flat))
