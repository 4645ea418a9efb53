"""WUDI, OptMerge, SWUDI, ASWUDI and DOGE: their formulas, how they are related, and what they promise.

Compiling takes nearly all of the time, so nearly everything here merges one model of two matrices with one program for
each form of a method. As (out, in) they are (3, 16), where the task vectors of three experts have fewer rows in all
than columns, and (7, 5), where they have more; both are well conditioned.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.methods.doge import doge
from jaxmerge.methods.selection import rank_words
from jaxmerge.methods.wudi import Wudi, _effective_rank, aswudi, optmerge, swudi, wudi
from jaxmerge.trees.info import TensorInfo
from tests.methods import reference_interference as reference

FEW = settings(max_examples=4)
SEEDS = st.integers(0, 2**32 - 1)
QUICKLY: Any = {"xla_backend_optimization_level": 0}
SHAPES = {"wide/kernel": (16, 3), "tall.weight": (7, 5)}


def models(seed, count=3):
    """Task vectors of `count` experts."""
    rng = np.random.default_rng(seed)
    return [{n: 0.1 * rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()} for _ in range(count)]


@jax.jit
def _merged(method, deltas):
    return jm.merge(method, deltas, base=jax.tree.map(jnp.zeros_like, deltas[0]))


@functools.cache
def _program(structure, shapes):
    operands = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    return _merged.lower(*operands).compile(QUICKLY)


def merged(method, deltas):
    """The merge, by a program that is compiled quickly rather than well."""
    leaves, structure = jax.tree.flatten((method, deltas))
    leaves = [np.asarray(leaf, np.float32) for leaf in leaves]
    program = _program(structure, tuple(leaf.shape for leaf in leaves))
    return jax.device_get(program(*jax.tree.unflatten(structure, leaves)))


def by_formula(merge, deltas, scale=1.0, weights=(1, 1, 1), **options):
    wide = [{name: x.astype(np.float64) for name, x in delta.items()} for delta in deltas]
    base = {name: 0 * x for name, x in wide[0].items()}
    return reference.of_matrices(merge)(base, wide, scale, weights, **options)


def changed(method: Any, **coefficients: Any) -> Any:
    return dataclasses.replace(method, **coefficients)


def added(deltas, factor=1.0):
    return {name: factor * sum(delta[name] for delta in deltas) for name in SHAPES}


def assert_near(found, wanted, **tolerance):
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **tolerance)


SCALED = {"scale": 0.7}
QWEN = {"centre": False, "start": "mean", "steps": 1000}
FORMS = {
    "wudi": (wudi(0.7), reference.wudi, SCALED),
    "wudi in steps": (wudi(steps=1000), reference.wudi, {"steps": 1000}),
    "optmerge": (optmerge(0.7), reference.optmerge, SCALED | {"steps": 300}),
    "optmerge by descent": (
        optmerge(optimizer="sgd", learning_rate=0.05, **QWEN),
        reference.optmerge,
        {"optimizer": reference.sgd, "rate": 0.05, **QWEN},
    ),
    "optmerge in closed form": (optmerge(steps=None), reference.optmerge, {}),
    "swudi": (swudi(0.7), reference.swudi, SCALED),
    "swudi from the mean": (
        swudi(time=2.0, rank=0.35, start="mean"),
        reference.swudi,
        {"time": 2.0, "rank": 0.35, "start": "mean"},
    ),
    "aswudi": (aswudi(0.7), reference.aswudi, SCALED),
}


@pytest.mark.parametrize(("method", "formula", "options"), FORMS.values(), ids=FORMS)
def test_methods_give_their_formulas(method, formula, options):
    deltas = models(0)
    # Steps of Adam magnify rounding where a gradient is nearly zero.
    assert_near(merged(method, deltas), by_formula(formula, deltas, **options), rtol=1e-6, atol=3e-6)


def test_weights_are_factors_of_the_task_vectors():
    deltas, weights = models(0), (0.5, 1.5, 1.0)
    found = merged(wudi(weights=weights), deltas)
    assert_near(found, by_formula(reference.wudi, deltas, weights=weights), rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("rule", ["participation_sqrt", "participation", "entropy", "stable"])
def test_rules_give_their_formulas(rule):
    values = np.array([0, 1e-3, 0.2, 0.2, 0.5, 2.0])
    found = _effective_rank(rule, jnp.asarray(values, jnp.float32))
    np.testing.assert_allclose(found, reference.RULES[rule](values), rtol=1e-5)
    equal = np.array([0, 0, 0.3, 0.3, 0.3, 0.3])  # four by any measure, but for rounding
    np.testing.assert_allclose(_effective_rank(rule, jnp.asarray(equal, jnp.float32)), 4, rtol=1e-6)


# Limits: the forms are one method at different ends.


def test_steps_lead_to_the_closed_form():
    """Where there is but one minimiser. Where there are more, Adam finds another one."""
    deltas = models(1)
    goal, start = merged(wudi(), deltas), added(deltas)
    arrived = merged(wudi(steps=1000, learning_rate=1e-3), deltas)
    far = {name: np.linalg.norm(arrived[name] - goal[name]) / np.linalg.norm(start[name] - goal[name]) for name in goal}
    assert far["tall.weight"] < 0.01
    wide = [delta["wide/kernel"].T for delta in deltas]
    arrived_wide, start_wide = (np.asarray(x["wide/kernel"]).T for x in (arrived, start))
    loss = functools.partial(reference.loss, targets=wide, guides=wide, norms=[reference.norm(d) for d in wide])
    assert loss(arrived_wide) < 1e-3 * loss(start_wide)
    arrived = merged(optmerge(optimizer="sgd", learning_rate=0.2, **QWEN), deltas)
    goal = by_formula(reference.optmerge, deltas, centre=False, start="mean")
    assert_near(arrived, goal, atol=1e-4)


def test_the_filter_is_that_of_gradient_descent():
    deltas, steps = models(2), 4000

    def plain(gradient, x, rate, steps):
        return functools.reduce(lambda x, _: x - rate * gradient(x), range(steps), x)

    def descended(deltas):
        norms = [reference.norm(d) for d in deltas]
        return reference.lowered(sum(deltas), deltas, deltas, norms, plain, 1.5 / steps, steps)

    found = merged(swudi(time=3.0, rank=1.0), deltas)
    assert_near(found, by_formula(descended, deltas), rtol=2e-3, atol=2e-4)  # steps of finite length


def test_ends_of_the_filter():
    deltas = models(3)
    assert_near(merged(swudi(time=0.0), deltas), added(deltas), atol=1e-7)
    assert_near(merged(swudi(time=0.0, start="mean"), deltas), added(deltas, 1 / 3), atol=1e-7)
    everything = merged(wudi(), deltas)
    for method in (swudi(time=1e6, rank=1.0), swudi(time=1e6, rank=1.0, start="mean"), swudi(time=None, rank=None)):
        assert_near(merged(method, deltas), everything, atol=3e-6)


def test_truncation_leaves_as_many_directions_as_asked():
    deltas = models(4)
    for share, rank in {0.01: 1, 0.2: 1, 0.21: 2, 0.6: 3, 0.8: 4}.items():
        found = merged(swudi(rank=share, time=300.0, start="zero"), deltas)["tall.weight"]
        assert np.linalg.matrix_rank(found, tol=1e-5) == rank


# Properties.

CLOSED = {
    "wudi": wudi(),
    "optmerge": optmerge(steps=None),
    "swudi": swudi(),
    "aswudi": aswudi(),
}
DOGE: Any = doge(steps=20, learning_rate=1e-3, subspace=3)
ALL = {**CLOSED, "wudi in steps": wudi(steps=1000), "optmerge in steps": optmerge(), "doge": DOGE}
closed = pytest.mark.parametrize("method", CLOSED.values(), ids=CLOSED)
all_methods = pytest.mark.parametrize("method", ALL.values(), ids=ALL)


@all_methods
@FEW
@given(seed=SEEDS, order=st.permutations(range(3)))
def test_order_of_experts_does_not_matter(method, seed, order):
    deltas = models(seed)
    assert_near(merged(method, [deltas[i] for i in order]), merged(method, deltas), atol=1e-5)


@closed
@FEW
@given(seed=SEEDS, exponent=st.integers(-12, 12))
def test_scaling_the_task_vectors_scales_the_closed_forms(method, seed, exponent):
    deltas, factor = models(seed), np.float32(2.0**exponent)
    scaled = merged(method, jax.tree.map(lambda d: factor * d, deltas))
    assert_near({name: x / factor for name, x in scaled.items()}, merged(method, deltas), atol=1e-5)


def test_layouts_agree():
    deltas = models(5)
    turned = merged(wudi(), [{"wide.weight": delta["wide/kernel"].T.copy()} for delta in deltas])
    np.testing.assert_allclose(turned["wide.weight"].T, merged(wudi(), deltas)["wide/kernel"], atol=1e-6)


def signs(seed):
    """A task vector of norm 4 in both matrices, exactly."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, shape in SHAPES.items():
        x = np.zeros(np.prod(shape), np.float32)
        x[rng.permutation(x.size)[:16]] = rng.choice([-1.0, 1.0], 16)
        result[name] = x.reshape(shape)
    return result


