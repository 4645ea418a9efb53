"""Averages over the checkpoints of a run: exact, in any order, for any number, and weights from metrics."""

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

FEW = settings(max_examples=8)
SEEDS = st.integers(0, 2**32 - 1)
EPS = float(np.finfo(np.float32).eps)


def make(seed: int, count: int = 6):
    """Checkpoints of a small model, half of it in bfloat16, with a counter."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((count, 3, 4)).astype(np.float32)
    half = rng.standard_normal((count, 5)).astype(ml_dtypes.bfloat16)
    return [{"w": w, "half": h, "step": np.int32(i)} for i, (w, h) in enumerate(zip(weights, half, strict=True))]


def averaged(checkpoints, weights=None, **options):
    state = jm.running_average(checkpoints[0], **options)
    for checkpoint, weight in zip(checkpoints, weights or [1.0] * len(checkpoints), strict=True):
        state = state.update(checkpoint, weight)
    return state


def weighted_mean(checkpoints, weights):
    wide = np.array([x["w"] for x in checkpoints], np.float64)
    return np.tensordot(np.asarray(weights, np.float64), wide, 1) / np.sum(weights)


@FEW
@given(seed=SEEDS, weights=st.lists(st.floats(0.125, 8), min_size=6, max_size=6), order=st.permutations(range(6)))
def test_the_mean_is_exact_in_any_order(seed, weights, order):
    checkpoints = make(seed)
    mean = averaged(checkpoints, weights).params()
    permuted = averaged([checkpoints[i] for i in order], [weights[i] for i in order]).params()
    wanted = weighted_mean(checkpoints, weights)
    # Each of the steps rounds the distance to the mean, which is up to some 6, a few times.
    for found in (mean, permuted):
        np.testing.assert_allclose(found["w"], wanted, rtol=0, atol=24 * EPS)
        assert found["half"].dtype == jnp.bfloat16
    assert mean["step"] == 5


@FEW
@given(seed=SEEDS, decay=st.sampled_from([0.5, 0.9, 0.999]))
def test_a_moving_average_has_geometric_weights_that_sum_to_one(seed, decay):
    checkpoints = make(seed)
    weights = decay ** np.arange(5, -1, -1.0)
    found = averaged(checkpoints, decay=decay).params()
    np.testing.assert_allclose(found["w"], weighted_mean(checkpoints, weights), rtol=0, atol=24 * EPS)


def test_a_moving_average_can_start_as_if_the_first_had_always_been_there():
    checkpoints = make(0)
    wanted = checkpoints[0]["w"].astype(np.float64)
    for checkpoint in checkpoints[1:]:
        wanted = 0.9 * wanted + 0.1 * checkpoint["w"]
    found = averaged(checkpoints, [10.0] + [1.0] * 5, decay=0.9).params()
    np.testing.assert_allclose(found["w"], wanted, atol=24 * EPS)


def test_stochastic_weight_averaging_takes_every_nth_from_a_start():
    checkpoints = make(0, count=9)
    state = averaged(checkpoints, start=2, every=3)
    assert (int(state.count), float(state.weight)) == (9, 3)
    taken = [checkpoints[i] for i in (2, 5, 8)]
    np.testing.assert_allclose(state.params()["w"], weighted_mean(taken, [1, 1, 1]), atol=24 * EPS)
    assert averaged(checkpoints[:8], start=2, every=3).params()["step"] == 5


@pytest.mark.parametrize("decay", [1.0, 0.9999])
def test_ten_thousand_half_precision_checkpoints_average_to_the_last_place(decay):
    rng = np.random.default_rng(0)
    run = 1 + np.linspace(0, 0.01, 10_000)[:, None] + 0.01 * rng.standard_normal((10_000, 16))
    run = run.astype(ml_dtypes.bfloat16)
    weights = np.float64(np.float32(decay)) ** np.arange(9999, -1, -1)
    wanted = weights @ run.astype(np.float64) / weights.sum()

    @jax.jit
    def all_of(state, run):
        return jax.lax.scan(lambda state, x: (state.update({"w": x}), None), state, run)[0].mean["w"]

    error = {}
    for compensated in (True, False):
        start = jm.running_average(
            {"w": jax.ShapeDtypeStruct((16,), jnp.bfloat16)}, decay=decay, compensated=compensated
        )
        error[compensated] = np.abs(np.asarray(all_of(start, run), np.float64) - wanted).max()
    assert error[True] <= EPS, "half a unit in the last place, and a little for the rates"
    assert error[False] > 20 * EPS, "or there is nothing to compensate"


def test_identical_checkpoints_average_to_themselves_bit_for_bit():
    (checkpoint,) = make(0, count=1)
    found = averaged([checkpoint] * 7, [0.3, 1, 2, 5, 0.1, 0, 1]).params()
    for name, value in checkpoint.items():
        np.testing.assert_array_equal(found[name], value)


def test_under_jit_with_donation_in_one_program():
    checkpoints = jax.device_put(make(0))
    traced = []

    def counted(state, params):
        traced.append(params)
        return state.update(params)

    update = jax.jit(counted, donate_argnums=0)
    state = jm.running_average(checkpoints[0])
    for checkpoint in checkpoints:
        before, state = state, update(state, checkpoint)
        assert before.mean["w"].is_deleted() and not checkpoint["w"].is_deleted()
    assert len(traced) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params(), averaged(checkpoints).params())


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_the_sharding_is_kept(axes):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axes,))
    sharding = NamedSharding(mesh, P(None, "x"))
    checkpoints = [{"w": x["w"]} for x in make(0)]
    struct = jax.ShapeDtypeStruct((3, 4), np.float32, sharding=sharding)
    states = [jm.running_average({"w": x}) for x in (struct, jax.device_put(checkpoints[0]["w"], sharding))]
    assert all(x.sharding == sharding for state in states for x in (state.mean["w"], state.rest["w"]))
    state = states[0]
    for i, checkpoint in enumerate(checkpoints):  # wherever they lie
        state = state.update(jax.device_put(checkpoint, sharding) if i % 2 else checkpoint)
        assert state.mean["w"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(state.params()["w"], averaged(checkpoints).params()["w"])


def test_a_saved_average_goes_on_where_it_was(tmp_path):
    checkpoints = [{"w": x["w"]} for x in make(0)]
    half = averaged(checkpoints[:3], decay=0.9)
    jm.save_checkpoint(tmp_path / "average.npz", half)
    with jm.open_checkpoint(tmp_path / "average.npz") as saved:
        again = jm.running_average(checkpoints[0], decay=0.9).restored(saved.load())
    for checkpoint in checkpoints[3:]:
        again = again.update(checkpoint)
    wanted = averaged(checkpoints, decay=0.9)
    jax.tree.map(np.testing.assert_array_equal, again, wanted)
    with pytest.raises(jm.StructureError, match="the saved average"):
        again.restored({"another": jnp.zeros(3)})


def test_lazy_parameters_are_read(tmp_path):
    checkpoints = make(0)
    paths = [jm.save_checkpoint(tmp_path / f"{i}.npz", x) for i, x in enumerate(checkpoints)]
    state = jm.running_average(checkpoints[0])
    for path in paths:
        with jm.open_checkpoint(path) as opened:
            state = state.update(opened.params)
    jax.tree.map(np.testing.assert_array_equal, state.params(), averaged(checkpoints).params())


def test_double_precision_stays(x64):
    checkpoints = [{"w": x["w"].astype(np.float64)} for x in make(0)]
    found = averaged(checkpoints).params()["w"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, weighted_mean(checkpoints, [1] * 6), rtol=0, atol=1e-15)


def test_mistakes_are_told():
    checkpoints = make(0)
    state = jm.running_average(checkpoints[0], start=3)
    with pytest.raises(jm.RecipeError, match="taken no parameters in 1 updates"):
        state.update(checkpoints[0]).params()
    with pytest.raises(jm.ShapeError, match="tensor 'w'"):
        state.update(checkpoints[0] | {"w": np.zeros(3, np.float32)})
    with pytest.raises(jm.DTypeError, match="tensor 'half'.*bfloat16"):
        state.update(checkpoints[0] | {"half": np.zeros(5, np.float32)})
    with pytest.raises(jm.RecipeError, match="weight is -1"):
        state.update(checkpoints[0], -1.0)
    with pytest.raises(jm.RecipeError, match="decay is 0"):
        jm.running_average(checkpoints[0], decay=0)
    with pytest.raises(jm.RecipeError, match="every=0"):
        jm.running_average(checkpoints[0], every=0)


# Weights from metrics

METRICS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)
KINDS = st.sampled_from(["loss", "step", "score"])


@FEW
@given(metrics=METRICS, kind=KINDS, penalty=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_weights_are_powers_that_sum_to_one(metrics, kind, penalty):
    scores = 1 / np.array(metrics) if kind == "loss" else np.array(metrics)
    powers = scores**penalty
    weights = jm.weights_from_metric(metrics, kind, penalty=penalty)
    np.testing.assert_allclose(weights, powers / powers.sum(), rtol=1e-9)
    by_name = jm.weights_from_metric({str(i): m for i, m in enumerate(metrics)}, kind, penalty=penalty)
    assert by_name == {str(i): w for i, w in enumerate(weights)}


@FEW
@given(metric=st.floats(1e-3, 1e3), kind=KINDS, penalty=st.sampled_from([0.0, 2.0, np.inf]))
def test_equal_metrics_give_equal_weights(metric, kind, penalty):
    assert jm.weights_from_metric([metric] * 4, kind, penalty=penalty) == [0.25] * 4


@FEW
@given(metrics=METRICS, kind=KINDS)
def test_an_infinite_penalty_takes_the_best(metrics, kind):
    best = min(metrics) if kind == "loss" else max(metrics)
    weights = jm.weights_from_metric(metrics, kind, penalty=np.inf)
    assert weights == [(m == best) / metrics.count(best) for m in metrics]
    finite = jm.weights_from_metric(metrics, kind, penalty=1e9)  # no power overflows
    np.testing.assert_allclose(sum(finite), 1)


def test_a_penalty_can_be_learned():
    checkpoints = [{"w": x["w"]} for x in make(0, count=3)]

    def merged(penalty):
        weights = jm.weights_from_metric([0.5, 1.0, 2.0], "loss", penalty=penalty)
        return jnp.sum(jm.merge(jm.linear(weights), checkpoints)["w"])

    step = 0.01
    slope = (merged(1 + step) - merged(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(merged)(1.0), slope, rtol=1e-2)


@pytest.mark.parametrize(
    ("metrics", "kind", "told"),
    [
        ([1.0, 0.0], "loss", "the loss of checkpoint 1 is 0.0"),
        ({"a": 1.0, "b": -2.0}, "score", "the score of checkpoint 'b' is -2.0"),
        ([1.0, float("nan")], "step", "checkpoint 1 is nan"),
        ([0.0, 0.0], "step", "every step is 0"),
        ([], "step", "one number per checkpoint"),
        ([1.0], "accuracy", "expected 'loss', 'step' or 'score'"),
    ],
)
def test_metrics_that_tell_nothing(metrics, kind, told):
    with pytest.raises(jm.RecipeError, match=told):
        jm.weights_from_metric(metrics, kind)


def test_a_penalty_is_not_negative():
    with pytest.raises(jm.RecipeError, match="penalty is -1"):
        jm.weights_from_metric([1.0, 2.0], penalty=-1)
