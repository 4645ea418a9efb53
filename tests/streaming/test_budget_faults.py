"""Merges within an I/O budget when files change or are damaged: noticed, one clear error, nothing published.

A catalog that is damaged is begun anew or its damaged parts are gathered again; it never answers anything wrong.
"""

import contextlib
import os
import random
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.checkpoints.stores import FileSource
from jaxmerge.streaming import merge_checkpoint as merge_checkpoint_module
from jaxmerge.streaming.catalog import open_catalog
from jaxmerge.streaming.merge_checkpoint import plan_merge
from jaxmerge.streaming.statistics import BlockStatistics

METHOD = jm.task_arithmetic(0.4)
BLOCK_BYTES = 256


def make_models(folder: Path) -> tuple[Path, dict[str, Path]]:
    rng = np.random.default_rng(0)
    base = {"w": rng.normal(size=(40, 16)).astype(np.float32), "v": rng.normal(size=50).astype(np.float32)}
    experts = {}
    for name in "ab":
        moved = {key: x + rng.normal(size=x.shape).astype(np.float32) for key, x in base.items()}
        experts[name] = jm.save_checkpoint(folder / name, moved)
    return jm.save_checkpoint(folder / "base", base), experts


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, dict[str, Path], Path]:
    base, experts = make_models(tmp_path)
    with open_catalog(tmp_path / "models.catalog") as catalog:
        catalog.add(base, experts, block_bytes=BLOCK_BYTES)
    return base, experts, tmp_path / "models.catalog"


def overwritten(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\0\0\x80\x3f")


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4)


def replaced(file: Path) -> None:
    other = file.with_name("other")
    shutil.copy2(file, other)  # its size and time are the same
    other.rename(file)


def saved_again(file: Path) -> None:
    with jm.open_checkpoint(file) as checkpoint:
        tensors = {name: np.asarray(x) + 1 for name, x in checkpoint.params.items()}
    jm.save_checkpoint(file.parent, tensors, overwrite=True)


