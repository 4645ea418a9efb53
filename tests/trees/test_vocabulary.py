"""Vocabularies: reading them, hostile ones too, putting them together, and tables whose rows follow them."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.trees import vocabulary as module
from jaxmerge.trees.lazy import ArrayTensor, LazyTensor
from jaxmerge.trees.vocabulary import (
    TokenRule,
    Vocabulary,
    align_vocabularies,
    merge_vocabularies,
    read_vocabulary,
    tokenizer_with,
    vocabulary_of,
)

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tokenizer(vocab, added=()) -> dict:
    return {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": [{"content": t, "id": i} for t, i in added]}


def vocabulary(*tokens: str) -> Vocabulary:
    return Vocabulary({token: i for i, token in enumerate(tokens)})


def test_reading(tmp_path):
    text = json.dumps(tokenizer({"a": 0, "ü": 1}, [("<s>", 2), ("a", 0)]))
    (tmp_path / "tokenizer.json").write_text(text)
    for place in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path), text.encode()):
        found = read_vocabulary(place)
        assert found.ids == {"a": 0, "ü": 1, "<s>": 2} and set(found.added) == {"<s>", "a"} and found.size == 3
    assert vocabulary_of({"model": {"vocab": [["x", -1.5], ["y", -2]]}, "added_tokens": None}).ids == {"x": 0, "y": 1}


HOSTILE = {
    "no JSON": (b"\xff\xfe{", "no JSON"),
    "half": (b'{"model": ', "no JSON"),
    "deep": (b"[" * 100_000, "no JSON"),
    "a list": (b"[]", "no JSON object but a list"),
    "no model": (b"{}", "model.vocab must map"),
    "text for a model": (b'{"model": "x"}', "model.vocab must map"),
    "no pieces": (b'{"model": {"vocab": [1, 2]}}', "list of [token, score]"),
    "a key twice": (b'{"model": {"vocab": {"a": 0, "a": 1}}}', "has the name 'a' twice"),
    "an id twice": (b'{"model": {"vocab": {"a": 0, "b": 0}}}', "the id 0 has the tokens 'a' and 'b'"),
    "a piece twice": (b'{"model": {"vocab": [["a", 1], ["a", 2]]}}', "the token 'a' has the ids 0 and 1"),
    "two ids": (json.dumps(tokenizer({"a": 0}, [("a", 1)])).encode(), "the token 'a' has the ids 0 and 1"),
    "a huge id": (b'{"model": {"vocab": {"a": 1000000000000}}}', "has the id 1000000000000, which cannot be"),
    "digits": (b'{"model": {"vocab": {"a": ' + b"9" * 5000 + b"}}}", "no JSON"),
    "a negative id": (b'{"model": {"vocab": {"a": -1}}}', "has the id -1"),
    "a true id": (b'{"model": {"vocab": {"a": true}}}', "has the id True"),
    "text for an id": (b'{"model": {"vocab": {"a": "0"}}}', "has the id '0'"),
    "odd added tokens": (b'{"model": {"vocab": {}}, "added_tokens": [1]}', "added_tokens must be a list"),
}


@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_tokenizers(text, message):
    with pytest.raises(jm.CheckpointError) as error:
        read_vocabulary(text)
    assert message in str(error.value)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(jm.CheckpointError, match="No such file"):
        read_vocabulary(tmp_path)
    with pytest.raises(jm.CheckpointError, match="cannot be read"):
        read_vocabulary("a\0b")
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10)
    (tmp_path / "tokenizer.json").write_text("{" + " " * 20 + "}")
    with pytest.raises(jm.CheckpointError, match="longer than 10 bytes"):
        read_vocabulary(tmp_path)


def test_union_keeps_the_base_and_adds_the_rest_in_order():
    entry = {"content": "<im>", "id": 3, "special": True}
    x = Vocabulary({"b": 0, "e": 1, "d": 2, "<im>": 3}, {"<im>": entry})
    found = merge_vocabularies({"x": x, "base": vocabulary("a", "b")}, base="base", extra=["new", "a"])
    assert found.ids == {"a": 0, "b": 1, "e": 2, "d": 3, "<im>": 4, "new": 5}
    assert set(found.added) == {"e", "d", "<im>", "new"}
    assert found.added["<im>"] == {"content": "<im>", "id": 4, "special": True}
    assert merge_vocabularies({"x": x, "base": vocabulary("a", "b")}).ids == {**x.ids, "a": 4}
    written = tokenizer_with(tokenizer({"a": 0, "b": 1}), found)
    assert vocabulary_of(written).ids == found.ids


def test_vocabulary_of_one_model():
    both = {"x": vocabulary("p", "q"), "base": vocabulary("a")}
    assert merge_vocabularies(both, "x").ids == {"p": 0, "q": 1}
    assert merge_vocabularies(both, "base", base="base").ids == {"a": 0}
    with pytest.raises(jm.RecipeError, match="there is no base"):
        merge_vocabularies(both, "base")
    with pytest.raises(jm.RecipeError, match="no vocabulary of a model 'z'; there are x, base"):
        merge_vocabularies(both, "z")
    with pytest.raises(jm.RecipeError, match="no vocabulary"):
        merge_vocabularies({})


def test_added_tokens_beyond_the_table_are_left_out():
    known = vocabulary_of(tokenizer({"a": 0, "b": 1, "<pad>": 2}, [("<pad>", 2)]))
    assert known.within(2).ids == {"a": 0, "b": 1} and known.within(3) == known
    with pytest.raises(jm.ShapeError, match="the token 'b' has id 1, and the embedding table has 1 rows"):
        known.within(1)
    left = tokenizer_with(tokenizer({"a": 0, "b": 1, "<pad>": 2}, [("<pad>", 2)]), known.within(2))
    assert vocabulary_of(left).ids == {"a": 0, "b": 1}


# Rows

VOCABULARIES = {"base": vocabulary("a", "b", "c"), "x": vocabulary("c", "e", "b", "f"), "y": vocabulary("e", "a", "g")}


def tables(dtype: Any = np.float32) -> dict[str, dict[str, np.ndarray]]:
    """Rows of the base are 1, 2, 3, those of x 11, 12, …, those of y 21, 22, …"""
    starts = {"base": 1, "x": 11, "y": 21}
    made = {}
    for model, start in starts.items():
        rows = start + np.arange(VOCABULARIES[model].size + 1, dtype=np.float32)  # a padding row more than tokens
        made[model] = {EMBED: np.stack([rows, -rows], 1).astype(dtype), "w": np.ones(2)}
    return made


def rows_of(params, target: Vocabulary, name: str = EMBED) -> dict[str, float]:
    table = np.asarray(params[name])
    return {token: float(table[i, 0]) for token, i in target.ids.items()}


@pytest.mark.parametrize(
    ("base", "tokens", "expected"),
    [
        ("base", {}, {"base": (1, 2, 3, 16.5, 14, 23), "x": (1, 13, 11, 12, 14, 23), "y": (22, 2, 3, 21, 14, 23)}),
        (None, {}, {"base": (1, 2, 3, 16.5, 14, 23), "x": (11.5, 13, 11, 12, 14, 23), "y": (22, 7.5, 7, 21, 14, 23)}),
        (
            "base",
            {
                "a": TokenRule(model="y"),
                "e": TokenRule(zero=True),
                "f": TokenRule(model="x", token="c"),
                "g": TokenRule(),
            },
            {"base": (1, 2, 3, 0, 11, 23), "x": (22, 13, 11, 12, 14, 23), "y": (22, 2, 3, 21, 11, 23)},
        ),
        (
            "base",
            {
                "a": TokenRule(model="x", token=3, force=True),
                "b": TokenRule(zero=True, force=True),
                "c": TokenRule(force=True),
            },
            {"base": (14, 0, 3, 16.5, 14, 23), "x": (14, 0, 3, 12, 14, 23), "y": (14, 0, 3, 21, 14, 23)},
        ),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_where_rows_come_from(base, tokens, expected, lazy):
    models = tables()
    if lazy:
        models = {model: {name: ArrayTensor(x) for name, x in tree.items()} for model, tree in models.items()}
    target = merge_vocabularies(VOCABULARIES, base="base")
    aligned = align_vocabularies(models, VOCABULARIES, target, base=base, tokens=tokens)
    for model, values in expected.items():
        assert rows_of(aligned[model], target) == dict(zip("abcefg", values, strict=True)), model
        np.testing.assert_array_equal(np.asarray(aligned[model][EMBED])[:, 1], -np.asarray(aligned[model][EMBED])[:, 0])
        assert isinstance(aligned[model][EMBED], LazyTensor) == lazy
        assert aligned[model]["w"] is models[model]["w"]


def test_padding_and_gaps_are_the_mean_and_a_token_of_nobody_is_zero():
    target = Vocabulary({"a": 0, "c": 2, "<new>": 3})  # no token has id 1
    models = {name: jax.tree.map(jnp.asarray, tree) for name, tree in tables(np.float32).items()}
    found = align_vocabularies(models, VOCABULARIES, target, base="base", pad_to_multiple_of=4)["base"][EMBED]
    assert isinstance(found, jax.Array)
    np.testing.assert_allclose(found[:, 0], [1, 4 / 3, 3, 0], rtol=1e-6)
    found = align_vocabularies(models, VOCABULARIES, target, pad_to_multiple_of=5)["base"][EMBED]
    np.testing.assert_allclose(found[:, 0], [1, 4 / 3, 3, 0, 4 / 3], rtol=1e-6)


@settings(max_examples=25)
@given(st.data())
def test_any_run_of_lazy_rows_is_that_run(data):
    """Gathered rows, however they are cut, are those that each token's own table has."""
    letters = st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1, max_size=8)
    vocabularies = {name: vocabulary(*data.draw(letters)) for name in ("m", "n", "o")}
    values = {
        (name, t): 10.0 * i + "abcdefgh".index(t) for i, (name, v) in enumerate(vocabularies.items()) for t in v.ids
    }
    models = {
        name: {HEAD: ArrayTensor(np.array([[values[name, t]] * 3 for t in v.ids], np.float32))}
        for name, v in vocabularies.items()
    }
    target = merge_vocabularies(vocabularies)
    multiple = data.draw(st.sampled_from([1, 5]))
    aligned = align_vocabularies(models, vocabularies, target, base="n", pad_to_multiple_of=multiple)
    for name in vocabularies:
        tensor = aligned[name][HEAD]
        whole = np.zeros(tensor.shape, np.float32)
        for token, i in target.ids.items():
            of = {m: values[m, token] for m in vocabularies if token in vocabularies[m].ids}
            whole[i] = of.get(name, of.get("n", np.mean(list(of.values()))))
        whole[target.size :] = whole[: target.size].mean(axis=0, dtype=np.float64)
        np.testing.assert_array_equal(tensor[...], whole)
        start = data.draw(st.integers(0, tensor.size))
        out = np.empty(data.draw(st.integers(0, tensor.size - start)), np.float32)
        tensor.read_flat(start, out)
        np.testing.assert_array_equal(out, whole.reshape(-1)[start : start + out.size])
        np.testing.assert_array_equal(tensor[1:, 1:2], whole[1:, 1:2])


