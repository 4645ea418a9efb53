"""Spectral methods: what their formulas promise, whatever the numbers are, and what becomes of other tensors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.methods.enchtable import interference
from jaxmerge.methods.factorisation import compact_svd, leading_svd, polar
from jaxmerge.methods.spectral import Others
from tests.methods import reference_spectral as reference
from tests.methods.models import NAMES, assert_close, assert_same, make_models, on_device

SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=4)
SHAPE = (12, 20)  # one shape, so that few programs are compiled

METHODS = {
    "tsv_m": (jm.tsv_m(), reference.tsv_m_matrix),
    "tsv_m_rank": (jm.tsv_m(rank=0.5), functools.partial(reference.tsv_m_matrix, rank=6)),
    "iso_c": (jm.iso_c(), reference.iso_c_matrix),
    "iso_cts": (jm.iso_cts(0.5), functools.partial(reference.iso_cts_matrix, common=0.5)),
}
methods = pytest.mark.parametrize(("method", "formula"), METHODS.values(), ids=METHODS)


def update(method, deltas, name="a.weight"):
    """The merged task vector of one matrix (out, in)."""
    base = {name: jnp.zeros(deltas[0].shape)}
    return np.asarray(jm.merge(method, [{name: jnp.asarray(d, jnp.float32)} for d in deltas], base=base)[name])


def random_deltas(seed, count=3, shape=SHAPE):
    """Task vectors whose singular values are well apart, so that rounding does not choose among directions."""
    rng = np.random.default_rng(seed)
    return [with_spectrum(rng, shape, np.geomspace(1, 0.05, min(shape))) for _ in range(count)]


def with_spectrum(rng, shape, s):
    u, v = (np.linalg.qr(rng.standard_normal((side, len(s))))[0] for side in shape)
    return u * s @ v.T


def close(found, wanted, within=2e-4):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=within * max(np.abs(wanted).max(), 1e-3))


# The formulas


@methods
@FEW
@given(seed=SEEDS)
def test_update_is_that_of_the_formula(method, formula, seed):
    deltas = random_deltas(seed)
    close(update(method, deltas), formula(deltas))


@methods
@FEW
@given(seed=SEEDS, exponent=st.integers(-12, 6))
def test_update_scales_and_does_not_depend_on_order_or_signs_of_bases(method, formula, seed, exponent):
    deltas = random_deltas(seed)
    found = update(method, deltas)
    close(update(method, [d * 2.0**exponent for d in deltas]) * 2.0**-exponent, found)
    close(update(method, [deltas[i] for i in (2, 0, 1)]), found)
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((side, side)))[0] for side in SHAPE)
    close(update(method, [left @ d @ right for d in deltas]), left @ found @ right)
    flips = np.sign(rng.standard_normal(SHAPE[0]))[:, None]
    close(update(method, [flips * d for d in deltas]), flips * found)


@methods
def test_flax_kernels_and_transposed_weights_merge_alike(method, formula):
    deltas = random_deltas(0)
    close(update(method, [d.T for d in deltas], "a/kernel").T, update(method, deltas))


def test_one_expert():
    (delta,) = random_deltas(0, count=1)
    close(update(jm.tsv_m(), [delta]), delta, within=1e-5)
    flat = update(jm.iso_c(), [delta])
    close(np.linalg.svd(flat, compute_uv=False), np.full(12, np.linalg.svd(delta, compute_uv=False).mean()))
    close(update(jm.iso_cts(0.0), [delta]), flat)


def test_iso_cts_with_all_directions_common_is_iso_c():
    deltas = random_deltas(0)
    close(update(jm.iso_cts(1.0), deltas), update(jm.iso_c(), deltas))


def test_experts_in_orthogonal_spaces_are_summed():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((side, 12)))[0] for side in SHAPE)
    deltas = [(u[:, i : i + 4] * [3, 2, 1, 0.5]) @ v[:, i : i + 4].T for i in (0, 4, 8)]
    close(update(jm.tsv_m(), deltas), sum(deltas), within=1e-5)
    close(update(jm.tsv_m(rank=1), deltas), sum(3 * np.outer(u[:, i], v[:, i]) for i in (0, 4, 8)), within=1e-5)


def test_weights_multiply_task_vectors():
    deltas = random_deltas(0)
    for make in (jm.tsv_m, jm.iso_c, functools.partial(jm.iso_cts, 0.5)):
        weighted = update(make(scale=0.5, weights=[1, 2, 3]), deltas)
        close(weighted, 0.5 * update(make(), [w * d for w, d in zip((1, 2, 3), deltas, strict=True)]), within=1e-5)


# What is not determined gets nothing


@methods
def test_nothing_but_the_space_of_low_rank_experts_is_changed(method, formula):
    rng = np.random.default_rng(0)
    deltas = [with_spectrum(rng, SHAPE, np.array([1.0, 0.5])) for _ in range(3)]
    found = update(method, deltas)
    assert np.linalg.norm(found) > 0.1
    rows = np.linalg.svd(np.vstack(deltas))[2][:6].T
    columns = np.linalg.svd(np.hstack(deltas))[0][:, :6]
    close(columns @ columns.T @ found @ rows @ rows.T, found, within=1e-4)


def test_iso_c_of_a_low_rank_sum_keeps_its_nuclear_norm_and_says_so():
    rng = np.random.default_rng(0)
    delta = with_spectrum(rng, SHAPE, np.array([3.0, 2.0, 1.0])).astype(np.float32)
    base = {"w": jnp.zeros(SHAPE)}
    merged, report = jm.merge(jm.iso_c(), [{"w": jnp.asarray(delta)}], base=base, return_report=True)
    s = np.linalg.svd(merged["w"], compute_uv=False)
    np.testing.assert_allclose(s, [2.0] * 3 + [0.0] * 9, atol=1e-5)
    notes = report.tensors[0].notes
    assert (notes["directions"], notes["directions_at_most"]) == (3, 12)


@methods
def test_an_expert_without_a_change_adds_no_direction(method, formula):
    """Nor does one of weight 0. With a given rank, TSV-M is then that of the others."""
    deltas = random_deltas(0)
    silent = update(method, [*deltas[:2], 0 * deltas[2]])
    assert np.isfinite(silent).all()
    close(update(dataclasses.replace(method, weights=(1.0, 1.0, 0.0)), deltas), silent, within=1e-5)
    if method is METHODS["tsv_m_rank"][0]:
        close(silent, update(method, deltas[:2]), within=1e-5)


@methods
def test_experts_equal_to_the_base_give_the_base(method, formula):
    np.testing.assert_array_equal(update(method, [np.zeros(SHAPE)] * 3), 0)


def test_identical_experts_do_not_add_up():
    """Their directions are the same, so that polar factors share them out."""
    (delta,) = random_deltas(0, count=1)
    u, s, v = reference.leading(delta, 4)
    close(update(jm.tsv_m(), [delta] * 3), u * s @ v.T, within=1e-5)


def test_more_experts_than_singular_values():
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal((2, 6)) for _ in range(3)]
    close(update(jm.tsv_m(), deltas), reference.tsv_m_matrix(deltas, rank=1))
    assert np.isfinite(update(jm.iso_cts(0.0), deltas)).all()


# Other tensors


def test_what_is_not_factorised():
    rng = np.random.default_rng(0)
    shapes = {"embed": (5, 8), "conv/kernel": (2, 3, 4), "norm/scale": (8,)}
    deltas = [{n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in shapes.items()} for _ in range(2)]
    zero = jax.tree.map(jnp.zeros_like, deltas[0])
    total = jax.tree.map(jnp.add, *deltas)
    treatments: dict[Others, float] = {"mean": 0.25, "sum": 0.5, "base": 0.0}
    for others, factor in treatments.items():
        merged = jm.merge(jm.iso_c(0.5, others=others), deltas, base=zero)
        for name in ("conv/kernel", "norm/scale"):
            close(merged[name], factor * total[name], within=1e-6)
        assert jnp.linalg.norm(merged["embed"]) > 0.1
    kernels = jm.merge(jm.iso_c(0.5, factored="kernels", others="base"), deltas, base=zero)
    assert_same({n: kernels[n] for n in ("embed", "norm/scale")}, {n: zero[n] for n in ("embed", "norm/scale")})
    flat = np.asarray(kernels["conv/kernel"]).reshape(6, 4)  # window and input axes joined
    close(flat.T, 0.5 * reference.iso_c_matrix([np.asarray(d["conv/kernel"]).reshape(6, 4).T for d in deltas]))


def test_rank_by_name_and_wrong_ranks():
    deltas = random_deltas(0)
    experts = [{"a": jnp.asarray(d, jnp.float32), "b": jnp.asarray(d, jnp.float32)} for d in deltas]
    merged = jm.merge(jm.tsv_m(rank={"a": 2, ".*": 0.25}), experts, base=jax.tree.map(jnp.zeros_like, experts[0]))
    close(merged["a"], reference.tsv_m_matrix(deltas, rank=2))
    close(merged["b"], reference.tsv_m_matrix(deltas, rank=3))
    with pytest.raises(jm.RecipeError, match="'c' matches no tensor"):
        jm.merge(jm.tsv_m(rank={"c": 2, ".*": 1}), experts, base=experts[0])
    for wrong in (0, -1, 1.5, 0.0, True, "all", jm.by_depth([1, 2])):
        with pytest.raises(jm.RecipeError, match="rank is"):
            jm.tsv_m(rank=wrong)
    with pytest.raises(jm.RecipeError, match="common is 1.5"):
        jm.iso_cts(1.5)


# EnchTable


def enchtable(task, safety, beta):
    """The update of a matrix and of a bias, and of EnchTable's formula."""
    base = {name: np.zeros(x.shape) for name, x in task.items()}
    models = {"task": task, "safety": safety}
    merged = jm.merge(
        jm.enchtable(beta), {n: jax.tree.map(jnp.float32, x) for n, x in models.items()}, base=on_device(zeros(task))
    )
    return jax.device_get(merged), reference.enchtable(base, [task, safety], beta, gain=200)


