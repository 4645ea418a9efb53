"""M2N2: shared fitness, attraction, replacement, and merges that repeat what evolved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.learning import evolution
from tests.methods.models import assert_close

SHAPES = {"embed/kernel": (3, 4), "layers_2/kernel": (4, 4), "layers_10/kernel": (4, 4), "layers_10/bias": (4,)}


def make(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


def score(params):
    """Each example asks for one entry to be near its target."""
    flat = jnp.concatenate([x.reshape(-1) for x in params.values()])
    return jnp.exp(-((flat - TARGET) ** 2))


TARGET = np.concatenate([x.reshape(-1) for x in make(99).values()])


def numpy_crossover(a, b, ratio, boundary):
    """One angle, one boundary over the tensors by depth, in float64."""
    names = ["embed/kernel", "layers_2/kernel", "layers_10/bias", "layers_10/kernel"]
    x, y = (np.concatenate([np.asarray(m[n], np.float64).reshape(-1) for n in names]) for m in (a, b))
    angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    t = np.where(np.arange(len(x)) < boundary, ratio, 1 - ratio)
    child = np.sin((1 - t) * angle) / np.sin(angle) * x + np.sin(t * angle) / np.sin(angle) * y
    parts = np.split(child, np.cumsum([np.prod(SHAPES[n]) for n in names])[:-1])
    return {n: p.reshape(SHAPES[n]).astype(np.float32) for n, p in zip(names, parts, strict=True)}


@pytest.mark.parametrize("boundary", [0, 30])
def test_a_child_is_the_published_crossover(boundary, monkeypatch):
    """At boundary 0 it is a plain spherical interpolation."""
    a, b = make(0), make(1)
    monkeypatch.setattr(jax.random, "randint", lambda *_: jnp.int32(boundary))
    start = jm.niches_start({"a": a, "b": b}, score, population=3)
    after, record = jax.jit(lambda start, key: jm.niches_step(start, key, score, like=a))(start, jax.random.key(3))
    assert int(record.place) == 2  # the free place, whose fitness is zero
    weights = np.asarray(record.weights)
    x, y = ((a, b), (b, a))[int(record.parents[0])]
    x_flat, y_flat = (np.concatenate([np.asarray(v).reshape(-1) for v in m.values()]) for m in (x, y))
    angle = np.arccos(x_flat @ y_flat / np.linalg.norm(x_flat) / np.linalg.norm(y_flat))
    ratio = np.arcsin(weights[0, 1, 0] * np.sin(angle)) / angle
    if not np.isclose(weights[0, 0, 0], np.sin((1 - ratio) * angle) / np.sin(angle), rtol=1e-4):
        ratio = (np.pi - np.arcsin(weights[0, 1, 0] * np.sin(angle))) / angle
    found = {name: value[2] for name, value in after.models.items()}
    wanted = numpy_crossover(x, y, ratio, boundary)
    for name in found:
        np.testing.assert_allclose(found[name], wanted[name], atol=2e-5)


SEEDS = {"b": make(0), "a": make(1), "c": make(2)}  # in the order given, which is no alphabet


def run(key=1, per_tensor=False):
    return jm.evolve(SEEDS, score, steps=60, key=key, population=6, per_tensor=per_tensor, progress=False)


@pytest.fixture(scope="module")
def run_once():
    return run()


@pytest.mark.parametrize("per_tensor", [False, True])
def test_the_method_repeats_the_best_model(per_tensor, run_once):
    evolved = run(per_tensor=True) if per_tensor else run_once
    assert evolved.method is not None
    assert_close(jm.merge(evolved.method, SEEDS), evolved.params, ulps=64)  # rounded in each of many generations
    backwards = dict(reversed(SEEDS.items()))
    assert_close(jm.merge(evolved.method, backwards), evolved.params, ulps=64)
    np.testing.assert_allclose(np.mean(score(evolved.params)), evolved.score, rtol=1e-5)
    assert max(len(starts) for starts in evolved.method.starts) > 1  # pyright: ignore[reportAttributeAccessIssue]
    assert repr(evolved).startswith("Evolution(of b, a, c: score")


def test_the_method_streams(tmp_path, run_once):
    for name, seed in SEEDS.items():
        jm.save_checkpoint(tmp_path / name, seed)
    paths = {name: tmp_path / name for name in SEEDS}
    jm.merge_checkpoint(run_once.method, paths, out=tmp_path / "out", progress=False)
    streamed = jm.open_checkpoint(tmp_path / "out").load()
    memory = jm.merge(run_once.method, SEEDS)
    for name, value in memory.items():
        np.testing.assert_array_equal(streamed[name], value)


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), competition=st.sampled_from([0.0, 1.0]))
def test_shared_fitness(seed, competition):
    scores = np.random.default_rng(seed).integers(0, 2, (5, 7)).astype(np.float32)
    scores[1:, 0], scores[0, 0] = 0, 1  # model 0 alone solves example 0
    fitness = np.sum(scores / np.asarray(evolution._rivals(jnp.asarray(scores), competition)), axis=1)
    if competition:
        assert fitness[0] >= 1
        np.testing.assert_allclose(fitness.sum(), np.count_nonzero(scores.sum(0)), rtol=1e-5)
    else:
        np.testing.assert_array_equal(fitness, scores.sum(1))


def test_attraction_looks_for_what_the_first_parent_lacks():
    """Models 0 and 1 are clones; 2 solves what they do not. Whoever is first, a clone is never second to a clone."""
    scores = jnp.asarray([[1, 1, 0], [1, 1, 0], [0, 0, 1]], jnp.float32)
    niches = jm.Niches({"w": jnp.asarray([[1.0, 0], [1.0, 0], [0, 1.0]])}, scores)
    step = jax.jit(lambda key: jm.niches_step(niches, key, lambda p: jnp.zeros(3), like={"w": jnp.zeros(2)})[1].parents)
    pairs = {tuple(pair) for pair in np.asarray(jax.vmap(step)(jax.random.split(jax.random.key(0), 50))).tolist()}
    assert pairs == {(0, 2), (1, 2), (2, 0), (2, 1)}


def test_a_first_parent_that_dominates_is_no_accident():
    """No other model gains anything, which makes the published weights of the second parent 0 / 0: fitness decides."""
    niches = jm.Niches({"w": jnp.eye(3)}, jnp.asarray([[1.0, 1, 0], [1, 0, 0], [0, 0, 0]]))
    step = jax.jit(lambda key: jm.niches_step(niches, key, lambda p: p["w"], like={"w": jnp.zeros(3)}))
    after, record = jax.vmap(step)(jax.random.split(jax.random.key(0), 30))
    assert set(map(tuple, record.parents.tolist())) == {(0, 1), (1, 0)}  # never 2, which solves nothing
    assert jnp.isfinite(after.models["w"]).all()


def test_plain_fitness_never_loses_the_best():
    evolved = jm.evolve([make(0), make(1)], score, steps=200, population=5, competition=0.0, progress=False)
    assert (np.diff(evolved.history) >= -1e-7).all() and evolved.history[-1] > evolved.history[0]


def test_the_same_key_gives_the_same(run_once):
    np.testing.assert_array_equal(run().history, run_once.history)
    assert not np.array_equal(run(key=2).history, run_once.history)


def test_runs_go_side_by_side():
    start = jm.niches_start([make(0), make(1)], score, population=4)
    step = jax.jit(lambda key: jm.niches_step(start, key, score, like=make(0))[0].scores)
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_allclose(jax.vmap(step)(keys)[1], step(keys[1]), rtol=1e-5)


def test_mutated_models_are_no_merge():
    evolved = jm.evolve([make(0), make(1)], score, steps=5, mutation=0.01, population=3, progress=False)
    assert evolved.method is None and "mutated" in repr(evolved)


def test_bad_input():
    a, b = make(0), make(1)
    for wrong, error, match in [
        (lambda: jm.evolve([a], score, steps=1), jm.RecipeError, "two or more"),
        (lambda: jm.evolve([a, b], score, steps=1, population=1), jm.RecipeError, "population"),
        (lambda: jm.evolve([a, b], score, steps=0), jm.RecipeError, "steps"),
        (lambda: jm.evolve([a, b], lambda p: jnp.float32(1), steps=1), jm.RecipeError, "vector"),
        (lambda: jm.evolve([a, b], lambda p: -score(p), steps=1), jm.RecipeError, "from 0 up"),
        (lambda: jm.evolve([a, b], lambda p: score(p) / 0, steps=1), jm.NonFiniteError, "expert_0"),
        (lambda: jm.evolve([a, {"w": jnp.ones(3)}], score, steps=1), jm.StructureError, "expert_1"),
    ]:
        with pytest.raises(error, match=match):
            wrong()
    for runs, match in [({"w": [(1, (1.0,))]}, "grow from 0"), ({"w": [(0, (1.0, 2.0))]}, "one per expert")]:
        with pytest.raises(jm.RecipeError, match=match):
            jm.segments(runs, experts=["a"])
    with pytest.raises(jm.RecipeError, match="name them"):
        jm.merge(jm.segments({"w": [(0, (1.0,))]}, experts=["a"]), {"b": {"w": jnp.ones(3)}})
