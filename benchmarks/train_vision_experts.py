"""Trains a second set of experts for `vision_suite.py`: another base, larger learning rates, more steps.

The recorded experts were tuned gently from a base that knows their tasks well. Here the base has seen little of each
task, so that experts go further from it, and merging loses more:

    PYTHONPATH=. python benchmarks/train_vision_experts.py --data DATA --out EXPERTS
    PYTHONPATH=. python benchmarks/vision_suite.py --data DATA --experts EXPERTS --rows rows/

The base and the heads are trained together on a few images of every task; then the heads stay as they are, and each
expert is tuned in full on all training images of its task. `EXPERTS` gets the form that `examples/vision_experts.py`
reads. One seed decides everything.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxmerge as jm
from examples import vision_experts

TASKS = vision_experts.TASKS
CONFIG = vision_experts.Config()


def shifted(images: np.ndarray, rng: np.random.Generator, most: int = 2) -> np.ndarray:
    """Each image moved by up to `most` pixels along both axes; what comes in is the corner's grey."""
    size = images.shape[-1]
    padded = np.pad(images, ((0, 0), (most, most), (most, most)), mode="edge")
    moved = np.empty_like(images)
    for i, (down, right) in enumerate(rng.integers(0, 2 * most + 1, (len(images), 2))):
        moved[i] = padded[i, down : down + size, right : right + size]
    return moved


def to_torch(params: nnx.State) -> dict[str, np.ndarray]:
    """The inverse of `vision_experts.from_torch`."""
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        value = np.asarray(leaf)
        if name.endswith("/kernel"):
            name, value = name.removesuffix("kernel") + "weight", np.ascontiguousarray(value.T)
        name = name.removesuffix("scale") + "weight" if name.endswith("/scale") else name
        tensors[name.replace("/", ".")] = value
    return tensors


def train(
    loss: Callable[[Any, Any], Any], params: Any, batch: Callable[[], Any], steps: int, rate: float, what: str
) -> Any:
    """AdamW with a warm-up and a cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps)
    optimizer = optax.adamw(schedule, weight_decay=0.01)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, slopes = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(slopes, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.tree.map(jnp.array, params)  # the caller keeps its own
    state, value, start = optimizer.init(params), float("nan"), time.perf_counter()
    for _ in range(steps):
        params, state, value = step(params, state, batch())
    print(f"{what}: loss {float(value):.3f} after {steps} steps, {time.perf_counter() - start:.0f} s", flush=True)
    return params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with vision/TASK.npz")
    parser.add_argument("--out", type=Path, required=True, help="folder for base, experts and heads")
    parser.add_argument("--base-images", type=int, default=300, help="of each task that the base is trained on")
    parser.add_argument("--base-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1000, help="of each expert")
    parser.add_argument("--rate", type=float, default=5e-4, help="largest learning rate of the experts")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    images, labels, classes = {}, {}, {}
    for task in TASKS:
        with np.load(arguments.data / "vision" / f"{task}.npz") as data:
            images[task], labels[task] = data["x_train"], data["y_train"].astype(np.int32)
            classes[task] = len(data["classes"])
    few = {task: rng.permutation(len(x))[: arguments.base_images] for task, x in images.items()}

    rngs = nnx.Rngs(arguments.seed)
    graph, params = nnx.split(vision_experts.VisionTransformer(CONFIG, rngs), nnx.Param)
    heads = {t: 0.1 * jax.random.normal(rngs.params(), (n, CONFIG.embed)) for t, n in classes.items()}

    def loss_of(params: Any, head: Any, task_images: Any, task_labels: Any) -> Any:
        unit = head / jnp.linalg.norm(head, axis=1, keepdims=True)
        scores = CONFIG.scale * nnx.merge(graph, params)(task_images) @ unit.T
        return optax.softmax_cross_entropy_with_integer_labels(scores, task_labels).mean()

    def joint(both: Any, batch: Any) -> Any:
        losses = [loss_of(both[0], both[1][task], *part) for task, part in batch.items()]
        return sum(losses[1:], losses[0]) / len(losses)

    def draw(task: str, among: Any, count: int) -> Any:
        chosen = rng.choice(among, count)
        return shifted(images[task][chosen], rng), labels[task][chosen]

    each = max(1, arguments.batch // 4)
    base, heads = train(
        joint,
        (params, heads),
        lambda: {task: draw(task, few[task], each) for task in TASKS},
        arguments.base_steps,
        1e-3,
        "base",
    )
    heads = {task: head / jnp.linalg.norm(head, axis=1, keepdims=True) for task, head in heads.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "config.json").write_text(json.dumps(CONFIG._asdict()))
    save = partial(jm.save_checkpoint, overwrite=True)
    save(arguments.out / "heads.safetensors", heads)
    save(arguments.out / "base.safetensors", to_torch(base))
    for task in TASKS:
        tuned = train(
            lambda params, batch, head=heads[task]: loss_of(params, head, *batch),
            base,
            lambda task=task: draw(task, len(images[task]), arguments.batch),
            arguments.steps,
            arguments.rate,
            task,
        )
        save(arguments.out / f"{task}.safetensors", to_torch(tuned))

    model = vision_experts.load(arguments.out)
    for task in TASKS:
        with np.load(arguments.data / "vision" / f"{task}.npz") as data:
            x, y = data["x_test"], data["y_test"]
        alone, zero = (vision_experts.accuracy(model, p, task, x, y) for p in (model.experts[task], model.base))
        print(f"{task:12} base {zero:.4f}   expert {alone:.4f}")


if __name__ == "__main__":
    main()
