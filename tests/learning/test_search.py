"""Sweeps are loops; CMA-ES finds the coefficients that a merge was made with."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from tests.methods.models import make_models, on_device

SHAPES = {"layers/0/kernel": (4, 4), "layers/1/kernel": (4, 4)}
BASE, EXPERTS = map(on_device, make_models(shapes=SHAPES))
EXPERTS = dict(reversed(EXPERTS.items()))  # in no alphabetical order
TA: jm.Method = jm.task_arithmetic(0.3)
TARGET = jm.merge(jm.task_arithmetic(1.0, weights=[0.9, -0.2, 0.4]), EXPERTS, base=BASE)


def nearness(params):
    return -sum(jnp.sum((params[name] - TARGET[name]) ** 2) for name in TARGET)


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_sweep_is_a_loop(at_once):
    values = jnp.asarray([0.0, 0.3, 0.6, 0.9, 1.2])
    swept = jm.sweep(jm.task_arithmetic, values, EXPERTS, nearness, base=BASE, at_once=at_once)
    loop = [float(nearness(jm.merge(jm.task_arithmetic(float(v)), EXPERTS, base=BASE))) for v in values]
    np.testing.assert_allclose(swept.scores, loop, rtol=1e-5)
    assert swept.best == int(np.argmax(loop))
    assert repr(swept.method) == repr(jm.task_arithmetic(float(values[swept.best])))
    assert "5 trials" in repr(swept)


def test_a_sweep_over_one_weight_per_expert_keeps_their_order():
    values = np.array([[0.9, -0.2, 0.4], [0.4, -0.2, 0.9]], np.float32)
    swept = jm.sweep(lambda w: jm.task_arithmetic(1.0, weights=w), values, EXPERTS, nearness, base=BASE)
    assert swept.best == 0 and swept.scores[0] == pytest.approx(0, abs=1e-8)


def test_cma_es_finds_the_weights():
    start = jm.linear([0.3, 0.3, 0.3], normalize=False)
    experts = {name: jm.task_vector(expert, BASE) for name, expert in EXPERTS.items()}
    wanted = jm.task_vector(TARGET, BASE)
    score = lambda p: -sum(float(jnp.sum((p[name] - wanted[name]) ** 2)) for name in wanted)  # noqa: E731
    found = jm.search(start, experts, score, evaluations=250, progress=False)
    np.testing.assert_allclose(np.array(jax.tree.leaves(found.method)), [0.9, -0.2, 0.4], atol=0.05)
    assert found.score == max(found.history) and len(found.history) <= 250
    again = jm.search(start, experts, score, evaluations=20, progress=False)
    np.testing.assert_array_equal(again.history, found.history[:20])
    assert repr(found).startswith("Searched(linear(")


def test_one_coefficient_within_bounds():
    found = jm.search(
        jm.task_arithmetic(jm.learnable(0.9, per_tensor=False, per_expert=False)),
        EXPERTS,
        lambda p: float(nearness(p)),
        evaluations=60,
        base=BASE,
        bounds=(0.0, 0.2),
    )
    assert float(jax.tree.leaves(found.method)[-1]) == pytest.approx(0.2, abs=1e-3)


def test_bad_input(monkeypatch):
    def search(method=TA, score=lambda p: 0.0, evaluations=5):
        return jm.search(method, EXPERTS, score, evaluations=evaluations, base=BASE, progress=False)

    sweep = lambda values, score=nearness: jm.sweep(jm.task_arithmetic, values, EXPERTS, score, base=BASE)  # noqa: E731
    for wrong, error, match in [
        (lambda: search(evaluations=0), jm.RecipeError, "evaluations"),
        (lambda: search(jm.model_stock()), jm.RecipeError, "no coefficient"),
        (lambda: search(score=lambda p: np.nan), jm.NonFiniteError, "none of 5"),
        (lambda: search(score=lambda p: np.ones(3)), jm.RecipeError, "one number"),
        (lambda: sweep(jnp.float32(1)), jm.RecipeError, "trials"),
        (lambda: sweep(jnp.ones(2), lambda p: jnp.ones(3)), jm.RecipeError, "one number"),
        (lambda: sweep(jnp.ones(2), lambda p: jnp.nan * nearness(p)), jm.NonFiniteError, "2 trials"),
    ]:
        with pytest.raises(error, match=match):
            wrong()
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(jm.RecipeError, match=r"jaxmerge\[search\]"):
        search()
