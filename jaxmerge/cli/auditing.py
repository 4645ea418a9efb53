"""`jaxmerge explain` and `jaxmerge replay`: what the manifest of a merged folder tells, and the same merge again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.cli.nodes import suggestion
from jaxmerge.cli.output import natural_order, print_table
from jaxmerge.errors import CheckpointError, RecipeError
from jaxmerge.streaming.budget import AccessPlan
from jaxmerge.streaming.fingerprint import fingerprint
from jaxmerge.streaming.manifest import Manifest, load_manifest
from jaxmerge.streaming.merge_checkpoint import merge_checkpoint
from jaxmerge.streaming.method_data import key_from_data, method_from_data
from jaxmerge.streaming.report import StreamReport
from jaxmerge.streaming.sizes import format_bytes

_MOST_REASONS = 5


def explain_model(path: str) -> None:
    """Prints what a merged folder was made from, and, for a merge within an I/O budget, what each tensor holds of it.

    Args:
        path: the folder, or its manifest.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    manifest = load_manifest(path)
    merge, run, plan = manifest.merge, manifest.run, manifest.io_plan
    rows = [("method", merge.method)]
    for model in (*([] if merge.base is None else [merge.base]), *merge.experts):
        read = f", {format_bytes(run.bytes_read[model.name])} read" if model.name in run.bytes_read else ""
        rows.append((model.name, f"{model.path or 'given in memory'}{read}"))
    given = {"seed or key": merge.key, "dtype": merge.dtype, "layer-stacked": ", ".join(merge.rules.stacked)}
    rows += [(what, str(value)) for what, value in given.items() if value not in (None, "")]
    rows.append(
        (
            "tensors",
            f"{len(manifest.output.tensors)}, {format_bytes(sum(x.nbytes for x in manifest.output.tensors.values()))}",
        )
    )
    if run.copied is not None:
        count = sum(map(len, run.copied.blocks.values()))
        blocks = f" and {count} blocks of {len(run.copied.blocks)} others" if count else ""
        copied = f"{len(run.copied.tensors)} tensors{blocks}, from {run.copied.path} (id {run.copied.id})"
        rows.append(("copied", copied))
    rows.append(("finished", run.finished))
    rows.append(("made with", ", ".join(f"{name} {version}" for name, version in run.versions.items())))
    rows += [] if plan is None else plan.rows()
    rows.append(("id", manifest.id))
    print_table(f"what {path} was made from", ("", ""), rows)
    if plan is not None:
        names = sorted(plan.blocks, key=natural_order)
        shares = [(name, *(_share(plan, expert, name) for expert in plan.experts)) for name in names]
        print_table("blocks that were read; the base stands in for the others", ("tensor", *plan.experts), shares)


def explain_tensor(path: str, tensor: str) -> None:
    """Prints what one tensor was made from; within an I/O budget also why blocks were left out.

    Args:
        path: the folder, or its manifest.
        tensor: name of the tensor.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
        RecipeError: the folder has no such tensor.
    """
    manifest = load_manifest(path)
    output, plan = manifest.output, manifest.io_plan
    if tensor not in {**output.tensors, **output.tied}:
        raise RecipeError(f"{path} has no tensor {tensor!r}{suggestion(tensor, [*output.tensors, *output.tied])}")
    kept = output.tied.get(tensor, tensor)
    found = output.tensors[kept]
    print(f"{tensor}: {found.dtype}{list(found.shape)}{'' if kept == tensor else f', tied to {kept}'}")
    print(f"sha256 of its {len(found.blocks)} block hashes: {found.sha256}")
    print(f"method: {manifest.merge.method}")
    copied = manifest.run.copied
    if copied is not None and kept in copied.tensors:
        there = "" if copied.tensors[kept] == kept else f", where it is {copied.tensors[kept]}"
        print(f"it was copied from {copied.path} (id {copied.id}){there}, since it was made in the same way there:")
        print("method and coefficients for this tensor, dtype, libraries, and the tensors that went in are the same")
        return
    if copied is not None and kept in copied.blocks:
        blocks = copied.blocks[kept]
        print(f"{len(blocks)} of its {len(found.blocks)} blocks were copied from {copied.path} (id {copied.id}), since")
        print("nothing that they depend on has changed there; merged again were the blocks", end=" ")
        print(_runs(sorted({*range(len(found.blocks))}.difference(blocks))))
    elif copied is not None:
        print(f"it was merged: in {copied.path} nothing was made in the same way from the same tensors")
    if plan is None:
        print("all of it was read from each expert")
        return
    planned = next((name for name in (tensor, kept, *_tied_to(manifest, kept)) if name in plan.blocks), None)
    if planned is None:
        print("it is the base's: tensors that are not floating point are not read from experts")
        return
    for expert in plan.experts:
        print(f"{expert}: {_share(plan, expert, planned)}")
        left = [int(i) for i in (~plan.chosen[expert][planned]).nonzero()[0]]
        for block in left[:_MOST_REASONS]:
            print(f"  {plan.explain(expert, planned, block)}")
        if len(left) > _MOST_REASONS:
            print(f"  {len(left) - _MOST_REASONS} more blocks were not read")


