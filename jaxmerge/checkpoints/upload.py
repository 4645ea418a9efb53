"""Uploading a finished checkpoint to an object store, in such an order that no reader takes half of it for a whole one.

Object stores have no rename. What they have is a write on condition that an object is as it was when it was looked at,
and readers begin with one certain object: the index of the shards, `model.safetensors` or the description of an Orbax
tree, the *opener*. A folder is therefore uploaded like this:

1. A *claim* is put in the opener's place: a few bytes that open as nothing, with a number of this upload's own. From
   here until step 4 there is nothing to open.
2. Openers of other layouts are replaced by the claim, so that nobody can complete them any more, and removed. So is
   the manifest of what stood there before.
3. All other objects are written. Before each one is written, it is looked at, then it is made sure that the claim still
   stands, and then it is written on condition that nobody else has written it since. So an upload that has lost its
   claim cannot change an object of the one that took it.
4. The opener takes the place of the claim, on condition that it is still this upload's.

A later upload takes over a claim, because nothing tells whether the earlier one still runs; the earlier one notices.
A single file is one object, and needs only one conditional write.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxmerge.checkpoints.publish import as_checkpoint_error
from jaxmerge.checkpoints.stores import PIECE_BYTES, SECONDS_PER_REQUEST, open_kvstore, wait
from jaxmerge.errors import CheckpointError, ConflictError

if TYPE_CHECKING:
    import tensorstore as ts

SHARD_BYTES = 256 << 20
"""Size of the files that a safetensors folder is split into: TensorStore writes an object whole, from memory."""

MAX_OBJECT_BYTES = 5 << 30
"""The largest object: S3 takes no more in one request, and TensorStore makes one request for each."""

OBJECTS_AT_ONCE = 8
"""Objects that are on their way at the same time."""

BYTES_AT_ONCE = 64 << 20
"""What they may hold together; a larger one travels alone."""

_SLOWEST = 256 << 10  # bytes per second: what a connection does at least, before an upload is given up
_TRIES = 5  # to write an object that somebody else writes as well

_MANIFEST = "jaxmerge.json"
_OPENERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    *(f"{folder}_METADATA" for folder in ("", "state/", "default/", "params/")),
)
_ORBAX_FOLDERS = ("state/", "default/", "params/")

_CLAIM = b'{"jaxmerge": "a checkpoint is being uploaded here", "upload": "%s"}'
_CLAIM_BYTES = len(_CLAIM) - 2 + 32


class _Found(NamedTuple):
    """What stands under a key: its generation, whether there is anything, and the claim if it is one."""

    generation: bytes
    exists: bool
    claim: bytes | None = None


class Place:
    """Where in an object store a checkpoint is to appear.

    Attributes:
        url: as the user gave it.
        name: of the folder or file.
        is_folder: which of both.
    """

    def __init__(
        self,
        url: str,
        *,
        is_folder: bool,
        overwrite: bool = False,
        context: ts.Context | None = None,
        kvstore: Any = None,
    ):
        """Opens it. Nothing is written.

        Args:
            url: a folder or a file.
            is_folder: which of both.
            overwrite: what stands there is replaced.
            context: TensorStore's context: credentials, or the contents of `memory://`.
            kvstore: the `KvStore` of the folder (that the file is in), where a URL cannot tell all: an endpoint.

        Raises:
            CheckpointError: TensorStore cannot use the URL, or cannot write there.
        """
        self.url = url.rstrip("/")
        parent, _, self.name = self.url.rpartition("/")
        if url.startswith(("http://", "https://")):
            raise CheckpointError(f"{url}: web servers can only be read from; write to a local path, s3:// or gs://")
        if parent.endswith(":/") or not self.name:
            raise CheckpointError(
                f"{url} is no place in a bucket; name a folder or file in it, such as {self.url}/NAME"
            )
        self.is_folder, self._overwrite = is_folder, overwrite
        self._kv = kvstore or open_kvstore(f"{self.url if is_folder else parent}/", context)

    def check(self) -> None:
        """Checks that nothing stands there, or that it may be replaced.

        Raises:
            ConflictError: a checkpoint is there.
            CheckpointError: the store does not answer.
        """
        for key in _OPENERS if self.is_folder else (self.name,):
            self._refuse(self._look(key))

    def upload(self, output: Path, display: Any = None) -> None:
        """Uploads a finished checkpoint.

        Args:
            output: the local folder or file.
            display: is told of the progress by `begin(what, bytes)` and `advance(bytes)`.

        Raises:
            ConflictError: a checkpoint is there, or somebody else uploads to the same place.
            CheckpointError: an object cannot be written.
        """
        if not self.is_folder:
            self._upload_file(output, display)
            return
        files = _sizes(output)
        opener = next(key for key in reversed(_OPENERS) if key in files)  # an index rather than the only file
        if display is not None:
            display.begin(f"upload to {self.url}", sum(files.values()))
        claim = self._claim(opener)
        self._clear(opener, files, claim)

        def send(key: str) -> None:
            self._put(key, _content(output / key), opener, claim)
            if display is not None:
                display.advance(files[key])

        # The manifest when all it tells of is there.
        _send_all({key: size for key, size in files.items() if key not in (opener, _MANIFEST)}, send)
        if _MANIFEST in files:
            send(_MANIFEST)
        content = _content(output / opener)
        found = self._look(opener)
        if found.claim != claim:
            raise ConflictError(self._lost())
        # Two uploads may have the same opener, so it does not tell whose it is when the condition does not hold.
        if not self._wait(self._kv.write(opener, content, if_equal=found.generation), opener, len(content)).generation:
            raise ConflictError(f"{self._lost()} (or the answer to the last request was lost: look what is there)")
        if display is not None:
            display.advance(files[opener])

    def _upload_file(self, output: Path, display: Any) -> None:
        content = _content(output)
        if display is not None:
            display.begin(f"upload to {self.url}", len(content))
        found = self._look(self.name)
        self._refuse(found)
        if not self._write(self.name, content, found.generation):
            raise ConflictError(self._lost())
        if display is not None:
            display.advance(len(content))

    def _claim(self, opener: str) -> bytes:
        """Puts a claim in the place of the opener, and returns it."""
        self.check()
        found = self._look(opener)
        self._refuse(found)
        claim = _CLAIM % secrets.token_hex(16).encode()
        if not self._write(opener, claim, found.generation):
            raise ConflictError(self._lost())
        return claim

    def _clear(self, opener: str, files: dict[str, int], claim: bytes) -> None:
        """Removes what would be taken for a part of the new checkpoint.

        That is openers and an old manifest; with `overwrite` all other objects of the former checkpoint as well.
        """
        # Others may have claimed an opener of another layout meanwhile. Looking comes after claiming, so one of two
        # uploads sees the other.
        for key in _OPENERS:
            if key == opener:
                continue
            found = self._look(key)
            try:
                self._refuse(found)
                # Removing is not one step on S3, writing on a condition is.
                if found.exists and not (
                    self._holds_claim(opener, claim) and self._write(key, claim, found.generation)
                ):
                    raise ConflictError(self._lost())
            except ConflictError:  # somebody else has completed a checkpoint, which our claim must not hide
                mine = self._look(opener)
                if mine.claim == claim:
                    self._wait(self._kv.write(opener, None, if_equal=mine.generation), opener)
                raise
            if found.exists:
                found = self._look(key)
                if found.claim == claim:
                    self._wait(self._kv.write(key, None, if_equal=found.generation), key)
        stale = [] if _MANIFEST in files else [_MANIFEST]
        if self._overwrite:
            listed = [key.decode() for key in self._wait(self._kv.list(), self.url)]
            ours = [key for key in listed if "/" not in key or key.startswith(_ORBAX_FOLDERS)]
            stale = [key for key in ours if key not in files and key not in _OPENERS]
        for key in stale:
            self._put(key, None, opener, claim)

    def _put(self, key: str, content: bytes | None, opener: str, claim: bytes) -> None:
        """Writes an object while the claim stands; None removes it."""
        for _ in range(_TRIES):
            found = self._look(key)
            if not self._holds_claim(opener, claim):
                raise ConflictError(self._lost())
            if (content is None and not found.exists) or self._write(key, content, found.generation):
                return
        raise ConflictError(self._lost())

    def _holds_claim(self, opener: str, claim: bytes) -> bool:
        return self._look(opener).claim == claim

    def _look(self, key: str) -> _Found:
        found = self._wait(self._kv.read(key, byte_range=slice(0, 0)), key)
        if found.state != "value" or key not in _OPENERS:
            return _Found(found.stamp.generation, found.state == "value")
        try:
            found = self._wait(self._kv.read(key, byte_range=slice(0, _CLAIM_BYTES)), key)
        except CheckpointError as error:
            if "OUT_OF_RANGE" not in str(error):
                raise
            return _Found(found.stamp.generation, True)  # it is shorter
        if found.state != "value":  # removed meanwhile
            return _Found(found.stamp.generation, False)
        is_claim = found.value.startswith(_CLAIM.partition(b"%s")[0])
        return _Found(found.stamp.generation, True, found.value if is_claim else None)

    def _refuse(self, found: _Found) -> None:
        if found.exists and found.claim is None and not self._overwrite:
            raise ConflictError(f"{self.url} exists already; remove it, choose another name or pass overwrite=True")

    def _write(self, key: str, content: bytes | None, generation: bytes) -> bool:
        """Writes or removes an object if it is as it was; false if it is not."""
        stamp = self._wait(self._kv.write(key, content, if_equal=generation), key, len(content or b""))
        # A request whose answer was lost is made again, and then finds its own work.
        return bool(stamp.generation) or (content is not None and self._holds(key, content))

    def _holds(self, key: str, content: bytes) -> bool:
        try:
            for start in range(0, max(len(content), 1), PIECE_BYTES):
                piece = content[start : start + PIECE_BYTES]
                found = self._wait(self._kv.read(key, byte_range=slice(start, start + len(piece))), key)
                if found.state != "value" or found.value != piece:
                    return False
        except CheckpointError as error:
            if "OUT_OF_RANGE" not in str(error):
                raise
            return False
        return True

    def _wait(self, request: Any, key: str, nbytes: int = 0) -> Any:
        where = f"{self.url}/{key}" if self.is_folder and key != self.url else self.url
        return wait(request, where, "write to", SECONDS_PER_REQUEST + nbytes / _SLOWEST)

    def _lost(self) -> str:
        return f"{self.url} is being written by somebody else; wait until that is complete, or choose another name"


def upload_folder(output: Path, url: str, kvstore: Any, prefix: str) -> None:
    """Uploads a folder to where nobody else writes, in any order. Until that is done, nobody may be told of the place.

    Args:
        output: the local folder.
        url: where, for messages.
        kvstore: the `KvStore`.
        prefix: of the keys in it, with a slash at its end.

    Raises:
        CheckpointError: an object cannot be written.
    """
    files = _sizes(output)

    def send(key: str) -> None:
        request = kvstore.write(f"{prefix}{key}", _content(output / key))
        wait(request, f"{url}/{key}", "write to", SECONDS_PER_REQUEST + files[key] / _SLOWEST)

    _send_all(files, send)


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def _send_all(files: dict[str, int], send: Callable[[str], None]) -> None:
    """Sends files, large ones first, several at once."""
    gate = _Gate(BYTES_AT_ONCE)

    def hold_and_send(key: str) -> None:
        with gate.holding(files[key]):
            send(key)

    with ThreadPoolExecutor(OBJECTS_AT_ONCE, "jaxmerge-upload") as threads:
        sent = [threads.submit(hold_and_send, key) for key in sorted(files, key=lambda key: -files[key])]
        try:
            for done in as_completed(sent):
                done.result()
        except BaseException:
            for waiting in sent:
                waiting.cancel()
            raise


def _content(path: Path) -> bytes:
    with as_checkpoint_error(f"read {path}"):
        return path.read_bytes()


class _Gate:
    """Lets so many bytes through at once, and what is larger alone."""

    def __init__(self, capacity: int):
        self._capacity, self._held = capacity, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def holding(self, n: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + n <= self._capacity)
            self._held += n
        try:
            yield
        finally:
            with self._changed:
                self._held -= n
                self._changed.notify_all()
