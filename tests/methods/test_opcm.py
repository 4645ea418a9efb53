"""OPCM: the recursion as it is published, its invariants, and the ways to run it."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from jaxmerge.methods.opcm import projected_away
from tests.methods.models import assert_close, on_device
from tests.methods.reference_continual import deltas_of, norm, opcm_steps

FEW = settings(max_examples=4)
SEEDS = st.integers(0, 2**32 - 1)
ALPHAS = st.sampled_from([0.0, 0.3, 0.5, 0.9])
# Kernels with more outputs than inputs and with fewer; what is only added: an embedding, a vector.
SHAPES = {"a/kernel": (4, 6), "b/kernel": (6, 4), "d/embedding": (6, 4), "d/bias": (4,)}
KERNELS = [name for name in SHAPES if name.endswith("kernel")]


def make(seed: int, count: int = 3):
    """A base and experts in float32, whose task vectors are of different lengths."""
    rng = np.random.default_rng(seed)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    lengths = rng.uniform(0.05, 0.5, count)
    experts = [
        {n: (x + length * rng.standard_normal(x.shape)).astype(np.float32) for n, x in base.items()}
        for length in lengths
    ]
    return base, experts


def run(base, experts, **options):
    """Every state, from none merged to all."""
    states = [jm.opcm_start(on_device(base))]
    for expert in experts:
        states.append(jm.opcm_add(states[-1], on_device(expert), **options))
    return states


@FEW
@given(seed=SEEDS, alpha=ALPHAS)
def test_it_is_the_published_recursion(seed, alpha):
    base, experts = make(seed)
    wanted = list(opcm_steps(base, experts, alpha))
    for state, expected in zip(run(base, experts, alpha=alpha)[1:], wanted, strict=True):
        for name, value in state.params().items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)
    merged = jm.merge(jm.opcm(alpha), experts, base=base)
    for name, value in merged.items():
        np.testing.assert_allclose(value, wanted[-1][name], rtol=1e-4, atol=1e-4, err_msg=name)


@FEW
@given(seed=SEEDS, alpha=ALPHAS)
def test_the_length_is_the_mean_length_of_the_experts(seed, alpha):
    base, experts = make(seed)
    lengths = []
    for expert, state in zip(experts, run(base, experts, alpha=alpha)[1:], strict=True):
        lengths.append(norm(deltas_of(base, expert)))
        np.testing.assert_allclose(norm(deltas_of(base, state.params())), np.mean(lengths), rtol=1e-5)


@FEW
@given(seed=SEEDS, alpha=ALPHAS)
def test_the_first_expert_adds_nothing_to_kernels_when_it_comes_again(seed, alpha):
    base, (expert, *_) = make(seed)
    _, once, twice = run(base, [expert, expert], alpha=alpha)
    for name in KERNELS:
        np.testing.assert_allclose(twice.total[name], once.total[name], rtol=0, atol=1e-6)
    np.testing.assert_allclose(twice.total["d/bias"], 2 * once.total["d/bias"], rtol=1e-6)


def test_the_base_is_where_it_starts_and_one_expert_is_itself():
    base, (expert, *_) = make(0)
    start, once = run(base, [expert])
    for state, wanted in ((start, base), (once, expert)):
        assert_close(state.params(), wanted, ulps=2)
    small = [{name: x[name] for name in ("a/kernel", "d/bias")} for x in (base, expert)]
    assert_close(jm.merge(jm.opcm(), small[1:], base=small[0]), small[1], ulps=2)


def test_a_base_that_was_not_trained_changes_nothing_but_the_mean_length():
    base, (expert, *_) = make(0)
    _, _, state = run(base, [expert, base])
    half = {name: base[name] + deltas_of(base, expert)[name] / 2 for name in base}
    for name, value in state.params().items():
        np.testing.assert_allclose(value, half[name], rtol=1e-5, atol=1e-6)
    assert_close(jm.merge(jm.opcm(), [base] * 3, base=base), base)


def test_directions_below_the_rank_take_nothing_away():
    """The published answer there depends on which of many bases of the null space a decomposition happens to give."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (6, 4))
    delta = rng.standard_normal((6, 4))
    total = u[:, :2] @ np.diag([3.0, 1.0]) @ v[:, :2].T  # rank 2 of 4
    inside = u.T @ delta @ v
    inside[[0, 1], [0, 1]] = 0
    found = projected_away(jnp.asarray(total, jnp.float32), jnp.asarray(delta, jnp.float32), 0.5)
    np.testing.assert_allclose(found, u @ inside @ v.T, atol=1e-5)