def zeros(model):
    return {name: np.zeros(x.shape, np.float32) for name, x in model.items()}


@FEW
@given(seed=SEEDS, beta=st.floats(0, 2, width=32))
def test_enchtable_is_its_formula(seed, beta):
    rng = np.random.default_rng(seed)
    task, safety = (
        {"w": by * d, "bias": by * rng.standard_normal(20)}
        for by, d in zip((0.1, 0.3), random_deltas(seed, count=2), strict=True)
    )
    found, wanted = enchtable(task, safety, beta)
    for name, value in wanted.items():
        close(found[name], value, within=1e-5)
    found, _ = enchtable(task, safety, 0.0)
    assert_same(found, {name: x.astype(np.float32) for name, x in task.items()})


def test_enchtable_adds_what_does_not_interfere(rng):
    u, v = (np.linalg.qr(rng.standard_normal((side, 12)))[0] for side in SHAPE)
    task, safety = ({"w": u[:, i : i + 6] @ v[:, i : i + 6].T, "bias": np.ones(20)} for i in (0, 6))
    assert float(interference(jnp.float32(task["w"]), jnp.float32(safety["w"]), 0.5)) < 1e-7
    close(enchtable(task, safety, 1.0)[0]["w"], task["w"] + safety["w"], within=1e-4)