@FEW
@given(seed=SEEDS)
def test_one_expert_is_that_expert(seed):
    (delta,) = models(seed, count=1)
    for method in (wudi(), optmerge(steps=None)):
        assert_near(merged(method, [delta]), delta, atol=3e-6)
    nothing = added([delta], 0.0)
    for method in (wudi(), swudi(time=1e6, rank=1.0)):
        assert_near(merged(method, [nothing, delta, nothing]), delta, atol=3e-6)
    alone = changed(DOGE, eta=4.0, density=1.0)
    assert_near(merged(alone, [nothing, signs(seed), nothing]), signs(seed), rtol=0)


@FEW
@given(seed=SEEDS)
def test_experts_that_see_nothing_of_each_other_are_added(seed):
    """Their rows span subspaces at right angles."""
    rng = np.random.default_rng(seed)
    wide = np.linalg.qr(rng.standard_normal((16, 16)))[0][:9].reshape(3, 3, 16)
    tall = np.linalg.qr(rng.standard_normal((5, 5)))[0][:3].reshape(3, 1, 5)
    deltas = [
        {
            "wide/kernel": (rng.uniform(0.5, 2) * rng.standard_normal((3, 3)) @ w).T.astype(np.float32),
            "tall.weight": (rng.uniform(0.5, 2) * rng.standard_normal((7, 1)) @ t).astype(np.float32),
        }
        for w, t in zip(wide, tall, strict=True)
    ]
    for method in (wudi(), swudi(rank=1.0)):
        assert_near(merged(method, deltas), added(deltas), atol=3e-5)


