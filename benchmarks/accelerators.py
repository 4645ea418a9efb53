"""What part of a device's memory bandwidth a merge in memory reaches: the same script for CPU and GPU.

Every merge reads the base, where its method has one, and the experts, and writes the result: so many bytes it cannot do
without. Divided by the time they give its bandwidth, which is compared with that of copying an array on the same
device, measured in turn with it. A merge that has to read its inputs several times reaches a part of the copy at best;
what that is by its `passes` stands beside it.

The model has the tensors of a Llama-shaped one in bfloat16. `program` is the whole merge as one compiled function
(`jax.jit`), `calls` is `jm.merge` outside of one, with a program per tensor shape and a look at every input for NaN.

    python benchmarks/accelerators.py                                   # 1 B parameters on a GPU, 20 M on a CPU
    python benchmarks/accelerators.py --parameters 1000000 --rounds 3   # does it run?
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxmerge as jm
from jaxmerge.methods.measurements import search_rounds

Model = dict[str, jax.Array]
LAYERS = 16
ROUNDS = search_rounds(jnp.float32)  # counting passes of an order statistic


@dataclass(frozen=True)
class Case:
    """A method, how often it reads its inputs, and what part of the copy's bandwidth it is to reach."""

    method: jm.Method
    with_base: bool
    passes: int = 1
    aim: float | None = None


CASES = {
    "linear": Case(jm.linear(), False, aim=0.8),
    "task_arithmetic": Case(jm.task_arithmetic(0.25), True, aim=0.8),
    "dare": Case(jm.dare(0.5), True),
    "model_stock": Case(jm.model_stock(), True, 2),
    "ties": Case(jm.ties(0.2), True, ROUNDS + 1, aim=0.5),
    "ties_tensor": Case(jm.ties(0.2, scope="tensor"), True, ROUNDS + 1, aim=0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parameters", type=int, help="of the model; 1 B on an accelerator and 20 M on a CPU if not given"
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7, help="of which medians are taken, after one that compiles")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--json", type=Path, help="writes every single measurement there")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    parameters = arguments.parameters or (20_000_000 if device.platform == "cpu" else 1_000_000_000)

    base, *experts = make_models(parameters, 1 + arguments.experts)
    size = sum(x.nbytes for x in base.values())
    print(
        f"{device.device_kind}, jax {jax.__version__}; {arguments.experts} experts of {size / 2e6:.0f} M parameters in "
        f"{len(base)} tensors, bfloat16; medians of {arguments.rounds}\n"
    )
    print(f"{'':17} {'bytes':>9} {'program':>28}   {'calls':>28}   best by passes, aim")
    array = jnp.zeros(size // 2, jnp.bfloat16)
    copy = timed(jax.jit(jnp.copy), (array,))
    results = {}
    for name in arguments.methods:
        case = CASES[name]
        merge = merging(case)
        given = (base if case.with_base else None, experts)
        needed = size * (len(experts) + case.with_base + 1)
        ways = {"copy": copy, "program": timed(jax.jit(merge), given), "calls": timed(merge, given)}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.rounds):
            for way, run in ways.items():
                seconds[way].append(run())
        print(row(name, case, needed, 2 * size, seconds, len(experts)), flush=True)
        results[name] = {"bytes": needed, "copied": 2 * size, "seconds": seconds}
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": device.device_kind, "results": results}, indent=2) + "\n")


def merging(case: Case) -> Callable[..., Model]:
    return lambda base, experts: jm.merge(case.method, experts, base=base, key=0)


def shapes(parameters: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama-shaped model with about so many parameters, in 16 layers."""
    unit = 128  # entries
    hidden = unit * max(round((parameters / 248) ** 0.5 / unit), 1)
    block = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden // 4, hidden),
        "v_proj": (hidden // 4, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (4 * hidden, hidden),
        "up_proj": (4 * hidden, hidden),
        "down_proj": (hidden, 4 * hidden),
        "norm": (hidden,),
    }
    layers = {f"layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in block.items()}
    return {"embed_tokens.weight": (16 * hidden, hidden)} | layers


def make_models(parameters: int, count: int) -> list[Model]:
    """A base, and experts whose changes are a twentieth of the size of the weights, rounded to bfloat16."""
    models: list[Model] = [{} for _ in range(count)]
    make = jax.jit(_tensors, static_argnums=(1, 2))
    for i, (name, shape) in enumerate(shapes(parameters).items()):
        for model, tensor in zip(models, make(jax.random.key(i), shape, count), strict=True):
            model[name] = tensor
    return models


def _tensors(key: jax.Array, shape: tuple[int, ...], count: int) -> list[jax.Array]:
    base, *changes = (jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(key, count))
    return [base, *(base + change / 20 for change in changes)]


def timed(function: Callable[..., Any], given: tuple[Any, ...]) -> Callable[[], float]:
    """Runs a function to the end; the seconds it took. It has run once before, to compile."""

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function(*given))
        return time.perf_counter() - start

    run()
    return run


def row(name: str, case: Case, needed: int, copied: int, seconds: dict[str, list[float]], experts: int) -> str:
    """Times, bandwidths and what part of the copy's they are."""
    copy = copied / statistics.median(seconds["copy"])
    cells = []
    for way in ("program", "calls"):
        taken = statistics.median(seconds[way])
        cells.append(f"{1e3 * taken:8.1f} ms {needed / taken / 1e9:6.0f} GB/s {needed / taken / copy:4.0%}")
    inputs = experts + case.with_base
    best = (inputs + 1) / (inputs * case.passes + 1)
    aim = "" if case.aim is None else f", aim {case.aim:.0%}"
    return f"{name:17} {needed / 1e9:6.2f} GB {cells[0]}   {cells[1]}   {best:4.0%}{aim}; copy {copy / 1e9:.0f} GB/s"


if __name__ == "__main__":
    main()
