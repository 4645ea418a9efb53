"""Namings: what transformers saves becomes what Flax models hold, and back, and nothing is read on the way."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.trees.lazy import ArrayTensor, LazyTensor
from jaxmerge.trees.naming_tables import FAMILIES, MODEL_TYPES
from tests.trees.record_transformers import DATA, weights

with np.load(DATA) as data:
    CONFIGS = {name.partition("/")[0]: json.loads(str(data[name])) for name in data if name.endswith("/config")}
    MODELS = {name.partition("/")[0]: weights(json.loads(str(data[name]))) for name in data if name.endswith("/shapes")}
FAMILY = {name: MODEL_TYPES[CONFIGS[name]["model_type"]] for name in MODELS}


class Unread(LazyTensor):
    """A tensor that must not be read."""

    label = "unread"

    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, dtype

    def read(self, box):
        raise AssertionError("a tensor was read")


KINDS = {
    "numpy": lambda x: x,
    "jax": jnp.asarray,
    "lazy": ArrayTensor,
    "unread": lambda x: Unread(x.shape, x.dtype),
    "shapes": lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
}


def described(tree):
    return {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in jm.named_leaves(tree).items()}


def test_the_convention():
    """Spelled out: the names and axes of transformers' former Flax models."""
    expected = {
        "model.embed_tokens.weight": ("model/embed_tokens/embedding", None),
        "model.layers.11.self_attn.q_proj.weight": ("model/layers/11/self_attn/q_proj/kernel", (1, 0)),
        "model.layers.11.self_attn.q_proj.bias": ("model/layers/11/self_attn/q_proj/bias", None),
        "model.layers.11.self_attn.q_norm.weight": ("model/layers/11/self_attn/q_norm/weight", None),
        "model.layers.11.mlp.down_proj.weight": ("model/layers/11/mlp/down_proj/kernel", (1, 0)),
        "model.layers.11.pre_feedforward_layernorm.weight": (
            "model/layers/11/pre_feedforward_layernorm/weight",
            None,
        ),
        "model.norm.weight": ("model/norm/weight", None),
        "lm_head.weight": ("lm_head/kernel", (1, 0)),
    }
    vit = {
        "vit.embeddings.cls_token": ("vit/embeddings/cls_token", None),
        "vit.embeddings.patch_embeddings.projection.weight": (
            "vit/embeddings/patch_embeddings/projection/kernel",
            (2, 3, 1, 0),
        ),
        "vit.encoder.layer.0.attention.attention.query.weight": (
            "vit/encoder/layer/0/attention/attention/query/kernel",
            (1, 0),
        ),
        "vit.encoder.layer.0.output.dense.bias": ("vit/encoder/layer/0/output/dense/bias", None),
        "vit.encoder.layer.0.layernorm_before.weight": ("vit/encoder/layer/0/layernorm_before/scale", None),
        "vit.encoder.layer.0.layernorm_before.bias": ("vit/encoder/layer/0/layernorm_before/bias", None),
        "pooler.dense.weight": ("pooler/dense/kernel", (1, 0)),
        "classifier.weight": ("classifier/kernel", (1, 0)),
    }
    for family, names in (("gemma3", expected), ("vit", vit)):
        shapes = {name: tuple(range(2, 2 + len(axes or (0,)))) for name, (_, axes) in names.items()}
        found = jm.named_leaves(jm.naming(family)({n: np.arange(np.prod(s)).reshape(s) for n, s in shapes.items()}))
        assert set(found) == {new for new, _ in names.values()}
        for name, (new, axes) in names.items():
            np.testing.assert_array_equal(
                found[new], np.arange(np.prod(shapes[name])).reshape(shapes[name]).transpose(axes)
            )


@settings(max_examples=40)
@given(data=st.data())
def test_there_and_back(data):
    """Whatever leaves, layers and prefix: the inverse gives the same names, shapes, dtypes and values."""
    name = data.draw(st.sampled_from(sorted(MODELS)))
    chosen = data.draw(
        st.sets(st.sampled_from(sorted({re.sub(r"\.[01]\.", ".0.", n) for n in MODELS[name]})), min_size=1)
    )
    layers = data.draw(st.sampled_from([1, 2, 11]))
    prefix = data.draw(st.sampled_from(["", r"(model|vit)\."]))
    stacked, kind = data.draw(st.booleans()), data.draw(st.sampled_from(sorted(KINDS)))
    params = {}
    for leaf in chosen:
        for layer in range(layers if ".0." in leaf else 1):
            x = MODELS[name][leaf].astype(np.float16 if "norm" in leaf else np.float32) + layer
            params[re.sub(f"^{prefix}", "", leaf).replace(".0.", f".{layer}.")] = KINDS[kind](x)
    naming = jm.naming(FAMILY[name], stacked=stacked)
    there = naming(params)
    back = naming.inverse()(there)
    assert naming.inverse().inverse()(params).keys() == there.keys()
    assert described(back) == described(params) and set(back) == set(params)
    if kind not in ("unread", "shapes"):
        for leaf, x in params.items():
            np.testing.assert_array_equal(np.asarray(back[leaf]), np.asarray(x))
    shapes = naming({leaf: jax.ShapeDtypeStruct(x.shape, x.dtype) for leaf, x in params.items()})
    assert described(shapes) == described(there)


