"""The model store on an object store: conditional writes, and what killed writers, lost answers and races leave."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorstore as ts

import jaxmerge as jm
from jaxmerge.cli import storing
from jaxmerge.cli.main import main
from jaxmerge.streaming import store_objects
from jaxmerge.streaming.store import ModelStore, open_store
from jaxmerge.streaming.store_objects import ObjectPlace
from tests.checkpoints.test_remote_output import S3

URL = "memory://bucket/store"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which versions are built; most tests leave nothing in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def memory() -> Any:
    return ts.KvStore.open("memory://bucket/store/", context=ts.Context()).result()


def store_on(kv: Any) -> ModelStore:
    return ModelStore(ObjectPlace(URL, kvstore=kv))


def objects(kv: Any) -> dict[str, bytes]:
    return {key.decode(): kv.read(key).result().value for key in kv.list().result()}


def copy_of(kv: Any) -> Any:
    copy = memory()
    for key, content in objects(kv).items():
        copy.write(key, content).result()
    return copy


def commit(store: ModelStore, value: int, **options: Any) -> str:
    """Commits a version of the model m. A folder of plain files is enough: nothing looks into them."""
    with store.transaction("m", **options) as transaction:
        transaction.folder.mkdir()
        for name, content in contents(value).items():
            (transaction.folder / name).write_bytes(content)
    assert transaction.version is not None
    return transaction.version.commit


def contents(value: int) -> dict[str, bytes]:
    return {"model.safetensors": b"%d" % value * 9, "config.json": b'{"is": "it"}'}


def value_at(kv: Any, store: ModelStore) -> int | None:
    """The value that was committed last; all of its version must be there."""
    if store.head("m") is None:
        return None
    prefix = f"{str(store.path('m')).removeprefix(URL + '/')}/"
    found = {key.removeprefix(prefix): content for key, content in objects(kv).items() if key.startswith(prefix)}
    value = int(found["model.safetensors"][:1])
    assert found == contents(value)
    return value


def check_tidy(kv: Any) -> None:
    """After recovery there is HEAD, and for each version a record that says COMMITTED and all of its objects."""
    store = store_on(kv)
    store.recover(patience=0)
    assert store.recover(patience=0) == () == store.verify()
    records = store._records("m")
    assert {record.state for record in records} <= {"COMMITTED"}
    expected = {f"models/m/commits/{record.key}.json" for record in records} | ({"models/m/HEAD"} if records else set())
    expected |= {f"models/m/versions/{record.key}/{name}" for record in records for name in record.files}
    assert objects(kv).keys() == expected
    head = [record for record in records if record.key == store._place.current("m")]
    assert len(head) == bool(records)
    numbers, commits = [x.number for x in records], [x.commit for x in records]
    assert len({*numbers}) == len(numbers) and len({*commits}) == len(commits)


@dataclasses.dataclass
class Answer:
    """What a request gives: a result or an error."""

    found: Any

    def result(self, timeout: float | None = None) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


class Tagged:
    """A key-value store where an object that is rewritten with its former content passes for untouched, as on S3.

    Without `conditions` it ignores them, as some servers do. After each write the current version must be whole; where
    it is not, `broken` tells so.
    """

    def __init__(self, content: dict[str, bytes] | None = None, conditions: bool = True):
        self._content, self._conditions, self._lock = dict(content or {}), conditions, threading.Lock()
        self.broken: list[str] = []

    def _look(self, written: str) -> None:
        key = self._content.get("models/m/HEAD", b"").decode().partition(" ")[0]
        record = json.loads(self._content.get(f"models/m/commits/{key}.json", b'{"record": {}}'))["record"]
        missing = [name for name in record.get("files", "") if f"models/m/versions/{key}/{name}" not in self._content]
        if key and (record.get("state") not in ("PREPARED", "AGAIN", "COMMITTED") or missing):
            self.broken.append(f"{written}: HEAD is {key}, which is {record.get('state')} and misses {missing}")

    def _tag(self, key: str) -> bytes:
        return hashlib.md5(self._content[key]).digest() if key in self._content else b"none"

    def read(self, key: str | bytes, byte_range: slice = slice(None)) -> "Answer":  # noqa: B008
        key = key if isinstance(key, str) else key.decode()
        content = self._content.get(key, b"")[byte_range]
        if not content and byte_range.stop:
            return Answer(ValueError("OUT_OF_RANGE"))
        state = "value" if key in self._content else "missing"
        return Answer(SimpleNamespace(state=state, value=content, stamp=SimpleNamespace(generation=self._tag(key))))

    def write(self, key: str, value: bytes | None, if_equal: bytes | None = None) -> "Answer":
        with self._lock:
            if self._conditions and if_equal not in (None, self._tag(key)):
                return Answer(SimpleNamespace(generation=b""))
            if value is None:
                self._content.pop(key, None)
            else:
                self._content[key] = value
            self._look(key)
            return Answer(SimpleNamespace(generation=self._tag(key)))

    def list(self, within: Any = None) -> "Answer":
        low, high = ("", "~") if within is None else (within.inclusive_min.decode(), within.exclusive_max.decode())
        return Answer([key.encode() for key in sorted(self._content) if low <= key < high])


class Faulty:
    """A key-value store in which something happens at write number `at`.

    `how`: "once", that write fails; "killed", it and all later ones fail; "lost", it is done, and its answer is lost;
    or a function, which is called before it.
    """

    def __init__(self, kv: Any, at: int, how: str | Callable[[], object]):
        self._kv, self._at, self._how, self._lock = kv, at, how, threading.RLock()
        self.writes = 0

    def write(self, key: str, value: bytes | None, **condition: Any) -> Any:
        with self._lock:
            number, self.writes = self.writes, self.writes + 1
            if callable(self._how):
                if number == self._at:
                    self._how()
            elif number == self._at or (number > self._at and self._how == "killed"):
                if self._how == "lost":
                    self._kv.write(key, value, **condition).result()
                return Answer(ValueError("UNAVAILABLE: no"))
            return self._kv.write(key, value, **condition)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kv, name)


@pytest.fixture(scope="module")
def started() -> Any:
    """Versions 1 and 3 of a model; version 3 is current."""
    kv = memory()
    for value in (1, 3):
        commit(store_on(kv), value)
    return kv


ACTIONS: dict[str, tuple[Callable[[ModelStore], object], set[int]]] = {
    "a new version": (lambda store: commit(store, 4), {3, 4}),
    "an old one again": (lambda store: commit(store, 1), {3, 1}),
    "the same again": (lambda store: commit(store, 3), {3}),
    "gc": (lambda store: store.gc(keep=1), {3}),
}


@pytest.mark.parametrize("how", ["once", "killed", "lost"])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_fault_at_any_write_leaves_the_old_or_the_new_version(started: Any, action: str, how: str) -> None:
    (run, allowed), former = ACTIONS[action], {x.commit for x in store_on(started).versions("m")}
    for at in itertools.count():
        kv = copy_of(started)
        faulty, error = Faulty(kv, at, how), None
        try:
            run(store_on(faulty))
        except jm.CheckpointError as raised:
            error = str(raised)
            assert "UNAVAILABLE" in error
        now = value_at(kv, store_on(kv))
        assert now in allowed
        if error is not None and how != "lost":
            assert now == 3
        check_tidy(kv)
        after = value_at(kv, store_on(kv))
        if error is None:
            assert after == now
        elif after != now:  # all was ready for it, and nothing tells whether the last request has arrived
            assert "recover() makes it current" in error or action == "an old one again"
        assert action == "gc" or former <= {x.commit for x in store_on(kv).versions("m")}
        if faulty.writes <= at:
            break
    assert at >= {"a new version": 8, "an old one again": 3, "the same again": 0, "gc": 4}[action]


def test_the_first_version_of_all_and_a_recovery_that_fails() -> None:
    for at in range(7):
        kv = memory()
        with contextlib.suppress(jm.CheckpointError):
            commit(store_on(Faulty(kv, at, "killed")), 1)
        saved = kv
        for again in itertools.count():
            kv = copy_of(saved)
            faulty = Faulty(kv, again, "killed")
            with contextlib.suppress(jm.CheckpointError):
                store_on(faulty).recover(patience=0)
            check_tidy(kv)
            if faulty.writes <= again:
                break


OTHERS: dict[str, Callable[[ModelStore], object]] = {
    "another version": lambda store: commit(store, 5),
    "the same version": lambda store: commit(store, 4),
    "an old version": lambda store: commit(store, 1),
    "away and back": lambda store: (commit(store, 5), commit(store, 3)),
    "recover": lambda store: store.recover(patience=0),
    "gc": lambda store: store.gc(keep=0),
}


COMMITTED_LAST = {"another version": 5, "the same version": 4, "an old version": 1}


@pytest.mark.parametrize(
    "action, other",
    [
        *itertools.product(["a new version", "an old one again"], OTHERS),
        *itertools.product(["gc"], ["an old version", "away and back", "gc"]),
    ],
)
def test_whatever_others_do_between_two_writes(started: Any, action: str, other: str) -> None:
    outcomes, former = set(), {x.commit for x in store_on(started).versions("m")}
    for at in itertools.count():
        kv, done = Tagged(objects(started)), []
        faulty = Faulty(kv, at, lambda kv=kv, done=done: done.append(OTHERS[other](store_on(kv))))
        outcome = "done"
        try:
            ACTIONS[action][0](store_on(faulty))
        except jm.ConflictError as error:
            outcome = "removed" if "taken for dead" in str(error) else "conflict"
        if not done:
            break
        outcomes.add(outcome)
        now = value_at(kv, store_on(kv))
        check_tidy(kv)
        assert value_at(kv, store_on(kv)) == now
        if other in ("recover", "gc") and action != "gc":
            (wanted,) = ACTIONS[action][1] - {3}
            assert now == (wanted if outcome == "done" else 3)
        elif other in COMMITTED_LAST:  # theirs comes after ours, or instead of it
            assert now == COMMITTED_LAST[other]
        if "gc" not in (action, other):
            assert former <= {x.commit for x in store_on(kv).versions("m")}
        assert not kv.broken
    assert at > 2
    conflicts = action != "gc" and other == "another version"
    conflicts |= (action, other) in (("a new version", "an old version"), ("an old one again", "the same version"))
    assert ("conflict" in outcomes) == conflicts
    # Others may remove it, before the upload is complete or after HEAD has changed.
    assert ("removed" in outcomes) == ((action, other) in (("a new version", x) for x in ("recover", "away and back")))


class Slow:
    """A key-value store that takes its time, so that others come in between."""

    def __init__(self, kv: Any, seed: int):
        self._kv, self._random = kv, random.Random(seed)

    def __getattr__(self, name: str) -> Any:
        time.sleep(self._random.choice((0, 0, 0.0005, 0.002)))
        return getattr(self._kv, name)


def test_of_many_writers_at_once_each_replaces_the_version_that_it_has_seen(started: Any) -> None:
    kv, lost, wrong = Tagged(objects(started)), [], []

    def run(seed: int, act: Callable[[ModelStore], object]) -> None:
        for again in range(3):
            try:
                act(store_on(Slow(kv, 10 * seed + again)))
            except jm.ConflictError as error:
                lost.append(str(error))
            except BaseException as error:
                wrong.append(repr(error))

    acts = [lambda store, value=value: commit(store, value) for value in (1, 5, 6, 6)]
    acts += [lambda store: store.gc(keep=2), lambda store: store.recover(patience=0.0)]
    threads = [threading.Thread(target=run, args=item) for item in enumerate(acts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not kv.broken
    assert all("somebody else has committed" in text or "taken for dead" in text for text in lost)
    check_tidy(kv)


def test_what_cannot_be_committed_is_kept_and_what_cannot_be_a_store_is_said(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(jm.CheckpointError, match="can only be read from"):
        open_store("https://host/store")
    server = Tagged(conditions=False)
    with pytest.raises(jm.CheckpointError, match="does not honour conditional writes"):
        commit(store_on(server), 1)
    assert not objects(server)
    kv = memory()
    with monkeypatch.context() as patch:
        patch.setattr(store_objects, "MAX_OBJECT_BYTES", 10)
        with pytest.raises(jm.CheckpointError, match=r"config\.json is 12 bytes long.* pass max_shard_bytes"):
            commit(store_on(kv), 1)
    with pytest.raises(jm.CheckpointError, match="cannot write to memory://.* UNAVAILABLE.* kept in") as caught:
        commit(store_on(Faulty(kv, 3, "once")), 1)
    kept = Path(str(caught.value).rpartition(" ")[2])
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == contents(1) and not objects(kv)
    left = {*temporary.iterdir()}
    commit(store_on(kv), 1)
    with pytest.raises(ZeroDivisionError), store_on(kv).transaction("m") as transaction:
        transaction.folder.mkdir()
        raise ZeroDivisionError
    with pytest.raises(jm.ConflictError, match="and no version was expected"):
        commit(store_on(kv), 2, expected=None)
    assert {*temporary.iterdir()} == left
    kv.write("models/m/HEAD", b"main").result()
    with pytest.raises(jm.CheckpointError, match="HEAD is damaged: found 'main'"):
        store_on(kv).head("m")


def test_a_young_upload_is_left_alone_by_recover() -> None:
    kv = memory()
    commit(store_on(kv), 1)
    with contextlib.suppress(jm.CheckpointError):
        commit(store_on(Faulty(kv, 5, "killed")), 2)  # when all is uploaded
    before = objects(kv)
    assert store_on(kv).recover() == store_on(kv).recover(patience=600) == () and objects(kv) == before
    assert commit(store_on(kv), 2) == store_on(kv).head("m") and store_on(kv).versions("m")[0].number == 2
    assert store_on(kv).recover(patience=0) == ("m: an unfinished version was removed",)
    check_tidy(kv)


def test_a_version_that_was_current_stays_even_if_its_writer_was_killed_then(
    started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv, settle, calls = Tagged(objects(started)), ObjectPlace._settle, []
    former = store_on(kv).head("m")

    def settle_and_then(place: ObjectPlace, name: str, but: str | None = None) -> list[str]:
        done = settle(place, name, but)
        calls.append(but)
        if len(calls) == 2:  # after the upload another writer commits the same anew, and is killed when HEAD is set
            patch.setattr(ObjectPlace, "_settle", settle)
            commit(store_on(kv), 5)
            store_on(kv).gc(keep=0)
            with contextlib.suppress(jm.CheckpointError):
                commit(store_on(Faulty(kv, 7, "killed")), 3)
            assert [x.state for x in store_on(kv)._records("m") if x.commit == former] == ["PREPARED"]
        return done

    with monkeypatch.context() as patch, store_on(kv).transaction("m") as transaction:
        transaction.folder.mkdir()
        (transaction.folder / "model.safetensors").write_bytes(b"4")
        patch.setattr(ObjectPlace, "_settle", settle_and_then)
    check_tidy(kv)
    assert [x.commit for x in store_on(kv).versions("m")][1] == former and not kv.broken


def test_a_damaged_version_is_found_and_repaired_by_the_same_merge() -> None:
    kv = memory()
    store, current = store_on(kv), commit(store_on(kv), 1)
    place = str(store.path("m")).removeprefix(f"{URL}/")
    kv.write(f"{place}/model.safetensors", b"2" * 9).result()
    kv.write(f"{place}/more", b"").result()
    assert [str(x) for x in store.verify("m", current[:6])] == [
        f"m@{current}: more: was added",
        f"m@{current}: model.safetensors: has other bytes than were written",
    ]
    kv.write(f"{place}/model.safetensors", None).result()
    assert "model.safetensors: is missing" in str(store.verify()[1])
    assert commit(store, 1) == current == store.head("m") and value_at(kv, store) == 1
    check_tidy(kv)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> dict[str, Any]:
    """A base and two experts in the current folder, and a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    values = {name: rng.normal(size=(8, 5)).astype(np.float32) for name in ("base", "a", "b")}
    for name, array in values.items():
        jm.save_checkpoint(name, {"w": array, "v": array[0]}, side_files={"config.json": b"{}"})
    Path("recipe.yml").write_text("method: {task_arithmetic: 0.5}\nbase: base\nexperts: {maths: a, code: b}\n")
    return values


