"""The `.npz` format: a zip archive of `.npy` members.

Stored members are read in place, by byte ranges; compressed ones are inflated as far as a read needs. Nothing is ever
unpickled. NumPy's format has no name for bfloat16 and the float8 kinds: we write them as raw bytes, as NumPy does, and
put the name of the dtype into the comment of the zip member, where it disturbs no reader.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.checkpoints.layout import CUSTOM_DTYPES, Layout, PlannedFile, TensorSpec, text_metadata
from jaxmerge.checkpoints.stored import StoredTensor
from jaxmerge.checkpoints.stores import ByteSource
from jaxmerge.errors import CheckpointError
from jaxmerge.trees.lazy import LazyTensor

_MAX_HEADER_BYTES = 4096  # what a member claims of its header's length is not read; real headers have about 128 bytes
_ALIGNMENT = 64  # arrays start at a multiple of this, as NumPy's own files promise for single arrays
_ZIP64 = 0xFFFFFFFF  # "see the 64-bit field"; we always write 64-bit fields, so that there is one case
_VERSION, _FLAGS, _DATE = 45, 0x800, 0x21  # zip version with 64-bit fields; names in UTF-8; 1 January 1980


def open_file(source: ByteSource) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Reads the directory of an archive and the header of each member.

    Returns:
        The tensors by name, and the metadata that the archive's comment holds if we wrote it.

    Raises:
        CheckpointError: the file is no archive, truncated or corrupt, or a member holds no plain numbers.
    """
    try:
        archive = zipfile.ZipFile(_SourceFile(source))
    except CheckpointError:
        raise
    except Exception as error:  # the parser of a malformed file raises all kinds of errors
        raise CheckpointError(f"{source.label} is no npz archive, or truncated: {error}; write it again") from error
    tensors: dict[str, LazyTensor] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in tensors:
            raise CheckpointError(f"{source.label} holds {name} twice; write it again")
        tensors[name] = _open_member(archive, member, name, source)
    return tensors, _load_metadata(archive.comment)


def layout(name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, Any], aliases: Mapping[str, str]) -> Layout:
    """One archive of stored members. Their checksums are filled in when all tensors are written."""
    fixed: list[tuple[int, bytes]] = []
    places: dict[str, tuple[str, int]] = {}
    directory = b""
    checksums: list[tuple[int, int, int, int]] = []  # where it stands in the member and in the directory; of what range
    position = 0
    for spec in specs:
        header = _npy_header(spec)
        member = f"{spec.name}.npy".encode()
        size, before = len(header) + spec.nbytes, 30 + len(member) + 20
        padding = -(position + before + 4 + len(header)) % _ALIGNMENT
        extra = struct.pack("<HHQQHH", 1, 16, size, size, 0xD935, padding) + bytes(padding)
        local = struct.pack(
            "<4s5H3I2H", b"PK\3\4", _VERSION, _FLAGS, 0, 0, _DATE, 0, _ZIP64, _ZIP64, len(member), len(extra)
        )
        fixed.append((position, local + member + extra + header))
        start = position + len(local + member + extra)
        checksums.append((position + 14, len(directory) + 16, start, size))
        places[spec.name] = (name, start + len(header))
        comment = spec.dtype.name.encode() if spec.dtype.name in CUSTOM_DTYPES else b""
        central = struct.pack("<HHQQQ", 1, 24, size, size, position)
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 3 << 8 | _VERSION, _VERSION, _FLAGS, 0, 0, _DATE, 0, _ZIP64, _ZIP64,
            len(member), len(central), len(comment), 0, 0, 0o644 << 16, _ZIP64,
        ) + member + central + comment  # fmt: skip
        position = start + size
    comment = json.dumps(text_metadata(metadata, aliases)).encode() if metadata or aliases else b""
    if len(comment) > 0xFFFF:
        raise CheckpointError(f"{name}: {len(comment)} bytes of metadata do not fit an npz archive; use safetensors")
    end = struct.pack(
        "<4sQ2H2I4Q", b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, len(specs), len(specs), len(directory), position
    )
    end += struct.pack("<4sIQI", b"PK\6\7", 0, position + len(directory), 1)
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _ZIP64, _ZIP64, len(comment)) + comment
    fixed.append((position, directory + end))
    marks = [(local, position + central, start, size) for local, central, start, size in checksums]
    return Layout(
        files={name: PlannedFile(position + len(directory) + len(end), fixed)},
        places=places,
        seal=functools.partial(_write_checksums, name, marks),
    )


