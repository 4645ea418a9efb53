"""Small models for the tests of methods: three layers, names as Flax gives them, and few shapes: each is a program."""

from typing import Any

import jax.numpy as jnp
import numpy as np

Tensors = dict[str, Any]

SHAPES = {
    **{f"blocks/{layer}/kernel": (8, 16) for layer in range(3)},
    **{f"blocks/{layer}/bias": (16,) for layer in range(3)},
}
WITH_EMBEDDING = {"embed/embedding": (8, 16), **SHAPES}
"""A tensor more, outside the layers and with other axes than a kernel."""

NAMES = ("math", "code", "chat")


def make_models(
    seed: int = 0, dtype: Any = np.float32, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> tuple[Tensors, dict[str, Tensors]]:
    """A base and three experts by name, as NumPy arrays; task vectors are a tenth of the weights."""
    rng = np.random.default_rng(seed)
    base = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    experts = {
        expert: {n: (x + 0.1 * rng.standard_normal(x.shape)).astype(dtype) for n, x in base.items()} for expert in NAMES
    }
    return base, experts


def on_device(tree: Any) -> Any:
    """The same with JAX arrays, dicts in their order (`jax.tree.map` would sort them by key)."""
    return {k: on_device(v) for k, v in tree.items()} if isinstance(tree, dict) else jnp.asarray(tree)


def assert_same(found: Tensors, wanted: Tensors) -> None:
    """Bit for bit, container of names and dtypes included."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        got, want = np.asarray(found[name]), np.asarray(value)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want, err_msg=name)


def assert_close(found: Tensors, wanted: Tensors, ulps: int = 1) -> None:
    """Within some units in the last place of the dtype, at the size of 1 or of each entry, whichever is more."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        got, want = np.asarray(found[name]), np.asarray(value)
        assert got.dtype == want.dtype and got.shape == want.shape, name
        step = ulps * float(jnp.finfo(want.dtype).eps)
        np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=step, atol=step, err_msg=name)