def test_only_the_rows_asked_for_are_read(tmp_path):
    for model, tree in tables().items():
        jm.save_checkpoint(tmp_path / model, {name: x.astype(np.float32) for name, x in tree.items()})
    checkpoints = {model: jm.open_checkpoint(tmp_path / model) for model in VOCABULARIES}
    target = merge_vocabularies(VOCABULARIES, base="base")
    aligned = align_vocabularies({m: c.params for m, c in checkpoints.items()}, VOCABULARIES, target, base="base")
    assert [c.bytes_read for c in checkpoints.values()] == [0, 0, 0]
    assert aligned["x"][EMBED][target.ids["a"], 0] == 1
    assert {m: c.bytes_read for m, c in checkpoints.items()} == {"base": 4, "x": 0, "y": 0}


def test_tied_tables_stay_tied_and_half_precision_stays():
    models = tables(ml_dtypes.bfloat16)
    for tree in models.values():
        tree[HEAD] = tree[EMBED]
    found = align_vocabularies(models, VOCABULARIES, merge_vocabularies(VOCABULARIES))
    for tree in found.values():
        assert tree[HEAD] is tree[EMBED] and tree[EMBED].dtype == ml_dtypes.bfloat16


def test_flax_names_and_a_table_with_the_tokens_last():
    models = {
        name: {"params": {"embed": {"embedding": x[EMBED]}, "lm_head": {"kernel": x[EMBED].T.copy()}}}
        for name, x in tables().items()
    }
    target = merge_vocabularies(VOCABULARIES)
    found = align_vocabularies(models, VOCABULARIES, target)["y"]["params"]
    np.testing.assert_array_equal(found["embed"]["embedding"], found["lm_head"]["kernel"].T)
    named = align_vocabularies(models, VOCABULARIES, target, tables={".*kernel": -1})["y"]["params"]
    assert named["embed"]["embedding"].shape == (4, 2)
    np.testing.assert_array_equal(named["lm_head"]["kernel"], found["lm_head"]["kernel"])


