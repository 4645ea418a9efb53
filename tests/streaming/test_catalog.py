"""The catalog: statistics are right, gathered once, and never used for files that have changed."""

import os
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.streaming import catalog as catalog_module
from jaxmerge.streaming.catalog import Catalog, open_catalog
from jaxmerge.streaming.fingerprint import fingerprint
from jaxmerge.streaming.statistics import BlockStatistics

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BLOCK = 64  # entries of bfloat16 in the blocks of these tests
BLOCK_BYTES = 128


def make_models(folder: Path, format: str | None = None, suffix: str = "", **options: Any) -> tuple[Path, list[Path]]:
    """A base with tied embeddings and an integer tensor, and two experts, in float32 and bfloat16."""
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(30, 16)).astype(BFLOAT16)
    base = {
        "embed": embedding,
        "head": embedding,
        "layers.0.w": rng.normal(size=(25, 20)).astype(np.float32),
        "positions": np.arange(9),
        "scale": np.float32(3),
    }
    paths = [jm.save_checkpoint(folder / f"base{suffix}", base, format=format, **options)]
    for expert in "ab":
        moved = {name: x.copy() for name, x in base.items() if name not in ("head", "scale")}
        moved["scale"] = np.float32(-0.0)
        w = moved["layers.0.w"].reshape(-1)
        w[40:300] += rng.normal(size=260).astype(np.float32)
        moved["embed"] = (embedding.astype(np.float32) + 0.1 * rng.normal(size=(30, 16))).astype(BFLOAT16)
        moved["head"] = moved["embed"]
        paths.append(jm.save_checkpoint(folder / f"{expert}{suffix}", moved, format=format, **options))
    return paths[0], paths[1:]


def loaded(path: Path) -> dict[str, np.ndarray]:
    with jm.open_checkpoint(path) as checkpoint:
        return {name: np.asarray(x) for name, x in jm.named_leaves(checkpoint.params).items()}


def known(catalog: Catalog, base: Path, expert: Path) -> dict[str, BlockStatistics] | None:
    with open_checkpoint(base) as one, open_checkpoint(expert) as other:
        return catalog.statistics(one, other)


def content(catalog: Catalog, path: Path) -> str | None:
    with open_checkpoint(path) as checkpoint:
        return catalog.content(checkpoint)


@pytest.mark.parametrize("format, suffix", [(None, ""), ("npz", ".npz"), ("orbax", "")])
def test_statistics_are_those_of_the_task_vector(format: str | None, suffix: str, tmp_path: Path) -> None:
    base, experts = make_models(tmp_path, format, suffix)
    with open_catalog(None) as catalog:
        read = catalog.add(base, experts, block_bytes=BLOCK_BYTES)
        assert set(read) == {"the base", "expert_0", "expert_1"}
        assert read["the base"] == read["expert_1"] == jm.open_checkpoint(base).nbytes, "each tensor once"
        found = known(catalog, base, experts[0])
    assert found is not None and set(found) == {"embed", "layers.0.w", "scale"}
    for name, x in found.items():
        one, other = loaded(base)[name].reshape(-1), loaded(experts[0])[name].reshape(-1)
        delta = other.astype(np.float64) - one.astype(np.float64)
        if format != "orbax":  # whose arrays are read by chunks, here one for each array
            assert x.block == BLOCK_BYTES // one.dtype.itemsize
        blocks = [slice(at, at + x.block) for at in range(0, one.size, x.block)]
        assert x.size == one.size and len(x.norms) == len(blocks)
        np.testing.assert_allclose(x.norms, [np.linalg.norm(delta[b]) for b in blocks], rtol=1e-12)
        np.testing.assert_array_equal(x.largest, [np.abs(delta[b]).max() for b in blocks])
        np.testing.assert_array_equal(x.zeros, [np.sum(delta[b] == 0) for b in blocks])
        bits = {2: np.uint16, 4: np.uint32}[one.dtype.itemsize]
        np.testing.assert_array_equal(x.touched, [np.sum(other[b].view(bits) != one[b].view(bits)) for b in blocks])
        whole = x.regrouped(3 * x.block)
        joined = [slice(at, at + whole.block) for at in range(0, one.size, whole.block)]
        np.testing.assert_allclose(whole.norms, [np.linalg.norm(delta[b]) for b in joined], rtol=1e-12)
        np.testing.assert_array_equal(whole.largest, [np.abs(delta[b]).max() for b in joined])


