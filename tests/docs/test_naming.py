"""The page on names: its code runs, and the merged model is the same before and after it was renamed."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxmerge as jm
from tests.docs.code_blocks import run_python_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "naming.md"


def test_blocks_run_and_do_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_python_blocks(PAGE)
    saved = jm.open_checkpoint("merged").load()
    assert saved.keys() == names["merged"].keys()
    for name, leaf in names["merged"].items():
        np.testing.assert_array_equal(saved[name], leaf[...], err_msg=name)
    assert names["logits"].shape == (1, 6, 32) and bool(jnp.isfinite(names["logits"]).all())
    assert names["tree"]["blocks"][0]["fc1"]["kernel"].shape == (2, 3)
