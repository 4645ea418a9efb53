import hashlib
import http.server
import itertools
import re
import shutil
import tempfile
import threading
import urllib.parse

import numpy as np
import pytest
import tensorstore as ts

import jaxmerge as jm
from jaxmerge.checkpoints import upload, writer
from jaxmerge.checkpoints.base import open_checkpoint
from jaxmerge.checkpoints.upload import Place
from jaxmerge.checkpoints.writer import save_checkpoint
from jaxmerge.errors import CheckpointError, ConflictError
from jaxmerge.trees.paths import named_leaves

LAYOUTS = {
    "shards": {"max_shard_bytes": 80},
    "single": {"side_files": {"config.json": b"{}"}},
    "orbax": {"format": "orbax"},
}
PARAMS = {"a": np.arange(20, dtype=np.float32), "b": np.full(17, 2.0, np.float32), "c": np.ones((2, 3), np.int8)}
OTHER = {name: array + 1 for name, array in PARAMS.items()}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder in which outputs are built; most tests leave nothing in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def context():
    return ts.Context()


def memory(context, path="m/"):
    return ts.KvStore.open(f"memory://{path}", context=context).result()


def objects(kv):
    return {key.decode(): kv.read(key).result().value for key in kv.list().result()}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def holds(url, params, context):
    got = named_leaves(open_checkpoint(url, context=context).params)
    return got.keys() == params.keys() and all(np.array_equal(got[name][...], params[name]) for name in params)


class Answer:
    """What a request gives that is refused."""

    def result(self, timeout=None):
        raise ValueError("PERMISSION_DENIED: no")


class Watched:
    """A key-value store whose writer dies before write number `last`, or in which something else happens there."""

    def __init__(self, kv, last, then=None):
        self._kv, self._last, self._then, self._lock = kv, last, then, threading.Lock()
        self.writes = 0

    def write(self, key, value, **condition):
        with self._lock:
            self.writes += 1
            if self.writes > self._last and self._then is None:
                return Answer()
            if self.writes == self._last + 1 and self._then is not None:
                self._then()
            return self._kv.write(key, value, **condition)

    def __getattr__(self, name):
        return getattr(self._kv, name)


@pytest.mark.parametrize("place", ["memory", "file"])
def test_each_layout_is_what_is_written_locally_and_takes_the_place_of_any_other(tmp_path, temporary, context, place):
    kv = memory(context) if place == "memory" else ts.KvStore.open(f"file://{tmp_path}/kv/").result()
    former = {name: save_checkpoint(tmp_path / "former" / name, OTHER, **LAYOUTS[name]) for name in LAYOUTS}
    local = {name: save_checkpoint(tmp_path / "local" / name, PARAMS, **LAYOUTS[name]) for name in LAYOUTS}
    for before, name in itertools.product(LAYOUTS, LAYOUTS):
        for key in kv.list().result():
            kv.write(key, None).result()
        Place("memory://x/m", is_folder=True, kvstore=kv).upload(former[before])
        with pytest.raises(ConflictError, match="x/m exists already"):
            Place("memory://x/m", is_folder=True, kvstore=kv).check()
        Place("memory://x/m", is_folder=True, kvstore=kv, overwrite=True).upload(local[name])
        assert objects(kv) == files(local[name]), (before, name)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("path, options", [*LAYOUTS.items(), ("m.npz", {}), ("m.safetensors", {})])
def test_a_checkpoint_is_saved_to_a_url(tmp_path, temporary, context, path, options):
    url = f"memory://bucket/{path}"
    assert save_checkpoint(url, PARAMS, context=context, **options) == url
    assert holds(url, PARAMS, context)
    with pytest.raises(ConflictError, match=f"{url} exists already; .* overwrite=True"):
        save_checkpoint(url, OTHER, context=context, **options)
    assert holds(url, PARAMS, context)
    save_checkpoint(url, OTHER, context=context, overwrite=True, **options)
    assert holds(url, OTHER, context)
    assert not list(temporary.iterdir())


