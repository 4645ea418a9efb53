"""`make demo`: trains a base and five experts on real images, merges them from disk by every method, and compares."""

from __future__ import annotations

import argparse
import contextlib
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jaxmerge as jm
from examples.digits.data import PRETRAINING, TASKS, Split, load_splits
from examples.digits.train import accuracies, init, train
from jaxmerge.cli.comparing import compare
from jaxmerge.plots import plot_cosines, plot_scores

OUT = Path("demo-output")
PRETRAINING_STEPS, EXPERT_STEPS = 500, 150
SHARD_BYTES = 400_000
TABLE_WIDTH = 127

TITLE = "Accuracy on test images in percent, and what each merge from disk to disk took"
CAPTION = """\
parity: even or odd? large: above four? The other tasks name the digit, shown as the task says.
norm. mean: mean of the accuracy relative to the task's expert. seconds include compiling and making the output durable.
scale: chosen on validation images, once for the methods that sum task vectors (task arithmetic to Breadcrumbs), once
for those that average where signs agree (TIES to Breadcrumbs-TIES) and for LiNeS; other coefficients are the defaults.
Model Stock stays near the base because these task vectors are nearly orthogonal; it is made for experts on one task.
peak MiB: largest resident memory of this process during the merge, nearly all of it the libraries and the training.
Of two: rotated and mirrored. Of one: rotated, which negation makes the base forget. NearSwap's distance of 0.002 and
negation's scale were set by hand."""

Scores = Mapping[str, float]
"""Task → accuracy, between 0 and 1."""

FAMILIES: list[dict[str, Callable[[float], jm.Method]]] = [
    {
        "task arithmetic": jm.task_arithmetic,
        "DARE linear": lambda scale: jm.dare(density=0.5, scale=scale),
        "Breadcrumbs": lambda scale: jm.breadcrumbs(scale=scale),
    },
    {
        "TIES over the model": lambda scale: jm.ties(density=0.2, scale=scale),
        "TIES per tensor": lambda scale: jm.ties(density=0.2, scale=scale, scope="tensor"),
        "DARE-TIES": lambda scale: jm.dare_ties(density=0.5, scale=scale),
        "DELLA": lambda scale: jm.della(density=0.5, scale=scale),
        "Breadcrumbs-TIES": lambda scale: jm.breadcrumbs_ties(scale=scale),
    },
    {"LiNeS": lambda scale: jm.lines(beta=scale)},
]
"""Methods with a scale, by what they do with task vectors: sum, average where signs agree, scale with depth.

The scale of a family is chosen for its first method, whose result is linear in it.
"""

SCALES = [i / 10 for i in range(1, 11)]


class Merge(NamedTuple):
    """A merge to do."""

    name: str
    method: jm.Method
    experts: tuple[str, ...]
    based: bool = True
    scale: float | None = None


class Row(NamedTuple):
    """A merge that was done, and the test accuracy of the result by task."""

    merge: Merge
    report: jm.StreamReport
    accuracy: Scores


def main() -> None:
    """Runs everything and writes to `demo-output/`."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="draws the splits, the initial weights and the batches")
    seed = parser.parse_args().seed

    started = time.perf_counter()
    splits = load_splits(seed)
    model, untrained = init(seed)
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    def score(params: nnx.State) -> Scores:
        return {task: float(share) for task, share in accuracies(model, params, TASKS, splits["test"]).items()}

    with Progress(*columns) as bars:
        base, experts = train_models(model, untrained, splits["train"], seed, bars)
        paths = save_models(base, experts)
        scaled = choose_scales(model, base, experts, splits["val"], bars)
        merges = [*unscaled(tuple(experts)), *scaled, *of_few()]
        rows = []
        bar = bars.add_task("merge from disk to disk", total=len(merges))
        for merge in merges:
            report = merge_on_disk(merge, paths)
            rows.append(Row(merge, report, score(load(report.path, like=base))))
            bars.advance(bar)
    base_accuracy = score(base)
    own_accuracy = {task: score(params)[task] for task, params in experts.items()}

    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(make_table(base_accuracy, own_accuracy, rows))
    draw(paths, base_accuracy, own_accuracy, rows)
    written = f"models and merged checkpoints, scores.png and cosines.png are in {OUT}/"
    console.print(f"{written}; {time.perf_counter() - started:.0f} seconds in all")


def train_models(
    model: nnx.GraphDef, untrained: nnx.State, split: Split, seed: int, bars: Progress
) -> tuple[nnx.State, dict[str, nnx.State]]:
    """The base, and from it an expert for each task."""
    bar = bars.add_task("pretrain the base", total=PRETRAINING_STEPS)
    advance = partial(bars.advance, bar)
    base = train(model, untrained, PRETRAINING, split, steps=PRETRAINING_STEPS, peak=2e-3, seed=seed, advance=advance)
    bar = bars.add_task(f"fine-tune {len(TASKS)} experts", total=EXPERT_STEPS * len(TASKS))
    tune = partial(train, model, base, steps=EXPERT_STEPS, peak=3e-4, advance=partial(bars.advance, bar))
    experts = {name: tune(task, split, seed=seed + i) for i, (name, task) in enumerate(TASKS.items(), start=1)}
    return base, experts


def save_models(base: nnx.State, experts: Mapping[str, nnx.State]) -> dict[str, Path]:
    """Saves base and experts as they come in practice: single files, a sharded folder with an index, and Orbax."""
    options: dict[str, dict[str, Any]] = {"rotated": {"max_shard_bytes": SHARD_BYTES}, "inverted": {"format": "orbax"}}
    return {
        name: jm.save_checkpoint(
            OUT / "models" / (name if name in options else f"{name}.safetensors"),
            params,
            overwrite=True,
            **options.get(name, {}),
        )
        for name, params in {"base": base, **experts}.items()
    }


def load(path: Path, *, like: nnx.State) -> nnx.State:
    """Reads a checkpoint into the structure of the model's parameters."""
    with jm.open_checkpoint(path) as checkpoint:
        tensors = jm.named_leaves(checkpoint.load())
    return jax.tree.unflatten(jax.tree.structure(like), [tensors[name] for name in jm.named_leaves(like)])