def test_enchtable_wants_a_task_model_and_a_safety_model():
    base, experts = map(on_device, make_models())
    with pytest.raises(jm.RecipeError, match="found 3, expected 2"):
        jm.merge(jm.enchtable(), experts, base=base)
    with pytest.raises(jm.RecipeError, match="'safety'; there are math, code; name the safety model with safety="):
        jm.merge(jm.enchtable(), {name: experts[name] for name in NAMES[:2]}, base=base)
    same = jm.merge(jm.enchtable(safety="code"), {"math": base, "code": base}, base=base)
    assert_same(same, base)


# TSV-C


LAYOUT = {"blocks/0/kernel": SHAPE, "blocks/0/bias": (20,), "embed/embedding": SHAPE}


def test_a_compressed_expert_is_the_best_of_its_rank_and_survives_saving(tmp_path):
    base, experts = make_models(shapes=LAYOUT)
    base["steps"] = np.arange(3)
    expert = experts["math"] | {"steps": np.arange(3)}
    compressed = jm.compress_tsv(on_device(expert), on_device(base), 0.25)
    assert (
        repr(compressed) == f"LowRankTaskVector(2 matrices of rank 3, 1 tensors whole, {4 * (2 * 3 * 32 + 20)} bytes)"
    )
    assert compressed.nbytes == 4 * (2 * 3 * 32 + 20)
    restored = compressed.restore(on_device(base))
    for name in LAYOUT:
        delta = expert[name] - base[name]
        if delta.ndim == 2:
            u, s, v = reference.leading(delta.astype(np.float64), 3)
            delta = u * s @ v.T
        close(restored[name] - base[name], delta, within=1e-4)
    np.testing.assert_array_equal(restored["steps"], base["steps"])
    for path in ("small.npz", "small.safetensors"):
        jm.save_checkpoint(tmp_path / path, compressed)
        read = jm.LowRankTaskVector.from_params(jm.open_checkpoint(tmp_path / path).params)
        assert_same(read.restore(on_device(base)), restored)
    assert jm.cast(compressed, "bfloat16").nbytes == compressed.nbytes // 2