def replay(
    path: str, out: str, *, catalog: str | None = None, overwrite: bool = False, progress: bool | None = None
) -> tuple[StreamReport, list[str]]:
    """Merges again as a manifest says, from the same files.

    Args:
        path: the manifest, or the folder that it is in.
        out: a local folder.
        catalog: a catalog with statistics, for a merge within an I/O budget; without one all is read to gather them.
        overwrite: replace what stands at `out`.
        progress: show a bar; by default in a terminal.

    Returns:
        What it took, and the tensors whose bytes are not those that the manifest tells: none on the same machine with
        the same libraries.

    Raises:
        CheckpointError: the manifest is damaged, or a model is missing or not as it was.
        RecipeError: the merge cannot be told as data: its method holds a function or a class that is not part of the
            library, or a model was given in memory.
        MergeError: as `merge_checkpoint` does.
    """
    if Path(out).suffix in (".safetensors", ".npz"):
        raise RecipeError(f"{out}: a manifest is replayed into a folder; give a path without suffix")
    manifest = load_manifest(path)
    merge = manifest.merge
    if merge.recipe is None:
        raise RecipeError(
            f"{path}: {merge.method} holds a function, statistics that are in memory or behind a URL, or a class that "
            "is not part of jaxmerge, so it cannot be built from the manifest; call merge_checkpoint with it again"
        )
    method, key = method_from_data(merge.recipe), key_from_data(merge.key)
    paths: dict[str, str] = {}
    for model in (*([] if merge.base is None else [merge.base]), *merge.experts):
        if model.path is None:
            raise RecipeError(f"{path}: {model.name} was given in memory, so it cannot be read again")
        if model.fingerprint is None:
            raise CheckpointError(
                f"{path}: {model.name} ({model.path}) came from a server that does not tell whether files have "
                "changed, so the merge cannot be replayed; download the model and merge again"
            )
        with open_checkpoint(model.path) as checkpoint:
            if fingerprint(checkpoint).model != model.fingerprint:
                raise CheckpointError(
                    f"{model.name} ({model.path}) is not as it was when {path} was written: its header, or the size or "
                    "time of change of a file differs; put the former files back with their times, or merge anew"
                )
        paths[model.name] = model.path
    report = merge_checkpoint(
        method,
        {model.name: paths[model.name] for model in merge.experts},
        base=None if merge.base is None else paths[merge.base.name],
        out=out,
        format=manifest.output.format,
        key=key,
        rules=merge.rules,
        dtype=merge.dtype,
        memory_budget=manifest.run.memory_budget,
        io_budget=manifest.io_plan,
        catalog=catalog,
        max_shard_bytes=manifest.output.max_shard_bytes,
        overwrite=overwrite,
        allow_nonfinite=merge.allow_nonfinite,
        recipe=manifest.run.recipe,
        progress=progress,
    )
    again = load_manifest(report.path).output.tensors
    names = sorted({*manifest.output.tensors, *again}, key=natural_order)
    return report, [name for name in names if manifest.output.tensors.get(name) != again.get(name)]


def _tied_to(manifest: Manifest, kept: str) -> list[str]:
    return [name for name, other in manifest.output.tied.items() if other == kept]


def _share(plan: AccessPlan, expert: str, tensor: str) -> str:
    chosen = plan.chosen[expert][tensor]
    return f"{int(chosen.sum())} of {len(chosen)} blocks ({chosen.mean():.1%})"


def _runs(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, such as `3, 7 to 9`."""
    ends: list[list[int]] = []
    for number in numbers:
        if ends and ends[-1][1] == number - 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in ends)