def choose_scales(
    model: nnx.GraphDef, base: nnx.State, experts: Mapping[str, nnx.State], split: Split, bars: Progress
) -> list[Merge]:
    """The merges of all families, at the scales with the best mean accuracy on the validation images."""

    @jax.jit
    def means(start: nnx.State, direction: nnx.State) -> jax.Array:
        def mean(scale: jax.Array) -> jax.Array:
            found = accuracies(model, jm.apply_task_vector(start, direction, scale), TASKS, split)
            return jnp.mean(jnp.stack(list(found.values())))

        return jax.lax.map(mean, jnp.asarray(SCALES))

    merges = []
    bar = bars.add_task("choose scales on validation images", total=len(FAMILIES))
    for family in FAMILIES:
        make = next(iter(family.values()))
        at_zero, at_one = (jm.merge(make(scale), experts, base=base) for scale in (0.0, 1.0))
        scale = SCALES[int(means(at_zero, jm.task_vector(at_one, at_zero)).argmax())]
        merges += [Merge(name, make(scale), tuple(experts), scale=scale) for name, make in family.items()]
        bars.advance(bar)
    return merges


def unscaled(experts: tuple[str, ...]) -> list[Merge]:
    """Merges of all experts that have no scale."""
    return [
        Merge("linear (average)", jm.linear(), experts, based=False),
        Merge("Model Stock", jm.model_stock(), experts),
    ]


def of_few() -> list[Merge]:
    """Merges of one or two experts."""
    two, one = ("rotated", "mirrored"), ("rotated",)
    return [
        Merge("SLERP of two", jm.slerp(0.5), two, based=False),
        Merge("NearSwap of two", jm.nearswap(0.002), two, based=False),
        Merge("passthrough of one", jm.passthrough(), one, based=False),
        Merge("negation of one", jm.task_arithmetic(-0.5), one, scale=-0.5),
    ]


def merge_on_disk(merge: Merge, paths: Mapping[str, Path]) -> jm.StreamReport:
    """Does a merge from disk to disk."""
    with contextlib.suppress(OSError):  # makes the kernel measure the peak of this merge, where it can: on Linux
        Path("/proc/self/clear_refs").write_text("5")
    return jm.merge_checkpoint(
        merge.method,
        {name: paths[name] for name in merge.experts},
        base=paths["base"] if merge.based else None,
        out=OUT / "merged" / re.sub(r"\W+", "-", merge.name.lower()).strip("-"),
        key=0,
        memory_budget="64MiB",
        overwrite=True,
        progress=False,
    )


def make_table(base: Scores, own: Scores, rows: list[Row]) -> Table:
    """The table: accuracy on test images by task, and what each merge took."""
    table = Table(
        title=TITLE,
        title_justify="left",
        caption=CAPTION,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("method", no_wrap=True)
    for name in ("scale", *own, "mean", "norm. mean", "seconds", "MB read", "peak MiB"):
        table.add_column(name, justify="right")

    def percentages(accuracy: Scores) -> list[str]:
        shares = [*(accuracy[task] for task in own), np.mean(list(accuracy.values())), normalised(accuracy, own)]
        return [f"{100 * share:.1f}" for share in shares]

    table.add_row("base", "", *percentages(base))
    table.add_row("experts, each on its task", "", *percentages(own), end_section=True)
    for i, (merge, report, accuracy) in enumerate(rows):
        table.add_row(
            merge.name,
            "" if merge.scale is None else f"{merge.scale:.1f}",
            *percentages(accuracy),
            f"{sum(report.seconds.values()):.2f}",
            f"{sum(report.bytes_read.values()) / 1e6:.1f}",
            f"{report.memory_peak / 2**20:.0f}",
            end_section=i + 1 < len(rows) and len(rows[i + 1].merge.experts) != len(merge.experts),
        )
    return table


def normalised(accuracy: Scores, own: Scores) -> float:
    """Mean over the tasks of the accuracy relative to that of the task's expert."""
    return float(np.mean([accuracy[task] / own[task] for task in own]))


def draw(paths: Mapping[str, Path], base: Scores, own: Scores, rows: list[Row]) -> None:
    """Writes the bar chart of the table (merges of several experts) and the heat map of cosines."""
    relative = {
        row.merge.name: {task: row.accuracy[task] / own[task] for task in own}
        for row in rows
        if len(row.merge.experts) > 1
    }
    references = {"base": normalised(base, own), "experts": 1.0}
    chart = plot_scores(relative, references=references, label="test accuracy relative to that of each task's expert")
    chart.savefig(OUT / "scores.png")
    layers = compare(str(paths["base"]), {task: str(paths[task]) for task in own})
    plot_cosines({layer.name: layer.cosines for layer in layers}, list(own)).savefig(OUT / "cosines.png")


if __name__ == "__main__":
    main()
