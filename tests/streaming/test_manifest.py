"""Manifests: what they tell, that a changed byte is found and named, and that a damaged one is refused."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.checkpoints.layout import TensorSpec
from jaxmerge.cli.auditing import replay
from jaxmerge.streaming import fingerprint as fingerprint_module
from jaxmerge.streaming.catalog import open_catalog
from jaxmerge.streaming.fingerprint import digest
from jaxmerge.streaming.manifest import (
    MANIFEST,
    BlockHashes,
    load_manifest,
    verify_checkpoint,
)
from jaxmerge.streaming.method_data import method_as_data, method_from_data
from jaxmerge.trees.info import Rules

NAMES = ("base", "a", "b")
METHOD = jm.task_arithmetic(0.3, weights={"a": 1.0, "b": 0.5})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Three models that no test changes: one tensor has several hashed blocks, one is tied, one is no float."""
    folder, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    paths = {}
    for name in NAMES:
        embedding = rng.normal(size=(40, 16)).astype(ml_dtypes.bfloat16)
        params = {
            "embed": embedding,
            "head": embedding,
            "layers.w": rng.normal(size=(3, 200, 1001)).astype(np.float32),
            "positions": np.arange(9),
        }
        paths[name] = jm.save_checkpoint(folder / name, params)
    return paths.pop("base"), paths


@pytest.fixture
def merged(models: tuple[Path, dict[str, Path]], tmp_path: Path) -> Path:
    return merge(models, tmp_path / "merged")


def merge(models: tuple[Path, dict[str, Path]], out: Path, method: jm.Method = METHOD, **options: Any) -> Path:
    return jm.merge_checkpoint(method, models[1], base=models[0], out=out, progress=False, **options).path


def reference_hashes(x: np.ndarray, block: int) -> tuple[str, ...]:
    data = x.tobytes()
    return tuple(hashlib.sha256(data[at : at + block]).hexdigest() for at in range(0, len(data), block))


def flip(folder: Path, tensor: str, at: int) -> None:
    """Flips one bit of a byte of a tensor."""
    with jm.open_checkpoint(folder) as checkpoint:
        offset = checkpoint.params[tensor].offset + at
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 16]))


