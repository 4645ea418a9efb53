"""Opening checkpoints: every format becomes a tree of lazy tensors.

Opening reads headers only. What is read later is what is asked for, and it is counted.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmerge.checkpoints import npz, orbax, safetensors
from jaxmerge.checkpoints.stores import ByteSource, FileStore, Store, open_store
from jaxmerge.errors import CheckpointError
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import named_leaves, with_leaves

if TYPE_CHECKING:
    import tensorstore as ts

# What Hugging Face folders hold beside the weights; asked for one by one where a folder cannot be listed.
_KNOWN_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".npy"),
    *(".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".tflite", ".ot"),
)


class Checkpoint:
    """An opened checkpoint. `open_checkpoint` makes one.

    As a context manager it is closed at the end of the block; unused checkpoints close themselves.

    Attributes:
        params: the tensors: a flat dict `{name: LazyTensor}` (safetensors, npz) or the saved nesting (Orbax). A tied
            tensor is one object that stands under each of its names.
        format: "safetensors", "npz" or "orbax".
        path: the path or URL.
        metadata: the text that is stored with the tensors.
        aliases: tied tensors, `{further name: name that it is stored under}`.
    """

    def __init__(
        self,
        store: Store,
        path: str,
        format: str,
        params: Any,
        metadata: dict[str, str],
        aliases: dict[str, str],
    ):
        self._store = store
        self.path, self.format, self.params, self.metadata, self.aliases = path, format, params, metadata, aliases
        self._bytes_to_open = store.counter.total

    @property
    def bytes_read(self) -> int:
        """Bytes that were fetched since the checkpoint was opened (without the headers that opening read).

        For Orbax they are counted per chunk and as decoded.
        """
        return self._store.counter.total - self._bytes_to_open

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, tied ones counted once."""
        return sum(leaf.nbytes for leaf in {id(leaf): leaf for leaf in self._leaves().values()}.values())

    @property
    def side_files(self) -> dict[str, Path | bytes]:
        """What else is in a Hugging Face folder (config, tokenizer, licence, …): paths, or the contents behind a URL.

        Raises:
            CheckpointError: the folder cannot be listed, or a file behind a URL cannot be read.
        """
        if self.format != "safetensors" or self.path != self._store.path:
            return {}
        names = [
            name
            for name in self._store.names() or _KNOWN_SIDE_FILES
            if name != "jaxmerge.json" and not name.startswith(".") and not name.endswith(_WEIGHT_SUFFIXES)
        ]
        if isinstance(self._store, FileStore):
            return {name: self._store.folder / name for name in names}
        contents = {name: self._store.read_file(name) for name in names}
        return {name: content for name, content in contents.items() if content is not None}

    def load(self, shardings: Any = None) -> Any:
        """All tensors as JAX arrays, in the tree of `params`; see `materialize`."""
        return materialize(self.params, shardings)

    def close(self) -> None:
        """Closes the files. Tensors that were not read yet cannot be read any more."""
        self._store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.path}: {self.format}, {len(self._leaves())} tensors, {_readable(self.nbytes)})"

    def _leaves(self) -> dict[str, LazyTensor]:
        return named_leaves(self.params)


def open_checkpoint(location: str | Path, *, context: ts.Context | None = None) -> Checkpoint:
    """Opens a checkpoint; only headers are read.

    Args:
        location: a safetensors or npz file, a Hugging Face folder (one safetensors file, or shards with an index), or
            an Orbax folder (v1 or v0): a local path, or a URL that TensorStore can read from: `http://`, `https://`,
            `gs://`, `s3://`, `memory://`, `file://`.
        context: TensorStore's context for a URL: credentials, limits, or the contents of `memory://`.

    Returns:
        The checkpoint, whose `params` are lazy tensors.

    Raises:
        CheckpointError: there is no checkpoint there, or it is truncated or corrupt, or uses an unknown dtype.
    """
    store, key = open_store(location, context)
    try:
        if not key and orbax.is_orbax(store):
            params, metadata, aliases = orbax.open_folder(store)
            return Checkpoint(store, store.path, "orbax", params, metadata, aliases)
        if not key:
            tensors, metadata = safetensors.open_folder(store)
            return _flat(store, store.path, "safetensors", tensors, metadata)
        source = _existing(store, key)
        if key.endswith(".npz"):
            tensors, metadata = npz.open_file(source)
            return _flat(store, f"{store.path}/{key}", "npz", tensors, metadata)
        tensors, metadata = safetensors.open_file(source)
        return _flat(store, f"{store.path}/{key}", "safetensors", tensors, metadata)
    except BaseException:
        store.close()
        raise


def materialize(params: Any, shardings: Any = None) -> Any:
    """Reads lazy tensors into JAX arrays.

    Args:
        params: a tree of lazy tensors and arrays (which stay as they are).
        shardings: a `jax.sharding.Sharding` for all tensors, or a tree of them like `params`; each device's part is
            then read on its own, and nothing else. By default everything is put on the default device.

    Returns:
        The tree with JAX arrays, with the dtypes JAX gives them (float64 and int64 become 32 bits wide without x64).
        Tied tensors are one array.
    """
    import jax

    leaves = named_leaves(params)
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        targets = dict.fromkeys(leaves, shardings)
    else:
        targets = named_leaves(shardings)
    arrays: dict[tuple[int, Any], jax.Array] = {}
    result = {}
    for name, leaf in leaves.items():
        target = targets[name]
        if not isinstance(leaf, LazyTensor):
            result[name] = leaf if target is None else jax.device_put(leaf, target)
            continue
        if (id(leaf), target) not in arrays:
            # JAX may keep using the memory it is given. Each array that is read here is fresh and used once.
            if target is None:
                arrays[id(leaf), target] = jax.device_put(leaf[...])
            else:
                arrays[id(leaf), target] = jax.make_array_from_callback(leaf.shape, target, _read_each_once(leaf))
        result[name] = arrays[id(leaf), target]
    return with_leaves(params, result)


def _flat(
    store: Store, path: str, format: str, tensors: Mapping[str, LazyTensor], metadata: dict[str, str]
) -> Checkpoint:
    """The checkpoint of a flat format: metadata entries that map an absent name to a present one are tied tensors."""
    params = dict(tensors)
    aliases = {name: kept for name, kept in metadata.items() if kept in tensors and name not in tensors}
    params.update((name, tensors[kept]) for name, kept in aliases.items())
    return Checkpoint(
        store, path, format, params, {key: text for key, text in metadata.items() if key not in aliases}, aliases
    )


def _read_each_once(leaf: LazyTensor) -> Callable[[Any], np.ndarray]:
    """Reads slices of a tensor; devices that hold the same slice share one read."""
    pieces: dict[str, np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        key = str(index)
        if key not in pieces:
            pieces[key] = leaf[index]
        return pieces[key]

    return read


def _existing(store: Store, key: str) -> ByteSource:
    source = store.source(key)
    if source is None:
        raise CheckpointError(f"there is no checkpoint at {store.path}/{key}; check the address")
    return source


def _readable(n: int) -> str:
    power = min(max(n.bit_length() - 1, 0) // 10, 3)
    return f"{n / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
