"""`merge_checkpoint` and `save_lazily`: from disk to disk, in a transaction, within a memory budget.

Everything that headers tell is checked before a weight is read, and the output appears complete or not at all. What is
there already is not merged again: tensors that a killed run of the same merge has finished, and tensors of an earlier
output that would come out the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax

from jaxmerge.checkpoints.base import Checkpoint, open_checkpoint
from jaxmerge.checkpoints.layout import TensorSpec
from jaxmerge.checkpoints.stores import local_path
from jaxmerge.checkpoints.upload import SHARD_BYTES
from jaxmerge.checkpoints.writer import CheckpointWriter, open_writer, place_of
from jaxmerge.errors import BudgetError, CheckpointError, ConflictError, RecipeError
from jaxmerge.methods.assignment import Assignment, assign
from jaxmerge.methods.lazy import as_lazy, merge_lazily
from jaxmerge.methods.method import Method
from jaxmerge.streaming.access import BASE, plan_job, restricted
from jaxmerge.streaming.budget import AccessPlan
from jaxmerge.streaming.budgeted import Scratch
from jaxmerge.streaming.catalog import Catalog, open_catalog
from jaxmerge.streaming.engine import restore, stream
from jaxmerge.streaming.fingerprint import digest, fingerprint
from jaxmerge.streaming.journal import Journal
from jaxmerge.streaming.manifest import (
    BLOCK_BYTES,
    MANIFEST,
    BlockHashes,
    Copied,
    Merge,
    Output,
    describe_merge,
    versions,
    write_manifest,
)
from jaxmerge.streaming.plan import Plan, make_plan, merges_within
from jaxmerge.streaming.processes import (
    ALONE,
    Done,
    Processes,
    done_by_all,
    everywhere,
    facts_of,
    fewest_cores,
    gathered,
    keys_of_first,
    working,
    written_together,
)
from jaxmerge.streaming.progress import Progress, showing
from jaxmerge.streaming.report import StreamReport, peak_memory
from jaxmerge.streaming.reuse import Keys, Known, Previous, tensor_keys
from jaxmerge.streaming.sizes import format_bytes, parse_bytes
from jaxmerge.trees.checks import cast, is_mergeable, name_experts
from jaxmerge.trees.info import Rules
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import Params, named_leaves

if TYPE_CHECKING:
    import tensorstore as ts

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
    io_budget: int | str | AccessPlan | None = None,
    catalog: Catalog | str | Path | None = None,
    policy: str = "greedy_value",
    floors: tuple[int, int] = (0, 0),
    max_shard_bytes: int | str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    manifest: bool = True,
    reuse: str | Path | None = None,
    recipe: str | None = None,
    progress: bool | None = None,
    processes: Literal["all", "own"] = "all",
    context: ts.Context | None = None,
) -> StreamReport:
    """Merges checkpoints into a checkpoint, disk to disk.

    The result is that of `jm.merge` on the loaded checkpoints, in the base's names, shapes and dtypes (the first
    expert's without a base), with its metadata and, for Hugging Face folders, its config, tokenizer and other files.
    It is written to a hidden folder beside `out` and renamed when it is complete and durable: whatever happens before
    that, `out` stays as it was. Where the output gets a manifest, the next run of the same merge goes on where a killed
    one ended: tensors that were finished are read back and hashed instead of being merged again. Any other run clears
    what a killed one left.

    Where `out` is a URL, all this happens in a temporary folder, which needs as much disk as the output; then it is
    uploaded, the object that readers begin with last. A killed run is begun anew.

    With an I/O budget only some blocks of the experts' tensors are read, and the base stands in for the others: the
    result is the merge of experts whose task vectors are zero there. Tensors that are not floating point are then the
    base's, without being compared.

    Under `jax.distributed` all processes make the same call, and each reads, merges and writes its share, once. The
    output, on a file system that all hosts share, is the one that a single process writes, byte for byte; process 0
    publishes it when all have finished, and an error in one process is raised in all.

    Args:
        method: what to do, such as `jm.ties(density=0.2)`.
        experts: a list or a dict by name of checkpoints: paths or URLs, opened checkpoints, or parameter trees.
        base: the checkpoint that the experts were tuned from; task-vector methods need it.
        out: a local path, or a URL such as `s3://BUCKET/NAME` or `gs://BUCKET/NAME`: a folder, or a file with the
            suffix `.safetensors` or `.npz`.
        format: "safetensors", "npz" or "orbax"; by default what the suffix of `out` says, and safetensors for folders.
        key: PRNG key (or an integer seed) for methods that draw.
        rules: how tensor names are read, where the defaults guess wrong; which leaves are layer-stacked.
        dtype: floating-point dtype of the result, which lets the inputs have different ones: they are merged in float32
            at least, and rounded once. None: that of the inputs.
        memory_budget: bytes (or text such as "1GiB") that the work may take beside Python and its libraries.
        io_budget: bytes that may be fetched from all experts together: a number, text such as "2GiB", or a share of
            what they hold, such as "10%"; or a plan made by `plan_merge`. It needs a base. Statistics that the catalog
            lacks are gathered first, which reads everything once. A method that measures keeps fetched blocks in a
            temporary file beside `out` (with a URL, in the system's folder for such files).
        catalog: a catalog or its path; None gathers statistics for this call alone. It also tells the content of
            tensors to `reuse`.
        policy: how blocks are chosen: `"greedy_value"` reads where the most is to be gained per byte, `"uniform_hash"`
            by a hash of the blocks' names, `"full"` everything.
        floors: how many blocks of each expert, and of each tensor, are chosen before all others.
        max_shard_bytes: size of the files that a safetensors folder is split into; 5 GiB by default, behind a URL
            256 MiB or a quarter of the memory budget, because an object is uploaded from memory.
        overwrite: replace what stands at `out`, when the merge is complete.
        allow_nonfinite: let NaN and infinity in the inputs pass.
        manifest: write down in a folder (`jaxmerge.json`) what it was made from, with paths as they are given here,
            and hashes of its tensors, for `verify_checkpoint`. Single files have no place for it.
        reuse: an earlier output with a manifest; it may be the one that is to be replaced. Tensors that would come out
            as they are there are copied, and nothing of them is read from base and experts (so these are not searched
            for NaN again). The result is that of a merge without it.
        recipe: text that the manifest keeps, such as the recipe that the merge was read from.
        progress: show what will be read, written and needed, and a bar; by default in a terminal or notebook.
        processes: where `jax.distributed.initialize` has brought several processes together, whether all of them share
            the work, or each merges on its own account. With one process there is no difference.
        context: TensorStore's context for a URL as `out`: credentials, or the contents of `memory://`.

    Returns:
        What it took.

    Raises:
        CheckpointError: an input cannot be opened or read, or the output cannot be written.
        StructureError, ShapeError, DTypeError: experts and base differ.
        NonFiniteError: NaN or infinity in an input.
        RecipeError: the method does not fit these experts, or lacks a base, a key or a value for some tensor; or
            processes make different calls.
        BudgetError: a tensor needs more memory than the budget, the message tells which and how much; or the I/O budget
            cannot be kept.
        ConflictError: `out` exists, is an input, or is being written by somebody else.
    """
    started = time.perf_counter()
    out = local_path(out)
    with contextlib.ExitStack() as opened:
        together = opened.enter_context(working(processes))
        sources, reference, job = _opened(opened, method, experts, base, key, rules, dtype)
        about, manifest = None, manifest and _is_folder(out, format)
        if manifest or together.count > 1:
            about = describe_merge(
                method,
                {name: _described(name, source, sources) for name, source in name_experts(experts).items()},
                None if base is None else _described(BASE, base, sources),
                key=key,
                dtype=dtype,
                rules=rules,
                allow_nonfinite=allow_nonfinite,
            )
            options = {"policy": policy, "floors": floors, "reuse": reuse, "the text of the recipe": recipe}
            if not isinstance(io_budget, AccessPlan):  # that of process 0 is used
                options["io_budget"] = io_budget
            together.agree(lambda: _facts(about, options))
        opening, seconds = time.perf_counter() - started, {}
        access, analysed = None, {}
        # Without a budget, a catalog is asked only for what it knows. Of several processes, the first one asks.
        there = isinstance(catalog, Catalog) or (catalog is not None and Path(catalog).exists())
        asks = together.index == 0 and (io_budget is not None or there)
        known = _catalog(opened, catalog) if asks else None
        if io_budget is None:
            merged = merge_lazily(job, allow_nonfinite)
        else:
            place = place_of(out, format, overwrite, context)

            def choose() -> tuple[AccessPlan, dict[str, int]]:
                assert known is not None
                _check_conflict(out, sources)  # before everything is read for statistics
                if place is not None:
                    place.check()
                elif os.path.lexists(out) and not overwrite:
                    raise ConflictError(f"{out} exists already; remove it, choose another name or pass overwrite=True")
                return plan_job(job, sources, known, io_budget, policy, floors, progress)

            access, analysed = _chosen(together, choose)
            scratch = Scratch(Path(out).absolute().parent if place is None else Path(tempfile.gettempdir()))
            opened.callback(scratch.close)
            merged = merge_lazily(restricted(job, access, scratch), allow_nonfinite)
            seconds = {"choose": time.perf_counter() - started - opening}
        if dtype is not None:
            merged = cast(merged, dtype)
        target = _Target(
            out,
            format,
            None if reference is None else reference.metadata,
            _side_files(reference, dtype) if reference and _is_hugging_face(out, format) else None,
            max_shard_bytes,
            overwrite,
            context,
        )
        previous = None if reuse is None else opened.enter_context(Previous(reuse))
        told = _Context(sources, access, about if manifest else None, recipe, previous, known, together)
        report = _saved(merged, target, memory_budget, progress, told)
        seconds = {"open": opening, **seconds, **report.seconds}
        report = dataclasses.replace(report, seconds=seconds, io_plan=access, bytes_analysed=analysed)
        if access is not None and known is not None:
            total = sum(seconds.values())
            try:
                known.record_run(access, report.path, repr(method), sources, report.bytes_read, total)
            except CheckpointError as error:  # the merge itself is complete
                warnings.warn(f"{report.path} was merged, but the catalog does not tell: {error}", stacklevel=2)
    return report


def plan_merge(
    method: Method,
    experts: Sequence[Source] | Mapping[str, Source],
    *,
    base: Source | None = None,
    key: Any = None,
    rules: Rules = Rules(),
    dtype: str | None = None,
    memory_budget: int | str = DEFAULT_BUDGET,
    io_budget: int | str | AccessPlan | None = None,
    catalog: Catalog | str | Path | None = None,
    policy: str = "greedy_value",
    floors: tuple[int, int] = (0, 0),
) -> Plan:
    """Checks a merge of checkpoints as `merge_checkpoint` does, and plans it. No tensor is read, nothing is written.

    With an I/O budget, statistics that the catalog lacks are gathered first, which does read.

    Args:
        method: what to do.
        experts: as for `merge_checkpoint`.
        base: as for `merge_checkpoint`.
        key: PRNG key (or an integer seed) for methods that draw.
        rules: how tensor names are read.
        dtype: floating-point dtype of the result.
        memory_budget: bytes, or text such as "1GiB".
        io_budget: as for `merge_checkpoint`.
        catalog: as for `merge_checkpoint`.
        policy: as for `merge_checkpoint`.
        floors: as for `merge_checkpoint`.

    Returns:
        What would be read, written and held in memory; with an I/O budget, `io_plan` tells which blocks.

    Raises:
        MergeError: as `merge_checkpoint` does before it reads a weight.
    """
    with contextlib.ExitStack() as opened:
        sources, _, job = _opened(opened, method, experts, base, key, rules, dtype)
        access = None
        if io_budget is not None:
            access, _ = plan_job(job, sources, _catalog(opened, catalog), io_budget, policy, floors)
            job = restricted(job, access, Scratch(Path.cwd()))  # to which nothing is written
        merged = merge_lazily(job, allow_nonfinite=True)
        merged = merged if dtype is None else cast(merged, dtype)
        plan = make_plan(_stored_once(merged, sources)[0], parse_bytes(memory_budget, "memory_budget"))
        return dataclasses.replace(plan, io_plan=access)


def _facts(about: Merge, options: Mapping[str, Any]) -> dict[str, str]:
    """What the processes of a merge must agree on, besides what `_saved` asks."""
    told = {
        "the method": about.method,
        "the method's coefficients": digest(about.recipe),
        "the key": digest(about.key),
        "dtype": about.dtype,
        "the rules": about.rules,
        "allow_nonfinite": about.allow_nonfinite,
        "the names of the models": [x.name for x in (about.base, *about.experts) if x is not None],
        **options,
    }
    return {name: str(value) for name, value in told.items()}


def _chosen(
    together: Processes, choose: Callable[[], tuple[AccessPlan, dict[str, int]]]
) -> tuple[AccessPlan, dict[str, int]]:
    """What `choose` gives in process 0."""
    if together.count == 1:
        return choose()
    chosen: list[tuple[AccessPlan, dict[str, int]]] = []

    def as_bytes() -> bytes:
        chosen.append(choose())
        return json.dumps([chosen[0][0].as_data(), chosen[0][1]]).encode()

    plan, analysed = json.loads(together.from_first("access plan", as_bytes))
    return chosen[0] if chosen else (AccessPlan.from_data(plan), analysed)


def _catalog(opened: contextlib.ExitStack, catalog: Catalog | str | Path | None) -> Catalog:
    return catalog if isinstance(catalog, Catalog) else opened.enter_context(open_catalog(catalog))


def _opened(
    opened: contextlib.ExitStack,
    method: Method,
    experts: Sequence[Source] | Mapping[str, Source],
    base: Source | None,
    key: Any,
    rules: Rules,
    dtype: str | None,
) -> tuple[dict[str, Checkpoint], Checkpoint | None, Assignment]:
    """The checkpoints by name, the one that gives metadata and side files, and the merge."""
    sources: dict[str, Checkpoint] = {}

    def params_of(name: str, source: Source) -> Params:
        if isinstance(source, str | Path):
            source = opened.enter_context(open_checkpoint(source))
        if isinstance(source, Checkpoint):
            sources[name] = source
            return source.params
        return source

    base_params = None if base is None else params_of(BASE, base)
    trees = {name: params_of(name, source) for name, source in name_experts(experts).items()}
    if dtype is not None and _other_dtypes((base_params, *trees.values()), dtype):
        wide = "float64" if dtype == "float64" else "float32"
        base_params, trees = cast(base_params, wide), {name: cast(tree, wide) for name, tree in trees.items()}
    reference = sources.get(next(iter(trees)) if base is None else BASE)
    return sources, reference, assign(method, trees, base_params, key, rules)


def _described(name: str, source: Source, sources: Mapping[str, Checkpoint]) -> tuple[str | None, Checkpoint | None]:
    """The path of a model as it was given, and the opened model; both None for a tree."""
    checkpoint = sources.get(name)
    return (None if checkpoint is None else str(source if isinstance(source, str | Path) else source.path)), checkpoint


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
    processes: Literal["all", "own"] = "all",
    context: ts.Context | None = None,
) -> StreamReport:
    """Saves a tree of lazy tensors, reading and computing as it writes.

    Such a tree is what `jm.merge` makes from lazy parameters, also when it was renamed, transposed, cast or stacked
    afterwards, or is a merge of merges. The transaction is that of `merge_checkpoint`.

    Args:
        params: a tree of lazy tensors and arrays. A leaf that stands under several names is stored once.
        out: a local path, or a URL such as `s3://BUCKET/NAME` or `gs://BUCKET/NAME`: a folder, or a file with the
            suffix `.safetensors` or `.npz`.
        format: "safetensors", "npz" or "orbax"; by default what the suffix of `out` says, and safetensors for folders.
        metadata: text to store with the tensors.
        side_files: further files of a folder, such as `Checkpoint.side_files`.
        memory_budget: bytes (or text such as "1GiB") that the work may take beside Python and its libraries.
        max_shard_bytes: size of the files that a safetensors folder is split into; 5 GiB by default, behind a URL
            256 MiB or a quarter of the memory budget, because an object is uploaded from memory.
        overwrite: replace what stands at `out`, when everything is written.
        progress: show what will be read, written and needed, and a bar; by default in a terminal or notebook.
        sources: opened checkpoints that the tree is read from, by name: `out` must be none of them, and the report
            tells what was read from each.
        processes: as for `merge_checkpoint`: by default all processes of `jax.distributed` save the same tree.
        context: TensorStore's context for a URL as `out`.

    Returns:
        What it took.

    Raises:
        CheckpointError: a tensor cannot be read, or the output cannot be written.
        BudgetError: a tensor needs more memory than the budget; the message tells which and how much.
        ConflictError: `out` exists, is one of the sources, or is being written by somebody else.
        NonFiniteError: a merged tensor has NaN or infinity in an input.
    """
    target = _Target(local_path(out), format, metadata, side_files, max_shard_bytes, overwrite, context)
    with working(processes) as together:
        return _saved(params, target, memory_budget, progress, _Context(sources or {}, together=together))


@dataclasses.dataclass(frozen=True)
class _Target:
    """Where a tree is saved, and how; see `save_lazily`."""

    out: str | Path
    format: str | None
    metadata: Mapping[str, str] | None
    side_files: Mapping[str, Path | bytes] | None
    max_shard_bytes: int | str | None
    overwrite: bool
    context: ts.Context | None = None


@dataclasses.dataclass(frozen=True)
class _Context:
    """What is known about a tree that is saved.

    Attributes:
        sources: the checkpoints that it is read from.
        access: what may be read from them; the output is not published if it was more.
        about: what the merge is; the output gets a manifest then.
        recipe: its text.
        previous: an earlier output, of which tensors may be copied.
        catalog: what is known about the sources.
        together: the processes that save it.
    """

    sources: Mapping[str, Checkpoint]
    access: AccessPlan | None = None
    about: Merge | None = None
    recipe: str | None = None
    previous: Previous | None = None
    catalog: Catalog | None = None
    together: Processes = ALONE


def _saved(
    params: Params, target: _Target, memory_budget: int | str, progress: bool | None, context: _Context
) -> StreamReport:
    """Does what `save_lazily` does, and what the context asks for."""
    started, together = time.perf_counter(), context.together
    out, format, max_shard_bytes, sources = target.out, target.format, target.max_shard_bytes, context.sources
    _check_conflict(out, sources)
    tensors, aliases = _stored_once(params, sources)
    budget = parse_bytes(memory_budget, "memory_budget")
    if max_shard_bytes is None and _is_hugging_face(out, format):
        max_shard_bytes = min(budget // 4, SHARD_BYTES) if "://" in str(out) else DEFAULT_SHARD
    shards = None if max_shard_bytes is None else parse_bytes(max_shard_bytes, "max_shard_bytes")
    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    together.agree(lambda: _facts_of_output(target, specs, sources, budget, context.about is not None))
    plan = make_plan(tensors, budget, fewest_cores(together))
    keys: Keys = {}
    if context.about is not None or context.previous is not None:
        keys = keys_of_first(together, lambda: tensor_keys(tensors, sources, context.catalog, plan.chunk))
    copied = {} if context.previous is None else context.previous.find(keys)
    hashes, journal = None, None
    if context.about is not None:
        hashes = BlockHashes(specs)
        journal = None if together.count > 1 else _journal(context.about, context.access, keys)
    already_read = {name: source.bytes_read for name, source in sources.items()}
    # Byte sources notice for themselves when they change; an Orbax folder is many files, looked at before and after.
    folders = {name: fingerprint(source).model for name, source in sources.items() if source.format == "orbax"}
    with showing(progress if together.index == 0 else False) as shown, contextlib.ExitStack() as closing:
        display = together.watching(shown)
        if journal is not None:
            closing.callback(journal.close)
        display.say(
            f"{out}: {len(tensors)} tensors, {format_bytes(plan.to_read)} to read, "
            f"{format_bytes(plan.to_write)} to write, at most {format_bytes(plan.memory)} of memory"
        )

        def begin(join: bool) -> CheckpointWriter:
            return open_writer(
                out,
                specs,
                format=format,
                metadata=target.metadata,
                aliases=aliases,
                max_shard_bytes=shards,
                # The manifest of an input tells nothing about the output.
                side_files={name: file for name, file in (target.side_files or {}).items() if name != MANIFEST},
                overwrite=target.overwrite,
                resume=None if journal is None else journal.resume,
                join=join,
                context=target.context,
            )

        with written_together(together, begin) as writer:
            writer.display = display
            planned = time.perf_counter()
            finished: dict[str, Known] = {}
            if journal is not None:
                journal.begin(writer)
                finished = {name: Known(blocks) for name, blocks in journal.finished.items() if name in keys}
            known = {**copied, **finished}
            here: set[str] = set()
            seconds: dict[str, float] = {}
            if known:
                _say_known(display, known, tensors, context.previous)
                own = dict(list(known.items())[together.index :: together.count])
                here, seconds = restore(own, plan.workers, writer, display, hashes, journal)
                here = everywhere(together, here)
                _warn_damaged(copied, finished, here, context.previous)
            rest = plan.without(here)
            worker_seconds = stream(rest, writer, display, hashes, journal, together)
            worker_seconds = {name: s + seconds.get(name, 0.0) for name, s in worker_seconds.items()}
            for name, state in folders.items():
                if fingerprint(sources[name]).model != state:
                    raise CheckpointError(
                        f"{sources[name].path} was changed while it was read; try again when it is complete"
                    )
            streamed = time.perf_counter()
            read = {name: source.bytes_read - already_read[name] for name, source in sources.items()}
            done = gathered(together, writer, hashes, Done(read, worker_seconds, plan.workers, peak_memory()))
            from_previous = {name: copied[name].name for name in sorted(here) if name not in finished}
            if context.access is not None and together.index == 0:
                _check_fetched(context.access, sources, done.bytes_read)
            if context.about is not None and hashes is not None and together.index == 0:
                output = Output(format or "safetensors", shards, BLOCK_BYTES, hashes.tensors(), aliases)
                earlier = context.previous
                write_manifest(
                    writer.folder,
                    context.about,
                    output,
                    memory_budget=budget,
                    bytes_read=done.bytes_read,
                    recipe=context.recipe,
                    io_plan=context.access,
                    keys=keys,
                    copied=Copied(earlier.path, earlier.manifest.id, from_previous) if earlier else None,
                )
        published = time.perf_counter()
    resumed = [name for name in here if name in finished]
    done = done_by_all(together, done)
    return StreamReport(
        path=writer.path,
        tensors=len(tensors),
        merged=len({part.name for part in (*plan.shared, *plan.alone) if merges_within(part.leaf)}),
        bytes_read=done.bytes_read,
        bytes_written=plan.to_write - sum(tensors[name].nbytes for name in resumed),
        seconds={"plan": planned - started, "stream": streamed - planned, "publish": published - streamed},
        worker_seconds=done.worker_seconds,
        workers=done.workers,
        memory_planned=plan.memory,
        memory_peak=done.memory_peak,
        resumed=len(resumed),
        reused=len(from_previous),
        processes=together.count,
    )


def _facts_of_output(
    target: _Target, specs: Sequence[TensorSpec], sources: Mapping[str, Checkpoint], budget: int, has_manifest: bool
) -> dict[str, str]:
    """What the processes that save a tree must agree on.

    Raises:
        RecipeError: the output is behind a URL.
    """
    if "://" in str(target.out):
        raise RecipeError(
            f"{target.out}: several processes write to one folder, which cannot be behind a URL; merge into a local "
            "folder that all hosts share and upload that, or let one process merge (processes='own')"
        )
    told = {
        "out": os.path.abspath(target.out),
        "format": target.format,
        "max_shard_bytes": target.max_shard_bytes,
        "overwrite": target.overwrite,
        "memory_budget": budget,
        "manifest": has_manifest,
        "64-bit arithmetic": jax.config.jax_enable_x64,  # pyright: ignore[reportAttributeAccessIssue]
        "the tensors of the output": digest([[x.name, x.dtype.name, list(x.shape)] for x in specs]),
        **{f"the version of {name}": version for name, version in versions().items() if name != "python"},
        **facts_of(sources),
    }
    return {name: str(value) for name, value in told.items()}


def _journal(about: Merge, access: AccessPlan | None, keys: Keys) -> Journal | None:
    """The journal of a merge; None if nothing tells whether the inputs of a tensor are the same in a later run."""
    if not keys:
        return None
    plan = None if access is None else access.digest
    # The first key tells inputs by their files, whatever a catalog has learnt meanwhile.
    first = {name: found[0] for name, found in keys.items()}
    return Journal(digest([dataclasses.asdict(about), plan, first, BLOCK_BYTES]))


def _say_known(
    display: Progress, known: Mapping[str, Known], tensors: Mapping[str, LazyTensor], previous: Previous | None
) -> None:
    """Tells what is taken over instead of being merged."""
    copied = "" if previous is None else f"copied from {previous.path}"
    for from_previous, text in ((True, copied), (False, "here from a run that was killed")):
        names = [name for name, found in known.items() if (found.source is not None) == from_previous]
        if names:
            size = format_bytes(sum(tensors[name].nbytes for name in names))
            display.say(f"{len(names)} tensors ({size}) are {text}")


def _warn_damaged(
    copied: Mapping[str, Known], finished: Mapping[str, Known], here: Collection[str], previous: Previous | None
) -> None:
    damaged = [found.name for name, found in copied.items() if name not in here and name not in finished]
    if damaged and previous is not None:
        more = "" if len(damaged) == 1 else f" and {len(damaged) - 1} more tensors"
        warnings.warn(
            f"{previous.path}: {damaged[0]!r}{more} is not what was written there, and was merged again; "
            "look with jaxmerge verify",
            stacklevel=2,
        )


def _check_fetched(plan: AccessPlan, sources: Mapping[str, Checkpoint], read: Mapping[str, int]) -> None:
    """Checks that no more was fetched than planned. What is opened under several names is counted together."""
    for name, source in sources.items():
        together = [other for other in sources if sources[other] is source]
        planned = sum(plan.planned.get(other, 0) for other in together)
        if BASE not in together and read[name] > planned:
            raise BudgetError(
                f"expert {name!r}: {read[name]} bytes were fetched from {source.path}, and {planned} were planned; "
                "nothing was written. Its files are not read as they are laid out: save it again as safetensors, and "
                "report this"
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


def _is_folder(out: str | Path, format: str | None) -> bool:
    return _is_hugging_face(out, format) or format == "orbax"


def _check_conflict(out: str | Path, sources: Mapping[str, Checkpoint]) -> None:
    url, target = str(out).rstrip("/") + "/", Path(out).resolve()
    for name, source in sources.items():
        if "://" in source.path or "://" in url:
            taken = f"{source.path}/".startswith(url)
        else:
            path = Path(source.path).resolve()
            taken = target == path or target in path.parents or (path in target.parents and target.is_file())
        if taken:
            raise ConflictError(
                f"{out} holds, or is part of, the input {name!r} ({source.path}); choose another output"
            )
