"""Layers of models: selected, stacked and renumbered, under the names of every framework, read by nobody."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.trees.info import Rules, tensor_infos
from jaxmerge.trees.layers import select_layers, stack_layers
from jaxmerge.trees.lazy import ArrayTensor, LazyTensor

LAYERS = 4


class Unread(LazyTensor):
    """A tensor that must not be read."""

    shape, dtype, label = (2,), np.dtype(np.float32), "unread"

    def read(self, box):
        raise AssertionError("a tensor was read")


def hugging_face(start: float = 0.0, layers: int = LAYERS) -> dict[str, np.ndarray]:
    params = {"model.embed_tokens.weight": np.full(2, start - 1), "lm_head.weight": np.full(2, start - 2)}
    for layer in range(layers):
        params[f"model.layers.{layer}.mlp.experts.7.weight"] = np.full(2, start + layer)
        params[f"model.layers.{layer}.norm.weight"] = np.full(2, start + layer + 0.5)
    return params


def layer_values(params) -> list[float]:
    """The first entry of each layer's expert, in order."""
    count = sum("experts" in name for name in params)
    return [float(params[f"model.layers.{i}.mlp.experts.7.weight"][0]) for i in range(count)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((1, 3), [1, 2]),
        ((0, 4), [0, 1, 2, 3]),
        (range(0, 4, 2), [0, 2]),
        ([3, 1, 1], [3, 1, 1]),
        (range(3, 0, -1), [3, 2, 1]),
    ],
)
def test_selected_layers_are_renumbered(layers, expected):
    params = hugging_face()
    found = select_layers(params, layers)
    assert layer_values(found) == expected
    assert [found[f"model.layers.{i}.norm.weight"][0] for i in range(len(expected))] == [n + 0.5 for n in expected]
    assert found["lm_head.weight"] is params["lm_head.weight"]
    assert len(found) == 2 + 2 * len(expected)


def test_pieces_are_stacked_and_the_rest_is_of_one_model():
    a, b = hugging_face(), hugging_face(100)
    assert layer_values(stack_layers([(a, (0, 3)), (b, (1, 4)), (a, (3, 4))])) == [0, 1, 2, 101, 102, 103, 3]
    assert stack_layers([(a, (0, 1)), (b, (0, 1))])["lm_head.weight"][0] == -2
    assert stack_layers([(a, (0, 1)), (b, (0, 1))], outside=b)["lm_head.weight"][0] == 98


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=5)),
        min_size=1,
        max_size=4,
    )
)
def test_any_stack_has_the_layers_in_order(pieces):
    models = [hugging_face(), hugging_face(100)]
    found = stack_layers([(models[i], layers) for i, layers in pieces])
    assert layer_values(found) == [100 * i + layer for i, layers in pieces for layer in layers]
    layered = [leaf for name, leaf in found.items() if "layers" in name]
    assert len({id(leaf) for leaf in layered}) == len(layered)  # else equal layers would be saved as tied tensors
    infos = tensor_infos({name: leaf.shape for name, leaf in found.items()})
    assert {info.num_layers for info in infos.values()} == {0, len(layered) // 2}


def test_nothing_is_read_and_repeated_layers_are_saved(tmp_path, rng):
    unread = {name: Unread() for name in hugging_face()}
    found = stack_layers([(unread, (0, 3)), (unread, (1, 4))])
    assert len({id(leaf) for leaf in found.values()}) == len(found) == 14
    jm.save_checkpoint(tmp_path / "a", {name: value.astype(np.float32) for name, value in hugging_face().items()})
    with jm.open_checkpoint(tmp_path / "a") as a:
        jm.save_lazily(stack_layers([(a.params, (0, 3)), (a.params, (1, 4))]), tmp_path / "out")
    saved = jm.open_checkpoint(tmp_path / "out")
    assert not saved.aliases
    assert layer_values({name: leaf[...] for name, leaf in saved.params.items()}) == [0, 1, 2, 1, 2, 3]


def test_what_is_tied_stays_tied():
    params = hugging_face()
    params["lm_head.weight"] = params["model.embed_tokens.weight"]
    shared = np.ones(2)
    for layer in range(LAYERS):
        params[f"model.layers.{layer}.norm.weight"] = shared
    found = select_layers(params, [0, 1, 1])
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]
    norms = [found[f"model.layers.{i}.norm.weight"] for i in range(3)]
    assert norms[0] is norms[1] is shared and norms[2] is not shared


