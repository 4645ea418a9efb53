"""WIDEN: one expert, whole-model scale, and layouts."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from tests.methods.models import assert_close, make_models, on_device

FEW = settings(max_examples=4)


@FEW
@given(seed=st.integers(0, 2**32 - 1))
def test_one_expert_is_that_expert(seed):
    base, experts = map(on_device, make_models(seed))
    assert_close(jm.merge(jm.widen(), [experts["math"]], base=base), experts["math"], ulps=2)


def test_layouts_agree(rng):
    base, *experts = (rng.standard_normal((6, 9)).astype(np.float32) for _ in range(4))
    flax = jm.merge(jm.widen(), [{"a/kernel": jnp.asarray(x)} for x in experts], base={"a/kernel": jnp.asarray(base)})
    torch = jm.merge(
        jm.widen(), [{"a.weight": jnp.asarray(x.T)} for x in experts], base={"a.weight": jnp.asarray(base.T)}
    )
    np.testing.assert_allclose(torch["a.weight"].T, flax["a/kernel"], rtol=1e-5, atol=1e-6)


def test_columns_of_zeros_are_merged_like_others():
    base = {"a/kernel": jnp.zeros((3, 4))}
    merged = jm.merge(jm.widen(), [{"a/kernel": jnp.ones((3, 4))}], base=base)
    np.testing.assert_allclose(merged["a/kernel"], 1.0)
