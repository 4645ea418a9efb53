"""How a catalog knows that a checkpoint is the one it has seen: by the state of its files, without reading them.

The state of a local file is its size, the time it was last changed (in nanoseconds) and a hash of its first bytes,
where the header is. Behind a URL it is the generation or tag that the server gives; where there is none, what was
learnt about the file is used as long as it is open, and never again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import weakref
from pathlib import Path
from typing import Any

from jaxmerge.checkpoints.base import Checkpoint
from jaxmerge.checkpoints.orbax import OrbaxTensor
from jaxmerge.checkpoints.stored import StoredTensor
from jaxmerge.checkpoints.stores import FileSource, FileStore, KvSource, wait
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import named_leaves

_HEAD = 64 << 10


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The state of a checkpoint.

    Attributes:
        model: a hash of all of it.
        tensors: tensor name → a hash of the state of the file that holds it and of its place, dtype and shape there.
        lasting: whether it is the same when the checkpoint is opened again; false behind a URL without tags.
    """

    model: str
    tensors: dict[str, str]
    lasting: bool = True


def fingerprint(checkpoint: Checkpoint) -> Fingerprint:
    """The state of an opened checkpoint. Nothing is read but the beginnings of its files, which is not counted.

    Raises:
        CheckpointError: the server that has its files does not answer.
    """
    states: dict[int, Any] = {}
    tensors, lasting = {}, True
    for name, leaf in named_leaves(checkpoint.params).items():
        stored = stored_tensor(leaf)
        holder = stored.source if isinstance(stored, StoredTensor) else checkpoint
        if id(holder) not in states:
            states[id(holder)] = _state(holder)
            lasting = lasting and holder not in _UNKNOWN
        place = getattr(stored, "offset", None)
        tensors[name] = digest([states[id(holder)], name, leaf.dtype.name, list(leaf.shape), place])
    return Fingerprint(digest([sorted(tensors.items()), sorted(checkpoint.aliases.items())]), tensors, lasting)


def stored_tensor(leaf: LazyTensor) -> LazyTensor:
    """The tensor of a file that a leaf of a checkpoint shows, maybe cast or transposed."""
    while not isinstance(leaf, StoredTensor | OrbaxTensor) and isinstance(getattr(leaf, "source", None), LazyTensor):
        leaf = leaf.source  # pyright: ignore[reportAttributeAccessIssue]
    return leaf


def digest(value: Any) -> str:
    """SHA-256 of plain data, as canonical JSON: the same in every process and for every order of a dict."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _state(holder: Any) -> Any:
    """What changes when a file (or the folder of an Orbax checkpoint) does, as plain data."""
    if isinstance(holder, FileSource):
        # The opened file, not whatever stands under its name by now.
        found, head = os.fstat(holder._fd), os.pread(holder._fd, _HEAD, 0)
        return [found.st_size, found.st_mtime_ns, hashlib.sha256(head).hexdigest()]
    if isinstance(holder, KvSource):
        generation = wait(holder._kv.read(holder._key, byte_range=slice(0, 1)), holder.label).stamp.generation
        return generation.hex() if len(generation) > 1 else _unknown(holder)
    if isinstance(holder, Checkpoint) and isinstance(holder._store, FileStore):
        folder = Path(holder._store.folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        states = []
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                states.append([str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns])
        return states
    return _unknown(holder)


_UNKNOWN: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _unknown(holder: Any) -> str:
    """A state that equals no other, as long as the file is open."""
    return _UNKNOWN.setdefault(holder, os.urandom(16).hex())
