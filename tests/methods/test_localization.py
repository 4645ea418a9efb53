"""TALL masks and Consensus merging: limits of their numbers, and the two ways to one expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from tests.methods.models import NAMES, assert_same, make_models, on_device

FEW = settings(max_examples=4)
SEEDS = st.integers(0, 2**32 - 1)


@FEW
@given(seed=SEEDS)
def test_consensus_of_none_keeps_all_and_of_more_than_there_are_nothing(seed):
    base, experts = map(on_device, make_models(seed))
    everything = jm.merge(jm.task_arithmetic(0.3), experts, base=base)
    assert_same(jm.merge(jm.consensus(0.3, minimum=0), experts, base=base), everything)
    assert_same(jm.merge(jm.consensus(0.3, minimum=len(NAMES) + 1), experts, base=base), base)


@FEW
@given(seed=SEEDS, minimum=st.integers(0, 3), threshold=st.floats(0, 2, width=32))
def test_consensus_counts_the_masks(seed, minimum, threshold):
    base, experts = map(on_device, make_models(seed))
    held = jm.tall_experts(experts, base=base, threshold=threshold)
    masks = [held.mask(name) for name in NAMES]
    agreed = {n: jnp.where(sum(m[n].astype(int) for m in masks) >= minimum, x, 0) for n, x in held.unified.items()}
    found = jm.merge(jm.consensus(1.0, minimum=minimum, threshold=threshold), experts, base=base)
    assert_same(found, jm.apply_task_vector(base, agreed))


def test_at_threshold_zero_a_mask_is_where_the_expert_moved():
    base = {"w": jnp.zeros(4)}
    experts = [{"w": jnp.asarray([1.0, 0.0, -2.0, 0.0])}, {"w": jnp.asarray([0.0, 0.0, 1.0, 3.0])}]
    held = jm.tall_experts(experts, base=base, threshold=0.0)
    for name, expert in zip(held.names, experts, strict=True):
        np.testing.assert_array_equal(held.mask(name)["w"], expert["w"] != 0)


@pytest.mark.parametrize("expert", NAMES)
def test_a_held_expert_is_the_one_that_is_merged(expert):
    base, experts = map(on_device, make_models(1))
    thresholds = dict(zip(NAMES, [0.2, 0.4, 0.6], strict=True))
    held = jm.tall_experts(experts, base=base, threshold=thresholds)
    merged = jm.merge(jm.tall_mask(expert, threshold=thresholds), experts, base=base)
    assert_same(held.approximation(expert, base), merged)


def test_masked_experts_are_a_pytree_of_one_task_vector_and_bits():
    base, experts = map(on_device, make_models(1))
    held = jm.tall_experts(experts, base=base)
    again = jax.jit(lambda held: held)(held)
    assert_same(again.approximation("code", base), held.approximation("code", base))
    entries = sum(x.size for x in base.values())
    assert held.nbytes == 4 * entries + 3 * entries // 8 + 3 * 4
    with pytest.raises(jm.RecipeError, match="'law'; there are math, code, chat"):
        held.mask("law")


def test_mistakes_are_told():
    base, experts = map(on_device, make_models(1))
    with pytest.raises(jm.RecipeError, match="no expert is named 'law'"):
        jm.merge(jm.tall_mask("law"), experts, base=base)
    with pytest.raises(jm.RecipeError, match=r"put a stage such as total\(\) before it"):
        jm.merge(jm.chain(jm.keep_consensus(), jm.total()), experts, base=base)
