"""Frank-Wolfe among candidates: its steps, against NumPy, with few reads; and positions among task vectors."""

from __future__ import annotations

import warnings
from collections import Counter

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmerge as jm
from jaxmerge.errors import NonFiniteError, RecipeError
from jaxmerge.learning.frank_wolfe import select
from jaxmerge.trees.lazy import ArrayTensor

SHAPES = {"head": (3, 4), "bias": (4,), "unused": (2,)}
NAMES = ("maths", "code", "law")  # not in alphabetical order
RNG = np.random.default_rng(0)
BASE = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
CANDIDATES = {e: {n: (w + RNG.normal(size=w.shape)).astype(np.float32) for n, w in BASE.items()} for e in NAMES}
TARGET = RNG.normal(size=SHAPES["head"]).astype(np.float32)
BATCHES = [RNG.normal(size=(5, 3)).astype(np.float32) for _ in range(2)]


def loss(params, x):
    """Squared errors, which do not depend on one of the tensors."""
    return jnp.mean(jnp.square(x @ (params["head"] - TARGET) + params["bias"][None]))


def loss_by_hand(params):
    return np.mean([np.mean((x @ (params["head"] - TARGET) + params["bias"]) ** 2) for x in BATCHES])


def gradient_by_hand(params):
    errors = [x @ (params["head"] - TARGET) + params["bias"] for x in BATCHES]
    head = np.mean([2 * x.T @ e / e.size for x, e in zip(BATCHES, errors, strict=True)], axis=0)
    bias = np.mean([2 * e.sum(axis=0) / e.size for e in errors], axis=0)
    return {"head": head, "bias": bias, "unused": np.zeros(2)}


def wide(params):
    return {name: np.asarray(x, np.float64) for name, x in params.items()}


def lazy(params):
    return {name: ArrayTensor(x) for name, x in params.items()}


def learn(candidates=CANDIDATES, base=BASE, **options):
    return jm.learn_frank_wolfe(
        candidates, BATCHES, **{"loss": loss, "base": base, "steps": 3, "progress": False} | options
    )


def by_hand(steps, start, step_size, granularity, alignment):
    base, candidates = wide(BASE), {name: wide(x) for name, x in CANDIDATES.items()}
    merged = {n: w + start * sum(candidates[e][n] - w for e in NAMES) for n, w in base.items()}
    candidates["start"] = dict(merged)
    losses, chosen = [], []
    for t in range(steps):
        gradient = gradient_by_hand(merged)
        losses.append(loss_by_hand(merged))
        scores = {}
        for name, candidate in candidates.items():
            scores[name] = {}
            for n, g in gradient.items():
                size = np.linalg.norm(g) * np.linalg.norm(candidate[n]) if alignment == "cosine" else 1
                scores[name][n] = np.sum(g * candidate[n]) / size if size else 0.0
        if granularity == "task":
            best = min(scores, key=lambda name: sum(scores[name].values()))
            choice = {n: best for n in base}
        else:
            choice = {n: min(scores, key=lambda name: scores[name][n]) for n in base}
        chosen.append(list(choice.values()))
        gamma = 2 / (t + 2) * step_size
        merged = {n: w + gamma * (candidates[choice[n]][n] - w) for n, w in merged.items()}
    return merged, losses, chosen


@pytest.mark.parametrize(
    ("start", "step_size", "granularity", "alignment"),
    [(0.3, 0.5, "task", "cosine"), (0.3, 0.5, "layer", "cosine"), (0.0, 1.0, "layer", "inner_product")],
)
def test_steps_are_those_of_numpy(start, step_size, granularity, alignment):
    """Also of candidates on disk; the coefficients that are learned give the model that the steps led to."""
    options = {"start": start, "step_size": step_size, "granularity": granularity, "alignment": alignment}
    learned = learn(**options)
    merged, losses, chosen = by_hand(3, **options)
    np.testing.assert_allclose(learned.history["loss"], losses, rtol=1e-5)
    names = [list(dict.fromkeys(row)) for row in chosen] if granularity == "task" else chosen
    order = list(learned.coefficients)
    by_tensor = np.array(chosen)[:, [list(SHAPES).index(n) for n in order]]
    np.testing.assert_array_equal(learned.history["chosen"], by_tensor if granularity == "layer" else np.ravel(names))
    found = jm.merge(learned.method, CANDIDATES, base=BASE)
    for name, expected in merged.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)

    lazily = learn({name: lazy(x) for name, x in CANDIDATES.items()}, lazy(BASE), **options)
    assert lazily.coefficients == learned.coefficients
    if granularity == "task":
        half = learn(steps=2, **options)
        rest = learn(state=half.state, **options)
        assert rest.history["step"].tolist() == [2]
        for name, row in learned.coefficients.items():
            np.testing.assert_allclose(list(rest.coefficients[name].values()), list(row.values()), rtol=1e-6)


def test_no_step_stays_and_a_whole_step_arrives():
    for candidate, share in learn(steps=1, step_size=0.0).coefficients["head"].items():
        assert share == np.float32(0.3), candidate
    whole = learn(steps=1, step_size=1.0)
    arrived = whole.history["chosen"][0]
    vertex = jm.merge(whole.method, CANDIDATES, base=BASE)
    for name, wanted in CANDIDATES[arrived].items():
        np.testing.assert_allclose(vertex[name], wanted, rtol=1e-6, atol=1e-6)


