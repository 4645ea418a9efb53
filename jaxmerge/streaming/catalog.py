"""The catalog: what is known about models on disk, in one SQLite file, so that a merge can be planned without reading.

Statistics are gathered in one pass over a base and an expert and kept by block. They are used only as long as the files
are in the state in which they were read (`jaxmerge.streaming.fingerprint`); what changed is read again, the rest is
not. In the same pass the contents are hashed, so a plan names models by what they are, not by where they lie.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import sqlite3
import threading
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxmerge.checkpoints.base import Checkpoint, open_checkpoint
from jaxmerge.errors import CheckpointError, RecipeError
from jaxmerge.methods.lazy import CHUNK
from jaxmerge.streaming.fingerprint import Fingerprint, digest, fingerprint
from jaxmerge.streaming.progress import Progress, showing
from jaxmerge.streaming.sizes import format_bytes, parse_bytes
from jaxmerge.streaming.statistics import BLOCK_BYTES, SKETCH, BlockStatistics, default_block, measure
from jaxmerge.trees.checks import check_same_tensors, is_mergeable, name_experts
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import named_leaves

_APPLICATION = 0x6A6D6361  # "jmca": how the file says that it is one of ours
_MAGIC = b"SQLite format 3\0"
_BUSY_SECONDS = 60.0
_MOST_WORKERS = 4

_MIGRATIONS = (
    """
    CREATE TABLE models (
        id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, format TEXT NOT NULL, fingerprint TEXT NOT NULL,
        content TEXT, parameters INTEGER NOT NULL, bytes INTEGER NOT NULL, added TEXT NOT NULL
    );
    CREATE TABLE tensors (
        model INTEGER NOT NULL REFERENCES models ON DELETE CASCADE, name TEXT NOT NULL, dtype TEXT NOT NULL,
        shape TEXT NOT NULL, fingerprint TEXT NOT NULL, content TEXT, PRIMARY KEY (model, name)
    );
    CREATE TABLE aliases (
        model INTEGER NOT NULL REFERENCES models ON DELETE CASCADE, name TEXT NOT NULL, kept TEXT NOT NULL,
        PRIMARY KEY (model, name)
    );
    CREATE TABLE statistics (
        expert INTEGER NOT NULL REFERENCES models ON DELETE CASCADE,
        base INTEGER NOT NULL REFERENCES models ON DELETE CASCADE,
        name TEXT NOT NULL, expert_fingerprint TEXT NOT NULL, base_fingerprint TEXT NOT NULL,
        size INTEGER NOT NULL, block INTEGER NOT NULL, norms BLOB NOT NULL, largest BLOB NOT NULL, zeros BLOB NOT NULL,
        touched BLOB NOT NULL, sketches BLOB NOT NULL, checksum TEXT NOT NULL, PRIMARY KEY (expert, base, name)
    );
    CREATE TABLE plans (digest TEXT PRIMARY KEY, policy TEXT NOT NULL, budget INTEGER, added TEXT NOT NULL);
    CREATE TABLE runs (
        id INTEGER PRIMARY KEY, plan TEXT NOT NULL REFERENCES plans, out TEXT NOT NULL, method TEXT NOT NULL,
        bound REAL, seconds REAL NOT NULL, finished TEXT NOT NULL
    );
    CREATE TABLE lineage (
        run INTEGER NOT NULL REFERENCES runs, role TEXT NOT NULL, name TEXT NOT NULL, path TEXT NOT NULL,
        content TEXT NOT NULL, planned INTEGER NOT NULL, fetched INTEGER NOT NULL, PRIMARY KEY (run, role, name)
    );
    """,
)
_ARRAYS = {"norms": np.float64, "largest": np.float64, "zeros": np.int64, "touched": np.int64, "sketches": np.float32}

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
                if _checksum(row) != row["checksum"]:
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

    def statistics(self, base: Checkpoint, expert: Checkpoint) -> dict[str, BlockStatistics] | None:
        """The blocks of a task vector by tensor, for the names that `paired` gives; None unless all are known.

        Args:
            base: the opened base.
            expert: the opened expert.
        """
        states = fingerprint(base), fingerprint(expert)
        with self._lock, self._reporting():
            rows = self._known(base, expert, *states)
        pairs = paired(base, expert)
        needed = {name for name, (leaf, _) in pairs.items() if is_mergeable(leaf)}
        return {name: _statistics(rows[name]) for name in needed} if needed <= rows.keys() else None

    def content(self, checkpoint: Checkpoint) -> str | None:
        """The hash of a model's contents: its tensors' names, dtypes, shapes and bytes. None unless it is known.

        Args:
            checkpoint: the opened model.
        """
        with self._lock, self._reporting():
            found = self._rows(
                "SELECT content FROM models WHERE path = ? AND fingerprint = ?",
                (_place(checkpoint), fingerprint(checkpoint).model),
            )
        return found[0]["content"] if found else None

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

    def record_run(
        self,
        plan: Any,
        out: Path,
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
            # Dtypes may differ: differences are taken in float64.
            shapes = {
                key: jax.ShapeDtypeStruct(x.shape, leaves[key].dtype if key in leaves else x.dtype)
                for key, x in named_leaves(expert.params).items()
            }
            check_same_tensors(leaves, {name: shapes}, "the base")
        states = {name: fingerprint(model) for name, model in models.items()}
        with self._lock, self._reporting(), self._connection:
            ids = {name: self._register(model, states[name]) for name, model in models.items()}
        work = self._work(models, states, ids, block_bytes)
        total = sum(item.nbytes for item in work)
        if work:
            display.say(f"statistics of {len(experts)} experts are gathered first: {format_bytes(total)} to read")
            display.begin("gathering statistics", total)

        def read(item: _Work) -> tuple[_Work, dict[str, BlockStatistics], dict[str, str]]:
            hashes = {name: hashlib.sha256() for name in item.hashed}
            with jax.enable_x64(True):  # for this thread
                found = measure(item.name, item.base, item.experts, item.block, hashes)
            return item, found, {name: x.hexdigest() for name, x in hashes.items()}

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
            except BaseException:
                for other in running:
                    other.cancel()
                raise
        for name, model in models.items():
            if fingerprint(model).model != states[name].model:
                with self._lock, self._reporting(), self._connection:
                    self._connection.execute("DELETE FROM models WHERE path = ?", (_place(model),))
                raise CheckpointError(f"{model.path} was changed while it was read; try again when it is complete")
        with self._lock, self._reporting(), self._connection:
            for name, model in models.items():
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
        (row,) = self._rows("SELECT id FROM models WHERE path = ?", (_place(checkpoint),))
        number = row["id"]
        known = {
            row["name"]: row["fingerprint"]
            for row in self._rows("SELECT name, fingerprint FROM tensors WHERE model = ?", (number,))
        }
        gone = [(number, name) for name, found in known.items() if state.tensors.get(name) != found]
        self._connection.executemany("DELETE FROM tensors WHERE model = ? AND name = ?", gone)
        self._connection.executemany(
            "INSERT INTO tensors VALUES (?, ?, ?, ?, ?, NULL)",
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
            and row["checksum"] == _checksum(row)  # SQLite does not notice a byte that has changed within a value
        }

    def _store(
        self,
        ids: Mapping[str, int],
        states: Mapping[str, Fingerprint],
        name: str,
        found: Mapping[str, BlockStatistics],
        contents: Mapping[str, str],
    ) -> None:
        self._connection.executemany(
            "UPDATE tensors SET content = ? WHERE model = ? AND name = ?",
            [(content, ids[model], name) for model, content in contents.items()],
        )
        for expert, x in found.items():
            row = {
                "expert": ids[expert],
                "base": ids[""],
                "name": name,
                "expert_fingerprint": states[expert].tensors[name],
                "base_fingerprint": states[""].tensors[name],
                "size": x.size,
                "block": x.block,
                **{key: np.ascontiguousarray(getattr(x, key), dtype).tobytes() for key, dtype in _ARRAYS.items()},
            }
            row["checksum"] = _checksum(row)
            places = ", ".join(f":{key}" for key in row)
            self._connection.execute(f"INSERT OR REPLACE INTO statistics VALUES ({places})", row)

    def _set_content(self, checkpoint: Checkpoint, number: int) -> None:
        """Notes the hash of a model's contents, once those of all its tensors are known. Tied ones count once."""
        leaves, once = named_leaves(checkpoint.params), {}
        for name in sorted(leaves, key=lambda name: name in checkpoint.aliases):
            once.setdefault(id(leaves[name]), name)
        rows = {row["name"]: row for row in self._rows("SELECT * FROM tensors WHERE model = ?", (number,))}
        parts = [[n, rows[n]["dtype"], rows[n]["shape"], rows[n]["content"]] for n in sorted(once.values())]
        if all(part[3] is not None for part in parts):
            content = digest([parts, sorted(checkpoint.aliases.items())])
            self._connection.execute("UPDATE models SET content = ? WHERE id = ?", (content, number))

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
    if path is None:
        return Catalog(None, _connected(":memory:"))
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            with open(path, "rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise CheckpointError(f"{path} is no catalog; choose another path, or remove the file")
        try:
            return Catalog(path, _connected(str(path)))
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # busy, read-only, no such folder: nothing is damaged
                raise
            aside = _move_aside(path)
            warnings.warn(f"the catalog {path} was damaged ({error}); it is now {aside}, and begun anew", stacklevel=2)
            return Catalog(path, _connected(str(path)))
    except (OSError, sqlite3.Error) as error:
        raise CheckpointError(f"the catalog {path} cannot be opened: {error}; check its folder's mode") from error


def paired(base: Checkpoint, expert: Checkpoint) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """The tensors of a base and an expert by name; tied ones once, under the name that both keep."""
    leaves, others = named_leaves(base.params), named_leaves(expert.params)
    result: dict[str, tuple[LazyTensor, LazyTensor]] = {}
    seen: set[tuple[int, int]] = set()
    for name in sorted(leaves, key=lambda name: (name in base.aliases) + (name in expert.aliases)):
        if name in others and (id(leaves[name]), id(others[name])) not in seen:
            seen.add((id(leaves[name]), id(others[name])))
            result[name] = (leaves[name], others[name])
    return result


def _connected(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
    try:
        connection.row_factory = sqlite3.Row
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if tables and application != _APPLICATION:
            raise CheckpointError(f"{path} is a database of another program; choose another path for the catalog")
        if version > len(_MIGRATIONS):
            raise CheckpointError(
                f"{path} is a catalog of version {version}, and this jaxmerge knows versions up to {len(_MIGRATIONS)}; "
                "upgrade jaxmerge, or choose another path"
            )
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        if version < len(_MIGRATIONS):
            _migrate(connection)
        return connection
    except BaseException:
        connection.close()
        raise


def _migrate(connection: sqlite3.Connection) -> None:
    """Brings a catalog to the present version, in one transaction, once even if several processes try."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        for script in _MIGRATIONS[version:]:
            for statement in filter(str.strip, script.split(";")):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _move_aside(path: Path) -> Path:
    """Renames a damaged catalog and what belongs to it."""
    number = 0
    while (aside := path.with_name(f"{path.name}.damaged{number or ''}")).exists():
        number += 1
    for suffix in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


def _statistics(row: sqlite3.Row) -> BlockStatistics:
    arrays = {key: np.frombuffer(row[key], dtype) for key, dtype in _ARRAYS.items()}
    arrays["sketches"] = arrays["sketches"].reshape(-1, SKETCH)
    return BlockStatistics(row["size"], row["block"], **arrays)


def _checksum(row: Any) -> str:
    """A hash of what a row of statistics says, and of what."""
    told = hashlib.sha256(repr([row[key] for key in ("name", "expert_fingerprint", "base_fingerprint")]).encode())
    told.update(repr((row["size"], row["block"])).encode())
    for key in _ARRAYS:
        told.update(row[key])
    return told.hexdigest()


def _place(checkpoint: Checkpoint) -> str:
    """The path by which a model is known."""
    return checkpoint.path if "://" in checkpoint.path else str(Path(checkpoint.path).resolve())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
