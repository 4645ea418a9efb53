"""Keys: hashes of all that the bytes of an output depend on, by which a later merge knows what would come out the same.

For a tensor that is the method as it is for this tensor, what was drawn, the dtypes, the versions of the libraries, and
the tensors that it is made from. These are told by where they lie and the state of their file, and, where a catalog
knows it, by a hash of their content; so a tensor has one key or two, and one that is the same in both merges is enough.
A method with measurements over the model depends on all tensors that it measures, so their keys do too.

Where a tensor is merged entry by entry, and a catalog knows the content of what it is made from, each of its blocks has
a key too. It holds the blocks of the inputs that lie in the same place, so that merging again touches only those blocks
in which something has changed.

Two things that an output is given do not matter to it, and are not in the key. `passthrough` depends on the model that
it copies. And where task vectors are only added up, experts at the end of the list whose tensor (or block) equals the
base's add zero. Earlier ones add zero too, but the compiled sum may then round in another order, so they count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmerge.checkpoints.base import Checkpoint
from jaxmerge.errors import RecipeError
from jaxmerge.methods.assignment import TensorTask
from jaxmerge.methods.choosing import Passthrough
from jaxmerge.methods.lazy import CopiedTensor, LazyMerge, MergedTensor
from jaxmerge.methods.lines import ScaleByDepth
from jaxmerge.methods.method import Method
from jaxmerge.methods.stages import Chain
from jaxmerge.methods.task_arithmetic import Scale, Total, Weigh
from jaxmerge.streaming.budgeted import BudgetedTensor
from jaxmerge.streaming.catalog import Catalog
from jaxmerge.streaming.content import BLOCK_BYTES, DIGEST_BYTES, together
from jaxmerge.streaming.fingerprint import digest, fingerprint
from jaxmerge.streaming.manifest import method_as_data, versions
from jaxmerge.streaming.plan import merges_within
from jaxmerge.trees.lazy import CastTensor, LazyTensor, SlicedTensor, StackedTensor, TransposedTensor
from jaxmerge.trees.paths import named_leaves

_KEY_LETTERS = 32  # of a block's key: there are many


class Keys(NamedTuple):
    """The keys of an output.

    Attributes:
        tensors: tensor → its keys. Tensors without any are left out: their method holds a function or a class that is
            not part of the library, or they are made from tensors in memory or behind a URL that does not tell whether
            a file changed.
        blocks: tensor → the key of each of its blocks. Only for tensors whose blocks depend on less than all of it.
    """

    tensors: Mapping[str, tuple[str, ...]]
    blocks: Mapping[str, tuple[str, ...]]


def output_keys(
    tensors: Mapping[str, LazyTensor], sources: Mapping[str, Checkpoint], catalog: Catalog | None, chunk: int
) -> Keys:
    """The keys of the tensors of an output and of their blocks. Nothing is read but the beginnings of files.

    Args:
        tensors: what is to be written, by name.
        sources: the opened checkpoints that it is made from.
        catalog: knows the content of tensors; None tells them by their files alone.
        chunk: entries that are computed at a time, on which sums depend.
    """
    states, blocks = {}, {}
    for checkpoint in sources.values():
        state = fingerprint(checkpoint)
        leaves = named_leaves(checkpoint.params)
        if state.lasting:
            # The path too: files of different models may have the same time, size and beginning.
            place = _place(checkpoint)
            states.update({id(leaf): ["state", place, state.tensors[name]] for name, leaf in leaves.items()})
        if catalog is not None:
            known = catalog.tensor_contents(checkpoint, state)
            blocks.update({id(leaves[name]): hashes for name, hashes in known.items()})
    contents = {leaf: ["content", together(hashes)] for leaf, hashes in blocks.items()}
    around: dict[str, Any] = {name: version for name, version in versions().items() if name != "python"}
    around["float"] = jnp.result_type(float).name
    result: dict[str, tuple[str, ...]] = {}
    for told in (states, {**states, **contents}) if contents else (states,):
        described = _Descriptions(told, chunk)
        for name, tensor in tensors.items():
            try:
                key = digest([around, tensor.dtype.name, list(tensor.shape), described.tensor(tensor)])
            except (RecipeError, _UnknownError):
                continue
            result[name] = tuple(dict.fromkeys((*result.get(name, ()), key)))
    runs = _Runs(blocks, _Descriptions({**states, **contents}, chunk))
    of_blocks = {name: _block_keys(tensor, runs, around) for name, tensor in tensors.items() if name in result}
    return Keys(result, {name: keys for name, keys in of_blocks.items() if keys})


def _block_keys(tensor: LazyTensor, runs: _Runs, around: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the blocks of a tensor; none if they would tell no more than the tensor's key."""
    step = BLOCK_BYTES // tensor.dtype.itemsize
    if tensor.size <= step or not runs.tell(tensor):
        return ()
    prefix = digest([around, tensor.dtype.name, list(tensor.shape)]).encode()
    starts = range(0, tensor.size, step)
    found = (runs.run(tensor, start, min(start + step, tensor.size)) for start in starts)
    return tuple(
        hashlib.sha256(prefix + struct.pack("<Q", start) + run).hexdigest()[:_KEY_LETTERS]
        for start, run in zip(starts, found, strict=True)
    )


