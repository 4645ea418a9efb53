import json
import os
import re
import stat
import struct

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings

from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.checkpoints.safetensors import open_file
from jaxmerge.checkpoints.stores import ByteCounter, FileSource
from jaxmerge.checkpoints.writer import save_checkpoint
from jaxmerge.errors import CheckpointError


def written(path, header: dict | bytes, data: bytes = b"", length: int | None = None):
    """A file with any header, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: object = "F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# ---- interchange with the safetensors package


def test_the_package_reads_what_we_write(tmp_path, tensors):
    save_checkpoint(tmp_path / "m.safetensors", tensors, metadata={"format": "pt", "note": "größer"})
    with safetensors.safe_open(tmp_path / "m.safetensors", "numpy") as theirs:
        assert theirs.metadata() == {"format": "pt", "note": "größer"}
        assert set(theirs.keys()) == set(tensors)
        for name, array in tensors.items():
            if not array.dtype.name.startswith("float8"):  # the package cannot read what it writes of these
                got = theirs.get_tensor(name)
                assert got.dtype == array.dtype
                np.testing.assert_array_equal(got, array)


def test_we_read_what_the_package_writes(tmp_path, tensors):
    safetensors.numpy.save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "np"})
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert checkpoint.metadata == {"format": "np"}
    assert checkpoint.params.keys() == tensors.keys()
    for name, array in tensors.items():
        assert checkpoint.params[name].dtype == array.dtype
        np.testing.assert_array_equal(checkpoint.params[name][...], array)


def test_float8_bytes_are_those_that_the_package_writes(tmp_path, tensors):
    float8 = {name: array for name, array in tensors.items() if array.dtype.name.startswith("float8")}
    safetensors.numpy.save_file(float8, tmp_path / "theirs.safetensors")
    save_checkpoint(tmp_path / "ours.safetensors", float8)
    theirs, ours = (open_checkpoint(tmp_path / f"{who}.safetensors").params for who in ("theirs", "ours"))
    assert len(float8) == 2
    for name in float8:
        assert theirs[name].dtype == ours[name].dtype == float8[name].dtype
        assert theirs[name][...].tobytes() == ours[name][...].tobytes() == float8[name].tobytes()


# ---- the file itself


def test_data_starts_at_a_page_and_every_tensor_at_a_multiple_of_its_dtype(tmp_path, tensors):
    path = save_checkpoint(tmp_path / "m.safetensors", tensors)
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert (8 + length) % 4096 == 0
    for tensor in open_checkpoint(path).params.values():
        assert tensor.offset % tensor.dtype.itemsize == 0


def test_file_modes_obey_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = save_checkpoint(tmp_path / "model", {"w": np.ones(3)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((path / "model.safetensors").stat().st_mode) == 0o640
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_opening_reads_the_header_and_nothing_else(tmp_path):
    size = 1 << 40  # a sparse file of a terabyte: whoever reads the data does not come back
    path = written(tmp_path / "m.safetensors", {"w": entry("U8", [size], [0, size])})
    os.truncate(path, path.stat().st_size + size)

    def bytes_read_by_this_process():
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    before = bytes_read_by_this_process()
    checkpoint = open_checkpoint(path)
    assert bytes_read_by_this_process() - before < 10_000
    assert checkpoint.bytes_read == 0
    assert checkpoint.params["w"].nbytes == size
    np.testing.assert_array_equal(checkpoint.params["w"][size - 5 :], np.zeros(5, np.uint8))
    assert checkpoint.bytes_read == 5


# ---- Hugging Face folders


def test_shards_have_an_index_that_the_package_can_follow(tmp_path, tensors):
    path = save_checkpoint(tmp_path / "model", tensors, max_shard_bytes=300, metadata={"made_by": "test"})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    for name, array in tensors.items():
        with safetensors.safe_open(path / index["weight_map"][name], "numpy") as shard:
            assert name in shard.keys()  # noqa: SIM118
            assert shard.metadata() == {"format": "pt", "made_by": "test"}
            if not array.dtype.name.startswith("float8"):
                np.testing.assert_array_equal(shard.get_tensor(name), array)
    sizes = dict.fromkeys(files, 0)
    for name, file in index["weight_map"].items():
        sizes[file] += tensors[name].nbytes
    assert max(sizes.values()) <= 300

    checkpoint = open_checkpoint(path)
    assert checkpoint.metadata == {"format": "pt", "made_by": "test"}
    assert list(checkpoint.params) == sorted(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.params[name][...], array)


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    arrays = {"a": np.ones(2, np.int8), "b": np.ones(50, np.int8), "c": np.ones(3, np.int8), "d": np.ones(4, np.int8)}
    path = save_checkpoint(tmp_path / "model", arrays, max_shard_bytes=8)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert [file[6:11] for file in index["weight_map"].values()] == ["00001", "00002", "00003", "00003"]


def test_a_model_within_one_shard_needs_no_index(tmp_path, tensors):
    path = save_checkpoint(tmp_path / "model", tensors, max_shard_bytes=1 << 20)
    assert [file.name for file in path.iterdir()] == ["model.safetensors"]


def test_metadata_of_the_index_is_kept_but_for_the_sizes(tmp_path):
    path = save_checkpoint(tmp_path / "model", {"a": np.ones(4), "b": np.ones(4)}, max_shard_bytes=32)
    index_path = path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["metadata"].update(total_parameters=8, note="kept", nested={"x": 1})
    index_path.write_text(json.dumps(index))
    assert open_checkpoint(path).metadata == {"format": "pt", "note": "kept", "nested": '{"x": 1}'}


@pytest.fixture
def sharded(tmp_path):
    path = save_checkpoint(tmp_path / "model", {"a": np.ones(4), "b": np.ones(4)}, max_shard_bytes=32)

    def change(update):
        index_path = path / "model.safetensors.index.json"
        index = json.loads(index_path.read_text())
        update(index)
        index_path.write_text(json.dumps(index))
        return path

    return change


WRONG_INDICES = [
    (lambda index: index["weight_map"].update(b="model-00009-of-00002.safetensors"), "model-00009.* is absent"),
    (lambda index: index["weight_map"].update(c="model-00001-of-00002.safetensors"), "c is not in model-00001"),
    (lambda index: index["weight_map"].update(b="../secret.safetensors"), r"'../secret.* no name of a file"),
    (lambda index: index["weight_map"].update(b="/etc/passwd"), "'/etc/passwd' is no name of a file"),
    (lambda index: index["weight_map"].update(b=".."), r"'\.\.' is no name of a file"),
    (lambda index: index["weight_map"].update(b=7), "weight_map must map"),
    (lambda index: index.pop("weight_map"), "weight_map must map"),
    (lambda index: index.update(metadata=[1]), "metadata must be"),
]


@pytest.mark.parametrize("update, message", WRONG_INDICES, ids=range(len(WRONG_INDICES)))
def test_a_wrong_index_is_an_error(sharded, update, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded(update))


def test_an_index_that_is_no_json_or_names_a_tensor_twice_is_an_error(sharded):
    path = sharded(lambda index: None)
    index_path = path / "model.safetensors.index.json"
    index_path.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(CheckpointError, match="'a' twice"):
        open_checkpoint(path)
    index_path.write_text('{"weight_map": ')
    with pytest.raises(CheckpointError, match="no JSON"):
        open_checkpoint(path)


def test_shards_without_an_index_are_an_error_and_a_lone_file_is_not(sharded):
    path = sharded(lambda index: None)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="2 .safetensors files and 0 indices"):
        open_checkpoint(path)
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 .safetensors files and 0 indices"):  # half of a copy
        open_checkpoint(path)
    (path / "model-00002-of-00002.safetensors").rename(path / "model-00001-of-00001.safetensors")
    assert list(open_checkpoint(path).params) == ["b"]


# ---- hostile files


WRONG_HEADERS = [
    ({"w": entry(offsets=[0, 4])}, "w is F32.* needs 8 bytes, but has bytes 0 to 4"),
    ({"w": entry(offsets=[0, 16], shape=[4])}, "m.safetensors: the header describes"),
    ({"w": entry(offsets=[8, 16])}, "w leaves a hole before it: it starts at byte 8 of the data, not at 0"),
    ({"w": entry(), "v": entry(offsets=[4, 12])}, "v overlaps the tensor before it"),
    ({"w": entry(), "v": entry()}, "overlaps the tensor before it"),
    ({"w": entry("F32", [1], [0, 4])}, "the header describes"),
    ({"w": entry(offsets=[8, 0])}, "w is F32"),
    ({"w": entry(offsets=[-8, 0])}, r"w has the data_offsets \[-8, 0\]"),
    ({"w": entry(offsets=[0, 8, 8])}, "w has the data_offsets"),
    ({"w": entry(offsets=[0.0, 8.0])}, "w has the data_offsets"),
    ({"w": entry(shape=[-2])}, r"w has the shape \[-2\]"),
    ({"w": entry(shape=[-1, -2])}, "w has the shape"),
    ({"w": entry(shape=[True, 2])}, "w has the shape"),
    ({"w": entry(shape=[2**70])}, "w has the shape"),
    ({"w": entry(shape=[2**62, 2**62])}, "w has the shape .* too large"),
    ({"w": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, "w has the shape .* too large"),
    ({"w": entry(shape=[1] * 40 + [2])}, "w has the shape"),
    ({"w": entry(dtype="F4")}, "w has the unknown dtype 'F4'"),
    ({"w": entry(dtype=["F32"])}, "w has the unknown dtype"),
    ({"w": {"dtype": "F32", "shape": [2]}}, "w needs dtype, shape and data_offsets"),
    ({"w": {**entry(), "pickle": "x"}}, "w needs dtype, shape and data_offsets"),
    ({"w": [1, 2]}, "w needs dtype, shape and data_offsets"),
    ({"__metadata__": {"a": 1}, "w": entry()}, "__metadata__ must map text to text"),
    ({"__metadata__": [], "w": entry()}, "__metadata__ must map text to text"),
    (b'{"w": {}, "w": {}}', "the name 'w' twice"),
    (b'{"w": {"dtype": "F32", "dtype": "F16"}}', "the name 'dtype' twice"),
    (b'{"w": ', "its header is no JSON"),
    (b"\xff\xfe{}", "its header is no JSON"),
    (b"[" * 100_000, "its header is no JSON"),
    (b"[]", "its header is no JSON object but a list"),
    (b'{"\\ud800": 1}', "its header is no JSON"),
    (b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', "no JSON"),
    (b"", "its header is no JSON"),
]


@pytest.mark.parametrize("header, message", WRONG_HEADERS, ids=range(len(WRONG_HEADERS)))
def test_a_wrong_header_is_an_error_that_names_file_and_tensor(tmp_path, header, message):
    path = written(tmp_path / "m.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "m.safetensors" in str(caught.value)


WRONG_LENGTHS = [
    (b"", "ends at byte 0"),
    (b"\x10\0\0\0", "ends at byte 4"),
    (struct.pack("<Q", 1 << 20) + b"{}", "ends at byte 10, but bytes up to"),
    (struct.pack("<Q", 100_000_001) + b"{}", "claims to be 100000001 bytes long, 100000000 is the limit"),
    (struct.pack("<Q", 2**64 - 1) + b"{}", "claims to be 18446744073709551615 bytes long"),
]


@pytest.mark.parametrize("content, message", WRONG_LENGTHS, ids=range(len(WRONG_LENGTHS)))
def test_a_header_length_beyond_the_file_is_an_error_and_allocates_nothing(tmp_path, content, message):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m.safetensors")


def test_data_that_is_cut_off_or_too_long_is_an_error(tmp_path):
    path = save_checkpoint(tmp_path / "m.safetensors", {"w": np.ones(4)})
    content = path.read_bytes()
    for wrong in (content[:-1], content + b"\0"):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match="the file has more or less"):
            open_checkpoint(path)


VALID = json.dumps({"__metadata__": {"a": "b"}, "w": entry(), "v": entry("BF16", [2, 1], [8, 12])}).encode()


def check_consistent_or_refused(path, content: bytes):
    path.write_bytes(content)
    source = FileSource(path, ByteCounter())
    try:
        tensors, metadata = open_file(source)
    except CheckpointError:
        return
    finally:
        source.close()
    length = struct.unpack("<Q", content[:8])[0]
    covered = sorted((tensor.offset, tensor.offset + tensor.nbytes) for tensor in tensors.values())
    edges = [8 + length, *(edge for pair in covered for edge in pair), len(content)]
    assert edges[::2] == edges[1::2], "the tensors cover the data exactly"
    assert all(isinstance(text, str) for pair in metadata.items() for text in pair)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "m.safetensors"


@settings(max_examples=200)
@given(content=st.binary(max_size=300))
@example(content=struct.pack("<Q", 2) + b"{}")
def test_random_bytes_are_consistent_or_refused(fuzzed, content):
    check_consistent_or_refused(fuzzed, content)


@settings(max_examples=300)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(VALID) + 20), st.binary(max_size=6), st.integers(0, 6)), max_size=4),
    fix_length=st.booleans(),
)
@example(edits=[], fix_length=True)
def test_a_damaged_file_is_consistent_or_refused(fuzzed, edits, fix_length):
    content = VALID + bytes(12)
    for at, insert, remove in edits:
        content = content[:at] + insert + content[at + remove :]
    length = content.rfind(b"}") + 1 if fix_length else len(VALID)
    check_consistent_or_refused(fuzzed, struct.pack("<Q", length) + content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "U8", "", "w"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BF16", "F64", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 12), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=200)
@given(header=st.dictionaries(st.text(max_size=4), entries | json_values, max_size=4), data=st.binary(max_size=16))
def test_any_json_header_is_consistent_or_refused(fuzzed, header, data):
    text = json.dumps(header).encode()
    check_consistent_or_refused(fuzzed, struct.pack("<Q", len(text)) + text + data)


def test_what_a_format_cannot_hold_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape("cannot hold w, which is complex128")):
        save_checkpoint(tmp_path / "m.safetensors", {"w": np.ones(2, np.complex128)})
    assert not list(tmp_path.iterdir())
