"""Merge methods on real experts: accuracy by task of eight fine-tuned vision transformers, merged into one.

The network, its base and eight experts are those of `examples/vision_experts.py`. A method's scale is chosen on
validation images, everything is reported on test images, and methods that learn at test time see these without labels.
Every row is kept in a file of its own, so a run that was ended goes on where it was:

    PYTHONPATH=. python benchmarks/vision_suite.py --data DATA --images 500 --rows out/
    PYTHONPATH=. python benchmarks/vision_suite.py --data DATA --images 500 --rows out/ --only ties adamerging
    PYTHONPATH=. python benchmarks/vision_suite.py --data DATA --images 500 --rows out/ --study entropy.png

DATA holds `vision/TASK.npz` and `vision-experts/`, unless `--experts` names another folder of experts, such as
`train_vision_experts.py` makes. `--peer-python` also merges by published implementations in a process of their own (see
`_vision_peers.py`), from the same checkpoints with the same settings, statistics and batches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxmerge as jm
from examples import vision_experts

TASKS = vision_experts.TASKS
CHUNK = 500  # images that are classified at once
EXAMPLES, FISHER_BATCH = 256, 32  # training images of each task for statistics, as FusionBench takes them
SCALES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # of sums of task vectors
WIDE = (0.1, 0.2, 0.4, 0.7, 1.0, 1.5)  # of means, and of what is made orthogonal


class Settings(NamedTuple):
    """What learned rows are learned with."""

    steps: int
    rate: float
    batch: int
    start: float


class Suite:
    """Base, experts, and the images of the eight tasks.

    Args:
        data: folder with `vision/`.
        experts: folder with base, experts and heads.
        most: how many test images of each task are looked at; None for all.
        validation: how many validation images.
        settings: of learning.
    """

    def __init__(self, data: Path, experts: Path, most: int | None, validation: int | None, settings: Settings):
        self.model = vision_experts.load(experts)
        self.base, self.experts, self.settings = self.model.base, self.model.experts, settings
        self.images: dict[str, dict[str, np.ndarray]] = {"train": {}, "val": {}, "test": {}}
        self.labels: dict[str, dict[str, np.ndarray]] = {"train": {}, "val": {}, "test": {}}
        for task in TASKS:
            with np.load(data / "vision" / f"{task}.npz") as arrays:
                for split, count in (("train", None), ("val", validation), ("test", most)):
                    self.images[split][task] = arrays[f"x_{split}"][:count]
                    self.labels[split][task] = arrays[f"y_{split}"][:count].astype(int)
        self._features = jax.jit(self.model.features)

    def logits(self, params: Any, split: str, tasks: Sequence[str] = TASKS) -> dict[str, np.ndarray]:
        """Scores of the classes, `[images, classes]` by task; all images go through the network in equal chunks."""
        images, parts = np.concatenate([self.images[split][task] for task in tasks]), []
        for start in range(0, len(images), CHUNK):
            part = images[start : start + CHUNK]
            full = np.zeros((CHUNK, *part.shape[1:]), np.uint8)
            full[: len(part)] = part
            parts.append(np.asarray(self._features(params, full))[: len(part)])
        ends = np.cumsum([len(self.images[split][task]) for task in tasks])[:-1]
        by_task = dict(zip(tasks, np.split(np.concatenate(parts), ends), strict=True))
        return {t: self.model.config.scale * x @ np.asarray(self.model.heads[t]).T for t, x in by_task.items()}

    def correct(self, merged: Any, split: str = "test") -> dict[str, np.ndarray]:
        """Which images are classified right, by task. `merged` are parameters, or a dict of them by task."""
        if isinstance(merged, dict):
            scores = {task: self.logits(merged[task], split, [task])[task] for task in TASKS}
        else:
            scores = self.logits(merged, split)
        return {task: x.argmax(axis=-1) == self.labels[split][task] for task, x in scores.items()}

    def merge(self, method: jm.Method, seed: int = 0) -> Any:
        return jm.merge(method, self.experts, base=self.base, key=seed)

    def examples(self, task: str, seed: int) -> np.ndarray:
        """Training images for statistics."""
        images = self.images["train"][task]
        return images[np.random.default_rng([seed, TASKS.index(task)]).permutation(len(images))[:EXAMPLES]]

    def order(self, task: str, seed: int, steps: int, split: str = "test") -> np.ndarray:
        """Which images a step sees, `[steps, batch]`: all of them in a random order, then all again in another."""
        rng, count, size = np.random.default_rng([seed, TASKS.index(task)]), len(self.images[split][task]), 0
        parts = []
        while size < steps * self.settings.batch:
            parts.append(rng.permutation(count))
            size += count
        return np.concatenate(parts)[: steps * self.settings.batch].reshape(steps, -1)

    def batches(self, seed: int, steps: int) -> Callable[[int], dict[str, np.ndarray]]:
        """Test images without labels, by step."""
        orders = {task: self.order(task, seed, steps) for task in TASKS}
        return lambda step: {task: self.images["test"][task][orders[task][step]] for task in TASKS}

    def apply(self, task: str) -> Callable[[Any, Any], Any]:
        """`(params, images) -> logits` of a task."""
        return lambda params, images: (
            self.model.config.scale * self.model.features(params, images) @ self.model.heads[task].T
        )


def mean_accuracy(correct: Mapping[str, np.ndarray]) -> float:
    return float(np.mean([np.mean(right) for right in correct.values()]))


# What a row does: `(suite, scale, seed)` to merged parameters, or a dict of them where each task has its own.


def plain(make: Callable[..., jm.Method]) -> Callable[[Suite, float, int], Any]:
    """A method that needs no data, made of its scale where it has one."""
    return lambda suite, scale, seed: suite.merge(make() if math.isnan(scale) else make(scale), seed)


def recovered(suite: Suite, scale: float, seed: int) -> dict[str, Any]:
    """EMR's approximation of each expert, on its own task."""
    held = jm.emr_experts(suite.experts, base=suite.base)
    return {task: held.approximation(task, suite.base) for task in TASKS}


