"""`merge_checkpoint` and `save_lazily`: from disk to disk, in a transaction, within a memory budget.

Everything that headers tell is checked before a weight is read, and the output appears complete or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmerge.checkpoints.base import Checkpoint, open_checkpoint
from jaxmerge.checkpoints.layout import TensorSpec
from jaxmerge.checkpoints.writer import open_writer
from jaxmerge.errors import ConflictError
from jaxmerge.methods.assignment import assign
from jaxmerge.methods.lazy import as_lazy, merge_lazily
from jaxmerge.methods.method import Method
from jaxmerge.streaming.engine import stream
from jaxmerge.streaming.plan import Plan, make_plan, merges_within
from jaxmerge.streaming.progress import showing
from jaxmerge.streaming.report import StreamReport, peak_memory
from jaxmerge.streaming.sizes import format_bytes, parse_bytes
from jaxmerge.trees.checks import cast, is_mergeable, name_experts
from jaxmerge.trees.info import Rules
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import Params, named_leaves

Source = str | Path | Checkpoint | Params
"""A checkpoint by path or URL, an opened one, or a parameter tree (with lazy leaves, in memory, or both)."""

DEFAULT_BUDGET = "512MiB"
"""Memory for the work, beside some 200 MiB for Python and its libraries."""

DEFAULT_SHARD = "5GiB"
"""What Hugging Face tools split checkpoints into."""


def merge_checkpoint(
    method: Method,
    experts: Sequence[Source] | Mapping[str, Source],
    *,
    base: Source | None = None,
    out: str | Path,
    format: str | None = None,
    key: Any = None,
    rules: Rules = Rules(),
    dtype: str | None = None,
    memory_budget: int | str = DEFAULT_BUDGET,
    max_shard_bytes: int | str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: bool | None = None,
) -> StreamReport:
    """Merges checkpoints into a checkpoint, disk to disk.

    The result is that of `jm.merge` on the loaded checkpoints, in the base's names, shapes and dtypes (the first
    expert's without a base), with its metadata and, for Hugging Face folders, its config, tokenizer and other files.
    It is written to a hidden folder beside `out` and renamed when it is complete and durable: whatever happens before
    that, `out` stays as it was, and the next run clears what a killed one left.

    Args:
        method: what to do, such as `jm.ties(density=0.2)`.
        experts: a list or a dict by name of checkpoints: paths or URLs, opened checkpoints, or parameter trees.
        base: the checkpoint that the experts were tuned from; task-vector methods need it.
        out: a local path: a folder, or a file with the suffix `.safetensors` or `.npz`.
        format: "safetensors", "npz" or "orbax"; by default what the suffix of `out` says, and safetensors for folders.
        key: PRNG key (or an integer seed) for methods that draw.
        rules: how tensor names are read, where the defaults guess wrong; which leaves are layer-stacked.
        dtype: floating-point dtype of the result, which lets the inputs have different ones: they are merged in float32
            at least, and rounded once. None: that of the inputs.
        memory_budget: bytes (or text such as "1GiB") that the work may take beside Python and its libraries.
        max_shard_bytes: size of the files that a safetensors folder is split into; 5 GiB by default.
        overwrite: replace what stands at `out`, when the merge is complete.
        allow_nonfinite: let NaN and infinity in the inputs pass.
        progress: show what will be read, written and needed, and a bar; by default in a terminal or notebook.

    Returns:
        What it took.

    Raises:
        CheckpointError: an input cannot be opened or read, or the output cannot be written.
        StructureError, ShapeError, DTypeError: experts and base differ.
        NonFiniteError: NaN or infinity in an input.
        RecipeError: the method does not fit these experts, or lacks a base, a key or a value for some tensor.
        BudgetError: a tensor needs more memory than the budget; the message tells which and how much.
        ConflictError: `out` exists, is an input, or is being written by somebody else.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as opened:
        sources, reference, merged = _opened(opened, method, experts, base, key, rules, dtype, allow_nonfinite)
        opening = time.perf_counter() - started
        report = save_lazily(
            merged,
            out,
            format=format,
            metadata=None if reference is None else reference.metadata,
            side_files=_side_files(reference, dtype) if reference and _is_hugging_face(out, format) else None,
            memory_budget=memory_budget,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            progress=progress,
            sources=sources,
        )
    return dataclasses.replace(report, seconds={"open": opening, **report.seconds})


