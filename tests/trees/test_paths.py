"""Names of leaves, renaming, and rules on names."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import jaxmerge as jm
from jaxmerge.trees.lazy import ArrayTensor
from jaxmerge.trees.paths import match_rules, with_leaves

NAMES = ["blocks/0/attn/kernel", "blocks/0/attn/bias", "blocks/10/attn/kernel", "embed"]


class Model(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))])


TREES = {
    "nested": ({"b": {"c": 1.0}, "a": [2.0, (3.0,)]}, ["a/0", "a/1/0", "b/c"]),
    "frozen": (FrozenDict({"params": {"Dense_0": {"kernel": 1.0}}}), ["params/Dense_0/kernel"]),
    "flat": ({"model.layers.0.weight": 1.0, "lm_head": 2.0}, ["lm_head", "model.layers.0.weight"]),
    "integer keys": ({"blocks": {0: 1.0, 1: 2.0}}, ["blocks/0", "blocks/1"]),
    "state": (nnx.state(Model(), nnx.Param), ["blocks/0/bias", "blocks/0/kernel"]),
    "pure dict": (nnx.to_pure_dict(nnx.state(Model(), nnx.Param)), ["blocks/0/bias", "blocks/0/kernel"]),
    "boxes": ({"w": nn.Partitioned(jnp.ones(2), names=("x",))}, ["w"]),
    "lazy": ({"w": ArrayTensor(np.ones(2))}, ["w"]),
    "nothing": ({"a": None, "b": {}}, []),
}


@pytest.mark.parametrize(("tree", "names"), TREES.values(), ids=TREES)
def test_names(tree, names):
    assert sorted(jm.named_leaves(tree)) == names


@pytest.mark.parametrize("tree", [tree for tree, _ in TREES.values()], ids=TREES)
def test_leaves_go_back_where_they_came_from(tree):
    again = with_leaves(tree, jm.named_leaves(tree))
    assert type(again) is type(tree)
    assert jm.named_leaves(again).keys() == jm.named_leaves(tree).keys()
    assert all(a is b for a, b in zip(jm.named_leaves(again).values(), jm.named_leaves(tree).values(), strict=True))


def test_boxes_are_opened_and_closed_again():
    tree = TREES["boxes"][0]
    assert jm.named_leaves(tree)["w"] is tree["w"].value
    changed = with_leaves(tree, {"w": jnp.zeros(2)})
    assert isinstance(changed["w"], nn.Partitioned)
    assert changed["w"].names == ("x",)


def test_two_leaves_of_one_name():
    with pytest.raises(jm.StructureError, match="'a/b'"):
        jm.named_leaves({"a": {"b": 1.0}, "a/b": 2.0})


def test_renamed():
    flat = {name: index for index, name in enumerate(NAMES)}
    renamed = jm.renamed(flat, {r"blocks/(\d+)/attn/kernel": r"layers.\1.weight", "embed": "tokens"})
    assert renamed == {"layers.0.weight": 0, "blocks/0/attn/bias": 1, "layers.10.weight": 2, "tokens": 3}
    with pytest.raises(jm.StructureError, match="'x'"):
        jm.renamed(flat, {"blocks/.*kernel": "x"})
    with pytest.raises(jm.RecipeError, match="matches no tensor"):
        jm.renamed(flat, {"blocks/5/.*": "x"})


def test_first_rule_wins_and_rules_match_whole_names():
    matched = match_rules(["embed", "blocks/0/.*", ".*kernel"], NAMES)
    assert matched == dict(zip(NAMES, ["blocks/0/.*", "blocks/0/.*", ".*kernel", "embed"], strict=True))
    assert match_rules([], NAMES) == dict.fromkeys(NAMES)
    with pytest.raises(jm.RecipeError):
        match_rules(["kernel"], NAMES)


def test_a_name_that_is_no_pattern_matches_itself():
    assert match_rules(["a+b"], ["a+b", "aab"]) == {"a+b": "a+b", "aab": "a+b"}


def test_a_rule_that_matches_nothing_suggests_the_nearest_names():
    with pytest.raises(jm.RecipeError, match=r"blocks/0/attn/kernel"):
        match_rules(["block/0/attn/kernel"], NAMES)
    with pytest.raises(jm.RecipeError, match="no regular expression"):
        match_rules(["(("], NAMES)