def test_models_with_different_vocabularies_merge():
    models = tables()
    with pytest.raises(jm.ShapeError, match="expert 'x', tensor 'model.embed_tokens.weight'"):
        jm.merge(jm.linear(), models)
    aligned = align_vocabularies(
        models, VOCABULARIES, merge_vocabularies(VOCABULARIES, "base", base="base"), base="base"
    )
    merged = jm.merge(jm.linear(), {m: {EMBED: jnp.asarray(x[EMBED])} for m, x in aligned.items()})
    np.testing.assert_allclose(merged[EMBED][:, 0], [(1 + 1 + 22) / 3, (2 + 13 + 2) / 3, (3 + 11 + 3) / 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": {"zzz": TokenRule(zero=True)}}, "a rule for the token 'zzz', which is not in the vocabulary"),
        ({"tokens": {"a": TokenRule(model="nobody")}}, "names the model 'nobody', which is not there"),
        ({"tokens": {"a": TokenRule(model="x")}}, "takes 'a' of model 'x', which has no such token"),
        ({"tokens": {"a": TokenRule(model="x", token=99)}}, "takes 99 of model 'x', which has no such token"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
        ({"base": "nobody"}, "the vocabulary of model 'nobody' is not given"),
        ({"tables": {"nothing": 0}}, "the rule 'nothing' matches no tensor"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(jm.RecipeError) as error:
        align_vocabularies(tables(), VOCABULARIES, merge_vocabularies(VOCABULARIES), **change)
    assert message in str(error.value)


def test_tables_that_do_not_fit():
    target = merge_vocabularies(VOCABULARIES)
    models = tables()
    models["y"][EMBED] = models["y"][EMBED][:2]
    with pytest.raises(jm.ShapeError, match=r"model 'y', tensor .*: found 2 rows, expected at least 3"):
        align_vocabularies(models, VOCABULARIES, target)
    models["y"][EMBED] = np.ones((4, 5), np.float32)
    with pytest.raises(jm.ShapeError, match=r"found rows of shape \(5,\), expected \(2,\) as in model 'base'"):
        align_vocabularies(models, VOCABULARIES, target)
    with pytest.raises(jm.RecipeError, match="no embedding table is found among 1 tensors"):
        align_vocabularies({"x": {"w": np.ones(2)}}, VOCABULARIES, target)
    with pytest.raises(jm.ShapeError, match="has no axis 2"):
        align_vocabularies(tables(), VOCABULARIES, target, tables={EMBED: 2})
    with pytest.raises(jm.DTypeError, match="found float, expected an array"):
        align_vocabularies({"x": {EMBED: 1.0}}, VOCABULARIES, target)
    with pytest.raises(jm.RecipeError, match="the row is zero, or comes from a model, not both"):
        TokenRule(zero=True, model="x")
    with pytest.raises(jm.RecipeError, match="say of which model"):
        TokenRule(token="a")
