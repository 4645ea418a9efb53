"""Several processes that share a merge write what one process writes, and fail together."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.methods.selection import OrderStatisticSearch
from jaxmerge.streaming.manifest import MANIFEST, load_manifest, verify_checkpoint
from jaxmerge.streaming.plan import make_plan
from jaxmerge.trees.lazy import ArrayTensor
from tests.streaming import many_processes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, and what one process makes of them."""
    folder, rng, models = tmp_path_factory.mktemp("processes"), np.random.default_rng(0), {}
    for name in ("base", "a", "b", "nan"):
        tied = rng.normal(size=(300, 700)).astype(ml_dtypes.bfloat16)
        params = {f"layers.{i}.w": rng.normal(size=(600, 1000 + i)).astype(np.float32) for i in range(2)}
        params |= {
            "embed": tied,
            "head": tied,
            "norm": rng.normal(size=7).astype(np.float32),
            "positions": np.arange(9),
        }
        if name == "nan":
            params["layers.1.w"][-1, -1] = np.nan
        models[name] = params
    moved = models["a"]["layers.0.w"].copy()
    moved[300, 0] += 1
    models["moved"] = models["a"] | {"layers.0.w": moved}
    for name, params in models.items():
        jm.save_checkpoint(folder / "models" / name, params, side_files={"config.json": b"{}"})
    (folder / "recipe.yml").write_text(many_processes.RECIPE)
    return folder


