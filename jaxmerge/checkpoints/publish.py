"""Outputs that appear whole or not at all.

An output is built in a hidden folder beside its target, and renamed at the end. At every moment the target is either as
it was before or complete. The folder is locked while its owner lives, so a second writer of the same target is told
so, while what a killed writer left behind is taken over and cleared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxmerge.errors import CheckpointError, ConflictError

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EFBIG: "the file would be larger than is allowed here; write smaller shards (max_shard_bytes) or elsewhere",
    errno.EACCES: "permission denied; check the owner and mode of the folder",
    errno.EPERM: "permission denied; check the owner and mode of the folder",
    errno.EROFS: "the file system is read-only; write elsewhere",
}


@contextlib.contextmanager
def as_checkpoint_error(action: str) -> Iterator[None]:
    """Turns an `OSError` into a `CheckpointError` that says what failed and what to do."""
    try:
        yield
    except OSError as error:
        reason = _REMEDIES.get(error.errno or 0, error.strerror or str(error))
        raise CheckpointError(f"cannot {action}: {reason}") from error


class Staging:
    """A hidden folder in which an output is built before it gets its name.

    Attributes:
        target: the output: a folder or a file that does not exist yet (or is to be replaced).
        folder: the hidden folder. It becomes the target, or the file `target.name` in it does.
    """

    def __init__(self, target: Path, *, is_folder: bool, overwrite: bool = False):
        """Claims the target.

        Raises:
            ConflictError: the target exists and `overwrite` is false, or somebody else is writing it.
            CheckpointError: the folder cannot be made.
        """
        self.target = Path(os.path.abspath(target))
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self._replaced = self.target.with_name(f".{self.target.name}.replaced")
        self._is_folder, self._overwrite = is_folder, overwrite
        self._check_target()
        with as_checkpoint_error(f"write {self.target}"):
            self._made = list(itertools.takewhile(lambda parent: not parent.exists(), self.target.parents))
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = self._claim()
            try:
                for leftover in self.folder.iterdir():
                    _remove(leftover)
                if os.path.lexists(self.target):
                    _remove(self._replaced)
                elif self._replaced.exists():  # a writer was killed between the two renames of commit()
                    self._replaced.rename(self.target)
                self._check_target()
            except BaseException:
                self.abort()
                raise

    def commit(self) -> None:
        """Gives the output its name. Files in it must have been synced; folders are synced here.

        Raises:
            ConflictError: the target came into being meanwhile.
        """
        self._check_target()
        with as_checkpoint_error(f"write {self.target}"):
            for folder, _, _ in os.walk(self.folder):
                sync(folder)
            if os.path.lexists(self.target) and (self._is_folder or self.target.is_dir()):
                self.target.rename(self._replaced)  # nothing can be renamed over a folder
            output = self.folder if self._is_folder else self.folder / self.target.name
            try:
                output.rename(self.target)
            except OSError:
                if self._replaced.exists():
                    self._replaced.rename(self.target)
                raise
            sync(self.target.parent)
            _remove(self._replaced)
            _remove(self.folder)
            self._release()

    def abort(self) -> None:
        """Removes the hidden folder and everything in it, and parent folders that were made for it and are empty.

        After `commit` or a first `abort` there is nothing to do.
        """
        if self._lock is not None:  # otherwise the folder may be another writer's by now
            _remove(self.folder)
            self._release()
            with contextlib.suppress(OSError):  # somebody else uses it by now
                for parent in self._made:
                    parent.rmdir()

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _check_target(self) -> None:
        if os.path.lexists(self.target) and not self._overwrite:
            raise ConflictError(f"{self.target} exists already; remove it, choose another name or pass overwrite=True")

    def _claim(self) -> int:
        while True:
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir()
            try:
                lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The former owner may have renamed or removed the folder between our open() and flock().
                if self.folder.exists() and os.path.samestat(os.fstat(lock), self.folder.stat()):
                    return lock
            except BlockingIOError:
                os.close(lock)
                raise ConflictError(f"{self.target} is being written already; wait or take another name") from None
            os.close(lock)


def sync(path: str | Path) -> None:
    """Makes a file or folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
