"""Merging again what has changed: tensors that would come out as they did before are copied from an earlier output.

Each tensor of an output has keys: hashes of everything that its bytes depend on. That is the method as it is for this
tensor, what was drawn, the dtypes, the versions of the libraries, and the tensors that it is made from. These are told
by where they lie and the state of their file, and, where a catalog knows it, by a hash of their content; so a tensor
has one key or two, and one that is the same in both merges is enough. A method with measurements over the model depends
on all tensors that it measures, so their keys do too.

Two things that an output is given do not matter to it, and are not in the key. `passthrough` depends on the model that
it copies. And where task vectors are only added up, experts at the end of the list whose tensor equals the base's add
zero. Earlier ones add zero too, but the compiled sum may then round in another order, so they count.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmerge.checkpoints.base import Checkpoint, open_checkpoint
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
from jaxmerge.streaming.fingerprint import digest, fingerprint
from jaxmerge.streaming.manifest import BLOCK_BYTES, load_manifest, method_as_data, versions
from jaxmerge.trees.lazy import CastTensor, LazyTensor, SlicedTensor, StackedTensor, TransposedTensor
from jaxmerge.trees.paths import named_leaves

Keys = Mapping[str, tuple[str, ...]]
"""Tensor → its keys."""


@dataclasses.dataclass(frozen=True)
class Known:
    """A tensor of an output whose bytes are somewhere already.

    Attributes:
        blocks: SHA-256 of its blocks.
        source: where it is read; None for the files that are being written.
        name: what it is called there.
    """

    blocks: tuple[str, ...]
    source: LazyTensor | None = None
    name: str = ""


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
        """The tensors that it holds as they would come out now.

        Args:
            keys: of the tensors that are to be written.
        """
        manifest = self.manifest
        if manifest.output.block_bytes != BLOCK_BYTES:
            return {}
        names = {key: name for name, found in manifest.run.keys.items() for key in found}
        leaves, result = named_leaves(self.checkpoint.params), {}
        for name, wanted in keys.items():
            kept = next((names[key] for key in wanted if key in names), None)
            written = None if kept is None else manifest.output.tensors.get(kept)
            leaf = None if kept is None else leaves.get(kept)
            if kept is None or written is None or leaf is None:
                continue
            # A key tells dtype and shape too, but the files may have been changed since.
            if (leaf.dtype.name, tuple(leaf.shape)) == (written.dtype, written.shape):
                result[name] = Known(written.blocks, leaf, kept)
        return result


def tensor_keys(
    tensors: Mapping[str, LazyTensor], sources: Mapping[str, Checkpoint], catalog: Catalog | None, chunk: int
) -> dict[str, tuple[str, ...]]:
    """The keys of the tensors of an output. Nothing is read but the beginnings of files.

    Args:
        tensors: what is to be written, by name.
        sources: the opened checkpoints that it is made from.
        catalog: knows the content of tensors; None tells them by their files alone.
        chunk: entries that are computed at a time, on which sums depend.

    Returns:
        Keys by tensor. Tensors without any are left out: their method holds a function or a class that is not part of
        the library, or they are made from tensors in memory or behind a URL that does not tell whether a file changed.
    """
    states, contents = {}, {}
    for checkpoint in sources.values():
        state = fingerprint(checkpoint)
        leaves = named_leaves(checkpoint.params)
        if state.lasting:
            # The path too: files of different models may have the same time, size and beginning.
            place = _place(checkpoint)
            states.update({id(leaf): ["state", place, state.tensors[name]] for name, leaf in leaves.items()})
        if catalog is not None:
            known = catalog.tensor_contents(checkpoint, state)
            contents.update({id(leaves[name]): ["content", content] for name, content in known.items()})
    around = {name: version for name, version in versions().items() if name != "python"}
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
    return result


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
        info = task.info
        facts = [list(info.shape), info.kind, list(info.input_axes), list(info.output_axes), method_as_data(info.seeds)]
        base = None if task.base is None else self.tensor(task.base)
        if isinstance(task.method, Passthrough) and not exactly:
            index = task.method._index
            copied = base if index is None else self.tensor(task.experts[index])
            return ["passthrough", method_as_data(task.method.scale), copied]
        experts = [self.tensor(expert) for expert in task.experts]
        method = task.method
        if _is_sum(method) and not exactly:
            count = max((k + 1 for k, expert in enumerate(experts) if expert != base), default=0)
            method, experts = _first(method, count), experts[:count]
        return [method_as_data(method), facts, base, experts]


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


def _place(checkpoint: Checkpoint) -> str:
    return checkpoint.path if "://" in checkpoint.path else str(Path(checkpoint.path).resolve())