@pytest.fixture(scope="module")
def alone(models: Path) -> dict[str, Any]:
    """The reports of one process, whose outputs are in the folder `alone`."""
    (models / "alone").mkdir()
    (models / "alone" / "models").symlink_to(models / "models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models / "alone")
        return {
            name: many_processes.answer(lambda name=name: many_processes.merge(name)) for name in many_processes.CALLS
        }


@contextlib.contextmanager
def started(folder: Path, count: int, victim: int = -1) -> Iterator[list[subprocess.Popen]]:
    """Processes that work in a folder; two of them find each other as under Slurm, others are told."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        # Slurm's jobs have ports from 61440 on.
        job = next(n for n in range(free.getsockname()[1] % 2000, 4096) if free.connect_ex(("localhost", 61440 + n)))
    processes = []
    with contextlib.ExitStack() as closing:
        for index in range(count):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
            given = ["--coordinator", f"localhost:{61440 + job}", "--count", str(count), "--index", str(index)]
            if count == 2 and victim < 0:
                names = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
                environment |= dict(zip(names, map(str, (job, count, index, index, count)), strict=True))
                environment["SLURM_STEP_NODELIST"], given = "localhost", []
            command = [sys.executable, "-W", "ignore", many_processes.__file__ or "", str(index), str(victim), *given]
            log = closing.enter_context((folder / f"log-{index}.txt").open("w"))
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
            processes.append(closing.enter_context(process))
            closing.callback(process.kill)
        yield processes


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {path.name: path.read_bytes()}
    files = (file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_do_what_one_does(models: Path, alone: dict[str, Any], tmp_path: Path, count: int) -> None:
    for name in ("models", "recipe.yml"):
        (tmp_path / name).symlink_to(models / name)
    with started(tmp_path, count) as processes:
        for index, process in enumerate(processes):
            assert process.wait(200) == 0, (tmp_path / f"log-{index}.txt").read_text()[-3000:]
    answers = [json.loads((tmp_path / f"answer-{index}.json").read_text()) for index in range(count)]

    calls = [name for name in many_processes.CALLS if name in answers[0]]
    for name in calls:
        reports, expected = [told[name] for told in answers], alone[name]
        assert all(report == reports[0] for report in reports), reports
        assert reports[0]["processes"] == count
        assert contents(tmp_path / name) == contents(models / "alone" / name), name
        if not name.endswith(".safetensors"):
            assert verify_checkpoint(tmp_path / name) == ()
            assert load_manifest(tmp_path / name).id == load_manifest(models / "alone" / name).id
        assert reports[0]["bytes_written"] == expected["bytes_written"]
        assert reports[0]["reused"] == expected["reused"]
        assert reports[0]["reused_blocks"] == expected["reused_blocks"]
        read, planned = reports[0]["bytes_read"], reports[0]["planned"]
        if planned is not None:
            assert all(read[expert] <= planned[expert] for expert in planned)
        elif name == "ties":  # each process takes the same sample
            extra = {model: n - expected["bytes_read"][model] for model, n in read.items()}
            assert len(set(extra.values())) == 1 and 0 < extra["a"] <= (count - 1) * 4 << 17
        else:
            assert read == expected["bytes_read"], name

    def failed(name: str) -> str:
        """The message that all processes have."""
        errors = [told[name] for told in answers]
        assert all(error == errors[0] for error in errors), errors
        return ": ".join(errors[0])

    assert "NonFiniteError: process" in (message := failed("nan")) and "'c', tensor 'layers.1.w'" in message
    assert [bool(told["command"]) for told in answers] == [True] + [False] * (count - 1)
    assert contents(tmp_path / "command") == contents(tmp_path / "example")
    outputs = {"example", "command", *calls}
    if count == 2:
        outputs |= {"own-0.safetensors", "own-1.safetensors", "catalog", "one-called"}
        assert alone["again"]["reused"] > 0 and alone["blocks"]["reused_blocks"] == 2
        assert "RecipeError: process 1 of" in (message := failed("differs")) and "the method" in message
        assert "CheckpointError: process 1 of" in (message := failed("missing")) and "models/nowhere" in message
        assert "CheckpointError: process 1 of" in (message := failed("elsewhere")) and "all hosts share" in message
        assert "CheckpointError: process 0 of" in (message := failed("unpublished")) and "the disk is full" in message
        assert "RecipeError: process" in (message := failed("url")) and "processes='own'" in message
        assert "one process" in failed("store")
        bugs = [told["bug"] for told in answers]
        assert bugs[1] == "AttributeError" and "process 1 of 2" in bugs[0] and bugs[1] in bugs[0]
        for index in range(count):
            own = contents(tmp_path / f"own-{index}.safetensors").values()
            assert list(own) == list(contents(models / "alone" / "dare.safetensors").values())
            assert answers[index]["own"]["processes"] == 1
        outputs.add("lazily")
        with jm.open_checkpoint(tmp_path / "lazily") as one, jm.open_checkpoint(tmp_path / "ties") as other:
            assert set(one.params) == set(jm.named_leaves(other.params))
            for tensor, leaf in jm.named_leaves(other.params).items():
                np.testing.assert_array_equal(one.params[tensor][...], leaf[...])
        kind, message = answers[0]["one calls"]
        assert kind == "CheckpointError" and "for process 1 of 2" in message and "processes='own'" in message
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(("log-", "answer-"))}
    assert left == outputs | {"models", "recipe.yml"}


def test_shares_are_runs_of_about_equal_work() -> None:
    tensors = {f"{n}": ArrayTensor(np.zeros(size, np.int8)) for n, size in enumerate((1 << 23, 5, 1 << 21, 1 << 22))}
    plan = make_plan(tensors, 1 << 26, cores=2)
    shares = plan.shares(3, list(tensors))
    runs = [[(int(part.name), part.start) for part in (*share.shared, *share.alone)] for share in shares]
    together = [place for run in runs for place in sorted(run)]
    assert together == sorted((int(part.name), part.start) for part in (*plan.shared, *plan.alone))
    sizes = [share.to_write for share in shares]
    assert sum(sizes) == plan.to_write and max(sizes) - min(sizes) <= 2 * plan.chunk
    assert [sum(part.stop - part.start for part in share.shared) for share in shares] == sizes


@given(st.integers(0, 2**32 - 1), st.integers(1, 4000), st.booleans())
@settings(max_examples=20)
def test_an_order_statistic_is_searched_in_shares(seed: int, rank: int, full_of_ties: bool) -> None:
    rng = np.random.default_rng(seed)
    values = np.abs(rng.normal(size=4000)).astype(np.float32)
    values = np.round(values, 1) if full_of_ties else values
    pieces = np.split(values, np.sort(rng.integers(0, 4001, size=2)))
    searches = [OrderStatisticSearch(rank, 4000) for _ in pieces]
    for search in searches:
        search.sample([values[:50], values[2000:2050]] if seed % 2 else [])
    while not searches[0].done:
        for search, piece in zip(searches, pieces, strict=True):
            search.update(piece)
        counts = [search.counts() for search in searches]
        for search in searches:
            search.take_counts(counts)
            search.end_pass()
    assert {search.result for search in searches} == {np.sort(values)[-rank]}


def test_a_process_that_is_killed_leaves_the_old_version(models: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    folders, begun = [tmp_path / str(victim) for victim in range(2)], time.monotonic()
    with contextlib.ExitStack() as running:
        runs = []
        for victim, folder in enumerate(folders):
            folder.mkdir()
            (folder / "models").symlink_to(models / "models")
            jm.save_checkpoint(folder / "old", {"w": np.ones(3)})
            runs.append(running.enter_context(started(folder, 2, victim)))
        codes = [[process.wait(120) for process in run] for run in runs]
    assert time.monotonic() - begun < 60
    # JAX ends the others when process 0 is gone; when another one is, they end with an error of ours.
    assert (codes[0][0], codes[1][1]) == (-9, -9) and codes[0][1] != 0 and codes[1][0] == 0
    kind, message = json.loads((folders[1] / "answer-0.json").read_text())["killed"]
    assert kind == "CheckpointError" and "process 1 of 2" in message and "no sign of life" in message
    assert not (folders[0] / "answer-1.json").exists()
    assert not (folders[1] / ".old.partial").exists()
    assert (folders[0] / ".old.partial").exists()  # nobody was there to remove it
    for folder in folders:
        with jm.open_checkpoint(folder / "old") as old:
            np.testing.assert_array_equal(old.params["w"][...], np.ones(3))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            report = many_processes.merge("tensor", "old", **many_processes.LAST)
        assert verify_checkpoint(folder / "old") == () and report.processes == 1
        assert not (folder / ".old.partial").exists()
