"""Where a model store keeps things, and the protocol by which it changes there: on a local file system.

`StorePlace` is what `jaxmerge.streaming.store` needs of either kind of place; `LocalPlace` is the one with folders,
renames and locks. The one with objects and conditional writes is in `jaxmerge.streaming.store_objects`.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmerge.checkpoints.publish import (
    as_checkpoint_error,
    claim,
    exchange,
    lock_folder,
    remove,
    rename_new,
    replace_file,
    sync,
)
from jaxmerge.errors import CheckpointError, ConflictError
from jaxmerge.streaming.fingerprint import digest
from jaxmerge.streaming.manifest import MANIFEST, Manifest, load_manifest, verify_checkpoint

NAME = r"\w[\w.-]*"
"""What models may be called."""

COMMIT = r"[0-9a-f]{32}"
"""What commits are called."""

_READ_BYTES = 1 << 20
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """What `commits/COMMIT.json` holds.

    Attributes:
        state: "PREPARED" or "COMMITTED"; on an object store also "PENDING", "AGAIN" or "REMOVED".
        commit: the version.
        manifest: id of its manifest, or None.
        files: each file but the manifest, with its size and SHA-256; None for files whose tensors the manifest hashes.
            On an object store all files, with their hashes.
        number: of the version.
        finished: time of the state before "COMMITTED", in UTC.
        previous: the commit that was current before.
        parents: versions of the store that it was made from.
        folder: on an object store, its name in `versions/`.
        replaces: on an object store, the text of the HEAD in whose place its own is put.
    """

    state: str
    commit: str
    manifest: str | None
    files: dict[str, tuple[int, str | None]]
    number: int
    finished: str
    previous: str | None
    parents: tuple[str, ...]
    folder: str | None = None
    replaces: str | None = None

    @property
    def key(self) -> str:
        """Its name in `versions/`, and with a suffix in `commits/`."""
        return self.folder or self.commit

    @property
    def nbytes(self) -> int:
        """Size of its files, without the manifest."""
        return sum(size for name, (size, _) in self.files.items() if name != MANIFEST)

    @classmethod
    def load(cls, content: bytes, where: str) -> Record:
        """The record that `content` tells.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            told = json.loads(content.decode())
            if told["version"] != _VERSION or digest(told["record"]) != told["id"]:
                raise ValueError("it was changed since it was written, or is of another version")
            files = {path: (size, sha256) for path, (size, sha256) in told["record"]["files"].items()}
            return cls(**{**told["record"], "files": files, "parents": tuple(told["record"]["parents"])})
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{where} is damaged ({error!r:.200}); put it back from a copy, or remove it"
            ) from None

    def content(self) -> bytes:
        """What its file holds."""
        plain = {name: x for name, x in dataclasses.asdict(self).items() if x is not None or name not in _REMOTE}
        told = {"version": _VERSION, "id": digest(plain), "record": plain}
        return json.dumps(told, sort_keys=True, indent=1).encode()

    def save(self, folder: Path) -> None:
        """Writes it to a local folder, in one durable step."""
        replace_file(folder / f"{self.key}.json", self.content())


_REMOTE = ("folder", "replaces")  # are told on object stores alone


@dataclasses.dataclass(frozen=True)
class Draft:
    """A version that is about to be committed.

    Attributes:
        folder: where its files are.
        commit: what it is called.
        manifest: id of its manifest, or None.
        files: as in its record.
        parents: versions of the store that it was made from.
    """

    folder: Path
    commit: str
    manifest: str | None
    files: dict[str, tuple[int, str | None]]
    parents: tuple[str, ...]


