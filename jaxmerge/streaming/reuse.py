"""Merging again what has changed: tensors that would come out as they did before are copied from an earlier output.

Which those are, keys tell (`jaxmerge.streaming.keys`). Of a tensor of which only some blocks would be the same, those
are copied.
"""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.checkpoints.layout import TensorSpec
from jaxmerge.streaming.content import BLOCK_BYTES
from jaxmerge.streaming.keys import Keys
from jaxmerge.streaming.manifest import TensorHash, load_manifest
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import named_leaves


@dataclasses.dataclass(frozen=True)
class Known:
    """A tensor of an output whose bytes, or some of them, are somewhere already.

    Attributes:
        blocks: SHA-256 of its blocks; empty text for those that are not there.
        source: where it is read; None for the files that are being written.
        name: what it is called there.
    """

    blocks: tuple[str, ...]
    source: LazyTensor | None = None
    name: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there."""
        return all(self.blocks)

    def nbytes_of(self, spec: TensorSpec) -> int:
        """Bytes of the blocks that are there."""
        return sum(min(BLOCK_BYTES, spec.nbytes - i * BLOCK_BYTES) for i, x in enumerate(self.blocks) if x)


class Previous:
    """An earlier output. As a context manager it is closed at the end of the block.

    Attributes:
        path: as it was given.
        manifest: what it holds.
        checkpoint: it, opened.
    """

    def __init__(self, path: str | Path):
        """Opens it.

        Raises:
            CheckpointError: it is no output with a manifest, or cannot be opened.
        """
        self.path, self.manifest = str(path), load_manifest(path)
        self.checkpoint = open_checkpoint(path)

    def __enter__(self) -> Previous:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.checkpoint.close()

    def find(self, keys: Keys) -> dict[str, Known]:
        """The tensors that it holds, or holds in part, as they would come out now.

        Args:
            keys: of what is to be written.
        """
        output, run = self.manifest.output, self.manifest.run
        if output.block_bytes != BLOCK_BYTES:
            return {}
        names = {key: name for name, found in run.keys.items() for key in found}
        leaves, result = named_leaves(self.checkpoint.params), {}

        def written(name: str) -> TensorHash | None:
            """What was written, unless the file holds something else now."""
            there, leaf = output.tensors.get(name), leaves.get(name)
            if there is None or leaf is None or (leaf.dtype.name, tuple(leaf.shape)) != (there.dtype, there.shape):
                return None
            return there

        for name, wanted in keys.tensors.items():
            kept = next((names[key] for key in wanted if key in names), None)
            if kept is not None and (there := written(kept)) is not None:
                result[name] = Known(there.blocks, leaves[kept], kept)
        for name, wanted in keys.blocks.items():
            before, there = run.block_keys.get(name, ()), written(name)
            if name in result or there is None or not len(before) == len(wanted) == len(there.blocks):
                continue
            blocks = tuple(x if a == b else "" for x, a, b in zip(there.blocks, before, wanted, strict=True))
            if any(blocks):
                result[name] = Known(blocks, leaves[name], name)
        return result
