"""From disk to disk: what is written, what stays, and what every kind of failure leaves behind."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.checkpoints.layout import TensorSpec
from jaxmerge.checkpoints.writer import open_writer
from jaxmerge.trees.lazy import ArrayTensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NAMES = ("base", "maths", "code")


def make_models(folder: Path, format: str | None = None, suffix: str = "") -> tuple[Path, dict[str, Path]]:
    """A base with tied embeddings and an integer tensor, and two experts."""
    rng = np.random.default_rng(0)
    paths = {}
    for name in NAMES:
        embedding = rng.normal(size=(40, 16)).astype(BFLOAT16)
        params = {
            "model.embed.weight": embedding,
            "model.layers.0.mlp.weight": rng.normal(size=(50, 16)).astype(BFLOAT16),
            "model.layers.1.mlp.weight": rng.normal(size=(50, 16)).astype(BFLOAT16),
            "model.norm.weight": rng.normal(size=16).astype(np.float32),
            "model.positions": np.arange(9),
            "lm_head.weight": embedding,
        }
        path = folder / f"{name}{suffix}"
        paths[name] = jm.save_checkpoint(path, params, format=format, metadata={"made": "here"})
        if path.is_dir() and format is None:
            (path / "config.json").write_text(json.dumps({"of": name}))
            (path / "tokenizer.json").write_text("{}")
    return paths.pop("base"), paths


def loaded(path: str | Path) -> dict:
    with jm.open_checkpoint(path) as checkpoint:
        return {name: np.asarray(x) for name, x in jm.named_leaves(checkpoint.params).items()}


def check_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], np.asarray(x), err_msg=name)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected_ties(base: Path, experts: dict[str, Path]) -> dict:
    return jm.merge(jm.ties(0.4), {name: loaded(path) for name, path in experts.items()}, base=loaded(base))


@pytest.mark.parametrize("format, suffix", [(None, ""), (None, ".safetensors"), ("npz", ".npz"), ("orbax", "")])
def test_every_format_in_and_out(format: str | None, suffix: str, tmp_path: Path) -> None:
    base, experts = make_models(tmp_path, format, suffix)
    out = tmp_path / f"merged{suffix}"
    report = jm.merge_checkpoint(jm.ties(0.4), experts, base=base, out=out, format=format, progress=False)
    check_equal(loaded(out), expected_ties(base, experts))
    assert report.path == out
    assert (report.tensors, report.merged) == (5, 4)
    assert set(report.bytes_read) == {"the base", "maths", "code"}
    with jm.open_checkpoint(out) as merged, jm.open_checkpoint(base) as opened:
        assert merged.metadata["made"] == "here"
        assert merged.aliases == opened.aliases != {}


@pytest.mark.parametrize("kept, further", [("embed", "head"), ("head", "embed")])
def test_tied_weights_keep_the_name_they_are_stored_under(kept: str, further: str, tmp_path: Path) -> None:
    weights = np.arange(6, dtype=np.float32)
    for model in "ab":
        spec = TensorSpec(kept, weights.dtype, weights.shape)
        with open_writer(tmp_path / model, [spec], aliases={further: kept}) as writer:
            writer.write(kept, 0, weights)
    jm.merge_checkpoint(jm.dare(0.5), [tmp_path / "a"], base=tmp_path / "b", out=tmp_path / "merged", key=0)
    with jm.open_checkpoint(tmp_path / "merged") as merged:
        assert merged.aliases == {further: kept}


def test_side_files_of_the_reference_come_along(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    jm.merge_checkpoint(jm.ties(0.4), experts, base=base, out=tmp_path / "of base")
    jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "of expert")
    jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "one.safetensors")  # has no place for any
    assert json.loads((tmp_path / "of base/config.json").read_text()) == {"of": "base"}
    assert json.loads((tmp_path / "of expert/config.json").read_text()) == {"of": "maths"}
    assert sorted(path.name for path in (tmp_path / "of base").iterdir()) == [
        "config.json",
        "jaxmerge.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_shards(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    jm.merge_checkpoint(jm.ties(0.4), experts, base=base, out=tmp_path / "merged", max_shard_bytes="2 kB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == 3
    check_equal(loaded(tmp_path / "merged"), expected_ties(base, experts))


def test_every_kind_of_source(tmp_path: Path) -> None:
    """A path, an opened checkpoint, a tree in memory, a lazily merged tree."""
    base, experts = make_models(tmp_path)
    with jm.open_checkpoint(experts["maths"]) as opened, jm.open_checkpoint(experts["code"]) as other:
        lazily = jm.merge(jm.linear(), [opened.params, other.params])
        sources = {"path": str(experts["code"]), "opened": opened, "tree": loaded(experts["code"]), "merge": lazily}
        report = jm.merge_checkpoint(jm.linear(), sources, out=tmp_path / "merged")
        assert set(report.bytes_read) == {"path", "opened"}
        assert opened.params["model.norm.weight"][0] == loaded(experts["maths"])["model.norm.weight"][0], "still open"
        trees = [
            loaded(experts["code"]),
            loaded(experts["maths"]),
            loaded(experts["code"]),
            {k: x[...] for k, x in lazily.items()},
        ]
        check_equal(loaded(tmp_path / "merged"), jm.merge(jm.linear(), trees))


def test_save_lazily_saves_any_tree(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    expected = jm.merge(jm.linear(), [loaded(path) for path in experts.values()])
    with jm.open_checkpoint(experts["maths"]) as a, jm.open_checkpoint(experts["code"]) as b:
        merged = jm.merge(jm.linear(), [a.params, b.params])
        tree = {"layers": [merged[f"model.layers.{i}.mlp.weight"].T for i in range(2)], "scale": np.float32(3)}
        report = jm.save_lazily(tree, tmp_path / "merged", format="orbax", metadata={"by": "hand"}, sources={"a": a})
        assert report.bytes_read["a"] == a.bytes_read > 0
    found = loaded(tmp_path / "merged")
    assert found["scale"] == 3
    np.testing.assert_array_equal(found["layers/1"], np.asarray(expected["model.layers.1.mlp.weight"]).T)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # pyright: ignore[reportArgumentType]

        def do_GET(self) -> None:
            path = Path(self.translate_path(self.path))
            if not path.is_file():
                self.send_error(404)
                return
            data, wanted = path.read_bytes(), re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, len(data) - 1)
            if first >= len(data):
                self.send_error(416)
                return
            body = data[first : last + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_from_urls(server: str, tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    urls = {name: f"{server}/{name}" for name in experts}
    jm.merge_checkpoint(jm.ties(0.4), urls, base=f"{server}/base", out=tmp_path / "merged")
    check_equal(loaded(tmp_path / "merged"), expected_ties(base, experts))
    assert json.loads((tmp_path / "merged/config.json").read_text()) == {"of": "base"}


def test_overwrite_replaces_and_its_absence_protects(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    out = tmp_path / "merged"
    jm.merge_checkpoint(jm.linear(), experts, out=out)
    before = contents(out)
    with pytest.raises(jm.ConflictError, match="exists already"):
        jm.merge_checkpoint(jm.ties(0.4), experts, base=base, out=out)
    assert contents(out) == before
    jm.merge_checkpoint(jm.ties(0.4), experts, base=base, out=out, overwrite=True)
    check_equal(loaded(out), expected_ties(base, experts))


@pytest.mark.parametrize("out", ["base", ".", "base/model.safetensors"])
def test_an_input_is_never_overwritten(out: str, tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(jm.ConflictError, match="input 'the base'"):
        jm.merge_checkpoint(jm.ties(0.4), experts, base=base, out=tmp_path / out, overwrite=True)
    assert contents(tmp_path) == before


def changed(path: Path, **tensors: np.ndarray | None) -> Path:
    """A copy of a checkpoint with other tensors (None drops one)."""
    params = {name: x for name, x in {**loaded(path), **tensors}.items() if x is not None}
    return jm.save_checkpoint(path.with_name("changed"), params)


def nonfinite() -> np.ndarray:
    x = np.zeros((50, 16), BFLOAT16)
    x[49, 3] = np.nan
    return x


LAYER = "model.layers.1.mlp.weight"


@pytest.mark.parametrize(
    "tensors, method, error, message",
    [
        ({LAYER: None}, jm.ties(0.4), jm.StructureError, f"'bad' lacks '{LAYER}'"),
        ({"extra": np.zeros(3)}, jm.ties(0.4), jm.StructureError, "'bad' has 'extra'"),
        ({LAYER: np.zeros((5, 5), BFLOAT16)}, jm.ties(0.4), jm.ShapeError, f"'bad', tensor '{LAYER}'"),
        ({LAYER: np.zeros((50, 16), np.float32)}, jm.ties(0.4), jm.DTypeError, f"'bad', tensor '{LAYER}'"),
        ({"model.positions": np.arange(9) + 1}, jm.linear(), jm.StructureError, "'bad', tensor 'model.positions'"),
        ({LAYER: nonfinite()}, jm.linear(), jm.NonFiniteError, f"'bad', tensor '{LAYER}'"),
        ({LAYER: nonfinite()}, jm.ties(0.4), jm.NonFiniteError, f"'bad', tensor '{LAYER}'"),
        ({LAYER: nonfinite()}, jm.ties(0.4, scope="tensor"), jm.NonFiniteError, f"'bad', tensor '{LAYER}'"),
        ({LAYER: nonfinite()}, jm.della(0.4), jm.NonFiniteError, f"'bad', tensor '{LAYER}'"),
        ({}, jm.linear([1, 2, 3]), jm.RecipeError, "found 3 values, expected 2"),
    ],
)
def test_bad_experts(tensors: dict, method: jm.Method, error: type, message: str, tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    bad = changed(experts["code"], **tensors)
    before = contents(tmp_path)
    with pytest.raises(error, match=re.escape(message)):
        jm.merge_checkpoint(method, {"maths": experts["maths"], "bad": bad}, base=base, out=tmp_path / "merged", key=0)
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {*NAMES, "changed"}


def test_allow_nonfinite(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    experts["code"] = changed(experts["code"], **{LAYER: nonfinite()})
    jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "merged", allow_nonfinite=True)
    assert np.isnan(loaded(tmp_path / "merged")[LAYER].astype(np.float32)).sum() == 1


def test_nothing_is_read_before_everything_is_checked(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    bad = changed(experts["code"], **{LAYER: np.zeros((5, 5), BFLOAT16)})
    with jm.open_checkpoint(base) as opened:
        with pytest.raises(jm.ShapeError):
            jm.merge_checkpoint(jm.ties(0.4), [experts["maths"], bad], base=opened, out=tmp_path / "merged")
        with pytest.raises(jm.ConflictError):
            jm.merge_checkpoint(jm.ties(0.4), experts, base=opened, out=experts["maths"])
        assert opened.bytes_read == 0


@pytest.mark.parametrize("size", ["512MiB", "1.5 GiB", 10**8, "2gb"])
def test_budgets_as_text_and_numbers(size: int | str, tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "merged", memory_budget=size)


@pytest.mark.parametrize("size", ["much", "", "-1", 0, "1 PB"])
def test_budgets_that_are_none(size: int | str, tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    with pytest.raises(jm.RecipeError, match="memory_budget"):
        jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "merged", memory_budget=size)


def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    big = {"small": np.zeros(5, np.float32), "big": np.zeros((1000, 1000), np.float32)}
    with pytest.raises(jm.BudgetError, match=r"'big'.*needs [\d.]+ MiB"):
        jm.merge_checkpoint(jm.della(0.5), [big, big], base=big, out=tmp_path / "m", memory_budget="8MB", key=0)
    with pytest.raises(jm.BudgetError, match="needs at least"):
        jm.merge_checkpoint(jm.linear(), [big, big], out=tmp_path / "m", memory_budget="8kB")
    assert list(tmp_path.iterdir()) == []


def test_the_file_system_says_no(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    before = contents(tmp_path)
    with pytest.raises(jm.CheckpointError, match="cannot write"):
        jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "file" / "merged")
    assert contents(tmp_path) == before


@contextlib.contextmanager
def running(script: str, folder: Path) -> Iterator[subprocess.Popen]:
    """A Python process that runs a script in a folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def outcome(script: str, folder: Path) -> tuple[str, str]:
    """What a script prints, and its errors."""
    with running(script, folder) as process:
        return process.communicate(timeout=300)