class StorePlace(abc.ABC):
    """Where a store keeps its models.

    Attributes:
        root: its folder or URL.
    """

    root: Path | Any

    @abc.abstractmethod
    def exists(self) -> bool:
        """Whether there is a store."""

    @abc.abstractmethod
    def names(self) -> list[str]:
        """The models, also those that have no version yet."""

    @abc.abstractmethod
    def current(self, name: str) -> str | None:
        """The key of the current version, None if there is none.

        Raises:
            CheckpointError: HEAD is damaged.
        """

    @abc.abstractmethod
    def records(self, name: str) -> list[Record]:
        """The records of a model.

        Raises:
            CheckpointError: one is damaged.
        """

    @abc.abstractmethod
    def where(self, name: str, key: str) -> Path | Any:
        """The path or URL of a version."""

    @abc.abstractmethod
    def holds(self, name: str, key: str) -> bool:
        """Whether there is such a version."""

    @abc.abstractmethod
    def faults(self, name: str, record: Record) -> list[tuple[str, str]]:
        """What is not as it was committed: name and problem. Everything is read."""

    @abc.abstractmethod
    def parent(self, path: str) -> str | None:
        """The version of this store, as `NAME@COMMIT`, that a path belongs to."""

    @abc.abstractmethod
    def begin(self, name: str) -> str | None:
        """Prepares for a transaction, and recovers what is prepared. Returns the current commit."""

    @abc.abstractmethod
    def workplace(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local folder, empty or with what `merge_checkpoint` may go on from. It is removed at the end."""

    @abc.abstractmethod
    def commit(self, name: str, draft: Draft, expected: str | None) -> Record:
        """Takes a version through all states.

        Raises:
            ConflictError: another commit is current than is expected.
        """

    @abc.abstractmethod
    def recover(self, name: str, patience: float) -> list[str]:
        """Finishes or removes what killed writers have left. Returns what was done."""

    @abc.abstractmethod
    def discard(self, name: str, commit: str) -> bool:
        """Removes a version; false if it is the current one."""

    def check_expected(self, name: str, expected: str | None, head: str | None) -> None:
        """Checks that a commit is current.

        Raises:
            ConflictError: another one is.
        """
        if head != expected:
            raise ConflictError(
                f"{self.root}: {name} is at {head or 'no version'}, and {expected or 'no version'} was expected: "
                "somebody else has committed to it; look at that version, and begin again"
            )


class LocalPlace(StorePlace):
    """A local folder."""

    def __init__(self, root: Path):
        self.root: Path = root

    def exists(self) -> bool:
        return (self.root / "models").is_dir()

    def names(self) -> list[str]:
        folder = self.root / "models"
        with as_checkpoint_error(f"read {self.root}"):
            found = folder.iterdir() if folder.is_dir() else ()
            return sorted(path.name for path in found if re.fullmatch(NAME, path.name, re.ASCII) and path.is_dir())

    def current(self, name: str) -> str | None:
        file = self._model(name) / "HEAD"
        with as_checkpoint_error(f"read {file}"):
            try:
                text = file.read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, NotADirectoryError):
                return None
        if not re.fullmatch(rf"{COMMIT}\n", text):
            raise CheckpointError(f"{file} is damaged: found {text!r:.60}, expected a commit; write one of versions/")
        return text.strip()

    def records(self, name: str) -> list[Record]:
        records = []
        with as_checkpoint_error(f"read {self.root}"):
            for file in sorted((self._model(name) / "commits").glob("[0-9a-f]*.json")):
                with contextlib.suppress(FileNotFoundError):  # gc has removed it meanwhile
                    records.append(Record.load(file.read_bytes(), str(file)))
        return records

    def where(self, name: str, key: str) -> Path:
        return self._model(name) / "versions" / key

    def holds(self, name: str, key: str) -> bool:
        return self.where(name, key).is_dir()

    def faults(self, name: str, record: Record) -> list[tuple[str, str]]:
        return _faults(self.where(name, record.key), record, tensors=True)

    def parent(self, path: str) -> str | None:
        here = os.path.realpath(self.root / "models")
        place = "" if "://" in path else os.path.relpath(os.path.realpath(path), here)
        match = re.match(rf"({NAME})/versions/([0-9a-f]+)(?:/|$)", place, re.ASCII)
        return f"{match[1]}@{match[2]}" if match else None

    def begin(self, name: str) -> str | None:
        model = self._model(name)
        self._make_folders(model)
        with self._lock(model):
            self._settle(name)
            return self.current(name)

    @contextlib.contextmanager
    def workplace(self, name: str) -> Iterator[Path]:
        with contextlib.ExitStack() as stack:
            with as_checkpoint_error(f"write to {self.root}"):
                place = stack.enter_context(self._place(self._model(name)))
                for leftover in place.iterdir():
                    if leftover.name != ".model.partial":  # a killed merge_checkpoint's, which may go on from there
                        remove(leftover)
            yield place

    def commit(self, name: str, draft: Draft, expected: str | None) -> Record:
        model, commit, folder = self._model(name), draft.commit, draft.folder
        commits, target = model / "commits", model / "versions" / commit
        with self._lock(model):
            self._settle(name)
            head = self.current(name)
            records = {record.commit: record for record in self.records(name)}
            if head != commit:
                self.check_expected(name, expected, head)
            if commit in records:  # the same content again
                # Should the former copy be missing or damaged, this one is not.
                if target.exists():
                    exchange(folder, target)
                else:
                    rename_new(folder, target)
                sync(target.parent)
                if head != commit:
                    replace_file(model / "HEAD", f"{commit}\n".encode())
                return records[commit]
            number = 1 + max((x.number for x in records.values()), default=0)
            record = Record("PREPARED", commit, draft.manifest, draft.files, number, now(), head, draft.parents)
            try:
                record.save(commits)
                if target.exists():  # a folder without a record, which says nothing
                    os.rename(target, folder.with_name("replaced"))
                rename_new(folder, target)
                sync(target.parent)
                self._finish(name, record, checked=True)
            except BaseException as error:
                if self.current(name) != commit:
                    with contextlib.suppress(OSError):
                        self._discard(model, commit, folder.parent)
                    raise
                if not isinstance(error, OSError):
                    raise
                # HEAD is set: the version is committed, and recovery completes what its record says.
            return record

    def recover(self, name: str, patience: float) -> list[str]:
        model = self._model(name)
        with self._lock(model):
            done = self._settle(name)
        for place in sorted((model / "staging").glob("*")):
            lock = claim(place)
            if lock is not None:
                with _closing(lock):
                    remove(place)
                done.append(f"{name}: an unfinished version was removed")
        return done

    def discard(self, name: str, commit: str) -> bool:
        model = self._model(name)
        with self._lock(model):
            if self.current(name) == commit:
                return False
            with self._place(model) as place:
                self._discard(model, commit, place)
        return True

    def _model(self, name: str) -> Path:
        check_name(name)
        return self.root / "models" / name

    def _make_folders(self, model: Path) -> None:
        missing = [x for x in (*reversed(model.parents), model) if not x.exists()]
        for folder in (*missing, *(model / part for part in ("versions", "commits", "staging"))):
            folder.mkdir(exist_ok=True)
        for folder in (*(x.parent for x in missing), model):
            sync(folder)

    @contextlib.contextmanager
    def _lock(self, model: Path) -> Iterator[None]:
        """Held while HEAD and records change, which takes a moment."""
        with _closing(lock_folder(model)):
            yield

    @contextlib.contextmanager
    def _place(self, model: Path) -> Iterator[Path]:
        """The first folder in `staging` that nobody else is at. It is removed at the end."""
        places = (model / "staging" / str(number) for number in itertools.count())
        place, lock = next((place, lock) for place in places if (lock := claim(place)) is not None)
        with _closing(lock):
            try:
                yield place
            finally:
                with contextlib.suppress(OSError):  # `recover` removes what cannot be removed now
                    remove(place)

    def _settle(self, name: str) -> list[str]:
        """Recovery, given the lock: finishes or removes what is prepared."""
        model, done = self._model(name), []
        for draft in (*model.glob(".*.draft"), *(model / "commits").glob(".*.draft")):
            remove(draft)
        for record in self.records(name):
            label = f"{name}@{record.commit}"
            if record.state == "PREPARED":
                done.append(settled(label, self._finish(name, record)))
            elif not (model / "versions" / record.commit).exists() and self.current(name) != record.commit:
                with self._place(model) as place:
                    self._discard(model, record.commit, place)
                done.append(f"{label} was removed")
        return done

    def _finish(self, name: str, record: Record, *, checked: bool = False) -> bool:
        """Takes a prepared version through the remaining steps, or removes it. May be done again at any point."""
        model, head = self._model(name), self.current(name)
        if head != record.commit:
            folder = model / "versions" / record.commit
            if head != record.previous or (not checked and _faults(folder, record, tensors=False)):
                with self._place(model) as place:
                    self._discard(model, record.commit, place)
                return False
            replace_file(model / "HEAD", f"{record.commit}\n".encode())
        dataclasses.replace(record, state="COMMITTED").save(model / "commits")
        return True

    def _discard(self, model: Path, commit: str, place: Path) -> None:
        """Removes a version: it goes to a place of ours in one step, where it is removed, and its record after it."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(model / "versions" / commit, place / "removed")
            with contextlib.suppress(OSError):  # on a full disk too
                sync(model / "versions")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(model / "commits" / f"{commit}.json")
            sync(model / "commits")


def check_name(name: str) -> None:
    """Checks that a model may be called so.

    Raises:
        CheckpointError: it may not.
    """
    if not re.fullmatch(NAME, name, re.ASCII):
        raise CheckpointError(f"{name!r} cannot be the name of a model; use letters, digits, '.', '-' and '_'")


def settled(label: str, committed: bool) -> str:
    """What recovery tells of a version that was prepared."""
    return f"{label} was {'committed' if committed else 'removed: it was incomplete, or others were first'}"


def now() -> str:
    """The time, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def make_durable(folder: Path, manifest: Manifest | None) -> dict[str, tuple[int, str | None]]:
    """Syncs the files of a folder and takes away the permission to write them.

    Returns:
        Size of each file but the manifest, and SHA-256 of those whose tensors the manifest does not hash.

    Raises:
        CheckpointError: there is something else than plain files.
    """
    files: dict[str, tuple[int, str | None]] = {}
    for path in _files(folder):
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is a link or no plain file; a version must hold copies of its files")
        sync(path)
        path.chmod(path.stat().st_mode & ~0o222)
        if path != folder / MANIFEST:
            hashed = None if _has_tensors(path, manifest) else sha256_of(path)
            files[str(path.relative_to(folder))] = (path.stat().st_size, hashed)
    for parent, _, _ in os.walk(folder):
        sync(parent)
    return files


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            found.update(piece)
    return found.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names)


def _has_tensors(path: Path, manifest: Manifest | None) -> bool:
    """Whether the manifest hashes what the file holds, tensor by tensor."""
    return manifest is not None and manifest.output.format == "safetensors" and path.suffix == ".safetensors"


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _faults(folder: Path, record: Record, *, tensors: bool) -> list[tuple[str, str]]:
    """What is wrong in the folder of a version: name and problem. Tensors are read only if they are asked for."""
    if not folder.is_dir():
        return [("", "its folder is missing")]
    there = {str(path.relative_to(folder)) for path in _files(folder)} - {MANIFEST}
    found = [(name, "was added") for name in sorted(there - record.files.keys())]
    for name, (size, sha256) in record.files.items():
        path = folder / name
        if name not in there:
            found.append((name, "is missing"))
        elif path.stat().st_size != size:
            found.append((name, f"has {path.stat().st_size} bytes, and {size} were written"))
        elif sha256 is not None and sha256_of(path) != sha256:
            found.append((name, "has other bytes than were written"))
    if record.manifest is None:
        return found
    try:
        if load_manifest(folder).id != record.manifest:
            found.append((MANIFEST, "is another one than was written"))
        elif tensors:
            found += [(fault.tensor, fault.problem) for fault in verify_checkpoint(folder)]
    except CheckpointError as error:
        found.append((MANIFEST if "manifest" in str(error) else "", str(error)))
    return found
