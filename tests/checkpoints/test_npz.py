import io
import json
import struct
import threading
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.checkpoints.npz import open_file
from jaxmerge.checkpoints.stores import ByteCounter, FileSource
from jaxmerge.checkpoints.writer import save_checkpoint
from jaxmerge.errors import CheckpointError


def test_all_dtypes_come_back(tmp_path, tensors):
    path = save_checkpoint(tmp_path / "m.npz", tensors, metadata={"note": "größer"})
    checkpoint = open_checkpoint(path)
    assert checkpoint.metadata == {"note": "größer"}
    assert checkpoint.params.keys() == tensors.keys()
    for name, array in tensors.items():
        assert checkpoint.params[name].dtype == array.dtype
        np.testing.assert_array_equal(checkpoint.params[name][...], array)


def test_numpy_and_jax_read_what_we_write(tmp_path, tensors):
    path = save_checkpoint(tmp_path / "m.npz", tensors)
    assert zipfile.ZipFile(path).testzip() is None, "the checksums are right"
    with np.load(path) as theirs:
        assert set(theirs.files) == set(tensors)
        for name, array in tensors.items():
            assert theirs[name].view(array.dtype).tobytes() == array.tobytes()
    with jnp.load(path) as theirs:  # pyright: ignore[reportGeneralTypeIssues]
        np.testing.assert_array_equal(theirs["model.float32.weight"], tensors["model.float32.weight"])


def test_we_read_what_numpy_writes(tmp_path, tensors):
    plain = {name: array for name, array in tensors.items() if np.issubdtype(array.dtype, np.number)}
    plain["bf16"] = tensors["model.bfloat16.weight"]  # two raw bytes an entry: bfloat16, as jax.numpy.load has it
    plain["fortran"] = np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    plain["big_endian"] = np.arange(6, dtype=">f4").reshape(2, 3)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "m.npz", **plain)
        params = open_checkpoint(tmp_path / "m.npz").params
        assert params.keys() == plain.keys()
        for name, array in plain.items():
            assert params[name].dtype == array.dtype.newbyteorder("=")
            np.testing.assert_array_equal(params[name][...], array)
        np.testing.assert_array_equal(params["fortran"][1:, 1, 2:4], plain["fortran"][1:, 1, 2:4])


def test_a_slice_of_a_stored_member_reads_its_bytes_only(tmp_path):
    array = np.arange(1000, dtype=np.float32).reshape(100, 10)
    np.savez(tmp_path / "m.npz", w=array)
    checkpoint = open_checkpoint(tmp_path / "m.npz")
    assert checkpoint.bytes_read == 0
    np.testing.assert_array_equal(checkpoint.params["w"][20:25, 3:7], array[20:25, 3:7])
    assert checkpoint.bytes_read == 5 * 4 * 4


def test_a_compressed_member_is_inflated_once_when_it_is_read_in_order(tmp_path, rng):
    array = rng.normal(size=200_000).astype(np.float32)
    np.savez_compressed(tmp_path / "m.npz", w=array)
    compressed = zipfile.ZipFile(tmp_path / "m.npz").getinfo("w.npy").compress_size
    checkpoint = open_checkpoint(tmp_path / "m.npz")
    buffer = np.empty(1000, np.float32)
    for start in range(0, array.size, buffer.size):
        checkpoint.params["w"].read_flat(start, buffer)
        np.testing.assert_array_equal(buffer, array[start : start + buffer.size])
    assert checkpoint.bytes_read <= compressed * 1.01
    checkpoint.params["w"].read_flat(500, buffer)  # backwards: starts again
    np.testing.assert_array_equal(buffer, array[500:1500])


