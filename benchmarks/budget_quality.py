"""Quality against I/O budget: what a merge is worth that reads a part of its experts.

Two kinds of experts: a small vision transformer fine-tuned for eight tasks (safetensors files and test images, in a
folder that is given; nothing is downloaded), and synthetic ones whose blocks differ much in norm, or hardly.

    python benchmarks/budget_quality.py --experts DATA/vision-experts --images DATA/vision --plot quality.png
    python benchmarks/budget_quality.py --blocks 64 --shares 10 50    # synthetic experts only, small: does it run?
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

import jaxmerge as jm

Weights = Mapping[str, Any]
TASKS = ("mnist", "kannada", "oracle", "quickdraw", "gtsrb", "signdigits", "spoken", "pneumonia")
POLICIES = ("greedy_value", "uniform_hash")
SHARES = (5, 10, 20, 30, 50, 100)
SIGMAS = {"even": 0.0, "log-normal, sigma 1": 1.0, "log-normal, sigma 2": 2.0}
DEPTH, HEADS, PATCH, SCALE = 6, 4, 7, 16.0
PARITY = 1e-4
BATCH = 500


@jax.jit
def features(weights: Weights, images: Num[Any, "n 28 28"]) -> Float[Array, "n 64"]:
    """The vision transformer: unit vectors of images."""
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1
    rows = 28 // PATCH
    x = x.reshape(-1, rows, PATCH, rows, PATCH).transpose(0, 1, 3, 2, 4).reshape(len(images), rows**2, PATCH**2)
    x = _linear(weights, "patch_embed", x)
    first = jnp.broadcast_to(weights["cls_token"], (len(images), 1, x.shape[-1]))
    x = jnp.concatenate([first, x], axis=1) + weights["pos_embed"]
    for i in range(DEPTH):
        block = f"blocks.{i}"
        x = x + _attention(weights, f"{block}.attn", _norm(weights, f"{block}.ln1", x))
        y = jax.nn.gelu(_linear(weights, f"{block}.mlp.fc1", _norm(weights, f"{block}.ln2", x)), approximate=False)
        x = x + _linear(weights, f"{block}.mlp.fc2", y)
    x = _norm(weights, "ln_post", x[:, 0]) @ weights["proj.weight"].T
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _linear(weights: Weights, name: str, x: Any) -> Any:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Weights, name: str, x: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _attention(weights: Weights, name: str, x: Any) -> Any:
    q, k, v = (_linear(weights, f"{name}.{part}", x).reshape(*x.shape[:2], HEADS, -1) for part in "qkv")
    scores = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5, axis=-1)
    return _linear(weights, f"{name}.out", jnp.einsum("nhqk,nkhd->nqhd", scores, v).reshape(x.shape))


def loaded(path: str | Path) -> dict[str, np.ndarray]:
    with jm.open_checkpoint(path) as checkpoint:
        return {name: np.asarray(x) for name, x in jm.named_leaves(checkpoint.params).items()}


class Vision:
    """Test images of the eight tasks and their fixed heads.

    Args:
        experts: folder with `base`, an expert for each task, `heads` and the parity check.
        images: folder with the test images.
        most: how many of each task's images are looked at.
    """

    def __init__(self, experts: Path, images: Path, most: int):
        self._heads, self._data = loaded(experts / "heads.safetensors"), {}
        for task in TASKS:
            with np.load(images / f"{task}.npz") as data:
                self._data[task] = data["x_test"][:most], data["y_test"][:most]

    def accuracy(self, weights: Weights, task: str) -> float:
        """The share of a task's test images that are classified right."""
        images, labels = self._data[task]
        right = 0
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            full = np.zeros((BATCH, 28, 28), np.uint8)  # one shape, one program
            full[: len(batch)] = batch
            found = np.asarray(features(weights, full))[: len(batch)] @ self._heads[task].T
            right += int((found.argmax(-1) == labels[start : start + BATCH]).sum())
        return right / len(images)

    def mean_accuracy(self, weights: Weights) -> float:
        return statistics.mean(self.accuracy(weights, task) for task in TASKS)


