"""The safetensors format: `u64 header length + JSON header + data`, and Hugging Face folders of such files.

A header is a claim about the file. Nothing is believed, and nothing is allocated for it, before it fits the file:
the tensors must cover the data exactly, in order, without gaps or overlaps, and each must have the bytes that its
dtype and shape need.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge.checkpoints.layout import DTYPES, Layout, PlannedFile, TensorSpec, aligned, as_text, text_metadata
from jaxmerge.checkpoints.stored import StoredTensor
from jaxmerge.checkpoints.stores import ByteSource, Store, load_json
from jaxmerge.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit that the format's own readers have."""

CODES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
"""The format's names of dtypes, and NumPy's."""

_CODE_OF = {name: code for code, name in CODES.items()}

_AGAIN = "the file is corrupt: download or write it again"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def open_file(source: ByteSource) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Reads the header of a file.

    Returns:
        The tensors by name, in the order of the file's data, and the metadata.

    Raises:
        CheckpointError: the file is no safetensors file, truncated or corrupt.
    """
    start, header = _read_header(source)
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise CheckpointError(f"{source.label}: __metadata__ must map text to text; {_AGAIN}")
    entries = [(*_check_entry(source.label, name, entry), name) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[:2])
    tensors, position = {}, 0
    for begin, end, dtype, shape, name in entries:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise CheckpointError(
                f"{source.label}: {name} {kind}: it starts at byte {begin} of the data, not at {position}; {_AGAIN}"
            )
        position = end
        tensors[name] = StoredTensor(source, name, dtype, shape, start + begin)
    if not source.ends_at(start + position):
        raise CheckpointError(
            f"{source.label}: the header describes {start + position} bytes, the file has more or less; {_AGAIN}"
        )
    return tensors, metadata


_PART = re.compile(r"-of-0*(?!1\.)[1-9]\d*\.safetensors$")
"""What a shard among several is called. Alone and without an index it is part of a checkpoint that was not copied."""


def open_folder(store: Store) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Reads the headers of a Hugging Face folder: one file, or shards with an index.

    Returns:
        The tensors by name and the metadata of all files, that of the index included.

    Raises:
        CheckpointError: there is no such file, the index is wrong, or a file is corrupt.
    """
    names = store.names() or [_SINGLE, _INDEX]
    weights = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    if _SINGLE in weights and (source := store.source(_SINGLE)):
        return open_file(source)
    if len(indices) == 1 and (index := store.read_file(indices[0])) is not None:
        return _open_shards(store, indices[0], index)
    if len(weights) == 1 and not _PART.search(weights[0]) and (source := store.source(weights[0])):
        return open_file(source)
    raise CheckpointError(
        f"{store.path}: {len(weights)} .safetensors files and {len(indices)} indices were found; "
        f"a folder needs {_SINGLE}, or shards with one {_INDEX}; name one file to open it alone"
    )


def file_layout(
    name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, Any], aliases: Mapping[str, str]
) -> Layout:
    """One file. Tensors lie in the given order, those of wider dtypes first, so that each is aligned to its dtype."""
    header: dict[str, Any] = {}
    if metadata or aliases:
        header["__metadata__"] = text_metadata(metadata, aliases)
    offsets, position = {}, 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        if spec.dtype.name not in _CODE_OF:
            raise CheckpointError(f"{name}: safetensors cannot hold {spec.name}, which is {spec.dtype}; cast it first")
        offsets[spec.name], end = position, position + spec.nbytes
        header[spec.name] = {
            "dtype": _CODE_OF[spec.dtype.name],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    start = aligned(8 + len(text))
    if start - 8 > MAX_HEADER_BYTES:
        raise CheckpointError(f"{name}: {len(specs)} tensors need a header of {start} bytes, too long; write shards")
    fixed = struct.pack("<Q", start - 8) + text.ljust(start - 8)
    return Layout(
        files={name: PlannedFile(start + position, [(0, fixed)])},
        places={tensor: (name, start + offset) for tensor, offset in offsets.items()},
    )


def folder_layout(
    specs: Sequence[TensorSpec],
    metadata: Mapping[str, Any],
    aliases: Mapping[str, str],
    max_shard_bytes: int | None,
) -> Layout:
    """A Hugging Face folder: `model.safetensors`, or shards with an index when one file would be too large.

    The metadata gets `format: pt` unless it names a format, because transformers refuses files without one.
    """
    metadata = {"format": "pt", **metadata}
    shards = _split(specs, max_shard_bytes)
    if len(shards) == 1:
        return file_layout(_SINGLE, specs, metadata, aliases)
    files: dict[str, PlannedFile] = {}
    places: dict[str, tuple[str, int]] = {}
    for i, shard in enumerate(shards, 1):
        layout = file_layout(f"model-{i:05}-of-{len(shards):05}.safetensors", shard, metadata, aliases)
        files.update(layout.files)
        places.update(layout.places)
    total = {"total_size": sum(spec.nbytes for spec in specs)}
    index = {"metadata": {**metadata, **total}, "weight_map": {spec.name: places[spec.name][0] for spec in specs}}
    files[_INDEX] = PlannedFile.of(json.dumps(index, indent=2).encode())
    return Layout(files, places)


def _read_header(source: ByteSource) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the header's JSON object."""
    (length,) = struct.unpack("<Q", source.read(0, 8))
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{source.label}: its header claims to be {length} bytes long, {MAX_HEADER_BYTES} is the limit; "
            "this is no safetensors file, or it is corrupt"
        )
    text = b"".join(source.read(8 + at, min(1 << 20, length - at)) for at in range(0, length, 1 << 20))
    return 8 + length, load_json(text, f"{source.label}: its header")


