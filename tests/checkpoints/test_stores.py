import contextlib
import http.server
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from jaxmerge.checkpoints import stores
from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.checkpoints.writer import save_checkpoint
from jaxmerge.errors import CheckpointError
from jaxmerge.trees.paths import named_leaves


class Server:
    """A web server on this machine that serves a folder by ranges and counts the bytes it sends."""

    def __init__(self, folder: Path):
        self.requests: list[str] = []
        self.bytes_sent = 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.path)
                path = folder / urllib.parse.unquote(self.path).lstrip("/")
                if not path.is_file():
                    self.send_error(404)
                    return
                content, status = path.read_bytes(), 200
                if wanted := self.headers.get("Range"):
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    start, stop = int(first), min(int(last or len(content)), len(content) - 1) + 1
                    if start >= len(content):
                        self.send_error(416)
                        return
                    size, content, status = len(content), content[start:stop], 206
                self.send_response(status)
                if status == 206:
                    self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                server.bytes_sent += len(content)  # before the client can know
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path):
    with Server(tmp_path) as server:
        yield server


def assert_same(checkpoint, tensors):
    got = named_leaves(checkpoint.params)
    assert got.keys() == tensors.keys()
    for name, array in tensors.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name][...], array)


@pytest.mark.parametrize(
    "path, options",
    [
        ("m.safetensors", {}),
        ("single", {}),
        ("sharded", {"max_shard_bytes": 300}),
        ("m.npz", {}),
        ("orbax", {"format": "orbax"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_format_opens_from_a_web_server(tmp_path, server, tensors, path, options):
    save_checkpoint(tmp_path / path, tensors, metadata={"note": "x"}, **options)
    checkpoint = open_checkpoint(f"{server.url}/{path}")
    assert checkpoint.path == f"{server.url}/{path}"
    assert checkpoint.metadata["note"] == "x"
    assert_same(checkpoint, tensors)
    with open_checkpoint(tmp_path / path) as local:
        assert checkpoint.format == local.format
        assert checkpoint.nbytes == local.nbytes


def test_a_compressed_archive_opens_from_a_web_server(tmp_path, server, rng):
    tensors = {"w": rng.normal(size=5000), "v": np.arange(3)}
    np.savez_compressed(tmp_path / "m.npz", **tensors)
    assert_same(open_checkpoint(f"{server.url}/m.npz"), tensors)


def test_opening_a_url_fetches_the_header_and_a_slice_its_bytes(tmp_path, server):
    array = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    save_checkpoint(tmp_path / "m.safetensors", {"w": array})
    checkpoint = open_checkpoint(f"{server.url}/m.safetensors")
    assert server.bytes_sent < 10_000
    assert checkpoint.bytes_read == 0
    before = server.bytes_sent
    np.testing.assert_array_equal(checkpoint.params["w"][100:103], array[100:103])
    assert checkpoint.bytes_read == server.bytes_sent - before == 3 * 4096
    requests = len(server.requests)
    np.testing.assert_array_equal(checkpoint.params["w"][:300, 7:9], array[:300, 7:9])
    assert len(server.requests) - requests < 5, "nearby rows come in one request"
    assert checkpoint.bytes_read == server.bytes_sent - before


def test_large_reads_are_cut_into_pieces_that_arrive_in_order(tmp_path, server, monkeypatch):
    monkeypatch.setattr(stores, "PIECE_BYTES", 1000)
    array = np.arange(20_123, dtype=np.int32)
    save_checkpoint(tmp_path / "m.safetensors", {"w": array})
    checkpoint = open_checkpoint(f"{server.url}/m.safetensors")
    np.testing.assert_array_equal(checkpoint.params["w"][...], array)
    assert checkpoint.bytes_read == array.nbytes
    assert len(server.requests) > 80


def test_side_files_come_from_the_server(tmp_path, server):
    files = {"config.json": b'{"a": 1}', "tokenizer.json": b"{}"}
    save_checkpoint(tmp_path / "model", {"w": np.ones(2)}, side_files=files)
    assert open_checkpoint(f"{server.url}/model/").side_files == files


def test_what_is_not_on_the_server_is_an_error(tmp_path, server):
    for name in ("absent.safetensors", "absent.npz", "absent"):
        with pytest.raises(CheckpointError, match=f"{name}"):
            open_checkpoint(f"{server.url}/{name}")
    save_checkpoint(tmp_path / "model", {"a": np.ones(2), "b": np.ones(2)}, max_shard_bytes=16)
    (tmp_path / "model/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the shard model-00002-of-00002.safetensors is absent"):
        open_checkpoint(f"{server.url}/model")


def test_a_file_that_is_cut_off_on_the_server_is_an_error(tmp_path, server):
    path = save_checkpoint(tmp_path / "m.safetensors", {"w": np.ones(100)})
    content = path.read_bytes()
    for n in (0, 4, 100, len(content) - 1):
        path.write_bytes(content[:n])
        with pytest.raises(CheckpointError, match=r"m\.safetensors"):
            open_checkpoint(f"{server.url}/m.safetensors")


def test_a_server_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "SECONDS_PER_REQUEST", 0.5)
    with Server(tmp_path) as stopped:
        pass
    with pytest.raises(CheckpointError, match="no answer within"):
        open_checkpoint(f"{stopped.url}/m.safetensors")


@pytest.mark.parametrize("path, options", [("m.safetensors", {}), ("folder", {"max_shard_bytes": 300}), ("m.npz", {})])
def test_the_in_memory_store(tmp_path, tensors, path, options):
    saved = save_checkpoint(tmp_path / path, tensors, **options)
    context = ts.Context()
    memory = ts.KvStore.open("memory://models/", context=context).result()
    for file in [saved] if saved.is_file() else list(saved.iterdir()):
        memory.write(str(file.relative_to(tmp_path)), file.read_bytes()).result()
    checkpoint = open_checkpoint(f"memory://models/{path}", context=context)
    assert checkpoint.bytes_read == 0
    assert_same(checkpoint, tensors)
    if path != "m.npz":
        assert checkpoint.bytes_read == checkpoint.nbytes


def test_orbax_in_the_in_memory_store(tmp_path, tensors):
    saved = save_checkpoint(tmp_path / "ckpt", tensors, format="orbax")
    context = ts.Context()
    memory = ts.KvStore.open("memory://", context=context).result()
    for file in saved.rglob("*"):
        if file.is_file():
            memory.write(str(file.relative_to(tmp_path)), file.read_bytes()).result()
    assert_same(open_checkpoint("memory://ckpt", context=context), tensors)


def test_file_urls_are_local_files(tmp_path, tensors):
    path = save_checkpoint(tmp_path / "a b.safetensors", tensors)
    assert_same(open_checkpoint(path.as_uri()), tensors)
    assert_same(open_checkpoint(f"file://{path}"), tensors)


@pytest.mark.parametrize("url", ["bogus://x/y", "s3://no/such bucket", "gs://B/y.npz"])
def test_urls_that_mean_nothing_are_errors(url):
    with pytest.raises(CheckpointError, match="cannot read"):
        open_checkpoint(url)


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint at {tmp_path}/absent"):
        open_checkpoint(tmp_path / "absent")


def test_many_threads_read_one_sharded_checkpoint_and_every_byte_is_counted(tmp_path, rng):
    tensors = {f"t{i}": rng.normal(size=(40, 50)).astype(np.float32) for i in range(12)}
    path = save_checkpoint(tmp_path / "model", tensors, max_shard_bytes=20_000)
    checkpoint = open_checkpoint(path)
    assert len(list(path.glob("*.safetensors"))) > 4
    wrong: list[str] = []

    def read(seed):
        draw = np.random.default_rng(seed)
        buffer = np.empty(100, np.float32)
        for _ in range(200):
            name, start = f"t{draw.integers(12)}", int(draw.integers(1900))
            checkpoint.params[name].read_flat(start, buffer)
            if not np.array_equal(buffer, tensors[name].reshape(-1)[start : start + 100]):
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert checkpoint.bytes_read == 8 * 200 * 400


def test_a_closed_checkpoint_says_so_and_never_reads_another_file(tmp_path):
    path = save_checkpoint(tmp_path / "m.safetensors", {"w": np.ones(1000)})
    with open_checkpoint(path) as checkpoint:
        tensor = checkpoint.params["w"]
        tensor[:3]
    with contextlib.ExitStack() as files:
        for _ in range(20):  # one of them gets the number of the closed file
            files.enter_context(open(path, "rb"))
        with pytest.raises(CheckpointError, match="was closed; open it again"):
            tensor[:3]
    checkpoint.close()


def test_a_source_tells_its_state_and_is_one_file_in_one_state(tmp_path, server):
    save_checkpoint(tmp_path / "m.safetensors", {"w": np.ones(100)})

    def opened(location):
        source = stores.open_store(location, None)[0].source("m.safetensors")
        assert source is not None
        return source

    source = opened(tmp_path)
    before = source.state()
    assert before == opened(tmp_path).state() is not None
    (tmp_path / "moved").mkdir()
    (tmp_path / "m.safetensors").rename(tmp_path / "moved/m.safetensors")
    assert len(source.read(8, 8)) == 8, "what was moved away lives on"
    save_checkpoint(tmp_path / "m.safetensors", {"w": np.zeros(100)})
    with pytest.raises(CheckpointError, match="changed while it was read, or another one took its place"):
        source.read(8, 8)
    assert opened(server.url).state() is None, "it gives no tags"
    assert opened(tmp_path).state() != before
