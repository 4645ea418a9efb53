import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxmerge.checkpoints.base import materialize, open_checkpoint
from jaxmerge.checkpoints.writer import save_checkpoint
from jaxmerge.trees.lazy import ArrayTensor, StackedTensor

FORMATS = [("m.safetensors", None), ("folder", None), ("m.npz", None), ("orbax", "orbax")]


@pytest.mark.parametrize("path, format", FORMATS, ids=[path for path, _ in FORMATS])
def test_a_nested_tree_keeps_its_names_and_tied_tensors_stay_one(tmp_path, path, format):
    embedding = jnp.arange(6.0).reshape(3, 2)
    tree = {"embed": {"weight": embedding}, "blocks": [{"kernel": np.ones((2, 2))}], "head": {"weight": embedding}}
    save_checkpoint(tmp_path / path, tree, format=format, metadata={"note": "x"})
    checkpoint = open_checkpoint(tmp_path / path)
    flat = {"/".join(k.key for k in keys): leaf for keys, leaf in jax.tree.leaves_with_path(checkpoint.params)}
    assert set(flat) == {"embed/weight", "blocks/0/kernel", "head/weight"}
    assert flat["embed/weight"] is flat["head/weight"]
    assert checkpoint.aliases == {"head/weight": "embed/weight"}
    assert "head/weight" not in checkpoint.metadata
    assert checkpoint.metadata["note"] == "x"
    assert checkpoint.nbytes == 24 + 32, "one copy"

    again = save_checkpoint(tmp_path / f"again-{path}", checkpoint.params, format=format, metadata=checkpoint.metadata)
    assert open_checkpoint(again).aliases == checkpoint.aliases
    loaded = checkpoint.load()
    leaves = dict(zip(flat, jax.tree.leaves(loaded), strict=True))
    assert leaves["embed/weight"] is leaves["head/weight"]
    np.testing.assert_array_equal(leaves["embed/weight"], embedding)


def test_equal_numbers_are_not_tied(tmp_path):
    path = save_checkpoint(tmp_path / "m.safetensors", {"a": 1.0, "b": 1.0, "c": 1.0})
    assert open_checkpoint(path).aliases == {}


def test_weights_tied_by_the_safetensors_convention_are_found(tmp_path):
    import safetensors.numpy

    metadata = {"format": "pt", "lm_head.weight": "embed.weight", "lost": "absent"}
    safetensors.numpy.save_file({"embed.weight": np.ones((3, 2))}, tmp_path / "m.safetensors", metadata=metadata)
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert checkpoint.params["lm_head.weight"] is checkpoint.params["embed.weight"]
    assert checkpoint.metadata == {"format": "pt", "lost": "absent"}


def test_weights_are_tied_across_shards(tmp_path):
    a, b = np.ones(4), np.zeros(4)
    path = save_checkpoint(tmp_path / "model", {"a": a, "b": b, "c": a}, max_shard_bytes=32)
    assert len(list(path.glob("*.safetensors"))) == 2
    assert open_checkpoint(path).aliases == {"c": "a"}


def test_side_files_go_from_folder_to_folder(tmp_path):
    config = json.dumps({"model_type": "llama"}).encode()
    first = save_checkpoint(tmp_path / "first", {"w": np.ones(2)}, side_files={"config.json": config, "LICENSE": b"x"})
    for name in ("pytorch_model.bin", "model.safetensors.index.json", ".hidden", "old.gguf"):
        (first / name).write_bytes(b"weights")
    (first / "subfolder").mkdir()
    checkpoint = open_checkpoint(first)
    assert checkpoint.side_files == {"config.json": first / "config.json", "LICENSE": first / "LICENSE"}
    second = save_checkpoint(tmp_path / "second", checkpoint.params, side_files=checkpoint.side_files)
    assert sorted(file.name for file in second.iterdir()) == ["LICENSE", "config.json", "model.safetensors"]
    assert (second / "config.json").read_bytes() == config
    assert open_checkpoint(first / "model.safetensors").side_files == {}


