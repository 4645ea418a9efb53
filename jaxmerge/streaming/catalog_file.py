"""The file of a catalog: its tables, how it is opened, and what is done about a damaged one.

A catalog only holds what can be read again from the models. So nothing in it is trusted that does not bear checking: a
file that SQLite finds damaged, or whose tables are not those of its version, is renamed and begun anew; a row of
statistics whose checksum is wrong counts as absent.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sqlite3
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxmerge.errors import CheckpointError
from jaxmerge.streaming.statistics import SKETCH, BlockStatistics

_APPLICATION = 0x6A6D6361  # "jmca": how the file says that it is one of ours
_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100
_BUSY_SECONDS = 60.0

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
    """
    CREATE TABLE quantiles (
        expert INTEGER NOT NULL REFERENCES models ON DELETE CASCADE,
        base INTEGER NOT NULL REFERENCES models ON DELETE CASCADE,
        name TEXT NOT NULL, magnitudes BLOB NOT NULL, checksum TEXT NOT NULL, PRIMARY KEY (expert, base, name)
    );
    DELETE FROM statistics
    """,
    """
    ALTER TABLE tensors ADD COLUMN blocks BLOB;
    UPDATE tensors SET content = NULL;
    UPDATE models SET content = NULL
    """,
)
_ARRAYS = {"norms": np.float64, "largest": np.float64, "zeros": np.int64, "touched": np.int64, "sketches": np.float32}


def open_file(path: Path | None) -> sqlite3.Connection:
    """Opens the file of a catalog, or begins one; a damaged one is renamed with a warning, and begun anew.

    Args:
        path: the file; None: in memory.

    Raises:
        CheckpointError: the file is something else, was written by a newer version, or cannot be written.
    """
    if path is None:
        return _connected(":memory:")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _check_header(path)
            return _connected(str(path))
        except sqlite3.Error as error:
            if not _is_damage(error):
                raise
            aside = _move_aside(path)
            warnings.warn(f"the catalog {path} was damaged ({error}); it is now {aside}, and begun anew", stacklevel=3)
            return _connected(str(path))
    except (OSError, sqlite3.Error) as error:
        raise CheckpointError(f"the catalog {path} cannot be opened: {error}; check its folder's mode") from error


def row_of(x: BlockStatistics, **about: Any) -> dict[str, Any]:
    """The row of the table `statistics` that holds these, with its checksum; `about` are its other columns."""
    arrays = {key: np.ascontiguousarray(getattr(x, key), dtype).tobytes() for key, dtype in _ARRAYS.items()}
    row = {**about, "size": x.size, "block": x.block, **arrays}
    return {**row, "checksum": checksum(row)}


def statistics_of(row: Any) -> BlockStatistics:
    """The statistics that a row holds."""
    arrays = {key: np.frombuffer(row[key], dtype) for key, dtype in _ARRAYS.items()}
    arrays["sketches"] = arrays["sketches"].reshape(-1, SKETCH)
    return BlockStatistics(row["size"], row["block"], **arrays)


def quantile_row_of(x: BlockStatistics, statistics: Any) -> dict[str, Any]:
    """The row of the table `quantiles` that goes with a row of statistics. (Planning reads many, and none of these.)"""
    row = {key: statistics[key] for key in ("expert", "base", "name")}
    magnitudes = zlib.compress(np.ascontiguousarray(x.magnitudes, np.int64).tobytes(), 1)
    return {**row, "magnitudes": magnitudes, "checksum": quantile_checksum(magnitudes, statistics["checksum"])}


def magnitudes_of(row: Any, statistics: Any) -> Int[np.ndarray, "2048"] | None:
    """The counts that a row of quantiles holds; None if it is damaged, or goes with other statistics."""
    if row["checksum"] != quantile_checksum(row["magnitudes"], statistics["checksum"]):
        return None
    return np.frombuffer(zlib.decompress(row["magnitudes"]), np.int64)


def quantile_checksum(magnitudes: bytes, statistics: str) -> str:
    """A hash of a row of quantiles and of the statistics that it goes with."""
    return hashlib.sha256(statistics.encode() + magnitudes).hexdigest()


def checksum(row: Any) -> str:
    """A hash of what a row of statistics says, and of what."""
    told = hashlib.sha256(repr([row[key] for key in ("name", "expert_fingerprint", "base_fingerprint")]).encode())
    told.update(repr((row["size"], row["block"])).encode())
    for key in _ARRAYS:
        told.update(row[key])
    return told.hexdigest()


def _check_header(path: Path) -> None:
    """Checks that a file, if there is one, is a database that can be written, as far as its first bytes tell."""
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, "rb") as file:
        header = file.read(_HEADER_BYTES)
    is_database, is_ours = header.startswith(_MAGIC), header[68:72] == _APPLICATION.to_bytes(4, "big")
    if not is_database and not is_ours:
        raise CheckpointError(f"{path} is no catalog; choose another path, or remove the file")
    if not is_database or not {1, 2}.issuperset(header[18:20]):  # others are not written, or not even read
        raise sqlite3.DatabaseError("its header is broken")


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether an error tells of the file's content; not if it is busy, read-only, or the disk is full."""
    if not isinstance(error, sqlite3.OperationalError):
        return isinstance(error, sqlite3.DatabaseError)
    return error.sqlite_errorcode in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_IOERR_SHORT_READ)


def _connected(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("BEGIN")  # one moment for all three, also while another program makes the tables
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute("COMMIT")
        if tables and application != _APPLICATION:
            raise CheckpointError(f"{path} is a database of another program; choose another path for the catalog")
        if version > len(_MIGRATIONS):
            raise CheckpointError(
                f"{path} is a catalog of version {version}, and this jaxmerge knows versions up to {len(_MIGRATIONS)}; "
                "upgrade jaxmerge, or choose another path"
            )
        if tables and version < 1:
            raise sqlite3.DatabaseError(f"it has tables, and is of version {version}")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        _keep_a_log(connection)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        if version < len(_MIGRATIONS):
            _migrate(connection)
        if _tables(connection) != _expected_tables():
            raise sqlite3.DatabaseError(f"its tables are not those of version {len(_MIGRATIONS)}")
        return connection
    except BaseException:
        connection.close()
        raise


def _keep_a_log(connection: sqlite3.Connection) -> None:
    """Turns write-ahead logging on. SQLite does not wait for others in this one step, so the waiting is done here."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _tables(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    """The tables by name, with the statement that makes each."""
    return {tuple(row) for row in connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'")}


@functools.cache
def _expected_tables() -> set[tuple[str, str]]:
    connection = sqlite3.connect(":memory:")
    try:
        _migrate(connection)
        return _tables(connection)
    finally:
        connection.close()


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