def expected_of(models: dict[str, Any], scale: float = 0.5) -> Any:
    return models["base"] + scale * (models["a"] - models["base"] + models["b"] - models["base"])


def test_merges_from_and_to_a_url(models: dict[str, Any], temporary: Path) -> None:
    context = ts.Context()
    store, local = open_store(URL, context=context), open_store("local")
    for each in (store, local):
        with each.transaction("chat") as transaction:
            jm.merge_checkpoint(
                jm.task_arithmetic(0.5), ["a", "b"], base="base", out=transaction.folder, max_shard_bytes=100
            )
    assert store.head("chat") == local.head("chat"), "the same merge has the same commit anywhere"
    (version,) = store.versions("chat")
    assert version.path == store.path("chat") and str(version.path).startswith(f"{URL}/models/chat/versions/")
    opened = jm.open_checkpoint(version.path, context=context)
    np.testing.assert_allclose(opened.params["w"][...], expected_of(models), rtol=1e-5)
    assert (version.manifest, version.nbytes) == (local.versions("chat")[0].manifest, local.versions("chat")[0].nbytes)

    with store.transaction("chat", expected=version.commit) as transaction:
        jm.merge_checkpoint(jm.linear(), {"now": opened, "code": "b"}, out=transaction.folder)
    assert [x.parents for x in store.versions("chat")] == [(f"chat@{version.commit}",), ()]
    assert store.verify() == () == store.recover() and store.models() == ("chat",)
    assert [x.commit for x in store.gc(keep=1, parents=True)] == []
    assert [x.commit for x in store.gc(keep=1)] == [version.commit]
    with pytest.raises(jm.CheckpointError, match="chat has no version"):
        store.path("chat", version.commit)
    with pytest.raises(jm.CheckpointError, match="has no model 'law'; it has chat"):
        store.path("law")
    assert not list(temporary.iterdir())