def test_a_checkpoint_is_renamed_unread_and_stacked_layers_are_in_order(tmp_path):
    jm.save_checkpoint(tmp_path / "a", MODELS["gemma3"])
    with jm.open_checkpoint(tmp_path / "a") as checkpoint:
        found = jm.naming("gemma3", stacked=True)(checkpoint.params)
        assert checkpoint.bytes_read == 0
        assert set(found["model"]["layers"]["mlp"]) == {"gate_proj", "up_proj", "down_proj"}
        for layer in range(2):
            np.testing.assert_array_equal(
                found["model"]["layers"]["mlp"]["up_proj"]["kernel"][layer],
                MODELS["gemma3"][f"model.layers.{layer}.mlp.up_proj.weight"].T,
            )
    many = {
        f"model.layers.{layer}.mlp.up_proj.weight": np.full((1, 1), layer) for layer in (10, 2, 0, *range(3, 10), 1)
    }
    stack = jm.naming("llama", stacked=True)(many)["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert stack.ravel().tolist() == list(range(11))
    layers = jm.naming("llama")(many)["model"]["layers"]
    assert set(layers) == set(range(11))  # as nnx.to_pure_dict has them


def test_traced():
    params = {"lm_head.weight": jnp.arange(6.0).reshape(3, 2)}
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jm.naming("llama")(p)["lm_head"]["kernel"][0])))(params)
    np.testing.assert_array_equal(gradient["lm_head.weight"], [[1, 0]] * 3)


def test_tied_embeddings_stay_one_leaf(tmp_path):
    table = np.ones((3, 2), np.float32)
    tied = {"lm_head.weight": table, "model.embed_tokens.weight": table}
    naming = jm.naming("gemma")
    assert jm.named_leaves(naming(tied)).keys() == {"model/embed_tokens/embedding"}
    assert naming.inverse()(naming(tied)).keys() == {"model.embed_tokens.weight"}
    jm.save_checkpoint(tmp_path / "a", tied)
    assert naming(jm.open_checkpoint(tmp_path / "a").params).keys() == {"model"}
    untied = {"lm_head.weight": table, "model.embed_tokens.weight": table.copy()}
    assert naming(untied).keys() == {"model", "lm_head"}
    shape = jax.ShapeDtypeStruct((3, 2), np.float32)  # one description of two tensors
    assert naming(dict.fromkeys(untied, shape)).keys() == {"model", "lm_head"}
    norm = np.ones(2)  # under names with the same axes, one object
    layers = naming({f"model.layers.{i}.input_layernorm.weight": norm for i in range(2)})["model"]["layers"]
    assert layers[0]["input_layernorm"]["weight"] is layers[1]["input_layernorm"]["weight"]


def test_each_family_fits_its_models_and_says_which_fits_others():
    for name, params in MODELS.items():
        assert jm.naming_for(CONFIGS[name]) == jm.naming(FAMILY[name])
        fits = {family for family in FAMILIES if None not in jm.naming(family).matches(params)}
        assert FAMILY[name] in fits
        for family in set(FAMILIES) - fits:
            with pytest.raises(jm.RecipeError, match=rf"jm.naming\('{family}'\) has no rule for '.*has one for each"):
                jm.naming(family)(params)
    with pytest.raises(jm.RecipeError, match=r"_feedforward.* and 1 more, of 24 .*; jm.naming\('gemma2'\) has"):
        jm.naming("qwen2")(MODELS["gemma2"])
    with pytest.raises(jm.RecipeError, match=r"naming\('llama'\)\.inverse\(\) has one for each"):
        jm.naming("llama")(jm.naming("llama")(MODELS["llama"]))
    with pytest.raises(jm.RecipeError, match=r"'score.weight', of .*nearest is jm.naming\('llama'\) with rules for 21"):
        jm.naming("llama")(MODELS["llama"] | {"score.weight": np.ones((2, 2))})


def test_rules_are_shown_before_they_run():
    naming = jm.naming("llama")
    buffer = "layers.3.self_attn.rotary_emb.inv_freq"
    matches = naming.matches({"lm_head.weight": 0, "score.weight": 0, buffer: 0})
    assert list(matches) == [*naming.rules, None]
    assert [names for names in matches.values() if names] == [
        {"lm_head.weight": "lm_head.kernel"},
        {buffer: None},
        {"score.weight": None},
    ]
    text = repr(naming)
    assert text.startswith("jm.naming('llama')\n") and text.count("\n") == len(naming.rules)
    assert "(lm_head)\\.weight" in text and "axes (1, 0)" in text and "left out" in text
    assert repr(jm.naming("vit", stacked=True).inverse()).startswith("jm.naming('vit', stacked=True).inverse()\n")


