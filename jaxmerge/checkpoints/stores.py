"""Where bytes come from: local files and, through TensorStore's key-value stores, URLs.

A `Store` is a folder of files, a `ByteSource` one file of it. Only ranges that are asked for are read, and a
`ByteCounter` counts them. Local files are read by `preadv` straight into the caller's memory; URLs in pieces, several
at once, each with a time limit (TensorStore's http driver repeats a failing request for a very long time).

A source is one file in one state. When the file has changed since it was opened, or another one stands in its place,
reading fails: bytes of two states must not end up in one model.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
import json
import os
import re
import threading
import urllib.parse
import urllib.request
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmerge.errors import CheckpointError

if TYPE_CHECKING:
    import tensorstore as ts

PIECE_BYTES = 4 << 20
"""Size of one request to a URL."""

REQUESTS_AT_ONCE = 8
"""Requests to a URL that one read has under way at the same time."""

SECONDS_PER_REQUEST = 60.0
"""How long one request to a URL may take."""

MAX_SMALL_FILE_BYTES = 256 << 20
"""Files that are read whole (indices, tokenizers) are not longer than this."""


_HEAD_BYTES = 64 << 10  # of a file that its state tells


class ByteCounter:
    """A number of bytes that several threads add to."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, n: int) -> None:
        with self._lock:
            self.total += n


