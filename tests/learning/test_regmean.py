"""Gram matrices and the merges that take them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxmerge as jm
from jaxmerge.trees.lazy import ArrayTensor
from tests.learning.perceptron import IN, NAMES, apply, make_batches, make_params, on_device


def assert_trees_close(found, wanted, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), jax.device_get(found), wanted)


def mean_square(rows):
    rows = np.asarray(rows, np.float64).reshape(-1, np.shape(rows)[-1])
    return rows.T @ rows / len(rows)


def filled(abstract):
    """Random numbers for an abstract tree: no program has to be compiled to initialise a model."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape).astype(np.float32), abstract)


# Gram matrices


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.remat(nn.Dense)(4, name="up")(x)), None


class Many(nn.Module):
    """Every kind of layer that is found, and some that are not."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 2), strides=2, name="conv")(x)
        x = nn.Conv(4, (2, 2), feature_group_count=4, name="depthwise")(x).reshape(x.shape[0], -1, 4)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = layers(name="layers")(x, None)
        x = nn.LayerNorm(name="norm")(nn.Einsum((4, 3), "...i,ij->...j", name="einsum")(x))
        return nn.Embed(5, 3, name="embed").attend(x)


def test_gram_of_every_layer_of_a_linen_model_is_that_of_its_inputs():
    model, x = Many(), np.random.default_rng(0).standard_normal((2, 5, 4, 3)).astype(np.float32)
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), x))

    @jax.jit
    def inputs_of_layers(variables, x):
        seen = {}

        def capture(call, args, kwargs, context):
            kernel = isinstance(context.module, nn.Conv | nn.DenseGeneral | nn.Einsum)
            if kernel and context.method_name == "__call__" and context.module.path[0] != "layers":  # within the scan
                seen["/".join(context.module.path)] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(capture):
            model.apply(variables, x)
        return seen

    inputs = inputs_of_layers(variables, x)
    found = jm.gram(model.apply, variables, [x, x], rules=jm.Rules(stacked=("params/layers/.*",)))

    padded = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))  # SAME: 5 rows in steps of 2 by a window of 3, 4 columns by 2
    patches = [padded[:, i : i + 3, j : j + 2].reshape(2, -1) for i in (0, 2, 4) for j in (0, 2)]
    wanted = {"params/conv/kernel": mean_square(np.stack(patches))}
    for name in ("query", "key", "value", "out"):
        rows = np.asarray(inputs[f"attention/{name}"])
        wanted[f"params/attention/{name}/kernel"] = mean_square(rows.reshape(*rows.shape[:2], -1))
    wanted["params/einsum/kernel"] = mean_square(inputs["einsum"])
    assert set(found) == {*wanted, "params/layers/up/kernel"}
    assert_trees_close({name: found[name] for name in wanted}, wanted)

    up = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["layers"]["up"])
    out = variables["params"]["attention"]["out"]
    h = np.einsum("bthd,hdf->btf", np.asarray(inputs["attention/out"], np.float64), out["kernel"]) + out["bias"]
    for i in range(2):
        np.testing.assert_allclose(found["params/layers/up/kernel"][i], mean_square(h), 1e-5, 1e-5)
        h = h + np.maximum(h @ up["kernel"][i] + up["bias"][i], 0)
    np.testing.assert_allclose(mean_square(inputs["einsum"]), mean_square(h), 1e-5, 1e-5)


def test_gram_of_an_nnx_model_of_a_torch_layout_and_of_inputs_that_are_told(capsys):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.one = nnx.Linear(IN, 4, rngs=rngs)
            self.two = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
            self.three = nnx.Einsum("bij,ijk->bk", (2, 3, 5), rngs=rngs)

        def __call__(self, x):
            return self.three(self.two(self.one(x)))

    (x, *_) = make_batches(0)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
    state = filled(abstract)
    found = jm.gram(lambda state, x: nnx.merge(graph, state)(x), state, [x], tensors="(one|three)/.*")
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(state))
    one = x @ p["one"]["kernel"] + p["one"]["bias"]
    three = np.einsum("bi,ijk->bjk", one, p["two"]["kernel"]) + p["two"]["bias"]
    assert set(found) == {"one/kernel", "three/kernel"}
    np.testing.assert_allclose(found["one/kernel"], mean_square(x), 1e-5, 1e-5)
    np.testing.assert_allclose(found["three/kernel"], mean_square(three.reshape(len(x), -1)), 1e-5, 1e-5)

    torch = {"layer.weight": np.ones((3, IN), np.float32)}
    summed = jm.gram(lambda p, x: x @ p["layer.weight"].T, torch, [x, x[:2]], normalize=False, progress=True)
    assert "Gram matrices" in capsys.readouterr().err
    np.testing.assert_allclose(summed["layer.weight"], x.T @ x + x[:2].T @ x[:2], 1e-5, 1e-5)
    told = jm.gram(lambda p, x: {"layer.weight": x[None]}, torch, [x, x[:2]], inputs=True, normalize=False)
    np.testing.assert_allclose(told["layer.weight"], summed["layer.weight"], 1e-6)


X = make_batches(3)[0]
NAN = X.copy()
NAN[1, 2] = np.nan
GRAM_MISTAKES = {
    "no batch": ({"batches": []}, jm.RecipeError, "there were no batches"),
    "NaN": ({"batches": [X, NAN]}, jm.NonFiniteError, "batch 1, tensor 'first/kernel'"),
    "a pattern for nothing": ({"tensors": "frist/kernel"}, jm.RecipeError, "first/kernel"),
    "no linear layer": ({"tensors": ".*/bias"}, jm.RecipeError, "no kernel is applied"),
    "another layout": ({"rules": jm.Rules(layout="huggingface")}, jm.RecipeError, r"summed over its axes \(0,\)"),
    "inputs of another shape": (
        {"apply": lambda p, x: {"head/kernel": x}, "inputs": True},
        jm.ShapeError,
        r"inputs of 'head/kernel': found shape \(6, 5\)",
    ),
    "inputs of no tensor": ({"apply": lambda p, x: {"heda/kernel": x}, "inputs": True}, jm.RecipeError, "head/kernel"),
}


@pytest.mark.parametrize(("options", "error", "message"), GRAM_MISTAKES.values(), ids=GRAM_MISTAKES)
def test_mistakes_in_collecting_are_told_apart(options, error, message):
    options = {"apply": apply, "batches": [X], **options}
    with pytest.raises(error, match=message):
        jm.gram(options.pop("apply"), make_params(0), options.pop("batches"), **options)


# The merge

ROWS, OUT = 20, 6
SHAPES = {"blocks/0/kernel": (8, OUT), "blocks/1/kernel": (8, OUT), "blocks/0/bias": (OUT,), "blocks/1/bias": (OUT,)}
WEIGHTS = {"a": 0.5, "b": 1.5, "c": 1.0}


def make_models(seed=0, rows=ROWS):
    """Experts, and the inputs of their layers."""
    rng = np.random.default_rng(seed)
    experts = {name: {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()} for name in NAMES}
    kernels = [n for n in SHAPES if n.endswith("kernel")]
    inputs = {name: {n: rng.standard_normal((rows, 8)) * [0.1, *[1.0] * 6, 5] for n in kernels} for name in NAMES}
    return experts, inputs


def grams_of(inputs):
    return {e: {n: mean_square(x).astype(np.float32) for n, x in tree.items()} for e, tree in inputs.items()}


def by_hand(experts, grams, weights=None, off_diagonal=1.0):
    weights = weights or dict.fromkeys(NAMES, 1.0)
    result = {}
    for name, shape in SHAPES.items():
        kernel = name.endswith("kernel")
        left, right = np.zeros((shape[0],) * 2 if kernel else ()), np.zeros(shape)
        for e in NAMES:
            w = experts[e][name].astype(np.float64)
            if kernel:
                g = np.asarray(grams[e][name], np.float64)
                g = off_diagonal * g + (1 - off_diagonal) * np.diag(np.diag(g))
                left, right = left + weights[e] * g, right + weights[e] * g @ w
            else:
                left, right = left + weights[e], right + weights[e] * w
        result[name] = np.linalg.solve(left, right) if kernel else right / left
    return result


@settings(max_examples=4)
@given(seed=st.integers(0, 2**32 - 1), off_diagonal=st.floats(0, 1))
def test_merge_is_the_closed_form(seed, off_diagonal):
    experts, inputs = make_models(seed)
    grams, models = grams_of(inputs), on_device(experts)

    def merge(grams, off_diagonal=off_diagonal):
        return jm.merge(jm.regmean(grams, WEIGHTS, off_diagonal=off_diagonal), models)

    assert_trees_close(merge(grams), by_hand(experts, grams, WEIGHTS, off_diagonal), 2e-3, 2e-4)
    mean = jax.device_get(jm.merge(jm.linear(WEIGHTS), models))
    assert_trees_close(merge(dict.fromkeys(NAMES, grams["a"])), mean, 1e-4, 1e-4)  # equal Gram matrices
    by_channel = jax.device_get(merge(grams, 0.0))["blocks/0/kernel"]
    diagonals = {e: WEIGHTS[e] * np.diag(grams[e]["blocks/0/kernel"])[:, None] for e in NAMES}
    shares = sum(diagonals[e] * experts[e]["blocks/0/kernel"] for e in NAMES) / sum(diagonals.values())
    np.testing.assert_allclose(by_channel, shares, 1e-4, 1e-4)


def test_no_other_kernel_comes_nearer_to_the_outputs_of_all_experts():
    experts, inputs = make_models()
    merged = jax.device_get(jm.merge(jm.regmean(grams_of(inputs), off_diagonal=1.0), on_device(experts)))
    rng = np.random.default_rng(1)
    for name in ("blocks/0/kernel", "blocks/1/kernel"):

        def loss(w, name=name):
            return sum(np.sum((inputs[e][name] @ (w - experts[e][name])) ** 2) for e in NAMES)

        best = loss(merged[name].astype(np.float64))
        for size in (1e-2, 1e-1):
            assert loss(merged[name] + size * rng.standard_normal((8, OUT))) > best
        residual = sum(inputs[e][name].T @ (inputs[e][name] @ (merged[name] - experts[e][name])) for e in NAMES)
        size = sum(np.abs(inputs[e][name].T) @ np.abs(inputs[e][name] @ experts[e][name]) for e in NAMES)
        np.testing.assert_array_less(np.abs(residual), 1e-5 * size)
        mean = np.mean([experts[e][name] for e in NAMES], axis=0)
        assert loss(mean) > best


@pytest.mark.parametrize(("width", "rows"), [(8, 1), (200, 15)])
def test_where_no_expert_has_seen_inputs_kernels_are_the_mean(width, rows):
    """Fewer rows than channels, and a channel that is dead: as the pseudo-inverse has it."""
    rng = np.random.default_rng(0)
    names = ("a", "b")
    experts = {e: {"kernel": rng.standard_normal((width, 3)).astype(np.float32)} for e in names}
    inputs = {e: rng.standard_normal((rows, width)) for e in names}
    for x in inputs.values():
        x[:, 2] = 0
    grams = {e: {"kernel": mean_square(inputs[e]).astype(np.float32)} for e in names}
    merged = jax.device_get(jm.merge(jm.regmean(grams, off_diagonal=1.0), on_device(experts)))["kernel"]
    mean = np.mean([experts[e]["kernel"].astype(np.float64) for e in names], axis=0)
    scale = np.sqrt(sum(np.diag(mean_square(inputs[e])) for e in names))
    scale[2] = 1
    g = sum(mean_square(inputs[e]) for e in names) / np.outer(scale, scale)
    t = sum(mean_square(inputs[e]) @ (experts[e]["kernel"] - mean) for e in names) / scale[:, None]
    np.testing.assert_allclose(merged, mean + np.linalg.pinv(g, 1e-6) @ t / scale[:, None], 0, 0.02)  # of changes by 1
    np.testing.assert_allclose(merged[2], mean[2], 0, 1e-6)
    alone = jm.merge(jm.regmean({"a": grams["a"]}), on_device({"a": experts["a"]}))
    np.testing.assert_array_equal(alone["kernel"], experts["a"]["kernel"])
    drawn = jm.merge(jm.regmean(grams, off_diagonal=1.0, ridge=1e6), on_device(experts))["kernel"]
    np.testing.assert_allclose(drawn, mean, 0, 1e-4)


def test_merge_is_a_jax_function_in_both_layouts():
    experts, inputs = make_models()
    grams, names = grams_of(inputs), ("blocks/0/kernel", "blocks/0/bias")
    models = on_device({e: {n: tree[n] for n in names} for e, tree in experts.items()})
    grams = on_device({e: {n: g for n, g in tree.items() if n in names} for e, tree in grams.items()})
    wanted = by_hand(experts, grams_of(inputs), None, 0.8)

    @jax.jit
    def everything(grams, factor, models):
        def merged(factor):
            return jm.merge(jm.regmean(grams, off_diagonal=factor), models)

        def loss(factor):
            return jnp.sum(merged(factor)["blocks/0/kernel"] ** 2)

        return jax.vmap(merged)(jnp.stack([factor, 0 * factor])), jax.value_and_grad(loss)(factor)

    swept, (_, slope) = everything(grams, jnp.float32(0.8), models)
    assert_trees_close({n: x[0] for n, x in swept.items()}, {n: wanted[n] for n in names}, 1e-3, 1e-4)
    near = [everything(grams, jnp.float32(0.8 + d), models)[1][0] for d in (1e-2, -1e-2)]
    np.testing.assert_allclose(slope, (near[0] - near[1]) / 2e-2, rtol=5e-2)

    torch = {e: {"layer.weight": tree["blocks/0/kernel"].T} for e, tree in models.items()}
    grams = {e: {"layer.weight": tree["blocks/0/kernel"]} for e, tree in grams.items()}
    transposed = jm.merge(jm.regmean(grams, off_diagonal=0.8), torch)["layer.weight"]
    np.testing.assert_allclose(transposed.T, wanted["blocks/0/kernel"], 1e-3, 1e-4)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_kernels_merge_in_place(kind):
    axis = AxisType.Auto if kind == "auto" else AxisType.Explicit
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"), axis_types=(axis, axis))
    experts, inputs = make_models()
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("x", "y")))
    name = "blocks/0/kernel"
    models = {e: {name: place(tree[name])} for e, tree in experts.items()}
    grams = {e: {name: tree[name]} for e, tree in grams_of(inputs).items()}
    merged = jm.merge(jm.regmean(grams, off_diagonal=1.0), models)[name]
    np.testing.assert_allclose(merged, by_hand(experts, grams_of(inputs))[name], 2e-3, 2e-4)
    assert merged.sharding.spec == PartitionSpec("x", "y")
    placed = {e: {name: place(tree[name])} for e, tree in grams.items()}
    np.testing.assert_allclose(jm.merge(jm.regmean(placed, off_diagonal=1.0), models)[name], merged, 1e-4, 1e-5)


def test_saved_statistics_merge_stacked_lazily_and_from_disk_to_disk(tmp_path):
    experts, inputs = make_models()
    grams = grams_of(inputs)
    wanted = jax.device_get(jm.merge(jm.regmean(grams), on_device(experts)))
    for name in NAMES:
        jm.save_checkpoint(tmp_path / name, experts[name])
        jm.save_checkpoint(tmp_path / f"{name}-gram", grams[name])
    opened = {name: jm.open_checkpoint(tmp_path / f"{name}-gram").params for name in NAMES}
    jm.merge_checkpoint(jm.regmean(opened), {n: tmp_path / n for n in NAMES}, out=tmp_path / "merged", progress=False)
    assert_trees_close(jm.open_checkpoint(tmp_path / "merged").load(), wanted, 1e-6, 1e-6)

    def stacked(tree):
        return {
            f"blocks/{part}": np.stack([tree[f"blocks/{i}/{part}"] for i in range(2)]) for part in ("kernel", "bias")
        }

    def stacked_gram(tree):
        return {"blocks/kernel": np.stack([tree[f"blocks/{i}/kernel"] for i in range(2)])}

    method = jm.regmean({name: stacked_gram(tree) for name, tree in grams.items()})
    for put in (jnp.asarray, ArrayTensor):
        models = {name: {n: put(x) for n, x in stacked(tree).items()} for name, tree in experts.items()}
        merged = jm.merge(method, models, rules=jm.Rules(stacked=("blocks/.*",)))
        assert_trees_close(jax.tree.map(np.asarray, merged), stacked(wanted), 1e-5, 1e-5)


def changed(change):
    grams = grams_of(make_models()[1])
    grams["b"] = {n: change(g) for n, g in grams["b"].items()}
    return grams


MISFITS = {
    "another shape": (changed(lambda g: g[:4, :4]), jm.ShapeError, r"found shape \(4, 4\), expected \(8, 8\)"),
    "NaN": (changed(lambda g: g * np.nan), jm.NonFiniteError, "expert 'b', tensor 'blocks/0/kernel'"),
    "of no tensor": (
        {e: {"head/kernel": np.eye(8)} for e in NAMES},
        jm.RecipeError,
        "'head/kernel', which is no tensor",
    ),
    "missing": ({**changed(lambda g: g), "b": {}}, jm.StructureError, "expert 'b' has nothing for"),
    "other experts": ([np.eye(8)], jm.RecipeError, "of 1 models, expected 3"),
}


@pytest.mark.parametrize(("grams", "error", "message"), MISFITS.values(), ids=MISFITS)
def test_gram_matrices_that_do_not_fit_are_told_apart(grams, error, message):
    with pytest.raises(error, match=message):
        jm.merge(jm.regmean(grams), on_device(make_models()[0]))


def test_wrong_parameters_are_refused():
    grams = grams_of(make_models()[1])
    for options in ({"weights": [1.0, -1.0, 1.0]}, {"off_diagonal": 1.1}, {"ridge": -1e-6}):
        with pytest.raises(jm.RecipeError):
            jm.regmean(grams, **options)
    assert repr(jm.regmean(grams, ridge=0.1)) == "regmean(ridge=0.1)"


# RegMean++


def test_sequential_grams_are_taken_behind_the_merged_layers():
    """Two kernels in one block, a head outside: in the block an expert's own kernels count, below it merged ones."""

    def run(params, x):
        for i in range(2):
            block = params[f"blocks_{i}"]
            x = jnp.tanh(jnp.tanh(x @ block["up"]["kernel"]) @ block["down"]["kernel"]) + block["bias"][None]
        return x @ params["head"]["kernel"]

    rng = np.random.default_rng(0)

    def make():
        kernel = lambda m, n: {"kernel": rng.standard_normal((m, n)).astype(np.float32)}  # noqa: E731
        blocks = {
            f"blocks_{i}": {"up": kernel(5, 4), "down": kernel(4, 5), "bias": np.ones(5, np.float32)} for i in (0, 1)
        }
        return {**blocks, "head": kernel(5, 3)}

    experts = {"a": make(), "b": make()}
    batches = {name: [rng.standard_normal((30, IN)).astype(np.float32)] for name in experts}
    found = jm.sequential_grams(run, experts, batches)
    merged = jax.device_get(jm.merge(jm.regmean(found), on_device(experts)))
    for name, expert in experts.items():
        x = batches[name][0].astype(np.float64)
        for i in range(2):
            own, below = expert[f"blocks_{i}"], merged[f"blocks_{i}"]
            np.testing.assert_allclose(found[name][f"blocks_{i}/up/kernel"], mean_square(x), 1e-4, 1e-4)
            inner = np.tanh(x @ own["up"]["kernel"])
            np.testing.assert_allclose(found[name][f"blocks_{i}/down/kernel"], mean_square(inner), 1e-4, 1e-4)
            x = np.tanh(np.tanh(x @ below["up"]["kernel"]) @ below["down"]["kernel"]) + below["bias"]
        np.testing.assert_allclose(found[name]["head/kernel"], mean_square(x), 1e-4, 1e-4)
    for wrong, message in (({"a": batches["a"]}, "found a, expected"), ([[], []], "of expert 'a' is empty")):
        with pytest.raises(jm.RecipeError, match=message):
            jm.sequential_grams(run, experts, wrong)
