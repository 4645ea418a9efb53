"""Greedy soups (arXiv 2203.05482): average the experts that help, judged by a score on held-out data."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from jaxmerge.checkpoints.base import Checkpoint, materialize, open_checkpoint
from jaxmerge.errors import RecipeError
from jaxmerge.methods.checkpoint_averages import moved
from jaxmerge.streaming.progress import showing
from jaxmerge.streaming.sources import Source
from jaxmerge.trees.checks import check_same_tensors, is_mergeable, name_experts
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import Params, named_leaves, with_leaves
from jaxmerge.trees.task_vectors import accumulation_dtype


@dataclasses.dataclass(frozen=True)
class SoupTrial:
    """One expert's chance of getting into a greedy soup.

    Attributes:
        name: of the expert.
        alone: its own score.
        together: the score of the soup with it.
        taken: whether it is in the soup.
    """

    name: str
    alone: float
    together: float
    taken: bool


@dataclasses.dataclass(frozen=True)
class GreedySoup:
    """A greedy soup and how it came about: a table in a terminal and in a notebook.

    Attributes:
        params: the mean of the experts taken.
        score: its score.
        trials: one per expert, in the order in which they were tried.
    """

    params: Params
    score: float
    trials: tuple[SoupTrial, ...]

    @property
    def taken(self) -> tuple[str, ...]:
        """The names of the experts in the soup, the best first."""
        return tuple(trial.name for trial in self.trials if trial.taken)

    def rows(self) -> list[tuple[str, ...]]:
        """The table: expert, its own score, the score of the soup with it, whether it was taken."""
        return [(t.name, f"{t.alone:.6g}", f"{t.together:.6g}", "yes" if t.taken else "no") for t in self.trials]

    _HEAD = ("expert", "score alone", "score of the soup with it", "taken")

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        title = f"{len(self.taken)} of {len(self.trials)} experts, score {self.score:.6g}"
        table = Table(*self._HEAD, title=title, title_justify="left")
        for row in self.rows():
            table.add_row(*row)
        console = Console(width=120)
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip("\n")

    def __repr__(self) -> str:
        return f"GreedySoup({', '.join(self.taken)} of {len(self.trials)} experts, score {self.score:.6g})"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self._HEAD)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self.rows())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def greedy_soup(
    experts: Sequence[Source] | Mapping[str, Source],
    score: Callable[[Any], Any],
    *,
    alone: Sequence[float] | Mapping[str, float] | None = None,
    progress: bool | None = None,
) -> GreedySoup:
    """Greedy soup: tries the experts from the best to the worst and averages those that do not lower the score.

    Args:
        experts: a list or a dict by name of parameter trees, paths or URLs of checkpoints, or opened ones. One at a
            time is read, and its tensors one by one once it has been scored: two models are held, the soup and the soup
            with one more, and whatever was given in memory.
        score: of parameters, as JAX arrays in the expert's container (`jm.open_checkpoint(path).load()` for a
            path); higher is better, on data that no expert was trained on. It is called once for every expert and once
            for every expert but the best.
        alone: the experts' own scores where they are known, in order or by name.
        progress: show each trial; by default in a terminal or notebook.

    Returns:
        The soup, its score, and every trial. What is not floating point is the best expert's.

    Raises:
        StructureError, ShapeError, DTypeError: the experts differ.
        CheckpointError: one cannot be opened or read.
        RecipeError: a score is not a number, or there are not as many as experts.

    Experts with equal scores are tried in their order. An expert that leaves the score as it is is taken, as in the
    paper. Source: arXiv 2203.05482, recipe 1.
    """
    sources = name_experts(experts)
    with showing(progress) as display:
        _check_same(sources)
        own = _known(alone, tuple(sources)) if alone is not None else {}
        for name, source in sources.items():
            if name not in own:
                own[name] = _number(score(_loaded(source)), f"expert {name!r}")
                display.say(f"{name}: {own[name]:.6g} alone")
        order = sorted(own, key=lambda name: -own[name])
        best, *rest = order
        soup, of_soup = _loaded(sources[best]), own[best]
        trials = [SoupTrial(best, of_soup, of_soup, True)]
        mean = {n: x.astype(_wide(x)) for n, x in named_leaves(soup).items() if is_mergeable(x)}
        count = 1
        for name in rest:
            trial = _with_one_more(mean, count, sources[name])
            params = _like(soup, trial)
            together = _number(score(params), f"the soup with expert {name!r}")
            taken = together >= of_soup
            if taken:
                mean, count, soup, of_soup = trial, count + 1, params, together
            trials.append(SoupTrial(name, own[name], together, taken))
            display.say(f"{name}: {together:.6g} with the soup, {'taken' if taken else 'left out'}")
            del trial, params  # before the next ones are made
    return GreedySoup(soup, of_soup, tuple(trials))


def _with_one_more(mean: dict[str, Any], count: int, source: Source) -> dict[str, Any]:
    """The mean of `count` experts and one more, whose tensors are read one by one."""
    rate = jnp.asarray(1 / (count + 1), jnp.float32)
    with _tree(source) as tree:
        leaves = named_leaves(tree)
        return {name: _move(x, _array(leaves[name]), rate) for name, x in mean.items()}


@functools.partial(jax.jit)
def _move(mean: Float[Array, "..."], value: Num[Array, "..."], rate: Float[Array, ""]) -> Float[Array, "..."]:
    return moved(mean, None, value, rate)[0]


def _like(params: Params, mean: dict[str, Any]) -> Params:
    """Parameters with a mean in their dtypes."""
    leaves = named_leaves(params)
    return with_leaves(params, {n: mean[n].astype(x.dtype) if n in mean else x for n, x in leaves.items()})


def _check_same(sources: Mapping[str, Source]) -> None:
    """Checks that all experts have the first one's tensors, by their headers."""
    first, *others = sources
    with _tree(sources[first]) as tree:
        reference = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in named_leaves(tree).items()}
    for name in others:
        with _tree(sources[name]) as tree:
            check_same_tensors(reference, {name: named_leaves(tree)}, f"expert {first!r}")


@contextlib.contextmanager
def _tree(source: Source) -> Iterator[Params]:
    """The parameters of an expert, lazy leaves where it is a checkpoint, which is open for the time of the block."""
    if isinstance(source, str | Path):
        with open_checkpoint(source) as checkpoint:
            yield checkpoint.params
    else:
        yield source.params if isinstance(source, Checkpoint) else source


def _loaded(source: Source) -> Params:
    with _tree(source) as tree:
        loaded = materialize(tree)
    return with_leaves(loaded, {name: _array(x) for name, x in named_leaves(loaded).items()})


def _array(leaf: Any) -> Any:
    """A leaf as a JAX array."""
    return jnp.asarray(leaf[...] if isinstance(leaf, LazyTensor) else leaf)


def _wide(leaf: Any) -> Any:
    return jax.dtypes.canonicalize_dtype(accumulation_dtype(leaf.dtype))


def _known(scores: Sequence[float] | Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    if not isinstance(scores, Mapping):
        if len(scores) != len(names):
            raise RecipeError(f"found {len(scores)} scores, expected {len(names)}, one per expert")
        scores = dict(zip(names, scores, strict=True))
    if set(scores) != set(names):
        raise RecipeError(f"scores are given for {sorted(scores)}, but the experts are {list(names)}")
    return {name: _number(scores[name], f"expert {name!r}") for name in names}


def _number(value: Any, what: str) -> float:
    number = float(np.asarray(value))
    if math.isnan(number):
        raise RecipeError(f"the score of {what} is NaN, expected a number; higher is better")
    return number
