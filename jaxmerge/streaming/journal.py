"""The journal: how far a merge has come, so that the next one goes on where a killed one ended.

It is a file in the hidden folder in which the output is built. Its first line names the merge by a digest of all that
the output depends on; each further line names a tensor that is complete, with the hashes of its blocks, and is written
when the tensor is on the disk. A line is a claim, not a proof: before a tensor is taken over, its bytes are hashed
again. So a journal that is behind, or ahead of what the disk really holds, costs work and never changes a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from jaxmerge.checkpoints.layout import Layout
from jaxmerge.checkpoints.publish import as_checkpoint_error, sync
from jaxmerge.checkpoints.writer import JOURNAL, CheckpointWriter
from jaxmerge.streaming.fingerprint import digest

BATCH_BYTES = 256 << 20
"""So many bytes of complete tensors are made durable and noted together."""

BATCH_SECONDS = 5.0
"""Or those that are complete after this time."""

_VERSION = 1
_LARGEST = 1 << 30


class Journal:
    """The journal of one merge; several threads may note what they have finished.

    Attributes:
        merge: digest of all that the output depends on, except its layout.
        finished: what a killed merge noted: tensor → SHA-256 of its blocks. Empty unless it was the same merge.
    """

    def __init__(self, merge: str):
        self.merge = merge
        self.finished: dict[str, tuple[str, ...]] = {}
        self._header, self._intact = "", 0
        self._writer: CheckpointWriter | None = None
        self._file: int | None = None
        self._lock, self._write_lock = threading.Lock(), threading.Lock()
        self._waiting: dict[str, tuple[str, ...]] = {}
        self._bytes, self._since = 0, 0.0

    def resume(self, folder: Path, layout: Layout) -> bool:
        """Whether a folder is what a killed writer of the same merge left; other things in it are removed then.

        Args:
            folder: the hidden folder.
            layout: what is to be written.
        """
        self._header = digest([self.merge, _as_data(layout)])
        try:
            self.finished, self._intact = self._read(folder / JOURNAL)
            same = all((folder / name).stat().st_size == planned.size for name, planned in layout.files.items())
            if not same or any((folder / name).is_symlink() for name in layout.files):
                raise ValueError("other files")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            self.finished, self._intact = {}, 0
            return False
        _keep_only(folder, {JOURNAL, *layout.files})
        return True

    def begin(self, writer: CheckpointWriter) -> None:
        """Begins to note, or goes on if the writer does.

        Raises:
            CheckpointError: the file cannot be written.
        """
        with as_checkpoint_error(f"write {writer.path}"):
            self._file = os.open(writer.folder / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._file, self._intact)  # what follows is a line that was not written to its end
            if not writer.resumed:
                self._append([{"version": _VERSION, "merge": self._header}])
                for folder in (writer.folder, writer.folder.parent):  # lest it have no name after a power cut
                    sync(folder)
        self._writer, self._since = writer, time.monotonic()

    def note(self, tensor: str, blocks: tuple[str, ...]) -> None:
        """Notes that a tensor is complete; some calls first make durable what has come together.

        Args:
            tensor: its name.
            blocks: SHA-256 of its blocks.

        Raises:
            CheckpointError: the disk is full.
        """
        assert self._writer is not None
        with self._lock:
            self._waiting[tensor] = blocks
            self._bytes += self._writer.specs[tensor].nbytes
            now = time.monotonic()
            if self._bytes < BATCH_BYTES and now - self._since < BATCH_SECONDS:
                return
            batch, self._waiting = self._waiting, {}
            self._bytes, self._since = 0, now
        self._writer.sync(batch)
        with self._write_lock, as_checkpoint_error(f"write {self._writer.path}"):
            self._append([{"tensor": name, "blocks": hashes} for name, hashes in batch.items()])

    def close(self) -> None:
        """Closes the file."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _append(self, entries: list[dict]) -> None:
        assert self._file is not None
        data = b"".join(_line(entry) for entry in entries)
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    def _read(self, path: Path) -> tuple[dict[str, tuple[str, ...]], int]:
        """What a journal says, and how many bytes of it are whole lines.

        Raises:
            OSError, ValueError, LookupError, TypeError: there is none, it is of another merge, or it is damaged.
        """
        if path.is_symlink() or path.stat().st_size > _LARGEST:
            raise ValueError("no journal")
        data = path.read_bytes()
        intact = data.rfind(b"\n") + 1
        header, *entries = map(_entry, data[:intact].splitlines())
        if header != {"version": _VERSION, "merge": self._header}:
            raise ValueError("the journal of another merge")
        return {entry["tensor"]: tuple(entry["blocks"]) for entry in entries}, intact


def _line(entry: Mapping[str, object]) -> bytes:
    """A line: JSON, and a hash of it."""
    text = json.dumps(entry, separators=(",", ":")).encode()
    return text + b" " + hashlib.sha256(text).hexdigest()[:16].encode() + b"\n"


def _entry(line: bytes) -> dict:
    text, _, check = line.rpartition(b" ")
    if hashlib.sha256(text).hexdigest()[:16].encode() != check:
        raise ValueError("a damaged line")
    return json.loads(text)


def _as_data(layout: Layout) -> object:
    """A layout as plain data, with hashes of what its files hold beside tensors."""
    files = {
        name: [planned.size, [[at, hashlib.sha256(content).hexdigest()] for at, content in planned.fixed]]
        for name, planned in layout.files.items()
    }
    return [files, {name: list(place) for name, place in layout.places.items()}, dict(layout.links)]


def _keep_only(folder: Path, names: set[str]) -> None:
    """Removes all files but some, and folders without any."""
    parents = {str(parent) for name in names for parent in Path(name).parents}
    for path in sorted(folder.rglob("*"), reverse=True):
        name = str(path.relative_to(folder))
        if name in names or (name in parents and not path.is_symlink()):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
