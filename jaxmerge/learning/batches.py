"""Batches: gone through once, as collectors of statistics do, or one per step, as what learns does; checked."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.errors import NonFiniteError, RecipeError, ShapeError
from jaxmerge.learning.progress import counting


def examples_of(batch: Any, number: int) -> int:
    """How many examples a batch holds: the length of the first axis of all of its arrays.

    Raises:
        RecipeError: it holds none.
        ShapeError: its arrays differ in length, or one has no axes.
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    lengths = {shape[0] if shape else None for shape in shapes}
    if not shapes or 0 in lengths:
        raise RecipeError(f"batch {number} is empty: found arrays of shapes {shapes}, expected at least one example")
    if len(lengths) > 1 or None in lengths:
        raise ShapeError(
            f"batch {number}: found arrays of shapes {shapes}, expected as many examples in each, along the first axis"
        )
    return shapes[0][0]


def each_batch(batches: Iterable[Any], what: str, progress: bool | None) -> Iterator[tuple[int, Any]]:
    """The batches with their numbers, from 0; a bar shows how many are done, in a terminal or notebook.

    Raises:
        RecipeError: there is no batch, or `batches` is a batch itself.
    """
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        raise RecipeError(
            f"batches is {type(batches).__name__}, expected a list of batches or an iterator; give [batch] for one"
        )
    number = -1
    total = len(batches) if isinstance(batches, Sequence) else None
    with counting(progress, what, total) as advance:
        for number, batch in enumerate(batches):
            yield number, batch
            advance(1, "")
    if number < 0:
        raise RecipeError("there were no batches; an iterator that was used up must be made anew")


def cached(make: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes programs, remembering the last ones: the same model compiles once for all experts."""
    remembered = _remembered(make)

    def call(*arguments: Any) -> Any:
        try:
            hash(arguments)
        except TypeError:
            return make(*arguments)
        return remembered(*arguments)

    return call


@functools.cache
def _remembered(make: Callable[..., Any]) -> Callable[..., Any]:
    return functools.lru_cache(maxsize=4)(make)


def check_finite(flags: Sequence[Any], names: Sequence[str], what: str) -> None:
    """Waits for flags, one row per batch and one flag per name, and raises the error for the first that is not set.

    Raises:
        NonFiniteError: there is one.
    """
    for number, row in enumerate(jax.device_get(list(flags))):
        if not np.all(row):
            raise NonFiniteError(
                f"batch {number}, tensor {names[int(np.argmin(row))]!r}: found NaN or infinity in {what}, expected "
                "finite numbers; look at the batch and at the parameters"
            )


class BatchOfStep:
    """Gives the batch of a step, checked; `NO_MORE` when an iterator has no more."""

    def __init__(self, batches: Any, first: int):
        """Takes a list, which is gone through again and again, a function of the step, or an iterator.

        Args:
            batches: the batches.
            first: the step that a run starts at.

        Raises:
            RecipeError: it is something else, or empty.
        """
        if isinstance(batches, Mapping) or hasattr(batches, "shape"):
            raise RecipeError(
                f"batches is {type(batches).__name__}, expected a list of batches, a function of the step, or an "
                "iterator; for a single batch give [batch]"
            )
        if isinstance(batches, Sequence):
            if not batches:
                raise RecipeError("batches is an empty list; give at least one batch")
            self.get: Callable[[int], Any] = lambda step: batches[step % len(batches)]
        elif callable(batches):
            self.get = batches
        else:
            iterator = iter(batches)
            self.get = lambda step: next(iterator, NO_MORE)
        self.first, self.shapes = first, None

    def __call__(self, step: int) -> Any:
        batch = self.get(step)
        if batch is NO_MORE:
            if step == self.first:
                raise RecipeError("batches gave no batch at all; an iterator that was used up must be made anew")
            return batch
        leaves, treedef = jax.tree.flatten(batch)
        for leaf in leaves:
            if 0 in np.shape(leaf):
                raise RecipeError(f"the batch of step {step} is empty: it holds an array of shape {np.shape(leaf)}")
        shapes = (treedef, tuple((np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves))
        if self.shapes is None:
            self.shapes = {shapes}
        elif shapes not in self.shapes:
            self.shapes.add(shapes)
            warnings.warn(
                f"the batch of step {step} has other shapes ({', '.join(str(shape) for shape, _ in shapes[1])}) than "
                "those before, so the step is compiled again; drop or pad the last batch of an epoch",
                stacklevel=3,
            )
        return batch


NO_MORE = object()
