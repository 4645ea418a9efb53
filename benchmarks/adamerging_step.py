"""A step of layer-wise AdaMerging, beside a training step of the same network, and beside FusionBench's in PyTorch.

The network, its base and eight experts are those of `examples/vision_experts.py`, whose folder is the argument. A step
merges eight experts with a coefficient for every tensor and expert, runs `--batch` images of each task through the
merged network, and improves the coefficients by the entropy of its answers. The training step updates all parameters by
the same loss of the same images. Every side sees the same images in every step, and in a round every side has its turn.

FusionBench runs in a process of its own Python (see `_adamerging_peer.py`); `--peer-python none` leaves it out. What
both have learned in the end is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxmerge as jm
from examples import vision_experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="base, experts, heads and config.json")
    parser.add_argument("--batch", type=int, default=16, help="images of each task in a step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peer-python", default="none", help="the Python that has PyTorch and FusionBench")
    parser.add_argument("--peer-path", help="a folder to put on its path")
    parser.add_argument("--json", type=Path, help="write every number there")
    arguments = parser.parse_args()

    model = vision_experts.load(arguments.folder)
    rng, size = np.random.default_rng(0), model.config.image
    batch = {t: rng.integers(0, 256, (arguments.batch, size, size), np.uint8) for t in vision_experts.TASKS}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "batch.npz", **batch)  # pyright: ignore[reportArgumentType]
        peer = None if arguments.peer_python == "none" else Peer(arguments, Path(folder) / "batch.npz")
        taken, learned = run(model, batch, peer, arguments.rounds)
    report(taken, learned)
    if arguments.json:
        arguments.json.write_text(json.dumps(taken, indent=1))


class Peer:
    """The process that takes FusionBench's steps."""

    def __init__(self, arguments: argparse.Namespace, batch: Path):
        command = [arguments.peer_python, str(Path(__file__).with_name("_adamerging_peer.py")), arguments.folder, batch]
        path = {} if arguments.peer_path is None else {"PYTHONPATH": arguments.peer_path}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **path})
        assert process.stdin is not None and process.stdout is not None
        self.calls, self.answers = process.stdin, process.stdout

    def step(self) -> dict[str, Any]:
        print("step", file=self.calls, flush=True)
        answer = self.answers.readline()
        if not answer:
            raise SystemExit("the process of FusionBench ended")
        return json.loads(answer)


class Clock:
    """Seconds of wall clock and of processor time since it was made."""

    def __init__(self) -> None:
        self.start, self.busy = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, Any]:
        return {"seconds": time.perf_counter() - self.start, "processor": time.process_time() - self.busy}


def run(model: vision_experts.Experts, batch: Any, peer: Peer | None, rounds: int) -> tuple[dict[str, Any], jm.Learned]:
    """Steps of all sides in turn: those of the other sides are taken between two of ours."""
    loss, adam = jm.entropy(model.logits), optax.adam(1e-3)

    @jax.jit
    def train(params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = adam.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state = model.base, adam.init(model.base)
    taken: dict[str, list[dict[str, Any]]] = {"ours": [], "training": [], "FusionBench": []}
    clock = Clock()

    def others(step: int, value: float, _: jm.LearnState) -> None:
        nonlocal params, state, clock
        taken["ours"].append(clock.read() | {"loss": value})
        clock = Clock()
        params, state, value_of_training = train(params, state, batch)
        value_of_training = float(value_of_training)
        taken["training"].append(clock.read() | {"loss": value_of_training})
        if peer is not None:
            taken["FusionBench"].append(peer.step())
        clock = Clock()

    learned = jm.learn(
        jm.adamerging(0.3), model.experts, [batch], loss=loss, steps=rounds + 1, base=model.base, optimizer=adam,
        on_step=others, progress=False,
    )  # fmt: skip
    return taken, learned


def torch_name(name: str) -> str:
    return name.replace("/kernel", ".weight").replace("/scale", ".weight").replace("/", ".")


def report(taken: dict[str, Any], learned: jm.Learned) -> None:
    """Prints medians of all steps but the first, which compiles, and how far both results lie apart."""
    print(f"{'':12} {'ms':>8} {'processor ms':>13} {'first, s':>9}   ours is faster by")
    middle = {}
    for side, steps in taken.items():
        if steps:
            middle[side] = [statistics.median(s[key] for s in steps[1:]) for key in ("seconds", "processor")]
            wall, busy = middle[side]
            ratio = f"{wall / middle['ours'][0]:.2f}x ({busy / middle['ours'][1]:.2f}x by processor time)"
            print(f"{side:12} {1e3 * wall:8.1f} {1e3 * busy:13.1f} {steps[0]['seconds']:9.2f}   {ratio}")
    if taken["FusionBench"]:
        theirs = taken["FusionBench"][-1]["coefficients"]
        ours = {torch_name(name): row.values() for name, row in learned.coefficients.items()}
        apart = max(abs(a - b) for n, row in theirs.items() for a, b in zip(row, ours[n], strict=True))
        print(f"largest difference of a coefficient after {len(taken['ours'])} steps: {apart:.1e}")


if __name__ == "__main__":
    main()
