"""The model store: versions, the current one, conflicts, lineage, verification, garbage collection, its commands."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts

import jaxmerge as jm
from jaxmerge.cli.main import main
from jaxmerge.streaming.store import ModelStore, Transaction, open_store
from jaxmerge.streaming.store_objects import ObjectPlace

RECIPE = "method: {task_arithmetic: 0.3}\nbase: base\nexperts: {maths: a, code: b}\n"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> ModelStore:
    """A store, in the current folder, beside a base, two experts and a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    for name in ("base", "a", "b"):
        params: dict[str, Any] = {"w": rng.normal(size=(8, 5)).astype(np.float32), "ids": np.arange(3)}
        jm.save_checkpoint(name, params, side_files={"config.json": b'{"of": "it"}'})
    Path("recipe.yml").write_text(RECIPE)
    return open_store("models.store")


@pytest.fixture(params=["local", "memory"])
def any_store(request: pytest.FixtureRequest, store: ModelStore) -> ModelStore:
    """The same, and one on an object store."""
    return store if request.param == "local" else open_store("memory://bucket/store", context=ts.Context())


def merge(into: Transaction, scale: float, experts: tuple[Any, ...] = ("a", "b"), base: Any = "base") -> None:
    jm.merge_checkpoint(jm.task_arithmetic(scale), experts, base=base, out=into.folder, progress=False)


def commit(store: ModelStore, name: str, value: float, **options: Any) -> str:
    """Commits a folder without a manifest, which nobody has merged."""
    with store.transaction(name, **options) as transaction:
        jm.save_checkpoint(transaction.folder, {"w": np.full(4, float(value))})
    assert transaction.version is not None
    return transaction.version.commit


def tree(store: ModelStore) -> set[str]:
    if isinstance(store._place, ObjectPlace):
        return {key.decode() for key in store._place._kv.list().result()}
    return {str(path.relative_to(store.root)) for path in Path(store.root).rglob("*")}


def test_versions_of_merges(store: ModelStore) -> None:
    assert store.models() == store.versions("chat") == ()
    assert store.head("chat") is None and not store.root.exists()
    for scale in (0.3, 0.5):
        with store.transaction("chat") as transaction:
            merge(transaction, scale)
            assert store.head("chat") in (None, *(x.commit for x in store.versions("chat")))
    second, first = store.versions("chat")
    assert store.models() == ("chat",)
    assert second == transaction.version and store.head("chat") == second.commit and second.previous == first.commit
    assert (first.number, second.number) == (1, 2) and first.parents == second.parents == ()
    assert store.path("chat") == second.path and store.path("chat", first.commit[:6]) == first.path
    for version, scale in ((first, 0.3), (second, 0.5)):
        assert jm.load_manifest(version.path).id == version.manifest
        models = [jm.open_checkpoint(x).params["w"][...] for x in ("base", "a", "b")]
        expected = models[0] + scale * (models[1] - models[0] + models[2] - models[0])
        np.testing.assert_allclose(jm.open_checkpoint(version.path).params["w"][...], expected, rtol=1e-5)
        assert (version.path / "config.json").stat().st_mode & 0o222 == 0, "versions are not for writing"
        assert version.nbytes == sum(x.stat().st_size for x in version.path.iterdir() if x.name != "jaxmerge.json")
    assert store.verify() == () == store.recover()

    # The same merge again is the same version, and becomes the current one. It also repairs a damaged copy.
    weights = first.path / "model.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 16
    weights.write_bytes(data)
    (fault,) = store.verify("chat")
    assert (fault.commit, fault.name) == (first.commit, "w") and "in block 0 of 1" in fault.problem
    before = tree(store)
    with store.transaction("chat", expected=second.commit) as transaction:
        merge(transaction, 0.3)
    assert transaction.version == first and store.head("chat") == first.commit
    assert store.verify() == () and tree(store) == before

    # A version of the store is a model like any other, and is recorded as a parent; the side files count too.
    with store.transaction("small") as transaction:
        merge(transaction, 0.1, (first.path, "b"), store.path("chat", second.commit))
    assert transaction.version is not None
    assert set(transaction.version.parents) == {f"chat@{first.commit}", f"chat@{second.commit}"}
    config = transaction.version.path / "config.json"
    config.chmod(0o644)
    config.write_text('{"of": "us"}')
    (config.parent / "more").touch()
    assert [(x.name, x.problem) for x in store.verify("small")] == [
        ("more", "was added"),
        ("config.json", "has other bytes than were written"),
    ]


