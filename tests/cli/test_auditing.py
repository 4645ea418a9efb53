"""`jaxmerge verify`, `explain` and `replay`: what they print, and when they fail."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.cli.main import main
from jaxmerge.streaming.fingerprint import digest
from jaxmerge.streaming.manifest import MANIFEST, load_manifest

RECIPE = "# from my notes\nmethod: {task_arithmetic: 0.3}\nbase: base\nexperts: {maths: a, code: b}\n"


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with models and a merge of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("base", "a", "b"):
        params: dict[str, Any] = {f"layers.{i}.w": rng.normal(size=(16, 8)).astype(np.float32) for i in (2, 10)}
        jm.save_checkpoint(name, params | {"ids": np.arange(3)})
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints, on either stream."""
    if code:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == code
    else:
        main(arguments)
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_merge_verify_explain_replay(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "merge", "recipe.yml", "--out", "out", "--seed", "3")
    assert load_manifest("out").run.recipe == RECIPE
    assert "out is what was written: 3 tensors" in run(capsys, "verify", "out")

    told = run(capsys, "explain", "out")
    for part in ("scale(factor=0.3)", "seed or key", "a, 1.023 KiB read", "base, ", load_manifest("out").id):
        assert part in told, told
    told = run(capsys, "explain", "out", "--tensor", "layers.2.w")
    assert "layers.2.w: float32[16, 8]" in told and "all of it was read from each expert" in told
    assert "did you mean 'layers.2.w'?" in run(capsys, "explain", "out", "--tensor", "layer.2.w", code=1)

    assert f"all bytes are those of out/{MANIFEST}" in run(capsys, "replay", f"out/{MANIFEST}", "--out", "again")
    assert load_manifest("again").id == load_manifest("out").id
    assert load_manifest("again").run.recipe == RECIPE
    assert "exists already" in run(capsys, "replay", "out", "--out", "again", code=1)

    weights = folder / "out/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    told = run(capsys, "verify", "out", code=1)
    assert "other bytes than were written, in block 0 of 1" in told and "1 tensors differ" in told
    assert "there is no manifest" in run(capsys, "verify", "base", code=1)


def test_explain_a_merge_within_a_budget(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "catalog", "add", "my.catalog", "base", "a", "b", "--block", "64")
    run(capsys, "merge", "recipe.yml", "--out", "out", "--io-budget", "25%", "--catalog", "my.catalog")
    plan = load_manifest("out").io_plan
    assert plan is not None and load_manifest("out").run.recipe == RECIPE

    told = run(capsys, "explain", "out")
    assert "error, at most" in told and "planned from maths" in told
    read = int(plan.chosen["code"]["layers.10.w"].sum())
    assert f"{read} of 8 blocks ({read / 8:.1%})" in told

    told = run(capsys, "explain", "out", "--tensor", "layers.10.w")
    left = int(np.flatnonzero(~plan.chosen["maths"]["layers.10.w"])[0])
    assert plan.explain("maths", "layers.10.w", left) in told and "left out; it is number" in told
    assert "it is the base's" in run(capsys, "explain", "out", "--tensor", "ids")

    run(capsys, "replay", "out", "--out", "again", "--catalog", "my.catalog")
    assert load_manifest("again").id == load_manifest("out").id


def test_replay_tells_when_bytes_differ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "merge", "recipe.yml", "--out", "out")
    one, other = (f"out{x}/{MANIFEST}" for x in ("", "2"))
    recipe = (folder / "recipe.yml").read_text()
    (folder / "recipe.yml").write_text(recipe.replace("0.3", "0.4"))
    run(capsys, "merge", "recipe.yml", "--out", "out2")
    # A manifest with the method of one merge and the output of another stands for libraries that compute differently.
    told, changed = (json.loads(Path(x).read_text()) for x in (one, other))
    told["manifest"]["output"] = changed["manifest"]["output"]
    Path("mixed.json").write_text(json.dumps({**told, "id": digest(told["manifest"])}))
    printed = run(capsys, "replay", "mixed.json", "--out", "again", code=1)
    assert "2 tensors have other bytes than in mixed.json: layers.2.w, layers.10.w" in printed