def test_a_merge_is_uploaded_and_a_conflict_is_found_before_anything_is_read(tmp_path, temporary, context, monkeypatch):
    experts = [jm.open_checkpoint(save_checkpoint(tmp_path / name, PARAMS)) for name in ("one", "two")]
    shown = []
    monkeypatch.setattr(
        "jaxmerge.streaming.progress.Progress.begin", lambda _, what, total: shown.append([what, total])
    )
    monkeypatch.setattr("jaxmerge.streaming.progress.Progress.advance", lambda _, n: shown.append(n))
    url = "memory://bucket/merged"
    report = jm.merge_checkpoint(jm.linear(), experts, out=url, context=context, max_shard_bytes=80, progress=False)
    assert report.path == url
    stored = objects(memory(context, "bucket/merged/"))
    total = sum(map(len, stored.values()))
    assert sum(shown[shown.index([f"upload to {url}", total]) + 1 :]) == total
    jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "merged", max_shard_bytes=80)
    local = files(tmp_path / "merged")
    assert stored.keys() == local.keys()
    assert all(stored[name] == local[name] for name in stored if name != "jaxmerge.json"), "which tells the time"
    for name, content in stored.items():
        (tmp_path / "merged" / name).write_bytes(content)
    assert not jm.verify_checkpoint(tmp_path / "merged")

    read = [expert.bytes_read for expert in experts]
    for budget in ({}, {"io_budget": "50%", "base": experts[0]}):
        with pytest.raises(ConflictError, match="exists already"):
            jm.merge_checkpoint(jm.linear(), experts, out=url, context=context, **budget)
    opened = open_checkpoint(url, context=context)
    with pytest.raises(ConflictError, match="is part of, the input 'a'"):
        jm.merge_checkpoint(jm.linear(), {"a": opened}, out=url, context=context, overwrite=True)
    assert [expert.bytes_read for expert in experts] == read
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_upload_that_is_killed_anywhere_leaves_nothing_that_opens(tmp_path, context, layout, overwrite):
    local = save_checkpoint(tmp_path / "local", PARAMS, **LAYOUTS[layout])
    former = save_checkpoint(tmp_path / "former", OTHER, **LAYOUTS["single"])
    for n in itertools.count():
        kv = memory(context, f"{n}/m/")
        if overwrite:
            Place("memory://x/m", is_folder=True, kvstore=kv).upload(former)
        watched = Watched(kv, n)
        try:
            Place("memory://x/m", is_folder=True, overwrite=overwrite, kvstore=watched).upload(local)
            break
        except CheckpointError as error:
            assert "cannot write to memory://x/m" in str(error)
        # Until its opener is removed, a former checkpoint of another layout is whole, also where a claim hides it.
        there = overwrite and (n == 0 or (layout != "single" and n == 1))
        if there and (n == 0 or layout == "shards"):
            assert holds(f"memory://{n}/m", OTHER, context)
        else:
            with pytest.raises(CheckpointError):
                open_checkpoint(f"memory://{n}/m", context=context)
        Place("memory://x/m", is_folder=True, overwrite=there, kvstore=kv).upload(local)
        assert holds(f"memory://{n}/m", PARAMS, context)
    assert n == watched.writes >= len(files(local)) + 1
    assert holds(f"memory://{n}/m", PARAMS, context)


@pytest.mark.parametrize("layouts", [("shards", "shards"), ("orbax", "orbax"), ("shards", "single")])
def test_the_later_of_two_uploads_wins_wherever_the_earlier_one_is(tmp_path, context, layouts):
    one = save_checkpoint(tmp_path / "one", PARAMS, **LAYOUTS[layouts[0]])
    two = save_checkpoint(tmp_path / "two", OTHER, **LAYOUTS[layouts[1]])
    for n in range(len(files(one)) + 1):
        kv = memory(context, f"{n}/m/")
        later = Place("memory://x/m", is_folder=True, kvstore=kv)
        watched = Watched(kv, n, lambda later=later: later.upload(two))
        with pytest.raises(ConflictError, match="x/m (is being written by somebody else|exists already)"):
            Place("memory://x/m", is_folder=True, kvstore=watched).upload(one)
        assert holds(f"memory://{n}/m", OTHER, context), n
        assert objects(kv).items() >= files(two).items(), n