def test_rules_of_ones_own():
    rules = (
        (r"(enc|dec)2\.(\d+)\.conv([ab]|[(])\.weight", r"\3.conv.\1.at\2", (2, 3, 1, 0)),
        (r"steps", None),
        (r"plain\.w", "other.w"),
    )
    naming = jm.Naming(rules)
    params = {"enc2.7.conva.weight": np.zeros((2, 3, 4, 5)), "plain.w": np.zeros(1), "steps": np.zeros(())}
    found = naming(params)
    assert described(found).keys() == {"a/conv/enc/at7", "other/w"} and found["a"]["conv"]["enc"]["at7"].shape == (
        4,
        5,
        3,
        2,
    )
    assert described(naming.inverse()(found)) == {n: s for n, s in described(params).items() if n != "steps"}
    first = jm.Naming((("plain.w", "mine"), *rules))  # the first match wins
    assert set(first(params)) == {"a", "mine"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ((r"a\.\d+", "b"), "plain text and groups"),
        ((r"(a|(b))\.c", r"\1"), "plain text and groups"),
        ((r"(?:a|b)", "c"), "plain text and groups"),
        ((r"(a)?b", r"\1"), "plain text and groups"),
        ((r"(a)(b)", r"\1\1"), "each of its 2 groups once"),
        ((r"(a)(b)", r"\1"), "each of its 2 groups once"),
    ],
)
def test_rules_that_cannot_be_inverted(rule, message):
    with pytest.raises(jm.RecipeError, match=message):
        jm.Naming((rule,)).inverse()


def test_what_cannot_be_renamed():
    two = np.zeros((2, 2))
    with pytest.raises(jm.RecipeError, match="no regular expression"):
        jm.Naming((("(", "a"),))
    with pytest.raises(jm.RecipeError, match="and 'ab c' is not one"):
        jm.Naming(("ab c",))
    with pytest.raises(jm.RecipeError, match="no permutation"):
        jm.Naming((("a", "b", (0, 0)),))
    with pytest.raises(jm.RecipeError, match="cannot be applied to 'a'"):
        jm.Naming((("a", r"\1"),))({"a": two})
    with pytest.raises(jm.StructureError, match="'a' and 'b' both become 'c'"):
        jm.Naming((("[ab]", "c"),))({"a": two, "b": two.copy()})
    with pytest.raises(jm.StructureError, match=r"two tensors are both named 'a\.b'"):
        jm.Naming(((".*", "c"),))({"a/b": two, "a.b": two})
    for names in (("x", "x.y"), ("x.y", "x")):
        with pytest.raises(jm.StructureError, match="'x'|'x.y'"):
            jm.Naming((("a", names[0]), ("b", names[1])))({"a": two, "b": two})
    with pytest.raises(jm.ShapeError, match=r"'lm_head.weight': found shape \(2,\), expected 2 axes"):
        jm.naming("llama")({"lm_head.weight": two[0]})
    with pytest.raises(jm.RecipeError, match="'gemma4', perhaps 'gemma'"):
        jm.naming("gemma4")


def test_layers_that_cannot_be_stacked_or_split():
    naming = jm.naming("llama", stacked=True)
    up, norm = "model.layers.{}.mlp.up_proj.weight", "model.layers.{}.input_layernorm.weight"
    two, three = np.zeros((2, 2)), np.zeros((3, 2))
    with pytest.raises(jm.StructureError, match=r"up_proj.kernel' cannot be stacked: it is in layers \[0, 2\]"):
        naming({up.format(0): two, up.format(2): two})
    with pytest.raises(jm.StructureError, match=r"norm.weight' cannot be stacked: it is in layers \[1\] of 0 to 1"):
        naming({up.format(0): two, up.format(1): two, norm.format(1): two[0]})
    with pytest.raises(jm.ShapeError, match=r"up_proj.kernel', layer 1: found shape \(2, 3\), expected \(2, 2\)"):
        naming({up.format(0): two, up.format(1): three})
    with pytest.raises(jm.DTypeError, match="layer 1: found dtype float32, expected float64"):
        naming({up.format(0): two, up.format(1): two.astype(np.float32)})
    layers = {"mlp": {"up_proj": {"kernel": np.zeros((2, 1, 1))}}, "input_layernorm": {"weight": np.zeros((3, 1))}}
    with pytest.raises(jm.ShapeError, match="expected . layers along axis 0"):
        naming.inverse()({"layers": layers})


def test_naming_by_configuration(tmp_path):
    folder = tmp_path / "a"
    jm.save_checkpoint(folder, MODELS["vit"])
    with pytest.raises(jm.RecipeError, match="no config.json that can be read"):
        jm.naming_for(folder)
    (folder / "config.json").write_text(json.dumps(CONFIGS["vit"]))
    assert jm.naming_for(folder) == jm.naming_for(jm.open_checkpoint(folder)) == jm.naming("vit")
    assert jm.naming_for(str(folder), stacked=True) == jm.naming("vit", stacked=True)
    with pytest.raises(jm.RecipeError, match="model type 'bert', only for llama"):
        jm.naming_for({"model_type": "bert"})