def when_planned(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Changes something after a merge was planned, before a tensor is read."""
    planned = merge_checkpoint_module.plan_job

    def plan(*arguments: Any) -> Any:
        result = planned(*arguments)
        change()
        return result

    monkeypatch.setattr(merge_checkpoint_module, "plan_job", plan)


def between_reads(monkeypatch: pytest.MonkeyPatch, file: Path, change: Callable[[], None]) -> None:
    """Changes something before the second time that a tensor's bytes are read from a file."""
    read_into, reads = FileSource.read_into, []

    def read(source: FileSource, offset: int, out: np.ndarray) -> None:
        if reads and source._path == file:
            reads.append(offset)
            if len(reads) == 3:
                change()
        read_into(source, offset, out)

    when_planned(monkeypatch, lambda: reads.append(0))
    monkeypatch.setattr(FileSource, "read_into", read)


@pytest.mark.parametrize("change", [overwritten, truncated, replaced, saved_again])
@pytest.mark.parametrize("moment", ["planned", "reading"])
@pytest.mark.parametrize("which", ["base", "b"])
def test_a_file_that_changes_during_a_merge(
    change: Callable[[Path], None], moment: str, which: str, models: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    base, experts, catalog = models
    file = (base if which == "base" else experts[which]) / "model.safetensors"
    if moment == "planned":
        when_planned(monkeypatch, lambda: change(file))
    else:
        between_reads(monkeypatch, file, lambda: change(file))
    before = sorted(path.name for path in tmp_path.iterdir())
    options: dict[str, Any] = {"base": base, "out": tmp_path / "out", "io_budget": "60%", "catalog": catalog}
    with pytest.raises(jm.CheckpointError, match="changed while it was read|is truncated") as caught:
        jm.merge_checkpoint(METHOD, experts, **options)
    assert "model.safetensors" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing is left"
    monkeypatch.undo()
    if change is not truncated:  # the next merge takes the files as they are now
        report = jm.merge_checkpoint(METHOD, experts, **options)
        assert report.io_plan is not None
        assert {name: report.bytes_read[name] for name in experts} == report.io_plan.planned


def test_a_file_that_changes_before_a_planned_merge(models: Any, tmp_path: Path) -> None:
    base, experts, catalog = models
    options: dict[str, Any] = {"base": base, "catalog": catalog}
    plan = plan_merge(METHOD, experts, io_budget="50%", **options).io_plan
    replaced(experts["a"] / "model.safetensors")
    saved_again(experts["b"] / "model.safetensors")
    with pytest.raises(jm.RecipeError, match="made for another merge .expert 'b' differs"):
        jm.merge_checkpoint(METHOD, experts, out=tmp_path / "out", io_budget=plan, **options)
    assert not (tmp_path / "out").exists()


def test_a_value_behind_a_url_that_changes_during_a_merge(models: Any, tmp_path: Path, monkeypatch: Any) -> None:
    ts = pytest.importorskip("tensorstore")
    base, experts, catalog = models
    context = ts.Context()
    kv = ts.KvStore.open("memory://models/", context=context).result()
    content = (experts["b"] / "model.safetensors").read_bytes()
    kv["b.safetensors"] = content
    with jm.open_checkpoint("memory://models/b.safetensors", context=context) as there:
        given = {"a": experts["a"], "b": there}
        options: dict[str, Any] = {"base": base, "io_budget": "60%", "catalog": catalog}
        assert jm.merge_checkpoint(METHOD, given, out=tmp_path / "one", **options).bytes_read["b"] > 0

        def change() -> None:
            kv["b.safetensors"] = content[:-4] + b"\0\0\x80\x3f"

        when_planned(monkeypatch, change)
        with pytest.raises(jm.CheckpointError, match=r"b\.safetensors was changed while it was read"):
            jm.merge_checkpoint(METHOD, given, out=tmp_path / "two", **options)
    assert not (tmp_path / "two").exists()


def test_a_read_that_falls_short(models: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The system may answer with fewer bytes than were asked for; and with none at all when a file is truncated."""
    base, experts, catalog = models
    options: dict[str, Any] = {"base": base, "io_budget": "60%", "catalog": catalog}
    jm.merge_checkpoint(METHOD, experts, out=tmp_path / "whole", **options)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: preadv(fd, [into[0][:100]], offset))
    jm.merge_checkpoint(METHOD, experts, out=tmp_path / "short", **options)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "short")]
    assert files[0].read_bytes() == files[1].read_bytes()
    when_planned(monkeypatch, lambda: monkeypatch.setattr(os, "preadv", lambda *_: 0))
    with pytest.raises(jm.CheckpointError, match=r"model\.safetensors ends at byte .* is truncated"):
        jm.merge_checkpoint(METHOD, experts, out=tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def learnt(path: Path, base: Path, expert: Path) -> tuple[dict[str, BlockStatistics] | None, str | None]:
    with open_catalog(path) as catalog, jm.open_checkpoint(base) as one, jm.open_checkpoint(expert) as other:
        return catalog.statistics(one, other), catalog.content(other)


def check_right(found: tuple[Any, Any], truth: tuple[Any, Any], everything: bool = False) -> None:
    """What a catalog answers is right, or it does not know."""
    for answer, right in zip(found, truth, strict=True):
        assert answer is not None or not everything
        if isinstance(answer, dict):
            for name, x in answer.items():
                for key in ("size", "block", "norms", "largest", "zeros", "touched", "sketches"):
                    np.testing.assert_array_equal(getattr(x, key), getattr(right[name], key))
        else:
            assert answer in (None, right)


def test_flipped_bytes_of_a_catalog(models: Any, tmp_path: Path) -> None:
    base, experts, path = models
    truth, content = learnt(path, base, experts["a"]), path.read_bytes()
    places = [*range(0, 100, 3), 19, 61, *random.Random(0).sample(range(100, len(content)), 40)]
    refused, rebuilt = set(), 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                check_right(learnt(path, base, experts["a"]), truth)
            except jm.CheckpointError:
                refused.add(place)
                assert path.read_bytes() == damaged, "a file that may be of somebody else is left alone"
        rebuilt += bool(warned)
        for extra in tmp_path.glob("models.catalog?*"):
            extra.unlink()
    # A version from the future, or the mark of another program.
    assert refused <= {*range(60, 64), *range(68, 72)}
    assert rebuilt > 5


@pytest.mark.parametrize("damage", ["content", "truncated", "row", "header", "version", "negative version", "table"])
def test_a_damaged_catalog_is_gathered_anew(damage: str, models: Any, tmp_path: Path) -> None:
    base, experts, path = models
    truth, content = learnt(path, base, experts["a"]), path.read_bytes()
    statement = {
        "content": "UPDATE tensors SET content = replace(content, '7', '8')",
        "row": "UPDATE statistics SET block = 2 * block",
        "version": "PRAGMA user_version = 0",
        "negative version": "PRAGMA user_version = -1",
        "table": "ALTER TABLE statistics ADD COLUMN more TEXT",
    }.get(damage)
    if statement is not None:
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(statement)
    else:
        path.write_bytes(content[:5000] if damage == "truncated" else b"SQLitE" + content[6:])
    whole = damage not in ("content", "row")
    with pytest.warns(UserWarning, match="was damaged") if whole else contextlib.nullcontext():
        check_right(learnt(path, base, experts["a"]), truth)
    assert (tmp_path / "models.catalog.damaged").exists() == whole
    with open_catalog(path) as catalog:
        catalog.add(base, experts, block_bytes=BLOCK_BYTES)
    check_right(learnt(path, base, experts["a"]), truth, everything=True)


def test_a_file_that_is_no_catalog_is_never_taken_for_one(models: Any, tmp_path: Path) -> None:
    base, experts, _ = models
    other = tmp_path / "other"
    other.write_bytes(random.Random(0).randbytes(5000))
    before = other.read_bytes()
    with pytest.raises(jm.CheckpointError, match="is no catalog"):
        jm.merge_checkpoint(METHOD, experts, base=base, out=tmp_path / "out", io_budget="50%", catalog=other)
    assert other.read_bytes() == before and not (tmp_path / "out").exists()
