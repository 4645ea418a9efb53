"""The manifest: what a merged folder holds and what it was made from, in one JSON file beside the tensors.

Its hashed part is plain data that says which merge it was (method, coefficients, inputs) and which bytes came out; the
SHA-256 of that part is the manifest's id. The same merge of the same files has the same id; times, versions and bytes
read stand beside it. Tensors are hashed by the workers as they are written, so no byte is read a second time for it.

(MergePipe, arXiv 2602.13273, stores a hash for each block too. What is in our file, and its form, is our own.)
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from jaxmerge.checkpoints.base import Checkpoint, open_checkpoint
from jaxmerge.checkpoints.layout import DTYPES, TensorSpec
from jaxmerge.checkpoints.publish import as_checkpoint_error, sync
from jaxmerge.errors import CheckpointError, RecipeError
from jaxmerge.methods.method import Method
from jaxmerge.streaming.budget import AccessPlan
from jaxmerge.streaming.content import BLOCK_BYTES, together
from jaxmerge.streaming.fingerprint import digest, fingerprint
from jaxmerge.streaming.method_data import key_as_data, method_as_data
from jaxmerge.trees.info import Rules
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import named_leaves

MANIFEST = "jaxmerge.json"
"""What the file is called."""

_VERSION = 1
_LARGEST = 1 << 30  # no manifest comes near: this is what 16 TiB of tensors need
_MOST_WORKERS = 4
_MOST_NUMBERS = 1 << 20  # bytes of a method's coefficients; statistics of large models are kept in files


@dataclasses.dataclass(frozen=True)
class Input:
    """A model that went into a merge.

    Attributes:
        name: the expert's name, `"the base"` for the base.
        path: path or URL as it was given; None for a tree of tensors in memory.
        fingerprint: the state of its files; None where that cannot be known.
    """

    name: str
    path: str | None
    fingerprint: str | None


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge as plain data.

    Attributes:
        method: the method as text.
        recipe: the method as `method_as_data` gives it; None if it holds something that is no data.
        base: the base, or None.
        experts: the experts, in order.
        key: seed or PRNG key as plain data, or None.
        dtype: floating-point dtype of the result, or None for that of the inputs.
        rules: how names were read.
        allow_nonfinite: whether NaN and infinity could pass.
        plan: digest of the access plan of a merge within an I/O budget, which names every block that was read.
    """

    method: str
    recipe: Any
    base: Input | None
    experts: tuple[Input, ...]
    key: Any
    dtype: str | None
    rules: Rules
    allow_nonfinite: bool
    plan: str | None = None


