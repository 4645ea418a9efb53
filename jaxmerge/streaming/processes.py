"""Several JAX processes that do one piece of work together.

They talk through the key-value store that `jax.distributed.initialize` starts in process 0: small messages, no
collectives on devices. So every wait can end, with an error that all processes raise alike: a process that fails tells
the others why, and one that is killed is missed, because each gives a sign of life every second.

Whether the work is published is decided in one place, a key that can be written once: by the first process that fails,
or by process 0 when all have finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Shaped

import jaxmerge.errors
from jaxmerge.checkpoints.base import Checkpoint
from jaxmerge.checkpoints.publish import as_checkpoint_error
from jaxmerge.checkpoints.writer import CheckpointWriter
from jaxmerge.errors import CheckpointError, MergeError, RecipeError
from jaxmerge.streaming.fingerprint import digest
from jaxmerge.streaming.keys import Keys
from jaxmerge.streaming.manifest import BlockHashes
from jaxmerge.streaming.progress import Progress
from jaxmerge.trees.paths import named_leaves

JOIN_SECONDS = 300.0
"""So long all processes wait for the last one to begin."""

SILENCE_SECONDS = 60.0
"""A process that gives no sign of life for so long is lost. JAX itself ends the others after 100 seconds."""

FOLDER_SECONDS = 60.0
"""So long a file that process 0 has written may take to be seen elsewhere: network file systems keep what they know."""

LONGEST_SECONDS = 6 * 3600.0
"""So long a process waits for others that live."""

TOKEN = ".jaxmerge-token"
"""A file in the hidden folder, by which the other processes know that it is the same folder."""

_BEAT_SECONDS = 1.0
_COMMIT = b"commit"
_PROBED, _PROBE = 8, 32  # tensors of a model that are looked into, and entries of each

_CURRENT = "jaxmerge/current"
_last = [0]  # the number of the last piece of work that this process took part in


class Processes:
    """The processes that work together. This class is the case of one, in which nothing needs to be done.

    All processes call the same methods in the same order.

    Attributes:
        index: number of this process, from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    def check(self) -> None:
        """Raises the error of a process that has failed."""

    def gather(self, name: str, data: bytes) -> list[bytes]:
        """What each process gives, in order, in process 0; the others do not wait, and get an empty list."""
        return [data]

    def from_first(self, name: str, make: Callable[[], bytes]) -> bytes:
        """What `make` gives in process 0, where alone it is called."""
        return make()

    def exchange(self, name: str, data: bytes) -> list[bytes]:
        """What each process gives, in order, in every process."""
        everyone = self.gather(name, data)
        together = self.from_first(name, lambda: _packed(everyone))
        return _unpacked(together)

    def agree(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """Checks that all processes are about to do the same.

        Args:
            facts: gives what must be equal, by what it is called; not asked of one process.

        Raises:
            RecipeError: it is not; the message tells which process differs, and in what.
        """

    def commit(self) -> None:
        """Decides, in process 0, that the work is published; from now on nobody else's failure counts."""

    def fail(self, error: BaseException) -> BaseException:
        """Tells the other processes of an error, unless one of them was first; the error that is to be raised."""
        return error

    def watching(self, display: Progress) -> Progress:
        """The display, which also ends the work when another process has failed."""
        return display


ALONE = Processes()


class _Together(Processes):
    """Several processes. A thread gives signs of life, and looks for those of the others."""

    def __init__(self, client: Any, index: int, count: int):
        self.index, self.count, self._client = index, count, client
        self._joined = self._abandoned = False
        self._call = self._begin()
        self._prefix = f"jaxmerge/{self._call}/"
        self._steps, self._read = itertools.count(), []
        self._beats, self._seen = itertools.count(), {}
        self._outcome: bytes | None = None
        self._told: dict[str, Any] | None = None
        self._common: list[BaseException] = []  # errors that all processes raise
        self._over = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._watch, name="jaxmerge-processes", daemon=True)
        self._thread.start()

    def _begin(self) -> int:
        """The number of this piece of work, which process 0 gives; so no process that made a call alone is ahead."""
        if self.index == 0:
            _last[0] += 1
            self._client.key_value_set_bytes(_CURRENT, str(_last[0]).encode(), True)
            return _last[0]
        self._prefix, end = "", time.monotonic() + JOIN_SECONDS
        self._seen = dict.fromkeys(range(1, self.count), (b"", 0.0))  # process 0 it is that is missing
        while (current := int(self._try_get(_CURRENT) or b"0")) <= _last[0]:
            if time.monotonic() > end:
                raise self._late(JOIN_SECONDS)
            time.sleep(0.05)
        _last[0] = current
        return current

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        if self.index == 0 and self._abandoned:  # who comes now waits for the next call
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_delete(_CURRENT)

    def meet(self) -> None:
        """Waits, in process 0, until all have begun. Who came after its error would take part in its next call."""
        end = time.monotonic() + JOIN_SECONDS
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while self.index == 0 and len(self._seen) < self.count and not self._abandoned and time.monotonic() < end:
                time.sleep(0.05)
                self._look()

    def check(self) -> None:
        if self._told is not None:
            raise self._as_error(self._told)

    def gather(self, name: str, data: bytes) -> list[bytes]:
        step = f"{next(self._steps)}/{name}/"
        self._set(f"{step}{self.index}", data)
        everyone = []
        if self.index == 0:
            everyone = [self._get(f"{step}{i}") for i in range(self.count)]
            if not self._joined:
                self._client.key_value_delete(f"jaxmerge/{self._call - 1}/")
            for former in self._read:  # all have come further than that
                self._client.key_value_delete(self._prefix + former)
            self._read = []
        self._read.append(step)
        return everyone

    def from_first(self, name: str, make: Callable[[], bytes]) -> bytes:
        step = f"{next(self._steps)}/{name}/"
        self._read.append(step)
        if self.index == 0:
            data = make()
            self._set(f"{step}all", data)
        else:
            data = self._get(f"{step}all")
        self._joined = True
        return data

    def agree(self, facts: Callable[[], Mapping[str, str]]) -> None:
        everyone = [json.loads(told) for told in self.exchange("agree", json.dumps(dict(facts())).encode())]
        first = everyone[0]
        for process, told in enumerate(everyone):
            for name in dict.fromkeys([*first, *told]):
                if told.get(name) == first.get(name):
                    continue
                shown = [str(x.get(name)) for x in (told, first)]
                found = f" (found {shown[0]}, expected {shown[1]})" if max(map(len, shown)) <= 160 else ""
                error = RecipeError(
                    f"process {process} of {self.count} differs from process 0 in {name}{found}; all processes must "
                    "make the same call, with the same versions and the same models, or each by itself "
                    "(processes='own')"
                )
                self._common.append(error)
                raise error

    def commit(self) -> None:
        if self.index == 0 and not self._set_once("outcome", _COMMIT):
            self._look()
            self.check()

    def fail(self, error: BaseException) -> BaseException:
        if any(error is known for known in self._common):
            return error
        kind = type(error).__name__
        message = str(error) if isinstance(error, MergeError) else f"{kind}: {error}"
        told = {"process": self.index, "host": socket.gethostname(), "kind": kind, "message": message}
        try:
            own = self._decide(told)
        except jax.errors.JaxRuntimeError:  # the service is gone, and with it the others
            return error
        if own and not isinstance(error, MergeError):
            self._common.append(error)
            return error
        return error if self._told is None else self._as_error(self._told)

    def watching(self, display: Progress) -> Progress:
        return _Watching(self, display)

    def _decide(self, told: dict[str, Any]) -> bool:
        """Decides for a failure, unless something else is decided. Returns whether this was it."""
        data = json.dumps(told).encode()
        own = self._set_once("outcome", data)
        if not own and self.index == 0 and self._try_get("outcome") == _COMMIT:
            own = self._set_once("afterwards", data)
        self._look()
        return own

    def _watch(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # JAX ends a process that has lost the service
                self._look()

    def _look(self) -> None:
        """Gives a sign of life, and looks for the others' and for what is decided."""
        self._client.key_value_set_bytes(f"{self._prefix}beat/{self.index}", str(next(self._beats)).encode(), True)
        beats, now = self._client.key_value_dir_get_bytes(f"{self._prefix}beat/"), time.monotonic()
        for key, beat in beats:
            process = int(key.rpartition("/")[2])
            if self._seen.get(process, (b"", 0.0))[0] != beat:
                self._seen[process] = (beat, now)
        decided = self._try_get("outcome")
        if decided == _COMMIT:
            decided = self._try_get("afterwards")
            self._outcome = _COMMIT
        if decided is not None:
            self._told = json.loads(decided)
            return
        awaited = [0] if self._outcome == _COMMIT else range(self.count)
        for process, (_, since) in sorted(self._seen.items()):
            if process in awaited and process != self.index and now - since > SILENCE_SECONDS:
                told = {
                    "process": process,
                    "host": None,
                    "kind": "CheckpointError",
                    "message": f"it has given no sign of life for {SILENCE_SECONDS:.0f} seconds, so it was probably "
                    "killed; look at what it has printed, and start all processes again",
                }
                if self._set_once("outcome", json.dumps(told).encode()) or self._outcome == _COMMIT:
                    self._told = told

    def _as_error(self, told: dict[str, Any]) -> MergeError:
        host = f" ({told['host']})" if told["host"] else ""
        kind = getattr(jaxmerge.errors, told["kind"], MergeError)
        error = kind(f"process {told['process']} of {self.count}{host}: {told['message']}")
        self._common.append(error)
        return error

    def _set(self, key: str, data: bytes) -> None:
        try:
            self._client.key_value_set_bytes(self._prefix + key, data)
        except jax.errors.JaxRuntimeError as error:
            raise self._lost(error) from error

    def _set_once(self, key: str, data: bytes) -> bool:
        try:
            self._client.key_value_set_bytes(self._prefix + key, data, False)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
            return False
        return True

    def _try_get(self, key: str) -> bytes | None:
        try:
            return self._client.key_value_try_get_bytes(self._prefix + key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

    def _get(self, key: str) -> bytes:
        """A value, when it is there."""
        limit = LONGEST_SECONDS if self._joined else JOIN_SECONDS
        end = time.monotonic() + limit
        while True:
            try:
                return self._client.blocking_key_value_get_bytes(self._prefix + key, 1000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise self._lost(error) from error
            self.check()
            if time.monotonic() > end:
                raise self._late(limit)

    def _late(self, limit: float) -> CheckpointError:
        self._abandoned = not self._joined
        missing = [str(i) for i in range(self.count) if i not in self._seen]
        whom = f"process {' and '.join(missing)} of {self.count}" if missing else "the other processes"
        return CheckpointError(
            f"waited {limit:.0f} seconds for {whom}; all processes must make this call, or the one that makes it alone "
            "must say so (processes='own')"
        )

    def _lost(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"process 0 of {self.count}, in which JAX's coordination service runs, does not answer ({error!s:.200}); "
            "look at what it has printed, and start all processes again"
        )


class _Watching(Progress):
    """A display that raises the error of another process, so that the work ends where it is."""

    def __init__(self, together: Processes, display: Progress):
        self._together, self._display = together, display

    def say(self, text: str) -> None:
        self._display.say(text)

    def begin(self, what: str, total: int) -> None:
        self._display.begin(what, total)

    def advance(self, n: int) -> None:
        self._together.check()
        self._display.advance(n)


@contextlib.contextmanager
def working(processes: Literal["all", "own"]) -> Iterator[Processes]:
    """The processes that share the work of the block. An error in one of them is raised in all.

    Args:
        processes: all that `jax.distributed.initialize` has brought together, or this one alone.

    Raises:
        RecipeError: it is neither.
    """
    if processes not in ("all", "own"):
        raise RecipeError(f"processes={processes!r} is not known; choose 'all' or 'own'")
    found = _coordination() if processes == "all" else None
    if found is None:
        yield ALONE
        return
    together = _Together(*found)
    try:
        yield together
    except BaseException as error:
        told = together.fail(error)
        if isinstance(error, Exception):
            together.meet()
        if told is error:
            raise
        raise told from error
    finally:
        together.close()


def _coordination() -> tuple[Any, int, int] | None:
    """The client of the coordination service, this process's number and how many there are; None if it is alone."""
    if not jax.distributed.is_initialized():
        return None
    # JAX has no public way to its key-value store; checkpointing libraries take this one too. jax.process_index() would
    # start a backend.
    from jax._src.distributed import global_state

    if global_state.client is None or global_state.num_processes == 1:
        return None
    return global_state.client, global_state.process_id, global_state.num_processes


@contextlib.contextmanager
def written_together(together: Processes, begin: Callable[[bool], CheckpointWriter]) -> Iterator[CheckpointWriter]:
    """A writer for the block, to whose files all processes write; process 0 publishes them at its end.

    Before that the block must have `count`ed in process 0 what the others have made durable.

    Args:
        together: the processes.
        begin: opens the writer, given whether it joins that of process 0.

    Raises:
        CheckpointError: a process does not see the folder in which process 0 builds the output.
    """
    if together.count == 1:
        with begin(False) as writer:
            yield writer
        return
    writer = None
    try:
        if together.index == 0:
            writer = begin(False)
            token = {"token": os.urandom(16).hex(), "folder": str(writer.folder), "places": _places(writer)}
            with as_checkpoint_error(f"write {writer.path}"):
                (writer.folder / TOKEN).write_text(token["token"])
            together.from_first("folder", lambda: json.dumps(token).encode())
        else:
            told = json.loads(together.from_first("folder", bytes))
            _find(Path(told["folder"]), told["token"], together)
            writer = begin(True)
            if _places(writer) != told["places"]:
                raise CheckpointError(f"{writer.path}: the files would be laid out in another way than in process 0")
        together.exchange("everybody sees it", b"")
        if together.index == 0:
            with as_checkpoint_error(f"write {writer.path}"):
                (writer.folder / TOKEN).unlink()
        yield writer
        if together.index == 0:
            together.commit()
            writer.finish()
        else:
            writer.abort()  # lets go of the folder
        together.from_first("published", bytes)
    except BaseException as error:
        told_error = together.fail(error)  # before the folder goes away, lest others fail first for that
        if writer is not None:
            writer.abort()
        if told_error is error:
            raise
        raise told_error from error


def _places(writer: CheckpointWriter) -> str:
    return digest([{name: list(place) for name, place in writer.places.items()}, writer.file_sizes])


def _find(folder: Path, token: str, together: Processes) -> None:
    """Waits until a folder that process 0 has made is seen here."""
    end = time.monotonic() + FOLDER_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if (folder / TOKEN).read_text() == token:
                return
        together.check()
        if time.monotonic() > end:
            raise CheckpointError(
                f"{folder.parent} is not the folder in which process 0 writes: what it has written in {folder.name} is "
                "not seen here; choose an output on a file system that all hosts share"
            )
        time.sleep(0.05)


def facts_of(sources: Mapping[str, Checkpoint]) -> dict[str, str]:
    """What tells the models of one process from those of another, by the name of the model.

    Copies on the hosts' own disks are the same model: times of files do not count, but tensors' names, shapes and
    dtypes do, and some of their entries (for Orbax, whose chunks may be large, the sizes of the files).
    """
    facts = {}
    for name, source in sources.items():
        leaves = named_leaves(source.params)
        found: list[Any] = [[key, leaf.dtype.name, list(leaf.shape)] for key, leaf in leaves.items()]
        if source.format == "orbax":
            found += [sorted(state[:2] for state in source._store.state() or [])]
        else:
            probed = [leaf for leaf in leaves.values() if leaf.size][:: max(len(leaves) // _PROBED, 1)]
            for leaf in probed[:_PROBED]:
                n = min(leaf.size, _PROBE)
                values = np.empty(n, leaf.dtype)
                leaf.read_flat((leaf.size - n) // 2, values)
                found.append(hashlib.sha256(values.tobytes()).hexdigest())
        facts[f"the model {name!r}"] = digest(found)
    return facts


def fewest_cores(together: Processes) -> int:
    """How many cores the host with the fewest has: a plan depends on them, and all processes need the same."""
    return min(json.loads(told) for told in together.exchange("cores", json.dumps(os.cpu_count() or 1).encode()))


def keys_of_first(together: Processes, make: Callable[[], Keys]) -> Keys:
    """The keys of tensors as process 0 has them, which alone asks a catalog."""
    if together.count == 1:
        return make()
    told = json.loads(together.from_first("keys", lambda: json.dumps([dict(x) for x in make()]).encode()))
    return Keys(*({name: tuple(keys) for name, keys in of_one_kind.items()} for of_one_kind in told))


def everywhere(together: Processes, here: Mapping[str, Collection[int]]) -> dict[str, set[int]]:
    """The blocks that the processes have, by tensor; each tensor is given by one of them."""
    data = json.dumps({name: sorted(blocks) for name, blocks in here.items()}).encode()
    everyone = [json.loads(told) for told in together.exchange("blocks", data)]
    return {name: set(blocks) for told in everyone for name, blocks in told.items()}


@dataclasses.dataclass(frozen=True)
class Done:
    """What one process has done, or all together.

    Attributes:
        bytes_read: from each checkpoint by name.
        worker_seconds: by activity.
        workers: their number.
        memory_peak: largest resident memory of a process.
    """

    bytes_read: dict[str, int]
    worker_seconds: dict[str, float]
    workers: int
    memory_peak: int


def gathered(together: Processes, writer: CheckpointWriter, hashes: BlockHashes | None, done: Done) -> Done:
    """Brings to process 0 what all have written; it is durable then.

    Args:
        together: the processes.
        writer: where they have written.
        hashes: of what was written; in process 0 they are complete afterwards.
        done: what this process has done.

    Returns:
        In process 0, what all have done together.
    """
    if together.count == 1:
        return done
    if together.index:
        writer.sync(writer.entries_written)
    told = {"entries": writer.entries_written, "hashes": hashes.found() if hashes else {}, "done": vars(done)}
    everyone = [json.loads(data) for data in together.gather("done", json.dumps(told).encode())]
    for other in everyone[1:]:
        writer.count(other["entries"])
        if hashes is not None:
            hashes.take_found(other["hashes"])
    if not everyone:
        return done
    if hashes is not None:
        hashes.read_missing(writer.read_back)
    all_done = [Done(**other["done"]) for other in everyone]
    return Done(
        {name: sum(x.bytes_read[name] for x in all_done) for name in done.bytes_read},
        {name: sum(x.worker_seconds[name] for x in all_done) for name in done.worker_seconds},
        sum(x.workers for x in all_done),
        max(x.memory_peak for x in all_done),
    )


def done_by_all(together: Processes, done: Done) -> Done:
    """What process 0 knows that all have done, in every process."""
    return Done(**json.loads(together.from_first("report", lambda: json.dumps(vars(done)).encode())))


def as_bytes(arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> bytes:
    """Arrays by name, to be sent."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def from_bytes(data: bytes) -> dict[str, Shaped[np.ndarray, "..."]]:
    """What `as_bytes` was given."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _packed(parts: Sequence[bytes]) -> bytes:
    return json.dumps([len(part) for part in parts]).encode() + b"\n" + b"".join(parts)


def _unpacked(data: bytes) -> list[bytes]:
    head, _, rest = data.partition(b"\n")
    ends = list(itertools.accumulate(json.loads(head)))
    return [rest[start:end] for start, end in zip([0, *ends], ends, strict=False)]
