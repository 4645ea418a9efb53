"""The catalog: what is known about models on disk, in one SQLite file, so that a merge can be planned without reading.

Statistics are gathered in one pass over a base and an expert and kept by block. They are used only as long as the files
are in the state in which they were read (`jaxmerge.streaming.fingerprint`); what changed is read again, the rest is
not. In the same pass the contents are hashed, so a plan names models by what they are, not by where they lie.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import sqlite3
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxmerge.checkpoints.base import Checkpoint, open_checkpoint
from jaxmerge.checkpoints.writer import save_checkpoint
from jaxmerge.errors import CheckpointError, RecipeError
from jaxmerge.methods.lazy import CHUNK
from jaxmerge.streaming.catalog_file import checksum, magnitudes_of, open_file, quantile_row_of, row_of, statistics_of
from jaxmerge.streaming.content import ContentHash, together
from jaxmerge.streaming.fingerprint import Fingerprint, digest, fingerprint
from jaxmerge.streaming.progress import Progress, showing
from jaxmerge.streaming.sizes import format_bytes, parse_bytes
from jaxmerge.streaming.statistics import (
    BLOCK_BYTES,
    MAGNITUDES,
    BlockStatistics,
    between,
    default_block,
    entries_within,
    measure,
)
from jaxmerge.streaming.watched import WatchedTensor
from jaxmerge.trees.checks import check_same_tensors, is_mergeable, name_experts
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import Params, named_leaves

_MOST_WORKERS = 4

ModelSource = str | Path | Checkpoint
"""A checkpoint by path or URL, or an opened one."""


@dataclasses.dataclass(frozen=True)
class CatalogEntry:
    """A model in a catalog.

    Attributes:
        path: where it was found.
        state: `"fresh"`, `"changed"` since it was read, or `"missing"`.
        format: of the checkpoint.
        parameters: number of entries of all tensors.
        bytes: size of all tensors.
        content: hash of its contents; None until all of it has been read.
        bases: paths of the bases that its task vector is known against.
    """

    path: str
    state: str
    format: str
    parameters: int
    bytes: int
    content: str | None
    bases: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Work:
    """A tensor that must be read, from the base and some experts; some of them are hashed."""

    name: str
    base: LazyTensor
    block: int
    experts: dict[str, LazyTensor] = dataclasses.field(default_factory=dict)
    hashed: set[str] = dataclasses.field(default_factory=set)

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + sum(expert.nbytes for expert in self.experts.values())


class Catalog:
    """What is known about models; `open_catalog` opens one. Several processes may use it at a time.

    As a context manager it is closed at the end of the block.

    Attributes:
        path: the file; None in memory.
    """

    def __init__(self, path: Path | None, connection: sqlite3.Connection):
        self.path, self._connection, self._lock = path, connection, threading.RLock()

    def add(
        self,
        base: ModelSource,
        experts: Sequence[ModelSource] | Mapping[str, ModelSource],
        *,
        block_bytes: int | str | None = None,
        progress: bool | None = None,
    ) -> dict[str, int]:
        """Gathers the statistics of task vectors that are missing; what is known and unchanged is not read again.

        Args:
            base: the model that the experts were tuned from.
            experts: a list or a dict by name.
            block_bytes: size of a block, such as "1MiB"; rounded down to a power of two of entries, and up to what can
                be fetched alone. By default 1 MiB, and for what is known already the size that it has.
            progress: show a bar; by default in a terminal or notebook.

        Returns:
            Bytes read from each expert by name, and from `"the base"`.

        Raises:
            CheckpointError: a model cannot be read, or changes while it is read.
            StructureError, ShapeError: an expert has other tensors than the base.
            NonFiniteError: NaN or infinity in a model.
            BudgetError: a tensor is compressed, so that its blocks cannot be read alone.
        """
        blocks = None if block_bytes is None else parse_bytes(block_bytes, "block_bytes")
        with contextlib.ExitStack() as opened, showing(progress) as display:

            def checkpoint(source: ModelSource) -> Checkpoint:
                return source if isinstance(source, Checkpoint) else opened.enter_context(open_checkpoint(source))

            if "" in name_experts(experts):
                raise RecipeError("an expert has an empty name; give it another one")
            models = {name: checkpoint(source) for name, source in {"": base, **name_experts(experts)}.items()}
            before = {name: model.bytes_read for name, model in models.items()}
            self._gather(models, blocks, display)
            return {name or "the base": model.bytes_read - before[name] for name, model in models.items()}

    def save(
        self,
        path: str | Path,
        params: Params,
        *,
        base: ModelSource,
        block_bytes: int | str | None = None,
        **options: Any,
    ) -> Path:
        """Saves an expert as `jm.save_checkpoint` does, and gathers its statistics on the way: it is not read again.

        They are those that `add` gathers. The base is read alongside, once. Of an Orbax checkpoint, tensors that take
        several chunks are read again.

        Args:
            path: where to.
            params: a tree of arrays or lazy tensors, with the names and shapes of the base's.
            base: the model that the expert was tuned from.
            block_bytes: as for `add`; 1 MiB by default.
            **options: as for `save_checkpoint`.

        Returns:
            The absolute path.

        Raises:
            NonFiniteError: NaN or infinity in a tensor; nothing is saved.
            StructureError, ShapeError: the tensors are not those of the base; nothing is saved.
            MergeError: as `save_checkpoint` and `add` do.
        """
        blocks = BLOCK_BYTES if block_bytes is None else parse_bytes(block_bytes, "block_bytes")
        with contextlib.ExitStack() as opened:
            model = base if isinstance(base, Checkpoint) else opened.enter_context(open_checkpoint(base))
            leaves, before = named_leaves(model.params), fingerprint(model)
            given = {name: x if hasattr(x, "dtype") else np.asarray(x) for name, x in named_leaves(params).items()}
            _check_tensors(leaves, "that is saved", given)
            once: dict[int, Any] = {}  # tied tensors stay tied
            for name, leaf in given.items():
                if id(leaf) not in once and isinstance(leaf.dtype, np.dtype):  # others cannot be saved
                    whole = options.get("format") == "orbax" or not is_mergeable(leaf)
                    block = max(leaf.size, 1) if whole else entries_within(blocks, leaf.dtype)
                    once[id(leaf)] = WatchedTensor(leaf, name, leaves[name], block)
            watched = {name: once.get(id(leaf), leaf) for name, leaf in given.items()}
            saved = save_checkpoint(path, watched, **options)
            expert = opened.enter_context(open_checkpoint(saved))
            self._note(model, expert, watched, before, blocks)
            self.add(model, {"that is saved": expert}, block_bytes=block_bytes, progress=False)
        return saved

    def list(self) -> tuple[CatalogEntry, ...]:
        """The models, by path, and whether they are as they were."""
        with self._lock:
            models = self._rows("SELECT * FROM models ORDER BY path")
            bases = self._rows(
                "SELECT DISTINCT expert, path FROM statistics JOIN models ON base = models.id ORDER BY path"
            )
        return tuple(
            CatalogEntry(
                model["path"],
                self._state(model),
                model["format"],
                model["parameters"],
                model["bytes"],
                model["content"],
                tuple(row["path"] for row in bases if row["expert"] == model["id"]),
            )
            for model in models
        )

    def verify(self) -> tuple[CatalogEntry, ...]:
        """Checks the file, and that every model is as it was.

        Returns:
            The models that are missing or changed; empty if all is well.

        Raises:
            CheckpointError: the file is damaged.
        """
        with self._lock, self._reporting():
            for row in self._rows("PRAGMA integrity_check") + self._rows("PRAGMA foreign_key_check"):
                if tuple(row) != ("ok",):
                    raise CheckpointError(f"{self.path} is damaged ({tuple(row)}); open it again to have it rebuilt")
            for row in self._rows("SELECT * FROM statistics"):
                if checksum(row) != row["checksum"]:
                    raise CheckpointError(f"{self.path} is damaged (statistics of {row['name']}); add the models again")
        return tuple(entry for entry in self.list() if entry.state != "fresh")

    def gc(self) -> int:
        """Forgets models that are missing or changed, and statistics that belong to an earlier state of a model.

        Returns:
            Number of models forgotten.
        """
        gone = [entry.path for entry in self.list() if entry.state != "fresh"]
        with self._lock, self._reporting():
            with self._connection:
                self._connection.executemany("DELETE FROM models WHERE path = ?", [(path,) for path in gone])
                self._connection.execute(
                    """DELETE FROM statistics WHERE
                    expert_fingerprint NOT IN (SELECT fingerprint FROM tensors WHERE model = expert) OR
                    base_fingerprint NOT IN (SELECT fingerprint FROM tensors WHERE model = base)"""
                )
            self._connection.execute("VACUUM")
        return len(gone)

    def statistics(
        self, base: Checkpoint, expert: Checkpoint, states: tuple[Fingerprint, Fingerprint] | None = None
    ) -> dict[str, BlockStatistics] | None:
        """The blocks of a task vector by tensor, for the names that `paired` gives; None unless all are known.

        Args:
            base: the opened base.
            expert: the opened expert.
            states: the states of both, if they have just been looked at.
        """
        states = states or (fingerprint(base), fingerprint(expert))
        with self._lock, self._reporting():
            rows = self._known(base, expert, *states)
        pairs = paired(base, expert, states)
        needed = {name for name, (leaf, _) in pairs.items() if is_mergeable(leaf)}
        return {name: statistics_of(rows[name]) for name in needed} if needed <= rows.keys() else None

    def content(self, checkpoint: Checkpoint, state: Fingerprint | None = None) -> str | None:
        """The hash of a model's contents: its tensors' names, dtypes, shapes and bytes. None unless it is known.

        Args:
            checkpoint: the opened model.
            state: its state, if it has just been looked at.
        """
        state = state or fingerprint(checkpoint)
        with self._lock, self._reporting():
            found = self._rows(
                "SELECT id, content FROM models WHERE path = ? AND fingerprint = ?",
                (_place(checkpoint), state.model),
            )
            known = [row["content"] for row in found if row["content"] == self._content(checkpoint, row["id"], state)]
        return known[0] if known else None

    def tensor_contents(self, checkpoint: Checkpoint, state: Fingerprint) -> dict[str, bytes]:
        """What is known of a checkpoint's tensors: name → hashes of its blocks; tied ones by any of their names.

        Args:
            checkpoint: an opened checkpoint.
            state: the state it is in; what was learnt in another is not told.

        Raises:
            CheckpointError: the catalog cannot be read.
        """
        with self._lock, self._reporting():
            rows = self._rows(
                """SELECT tensors.name, tensors.content, tensors.fingerprint, tensors.blocks FROM tensors JOIN models
                ON models.id = model WHERE models.path = ? AND tensors.content NOT NULL""",
                (_place(checkpoint),),
            )
        return {
            row["name"]: row["blocks"]
            for row in rows
            if row["fingerprint"] == state.tensors.get(row["name"])
            and isinstance(row["blocks"], bytes)
            and row["content"] == together(row["blocks"])
        }

    def gram(self, base: ModelSource, experts: Sequence[ModelSource]) -> Float[np.ndarray, "K K"]:
        r"""Inner products of task vectors. Nothing is read.

        The diagonal is exact. The others are estimates from sketches, without bias; over B blocks that matter alike the
        standard error is about $1/(8 \sqrt{B})$ of the product of the two norms.

        Args:
            base: the base.
            experts: K experts, all of them in the catalog.

        Raises:
            CheckpointError: the catalog does not know one of them, or has it in blocks of another size.
        """
        with contextlib.ExitStack() as opened:
            of_base, *models = [
                x if isinstance(x, Checkpoint) else opened.enter_context(open_checkpoint(x)) for x in (base, *experts)
            ]
            known = [self.statistics(of_base, model) for model in models]
        for model, found in zip(models, known, strict=True):
            if found is None:
                raise CheckpointError(f"the catalog does not know {model.path} as it is now; add it first")
        result = np.zeros((len(models), len(models)))
        for i, a in enumerate(known):
            for j, b in enumerate(known):
                assert a is not None and b is not None
                for name in a.keys() & b.keys():
                    if a[name].block != b[name].block:
                        raise CheckpointError(
                            f"tensor {name!r}: {models[i].path} has blocks of {a[name].block} entries, "
                            f"{models[j].path} of {b[name].block}; add both with one block_bytes"
                        )
                    one, other = a[name].sketches.astype(np.float64), b[name].sketches.astype(np.float64)
                    result[i, j] += np.sum(a[name].norms ** 2) if i == j else np.sum(one * other)
        return result

    def quantiles(
        self, base: ModelSource, expert: ModelSource, shares: Sequence[float]
    ) -> Float[np.ndarray, "shares 2"]:
        """The magnitudes that shares of a task vector's entries reach, over the model. Nothing is read.

        Args:
            base: the base.
            expert: an expert that is in the catalog.
            shares: in (0, 1], such as the density of a trim.

        Returns:
            Of each share the lower and upper end of where the cut lies: within an eighth, since magnitudes are counted
            in eight bins for each power of two.

        Raises:
            CheckpointError: the catalog does not know the expert as it is now.
            RecipeError: a share lies outside of (0, 1].
        """
        for share in shares:
            if not 0 < share <= 1:
                raise RecipeError(f"a share is {share}, expected a number above 0 and at most 1")
        with contextlib.ExitStack() as opened:
            of_base, model = [
                x if isinstance(x, Checkpoint) else opened.enter_context(open_checkpoint(x)) for x in (base, expert)
            ]
            states = fingerprint(of_base), fingerprint(model)
            with self._lock, self._reporting():
                known = self._known(of_base, model, *states)
                rows = self._rows(
                    """SELECT quantiles.* FROM quantiles JOIN models a ON a.id = expert JOIN models b ON b.id = base
                    WHERE a.path = ? AND b.path = ?""",
                    (_place(model), _place(of_base)),
                )
            found = {row["name"]: magnitudes_of(row, known[row["name"]]) for row in rows if row["name"] in known}
            total = np.zeros(MAGNITUDES, np.int64)
            for name, (leaf, _) in paired(of_base, model, states).items():
                if is_mergeable(leaf):
                    counts = found.get(name)
                    if counts is None:
                        raise CheckpointError(f"the catalog does not know {model.path} as it is now; add it first")
                    total += counts
        size = int(total.sum())
        if not size:
            raise CheckpointError(f"{model.path} has no floating-point entries")
        return np.array([between(total, max(1, int(share * size))) for share in shares])

    def record_run(
        self,
        plan: Any,
        out: Path | str,
        method: str,
        sources: Mapping[str, Checkpoint],
        fetched: Mapping[str, int],
        seconds: float,
    ) -> None:
        """Notes a merge: its plan, its output and what it was made from.

        Args:
            plan: the access plan.
            out: the output.
            method: the method, as text.
            sources: the opened models, by name.
            fetched: bytes read from each of them.
            seconds: how long it took.
        """
        contents = {"the base": plan.base, **plan.experts}
        with self._lock, self._reporting(), self._connection:
            self._connection.execute(
                "INSERT OR IGNORE INTO plans VALUES (?, ?, ?, ?)", (plan.digest, plan.policy, plan.budget, _now())
            )
            run = self._connection.execute(
                "INSERT INTO runs (plan, out, method, bound, seconds, finished) VALUES (?, ?, ?, ?, ?, ?)",
                (plan.digest, str(out), method, plan.bound, seconds, _now()),
            ).lastrowid
            self._connection.executemany(
                "INSERT INTO lineage VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        run,
                        "base" if name == "the base" else "expert",
                        name,
                        _place(source),
                        contents[name],
                        plan.planned.get(name, 0),
                        fetched[name],
                    )
                    for name, source in sources.items()
                ],
            )

    def runs(self) -> Sequence[dict[str, Any]]:
        """The merges that were made with this catalog, oldest first.

        Returns:
            For each its `plan` (digest), `out`, `method`, `bound`, `seconds`, `finished`, and `inputs`: for each model
            its `role`, `name`, `path`, `content` hash, and bytes `planned` and `fetched`.
        """
        with self._lock, self._reporting():
            runs = [dict(row) for row in self._rows("SELECT * FROM runs ORDER BY id")]
            inputs = [dict(row) for row in self._rows("SELECT * FROM lineage ORDER BY run, role, name")]
        for run in runs:
            number = run.pop("id")
            run["inputs"] = [{k: v for k, v in x.items() if k != "run"} for x in inputs if x["run"] == number]
        return runs

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Catalog({'in memory' if self.path is None else self.path})"

    def _gather(self, models: Mapping[str, Checkpoint], block_bytes: int | None, display: Progress) -> None:
        """Reads what is not known. The base, whose name is empty, is read once for all experts."""
        base, experts = models[""], {name: model for name, model in models.items() if name}
        leaves = named_leaves(base.params)
        for name, expert in experts.items():
            _check_tensors(leaves, name, named_leaves(expert.params))
        states = {name: fingerprint(model) for name, model in models.items()}
        with self._lock, self._reporting(), self._connection:
            ids = {name: self._register(model, states[name]) for name, model in models.items()}
        work = self._work(models, states, ids, block_bytes)
        total = sum(item.nbytes for item in work)
        if work:
            display.say(f"statistics of {len(experts)} experts are gathered first: {format_bytes(total)} to read")
            display.begin("gathering statistics", total)

        def read(item: _Work) -> tuple[_Work, dict[str, BlockStatistics], dict[str, bytes]]:
            hashes = {name: ContentHash() for name in item.hashed}
            with jax.enable_x64(True):  # for this thread
                found = measure(item.name, item.base, item.experts, item.block, hashes)
            return item, found, {name: x.blocks() for name, x in hashes.items()}

        # Parts of an Orbax chunk come from the last chunks that were decoded, which threads would take from each other.
        one = any(model.format == "orbax" for model in models.values())
        workers = 1 if one else min(max(os.cpu_count() or 1, 2), _MOST_WORKERS)
        with ThreadPoolExecutor(workers, "jaxmerge") as threads:
            running = [threads.submit(read, item) for item in work]
            try:
                for done in as_completed(running):
                    item, found, contents = done.result()
                    with self._lock, self._reporting(), self._connection:  # so that what was read survives a kill
                        self._store(ids, states, item.name, found, contents)
                    display.advance(item.nbytes)
            except BaseException as error:
                for other in running:
                    other.cancel()
                if isinstance(error, CheckpointError):
                    self._forget_changed(models, states)
                raise
        changed = self._forget_changed(models, states)
        if changed:
            raise CheckpointError(f"{changed[0]} was changed while it was read; try again when it is complete")
        with self._lock, self._reporting(), self._connection:
            for name, model in models.items():
                self._set_content(model, ids[name])

    def _forget_changed(self, models: Mapping[str, Checkpoint], states: Mapping[str, Fingerprint]) -> Sequence[str]:
        """Forgets models that are no longer in the state in which their reading began; answers their paths."""
        changed = [model for name, model in models.items() if fingerprint(model).model != states[name].model]
        with self._lock, self._reporting(), self._connection:
            query = "DELETE FROM models WHERE path = ?"
            self._connection.executemany(query, [(_place(model),) for model in changed])
        return [model.path for model in changed]

    def _note(
        self, base: Checkpoint, expert: Checkpoint, watched: Mapping[str, Any], before: Fingerprint, block_bytes: int
    ) -> None:
        """Stores what was learnt while an expert was written."""
        states = {"": fingerprint(base), "expert": fingerprint(expert)}
        if states[""].model != before.model:
            return
        with self._lock, self._reporting(), self._connection:
            ids = {"": self._register(base, states[""]), "expert": self._register(expert, states["expert"])}
            for name, (one, other) in paired(base, expert).items():
                x = watched[name]
                if x.blocks is None or x.base_blocks is None or x.base is not one:
                    continue
                found: dict[str, BlockStatistics] = {}
                if x.statistics is not None and x.block == default_block(other, block_bytes):
                    found["expert"] = x.statistics
                self._store(ids, states, name, found, {"": x.base_blocks, "expert": x.blocks})
            for name, model in (("", base), ("expert", expert)):
                self._set_content(model, ids[name])

    def _work(
        self,
        models: Mapping[str, Checkpoint],
        states: Mapping[str, Fingerprint],
        ids: Mapping[str, int],
        block_bytes: int | None,
    ) -> Sequence[_Work]:
        """What must be read, large tensors first, so that the workers finish together."""
        with self._lock, self._reporting():
            query = "SELECT name FROM tensors WHERE model = ? AND content NOT NULL"
            hashed = {name: {row["name"] for row in self._rows(query, (number,))} for name, number in ids.items()}
        seen: set[int] = set()

        def is_new(model: str, name: str, leaf: LazyTensor) -> bool:
            new = name not in hashed[model] and id(leaf) not in seen
            seen.add(id(leaf))
            return new

        work: dict[tuple[str, int], _Work] = {}
        for expert, model in models.items():
            if not expert:
                continue
            with self._lock, self._reporting():
                rows = self._known(models[""], model, states[""], states[expert])
            for name, (one, other) in paired(models[""], model).items():
                block = default_block(other, block_bytes or BLOCK_BYTES) if is_mergeable(one) else CHUNK
                known = name in rows and (block_bytes is None or rows[name]["block"] == block)
                new = {key for key, leaf in (("", one), (expert, other)) if is_new(key, name, leaf)}
                if new or not (known or not is_mergeable(one)):
                    item = work.setdefault((name, block), _Work(name, one, block))
                    item.hashed.update(new)
                    if not known or expert in new:
                        item.experts[expert] = other
        return sorted(work.values(), key=lambda item: -item.nbytes)

    def _register(self, checkpoint: Checkpoint, state: Fingerprint) -> int:
        """The number of a model, whose tensors are those of now."""
        leaves = named_leaves(checkpoint.params)
        once = {id(leaf): leaf for leaf in leaves.values()}.values()
        self._connection.execute(
            """INSERT INTO models (path, format, fingerprint, parameters, bytes, added) VALUES (?, ?, ?, ?, ?, ?)
            ON CONFLICT (path) DO UPDATE SET format = excluded.format, parameters = excluded.parameters,
            bytes = excluded.bytes, content = CASE WHEN fingerprint = excluded.fingerprint THEN content END,
            fingerprint = excluded.fingerprint""",
            (
                _place(checkpoint),
                checkpoint.format,
                state.model,
                sum(leaf.size for leaf in once),
                checkpoint.nbytes,
                _now(),
            ),
        )
        (row,) = self._rows("SELECT id, content FROM models WHERE path = ?", (_place(checkpoint),))
        number = row["id"]
        known = {
            row["name"]: row["fingerprint"]
            for row in self._rows("SELECT name, fingerprint FROM tensors WHERE model = ?", (number,))
        }
        if row["content"] not in (None, self._content(checkpoint, number, state)):  # damaged: all is read again
            known = dict.fromkeys(known)
            self._connection.execute("UPDATE models SET content = NULL WHERE id = ?", (number,))
        gone = [(number, name) for name, found in known.items() if state.tensors.get(name) != found]
        self._connection.executemany("DELETE FROM tensors WHERE model = ? AND name = ?", gone)
        self._connection.executemany(
            "INSERT INTO tensors VALUES (?, ?, ?, ?, ?, NULL, NULL)",
            [
                (number, name, leaf.dtype.name, json.dumps(leaf.shape), state.tensors[name])
                for name, leaf in leaves.items()
                if known.get(name) != state.tensors[name]
            ],
        )
        self._connection.execute("DELETE FROM aliases WHERE model = ?", (number,))
        self._connection.executemany(
            "INSERT INTO aliases VALUES (?, ?, ?)",
            [(number, name, kept) for name, kept in checkpoint.aliases.items()],
        )
        return number

    def _known(
        self, base: Checkpoint, expert: Checkpoint, of_base: Fingerprint, of_expert: Fingerprint
    ) -> dict[str, sqlite3.Row]:
        """The statistics of tensors that are in the state in which they were read."""
        rows = self._rows(
            """SELECT statistics.* FROM statistics JOIN models a ON a.id = expert JOIN models b ON b.id = base
            WHERE a.path = ? AND b.path = ?""",
            (_place(expert), _place(base)),
        )
        return {
            row["name"]: row
            for row in rows
            if row["expert_fingerprint"] == of_expert.tensors.get(row["name"])
            and row["base_fingerprint"] == of_base.tensors.get(row["name"])
            and row["checksum"] == checksum(row)  # SQLite does not notice a byte that has changed within a value
        }

    def _store(
        self,
        ids: Mapping[str, int],
        states: Mapping[str, Fingerprint],
        name: str,
        found: Mapping[str, BlockStatistics],
        contents: Mapping[str, bytes],
    ) -> None:
        self._connection.executemany(
            "UPDATE tensors SET content = ?, blocks = ? WHERE model = ? AND name = ?",
            [(together(blocks), blocks, ids[model], name) for model, blocks in contents.items()],
        )
        for expert, x in found.items():
            row = row_of(
                x,
                expert=ids[expert],
                base=ids[""],
                name=name,
                expert_fingerprint=states[expert].tensors[name],
                base_fingerprint=states[""].tensors[name],
            )
            places = ", ".join(f":{key}" for key in row)
            self._connection.execute(f"INSERT OR REPLACE INTO statistics ({', '.join(row)}) VALUES ({places})", row)
            if x.magnitudes is not None:
                self._connection.execute(
                    "INSERT OR REPLACE INTO quantiles VALUES (:expert, :base, :name, :magnitudes, :checksum)",
                    quantile_row_of(x, row),
                )

    def _set_content(self, checkpoint: Checkpoint, number: int) -> None:
        """Notes the hash of a model's contents, once those of all its tensors are known."""
        content = self._content(checkpoint, number)
        self._connection.execute("UPDATE models SET content = ? WHERE id = ?", (content, number))

    def _content(self, checkpoint: Checkpoint, number: int, state: Fingerprint | None = None) -> str | None:
        """The hash of a model's contents from those of its tensors; None unless all are known. Tied ones count once."""
        leaves, once = named_leaves(checkpoint.params) if state is None else state.leaves, {}
        for name in sorted(leaves, key=lambda name: name in checkpoint.aliases):
            once.setdefault(id(leaves[name]), name)
        rows = {row["name"]: row for row in self._rows("SELECT * FROM tensors WHERE model = ?", (number,))}
        if any(name not in rows or rows[name]["content"] is None for name in once.values()):
            return None
        parts = [[n, rows[n]["dtype"], rows[n]["shape"], rows[n]["content"]] for n in sorted(once.values())]
        return digest([parts, sorted(checkpoint.aliases.items())])

    def _state(self, model: sqlite3.Row) -> str:
        try:
            with open_checkpoint(model["path"]) as checkpoint:
                return "fresh" if fingerprint(checkpoint).model == model["fingerprint"] else "changed"
        except CheckpointError:
            there = "://" in model["path"] or Path(model["path"]).exists()
            return "changed" if there else "missing"

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> tuple[sqlite3.Row, ...]:
        return tuple(self._connection.execute(query, values).fetchall())

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns an error of SQLite into one of ours."""
        try:
            yield
        except sqlite3.Error as error:
            raise CheckpointError(
                f"the catalog {self.path} cannot be used: {error}; close other programs that use it, or open it again"
            ) from error


def open_catalog(path: str | Path | None) -> Catalog:
    """Opens a catalog of models, or begins one.

    Args:
        path: a file, such as `models.catalog`. A catalog that is damaged is renamed to `….damaged` with a warning, and
            begun anew. None: in memory, forgotten when it is closed.

    Raises:
        CheckpointError: the file is something else, was written by a newer version, or cannot be written.
    """
    path = None if path is None else Path(path)
    return Catalog(path, open_file(path))


def _check_tensors(base: Mapping[str, Any], name: str, expert: Mapping[str, Any]) -> None:
    """Checks that an expert has the base's tensors; dtypes may differ, since differences are taken in float64."""
    shapes = {
        key: jax.ShapeDtypeStruct(x.shape, base[key].dtype if key in base else x.dtype) for key, x in expert.items()
    }
    check_same_tensors(base, {name: shapes}, "the base")


def paired(
    base: Checkpoint, expert: Checkpoint, states: tuple[Fingerprint, Fingerprint] | None = None
) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """The tensors of a base and an expert by name; tied ones once, under the name that both keep."""
    leaves, others = (x.leaves for x in states) if states else (named_leaves(x.params) for x in (base, expert))
    result: dict[str, tuple[LazyTensor, LazyTensor]] = {}
    seen: set[tuple[int, int]] = set()
    for name in sorted(leaves, key=lambda name: (name in base.aliases) + (name in expert.aliases)):
        if name in others and (id(leaves[name]), id(others[name])) not in seen:
            seen.add((id(leaves[name]), id(others[name])))
            result[name] = (leaves[name], others[name])
    return result


def _place(checkpoint: Checkpoint) -> str:
    """The path by which a model is known."""
    return checkpoint.path if "://" in checkpoint.path else str(Path(checkpoint.path).resolve())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
