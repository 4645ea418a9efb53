"""Outputs that appear whole or not at all.

An output is built in a hidden folder beside its target, and renamed at the end. What stands at the target is replaced
in one step where the operating system can exchange two names (Linux, macOS, on most local file systems): at every
moment the target is either as it was before or complete. Elsewhere two renames are needed to replace a folder; a
process that is killed between them leaves the old folder under a hidden name, and the next writer puts it back.

The hidden folder is locked while its owner lives, so a second writer of the same target is told so, while what a
killed writer left behind is taken over and cleared.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
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

    def __init__(
        self,
        target: Path,
        *,
        is_folder: bool,
        overwrite: bool = False,
        keep: Callable[[Path], bool] | None = None,
    ):
        """Claims the target.

        Args:
            target: the output: a folder or a file.
            is_folder: which of both.
            overwrite: it may exist, and is replaced then.
            keep: is asked, while the hidden folder is locked, whether what a killed writer left in it may stay. What it
                does not want in there it removes itself. None: nothing stays.

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
            self._lock = claim(self.folder)
            if self._lock is None:
                raise ConflictError(f"{self.target} is being written already; wait or take another name")
            try:
                if (keep is None or not keep(self.folder)) and any(self.folder.iterdir()):
                    self._clear()
                if os.path.lexists(self.target):
                    remove(self._replaced)
                elif os.path.lexists(self._replaced):  # a writer was killed between the two renames of commit()
                    os.rename(self._replaced, self.target)
                self._check_target()
            except BaseException:
                self.abort()
                raise

    def commit(self) -> None:
        """Gives the output its name. Files in it must have been synced; folders are synced here.

        After an error the target is as it was before; where names cannot be exchanged, a file may have been replaced.

        Raises:
            ConflictError: the target came into being meanwhile.
            CheckpointError: the output cannot be made durable, or cannot be renamed.
        """
        self._check_target()
        output = self.folder if self._is_folder else self.folder / self.target.name
        with contextlib.ExitStack() as held, as_checkpoint_error(f"write {self.target}"):
            for folder, _, _ in os.walk(self.folder):
                sync(folder)
            undo, clear = self._publish(output, held)
            try:
                for parent in (self.target.parent, *(made.parent for made in self._made)):
                    sync(parent)
            except OSError:
                undo()
                raise
            with contextlib.suppress(OSError):  # it is published; the next writer removes what could not be removed
                clear()
                if not self._is_folder:
                    remove(self.folder)
        self._release()

    def abort(self) -> None:
        """Removes the hidden folder and everything in it, and parent folders that were made for it and are empty.

        After `commit` or a first `abort` there is nothing to do.
        """
        if self._lock is not None:
            if _is_same(self._lock, self.folder):  # otherwise the folder is another writer's by now
                remove(self.folder)
            self._release()
            with contextlib.suppress(OSError):  # somebody else uses it by now
                for parent in self._made:
                    parent.rmdir()

    def _clear(self) -> None:
        """Empties the hidden folder, and makes it another one.

        A process on another host that worked for the killed writer may live on, unaware: it holds the former folder,
        in which it cannot do harm (`JoinedStaging`).
        """
        for leftover in self.folder.iterdir():
            remove(leftover)
        self.folder.rmdir()
        self._release()
        self._lock = claim(self.folder)
        if self._lock is None:
            raise ConflictError(f"{self.target} is being written already; wait or take another name")

    def _publish(self, output: Path, held: contextlib.ExitStack) -> tuple[Callable[[], object], Callable[[], object]]:
        """Gives the output its name. Returns what takes that back, and what removes the former target."""
        target, replaced = self.target, self._replaced
        while True:
            if not os.path.lexists(target):
                try:
                    rename_new(output, target)
                except FileExistsError:
                    self._check_target()
                    continue
                return lambda: os.rename(target, output), lambda: None
            is_folder = target.is_dir() and not target.is_symlink()
            if self._is_folder and is_folder:
                # The former target is about to get the hidden name, which other writers may claim. The writer that
                # published it may not have let go of it yet.
                held.callback(os.close, lock_folder(target))
            if exchange(output, target):
                # A file has no lock: should another writer have claimed its hidden name, unlink does no harm.
                clear = functools.partial(remove, output) if is_folder else functools.partial(os.unlink, output)
                return functools.partial(exchange, output, target), clear
            if not self._is_folder and not is_folder:
                os.rename(output, target)
                return lambda: None, lambda: None
            os.rename(target, replaced)  # nothing can be renamed over a folder
            try:
                os.rename(output, target)
            except OSError:
                os.rename(replaced, target)
                raise

            def undo() -> None:
                os.rename(target, output)
                os.rename(replaced, target)

            return undo, lambda: remove(replaced)

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _check_target(self) -> None:
        if os.path.lexists(self.target) and not self._overwrite:
            raise ConflictError(f"{self.target} exists already; remove it, choose another name or pass overwrite=True")


