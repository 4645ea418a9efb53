"""T3: what it weighs, and that mixing outputs is mixing weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm


class Model(nn.Module):
    """Convolution, scanned layers, norm: kernels, and parameters that are no kernels."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2,), name="conv")(x)
        block = nn.scan(
            lambda layer, x, _: (jnp.tanh(layer(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = block(nn.Dense(4, name="layers"), x, None)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x).reshape(x.shape[0], -1))


MODEL = Model()
X = np.random.default_rng(0).standard_normal((3, 4, 2)).astype(np.float32)


def make_pair(scale=1.0):
    rng = np.random.default_rng(1)
    abstract = jax.eval_shape(MODEL.init, jax.random.key(0), X)
    a, b = (jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract) for _ in range(2))
    return a, jax.tree.map(lambda x, y: x + scale * (y - x), a, b)


def reference(p, q):
    """The divergence in float64."""
    p, q = (np.exp(x - np.max(x)) / np.sum(np.exp(x - np.max(x))) for x in (np.float64(p), np.float64(q)))
    m = (p + q) / 2
    return sum(np.sum(x * np.log(x / m)) for x in (p, q)) / 2


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(0, 8))
def test_divergence_is_symmetric_bounded_and_zero_for_equal_predictions(seed, size):
    p, q = (size * np.random.default_rng(seed).standard_normal((2, 4, 5))).astype(np.float32)
    found = jm.jensen_shannon(p, q)
    np.testing.assert_allclose(found, [reference(a, b) for a, b in zip(p, q, strict=True)], 1e-4, 1e-6)
    np.testing.assert_array_equal(found, jm.jensen_shannon(q, p))
    np.testing.assert_allclose(jm.jensen_shannon(p, p + 3), 0, atol=1e-6)


def test_weights_run_between_their_bounds_and_as_published_hardly_at_all():
    certain = np.array([[0.0, -np.inf], [0.0, -np.inf]], np.float32)
    pair = certain, np.array([[0.0, -np.inf], [-np.inf, 0.0]], np.float32)  # equal, and disjoint
    np.testing.assert_allclose(jm.jensen_shannon(*pair), [0, math.log(2)], 1e-6)
    np.testing.assert_allclose(jm.t3_weights(*pair), [0, 1], atol=1e-6)
    np.testing.assert_allclose(jm.t3_weights(*pair, low=0.2, high=0.6), [0.2, 0.6], 1e-6)
    published = jm.t3_weights(*pair, gamma=0.5)
    np.testing.assert_allclose(published, [0.5, 1 / (1 + math.exp(-0.5 * math.log(2)))], 1e-6)
    assert published[1] < 0.586
    np.testing.assert_allclose(jm.t3_weights(*pair, gamma=1e3, centre=0.35), [0, 1], atol=1e-6)
    texts = [x[:, None].repeat(2, axis=1) for x in pair]  # several predictions per example
    np.testing.assert_allclose(jm.t3_weights(*texts), [0, 1], atol=1e-6)


@pytest.fixture(scope="module")
def predict():
    """Both forms in one program, for either orientation."""

    @jax.jit
    def predict(generalist, specialist, x):
        return {
            (per, weighs): jm.t3(MODEL.apply, generalist, specialist, x, weighs=weighs, per=per)
            for per in ("batch", "sample")
            for weighs in ("generalist", "specialist")
        }

    return predict


def test_each_example_is_predicted_with_weights_of_its_own(predict):
    generalist, specialist = make_pair()
    found = predict(generalist, specialist, X)
    apply = jax.jit(MODEL.apply)
    expected = jm.t3_weights(apply(generalist, X), apply(specialist, X))
    assert np.ptp(expected) > 0.05
    for weighs, (a, b) in {"generalist": (generalist, specialist), "specialist": (specialist, generalist)}.items():
        logits, weights = found["sample", weighs]
        np.testing.assert_allclose(weights, expected, 1e-5, 1e-6)
        for i, weight in enumerate(np.asarray(weights)):
            mixed = jax.tree.map(lambda x, y, w=weight: w * x + (1 - w) * y, a, b)
            np.testing.assert_allclose(logits[i], apply(mixed, X)[i], 1e-4, 1e-5)
        logits, weights = found["batch", weighs]
        np.testing.assert_allclose(weights, np.mean(expected), 1e-5)
        weight = np.mean(expected)
        mixed = jax.tree.map(lambda x, y, w=weight: w * x + (1 - w) * y, a, b)
        np.testing.assert_allclose(logits, apply(mixed, X), 1e-4, 1e-5)


def test_equal_models_predict_what_each_does_and_the_ends_are_the_models(predict):
    generalist, specialist = make_pair()
    for (per, weighs), (logits, weights) in predict(generalist, generalist, X).items():
        np.testing.assert_allclose(weights, 0, atol=1e-6)
        np.testing.assert_allclose(logits, jax.jit(MODEL.apply)(generalist, X), 1e-5, 1e-5, err_msg=f"{per} {weighs}")

    def seen(params, x):  # the parameters themselves, in place of a model's predictions
        flat = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(params)])
        return jnp.broadcast_to(flat, (x.shape[0], flat.size))

    for end, model in ((1.0, generalist), (0.0, specialist)):
        logits, _ = jm.t3(seen, generalist, specialist, X, weighs="generalist", low=end, high=end)
        np.testing.assert_array_equal(logits[0], seen(model, X)[0])


def test_mistakes_are_told_apart():
    a, b = {"w": jnp.ones((2, 3))}, {"w": jnp.zeros((2, 4))}
    with pytest.raises(jm.ShapeError, match="expert 'specialist', tensor 'w'"):
        jm.t3(lambda p, x: x @ p["w"], a, b, X[0], weighs="generalist")
    with pytest.raises(jm.RecipeError, match="low is 0.7"):
        jm.t3(lambda p, x: x @ p["w"], a, a, X[0], weighs="generalist", low=0.7, high=0.3)
    with pytest.raises(jm.ShapeError, match="expected the same from both"):
        jm.t3_weights(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