def plan_merge(
    method: Method,
    experts: Sequence[Source] | Mapping[str, Source],
    *,
    base: Source | None = None,
    key: Any = None,
    rules: Rules = Rules(),
    dtype: str | None = None,
    memory_budget: int | str = DEFAULT_BUDGET,
) -> Plan:
    """Checks a merge of checkpoints as `merge_checkpoint` does, and plans it. No tensor is read, nothing is written.

    Args:
        method: what to do.
        experts: as for `merge_checkpoint`.
        base: as for `merge_checkpoint`.
        key: PRNG key (or an integer seed) for methods that draw.
        rules: how tensor names are read.
        dtype: floating-point dtype of the result.
        memory_budget: bytes, or text such as "1GiB".

    Returns:
        What would be read, written and held in memory.

    Raises:
        MergeError: as `merge_checkpoint` does before it reads a weight.
    """
    with contextlib.ExitStack() as opened:
        sources, _, merged = _opened(opened, method, experts, base, key, rules, dtype, allow_nonfinite=True)
        return make_plan(_stored_once(merged, sources)[0], parse_bytes(memory_budget, "memory_budget"))


def _opened(
    opened: contextlib.ExitStack,
    method: Method,
    experts: Sequence[Source] | Mapping[str, Source],
    base: Source | None,
    key: Any,
    rules: Rules,
    dtype: str | None,
    allow_nonfinite: bool,
) -> tuple[dict[str, Checkpoint], Checkpoint | None, Params]:
    """The checkpoints by name, the one that gives metadata and side files, and the merged parameters, lazily."""
    sources: dict[str, Checkpoint] = {}

    def params_of(name: str, source: Source) -> Params:
        if isinstance(source, str | Path):
            source = opened.enter_context(open_checkpoint(source))
        if isinstance(source, Checkpoint):
            sources[name] = source
            return source.params
        return source

    base_params = None if base is None else params_of("the base", base)
    trees = {name: params_of(name, source) for name, source in name_experts(experts).items()}
    if dtype is not None and _other_dtypes((base_params, *trees.values()), dtype):
        wide = "float64" if dtype == "float64" else "float32"
        base_params, trees = cast(base_params, wide), {name: cast(tree, wide) for name, tree in trees.items()}
    merged = merge_lazily(assign(method, trees, base_params, key, rules), allow_nonfinite)
    reference = sources.get(next(iter(trees)) if base is None else "the base")
    return sources, reference, merged if dtype is None else cast(merged, dtype)


def _other_dtypes(trees: Sequence[Params], dtype: str) -> bool:
    leaves = [leaf for tree in trees for leaf in named_leaves(tree).values()]
    return any(is_mergeable(leaf) and leaf.dtype.name != dtype for leaf in leaves)


def _side_files(reference: Checkpoint, dtype: str | None) -> dict[str, Path | bytes]:
    """The side files; a `config.json` that tells the dtype of the tensors tells the new one."""
    files = dict(reference.side_files)
    config = files.get("config.json")
    if dtype is not None and config is not None:
        with contextlib.suppress(ValueError, AttributeError):  # what cannot be understood is copied as it is
            told: dict[str, Any] = json.loads(config if isinstance(config, bytes) else config.read_bytes())
            changed = {key: dtype for key in ("dtype", "torch_dtype") if key in told}
            if changed:
                files["config.json"] = json.dumps({**told, **changed}, indent=2).encode()
    return files