def test_the_sign_of_a_zero_counts_as_touched(tmp_path: Path) -> None:
    zero = np.zeros(3, np.float32)
    jm.save_checkpoint(tmp_path / "base", {"w": zero})
    jm.save_checkpoint(tmp_path / "a", {"w": -zero})
    with open_catalog(None) as catalog:
        catalog.add(tmp_path / "base", [tmp_path / "a"])
        found = known(catalog, tmp_path / "base", tmp_path / "a")
    assert found is not None
    assert (found["w"].touched.tolist(), found["w"].zeros.tolist(), found["w"].norms.tolist()) == ([3], [3], [0])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_nothing_overflows_or_vanishes(size: float, tmp_path: Path) -> None:
    jm.save_checkpoint(tmp_path / "base", {"w": np.zeros(3, np.float32)})
    jm.save_checkpoint(tmp_path / "a", {"w": np.full(3, size, np.float32)})
    with open_catalog(None) as catalog:
        catalog.add(tmp_path / "base", [tmp_path / "a"])
        found = known(catalog, tmp_path / "base", tmp_path / "a")
    assert found is not None
    np.testing.assert_allclose(found["w"].norms, size * np.sqrt(3), rtol=1e-6)


def test_gram_matrix_from_sketches(tmp_path: Path) -> None:
    """Estimates without bias: over 200 blocks they are within four standard errors; the diagonal is exact."""
    rng = np.random.default_rng(1)
    vectors = np.array([[1.0, 0, 0], [0.8, 0.6, 0], [-0.5, 0, 0.5]]) @ rng.normal(size=(3, 200 * 256))
    base = rng.normal(size=200 * 256)
    jm.save_checkpoint(tmp_path / "base.npz", {"w": base})
    paths = [jm.save_checkpoint(tmp_path / f"{i}.npz", {"w": base + x}) for i, x in enumerate(vectors)]
    with open_catalog(None) as catalog:
        catalog.add(tmp_path / "base.npz", paths, block_bytes=256 * 8)
        gram = catalog.gram(tmp_path / "base.npz", paths)
        exact, norms = vectors @ vectors.T, np.linalg.norm(vectors, axis=1)
        np.testing.assert_allclose(np.diag(gram), np.diag(exact), rtol=1e-10)
        assert (np.abs(gram - exact) <= 4 / np.sqrt(64 * 200) * np.outer(norms, norms)).all()
        assert np.abs(gram - exact).max() > 0
        catalog.add(tmp_path / "base.npz", paths[:1], block_bytes=128 * 8)
        with pytest.raises(jm.CheckpointError, match="blocks of 128 entries"):
            catalog.gram(tmp_path / "base.npz", paths)


def test_only_what_is_new_or_changed_is_read(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path, max_shard_bytes=1000)  # a file for each of the larger tensors
    with open_catalog(tmp_path / "models.catalog") as catalog:
        catalog.add(base, experts[:1], block_bytes=BLOCK_BYTES)
        read = catalog.add(base, experts)
        assert read["expert_0"] == 0 and 0 < read["expert_1"] == read["the base"] + 72  # integers are just hashed
        assert set(catalog.add(base, experts).values()) == {0}
    with open_catalog(tmp_path / "models.catalog") as catalog:
        assert set(catalog.add(base, experts).values()) == {0}
        before, contents = known(catalog, base, experts[0]), content(catalog, experts[0])
        shards = sorted(experts[0].glob("*.safetensors"))
        with jm.open_checkpoint(shards[0]) as shard:
            name, size = next(iter(shard.params)), shard.nbytes
            assert set(shard.params) == {name, *shard.aliases}
        with open(shards[0], "r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\x11\x40")
        assert known(catalog, base, experts[0]) is None and content(catalog, experts[0]) is None
        read = catalog.add(base, experts)
        assert read == {"the base": size, "expert_0": size, "expert_1": 0}
        after = known(catalog, base, experts[0])
        assert before is not None and after is not None
        assert after[name].norms[-1] != before[name].norms[-1]
        assert content(catalog, experts[0]) not in (None, contents)


