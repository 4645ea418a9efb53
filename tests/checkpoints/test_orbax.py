import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp_v0
import pytest
from orbax.checkpoint import v1 as ocp

from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.checkpoints.writer import save_checkpoint
from jaxmerge.errors import CheckpointError
from jaxmerge.trees.paths import named_leaves


@pytest.fixture
def tree(rng):
    return {
        "params": {
            "layers": [{"kernel": jnp.asarray(rng.normal(size=(9, 4)), jnp.bfloat16)} for _ in range(2)],
            "norm": {"scale": rng.normal(size=5).astype(np.float32), "float8": jnp.ones(3, jnp.float8_e4m3fn)},
        },
        "step": np.asarray(7, np.int32),
        "empty": {},
    }


def save_v1(path, tree):
    ocp.save(path, tree)


def save_v0(path, tree):
    with ocp_v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_v0_plain(path, tree):
    handler = ocp_v0.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp_v0.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, tree)


@pytest.mark.parametrize("save", [save_v1, save_v0, save_v0_plain])
def test_we_read_what_orbax_writes(tmp_path, tree, save):
    save(tmp_path / "ckpt", tree)
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    assert checkpoint.format == "orbax"
    assert jax.tree.structure(checkpoint.params) == jax.tree.structure(tree)
    got, expected = named_leaves(checkpoint.params), named_leaves(tree)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name][...], array)
    kernel = expected["params/layers/1/kernel"]
    np.testing.assert_array_equal(got["params/layers/1/kernel"][2:5, 1:3], kernel[2:5, 1:3])