@FEW
@given(seed=SEEDS)
def test_the_closed_form_has_the_least_loss(seed):
    deltas = models(seed)
    found, start = merged(wudi(), deltas), added(deltas)
    others = [start, merged(swudi(), deltas), merged(wudi(steps=1000), deltas), added([found, deltas[0]])]
    for name in SHAPES:
        turn = (lambda x: x.T) if name.endswith("kernel") else (lambda x: x)
        own = [turn(delta[name]).astype(np.float64) for delta in deltas]
        loss = functools.partial(reference.loss, targets=own, guides=own, norms=[reference.norm(d) for d in own])
        least, *losses = [loss(turn(tau[name]).astype(np.float64)) for tau in (found, *others)]
        assert least <= min(losses) + 1e-9  # both are zero where experts do not meet
        assert losses[2] < losses[0], "steps lower the loss"


# Experts that equal the base.


@pytest.mark.parametrize("name", ["wudi", "wudi in steps", "swudi", "aswudi"])
def test_an_expert_that_learned_nothing_takes_no_part(name):
    method, formula, _ = FORMS[name]
    deltas = models(6, count=2)
    found = merged(ALL[name], [deltas[0], added(deltas, 0.0), deltas[1]])
    options = {"steps": 1000} if name == "wudi in steps" else {}
    assert_near(found, by_formula(formula, deltas, weights=(1, 1), **options), atol=3e-6)


@all_methods
def test_where_nobody_learned_anything_nothing_moves(method):
    nothing = added(models(0), 0.0)
    for x in merged(method, [nothing] * 3).values():
        np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("method", [optmerge(steps=None), doge(steps=2)], ids=["optmerge", "doge"])
def test_more_experts_than_directions(method):
    """Approximations have rank 1 at least; the directions shared in DOGE are none."""
    deltas = [{"a.weight": delta["tall.weight"][:1, :2]} for delta in models(7)]
    found = merged(method, deltas)["a.weight"]
    assert np.isfinite(found).all() and found.any()


# DOGE.


def test_doge_gives_its_formula():
    deltas = models(8)
    wide = [{name: x.astype(np.float64) for name, x in delta.items()} for delta in deltas]
    base = {name: 0 * x for name, x in wide[0].items()}
    assert_near(merged(DOGE, deltas), reference.doge(base, wide, steps=20, rate=1e-3, subspace=3), rtol=1e-6, atol=3e-6)


def test_masks_are_cut_over_all_matrices_at_once():
    large, small, none = models(9)
    large["wide/kernel"], small["wide/kernel"] = 100 * large["wide/kernel"], small["wide/kernel"] / 100
    none = added([none], 0.0)
    method = changed(DOGE, density=0.25)
    found = {name: np.count_nonzero(x) for name, x in merged(method, [large, none, none]).items()}
    assert found == {"wide/kernel": 20, "tall.weight": 0}
    found = {name: np.count_nonzero(x) for name, x in merged(method, [small, none, none]).items()}
    assert found == {"wide/kernel": 0, "tall.weight": 20}


def test_ranks_of_the_masks():
    info = TensorInfo("a.weight", (8, 6), "kernel", (1,), (0,), group_size=128)

    def ranks(**options):
        method: Any = doge(**options)
        return method.passes, method.at(info, ("a", "b"))._ranks

    for (passes, found), scope, counts in (
        (ranks(density=0.25), "model", (32, 32)),
        (ranks(density=0.25, inclusive=True), "model", (33, 33)),
        (ranks(density=[0.25, 0.5], scope="tensor"), "tensor", (12, 24)),
    ):
        assert passes == (scope,)
        np.testing.assert_array_equal(found, [rank_words(count) for count in counts])


