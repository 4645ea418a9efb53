"""A model store: a folder of models, each a row of immutable versions of which one is the current one.

```
ROOT/models/NAME/HEAD                 the current version's commit, in a small file that is replaced in one step
ROOT/models/NAME/versions/COMMIT/     a version: a plain folder, as `merge_checkpoint` writes it
ROOT/models/NAME/commits/COMMIT.json  its record: state, hashes of its files, the version before it, its parents
ROOT/models/NAME/staging/0/           what a writer is working on; the folder is locked while the writer lives
```

A version goes through three states. PENDING: it is in `staging`. PREPARED: its files are durable, its record is
written, and it is put into `versions`. COMMITTED: HEAD was set, and the record says so. Each step is one rename and may
be done again, so `recover` goes on from wherever a killed writer stopped: what was pending is removed, what was
prepared is checked and then committed, or removed if it is incomplete or HEAD has moved on meanwhile.

The store does not know how to merge. It hands out a folder to write into, and publishes it.

(MergePipe, arXiv 2602.13273, has transactions of this kind. This protocol and its files are our own.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

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

CURRENT = "HEAD"
"""As an expected commit: whatever is current when the transaction begins."""

_NAME = r"\w[\w.-]*"
_COMMIT_DIGITS = 32
_READ_BYTES = 1 << 20
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ModelVersion:
    """A version of a model.

    Attributes:
        model: name of the model.
        commit: what the version is called: a hash of what it holds and of the merge that it comes from.
        path: its folder.
        number: versions of a model are numbered in the order in which they were committed.
        finished: when that was, in UTC.
        previous: the commit that was current before, or None.
        parents: versions of this store that it was made from, as `NAME@COMMIT`.
        manifest: id of its manifest, or None if it has none.
        nbytes: size of its files.
    """

    model: str
    commit: str
    path: Path
    number: int
    finished: str
    previous: str | None
    parents: tuple[str, ...]
    manifest: str | None
    nbytes: int


@dataclasses.dataclass(frozen=True)
class StoreFault:
    """Something in a store that is not as it was written.

    Attributes:
        model: name of the model.
        commit: the version.
        name: the tensor or file; "" for the version itself.
        problem: what is wrong.
    """

    model: str
    commit: str
    name: str
    problem: str

    def __str__(self) -> str:
        return f"{self.model}@{self.commit}: {self.name}{': ' if self.name else ''}{self.problem}"


@dataclasses.dataclass
class Transaction:
    """A version in the making. `ModelStore.transaction` hands it out.

    Attributes:
        model: name of the model.
        expected: the commit that must be current when this one is committed; None: there must be none.
        folder: where to write. It does not exist yet, so that `merge_checkpoint(out=...)` can make it.
        version: the version, after the block.
    """

    model: str
    expected: str | None
    folder: Path
    version: ModelVersion | None = None


@dataclasses.dataclass(frozen=True)
class _Record:
    """What `commits/COMMIT.json` holds.

    `files` maps each file but the manifest to its size and SHA-256; None for files whose tensors the manifest hashes.
    """

    state: str
    commit: str
    manifest: str | None
    files: dict[str, tuple[int, str | None]]
    number: int
    finished: str
    previous: str | None
    parents: tuple[str, ...]

    @classmethod
    def load(cls, file: Path) -> _Record:
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            if told["version"] != _VERSION or digest(told["record"]) != told["id"]:
                raise ValueError("it was changed since it was written, or is of another version")
            files = {path: (size, sha256) for path, (size, sha256) in told["record"]["files"].items()}
            return cls(**{**told["record"], "files": files, "parents": tuple(told["record"]["parents"])})
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{file} is damaged ({error!r:.200}); put it back from a copy, or remove it"
            ) from None

    def save(self, folder: Path) -> None:
        plain = dataclasses.asdict(self)
        told = {"version": _VERSION, "id": digest(plain), "record": plain}
        replace_file(folder / f"{self.commit}.json", json.dumps(told, sort_keys=True, indent=1).encode())


class ModelStore:
    """A folder of models with versions. `open_store` opens one; several processes may use it at a time.

    Attributes:
        root: the folder.
    """

    def __init__(self, root: Path):
        self.root = root

    def models(self) -> tuple[str, ...]:
        """Names of the models that have a version."""
        with as_checkpoint_error(f"read {self.root}"):
            return tuple(name for name in self._names() if self.head(name) is not None)

    def head(self, name: str) -> str | None:
        """The commit that is current, or None for a model without versions.

        Raises:
            CheckpointError: HEAD is damaged.
        """
        file = self._model(name) / "HEAD"
        with as_checkpoint_error(f"read {file}"):
            try:
                text = file.read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, NotADirectoryError):
                return None
        if not re.fullmatch(rf"[0-9a-f]{{{_COMMIT_DIGITS}}}\n", text):
            raise CheckpointError(f"{file} is damaged: found {text!r:.60}, expected a commit; write one of versions/")
        return text.strip()

    def path(self, name: str, commit: str | None = None) -> Path:
        """The folder of a version. It stays as it is until `gc` removes it, whatever is committed meanwhile.

        Args:
            name: the model.
            commit: the version, or the first digits of its commit; None: the current one.

        Raises:
            CheckpointError: there is none, or more than one.
        """
        if commit is None:
            commit = self.head(name)
            if commit is None:
                raise CheckpointError(
                    f"{self.root} has no model {name!r}; it has {', '.join(self.models()) or 'none at all'}"
                )
            found = [commit] if (self._model(name) / "versions" / commit).is_dir() else []
        else:
            found = [version.commit for version in self.versions(name) if version.commit.startswith(commit)]
        if len(found) != 1:
            raise CheckpointError(
                f"{self.root}: {name} has {len(found) or 'no'} version{'s' if found else ''} {commit}; "
                "`jaxmerge store versions` lists them"
            )
        return self._model(name) / "versions" / found[0]

    def versions(self, name: str) -> tuple[ModelVersion, ...]:
        """The versions of a model, the newest first.

        Raises:
            CheckpointError: a record is damaged.
        """
        head = self.head(name)
        records = [record for record in self._records(name) if record.state == "COMMITTED" or record.commit == head]
        return tuple(self._version(name, x) for x in sorted(records, key=lambda record: -record.number))

    @contextlib.contextmanager
    def transaction(
        self, name: str, *, expected: str | None = CURRENT, inputs: Iterable[str | Path] = ()
    ) -> Iterator[Transaction]:
        """A folder to write into, which becomes the current version of a model at the end of the block.

        When an exception leaves the block nothing has changed (empty folders of a new model may stay). Versions of this
        model that killed writers have prepared are recovered first. The folder may be the one that a killed writer had,
        so that `merge_checkpoint` finds there what it may go on from.

        Args:
            name: the model: letters, digits, `.`, `-` and `_`. The first version makes it.
            expected: the commit that must still be current at the end: by default what is current now; None: there must
                be no version.
            inputs: paths of models that go into it, for a folder without a manifest. Those in this store are recorded
                as its parents.

        Returns:
            A context manager, which gives a `Transaction`.

        Raises:
            ConflictError: another commit is current than is expected. If that shows at the end, what was written is
                removed.
            CheckpointError: nothing was written into the folder, or it cannot be committed.
        """
        model = self._model(name)
        with as_checkpoint_error(f"write to {self.root}"):
            self._make_folders(model)
            with self._lock(model):
                self._settle(name)
                head = self.head(name)
        if expected == CURRENT:
            expected = head
        self._check_expected(name, expected, head)
        with contextlib.ExitStack() as stack:
            with as_checkpoint_error(f"write to {self.root}"):
                place = stack.enter_context(self._place(model))
                for leftover in place.iterdir():
                    if leftover.name != ".model.partial":  # a killed merge_checkpoint's, which may go on from there
                        remove(leftover)
            transaction = Transaction(name, expected, place / "model")
            yield transaction
            if not transaction.folder.is_dir():
                raise CheckpointError(f"nothing was written to {transaction.folder}, so {name} has no new version")
            with as_checkpoint_error(f"commit {name} to {self.root}"):
                transaction.version = self._commit(transaction, inputs)

    def recover(self) -> tuple[str, ...]:
        """Finishes or removes what killed writers have left, for all models. What a living one is at is left alone.

        A transaction does the same for its own model. Nothing happens if there is nothing to do.

        Returns:
            What was done, one line each.

        Raises:
            CheckpointError: a record is damaged, or a folder cannot be written.
        """
        done = []
        with as_checkpoint_error(f"recover {self.root}"):
            for name in self._names():
                model = self._model(name)
                with self._lock(model):
                    done += self._settle(name)
                for place in sorted((model / "staging").glob("*")):
                    lock = claim(place)
                    if lock is not None:
                        with _closing(lock):
                            remove(place)
                        done.append(f"{name}: an unfinished version was removed")
        return tuple(done)

    def verify(self, name: str | None = None, commit: str | None = None) -> tuple[StoreFault, ...]:
        """Checks that versions hold what was committed: reads them, and compares hashes.

        Args:
            name: the model; None: all.
            commit: the version, or the first digits of its commit; None: all.

        Returns:
            What differs, by tensor where the version has a manifest, and by file. Empty if all is well.

        Raises:
            CheckpointError: there is no such version, or a record is damaged.
        """
        faults: list[StoreFault] = []
        for model in self._names() if name is None else (name,):
            chosen = None if commit is None else self.path(model, commit).name
            if name is not None and self.head(model) is None:
                self.path(model)  # says that there is none
            head, records = self.head(model), {record.commit: record for record in self._records(model)}
            if head is not None and head not in records:
                faults.append(StoreFault(model, head, "", "is current, and has no record"))
            for record in records.values():
                if chosen in (None, record.commit) and (record.state == "COMMITTED" or record.commit == head):
                    folder = self._model(model) / "versions" / record.commit
                    found = _faults(folder, record, tensors=True)
                    faults += [StoreFault(model, record.commit, *fault) for fault in found]
        return tuple(faults)

    def gc(self, *, keep: int = 1, parents: bool = False, dry_run: bool = False) -> tuple[ModelVersion, ...]:
        """Removes old versions. The current one of each model always stays.

        It does not know who reads: a version that is being read, or merged from, must be among those that are kept.

        Args:
            keep: how many of the newest versions of each model stay.
            parents: versions that the kept ones were made from stay too, and what those were made from.
            dry_run: remove nothing. Otherwise `recover` is done first.

        Returns:
            The versions that were removed, or would be.

        Raises:
            CheckpointError: a record is damaged, or a version cannot be removed.
        """
        if keep < 0:
            raise CheckpointError(f"keep={keep}: a number of versions cannot be negative")
        if not dry_run:
            self.recover()
        all_versions = {f"{x.model}@{x.commit}": x for name in self.models() for x in self.versions(name)}
        kept = {f"{name}@{self.head(name)}" for name in self.models()}
        for name in self.models():
            kept.update(f"{name}@{version.commit}" for version in self.versions(name)[:keep])
        waiting = [*kept] if parents else []
        while waiting:
            version = all_versions.get(waiting.pop())
            found = {*(() if version is None else version.parents)} - kept
            kept |= found
            waiting += found
        removed = []
        for label, version in all_versions.items():
            if label in kept:
                continue
            if not dry_run:
                model = self._model(version.model)
                with as_checkpoint_error(f"remove {label} from {self.root}"), self._lock(model):
                    if self.head(version.model) == version.commit:  # it has become current meanwhile
                        continue
                    with self._place(model) as place:
                        self._discard(model, version.commit, place)
            removed.append(version)
        return tuple(removed)

    def _names(self) -> list[str]:
        folder = self.root / "models"
        with as_checkpoint_error(f"read {self.root}"):
            found = folder.iterdir() if folder.is_dir() else ()
            return sorted(path.name for path in found if re.fullmatch(_NAME, path.name, re.ASCII) and path.is_dir())

    def _model(self, name: str) -> Path:
        if not re.fullmatch(_NAME, name, re.ASCII):
            raise CheckpointError(f"{name!r} cannot be the name of a model; use letters, digits, '.', '-' and '_'")
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

    def _records(self, name: str) -> list[_Record]:
        records = []
        with as_checkpoint_error(f"read {self.root}"):
            for file in sorted((self._model(name) / "commits").glob("[0-9a-f]*.json")):
                with contextlib.suppress(FileNotFoundError):  # gc has removed it meanwhile
                    records.append(_Record.load(file))
        return records

    def _version(self, name: str, record: _Record) -> ModelVersion:
        path = self._model(name) / "versions" / record.commit
        nbytes = sum(size for size, _ in record.files.values())
        return ModelVersion(
            name,
            record.commit,
            path,
            record.number,
            record.finished,
            record.previous,
            record.parents,
            record.manifest,
            nbytes,
        )

    def _check_expected(self, name: str, expected: str | None, head: str | None) -> None:
        if head != expected:
            raise ConflictError(
                f"{self.root}: {name} is at {head or 'no version'}, and {expected or 'no version'} was expected: "
                "somebody else has committed to it; look at that version, and begin again"
            )

    def _commit(self, transaction: Transaction, inputs: Iterable[str | Path]) -> ModelVersion:
        name, folder, model = transaction.model, transaction.folder, self._model(transaction.model)
        manifest = load_manifest(folder) if (folder / MANIFEST).exists() else None
        files = _made_durable(folder, manifest)
        content = {path: sha256 for path, (_, sha256) in files.items() if sha256 is not None}
        commit = digest([None if manifest is None else manifest.id, content])[:_COMMIT_DIGITS]
        commits, target = model / "commits", model / "versions" / commit
        with self._lock(model):
            self._settle(name)
            head = self.head(name)
            records = {record.commit: record for record in self._records(name)}
            if head != commit:
                self._check_expected(name, transaction.expected, head)
            if commit in records:  # the same content again
                # Should the former copy be missing or damaged, this one is not.
                if target.exists():
                    exchange(folder, target)
                else:
                    rename_new(folder, target)
                sync(target.parent)
                if head != commit:
                    replace_file(model / "HEAD", f"{commit}\n".encode())
                return self._version(name, records[commit])
            record = _Record(
                "PREPARED",
                commit,
                None if manifest is None else manifest.id,
                files,
                1 + max((x.number for x in records.values()), default=0),
                datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                head,
                self._parents(manifest, inputs),
            )
            try:
                record.save(commits)
                if target.exists():  # a folder without a record, which says nothing
                    os.rename(target, folder.with_name("replaced"))
                rename_new(folder, target)
                sync(target.parent)
                self._finish(name, record, checked=True)
            except BaseException as error:
                if self.head(name) != commit:
                    with contextlib.suppress(OSError):
                        self._discard(model, commit, folder.parent)
                    raise
                if not isinstance(error, OSError):
                    raise
                # HEAD is set: the version is committed, and recovery completes what its record says.
            return self._version(name, record)

    def _parents(self, manifest: Manifest | None, inputs: Iterable[str | Path]) -> tuple[str, ...]:
        """The inputs that are versions of this store."""
        paths = [str(path) for path in inputs]
        if manifest is not None:
            models = (*([] if manifest.merge.base is None else [manifest.merge.base]), *manifest.merge.experts)
            paths += [model.path for model in models if model.path is not None]
        here, found = os.path.realpath(self.root / "models"), {}
        for path in paths:
            place = "" if "://" in path else os.path.relpath(os.path.realpath(path), here)
            if match := re.match(rf"({_NAME})/versions/([0-9a-f]+)(?:/|$)", place, re.ASCII):
                found[f"{match[1]}@{match[2]}"] = None
        return tuple(found)

    def _settle(self, name: str) -> list[str]:
        """Recovery, given the lock: finishes or removes what is prepared."""
        model, done = self._model(name), []
        for draft in (*model.glob(".*.draft"), *(model / "commits").glob(".*.draft")):
            remove(draft)
        for record in self._records(name):
            label = f"{name}@{record.commit}"
            if record.state == "PREPARED":
                kept = self._finish(name, record)
                done.append(
                    f"{label} was {'committed' if kept else 'removed: it was incomplete, or others were first'}"
                )
            elif not (model / "versions" / record.commit).exists() and self.head(name) != record.commit:
                with self._place(model) as place:
                    self._discard(model, record.commit, place)
                done.append(f"{label} was removed")
        return done

    def _finish(self, name: str, record: _Record, *, checked: bool = False) -> bool:
        """Takes a prepared version through the remaining steps, or removes it. May be done again at any point."""
        model, head = self._model(name), self.head(name)
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


def open_store(root: str | Path) -> ModelStore:
    """Opens a model store. Nothing is made before the first transaction.

    Args:
        root: a local folder, which need not exist.

    Returns:
        The store.

    Raises:
        CheckpointError: it is a URL, or no folder.
    """
    if "://" in str(root):
        raise CheckpointError(
            f"{root}: a store needs a local file system, for its locks and renames; upload single versions instead"
        )
    path = Path(os.path.abspath(root))
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{root} is no folder; a store is one")
    return ModelStore(path)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _made_durable(folder: Path, manifest: Manifest | None) -> dict[str, tuple[int, str | None]]:
    """Syncs the files of a folder and takes away the permission to write them. Returns sizes and hashes."""
    files: dict[str, tuple[int, str | None]] = {}
    for path in _files(folder):
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is a link or no plain file; a version must hold copies of its files")
        sync(path)
        path.chmod(path.stat().st_mode & ~0o222)
        if path != folder / MANIFEST:
            hashed = None if _has_tensors(path, manifest) else _sha256(path)
            files[str(path.relative_to(folder))] = (path.stat().st_size, hashed)
    for parent, _, _ in os.walk(folder):
        sync(parent)
    return files


def _files(folder: Path) -> list[Path]:
    return sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names)


def _has_tensors(path: Path, manifest: Manifest | None) -> bool:
    """Whether the manifest hashes what the file holds, tensor by tensor."""
    return manifest is not None and manifest.output.format == "safetensors" and path.suffix == ".safetensors"


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            found.update(piece)
    return found.hexdigest()


def _faults(folder: Path, record: _Record, *, tensors: bool) -> list[tuple[str, str]]:
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
        elif sha256 is not None and _sha256(path) != sha256:
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