class ByteSource(abc.ABC):
    """A file of which ranges can be read, from several threads at once.

    Attributes:
        label: its name, for messages.
        gap: ranges that are at most so many bytes apart are better read as one, the gap included.
        size: its length in bytes.
        path: where it can be opened again; None for what is no file of its own, and behind URLs.
    """

    path: str | None = None
    label: str
    gap: int
    size: int

    @abc.abstractmethod
    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fills `out` (1-D uint8) with the bytes from `offset` on.

        Raises:
            CheckpointError: the file is shorter, cannot be read, or was changed since it was opened.
        """

    @abc.abstractmethod
    def ends_at(self, offset: int) -> bool:
        """Whether the file is exactly `offset` bytes long."""

    def state(self) -> Any:
        """What changes when the file does, as plain data; None where that cannot be known.

        Raises:
            CheckpointError: the file cannot be read.
        """
        return None

    def read(self, offset: int, n: int) -> bytes:
        """The `n` bytes from `offset` on. Only for sizes that a file is known to have or that are small."""
        out = np.empty(n, np.uint8)
        self.read_into(offset, out)
        return out.tobytes()

    def close(self) -> None:  # noqa: B027 – most sources hold nothing
        """Frees what the source holds. Reading afterwards is an error."""


class FileSource(ByteSource):
    """A local file."""

    gap = 0

    def __init__(self, path: Path, counter: ByteCounter):
        self.label, self._path, self._counter = path.name, path.absolute(), counter
        self.path = str(self._path)
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._closer = weakref.finalize(self, os.close, self._fd)
        opened = os.fstat(self._fd)
        self.size, self._identity = opened.st_size, _identity(opened)

    def read_into(self, offset: int, out: np.ndarray) -> None:
        done = 0
        while done < out.size:
            try:
                n = os.preadv(self._fd, [out[done:].data], offset + done)
            except OSError as error:
                closed = not self._closer.alive
                reason = "the checkpoint was closed; open it again" if closed else str(error)
                raise CheckpointError(f"cannot read {self.label}: {reason}") from error
            if n == 0:
                raise CheckpointError(
                    f"{self.label} ends at byte {offset + done}, but bytes up to {offset + out.size} were expected; "
                    "it is truncated: download or write it again"
                )
            done += n
        self._counter.add(out.size)
        self._check_unchanged()

    def ends_at(self, offset: int) -> bool:
        return self.size == offset

    def state(self) -> Any:
        """Size, time of the last change in nanoseconds and a hash of the first bytes, of the file that is open."""
        found, head = os.fstat(self._fd), os.pread(self._fd, _HEAD_BYTES, 0)
        return [found.st_size, found.st_mtime_ns, hashlib.sha256(head).hexdigest()]

    def _check_unchanged(self) -> None:
        """Checks that the file at the path is the one that is open, as it was then. One call: small reads are many."""
        try:
            now = os.stat(self._path)
        except OSError:  # moved or removed: what is open lives on
            now = os.fstat(self._fd)
        if _identity(now) != self._identity:
            raise CheckpointError(_changed(str(self._path)))

    def close(self) -> None:
        self._closer()
        self._fd = -1


class KvSource(ByteSource):
    """A value of a TensorStore key-value store."""

    gap = 64 << 10

    def __init__(self, kv: ts.KvStore, key: str, counter: ByteCounter):
        self.label, self._kv, self._key, self._counter = key, kv, key, counter
        self._generation: bytes | None = None  # of the value, as the first answer tells it

    def read_into(self, offset: int, out: np.ndarray) -> None:
        starts = range(0, out.size, PIECE_BYTES)
        pending: list[Any] = []
        for i, start in enumerate(starts):
            for ahead in starts[i + len(pending) : i + REQUESTS_AT_ONCE]:
                end = min(ahead + PIECE_BYTES, out.size)
                pending.append(self._kv.read(self._key, byte_range=slice(offset + ahead, offset + end)))
            value = self._answer(pending.pop(0), f"{self.label}, bytes {offset + start} and on")
            n = min(PIECE_BYTES, out.size - start)
            if value is None or len(value) != n:
                found = "nothing" if value is None else f"{len(value)} bytes"
                raise CheckpointError(f"{self.label}: {found} at byte {offset + start}, {n} bytes were expected")
            out[start : start + n] = np.frombuffer(value, np.uint8)
            self._counter.add(n)

    def ends_at(self, offset: int) -> bool:
        return (offset == 0 or bool(self.byte_at(offset - 1))) and not self.byte_at(offset)

    @functools.cached_property
    def size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        # Key-value stores do not tell how long a value is; some sixty one-byte requests do.
        high = 1
        while self.byte_at(high - 1):
            high *= 2
        low = high // 2  # the size is one of low ... high - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.byte_at(middle - 1) else (low, middle)
        return low

    def byte_at(self, position: int) -> bytes | None:
        """The byte at a position: empty past the end, None when there is no such key at all."""
        try:
            return self._answer(self._kv.read(self._key, byte_range=slice(position, position + 1)), self.label)
        except CheckpointError as error:
            if "OUT_OF_RANGE" in str(error):
                return b""
            raise

    def state(self) -> Any:
        """The generation or tag that the server gives; None if it gives none."""
        generation = wait(self._kv.read(self._key, byte_range=slice(0, 1)), self.label).stamp.generation
        return generation.hex() if _tells(generation) else None

    def _answer(self, request: Any, what: str) -> bytes | None:
        """The bytes that a request gives, None when there is no such key; all must be of one generation."""
        result = wait(request, what)
        if result.state != "value":
            return None
        generation = result.stamp.generation
        if self._generation is None:
            self._generation = generation
        elif generation != self._generation and _tells(generation) and _tells(self._generation):
            raise CheckpointError(_changed(self.label))
        return result.value


class Store(abc.ABC):
    """A folder of files.

    Attributes:
        path: its path or URL, as the user knows it.
        counter: counts the bytes that its sources read.
        context: TensorStore's context for it.
    """

    path: str
    context: ts.Context | None = None

    def __init__(self) -> None:
        self.counter = ByteCounter()
        self._sources: list[ByteSource] = []

    def source(self, key: str) -> ByteSource | None:
        """The file `key`, or None when there is no such file. It is open until the store is closed."""
        source = self._open(key)
        if source is not None:
            self._sources.append(source)
        return source

    def close(self) -> None:
        """Closes all sources."""
        for source in self._sources:
            source.close()

    @abc.abstractmethod
    def _open(self, key: str) -> ByteSource | None:
        """The file `key`, or None when there is no such file."""

    @abc.abstractmethod
    def kvstore_spec(self, subfolder: str) -> dict[str, Any] | str:
        """A folder in this one, "" or with a slash at its end, as TensorStore knows it."""

    def state(self) -> Any:
        """What changes when a file in the folder does, as plain data; None where that cannot be known."""
        return None

    @abc.abstractmethod
    def names(self) -> list[str] | None:
        """The names of its files, sorted; None where folders cannot be listed."""

    @abc.abstractmethod
    def read_file(self, key: str) -> bytes | None:
        """A whole small file, or None when there is none.

        Raises:
            CheckpointError: it is longer than `MAX_SMALL_FILE_BYTES`, or cannot be read.
        """


class FileStore(Store):
    """A local folder."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.path = folder, str(folder)

    def _open(self, key: str) -> ByteSource | None:
        path = self.folder / key
        with _readable(path):
            return FileSource(path, self.counter) if path.is_file() else None

    def read_file(self, key: str) -> bytes | None:
        source = self._open(key)
        if source is None:
            return None
        try:
            _check_small(source.size, f"{self.path}/{key}")
            return source.read(0, source.size)
        finally:
            source.close()

    def kvstore_spec(self, subfolder: str) -> dict[str, Any] | str:
        return {"driver": "file", "path": f"{self.folder.absolute()}/{subfolder}"}

    def state(self) -> Any:
        """Path, size and time of the last change of every file in it and below."""
        states = []
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                states.append([str(path.relative_to(self.folder)), found.st_size, found.st_mtime_ns])
        return states

    def names(self) -> list[str] | None:
        with _readable(self.folder):
            return sorted(entry.name for entry in self.folder.iterdir() if entry.is_file())


