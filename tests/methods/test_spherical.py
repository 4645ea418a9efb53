"""NuSLERP, Multi-SLERP and the Karcher mean: what holds for all vectors, and where directions run out."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.errors import RecipeError

SEEDS = st.integers(0, 2**32 - 1)
COUNTS = st.sampled_from([1, 3])  # each number of experts is a program of its own
FEW = settings(max_examples=15)
MEANS = {"multislerp": jm.multislerp(), "karcher": jm.karcher(iterations=30)}
all_means = pytest.mark.parametrize("method", MEANS.values(), ids=MEANS)


def vectors(seed, count, size=6):
    return list(np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32))


def merged(method, given, base=None):
    tensors = [{"w": jnp.asarray(x)} for x in given]
    return np.asarray(jm.merge(method, tensors, base=None if base is None else {"w": jnp.asarray(base)})["w"])


def unit(x):
    return x / np.linalg.norm(x)


@FEW
@given(seed=SEEDS)
def test_nuslerp_is_symmetric_and_ends_at_its_experts(seed):
    a, b = vectors(seed, 2)
    np.testing.assert_allclose(
        merged(jm.nuslerp([0.3, 0.7]), [a, b]), merged(jm.nuslerp([0.7, 0.3]), [b, a]), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(merged(jm.nuslerp([2.0, 0.0]), [a, b]), a, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged(jm.nuslerp([0.0, 2.0]), [a, b]), b, rtol=1e-5, atol=1e-5)


@FEW
@given(seed=SEEDS, t=st.floats(0, 1, width=32), exponent=st.integers(-9, -1), sign=st.sampled_from([-1, 1]))
def test_nuslerp_of_nearly_parallel_vectors_is_finite_and_near_the_line(seed, t, exponent, sign):
    a, off = vectors(seed, 2)
    b = sign * (2 * a + np.float32(10.0**exponent) * off)
    found = merged(jm.nuslerp([1 - t, t]), [a, b])
    assert np.isfinite(found).all()
    if sign > 0:
        angle = np.arccos(np.clip(unit(a.astype(float)) @ unit(b.astype(float)), -1, 1))
        bound = (angle**2 + 1e-5) * np.linalg.norm(b)
        assert np.abs(found - ((1 - t) * a + t * b)).max() <= bound


def test_nuslerp_by_axis_agrees_between_layouts(rng):
    base, a, b = (rng.standard_normal((5, 7)).astype(np.float32) for _ in range(3))

    def at(name, axis, transposed):
        tensors = [{name: jnp.asarray(x.T if transposed else x)} for x in (base, a, b)]
        value = np.asarray(jm.merge(jm.nuslerp([0.3, 0.6], axis=axis), tensors[1:], base=tensors[0])[name])
        return value.T if transposed else value

    for axis, number in (("input", 0), ("output", 1)):  # a Flax kernel is (in, out)
        flax = at("dense/kernel", axis, False)
        np.testing.assert_allclose(at("dense.weight", axis, True), flax, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(at("dense/kernel", number, False), flax, rtol=1e-6, atol=1e-6)


@all_means
@FEW
@given(seed=SEEDS, count=COUNTS, exponent=st.integers(-20, 20))
def test_means_scale_and_keep_the_mean_length(method, seed, count, exponent):
    given = vectors(seed, count)
    found = merged(method, given)
    np.testing.assert_allclose(np.linalg.norm(found), np.mean([np.linalg.norm(x) for x in given]), rtol=1e-5)
    np.testing.assert_array_equal(merged(method, [x * np.float32(2.0**exponent) for x in given]), found * 2.0**exponent)


@all_means
@FEW
@given(seed=SEEDS, count=COUNTS)
def test_mean_of_equal_experts_is_the_expert(method, seed, count):
    (expert,) = vectors(seed, 1)
    np.testing.assert_allclose(merged(method, [expert] * count), expert, rtol=1e-6)


@FEW
@given(seed=SEEDS)
def test_karcher_mean_of_two_lies_halfway_along_the_arc(seed):
    a, b = map(unit, vectors(seed, 2))
    np.testing.assert_allclose(merged(jm.karcher(), [a, b]), merged(jm.nuslerp(), [a, b]), rtol=1e-4, atol=1e-5)


@FEW
@given(seed=SEEDS, count=st.sampled_from([2, 3]))
def test_karcher_mean_has_no_pull_left(seed, count):
    """The defining property: logarithms at the mean add up to zero."""
    units = [unit(np.abs(x).astype(np.float64)) for x in vectors(seed, count)]  # one orthant, so the mean is unique
    mean = unit(merged(jm.karcher(iterations=30), [x.astype(np.float32) for x in units]).astype(np.float64))
    angles = [np.arccos(np.clip(u @ mean, -1, 1)) for u in units]
    pull = sum(a / np.sin(a) * (u - np.cos(a) * mean) for a, u in zip(angles, units, strict=True))
    assert np.linalg.norm(pull) < 1e-4


def test_without_an_iteration_the_karcher_mean_is_multislerp():
    given = vectors(0, 4)
    weights = [0.1, 0.4, 0.2, 0.6]
    np.testing.assert_allclose(
        merged(jm.karcher(weights, iterations=0), given), merged(jm.multislerp(weights), given), rtol=1e-6
    )


@all_means
def test_where_directions_cancel_the_mean_is_straight(method):
    (a,) = vectors(0, 1)
    np.testing.assert_allclose(merged(method, [a, -3 * a]), -a, rtol=1e-6)
    np.testing.assert_array_equal(merged(method, [a, a], base=a), a)


@all_means
def test_zero_vectors_have_no_direction_but_a_length(method):
    a, b = vectors(0, 2)
    both = merged(method, [a, b])
    np.testing.assert_allclose(merged(method, [a, b, 0 * a]), both * 2 / 3, rtol=1e-5)


def test_nuslerp_takes_two_experts():
    with pytest.raises(RecipeError, match="found 3.*multislerp"):
        merged(jm.nuslerp(), vectors(0, 3))