def test_one_tensor_of_one_candidate_is_held_at_a_time():
    """Each candidate is read once to start, once a step for its alignment, and the chosen one once more."""

    class Counted(ArrayTensor):
        def read(self, box):
            reads[self.label] += 1
            held.append(self.label)
            return super().read(box)

    reads, held = Counter(), []
    candidates = {e: {n: Counted(x, f"{e}/{n}") for n, x in model.items()} for e, model in CANDIDATES.items()}
    learned = learn(candidates, lazy(BASE), steps=2)
    for candidate in NAMES:
        steps = 2 + (learned.history["chosen"] == candidate).sum()
        assert all(reads[f"{candidate}/{name}"] == 1 + steps for name in SHAPES)
    assert all(a != b for a, b in zip(held, held[1:], strict=False))  # none is read to be kept


def test_soft_steps_mix_one_candidate_for_every_task():
    """Without inner steps the published simple form; with them and on the simplex, the same as `learn` by hand."""
    losses = {"x": loss, "y": lambda params, x: -loss(params, x)}
    soft = jm.learn_frank_wolfe_soft(
        CANDIDATES, BATCHES, losses=losses, base=BASE, steps=2, inner_steps=0, granularity="layer", progress=False
    )
    merged = wide(BASE)
    for t in range(2):
        gradient = gradient_by_hand(merged)
        new = dict(merged)
        for at, name in enumerate(soft.coefficients):
            g = gradient[name]
            scores = {e: np.sum(g * x[name]) / np.linalg.norm(x[name]) for e, x in CANDIDATES.items()}
            first = min(scores, key=lambda e: scores[e])
            second = min((e for e in NAMES if e != first), key=lambda e: -scores[e])
            assert soft.history["chosen"][t, at].tolist() == [first, second]
            for candidate in (first, second):
                new[name] = new[name] + 0.3 * 2 / (t + 2) * (CANDIDATES[candidate][name] - merged[name])
        merged = new
    found = jm.merge(soft.method, CANDIDATES, base=BASE)
    for name, expected in merged.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)

    options = {"optimizer": optax.sgd(0.1), "constrain": jm.simplex()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one tensor has no part in the loss, as learn tells
        trained = jm.learn_frank_wolfe_soft(
            CANDIDATES, BATCHES, losses={"x": loss}, base=BASE, steps=1, inner_steps=3, progress=False, **options
        )
        (candidate,) = trained.history["chosen"][0]
        chosen = {"x": CANDIDATES[candidate]}
        alone = jm.learn(
            jm.adamerging(0.3), chosen, BATCHES, loss=loss, base=BASE, steps=3, progress=False, **options
        )  # fmt: skip
    for name, row in trained.coefficients.items():
        assert row == {e: alone.coefficients[name]["x"] if e == candidate else 0 for e in NAMES}


def test_the_lowest_sum_or_the_lowest_of_each_tensor_among_what_is_not_taken():
    scores = {"a": {"v": 0.1, "w": 0.5}, "b": {"v": 0.4, "w": 0.1}, "c": {"v": 0.1, "w": 0.4}}
    assert select(scores, "task", {}) == {"v": "b", "w": "b"}
    assert select(scores, "layer", {}) == {"v": "a", "w": "b"}
    assert select(scores, "task", {"v": {"b"}, "w": {"b"}}) == {"v": "c", "w": "c"}
    assert select(scores, "layer", {"v": {"a"}, "w": {"b"}}) == {"v": "c", "w": "c"}


def test_what_makes_no_sense_is_refused():
    with pytest.raises(RecipeError, match="step_size is 2"):
        learn(step_size=2.0)
    with pytest.raises(RecipeError, match="a candidate is named 'start'"):
        learn({"start": BASE})
    with pytest.raises(RecipeError, match="there were no batches"):
        jm.learn_frank_wolfe(CANDIDATES, [], loss=loss, base=BASE, progress=False)
    with pytest.raises(NonFiniteError, match="not finite at step 0"):
        learn(loss=lambda params, x: loss(params, x) * jnp.nan)
    with pytest.raises(RecipeError, match="the state has 3 tensors and 3 candidates, expected 3 and 2"):
        learn({name: CANDIDATES[name] for name in NAMES[:2]}, state=learn(steps=0).state)
    with pytest.raises(RecipeError, match="found 4 tasks and 3 candidates"):
        jm.learn_frank_wolfe_soft(CANDIDATES, BATCHES, losses=dict.fromkeys("abcd", loss), base=BASE)


def test_self_positioning_is_a_mix_of_task_vectors_and_a_distance():
    """It starts at their mean; a step follows the derivatives of softmax and scale, by finite differences."""
    method = jm.self_positioning(0.8)

    def position(a, scale):
        share = np.exp(a) / np.exp(a).sum()
        return {n: w + scale * sum(s * (CANDIDATES[e][n] - w) for s, e in zip(share, NAMES, strict=True))
                for n, w in wide(BASE).items()}  # fmt: skip

    for name, value in jm.merge(method, CANDIDATES, base=BASE).items():
        np.testing.assert_allclose(value, position(np.zeros(3), 0.8)[name], rtol=1e-5, atol=1e-6)
    learned = jm.learn(
        method, CANDIDATES, BATCHES[:1], loss=loss, base=BASE, steps=1, optimizer=optax.sgd(0.1), progress=False
    )
    point, expected = np.array([0.0, 0.0, 0.0, 0.8]), np.zeros(4)

    def of(z):
        params = position(z[:3], z[3])
        return np.mean((BATCHES[0] @ (params["head"] - TARGET) + params["bias"]) ** 2)

    for i in range(4):
        step = 1e-5 * np.eye(4)[i]
        expected[i] = point[i] - 0.1 * (of(point + step) - of(point - step)) / 2e-5
    weights, scale = learned.coefficients.values()
    np.testing.assert_allclose([*weights.values(), scale], expected, rtol=1e-4, atol=1e-6)
