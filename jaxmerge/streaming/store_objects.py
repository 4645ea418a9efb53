"""A model store on an object store: no renames, no locks, but writes on condition that an object is as it was read.

```
ROOT/models/NAME/HEAD                         VERSION and a number of its own: no two HEADs of a model are the same
ROOT/models/NAME/versions/VERSION/            a version; VERSION is COMMIT-TOKEN, with a random token for each upload
ROOT/models/NAME/commits/VERSION.json         its record
```

Because of the token nobody else writes under a version's prefix, so it is uploaded without conditions, and never
changes. All that more than one process writes are HEAD and the records, and each change of them is one conditional
write on what was read before:

* A record is PENDING from before the upload until after it. So that is what recovery may declare dead: REMOVED. The
  writer then cannot make it PREPARED, and what it still uploads belongs to nobody.
* A PREPARED record names the HEAD that it is to replace, and anybody may finish it: HEAD, if it still is that one, then
  COMMITTED. Once HEAD is another one it never becomes that one again, so the version may be REMOVED without fear that
  somebody sets HEAD to it. Nobody replaces a HEAD whose version is not COMMITTED yet.
* A committed version that is to be current again is AGAIN until HEAD is set, which keeps `discard` off it; it is
  COMMITTED afterwards whether that succeeds or not.
* A version that is REMOVED stays so. Its objects are deleted, and its record after them.

Objects under a prefix without a record belong to nobody, since the record is written first and deleted last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxmerge.checkpoints.publish import as_checkpoint_error, remove
from jaxmerge.checkpoints.stores import ByteCounter, KvSource, open_kvstore, wait
from jaxmerge.checkpoints.upload import MAX_OBJECT_BYTES, upload_folder
from jaxmerge.errors import CheckpointError, ConflictError
from jaxmerge.streaming.manifest import MANIFEST
from jaxmerge.streaming.store_places import (
    COMMIT,
    NAME,
    Draft,
    Record,
    StorePlace,
    check_name,
    now,
    settled,
    sha256_of,
)

if TYPE_CHECKING:
    import tensorstore as ts

PATIENCE = 86400.0
"""Seconds after which an upload that is not complete counts as killed."""

_KEY = rf"{COMMIT}-[0-9a-f]{{16}}"
_READ_BYTES = 64 << 20


class _Head(NamedTuple):
    """HEAD as it was read: all of its text, "" for none, the version that it names, and its generation."""

    text: str
    key: str | None
    generation: bytes

    @property
    def commit(self) -> str | None:
        return None if self.key is None else self.key.partition("-")[0]


class _Found(NamedTuple):
    """A record as it was read, and its generation."""

    record: Record
    generation: bytes


class ObjectPlace(StorePlace):
    """A prefix in an object store."""

    def __init__(self, url: str, *, context: ts.Context | None = None, kvstore: Any = None):
        """Opens it. Nothing is read or written.

        Args:
            url: the prefix.
            context: TensorStore's context: credentials, or the contents of `memory://`.
            kvstore: the `KvStore` of the prefix, where a URL cannot tell all: an endpoint.

        Raises:
            CheckpointError: TensorStore cannot use the URL, or cannot write there.
        """
        if url.startswith(("http://", "https://")):
            raise CheckpointError(f"{url}: web servers can only be read from; keep a store in a folder, s3:// or gs://")
        self.root: str = url.rstrip("/")
        self._kv = kvstore or open_kvstore(f"{self.root}/", context)
        self._honours_conditions = False  # until it is tried

    def exists(self) -> bool:
        return bool(self._list("models/"))

    def names(self) -> list[str]:
        found = {key.split("/")[1] for key in self._list("models/") if key.count("/") > 1}
        return sorted(name for name in found if re.fullmatch(NAME, name, re.ASCII))

    def current(self, name: str) -> str | None:
        return self._head(name).key

    def records(self, name: str) -> list[Record]:
        return [found.record for found in self._found(name)]

    def where(self, name: str, key: str) -> str:
        return f"{self.root}/{self._model(name)}versions/{key}"

    def holds(self, name: str, key: str) -> bool:
        return self._look(name, key) is not None

    def faults(self, name: str, record: Record) -> list[tuple[str, str]]:
        return self._faults(name, record, contents=True)

    def parent(self, path: str) -> str | None:
        match = re.match(rf"{re.escape(self.root)}/models/({NAME})/versions/({COMMIT})-", path, re.ASCII)
        return f"{match[1]}@{match[2]}" if match else None

    def begin(self, name: str) -> str | None:
        self._settle(name)
        return self._head(name).commit

    @contextlib.contextmanager
    def workplace(self, name: str) -> Iterator[Path]:
        with as_checkpoint_error(f"write to {tempfile.gettempdir()}"):
            folder = Path(tempfile.mkdtemp(prefix="jaxmerge-"))
        try:
            yield folder
        finally:
            remove(folder)

    def commit(self, name: str, draft: Draft, expected: str | None) -> Record:
        key = f"{draft.commit}-{secrets.token_hex(8)}"
        try:
            return self._commit(name, draft, key, expected)
        except BaseException as error:
            left = None
            with contextlib.suppress(CheckpointError):
                left = self._abandon(name, key)
            if not isinstance(error, CheckpointError):
                raise
            if left is not None and left.state == "COMMITTED":
                return left
            if left is not None:  # the request that failed may still arrive
                raise CheckpointError(
                    f"{error}. All of {name}@{draft.commit} is uploaded: recover() makes it current, unless another "
                    "version is current by then"
                ) from error
            kept = Path(tempfile.mkdtemp(prefix="jaxmerge-")) / draft.folder.name
            os.rename(draft.folder, kept)
            raise CheckpointError(f"{error}. What was to be committed is complete, and kept in {kept}") from error

    def recover(self, name: str, patience: float) -> list[str]:
        # First the versions, then the records: what has none by then has lost it before.
        versions = {key.split("/")[3] for key in self._list(f"{self._model(name)}versions/")}
        done = self._settle(name)
        for found in self._found(name):
            versions.discard(found.record.key)
            age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(found.record.finished)
            if found.record.state != "PENDING" or age.total_seconds() < patience:
                continue
            if self._change(name, found, "REMOVED"):
                self._delete(name, found.record.key)
                done.append(f"{name}: an unfinished version was removed")
        for key in sorted(versions):
            self._delete(name, key)
            done.append(f"{name}: objects that belong to no version were removed")
        return done

    def discard(self, name: str, commit: str) -> bool:
        removed = False
        for found in self._found(name):
            key = found.record.key
            if found.record.commit != commit or found.record.state != "COMMITTED" or self._head(name).key == key:
                continue
            if self._change(name, found, "REMOVED"):
                self._delete(name, key)
                removed = True
        return removed

    def _commit(self, name: str, draft: Draft, key: str, expected: str | None) -> Record:
        uploaded = False
        while True:  # again only when somebody else has changed something
            self._settle(name, but=key)
            head = self._head(name)
            others = {x.record.key: x for x in self._found(name)}
            own, current = others.pop(key, None), others.get(head.key or "")
            if own is not None and own.record.state == "COMMITTED":
                return own.record
            if current is not None and current.record.state != "COMMITTED":
                continue
            same = [x for x in others.values() if (x.record.commit, x.record.state) == (draft.commit, "COMMITTED")]
            same = [x for x in same if self._is_whole(name, x.record)]
            if current is not None and current in same:
                self._clear(name, own)
                return current.record
            if head.commit != draft.commit:  # otherwise the current version is damaged, and this one repairs it
                self.check_expected(name, expected, head.commit)
            if same:
                if self._change(name, same[0], "AGAIN", replaces=head.text) and self._finish(
                    name, same[0].record.key, ours=True
                ):
                    self._clear(name, own)
                    return same[0].record
            elif not uploaded:
                self._upload(name, draft, key)
                uploaded = True
            elif own is None or own.record.state == "REMOVED":
                raise ConflictError(self._removed(name, draft.commit))
            else:
                number = 1 + max((x.record.number for x in others.values()), default=0)
                told = {"number": number, "finished": now(), "previous": head.commit, "replaces": head.text}
                if self._change(name, own, "PREPARED", **told) and self._finish(name, key, ours=True):
                    with contextlib.suppress(CheckpointError):
                        self.discard(name, draft.commit)  # a damaged copy
                    return dataclasses.replace(own.record, state="COMMITTED", **told)

    def _upload(self, name: str, draft: Draft, key: str) -> None:
        """Writes the record, and then all files."""
        files: dict[str, tuple[int, str | None]] = {}
        for path in (draft.folder / file for file in (*draft.files, *([] if draft.manifest is None else [MANIFEST]))):
            files[str(path.relative_to(draft.folder))] = path.stat().st_size, sha256_of(path)
        for file, (size, _) in files.items():
            if size > MAX_OBJECT_BYTES:
                raise CheckpointError(
                    f"{self.root}: {file} is {size} bytes long, and one upload has at most {MAX_OBJECT_BYTES}; pass "
                    "max_shard_bytes to merge_checkpoint"
                )
        record = Record("PENDING", draft.commit, draft.manifest, {}, 0, now(), None, draft.parents, folder=key)
        place = self._record(name, key)
        self._swap(place, record.content(), self._read(place)[1])
        if (found := self._look(name, key)) is None or not self._change(name, found, "PENDING", files=files):
            raise ConflictError(self._removed(name, draft.commit))
        # Now that it was changed, it can never again be as it was found.
        content = dataclasses.replace(record, files=files).content()
        if not self._honours_conditions and self._write(place, content, found.generation):
            raise CheckpointError(
                f"{self.root}: the server does not honour conditional writes, so two writers could overwrite each "
                "other; keep the store elsewhere"
            )
        self._honours_conditions = True
        upload_folder(draft.folder, self.where(name, key), self._kv, f"{self._model(name)}versions/{key}/")

    def _settle(self, name: str, but: str | None = None) -> list[str]:
        """Finishes or removes what is prepared, and completes what is removed."""
        done = []
        for found in self._found(name):
            record, label = found.record, f"{name}@{found.record.commit}"
            if record.key == but:
                continue
            if record.state == "REMOVED":
                self._delete(name, record.key)
                done.append(f"{label} was removed")
            elif record.state in ("PREPARED", "AGAIN"):
                committed = self._finish(name, record.key)
                done.append(
                    f"{label} stays a former version"
                    if record.state == "AGAIN" and not committed
                    else settled(label, committed)
                )
        return done

    def _finish(self, name: str, key: str, *, ours: bool = False) -> bool:
        """Takes a version that is PREPARED or AGAIN through the remaining steps. May be done again at any point.

        Args:
            name: the model.
            key: the version.
            ours: it is this transaction's, so its objects have been checked, and it is done when HEAD is set.

        Returns:
            Whether HEAD has been set to it. If not, it was removed or is a former version again, or others have
            finished it meanwhile.
        """
        while (found := self._look(name, key)) is not None and found.record.state in ("PREPARED", "AGAIN"):
            record, head = found.record, self._head(name)
            if head.key != key:
                if head.text != record.replaces or not (ours or self._is_whole(name, record)):
                    state = "COMMITTED" if record.state == "AGAIN" else "REMOVED"
                    if not self._change(name, found, state):
                        continue
                    if state == "REMOVED":
                        self._delete(name, key)
                    return False
                text = f"{key} {secrets.token_hex(8)}\n"
                if not self._swap(f"{self._model(name)}HEAD", text.encode(), head.generation):
                    continue
            with contextlib.suppress(*([CheckpointError] if ours else [])):
                self._change(name, found, "COMMITTED")  # unless others have done so
            return True
        return False

    def _abandon(self, name: str, key: str) -> Record | None:
        """Removes a version of ours that is not committed; otherwise, or if that is not certain, gives its record."""
        while (found := self._look(name, key)) is not None:
            record = found.record
            if record.state == "COMMITTED":
                return record
            if record.state == "PREPARED":
                head = self._head(name)
                if head.key == key:
                    return dataclasses.replace(record, state="COMMITTED")
                if head.text == record.replaces:
                    return record
            if record.state == "REMOVED" or self._change(name, found, "REMOVED"):
                break
        self._delete(name, key)
        return None

    def _clear(self, name: str, own: _Found | None) -> None:
        """Removes a version of ours that is not needed; `recover` does what cannot be done now."""
        with contextlib.suppress(CheckpointError):
            if own is not None:
                self._abandon(name, own.record.key)

    def _delete(self, name: str, key: str) -> None:
        """Deletes the objects of a version that is REMOVED, and its record after them."""
        for group in (self._list(f"{self._model(name)}versions/{key}/"), [self._record(name, key)]):
            deleting = [(self._kv.write(place, None), place) for place in group]
            for request, place in deleting:
                wait(request, f"{self.root}/{place}", "delete")

    def _removed(self, name: str, commit: str) -> str:
        return (
            f"{self.root}: {name}@{commit} was removed while it was uploaded, because its writer was taken for dead; "
            "begin again"
        )

    def _is_whole(self, name: str, record: Record) -> bool:
        return not self._faults(name, record, contents=False)

    def _faults(self, name: str, record: Record, *, contents: bool) -> list[tuple[str, str]]:
        """What is wrong in a version: name and problem. Contents are read only if they are asked for."""
        prefix = f"{self._model(name)}versions/{record.key}/"
        there = {key.removeprefix(prefix) for key in self._list(prefix)}
        if not there:
            return [("", "its objects are missing")]
        found = [(file, "was added") for file in sorted(there - record.files.keys())]
        for file, (size, sha256) in record.files.items():
            source = KvSource(self._kv, f"{prefix}{file}", ByteCounter())
            if file not in there:
                found.append((file, "is missing"))
            elif not source.ends_at(size):
                found.append((file, f"is not {size} bytes long, which were written"))
            elif contents and _sha256(source, size) != sha256:
                found.append((file, "has other bytes than were written"))
        return found

    def _model(self, name: str) -> str:
        check_name(name)
        return f"models/{name}/"

    def _record(self, name: str, key: str) -> str:
        return f"{self._model(name)}commits/{key}.json"

    def _head(self, name: str) -> _Head:
        place = f"{self._model(name)}HEAD"
        content, generation = self._read(place)
        if content is None:
            return _Head("", None, generation)
        text = content.decode(errors="replace")
        if not (match := re.fullmatch(rf"({_KEY}) [0-9a-f]{{16}}\n", text)):
            raise CheckpointError(f"{self.root}/{place} is damaged: found {text!r:.60}, expected one of versions/")
        return _Head(text, match[1], generation)

    def _found(self, name: str) -> list[_Found]:
        """The records, as they are. Those that are made or deleted meanwhile may be among them or not."""
        places = [key for key in self._list(f"{self._model(name)}commits/") if key.endswith(".json")]
        reading = [(place, self._kv.read(place)) for place in places]
        return [found for place, request in reading if (found := self._found_at(place, request)) is not None]

    def _look(self, name: str, key: str) -> _Found | None:
        place = self._record(name, key)
        return self._found_at(place, self._kv.read(place))

    def _found_at(self, place: str, request: Any) -> _Found | None:
        found = wait(request, f"{self.root}/{place}")
        if found.state != "value":
            return None
        return _Found(Record.load(found.value, f"{self.root}/{place}"), found.stamp.generation)

    def _change(self, name: str, found: _Found, state: str, **changes: Any) -> bool:
        """Changes a record, if it is as it was found."""
        record = dataclasses.replace(found.record, state=state, **changes)
        return self._swap(self._record(name, record.key), record.content(), found.generation)

    def _read(self, place: str) -> tuple[bytes | None, bytes]:
        """A small object, None if there is none, and its generation."""
        found = wait(self._kv.read(place), f"{self.root}/{place}")
        return (found.value if found.state == "value" else None), found.stamp.generation

    def _swap(self, place: str, content: bytes, generation: bytes) -> bool:
        """Writes a small object if it is as it was."""
        # A request whose answer was lost is made again, and then finds its own work. No two changes have one content,
        # unless they mean the same.
        return self._write(place, content, generation) or self._read(place)[0] == content

    def _write(self, place: str, content: bytes, generation: bytes) -> bool:
        request = self._kv.write(place, content, if_equal=generation)
        return bool(wait(request, f"{self.root}/{place}", "write to").generation)

    def _list(self, prefix: str) -> list[str]:
        import tensorstore as ts

        within = ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord("/") + 1))
        return sorted(key.decode() for key in wait(self._kv.list(within), f"{self.root}/{prefix}"))


def _sha256(source: KvSource, size: int) -> str:
    found, buffer = hashlib.sha256(), np.empty(min(size, _READ_BYTES), np.uint8)
    for start in range(0, size, _READ_BYTES):
        piece = buffer[: min(_READ_BYTES, size - start)]
        source.read_into(start, piece)
        found.update(piece.data)
    return found.hexdigest()
