import json
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.checkpoints.layout import TensorSpec
from jaxmerge.checkpoints.writer import open_writer, save_checkpoint
from jaxmerge.errors import CheckpointError, ConflictError, StructureError

TARGETS = [("m.safetensors", None), ("folder", None), ("m.npz", None), ("orbax", "orbax")]
each_target = pytest.mark.parametrize("target, format", TARGETS, ids=[target for target, _ in TARGETS])


def spec(name, array):
    return TensorSpec(name, array.dtype, array.shape)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@each_target
def test_threads_write_pieces_in_any_order(tmp_path, tensors, target, format, rng):
    pieces = [
        (name, start, array.reshape(-1)[start : start + 11])
        for name, array in tensors.items()
        for start in range(0, array.size, 11)
    ]
    rng.shuffle(pieces)  # pyright: ignore[reportArgumentType]
    writer = open_writer(tmp_path / target, [spec(*item) for item in tensors.items()], format=format)

    def write(own):
        for piece in own:
            writer.write(*piece)

    threads = [threading.Thread(target=write, args=(pieces[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.bytes_written == sum(array.nbytes for array in tensors.values())
    assert not (tmp_path / target).exists()
    assert writer.finish() == tmp_path / target
    assert [path.name for path in tmp_path.iterdir()] == [target]
    params = open_checkpoint(tmp_path / target).params
    for name, array in tensors.items():
        np.testing.assert_array_equal(params[name][...], array)


@each_target
def test_nothing_stands_at_the_path_until_it_is_finished_or_ever_after_an_error(tmp_path, target, format):
    class Stop(Exception):
        pass

    with pytest.raises(Stop), open_writer(tmp_path / target, [spec("w", np.ones(4))], format=format) as writer:
        writer.write("w", 0, np.ones(2))
        assert writer.folder.is_dir()
        assert not (tmp_path / target).exists()
        raise Stop
    assert files_below(tmp_path) == []


def test_a_tensor_that_is_not_complete_is_an_error(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"m\.safetensors: 2 entries of w were written, of 4"),
        open_writer(tmp_path / "m.safetensors", [spec("w", np.ones(4))]) as writer,
    ):
        writer.write("w", 0, np.ones(2))
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    "start, values",
    [(3, np.ones(2)), (-1, np.ones(2)), (0, np.ones(2, np.float32)), (0, np.ones((2, 1)))],
    ids=["beyond", "before", "dtype", "shape"],
)
def test_entries_that_do_not_fit_are_an_error(tmp_path, start, values):
    writer = open_writer(tmp_path / "m.safetensors", [spec("w", np.ones(4)), spec("v", np.ones(4))])
    with pytest.raises(CheckpointError, match=f"at entry {start} of w, which is float64"):
        writer.write("w", start, values)
    writer.abort()
    assert files_below(tmp_path) == []


@each_target
def test_an_existing_path_is_refused_and_kept_unless_it_is_to_be_replaced(tmp_path, target, format):
    def saved():
        return {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path) if (tmp_path / name).is_file()}

    save_checkpoint(tmp_path / target, {"w": np.ones(4)}, format=format)
    before = saved()
    with pytest.raises(ConflictError, match="exists already; remove it"):
        save_checkpoint(tmp_path / target, {"w": np.zeros(4)}, format=format)
    assert saved() == before
    with pytest.raises(ZeroDivisionError), open_writer(tmp_path / target, [], format=format, overwrite=True):
        raise ZeroDivisionError
    assert saved() == before
    old = open_checkpoint(tmp_path / target).params["w"]
    save_checkpoint(tmp_path / target, {"w": old.window(slice(0, 2))}, format=format, overwrite=True)  # from itself
    np.testing.assert_array_equal(open_checkpoint(tmp_path / target).params["w"][...], np.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == [target]


def test_a_folder_can_replace_a_file_and_a_file_a_folder(tmp_path):
    save_checkpoint(tmp_path / "m.safetensors", {"w": np.ones(4)})
    save_checkpoint(tmp_path / "m.safetensors", {"w": np.zeros(4)}, format="orbax", overwrite=True)
    assert open_checkpoint(tmp_path / "m.safetensors").format == "orbax"
    save_checkpoint(tmp_path / "m.safetensors", {"w": np.ones(3)}, overwrite=True)
    assert open_checkpoint(tmp_path / "m.safetensors").params["w"].shape == (3,)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_two_writers_of_one_path_conflict(tmp_path):
    specs = [spec("w", np.ones(4))]
    with open_writer(tmp_path / "model", specs) as writer:
        with pytest.raises(ConflictError, match="is being written already"):
            open_writer(tmp_path / "model", specs, overwrite=True)
        writer.write("w", 0, np.ones(4))
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "model").params["w"][...], np.ones(4))


def test_to_abort_what_is_over_does_no_harm(tmp_path):
    first = open_writer(tmp_path / "model", [])
    first.finish()
    second = open_writer(tmp_path / "model", [], overwrite=True)
    first.abort()
    assert second.folder.is_dir()
    second.abort()
    second.abort()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_comes_into_being_meanwhile_is_not_replaced(tmp_path):
    with (
        pytest.raises(ConflictError, match="exists already"),
        open_writer(tmp_path / "m.safetensors", [spec("w", np.ones(2))]) as writer,
    ):
        writer.write("w", 0, np.ones(2))
        (tmp_path / "m.safetensors").write_text("somebody else's")
    assert files_below(tmp_path) == ["m.safetensors"]
    assert (tmp_path / "m.safetensors").read_text() == "somebody else's"