def by_fisher(suite: Suite, scale: float, seed: int, kind: Any = "exact", normalize: bool = True) -> Any:
    fishers = {}
    for task in TASKS:
        images = suite.examples(task, seed)
        batches = [images[i : i + FISHER_BATCH] for i in range(0, len(images), FISHER_BATCH)]
        apply = suite.apply(task)
        if kind == "sampled":
            fishers[task] = jm.fisher(apply, suite.experts[task], batches, kind=kind, key=seed, samples=4)
        else:
            fishers[task] = jm.fisher(apply, suite.experts[task], batches, kind=kind)
    return suite.merge(jm.fisher_merge(fishers, normalize=normalize))


def by_regmean(suite: Suite, scale: float, seed: int) -> Any:
    apply = suite.model.features
    grams = {task: jm.gram(apply, suite.experts[task], [suite.examples(task, seed)]) for task in TASKS}
    return suite.merge(jm.regmean(grams, off_diagonal=0.9))


def by_regmean_plus(suite: Suite, scale: float, seed: int) -> Any:
    batches = {task: [suite.examples(task, seed)] for task in TASKS}
    return suite.merge(jm.regmean(jm.sequential_grams(suite.model.features, suite.experts, batches), off_diagonal=0.9))


def by_entropy(suite: Suite, scale: float, seed: int, **options: Any) -> Any:
    steps, rate, _, start = suite.settings
    learned = jm.learn(
        jm.adamerging(start, **options),
        suite.experts,
        suite.batches(seed, steps),
        base=suite.base,
        loss=jm.entropy(suite.model.logits),
        optimizer=optax.adam(rate),
        steps=steps,
        progress=False,
    )
    return suite.merge(learned.method)


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        title: how it is called.
        merge: what it does.
        scales: what its scale is chosen from; empty where it has none.
        seeded: whether it draws, or learns from batches that are drawn.
        peer: the published call with the same settings, and its parameters beside the scale.
        inputs: what the peer is given: `"examples"` for statistics, or `"batches"`.
    """

    title: str
    merge: Callable[[Suite, float, int], Any]
    scales: tuple[float, ...] = ()
    seeded: bool = False
    peer: tuple[str, dict[str, Any]] | None = None
    inputs: str = ""


def published_ties(scale: float) -> jm.Method:
    """TIES with the published code's counting."""
    return jm.chain(jm.trim(0.2, inclusive=True), jm.elect_sign(zero="majority"), jm.disjoint_mean(), jm.scale(scale))


