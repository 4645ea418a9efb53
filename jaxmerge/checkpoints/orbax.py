"""Orbax checkpoints: zarr arrays in OCDBT databases or plain folders, beside a description of the tree.

Both generations are read (v1: zarr3 under `state/`; v0: zarr2), through TensorStore and without Orbax. What we write is
the v1 layout with plain zarr3 files instead of a database: each array is one uncompressed, sharded chunk, so that its
file is the raw row-major array followed by a small index. Such a file can be written in any order and by many threads,
and Orbax loads it as it loads its own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped

from jaxmerge.checkpoints.layout import Layout, PlannedFile, TensorSpec, as_text, text_metadata
from jaxmerge.checkpoints.publish import as_checkpoint_error, exchange, remove
from jaxmerge.checkpoints.stores import ByteCounter, Store, load_json, wait
from jaxmerge.errors import CheckpointError, ConflictError
from jaxmerge.trees.lazy import Box, LazyTensor, covering_boxes

if TYPE_CHECKING:
    import tensorstore as ts

CHUNK_BYTES = 4 << 20
"""Size of the pieces in which the arrays that we write can be read."""

_SUBFOLDERS = ("", "state/", "default/", "params/")  # where Orbax puts a tree, by its version and manner of saving
_SEQUENCE_KEY, _DICT_KEY = 1, 2  # how Orbax marks the two kinds of keys


class OrbaxTensor(LazyTensor):
    """An array of an Orbax checkpoint.

    A read fetches whole chunks, and the byte counter counts them as decoded (what is compressed takes less). An array
    that Orbax wrote usually is one chunk for each device it was on.
    """

    def __init__(self, array: ts.TensorStore, label: str, cache: ChunkCache, counter: ByteCounter):
        self.shape, self.dtype, self.label = tuple(array.shape), array.dtype.numpy_dtype, label
        if self.dtype.kind == "O":
            raise CheckpointError(f"{label} has entries of type {array.dtype.name}, which are no numbers; leave it out")
        self._array, self._cache, self._counter = array, cache, counter
        self._chunk: tuple[int, ...] = tuple(array.chunk_layout.read_chunk.shape or ())  # pyright: ignore

    def read(self, box: Box) -> Shaped[np.ndarray, "..."]:
        out = np.empty([piece.stop - piece.start for piece in box], self.dtype)
        self._fill(box, out)
        return out

    def read_flat(self, start: int, out: Shaped[np.ndarray, " n"]) -> None:
        for box, at in covering_boxes(self.shape, start, start + out.size):
            shape = [piece.stop - piece.start for piece in box]
            self._fill(box, out[at - start : at - start + math.prod(shape)].reshape(shape))

    def _fill(self, box: Box, out: np.ndarray) -> None:
        import tensorstore as ts

        requests = []
        for chunk in self._chunks(box):
            part = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, chunk, strict=True))
            into = out[_within(part, box)]
            if part == chunk:
                target = ts.array(into, copy=False, write=True)
                requests.append(target.write(self._array[chunk].translate_to[(0,) * self.ndim]))
                self._counter.add(into.nbytes)
            else:
                whole = self._cache.get((self.label, str(chunk)), lambda chunk=chunk: self._read_chunk(chunk))
                into[...] = whole[_within(part, chunk)]
        for request in requests:
            wait(request, self.label)

    def _read_chunk(self, chunk: Box) -> np.ndarray:
        whole = np.empty([piece.stop - piece.start for piece in chunk], self.dtype)
        self._fill(chunk, whole)
        return whole

    def _chunks(self, box: Box) -> Iterable[Box]:
        """The chunks that a box touches, as boxes."""
        along = [
            [slice(at * c, min(at * c + c, n)) for at in range(piece.start // c, -(-piece.stop // c))]
            for piece, c, n in zip(box, self._chunk, self.shape, strict=True)
        ]
        return itertools.product(*along)


class ChunkCache:
    """The last chunks that were read for a part of them, so that reading a large chunk by parts decodes it once."""

    def __init__(self, capacity: int = 2):
        self._capacity = capacity
        self._chunks: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str], read: Callable[[], np.ndarray]) -> np.ndarray:
        """The chunk of that key, read now unless it is here already."""
        with self._lock:
            if key not in self._chunks:
                while len(self._chunks) >= self._capacity:
                    self._chunks.popitem(last=False)
                self._chunks[key] = read()
            self._chunks.move_to_end(key)
            return self._chunks[key]


def is_orbax(store: Store) -> bool:
    """Whether a folder is an Orbax checkpoint."""
    return _find_tree(store) is not None


def open_folder(store: Store) -> tuple[Any, dict[str, str], dict[str, str]]:
    """Reads the tree's description and the header of each array.

    Returns:
        The tree of tensors, the metadata as text, and the tied tensors `{further name: name}`.

    Raises:
        CheckpointError: the description is corrupt, or an array is missing or corrupt.
    """
    import tensorstore as ts

    found = _find_tree(store)
    if found is None:
        raise CheckpointError(f"{store.path} is no Orbax checkpoint: there is no _METADATA in it")
    subfolder, text = found
    tree = load_json(text, f"{store.path}/{subfolder}_METADATA")
    base = store.kvstore_spec(subfolder)
    if store.source(f"{subfolder}manifest.ocdbt") is not None:
        base = {"driver": "ocdbt", "base": base}
    kv = wait(ts.KvStore.open(base, context=store.context), store.path)
    driver = {
        "driver": "zarr3" if tree.get("use_zarr3") else "zarr",
        # A missing chunk is a truncated checkpoint, unless it was written without the chunks that are all zero.
        "fill_missing_data_reads": not tree.get("store_array_data_equal_to_fill_value", False),
    }
    metadata = _custom_metadata(store)
    cache = ChunkCache()
    leaves: dict[tuple[str | int, ...], Any] = {}
    requests: dict[tuple[str | int, ...], Any] = {}
    for keys, kind in _tree_entries(tree, store.path):
        if kind in _EMPTY:
            leaves[keys] = _EMPTY[kind]()
        else:
            array = kv / f"{'.'.join(map(str, keys))}/"
            leaves[keys] = None  # keeps the order
            requests[keys] = ts.open(driver, kvstore=array, open=True, read=True, context=store.context)
    tensors: dict[str, LazyTensor] = {}
    for keys, request in requests.items():
        name = "/".join(map(str, keys))
        if name in tensors:
            raise CheckpointError(f"{store.path} holds two tensors named {name}; rename one and save it again")
        label = f"{store.path.rpartition('/')[2]}: {name}"
        array = wait(request, f"{store.path}: {name}")
        tensors[name] = leaves[keys] = OrbaxTensor(array, label, cache, store.counter)
    aliases = {}
    for keys, (name, tensor) in zip(requests, tensors.items(), strict=True):
        kept = tensors.get(metadata.get(name, ""), tensor)
        if kept is not tensor and (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype):
            leaves[keys] = kept
            aliases[name] = metadata.pop(name)
    return _nested(leaves, store.path), metadata, aliases


def layout(specs: Sequence[TensorSpec], metadata: Mapping[str, Any], aliases: Mapping[str, str]) -> Layout:
    """The folder of a v1 checkpoint; `/` in a name separates the keys of nested dicts."""
    files: dict[str, PlannedFile] = {}
    places: dict[str, tuple[str, int]] = {}
    links: dict[str, str] = {}
    tree: dict[str, Any] = {}
    by_name = {spec.name: spec for spec in specs}
    for name in [*by_name, *aliases]:
        spec = by_name[aliases.get(name, name)]
        keys = _keys(name)
        folder = f"state/{'.'.join(keys)}"
        if f"{folder}/zarr.json" in files:
            raise CheckpointError(f"Orbax would store {name} where it stores another tensor ({folder}); rename one")
        header, data, place = _array_files(spec)
        files[f"{folder}/zarr.json"] = PlannedFile.of(header)
        if name in aliases:
            links[f"{folder}/{place}"] = places[spec.name][0]
        else:
            files[f"{folder}/{place}"] = data
            places[name] = (f"{folder}/{place}", 0)
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    handler = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
    documents = {
        "state/_METADATA": {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
        "_CHECKPOINT_METADATA": {
            "item_handlers": {"state": handler},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": None,
            "commit_timestamp_nsecs": None,
            "custom_metadata": text_metadata(metadata, aliases),
        },
    }
    files.update((name, PlannedFile.of(json.dumps(document).encode())) for name, document in documents.items())
    files["orbax.checkpoint"] = PlannedFile.of(b"")
    return Layout(files, places, links)


def save_sharded(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, Any], aliases: Mapping[str, str], overwrite: bool
) -> None:
    """Has Orbax write arrays that lie on the devices of several processes, each of which writes its own part.

    All processes must call this. The checkpoint appears complete or not at all, also in the place of another one.

    Args:
        path: a local path on a file system that all processes share.
        tensors: arrays by name, `/` separating the keys of nested dicts.
        metadata: text to store.
        aliases: tied tensors, `{further name: name in tensors}`. Orbax stores them again.
        overwrite: replace what stands at `path`.

    Raises:
        ConflictError: the path exists.
        CheckpointError: Orbax cannot hold these names, or cannot write there.
    """
    import jax
    from jax.experimental import multihost_utils
    from orbax.checkpoint import v1 as ocp

    leaves: dict[tuple[str | int, ...], Any] = {
        tuple(_keys(name)): tensors[aliases.get(name, name)] for name in (*tensors, *aliases)
    }
    replaces = os.path.lexists(path)
    if replaces and not overwrite:
        raise ConflictError(f"{path} exists already; remove it, choose another name or pass overwrite=True")
    # Orbax would remove the old one before it writes.
    target = path.with_name(f".{path.name}.draft") if replaces else path
    with as_checkpoint_error(f"write {path}"):
        custom: dict[str, Any] = {**text_metadata(metadata, aliases)}
        ocp.save(str(target), _nested(leaves, str(path)), overwrite=replaces, custom_metadata=custom)
        if replaces and jax.process_index() == 0:
            if exchange(target, path):
                remove(target)
            else:
                remove(path)
                os.rename(target, path)
        multihost_utils.sync_global_devices("checkpoint published")


def _keys(name: str) -> list[str]:
    """The keys that a name consists of, if Orbax can hold it."""
    keys = name.split("/")
    if "" in keys or "." in keys or ".." in keys or "\0" in name or keys[0].startswith("_"):
        raise CheckpointError(f"Orbax cannot hold a tensor with the name {name!r}; rename it")
    return keys


def _array_files(spec: TensorSpec) -> tuple[bytes, PlannedFile, str]:
    """The header of a zarr3 array, its data file (the index after the tensor), and the name of that file."""
    if spec.size == 0:
        raise CheckpointError(f"Orbax cannot hold {spec.name}, which has no entries; leave it out")
    shape = list(spec.shape)
    inner, n_inner, shard = shape, 1, shape
    if shape:  # chunks are runs of rows
        rows = min(shape[0], max(1, CHUNK_BYTES * shape[0] // spec.nbytes))
        n_inner = -(-shape[0] // rows)
        inner, shard = [rows, *shape[1:]], [n_inner * rows, *shape[1:]]
    inner_bytes = math.prod(inner) * spec.dtype.itemsize
    raw = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {"chunk_shape": inner, "codecs": [raw], "index_codecs": [raw]}
    fill = False if spec.dtype.kind == "b" else 0 if spec.dtype.kind in "iu" else 0.0
    header = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": spec.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "fill_value": [fill, fill] if spec.dtype.kind == "c" else fill,
    }
    index = np.array([[i * inner_bytes, inner_bytes] for i in range(n_inner)], "<u8").tobytes()
    end = n_inner * inner_bytes
    return json.dumps(header).encode(), PlannedFile(end + len(index), [(end, index)]), "c" + "/0" * len(shape)


_EMPTY: dict[str, Callable[[], Any]] = {"Dict": dict, "List": list, "Tuple": tuple, "None": lambda: None}


def _find_tree(store: Store) -> tuple[str, bytes] | None:
    for subfolder in _SUBFOLDERS:
        text = store.read_file(f"{subfolder}_METADATA")
        if text is not None:
            return subfolder, text
    return None


def _tree_entries(tree: dict[str, Any], path: str) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Key path and kind of each entry of the tree; keys of sequences are integers."""
    try:
        for entry in tree["tree_metadata"].values():
            keys = [
                int(key["key"]) if key["key_type"] == _SEQUENCE_KEY else str(key["key"])
                for key in entry["key_metadata"]
            ]
            if len(keys) > 100:
                raise ValueError(f"{len(keys)} nested keys")
            yield tuple(keys), str(entry["value_metadata"]["value_type"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: _METADATA does not describe a tree ({error!r}); save it again") from None


def _custom_metadata(store: Store) -> dict[str, str]:
    text = store.read_file("_CHECKPOINT_METADATA")
    custom = load_json(text, f"{store.path}/_CHECKPOINT_METADATA").get("custom_metadata") if text else None
    return as_text(custom) if isinstance(custom, dict) else {}


def _nested(leaves: Mapping[tuple[str | int, ...], Any], path: str) -> Any:
    """Dicts and lists from key paths."""
    if () in leaves:
        return leaves[()]
    children: dict[str | int, dict[tuple[str | int, ...], Any]] = {}
    for (key, *rest), leaf in leaves.items():
        children.setdefault(key, {})[tuple(rest)] = leaf
    if any(() in below and len(below) > 1 for below in children.values()):
        raise CheckpointError(f"{path}: _METADATA has a tensor and a subtree at one place; save it again")
    nodes = {key: _nested(below, path) for key, below in children.items()}
    if nodes.keys() == set(range(len(nodes))) and nodes:
        return [nodes[i] for i in range(len(nodes))]
    return {str(key): node for key, node in nodes.items()}


def _within(part: Box, whole: Box) -> tuple[Any, ...]:
    """The index of a part in the array of the whole; it gives an array even where there is no axis."""
    return *(slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, whole, strict=True)), ...