@dataclasses.dataclass(frozen=True)
class TensorHash:
    """A tensor that was written.

    Attributes:
        dtype: its dtype.
        shape: its shape.
        blocks: SHA-256 of each block of its bytes (row-major, little-endian), the last of which may be short.
        sha256: SHA-256 of the blocks' hashes, one after the other, as bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[str, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        """Number of its bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Output:
    """What was written.

    Attributes:
        format: "safetensors" or "orbax".
        max_shard_bytes: size of the files that a safetensors folder was split into.
        block_bytes: bytes of a block.
        tensors: by name.
        tied: further names of tensors.
    """

    format: str
    max_shard_bytes: int | None
    block_bytes: int
    tensors: dict[str, TensorHash]
    tied: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Copied:
    """Tensors that were copied from an earlier output instead of being merged again.

    Attributes:
        path: that output, as it was given.
        id: of its manifest.
        tensors: those that were copied whole: name → its name there.
        blocks: those that were copied in part: name → the numbers of the blocks; the others were merged.
    """

    path: str
    id: str
    tensors: dict[str, str]
    blocks: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """What is told beside the hashed part, because it may differ between merges that are the same.

    Attributes:
        versions: of Python and of the libraries.
        finished: when the tensors were written, in UTC.
        memory_budget: bytes. With another one, sums may be taken in another order.
        bytes_read: bytes fetched from each checkpoint, by name.
        recipe: text of the recipe, where there was one.
        keys: tensor → its keys (`jaxmerge.streaming.keys`), by which a later merge knows that it would be the same.
        block_keys: tensor → the keys of its blocks, where these depend on less than all of it.
        copied: what was copied from an earlier output; None without one.
    """

    versions: dict[str, str]
    finished: str
    memory_budget: int
    bytes_read: dict[str, int]
    recipe: str | None = None
    keys: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    copied: Copied | None = None
    block_keys: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a merged folder holds, and what it was made from.

    Attributes:
        id: SHA-256 of the hashed part: version, merge and output.
        merge: the merge.
        output: what was written.
        run: what is not hashed.
        io_plan: the blocks that were read within an I/O budget; None without one. Its digest is hashed.
    """

    id: str
    merge: Merge
    output: Output
    run: Run
    io_plan: AccessPlan | None = None


class BlockHashes:
    """Hashes of tensors that are written piece by piece, in any order, from any thread.

    A block that comes in one piece is hashed where it lies. One that comes in several is put together first; since
    pieces are written nearly in order, a few blocks at most are waiting at any time.
    """

    def __init__(self, specs: Iterable[TensorSpec], block_bytes: int = BLOCK_BYTES):
        self._specs = {spec.name: spec for spec in specs}
        self._block = block_bytes
        self._hashes = {name: [""] * -(-spec.nbytes // block_bytes) for name, spec in self._specs.items()}
        self._waiting: dict[tuple[str, int], tuple[bytearray, list[int]]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, start: int, values: Shaped[np.ndarray, " n"]) -> None:
        """Hashes the entries `start … start + n` of a flattened tensor, which are given once."""
        data = np.ascontiguousarray(values).view(np.uint8)
        at, size = start * values.dtype.itemsize, self._specs[name].nbytes
        end = at + data.size
        for number in range(at // self._block, -(-end // self._block)):
            first, last = number * self._block, min((number + 1) * self._block, size)
            piece = data[max(first - at, 0) : last - at]
            if piece.size == last - first:
                self._hashes[name][number] = hashlib.sha256(piece.data).hexdigest()
            else:
                self._put_together(name, number, last - first, max(at - first, 0), piece)

    def _put_together(self, name: str, number: int, size: int, at: int, piece: Shaped[np.ndarray, " n"]) -> None:
        with self._lock:
            block, missing = self._waiting.setdefault((name, number), (bytearray(size), [size]))
            block[at : at + piece.size] = piece.data
            missing[0] -= piece.size
            if missing[0]:
                return
            del self._waiting[name, number]
        self._hashes[name][number] = hashlib.sha256(block).hexdigest()

    def take_over(self, name: str, number: int, sha256: str) -> None:
        """Takes the hash of a block that is not given, because its bytes are there and have been hashed."""
        self._hashes[name][number] = sha256

    def found(self) -> dict[str, dict[int, str]]:
        """The hashes of the blocks that were given so far, by tensor and number."""
        return {name: {i: x for i, x in enumerate(hashes) if x} for name, hashes in self._hashes.items() if any(hashes)}

    def take_found(self, found: Mapping[str, Mapping[int, str]]) -> None:
        """Takes hashes of blocks that were given elsewhere."""
        for name, hashes in found.items():
            for number, text in hashes.items():
                self._hashes[name][int(number)] = text

    def read_missing(self, read: Callable[[str, int, Shaped[np.ndarray, " n"]], None]) -> None:
        """Hashes the blocks that were given in part here and in part elsewhere.

        Args:
            read: fills an array with the entries of a tensor from a flat position on, as they were written.
        """
        for name, hashes in self._hashes.items():
            spec = self._specs[name]
            step = self._block // spec.dtype.itemsize
            for number in (i for i, text in enumerate(hashes) if not text):
                values = np.empty(min(step, spec.size - number * step), spec.dtype)
                read(name, number * step, values)
                hashes[number] = hashlib.sha256(values.view(np.uint8).data).hexdigest()

    def blocks(self, name: str) -> tuple[str, ...]:
        """The hashes of a tensor's blocks, when all of its entries have been given."""
        return tuple(self._hashes[name])

    def tensors(self) -> dict[str, TensorHash]:
        """The hashes, when every entry has been given."""
        return {
            name: TensorHash(spec.dtype.name, spec.shape, self.blocks(name), _of_blocks(self.blocks(name)))
            for name, spec in self._specs.items()
        }


@dataclasses.dataclass(frozen=True)
class TensorFault:
    """A tensor that is not what was written.

    Attributes:
        tensor: its name.
        problem: what is wrong.
        blocks: the numbers of the blocks that differ.
    """

    tensor: str
    problem: str
    blocks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.tensor}: {self.problem}"


