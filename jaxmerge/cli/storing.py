"""`jaxmerge store`, and `jaxmerge merge --store`: models with versions."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxmerge.checkpoints.upload import SHARD_BYTES
from jaxmerge.cli.output import print_table
from jaxmerge.errors import CheckpointError
from jaxmerge.streaming.report import StreamReport
from jaxmerge.streaming.sizes import format_bytes
from jaxmerge.streaming.store import CURRENT, ModelStore, ModelVersion, open_store

_SHORT = 12  # digits of a commit in tables; any number that is enough to tell it is understood


def merge_into(
    root: str,
    name: str,
    expected: str | None,
    inputs: Iterable[str],
    merge: Callable[..., StreamReport],
) -> StreamReport:
    """Merges into a new version of a model.

    Args:
        root: the store, a folder or URL.
        name: the model.
        expected: the commit that must be current, "none" for no version at all; None: whatever is current now.
        inputs: paths of the models that are merged.
        merge: merges into a folder, given the folder and options of `merge_checkpoint`.

    Returns:
        What the merge took, with the path of the version.

    Raises:
        ConflictError: another commit is current.
        MergeError: as the merge does.
    """
    store = open_store(root)
    wanted = {None: CURRENT, "none": None}.get(expected, expected)
    if expected not in (None, "none"):
        path = store.path(name, expected)
        wanted = next((x.commit for x in store.versions(name) if x.path == path), expected)
    # Files are uploaded whole, from memory.
    options = {} if isinstance(store.root, Path) else {"max_shard_bytes": SHARD_BYTES}
    with store.transaction(name, expected=wanted, inputs=inputs) as transaction:
        report = merge(str(transaction.folder), **options)
    assert transaction.version is not None
    return dataclasses.replace(report, path=transaction.version.path)


def run_action(options: argparse.Namespace) -> bool:
    """Does what `jaxmerge store` is asked for, and prints it.

    Args:
        options: `action` (list, versions, path, verify, gc or recover), `root`, and what belongs to the action.

    Returns:
        Whether all is well: false when `verify` has found something that is not as it was committed.

    Raises:
        MergeError: the store cannot be read or written.
    """
    store = open_store(options.root)
    if not store.exists():
        raise CheckpointError(f"there is no model store {options.root}; begin one with jaxmerge merge --store")
    if options.action == "list":
        _list(store, options)
    elif options.action == "versions":
        _versions(store, options)
    elif options.action == "path":
        print(store.path(options.name, options.commit))
    elif options.action == "verify":
        faults = store.verify(options.name, options.commit)
        for fault in faults:
            print(fault)
        print(f"{options.root}: {len(faults)} faults" if faults else f"{options.root} holds what was committed")
        return not faults
    elif options.action == "gc":
        removed = store.gc(keep=options.keep, parents=options.parents, dry_run=options.dry_run)
        what = "would be removed" if options.dry_run else "removed"
        print_table(f"{options.root}: {len(removed)} versions {what}", _HEAD, [_row(store, x) for x in removed])
    else:
        done = store.recover()
        print("\n".join(done) if done else f"{options.root}: nothing was left unfinished")
    return True


_HEAD = ("model", "commit", "number", "committed", "size", "made from", "")


def _list(store: ModelStore, options: argparse.Namespace) -> None:
    found = {name: store.versions(name) for name in store.models()}
    if options.json:
        told = [
            {"model": name, "head": store.head(name), "path": str(store.path(name)), "versions": len(versions)}
            for name, versions in found.items()
        ]
        print(json.dumps(told, indent=1))
        return
    rows = []
    for name, versions in found.items():
        head = store.head(name) or ""
        finished = next((x.finished for x in versions if x.commit == head), "has no record")
        size = format_bytes(sum(x.nbytes for x in versions))
        rows.append((name, head[:_SHORT], finished, str(len(versions)), size))
    print_table(f"{options.root}: {len(rows)} models", ("model", "current", "committed", "versions", "size"), rows)


def _versions(store: ModelStore, options: argparse.Namespace) -> None:
    versions = store.versions(options.name)
    if not versions:
        store.path(options.name)  # says that there is none
    if options.json:
        print(json.dumps([dataclasses.asdict(x) | {"path": str(x.path)} for x in versions], indent=1))
        return
    title = f"{options.root}: {len(versions)} versions of {options.name}"
    print_table(title, _HEAD, [_row(store, x) for x in versions])


def _row(store: ModelStore, version: ModelVersion) -> tuple[str, ...]:
    parents = ", ".join(f"{name}@{commit[:_SHORT]}" for name, commit in (x.split("@") for x in version.parents))
    return (
        version.model,
        version.commit[:_SHORT],
        str(version.number),
        version.finished,
        format_bytes(version.nbytes),
        parents,
        "current" if version.commit == store.head(version.model) else "",
    )