def test_another_base_is_noticed(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    with open_catalog(tmp_path / "models.catalog") as catalog:
        catalog.add(base, experts)
        before = known(catalog, base, experts[0])
        moved = {name: x + np.asarray(1, x.dtype) for name, x in loaded(base).items()}
        jm.save_checkpoint(base, moved | {"head": moved["embed"]}, overwrite=True)
        assert known(catalog, base, experts[0]) is None
        assert catalog.add(base, experts)["expert_0"] > 0
        after = known(catalog, base, experts[0])
    assert before is not None and after is not None
    assert (after["layers.0.w"].norms > before["layers.0.w"].norms).all()


def test_content_is_what_a_model_is_named_by(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    with open_catalog(tmp_path / "models.catalog") as catalog:
        catalog.add(base, experts)
        first = content(catalog, experts[0])
        for path in experts[0].glob("*.safetensors"):
            os.utime(path, ns=(0, 0))  # the same, as far as one knows after reading it
        assert content(catalog, experts[0]) is None
        shutil.copytree(experts[0], tmp_path / "elsewhere")
        read = catalog.add(base, [experts[0], tmp_path / "elsewhere"])
        assert read["expert_0"] == read["expert_1"] > 0
        assert content(catalog, experts[0]) == content(catalog, tmp_path / "elsewhere") == first
        assert content(catalog, experts[1]) != first


def test_stale_and_missing_models(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    with open_catalog(tmp_path / "models.catalog") as catalog:
        catalog.add(base, experts)
        assert [(entry.path, entry.state, len(entry.bases)) for entry in catalog.list()] == [
            (str(experts[0]), "fresh", 1),
            (str(experts[1]), "fresh", 1),
            (str(base), "fresh", 0),
        ]
        assert catalog.verify() == () and catalog.gc() == 0
        jm.save_checkpoint(experts[0], {"w": np.zeros(3)}, overwrite=True)
        shutil.rmtree(experts[1])
        assert [entry.state for entry in catalog.list()] == ["changed", "missing", "fresh"]
        assert [entry.path for entry in catalog.verify()] == [str(path) for path in experts]
        assert catalog.gc() == 2
        assert [entry.path for entry in catalog.list()] == [str(base)]
        assert catalog.verify() == ()
        with pytest.raises(jm.CheckpointError, match="does not know"):
            catalog.gram(base, [base])


def test_a_model_that_changes_while_it_is_read_is_not_trusted(tmp_path: Path, monkeypatch: Any) -> None:
    base, experts = make_models(tmp_path)
    measure = catalog_module.measure

    def touch(*arguments: Any) -> Any:
        os.utime(experts[0] / "model.safetensors", ns=(1, 1))
        return measure(*arguments)

    monkeypatch.setattr(catalog_module, "measure", touch)
    with open_catalog(tmp_path / "models.catalog") as catalog:
        with pytest.raises(jm.CheckpointError, match="was changed while it was read"):
            catalog.add(base, experts[:1])
        assert [entry.path for entry in catalog.list()] == [str(base)]
        monkeypatch.undo()
        assert catalog.add(base, experts[:1])["expert_0"] > 0


def test_what_was_read_before_an_error_is_kept(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    broken = {**loaded(experts[0]), "scale": np.float32(np.nan)}  # the smallest tensor, which is read last
    bad = jm.save_checkpoint(tmp_path / "bad", broken)
    with open_catalog(tmp_path / "models.catalog") as catalog:
        with pytest.raises(jm.NonFiniteError, match="expert 'bad', tensor 'scale'"):
            catalog.add(base, {"bad": bad})
        with sqlite3.connect(tmp_path / "models.catalog") as connection:
            rows = connection.execute("SELECT name FROM statistics ORDER BY name").fetchall()
        connection.close()
        assert ("layers.0.w",) in rows and ("scale",) not in rows
        with open_checkpoint(base) as one, open_checkpoint(bad) as other:
            assert catalog.statistics(one, other) is None


def test_experts_that_do_not_fit(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    odd = jm.save_checkpoint(tmp_path / "odd", {**loaded(experts[0]), "scale": np.zeros(2, np.float32)})
    tensors: dict[str, Any] = {name: x.astype(np.float32) for name, x in loaded(experts[0]).items()}
    np.savez_compressed(tmp_path / "small.npz", **tensors)
    with open_catalog(None) as catalog:
        with pytest.raises(jm.ShapeError, match="expert 'odd', tensor 'scale'"):
            catalog.add(base, {"odd": odd})
        with pytest.raises(jm.BudgetError, match="is compressed"):
            catalog.add(base, [tmp_path / "small.npz"])
        with pytest.raises(jm.RecipeError, match="empty name"):
            catalog.add(base, {"": odd})


@pytest.mark.parametrize("damage", ["pages", "truncated"])
def test_a_damaged_catalog_is_moved_aside_and_begun_anew(damage: str, tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    path = tmp_path / "models.catalog"
    with open_catalog(path) as catalog:
        catalog.add(base, experts)
    content = path.read_bytes()
    garbage = content[:4096] + os.urandom(len(content) - 4096)
    path.write_bytes(garbage if damage == "pages" else content[: len(content) // 2])
    damaged = path.read_bytes()
    with pytest.warns(UserWarning, match="was damaged"):
        catalog = open_catalog(path)
    with catalog:
        assert catalog.list() == ()
        assert catalog.add(base, experts)["expert_0"] > 0
    assert (tmp_path / "models.catalog.damaged").read_bytes() == damaged
    with open_catalog(path) as catalog:
        assert len(catalog.list()) == 3


def test_a_value_that_has_changed_is_not_trusted(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    path = tmp_path / "models.catalog"
    with open_catalog(path) as catalog:
        catalog.add(base, experts)
        before = known(catalog, base, experts[0])
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE statistics SET touched = zeroblob(length(touched)) WHERE expert = 2")
    connection.close()
    with open_catalog(path) as catalog:
        assert known(catalog, base, experts[0]) is None
        with pytest.raises(jm.CheckpointError, match="is damaged"):
            catalog.verify()
        assert catalog.add(base, experts)["expert_0"] > 0
        after = known(catalog, base, experts[0])
        assert catalog.verify() == () and before is not None and after is not None
        np.testing.assert_array_equal(after["embed"].touched, before["embed"].touched)


def test_files_that_are_no_catalog_are_left_alone(tmp_path: Path) -> None:
    base, _ = make_models(tmp_path)
    other, newer = tmp_path / "other.db", tmp_path / "newer.catalog"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE precious (x)")
    connection.close()
    open_catalog(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    for path, message in (
        (base / "model.safetensors", "is no catalog"),
        (other, "database of another program"),
        (newer, "version 99"),
        (base, "cannot be opened"),
    ):
        before = path.read_bytes() if path.is_file() else b""
        with pytest.raises(jm.CheckpointError, match=message):
            open_catalog(path)
        assert not path.is_file() or path.read_bytes() == before


def test_several_may_use_a_catalog_at_a_time(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    path, failures = tmp_path / "models.catalog", []

    def add(expert: Path) -> None:
        try:
            with open_catalog(path) as catalog:
                catalog.add(base, [expert], progress=False)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=add, args=(expert,)) for expert in experts * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with open_catalog(path) as catalog:
        assert catalog.verify() == () and len(catalog.list()) == 3
        assert set(catalog.add(base, experts).values()) == {0}


def test_several_may_begin_a_catalog_at_a_time(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def begin(path: Path) -> None:
        try:
            open_catalog(path).close()
        except BaseException as error:
            failures.append(error)

    for number in range(30):
        path = tmp_path / f"{number}.catalog"
        threads = [threading.Thread(target=begin, args=(path,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_fingerprints_behind_urls(tmp_path: Path) -> None:
    """`memory://` has generations as s3 and gs have; what has none never equals itself."""
    ts = pytest.importorskip("tensorstore")
    base, experts = make_models(tmp_path)
    context = ts.Context()
    kv = ts.KvStore.open("memory://models/", context=context).result()
    kv["a.safetensors"] = (experts[0] / "model.safetensors").read_bytes()
    url = "memory://models/a.safetensors"
    with jm.open_checkpoint(url, context=context) as one, jm.open_checkpoint(url, context=context) as other:
        before = fingerprint(one)
        assert fingerprint(other) == before
    kv["a.safetensors"] = (experts[1] / "model.safetensors").read_bytes()
    with jm.open_checkpoint(url, context=context) as changed:
        assert fingerprint(changed).model != before.model
        catalog = open_catalog(None)
        assert catalog.add(base, [changed])["expert_0"] > 0
        assert catalog.add(base, [changed])["expert_0"] == 0
        catalog.close()


def test_what_is_saved_through_a_catalog_is_known_without_being_read(tmp_path: Path) -> None:
    """Statistics and contents are those of `add`, bit for bit; the base is read once, the expert not at all."""
    rng = np.random.default_rng(2)
    embedding = rng.normal(size=(700, 1000)).astype(BFLOAT16)  # more than a piece, and blocks that end within
    base = {
        "embed": embedding,
        "head": embedding,
        "norm": np.ones(9, np.float32),
        "n": np.arange(3),
        "none": embedding[:0],
    }
    moved = (embedding.astype(np.float32) + rng.normal(size=(700, 1000))).astype(BFLOAT16)
    path = jm.save_checkpoint(tmp_path / "base", base)
    expert = {**base, "embed": jax.numpy.asarray(moved), "norm": np.float32(2) * base["norm"], "none": moved[:0]}
    expert["head"] = expert["embed"]
    with open_catalog(tmp_path / "first.catalog") as one, open_catalog(None) as other, open_checkpoint(path) as of_base:
        one.add(path, [path])  # the base is known
        before = of_base.bytes_read
        saved = one.save(tmp_path / "expert", expert, base=of_base, block_bytes="1MB", metadata={"note": "x"})
        assert of_base.bytes_read - before == of_base.nbytes
        assert one.add(path, [saved]) == {"the base": 0, "expert_0": 0}
        other.add(path, [saved], block_bytes="1MB")
        found, expected = known(one, path, saved), known(other, path, saved)
        assert content(one, saved) == content(other, saved) is not None
        assert content(one, path) == content(other, path) is not None
        assert jm.open_checkpoint(saved).metadata["note"] == "x" and jm.open_checkpoint(saved).aliases
    assert found is not None and expected is not None and found.keys() == expected.keys() == {"embed", "norm", "none"}
    for name, x in expected.items():
        assert (found[name].size, found[name].block) == (x.size, x.block)
        for key in ("norms", "largest", "zeros", "touched", "sketches"):
            np.testing.assert_array_equal(getattr(found[name], key), getattr(x, key))


def test_what_cannot_be_known_while_saving(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    tensors: dict[str, Any] = loaded(experts[0])  # not tied
    with open_catalog(None) as catalog:
        for error, changed in (
            (jm.NonFiniteError, {"scale": np.float32(np.inf)}),
            (jm.ShapeError, {"scale": np.zeros(2, np.float32)}),
            (jm.StructureError, {"more": np.zeros(2, np.float32)}),
        ):
            with pytest.raises(error):
                catalog.save(tmp_path / "new", {**tensors, **changed}, base=base)
            assert not (tmp_path / "new").exists()
        saved = catalog.save(tmp_path / "new", tensors, base=base, format="orbax")
        assert known(catalog, base, saved) is not None and content(catalog, saved) is not None
        assert set(catalog.add(base, [saved]).values()) == {0}


def test_quantiles_hold_the_cut(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    one, other = loaded(base), loaded(experts[0])
    magnitudes = np.sort(
        np.concatenate(
            [
                np.abs(other[name].astype(np.float32) - one[name].astype(np.float32)).reshape(-1)
                for name in ("embed", "layers.0.w", "scale")  # tied tensors count once
            ]
        )
    )[::-1]
    shares = (0.01, 0.2, 0.5, 1.0)
    with open_catalog(tmp_path / "models.catalog") as catalog:
        with pytest.raises(jm.CheckpointError, match="does not know"):
            catalog.quantiles(base, experts[0], shares)
        catalog.add(base, experts, block_bytes=BLOCK_BYTES)
        found = catalog.quantiles(base, experts[0], shares)
        for share, (low, high) in zip(shares, found, strict=True):
            cut = magnitudes[int(share * len(magnitudes)) - 1]
            assert low <= cut <= high and (high <= low * 1.126 or low == 0)
        with pytest.raises(jm.RecipeError, match="share"):
            catalog.quantiles(base, experts[0], [0.0])
    with sqlite3.connect(tmp_path / "models.catalog") as file:  # a damaged row is not believed
        file.execute("UPDATE quantiles SET magnitudes = zeroblob(9) WHERE name = 'embed'")
    with open_catalog(tmp_path / "models.catalog") as catalog, pytest.raises(jm.CheckpointError, match="does not know"):
        catalog.quantiles(base, experts[0], shares)


@pytest.mark.parametrize("version", [1, 2])
def test_a_catalog_of_an_earlier_version_is_brought_up_to_date(tmp_path: Path, version: int) -> None:
    base, experts = make_models(tmp_path)
    path = tmp_path / "models.catalog"
    with open_catalog(path) as catalog:
        catalog.add(base, experts)
    with sqlite3.connect(path) as file:
        file.execute("ALTER TABLE tensors DROP COLUMN blocks")
        if version == 1:
            file.execute("DROP TABLE quantiles")
        file.execute(f"PRAGMA user_version = {version}")
    with open_catalog(path) as catalog:
        assert len(catalog.list()) == 3 and content(catalog, base) is None  # to be read again
        assert (known(catalog, base, experts[0]) is None) == (version == 1)
        read = catalog.add(base, experts)
        assert read["expert_0"] > 0 and known(catalog, base, experts[0]) is not None
        assert catalog.quantiles(base, experts[0], [0.5]).shape == (1, 2)
        assert content(catalog, base) is not None