def _check_entry(file: str, name: str, entry: Any) -> tuple[int, int, np.dtype, tuple[int, ...]]:
    """Begin and end in the data, dtype and shape of a tensor, when they agree with each other."""
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise CheckpointError(f"{file}: {name} needs dtype, shape and data_offsets, found {entry!r:.200}; {_AGAIN}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in CODES:
        raise CheckpointError(f"{file}: {name} has the unknown dtype {code!r:.50}; known are {', '.join(CODES)}")
    if not _are_counts(shape) or len(shape) > 32:
        raise CheckpointError(f"{file}: {name} has the shape {shape!r:.200}, no list of up to 32 sizes; {_AGAIN}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{file}: {name} has the data_offsets {offsets!r:.200}, no begin and end; {_AGAIN}")
    dtype, (begin, end) = DTYPES[CODES[code]], offsets
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 63:
        raise CheckpointError(f"{file}: {name} has the shape {shape!r:.200}, too large for any array; {_AGAIN}")
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise CheckpointError(
            f"{file}: {name} is {code}{shape} and needs {needed} bytes, but has bytes {begin} to {end}; {_AGAIN}"
        )
    return begin, end, dtype, tuple(shape)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _open_shards(store: Store, index_name: str, text: bytes) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of all shards, as the index distributes them."""
    what = f"{store.path}/{index_name}"
    index = load_json(text, what)
    weight_map, extra = index.get("weight_map"), index.get("metadata", {})
    if not (isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())):
        raise CheckpointError(f"{what}: weight_map must map tensor names to file names; {_AGAIN}")
    if not isinstance(extra, dict):
        raise CheckpointError(f"{what}: metadata must be a JSON object; {_AGAIN}")
    shards: dict[str, dict[str, StoredTensor]] = {}
    metadata: dict[str, str] = {}
    for file in dict.fromkeys(weight_map.values()):
        if "/" in file or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(f"{what}: {file!r} is no name of a file in this folder; do not use this checkpoint")
        source = store.source(file)
        if source is None:
            raise CheckpointError(f"{what}: the shard {file} is absent; download it again")
        shards[file], of_shard = open_file(source)
        metadata.update(of_shard)
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise CheckpointError(f"{what}: {name} is not in {file}, where the index says it is; {_AGAIN}")
    # What counts bytes or parameters is worked out anew whenever a checkpoint is written.
    kept = {key: value for key, value in extra.items() if key not in ("total_size", "total_parameters")}
    metadata.update(as_text(kept))
    return {name: shards[file][name] for name, file in weight_map.items()}, metadata


def _split(specs: Sequence[TensorSpec], max_shard_bytes: int | None) -> list[list[TensorSpec]]:
    """Distributes tensors, in order, over shards of at most so many bytes; a larger tensor gets one of its own."""
    shards: list[list[TensorSpec]] = [[]]
    room = max_shard_bytes
    for spec in specs:
        if room is not None and shards[-1] and spec.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(spec)
        room = None if room is None else room - spec.nbytes
    return shards
