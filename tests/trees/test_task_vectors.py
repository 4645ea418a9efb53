"""Task vectors as trees: out of a model and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxmerge as jm

BASE = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3), "steps": jnp.arange(2), "key": jax.random.key(0)}


def expert(dtype=jnp.float32):
    return BASE | {"w": (BASE["w"] * 1.01 + 0.001).astype(dtype)}


def test_round_trip():
    vector = jm.task_vector(expert(), BASE)
    np.testing.assert_array_equal(vector["w"], expert()["w"] - BASE["w"])
    np.testing.assert_array_equal(vector["steps"], 0)
    applied = jm.apply_task_vector(BASE, vector)
    np.testing.assert_allclose(applied["w"], expert()["w"], rtol=1e-7)
    assert applied["key"] is BASE["key"]
    np.testing.assert_array_equal(applied["steps"], BASE["steps"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_differences_of_half_precision_are_float32(dtype):
    base = BASE | {"w": BASE["w"].astype(dtype)}
    vector = jm.task_vector(expert(dtype), base)
    assert vector["w"].dtype == jnp.float32
    applied = jm.apply_task_vector(base, vector)
    assert applied["w"].dtype == dtype
    np.testing.assert_array_equal(applied["w"], expert(dtype)["w"])


@given(scale=st.floats(-4, 4, width=32))
def test_scale(scale):
    vector = jm.task_vector(expert(), BASE)
    wanted = BASE["w"] + np.float32(scale) * vector["w"]
    np.testing.assert_allclose(jm.apply_task_vector(BASE, vector, scale)["w"], wanted, rtol=1e-6, atol=1e-7)


def test_analogy_and_merge_agree():
    vector = jm.task_vector(expert(), BASE)
    merged = jm.merge(jm.task_arithmetic(-0.5), [expert()], base=BASE)
    np.testing.assert_allclose(jm.apply_task_vector(BASE, vector, -0.5)["w"], merged["w"], rtol=1e-6, atol=1e-7)


def test_under_jit_and_grad():
    def loss(scale):
        return jnp.sum(jm.apply_task_vector(BASE, jm.task_vector(expert(), BASE), scale)["w"])

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.3), jnp.sum(jm.task_vector(expert(), BASE)["w"]), rtol=1e-5)


def test_wrong_trees():
    with pytest.raises(jm.StructureError, match="lacks 'w'"):
        jm.task_vector({name: x for name, x in BASE.items() if name != "w"}, BASE)
    with pytest.raises(jm.ShapeError, match="'w'"):
        jm.apply_task_vector(BASE, BASE | {"w": jnp.ones((3, 2))})
    with pytest.raises(jm.DTypeError, match="'w'"):
        jm.task_vector(expert(jnp.bfloat16), BASE)


def test_cast():
    cast = jm.cast(BASE, "bfloat16")
    assert cast["w"].dtype == jnp.bfloat16
    assert cast["steps"] is BASE["steps"]