def test_equal_experts_need_no_correction():
    """Their sum is each of them, so there is no conflict."""
    same, nothing = signs(10), added([signs(10)], 0.0)
    halved = changed(DOGE, eta=2.0, density=1.0)
    assert_near(merged(halved, [same, same, nothing]), same, rtol=0)


def test_the_correction_lessens_the_conflict():
    deltas = [delta["tall.weight"] for delta in models(11)]
    shift = np.asarray(jax.jit(DOGE.correction)(deltas))
    assert 0 < np.abs(shift).max() <= 20 * 1e-3 * 1.01
    assert reference.conflict(shift, deltas) < reference.conflict(0 * shift, deltas)


# Transformations.


def test_vmap_over_coefficients_is_a_loop():
    deltas = [{"tall.weight": delta["tall.weight"]} for delta in models(12)]
    points = jnp.asarray([[300.0, 0.2, 1e-6], [0.0, 1.0, 1e-6], [3.0, 0.65, 0.3]])
    swept = jax.vmap(lambda c: _merged(swudi(time=c[0], rank=c[1], cutoff=c[2]), deltas))(points)
    for i, (time, rank, cutoff) in enumerate(points.tolist()):
        alone = merged(swudi(time=time, rank=rank, cutoff=cutoff), deltas)
        assert_near({name: x[i] for name, x in swept.items()}, alone, atol=1e-6)


def test_gradients_are_finite_and_those_of_finite_differences(x64):
    """Also where eigenvalues coincide, as those of experts that learned nothing do."""
    rng = np.random.default_rng(13)

    @jax.jit
    @jax.value_and_grad
    def loss(point):
        time, deltas = point
        return jnp.sum(jnp.sin(_merged(swudi(time=time, rank=0.5), deltas)["a.weight"]))

    deltas, step = ([{"a.weight": jnp.asarray(rng.standard_normal((3, 16)))} for _ in range(3)] for _ in range(2))
    for shares in ((1, 1, 1), (1, 0, 0), (0, 0, 0)):
        learned = [jax.tree.map(lambda x, s=s: s * x, d) for s, d in zip(shares, deltas, strict=True)]
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(loss((jnp.float64(3.0), learned))[1]))
    point, step = (jnp.float64(3.0), deltas), (jnp.float64(1.0), step)
    above, below = (jax.tree.map(lambda x, s, h=h: x + h * s, point, step) for h in (1e-6, -1e-6))
    slope = (loss(above)[0] - loss(below)[0]) / 2e-6
    found = sum(jnp.vdot(g, s) for g, s in zip(*map(jax.tree.leaves, (loss(point)[1], step)), strict=True))
    np.testing.assert_allclose(found, slope, rtol=1e-5)


def test_gradients_of_steps_are_finite():
    """Also where the gradient that the steps follow is zero."""
    deltas = [jnp.asarray(delta["tall.weight"]) for delta in models(14)]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(rate, deltas):
        return jnp.sum(Wudi(steps=2, learning_rate=rate).merge_matrices(deltas) ** 2)

    for shares in ((1, 1, 1), (1, 0, 0), (0, 0, 0)):
        found = gradient(jnp.float32(0.01), [s * d for s, d in zip(shares, deltas, strict=True)])
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    by_eta = jax.jit(jax.grad(lambda eta, deltas: jnp.sum(changed(DOGE, eta=eta).correction(deltas) ** 2)))
    found = [by_eta(jnp.float32(0.07), [s * d for d in deltas]) for s in (0, 1)]
    assert np.isfinite(found).all() and found[0] == 0 != found[1]


# Errors.


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: wudi(steps=-1), "wudi: found -1 steps, expected 0 or more"),
        (lambda: optmerge(steps=-1), "optmerge: found -1 steps"),
        (lambda: swudi(rank=0.0), "rank is 0"),
        (lambda: swudi(rank=5), "rank is 5"),
        (lambda: doge(density=0.0), "density is 0"),
        (lambda: doge(subspace=0), "doge: found steps=400 and subspace=0"),
        (lambda: doge(steps=-1), "doge: found steps=-1"),
    ],
)
def test_what_cannot_work_is_said(make, found):
    with pytest.raises(jm.RecipeError, match=found):
        make()


def test_a_density_of_the_model_is_one_for_all_tensors():
    deltas = models(0)
    with pytest.raises(jm.RecipeError, match="density over the whole model cannot differ between tensors"):
        jm.merge(doge(density={"wide.*": 0.2, ".*": 0.3}), deltas, base=deltas[0])