def check_parity(folder: Path) -> float:
    """The largest difference between our features and those that came with the experts; ends if it is not small."""
    with np.load(folder / "check.npz") as check:
        images, expected = check["images"], [check["base_features"], *check["expert_features"]]
    worst = 0.0
    for name, wanted in zip(("base", *TASKS), expected, strict=True):
        found = np.asarray(features(loaded(folder / f"{name}.safetensors"), images))
        worst = max(worst, float(np.abs(found - wanted).max()))
    if worst > PARITY:
        raise SystemExit(
            f"the features differ by {worst:.2g} from those of the experts' makers, at most {PARITY} expected"
        )
    return worst


def make_synthetic(folder: Path, experts: int, blocks: int, block: int, sigma: float) -> tuple[Path, list[Path]]:
    """A base of zeros and experts whose blocks have random directions and log-normal norms."""
    rng = np.random.default_rng(0)
    base = jm.save_checkpoint(folder / "base", {"w": np.zeros((blocks, block), np.float32)})
    paths = []
    for k in range(experts):
        directions = rng.normal(size=(blocks, block))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        delta = rng.lognormal(sigma=sigma, size=(blocks, 1)) * directions
        paths.append(jm.save_checkpoint(folder / f"expert_{k}", {"w": delta.astype(np.float32)}))
    return base, paths


def sweep(
    base: Path,
    experts: Sequence[Path],
    method: jm.Method,
    shares: Sequence[int],
    block_bytes: int,
    folder: Path,
    vision: Vision | None = None,
) -> list[dict[str, Any]]:
    """Merges at each budget by each policy; errors are relative to the merged task vector of all that there is."""
    out, rows = folder / "out", []
    run = partial(jm.merge_checkpoint, method, experts, base=base, out=out, overwrite=True, progress=False)
    run()
    start, full = loaded(base), loaded(out)
    whole = np.sqrt(sum(np.sum((full[name].astype(np.float64) - x) ** 2) for name, x in start.items()))
    with jm.open_catalog(None) as catalog:
        catalog.add(base, experts, block_bytes=block_bytes, progress=False)
        for policy in POLICIES:
            for share in shares:
                begun = time.perf_counter()
                report = run(io_budget=f"{share}%", catalog=catalog, policy=policy)
                seconds, plan, merged = time.perf_counter() - begun, report.io_plan, loaded(out)
                assert plan is not None
                squares = sum(np.sum((merged[name].astype(np.float64) - x) ** 2) for name, x in full.items())
                row = {
                    "policy": policy,
                    "share": share,
                    "bytes": sum(n for name, n in report.bytes_read.items() if name != "the base"),
                    "seconds": seconds,
                    "error": float(np.sqrt(squares) / whole),
                    "expected": None if plan.expected is None else plan.expected / whole,
                    "bound": None if plan.bound is None else plan.bound / whole,
                    "kept": plan.kept,
                }
                if vision is not None:
                    row["accuracy"] = vision.mean_accuracy(merged)
                rows.append(row)
    if vision is not None:
        rows += [{"policy": "base", "accuracy": vision.mean_accuracy(start)}]
        rows += [{"policy": "full", "accuracy": vision.mean_accuracy(full)}]
    return rows


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    scored = any("accuracy" in row for row in rows)
    print(f"\n### {title}\n")
    print(f"| policy | budget | KiB read | seconds | error | expected | at most |{' accuracy |' * scored}")
    print(f"| --- | --- | --- | --- | --- | --- | --- |{' --- |' * scored}")
    for row in rows:
        if row["policy"] in ("base", "full"):
            what = "no expert" if row["policy"] == "base" else "all, no budget"
            print(f"| {what} | | | | | | | {row['accuracy']:.4f} |")
            continue
        expected, bound = ("" if row[x] is None else f"{row[x]:.3f}" for x in ("expected", "bound"))
        told = [
            row["policy"],
            f"{row['share']} %",
            f"{row['bytes'] / 1024:.0f}",
            f"{row['seconds']:.2f}",
            f"{row['error']:.3f}",
            expected,
            bound,
        ]
        told += [f"{row['accuracy']:.4f}"] if scored else []
        print(f"| {' | '.join(told)} |")


