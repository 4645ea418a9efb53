"""What a tensor holds, told by hashes of its blocks.

A catalog and a manifest cut tensors in the same way, so that merging again can tell which blocks of an input are those
that an earlier output was made from.
"""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import UInt8

BLOCK_BYTES = 1 << 20
"""Bytes of a tensor (row-major, little-endian) that are hashed together, the last block of which may be shorter: few
enough to tell where it was damaged or changed, and no more than are written at once, unless memory is short."""

DIGEST_BYTES = 32
"""Bytes of a block's hash, which is SHA-256."""


class ContentHash:
    """Hashes a tensor whose bytes come in order, in pieces of any size."""

    def __init__(self) -> None:
        self._done, self._block, self._filled = bytearray(), hashlib.sha256(), 0

    def update(self, data: UInt8[np.ndarray, " n"]) -> None:
        """Takes the bytes that come next."""
        at = 0
        while at < data.size:
            n = min(BLOCK_BYTES - self._filled, data.size - at)
            self._block.update(data[at : at + n].data)
            self._filled, at = self._filled + n, at + n
            if self._filled == BLOCK_BYTES:
                self._end_block()

    def blocks(self) -> bytes:
        """The hashes of the blocks, one after the other. Nothing more is taken afterwards."""
        if self._filled:
            self._end_block()
        return bytes(self._done)

    def _end_block(self) -> None:
        self._done += self._block.digest()
        self._block, self._filled = hashlib.sha256(), 0


def together(blocks: bytes) -> str:
    """The hash of a tensor: SHA-256 of its blocks' hashes, one after the other."""
    return hashlib.sha256(blocks).hexdigest()
