"""A model store: models, each a row of immutable versions of which one is the current one.

```
ROOT/models/NAME/HEAD                 the current version's commit, in a small file that is replaced in one step
ROOT/models/NAME/versions/COMMIT/     a version: a plain folder, as `merge_checkpoint` writes it
ROOT/models/NAME/commits/COMMIT.json  its record: state, hashes of its files, the version before it, its parents
ROOT/models/NAME/staging/0/           what a writer is working on; the folder is locked while the writer lives
```

ROOT is a local folder (`jaxmerge.streaming.store_places`) or the URL of an object store, where a version and its record
have a longer name, and `staging` is a local temporary folder (`jaxmerge.streaming.store_objects`).

A version goes through three states. PENDING: it is in `staging`, or on its way to an object store. PREPARED: its files
are durable, its record is written, and it is put into `versions`. COMMITTED: HEAD was set, and the record says so. Each
step is one rename, or one conditional write, and may be done again, so `recover` goes on from wherever a killed writer
stopped: what was pending is removed, what was prepared is checked and then committed, or removed if it is incomplete or
HEAD has moved on meanwhile.

The store does not know how to merge. It hands out a folder to write into, and publishes it.

(MergePipe, arXiv 2602.13273, has transactions of this kind. This protocol and its files are our own.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmerge.checkpoints.publish import as_checkpoint_error
from jaxmerge.checkpoints.stores import local_path
from jaxmerge.errors import CheckpointError
from jaxmerge.streaming.fingerprint import digest
from jaxmerge.streaming.manifest import MANIFEST, load_manifest
from jaxmerge.streaming.store_objects import PATIENCE, ObjectPlace
from jaxmerge.streaming.store_places import Draft, LocalPlace, Record, StorePlace, check_name, make_durable

if TYPE_CHECKING:
    import tensorstore as ts

CURRENT = "HEAD"
"""As an expected commit: whatever is current when the transaction begins."""

_COMMIT_DIGITS = 32


@dataclasses.dataclass(frozen=True)
class ModelVersion:
    """A version of a model.

    Attributes:
        model: name of the model.
        commit: what the version is called: a hash of what it holds and of the merge that it comes from.
        path: its folder; its URL, as text, in a store on an object store.
        number: versions of a model are numbered in the order in which they were committed.
        finished: when that was, in UTC.
        previous: the commit that was current before, or None.
        parents: versions of this store that it was made from, as `NAME@COMMIT`.
        manifest: id of its manifest, or None if it has none.
        nbytes: size of its files.
    """

    model: str
    commit: str
    path: Path | Any
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
        folder: where to write. It does not exist yet, so that `merge_checkpoint(out=...)` can make it. It is local also
            if the store is not.
        version: the version, after the block.
    """

    model: str
    expected: str | None
    folder: Path
    version: ModelVersion | None = None


