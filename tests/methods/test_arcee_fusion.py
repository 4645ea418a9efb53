"""Arcee Fusion: every entry comes from one of the two models."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.methods import arcee_fusion as arcee
from tests.methods.models import assert_same, make_models, on_device

FEW = settings(max_examples=4)


@FEW
@given(seed=st.integers(0, 2**32 - 1), axis=st.sampled_from(["input", "output", None, -1]))
def test_entries_come_from_either_model(seed, axis):
    base, experts = map(on_device, make_models(seed))
    merged = jm.merge(jm.arcee_fusion(axis=axis), [experts["math"]], base=base)
    taken = {name: np.asarray(merged[name] == x) for name, x in experts["math"].items()}
    assert all((taken[name] | np.asarray(merged[name] == x)).all() for name, x in base.items())
    share = np.mean(np.concatenate([x.ravel() for x in taken.values()]))
    assert 0 < share < 0.5
    assert_same(jm.merge(jm.arcee_fusion(axis=axis), [base], base=base), base)


def test_layouts_agree(rng):
    a, b = (jnp.asarray(rng.standard_normal((6, 9)).astype(np.float32)) for _ in range(2))
    flax = jm.merge(jm.arcee_fusion(), [{"a/kernel": b}], base={"a/kernel": a})["a/kernel"]
    torch = jm.merge(jm.arcee_fusion(), [{"a.weight": b.T}], base={"a.weight": a.T})["a.weight"]
    np.testing.assert_array_equal(torch.T, flax)


def test_small_changes_are_not_lost_in_rounding(rng):
    a = 0.02 * rng.standard_normal((512, 4)).astype(np.float32)
    b = a + np.array([1e-5, 1e-3, 0.1, 10.0], np.float32) * rng.standard_normal(a.shape).astype(np.float32)
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(0) + 1e-8 for x in (b, a))
    found = arcee._divergence(jnp.asarray(a), jnp.asarray(b), (0,))[0]
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(0), rtol=3e-3)


def test_it_fuses_one_expert():
    base, experts = map(on_device, make_models())
    with pytest.raises(jm.RecipeError, match="found 3 experts, expected 1"):
        jm.merge(jm.arcee_fusion(), experts, base=base)
