"""`jaxmerge inspect`: what is in a checkpoint. Headers are read, tensors are not."""

from __future__ import annotations

from typing import Any

from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.cli.output import natural_order
from jaxmerge.trees.info import tensor_infos
from jaxmerge.trees.paths import named_leaves


def describe(location: str) -> dict[str, Any]:
    """A checkpoint and its tensors, as plain data.

    Args:
        location: path or URL.

    Returns:
        `path`, `format`, `bytes` and `parameters` (tied tensors counted once), `metadata`, and `tensors`: for each its
        `name`, `dtype`, `shape`, `bytes`, `kind`, `layer` (None outside a stack of layers) and `tied_to` (None, or the
        name that it is stored under).

    Raises:
        CheckpointError: there is no checkpoint there, or it is corrupt.
    """
    with open_checkpoint(location) as checkpoint:
        leaves = named_leaves(checkpoint.params)
        infos = tensor_infos({name: leaf.shape for name, leaf in leaves.items()})
        tensors = [
            {
                "name": name,
                "dtype": leaf.dtype.name,
                "shape": list(leaf.shape),
                "bytes": leaf.nbytes,
                "kind": infos[name].kind,
                "layer": infos[name].layer,
                "tied_to": checkpoint.aliases.get(name),
            }
            for name, leaf in sorted(leaves.items(), key=lambda item: natural_order(item[0]))
        ]
        return {
            "path": checkpoint.path,
            "format": checkpoint.format,
            "bytes": checkpoint.nbytes,
            "parameters": sum(leaf.size for name, leaf in leaves.items() if name not in checkpoint.aliases),
            "metadata": checkpoint.metadata,
            "tensors": tensors,
        }
