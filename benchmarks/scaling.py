"""How far `jm.estimate_cost` is from what happens, at three sizes: bytes read, collectives, memory of a device, time.

    PYTHONPATH=. python benchmarks/scaling.py
    PYTHONPATH=. python benchmarks/scaling.py --hidden 256 512 1024 --methods linear ties

Bytes are those that `merge_checkpoint` fetches. Collectives and memory are read from the programs that `jm.merge`
compiles for eight simulated devices, tensors sharded over both axes of a 4 x 2 mesh. Times are those of `jm.merge` on
one device; set OPENBLAS_NUM_THREADS=1 where other work shares the cores. Columns called *of cost* are what was found
divided by what was told.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from benchmarks._common import Shape
from jaxmerge.methods.assignment import assign
from jaxmerge.methods.measurements import begin_search, search_rounds
from jaxmerge.methods.merge import _buckets, _measure_model
from jaxmerge.methods.programs import count_whole, measure_whole, merge_whole

METHODS = {
    "linear": jm.linear(),
    "task_arithmetic": jm.task_arithmetic(0.3),
    "dare": jm.dare(0.5),
    "ties, each tensor": jm.ties(0.2, scope="tensor"),
    "ties": jm.ties(0.2),
    "tsv_m": jm.tsv_m(),
    "iso_c": jm.iso_c(),
}
MESH = {"data": 4, "model": 2}
DEVICES = 8
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def collective_bytes(program: str) -> float:
    """Bytes that a device receives while a compiled program runs; what a loop holds counts for each of its rounds."""
    named, entry = {}, ""
    for part in re.split(r"\n(?=(?:ENTRY )?%\S+ \()", program):
        if found := re.match(r"(ENTRY )?%(\S+) \(", part):
            named[found[2]] = part
            entry = found[2] if found[1] else entry

    def within(name: str) -> float:
        total = 0.0
        for line in named[name].splitlines():
            if found := re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})\(", line):
                total += received(line, found[1], found[2])
            elif found := re.search(r"body=%([\w.\-]+)", line):
                rounds = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                total += within(found[1]) * (int(rounds[1]) if rounds else 1)
            elif found := re.search(r" call\(.*to_apply=%([\w.\-]+)", line):
                total += within(found[1])
        return total

    return within(entry)


def received(line: str, results: str, kind: str) -> float:
    """Bytes that a device receives in one collective, whose results are these."""
    size = 0.0
    for bits, dims in re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", results):
        size += int(bits) / 8 * np.prod([int(n) for n in dims.split(",") if n])
    groups = re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", line)
    count = DEVICES if groups is None else int(groups[2] or len(groups[1].split(",")))
    if kind == "collective-permute":
        return size
    return size * {"all-reduce": 2, "reduce-scatter": count}.get(kind, 1) * (count - 1) / count


def compiled(method: jm.Method, experts: Any, base: Any) -> tuple[float, int]:
    """Bytes that a device receives during a merge, and the most that it holds for a program, inputs and result too."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))

    def put(tree: Any) -> Any:
        specs = {1: P("data"), 2: P("data", "model")}
        return {name: jax.device_put(x, NamedSharding(mesh, specs[x.ndim])) for name, x in tree.items()}

    buckets = _buckets(assign(method, [put(x) for x in experts], put(base), 0, jm.Rules()), traced=False)
    known = _measure_model(buckets, traced=False)
    total, held = 0.0, 0
    for bucket in buckets:
        program: Any = merge_whole.lower(
            *bucket.operands, known[bucket.group], batch=bucket.batch, sharding=bucket.sharding
        ).compile()
        total += collective_bytes(program.as_text()) + counted(bucket)
        sizes = program.memory_analysis()
        held = max(held, sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes)
    return total, held


def counted(bucket: Any) -> float:
    """Bytes that a device receives while an order statistic over the model is searched in a tensor."""
    method, *_ = bucket.operands
    if method.passes != ("model",):
        return 0.0
    search = begin_search(measure_whole(*bucket.operands, {}, batch=bucket.batch).ranks, jnp.float32)
    program: Any = count_whole.lower(*bucket.operands, {}, search, batch=bucket.batch).compile()
    return search_rounds(jnp.float32) * collective_bytes(program.as_text())


def fetched(method: jm.Method, experts: list[Any], base: Any) -> int:
    """Bytes that a merge from disk to disk reads."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(i) for i in range(len(experts) + 1)]
        for path, tree in zip(paths, [base, *experts], strict=True):
            jm.save_checkpoint(path, tree)
        report = jm.merge_checkpoint(
            method, paths[1:], base=paths[0], out=Path(folder) / "out", key=0, progress=False, memory_budget="4GiB"
        )
    return sum(report.bytes_read.values())


def row(name: str, hidden: int, count: int, rounds: int) -> str:
    method, rng = METHODS[name], np.random.default_rng(0)
    shapes = Shape(layers=4, hidden=hidden, intermediate=3 * hidden, heads=4, vocabulary=8 * hidden).tensors()
    base = {n: jnp.asarray(rng.standard_normal(s, np.float32), jnp.bfloat16) for n, s in shapes.items()}
    experts = []
    for _ in range(count):
        noise = {n: 0.01 * rng.standard_normal(x.shape, np.float32) for n, x in base.items()}
        experts.append({n: (x.astype(np.float32) + noise[n]).astype(x.dtype) for n, x in base.items()})
    told = jm.estimate_cost(method, experts, base=base, mesh=MESH)
    moved, held = compiled(method, experts, base)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(jm.merge(method, experts, base=base, key=0))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    cells = [name, f"{told.parameters:,}", f"{fetched(method, experts, base) / told.read_bytes:.3f}"]
    of_cost = f"{moved / told.collective_bytes:.2f}" if told.collective_bytes else "none told"
    cells += [f"{moved / 2**20:.3f} MiB", of_cost]
    cells += [f"{held / 2**20:.2f} MiB", f"{held / (told.device_memory - told.model_bytes / DEVICES):.2f}"]
    cells += [f"{1e3 * median:.1f}", f"{1e9 * median / told.parameters:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 256, 512], help="sizes of the model")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    head = [
        "method",
        "parameters",
        "read, of cost",
        "received",
        "of cost",
        "held by a device",
        "of cost",
        "ms",
        "ns each",
    ]
    print(f"| {' | '.join(head)} |\n| {' | '.join(['---'] * len(head))} |")
    for name in arguments.methods:
        for hidden in arguments.hidden:
            print(row(name, hidden, arguments.experts, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