class _UnknownError(Exception):
    """A tensor is of unknown content."""


class _Descriptions:
    """What tensors depend on, as plain data."""

    def __init__(self, stored: Mapping[int, Any], chunk: int):
        self._stored, self._chunk = stored, chunk
        self._known: dict[int, Any] = {}
        self._groups: dict[tuple[int, int], str] = {}

    def tensor(self, leaf: LazyTensor) -> Any:
        """What the bytes of a lazy tensor depend on."""
        if id(leaf) not in self._known:
            self._known[id(leaf)] = self._described(leaf)
        return self._known[id(leaf)]

    def _described(self, leaf: LazyTensor) -> Any:
        if id(leaf) in self._stored:
            return [*self._stored[id(leaf)], leaf.dtype.name, list(leaf.shape)]
        match leaf:
            case MergedTensor():
                return self._merged(leaf.merge, leaf.task)
            case CopiedTensor():
                return ["copied", self.tensor(leaf.source), [self.tensor(x) for x in leaf.others]]
            case BudgetedTensor():
                if not leaf.chosen.any():
                    return self.tensor(leaf.base)
                chosen = np.packbits(leaf.chosen).tobytes().hex()
                return ["budgeted", self.tensor(leaf.expert), self.tensor(leaf.base), leaf.block, chosen]
            case CastTensor():
                return ["cast", leaf.dtype.name, self.tensor(leaf.source)]
            case TransposedTensor():
                return ["transposed", list(leaf.axes), self.tensor(leaf.source)]
            case SlicedTensor():
                box = [[piece.start, piece.stop] for piece in leaf.box]
                return ["sliced", box, sorted(leaf.squeezed), self.tensor(leaf.source)]
            case StackedTensor():
                return ["stacked", [self.tensor(source) for source in leaf.sources]]
        raise _UnknownError

    def _merged(self, merge: LazyMerge, task: TensorTask) -> Any:
        told: list[Any] = ["merged", merge.allow_nonfinite, *self._task(task, merge.allow_nonfinite)]
        if task.method.passes:
            told.append(self._chunk)
        if "model" in task.method.passes:
            group = (id(merge), task.group)
            if group not in self._groups:
                self._groups[group] = digest([self._task(other, True) for other in merge.group(task)])
            told.append(self._groups[group])
        return told

    def _task(self, task: TensorTask, exactly: bool) -> list[Any]:
        """The method and the inputs of a tensor."""
        count, inputs = _depends_on(task, self.tensor, exactly)
        return [_method_as_data(task, count), *inputs]