def test_layer_stacked_and_full_rank_compression():
    base, experts = make_models(shapes={"blocks/kernel": (2, *SHAPE)})
    base, expert = on_device(base), on_device(experts["math"])
    rules = jm.Rules(stacked=("blocks/.*",))
    compressed = jm.compress_tsv(expert, base, 0.25, rules=rules)
    assert compressed.left["blocks/kernel"].shape == (2, 20, 3)  # outputs first
    restored = compressed.restore(base, rules=rules)
    for layer in range(2):
        one, of_base = ({"w/kernel": model["blocks/kernel"][layer]} for model in (expert, base))
        alone = jm.compress_tsv(one, of_base, 0.25).restore(of_base)
        close(restored["blocks/kernel"][layer], alone["w/kernel"], within=1e-5)
    whole = jm.compress_tsv(expert, base, 1.0, rules=rules)
    assert not whole.left, "factors of full rank are larger than the matrix"
    assert_close(whole.restore(base, rules=rules), expert, ulps=2)


def test_what_cannot_be_compressed_or_restored_is_told():
    base, experts = map(on_device, make_models(shapes=LAYOUT))
    compressed = jm.compress_tsv(experts["math"], base, 0.25)
    with pytest.raises(jm.StructureError, match=r"lacks \['more'\]"):
        compressed.restore(base | {"more": jnp.ones(3)})
    with pytest.raises(jm.StructureError, match="'w': found no part"):
        jm.LowRankTaskVector.from_params({"w": jnp.ones(3)})
    with pytest.raises(jm.StructureError, match="'w' has only one of its two factors"):
        jm.LowRankTaskVector.from_params({"left": {"w": jnp.ones((3, 1))}})
    with pytest.raises(jm.RecipeError, match="rank_share is 0"):
        jm.compress_tsv(experts["math"], base, 0)


# Factorisations


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]])
def test_factorisations_are_those_of_numpy(shape, dtype, rng, x64):
    matrix = with_spectrum(rng, shape, np.geomspace(1, 1e-3, 12))
    x, within = jnp.asarray(matrix, dtype), 2e3 * np.finfo(dtype).eps
    close(polar(x), reference.polar(matrix), within=3 * within)
    u, s, v = compact_svd(x)
    close(u * s[None, :] @ v.T, matrix, within=within)
    for rank in (2, 8):  # by a Gram matrix, and by the whole SVD
        u, s, v = leading_svd(x, rank)
        a, b, c = reference.leading(matrix, rank)
        close(s, b, within=within)
        close(u @ u.T, a @ a.T, within=within)
        close(u * s[None, :] @ v.T, a * b @ c.T, within=within)


def test_factorisations_stop_at_the_numerical_rank(rng):
    x = jnp.asarray(with_spectrum(rng, SHAPE, np.array([1.0, 0.5, 0.25])), jnp.float32)
    for u, s, v in (compact_svd(x), leading_svd(x, 5), leading_svd(x, 2)):
        count = min(3, s.size)
        assert (np.asarray(s[count:]) == 0).all() and (np.asarray(u[:, count:]) == 0).all()
        close(u.T @ u, np.diag(np.arange(s.size) < count))
        close(v.T @ v, np.diag(np.arange(s.size) < count))
    factor = np.linalg.svd(polar(x), compute_uv=False)
    np.testing.assert_allclose(factor, [1] * 3 + [0] * 9, atol=1e-5)
    assert not np.asarray(compact_svd(x * 1e-9, jnp.float32(1.0))[1]).any(), (
        "nothing but the rounding of a larger whole"
    )


def test_derivatives_are_those_of_finite_differences(rng, x64):
    """Of scale, weights and task vectors, and finite where nothing is determined."""
    base = {"w": jnp.asarray(rng.standard_normal(SHAPE))}
    deltas = [jnp.asarray(d) for d in random_deltas(0, count=2)]
    probe = jnp.asarray(rng.standard_normal(SHAPE))
    low = [jnp.asarray(with_spectrum(rng, SHAPE, np.array([1.0, 0.5]))) for _ in range(2)]

    for make in (jm.tsv_m, jm.iso_c, functools.partial(jm.iso_cts, 0.5)):

        @jax.jit
        @jax.value_and_grad
        def loss(point, make=make):
            scale, weights, deltas = point
            experts = [{"w": base["w"] + delta} for delta in deltas]
            return jnp.vdot(probe, jm.merge(make(scale, weights=weights), experts, base=base)["w"])

        point = (jnp.asarray(0.7), jnp.asarray([0.5, 2.0]), deltas)
        step = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), point)
        slope = sum(map(jnp.vdot, *map(jax.tree.leaves, (loss(point)[1], step))))
        h = 1e-6
        above, below = (jax.tree.map(lambda x, s, h=h: x + h * s, point, step) for h in (h, -h))
        np.testing.assert_allclose(slope, (loss(above)[0] - loss(below)[0]) / (2 * h), rtol=1e-5)
        for others in (low, [deltas[0]] * 2, [0 * d for d in deltas]):
            assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(loss((*point[:2], others))[1]))
