"""A merge as a JAX function: jit, vmap, grad, one compilation per shape, no implicit transfers."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from tests.methods.everything import EVERYTHING, KEY, each
from tests.methods.models import NAMES, assert_close, assert_same, make_models, on_device

all_methods = each(EVERYTHING)


def inputs(entry, seed=0, dtype: Any = np.float32):
    base, experts = make_models(seed, dtype)
    return on_device(base), {name: on_device(experts[name]) for name in NAMES[: entry.experts]}


@all_methods
def test_under_jit_as_outside_and_without_implicit_transfers(entry):
    base, experts = jax.device_put(inputs(entry))
    key = jax.device_put(jax.random.key(KEY))

    @jax.jit
    def merge(method, base, experts, key):
        return jm.merge(method, experts, base=base, key=key)

    jitted = merge(entry.method, base, experts, key)
    with jax.transfer_guard("disallow"):
        eager = jm.merge(entry.method, experts, base=base, key=key)
    # XLA fuses the arithmetic of the whole model, which may round once less.
    assert_close(jitted, eager, ulps=2)


CLOSED_OVER = ["linear", "ties", "dare", "lines"]


@each({name: EVERYTHING[name] for name in CLOSED_OVER})
def test_coefficients_may_be_constants_of_a_program(entry):
    base, experts = jax.device_put(inputs(entry))
    merge = jax.jit(lambda base, experts: jm.merge(entry.method, experts, base=base, key=KEY))
    wanted = merge(base, experts)
    assert_close(wanted, jm.merge(entry.method, experts, base=base, key=KEY), ulps=2)
    with jax.transfer_guard("disallow"):
        again = merge(base, experts)
    assert_same(again, wanted)


SWEEPS = {
    "scale": (lambda c: jm.task_arithmetic(c), [0.0, 0.3, 1.5]),
    "weights": (lambda c: jm.linear(jnp.stack([c, 1 - c, jnp.ones_like(c)])), [0.2, 0.5, 0.9]),
    "t": (lambda c: jm.chain(jm.trim(0.3), jm.elect_sign(), jm.disjoint_mean(), jm.scale(c)), [0.1, 1.0]),
    "density": (lambda c: jm.ties(c), [0.1, 0.25, 1.0]),
    "density per tensor": (lambda c: jm.ties(c, scope="tensor"), [0.1, 0.25, 1.0]),
    "kept": (lambda c: jm.breadcrumbs(c, gamma=0.125), [0.25, 0.5]),
    "kept at random": (lambda c: jm.dare(c), [0.25, 0.5, 1.0]),
    "by rank": (lambda c: jm.della(c, epsilon=0.1), [0.25, 0.5]),
    "alpha": (lambda c: jm.lines(alpha=c, beta=1 - c), [0.25, 0.5]),
    "depth": (lambda c: jm.task_arithmetic(jm.by_depth([c, 1.0])), [0.25, 0.5]),
}


@pytest.mark.parametrize(("make", "values"), SWEEPS.values(), ids=SWEEPS)
def test_vmap_over_a_coefficient_is_a_loop(make, values):
    base, experts = map(on_device, make_models())
    swept = jax.vmap(lambda c: jm.merge(make(c), experts, base=base, key=KEY))(jnp.asarray(values, jnp.float32))
    for i, value in enumerate(values):
        one = jm.merge(make(jnp.float32(value)), experts, base=base, key=KEY)
        assert_close({name: x[i] for name, x in swept.items()}, one, ulps=2)
        known = jm.merge(make(value), experts, base=base, key=KEY) if "weights" not in repr(make(1.0)) else one
        assert_close(known, one, ulps=2)


DIFFERENTIATED = {name: entry for name, entry in EVERYTHING.items() if entry.differentiates}


@each(DIFFERENTIATED)
def test_gradients_are_finite_and_those_of_finite_differences_in_float64(entry, x64):
    """Along a random direction of coefficients, base and experts; and where experts equal the base."""
    base, experts = inputs(entry, dtype=np.float64)
    rng = np.random.default_rng(1)
    point = (jax.tree.map(lambda c: jnp.asarray(c, jnp.float64), entry.method), base, experts)

    def direction(path, x):
        step_function = any(getattr(part, "name", "") in STEPS for part in path)
        return jnp.asarray(rng.standard_normal(x.shape) * (0 if step_function else 1))

    step = jax.tree_util.tree_map_with_path(direction, point)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(point):
        method, base, experts = point
        merged = jm.merge(method, experts, base=base, key=KEY)
        return sum(jnp.sum(jnp.sin(x)) for x in merged.values()), merged

    (_, merged), gradient = loss(point)
    assert all(x.dtype == np.float64 for x in merged.values())
    if entry.reference:
        wanted = entry.reference(*jax.device_get((base, list(experts.values()))))
        for name, value in wanted.items():  # coefficients may have been rounded to float32 on their way
            np.testing.assert_allclose(merged[name], value, rtol=1e-7, atol=1e-7, err_msg=name)
    slope = sum(jnp.vdot(g, s) for g, s in zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True))
    h = 1e-7
    above, below = (jax.tree.map(lambda x, s, h=h: x + h * s, point, step) for h in (h, -h))
    np.testing.assert_allclose(slope, (loss(above)[0][0] - loss(below)[0][0]) / (2 * h), rtol=2e-5, atol=1e-5)

    nothing_learned = loss((point[0], base, dict.fromkeys(experts, base)))[1]
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves((gradient, nothing_learned)))


STEPS = {"gamma"}
"""Coefficients that count entries; the result is a step function of them. A density does more where it also divides."""


def compilations(caplog, run):
    """Names of the programs compiled while `run` runs."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        run()
    messages = [record.getMessage() for record in caplog.records]
    return [m for m in messages if m.startswith("Finished XLA compilation of")]


COMPILED = {
    "plain": jm.task_arithmetic(0.4),
    "by depth": jm.task_arithmetic(jm.by_depth([0.1, 0.4])),
    "by pattern": jm.task_arithmetic({".*kernel": 0.5, ".*": jm.by_depth([0.1, 0.4])}),
    "trimmed": jm.ties(jm.by_depth([0.1, 0.4]), scope="tensor"),
    "trimmed over the model": jm.ties(0.2),
    "dropped": jm.dare(jm.by_depth([0.2, 0.4])),
}


@pytest.mark.parametrize("method", COMPILED.values(), ids=COMPILED)
def test_one_compilation_per_shape(method, caplog):
    shapes = {
        f"layers/{i}/{name}": shape for i in range(12) for name, shape in {"kernel": (4, 6), "bias": (6,)}.items()
    }
    base, experts = map(on_device, make_models(0, shapes=shapes))
    first = compilations(caplog, lambda: jm.merge(method, experts, base=base, key=KEY))
    assert sum("merge_whole" in message for message in first) <= 2
    assert len(first) < 30, "something is compiled per tensor"
    others = map(on_device, make_models(1, shapes=shapes))
    base, experts = others
    changed = jax.tree.map(lambda c: c / 2, method)
    assert compilations(caplog, lambda: jm.merge(changed, experts, base=base, key=KEY + 1)) == []


def test_buffers_of_the_caller_are_not_kept():
    """NumPy arrays that are aligned may be shared with JAX; the result must not change when they are refilled."""
    base, experts = make_models()
    merged = jm.merge(jm.linear(), experts, base=base)
    wanted = {name: np.array(value) for name, value in merged.items()}
    for model in (base, *experts.values()):
        for value in model.values():
            value[...] = np.nan
    assert_same(merged, wanted)
