"""Whole merge commands of jaxmerge and mergekit on the same files, in turn, with the floor beside them.

Each command runs as a process of its own: start-up, imports and compilation count. The floor is what any merge has to
do: read the same bytes once and write the output. In a round every tool and the floor have their turn, each right after
all inputs were read once, so that they come from the page cache. One more round after those drops the inputs from it
instead: what the system then fetches from the disk are the bytes that a command reads. It does not enter the medians.

Errors are taken against a float64 reference (see `_common.py`). "Inside" is the merge itself, called repeatedly in one
process, against the floor in that process. Linux only (`/proc`, advice on the page cache).

This process imports the standard library alone and stays small, because the peak memory that Linux reports for a child
starts at the peak of its parent. Making the files, checking the results and "inside" have processes of their own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _common import Error

BLOCK = 1 << 20  # bytes per read of the floor: large enough to be cheap, small enough to stay in the processor's caches
PARTS = ("jaxmerge", "mergekit", "inside")


@dataclass(frozen=True)
class Method:
    """One merge: as a mergekit recipe, and as the same method of jaxmerge."""

    with_base: bool
    parameters: dict[str, float]  # of each expert
    ours: Callable[[Any], Any]  # jaxmerge -> method


METHODS = {
    "linear": Method(False, {"weight": 1.0}, lambda jm: jm.linear()),
    "task_arithmetic": Method(True, {"weight": 0.25}, lambda jm: jm.task_arithmetic(0.25)),
    "ties": Method(True, {"weight": 1.0, "density": 0.2}, lambda jm: jm.ties(0.2, scope="tensor")),
}


@dataclass(frozen=True)
class Usage:
    """What one process took.

    Attributes:
        seconds: wall time.
        peak: peak resident memory in bytes, as the system reports it: pages of memory-mapped files included.
        anonymous: peak of the part that the process allocated itself, sampled every 10 ms, in bytes.
        fetched: bytes fetched from the disk, which are the bytes read where the page cache was cold.
    """

    seconds: float
    peak: int
    anonymous: int
    fetched: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="keeps the models there for another run (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=3, help="warm rounds, of which medians are taken")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=16, help="blocks of the model; 16 make 271 M parameters")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to run beside the floor")
    parser.add_argument("--mergekit", default="mergekit-yaml", help="the command, where it is not on the path")
    parser.add_argument("--json", type=Path, help="writes every single measurement there")
    arguments = parser.parse_args()
    # For every process started here: no accelerator, and no look-up of model names for mergekit's model card.
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    if arguments.dir:
        arguments.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="merge_throughput_", dir=arguments.dir) as work:
        results = compare(arguments, Path(work))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def compare(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Makes the models, measures and prints one method after the other; returns everything that was measured."""
    tools: dict[str, list[str]] = {}
    facts: dict[str, object] = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    if "jaxmerge" in arguments.only:
        tools["jaxmerge"] = [sys.executable, "-m", "jaxmerge", "merge", "{recipe}", "--out", "{out}"]
        facts |= {package: version(package) for package in ("jax", "jaxlib")}
    if "mergekit" in arguments.only:
        command = shutil.which(arguments.mergekit)
        if command is None:
            raise SystemExit(f"{arguments.mergekit} not found: see README.md, or leave mergekit out with --only")
        tools["mergekit"] = [command, "{recipe}", "{out}", "--no-copy-tokenizer", "--quiet"]
        ask = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'), v('transformers'))"
        versions = subprocess.check_output([Path(command).with_name("python"), "-c", ask], text=True).split()
        facts |= dict(zip(("mergekit", "torch", "transformers"), versions, strict=True))
    models = (arguments.dir or work) / f"llama_{arguments.layers}_layers_{arguments.experts}_experts"
    facts |= in_own_process(prepare, models, work, arguments.layers, arguments.experts)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)

    results: dict[str, Any] = {"facts": facts, "methods": {}}
    for name in arguments.methods:
        experts = [models / f"expert_{i}" for i in range(arguments.experts)]
        base = [models / "base"] * METHODS[name].with_base
        recipe, out = work / f"{name}.yml", work / "merged"
        recipe.write_text(mergekit_recipe(name, base, experts))
        commands = {tool: [w.format(recipe=recipe, out=out) for w in words] for tool, words in tools.items()}
        row = measure(name, [*base, *experts], commands, out, arguments.rounds)
        if "inside" in arguments.only:
            row["inside"] = in_own_process(measure_inside, name, base, experts, out, arguments.rounds)
        print(table(name, row), flush=True)
        results["methods"][name] = row
    return results


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Calls `function` in a fresh process, which takes its memory with it when it ends."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def prepare(models: Path, work: Path, layers: int, experts: int) -> dict[str, int]:
    """Makes the models, unless they are there from another run, in `work` and moves them; returns what they are."""
    from _common import Shape, make_models

    shape = Shape(layers=layers)
    needed = 2 * shape.parameters * (1 if models.exists() else experts + 2)
    if shutil.disk_usage(work).free < needed:
        raise SystemExit(f"{work}: {needed / 1e9:.1f} GB are needed and not free; give another --dir")
    if not models.exists():
        make_models(work / "new", shape, experts)
        (work / "new").rename(models)
    return {"parameters": shape.parameters, "experts": experts}


