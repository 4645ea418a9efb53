"""Faults on purpose: the program that `test_faults.py` runs.

It is a process of its own that never starts a JAX backend, so that it can fork: each child does one piece of work, and
is killed at one of its steps, or at a random moment. A step is a system call that changes the file system. After each
fault the rules are checked; `main` prints, as JSON, how many steps there were and which rules were broken.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.checkpoints import publish
from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.checkpoints.publish import Staging
from jaxmerge.checkpoints.writer import save_checkpoint
from jaxmerge.errors import CheckpointError
from jaxmerge.streaming.manifest import MANIFEST
from jaxmerge.streaming.store import ModelStore, open_store

Step = Callable[[str], None]

WRITES = ("write", "pwrite", "posix_fallocate", "ftruncate", "fsync", "open", "mkdir")
"""What a full disk can fail."""

CHANGES = (*WRITES, "rename", "unlink", "rmdir", "link", "chmod")


@contextlib.contextmanager
def watched(step: Step, names: tuple[str, ...] = CHANGES) -> Iterator[None]:
    """Calls `step` before each system call that changes the file system."""
    originals = {name: getattr(os, name) for name in names}
    rename = publish._rename

    def before(name: str, *args: Any, **options: Any) -> Any:
        if name != "open" or args[1] & os.O_CREAT:
            step(name)
        return originals[name](*args, **options)

    def before_rename(*args: Any) -> bool:
        step("rename")
        return rename(*args)

    for name in names:
        setattr(os, name, lambda *args, name=name, **options: before(name, *args, **options))
    if "rename" in names:
        publish._rename = before_rename
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
        publish._rename = rename


def in_child(work: Callable[[], object]) -> int:
    """Does the work in another process, whose id is returned. It ends with code 0, or 1 after an exception."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return child


def killed(work: Callable[[], object], at: int) -> bool:
    """Does the work in a child that kills itself before step number `at`; false if it has fewer steps."""
    left = [at]

    def step(_: str) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def watched_work() -> None:
        with watched(step):
            work()

    _, status = os.waitpid(in_child(watched_work), 0)
    if os.WIFSIGNALED(status):
        return True
    assert status == 0, "the work failed without a fault"
    return False


def files(folder: Path) -> dict[str, bytes]:
    """All files and empty folders."""
    found = sorted(folder.rglob("*"))
    return {str(x.relative_to(folder)): x.read_bytes() if x.is_file() else b"" for x in found if x.name != "commits"}


class Scenario:
    """A store with an old version of a model, what a merge adds to it, and the rules."""

    def __init__(self, folder: Path, old: dict[str, Any], new: dict[str, Any], manifests: dict[str, bytes]):
        self.folder, self.manifests = folder, manifests
        self.params = {"old": old, "new": new}
        self.broken: list[str] = []
        self.count = 0
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        folder.mkdir()
        self.write(open_store(folder / "template"), "old")
        self.write(open_store(folder / "other"), "new")
        self.old, self.new = (open_store(folder / name).head("m") for name in ("template", "other"))

    def write(self, store: ModelStore, which: str) -> None:
        with store.transaction("m") as transaction:
            self.write_folder(transaction.folder, which)

    def write_folder(self, path: Path, which: str, overwrite: bool = False) -> None:
        side = {MANIFEST: self.manifests[which], "config.json": which.encode()}
        save_checkpoint(path, self.params[which], side_files=side, overwrite=overwrite)

    def store(self) -> ModelStore:
        """A fresh store with the old version."""
        root = self.folder / "store"
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(root)
        shutil.copytree(self.folder / "template", root)
        return open_store(root)

    def rule(self, holds: bool, text: str) -> None:
        self.count += 1
        if not holds:
            self.broken.append(text)

    def check_store(self, store: ModelStore, where: str, recovery: bool = True) -> None:
        """Before recovery readers see the old or the new version; after it nothing else is there."""
        head = store.head("m")
        self.rule(head in (self.old, self.new), f"{where}: HEAD is {head}")
        faults = [x for x in store.verify("m") if x.commit == head]
        self.rule(not faults, f"{where}: the current version is damaged: {faults}")
        with open_checkpoint(store.path("m")) as opened:
            config = opened.side_files["config.json"]
            told = config if isinstance(config, bytes) else config.read_bytes()
            self.rule(told.decode() == ("old" if head == self.old else "new"), f"{where}: another content")
        if recovery:
            store.recover()
        self.check_tidy(store, where)
        self.rule(store.recover() == (), f"{where}: a second recovery found something")

    def check_tidy(self, store: ModelStore, where: str) -> None:
        head = store.head("m")
        expected = {self.old, head}
        found = {x.name for x in (store.root / "models/m/versions").iterdir()}
        records = {x.name for x in (store.root / "models/m/commits").iterdir()}
        others = {x.name for x in (store.root / "models/m").iterdir()} | set(
            os.listdir(store.root / "models/m/staging")
        )
        self.rule(found == expected, f"{where}: versions {found}")
        self.rule(records == {f"{commit}.json" for commit in expected}, f"{where}: records {records}")
        self.rule(others == {"HEAD", "versions", "commits", "staging"}, f"{where}: left over: {others}")
        self.rule(not store.verify(), f"{where}: {store.verify()}")


