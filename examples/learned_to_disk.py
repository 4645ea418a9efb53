"""Coefficients that are learned in memory, and the same merge from disk to disk.

Layer-wise AdaMerging is learned on images without labels. What `jm.learn` gives is a method like any other, so
`jm.merge_checkpoint` streams the checkpoints by it, and the file that comes out answers like the model in memory.

    python -m examples.learned_to_disk                 # scikit-learn's digits; experts are trained first
    python -m examples.learned_to_disk --data DATA     # eight vision experts: DATA/vision and DATA/vision-experts
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxmerge as jm
from examples import vision_experts
from examples.digits import data, train
from examples.digits.model import VisionTransformer


class Problem(NamedTuple):
    """A base, its experts, and what there is to ask of a merged model.

    Attributes:
        base: parameters.
        experts: task → parameters.
        logits: `(params, {task: images}) -> {task: scores}`.
        batch: step → `{task: images}`, without labels.
        accuracy: parameters → share of right answers on test images, by task.
    """

    base: Any
    experts: dict[str, Any]
    logits: Callable[[Any, Any], Any]
    batch: Callable[[int], dict[str, Any]]
    accuracy: Callable[[Any], dict[str, float]]


def digits(
    *, dim: int = 48, depth: int = 2, heads: int = 4, pretraining: int = 250, tuning: int = 100, size: int = 16
) -> Problem:
    """The tasks of `examples/digits`, with a smaller network than there; base and experts are trained here.

    Args:
        dim: width of the network.
        depth: its blocks.
        heads: of attention.
        pretraining: steps of the base, a multiple of 50.
        tuning: steps of each expert, a multiple of 50.
        size: images of each task in a batch.
    """
    splits = data.load_splits()
    make = nnx.jit(lambda: VisionTransformer(nnx.Rngs(0), dim=dim, depth=depth, heads=heads))
    graph, fresh = nnx.split(make(), nnx.Param)

    def fit(start: Any, task: data.Task, steps: int, peak: float, seed: int) -> Any:
        options: dict[str, Any] = {"steps": steps, "peak": peak, "seed": seed, "advance": lambda done: None}
        with jax.numpy_dtype_promotion("standard"):  # Adam in optax raises a float to an integer power
            return train.train(graph, start, task, splits["train"], **options)

    base = fit(fresh, data.PRETRAINING, pretraining, 3e-3, 0)
    experts = {name: fit(base, task, tuning, 1e-3, i + 1) for i, (name, task) in enumerate(data.TASKS.items())}
    test, tasks = splits["test"], data.TASKS
    shown = {name: np.asarray(data.show(test.images, task, jax.random.key(0))) for name, task in tasks.items()}

    def logits(params: Any, images: Mapping[str, Any]) -> dict[str, Any]:
        return {name: train.logits(graph, params, tasks[name], jnp.asarray(x)) for name, x in images.items()}

    def accuracy(params: Any) -> dict[str, float]:
        return {name: float(share) for name, share in train.accuracies(graph, params, tasks, test).items()}

    return Problem(base, experts, logits, batches(shown, size), accuracy)


def vision(folder: Path, *, most: int = 500, size: int = 16) -> Problem:
    """The eight experts of `examples/vision_experts.py`.

    Args:
        folder: with `vision-experts/` and `vision/TASK.npz`.
        most: test images of each task that are looked at.
        size: images of each task in a batch.
    """
    model, images, labels = vision_experts.load(folder / "vision-experts"), {}, {}
    for task in vision_experts.TASKS:
        with np.load(folder / "vision" / f"{task}.npz") as arrays:
            images[task], labels[task] = arrays["x_test"][:most], arrays["y_test"][:most]

    def accuracy(params: Any) -> dict[str, float]:
        return {t: vision_experts.accuracy(model, params, t, images[t], labels[t]) for t in images}

    return Problem(model.base, model.experts, model.logits, batches(images, size), accuracy)


def batches(images: Mapping[str, np.ndarray], size: int) -> Callable[[int], dict[str, Any]]:
    """The batch of a step, drawn by its number alone, so that a run can be resumed."""

    def batch(step: int) -> dict[str, Any]:
        rng = np.random.default_rng(step)
        return {task: x[rng.choice(len(x), size, replace=False)] for task, x in images.items()}

    return batch


def learn(problem: Problem, method: jm.Method | None = None, *, steps: int = 100, rate: float = 3e-3) -> jm.Learned:
    """A method's coefficients by entropy; layer-wise AdaMerging by default, from task arithmetic with 0.3."""
    return jm.learn(
        jm.adamerging(0.3) if method is None else method,
        problem.experts,
        problem.batch,
        base=problem.base,
        loss=jm.entropy(problem.logits),
        optimizer=optax.adam(rate),
        steps=steps,
    )


def to_disk(problem: Problem, method: jm.Method, folder: Path) -> Any:
    """Saves base and experts, merges the files by a method, and reads what came out."""
    paths = {
        name: jm.save_checkpoint(folder / f"{name}.safetensors", params)
        for name, params in {"base": problem.base, **problem.experts}.items()
    }
    base = paths.pop("base")
    report = jm.merge_checkpoint(method, paths, base=base, out=folder / "merged.safetensors", progress=False)
    with jm.open_checkpoint(report.path) as checkpoint:
        tensors = jm.named_leaves(checkpoint.load())
    return jax.tree.unflatten(
        jax.tree.structure(problem.base), [tensors[name] for name in jm.named_leaves(problem.base)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the vision experts; digits without")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    problem = vision(arguments.data) if arguments.data else digits()
    learned = learn(problem, steps=arguments.steps)
    in_memory = jm.merge(learned.method, problem.experts, base=problem.base)
    with tempfile.TemporaryDirectory() as folder:
        on_disk = to_disk(problem, learned.method, Path(folder))
    models = {
        "task arithmetic": jm.merge(jm.task_arithmetic(0.3), problem.experts, base=problem.base),
        "learned, in memory": in_memory,
        "learned, from disk": on_disk,
    }
    found = {name: problem.accuracy(params) for name, params in models.items()}
    print(f"{'':20}" + "".join(f"{task:>12}" for task in (*problem.experts, "mean")))
    for name, row in found.items():
        print(f"{name:20}" + "".join(f"{x:12.3f}" for x in (*row.values(), np.mean(list(row.values())))))
    if found["learned, in memory"] != found["learned, from disk"]:
        raise SystemExit("the file that was streamed answers otherwise than the model in memory")


if __name__ == "__main__":
    main()
