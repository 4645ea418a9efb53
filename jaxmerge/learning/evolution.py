"""Evolution of merged models: M2N2 (natural niches, arXiv 2508.16204).

An archive of models. At each step two parents are drawn, merged with a random ratio and a random boundary, and the
child takes the place of the least fit. Fitness is shared: an example that few models solve is worth more to those that
do (competition), and the second parent is drawn by what it can do and the first cannot (attraction).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmerge.errors import NonFiniteError, RecipeError
from jaxmerge.learning.progress import counting
from jaxmerge.methods.method import Method
from jaxmerge.methods.segments import segments
from jaxmerge.trees.checks import check_same_tensors, is_mergeable, name_experts
from jaxmerge.trees.info import tensor_infos
from jaxmerge.trees.paths import Params, named_leaves, with_leaves
from jaxmerge.trees.task_vectors import accumulation_dtype

Score = Callable[[Params], Any]
"""One number per example, from 0 (wrong) up: a pure function of parameters that JAX can trace."""

_STRAIGHT = 1e-6
"""Sine of the angle below which two models are interpolated on a straight line, as in the published code."""

_AT_ONCE = 100
"""Steps per compiled call, after each of which the display moves on."""


@dataclasses.dataclass(frozen=True)
class Niches:
    """The archive of an evolution: a pytree, to be saved and gone on from.

    Attributes:
        models: parameters with a leading axis of P models, floating-point leaves in float32 at least.
        scores: `[P, N]`, what each model scores on each example. A free place is a model of zeros with scores of zero.
    """

    models: Params
    scores: Any

    @property
    def best(self) -> Params:
        """The parameters with the highest sum of scores."""
        return jax.tree.map(lambda x: x[jnp.argmax(jnp.sum(self.scores, axis=1))], self.models)


@dataclasses.dataclass(frozen=True)
class Crossover:
    """What one step did.

    Attributes:
        parents: `[2]`, their places in the archive.
        boundary: position where the second ratio begins, in all tensors one after the other, by depth, then by name.
        weights: `[2, 2, T]` before and after the boundary, of the first and second parent, for each tensor.
        place: of the child in the archive; P where it was the least fit itself.
        best: mean score of the best model afterwards.
    """

    parents: Any
    boundary: Any
    weights: Any
    place: Any
    best: Any


jax.tree_util.register_dataclass(Niches)
jax.tree_util.register_dataclass(Crossover)


@dataclasses.dataclass(frozen=True)
class Evolution:
    """What came out of an evolution.

    Attributes:
        params: the best model, in the container and dtypes of the first one given.
        score: its mean score.
        method: a merge method that makes it from the models given, in memory or streamed; None where entries were
            mutated, which no merge can repeat.
        history: `[steps]`, the mean score of the best model after each step.
        niches: the archive at the end.
        names: of the models given.
    """

    params: Params
    score: float
    method: Method | None
    history: Float[np.ndarray, " steps"]
    niches: Niches
    names: tuple[str, ...]

    def __repr__(self) -> str:
        made = "a merge" if self.method is not None else "mutated"
        places, examples = self.niches.scores.shape
        return (
            f"Evolution(of {', '.join(self.names)}: score {self.score:.6g} after {len(self.history)} steps, "
            f"{places} models, {examples} examples, {made})"
        )


def evolve(
    models: Sequence[Params] | Mapping[str, Params],
    score: Score,
    *,
    steps: int,
    key: int | Key[Array, ""] = 0,
    population: int = 20,
    competition: float = 1.0,
    attraction: bool = True,
    split: bool = True,
    per_tensor: bool = False,
    mutation: float = 0.0,
    progress: bool | None = None,
) -> Evolution:
    r"""Evolves merges of models by M2N2: natural niches, attraction, and split points that evolve too.

    Each step draws a first parent in proportion to its shared fitness $f_i = \sum_j s_{ij} / z_j$ with
    $z_j = (\sum_k s_{kj})^\alpha$, a second in proportion to $\sum_j \max(0, s_{ij} - s_{1j}) / z_j$, a ratio $w$ and a
    boundary. Before the boundary the child is the spherical interpolation of its parents at $w$, after it at $1 - w$.
    It joins the archive, and the model with the least shared fitness leaves.

    Args:
        models: two or more parameter trees of one structure.
        score: parameters → `[N]`, one number per example, not negative; traced and compiled once.
        steps: how many children are made; `score` runs once for each.
        key: a seed or a PRNG key. The same key gives the same evolution.
        population: P, places in the archive, at least as many as models. All P models are held in memory.
        competition: $\alpha$; 0 makes fitness the plain sum of scores, as in a genetic algorithm.
        attraction: false draws both parents by fitness.
        split: false has no boundary: one ratio for the whole child.
        per_tensor: an angle for each tensor. By default one serves the whole model, as published, and the tensors with
            the largest norms then decide it.
        mutation: standard deviation of noise added to every entry of a child; 0.01 in the paper where it starts from
            random models, 0 for trained ones.
        progress: show a bar; by default in a terminal or notebook.

    Raises:
        RecipeError: fewer than two models, an archive too small for them, or scores that are no vector, or negative.
        StructureError, ShapeError, DTypeError: the models differ.
        NonFiniteError: a model given scores NaN or infinity.

    Source: arXiv 2508.16204 and the authors' code. There, all second-parent weights can be zero, which gives NaN: we
    then draw by fitness. There, tensors follow each other in key order: here by depth, then by name, so that a boundary
    lies between early and late layers. Leaves that are not floating point are the first model's.
    """
    named = name_experts(models)
    if len(named) < 2:
        raise RecipeError(f"an evolution needs two or more models, found {len(named)}")
    if population < len(named):
        raise RecipeError(f"population is {population}, but {len(named)} models are given; each takes a place")
    if steps < 1:
        raise RecipeError(f"steps is {steps}, expected 1 or more")
    first = next(iter(named.values()))
    niches = niches_start(named, score, population=population)
    step = functools.partial(
        niches_step,
        score=score,
        like=first,
        competition=competition,
        attraction=attraction,
        split=split,
        per_tensor=per_tensor,
        mutation=mutation,
    )

    @jax.jit
    def some_steps(niches: Niches, keys: Key[Array, " steps"]) -> tuple[Niches, Crossover]:
        return jax.lax.scan(lambda state, key: step(state, key), niches, keys)

    keys = jax.random.split(jax.random.key(key) if isinstance(key, int) else key, steps)
    records = []
    with counting(progress, "Evolving", steps) as advance:
        for start in range(0, steps, _AT_ONCE):
            niches, record = some_steps(niches, keys[start : start + _AT_ONCE])
            records.append(jax.device_get(record))
            advance(len(record.place), f"best score {records[-1].best[-1]:.4g}")
    record = jax.tree.map(lambda *parts: np.concatenate(parts), *records)
    totals = np.asarray(jax.device_get(jnp.mean(niches.scores, axis=1)))
    winner = int(np.argmax(totals))
    params = _cast_like(jax.tree.map(lambda x: x[winner], niches.models), first)
    method = None if mutation else lineage(record, winner, named)
    return Evolution(params, float(totals[winner]), method, record.best, niches, tuple(named))


def niches_start(models: Sequence[Params] | Mapping[str, Params], score: Score, *, population: int = 20) -> Niches:
    """An archive of P places with the models given in the first of them.

    Args:
        models: parameter trees of one structure.
        score: as for `evolve`.
        population: P.

    Raises:
        RecipeError: scores are not one row of numbers from 0 up.
        NonFiniteError: a model scores NaN or infinity.
        StructureError, ShapeError, DTypeError: the models differ.
    """
    named = name_experts(models)
    leaves = {name: named_leaves(model) for name, model in named.items()}
    name, first = next(iter(leaves.items()))
    check_same_tensors(first, {other: x for other, x in leaves.items() if other != name}, f"expert {name!r}")
    judged = jax.jit(score)
    rows = []
    for expert, model in named.items():
        row = judged(model)
        found = f"scores of shape {getattr(row, 'shape', None)} for expert {expert!r}"
        if getattr(row, "ndim", None) != 1 or not row.size:
            raise RecipeError(f"found {found}, expected one number per example: a vector")
        row = np.asarray(row, np.float32)
        if not np.isfinite(row).all():
            example = int(np.argmin(np.isfinite(row)))
            raise NonFiniteError(f"expert {expert!r} scores NaN or infinity on example {example}")
        if row.min() < 0:
            raise RecipeError(f"expert {expert!r} scores {row.min():g} on an example; scores count from 0 up")
        rows.append(row)

    def stack(*xs: Any) -> Array:
        if not is_mergeable(xs[0]):
            return jnp.stack([jnp.asarray(xs[0])] * population)
        dtype = accumulation_dtype(xs[0].dtype)
        free = [jnp.zeros(xs[0].shape, dtype)] * (population - len(xs))
        return jnp.stack([*(jnp.asarray(x).astype(dtype) for x in xs), *free])

    stacked = {n: stack(*(x[n] for x in leaves.values())) for n in first}
    scores = np.zeros((population, len(rows[0])), np.float32)
    scores[: len(rows)] = rows
    return Niches(with_leaves(next(iter(named.values())), stacked), jnp.asarray(scores))


def niches_step(
    niches: Niches,
    key: Key[Array, ""],
    score: Score,
    *,
    like: Params,
    competition: float = 1.0,
    attraction: bool = True,
    split: bool = True,
    per_tensor: bool = False,
    mutation: float = 0.0,
) -> tuple[Niches, Crossover]:
    """One child: a pure function, for `jax.lax.scan` over steps and `jax.vmap` over runs.

    Args:
        niches: the archive.
        key: a PRNG key.
        score: as for `evolve`.
        like: parameters that give the dtypes that a child is scored in.
        competition: as for `evolve`.
        attraction: as for `evolve`.
        split: as for `evolve`.
        per_tensor: as for `evolve`.
        mutation: as for `evolve`.

    Returns:
        The next archive, and what was done.
    """
    of_first, of_second, of_ratio, of_boundary, of_noise = jax.random.split(key, 5)
    scores = niches.scores
    shared = scores / _rivals(scores, competition)
    fitness = jnp.sum(shared, axis=1)
    one = _draw(of_first, fitness, jnp.zeros(len(fitness), bool))
    gain = jnp.sum(jnp.maximum(0, shared - shared[one][None]), axis=1) if attraction else jnp.zeros_like(fitness)
    another = jnp.arange(len(fitness)) == one
    two = _draw(of_second, jnp.where(jnp.sum(gain) > 0, gain, fitness), another & ~(jnp.sum(gain) > 0))

    order = _order(niches.models)
    sizes = [size for _, size in order]
    ratio = jax.random.uniform(of_ratio)
    boundary = jax.random.randint(of_boundary, (), 0, sum(sizes)) if split else jnp.int32(sum(sizes))
    leaves = named_leaves(niches.models)
    pairs = {name: (leaves[name][one], leaves[name][two]) for name, _ in order}
    weights = jnp.stack([_weights(pairs, t, per_tensor) for t in (ratio, 1 - ratio)])
    child, start = {name: x[0] for name, x in leaves.items()}, 0
    noise = jax.random.split(of_noise, len(order))
    for number, ((name, size), (a, b)) in enumerate(zip(order, pairs.values(), strict=True)):
        before, after = (w[0, number] * a + w[1, number] * b for w in weights)
        place = jnp.arange(size, dtype=jnp.int32).reshape(a.shape)
        mixed = jnp.where(place < boundary - start, before, after)
        child[name] = mixed + mutation * jax.random.normal(noise[number], a.shape, a.dtype) if mutation else mixed
        start += size
    row = score(_cast_like(with_leaves(niches.models, child), like)).astype(scores.dtype)
    row = jnp.where(jnp.isfinite(row), jnp.maximum(row, 0), 0)  # a broken child solves nothing

    everyone = jnp.concatenate([scores, row[None]])
    place = jnp.argmin(jnp.sum(everyone / _rivals(everyone, competition), axis=1))

    def put(old: Array, new: Array) -> Array:
        return old.at[place].set(new, mode="drop")  # the child itself may be the least fit

    models = with_leaves(niches.models, {name: put(leaves[name], child[name]) for name in leaves})
    after = Niches(models, put(scores, row))
    record = Crossover(jnp.stack([one, two]), boundary, weights, place, jnp.max(jnp.mean(after.scores, axis=1)))
    return after, record


def _rivals(scores: Float[Array, "P N"], competition: float) -> Float[Array, "1 N"]:
    """$z_j$: what all models together score on an example."""
    together = jnp.sum(scores, axis=0, keepdims=True) ** competition
    return jnp.where(together > 0, together, 1)


def _draw(key: Key[Array, ""], weights: Float[Array, " P"], barred: Bool[Array, " P"]) -> Int[Array, ""]:
    """A place in proportion to the weights, none that is barred; any other place where no weight is left."""
    open_ = jnp.where(barred, 0.0, weights)
    open_ = jnp.where(jnp.sum(open_) > 0, open_, jnp.where(barred, 0.0, 1.0))
    return jax.random.categorical(key, jnp.log(open_))


def _weights(pairs: Mapping[str, tuple[Array, Array]], t: Float[Array, ""], per_tensor: bool) -> Float[Array, "2 T"]:
    """Weights of both parents in a spherical interpolation, for each tensor."""
    products = jnp.stack([jnp.stack([jnp.sum(a * a), jnp.sum(b * b), jnp.sum(a * b)]) for a, b in pairs.values()])
    products = products.astype(jnp.float32)
    if not per_tensor:
        products = jnp.broadcast_to(jnp.sum(products, axis=0), products.shape)
    aa, bb, ab = products.T
    norms = jnp.sqrt(aa * bb)
    angle = jnp.arccos(jnp.clip(ab / jnp.where(norms > 0, norms, 1), -1, 1))
    sine = jnp.sin(angle)
    curved = sine > _STRAIGHT
    sine = jnp.where(curved, sine, 1)
    return jnp.stack(
        [jnp.where(curved, jnp.sin((1 - t) * angle) / sine, 1 - t), jnp.where(curved, jnp.sin(t * angle) / sine, t)]
    )


def _order(models: Params) -> list[tuple[str, int]]:
    """Names and sizes of the tensors that are merged, of one model of the archive: by depth, then by name."""
    leaves = {name: x for name, x in named_leaves(models).items() if is_mergeable(x)}
    infos = tensor_infos({name: x.shape[1:] for name, x in leaves.items()})
    # What lies outside the stacks keeps its place in the tree relative to them: before, or after.
    names = list(infos)
    in_stack = [i for i, name in enumerate(names) if infos[name].layer is not None]
    first = in_stack[0] if in_stack else 0

    def depth(place: int) -> tuple[float, str]:
        layer = infos[names[place]].layer
        outside = -1.0 if place < first else float("inf")
        return (outside if layer is None else float(layer)), names[place]

    return [(names[place], infos[names[place]].size) for place in sorted(range(len(names)), key=depth)]


def _cast_like(params: Params, like: Params) -> Params:
    """Parameters in the container and dtypes of others."""
    leaves = named_leaves(params)
    return with_leaves(like, {name: leaves[name].astype(x.dtype) for name, x in named_leaves(like).items()})


def lineage(record: Crossover, place: int, models: Mapping[str, Params]) -> Method:
    """The merge of the models given at the start that makes the model at a place of the archive at the end.

    A spherical interpolation is a weighted sum once its angle is known, so crossovers of crossovers are weighted sums
    whose weights change at boundaries.

    Args:
        record: what each step did, stacked.
        place: in the archive.
        models: the models that the archive started from, by name.
    """
    order = _order(_stacked_shapes(models))
    sizes = np.array([size for _, size in order])
    edges = np.concatenate([[0], np.cumsum(sizes)])
    # Which steps matter is known from the last to the first; who lives at a place changes along the way.
    needed, wanted = [], {place}
    for step in range(len(record.place) - 1, -1, -1):
        at = int(record.place[step])
        if at in wanted:
            needed.append(step)
            wanted = (wanted - {at}) | {int(p) for p in record.parents[step]}
    identity = np.eye(len(models))
    alive: dict[int, tuple[np.ndarray, np.ndarray]] = {
        i: (np.array([0]), identity[i][None]) for i in range(len(models))
    }
    nothing = (np.array([0]), np.zeros((1, len(models))))
    for step in reversed(needed):
        one, two = (alive.get(int(p), nothing) for p in record.parents[step])
        alive[int(record.place[step])] = _crossed(one, two, int(record.boundary[step]), record.weights[step], edges)
    starts, weights = alive.get(place, nothing)
    table = {}
    for number, (name, _) in enumerate(order):
        low, high = edges[number], edges[number + 1]
        begin = int(np.searchsorted(starts, low, side="right")) - 1
        runs: list[tuple[int, tuple[float, ...]]] = []
        for s in range(begin, len(starts)):
            if starts[s] >= high:
                break
            row = tuple(weights[s].tolist())
            if not runs or runs[-1][1] != row:
                runs.append((max(int(starts[s] - low), 0), row))
        table[name] = runs
    return segments(table, experts=tuple(models))


def _crossed(
    one: tuple[np.ndarray, np.ndarray],
    two: tuple[np.ndarray, np.ndarray],
    boundary: int,
    weights: Float[np.ndarray, "2 2 T"],
    edges: Int[np.ndarray, " edges"],
) -> tuple[np.ndarray, np.ndarray]:
    """Starts of runs, and the weights `[runs, K]` of the models in each, of a child."""
    by_tensor = edges[:-1] if np.ptp(weights, axis=2).any() else edges[:1]
    inside = [boundary] if boundary < edges[-1] else []
    starts = np.unique(np.concatenate([one[0], two[0], by_tensor, inside]).astype(int))
    side = (starts >= boundary).astype(int)
    tensor = np.searchsorted(edges, starts, side="right") - 1
    shares = [
        side_weights[1][np.searchsorted(side_weights[0], starts, side="right") - 1] for side_weights in (one, two)
    ]
    own = weights.astype(np.float64)[side, :, tensor]
    return starts, own[:, :1] * shares[0] + own[:, 1:] * shares[1]


def _stacked_shapes(models: Mapping[str, Params]) -> dict[str, Any]:
    """One model of an archive as shapes with a leading axis."""
    leaves = named_leaves(next(iter(models.values())))
    return {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in leaves.items()}