@pytest.mark.parametrize("container", [dict, FrozenDict])
def test_nested_trees_stay_nested_with_their_keys(container):
    tree = {
        "params": {"blocks": {i: {"mlp/kernel": jnp.full(2, i)} for i in range(3)}, "embed": {"embedding": jnp.ones(3)}}
    }
    found = select_layers(container(tree), [2, 0])
    assert found.keys() == {"params"} and set(found["params"]["blocks"]) == {0, 1}
    assert [int(found["params"]["blocks"][i]["mlp/kernel"][0]) for i in (0, 1)] == [2, 0]
    assert found["params"]["embed"]["embedding"].shape == (3,)


def test_other_containers_become_flat():
    found = select_layers({"blocks": [{"w": jnp.full(1, i)} for i in range(3)]}, (1, 3))
    assert {name: int(leaf[0]) for name, leaf in found.items()} == {"blocks/0/w": 1, "blocks/1/w": 2}


@pytest.mark.parametrize("kind", ["numpy", "jax", "lazy", "mixed", "traced", "shapes"])
def test_scanned_leaves(kind):
    rules = Rules(stacked=("blocks/.*",))
    a, b = ({"blocks": {"w": np.arange(8.0, dtype=np.float32).reshape(4, 2) + i}, "embed": np.ones(2)} for i in (0, 10))
    pieces = [(a, [0, 3]), (b, (1, 2))]
    expected = np.array([[0, 1], [6, 7], [12, 13]], np.float32)

    def stacked(a, b):
        return stack_layers([(a, pieces[0][1]), (b, pieces[1][1])], rules=rules)

    if kind == "shapes":
        found = stacked(*(jax.eval_shape(lambda x=x: jax.tree.map(jnp.asarray, x)) for x in (a, b)))
        assert found["blocks"]["w"].shape == (3, 2)
        return
    if kind in ("lazy", "mixed"):
        a = jax.tree.map(ArrayTensor, a)
        b = b if kind == "mixed" else jax.tree.map(ArrayTensor, b)
    elif kind in ("jax", "traced"):
        a, b = jax.tree.map(jnp.asarray, (a, b))
    found = (jax.jit(stacked) if kind == "traced" else stacked)(a, b)
    assert isinstance(found["blocks"]["w"], LazyTensor) == (kind in ("lazy", "mixed"))
    np.testing.assert_array_equal(np.asarray(found["blocks"]["w"]), expected)


def test_pattern_says_which_stack():
    params = {f"{part}.block.{i}.w": np.full(1, i) for part in ("encoder", "decoder") for i in range(3)}
    with pytest.raises(jm.StructureError, match=r"several stacks.*encoder\.block\.\* \(3 layers\).*Rules\(layer="):
        select_layers(params, (0, 1))
    found = select_layers(params, [2], rules=Rules(layer=r"decoder\.block\.(\d+)"))
    assert len(found) == 4 and found["decoder.block.0.w"][0] == 2 and found["encoder.block.2.w"][0] == 2


@pytest.mark.parametrize(
    "layers", [(0, 5), (-1, 2), (2, 2), (3, 1), [4], [-1], [], range(0), range(10**12), (0, 10**12)]
)
def test_layers_that_do_not_exist(layers):
    with pytest.raises(jm.RecipeError, match="piece 0 has layers 0 to 3, and .* were asked for"):
        select_layers(hugging_face(), layers)


def test_models_that_do_not_go_together():
    with pytest.raises(jm.RecipeError, match="nothing to stack"):
        stack_layers([])
    with pytest.raises(jm.StructureError, match="no numbered layers among its 1 tensors"):
        select_layers({"w": np.ones(1)}, (0, 1))
    with pytest.raises(jm.StructureError, match=r"piece 1 has its layers in h\.\*, piece 0 in model\.layers\.\*"):
        stack_layers([(hugging_face(), (0, 1)), ({"h.0.w": np.ones(1)}, (0, 1))])
    gap = {name: leaf for name, leaf in hugging_face().items() if "layers.1" not in name}
    with pytest.raises(jm.StructureError, match="no tensor in layer 1"):
        select_layers(gap, (0, 2))
    rules = Rules(stacked=("w",))
    with pytest.raises(jm.ShapeError, match=r"piece 1, tensor 'w': found shape \(2, 3\)"):
        stack_layers([({"w": np.ones((2, 2))}, (0, 1)), ({"w": np.ones((2, 3))}, (0, 1))], rules=rules)
    with pytest.raises(jm.DTypeError, match="piece 1, tensor 'w': found dtype float32"):
        stack_layers([({"w": np.ones(2)}, (0, 1)), ({"w": np.ones(2, np.float32)}, (0, 1))], rules=rules)
    with pytest.raises(jm.RecipeError, match="scalar"):
        select_layers({"w": np.ones(())}, (0, 1), rules=rules)
