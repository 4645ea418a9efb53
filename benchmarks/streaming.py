"""Merges within an I/O budget: bytes, seconds and memory against the number of experts.

The experts lie behind a web server on this machine that hands out so many bytes a second and no more, so that reading
takes time although all files are in the page cache. Everything that is read is real data; only the models of 8 G
parameters are files without content.

    python benchmarks/streaming.py                                                    # 250 M parameters, 20 experts
    python benchmarks/streaming.py --layers 2 --hidden 256 --vocabulary 8000 --rate 50 --experts 2 4  # does it run?
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import itertools
import json
import math
import os
import shutil
import socketserver
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import Shape, make_models

import jaxmerge as jm
from jaxmerge.checkpoints.stores import open_store
from jaxmerge.methods.assignment import assign
from jaxmerge.streaming.access import BASE, plan_job
from jaxmerge.streaming.catalog import paired
from jaxmerge.streaming.content import BLOCK_BYTES as HASHED_BYTES
from jaxmerge.streaming.content import DIGEST_BYTES
from jaxmerge.streaming.fingerprint import fingerprint
from jaxmerge.streaming.statistics import BLOCK_BYTES, SKETCH, BlockStatistics, default_block

MB = 1e6
METHOD = jm.task_arithmetic(0.3)
STAGES = ("memory", "planning", "curve", "copy")
MEMORY_EXPERTS = 64
MEMORY_BUDGET = 256 << 20
MEMORY_ALLOWED = MEMORY_BUDGET + 300 * 10**6
SMALL = Shape(layers=4, hidden=512, intermediate=1408, heads=8, vocabulary=12000)  # 25 M parameters
LARGE = Shape(layers=36, hidden=4096, intermediate=12288, heads=32, vocabulary=65536)  # 8 G parameters


class Bucket:
    """Lets so many bytes a second pass, over all threads together."""

    def __init__(self, rate: float):
        self._rate, self._free, self._lock = rate, 0.0, threading.Lock()

    def take(self, n: int) -> None:
        """Waits until `n` bytes may pass. What was not used is lost after 50 ms."""
        with self._lock:
            self._free = max(self._free, time.monotonic() - 0.05) + n / self._rate
            wait = self._free - time.monotonic()
        if wait > 0:
            time.sleep(wait)


def serve(folder: Path, rate: float) -> None:
    """Serves the files of a folder by ranges; prints the port, and runs until its standard input ends."""
    bucket, piece = Bucket(rate), 128 << 10

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            path = folder / urllib.parse.unquote(self.path).lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            found = path.stat()
            start, stop = 0, found.st_size
            wanted = self.headers.get("Range")
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last or stop), stop - 1) + 1
                if start >= found.st_size:
                    self.send_error(416)
                    return
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{found.st_size}")
            self.send_header("Content-Length", str(stop - start))
            self.send_header("ETag", f'"{found.st_size}-{found.st_mtime_ns}"')
            self.end_headers()
            self.wfile.flush()
            with open(path, "rb") as file:
                while start < stop:
                    bucket.take(min(piece, stop - start))
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, min(piece, stop - start))

        def log_message(self, *_: Any) -> None:
            pass

    class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


@contextlib.contextmanager
def serving(folder: Path, rate: float) -> Iterator[str]:
    """The URL of a folder, served by another process."""
    command = [sys.executable, __file__, "--serve", str(folder), "--rate", str(rate)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.stdin.close()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def curve(folder: Path, shape: Shape, counts: Sequence[int], rate: float, rounds: int) -> dict[str, Any]:
    """Bytes and seconds over the number of experts, in full and within budgets, from the limited store."""
    out, most = folder / "out", max(counts)
    budgets = {"10 %": "10%", "30 %": "30%", "one expert": 2 * shape.parameters}
    rows: list[dict[str, Any]] = []
    with serving(folder, rate * MB) as url, jm.open_catalog(folder / "models.catalog") as catalog:
        experts = [f"{url}/expert_{i}" for i in range(most)]
        seconds, read = timed(lambda: catalog.add(f"{url}/base", experts, progress=False))
        print(f"catalog of {most} experts: {seconds:.1f} s, {sum(read.values()) / MB:.0f} MB", flush=True)
        for count in counts:
            given: dict[str, Any] = {"base": f"{url}/base", "out": out, "overwrite": True, "progress": False}
            # Compiles what merges of so many experts run, and reads the base.
            jm.merge_checkpoint(METHOD, experts[:count], io_budget=0, catalog=catalog, **given)
            for name, budget in {**budgets, "full": None}.items():
                options = given if budget is None else {**given, "io_budget": budget, "catalog": catalog}
                times, report = [], None
                for _ in range(rounds):
                    start = time.perf_counter()
                    report = jm.merge_checkpoint(METHOD, experts[:count], **options)
                    times.append(time.perf_counter() - start)
                assert report is not None and not report.bytes_analysed
                of_experts = sum(n for source, n in report.bytes_read.items() if source != BASE)
                row = {
                    "experts": count,
                    "budget": name,
                    "expert_bytes": of_experts,
                    "bytes": sum(report.bytes_read.values()) + report.bytes_written,
                    "seconds": statistics.median(times),
                    "rounds": times,
                    "plan_seconds": report.seconds.get("choose", 0.0),
                }
                if report.io_plan is not None:
                    plan = report.io_plan
                    row |= {"bound": plan.bound, "expected": plan.expected, "merged_norm": plan.merged_norm}
                rows.append(row)
                print(
                    f"{count:>3} experts, {name:<10} {of_experts / MB:>8.0f} MB of experts, {row['seconds']:>7.2f} s",
                    flush=True,
                )
    shutil.rmtree(out)
    return {"rows": rows, "catalog_seconds": seconds, "catalog_bytes": sum(read.values())}


def copy(folder: Path, count: int, rate: float, rounds: int) -> dict[str, Any]:
    """A merge in full beside reading the same bytes and writing the output, from the page cache and the store."""
    names = ["base", *(f"expert_{i}" for i in range(count))]
    out = folder / "out"
    result: dict[str, Any] = {"experts": count}
    with serving(folder, rate * MB) as url:
        for kind, root in (("page cache", str(folder)), ("store", url)):
            merges, floors = [], []
            for _ in range(rounds + 1):  # the first one compiles, and brings the files into the page cache
                floors.append(timed(lambda root=root: plain_copy([f"{root}/{name}" for name in names], out))[0])
                shutil.rmtree(out)
                merges.append(
                    timed(
                        lambda root=root: jm.merge_checkpoint(
                            METHOD, [f"{root}/{x}" for x in names[1:]], base=f"{root}/base", out=out, progress=False
                        )
                    )[0]
                )
                shutil.rmtree(out)
                if kind == "store" and rounds == 1:
                    break
            ours, floor = (statistics.median(x[1:] or x) for x in (merges, floors))
            result[kind] = {"merge": ours, "copy": floor, "ratio": ours / floor}
            print(
                f"{count} experts, {kind}: merge {ours:.2f} s, copy {floor:.2f} s, {ours / floor:.2f} times", flush=True
            )
    return result


def plain_copy(models: Sequence[str], out: Path) -> None:
    """Reads all models, and writes and syncs as much as the first of them holds."""
    buffer = np.empty(8 << 20, np.uint8)
    out.mkdir()
    with open(out / "model.safetensors", "wb") as target:
        for model in models:
            store, _ = open_store(model, None)
            source = store.source("model.safetensors")
            assert source is not None
            size = source.size
            for at in range(0, size, buffer.size):
                part = buffer[: min(buffer.size, size - at)]
                source.read_into(at, part)
                if model == models[0]:
                    target.write(part.data)
            store.close()
        target.flush()
        os.fsync(target.fileno())


def memory(folder: Path) -> dict[str, Any]:
    """The peak memory of merges of many experts, each in a process of its own."""
    make_models(folder, SMALL, MEMORY_EXPERTS)
    with jm.open_catalog(folder / "models.catalog") as catalog:
        catalog.add(folder / "base", [folder / f"expert_{i}" for i in range(MEMORY_EXPERTS)], progress=False)
    result: dict[str, Any] = {"experts": MEMORY_EXPERTS, "budget": MEMORY_BUDGET, "allowed": MEMORY_ALLOWED}
    for name, budget in (("libraries", ""), ("full", "none"), ("10 %", "10%")):
        command = [sys.executable, __file__, "--merge-once", str(folder), budget]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result[name] = int(answer.split()[-1])
        print(f"{MEMORY_EXPERTS} experts, {name}: peak memory {result[name] / MB:.0f} MB", flush=True)
    return result


def merge_once(folder: Path, budget: str) -> None:
    """What a process of `memory` does: it merges, unless the budget is "", and prints its peak memory in bytes."""
    experts = [folder / f"expert_{i}" for i in range(MEMORY_EXPERTS)]
    options: dict[str, Any] = {"base": folder / "base", "out": folder / "out", "memory_budget": MEMORY_BUDGET}
    if budget not in ("", "none"):
        options |= {"io_budget": budget, "catalog": folder / "models.catalog"}
    if budget:
        jm.merge_checkpoint(METHOD, experts, overwrite=True, progress=False, **options)
    else:
        jm.merge(METHOD, [{"x": np.ones(2, np.float32)}], base={"x": np.ones(2, np.float32)})
    # Not ru_maxrss, which a new process has from the one that started it.
    print(1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))


def planning(folder: Path, count: int, rate: float) -> dict[str, Any]:
    """Planning for models of which only the headers are stored, with made-up statistics, and the merge that is planned.

    The files are sparse: what is read of the tensors is zero, and comes at the rate of the limited store.
    """
    names = ["base", *(f"expert_{i}" for i in range(count))]
    header: dict[str, Any] = {}
    at = 0
    for name, dims in LARGE.tensors().items():
        size = 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    for name in names:
        (folder / name).mkdir(parents=True)
        with open(folder / name / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as opened:
        url = opened.enter_context(serving(folder, rate * MB))
        opening, sources = timed(lambda: {n: opened.enter_context(jm.open_checkpoint(f"{url}/{n}")) for n in names})
        catalog = opened.enter_context(jm.open_catalog(folder / "models.catalog"))
        sources = {BASE: sources.pop("base"), **sources}
        base = sources[BASE]
        for name, expert in itertools.islice(sources.items(), 1, None):
            states = {"": fingerprint(base), name: fingerprint(expert)}
            with catalog._connection:
                ids = {"": catalog._register(base, states[""]), name: catalog._register(expert, states[name])}
                for tensor, (_, leaf) in paired(base, expert).items():
                    blocks = rng.bytes(DIGEST_BYTES * -(-leaf.nbytes // HASHED_BYTES))
                    contents = {"": blocks, name: blocks}
                    catalog._store(ids, states, tensor, {name: made_up(leaf, rng)}, contents)
                catalog._set_content(base, ids[""])
                catalog._set_content(expert, ids[name])
        trees = {name: source.params for name, source in sources.items()}
        job = assign(METHOD, trees, trees.pop(BASE), None, jm.Rules())
        times, of_processor = [], []
        for _ in range(4):  # the first one compiles
            start, start_of_processor = time.perf_counter(), time.process_time()
            plan_job(job, sources, catalog, "10%")
            times.append(time.perf_counter() - start)
            of_processor.append(time.process_time() - start_of_processor)
        experts = {name: source for name, source in sources.items() if name != BASE}
        report = jm.merge_checkpoint(
            METHOD, experts, base=base, out=folder / "out", io_budget="10%", catalog=catalog, progress=False
        )
        shutil.rmtree(report.path)
    result = {
        "experts": count,
        "parameters": LARGE.parameters,
        "catalog_bytes": (folder / "models.catalog").stat().st_size,
        "open_seconds": opening,
        "seconds": statistics.median(times[1:]),
        "processor_seconds": statistics.median(of_processor[1:]),
        "first_seconds": times[0],
        "merge": dict(report.seconds),
        "read": sum(report.bytes_read.values()),
    }
    print(
        f"planning {count} experts of {LARGE.parameters / 1e9:.1f} G parameters: {result['seconds']:.2f} s, "
        f"{result['processor_seconds']:.2f} s of a core; {times[0]:.2f} s the first time",
        flush=True,
    )
    print(f"the merge, {result['read'] / MB:.0f} MB read: {report.seconds}", flush=True)
    return result


def made_up(leaf: Any, rng: np.random.Generator) -> BlockStatistics:
    """Statistics of a tensor that is nowhere."""
    block = default_block(leaf, BLOCK_BYTES)
    count = -(-leaf.size // block)
    return BlockStatistics(
        leaf.size,
        block,
        rng.lognormal(size=count),
        np.ones(count),
        np.zeros(count, np.int64),
        np.full(count, block),
        rng.standard_normal((count, SKETCH), np.float32),
    )


def judged(results: dict[str, Any]) -> list[tuple[str, float, str, float]]:
    """The figures that matter: what, how much, at most or at least, the limit."""
    figures: list[tuple[str, float, str, float]] = []
    if "curve" in results:
        rows = {(row["experts"], row["budget"]): row for row in results["curve"]["rows"]}
        most = max(count for count, _ in rows)
        full, tenth = rows[most, "full"], rows[most, "10 %"]
        flat = [row["expert_bytes"] for row in rows.values() if row["budget"] == "one expert"]
        figures += [
            ("expert bytes within a fixed budget, most / fewest", max(flat) / min(flat), "<=", 1.01),
            (f"expert bytes, {most} experts, full / 10 %", full["expert_bytes"] / tenth["expert_bytes"], ">=", 9),
            (f"seconds, {most} experts, full / 10 %", full["seconds"] / tenth["seconds"], ">=", 5),
            ("seconds to choose, share of that merge", tenth["plan_seconds"] / tenth["seconds"], "<=", 0.05),
        ]
    if "copy" in results:
        for kind in ("page cache", "store"):
            figures.append((f"seconds, merge in full / copy, {kind}", results["copy"][kind]["ratio"], "<=", 1.5))
    if "memory" in results:
        for name in ("full", "10 %"):
            share = results["memory"][name] / results["memory"]["allowed"]
            figures.append((f"peak memory of {MEMORY_EXPERTS} experts, {name} / allowed", share, "<=", 1))
    if "planning" in results:
        # Of a core, since planning has one thread and other work may run.
        figures.append(("seconds to plan 20 experts of 8 G", results["planning"]["processor_seconds"], "<=", 1))
        merge = results["planning"]["merge"]
        figures.append(
            ("seconds to choose, share of the merge of these", merge["choose"] / sum(merge.values()), "<=", 0.01)
        )
    return figures


def print_tables(results: dict[str, Any]) -> None:
    if "curve" in results:
        print("\n| experts | budget | MB of experts | MB in all | seconds | error, expected | at most |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for row in results["curve"]["rows"]:
            errors = ["", ""]
            if row["budget"] != "full":
                errors = [f"{row[x] / row['merged_norm']:.2f}" for x in ("expected", "bound")]
            cells = [row["experts"], row["budget"], f"{row['expert_bytes'] / MB:.0f}", f"{row['bytes'] / MB:.0f}"]
            cells += [f"{row['seconds']:.2f}", *errors]
            print(f"| {' | '.join(map(str, cells))} |")
        full, of_catalog = results["curve"]["rows"][-1], results["curve"]["catalog_seconds"]
        tenth = next(x for x in reversed(results["curve"]["rows"]) if x["budget"] == "10 %")
        gain = full["seconds"] - tenth["seconds"]
        print(
            f"\ncold: the catalog takes {of_catalog:.1f} s once, worth it from merge {math.ceil(of_catalog / gain)} on"
        )
    print("\n| figure | found | wanted |\n| --- | --- | --- |")
    for what, found, relation, limit in judged(results):
        reached = found <= limit if relation == "<=" else found >= limit
        print(f"| {what} | {found:.3g}{'' if reached else ' (missed)'} | {relation} {limit:g} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Merges within an I/O budget: bytes, seconds and memory.")
    parser.add_argument("--dir", type=Path, help="folder for the models; a temporary one unless given")
    parser.add_argument("--keep", action="store_true", help="leave the models there, and take them if they are")
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16, 20])
    parser.add_argument("--rate", type=float, default=200, help="MB a second that the server hands out")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--merge-once", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.rate)
    if options.merge_once:
        return merge_once(Path(options.merge_once[0]), options.merge_once[1])
    shape = Shape(options.layers, options.hidden, options.hidden * 11 // 4, options.hidden // 64, options.vocabulary)
    results: dict[str, Any] = {"parameters": shape.parameters, "rate": options.rate, "rounds": options.rounds}
    print(f"models of {shape.parameters / 1e6:.0f} M parameters, {options.rate:g} MB a second", flush=True)
    with contextlib.ExitStack() as stack:
        root = options.dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxmerge-streaming-")))
        root.mkdir(parents=True, exist_ok=True)
        for stage in STAGES:
            if stage not in options.only:
                continue
            folder = root / ("models" if stage in ("curve", "copy") else stage)
            if stage in ("curve", "copy") and not (folder / f"expert_{max(options.experts) - 1}").exists():
                shutil.rmtree(folder, ignore_errors=True)
                print(f"making the models: {timed(lambda: make_models(folder, shape, max(options.experts)))[0]:.0f} s")  # noqa: B023
            if stage == "memory":
                results[stage] = memory(folder)
            elif stage == "planning":
                results[stage] = planning(folder, 20, options.rate)
            elif stage == "curve":
                (folder / "models.catalog").unlink(missing_ok=True)
                results[stage] = curve(folder, shape, options.experts, options.rate, options.rounds)
            else:
                results[stage] = copy(folder, min(8, max(options.experts)), options.rate, options.rounds)
            if stage in ("memory", "planning"):
                shutil.rmtree(folder)
        if options.dir and not options.keep:
            shutil.rmtree(root / "models", ignore_errors=True)
    print_tables(results)
    if options.json:
        options.json.write_text(json.dumps({**results, "figures": judged(results)}, indent=1))


if __name__ == "__main__":
    main()
