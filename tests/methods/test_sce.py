"""SCE: what its selection and weights promise whatever the numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from tests.methods.models import assert_close, assert_same, make_models, on_device

FEW = settings(max_examples=4)
SEEDS = st.integers(0, 2**32 - 1)


@FEW
@given(seed=SEEDS, count=st.integers(1, 3))
def test_sce_of_equal_experts_is_the_expert_only_at_density_one(seed, count):
    base, experts = map(on_device, make_models(seed))
    equal = [experts["math"]] * count
    assert_close(jm.merge(jm.sce(1.0), equal, base=base), experts["math"], ulps=2)
    assert_same(jm.merge(jm.sce(0.9), equal, base=base), base)


@pytest.mark.parametrize("density", [0.0, 0.25, 0.5, 1.0])
def test_sce_keeps_its_share_of_the_entries_that_vary(density):
    base = {"w": jnp.zeros(60)}
    a = jnp.concatenate([jnp.arange(1.0, 41.0), jnp.ones(20)])
    b = jnp.concatenate([-a[:40] / 2, jnp.ones(20)])
    merged = jm.merge(jm.sce(density), [{"w": a}, {"w": b}], base=base)["w"]
    assert np.count_nonzero(merged) == (60 if density == 1 else int(density * 40))


def test_sce_weighs_small_task_vectors_alike_if_asked():
    base, experts = {"w": jnp.zeros(2)}, [{"w": jnp.full(2, 1e-4)}, {"w": jnp.full(2, 3e-4)}]
    by_energy = jm.merge(jm.sce(1.0), experts, base=base)["w"]
    alike = jm.merge(jm.sce(1.0, min_energy=1e-6), experts, base=base)["w"]
    np.testing.assert_allclose(by_energy, 2.8e-4, rtol=1e-5)
    np.testing.assert_allclose(alike, 2e-4, rtol=1e-5)
