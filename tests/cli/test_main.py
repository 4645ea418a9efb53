"""The command line: what each command prints, what it writes, and how it fails."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "method: ties\nparameters: {density: 0.5}\nbase: base\nexperts: {maths: a, code: b}\n"


@pytest.fixture
def folder(tmp_path, rng, monkeypatch) -> Path:
    """The current folder, with checkpoints base, a and b and a recipe that merges them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shapes = {"embed": (8, 4), **{f"layers.{i}.w": (4, 4) for i in (0, 2, 10)}}
    for name in ("base", "a", "b"):
        jm.save_checkpoint(name, {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()})
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return tmp_path


def fails(arguments: list[str], capsys) -> str:
    """The one line that a failing command prints to stderr."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    printed = capsys.readouterr()
    assert exit.value.code == 1 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["merge", "--help"], ["diff", "--help"], ["catalog", "add", "--help"]]
)
def test_help_answers_at_once_because_it_loads_nothing(arguments):
    script = f"from jaxmerge.__main__ import main\ntry:\n    main({arguments})\nexcept SystemExit:\n    pass"
    text, loaded = run_and_list_packages(script)
    assert "usage: jaxmerge" in text
    assert loaded - run_and_list_packages("")[1] == {"jaxmerge"}


def run_and_list_packages(script: str) -> tuple[str, set[str]]:
    """What a fresh interpreter prints, and the packages outside the standard library that it has loaded in the end."""
    command = [sys.executable, "-c", f"{script}\nimport sys\nprint('loaded', *sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    text, _, modules = done.stdout.rpartition("loaded ")
    return text, {name.split(".")[0] for name in modules.split()} - sys.stdlib_module_names


def test_merge_writes_what_the_recipe_says(folder, capsys):
    main(["merge", "recipe.yml", "--out", "out", "--memory-budget", "64MiB"])
    assert "4 merged, 0 copied" in capsys.readouterr().out
    params = {name: jm.open_checkpoint(name).load() for name in ("base", "a", "b", "out")}
    expected = jm.merge(jm.ties(0.5), {"maths": params["a"], "code": params["b"]}, base=params["base"])
    for name, value in expected.items():
        np.testing.assert_array_max_ulp(np.asarray(params["out"][name]), np.asarray(value), 1)


def test_merge_needs_overwrite_to_replace(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "precious").write_text("keep me")
    assert "out exists" in fails(["merge", "recipe.yml", "--out", "out"], capsys)
    assert (folder / "out" / "precious").read_text() == "keep me"
    main(["merge", "recipe.yml", "--out", "out", "--overwrite"])
    assert (folder / "out" / "model.safetensors").exists() and not (folder / "out" / "precious").exists()


def test_seed_on_the_command_line_replaces_the_recipes(folder):
    (folder / "recipe.yml").write_text("method: dare\nbase: base\nexperts: [a]\nseed: 1\n")
    for out, seed in (("one", []), ("same", ["--seed", "1"]), ("two", ["--seed", "2"])):
        main(["merge", "recipe.yml", "--out", out, *seed])
    one, same, two = ((folder / out / "model.safetensors").read_bytes() for out in ("one", "same", "two"))
    assert one == same != two


def test_dry_run_tells_and_writes_nothing(folder, capsys):
    main(["merge", "recipe.yml", "--out", "out", "--dry-run"])
    printed = capsys.readouterr().out
    assert "trim(density=0.5)" in printed and "maths: a" in printed and "to write: 320 B" in printed
    assert not (folder / "out").exists()


def test_catalog_then_plan_then_merge_within_a_budget(folder, capsys):
    main(["catalog", "add", "my.catalog", "base", "a", "b", "--block", "64"])
    assert [line.split()[1:4:2] for line in capsys.readouterr().out.splitlines() if " B " in line] == [
        ["the", "│"],
        ["a", "320"],
        ["b", "320"],
    ]
    io = ["--io-budget", "50%", "--catalog", "my.catalog"]
    main(["plan", "recipe.yml", *io, "--save", "plan.json"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "320 B, of 640 B in all experts" in printed and "value kept" in printed and "no bound is known" in printed
    main(["plan", "recipe.yml", *io, "--explain", "maths", "embed", "1"])
    assert re.match(r"block 1 of embed from maths: (read|left out); it is number \d of 5", capsys.readouterr().out)
    main(["merge", "recipe.yml", "--out", "out", *io])
    printed = capsys.readouterr().out
    assert re.search(r"read from maths +│ 128 B \(128 B planned\)", printed)
    assert json.loads((folder / "plan.json").read_text())["digest"][:16] in printed
    main(["merge", "recipe.yml", "--out", "planned", "--plan", "plan.json", "--catalog", "my.catalog"])
    assert (folder / "planned/model.safetensors").read_bytes() == (folder / "out/model.safetensors").read_bytes()
    main(["merge", "recipe.yml", "--out", "none", "--io-budget", "0", "--policy", "uniform_hash"])
    for name, value in jm.open_checkpoint("none").load().items():
        np.testing.assert_array_equal(value, jm.open_checkpoint("base").load()[name])


def test_plan_of_a_sum_tells_the_bound(folder, capsys):
    (folder / "sum.yml").write_text("method: task_arithmetic\nbase: base\nexperts: [a, b]\n")
    main(["plan", "sum.yml", "--io-budget", "100%"])
    assert re.search(r"error, at most +│ 0, 0.00% of the merged task vector", capsys.readouterr().out)


def test_catalog_lists_verifies_and_forgets(folder, capsys):
    main(["catalog", "add", "my.catalog", "base", "a", "b"])
    main(["catalog", "verify", "my.catalog"])
    assert "3 models are as they were, 0 are not" in capsys.readouterr().out
    shutil.rmtree(folder / "a")
    (folder / "b" / "model.safetensors").touch()
    main(["catalog", "list", "my.catalog"])
    lines = [line for line in capsys.readouterr().out.splitlines() if str(folder) in line]
    assert [line.split("│")[2].strip() for line in lines] == ["missing", "changed", "fresh"]
    with pytest.raises(SystemExit) as exit:
        main(["catalog", "verify", "my.catalog"])
    assert exit.value.code == 1 and f"{folder / 'a'}: missing" in capsys.readouterr().out
    main(["catalog", "gc", "my.catalog"])
    assert capsys.readouterr().out == "2 models forgotten\n"
    main(["catalog", "list", "my.catalog", "--json"])
    assert [entry["path"] for entry in json.loads(capsys.readouterr().out)] == [str(folder / "base")]


def test_inspect_lists_tensors_in_natural_order(folder, capsys):
    main(["inspect", "base"])
    lines = capsys.readouterr().out.splitlines()
    assert "4 tensors, 80 parameters, 320 B" in lines[0]
    names = [line.split()[1] for line in lines if "float32[" in line]
    assert names == ["embed", "layers.0.w", "layers.2.w", "layers.10.w"]
    main(["inspect", "base", "--json"])
    found = json.loads(capsys.readouterr().out)
    expected = {"name": "layers.2.w", "dtype": "float32", "shape": [4, 4], "bytes": 64, "kind": "kernel", "layer": 2}
    assert found["tensors"][2] == expected | {"tied_to": None}
    assert (found["format"], found["bytes"], found["parameters"]) == ("safetensors", 320, 80)


def test_inspect_counts_tied_tensors_once(folder, capsys):
    shared = np.ones((4, 2), np.float32)
    jm.save_checkpoint("tied", {"embed": shared, "head": shared})
    main(["inspect", "tied", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["bytes"], found["parameters"]) == (32, 8)
    assert [tensor["tied_to"] for tensor in found["tensors"]] == [None, "embed"]
    main(["inspect", "tied"])
    assert "tied to embed" in capsys.readouterr().out


def test_diff_prints_and_draws(folder, capsys):
    main(["diff", "base", "a", "b", "--plot", "cosines.png"])
    printed = capsys.readouterr().out
    rows = [line.split()[1] for line in printed.splitlines() if line.startswith("│ ")]
    assert rows == ["embed", "layers.0", "layers.2", "layers.10", "whole", "a", "b"]
    assert (folder / "cosines.png").read_bytes().startswith(b"\x89PNG")
    main(["diff", "base", "a", "b", "--json"])
    found = json.loads(capsys.readouterr().out)
    models = [jm.open_checkpoint(name).load() for name in ("base", "a", "b")]
    base, a, b = (np.concatenate([np.ravel(x) for x in model.values()]) for model in models)
    cosine = (a - base) @ (b - base) / np.linalg.norm(a - base) / np.linalg.norm(b - base)
    np.testing.assert_allclose(found["whole"]["cosines"], [[1, cosine], [cosine, 1]], 1e-5)
    assert [layer["name"] for layer in found["layers"]] == ["embed", "layers.0", "layers.2", "layers.10"]


def test_diff_of_equal_models_is_json_without_nan(folder, capsys):
    main(["diff", "base", "base", "--json"])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["whole"]["cosines"] == [[None]] and found["whole"]["sparsity"] == [1.0]


def test_methods_lists_and_explains(folder, capsys):
    main(["methods"])
    printed = capsys.readouterr().out
    for name in jm.list_methods():
        assert f"│ {name} " in printed
    assert "arXiv 2306.01708" in printed and "density=0.2" in printed
    main(["methods", "ties"])
    printed = capsys.readouterr().out
    assert printed.startswith("ties(density=0.2, ") and "share of entries kept" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "nothing.yml", "--out", "out"], "nothing.yml: the recipe cannot be read"),
        (["merge", "wrong.yml", "--out", "out"], "wrong.yml:2: ties has no parameter 'densty', did you mean"),
        (["merge", "lost.yml", "--out", "out"], "there is no checkpoint at"),
        (["merge", "recipe.yml", "--out", "base"], "base holds, or is part of, the input"),
        (["merge", "recipe.yml", "--out", "out", "--memory-budget", "much"], "memory_budget is 'much'"),
        (["merge", "recipe.yml", "--out", "out", "--io-budget", "much"], "io_budget is 'much'"),
        (["plan", "no-base.yml", "--io-budget", "10%"], "an I/O budget needs a base"),
        (["plan", "slices.yml", "--io-budget", "10%"], "cannot be merged within an I/O budget"),
        (["plan", "recipe.yml", "--explain", "maths", "embed", "x"], "--explain needs the number of a block"),
        (["plan", "recipe.yml", "--explain", "maths", "nothing", "0"], "has no tensor 'nothing'"),
        (["plan", "recipe.yml", "--save", "no/such/folder/plan.json"], "the plan cannot be written"),
        (["catalog", "list", "nothing"], "there is no catalog nothing"),
        (["catalog", "list", "recipe.yml"], "recipe.yml is no catalog"),
        (["inspect", "nothing"], "there is no checkpoint at"),
        (["inspect", "recipe.yml"], "recipe.yml"),
        (["diff", "base", "nothing"], "there is no checkpoint at"),
        (["diff", "base", "a", "a"], "the model 'a' is there twice"),
        (["diff", "base", "a", "--plot", "x.png"], "--plot draws cosines between experts: found 1 expert"),
        (["diff", "base", "a", "b", "--plot", "no/such/folder/x.png"], "the picture cannot be written"),
        (["diff", "base", "a", "b", "--plot", "x.sculpture"], "the picture cannot be written"),
        (["methods", "teis"], "unknown method 'teis', did you mean 'ties'?"),
    ],
)
def test_errors_are_one_line_and_leave_everything_as_it_was(folder, capsys, arguments, message):
    (folder / "wrong.yml").write_text("method: ties\nparameters: {densty: 0.5}\nbase: base\nexperts: [a]\n")
    (folder / "lost.yml").write_text("method: linear\nexperts: [a, c]\n")
    (folder / "no-base.yml").write_text("method: linear\nexperts: [a, b]\n")
    slice = "sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]"
    (folder / "slices.yml").write_text(f"merge_method: linear\nslices: [{{{slice}}}]\nparameters: {{weight: 1}}\n")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert message in fails(arguments, capsys)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_traceback_is_there_for_who_asks(folder):
    with pytest.raises(jm.CheckpointError):
        main(["inspect", "nothing", "--traceback"])


@pytest.mark.parametrize(
    "arguments", [[], ["mrege"], ["merge", "r"], ["diff", "base"], ["merge", "r", "--out", "o", "--seed", "x"]]
)
def test_wrong_usage_is_exit_code_two(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and "usage: jaxmerge" in capsys.readouterr().err


def test_reader_that_stops_early_is_no_error(folder):
    command = f"{sys.executable} -m jaxmerge methods | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