@given(
    size=st.integers(0, 3000),
    block=st.sampled_from([64, 256, 1024]),
    cuts=st.lists(st.integers(0, 3000), max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_hashes_are_those_of_the_bytes_however_they_are_written(size: int, block: int, cuts: list, order: Any) -> None:
    x = np.arange(size, dtype=np.uint16)
    hashes = BlockHashes([TensorSpec("x", x.dtype, x.shape)], block)
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    pieces = list(zip(edges, edges[1:], strict=False))
    order.shuffle(pieces)
    for start, stop in pieces:
        hashes.add("x", start, x[start:stop])
    found = hashes.tensors()["x"]
    assert found.blocks == reference_hashes(x, block)
    assert found.sha256 == hashlib.sha256(b"".join(map(bytes.fromhex, found.blocks))).hexdigest()
    assert not hashes._waiting


def test_manifest_tells_what_was_written_and_what_went_in(models: tuple[Path, dict[str, Path]], merged: Path) -> None:
    told = load_manifest(merged)
    with jm.open_checkpoint(merged) as checkpoint:
        for name, tensor in told.output.tensors.items():
            array = np.asarray(checkpoint.params[name])
            assert (tensor.dtype, tensor.shape) == (array.dtype.name, array.shape)
            assert tensor.blocks == reference_hashes(array, 1 << 20)
    assert len(told.output.tensors["layers.w"].blocks) == 3
    assert told.output.tied == {"head": "embed"}
    assert told.merge.base is not None and told.merge.base.path == str(models[0])
    assert [(model.name, model.path) for model in told.merge.experts] == [(n, str(p)) for n, p in models[1].items()]
    assert told.merge.method == repr(METHOD)
    assert told.run.bytes_read.keys() == {"the base", "a", "b"}
    assert verify_checkpoint(merged) == ()


def test_id_is_that_of_the_merge(models: tuple[Path, dict[str, Path]], merged: Path, tmp_path: Path) -> None:
    same = load_manifest(merged).id
    assert load_manifest(merge(models, tmp_path / "again", recipe="method: …")).id == same
    assert jm.plan_merge(METHOD, models[1], base=models[0], memory_budget="3MiB").chunk * 4 < 1 << 20
    assert load_manifest(merge(models, tmp_path / "small", memory_budget="3MiB")).id == same
    method = jm.task_arithmetic(0.3, weights={"a": 1.0, "b": np.nextafter(0.5, 1)})
    other = load_manifest(merge(models, tmp_path / "other", method))
    assert other.id != same
    assert other.output == load_manifest(merged).output, "so small a change is lost in float32"


def test_a_flipped_bit_is_found_and_named(merged: Path) -> None:
    flip(merged, "layers.w", (2 << 20) + 5)
    (fault,) = verify_checkpoint(merged)
    assert (fault.tensor, fault.blocks) == ("layers.w", (2,))
    assert "block 2 of 3 (bytes 2097152 to 2402399 of the tensor)" in str(fault)
    flip(merged, "layers.w", (2 << 20) + 5)
    assert verify_checkpoint(merged) == ()


def test_a_tied_tensor_is_named_by_both_names(merged: Path) -> None:
    flip(merged, "embed", 0)
    assert [fault.tensor for fault in verify_checkpoint(merged)] == ["embed", "head"]


def test_missing_added_and_reshaped_tensors_are_named(merged: Path) -> None:
    with jm.open_checkpoint(merged) as checkpoint:
        params = {name: np.asarray(x) for name, x in checkpoint.params.items()}
    manifest = (merged / MANIFEST).read_bytes()
    params |= {"new": np.ones(2), "layers.w": params["layers.w"].reshape(600, 1001)}
    del params["positions"]
    jm.save_checkpoint(merged, params, side_files={MANIFEST: manifest}, overwrite=True)
    found = {fault.tensor: fault.problem for fault in verify_checkpoint(merged)}
    assert found == {
        "layers.w": "is float32[600, 1001], and float32[3, 200, 1001] was written",
        "new": "was added: the manifest does not know it",
        "positions": "is missing",
    }


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_layer_stacked_tensors_and_orbax_folders(
    models: tuple[Path, dict[str, Path]], format: str, tmp_path: Path
) -> None:
    rules = Rules(stacked=("layers.w",))  # layers end within a hashed block
    out = merge(models, tmp_path / "merged", format=format, rules=rules)
    assert verify_checkpoint(out) == ()
    if format == "orbax":
        import orbax.checkpoint.experimental.v1 as ocp

        assert ocp.load(str(out)).keys() == {"embed", "head", "layers.w", "positions"}
    report, differing = replay(str(out), str(tmp_path / "again"), progress=False)
    assert not differing and load_manifest(report.path).id == load_manifest(out).id


def test_only_merged_folders_have_a_manifest_and_it_is_not_handed_on(
    models: tuple[Path, dict[str, Path]], merged: Path, tmp_path: Path
) -> None:
    merge(models, tmp_path / "one.safetensors")
    assert not (merge(models, tmp_path / "none", manifest=False) / MANIFEST).exists()
    jm.average_checkpoints([merged], out=tmp_path / "average", progress=False)
    assert not (tmp_path / "average" / MANIFEST).exists(), "it would be that of its input"
    for path, error in ((tmp_path / "none", "no manifest"), (tmp_path / "one.safetensors", "no manifest")):
        with pytest.raises(jm.CheckpointError, match=error):
            verify_checkpoint(path)


def test_replay_gives_the_same_bytes_and_id(models: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    method = jm.masked(jm.dare(0.5), "layers.*", otherwise=jm.linear({"a": 1, "b": jnp.float32(0.1)}))
    out = merge(models, tmp_path / "out", method, key=jax.random.key(7), dtype="float16", max_shard_bytes="1MiB")
    report, differing = replay(str(out), str(tmp_path / "again"), progress=False)
    assert not differing and load_manifest(report.path).id == load_manifest(out).id
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (report.path / file.name).read_bytes()


@pytest.mark.parametrize("where", ["memory", "file"])
def test_statistics_are_replayed(models: tuple[Path, dict[str, Path]], tmp_path: Path, where: str) -> None:
    given: dict[str, Any] = {}
    for seed, (name, path) in enumerate(models[1].items()):
        rng = np.random.default_rng(seed)
        with jm.open_checkpoint(path) as checkpoint:
            shapes = {key: x.shape for key, x in jm.named_leaves(checkpoint.params).items()}
        given[name] = {key: rng.random(shape).astype(np.float32) for key, shape in shapes.items()}
        if where == "file":
            saved = jm.save_checkpoint(tmp_path / "statistics" / name, given[name])
            given[name] = jm.open_checkpoint(saved).params
    out = merge(models, tmp_path / "out", jm.fisher_merge(given), allow_nonfinite=True)
    if where == "memory":
        with pytest.raises(jm.RecipeError, match="statistics that are in memory"):
            replay(str(out), str(tmp_path / "again"))
        return
    report, differing = replay(str(out), str(tmp_path / "again"), progress=False)
    assert not differing and load_manifest(report.path).id == load_manifest(out).id
    # What is merged again knows the statistics by their files.
    again = merge(models, tmp_path / "third", jm.fisher_merge(given), allow_nonfinite=True, reuse=out)
    told = load_manifest(again).run.copied
    assert told is not None and "embed" in told.tensors
    flip(tmp_path / "statistics" / "a", "embed", 0)
    with pytest.raises(jm.CheckpointError, match="the statistics in .* are not as they were"):
        replay(str(out), str(tmp_path / "fourth"))


def test_replay_refuses_inputs_that_have_changed(models: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    a = shutil.copytree(models[1]["a"], tmp_path / "a")
    out = jm.merge_checkpoint(jm.linear(), {"one": a}, out=tmp_path / "out", progress=False).path
    flip(a, "embed", 0)
    with pytest.raises(jm.CheckpointError, match=r"one \(.*/a\) is not as it was"):
        replay(str(out), str(tmp_path / "again"))
    shutil.rmtree(a)
    with pytest.raises(jm.CheckpointError, match="no checkpoint"):
        replay(str(out), str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_what_a_server_does_not_tag_cannot_be_replayed(
    models: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The state of an opened file, as that of one whose server gives neither tag nor generation.
    monkeypatch.setattr("jaxmerge.streaming.fingerprint._state", fingerprint_module._unknown)
    out = jm.merge_checkpoint(jm.linear(), {"a": models[1]["a"]}, out=tmp_path / "out", progress=False).path
    assert [model.fingerprint for model in load_manifest(out).merge.experts] == [None]
    with pytest.raises(jm.CheckpointError, match="does not tell whether files have changed"):
        replay(str(out), str(tmp_path / "again"))


def test_replay_tells_what_it_cannot_build(models: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    by_function = jm.masked(jm.linear(), lambda info: info.name == "embed")
    with pytest.raises(jm.RecipeError, match="holds a function"):
        replay(str(merge(models, tmp_path / "out", by_function)), str(tmp_path / "again"))
    tree = {"embed": np.ones(3, np.float32)}
    jm.merge_checkpoint(jm.linear(), {"in memory": tree}, out=tmp_path / "tree", progress=False)
    with pytest.raises(jm.RecipeError, match="in memory was given in memory"):
        replay(str(tmp_path / "tree"), str(tmp_path / "again"))
    with pytest.raises(jm.RecipeError, match="into a folder"):
        replay(str(tmp_path / "tree"), str(tmp_path / "again.safetensors"))
    assert not (tmp_path / "again").exists()


def test_merge_within_a_budget_keeps_its_plan(models: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    path = str(tmp_path / "models.catalog")
    with open_catalog(path) as catalog:
        catalog.add(models[0], models[1], block_bytes="64KiB", progress=False)
    plan = jm.plan_merge(METHOD, models[1], base=models[0], io_budget="30%", catalog=path).io_plan
    out = merge(models, tmp_path / "out", io_budget=plan, catalog=path)
    told = load_manifest(out)
    assert plan is not None and told.io_plan is not None
    assert told.merge.plan == plan.digest == told.io_plan.digest
    assert told.io_plan.explain("a", "layers.w", 3) == plan.explain("a", "layers.w", 3)
    assert {name: told.run.bytes_read[name] for name in "ab"} == plan.planned
    report, differing = replay(str(out), str(tmp_path / "again"), catalog=path, progress=False)
    assert not differing and load_manifest(report.path).id == told.id
    assert report.bytes_analysed == {}


EXAMPLES = {name: entry._example() for name, entry in jm.list_methods().items()}
METHODS = {name: method for name, method in EXAMPLES.items() if method is not None} | {
    "depth": jm.task_arithmetic(jm.by_depth([0.1, np.inf], outside=-0.0)),
    "arrays": jm.linear(jnp.asarray([0.1, 0.2], jnp.bfloat16)),
    "numpy": jm.linear([np.float32(0.1), np.float64(0.1)]),
    "chain": jm.chain(jm.trim({".*": 0.2}), jm.elect_sign(), jm.disjoint_mean(), jm.scale(1e-300)),
    "masked": jm.masked(jm.ties(0.2), ["a", "b"], otherwise=jm.linear({"a": 1, "b": 2})),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_methods_become_data_and_come_back(method: jm.Method) -> None:
    data = json.loads(json.dumps(method_as_data(method), allow_nan=False))
    found = method_from_data(data)
    assert repr(found) == repr(method)
    assert jax.tree.structure(found) == jax.tree.structure(method)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(method), strict=True):
        assert type(x) is type(y) and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def damaged(told: dict, change: Any) -> str:
    """A manifest that was changed and given the id that it then has."""
    change(told)
    told["id"] = digest(told["manifest"])
    return json.dumps(told)


def put(*keys: Any, value: Any) -> Any:
    def change(told: Any) -> None:
        for key in keys[:-1]:
            told = told[key]
        told[keys[-1]] = value

    return change


CHANGES = {
    "version": put("manifest", "version", value=2),
    "no merge": put("manifest", "merge", value=[]),
    "experts": put("manifest", "merge", "experts", value={"a": 1}),
    "rules": put("manifest", "merge", "rules", "layout", value="mine"),
    "dtype": put("manifest", "merge", "dtype", value="object"),
    "plan": put("manifest", "merge", "plan", value="0" * 64),
    "shape": put("manifest", "output", "tensors", "embed", "shape", value=[-1, 2]),
    "huge shape": put("manifest", "output", "tensors", "embed", "shape", value=[1 << 62, 1 << 62]),
    "text shape": put("manifest", "output", "tensors", "embed", "shape", value="many"),
    "hash": put("manifest", "output", "tensors", "embed", "sha256", value="0" * 64),
    "no hex": put("manifest", "output", "tensors", "embed", "blocks", value=["é"]),
    "block": put("manifest", "output", "block_bytes", value=0),
    "tied": put("manifest", "output", "tied", value={"x": "y"}),
    "run": put("run", value=None),
    "io_plan": put("io_plan", value={"names": [], "blocks": {"x": [1 << 62, 1]}}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_hostile_manifests_are_refused(change: Any, merged: Path) -> None:
    (merged / MANIFEST).write_text(damaged(json.loads((merged / MANIFEST).read_text()), change))
    with pytest.raises(jm.CheckpointError, match=MANIFEST):
        verify_checkpoint(merged)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[]", b"1" * 5000, b"[" * 100_000, b'{"manifest": NaN}'])
def test_what_is_no_manifest_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(jm.CheckpointError, match=MANIFEST):
        load_manifest(tmp_path)


def test_a_manifest_that_was_changed_or_is_huge_is_refused(merged: Path) -> None:
    text = (merged / MANIFEST).read_text()
    (merged / MANIFEST).write_text(text.replace('"key":null', '"key":1'))
    with pytest.raises(jm.CheckpointError, match="changed since it was written"):
        load_manifest(merged)
    with (merged / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(jm.CheckpointError, match="too large"):
        load_manifest(merged)


@pytest.mark.parametrize(
    "data",
    [
        None,
        1.0,
        {"is": "Linear"},
        {"is": "Linear", "fields": {"weights": 1.0}},
        {"is": "Linear", "fields": {"weights": "x", "normalize": True}},
        {"is": "Path", "fields": {}},
        {"is": "numpy", "dtype": "object", "shape": [1], "bytes": "00" * 8},
        {"is": "Weigh", "fields": {"weights": 1.0}},
    ],
)
def test_what_is_no_method_is_refused(data: Any) -> None:
    with pytest.raises(jm.CheckpointError, match="cannot be built"):
        method_from_data(data)


def test_nothing_is_left_when_the_manifest_cannot_be_written(
    models: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(jm.CheckpointError, match="the disk is full"):
        merge(models, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
