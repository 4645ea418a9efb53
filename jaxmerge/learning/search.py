"""Search for coefficients without gradients: a sweep over values, and CMA-ES."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from jaxmerge.errors import NonFiniteError, RecipeError
from jaxmerge.learning.coefficients import Coefficients
from jaxmerge.learning.progress import counting
from jaxmerge.methods.assignment import assign
from jaxmerge.methods.merge import merge
from jaxmerge.methods.method import Method
from jaxmerge.trees.checks import name_experts
from jaxmerge.trees.info import Rules
from jaxmerge.trees.paths import Params


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Scores of merges with different coefficients.

    Attributes:
        values: what was tried: an array, or a pytree of arrays, with one entry per trial along the first axis.
        scores: `[trials]`, higher is better.
        method: the method with the best score.
    """

    values: Any
    scores: Float[np.ndarray, " trials"]
    method: Method

    @property
    def best(self) -> int:
        """Which trial has the best score."""
        return int(np.nanargmax(self.scores))

    def __repr__(self) -> str:
        return f"Sweep({len(self.scores)} trials, best: {self.method!r} with score {self.scores[self.best]:.6g})"


def sweep(
    make: Callable[[Any], Method],
    values: Any,
    experts: Sequence[Params] | Mapping[str, Params],
    score: Callable[[Params], Any],
    *,
    base: Params | None = None,
    key: Any = None,
    rules: Rules = Rules(),
    at_once: int = 1,
) -> Sweep:
    """Merges with every value of a coefficient and scores each: one compiled program for all.

    Args:
        make: a value → a method, such as `jm.task_arithmetic` or `lambda c: jm.ties(0.2, scale=c)`.
        values: an array with the values along its first axis, or a pytree of such arrays.
        experts: parameter trees, as for `jm.merge`.
        score: merged parameters → one number, higher is better; traced.
        base: as for `jm.merge`.
        key: as for `jm.merge`; the draws of all trials are the same.
        rules: as for `jm.merge`.
        at_once: merged models held at a time, by `jax.vmap`; more are faster while they fit into memory.

    Raises:
        RecipeError: there are no values, or a score is more than one number.
        NonFiniteError: no trial has a score that is a number.
    """
    values = jax.tree.map(jnp.asarray, values)
    counts = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(values)}
    if len(counts) != 1 or 0 in counts:
        raise RecipeError(f"values need one or more trials along the first axis of every array; found {sorted(counts)}")

    def trial(value: Any, experts: Any, base: Any) -> Any:
        return _one_number(score(merge(make(value), experts, base=base, key=key, rules=rules)))

    named = _in_order(experts)
    all_trials = jax.jit(
        lambda values, experts, base: jax.lax.map(
            lambda value: trial(value, named(experts), base), values, batch_size=at_once
        )
    )
    scores = np.asarray(all_trials(values, list(name_experts(experts).values()), base), np.float64)
    if np.isnan(scores).all():
        raise NonFiniteError(f"all {len(scores)} trials score NaN; check the score function and the range of values")
    best = int(np.nanargmax(scores))
    winner = jax.tree.map(lambda x: np.asarray(x[best]).item() if x.ndim == 1 else x[best], values)
    return Sweep(values, scores, make(winner))


@dataclasses.dataclass(frozen=True)
class Searched:
    """What a search came to.

    Attributes:
        method: the method with the best coefficients tried.
        score: its score.
        history: `[evaluations]`, every score in the order of trials.
    """

    method: Method
    score: float
    history: Float[np.ndarray, " evaluations"]

    def __repr__(self) -> str:
        return f"Searched({self.method!r}: score {self.score:.6g} after {len(self.history)} evaluations)"