def test_compressed_members_are_read_by_several_threads(tmp_path, rng):
    arrays = {f"t{i}": rng.normal(size=30_000) for i in range(4)}
    np.savez_compressed(tmp_path / "m.npz", **arrays)
    params = open_checkpoint(tmp_path / "m.npz").params
    right = []

    def read(name, starts):
        out = np.empty(500)
        for start in starts:
            params[name].read_flat(start, out)
            right.append(np.array_equal(out, arrays[name][start : start + 500]))

    threads = [
        threading.Thread(target=read, args=(name, range(shift, 29_000, 1500))) for name in arrays for shift in (0, 700)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(right)
    assert len(right) == sum(len(range(shift, 29_000, 1500)) for shift in (0, 700)) * 4


# ---- hostile files


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def archive(path, members: dict[str, bytes], **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


class Explosive:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was loaded')",))


def described(shape, descr="<f4"):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()


WRONG_MEMBERS = [
    (npy(np.array([Explosive()], object)), "w has the dtype object"),
    (npy(np.array(["text"])), "w has the dtype <U4"),
    (npy(np.zeros(2, [("a", "f4")])), "w has the dtype"),
    (npy(np.zeros(3, "V1")), "w holds raw entries of 1 bytes"),
    (npy(np.ones(8))[:-1], "w is float64.* needs 192 bytes .* member has 191"),
    (npy(np.ones(8))[:60], "w is no readable npy member"),
    (b"not npy at all", "w is no readable npy member"),
    (b"", "w is no readable npy member"),
    (described((1 << 50,)) + bytes(4), "w is float32.* needs"),
    (described((-1,)) + bytes(4), r"w has the impossible shape \(-1,\)"),
    (described((0, 1 << 62, 1 << 62)), "w has the impossible shape"),
    (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(20_000), "w is no readable npy member"),
    (b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os').abort()        ", "w is no readable npy member"),
]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("content, message", WRONG_MEMBERS, ids=range(len(WRONG_MEMBERS)))
def test_a_wrong_member_is_an_error_and_nothing_is_unpickled(tmp_path, content, message, compression):
    path = archive(tmp_path / "m.npz", {"w.npy": content}, compression=compression)
    with pytest.raises(CheckpointError, match=f"m.npz: {message}"):
        open_checkpoint(path)


def test_a_truncated_archive_is_an_error(tmp_path):
    path = save_checkpoint(tmp_path / "m.npz", {"w": np.ones(100)})
    content = path.read_bytes()
    for n in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:n])
        with pytest.raises(CheckpointError, match=r"m\.npz"):
            open_checkpoint(path)


def test_a_member_named_twice_is_an_error(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "m.npz", "w") as file:
        file.writestr("w.npy", npy(np.ones(3)))
        file.writestr("w.npy", npy(np.zeros(3)))
    with pytest.raises(CheckpointError, match="holds w twice"):
        open_checkpoint(tmp_path / "m.npz")


def test_corrupt_compressed_data_is_an_error_when_it_is_read(tmp_path):
    np.savez_compressed(tmp_path / "m.npz", w=np.arange(10_000))
    content = bytearray((tmp_path / "m.npz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "m.npz").write_bytes(content)
    params = open_checkpoint(tmp_path / "m.npz").params
    with pytest.raises(CheckpointError, match=r"m\.npz: cannot inflate w\.npy"):
        params["w"][...]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "m.npz"


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("valid")
    w = np.arange(6, dtype=ml_dtypes.bfloat16)
    return save_checkpoint(folder / "m.npz", {"w": w, "v": np.ones((2, 2))}).read_bytes()


@settings(max_examples=150)
@given(edits=st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=5), st.integers(0, 5)), max_size=3))
def test_a_damaged_archive_opens_or_is_refused_and_reads_within_the_file(fuzzed, valid, edits):
    content = valid
    for at, insert, remove in edits:
        content = content[:at] + insert + content[at + remove :]
    fuzzed.write_bytes(content)
    source = FileSource(fuzzed, ByteCounter())
    try:
        tensors, _ = open_file(source)
        for tensor in tensors.values():
            assert tensor[...].shape == tensor.shape
    except CheckpointError:
        pass
    finally:
        source.close()


def test_comments_of_others_are_no_metadata(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.ones(2))
    for comment, metadata in [(b"hello", {}), (b"[1]", {}), (json.dumps({"a": "b", "c": 1}).encode(), {"a": "b"})]:
        with zipfile.ZipFile(tmp_path / "m.npz", "a") as file:
            file.comment = comment
        assert open_checkpoint(tmp_path / "m.npz").metadata == metadata


def test_metadata_that_does_not_fit_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="do not fit an npz archive"):
        save_checkpoint(tmp_path / "m.npz", {"w": np.ones(2)}, metadata={"long": "x" * 70_000})
    assert not list(tmp_path.iterdir())


def test_arrays_start_at_multiples_of_64(tmp_path, tensors):
    path = save_checkpoint(tmp_path / "m.npz", tensors)
    content = path.read_bytes()
    for member in zipfile.ZipFile(path).infolist():
        names, extra = struct.unpack("<2H", content[member.header_offset + 26 : member.header_offset + 30])
        assert (member.header_offset + 30 + names + extra) % 64 == 0
