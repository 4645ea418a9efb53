"""What the files of a checkpoint will look like, decided before the first tensor is written.

A layout places every tensor: its entries, in row-major order and little-endian, are one contiguous run of bytes in one
file. All formats are written in that shape, so one writer serves them all, and any thread may write any part of any
tensor at any time. Everything else that a file holds (headers, indices) is known beforehand and is given as bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmerge.errors import CheckpointError

CUSTOM_DTYPES = {name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}
"""The dtypes that NumPy itself does not have."""

DTYPES = CUSTOM_DTYPES | {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}
"""The dtypes that checkpoints are made of, by name."""

ALIGNMENT = 4096
"""Data starts at a multiple of this, a page, so that memory maps of it can be used in place."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written.

    Attributes:
        name: its name; in nested formats `/` separates the keys.
        dtype: the NumPy dtype it is stored in.
        shape: its shape.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class PlannedFile:
    """A file of a checkpoint.

    Attributes:
        size: its length in bytes.
        fixed: what it holds beside tensors, as `(offset, bytes)`.
    """

    size: int
    fixed: Sequence[tuple[int, bytes]] = ()

    @classmethod
    def of(cls, content: bytes) -> PlannedFile:
        """A file that holds no tensor."""
        return cls(len(content), [(0, content)])


@dataclasses.dataclass(frozen=True)
class Layout:
    """All files of a checkpoint and the place of each tensor in them. File names are relative, with `/`.

    Attributes:
        files: every file.
        places: tensor name → file and the offset of its first entry.
        links: further names of files: link → file.
        seal: called with the folder of the files when all tensors are written, for what depends on their values.
    """

    files: Mapping[str, PlannedFile]
    places: Mapping[str, tuple[str, int]]
    links: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seal: Callable[[Path], None] | None = None


def aligned(offset: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def text_metadata(metadata: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, str]:
    """The metadata that is stored: the caller's, and for each dropped name of a tied tensor the name that was kept.

    Raises:
        CheckpointError: a value cannot be written as JSON, or a key equals the name of a tied tensor.
    """
    for key in metadata:
        if key in aliases:
            raise CheckpointError(f"the metadata key {key!r} is also the name of a tied tensor; rename one of them")
    return {**as_text(metadata), **aliases}


def as_text(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as text: text stays, anything else becomes JSON.

    Raises:
        CheckpointError: a value cannot be written as JSON.
    """
    try:
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the metadata cannot be written as JSON: {error}; convert it to text") from None
