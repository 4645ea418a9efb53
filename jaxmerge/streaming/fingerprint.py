"""How a catalog knows that a checkpoint is the one it has seen: by the state of its files, without reading them.

The state of a local file is its size, the time it was last changed (in nanoseconds) and a hash of its first bytes,
where the header is. Behind a URL it is the generation or tag that the server gives; where there is none, what was
learnt about the file is used as long as it is open, and never again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import weakref
from typing import Any

from jaxmerge.checkpoints.base import Checkpoint
from jaxmerge.checkpoints.orbax import OrbaxTensor
from jaxmerge.checkpoints.stored import StoredTensor
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import named_leaves


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The state of a checkpoint.

    Attributes:
        model: a hash of all of it.
        tensors: tensor name → a hash of the state of the file that holds it and of its place, dtype and shape there.
        lasting: whether it is the same when the checkpoint is opened again; false behind a URL without tags.
        leaves: the tensors by name.
    """

    model: str
    tensors: dict[str, str]
    lasting: bool = True
    leaves: dict[str, LazyTensor] = dataclasses.field(default_factory=dict, compare=False, repr=False)


def fingerprint(checkpoint: Checkpoint) -> Fingerprint:
    """The state of an opened checkpoint. Nothing is read but the beginnings of its files, which is not counted.

    Raises:
        CheckpointError: the server that has its files does not answer.
    """
    states: dict[int, Any] = {}
    tensors, leaves, lasting = {}, named_leaves(checkpoint.params), True
    for name, leaf in leaves.items():
        stored = stored_tensor(leaf)
        holder = stored.source if isinstance(stored, StoredTensor) else checkpoint
        if id(holder) not in states:
            states[id(holder)] = _state(holder)
            lasting = lasting and holder not in _UNKNOWN
        place = getattr(stored, "offset", None)
        tensors[name] = digest([states[id(holder)], name, leaf.dtype.name, list(leaf.shape), place])
    return Fingerprint(digest([sorted(tensors.items()), sorted(checkpoint.aliases.items())]), tensors, lasting, leaves)


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
    state = holder._store.state() if isinstance(holder, Checkpoint) else holder.state()
    return _unknown(holder) if state is None else state


_UNKNOWN: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _unknown(holder: Any) -> str:
    """A state that equals no other, as long as the file is open."""
    return _UNKNOWN.setdefault(holder, os.urandom(16).hex())