def mergekit_recipe(name: str, base: Sequence[Path], experts: Sequence[Path]) -> str:
    """The recipe that both tools read (JSON is YAML)."""
    parameters = METHODS[name].parameters
    recipe: dict[str, object] = {
        "merge_method": name,
        "models": [{"model": str(expert), "parameters": parameters} for expert in experts],
        "dtype": "bfloat16",
    }
    if base:
        recipe["base_model"] = str(base[0])
    return json.dumps(recipe, indent=2)


def measure(
    name: str, inputs: Sequence[Path], commands: dict[str, list[str]], out: Path, rounds: int
) -> dict[str, Any]:
    """Runs the commands and the floor in turn: `rounds` warm rounds, then a cold one."""
    files = [path / "model.safetensors" for path in inputs]
    usages: dict[str, list[Usage]] = {tool: [] for tool in commands}
    errors: dict[str, Error] = {}
    floors = []
    for cold in [False] * rounds + [True]:
        for tool, command in commands.items():
            (drop if cold else read)(files)
            usages[tool].append(run(command))
            if tool not in errors:
                errors[tool] = in_own_process(check, name, inputs, out)
            shutil.rmtree(out)
        if not cold:
            floors.append(floor(files, out))
    return {
        "input_bytes": sum(file.stat().st_size for file in files),
        "floor": [seconds for seconds, _ in floors],
        "floor_fsync": [seconds for _, seconds in floors],
        "runs": {tool: [asdict(usage) for usage in taken[:-1]] for tool, taken in usages.items()},
        "fetched_cold": {tool: taken[-1].fetched for tool, taken in usages.items()},
        "errors": {tool: asdict(error) for tool, error in errors.items()},
    }


def run(command: Sequence[str]) -> Usage:
    """Runs a command to its end. What it prints is shown only when it fails."""
    with tempfile.TemporaryFile("w+") as printed:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        anonymous = 0
        # WNOWAIT leaves the ended process in place, so that its I/O counters can still be read.
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            anonymous = max(anonymous, counter(process.pid, "status", "RssAnon:") * 1024)
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        fetched = counter(process.pid, "io", "read_bytes:")
        _, status, used = os.wait4(process.pid, 0)
        if status:
            printed.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{printed.read()}")
    return Usage(seconds, used.ru_maxrss * 1024, anonymous, fetched)


def counter(pid: int, file: str, name: str) -> int:
    """One number out of /proc/PID/`file`; 0 where the process has none (it is just ending)."""
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0


