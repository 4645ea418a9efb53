"""`merge_checkpoint`: from disk to disk. Everything that headers tell is checked before a weight is read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxmerge.checkpoints.base import Checkpoint
from jaxmerge.checkpoints.stores import local_path
from jaxmerge.checkpoints.writer import place_of
from jaxmerge.errors import CheckpointError, ConflictError
from jaxmerge.methods.lazy import merge_lazily
from jaxmerge.methods.method import Method
from jaxmerge.streaming.access import BASE, plan_job, restricted
from jaxmerge.streaming.budget import AccessPlan
from jaxmerge.streaming.budgeted import Scratch
from jaxmerge.streaming.catalog import Catalog, open_catalog
from jaxmerge.streaming.fingerprint import digest
from jaxmerge.streaming.manifest import (
    Merge,
    describe_merge,
)
from jaxmerge.streaming.plan import Plan, make_plan
from jaxmerge.streaming.processes import (
    Processes,
    working,
)
from jaxmerge.streaming.report import StreamReport
from jaxmerge.streaming.reuse import Previous
from jaxmerge.streaming.saving import (
    DEFAULT_BUDGET,
    Target,
    Told,
    check_conflict,
    is_folder,
    is_hugging_face,
    saved,
    stored_once,
)
from jaxmerge.streaming.sizes import parse_bytes
from jaxmerge.streaming.sources import Source, described, opened_merge
from jaxmerge.trees.checks import cast, name_experts
from jaxmerge.trees.info import Rules

if TYPE_CHECKING:
    import tensorstore as ts


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
        sources, reference, job = opened_merge(opened, method, experts, base, key, rules, dtype)
        about, manifest = None, manifest and is_folder(out, format)
        if manifest or together.count > 1:
            about = describe_merge(
                method,
                {name: described(name, source, sources) for name, source in name_experts(experts).items()},
                None if base is None else described(BASE, base, sources),
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
                check_conflict(out, sources)  # before everything is read for statistics
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
        target = Target(
            out,
            format,
            None if reference is None else reference.metadata,
            _side_files(reference, dtype) if reference and is_hugging_face(out, format) else None,
            max_shard_bytes,
            overwrite,
            context,
        )
        previous = None if reuse is None else opened.enter_context(Previous(reuse))
        told = Told(sources, access, about if manifest else None, recipe, previous, known, together)
        report = saved(merged, target, memory_budget, progress, told)
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
        sources, _, job = opened_merge(opened, method, experts, base, key, rules, dtype)
        access = None
        if io_budget is not None:
            access, _ = plan_job(job, sources, _catalog(opened, catalog), io_budget, policy, floors)
            job = restricted(job, access, Scratch(Path.cwd()))  # to which nothing is written
        merged = merge_lazily(job, allow_nonfinite=True)
        merged = merged if dtype is None else cast(merged, dtype)
        plan = make_plan(stored_once(merged, sources)[0], parse_bytes(memory_budget, "memory_budget"))
        return dataclasses.replace(plan, io_plan=access)


def _facts(about: Merge, options: Mapping[str, Any]) -> dict[str, str]:
    """What the processes of a merge must agree on, besides what `saved` asks."""
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
