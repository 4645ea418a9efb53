"""The README tells the truth: its blocks run, in order, as a reader would run them.

A YAML block is a recipe, saved under the name in its first line, and `jaxmerge` commands are run in a shell. The
folders `base`, `maths`, `code` and `law` hold small checkpoints.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxmerge as jm
from tests.docs.code_blocks import code_blocks, run_python_blocks

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


@pytest.fixture
def checkpoints(tmp_path, monkeypatch, rng) -> None:
    """Makes the working directory one with four checkpoints of a two-layer model."""
    monkeypatch.chdir(tmp_path)
    shapes = {}
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (8, 8)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (16, 8)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (8,)
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    jm.save_checkpoint("base", base)
    for expert in ("maths", "code", "law"):
        tuned = {name: (x + 0.01 * rng.normal(size=x.shape)).astype(np.float32) for name, x in base.items()}
        jm.save_checkpoint(expert, tuned)


@pytest.mark.usefixtures("checkpoints")
def test_python_blocks_run_and_the_three_ways_agree():
    names = run_python_blocks(README)
    in_memory = jm.merge(names["method"], names["experts"], base=names["base"])
    streamed = jm.open_checkpoint("merged").params
    for name, tensor in in_memory.items():
        np.testing.assert_array_max_ulp(np.asarray(streamed[name]), np.asarray(tensor), maxulp=1)
        np.testing.assert_array_max_ulp(np.asarray(names["lazy"][name]), np.asarray(tensor), maxulp=1)


@pytest.mark.usefixtures("checkpoints")
def test_commands_run():
    for block in code_blocks(README, "yaml"):
        name = re.match(r"# (\S+)\n", block.text)
        assert name, f"line {block.line}: a recipe without a name in its first line"
        Path(name[1]).write_text(block.text)
    commands = [block.text for block in code_blocks(README, "sh") if block.text.startswith("jaxmerge")]
    assert commands
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for text in commands:
        subprocess.run(["bash", "-e", "-c", text], check=True, env={**os.environ, "PATH": path})
    for name, tensor in jm.open_checkpoint("merged-by-recipe").params.items():
        assert np.isfinite(np.asarray(tensor)).all(), name


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "".join(block.text for block in code_blocks(README, "sh")), re.MULTILINE)
    assert targets
    assert not [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)]


def test_every_method_page_has_a_row():
    linked = re.findall(r"^\| \[`.+?\]\(docs/methods/([\w-]+)\.md\)", README.read_text(), re.MULTILINE)
    assert set(linked) == {page.stem for page in (ROOT / "docs/methods").glob("*.md")} - {"index", "spectral"}