@pytest.mark.parametrize("layouts", [("shards", "single"), ("orbax", "shards")])
def test_an_upload_that_is_completed_when_another_is_about_to_take_it_over_stays(tmp_path, context, layouts):
    one = save_checkpoint(tmp_path / "one", PARAMS, **LAYOUTS[layouts[0]])
    two = save_checkpoint(tmp_path / "two", OTHER, **LAYOUTS[layouts[1]])
    kv = memory(context)
    with pytest.raises(CheckpointError, match="PERMISSION_DENIED"):  # all is written but the last object
        Place("memory://x/m", is_folder=True, kvstore=Watched(kv, len(files(one)))).upload(one)
    opener = {"shards": "model.safetensors.index.json", "orbax": "state/_METADATA"}[layouts[0]]
    completed = Watched(kv, 1, lambda: kv.write(opener, (one / opener).read_bytes()).result())
    with pytest.raises(ConflictError, match="somebody else"):
        Place("memory://x/m", is_folder=True, kvstore=completed).upload(two)
    assert objects(kv) == files(one)
    assert holds("memory://m", PARAMS, context)


def test_at_most_one_of_many_uploads_at_once_wins_and_what_opens_is_its_own(tmp_path, context):
    sources = [{name: array + i for name, array in PARAMS.items()} for i in range(4)]
    layouts = ["shards", "shards", "single", "orbax"]
    local = [save_checkpoint(tmp_path / str(i), p, **LAYOUTS[layouts[i]]) for i, p in enumerate(sources)]
    for n in range(10):
        kv, won = memory(context, f"{n}/m/"), []

        def run(i, kv=kv, won=won):
            try:
                Place("memory://x/m", is_folder=True, kvstore=kv).upload(local[i])
                won.append(i)
            except ConflictError:
                pass

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) <= 1
        if won:
            assert holds(f"memory://{n}/m", sources[won[0]], context)
        else:
            with pytest.raises(CheckpointError):
                open_checkpoint(f"memory://{n}/m", context=context)


def test_a_single_file_is_written_on_condition_that_nobody_else_was_faster(tmp_path, context):
    local = save_checkpoint(tmp_path / "m.npz", PARAMS)
    kv = memory(context)
    faster = Watched(kv, 0, lambda: kv.write("m.npz", b"other").result())
    with pytest.raises(ConflictError, match="somebody else"):
        Place("memory://m/m.npz", is_folder=False, kvstore=faster).upload(local)
    assert objects(kv) == {"m.npz": b"other"}
    again = Watched(kv, 0, lambda: kv.write("m.npz", local.read_bytes()).result())
    Place("memory://m/m.npz", is_folder=False, kvstore=again, overwrite=True).upload(local)  # a repeated request


def test_what_could_not_be_uploaded_is_kept_and_what_cannot_be_is_said_at_once(temporary, context, monkeypatch):
    for url, message in (("https://host/m", "can only be read from"), ("s3://bucket", "no place in a bucket")):
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(url, PARAMS)
    with pytest.raises(CheckpointError, match="only a safetensors folder has shards"):
        save_checkpoint("memory://m/m.npz", PARAMS, max_shard_bytes=80)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "MAX_OBJECT_BYTES", 1000)
        with pytest.raises(CheckpointError, match=r"m\.npz would be \d+ bytes long, and one upload has at most 1000"):
            save_checkpoint("memory://m/m.npz", PARAMS, context=context)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # pyright: ignore
        with pytest.raises(CheckpointError, match="needs 154 bytes, and 0 are free; .* TMPDIR"):
            save_checkpoint("memory://m/m", PARAMS, context=context)
    assert not list(temporary.iterdir())
    monkeypatch.setattr(upload, "open_kvstore", lambda *_: Watched(memory(context), 1))
    with pytest.raises(CheckpointError, match="cannot write to memory://m/m.*PERMISSION_DENIED.* kept in") as caught:
        save_checkpoint("memory://m/m", PARAMS, context=context)
    assert holds(str(caught.value).rpartition(" ")[2], PARAMS, None)