ROWS = {
    "base": Row("base", lambda suite, scale, seed: suite.base),
    "average": Row("average", plain(jm.linear), peer=("average", {})),
    "task_arithmetic": Row("task arithmetic", plain(jm.task_arithmetic), SCALES, peer=("task_arithmetic", {})),
    "ties": Row("TIES", plain(published_ties), WIDE, peer=("ties", {"threshold": 20, "merge_func": "mean"})),
    "dare": Row("DARE", plain(lambda scale: jm.dare(0.5, scale=scale)), SCALES, seeded=True),
    "breadcrumbs": Row(
        "Breadcrumbs", plain(lambda scale: jm.breadcrumbs(0.9, scale=scale)), SCALES,
        peer=("breadcrumbs", {"weight": 1.0, "density": 0.9, "lambda": 1.0}),
    ),
    "pcb": Row("PCB", plain(lambda scale: jm.pcb(0.1, weights=scale)), WIDE),
    "sce": Row(
        "SCE", plain(lambda scale: jm.sce(0.1, scale=scale, min_energy=1e-6)), WIDE, peer=("sce", {"select_topk": 0.1})
    ),
    "model_stock": Row("Model Stock", plain(jm.model_stock), peer=("model_stock", {})),
    "consensus": Row(
        "Consensus", plain(lambda scale: jm.consensus(scale, threshold=0.4)), SCALES,
        peer=("consensus", {"threshold": 0.4}),
    ),
    "tsv_m": Row("TSV-M", plain(jm.tsv_m), WIDE, peer=("tsv_m", {})),
    "iso_c": Row("Iso-C", plain(jm.iso_c), WIDE, peer=("iso_c", {})),
    "iso_cts": Row(
        "Iso-CTS", plain(lambda scale: jm.iso_cts(0.8, scale)), WIDE, peer=("iso_cts", {"common_space_fraction": 0.8})
    ),
    "wudi": Row("WUDI, minimiser", plain(jm.wudi)),
    "wudi_steps": Row("WUDI, 300 steps", plain(lambda: jm.wudi(steps=300)), peer=("wudi", {"iter_num": 300})),
    "doge": Row(
        "DOGE", plain(lambda: jm.doge(inclusive=True, others="base")),
        peer=("doge", {"subspace": 6, "K": 30, "lamda": 0.07}),
    ),
    "fisher": Row("Fisher, exact", by_fisher, seeded=True),
    "fisher_batch": Row(
        "Fisher, of batches", partial(by_fisher, kind="batch_square", normalize=False), seeded=True,
        peer=("fisher", {"batch": FISHER_BATCH, "normalize": False, "floor": 1e-6}), inputs="examples",
    ),
    "regmean": Row(
        "RegMean", by_regmean, seeded=True, peer=("regmean", {"off_diagonal": 0.9}), inputs="examples"
    ),
    "regmean_plus": Row("RegMean++", by_regmean_plus, seeded=True),
    "adamerging_task": Row("AdaMerging, by task", partial(by_entropy, per="task"), seeded=True),
    "adamerging": Row("AdaMerging, by layer", by_entropy, seeded=True, peer=("adamerging", {}), inputs="batches"),
    "adamerging_plus": Row("AdaMerging++, by layer", partial(by_entropy, density=0.2), seeded=True),
    "emr": Row("EMR, of each task", recovered, peer=("emr", {})),
    "experts": Row("experts, each on its task", lambda suite, scale, seed: dict(suite.experts)),
}  # fmt: skip


