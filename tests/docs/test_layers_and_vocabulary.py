"""The page on layers and vocabularies: its code runs, its recipe too, and they do what the page says."""

import json
from pathlib import Path

import numpy as np

import jaxmerge as jm
from tests.docs.code_blocks import code_blocks, run_python_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "layers-and-vocabulary.md"


def test_blocks_run_and_do_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_python_blocks(PAGE)
    base, chat = names["base"].load(), names["chat"].load()
    layer = "model.layers.{}.mlp.up_proj.weight"
    tall = jm.open_checkpoint("tall").params
    for i, (model, number) in enumerate([(base, 0), (base, 1), (base, 2), (chat, 1), (chat, 2), (chat, 3)]):
        np.testing.assert_array_equal(tall[layer.format(i)][...], model[layer.format(number)])
    assert json.loads(Path("tall", "config.json").read_text())["num_hidden_layers"] == 6
    np.testing.assert_array_equal(names["pruned"][layer.format(2)][...], base[layer.format(3)])

    head = np.asarray(names["merged"]["lm_head.weight"])
    mean = (np.asarray(base["lm_head.weight"])[:2] + np.asarray(chat["lm_head.weight"])[[1, 0]]) / 2
    np.testing.assert_allclose(head[:2], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(head[4], chat["lm_head.weight"][4])
    np.testing.assert_array_equal(names["table"][0], names["own"][1])  # the token b
    combined = np.asarray(names["coefficients"][0]) @ np.asarray(names["own"])[[1, 0, 2, 3]][names["indices"][0]]
    np.testing.assert_allclose(names["table"][4], combined, rtol=1e-4, atol=1e-5)

    (recipe,) = code_blocks(PAGE, "yaml")
    jm.load_recipe(recipe.text).run("merged")
    merged = jm.open_checkpoint("merged").params
    assert len(merged) == 5 + 3 and json.loads(Path("merged", "config.json").read_text())["num_hidden_layers"] == 5
    a, b = (np.asarray(model[layer.format(2)]) for model in (base, chat))
    np.testing.assert_allclose(merged[layer.format(2)][...], a + 0.8 * (b - a), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(merged[layer.format(3)][...], a + 0.5 * (b - a), rtol=1e-5, atol=1e-6)
