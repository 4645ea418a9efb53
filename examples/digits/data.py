"""Real images and the tasks made of them: scikit-learn's 1797 handwritten digits of 8x8 pixels.

Every image belongs to exactly one split: `train` is learned from, `val` is for choices, `test` is reported. A task is a
view (a way to show the image) and a question about its digit. Ten fixed orthonormal vectors stand for the ten digits,
and a class of several digits is the normalised sum of theirs, so nothing about a task is learned but the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.digits.model import EMBED, IMAGE

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

SIZES = {"train": 900, "val": 300, "test": 597}

VIEWS = {
    "upright": lambda images: images,
    "rotated": lambda images: jnp.rot90(images, axes=(-2, -1)),
    "inverted": lambda images: 1 - images,
    "mirrored": lambda images: images[..., ::-1],
}


class Split(NamedTuple):
    """Images with values in [0, 1], and the digit on each."""

    images: Float[Array, "n 8 8"]
    digits: Int[Array, " n"]


class Task(NamedTuple):
    """How images are shown, and what is asked about their digits.

    Attributes:
        views: the probability of each view of `VIEWS`.
        class_of_digit: the right answer for each digit.
        embeddings: a unit vector per class; a row of zeros is no class.
    """

    views: Float[np.ndarray, " views"]
    class_of_digit: Int[np.ndarray, " 10"]
    embeddings: Float[np.ndarray, "10 embed"]


def load_splits(seed: int = 0) -> dict[str, Split]:
    """The digits, shuffled and cut into train, val and test."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(digits))
    ends = np.cumsum(list(SIZES.values()))
    return {
        name: Split(
            jnp.asarray(images[at].reshape(-1, IMAGE, IMAGE) / 16, jnp.float32), jnp.asarray(digits[at], jnp.int32)
        )
        for name, at in zip(SIZES, np.split(order, ends[:-1]), strict=True)
    }


def make_task(views: Mapping[str, float], classes: Sequence[Sequence[int]]) -> Task:
    """A task from the probabilities of its views and the digits in each of its classes."""
    digit_vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(EMBED, 10)))[0].T
    class_of_digit = np.zeros(10, np.int32)
    embeddings = np.zeros((10, EMBED), np.float32)
    for i, members in enumerate(classes):
        class_of_digit[list(members)] = i
        embeddings[i] = digit_vectors[list(members)].sum(axis=0) / len(members) ** 0.5
    return Task(np.array([views.get(name, 0) for name in VIEWS], np.float32), class_of_digit, embeddings)


EACH_DIGIT = [[digit] for digit in range(10)]

PRETRAINING = make_task({"upright": 0.85, "rotated": 0.05, "inverted": 0.05, "mirrored": 0.05}, EACH_DIGIT)
"""What the base learns: digits, mostly upright, with a little of every view."""

TASKS = {
    "rotated": make_task({"rotated": 1}, EACH_DIGIT),
    "inverted": make_task({"inverted": 1}, EACH_DIGIT),
    "mirrored": make_task({"mirrored": 1}, EACH_DIGIT),
    "parity": make_task({"upright": 1}, [range(0, 10, 2), range(1, 10, 2)]),
    "large": make_task({"upright": 1}, [range(5), range(5, 10)]),
}
"""What the experts learn, one each."""


def show(images: Float[Array, "batch 8 8"], task: Task, key: PRNGKeyArray) -> Float[Array, "batch 8 8"]:
    """Shows each image in one of the task's views."""
    chosen = jax.random.choice(key, len(VIEWS), (len(images),), p=jnp.asarray(task.views))
    shown = [view(images) for view in VIEWS.values()]
    return jnp.select([(chosen == i)[:, None, None] for i in range(len(shown))], shown)


def augment(images: Float[Array, "batch 8 8"], key: PRNGKeyArray) -> Float[Array, "batch 8 8"]:
    """Turns, scales and shifts each image a little, at random."""
    keys = jax.random.split(key, 3)
    count = (len(images),)
    angle = jax.random.uniform(keys[0], count, minval=-0.2, maxval=0.2)
    size = jax.random.uniform(keys[1], count, minval=0.9, maxval=1.15)
    shift = jax.random.uniform(keys[2], (*count, 2, 1, 1), minval=-0.7, maxval=0.7)
    turn = size[:, None, None] * jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]]).T
    centre = (IMAGE - 1) / 2
    grid = jnp.indices((IMAGE, IMAGE), jnp.float32) - centre
    positions = jnp.einsum("nij,jhw->nihw", turn, grid) + centre + shift
    return jax.vmap(lambda image, at: jax.scipy.ndimage.map_coordinates(image, list(at), order=1))(images, positions)
