"""What is known about a tensor before it is read: its name, place in depth, axes and kind.

Operators never speak of axis numbers but of *input* and *output* axes: a Flax `kernel` is (…, in, out), a Hugging Face
`weight` is (out, in, …), and the same operator must give the transposed result on the transposed tensor.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from jaxmerge.errors import RecipeError
from jaxmerge.trees.paths import match_rules

Kind = Literal["kernel", "embedding", "norm", "bias", "other"]
Layout = Literal["flax", "huggingface"]

_FIRST_NUMBER = re.compile(r"(?:^|[./])(?:[^./]*_)?(\d+)(?=[./]|$)")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor, as a method sees it.

    Attributes:
        name: its name; empty inside a compiled program, which serves every tensor of a shape.
        shape: the shape of the whole tensor (also when a method is given a chunk of it).
        kind: kernel, embedding, norm, bias or other, judged by name and rank.
        input_axes: axes summed over when the layer is applied; empty for vectors.
        output_axes: axes that index the layer's outputs.
        layer: index of the layer in its stack, from 0; None outside any stack.
        num_layers: number of layers of that stack; 0 outside.
        group_size: number of entries of all tensors that the same method merges (model-wide measurements).
        offset: flat position of the chunk's first entry in the tensor.
        seeds: `[K, 2]` uint32, one pair per expert, for methods that draw.
    """

    name: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    kind: Kind = dataclasses.field(default="other", metadata={"static": True})
    input_axes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    output_axes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    layer: int | None = dataclasses.field(default=None, metadata={"static": True})
    num_layers: int = dataclasses.field(default=0, metadata={"static": True})
    group_size: int = dataclasses.field(default=0, metadata={"static": True})
    offset: Any = 0
    seeds: Any = None

    @property
    def size(self) -> int:
        """Number of entries of the whole tensor."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def depth(self) -> float | None:
        """Relative depth: 0 for the first layer of a stack, 1 for the last; None outside any stack of two or more."""
        return None if self.layer is None or self.num_layers < 2 else self.layer / (self.num_layers - 1)

    def for_program(self) -> TensorInfo:
        """The part that a compiled program may depend on: everything but name, place and group."""
        return dataclasses.replace(self, name="", layer=None, num_layers=0, group_size=0)


jax.tree_util.register_dataclass(TensorInfo)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How to read names, where the defaults guess wrong.

    Attributes:
        stacked: patterns of leaves that hold one tensor per layer along axis 0 (scanned models).
        layout: `"flax"` or `"huggingface"` for every tensor; None judges each by its name (`kernel` is Flax).
        layer: a regular expression (searched, not matched) whose last group is the layer number and everything before
            it the name of the stack; None takes the first path component that is a number or ends in `_` and a number.
    """

    stacked: tuple[str, ...] = ()
    layout: Layout | None = None
    layer: str | None = None


def tensor_infos(shapes: Mapping[str, tuple[int, ...]], rules: Rules = Rules()) -> dict[str, TensorInfo]:
    """Infos of all tensors of a model, from their names and shapes alone.

    Args:
        shapes: name → shape. For a stacked leaf the shape includes the layer axis; its info describes one layer, has
            `layer` None and `num_layers` the length of that axis.
        rules: exceptions to the way names are read.

    Raises:
        RecipeError: a rule matches nothing, or names a leaf without axes as stacked.
    """
    stacked = match_rules(rules.stacked, shapes)
    places = _layers((name for name in shapes if stacked[name] is None), rules.layer)
    infos = {}
    for name, shape in shapes.items():
        layer, num_layers = places.get(name, (None, 0))
        if stacked[name] is not None:
            if not shape:
                raise RecipeError(f"{name!r} is a scalar and cannot be stacked; correct the rule {stacked[name]!r}")
            num_layers, shape = shape[0], shape[1:]
        kind = tensor_kind(name, len(shape))
        inputs, outputs = tensor_axes(name, len(shape), kind, rules.layout)
        infos[name] = TensorInfo(name, tuple(shape), kind, inputs, outputs, layer, num_layers)
    return infos


def tensor_kind(name: str, ndim: int) -> Kind:
    """The kind of a tensor, judged by its name and rank."""
    parts = re.split(r"[./]", name.lower())
    leaf, path = parts[-1], "/".join(parts)
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    if re.search(r"norm|(^|/)ln(_|\d|/|$)|layer_?norm", path) or (leaf == "scale" and ndim <= 1):
        return "norm"
    if (
        re.search(r"embed|(^|/)wte|(^|/)wpe|cls_token", path)
        and not re.search(r"patch_embed", path)
        or leaf == "embedding"
    ):
        return "embedding"
    return "kernel" if ndim >= 2 else "other"


def tensor_axes(
    name: str, ndim: int, kind: Kind, layout: Layout | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Input and output axes of a tensor.

    A Flax kernel is (window…, in, out), attention's fused kernels are (in, heads, size) and, for the output projection,
    (heads, size, out). Everything else follows PyTorch: (out, in, window…). An embedding is (token, feature) in both.
    """
    if ndim < 2:
        return (), ()
    if kind == "embedding":
        return tuple(range(ndim - 1)), (ndim - 1,)
    leaf = re.split(r"[./]", name)[-1]
    if (layout or ("flax" if leaf == "kernel" else "huggingface")) == "huggingface":
        return (1,), (0,)
    if ndim == 3 and re.search(r"(^|/)(query|key|value|q|k|v)/kernel$", name):
        return (0,), (1, 2)
    if ndim == 3 and re.search(r"(^|/)(out|o)/kernel$", name):
        return (0, 1), (2,)
    return (ndim - 2,), (ndim - 1,)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor's name has the number of its layer.

    Attributes:
        layer: the number.
        start: position of its first digit in the name.
        stop: position after its last digit.
        stack: the name up to the number, the same for all tensors of a stack.
    """

    layer: int
    start: int
    stop: int
    stack: str


def layer_place(name: str, pattern: str | None = None) -> Place | None:
    """The place of the layer number in a tensor's name; None for a tensor outside any stack.

    Args:
        name: the tensor's name.
        pattern: as `Rules.layer`.
    """
    hit = _FIRST_NUMBER.search(name) if pattern is None else re.search(pattern, name)
    if hit is None:
        return None
    start, stop = hit.span(hit.lastindex or 0)
    return Place(int(name[start:stop]), start, stop, name[:start])


def _layers(names: Iterable[str], pattern: str | None) -> dict[str, tuple[int, int]]:
    """Layer number and number of layers, by name, for every tensor inside a stack of layers."""
    found = {name: place for name in names if (place := layer_place(name, pattern)) is not None}
    last: dict[str, int] = {}
    for place in found.values():
        last[place.stack] = max(last.get(place.stack, 0), place.layer)
    return {name: (place.layer, last[place.stack] + 1) for name, place in found.items()}