def save_lazily(
    params: Params,
    out: str | Path,
    *,
    format: str | None = None,
    metadata: Mapping[str, str] | None = None,
    side_files: Mapping[str, Path | bytes] | None = None,
    memory_budget: int | str = DEFAULT_BUDGET,
    max_shard_bytes: int | str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    sources: Mapping[str, Checkpoint] | None = None,
) -> StreamReport:
    """Saves a tree of lazy tensors, reading and computing as it writes.

    Such a tree is what `jm.merge` makes from lazy parameters, also when it was renamed, transposed, cast or stacked
    afterwards, or is a merge of merges. The transaction is that of `merge_checkpoint`.

    Args:
        params: a tree of lazy tensors and arrays. A leaf that stands under several names is stored once.
        out: a local path: a folder, or a file with the suffix `.safetensors` or `.npz`.
        format: "safetensors", "npz" or "orbax"; by default what the suffix of `out` says, and safetensors for folders.
        metadata: text to store with the tensors.
        side_files: further files of a folder, such as `Checkpoint.side_files`.
        memory_budget: bytes (or text such as "1GiB") that the work may take beside Python and its libraries.
        max_shard_bytes: size of the files that a safetensors folder is split into; 5 GiB by default.
        overwrite: replace what stands at `out`, when everything is written.
        progress: show what will be read, written and needed, and a bar; by default in a terminal or notebook.
        sources: opened checkpoints that the tree is read from, by name: `out` must be none of them, and the report
            tells what was read from each.

    Returns:
        What it took.

    Raises:
        CheckpointError: a tensor cannot be read, or the output cannot be written.
        BudgetError: a tensor needs more memory than the budget; the message tells which and how much.
        ConflictError: `out` exists, is one of the sources, or is being written by somebody else.
        NonFiniteError: a merged tensor has NaN or infinity in an input.
    """
    started = time.perf_counter()
    sources = sources or {}
    _check_conflict(Path(out), sources)
    tensors, aliases = _stored_once(params, sources)
    if max_shard_bytes is None and _is_hugging_face(out, format):
        max_shard_bytes = DEFAULT_SHARD
    plan = make_plan(tensors, parse_bytes(memory_budget, "memory_budget"))
    already_read = {name: source.bytes_read for name, source in sources.items()}
    with showing(progress) as display:
        display.say(
            f"{out}: {len(tensors)} tensors, {format_bytes(plan.to_read)} to read, "
            f"{format_bytes(plan.to_write)} to write, at most {format_bytes(plan.memory)} of memory"
        )
        with open_writer(
            out,
            [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()],
            format=format,
            metadata=metadata,
            aliases=aliases,
            max_shard_bytes=None if max_shard_bytes is None else parse_bytes(max_shard_bytes, "max_shard_bytes"),
            side_files=side_files,
            overwrite=overwrite,
        ) as writer:
            planned = time.perf_counter()
            worker_seconds = stream(plan, writer, display)
            streamed = time.perf_counter()
        published = time.perf_counter()
    return StreamReport(
        path=writer.path,
        tensors=len(tensors),
        merged=len({part.name for part in (*plan.shared, *plan.alone) if merges_within(part.leaf)}),
        bytes_read={name: source.bytes_read - already_read[name] for name, source in sources.items()},
        bytes_written=plan.to_write,
        seconds={"plan": planned - started, "stream": streamed - planned, "publish": published - streamed},
        worker_seconds=worker_seconds,
        workers=plan.workers,
        memory_planned=plan.memory,
        memory_peak=peak_memory(),
    )


def _stored_once(params: Params, sources: Mapping[str, Checkpoint]) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors by the name that each is stored under, and the further names of tied ones.

    What is a further name in an input stays one: other tools look for the weights under the name that was kept there.
    """
    tensors: dict[str, LazyTensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    further = {name for source in sources.values() for name in source.aliases}
    leaves = named_leaves(params)
    for name in sorted(leaves, key=lambda name: name in further):
        leaf = leaves[name]
        if hasattr(leaf, "dtype") and first.setdefault(id(leaf), name) != name:  # equal Python numbers are not tied
            aliases[name] = first[id(leaf)]
        else:
            tensors[name] = as_lazy(leaf)
    return tensors, aliases


def _is_hugging_face(out: str | Path, format: str | None) -> bool:
    """Whether the output is a folder of safetensors files."""
    return format in (None, "safetensors") and Path(out).suffix not in (".safetensors", ".npz")


def _check_conflict(out: Path, sources: Mapping[str, Checkpoint]) -> None:
    target = out.resolve()
    for name, source in sources.items():
        if "://" in source.path:
            continue
        path = Path(source.path).resolve()
        if target == path or target in path.parents or (path in target.parents and target.is_file()):
            raise ConflictError(
                f"{out} holds, or is part of, the input {name!r} ({source.path}); choose another output"
            )