class _SourceFile(io.RawIOBase):
    """A byte source as the file object that `zipfile` wants."""

    def __init__(self, source: ByteSource):
        self._source, self._position = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._source.size}[whence]
        if origin + offset < 0:
            raise OSError("a position before the start of the file")
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._source.size - self._position)  # an archive may claim more than there is
        return super().read(left if size < 0 else min(size, left)) or b""

    def readinto(self, buffer: bytearray | memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        n = max(0, min(len(buffer), self._source.size - self._position))
        self._source.read_into(self._position, np.frombuffer(buffer, np.uint8)[:n])
        self._position += n
        return n


class _InflatedMember(ByteSource):
    """A compressed member. Reading forwards goes on inflating; reading backwards starts again."""

    gap = 1 << 20  # what lies between is inflated anyway

    def __init__(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, label: str):
        self.label, self.size = label, member.file_size
        self._archive, self._member, self._lock = archive, member, threading.Lock()

    @functools.cached_property
    def _stream(self) -> zipfile.ZipExtFile:
        return self._archive.open(self._member)  # pyright: ignore[reportReturnType]

    def read_into(self, offset: int, out: np.ndarray) -> None:
        with self._lock:
            try:
                self._stream.seek(offset)
                done = 0
                while done < out.size and (n := self._stream.readinto(out[done : done + (8 << 20)].data)):
                    done += n
            except CheckpointError:
                raise
            except Exception as error:  # zlib, bz2, lzma and zipfile each have errors of their own
                raise CheckpointError(f"{self.label}: cannot inflate {self._member.filename}: {error}") from error
        if done < out.size:
            raise CheckpointError(f"{self.label}: {self._member.filename} is truncated; write the archive again")

    def ends_at(self, offset: int) -> bool:
        return self.size == offset


def _open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, source: ByteSource) -> LazyTensor:
    what = f"{source.label}: {name}"
    try:
        with archive.open(member) as stream:
            head = io.BytesIO(stream.read(_MAX_HEADER_BYTES))
        version = np.lib.format.read_magic(head)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read_header(head)
        header_bytes = head.tell()
    except CheckpointError:
        raise
    except Exception as error:  # the parser of a malformed file raises all kinds of errors
        raise CheckpointError(f"{what} is no readable npy member: {error!r:.300}; write the archive again") from error
    if dtype.kind == "V" and dtype.names is None:
        dtype = _custom_dtype(dtype, member.comment, what)
    elif dtype.kind not in "biufc":
        raise CheckpointError(f"{what} has the dtype {dtype}, which is no plain number; save it as numbers")
    if any(n < 0 for n in shape) or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 63:
        raise CheckpointError(f"{what} has the impossible shape {shape}; write the archive again")
    needed = header_bytes + math.prod(shape) * dtype.itemsize
    if member.file_size != needed:
        raise CheckpointError(
            f"{what} is {dtype.name}{list(shape)} and needs {needed} bytes with its header, but the member has "
            f"{member.file_size}; write the archive again"
        )
    if member.compress_type == zipfile.ZIP_STORED:
        # The lengths of name and extra field may differ between the member and the directory.
        n, m = struct.unpack("<2H", source.read(member.header_offset + 26, 4))
        start = member.header_offset + 30 + n + m
        if start + needed > source.size:
            raise CheckpointError(f"{what} ends at byte {start + needed} of {source.size}; write the archive again")
        raw = StoredTensor(source, name, dtype, _stored_shape(shape, fortran_order), start + header_bytes)
    else:
        inflated = _InflatedMember(archive, member, source.label)
        raw = StoredTensor(inflated, name, dtype, _stored_shape(shape, fortran_order), header_bytes)
    tensor = raw.transpose() if fortran_order and len(shape) > 1 else raw
    return tensor.astype(dtype.newbyteorder("="))


def _stored_shape(shape: tuple[int, ...], fortran_order: bool) -> tuple[int, ...]:
    return shape[::-1] if fortran_order else shape


def _custom_dtype(dtype: np.dtype, comment: bytes, what: str) -> np.dtype:
    """The dtype of a member that NumPy sees as raw bytes. (Without our comment, two bytes are bfloat16, as in JAX.)"""
    custom = CUSTOM_DTYPES.get(comment.decode("utf-8", "replace") or ("bfloat16" if dtype.itemsize == 2 else ""))
    if custom is None or custom.itemsize != dtype.itemsize:
        raise CheckpointError(f"{what} holds raw entries of {dtype.itemsize} bytes and does not say of which dtype")
    return custom


def _load_metadata(comment: bytes) -> dict[str, str]:
    """The metadata in an archive's comment; others' comments are none."""
    try:
        metadata = json.loads(comment)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(metadata, dict):
        return {}
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def _npy_header(spec: TensorSpec) -> bytes:
    descr = f"|V{spec.dtype.itemsize}" if spec.dtype.name in CUSTOM_DTYPES else spec.dtype.str
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": spec.shape})
    return out.getvalue()


def _write_checksums(name: str, marks: Sequence[tuple[int, int, int, int]], folder: Path) -> None:
    buffer = memoryview(bytearray(4 << 20))
    with open(folder / name, "r+b", buffering=0) as file:
        for in_member, in_directory, start, size in marks:
            file.seek(start)
            checksum, left = 0, size
            while left:
                n = file.readinto(buffer[: min(len(buffer), left)])
                if not n:
                    raise OSError(f"{name} became shorter while it was written")
                checksum = zlib.crc32(buffer[:n], checksum)
                left -= n
            for position in (in_member, in_directory):
                os.pwrite(file.fileno(), struct.pack("<I", checksum), position)