class JoinedStaging:
    """The hidden folder of an output that another process has claimed, and publishes when all have done their part.

    Attributes:
        target: the output.
        folder: the hidden folder.
        opened: its file descriptor. Files are opened relative to it: should the folder be removed and made anew by
            somebody else, nothing of that is touched.
    """

    def __init__(self, target: Path):
        """Opens it.

        Raises:
            CheckpointError: it is not there.
        """
        self.target = Path(os.path.abspath(target))
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        with as_checkpoint_error(f"write {self.target}"):
            self.opened: int | None = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    def commit(self) -> None:
        """Lets go of the folder; the other process publishes it."""
        opened, self.opened = self.opened, None
        if opened is not None:
            os.close(opened)

    abort = commit


def claim(folder: Path) -> int | None:
    """Makes a folder if it does not exist, and locks it. The lock goes with the process, or when it is closed.

    Returns:
        The lock, a file descriptor; None if somebody else has locked the folder.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        except OSError:
            if folder.is_dir() and not folder.is_symlink():
                raise
            with contextlib.suppress(FileNotFoundError):  # a file or link that had been replaced by a folder
                os.unlink(folder)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        # The former owner may have renamed or removed the folder between our open() and flock().
        if _is_same(lock, folder):
            return lock
        os.close(lock)


def lock_folder(folder: Path) -> int:
    """A lock on a folder, waiting for whoever has it now. It goes with the process, or when it is closed."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except BaseException:
        os.close(lock)
        raise
    return lock


def exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two files or folders, in one step; false if that cannot be done here."""
    return _rename(_EXCHANGE, one, other)


def rename_new(source: Path, target: Path) -> None:
    """Renames to a name that must be free.

    Raises:
        FileExistsError: it is not.
    """
    if not _rename(_NEW, source, target):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a small file in one durable step: at every moment it is as it was before or complete.

    After an `OSError` the file may be either.
    """
    draft = path.with_name(f".{path.name}.draft")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            while content:
                content = content[os.write(fd, content) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: str | Path) -> None:
    """Makes a file or folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Removes a file, or a folder and everything in it, also while somebody else does the same."""
    while os.path.lexists(path):
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                os.unlink(path)


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


# What the flags of a rename are called where there are any: RENAME_NOREPLACE and RENAME_EXCHANGE of renameat2 (Linux),
# RENAME_EXCL and RENAME_SWAP of renamex_np (macOS).
_NEW, _EXCHANGE = {"linux": (1, 2), "darwin": (4, 2)}.get(sys.platform, (0, 0))

_NOT_HERE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
"""What a system or file system answers that does not know a flag, or a container that does not let the call pass."""


def _rename(flag: int, source: Path, target: Path) -> bool:
    """Renames with a flag; false if that cannot be done here."""
    call = _system_call()
    if call is None:
        return False
    if call(os.fsencode(source), os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_HERE:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


@functools.cache
def _system_call() -> Callable[[bytes, bytes, int], int] | None:
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            call, here = library.renameat2, -100  # AT_FDCWD: relative paths start at the current folder
            call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
            return lambda source, target, flag: call(here, source, here, target, flag)
        if sys.platform == "darwin":
            call = library.renamex_np
            call.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)
            return call
    except (OSError, AttributeError):  # an older system
        pass
    return None