def search(
    method: Method,
    experts: Sequence[Params] | Mapping[str, Params],
    score: Callable[[Params], Any],
    *,
    evaluations: int,
    base: Params | None = None,
    sigma: float = 0.2,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    key: Any = None,
    rules: Rules = Rules(),
    progress: bool | None = None,
) -> Searched:
    """Searches a method's coefficients with CMA-ES, where a score has no gradient (accuracy, a judge, a benchmark).

    Args:
        method: where the search starts. What is searched is what `jm.learn` would learn: its `learnable` coefficients
            or, if it has none, all of its floating-point leaves.
        experts: parameter trees, as for `jm.merge`.
        score: merged parameters → one number, higher is better. It is not traced and may do anything.
        evaluations: trials at most, the start included.
        base: as for `jm.merge`.
        sigma: standard deviation of the first trials around the start.
        bounds: lowest and highest value of every coefficient; trials beyond are folded back.
        seed: of the search's own draws.
        key: as for `jm.merge`; the draws of all trials are the same.
        rules: as for `jm.merge`.
        progress: show a bar with the best score; by default in a terminal or notebook.

    Raises:
        RecipeError: the method has no coefficient to search, evaluations is below 1, or the package `cma` is not there.
        NonFiniteError: no trial has a score that is a number.

    The merge is compiled once. A trial that scores NaN counts as the worst. With a single coefficient a second is
    searched that does nothing, since the package wants two. Source: the package `cma`, which is installed with
    `jaxmerge[search]`; a tutorial of the algorithm is arXiv 1604.00772.
    """
    try:
        import cma
    except ImportError as error:
        raise RecipeError("jm.search needs the package cma; pip install 'jaxmerge[search]'") from error
    if evaluations < 1:
        raise RecipeError(f"evaluations is {evaluations}, expected 1 or more")
    job = assign(method, experts, base, key, rules)
    infos = {name: task.info for name, task in job.tasks.items()}
    coefficients = Coefficients.of(
        method, lambda part: [name for name, info in infos.items() if method.for_tensor(info) is part], job.experts
    )
    start, unravel = ravel_pytree(coefficients.values)
    named = _in_order(experts)
    trees = list(name_experts(experts).values())
    merged = jax.jit(
        lambda vector, experts, base: merge(
            coefficients.put(unravel(vector)), named(experts), base=base, key=key, rules=rules
        )
    )
    dimensions = start.size
    origin = np.concatenate([np.asarray(start, np.float64), np.zeros(max(0, 2 - dimensions))])
    if bounds is not None:
        origin = np.clip(origin, *bounds)
    options: dict[str, Any] = {"seed": seed + 1, "verbose": -9, "maxfevals": evaluations}  # 0 would mean the clock
    if bounds is not None:
        options["bounds"] = list(bounds)
    history: list[float] = []
    best = (-math.inf, np.asarray(start))

    def evaluate(vector: Any) -> float:
        nonlocal best
        numbers = np.asarray(vector[:dimensions], np.float32)
        value = float(_one_number(score(merged(numbers, trees, base))))
        history.append(value)
        if value > best[0]:
            best = (value, numbers)
        return -value if math.isfinite(value) else math.inf

    with counting(progress, "Searching", evaluations) as advance:
        evaluate(origin)
        advance(1, f"best score {best[0]:.4g}")
        strategy = cma.CMAEvolutionStrategy(origin, sigma, options)
        while len(history) < evaluations and not strategy.stop():
            asked = strategy.ask()
            told = []
            for vector in asked[: evaluations - len(history)]:
                told.append(evaluate(vector))
                advance(1, f"best score {best[0]:.4g}")
            if len(told) < len(asked):
                break
            strategy.tell(asked, told)
    if not math.isfinite(best[0]):
        raise NonFiniteError(f"none of {len(history)} trials has a score that is a number; check the score function")
    return Searched(coefficients.put(jax.device_get(unravel(jnp.asarray(best[1])))), best[0], np.array(history))


def _in_order(experts: Sequence[Params] | Mapping[str, Params]) -> Callable[[list[Params]], dict[str, Params]]:
    """Gives a list of experts their names back: as an argument of `jax.jit` a dict would be sorted."""
    names = tuple(name_experts(experts))
    return lambda trees: dict(zip(names, trees, strict=True))


def _one_number(value: Any) -> Any:
    if np.size(value) != 1:
        raise RecipeError(f"the score has shape {np.shape(value)}, expected one number: take its mean")
    return value if np.ndim(value) == 0 else value.reshape(())