class UrlStore(Store):
    """A folder behind a URL that TensorStore knows: http(s), gs, s3, memory."""

    def __init__(self, url: str, context: ts.Context | None):
        import tensorstore as ts

        super().__init__()
        self.path = url.rstrip("/")
        self.context = context or ts.Context()
        self._kv = open_kvstore(url, self.context)

    def _open(self, key: str) -> ByteSource | None:
        source = KvSource(self._kv, key, self.counter)
        return None if source.byte_at(0) is None else source

    def read_file(self, key: str) -> bytes | None:
        content = _value(self._kv.read(key), f"{self.path}/{key}")
        if content is not None:
            _check_small(len(content), f"{self.path}/{key}")
            self.counter.add(len(content))
        return content

    def kvstore_spec(self, subfolder: str) -> dict[str, Any] | str:
        return self._kv.url + urllib.parse.quote(subfolder)

    def names(self) -> list[str] | None:
        try:
            keys = wait(self._kv.list(), self.path)
        except CheckpointError as error:
            if isinstance(error.__cause__, NotImplementedError):
                return None
            raise
        return sorted(key.decode() for key in keys if b"/" not in key)


def open_kvstore(url: str, context: ts.Context | None) -> ts.KvStore:
    """The folder behind a URL, with a slash at its end.

    Raises:
        CheckpointError: TensorStore cannot use the URL.
    """
    import tensorstore as ts

    try:
        opening = ts.KvStore.open(url, context=context or ts.Context())
    except ValueError as error:
        raise CheckpointError(f"cannot read {url}: {error}") from error
    return wait(opening, url)


def local_path(location: str | Path) -> str | Path:
    """The path that a `file://` URL means; anything else as it is."""
    url = str(location)
    if url.startswith("file://"):
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
    return location


def open_store(location: str | Path, context: ts.Context | None) -> tuple[Store, str]:
    """The folder that a location is (with the key ""), or the folder and the key of the file that it is.

    Args:
        location: a local path, a `file://` URL, or another URL; URLs of folders need no trailing slash.
        context: TensorStore's context for URLs (credentials, the contents of `memory://`).

    Raises:
        CheckpointError: there is no such local path, or TensorStore cannot use the URL.
    """
    location = local_path(location)
    url = str(location)
    if "://" in url:
        folder, _, name = url.rstrip("/").rpartition("/")
        if re.search(r"\.(safetensors|npz)$", name):
            return UrlStore(f"{folder}/", context), name
        return UrlStore(f"{url.rstrip('/')}/", context), ""
    path = Path(location).expanduser()
    with _readable(path):
        if path.is_dir():
            return FileStore(path), ""
        if path.is_file():
            return FileStore(path.parent), path.name
    raise CheckpointError(f"there is no checkpoint at {path.absolute()}; check the path")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns an `OSError` about a path into a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check its owner and mode") from error


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """Which file it is, and in what state."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _changed(what: str) -> str:
    return f"{what} was changed while it was read, or another one took its place; try again when it is complete"


def _tells(generation: bytes) -> bool:
    """Whether a generation tells one state of a value from another; servers without tags give a single byte."""
    return len(generation) > 1


def _check_small(n: int, what: str) -> None:
    if n > MAX_SMALL_FILE_BYTES:
        raise CheckpointError(f"{what} is {n} bytes long, at most {MAX_SMALL_FILE_BYTES} were expected of such a file")


def _value(request: Any, what: str) -> bytes | None:
    """The bytes that a request for a key gives, None when there is no such key."""
    result = wait(request, what)
    return result.value if result.state == "value" else None


def wait(request: Any, what: str, action: str = "read", seconds: float | None = None) -> Any:
    """The result of a TensorStore request, which may take `SECONDS_PER_REQUEST` or the given time.

    Raises:
        CheckpointError: it failed, or there was no answer in time.
    """
    seconds = seconds or SECONDS_PER_REQUEST
    try:
        return request.result(timeout=seconds)
    except TimeoutError:
        request.cancel()
        raise CheckpointError(
            f"{what}: no answer within {seconds:.0f} s; check the address and the network, and try again"
        ) from None
    except Exception as error:  # TensorStore has no error type of its own
        raise CheckpointError(f"cannot {action} {what}: {error}") from error


def load_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no key is repeated.

    Raises:
        CheckpointError: the text is something else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"{what} has the name {key!r:.200} twice; it is corrupt: write it again")
            result[key] = value
        return result

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is no JSON: {error}; it is corrupt: download or write it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is no JSON object but a {type(value).__name__}; it is corrupt: write it again")
    return value