SLOW_MERGE = """
    import os
    import time
    import numpy as np
    import jaxmerge as jm

    class Slow(jm.LazyTensor):
        shape, dtype, label = (200, 1000), np.dtype(np.float32), "slow"

        def read(self, box):
            os.write(1, b"reading\\n")
            time.sleep(0.05)
            return np.ones([piece.stop - piece.start for piece in box], np.float32)

    tree = {str(i): Slow() for i in range(1000)}
    jm.merge_checkpoint(jm.linear(), [tree, tree], out="merged", progress=False)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_merge_leaves_nothing_that_lasts(how: signal.Signals, tmp_path: Path) -> None:
    with running(SLOW_MERGE, tmp_path) as process:
        assert process.stdout is not None
        for _ in range(10):
            assert process.stdout.readline() == "reading\n"
        assert [path.name for path in tmp_path.iterdir()] == [".merged.partial"]
        process.send_signal(how)
        _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
        assert list(tmp_path.iterdir()) == []
    tree = {"w": ArrayTensor(np.ones(3, np.float32))}
    jm.merge_checkpoint(jm.linear(), [tree, tree], out=tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert list(loaded(tmp_path / "merged")) == ["w"]


def test_a_full_disk(tmp_path: Path) -> None:
    """The limit on the size of files stands in for a full disk: it strikes in the same calls."""
    script = """
        import resource
        import numpy as np
        import jaxmerge as jm

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        tree = {"w": np.ones((1000, 100), np.float32)}
        jm.merge_checkpoint(jm.linear(), [tree, tree], out="merged")
    """
    _, errors = outcome(script, tmp_path)
    assert "CheckpointError: cannot write" in errors
    assert list(tmp_path.iterdir()) == []


def test_memory_depends_on_the_budget_alone(tmp_path: Path) -> None:
    """Twice the experts and twice the tensors take no more memory, and what is taken stays near the budget."""
    rng = np.random.default_rng(0)
    layer = rng.normal(size=(2048, 1024)).astype(np.float32)
    for i in range(5):
        params = {f"layers.{n}.weight": layer * (1 + 0.01 * i) for n in range(4)}
        jm.save_checkpoint(tmp_path / f"model-{i}.safetensors", params)
    script = """
        import numpy as np
        import jaxmerge as jm
        from pathlib import Path

        def peak():
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10

        def merge(experts, budget):
            files = [f"model-{i}.safetensors" for i in range(experts + 1)]
            method = jm.ties(0.3, scope="tensor")
            jm.merge_checkpoint(method, files[1:], base=files[0], out="out", overwrite=True, memory_budget=budget)
            return peak()

        small = {"w": np.ones(5, np.float32)}  # starts everything that is started once
        jm.merge_checkpoint(jm.ties(0.3, scope="tensor"), [small, small], base=small, out="out")
        print(peak(), merge(2, 100 << 20), merge(4, 100 << 20))
    """
    output, errors = outcome(script, tmp_path)
    assert output, errors
    start, of_two, of_four = map(int, output.split())
    assert of_two < start + (110 << 20)
    assert of_four < start + (110 << 20)


def test_the_plan_is_shown_before_a_weight_is_read(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    base, experts = make_models(tmp_path)
    jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "merged", progress=False)
    assert capfd.readouterr() == ("", "")
    experts["code"] = changed(experts["code"], **{LAYER: nonfinite()})
    with pytest.raises(jm.NonFiniteError):
        jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "again", progress=True)
    shown = " ".join(capfd.readouterr().err.split())
    assert re.search(r"again: 6 tensors, [\d.]+ KiB to read, [\d.]+ KiB to write, at most [\d.]+ \w+ of memory", shown)


def test_the_report_in_terminal_and_notebook(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    report = jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "merged")
    size = sum(path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors"))
    assert report.bytes_written < size < report.bytes_written + 8192
    assert report.bytes_read["maths"] == report.bytes_written
    assert set(report.seconds) == {"open", "plan", "stream", "publish"}
    assert report.memory_peak > report.memory_planned > 0
    for text in (str(report), report._repr_html_()):
        for wanted in ("4 merged, 1 copied", "read from maths", "peak memory", str(report.path)):
            assert wanted in text
    assert repr(report).count("\n") == 0
