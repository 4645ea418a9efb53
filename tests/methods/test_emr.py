"""EMR: exact recovery, restored magnitudes, and the two ways to one expert."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from tests.methods.models import NAMES, assert_close, make_models, on_device

FEW = settings(max_examples=4)
SEEDS = st.integers(0, 2**32 - 1)


@FEW
@given(seed=SEEDS)
def test_a_single_expert_is_recovered(seed):
    base, experts = map(on_device, make_models(seed))
    held = jm.emr_experts({"math": experts["math"]}, base=base)
    assert held.rescalers[0] == 1
    assert_close(held.approximation("math", base), experts["math"], ulps=2)


@pytest.mark.parametrize("average", ["tensor", "model"])
@FEW
@given(seed=SEEDS)
def test_the_mean_magnitude_is_restored(average, seed):
    base, experts = map(on_device, make_models(seed))
    over = np.mean if average == "tensor" else np.sum
    held = jm.emr_experts(experts, base=base, average=average)
    for name in NAMES:
        found = held.approximation(name, base)
        sizes = [sum(over(np.abs(np.asarray(x[n] - base[n]))) for n in base) for x in (found, experts[name])]
        np.testing.assert_allclose(*sizes, rtol=1e-4)


@pytest.mark.parametrize("average", ["tensor", "model"])
def test_a_held_expert_is_the_one_that_is_merged(average):
    base, experts = map(on_device, make_models(1))
    held = jm.emr_experts(experts, base=base, average=average)
    for name in NAMES:
        merged = jm.merge(jm.emr(name, average=average), experts, base=base)
        assert_close(held.approximation(name, base), merged, ulps=2)


def test_an_expert_that_agrees_nowhere_is_the_base():
    base = {"w": jnp.zeros(3)}
    opposed = {"small": {"w": -jnp.ones(3)}, "large": {"w": 2 * jnp.ones(3)}}
    held = jm.emr_experts(opposed, base=base)
    np.testing.assert_array_equal(held.approximation("small", base)["w"], 0)
    np.testing.assert_array_equal(held.approximation("large", base)["w"], 2)


def test_mistakes_are_told():
    base, experts = map(on_device, make_models(1))
    with pytest.raises(jm.RecipeError, match="no expert is named 'law'"):
        jm.merge(jm.emr("law"), experts, base=base)
