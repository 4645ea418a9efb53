"""`save_lazily`: a tree of lazy tensors to disk, in a transaction, within a memory budget.

The output appears complete or not at all. What is there already is not made again: tensors that a killed run of the
same merge has finished, and tensors of an earlier output that would come out the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax

from jaxmerge.checkpoints.base import Checkpoint
from jaxmerge.checkpoints.layout import TensorSpec
from jaxmerge.checkpoints.stores import local_path
from jaxmerge.checkpoints.upload import SHARD_BYTES
from jaxmerge.checkpoints.writer import CheckpointWriter, open_writer
from jaxmerge.errors import BudgetError, CheckpointError, ConflictError, RecipeError
from jaxmerge.methods.lazy import as_lazy
from jaxmerge.streaming.access import BASE
from jaxmerge.streaming.budget import AccessPlan
from jaxmerge.streaming.catalog import Catalog
from jaxmerge.streaming.content import BLOCK_BYTES
from jaxmerge.streaming.engine import restore, stream
from jaxmerge.streaming.fingerprint import digest, fingerprint
from jaxmerge.streaming.journal import Journal
from jaxmerge.streaming.keys import Keys, output_keys
from jaxmerge.streaming.manifest import (
    MANIFEST,
    BlockHashes,
    Copied,
    Merge,
    Output,
    versions,
    write_manifest,
)
from jaxmerge.streaming.plan import make_plan, merges_within
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
from jaxmerge.streaming.reuse import Known, Previous
from jaxmerge.streaming.sizes import format_bytes, parse_bytes
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import Params, named_leaves

if TYPE_CHECKING:
    import tensorstore as ts

DEFAULT_BUDGET = "512MiB"
"""Memory for the work, beside some 200 MiB for Python and its libraries."""

DEFAULT_SHARD = "5GiB"
"""What Hugging Face tools split checkpoints into."""


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
    target = Target(local_path(out), format, metadata, side_files, max_shard_bytes, overwrite, context)
    with working(processes) as together:
        return saved(params, target, memory_budget, progress, Told(sources or {}, together=together))


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a tree is saved, and how; see `save_lazily`."""

    out: str | Path
    format: str | None
    metadata: Mapping[str, str] | None
    side_files: Mapping[str, Path | bytes] | None
    max_shard_bytes: int | str | None
    overwrite: bool
    context: ts.Context | None = None


@dataclasses.dataclass(frozen=True)
class Told:
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


def saved(
    params: Params, target: Target, memory_budget: int | str, progress: bool | None, context: Told
) -> StreamReport:
    """Does what `save_lazily` does, and what the context asks for."""
    started, together = time.perf_counter(), context.together
    out, format, max_shard_bytes, sources = target.out, target.format, target.max_shard_bytes, context.sources
    check_conflict(out, sources)
    tensors, aliases = stored_once(params, sources)
    budget = parse_bytes(memory_budget, "memory_budget")
    if max_shard_bytes is None and is_hugging_face(out, format):
        max_shard_bytes = min(budget // 4, SHARD_BYTES) if "://" in str(out) else DEFAULT_SHARD
    shards = None if max_shard_bytes is None else parse_bytes(max_shard_bytes, "max_shard_bytes")
    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    together.agree(lambda: _facts_of_output(target, specs, sources, budget, context.about is not None))
    plan = make_plan(tensors, budget, fewest_cores(together))
    keys = Keys({}, {})
    if context.about is not None or context.previous is not None:
        keys = keys_of_first(together, lambda: output_keys(tensors, sources, context.catalog, plan.chunk))
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
                finished = {name: Known(blocks) for name, blocks in journal.finished.items() if name in keys.tensors}
            known = {**copied, **finished}
            here: dict[str, set[int]] = {}
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
            whole = {name for name, blocks in here.items() if len(blocks) == len(known[name].blocks)}
            from_previous = {name: copied[name].name for name in sorted(whole) if name not in finished}
            blocks = {name: tuple(sorted(found)) for name, found in here.items() if found and name not in whole}
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
                    keys=keys.tensors,
                    block_keys=keys.blocks,
                    copied=Copied(earlier.path, earlier.manifest.id, from_previous, blocks) if earlier else None,
                )
        published = time.perf_counter()
    resumed = [name for name in whole if name in finished]
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
        reused_blocks=sum(map(len, blocks.values())),
        processes=together.count,
    )


def _facts_of_output(
    target: Target, specs: Sequence[TensorSpec], sources: Mapping[str, Checkpoint], budget: int, has_manifest: bool
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
    if not keys.tensors:
        return None
    plan = None if access is None else access.digest
    # The first key tells inputs by their files, whatever a catalog has learnt meanwhile.
    first = {name: found[0] for name, found in keys.tensors.items()}
    return Journal(digest([dataclasses.asdict(about), plan, first, BLOCK_BYTES]))


def _say_known(
    display: Progress, known: Mapping[str, Known], tensors: Mapping[str, LazyTensor], previous: Previous | None
) -> None:
    """Tells what is taken over instead of being merged."""
    copied = "" if previous is None else f"copied from {previous.path}"
    for from_previous, text in ((True, copied), (False, "here from a run that was killed")):
        here = {name: found for name, found in known.items() if (found.source is not None) == from_previous}
        if here:
            specs = {name: TensorSpec(name, tensors[name].dtype, tensors[name].shape) for name in here}
            size = format_bytes(sum(found.nbytes_of(specs[name]) for name, found in here.items()))
            parts = sum(not found.is_whole for found in here.values())
            of_these = f", {parts} of them in part" if parts else ""
            display.say(f"{len(here)} tensors ({size}) are {text}{of_these}")


def _warn_damaged(
    copied: Mapping[str, Known], finished: Mapping[str, Known], here: Mapping[str, set[int]], previous: Previous | None
) -> None:
    damaged = [
        found.name
        for name, found in copied.items()
        if name not in finished and len(here.get(name, ())) < sum(map(bool, found.blocks))
    ]
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


def stored_once(params: Params, sources: Mapping[str, Checkpoint]) -> tuple[dict[str, LazyTensor], dict[str, str]]:
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


def is_hugging_face(out: str | Path, format: str | None) -> bool:
    """Whether the output is a folder of safetensors files."""
    return format in (None, "safetensors") and Path(out).suffix not in (".safetensors", ".npz")


def is_folder(out: str | Path, format: str | None) -> bool:
    """Whether the output is a folder."""
    return is_hugging_face(out, format) or format == "orbax"


def check_conflict(out: str | Path, sources: Mapping[str, Checkpoint]) -> None:
    """Raises a `ConflictError` if the output is one of the inputs, holds one or is part of one."""
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