class ModelStore:
    """Models with versions. `open_store` opens one; several processes may use it at a time.

    Attributes:
        root: the folder; the URL, as text, of a store on an object store.
    """

    def __init__(self, place: StorePlace):
        self._place = place
        self.root = place.root

    def exists(self) -> bool:
        """Whether a transaction has begun there before."""
        return self._place.exists()

    def models(self) -> tuple[str, ...]:
        """Names of the models that have a version."""
        with as_checkpoint_error(f"read {self.root}"):
            return tuple(name for name in self._place.names() if self.head(name) is not None)

    def head(self, name: str) -> str | None:
        """The commit that is current, or None for a model without versions.

        Raises:
            CheckpointError: HEAD is damaged.
        """
        return _commit_of(self._place.current(name))

    def path(self, name: str, commit: str | None = None) -> Path | Any:
        """The folder of a version, or its URL. It stays as it is until `gc` removes it, whatever else is committed.

        Args:
            name: the model.
            commit: the version, or the first digits of its commit; None: the current one.

        Raises:
            CheckpointError: there is none, or more than one.
        """
        return self._place.where(name, self._key(name, commit))

    def versions(self, name: str) -> tuple[ModelVersion, ...]:
        """The versions of a model, the newest first.

        Raises:
            CheckpointError: a record is damaged.
        """
        head = self._place.current(name)
        records = [record for record in self._records(name) if record.state in _COMMITTED or record.key == head]
        return tuple(self._version(name, x) for x in sorted(records, key=lambda record: -record.number))

    @contextlib.contextmanager
    def transaction(
        self, name: str, *, expected: str | None = CURRENT, inputs: Iterable[str | Path] = ()
    ) -> Iterator[Transaction]:
        """A folder to write into, which becomes the current version of a model at the end of the block.

        When an exception leaves the block nothing has changed (empty folders of a new model may stay). Versions of this
        model that killed writers have prepared are recovered first. The folder may be the one that a killed writer had,
        so that `merge_checkpoint` finds there what it may go on from. For a store on an object store it is a temporary
        one, which is uploaded at the end: pass `max_shard_bytes` to `merge_checkpoint`, since files are uploaded whole.

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
            CheckpointError: nothing was written into the folder, or it cannot be committed. On an object store what was
                written is kept in the temporary folder if the upload fails, and the message tells where.
        """
        check_name(name)
        with as_checkpoint_error(f"write to {self.root}"):
            head = self._place.begin(name)
        if expected == CURRENT:
            expected = head
        self._place.check_expected(name, expected, head)
        with self._place.workplace(name) as folder:
            transaction = Transaction(name, expected, folder / "model")
            yield transaction
            if not transaction.folder.is_dir():
                raise CheckpointError(f"nothing was written to {transaction.folder}, so {name} has no new version")
            with as_checkpoint_error(f"commit {name} to {self.root}"):
                record = self._place.commit(name, self._draft(transaction.folder, inputs), expected)
                transaction.version = self._version(name, record)

    def recover(self, *, patience: float = PATIENCE) -> tuple[str, ...]:
        """Finishes or removes what killed writers have left, for all models. What a living one is at is left alone.

        A transaction does the same for its own model. Nothing happens if there is nothing to do.

        Args:
            patience: on an object store nothing tells whether a writer lives. What has been on its way there for so
                many seconds (a day) is removed; should its writer live, it gets a `ConflictError`. Pass 0 if no upload
                is under way.

        Returns:
            What was done, one line each.

        Raises:
            CheckpointError: a record is damaged, or a folder cannot be written.
        """
        done = []
        with as_checkpoint_error(f"recover {self.root}"):
            for name in self._place.names():
                done += self._place.recover(name, patience)
        return tuple(done)

    def verify(self, name: str | None = None, commit: str | None = None) -> tuple[StoreFault, ...]:
        """Checks that versions hold what was committed: reads them, and compares hashes.

        Args:
            name: the model; None: all.
            commit: the version, or the first digits of its commit; None: all.

        Returns:
            What differs, by tensor where the version has a manifest and is local, else by file. Empty if all is well.

        Raises:
            CheckpointError: there is no such version, or a record is damaged.
        """
        faults: list[StoreFault] = []
        for model in self._place.names() if name is None else (name,):
            chosen = None if commit is None else self._key(model, commit)
            head = self._place.current(model)
            if name is not None and head is None:
                self._key(model, None)  # says that there is none
            records = {record.key: record for record in self._records(model)}
            if head is not None and head not in records:
                faults.append(StoreFault(model, _commit_of(head) or "", "", "is current, and has no record"))
            for record in records.values():
                if chosen in (None, record.key) and (record.state in _COMMITTED or record.key == head):
                    found = self._place.faults(model, record)
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
        by_model = {name: self.versions(name) for name in self.models()}
        all_versions = {f"{x.model}@{x.commit}": x for versions in by_model.values() for x in versions}
        kept = {f"{name}@{self.head(name)}" for name in by_model}
        for name, versions in by_model.items():
            kept.update(f"{name}@{version.commit}" for version in versions[:keep])
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
                with as_checkpoint_error(f"remove {label} from {self.root}"):
                    if not self._place.discard(version.model, version.commit):  # it has become current meanwhile
                        continue
            removed.append(version)
        return tuple(removed)

    def _key(self, name: str, commit: str | None) -> str:
        """What a version is called in its place."""
        if commit is None:
            key = self._place.current(name)
            if key is None:
                raise CheckpointError(
                    f"{self.root} has no model {name!r}; it has {', '.join(self.models()) or 'none at all'}"
                )
            found, commit = [key] if self._place.holds(name, key) else [], _commit_of(key)
        else:
            head = self._place.current(name)
            known = [x.key for x in self._records(name) if x.state in _COMMITTED or x.key == head]
            found = [key for key in known if key.startswith(commit)]
        if len(found) != 1:
            raise CheckpointError(
                f"{self.root}: {name} has {len(found) or 'no'} version{'s' if found else ''} {commit}; "
                "`jaxmerge store versions` lists them"
            )
        return found[0]

    def _records(self, name: str) -> list[Record]:
        return self._place.records(name)

    def _version(self, name: str, record: Record) -> ModelVersion:
        return ModelVersion(
            name,
            record.commit,
            self._place.where(name, record.key),
            record.number,
            record.finished,
            record.previous,
            record.parents,
            record.manifest,
            record.nbytes,
        )

    def _draft(self, folder: Path, inputs: Iterable[str | Path]) -> Draft:
        """What was written, made durable."""
        manifest = load_manifest(folder) if (folder / MANIFEST).exists() else None
        files = make_durable(folder, manifest)
        content = {path: sha256 for path, (_, sha256) in files.items() if sha256 is not None}
        commit = digest([None if manifest is None else manifest.id, content])[:_COMMIT_DIGITS]
        paths = [str(path) for path in inputs]
        if manifest is not None:
            models = (*([] if manifest.merge.base is None else [manifest.merge.base]), *manifest.merge.experts)
            paths += [model.path for model in models if model.path is not None]
        parents = dict.fromkeys(found for path in paths if (found := self._place.parent(path)) is not None)
        return Draft(folder, commit, None if manifest is None else manifest.id, files, tuple(parents))


def open_store(root: str | Path, *, context: ts.Context | None = None) -> ModelStore:
    """Opens a model store. Nothing is made before the first transaction.

    Args:
        root: a local folder, which need not exist; or a URL such as `s3://BUCKET/NAME` or `gs://BUCKET/NAME`.
        context: TensorStore's context for a URL: credentials, or the contents of `memory://`.

    Returns:
        The store.

    Raises:
        CheckpointError: it is no folder, or a URL that cannot be written to.
    """
    root = local_path(root)
    if "://" in str(root):
        return ModelStore(ObjectPlace(str(root), context=context))
    path = Path(os.path.abspath(root))
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{root} is no folder; a store is one")
    return ModelStore(LocalPlace(path))


_COMMITTED = ("COMMITTED", "AGAIN")


def _commit_of(key: str | None) -> str | None:
    """The commit of a version, from what it is called in its place."""
    return None if key is None else key[:_COMMIT_DIGITS]