def drop(files: Sequence[Path]) -> None:
    """Drops the files from the page cache."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened)  # pages that are not on disk yet would stay
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: Sequence[Path]) -> None:
    """Reads the files once, into the page cache."""
    buffer = bytearray(BLOCK)
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def floor(files: Sequence[Path], out: Path) -> tuple[float, float]:
    """Seconds for reading all files (of one size) once and writing one of them, and for an fsync of that on top."""
    read(files)
    buffer = memoryview(bytearray(BLOCK))
    start = time.perf_counter()
    sources = [os.open(file, os.O_RDONLY) for file in files]
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    at = 0
    while True:
        for source in sources:
            got = os.preadv(source, [buffer], at)
        if got == 0:
            break
        at += os.pwrite(target, buffer[:got], at)
    written = time.perf_counter()
    os.fsync(target)
    synced = time.perf_counter()
    for descriptor in (*sources, target):
        os.close(descriptor)
    out.unlink()
    return written - start, synced - written


def check(name: str, inputs: Sequence[Path], out: Path) -> Error:
    """The error of the checkpoint in `out`."""
    from _common import measure_error

    return measure_error(inputs, out, name, METHODS[name].parameters)


def measure_inside(
    name: str, base: Sequence[Path], experts: Sequence[Path], out: Path, rounds: int
) -> dict[str, list[float]]:
    """Seconds of `merge_checkpoint` and of the floor, in turn in one process; the first merge also compiles."""
    import jaxmerge as jm

    files = [path / "model.safetensors" for path in (*base, *experts)]
    seconds: dict[str, list[float]] = {"merge": [], "floor": [], "floor_fsync": []}
    for _ in range(rounds + 1):
        read(files)
        start = time.perf_counter()
        jm.merge_checkpoint(METHODS[name].ours(jm), list(experts), base=base[0] if base else None, out=out)
        seconds["merge"].append(time.perf_counter() - start)
        shutil.rmtree(out)
        plain, synced = floor(files, out)
        seconds["floor"].append(plain)
        seconds["floor_fsync"].append(synced)
    return seconds


def table(name: str, row: dict[str, Any]) -> str:
    """The medians of one method, and by how much mergekit takes more."""
    median = statistics.median
    lines = [
        "",
        f"{name:17} {'wall s':>8} {'peak MiB':>9} {'own MiB':>8} {'read GB':>8} {'max error':>10} "
        f"{'rms error':>10} > 1 ulp",
    ]
    medians = {}
    for tool, runs in row["runs"].items():
        medians[tool] = [median(run[key] for run in runs) for key in ("seconds", "peak", "anonymous")]
        (seconds, peak, anonymous), error = medians[tool], row["errors"][tool]
        lines.append(
            f"  {tool:15} {seconds:8.2f} {peak / 2**20:9.0f} {anonymous / 2**20:8.0f} "
            f"{row['fetched_cold'][tool] / 1e9:8.2f} {error['largest']:10.3g} {error['rms']:10.3g} "
            f"{error['beyond_ulp']:7.3%}"
        )
    if len(medians) == 2:
        seconds, peak, anonymous = (b / a for a, b in zip(medians["jaxmerge"], medians["mergekit"], strict=True))
        lines.append(f"  {'ratio':15} {seconds:7.1f}x {peak:8.1f}x {anonymous:7.1f}x")
    lines.append(
        f"  {'floor':15} {median(row['floor']):8.2f} {'':9} {'':8} {row['input_bytes'] / 1e9:8.2f} "
        f"(an fsync takes {median(row['floor_fsync']):.2f} s more)"
    )
    if "inside" in row:
        first, *later = row["inside"]["merge"]
        merge, floor_inside = median(later), median(row["inside"]["floor"])
        lines.append(
            f"  {'inside':15} {merge:8.2f} = {merge / floor_inside:.2f} times the floor in that process, "
            f"{floor_inside:.2f} s; the first call took {first:.2f} s"
        )
    for error in list(row["errors"].values())[:1]:  # the same for every tool
        lines.append(
            f"  rms error of rounding alone {error['rounding_rms']:.3g}; {error['undecided']:.1%} of the entries "
            "are tied at a cut and left out of the errors"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