def test_orbax_reads_what_we_write(tmp_path, tree):
    del tree["empty"], tree["params"]["layers"]
    tree["many_chunks"] = np.arange(3 * (1 << 20), dtype=np.float32).reshape(-1, 1024)  # 12 MiB, and not a round number
    tree["flag"] = np.array([True, False])
    path = save_checkpoint(tmp_path / "ckpt", tree, format="orbax", metadata={"note": "größer"})
    loaded = ocp.load(str(path))
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    assert ocp.metadata(str(path)).custom_metadata == {"note": "größer"}

    mesh = jax.make_mesh((4,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    abstract = jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)
    abstract["many_chunks"] = jax.ShapeDtypeStruct((3072, 1024), jnp.bfloat16, sharding=sharding)
    sharded = ocp.load(str(path), abstract)["many_chunks"]
    assert sharded.sharding == sharding
    np.testing.assert_array_equal(sharded, tree["many_chunks"].astype(ml_dtypes.bfloat16))


def test_all_dtypes_come_back(tmp_path, tensors):
    path = save_checkpoint(tmp_path / "ckpt", tensors, format="orbax")
    params = open_checkpoint(path).params
    assert params.keys() == tensors.keys()
    for name, array in tensors.items():
        assert params[name].dtype == array.dtype
        np.testing.assert_array_equal(params[name][...], array)
        np.testing.assert_array_equal(ocp.load(str(path))[name], array)


def test_a_slice_reads_the_chunks_it_touches(tmp_path):
    array = np.arange(5 << 20, dtype=np.float32).reshape(-1, 1024)  # 20 MiB in five chunks of 1024 rows
    path = save_checkpoint(tmp_path / "ckpt", {"w": array}, format="orbax")
    checkpoint = open_checkpoint(path)
    assert checkpoint.bytes_read == 0
    np.testing.assert_array_equal(checkpoint.params["w"][1000:1030, 5:9], array[1000:1030, 5:9])
    assert checkpoint.bytes_read == 8 << 20
    out = np.empty(1024 * 1024, np.float32)
    checkpoint.params["w"].read_flat(2048 * 1024, out)
    np.testing.assert_array_equal(out, array[2048:3072].reshape(-1))
    assert checkpoint.bytes_read == 12 << 20


def test_one_large_chunk_that_is_read_by_parts_is_decoded_once(tmp_path):
    array = np.arange(100_000, dtype=np.float32).reshape(100, 1000)
    ocp.save(tmp_path / "ckpt", {"w": array, "v": array + 1})
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    out = np.empty(700, np.float32)
    for start in range(0, 99_400, 700):
        for name in ("w", "v"):
            checkpoint.params[name].read_flat(start, out)
            np.testing.assert_array_equal(out, (array + (name == "v")).reshape(-1)[start : start + 700])
    assert checkpoint.bytes_read == 2 * array.nbytes


def test_tied_tensors_are_one_copy_that_orbax_sees_twice(tmp_path):
    embedding = np.arange(6.0).reshape(3, 2)
    path = save_checkpoint(tmp_path / "ckpt", {"embed": embedding, "head": {"kernel": embedding}}, format="orbax")
    assert os.path.samefile(path / "state/embed/c/0/0", path / "state/head.kernel/c/0/0")
    loaded = ocp.load(str(path))
    np.testing.assert_array_equal(loaded["embed"], embedding)
    np.testing.assert_array_equal(loaded["head"]["kernel"], embedding)
    checkpoint = open_checkpoint(path)
    assert checkpoint.params["embed"] is checkpoint.params["head"]["kernel"]
    assert checkpoint.aliases == {"head/kernel": "embed"}
    assert checkpoint.nbytes == embedding.nbytes


@pytest.mark.parametrize(
    "params, message",
    [
        ({"w": np.zeros((0, 3))}, "cannot hold w, which has no entries"),
        ({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, "where it stores another tensor"),
        ({"..": np.ones(1)}, "name '..'"),
        ({"a": {"../..": np.ones(1)}}, "name 'a/../..'"),
        ({"_METADATA": np.ones(1)}, "name '_METADATA'"),
    ],
    ids=range(5),
)
def test_what_orbax_cannot_hold_is_an_error(tmp_path, params, message):
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "ckpt", params, format="orbax")
    assert not list(tmp_path.iterdir())


def test_a_missing_data_file_is_an_error_and_no_zeros(tmp_path):
    ocp.save(tmp_path / "theirs", {"w": np.arange(1, 50_000, dtype=np.float32)})
    save_checkpoint(tmp_path / "ours", {"w": np.ones(5)}, format="orbax")
    for name, data in [("theirs", "state/ocdbt.process_0/d"), ("ours", "state/w/c")]:
        shutil.rmtree(tmp_path / name / data)
        with pytest.raises(CheckpointError, match="cannot read"):
            open_checkpoint(tmp_path / name).params["w"][...]


def test_a_truncated_data_file_is_an_error(tmp_path):
    path = save_checkpoint(tmp_path / "ckpt", {"w": np.ones(5000)}, format="orbax")
    with open(path / "state/w/c/0", "r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match="cannot read ckpt: w"):
        open_checkpoint(path).params["w"][:3]


WRONG_DESCRIPTIONS = [
    (b"{", "no JSON"),
    (b"[]", "no JSON object"),
    (b"{}", "does not describe a tree"),
    (b'{"tree_metadata": []}', "does not describe a tree"),
    (b'{"tree_metadata": {"a": {}}}', "does not describe a tree"),
    (b'{"tree_metadata": {"a": {"key_metadata": [{"key": "x", "key_type": 1}]}}}', "does not describe a tree"),
]


@pytest.mark.parametrize("content, message", WRONG_DESCRIPTIONS, ids=range(len(WRONG_DESCRIPTIONS)))
def test_a_wrong_description_is_an_error(tmp_path, content, message):
    path = save_checkpoint(tmp_path / "ckpt", {"w": np.ones(5)}, format="orbax")
    (path / "state/_METADATA").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"ckpt.*{message}"):
        open_checkpoint(path)


def test_an_array_that_is_described_but_absent_is_an_error(tmp_path):
    path = save_checkpoint(tmp_path / "ckpt", {"w": np.ones(5), "v": np.ones(5)}, format="orbax")
    shutil.rmtree(path / "state/v")
    with pytest.raises(CheckpointError, match="cannot read .*ckpt: v"):
        open_checkpoint(path)


def test_two_tensors_with_one_name_are_an_error(tmp_path):
    ocp.save(tmp_path / "ckpt", {"a": {"b": np.ones(2)}, "a/b": np.ones(2)})
    with pytest.raises(CheckpointError, match="two tensors named a/b"):
        open_checkpoint(tmp_path / "ckpt")


def test_a_tensor_and_a_subtree_at_one_place_is_an_error(tmp_path):
    path = save_checkpoint(tmp_path / "ckpt", {"w": np.ones(5)}, format="orbax")
    description = json.loads((path / "state/_METADATA").read_text())
    entry = description["tree_metadata"]["('w',)"]
    inner = {**entry, "key_metadata": [*entry["key_metadata"], {"key": "x", "key_type": 2}]}
    inner["value_metadata"] = {"value_type": "Dict", "skip_deserialize": True}
    description["tree_metadata"]["('w', 'x')"] = inner
    (path / "state/_METADATA").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="a tensor and a subtree at one place"):
        open_checkpoint(path)