def describe_merge(
    method: Method,
    experts: Mapping[str, tuple[str | None, Checkpoint | None]],
    base: tuple[str | None, Checkpoint | None] | None,
    *,
    key: Any,
    dtype: str | None,
    rules: Rules,
    allow_nonfinite: bool,
) -> Merge:
    """A merge as plain data.

    Args:
        method: the method.
        experts: name → path as given and opened checkpoint, both None for a tree in memory.
        base: path and checkpoint of the base, or None.
        key: PRNG key or integer seed, or None.
        dtype: floating-point dtype of the result.
        rules: how names are read.
        allow_nonfinite: whether NaN and infinity may pass.
    """

    def described(name: str, path: str | None, checkpoint: Checkpoint | None) -> Input:
        state = None if checkpoint is None else fingerprint(checkpoint)
        return Input(name, path, state.model if state is not None and state.lasting else None)

    try:
        if sum(np.asarray(x).nbytes for x in jax.tree.leaves(method) if not isinstance(x, LazyTensor)) > _MOST_NUMBERS:
            raise RecipeError("the method holds statistics in memory")
        recipe, told_key = method_as_data(method), key_as_data(key)
    except RecipeError:  # it is merged, but can only be described
        recipe = told_key = None
    return Merge(
        repr(method),
        recipe,
        None if base is None else described("the base", *base),
        tuple(described(name, *model) for name, model in experts.items()),
        told_key,
        None if dtype is None else np.dtype(dtype).name,
        rules,
        allow_nonfinite,
    )


def write_manifest(
    folder: Path,
    merge: Merge,
    output: Output,
    *,
    memory_budget: int,
    bytes_read: Mapping[str, int],
    recipe: str | None = None,
    io_plan: AccessPlan | None = None,
    keys: Mapping[str, tuple[str, ...]] = types.MappingProxyType({}),
    block_keys: Mapping[str, tuple[str, ...]] = types.MappingProxyType({}),
    copied: Copied | None = None,
) -> str:
    """Writes the manifest of a folder that is about to be published, and makes it durable.

    Args:
        folder: where to write it.
        merge: the merge.
        output: what was written.
        memory_budget: bytes of memory that the merge could take.
        bytes_read: bytes fetched from each checkpoint.
        recipe: text of the recipe.
        io_plan: the access plan of a merge within an I/O budget.
        keys: the keys of the tensors.
        block_keys: the keys of the blocks of some of them.
        copied: what was copied from an earlier output.

    Returns:
        The id.

    Raises:
        CheckpointError: it cannot be written.
    """
    if io_plan is not None:
        merge = dataclasses.replace(merge, plan=io_plan.digest)
    hashed = {"version": _VERSION, "merge": dataclasses.asdict(merge), "output": dataclasses.asdict(output)}
    finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run = Run(versions(), finished, memory_budget, dict(bytes_read), recipe, dict(keys), copied, dict(block_keys))
    found = digest(hashed)
    told = {
        "id": found,
        "manifest": hashed,
        "run": dataclasses.asdict(run),
        "io_plan": None if io_plan is None else io_plan.as_data(),
    }
    with as_checkpoint_error(f"write {MANIFEST}"):
        (folder / MANIFEST).write_text(json.dumps(told, sort_keys=True, separators=(",", ":")), encoding="utf-8")
        sync(folder / MANIFEST)
    return found


def load_manifest(path: str | Path) -> Manifest:
    """Reads a manifest.

    Args:
        path: the file, or the folder that it is in.

    Raises:
        CheckpointError: there is none, it is none, or it was changed since it was written.
    """
    import msgspec  # needed here alone

    path = Path(path)
    file = path / MANIFEST if path.is_dir() else path
    try:
        if file.stat().st_size > _LARGEST:
            raise CheckpointError(f"{file} is too large for a manifest; do not use it")
        told = json.loads(file.read_text(encoding="utf-8"))
        version, hashed = told["manifest"]["version"], told["manifest"]
        if version != _VERSION:
            raise CheckpointError(f"{file} is a manifest of version {version!r:.20}, expected {_VERSION}")
        if digest(hashed) != told["id"]:
            raise CheckpointError(f"{file} was changed since it was written: it does not have the id that it names")
        merge, output = msgspec.convert(hashed["merge"], Merge), msgspec.convert(hashed["output"], Output)
        io_plan = None if told["io_plan"] is None else AccessPlan.from_data(told["io_plan"])
        manifest = Manifest(told["id"], merge, output, msgspec.convert(told["run"], Run), io_plan)
        _check(manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"there is no manifest {file}; only folders that merge_checkpoint has written have one"
        ) from None
    except (OSError, RecursionError) as error:
        raise CheckpointError(f"{file}: the manifest cannot be read: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{file} is no manifest of a merge ({error!r:.200}); merge again") from None
    return manifest