def test_a_file_url_is_a_local_path(tmp_path):
    assert save_checkpoint(f"file://{tmp_path}/m", PARAMS) == tmp_path / "m"
    report = jm.merge_checkpoint(jm.linear(), [tmp_path / "m"], out=f"file://{tmp_path}/merged")
    assert report.path == tmp_path / "merged"


class S3:
    """The part of S3's protocol that TensorStore uses, with conditional writes."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.conditions: list[tuple[str, str]] = []
        self.refused = False
        lock, server = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, status, content=b"", tag=None, extra=()):
                self.send_response(status)
                for name, value in [*([("ETag", tag)] if tag else []), *extra]:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def key(self):
                return urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).removeprefix("/bucket/")

            def tag(self):
                content = server.objects.get(self.key())
                return None if content is None else f'"{hashlib.md5(content).hexdigest()}"'

            def do_PUT(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    if server.refused:
                        return self.answer(403)
                    for name in ("If-Match", "If-None-Match"):
                        if name in self.headers:
                            server.conditions.append((self.key(), name))
                    if self.headers.get("If-None-Match") == "*" and self.tag() is not None:
                        return self.answer(412)
                    if "If-Match" in self.headers and self.headers["If-Match"] != self.tag():
                        return self.answer(412)
                    server.objects[self.key()] = content
                    return self.answer(200, tag=self.tag())

            def do_GET(self):
                with lock:
                    query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
                    if "list-type" in query:
                        keys = "".join(
                            f"<Contents><Key>{key}</Key><Size>{len(value)}</Size></Contents>"
                            for key, value in sorted(server.objects.items())
                            if key.startswith(query["prefix"])
                        )
                        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{keys}</ListBucketResult>"
                        return self.answer(200, body.encode())
                    content = server.objects.get(self.key())
                    if content is None:
                        return self.answer(404)
                    found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                    if found is None:
                        return self.answer(200, content, self.tag())
                    start, stop = int(found[1]), min(int(found[2]) + 1, len(content))
                    if start >= len(content):
                        return self.answer(416)
                    where = f"bytes {start}-{stop - 1}/{len(content)}"
                    return self.answer(206, content[start:stop], self.tag(), [("Content-Range", where)])

            do_HEAD = do_GET

            def do_DELETE(self):
                with lock:
                    server.objects.pop(self.key(), None)
                self.answer(204)

            def log_message(self, *_):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})

    def place(self, **options):
        spec = {
            "driver": "s3",
            "bucket": "bucket",
            "path": "m/",
            "endpoint": f"http://127.0.0.1:{self._http.server_port}",
            "aws_region": "us-east-1",
            "aws_credentials": {"type": "anonymous"},
        }
        return Place("s3://bucket/m", is_folder=True, kvstore=ts.KvStore.open(spec).result(), **options)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def test_the_protocol_of_s3(tmp_path):
    local = {
        name: save_checkpoint(tmp_path / name, params, **LAYOUTS[name])
        for name, params in (("shards", PARAMS), ("orbax", OTHER))
    }

    def stored(server) -> dict[str, bytes]:
        return {key.removeprefix("m/"): content for key, content in server.objects.items()}

    with S3() as server:
        server.objects["other/model.safetensors"] = b"not ours"
        server.place().upload(local["shards"])
        index = "m/model.safetensors.index.json"
        assert [name for key, name in server.conditions if key == index] == ["If-None-Match", "If-Match"]
        assert {key for key, _ in server.conditions} == server.objects.keys() - {"other/model.safetensors"}
        assert server.conditions[-1] == (index, "If-Match")
        with pytest.raises(ConflictError, match="s3://bucket/m exists already"):
            server.place().upload(local["orbax"])
        server.place(overwrite=True).upload(local["orbax"])
        assert server.objects.pop("other/model.safetensors") == b"not ours"
        assert stored(server) == files(local["orbax"])
        server.refused = True
        with pytest.raises(CheckpointError, match=r"cannot write to s3://bucket/m/.*403"):
            server.place(overwrite=True).upload(local["shards"])
        assert stored(server) == files(local["orbax"])