def test_of_two_writers_the_first_wins(any_store: ModelStore) -> None:
    store = any_store
    first = commit(store, "m", 1)
    with pytest.raises(jm.ConflictError, match="somebody else has committed"), store.transaction("m") as slow:
        jm.save_checkpoint(slow.folder, {"w": np.zeros(4)})
        quick = commit(store, "m", 2)
        before = tree(store)
    assert store.head("m") == quick and slow.version is None
    left = {x for x in before if not x.startswith("models/m/staging/")}
    assert tree(store) == left, "the loser has left something"
    for expected in (first, None):
        with pytest.raises(jm.ConflictError, match=f"m is at {quick}, and {expected or 'no version'} was expected"):
            commit(store, "m", 3, expected=expected)
    with store.transaction("m", expected=quick) as slow:  # both have the same to say
        jm.save_checkpoint(slow.folder, {"w": np.full(4, 4.0)})
        same = commit(store, "m", 4)
    assert slow.version is not None and slow.version.commit == same == store.head("m")
    assert tree(store) > left and not any(x.startswith("models/m/staging/") for x in tree(store))


def test_an_error_in_a_transaction_changes_nothing(any_store: ModelStore, tmp_path: Path) -> None:
    store = any_store
    commit(store, "m", 1)
    before = tree(store)
    with pytest.raises(ZeroDivisionError), store.transaction("m") as transaction:
        jm.save_checkpoint(transaction.folder, {"w": np.zeros(4)})
        raise ZeroDivisionError
    with pytest.raises(jm.CheckpointError, match="nothing was written to"), store.transaction("m"):
        pass
    with pytest.raises(jm.CheckpointError, match="is a link"), store.transaction("m") as transaction:
        transaction.folder.mkdir()
        (transaction.folder / "model.safetensors").symlink_to(tmp_path / "a/model.safetensors")
    assert tree(store) == before


def test_gc_keeps_the_current_the_newest_and_what_they_come_from(any_store: ModelStore) -> None:
    store = any_store
    commits = [commit(store, "m", value) for value in range(5)]
    child = commit(store, "child", 9, inputs=[store.path("m", commits[1]), "base", "s3://bucket/model"])
    assert store.versions("child")[0].parents == (f"m@{commits[1]}",)
    commit(store, "m", 2)  # an older one becomes current
    assert store.head("m") == commits[2]

    def left() -> list[str]:
        return [x.commit for x in reversed(store.versions("m"))]

    removed = store.gc(keep=1, parents=True, dry_run=True)
    assert [x.commit for x in removed] == [commits[3], commits[0]] and left() == commits
    assert store.gc(keep=1, parents=True) == removed and left() == [commits[1], commits[2], commits[4]]
    assert [x.commit for x in store.gc(keep=0)] == [commits[4], commits[1]]
    assert left() == [commits[2]] and store.head("child") == child
    assert store.verify() == () == store.recover() == store.gc()
    with pytest.raises(jm.CheckpointError, match="m has no version"):
        store.path("m", commits[4])
    with pytest.raises(jm.CheckpointError, match="cannot be negative"):
        store.gc(keep=-1)


def test_a_prepared_version_is_removed_if_another_one_is_current(store: ModelStore) -> None:
    """Recovery sets HEAD only where the version was made for. Writers recover first, so this takes a foreign hand."""
    commits = [commit(store, "m", value) for value in range(3)]
    (record,) = (x for x in store._records("m") if x.commit == commits[1])
    dataclasses.replace(record, state="PREPARED").save(store.root / "models/m/commits")
    (done,) = store.recover()
    assert f"m@{commits[1]} was removed" in done and store.head("m") == commits[2]
    assert [x.commit for x in store.versions("m")] == [commits[2], commits[0]]
    assert not store.path("m").with_name(commits[1]).exists() and store.verify() == ()


