"""ComPEFT (arXiv 2311.13171): task vectors compressed to signs of their largest entries and one magnitude.

Also the compact form in which such ternary vectors are kept: one bit per entry, and one more for those that are not
zero. Packing and unpacking is exact to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.errors import MergeError
from jaxmerge.methods.coefficients import Coefficient, at_tensor, coefficient
from jaxmerge.methods.measurements import Scope, Total
from jaxmerge.methods.method import pytree
from jaxmerge.methods.stages import Chain, Stage, TaskVectors, chain
from jaxmerge.methods.task_arithmetic import total
from jaxmerge.methods.ties import trim
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.paths import Params, named_leaves

if TYPE_CHECKING:
    from jaxtyping import Shaped

_PARTS = (":mask", ":signs", ":magnitude", ":shape")


@pytree
class Ternarize(Stage):
    """See `ternarize`."""

    scale: Any = 1.0
    _size: Any = None

    @property
    def measures(self) -> Scope:
        return "model"

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Ternarize:
        return dataclasses.replace(self, scale=at_tensor(self.scale, info), _size=float(info.group_size))

    def measure(self, vectors: TaskVectors, info: TensorInfo) -> Total:
        return Total([jnp.stack([jnp.sum(d), jnp.sum(d * d)]) for d in vectors.original])

    def apply(self, vectors: TaskVectors, info: TensorInfo, measured: Any) -> TaskVectors:
        deltas = []
        for delta, (first, second) in zip(vectors.deltas, measured, strict=True):
            variance = (second - first * first / self._size) / jnp.maximum(self._size - 1, 1)
            deviation = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
            deltas.append(self.scale * deviation * jnp.sign(delta))
        return vectors.replace(deltas=tuple(deltas))


def ternarize(scale: Coefficient = 1.0) -> Stage:
    r"""Stage: replaces every entry that is left by its sign times $\alpha \sigma$.

    Args:
        scale: $\alpha$; $\sigma$ is the standard deviation of the expert's task vector over the model before any
            stage.

    Source: arXiv 2311.13171, §2.
    """
    return Ternarize(coefficient(scale))


def compeft(density: Coefficient = 0.2, *, scale: Coefficient = 1.0) -> Chain:
    r"""ComPEFT: the base plus the ternary form of the task vectors.

    $\theta = \theta_0 + \alpha \sum_i \sigma(\tau_i)\, \mathrm{sgn}(\hat\tau_i)$, with $\hat\tau_i$ the task vectors
    trimmed to their largest entries, and $\sigma$ the standard deviation, both over the whole model.

    Args:
        density: share of entries kept; 0.05 to 0.5 in the paper.
        scale: $\alpha$; tuned from 0.5 to 10 for small models, 1 serves large ones.

    Source: arXiv 2311.13171. `pack_ternary` stores such task vectors.
    """
    return chain(trim(density), ternarize(scale), total())


def pack_ternary(vector: Params) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The compact form of a ternary task vector: about one bit per entry, and one more for each that is not zero.

    Args:
        vector: a tree of float arrays, each with entries -m, 0 and m for one m of its own.

    Returns:
        A flat dict that any checkpoint format holds. Each tensor has `NAME:mask` (one bit per entry in row-major order:
        is it not zero), `NAME:signs` (one bit per such entry: is it positive), both uint8 with the first entry in the
        highest bit; `NAME:magnitude`, in the tensor's dtype; `NAME:shape`, int64.

    Raises:
        MergeError: a tensor is not ternary.

    Source: arXiv 2311.13171 counts such masks; the layout is ours.
    """
    packed = {}
    for name, leaf in named_leaves(vector).items():
        values = np.asarray(jax.device_get(leaf))
        flat = values.reshape(-1)
        mask = flat != 0
        kept = flat[mask]
        magnitude = np.abs(kept[:1]).reshape(-1) if kept.size else np.zeros(1, values.dtype)
        if not (np.abs(kept) == magnitude).all():
            raise MergeError(f"tensor {name!r}: found several magnitudes, expected -m, 0 and m; ternarize() it first")
        parts = (np.packbits(mask), np.packbits(kept > 0), magnitude, np.array(values.shape, np.int64))
        packed.update({name + part: value for part, value in zip(_PARTS, parts, strict=True)})
    return packed


def unpack_ternary(packed: Mapping[str, Any]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The task vector that `pack_ternary` has packed, bit for bit.

    Args:
        packed: its result, as it is or read from a checkpoint.

    Returns:
        Tensor name → array. `apply_task_vector` adds it to parameters of these names in any container.

    Raises:
        MergeError: a part of a tensor is missing or too short.
    """
    vector = {}
    for name in (key.removesuffix(_PARTS[0]) for key in packed if key.endswith(_PARTS[0])):
        missing = [name + part for part in _PARTS if name + part not in packed]
        if missing:
            raise MergeError(f"tensor {name!r} is packed in {len(_PARTS)} parts, but {', '.join(missing)} is not there")
        mask, signs, magnitude, shape = (np.asarray(packed[name + part]) for part in _PARTS)
        size = int(np.prod(shape))
        if mask.size != -(-size // 8) or signs.size != -(-np.count_nonzero(np.unpackbits(mask, count=size)) // 8):
            raise MergeError(f"tensor {name!r}: the packed bits do not fit the shape {tuple(shape)}; pack it again")
        kept = np.unpackbits(mask, count=size).astype(bool)
        values = np.zeros(size, magnitude.dtype)
        positive = np.unpackbits(signs, count=np.count_nonzero(kept)).astype(bool)
        values[kept] = np.where(positive, magnitude[0], -magnitude[0])
        vector[name] = values.reshape(shape)
    return vector
