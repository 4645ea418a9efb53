"""Every operator on the tensors of one layer, in memory, beside published implementations of the same operator.

The tensors are an MLP kernel, `--rows` x `--columns`, and an attention kernel, `--columns` x `--columns`, in float32; a
base and `--experts` experts. A time is that of a whole call: from arrays in memory to merged arrays in memory. The
first call of ours also compiles. Implementations are called on tensors directly, in a process of their own Python (see
`_peers.py`), on the same values, which they hold as (out, in). In a round every side has its turn.

With `--memory` nothing is timed: it prints what the compiler says each operator needs beside its inputs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _memory import working_set

import jaxmerge as jm
from jaxmerge.methods.doge import doge
from jaxmerge.methods.enchtable import enchtable
from jaxmerge.methods.isotropic import iso_c, iso_cts
from jaxmerge.methods.opcm import opcm
from jaxmerge.methods.tsv import tsv_m
from jaxmerge.methods.wudi import aswudi, optmerge, swudi, wudi

LIBRARIES = ("mergekit", "PEFT", "FusionBench")
Tensors = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A published function and the parameters with which it does what ours does."""

    library: str
    function: str
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator of ours and its peers.

    Attributes:
        ours: a method, or a function of experts and base.
        peers: published implementations.
        experts: how many experts take part, the first ones; None for all.
        with_base: whether ours is given the base.
        draws: results are random, so they are not compared.
    """

    ours: jm.Method | Callable[[list[Tensors], Tensors], Tensors]
    peers: tuple[Peer, ...] = ()
    experts: int | None = None
    with_base: bool = True
    draws: bool = False

    def run(self, base: Tensors, experts: list[Tensors]) -> Tensors:
        experts = experts[: self.experts]
        if not isinstance(self.ours, jm.Method):
            return jax.block_until_ready(self.ours(experts, base))
        return jax.block_until_ready(jm.merge(self.ours, experts, base=base if self.with_base else None, key=0))


def unified_by_emr(experts: list[Tensors], base: Tensors) -> Tensors:
    held = jm.emr_experts(experts, base=base)
    return {"held": held, **{name: base[name] + vector for name, vector in held.unified.items()}}


def needed_by_tall_masks(experts: list[Tensors], base: Tensors) -> Tensors:
    """In how many experts each entry is needed."""
    held = jm.tall_experts(experts, base=base, threshold=0.4)
    masks = [held.mask(expert) for expert in held.names]
    return {name: sum(mask[name].astype(jnp.int32) for mask in masks) for name in base}


def operators(steps: int) -> dict[str, Operator]:
    """Every operator, by name; `steps` are those of optimisers, where they can be chosen."""
    published_ties = jm.chain(jm.trim(0.2, inclusive=True), jm.elect_sign(zero="majority"), jm.disjoint_mean())
    equal, mean = {"weight": 1.0}, {"weight": 1.0, "normalize": True}
    return {
        "linear": Operator(
            jm.linear(),
            (Peer("mergekit", "linear", {**equal, "with_base": False}), Peer("FusionBench", "state_dict_avg")),
            with_base=False,
        ),
        "slerp": Operator(
            jm.slerp(0.5), (Peer("mergekit", "slerp", {"t": 0.5}), Peer("FusionBench", "slerp", {"t": 0.5})), experts=1
        ),
        "nuslerp": Operator(jm.nuslerp(), (Peer("mergekit", "nuslerp", equal),), experts=2),
        "multislerp": Operator(jm.multislerp(), (Peer("mergekit", "multislerp", equal),)),
        "karcher": Operator(jm.karcher(), (Peer("mergekit", "karcher", {"with_base": False}),), with_base=False),
        "nearswap": Operator(jm.nearswap(1e-3), (Peer("mergekit", "nearswap", {"t": 1e-3}),), experts=1),
        "passthrough": Operator(jm.passthrough(0.9), experts=1, with_base=False),
        "model_stock": Operator(jm.model_stock(), (Peer("mergekit", "model_stock"),)),
        "task_arithmetic": Operator(
            jm.task_arithmetic(0.3),
            tuple(Peer(library, "task_arithmetic", {"weight": 0.3}) for library in ("mergekit", "PEFT")),
        ),
        "ties_tensor": Operator(
            jm.ties(0.2, scope="tensor"),
            tuple(Peer(library, "ties", {**equal, "density": 0.2}) for library in ("mergekit", "PEFT")),
        ),
        "ties": Operator(
            published_ties, (Peer("FusionBench", "ties_merging", {"threshold": 20, "merge_func": "mean"}),)
        ),
        "dare": Operator(jm.dare(0.5), (Peer("PEFT", "dare_linear", {**equal, "density": 0.5}),), draws=True),
        "dare_l1": Operator(
            jm.dare(0.5, restore="l1"), (Peer("mergekit", "dare_linear", {**equal, "density": 0.5}),), draws=True
        ),
        "dare_ties": Operator(jm.dare_ties(0.5), (Peer("PEFT", "dare_ties", {**equal, "density": 0.5}),), draws=True),
        "dare_ties_l1": Operator(
            jm.dare_ties(0.5, restore="l1"), (Peer("mergekit", "dare_ties", {**mean, "density": 0.5}),), draws=True
        ),
        "della": Operator(
            jm.della(0.5, restore="l1"),
            (Peer("mergekit", "della", {**mean, "density": 0.5, "epsilon": 0.07}),),
            draws=True,
        ),
        "della_linear": Operator(
            jm.della_linear(0.5, restore="l1"),
            (Peer("mergekit", "della_linear", {**equal, "density": 0.5, "epsilon": 0.07}),),
            draws=True,
        ),
        "breadcrumbs": Operator(
            jm.breadcrumbs(0.9), (Peer("mergekit", "breadcrumbs", {**equal, "density": 0.9, "lambda": 0.3}),)
        ),
        "breadcrumbs_ties": Operator(
            jm.breadcrumbs_ties(0.9), (Peer("mergekit", "breadcrumbs_ties", {**mean, "density": 0.9}),)
        ),
        "sce": Operator(jm.sce(0.1, min_energy=1e-6), (Peer("mergekit", "sce", {"select_topk": 0.1}),)),
        "pcb": Operator(jm.pcb()),
        "widen": Operator(jm.widen()),
        "consensus": Operator(jm.consensus()),
        "tall_experts": Operator(
            needed_by_tall_masks, (Peer("FusionBench", "generate_task_masks", {"threshold": 0.4}),)
        ),
        "emr": Operator(jm.emr()),
        "emr_experts": Operator(unified_by_emr, (Peer("FusionBench", "emr_merge"),)),
        "compeft": Operator(jm.compeft()),
        "arcee_fusion": Operator(jm.arcee_fusion(), (Peer("mergekit", "arcee_fusion"),), experts=1),
        "lines": Operator(jm.lines(alpha=0.2, beta=0.8, num_layers=12)),
        "tsv_m": Operator(tsv_m(), (Peer("FusionBench", "compute_and_sum_svd_mem_reduction"),)),
        "iso_c": Operator(iso_c(), (Peer("FusionBench", "iso_c"),)),
        "iso_cts": Operator(iso_cts(0.8), (Peer("FusionBench", "iso_cts", {"common_space_fraction": 0.8}),)),
        "wudi": Operator(wudi()),
        "wudi_steps": Operator(wudi(steps=steps), (Peer("FusionBench", "wudi_merging", {"steps": steps}),)),
        "optmerge": Operator(optmerge(steps=steps)),
        "swudi": Operator(swudi()),
        "aswudi": Operator(aswudi()),
        "doge": Operator(
            doge(inclusive=True),
            (Peer("FusionBench", "DOGE_TA_Algorithm", {"subspace": 6, "K": 30, "lamda": 0.07}),),
        ),
        "enchtable": Operator(enchtable(safety="expert_1"), experts=2),
        "opcm": Operator(opcm()),
    }


class PeerProcess:
    """The process in which the libraries run, and the folder through which tensors pass."""

    def __init__(self, python: str, path: str | None, folder: Path):
        self._folder = folder
        command = [python, str(Path(__file__).with_name("_peers.py")), str(folder)]
        environment = os.environ if path is None else {**os.environ, "PYTHONPATH": path}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._calls, self._answers = self._process.stdin, self._process.stdout

    def ask(self, call: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(call), file=self._calls, flush=True)
        answer = self._answers.readline()
        if not answer:
            raise SystemExit(f"the process of the libraries ended, at {call}")
        return json.loads(answer)

    def merged(self) -> dict[str, np.ndarray]:
        """What the last call gave that was to be saved."""
        with np.load(self._folder / "merged.npz") as arrays:
            return dict(arrays)

    def close(self) -> None:
        self._calls.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="inputs of the MLP kernel")
    parser.add_argument("--columns", type=int, default=1024, help="outputs of both kernels")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the first call, of which medians are taken")
    parser.add_argument(
        "--limit", type=float, default=60, help="seconds after which a side takes part in no more rounds"
    )
    parser.add_argument("--steps", type=int, default=30, help="steps of wudi_steps and optmerge, of 300 as published")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=operators(1), help="operators")
    parser.add_argument("--libraries", nargs="*", choices=LIBRARIES, default=LIBRARIES, help="whom to compare with")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has the libraries")
    parser.add_argument("--peer-path", help="PYTHONPATH of that Python, for libraries that are not installed in it")
    parser.add_argument("--json", type=Path, help="writes every single measurement there")
    parser.add_argument("--memory", action="store_true", help="prints what each operator needs in memory instead")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    chosen = operators(arguments.steps)
    chosen = {name: chosen[name] for name in arguments.only or chosen}
    if arguments.memory:
        results = {"memory": print_memory(chosen, (arguments.rows, arguments.columns), arguments.experts)}
    else:
        with tempfile.TemporaryDirectory(prefix="operators_") as folder:
            results = compare(arguments, chosen, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def compare(arguments: argparse.Namespace, chosen: dict[str, Operator], folder: Path) -> dict[str, Any]:
    """Measures and prints one operator after the other; returns everything that was measured."""
    facts: dict[str, Any] = {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "unset"),
        **{package: version(package) for package in ("jax", "jaxlib")},
    }
    models = make_models(arguments.rows, arguments.columns, arguments.experts)
    process = None
    if arguments.libraries:
        inputs: Tensors = {f"{i}/{name}": x for i, model in enumerate(models) for name, x in model.items()}
        np.savez(folder / "inputs.npz", **inputs)
        process = PeerProcess(arguments.peer_python, arguments.peer_path, folder)
        facts |= process.ask({"versions": True})
        if "error" in facts:
            raise SystemExit(
                f"{arguments.peer_python}: {facts['error']}; give --peer-python, or --libraries without any"
            )
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    shapes = ", ".join(f"{name} {'x'.join(map(str, x.shape))}" for name, x in models[0].items())
    print(f"{arguments.experts} experts, float32: {shapes}\n", flush=True)
    print(
        f"{'operator':17} {'ms':>9} {'compile s':>9}   {'peer':12} {'ms':>9} {'times':>7} {'difference':>10}",
        flush=True,
    )

    base, *experts = [{name: jnp.array(x) for name, x in model.items()} for model in models]
    results: dict[str, Any] = {"facts": facts, "arguments": {**vars(arguments), "json": None}, "operators": {}}
    for name, operator in chosen.items():
        peers = [peer for peer in operator.peers if peer.library in arguments.libraries]
        row = measure(operator, peers, process, base, experts, arguments.rounds, arguments.limit)
        print(table(name, row), flush=True)
        results["operators"][name] = row
    if process is not None:
        process.close()
    return results


def make_models(rows: int, columns: int, experts: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Base and experts: normal weights, and normal changes of a size that differs by expert, partly the same for all.

    Names are those of Flax, so that ours takes the first axis for the inputs.
    """
    rng = np.random.default_rng(seed)
    shapes = {"mlp/kernel": (rows, columns), "attention/kernel": (columns, columns)}
    base = {name: 0.02 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    common = {name: 0.5 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    sizes = 1e-3 * 10 ** rng.uniform(-0.3, 0.3, experts).astype(np.float32)
    changed = [
        {name: x + size * (common[name] + rng.standard_normal(x.shape, np.float32)) for name, x in base.items()}
        for size in sizes
    ]
    return [base, *changed]


def measure(
    operator: Operator,
    peers: list[Peer],
    process: PeerProcess | None,
    base: Tensors,
    experts: list[Tensors],
    rounds: int,
    limit: float,
) -> dict[str, Any]:
    """Seconds of every call, ours and the peers' in turn; the first of each is the one that compiles or warms up."""
    merged: Tensors = {}

    def ours() -> float:
        start = time.perf_counter()
        result = operator.run(base, experts)
        seconds = time.perf_counter() - start
        merged.update(result)
        return seconds

    row: dict[str, Any] = {"ours": [], "peers": {}}
    failed = set()
    for number in range(rounds + 1):
        if number < 2 or sum(row["ours"][1:]) < limit:
            row["ours"].append(ours())
        for peer in peers:
            taken = row["peers"].setdefault(peer.library, {"seconds": []})
            if peer.library in failed or sum(taken["seconds"]) >= limit:
                continue
            assert process is not None
            experts_used = len(experts[: operator.experts])
            call = {**dataclasses.asdict(peer), "experts": experts_used, "save": number == 0}
            answer = process.ask(call)
            if "error" in answer:
                failed.add(peer.library)
                taken["error"] = answer["error"]
                continue
            taken["seconds"].append(answer["seconds"])
            if number == 0 and not operator.draws:
                taken["difference"] = difference(merged, process.merged(), base)
    return row


def difference(ours: Tensors, theirs: dict[str, np.ndarray], base: Tensors) -> float:
    """Root mean square of the difference, relative to that of what theirs adds to the base."""
    apart, size = 0.0, 0.0
    for name, value in theirs.items():
        value = value.astype(np.float64)
        apart += float(np.sum((np.asarray(ours[name], np.float64) - value) ** 2))
        size += float(np.sum((value - np.asarray(base[name], np.float64)) ** 2))
    return (apart / size) ** 0.5


def later(seconds: list[float]) -> float:
    """The median without the first call, where there are others."""
    return statistics.median(seconds[1:] or seconds)


def table(name: str, row: dict[str, Any]) -> str:
    ours = later(row["ours"])
    start = f"{name:17} {1e3 * ours:9.1f} {row['ours'][0] - ours:9.2f}"
    lines = []
    for library, taken in row["peers"].items():
        if "error" in taken:
            lines.append(f"{start}   {library:12} {taken['error'][:70]}")
        else:
            theirs = later(taken["seconds"])
            apart = f"{taken['difference']:10.1e}" if "difference" in taken else f"{'random':>10}"
            lines.append(f"{start}   {library:12} {1e3 * theirs:9.1f} {theirs / ours:6.1f}x {apart}")
        start = f"{'':37}"
    return "\n".join(lines or [start])


def print_memory(chosen: dict[str, Operator], shape: tuple[int, int], experts: int) -> dict[str, Any]:
    """Prints the working set of every method on one kernel, in tensors, and what it is without inputs and output."""
    print(f"{experts} experts, one {shape[0]}x{shape[1]} kernel in float32; numbers are in times that tensor's bytes\n")
    print(f"{'operator':17} {'inputs':>7} {'output':>7} {'temporary':>10} {'total':>7}", flush=True)
    found = {}
    for name, operator in chosen.items():
        if not isinstance(operator.ours, jm.Method):
            continue
        given = experts if operator.experts is None else operator.experts
        needed = working_set(operator.ours, given, shape, with_base=operator.with_base)
        row = (needed.inputs, needed.output, needed.temporary, needed.total)
        print(f"{name:17} {row[0]:7.1f} {row[1]:7.1f} {row[2]:10.1f} {row[3]:7.1f}", flush=True)
        found[name] = dataclasses.asdict(needed)
    return found


if __name__ == "__main__":
    main()