class _Runs:
    """What runs of tensors depend on, as bytes: where these are equal, so are the entries."""

    def __init__(self, blocks: Mapping[int, bytes], described: _Descriptions):
        self._blocks, self._described = blocks, described
        self._methods: dict[tuple[int, int | None], bytes] = {}
        self._wholes: dict[int, bytes] = {}

    def tell(self, leaf: LazyTensor) -> bool:
        """Whether the runs of a tensor depend on less than all of it."""
        if any(merged.task.method.passes or merged.task.method.whole_tensor for merged in merges_within(leaf)):
            return False
        return any(self._has_blocks(leaf))

    def _has_blocks(self, leaf: LazyTensor) -> Iterator[bool]:
        yield id(leaf) in self._blocks
        for source in _run_sources(leaf):
            yield from self._has_blocks(source)

    def run(self, leaf: LazyTensor, start: int, stop: int) -> bytes:
        """What the entries `start … stop` of a flattened tensor depend on."""
        hashes = self._blocks.get(id(leaf))
        if hashes is not None:
            step = BLOCK_BYTES // leaf.dtype.itemsize
            first, last = start // step, -(-stop // step)
            place = f"{leaf.dtype.name}:{start - first * step}:{stop - start}:".encode()
            return place + hashes[DIGEST_BYTES * first : DIGEST_BYTES * last]
        match leaf:
            case MergedTensor():
                return self._merged(leaf, start, stop)
            case CastTensor():
                return f"cast {leaf.dtype.name}:".encode() + self.run(leaf.source, start, stop)
            case SlicedTensor() if leaf.first is not None:
                return self.run(leaf.source, leaf.first + start, leaf.first + stop)
            case StackedTensor():
                each = leaf.sources[0].size
                layers = range(start // each, -(-stop // each))
                bounds = [(max(start - i * each, 0), min(stop - i * each, each)) for i in layers]
                return _joined(self.run(leaf.sources[i], *ends) for i, ends in zip(layers, bounds, strict=True))
            case BudgetedTensor():
                return self._budgeted(leaf, start, stop)
        if id(leaf) not in self._wholes:
            self._wholes[id(leaf)] = digest(self._described.tensor(leaf)).encode()
        return self._wholes[id(leaf)] + f":{start}:{stop}".encode()

    def _merged(self, leaf: MergedTensor, start: int, stop: int) -> bytes:
        exactly = leaf.merge.allow_nonfinite
        count, inputs = _depends_on(leaf.task, lambda source: self.run(source, start, stop), exactly)
        if (id(leaf), count) not in self._methods:
            self._methods[id(leaf), count] = digest([exactly, _method_as_data(leaf.task, count)]).encode()
        # What was drawn for an entry depends on where it is.
        place = f"{start}:{stop}".encode()
        return hashlib.sha256(_joined([self._methods[id(leaf), count], place, *(x or b"" for x in inputs)])).digest()

    def _budgeted(self, leaf: BudgetedTensor, start: int, stop: int) -> bytes:
        chosen = leaf.chosen[start // leaf.block : -(-stop // leaf.block)]
        if chosen.all() or not chosen.any():
            return self.run(leaf.expert if chosen.all() else leaf.base, start, stop)
        first = start // leaf.block * leaf.block
        pieces = []
        for is_read, at in zip(chosen, range(first, stop, leaf.block), strict=True):
            source = leaf.expert if is_read else leaf.base
            pieces.append(self.run(source, max(at, start), min(at + leaf.block, stop)))
        return _joined(pieces)


def _depends_on(task: TensorTask, told: Callable[[LazyTensor], Any], exactly: bool) -> tuple[int | None, list[Any]]:
    """Which inputs of a tensor matter: how many of the experts, and what is told of the base and of these.

    Args:
        task: the tensor.
        told: tells of an input; where it tells the same of two, they are equal.
        exactly: all inputs matter, because they are searched for NaN or measured.

    Returns:
        The number, or None for a method that copies one of the inputs; and the inputs.
    """
    method = task.method
    if isinstance(method, Passthrough) and not exactly:
        source = task.base if method._index is None else task.experts[method._index]
        assert source is not None
        return None, [told(source)]
    base, experts = None if task.base is None else told(task.base), [told(expert) for expert in task.experts]
    if exactly or not _is_sum(method):
        return len(experts), [base, *experts]
    count = max((k + 1 for k, expert in enumerate(experts) if expert != base), default=0)
    return count, [base, *experts[:count]]


def _method_as_data(task: TensorTask, count: int | None) -> Any:
    """The method of a tensor for its first `count` experts, and what it is told of the tensor.

    Raises:
        RecipeError: something in it cannot be written down.
    """
    info, method = task.info, task.method
    if count is None:
        assert isinstance(method, Passthrough)
        return ["passthrough", method_as_data(method.scale)]
    facts = [list(info.shape), info.kind, list(info.input_axes), list(info.output_axes), method_as_data(info.seeds)]
    return [method_as_data(_first(method, count) if count < len(task.experts) else method), facts]


def _is_sum(method: Method) -> bool:
    """Whether a method adds multiples of the task vectors to the base, and each is what it is without the others."""
    stages = method.stages if isinstance(method, Chain) else ()
    plain = all(isinstance(stage, Weigh | Total | Scale | ScaleByDepth) for stage in stages)
    return bool(stages) and plain and not method.passes and not any(getattr(x, "normalize", False) for x in stages)


def _first(method: Method, count: int) -> Method:
    """A sum over the first experts only."""
    assert isinstance(method, Chain)
    return Chain(
        tuple(
            dataclasses.replace(stage, weights=stage.weights[:count]) if isinstance(stage, Weigh) else stage
            for stage in method.stages
        )
    )


def _run_sources(leaf: LazyTensor) -> list[LazyTensor]:
    """The tensors whose runs a run of this one is made from."""
    match leaf:
        case MergedTensor():
            return [source for source in (leaf.task.base, *leaf.task.experts) if source is not None]
        case BudgetedTensor():
            return [leaf.expert, leaf.base]
        case StackedTensor():
            return list(leaf.sources)
        case CastTensor():
            return [leaf.source]
        case SlicedTensor() if leaf.first is not None:
            return [leaf.source]
    return []


def _joined(parts: Iterator[bytes] | Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(part)) + part for part in parts)


def _place(checkpoint: Checkpoint) -> str:
    return checkpoint.path if "://" in checkpoint.path else str(Path(checkpoint.path).resolve())
