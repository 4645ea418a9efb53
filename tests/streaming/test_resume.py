"""Merges that were killed go on where they ended, and give the bytes of a merge that was not."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.checkpoints.writer import JOURNAL
from jaxmerge.streaming.manifest import MANIFEST, load_manifest, verify_checkpoint
from jaxmerge.streaming.report import StreamReport

LAYERS = 6
METHOD = jm.task_arithmetic(0.3, weights={"a": 1.0, "b": 0.5})
MOMENTS = ("first write", "fourth write", "before a line", "within a line", "before the name", "orbax")

# One process starts the library once and forks a merge for each moment, which is killed there.
KILLED = """
    import os, signal, sys
    import jaxmerge as jm
    from jaxmerge.checkpoints.publish import Staging
    from jaxmerge.checkpoints.writer import CheckpointWriter
    from jaxmerge.streaming import journal

    os.cpu_count = lambda: 2
    journal.BATCH_BYTES = 1  # each tensor is noted when it is complete

    def die_in(cls, name, count, half=None):
        function, calls = getattr(cls, name), []
        def dying(self, *args):
            calls.append(args)
            if len(calls) == count:
                if half:
                    half(self, *args)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(self, *args)
        setattr(cls, name, dying)

    def half_a_line(self, entries):
        os.write(self._file, journal._line(entries[0])[:-5])

    moments = {
        "first write": lambda: die_in(CheckpointWriter, "write", 1),
        "fourth write": lambda: die_in(CheckpointWriter, "write", 4),
        "before a line": lambda: die_in(CheckpointWriter, "sync", 2),
        "within a line": lambda: die_in(journal.Journal, "_append", 4, half_a_line),
        "before the name": lambda: die_in(Staging, "commit", 1),
        "orbax": lambda: die_in(CheckpointWriter, "write", 5),
    }
    for moment, prepare in moments.items():
        child = os.fork()
        if not child:
            prepare()
            method = jm.task_arithmetic(0.3, weights={"a": 1.0, "b": 0.5})
            experts = {"a": "../models/a", "b": "../models/b"}
            kind = "orbax" if moment == "orbax" else None
            jm.merge_checkpoint(method, experts, base="../models/base", out=moment, format=kind, progress=False)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, moment
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and what merges of them left that were killed at several moments."""
    folder, rng = tmp_path_factory.mktemp("resume"), np.random.default_rng(0)
    for name in ("base", "a", "b"):
        embedding = rng.normal(size=(30, 100)).astype(ml_dtypes.bfloat16)
        params = {f"layers.{i}.w": rng.normal(size=(70, 100 + i)).astype(np.float32) for i in range(LAYERS)}
        params |= {"embed": embedding, "head": embedding, "positions": np.arange(9)}
        jm.save_checkpoint(folder / "models" / name, params, side_files={"config.json": b"{}"})
    (folder / "killed").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED)]
    done = subprocess.run(command, cwd=folder / "killed", env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def merge(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StreamReport]:
    """Merges as the killed processes did, in a folder of its own that has what one of them left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(folder / "models")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def merged(moment: str | None, spoil: Callable[[Path], object] = lambda _: None, **options) -> StreamReport:
        out = Path(f"out-{len(list(Path().iterdir()))}")
        if moment is not None:
            left = Path(f".{out}.partial")
            shutil.copytree(folder / "killed" / f".{moment}.partial", left, copy_function=shutil.copy2)
            spoil(left)
        experts = {"a": "../models/a", "b": "../models/b"}
        given = {"base": "../models/base", "progress": False} | options
        return jm.merge_checkpoint(given.pop("method", METHOD), experts, out=out, **given)

    return merged


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def noted(folder: Path, moment: str) -> list[str]:
    """The tensors that a journal names in whole lines."""
    path = folder / "killed" / f".{moment}.partial" / JOURNAL
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[1:-1]
    return [json.loads(line.rpartition(b" ")[0])["tensor"] for line in lines]


def test_a_killed_merge_goes_on_where_it_ended(folder: Path, merge: Callable[..., StreamReport]) -> None:
    whole = {kind: merge(None, format=kind) for kind in ("safetensors", "orbax")}
    assert {report.resumed for report in whole.values()} == {0}
    with jm.open_checkpoint(folder / "models" / "a") as checkpoint:
        sizes = {name: leaf.nbytes for name, leaf in jm.named_leaves(checkpoint.params).items() if name != "head"}
    counts = {}
    for moment in MOMENTS:
        kind = "orbax" if moment == "orbax" else "safetensors"
        report, finished = merge(moment, format=kind), noted(folder, moment)
        counts[moment] = report.resumed
        assert report.resumed == len(finished), moment
        rest = sum(size for name, size in sizes.items() if name not in finished)
        assert set(report.bytes_read.values()) == {rest}, moment
        assert report.bytes_written == rest
        assert contents(report.path) == contents(whole[kind].path), moment
        manifest = load_manifest(report.path)
        assert manifest.id == load_manifest(whole[kind].path).id
        assert manifest.run.keys == load_manifest(whole[kind].path).run.keys
        assert verify_checkpoint(report.path) == ()
        assert f".{report.path.name}.partial" not in os.listdir()
    assert counts["first write"] == counts["before the name"] == 0
    assert counts["before a line"] <= 1, "two workers may both be there"
    assert counts["within a line"] == 2
    assert min(counts["fourth write"], counts["orbax"]) >= 1


def test_what_is_damaged_is_merged_again(folder: Path, merge: Callable[..., StreamReport]) -> None:
    whole, moment = contents(merge(None).path), "within a line"
    first, second = noted(folder, moment)

    def flip(left: Path) -> None:
        """A bit of the first tensor that was finished."""
        with jm.open_checkpoint(folder / "models" / "base") as checkpoint:
            offset = checkpoint.params[first].offset  # the output has the base's layout
        with (left / "model.safetensors").open("r+b") as file:
            file.seek(offset + 7)
            byte = file.read(1)[0]
            file.seek(offset + 7)
            file.write(bytes([byte ^ 1]))

    def spoil_line(left: Path) -> None:
        text = (left / JOURNAL).read_bytes()
        (left / JOURNAL).write_bytes(text.replace(second.encode(), b"layers.9.w"))

    spoilt = {
        flip: 1,
        spoil_line: 0,
        lambda left: (left / JOURNAL).write_bytes(b""): 0,
        lambda left: os.truncate(left / "model.safetensors", 5000): 0,
        lambda left: (left / "config.json").unlink(): 0,
        lambda left: (left / "config.json").write_text("[]"): 2,  # as long, and written anew
        lambda left: (left / "other").mkdir(): 2,
    }
    for number, (spoil, resumed) in enumerate(spoilt.items()):
        report = merge(moment, spoil)
        assert report.resumed == resumed, number
        assert contents(report.path) == whole, number


def test_another_merge_starts_afresh(folder: Path, merge: Callable[..., StreamReport]) -> None:
    moment = "within a line"
    others = (
        {"method": jm.task_arithmetic(0.3, weights={"a": 1.0, "b": np.nextafter(0.5, 1)})},
        {"max_shard_bytes": 100_000},
        {"format": "orbax"},
        {"manifest": False},
    )
    for options in others:
        report = merge(moment, **options)
        assert report.resumed == 0
        assert not (report.path / JOURNAL).exists()
        assert contents(report.path) == contents(merge(None, **options).path)
    report = merge(moment, lambda _: os.utime(folder / "models" / "a" / "model.safetensors"))
    assert report.resumed == 0, "an expert was changed"