def test_a_checkpoint_describes_itself(tmp_path):
    path = save_checkpoint(tmp_path / "m.safetensors", {"a": np.ones((512, 2)), "b": np.ones(3, np.int8)})
    checkpoint = open_checkpoint(path)
    assert repr(checkpoint) == f"Checkpoint({path}: safetensors, 2 tensors, 8.003 KiB)"
    assert repr(checkpoint.params["a"]) == "StoredTensor(float64[512, 2], m.safetensors: a)"


def test_lazy_leaves_of_any_kind_are_saved_by_pieces(tmp_path, rng):
    array = rng.normal(size=(3000, 700))  # 16 MiB: several pieces
    first = open_checkpoint(save_checkpoint(tmp_path / "a.safetensors", {"w": array})).params["w"]
    derived = {
        "cast": first.astype(jnp.bfloat16),
        "transposed": first.window(slice(0, 40)).T,
        "stacked": StackedTensor([first.window(1), first.window(5), ArrayTensor(array[2])]),
        "same": first,
    }
    got = open_checkpoint(save_checkpoint(tmp_path / "b.safetensors", derived)).params
    expected = {
        "cast": array.astype(jnp.bfloat16),
        "transposed": array[:40].T,
        "stacked": array[[1, 5, 2]],
        "same": array,
    }
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_array_equal(got[name][...], value)


def test_an_nnx_state_is_saved_under_the_names_of_its_pure_dict(tmp_path):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    path = save_checkpoint(tmp_path / "m.safetensors", nnx.state(model, nnx.Param))
    params = open_checkpoint(path).params
    assert params.keys() == {"kernel", "bias"}
    np.testing.assert_array_equal(params["kernel"][...], model.kernel.get_value())


# ---- JAX arrays from lazy tensors


def test_each_device_reads_its_own_part_and_copies_share_one_read(tmp_path):
    array = np.arange(64, dtype=np.float32).reshape(8, 8)
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "m.safetensors", {"w": array, "v": array + 1}))
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    split = NamedSharding(mesh, PartitionSpec("x", None))
    loaded = checkpoint.load({"w": split, "v": NamedSharding(mesh, PartitionSpec())})
    assert loaded["w"].sharding == split
    np.testing.assert_array_equal(loaded["w"], array)
    np.testing.assert_array_equal(loaded["v"], array + 1)
    assert checkpoint.bytes_read == 2 * array.nbytes
    assert jax.tree.leaves(checkpoint.load(split))[0].sharding == split


def test_arrays_in_a_tree_stay_and_lazy_tensors_are_read():
    kept = jnp.ones(3)
    result = materialize({"a": kept, "b": ArrayTensor(np.arange(4))})
    assert result["a"] is kept
    assert isinstance(result["b"], jax.Array)


@pytest.mark.parametrize("path, format", FORMATS, ids=[path for path, _ in FORMATS])
def test_loaded_arrays_do_not_change_when_more_is_read(tmp_path, path, format):
    # JAX on the CPU uses aligned NumPy memory in place: were a buffer read into again, earlier arrays would change.
    arrays = {f"t{i}": np.full((256, 256), i, np.float32) for i in range(6)}
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / path, arrays, format=format))
    rounds = [checkpoint.load() for _ in range(3)]
    for loaded in rounds:
        for name, array in arrays.items():
            np.testing.assert_array_equal(loaded[name], array)
            np.testing.assert_array_equal(jax.jit(lambda x: x * 2)(loaded[name]), array * 2)


def test_a_buffer_that_is_reused_for_reading_needs_the_result_first(tmp_path):
    # The pattern of a streaming engine: one buffer, refilled as soon as the result of the last round was waited for.
    arrays = {f"t{i}": np.full(1 << 16, i, np.float32) for i in range(8)}
    params = open_checkpoint(save_checkpoint(tmp_path / "m.safetensors", arrays)).params
    memory = np.empty((1 << 16) + 16, np.float32)
    shift = -memory.ctypes.data % 64 // 4
    buffer = memory[shift : shift + (1 << 16)]  # aligned, so that JAX does use it in place
    double = jax.jit(lambda x: x * 2)
    results = []
    for name in arrays:
        params[name].read_flat(0, buffer)
        results.append(double(buffer).block_until_ready())
    for result, array in zip(results, arrays.values(), strict=True):
        np.testing.assert_array_equal(result, array * 2)