def kill_commits(scenario: Scenario) -> dict[str, int]:
    """Kills a commit at each step; and the recovery from each prepared state, at each of its own steps."""
    steps = recoveries = 0
    outcomes, seen = set(), set()
    for at in range(10_000):
        store = scenario.store()
        if not killed(lambda store=store: scenario.write(store, "new"), at):
            break
        steps += 1
        prepared = any(record.state == "PREPARED" for record in store._records("m"))
        state = (store.head("m"), *sorted(files(store.root)))
        if prepared and state not in seen:
            seen.add(state)
            saved = scenario.folder / "saved"
            shutil.copytree(store.root, saved)
            for again in range(10_000):
                shutil.rmtree(store.root)
                shutil.copytree(saved, store.root)
                if not killed(store.recover, again):
                    break
                recoveries += 1
                scenario.check_store(store, f"commit killed at step {at}, recovery at step {again}")
            shutil.rmtree(saved)
        else:
            scenario.check_store(store, f"commit killed at step {at}")
        outcomes.add(store.head("m"))
    scenario.rule(outcomes == {scenario.old, scenario.new}, f"kills led to {outcomes}")
    return {"steps": steps, "recoveries": recoveries}


def kill_first(scenario: Scenario) -> dict[str, int]:
    """Kills, at each step, the commit of the first version of the first model."""
    store, steps, outcomes = open_store(scenario.folder / "first" / "store"), 0, set()
    for at in range(10_000):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(store.root.parent)
        if not killed(lambda: scenario.write(store, "new"), at):
            break
        steps += 1
        where, head = f"first commit killed at step {at}", store.head("m")
        faults = store.verify("m", head) if head else ()
        scenario.rule(head in (None, scenario.new) and not faults, f"{where}: {head}, {faults}")
        store.recover()
        head = store.head("m")
        left = {x.name for x in store.root.glob("models/m/*/*")}
        expected = set() if head is None else {head, f"{head}.json"}
        scenario.rule(left == expected, f"{where}: {left}")
        scenario.rule(not store.verify(), f"{where}: {store.verify()}")
        outcomes.add(head)
    scenario.rule(outcomes == {None, scenario.new}, f"kills led to {outcomes}")
    return {"steps": steps}