PREAMBLE = """
import os, resource, sys, time
import numpy as np
from jaxmerge.checkpoints.layout import TensorSpec
from jaxmerge.checkpoints.writer import open_writer, save_checkpoint
from jaxmerge.errors import CheckpointError
path = sys.argv[1]
"""


def run(code: str, *args: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PREAMBLE + code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path):
    code = "w = open_writer(path, [TensorSpec('w', np.dtype('f8'), (4,))]); print('ready', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", PREAMBLE + code, str(tmp_path / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(ConflictError, match="is being written already"):
            save_checkpoint(tmp_path / "model", {"w": np.ones(4)})
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert files_below(tmp_path) == [".model.partial", ".model.partial/model.safetensors"]
    save_checkpoint(tmp_path / "model", {"v": np.ones(4)}, format="orbax")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert open_checkpoint(tmp_path / "model").format == "orbax"


def test_a_writer_killed_while_it_replaced_a_folder_loses_nothing(tmp_path):
    save_checkpoint(tmp_path / "model", {"w": np.ones(4)})
    (tmp_path / "model").rename(tmp_path / ".model.replaced")  # between the two renames
    with pytest.raises(ConflictError, match="exists already"):
        save_checkpoint(tmp_path / "model", {"w": np.zeros(4)})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "model").params["w"][...], np.ones(4))


@each_target
def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path, target, format):
    # A limit on the size of a file fails a write as a full disk does.
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    save_checkpoint(path, {"a": np.ones(10), "b": np.ones(100_000)}, format=sys.argv[2] or None)
except CheckpointError as error:
    print(error)
"""
    done = run(code, tmp_path / target, format or "")
    assert done.returncode == 0, done.stderr
    assert f"cannot write {tmp_path / target}" in done.stdout
    assert "max_shard_bytes" in done.stdout
    assert files_below(tmp_path) == []


def test_no_permission_is_an_error_that_leaves_nothing(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    code = """
if os.geteuid() == 0:
    os.setegid(65534); os.seteuid(65534)  # root may write anywhere
try:
    save_checkpoint(path, {"a": np.ones(10)})
except CheckpointError as error:
    print(error)
"""
    tmp_path.chmod(0o755)
    done = run(code, folder / "model")
    assert done.returncode == 0, done.stderr
    assert "permission denied; check the owner and mode" in done.stdout
    assert files_below(folder) == []


def test_unreadable_files_are_an_error(tmp_path):
    path = save_checkpoint(tmp_path / "m.safetensors", {"a": np.ones(10)})
    path.chmod(0)
    code = """
from jaxmerge.checkpoints.base import open_checkpoint
if os.geteuid() == 0:
    os.setegid(65534); os.seteuid(65534)
try:
    open_checkpoint(path)
except CheckpointError as error:
    print(error)
"""
    done = run(code, path)
    assert done.returncode == 0, done.stderr
    assert f"cannot read {path}: Permission denied" in done.stdout


@pytest.mark.parametrize(
    "path, options, message",
    [
        ("m.safetensors", {"format": "pickle"}, "unknown format 'pickle'"),
        ("m.safetensors", {"max_shard_bytes": 100}, "only a safetensors folder has shards"),
        ("m.npz", {"side_files": {"config.json": b""}}, "has no place for config.json"),
        ("model", {"side_files": {"../config.json": b""}}, "cannot be the name of a side file"),
        ("model", {"side_files": {"model.safetensors": b""}}, "cannot be the name of a side file"),
        ("model", {"metadata": {"step": object()}}, "metadata cannot be written as JSON"),
        ("https://host/model", {}, "web servers can only be read from"),
    ],
    ids=range(7),
)
def test_what_cannot_be_written_is_said_before_anything_is(tmp_path, monkeypatch, path, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(path, {"w": np.ones(4)}, **options)
    assert files_below(tmp_path) == []


def test_names_must_be_unique_and_ties_must_lead_to_a_tensor(tmp_path):
    w = spec("w", np.ones(2))
    for specs, aliases in [([w, w], {}), ([w], {"w": "w"}), ([w], {"v": "u"})]:
        with pytest.raises(StructureError, match="same name|is not written"):
            open_writer(tmp_path / "m.safetensors", specs, aliases=aliases)


@each_target
def test_entries_that_are_no_native_numbers_are_an_error(tmp_path, target, format):
    for leaf in (jax.random.key(0), np.array(["text"]), np.array([None])):
        with pytest.raises(CheckpointError, match=r"\bw\b"):
            save_checkpoint(tmp_path / target, {"w": leaf}, format=format)
    assert files_below(tmp_path) == []


def test_parent_folders_that_were_made_go_with_an_aborted_checkpoint(tmp_path, tensors):
    (tmp_path / "there").mkdir()
    writer = open_writer(tmp_path / "there" / "a" / "b" / "m.npz", [spec(*item) for item in tensors.items()])
    writer.abort()
    assert files_below(tmp_path) == ["there"]


def test_missing_parent_folders_are_made_and_no_parameters_are_a_checkpoint_too(tmp_path):
    path = save_checkpoint(tmp_path / "a/b/m.safetensors", {})
    assert open_checkpoint(path).params == {}
    assert json.loads(path.read_bytes()[8:]) == {}