class Peers:
    """The process that merges by published implementations, and the folder through which tensors pass."""

    def __init__(self, python: str, path: str | None, experts: Path, folder: Path):
        self._out, self._inputs, pipe = folder / "merged.npz", folder / "inputs.npz", subprocess.PIPE
        command = [python, str(Path(__file__).with_name("_vision_peers.py")), str(experts)]
        environment = {**os.environ, **({} if path is None else {"PYTHONPATH": path})}
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def merge(self, suite: Suite, row: Row, scale: float, seed: int) -> tuple[Any, dict[str, Any]]:
        """Merged parameters, or a dict of them by task, and what the process answered."""
        assert row.peer is not None and self._process.stdin is not None and self._process.stdout is not None
        name, parameters = row.peer
        inputs: dict[str, np.ndarray] = {}
        if row.inputs == "examples":
            inputs = {task: suite.examples(task, seed) for task in TASKS}
        elif row.inputs == "batches":
            steps, rate, _, start = suite.settings
            inputs = dict(suite.images["test"])
            inputs |= {f"{task}/order": suite.order(task, seed, steps) for task in TASKS}
            parameters = {"start": start, "rate": rate}
        if inputs:
            np.savez(self._inputs, **inputs)  # pyright: ignore[reportArgumentType]
        call = {
            "name": name,
            "tasks": list(TASKS),
            "parameters": parameters | ({} if math.isnan(scale) else {"scale": scale}),
            "inputs": str(self._inputs) if inputs else "",
            "out": str(self._out),
        }
        print(json.dumps(call), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of the published implementations ended, at {name}")
        found = json.loads(answer)
        if "error" in found:
            return None, found
        with np.load(self._out) as arrays:
            tensors = dict(arrays)

        def params(prefix: str) -> Any:
            own = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
            return vision_experts.filled(suite.base, vision_experts.from_torch(own))

        return {t: params(f"{t}/") for t in TASKS} if any("/" in key for key in tensors) else params(""), found


def measured(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call gives, its seconds, and by how many MiB resident memory rose above what was held before (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = _resident("VmRSS"), time.perf_counter()
    found = jax.block_until_ready(call())
    return found, time.perf_counter() - start, _resident("VmHWM") - before


def _resident(key: str) -> float:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))
    return math.nan


def run_row(suite: Suite, row: Row, seeds: Sequence[int], peers: Peers | None) -> dict[str, Any]:
    """Chooses the scale, merges, tests, and lets the peer do the same."""
    scale, validation = math.nan, {}
    if row.scales:
        # All these methods are linear in their scale, so that one merge gives the line along which to choose.
        direction = jm.task_vector(row.merge(suite, 1.0, seeds[0]), suite.base)
        at = {s: jm.apply_task_vector(suite.base, direction, s) for s in row.scales}
        validation = {s: mean_accuracy(suite.correct(params, "val")) for s, params in at.items()}
        scale = max(validation, key=lambda s: validation[s])
    done: dict[str, Any] = {"title": row.title, "scale": scale, "validation": validation, "runs": [], "peer": []}
    for seed in seeds if row.seeded else seeds[:1]:
        merged, seconds, peak = measured(partial(row.merge, suite, scale, seed))
        done["runs"].append({"seconds": seconds, "peak": peak, "correct": packed(suite.correct(merged))})
        if peers is not None and row.peer is not None:
            merged, answer = peers.merge(suite, row, scale, seed)
            if merged is None:
                done["peer"] = answer
                break
            done["peer"].append(answer | {"correct": packed(suite.correct(merged))})
    return done


def packed(correct: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {task: "".join("01"[int(x)] for x in right) for task, right in correct.items()}


def unpacked(runs: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The share of the runs that classify an image right, `[images]` by task."""
    return {task: np.mean([[c == "1" for c in run["correct"][task]] for run in runs], axis=0) for task in TASKS}


class Estimate(NamedTuple):
    """A mean over the tasks and its standard error, in points."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f}"


def estimate(by_task: Mapping[str, np.ndarray], of_seeds: Sequence[float] = ()) -> Estimate:
    """The mean over the tasks of numbers by image; the error is that of drawing other images, and other seeds."""
    images = sum(np.var(x) / len(x) for x in by_task.values()) / len(by_task) ** 2
    seeds = np.var(of_seeds, ddof=1) / len(of_seeds) if len(of_seeds) > 1 else 0.0
    return Estimate(100 * mean_accuracy(by_task), 100 * float(np.sqrt(images + seeds)))


def difference(runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> Estimate:
    """By how much `runs` are better than `others` on the same images."""
    ours, theirs = unpacked(runs), unpacked(others)
    means = [mean_accuracy(unpacked([run])) for run in runs]
    return estimate({task: ours[task] - theirs[task] for task in TASKS}, means)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown, accuracies in percent."""
    own = unpacked(rows["experts"]["runs"]) if "experts" in rows else None
    start = rows.get("task_arithmetic")
    head = ["method", "scale", *TASKS, "mean", "normalised", "beside task arithmetic", "seconds", "MiB", "published"]
    lines = [" | ".join(["", *head, ""]).strip(), " | ".join(["", *["---"] * len(head), ""]).strip()]
    for name, row in rows.items():
        runs, correct = row["runs"], unpacked(row["runs"])
        cells = [row["title"], "" if math.isnan(row["scale"]) else f"{row['scale']:g}"]
        cells += [f"{100 * np.mean(right):.1f}" for right in correct.values()]
        cells += [f"{100 * mean_accuracy(correct):.2f}"]
        ratios = [] if own is None else [np.mean(correct[task]) / np.mean(own[task]) for task in TASKS]
        cells += [f"{100 * np.mean(ratios):.1f}" if ratios else ""]
        cells += ["" if start is None or name == "task_arithmetic" else str(difference(runs, start["runs"]))]
        cells += [f"{np.median([run['seconds'] for run in runs]):.1f}"]
        cells += [f"{max(0.0, float(np.median([run['peak'] for run in runs]))):.0f}"]
        peer = row["peer"]
        if isinstance(peer, dict):
            cells += [peer["error"]]
        elif peer:
            apart = 100 * (mean_accuracy(unpacked(peer)) - mean_accuracy(correct))
            cells += [f"{apart:+.2f} in {np.median([run['seconds'] for run in peer]):.1f} s"]
        else:
            cells += [""]
        lines.append(" | ".join(["", *cells, ""]).strip())
    return "\n".join(lines)


# Why entropy misleads: the same run, watched with the labels that it does not see.


class Variant(NamedTuple):
    """A way to learn the coefficients."""

    title: str
    loss: Callable[[Suite], Callable[[Any, Any], Any]]
    optimizer: Callable[[float], Any] = optax.adam
    stop: bool = False
    labelled: bool = False


def cross_entropy(suite: Suite) -> Callable[[Any, Any], Any]:
    """With labels: what the coefficients could do."""

    def loss(params: Any, batch: Any) -> Any:
        scores = suite.model.logits(params, batch["images"])
        parts = [
            optax.softmax_cross_entropy_with_integer_labels(x, batch["labels"][t]).mean() for t, x in scores.items()
        ]
        return sum(parts[1:], parts[0])

    return loss


VARIANTS = {
    "entropy": Variant("entropy", lambda suite: jm.entropy(suite.model.logits)),
    "normalised": Variant("normalised by classes", lambda suite: jm.entropy(suite.model.logits, normalize=True)),
    "pulled": Variant(
        "pulled to the start",
        lambda suite: jm.entropy(suite.model.logits),
        lambda rate: optax.chain(jm.pull_to_start(1.0), optax.adam(rate)),
    ),
    "labels": Variant("cross-entropy, with training labels", cross_entropy, labelled=True),
}


def watch(suite: Suite, variant: Variant, every: int, seed: int = 0) -> dict[str, Any]:
    """What is true of the merged model along a run, and at which step `jm.stop_when_flat` would have ended it."""
    steps, rate, _, start = suite.settings
    orders = {task: suite.order(task, seed, steps, "train") for task in TASKS}

    def labelled(step: int) -> Any:
        return {
            part: {task: arrays["train"][task][orders[task][step]] for task in TASKS}
            for part, arrays in (("images", suite.images), ("labels", suite.labels))
        }

    batches = labelled if variant.labelled else suite.batches(seed, steps)
    flat, states, stopped = jm.stop_when_flat(window=50), {}, []

    def on_step(step: int, loss: float, state: jm.LearnState) -> None:
        if step % every == 0:
            states[step] = state
        if flat(step, loss, state):
            stopped.append(step)

    learn = partial(
        jm.learn, jm.adamerging(start), suite.experts, batches, base=suite.base, loss=variant.loss(suite),
        optimizer=variant.optimizer(rate), progress=False,
    )  # fmt: skip
    learn(steps=steps, on_step=on_step)
    methods = {0: jm.adamerging(start)} | {
        step: learn(steps=step, state=state).method for step, state in states.items()
    }
    seen = [{"step": step, "tasks": facts(suite, suite.merge(method))} for step, method in methods.items()]
    return {"title": variant.title, "flat": stopped[0] if stopped else None, "seen": seen}


def facts(suite: Suite, params: Any) -> dict[str, dict[str, float]]:
    """Accuracy, entropy and calibration of a model on test images, by task."""
    found: dict[str, dict[str, float]] = {}
    for task, scores in suite.logits(params, "test").items():
        labels = suite.labels["test"][task]
        log_p = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        p, answers = np.exp(log_p), scores.argmax(axis=1)
        entropy, right = -(p * log_p).sum(axis=1), answers == labels
        share = np.bincount(answers, minlength=p.shape[1]) / len(labels)
        truth = np.bincount(labels, minlength=p.shape[1]) / len(labels)
        found[task] = {
            "accuracy": float(right.mean()),
            "entropy": float(entropy.mean()),
            "confidence": float(p.max(axis=1).mean()),
            "sure_and_wrong": float(((p.max(axis=1) > 0.9) & ~right).mean()),
            "cross_entropy": float(-log_p[np.arange(len(labels)), labels].mean()),
            "moved": float(np.abs(share - truth).sum() / 2),
        }
    return found


def print_study(study: Mapping[str, Mapping[str, Any]]) -> None:
    """Means along the runs, and what happened to each task."""
    print("| run | step | accuracy | entropy | cross-entropy | confidence | sure and wrong |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for run in study.values():
        for row in run["seen"]:
            means = {key: np.mean([task[key] for task in row["tasks"].values()]) for key in row["tasks"][TASKS[0]]}
            shares = [f"{100 * means[key]:.1f}" for key in ("confidence", "sure_and_wrong")]
            numbers = [f"{100 * means['accuracy']:.2f}", f"{means['entropy']:.3f}", f"{means['cross_entropy']:.3f}"]
            print(f"| {run['title']} | {row['step']} | {' | '.join([*numbers, *shares])} |")
        print(f"| | flat at {run['flat'] or '-'} | | | | | |")
    print("\n| run | task | accuracy | entropy | cross-entropy | confidence | answers moved |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for run in study.values():
        first, last = (run["seen"][i]["tasks"] for i in (0, -1))
        for task in TASKS:
            cells = [
                f"{factor * first[task][key]:.{digits}f} to {factor * last[task][key]:.{digits}f}"
                for key, factor, digits in (
                    ("accuracy", 100, 1),
                    ("entropy", 1, 2),
                    ("cross_entropy", 1, 2),
                    ("confidence", 100, 1),
                    ("moved", 100, 1),
                )
            ]
            print(f"| {run['title']} | {task} | {' | '.join(cells)} |")


def plot_study(study: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Entropy and accuracy against the step: means of all runs, and the accuracy of each task along the first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for colour, run in enumerate(study.values()):
        steps = [row["step"] for row in run["seen"]]
        for axis, key, factor in ((axes[0], "entropy", 1), (axes[1], "accuracy", 100)):
            means = [factor * np.mean([task[key] for task in row["tasks"].values()]) for row in run["seen"]]
            axis.plot(steps, means, marker="o", markersize=3, color=f"C{colour}", label=run["title"])
            if run["flat"]:
                axis.axvline(run["flat"], color=f"C{colour}", linewidth=0.8, linestyle=":")
    first = next(iter(study.values()))["seen"]
    for task in TASKS:
        gained = [100 * (row["tasks"][task]["accuracy"] - first[0]["tasks"][task]["accuracy"]) for row in first]
        axes[2].plot([row["step"] for row in first], gained, marker="o", markersize=3, label=task)
    axes[0].set(xlabel="step", ylabel="mean entropy of test images, nats")
    low, high = axes[1].get_ylim()
    axes[1].set(xlabel="step", ylabel="mean test accuracy, %", ylim=(low - 1, high + 1))  # noise must look like noise
    axes[2].set(xlabel="step", ylabel="points gained by task, entropy")
    axes[1].legend(fontsize=7, frameon=False)
    axes[2].legend(fontsize=7, frameon=False, ncols=2)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with vision/ and vision-experts/")
    parser.add_argument("--experts", type=Path, help="folder of experts; DATA/vision-experts by default")
    parser.add_argument("--images", type=int, help="test images of each task; all by default")
    parser.add_argument("--validation", type=int, help="validation images of each task; all by default")
    parser.add_argument("--rows", type=Path, required=True, help="folder for a file per row; what is there is kept")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=ROWS, help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=3, help="of rows that draw or see batches")
    parser.add_argument("--steps", type=int, default=300, help="of AdaMerging")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of AdaMerging")
    parser.add_argument("--batch", type=int, default=16, help="images of each task in a step of AdaMerging")
    parser.add_argument("--start", type=float, default=0.3, help="of AdaMerging's coefficients")
    parser.add_argument("--peer-python", help="the Python that has PyTorch, FusionBench and mergekit")
    parser.add_argument("--peer-path", help="PYTHONPATH of that Python")
    parser.add_argument("--study", type=Path, metavar="PICTURE", help="watch entropy and accuracy along a run instead")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="runs of the study")
    parser.add_argument("--every", type=int, default=50, help="steps between two looks of the study")
    arguments = parser.parse_args()

    settings = Settings(arguments.steps, arguments.rate, arguments.batch, arguments.start)
    told = {"images": arguments.images, "validation": arguments.validation, **settings._asdict()}
    experts = arguments.experts or arguments.data / "vision-experts"
    suite = Suite(arguments.data, experts, arguments.images, arguments.validation, settings)
    arguments.rows.mkdir(parents=True, exist_ok=True)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {told}", flush=True)

    if arguments.study:
        study = {}
        for name in arguments.variants:
            run = partial(watch, suite, VARIANTS[name], arguments.every)
            study[name] = kept(arguments.rows / f"study-{name}.json", told, run)
        print_study(study)
        plot_study(study, arguments.study)
        return

    with tempfile.TemporaryDirectory(prefix="vision-suite-") as folder:
        peers = None
        if arguments.peer_python:
            peers = Peers(arguments.peer_python, arguments.peer_path, experts, Path(folder))
        rows = {}
        for name in arguments.only or ROWS:
            run = partial(run_row, suite, ROWS[name], range(arguments.seeds), peers)
            rows[name] = kept(arguments.rows / f"{name}.json", told, run)
    print(table(rows))


def kept(path: Path, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds if it was made with these settings; else it is made."""
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] == settings:
            return found
        raise SystemExit(f"{path} was made with {found['settings']}, not {settings}; give another folder")
    start = time.perf_counter()
    found = json.loads(json.dumps(make() | {"settings": dict(settings)}))
    path.write_text(json.dumps(found))
    print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


if __name__ == "__main__":
    main()
