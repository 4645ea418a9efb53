"""Training and scoring. One compiled program trains the base and every expert: what differs between them is data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.digits.data import Split, Task, augment, show
from examples.digits.model import VisionTransformer

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

SCALE, BATCH, CHUNK = 16.0, 64, 50
"""Logits per unit of cosine, images per step, and steps per call of the compiled program."""

ADAM = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4))


class Progress(NamedTuple):
    """What training carries from step to step."""

    params: nnx.State
    optimizer: Any
    step: Int[Array, ""]


def init(seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """An untrained model: its static part and its parameters."""
    model = nnx.jit(lambda: VisionTransformer(nnx.Rngs(seed)))()  # one program instead of one for each operation
    return nnx.split(model, nnx.Param)


def train(
    model: nnx.GraphDef,
    params: nnx.State,
    task: Task,
    split: Split,
    *,
    steps: int,
    peak: float,
    seed: int,
    advance: Callable[[int], None],
) -> nnx.State:
    """Trains all parameters on a task by AdamW, with a short warm-up and a cosine decay of the learning rate.

    Args:
        model: the static part of the model.
        params: where to start.
        task: what to learn.
        split: images to learn from.
        steps: number of steps, a multiple of `CHUNK`.
        peak: highest learning rate.
        seed: draws batches, views and augmentation.
        advance: called with the number of steps that were done since the last call.
    """
    progress, key = Progress(params, ADAM.init(params), jnp.int32(0)), jax.random.key(seed)
    for _ in range(steps // CHUNK):
        progress = _train_chunk(model, progress, task, split, jnp.float32(steps), jnp.float32(peak), key)
        jax.block_until_ready(progress)
        advance(CHUNK)
    return progress.params


def logits(
    model: nnx.GraphDef, params: nnx.State, task: Task, images: Float[Array, "batch 8 8"]
) -> Float[Array, "batch 10"]:
    """Scores of the classes: scaled cosines of the image's vector with the task's embeddings."""
    embeddings = jnp.asarray(task.embeddings)
    cosines = nnx.merge(model, params)(images) @ embeddings.T
    return jnp.where(jnp.any(embeddings != 0, axis=1)[None], SCALE * cosines, -jnp.inf)


@partial(jax.jit, static_argnums=0)
def accuracies(model: nnx.GraphDef, params: nnx.State, tasks: dict[str, Task], split: Split) -> dict[str, Array]:
    """Share of right answers on a split, by task."""

    def accuracy(task: Task) -> Float[Array, ""]:
        answers = logits(model, params, task, show(split.images, task, jax.random.key(0))).argmax(axis=1)
        return jnp.mean(answers == jnp.asarray(task.class_of_digit)[split.digits])

    return {name: accuracy(task) for name, task in tasks.items()}


@partial(jax.jit, static_argnums=0)
def _train_chunk(
    model: nnx.GraphDef,
    progress: Progress,
    task: Task,
    split: Split,
    steps: Float[Array, ""],
    peak: Float[Array, ""],
    key: PRNGKeyArray,
) -> Progress:
    def loss(params: nnx.State, images: Array, classes: Array) -> Array:
        scores = logits(model, params, task, images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, classes).mean()

    def step(progress: Progress, _: None) -> tuple[Progress, None]:
        keys = jax.random.split(jax.random.fold_in(key, progress.step), 3)
        chosen = jax.random.randint(keys[0], (BATCH,), 0, len(split.images))
        images = show(augment(split.images[chosen], keys[1]), task, keys[2])
        gradients = jax.grad(loss)(progress.params, images, jnp.asarray(task.class_of_digit)[split.digits[chosen]])
        direction, optimizer = ADAM.update(gradients, progress.optimizer, progress.params)
        done = progress.step.astype(jnp.float32)
        rate = peak * jnp.minimum(done / 30, 1) * (1 + jnp.cos(np.float32(np.pi) * done / steps)) / 2
        params = jax.tree.map(lambda p, d: p - rate * d, progress.params, direction)
        return Progress(params, optimizer, progress.step + 1), None

    return jax.lax.scan(step, progress, length=CHUNK)[0]
