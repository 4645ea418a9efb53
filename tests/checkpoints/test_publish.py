"""Publishing: who owns the hidden folder at which moment, and what stands at the target after an error."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxmerge.checkpoints import publish
from jaxmerge.checkpoints.publish import Staging
from jaxmerge.errors import CheckpointError, ConflictError

each_rename = pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder with something in it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    return tmp_path / "model"


def staged(target: Path, is_folder: bool = True, keep: Callable[[Path], bool] | None = None) -> Staging:
    """An output that is ready to replace what is there."""
    staging = Staging(target, is_folder=is_folder, overwrite=True, keep=keep)
    (staging.folder / ("new" if is_folder else target.name)).write_text("new")
    return staging


def contents(target: Path) -> list[str]:
    return sorted(os.listdir(target)) if target.is_dir() else [target.read_text()]


@each_rename
@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("former", ["folder", "file", "link", "nothing"])
def test_anything_can_be_replaced(
    target: Path, monkeypatch: pytest.MonkeyPatch, former: str, is_folder: bool, exchanges: bool
) -> None:
    elsewhere = target.with_name("elsewhere")
    if former != "folder":
        target.rename(elsewhere)
    if former == "file":
        target.write_text("old")
    elif former == "link":
        target.symlink_to(elsewhere)
    if not exchanges:
        monkeypatch.setattr(publish, "_system_call", lambda: None)
    before = None if former == "nothing" else contents(target)

    staging, sync = staged(target, is_folder), publish.sync
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="the disk is full"):
        patch.setattr(publish, "sync", lambda path: _full() if path == target.parent else sync(path))
        staging.commit()
    staging.abort()
    if exchanges or is_folder or former == "folder":  # a file's place is taken for good by a plain rename
        assert (contents(target) if os.path.lexists(target) else None) == before
        assert target.is_symlink() == (former == "link")

    staged(target, is_folder).commit()
    assert contents(target) == ["new"] and not target.is_symlink()
    assert {x.name for x in target.parent.iterdir()} <= {"model", "elsewhere"}
    assert former == "folder" or contents(elsewhere) == ["old"], "what a link leads to is not ours"


def _full() -> None:
    raise OSError(28, "no space")


def test_what_a_killed_writer_left_may_stay(target: Path) -> None:
    partial = target.with_name(".model.partial")
    asked: list[list[str]] = []

    def keep(folder: Path) -> bool:
        assert folder == partial
        with pytest.raises(ConflictError, match="is being written already"):  # we have it
            Staging(target, is_folder=True, overwrite=True)
        asked.append(contents(folder))
        return "journal" in asked[-1]

    partial.mkdir()
    for name, left in [("journal", ["journal", "new"]), ("other", ["new"])]:
        (partial / name).touch()
        staging = staged(target, keep=keep)
        assert contents(partial) == left
        os.close(staging._lock or -1)  # as if it were killed
        for path in partial.iterdir():
            path.unlink()
    assert asked == [["journal"], ["other"]]


@pytest.mark.parametrize("left", ["file", "link"])
def test_a_writer_killed_after_an_exchange_may_leave_a_file_or_link(target: Path, left: str) -> None:
    partial = target.with_name(".model.partial")
    if left == "file":
        partial.touch()
    else:
        partial.symlink_to(target)
    staged(target).commit()
    assert contents(target.parent) == ["model"] and contents(target) == ["new"]


def test_the_hidden_name_is_nobody_elses_while_the_former_folder_has_it(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conflicts = []

    def remove(path: Path) -> None:
        assert contents(path) == ["old"]
        with pytest.raises(ConflictError, match="is being written already"):
            Staging(target, is_folder=True, overwrite=True)
        conflicts.append(path)
        original(path)

    original = publish.remove
    staging = staged(target)
    monkeypatch.setattr(publish, "remove", remove)
    staging.commit()
    assert len(conflicts) == 1 and contents(target.parent) == ["model"]


def test_a_writer_that_comes_right_after_a_rename_keeps_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = []

    def rename_new(source: Path, target: Path) -> None:
        original(source, target)
        others.append(staged(target))

    original = publish.rename_new
    monkeypatch.setattr(publish, "rename_new", rename_new)
    staged(tmp_path / "model").commit()
    assert contents(others[0].folder) == ["new"]
    others[0].abort()
    assert contents(tmp_path) == ["model"]


def test_what_comes_into_being_at_the_last_moment_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def appears(source: Path, target: Path) -> None:
        target.write_text("somebody else's")
        original(source, target)

    original = publish.rename_new
    monkeypatch.setattr(publish, "rename_new", appears)
    for exchanges in (True, False):
        if not exchanges:
            monkeypatch.setattr(publish, "_system_call", lambda: None)
        staging = Staging(tmp_path / "model", is_folder=True)
        with pytest.raises(ConflictError, match="exists already"):
            staging.commit()
        staging.abort()
        assert contents(tmp_path) == ["model"] and (tmp_path / "model").read_text() == "somebody else's"
        (tmp_path / "model").unlink()