def verify_checkpoint(path: str | Path) -> tuple[TensorFault, ...]:
    """Checks that a merged folder holds what was written there: reads all tensors and compares their hashes.

    Side files (config, tokenizer, …) are not looked at.

    Args:
        path: a local folder that `merge_checkpoint` has written.

    Returns:
        What differs: tensors that are missing, were added, have another shape or dtype, or other bytes (the message
        tells which). Empty if all is well.

    Raises:
        CheckpointError: there is no manifest, or it is damaged; or the checkpoint cannot be opened.
    """
    output = load_manifest(Path(path) / MANIFEST).output
    with open_checkpoint(path) as checkpoint:
        leaves = named_leaves(checkpoint.params)
        faults = [TensorFault(name, "is missing") for name in {**output.tensors, **output.tied} if name not in leaves]
        to_read: dict[int, tuple[list[str], LazyTensor, TensorHash]] = {}
        for name, leaf in leaves.items():
            expected = output.tensors.get(output.tied.get(name, name))
            if expected is None:
                faults.append(TensorFault(name, "was added: the manifest does not know it"))
            elif (leaf.dtype.name, tuple(leaf.shape)) != (expected.dtype, expected.shape):
                found = f"{leaf.dtype.name}{list(leaf.shape)}"
                faults.append(TensorFault(name, f"is {found}, and {expected.dtype}{list(expected.shape)} was written"))
            else:
                to_read.setdefault(id(leaf), ([], leaf, expected))[0].append(name)
        # An Orbax checkpoint keeps the chunks that were decoded last, which threads would take from each other.
        workers = 1 if checkpoint.format == "orbax" else min(os.cpu_count() or 1, _MOST_WORKERS)
        with ThreadPoolExecutor(workers, "jaxmerge") as threads:
            items = list(to_read.values())
            differing = threads.map(lambda item: _differing(item[1], item[2], output.block_bytes), items)
            for (names, leaf, expected), blocks in zip(items, differing, strict=True):
                if blocks:
                    problem = _where(blocks, leaf, expected, output.block_bytes)
                    faults += [TensorFault(name, problem, blocks) for name in names]
    return tuple(sorted(faults, key=lambda fault: fault.tensor))


def _check(manifest: Manifest) -> None:
    """Checks what types do not tell."""
    output, plan = manifest.output, manifest.io_plan
    if not (1 << 10 <= output.block_bytes <= 1 << 26) or output.block_bytes & (output.block_bytes - 1):
        raise ValueError(f"blocks of {output.block_bytes} bytes")
    for name, tensor in output.tensors.items():
        if min(tensor.shape, default=0) < 0 or len(tensor.blocks) != -(-tensor.nbytes // output.block_bytes):
            raise ValueError(f"{name} has {len(tensor.blocks)} blocks")
        if tensor.sha256 != _of_blocks(tensor.blocks):
            raise ValueError(f"{name} has another hash than its blocks")
    if missing := [name for name in output.tied.values() if name not in output.tensors]:
        raise ValueError(f"{missing[0]} is tied, and not there")
    if manifest.merge.dtype is not None and manifest.merge.dtype not in DTYPES:
        raise ValueError(f"the dtype {manifest.merge.dtype}")
    if manifest.merge.plan != (None if plan is None else plan.digest):
        raise ValueError("the access plan is another one")


def _differing(leaf: LazyTensor, expected: TensorHash, block_bytes: int) -> tuple[int, ...]:
    """The blocks of a tensor whose bytes are not those that were written."""
    step = block_bytes // leaf.dtype.itemsize
    buffer = np.empty(min(step, leaf.size), leaf.dtype)
    found = []
    for number, start in enumerate(range(0, leaf.size, step)):
        piece = buffer[: min(step, leaf.size - start)]
        leaf.read_flat(start, piece)
        if hashlib.sha256(piece.view(np.uint8).data).hexdigest() != expected.blocks[number]:
            found.append(number)
    return tuple(found)


def _where(blocks: tuple[int, ...], leaf: LazyTensor, expected: TensorHash, block_bytes: int) -> str:
    first = blocks[0] * block_bytes
    more = "" if len(blocks) == 1 else f", and {len(blocks) - 1} more"
    last = min(first + block_bytes, leaf.nbytes) - 1
    return (
        f"other bytes than were written, in block {blocks[0]} of {len(expected.blocks)} "
        f"(bytes {first} to {last} of the tensor){more}"
    )


def _of_blocks(blocks: Iterable[str]) -> str:
    return together(bytes.fromhex("".join(blocks)))


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that arithmetic depends on."""
    found = {"python": platform.python_version()}
    for name in ("jaxmerge", "jax", "jaxlib", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # used from its source, without being installed
            found[name] = "unknown"
    return found