def test_what_is_no_store_or_is_damaged(store: ModelStore, tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}/models.store").root == store.root
    with pytest.raises(jm.CheckpointError, match="is no folder"):
        open_store(tmp_path / "recipe.yml")
    for name in ("", "..", "a/b", ".hidden"):
        with pytest.raises(jm.CheckpointError, match="cannot be the name of a model"):
            store.head(name)
    current = commit(store, "m", 1)
    with pytest.raises(jm.CheckpointError, match="has no model 'n'; it has m"):
        store.path("n")
    record = store.root / "models/m/commits" / f"{current}.json"
    record.write_text(record.read_text().replace("COMMITTED", "PREPARED"))
    with pytest.raises(jm.CheckpointError, match="is damaged"):
        store.versions("m")
    (store.root / "models/m/HEAD").write_text("main")
    with pytest.raises(jm.CheckpointError, match="HEAD is damaged: found 'main'"):
        store.head("m")


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints, on either stream."""
    if code:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == code
    else:
        main(arguments)
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_the_commands(store: ModelStore, capsys: pytest.CaptureFixture[str]) -> None:
    root = "models.store"
    assert "there is no model store" in run(capsys, "store", "list", root, code=1)
    to_chat = ("merge", "recipe.yml", "--store", root, "--name", "chat")
    printed = run(capsys, *to_chat, "--expected", "none")
    first = store.versions("chat")[0]
    assert str(first.path) in printed.replace("\n", "")
    assert "was expected" in run(capsys, *to_chat, "--expected", "none", code=1)
    Path("recipe.yml").write_text(RECIPE.replace("0.3", "0.4"))
    run(capsys, *to_chat, "--expected", first.commit[:8])
    second = store.versions("chat")[0]
    Path("recipe.yml").write_text(RECIPE.replace("base: base", f"base: {second.path}"))
    run(capsys, *to_chat[:-1], "maths")

    listed = run(capsys, "store", "list", root)
    assert second.commit[:12] in listed and "2 models" in listed
    assert [x["model"] for x in json.loads(run(capsys, "store", "list", root, "--json"))] == ["chat", "maths"]
    listed = run(capsys, "store", "versions", root, "chat")
    assert "2 versions of chat" in listed and first.commit[:12] in listed and "current" in listed
    assert f"chat@{second.commit[:12]}" in run(capsys, "store", "versions", root, "maths")
    told = json.loads(run(capsys, "store", "versions", root, "chat", "--json"))
    assert [x["commit"] for x in told] == [second.commit, first.commit]
    assert run(capsys, "store", "path", root, "chat", first.commit[:8]).strip() == str(first.path)
    assert "has no model 'law'" in run(capsys, "store", "versions", root, "law", code=1)

    assert "holds what was committed" in run(capsys, "store", "verify", root)
    (first.path / "config.json").unlink()
    assert f"chat@{first.commit}: config.json: is missing" in run(capsys, "store", "verify", root, "chat", code=1)
    assert "holds what was committed" in run(capsys, "store", "verify", root, "chat", second.commit)
    assert "1 versions would be removed" in run(capsys, "store", "gc", root, "--dry-run")
    assert first.path.exists()
    assert first.commit[:12] in run(capsys, "store", "gc", root, "--keep", "1")
    assert not first.path.exists()
    (store.root / "models/chat/staging/7").mkdir()
    assert "an unfinished version was removed" in run(capsys, "store", "recover", root)
    assert "nothing was left unfinished" in run(capsys, "store", "recover", root)

    assert "give --name" in run(capsys, *to_chat[:-2], code=1)
    assert "a new version" in run(capsys, *to_chat, "--overwrite", code=1)
    assert "belong to --store" in run(capsys, "merge", "recipe.yml", "--out", "out", "--name", "chat", code=1)
