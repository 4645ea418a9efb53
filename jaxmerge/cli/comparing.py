"""`jaxmerge diff`: how far experts moved from their base and from each other, layer by layer.

Only inner products of task vectors and counts of zeros are kept, and both add up over chunks, so a comparison holds one
chunk of each model at a time, whatever the size of the models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.cli.output import natural_order
from jaxmerge.errors import NonFiniteError
from jaxmerge.trees.checks import check_same_tensors, is_mergeable
from jaxmerge.trees.info import TensorInfo, tensor_infos
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import named_leaves
from jaxmerge.trees.task_vectors import accumulation_dtype

CHUNK = 1 << 20
"""Entries of each model that are in memory at a time."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """What separates K experts from their base in some part of a model.

    Attributes:
        name: the layer, such as `model.layers.3`, or the name of a tensor outside the layers.
        size: number of entries.
        base_norm: L2 norm of the base.
        products: `[K, K]` inner products of the task vectors.
        zeros: `[K]` number of entries that equal the base's.
    """

    name: str
    size: int
    base_norm: float
    products: Float[np.ndarray, "K K"]
    zeros: Float[np.ndarray, " K"]

    @property
    def norms(self) -> Float[np.ndarray, " K"]:
        """L2 norm of each task vector."""
        return np.sqrt(np.diag(self.products))

    @property
    def cosines(self) -> Float[np.ndarray, "K K"]:
        """Cosine of the angle between each two task vectors; NaN where one of them is zero."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.clip(self.products / np.outer(self.norms, self.norms), -1, 1)

    @property
    def sparsity(self) -> Float[np.ndarray, " K"]:
        """Share of each task vector's entries that are zero."""
        return self.zeros / max(self.size, 1)

    def __add__(self, other: Difference) -> Difference:
        """The two parts together, under the name of this one."""
        return Difference(
            self.name,
            self.size + other.size,
            float(np.hypot(self.base_norm, other.base_norm)),
            self.products + other.products,
            self.zeros + other.zeros,
        )


def compare(base: str, experts: Mapping[str, str]) -> list[Difference]:
    """Compares experts with their base.

    Args:
        base: path or URL.
        experts: name → path or URL.

    Returns:
        One difference per layer and per tensor outside the layers, in natural order. Tensors that are not
        floating point are left out.

    Raises:
        CheckpointError: a checkpoint cannot be opened or read.
        StructureError, ShapeError, DTypeError: an expert has other tensors than the base.
        NonFiniteError: NaN or infinity in a tensor.
    """
    with contextlib.ExitStack() as stack:
        leaves, *others = [
            named_leaves(stack.enter_context(open_checkpoint(path)).params) for path in (base, *experts.values())
        ]
        check_same_tensors(leaves, dict(zip(experts, others, strict=True)), "the base")
        infos = tensor_infos({name: leaf.shape for name, leaf in leaves.items()})
        layers: dict[str, Difference] = {}
        for name, leaf in leaves.items():
            if is_mergeable(leaf):
                difference = _difference(_layer_name(infos[name]), leaf, [other[name] for other in others])
                known = layers.get(difference.name)
                layers[difference.name] = difference if known is None else known + difference
    return sorted(layers.values(), key=lambda layer: natural_order(layer.name))


def _layer_name(info: TensorInfo) -> str:
    """The part of a tensor's name up to the number of its layer; the whole name outside the layers."""
    found = info.layer is not None and re.match(rf"(.*?(?:^|[./_])0*{info.layer})(?:[./]|$)", info.name)
    return found[1] if found else info.name


def _difference(name: str, base: LazyTensor, experts: Sequence[LazyTensor]) -> Difference:
    dtype = accumulation_dtype(base.dtype)
    products, zeros, squares = np.zeros((len(experts), len(experts))), np.zeros(len(experts)), 0.0
    for start in range(0, base.size, CHUNK):
        size = min(CHUNK, base.size - start)
        reference = _read(base, start, size).astype(dtype)
        deltas = np.empty((len(experts), size), dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below
            for delta, expert in zip(deltas, experts, strict=True):
                np.subtract(_read(expert, start, size), reference, out=delta, dtype=dtype)
            sums = deltas @ deltas.T
        if not np.isfinite(sums).all():
            raise NonFiniteError(_blame(base, experts, start, size))
        products += sums
        zeros += size - np.count_nonzero(deltas, axis=1)
        squares += float(reference @ reference)
    return Difference(name, base.size, float(np.sqrt(squares)), products, zeros)


def _read(tensor: LazyTensor, start: int, size: int) -> Any:
    entries = np.empty(size, tensor.dtype)
    tensor.read_flat(start, entries)
    return entries


def _blame(base: LazyTensor, experts: Sequence[LazyTensor], start: int, size: int) -> str:
    """The message for a chunk whose inner products are not finite."""
    for tensor in (base, *experts):
        if not np.isfinite(_read(tensor, start, size)).all():
            return f"{tensor.label}: found NaN or infinity, expected finite numbers; repair or leave out that model"
    return f"{base.label}: the difference from the base is too large to be squared; repair or leave out that model"
