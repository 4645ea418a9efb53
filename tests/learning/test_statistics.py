"""Fisher information and the merge that takes it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxmerge as jm
from jaxmerge.trees.lazy import ArrayTensor
from tests.learning.perceptron import (
    CLASSES,
    NAMES,
    apply,
    gradient,
    hidden_and_probabilities,
    make_batches,
    make_params,
    on_device,
)

BATCHES = make_batches(1)
ALL = np.concatenate(BATCHES)
LABELS = np.random.default_rng(2).integers(0, CLASSES, len(ALL))
LABELLED = [(x, LABELS[i * 6 : i * 6 + len(x)]) for i, x in enumerate(BATCHES)]


def assert_trees_close(found, wanted, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), jax.device_get(found), wanted)


# Fisher information


def reference(kind, moment=2):
    """The mean over examples of the moment of the gradient of the log-likelihood, in loops."""
    params, total = make_params(0), jax.tree.map(lambda x: np.zeros(x.shape), make_params(0))
    hidden, probabilities = hidden_and_probabilities(params, ALL)
    for i, x in enumerate(ALL):
        for y in range(CLASSES):
            share = probabilities[i, y] if kind == "exact" else float(y == LABELS[i])
            score = gradient(params, x, hidden[i], np.eye(CLASSES)[y] - probabilities[i])
            total = jax.tree.map(lambda t, g, share=share: t + share * g**moment / len(ALL), total, score)
    return total


@pytest.mark.parametrize(("kind", "batches"), [("exact", BATCHES), ("empirical", LABELLED)])
def test_fisher_is_the_mean_square_of_the_gradients_of_single_examples(kind, batches):
    found = jm.fisher(apply, make_params(0), batches, kind=kind, chunk=4)
    assert_trees_close(found, reference(kind))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))


def test_sampled_fisher_estimates_the_exact_one_however_examples_are_batched():
    samples = 200
    found = jm.fisher(apply, make_params(0), BATCHES, kind="sampled", samples=samples, key=3)
    exact = reference("exact")
    # The variance of a draw, less its square for each example by itself: at most the fourth moment.
    error = jax.tree.map(lambda fourth: np.sqrt(fourth / samples / len(ALL)), reference("exact", moment=4))
    jax.tree.map(lambda f, e, s: np.testing.assert_array_less(np.abs(f - e), 5 * s + 1e-6), found, exact, error)
    batches = [ALL[:6], ALL[6:9], ALL[9:]]
    otherwise = jm.fisher(apply, make_params(0), batches, kind="sampled", samples=samples, key=3)
    assert_trees_close(otherwise, jax.device_get(found), rtol=1e-4)


def test_square_of_a_batch_is_told_by_its_name_and_has_cross_terms():
    found = jm.fisher(apply, make_params(0), BATCHES, kind="batch_square")
    params, wanted = make_params(0), jax.tree.map(lambda x: np.zeros(x.shape), make_params(0))
    for x in BATCHES:
        hidden, p = hidden_and_probabilities(params, x)
        # sum_y sqrt(p_y) d log p_y, with sqrt(p) held
        signals = np.sqrt(p) - p * np.sqrt(p).sum(axis=1, keepdims=True)
        parts = [gradient(params, x[i], hidden[i], signals[i]) for i in range(len(x))]
        square = jax.tree.map(lambda *g: sum(g) ** 2 / len(ALL), *parts)
        wanted = jax.tree.map(np.add, wanted, square)
    assert_trees_close(found, wanted)


def test_fisher_of_a_text_and_of_parameters_that_are_not_all_numbers():
    """Labels of all tokens together are one observation; half-precision parameters give float32; counters zeros."""
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)), jnp.bfloat16), "steps": jnp.asarray(7)}
    x, labels = BATCHES[0].reshape(3, 2, 5), LABELS[:6].reshape(3, 2)
    found = jm.fisher(lambda p, x: x @ p["w"].astype(jnp.float32), params, [(x, labels)], kind="empirical")
    w, wanted = np.asarray(params["w"], np.float64), np.zeros((5, 3))
    for example, label in zip(x.astype(np.float64), labels, strict=True):
        p = np.exp(example @ w) / np.exp(example @ w).sum(axis=1, keepdims=True)
        wanted += (example.T @ (np.eye(3)[label] - p)) ** 2 / 3
    np.testing.assert_allclose(found["w"], wanted, 1e-4, 1e-6)
    assert found["w"].dtype == np.float32 and found["steps"] == 0


NAN = BATCHES[0].copy()
NAN[2, 1] = np.nan
WRONG = {
    "no batch": ((), {}, jm.RecipeError, "there were no batches"),
    "a batch for batches": (BATCHES[0], {}, jm.RecipeError, r"give \[batch\] for one"),
    "an empty batch": ([BATCHES[0], BATCHES[0][:0]], {}, jm.RecipeError, "batch 1 is empty"),
    "NaN": ([BATCHES[1], NAN], {}, jm.NonFiniteError, "batch 1, tensor 'first/bias'"),
    "a label too large": (
        [(BATCHES[0], np.full(6, 3))],
        {"kind": "empirical"},
        jm.RecipeError,
        "label 3, expected 0 to 2",
    ),
    "a negative label": (
        [(BATCHES[0], np.full(6, -1))],
        {"kind": "empirical"},
        jm.RecipeError,
        "batch 0: found the label",
    ),
    "no labels": ([BATCHES[0]], {"kind": "empirical"}, jm.RecipeError, r"expected \(inputs, labels\)"),
    "labels of another shape": ([(BATCHES[0], LABELS[:6, None])], {"kind": "empirical"}, jm.ShapeError, r"shape \[6\]"),
    "examples that differ in number": (
        [(BATCHES[0], BATCHES[2])],
        {},
        jm.ShapeError,
        "batch 0: found arrays of shapes",
    ),
    "no key": (BATCHES, {"kind": "sampled"}, jm.RecipeError, "pass key="),
}


@pytest.mark.parametrize(("batches", "options", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_batches_are_told_apart(batches, options, error, message):
    with pytest.raises(error, match=message):
        jm.fisher(apply, make_params(0), batches, **options)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda p, x: apply(p, x)[:, :1], jm.RecipeError, "the only class is certain"),
        (lambda p, x: apply(p, x)[:, None], jm.ShapeError, "kind='sampled'"),
        (lambda p, x: jnp.sum(apply(p, x), axis=1), jm.ShapeError, "expected \\[6, …, classes\\]"),
    ],
)
def test_wrong_logits_are_told_apart(function, error, message):
    with pytest.raises(error, match=message):
        jm.fisher(function, make_params(0), BATCHES)


# The merge

SHAPES = {"blocks/0/kernel": (8, 16), "blocks/1/kernel": (8, 16), "blocks/0/bias": (16,), "blocks/1/bias": (16,)}
WEIGHTS = {"a": 0.5, "b": 1.5, "c": 1.0}


def make_models(seed=0):
    """Experts, and Fishers that span ten orders of magnitude."""
    rng = np.random.default_rng(seed)
    draw = {name: {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()} for name in NAMES}
    fishers = {
        name: {n: (10.0 ** rng.uniform(-12, -2, s)).astype(np.float32) for n, s in SHAPES.items()} for name in NAMES
    }
    return draw, fishers


def merged_by_hand(experts, fishers, weights, floor, raises="add", normalize=False):
    norms = {
        e: np.sqrt(sum((f.astype(np.float64) ** 2).sum() for f in tree.values())) if normalize else 1.0
        for e, tree in fishers.items()
    }
    result = {}
    for name in SHAPES:
        above = below = 0
        for expert, tree in fishers.items():
            f = tree[name].astype(np.float64)
            precision = weights[expert] / norms[expert] * (f + floor if raises == "add" else np.maximum(f, floor))
            above, below = above + precision * experts[expert][name], below + precision
        result[name] = above / below
    return result


@pytest.mark.parametrize("options", [{}, {"raises": "max"}, {"normalize": True}], ids=str)
def test_merge_is_the_mean_weighted_by_precision(options):
    experts, fishers = make_models()
    merged = jm.merge(jm.fisher_merge(fishers, WEIGHTS, floor=1e-7, **options), on_device(experts))
    assert_trees_close(merged, merged_by_hand(experts, fishers, WEIGHTS, 1e-7, **options))


@settings(max_examples=4)
@given(seed=st.integers(0, 2**32 - 1), factor=st.floats(0.125, 8))
def test_what_must_hold_of_the_merge(seed, factor):
    experts, fishers = make_models(seed)
    models = on_device(experts)

    def merge(fishers, weights=None, floor=0.0, normalize=False):
        return jm.merge(jm.fisher_merge(fishers, weights, floor=floor, normalize=normalize), models)

    mean = jax.device_get(jm.merge(jm.linear(WEIGHTS), models))
    same = dict.fromkeys(NAMES, fishers["a"])
    assert_trees_close(merge(same, WEIGHTS), mean)  # equal information
    nothing = jax.tree.map(np.zeros_like, fishers)
    assert_trees_close(merge(nothing, WEIGHTS), mean)  # none at all
    sure = {**nothing, "b": jax.tree.map(np.ones_like, fishers["b"])}
    assert_trees_close(merge(sure, WEIGHTS), experts["b"])
    scaled = {**fishers, "b": jax.tree.map(lambda f: f * np.float32(factor), fishers["b"])}
    assert_trees_close(merge(scaled), jax.device_get(merge(fishers, {"a": 1.0, "b": factor, "c": 1.0})), 1e-4)
    assert_trees_close(merge(scaled, normalize=True), jax.device_get(merge(fishers, normalize=True)), 1e-4)
    backwards = {name: fishers[name] for name in reversed(NAMES)}
    assert_trees_close(merge(backwards, WEIGHTS), jax.device_get(merge(fishers, WEIGHTS)), 1e-4, 1e-5)


def test_floor_of_the_target_alone_decides_where_nobody_knows_anything():
    """As the authors have it: a maximum for the target model."""
    experts, fishers = make_models()
    nothing = jax.tree.map(np.zeros_like, fishers)
    method = jm.fisher_merge(nothing, floor={"a": 1e-6, "b": 0.0, "c": 0.0}, raises="max")
    assert_trees_close(jm.merge(method, on_device(experts)), experts["a"])


def test_merge_is_a_jax_function_of_statistics_weights_and_experts():
    experts, fishers = map(on_device, make_models())
    wanted = jax.device_get(jm.merge(jm.fisher_merge(fishers, WEIGHTS, normalize=True), experts))
    short = ["blocks/0/kernel"]  # its Fishers have norms of their own

    def merged(fishers, weights, experts):
        return jm.merge(jm.fisher_merge(fishers, weights, normalize=True), experts)

    @jax.jit
    def everything(fishers, weights, experts):
        def loss(weights):
            parts = [{name: tree[name] for name in short} for tree in fishers.values()]
            models = [{name: tree[name] for name in short} for tree in experts.values()]
            return sum(jnp.sum(x**2) for x in merged(parts, weights, models).values())

        swept = jax.vmap(lambda w: merged(fishers, list(w), experts))(jnp.stack([3 * weights, weights]))
        return swept, jax.value_and_grad(loss)(weights)

    weights = jnp.asarray(list(WEIGHTS.values()))
    swept, (value, slope) = everything(fishers, weights, experts)
    for i in range(2):  # only ratios count
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], swept), wanted)
    np.testing.assert_allclose(np.dot(slope, weights), 0, atol=1e-3)
    step = 1e-2
    near = [everything(fishers, weights.at[0].add(sign * step), experts)[1][0] for sign in (1, -1)]
    np.testing.assert_allclose(slope[0], (near[0] - near[1]) / (2 * step), rtol=2e-2)
    assert value > 0


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_models_merge_in_place(kind):
    axis = AxisType.Auto if kind == "auto" else AxisType.Explicit
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"), axis_types=(axis, axis))
    experts, fishers = make_models()

    def placed(tree):
        return {
            n: jax.device_put(v, NamedSharding(mesh, PartitionSpec(*("x", "y")[: v.ndim]))) for n, v in tree.items()
        }

    wanted = merged_by_hand(experts, fishers, WEIGHTS, 1e-6, normalize=True)
    for statistics in (fishers, {name: placed(tree) for name, tree in fishers.items()}):
        method = jm.fisher_merge(statistics, WEIGHTS, normalize=True)
        merged = jm.merge(method, {name: placed(tree) for name, tree in experts.items()})
        assert_trees_close(merged, wanted)
        assert merged["blocks/0/kernel"].sharding.spec == PartitionSpec("x", "y")


def test_stacked_leaves_take_stacked_statistics():
    def stacked(tree):
        return {
            f"blocks/{part}": np.stack([tree[f"blocks/{i}/{part}"] for i in range(2)]) for part in ("kernel", "bias")
        }

    experts, fishers = make_models()
    method = jm.fisher_merge({name: stacked(tree) for name, tree in fishers.items()}, normalize=True)
    together = on_device({name: stacked(tree) for name, tree in experts.items()})
    rules = jm.Rules(stacked=("blocks/.*",))
    wanted = stacked(merged_by_hand(experts, fishers, dict.fromkeys(NAMES, 1.0), 1e-6, normalize=True))
    assert_trees_close(jm.merge(method, together, rules=rules), wanted)
    lazy = {name: {n: ArrayTensor(x) for n, x in stacked(tree).items()} for name, tree in experts.items()}
    assert_trees_close(jax.tree.map(np.asarray, jm.merge(method, lazy, rules=rules)), wanted)


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_saved_statistics_merge_from_disk_to_disk(tmp_path, format):
    experts, fishers = make_models()
    wanted = jm.merge(jm.fisher_merge(fishers, WEIGHTS), on_device(experts))
    for name in NAMES:
        jm.save_checkpoint(tmp_path / name, experts[name])
        jm.save_checkpoint(tmp_path / f"{name}-fisher", fishers[name], format=format)
    opened = {name: jm.open_checkpoint(tmp_path / f"{name}-fisher").params for name in NAMES}
    assert_trees_close(jm.merge(jm.fisher_merge(opened, WEIGHTS), on_device(experts)), jax.device_get(wanted), 0, 0)
    method = jm.fisher_merge(opened, WEIGHTS, normalize=True)
    lazy = jm.merge(method, {name: {n: ArrayTensor(x) for n, x in tree.items()} for name, tree in experts.items()})
    held = [leaf for leaf in jax.tree.leaves(lazy["blocks/0/kernel"].task.method) if isinstance(leaf, jm.LazyTensor)]
    assert len(held) == 3  # nothing is read before its tensor is merged
    jm.merge_checkpoint(method, {name: tmp_path / name for name in NAMES}, out=tmp_path / "merged", progress=False)
    found = jm.open_checkpoint(tmp_path / "merged").load()
    assert_trees_close(found, jax.device_get(jm.merge(method, on_device(experts))), 1e-6, 1e-7)


def other(change):
    experts, fishers = make_models()
    fishers["b"] = change(fishers["b"])
    return fishers


MISFITS = {
    "another structure": (
        other(lambda f: {"w": f["blocks/0/kernel"]}),
        jm.StructureError,
        "expert 'b' has nothing for",
    ),
    "another shape": (
        other(lambda f: {n: x[:4] for n, x in f.items()}),
        jm.ShapeError,
        r"found shape \(4,\), expected \(16,\)",
    ),
    "NaN": (other(lambda f: {n: x * np.nan for n, x in f.items()}), jm.NonFiniteError, "expert 'b', tensor"),
    "other experts": ({"d": make_models()[1]["a"]}, jm.RecipeError, "those of d, but the experts are a, b, c"),
    "too few": ([make_models()[1]["a"]], jm.RecipeError, "of 1 models, expected 3"),
}


@pytest.mark.parametrize(("fishers", "error", "message"), MISFITS.values(), ids=MISFITS)
def test_statistics_that_do_not_fit_are_told_apart(fishers, error, message):
    with pytest.raises(error, match=message):
        jm.merge(jm.fisher_merge(fishers), on_device(make_models()[0]))


def test_wrong_parameters_are_refused():
    fishers = make_models()[1]
    wrong: list[dict[str, Any]] = [{"weights": [1.0, -1.0, 1.0]}, {"floor": -1e-6}]
    for options in wrong:
        with pytest.raises(jm.RecipeError):
            jm.fisher_merge(fishers, **options)
    with pytest.raises(jm.RecipeError, match="open_checkpoint"):
        jm.fisher_merge({"a": "folder", "b": "folder"})
    assert repr(jm.fisher_merge(fishers, normalize=True)) == "fisher_merge(normalize=True)"
