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
from jaxmerge.streaming.manifest import versions
from jaxmerge.streaming.method_data import method_as_data
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
    run = runs.of(tensor)
    told = (b"%s:%d:%s" % (prefix, start, run(start, min(start + step, tensor.size))) for start in starts)
    return tuple(hashlib.sha256(x).hexdigest()[:_KEY_LETTERS] for x in told)


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


_Run = Callable[[int, int], bytes]
"""Tells what the entries `start … stop` of a flattened tensor depend on: where it tells the same, they are the same."""


class _Runs:
    """What runs of tensors depend on, as bytes. Each tensor is looked at once, since it has many blocks."""

    def __init__(self, blocks: Mapping[int, bytes], described: _Descriptions):
        self._blocks, self._described = blocks, described
        self._known: dict[int, _Run] = {}

    def tell(self, leaf: LazyTensor) -> bool:
        """Whether the runs of a tensor depend on less than all of it."""
        if any(merged.task.method.passes or merged.task.method.whole_tensor for merged in merges_within(leaf)):
            return False
        return any(self._has_blocks(leaf))

    def _has_blocks(self, leaf: LazyTensor) -> Iterator[bool]:
        yield id(leaf) in self._blocks
        for source in _run_sources(leaf):
            yield from self._has_blocks(source)

    def of(self, leaf: LazyTensor) -> _Run:
        """What tells of a tensor's runs.

        Raises:
            RecipeError, _UnknownError: nothing can be told of it.
        """
        if id(leaf) not in self._known:
            self._known[id(leaf)] = self._made(leaf)
        return self._known[id(leaf)]

    def _made(self, leaf: LazyTensor) -> _Run:
        if id(leaf) in self._blocks:
            return _run_of_blocks(leaf, self._blocks[id(leaf)])
        match leaf:
            case MergedTensor():
                return self._merged(leaf)
            case CastTensor():
                cast, source = f"cast {leaf.dtype.name}:".encode(), self.of(leaf.source)
                return lambda start, stop: cast + source(start, stop)
            case SlicedTensor() if leaf.first is not None:
                first, source = leaf.first, self.of(leaf.source)
                return lambda start, stop: source(first + start, first + stop)
            case StackedTensor():
                return _run_of_pieces([self.of(source) for source in leaf.sources], leaf.sources[0].size)
            case BudgetedTensor():
                expert, base = self.of(leaf.expert), self.of(leaf.base)
                return _run_of_pieces([expert if is_read else base for is_read in leaf.chosen], leaf.block, True)
        whole = digest(self._described.tensor(leaf)).encode()
        return lambda start, stop: whole + b":%d:%d" % (start, stop)

    def _merged(self, leaf: MergedTensor) -> _Run:
        task, exactly, methods = leaf.task, leaf.merge.allow_nonfinite, {}
        runs = {id(x): self.of(x) for x in _depended_on(task, exactly)}

        def run(start: int, stop: int) -> bytes:
            count, inputs = _depends_on(task, lambda source: runs[id(source)](start, stop), exactly)
            if count not in methods:
                methods[count] = digest([exactly, _method_as_data(task, count)]).encode()
            # What was drawn for an entry depends on where it is.
            place = b"%d:%d" % (start, stop)
            return hashlib.sha256(_joined([methods[count], place, *(x or b"" for x in inputs)])).digest()

        return run


def _run_of_blocks(leaf: LazyTensor, hashes: bytes) -> _Run:
    """Tells of a tensor by the hashes of its blocks."""
    name, step = leaf.dtype.name.encode(), BLOCK_BYTES // leaf.dtype.itemsize

    def run(start: int, stop: int) -> bytes:
        first, last = start // step, -(-stop // step)
        place = b"%s:%d:%d:" % (name, start - first * step, stop - start)
        return place + hashes[DIGEST_BYTES * first : DIGEST_BYTES * last]

    return run


def _run_of_pieces(pieces: Sequence[_Run], each: int, in_place: bool = False) -> _Run:
    """Tells of a tensor that is put together from pieces.

    Args:
        pieces: tells of each piece.
        each: entries of a piece.
        in_place: what tells of a piece is asked by the position in the tensor, not in the piece.
    """

    def run(start: int, stop: int) -> bytes:
        first, last = start // each, -(-stop // each)
        told = pieces[first]
        if in_place and all(piece is told for piece in pieces[first + 1 : last]):
            return told(start, stop)  # as if it were not cut
        parts = []
        for number in range(first, last):
            at = 0 if in_place else number * each
            ends = max(start, number * each) - at, min(stop, (number + 1) * each) - at
            parts.append(pieces[number](*ends))
        return _joined(parts)

    return run


def _depended_on(task: TensorTask, exactly: bool) -> list[LazyTensor]:
    """The inputs that a tensor may depend on; `exactly`: all of them, because they are searched for NaN or measured."""
    method = task.method
    if isinstance(method, Passthrough) and not exactly:
        sources = [task.base if method._index is None else task.experts[method._index]]
    else:
        sources = [task.base, *task.experts]
    return [source for source in sources if source is not None]


def _depends_on(task: TensorTask, told: Callable[[LazyTensor], Any], exactly: bool) -> tuple[int | None, list[Any]]:
    """Which inputs of a tensor matter: how many of the experts, and what is told of the base and of these.

    Args:
        task: the tensor.
        told: tells of an input; where it tells the same of two, they are equal.
        exactly: all inputs matter.

    Returns:
        The number, or None for a method that copies one of the inputs; and the inputs.
    """
    inputs = [told(source) for source in _depended_on(task, exactly)]
    if isinstance(task.method, Passthrough) and not exactly:
        return None, inputs
    base, experts = (None, inputs) if task.base is None else (inputs[0], inputs[1:])
    if exactly or not _is_sum(task.method):
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