def kill_at_random(scenario: Scenario, times: int = 50) -> dict[str, int]:
    """Kills a commit at random moments."""
    draws, tried, killed_ones, committed = random.Random(0), 0, 0, 0
    seconds = 0.03  # about what a commit takes; it is learnt
    while killed_ones < times and tried < 5 * times:
        store, tried = scenario.store(), tried + 1
        child = in_child(lambda store=store: scenario.write(store, "new"))
        time.sleep(draws.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            seconds *= 0.9  # it was too fast for us
            continue
        killed_ones, seconds = killed_ones + 1, seconds * 1.06
        scenario.check_store(store, f"random kill {killed_ones}")
        committed += store.head("m") == scenario.new
    return {"killed": killed_ones, "tried": tried, "committed": committed}


def kill_gc(scenario: Scenario) -> dict[str, int]:
    """Kills the removal of the old version at each step."""
    steps = 0
    for at in range(10_000):
        store = scenario.store()
        scenario.write(store, "new")
        if not killed(lambda store=store: store.gc(keep=0), at):
            break
        steps += 1
        scenario.rule(store.head("m") == scenario.new, f"gc killed at step {at}: HEAD has changed")
        scenario.rule(not store.verify("m", store.head("m")), f"gc killed at step {at}: {store.verify()}")
        store.gc(keep=0)
        left = {x.name for x in (store.root / "models/m/versions").iterdir()}
        scenario.rule(left == {scenario.new}, f"gc killed at step {at}, then done: versions {left}")
        scenario.rule(not store.verify(), f"gc killed at step {at}, then done: {store.verify()}")
    return {"steps": steps}


def fill_disk(scenario: Scenario) -> dict[str, int]:
    """Fails each write of a commit, once or from then on, as a full disk does."""
    failed = {"once": 0, "from then on": 0}
    for how in failed:
        for at in range(10_000):
            store, left = scenario.store(), [at]
            before = files(store.root)

            def step(name: str, left: list[int] = left, how: str = how) -> None:
                left[0] -= 1
                if left[0] == -1 or (left[0] < 0 and how != "once" and name != "rename"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            where = f"disk full at write {at}, {how}"
            try:
                with watched(step, (*WRITES, "rename")):
                    scenario.write(store, "new")
            except CheckpointError as error:
                scenario.rule("the disk is full" in str(error), f"{where}: {error}")
                scenario.rule(files(store.root) == before, f"{where}: an error has left {files(store.root).keys()}")
                scenario.check_store(store, where, recovery=False)
            else:
                scenario.rule(store.head("m") == scenario.new, f"{where}: no error, and nothing was committed")
                scenario.check_store(store, where)
            if left[0] >= 0:
                break
            failed[how] += 1
    return failed


def race(scenario: Scenario) -> dict[str, int]:
    """Two processes commit to one name at once: one wins, and the other fails, with nothing left of it."""
    conflicts = 0
    for round in range(3):
        store, children = scenario.store(), []
        for which in ("new", "old again"):
            ready, go = os.pipe(), os.pipe()

            def write(which: str = which, ready: Any = ready, go: Any = go, store: ModelStore = store) -> None:
                with store.transaction("m") as transaction:
                    scenario.write_folder(transaction.folder, "new" if which == "new" else "old")
                    (transaction.folder / "which").write_text(which)  # neither is the old version
                    os.write(ready[1], b"1")
                    os.read(go[0], 1)

            child = in_child(write)
            children.append((child, ready[0], go[1]))
        for _, ready, _ in children:
            os.read(ready, 1)
        for _, _, go in children:
            os.write(go, b"1")
        codes = sorted(os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child, _, _ in children)
        scenario.rule(codes == [0, 1], f"race {round}: the writers ended with {codes}")
        scenario.rule(store.head("m") != scenario.old, f"race {round}: nobody has won")
        scenario.check_tidy(store, f"race {round}")
        conflicts += codes[1] == 1
    return {"conflicts": conflicts}


def kill_overwrites(scenario: Scenario, exchanges: bool) -> dict[str, int]:
    """Kills, at each step, a writer that replaces a folder."""
    out, steps = scenario.folder / "out" / "model", 0
    call = publish._system_call
    if not exchanges:
        publish._system_call = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    missing = 0
    outcomes = set()
    for at in range(10_000):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(out.parent)
        scenario.write_folder(out, "old")
        if not killed(lambda: scenario.write_folder(out, "new", overwrite=True), at):
            break
        steps += 1
        where = f"overwrite killed at step {at}"
        missing += not out.exists()
        if exchanges:
            scenario.rule(out.exists(), f"{where}: there is nothing any more")
        Staging(out, is_folder=True, overwrite=True).abort()  # the next writer, who thinks better of it
        scenario.rule(os.listdir(out.parent) == ["model"], f"{where}: left over: {os.listdir(out.parent)}")
        which = (out / "config.json").read_text()
        outcomes.add(which)
        with open_checkpoint(out) as opened:
            for name, values in scenario.params[which].items():
                scenario.rule(np.array_equal(np.asarray(opened.params[name]), values), f"{where}: {name} is mixed")
    publish._system_call = call
    scenario.rule(outcomes == {"old", "new"}, f"kills led to {outcomes}")
    return {"steps": steps, "missing": missing}


def watch_overwrites(scenario: Scenario) -> dict[str, int]:
    """Looks at a folder all the time while it is replaced by exchange."""
    out = scenario.folder / "watched" / "model"
    scenario.write_folder(out, "old")

    def write() -> None:
        for number in range(30):
            scenario.write_folder(out, "new" if number % 2 else "old", overwrite=True)

    child, looks = in_child(write), 0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        looks += 1
        scenario.rule((out / "model.safetensors").exists(), "the model was missing for a moment")
    scenario.rule(status == 0, "the writer failed")
    return {"looks": looks}


def order(scenario: Scenario) -> dict[str, int]:
    """Checks that all that gets its name has been made durable before, and the name after."""
    store = scenario.store()
    durable: set[int] = set()
    originals = os.fsync, os.write, os.pwrite, os.rename, publish._rename
    waiting: set[int] = set()  # folders in which a name has changed
    renames = 0

    def fsync(fd: int) -> None:
        originals[0](fd)
        durable.add(os.fstat(fd).st_ino)
        waiting.discard(os.fstat(fd).st_ino)

    def forget(write: Any) -> Any:
        def call(fd: int, *args: Any) -> int:
            durable.discard(os.fstat(fd).st_ino)
            return write(fd, *args)

        return call

    def look(source: Any, target: Any) -> None:
        nonlocal renames
        source, target = Path(source), Path(target)
        renames += 1
        for path in (source, *source.rglob("*")):
            scenario.rule(path.stat().st_ino in durable, f"{path} is renamed before it is durable")
        waiting.add(target.parent.stat().st_ino)

    def rename(source: Any, target: Any, **_: Any) -> None:
        look(source, target)
        originals[3](source, target)

    def flagged(flag: int, source: Path, target: Path) -> bool:
        look(source, target)
        return originals[4](flag, source, target)

    os.fsync, os.write, os.pwrite = fsync, forget(os.write), forget(os.pwrite)
    os.rename, publish._rename = rename, flagged  # pyright: ignore[reportAttributeAccessIssue]
    try:
        scenario.write(store, "new")
    finally:
        os.fsync, os.write, os.pwrite, os.rename, publish._rename = originals
    places = {(store.root / "models/m" / part).stat().st_ino for part in ("", "versions", "commits")}
    scenario.rule(not waiting & places, "a folder was not synced after a name in it had changed")
    return {"renames": renames}


def main(folder: Path) -> None:
    """Does everything in a folder that holds `old` and `new`: two merged models with manifests."""
    params, manifests = {}, {}
    for which in ("old", "new"):
        with open_checkpoint(folder / which) as opened:
            params[which] = {name: np.asarray(x) for name, x in opened.params.items()}
        manifests[which] = (folder / which / MANIFEST).read_bytes()
    told = {}
    for name, run in {
        "kill_commits": kill_commits,
        "kill_first": kill_first,
        "kill_at_random": kill_at_random,
        "kill_gc": kill_gc,
        "fill_disk": fill_disk,
        "race": race,
        "kill_overwrites": lambda scenario: kill_overwrites(scenario, True),
        "kill_overwrites_by_renames": lambda scenario: kill_overwrites(scenario, False),
        "watch_overwrites": watch_overwrites,
        "order": order,
    }.items():
        scenario = Scenario(folder / "work", params["old"], params["new"], manifests)
        started = time.perf_counter()
        figures = run(scenario)
        seconds = round(time.perf_counter() - started, 2)
        told[name] = {"figures": figures, "broken": scenario.broken, "checks": scenario.count, "seconds": seconds}
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