def test_at_one_all_of_the_spaces_is_taken_away():
    rng = np.random.default_rng(0)
    total, delta = (jnp.asarray(rng.standard_normal((6, 4)), jnp.float32) for _ in range(2))
    u, _, vt = np.linalg.svd(np.asarray(total, np.float64), full_matrices=False)
    found = projected_away(total, delta, 1.0)
    np.testing.assert_allclose(u.T @ found @ vt.T, 0, atol=1e-5)
    np.testing.assert_allclose(found, delta - u @ (u.T @ delta @ vt.T) @ vt, atol=1e-5)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_a_share(alpha):
    base, (expert, *_) = make(0)
    for call in (lambda: jm.opcm(alpha), lambda: jm.opcm_add(jm.opcm_start(base), expert, alpha=alpha)):
        with pytest.raises(jm.RecipeError, match="alpha"):
            call()


def test_other_layouts_give_the_transposed_result():
    base, experts = make(3)
    kernels = [x["a/kernel"] for x in (base, *experts)]
    merged = jm.merge(jm.opcm(), [{"kernel": x} for x in kernels[1:]], base={"kernel": kernels[0]})
    turned = jm.merge(jm.opcm(), [{"weight": x.T} for x in kernels[1:]], base={"weight": kernels[0].T})
    np.testing.assert_allclose(turned["weight"].T, merged["kernel"], atol=1e-6)


def test_matrices_are_embeddings_too():
    base, experts = make(1)
    (*_, kernels), (*_, matrices) = (run(base, experts, factored=f) for f in ("kernels", "matrices"))
    np.testing.assert_array_equal(kernels.total["a/kernel"], matrices.total["a/kernel"])
    assert np.abs(kernels.total["d/embedding"] - matrices.total["d/embedding"]).max() > 1e-3


def test_scanned_models_merge_as_unrolled_ones():
    rng = np.random.default_rng(0)
    models = [{f"{layer}/kernel": rng.standard_normal((4, 6)).astype(np.float32) for layer in "ab"} for _ in range(3)]
    stacked = [{"layers/kernel": np.stack([model["a/kernel"], model["b/kernel"]])} for model in models]
    state, scanned = jm.opcm_start(on_device(models[0])), jm.opcm_start(on_device(stacked[0]))
    for model, stack in zip(models[1:], stacked[1:], strict=True):
        state = jm.opcm_add(state, on_device(model))
        scanned = jm.opcm_add(scanned, on_device(stack), rules=jm.Rules(stacked=("layers/kernel",)))
    for i, layer in enumerate("ab"):
        np.testing.assert_allclose(
            scanned.params()["layers/kernel"][i], state.params()[f"{layer}/kernel"], rtol=1e-5, atol=1e-5
        )


def test_each_expert_costs_what_the_first_did():
    base, experts = jax.device_put(make(0, count=4))
    traced = []

    @jax.jit
    def add(state, expert):
        traced.append(expert)
        return jm.opcm_add(state, expert)

    state, eager = jm.opcm_start(base), jm.opcm_start(base)
    sizes = jax.tree.map(jnp.shape, state)
    for expert in experts:
        state, eager = add(state, expert), jm.opcm_add(eager, expert)
        assert jax.tree.map(jnp.shape, state) == sizes
    assert len(traced) == 1
    assert int(state.count) == 4
    assert_close(state.params(), eager.params(), ulps=64)


