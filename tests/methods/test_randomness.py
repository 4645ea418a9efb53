"""Random draws: fixed by key, expert, tensor and position; independent otherwise; right on average."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.trees.info import tensor_infos
from tests.methods.everything import EVERYTHING, each
from tests.methods.models import NAMES, assert_same, make_models, on_device

DRAWING = {name: entry for name, entry in EVERYTHING.items() if entry.draws}
SHAPE = (60, 80)


def kept(name="w", expert="a", key=0, density=0.3, shape=SHAPE):
    """Which entries of a task vector of ones survive."""
    base = {name: jnp.zeros(shape)}
    return np.asarray(jm.merge(jm.dare(density), {expert: {name: jnp.ones(shape)}}, base=base, key=key)[name]) != 0


@each(DRAWING)
def test_same_key_same_bytes_other_key_others(entry):
    base, experts = map(on_device, make_models())
    merged = jm.merge(entry.method, experts, base=base, key=3)
    assert_same(jm.merge(entry.method, experts, base=base, key=jax.random.key(3)), merged)
    assert_same(jm.merge(entry.method, experts, base=base, key=jax.random.PRNGKey(3)), merged)
    other = jm.merge(entry.method, experts, base=base, key=4)
    assert all((np.asarray(other[name]) != np.asarray(merged[name])).any() for name in base)


def test_draws_belong_to_names_not_to_places():
    base, experts = map(on_device, make_models())
    together = jm.merge(jm.dare(0.5), experts, base=base, key=1)
    swapped = jm.merge(jm.dare(0.5), {name: experts[name] for name in reversed(NAMES)}, base=base, key=1)
    for name, value in together.items():
        np.testing.assert_allclose(swapped[name], value, rtol=1e-5, atol=1e-6)
    part = jm.merge(
        jm.dare(0.5),
        {n: {"blocks/1/bias": x["blocks/1/bias"]} for n, x in experts.items()},
        base={"blocks/1/bias": base["blocks/1/bias"]},
        key=1,
    )
    assert_same(part, {"blocks/1/bias": together["blocks/1/bias"]})


@pytest.mark.parametrize("change", [{"name": "v"}, {"expert": "b"}, {"key": 1}], ids=lambda c: next(iter(c)))
def test_draws_of_other_tensors_experts_and_keys_are_independent(change):
    first, second = kept(), kept(**change)
    expected, n = 0.3**2, first.size
    both = (first & second).mean()
    assert abs(both - expected) < 5 * np.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.9])
def test_as_many_are_kept_as_the_density_says(density):
    masks = np.stack([kept(key=key, density=density) for key in range(10)])
    error = np.sqrt(density * (1 - density))
    assert abs(masks.mean() - density) < 5 * error / np.sqrt(masks.size)
    for axis in (0, 1):  # no stripes along rows or columns
        shares = masks.mean(axis=(0, 1 + axis))
        assert (np.abs(shares - density) < 5.5 * error / np.sqrt(masks.size / shares.size)).all()
    neighbours = (masks[:, :, 1:] & masks[:, :, :-1]).mean()
    assert abs(neighbours - density**2) < 6 * np.sqrt(density**2 / masks.size)


def test_survivors_are_divided_by_the_density_exactly():
    base, experts = map(on_device, make_models())
    zero = jax.tree.map(jnp.zeros_like, base)
    delta = jax.tree.map(jnp.subtract, experts["math"], base)
    merged = jm.merge(jm.dare(0.25), [delta], base=zero, key=0)
    for name, value in merged.items():
        survived = np.asarray(value) != 0
        np.testing.assert_array_equal(np.asarray(value)[survived], 4 * np.asarray(delta[name])[survived])


@pytest.mark.parametrize(
    "stage", [jm.drop(0.4), jm.magprune(0.4, epsilon=0.2), jm.magprune(0.4, axis="tensor")], ids=repr
)
def test_dropping_is_unbiased(stage):
    delta = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((6, 8), np.float32))}
    base = jax.tree.map(jnp.zeros_like, delta)
    keys = jax.random.split(jax.random.key(0), 2000)
    merge = jax.jit(jax.vmap(lambda key: jm.merge(jm.chain(stage, jm.total()), [delta], base=base, key=key)["w"]))
    draws = np.asarray(merge(keys), np.float64)
    error = draws.std(axis=0) / np.sqrt(len(keys))
    assert (np.abs(draws.mean(axis=0) - delta["w"]) < 5 * error + 1e-6).all()


def test_restoring_the_l1_norm_restores_it_in_every_draw():
    base, experts = map(on_device, make_models())
    zero = jax.tree.map(jnp.zeros_like, base)
    delta = jax.tree.map(jnp.subtract, experts["math"], base)
    for method in (jm.dare(0.3, restore="l1"), jm.della_linear(0.5, restore="l1")):
        merged = jm.merge(method, [delta], base=zero, key=0)
        for name, value in merged.items():
            np.testing.assert_allclose(jnp.abs(value).sum(), jnp.abs(delta[name]).sum(), rtol=1e-5)


def probability(name, delta, **options):
    info = tensor_infos({name: delta.shape})[name]
    stage: Any = jm.magprune(0.5, epsilon=0.2, **options).at(info, ("a",))
    return np.asarray(stage.keep_probability(jnp.asarray(delta), 0, info))


def test_magprune_keeps_the_large_more_often():
    delta = np.random.default_rng(0).permutation(np.arange(1.0, 9, dtype=np.float32))
    np.testing.assert_allclose(probability("b", delta), 0.3 + 0.4 * (delta - 1) / 7, rtol=1e-6)
    fibres = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    for axis in (0, 1):
        found = probability("w", fibres, axis=axis)
        np.testing.assert_allclose(
            np.sort(found, axis),
            np.moveaxis(
                np.broadcast_to(np.linspace(0.3, 0.7, fibres.shape[axis]), np.moveaxis(fibres, axis, -1).shape),
                -1,
                axis,
            ),
            rtol=1e-6,
        )
        np.testing.assert_array_equal(np.argsort(found, axis), np.argsort(np.abs(fibres), axis))


def test_fibres_of_one_entry_are_kept_with_the_mean_probability():
    np.testing.assert_allclose(probability("w", np.ones((3, 1), np.float32), axis=1), 0.5)
    np.testing.assert_allclose(probability("b", np.ones(1, np.float32)), 0.5)


@pytest.mark.parametrize("shape", [(6, 4), (3, 5, 6, 4)], ids=["dense", "convolution"])
def test_input_axes_are_the_same_fibres_in_both_layouts(shape):
    """A Flax kernel is (window…, in, out), a Hugging Face weight (out, in, window…)."""
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    there = (kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))
    weight = kernel.transpose(there)
    np.testing.assert_array_equal(probability("l.weight", weight), probability("l/kernel", kernel).transpose(there))


def test_attention_output_projection_ranks_over_heads_and_size():
    kernel = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    found = probability("attn/out/kernel", kernel)
    np.testing.assert_allclose(found.reshape(6, 5), probability("l/kernel", kernel.reshape(6, 5)))
