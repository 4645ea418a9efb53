"""AdaMerging: task arithmetic until it has learned, selected entries in ++, and coefficients that can be read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmerge as jm
from jaxmerge.errors import RecipeError
from jaxmerge.learning.losses import mean_entropy
from jaxmerge.methods.adamerging import KeepElected
from tests.methods.models import NAMES, make_models, on_device

SHAPES = {"layers/0/kernel": (4, 4), "layers/1/kernel": (4, 4)}
BASE, EXPERTS = make_models(shapes=SHAPES)
X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


def apply(params, x):
    return {"task": jnp.tanh(x @ params["layers/0/kernel"]) @ params["layers/1/kernel"]}


def learn(method, steps):
    experts, base = {name: on_device(expert) for name, expert in EXPERTS.items()}, on_device(BASE)
    rate = optax.sgd(0.1)
    return jm.learn(
        method, experts, [X], loss=jm.entropy(apply), steps=steps, base=base, optimizer=rate, progress=False
    )


def selected(density: float) -> list[dict[str, np.ndarray]]:
    """TIES' entries in NumPy: trimmed over the model, of the elected sign, neither averaged nor summed."""
    deltas = [{name: expert[name].astype(np.float64) - BASE[name] for name in BASE} for expert in EXPERTS.values()]
    for delta in deltas:
        sizes = np.sort(np.abs(np.concatenate([d.ravel() for d in delta.values()])))[::-1]
        cut = sizes[int(density * sizes.size) - 1]
        delta.update({name: np.where(np.abs(d) >= cut, d, 0) for name, d in delta.items()})
    for name in BASE:
        sign = np.sign(sum(delta[name] for delta in deltas))
        for delta in deltas:
            delta[name] = np.where(np.sign(delta[name]) == sign, delta[name], 0)
    return deltas


@pytest.mark.parametrize("density", [None, 0.5])
def test_without_steps_it_is_a_sum_with_the_first_number(density):
    method = jm.adamerging(0.4, density=density)
    merged = jm.merge(learn(method, 0).method, EXPERTS, base=BASE)
    for name in BASE:
        if density is None:
            expected = BASE[name] + 0.4 * sum(expert[name] - BASE[name] for expert in EXPERTS.values())
        else:
            expected = BASE[name] + 0.4 * sum(delta[name] for delta in selected(density))
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-6)


def test_plus_plus_learns_by_what_is_selected():
    """One step of gradient descent: the derivative is the inner product with the selected entries."""
    learned = learn(jm.adamerging(density=0.5), 1)
    deltas = selected(0.5)
    start = {n: jnp.asarray(BASE[n] + 0.3 * sum(d[n] for d in deltas), jnp.float32) for n in BASE}
    gradient = jax.device_get(jax.jit(jax.grad(lambda p: jm.entropy(apply)(p, X)))(start))
    for name, row in learned.coefficients.items():
        for expert, delta in zip(NAMES, deltas, strict=True):
            expected = 0.3 - 0.1 * np.sum(gradient[name] * delta[name])
            np.testing.assert_allclose(row[expert], expected, rtol=1e-5)


def test_task_wise_coefficients_are_sums_over_tensors():
    layers, task = learn(jm.adamerging(), 1).coefficients, learn(jm.adamerging([0.3, 0.3, 0.3], per="task"), 1)
    assert set(task.coefficients) == set(NAMES)
    assert learn(jm.task_arithmetic(jm.learnable(0.3, per_tensor=False, per_expert=False)), 0).coefficients == {
        "stages/2/factor": pytest.approx(0.3)
    }
    for name, value in task.coefficients.items():
        np.testing.assert_allclose(value - 0.3, sum(row[name] - 0.3 for row in layers.values()), rtol=1e-4, atol=1e-7)


def test_given_coefficients_are_settings():
    table = {"layers/0/kernel": [0.1, 0.2, 0.3], ".*": [0.0, 0.5, 1.0]}
    merged = jm.merge(jm.adamerging(table), EXPERTS, base=BASE)
    for name in BASE:
        weights = table.get(name, table[".*"])
        deltas = [expert[name] - BASE[name] for expert in EXPERTS.values()]
        expected = BASE[name] + sum(w * d for w, d in zip(weights, deltas, strict=True))
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RecipeError, match="put elect_sign"):
        jm.merge(jm.chain(jm.keep_elected(), jm.total()), EXPERTS, base=BASE)
    assert jm.keep_elected() == KeepElected()


def test_entropy_is_that_of_the_softmax_also_where_a_class_is_impossible():
    logits = np.array([[0.0, 3.0, -np.inf], [200.0, -200.0, 1.0]])
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    expected = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(axis=1).mean()
    value, gradient = jax.value_and_grad(mean_entropy)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.isfinite(gradient).all() and gradient[0, 2] == 0
    assert np.isnan(mean_entropy(jnp.array([[jnp.nan, 0.0]])))
    uniform = {"few": jnp.zeros((2, 3)), "many": jnp.zeros((2, 50))}
    np.testing.assert_allclose(jm.entropy(lambda p, x: uniform)(None, None), np.log(3) + np.log(50), rtol=1e-6)
    np.testing.assert_allclose(jm.entropy(lambda p, x: uniform, normalize=True)(None, None), 2, rtol=1e-6)


def test_coefficients_are_drawn_tensor_by_expert(tmp_path):
    learned = learn(jm.adamerging(), 1)
    figure = jm.plot_coefficients(learned)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(SHAPES)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(NAMES)
    shown = axes.images[0].get_array()
    assert shown is not None
    np.testing.assert_allclose(shown, [[row[name] for name in NAMES] for row in learned.coefficients.values()])
    figure.savefig(tmp_path / "coefficients.png")
    assert (tmp_path / "coefficients.png").stat().st_size > 1000
    assert len(jm.plot_coefficients({"a": 0.1, "b": 0.2}).axes[0].get_yticklabels()) == 2