def test_the_commands(
    models: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ts.Context()
    monkeypatch.setattr(storing, "open_store", functools.partial(open_store, context=context))
    store = open_store(URL, context=context)

    def run(*arguments: str) -> str:
        main(arguments)
        printed = capsys.readouterr()
        return printed.out + printed.err

    with pytest.raises(SystemExit):
        run("store", "list", URL)
    assert "there is no model store" in capsys.readouterr().err
    monkeypatch.setattr(storing, "SHARD_BYTES", 100)
    printed = run("merge", "recipe.yml", "--store", URL, "--name", "chat", "--expected", "none")
    (version,) = store.versions("chat")
    assert str(version.path) in printed.replace("\n", "")
    names = {key.rpartition("/")[2] for key in objects(ts.KvStore.open(f"{URL}/", context=context).result())}
    assert "model-00001-of-00002.safetensors" in names, "files that are uploaded are small"
    run("merge", "recipe.yml", "--store", URL, "--name", "chat", "--expected", version.commit[:8])
    assert version.commit[:12] in run("store", "list", URL)
    assert json.loads(run("store", "versions", URL, "chat", "--json"))[0]["path"] == version.path
    assert run("store", "path", URL, "chat").strip() == version.path
    assert "holds what was committed" in run("store", "verify", URL)
    assert "0 versions removed" in run("store", "gc", URL)
    assert "nothing was left unfinished" in run("store", "recover", URL)


def test_the_protocol_of_s3(models: dict[str, Any], temporary: Path) -> None:
    with S3() as server:

        def open_it() -> ModelStore:
            return ModelStore(ObjectPlace("s3://bucket/m", kvstore=server.place()._kv))

        def stored(prefix: str) -> set[str]:
            return {key.removeprefix("m/") for key in server.objects if key.startswith(f"m/{prefix}")}

        store = open_it()
        with store.transaction("chat") as transaction:
            jm.merge_checkpoint(jm.task_arithmetic(0.5), ["a", "b"], base="base", out=transaction.folder)
        (version,) = store.versions("chat")
        head, key = "m/models/chat/HEAD", str(version.path).rpartition("/")[2]
        assert stored("") == {"models/chat/HEAD", f"models/chat/commits/{key}.json", *stored("models/chat/versions/")}
        folder = Path("downloaded")
        folder.mkdir()
        for name in stored("models/chat/versions/"):
            (folder / Path(name).name).write_bytes(server.objects[f"m/{name}"])
        assert jm.verify_checkpoint(folder) == () == store.verify()
        np.testing.assert_allclose(jm.open_checkpoint(folder).params["w"][...], expected_of(models), rtol=1e-5)

        first = version.commit
        with pytest.raises(jm.ConflictError, match="somebody else"), store.transaction("chat") as slow:
            jm.save_checkpoint(slow.folder, {"w": np.zeros(3)})
            with open_it().transaction("chat") as quick:
                jm.save_checkpoint(quick.folder, {"w": np.ones(3)})
        assert quick.version is not None and store.head("chat") == quick.version.commit
        assert [condition for key, condition in server.conditions if key == head] == ["If-None-Match", "If-Match"]
        with store.transaction("chat") as again:
            jm.merge_checkpoint(jm.task_arithmetic(0.5), ["a", "b"], base="base", out=again.folder)
        assert again.version is not None and again.version.commit == first == store.head("chat")
        assert [x.commit for x in store.gc(keep=0)] == [quick.version.commit]
        assert stored("models/chat/commits/") == {f"models/chat/commits/{key}.json"}
        assert stored("models/chat/versions/") == {
            name for name in stored("") if name.startswith(f"models/chat/versions/{key}/")
        }
        assert store.verify() == () == store.recover(patience=0)