def test_gradients_are_finite_from_the_start_on_and_those_of_finite_differences(x64):
    base, experts = make(0)
    only = [{name: x[name].astype(np.float64) for name in ("a/kernel", "d/bias")} for x in (base, *experts)]
    base, *experts = map(on_device, only)

    @jax.jit
    def loss(size):
        state = jm.opcm_start(base)
        for expert in experts:
            moved = {name: base[name] + size * (expert[name] - base[name]) ** 2 for name in base}
            state = jm.opcm_add(state, moved)
        return sum(jnp.sum(jnp.sin(x)) for x in state.params().values())

    slope, step = jax.grad(loss)(0.7), 1e-6
    np.testing.assert_allclose(slope, (loss(0.7 + step) - loss(0.7 - step)) / (2 * step), rtol=1e-5)


def test_half_precision_is_rounded_once():
    base, experts = make(0)
    half = [{name: x.astype(ml_dtypes.bfloat16) for name, x in model.items()} for model in (base, *experts)]
    wide = [{name: x.astype(np.float32) for name, x in model.items()} for model in half]
    *_, state = run(half[0], half[1:])
    *_, expected = run(wide[0], wide[1:])
    assert all(x.dtype == jnp.float32 for x in state.total.values())
    for name, value in state.params().items():
        np.testing.assert_array_equal(value, np.asarray(expected.params()[name]).astype(ml_dtypes.bfloat16))


def test_a_saved_state_goes_on_where_it_was(tmp_path):
    base, experts = make(0)
    _, _, state, finished = run(base, experts)
    jm.save_checkpoint(tmp_path / "state.safetensors", state)
    with jm.open_checkpoint(tmp_path / "state.safetensors") as saved:
        again = jm.opcm_start(on_device(base)).restored(saved.load())
    again = jm.opcm_add(again, on_device(experts[-1]))
    jax.tree.map(np.testing.assert_array_equal, again, finished)
    with pytest.raises(jm.StructureError, match="the saved state"):
        again.restored({"another": jnp.zeros(3)})


def test_from_disk_to_disk(tmp_path):
    base, experts = make(0)
    paths = [jm.save_checkpoint(tmp_path / f"{i}.npz", model) for i, model in enumerate((base, *experts))]
    jm.merge_checkpoint(jm.opcm(), paths[1:], base=paths[0], out=tmp_path / "out.npz")
    with jm.open_checkpoint(tmp_path / "out.npz") as merged:
        found = {name: x[...] for name, x in merged.params.items()}
    assert_close(found, jm.merge(jm.opcm(), experts, base=base), ulps=8)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_the_sharding_is_kept(axes):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axes,))
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, P("x")))
    base, experts = make(0, count=2)
    base, *experts = [{name: x[name] for name in ("a/kernel", "d/bias")} for x in (base, *experts)]
    *_, wanted = run(base, experts)
    state = jm.opcm_start(jax.tree.map(put, base))
    for expert in experts:
        state = jm.opcm_add(state, jax.tree.map(put, expert))
    for tree in (state.total, state.params()):
        assert all(x.sharding.spec == P("x") or x.sharding.spec == P("x", None) for x in tree.values())
    assert_close(jax.device_get(state.params()), wanted.params(), ulps=8)


def test_mistakes_are_told():
    base, (expert, *_) = make(0)
    start = jm.opcm_start(on_device(base))
    with pytest.raises(jm.StructureError, match="lacks"):
        jm.opcm_add(start, {})
    with pytest.raises(jm.NonFiniteError, match="'the new one', tensor 'd/bias'"):
        jm.opcm_add(start, on_device(expert | {"d/bias": np.full(4, np.nan, np.float32)}))
    with pytest.raises(jm.RecipeError, match="base"):
        jm.merge(jm.opcm(), [expert])