def plot(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Error, and accuracy where it is known, against the budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scored = next((rows for rows in results.values() if any("accuracy" in row for row in rows)), None)
    figure, axes = plt.subplots(
        1, 2 if scored else 1, figsize=(9 if scored else 5, 3.6), layout="constrained", squeeze=False
    )
    left = axes[0][0]
    for colour, (name, rows) in enumerate(results.items()):
        for policy, style in zip(POLICIES, ("-", "--"), strict=True):
            these = [row for row in rows if row["policy"] == policy]
            shares, errors = [row["share"] for row in these], [row["error"] for row in these]
            label = f"{name}" if style == "-" else None
            left.plot(shares, errors, style, color=f"C{colour}", marker="o", markersize=3, label=label)
    left.plot([], [], "k-", label="greedy_value")
    left.plot([], [], "k--", label="uniform_hash")
    left.set(xlabel="budget, % of the experts' bytes", ylabel="error / merged task vector", ylim=(-0.03, 1.03))
    left.legend(fontsize=7, frameon=False)
    if scored:
        right = axes[0][1]
        for policy, style in zip(POLICIES, ("-", "--"), strict=True):
            these = [row for row in scored if row["policy"] == policy]
            shares, accuracies = [row["share"] for row in these], [100 * row["accuracy"] for row in these]
            right.plot(shares, accuracies, f"k{style}", marker="o", markersize=3, label=policy)
        for policy, label in (("base", "no expert"), ("full", "all of them")):
            (value,) = (100 * row["accuracy"] for row in scored if row["policy"] == policy)
            right.axhline(value, color="grey", linewidth=0.8, linestyle=":" if policy == "base" else "-.", label=label)
        right.set(xlabel="budget, % of the experts' bytes", ylabel="mean accuracy of eight tasks, %")
        right.legend(fontsize=7, frameon=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality of merges against I/O budget.")
    parser.add_argument("--experts", type=Path, help="folder with the vision experts; none without")
    parser.add_argument("--images", type=Path, help="folder with their test images")
    parser.add_argument("--most", type=int, default=10**9, help="test images of each task")
    parser.add_argument("--scale", type=float, default=0.3, help="of task arithmetic on the vision experts")
    parser.add_argument(
        "--methods", nargs="+", choices=("task_arithmetic", "ties"), default=("task_arithmetic", "ties")
    )
    parser.add_argument("--block-kib", type=int, default=16, help="size of the vision experts' blocks")
    parser.add_argument("--blocks", type=int, default=512, help="of a synthetic expert, each of 4 KiB")
    parser.add_argument("--shares", type=int, nargs="+", default=SHARES, help="budgets in %%")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="jaxmerge-quality-") as made:
        for name, sigma in SIGMAS.items():
            folder = Path(made) / name
            base, experts = make_synthetic(folder, 8, options.blocks, 1024, sigma)
            results[name] = sweep(base, experts, jm.task_arithmetic(), options.shares, 4096, folder)
            print_rows(f"synthetic experts, {name}", results[name])
        if options.experts:
            print(f"\nparity: {check_parity(options.experts):.1e}")
            vision = Vision(options.experts, options.images, options.most)
            base = options.experts / "base.safetensors"
            experts = [options.experts / f"{task}.safetensors" for task in TASKS]
            methods = {"task_arithmetic": jm.task_arithmetic(options.scale), "ties": jm.ties(0.2, scale=options.scale)}
            for method_name in options.methods:
                name, method = f"vision experts, {method_name}", methods[method_name]
                size = options.block_kib << 10
                results[name] = sweep(base, experts, method, options.shares, size, Path(made), vision)
                print_rows(name, results[name])
    if options.plot:
        plot({name: rows for name, rows in results.items() if "ties" not in name}, options.plot)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
