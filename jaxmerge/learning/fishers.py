"""The diagonal Fisher information of a classifier's parameters, batch by batch.

What is squared is the gradient of one example: `vmap` over a few examples at a time takes the memory of as many
gradients, and a scan over these chunks of a batch adds them up in float32. Batches are padded to one size with
examples that count nothing, so there is one program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxmerge.errors import RecipeError, ShapeError
from jaxmerge.learning.batches import cached, check_finite, each_batch, examples_of
from jaxmerge.trees.checks import is_mergeable
from jaxmerge.trees.paths import Params, named_leaves, with_leaves

Kind = Literal["exact", "sampled", "empirical", "batch_square"]
Values = dict[str, Any]


def fisher(
    apply: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    *,
    kind: Kind = "exact",
    samples: int = 1,
    chunk: int = 8,
    key: Any = None,
    progress: bool | None = None,
) -> Params:
    r"""The diagonal Fisher information of a classifier's parameters: how much its predictions depend on each of them.

    $F = \frac1N \sum_x \sum_y p(y|x)\, (\partial \log p(y|x) / \partial\theta)^2$, with $p$ the softmax of the logits.

    Args:
        apply: `(params, inputs) -> logits`, `[B, classes]` or, but for `"exact"`, `[B, …, classes]`, whose predictions
            are then taken as one label each (the tokens of a text). Examples must not depend on each other.
        params: the parameters; the gradients are taken in float32.
        batches: inputs whose arrays have the examples along the first axis; `(inputs, labels)` for `"empirical"`. Gone
            through once. A batch may be smaller than the first at no cost.
        kind: `"exact"` takes the expectation over all classes, a gradient for each; `"sampled"` draws labels from the
            model; `"empirical"` takes true ones, which is another quantity. `"batch_square"` is what FusionBench
            computes: the square of $\partial \sum_{x,y} \sqrt{p}\,\log p$ over a whole batch, whose cross terms make it
            no Fisher information and dependent on the batch size. It is one gradient per batch.
        samples: labels drawn for each example.
        chunk: examples differentiated at once, in the memory of two gradients each.
        key: PRNG key or seed of the draws, which do not depend on `chunk` or on the size of batches.
        progress: show a bar; by default in a terminal or notebook.

    Returns:
        A tree like `params` in float32, not negative; zeros for leaves that are not floating point. It can be saved
        with `jm.save_checkpoint` and is what `jm.fisher_merge` takes.

    Raises:
        RecipeError: no batch, an empty one, a label that is no class, a key that is missing, or too few logits.
        ShapeError: inputs, labels or logits do not fit each other.
        NonFiniteError: NaN or infinity in the gradients of a batch.

    Source: arXiv 2111.09832, for `"exact"` and `"sampled"`.
    """
    if kind not in get_args(Kind):
        raise RecipeError(f"kind is {kind!r}, expected one of {', '.join(get_args(Kind))}")
    if kind == "sampled" and key is None:
        raise RecipeError("fisher draws labels; pass key=jax.random.key(seed), or choose another kind")
    if samples < 1 or chunk < 1:
        raise RecipeError(f"samples is {samples} and chunk is {chunk}, expected at least 1")
    key = jax.random.key(int(key)) if isinstance(key, int | np.integer) else key
    sums = {n: jnp.zeros(np.shape(leaf), jnp.float32) for n, leaf in named_leaves(params).items() if is_mergeable(leaf)}
    if not sums:
        raise RecipeError("there are no floating-point parameters")
    step = cached(_step)(apply, kind, samples)
    flags, count, size, shape = [], 0, 0, None
    for number, batch in each_batch(batches, "Fisher information", progress):
        examples = examples_of(batch, number)
        size = size if examples <= size else -(-examples // min(chunk, examples)) * min(chunk, examples)
        inputs, labels = _taken_apart(batch, number) if kind == "empirical" else (batch, None)
        padded = jax.tree.map(lambda x, size=size: _padded(x, size), inputs)
        if shape is None or shape[0] != size:
            shape = jax.eval_shape(apply, params, padded).shape
            _check_logits(shape, size, kind)
        if labels is not None:
            _check_labels(labels, (examples, *shape[1:-1]), shape[-1], number)
            labels = _padded(labels, size)
        parts = size // min(chunk, size) if kind != "batch_square" else 1
        numbers = np.arange(count, count + size, dtype=np.uint32)
        weights = (np.arange(size) < examples).astype(np.float32)
        operands = jax.tree.map(
            lambda x, parts=parts, size=size: x.reshape(parts, size // parts, *x.shape[1:]),
            (padded, labels, numbers, weights),
        )
        sums, finite = step(sums, params, operands, key)
        flags.append(finite)
        count += examples
    check_finite(flags, list(sums), "the gradients")
    zeros = {name: jnp.zeros(np.shape(leaf), jnp.float32) for name, leaf in named_leaves(params).items()}
    return with_leaves(params, zeros | {name: total / count for name, total in sums.items()})


def _step(apply: Callable[[Params, Any], Any], kind: Kind, samples: int) -> Callable[..., Any]:
    """The program that adds a batch, cut into chunks, to the sums."""

    def log_probabilities(values: Values, params: Params, inputs: Any) -> Array:
        logits = apply(with_leaves(params, {**named_leaves(params), **values}), inputs)
        return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)

    def of_one(values: Values, params: Params, example: Any) -> Array:
        return log_probabilities(values, params, jax.tree.map(lambda x: x[None], example))[0]

    def likelihood(values: Values, params: Params, example: Any, label: Any) -> Array:
        """The log-likelihood of an example's labels, all of its predictions together."""
        return jnp.sum(jnp.take_along_axis(of_one(values, params, example), label[..., None], axis=-1))

    def exact(values: Values, params: Params, example: Any) -> Values:
        log_p, pull_back = jax.vjp(lambda values: of_one(values, params, example), values)

        def add(total: Values, one: Any) -> tuple[Values, None]:
            p, chosen = one
            (gradient,) = pull_back(chosen)
            return jax.tree.map(lambda t, g: t + p * g * g, total, gradient), None

        classes = jnp.eye(log_p.size, dtype=log_p.dtype)
        return lax.scan(add, jax.tree.map(jnp.zeros_like, values), (jnp.exp(log_p), classes))[0]

    def of_example(values: Values, params: Params, example: Any, label: Any, number: Any, key: Any) -> Values:
        if kind == "exact":
            return exact(values, params, example)
        if kind == "empirical":
            return jax.tree.map(jnp.square, jax.grad(likelihood)(values, params, example, label))
        log_p = of_one(values, params, example)

        def add(total: Values, key: Any) -> tuple[Values, None]:
            gradient = jax.grad(likelihood)(values, params, example, jax.random.categorical(key, log_p))
            return jax.tree.map(lambda t, g: t + g * g / samples, total, gradient), None

        keys = jax.random.split(jax.random.fold_in(key, number), samples)
        return lax.scan(add, jax.tree.map(jnp.zeros_like, values), keys)[0]

    def of_chunk(values: Values, params: Params, operands: Any, key: Any) -> Values:
        inputs, labels, numbers, weights = operands
        if kind == "batch_square":

            def total(values: Values) -> Array:
                log_p = log_probabilities(values, params, inputs)
                each = jnp.sum((lax.stop_gradient(jnp.exp(log_p / 2)) * log_p).reshape(weights.size, -1), axis=1)
                return jnp.sum(weights * each)

            return jax.tree.map(jnp.square, jax.grad(total)(values))
        squares = jax.vmap(of_example, (None, None, 0, 0, 0, None))(values, params, inputs, labels, numbers, key)
        # Not a product: what is NaN in an example that counts nothing would stay NaN.
        return jax.tree.map(
            lambda x: jnp.sum(jnp.where(weights.reshape(-1, *(1,) * (x.ndim - 1)) > 0, x, 0), axis=0), squares
        )

    def step(sums: Values, params: Params, operands: Any, key: Any) -> tuple[Values, Array]:
        leaves = named_leaves(params)
        values = {name: leaves[name].astype(jnp.float32) for name in sums}

        def add(total: Values, chunk: Any) -> tuple[Values, None]:
            return jax.tree.map(jnp.add, total, of_chunk(values, params, chunk, key)), None

        new = lax.scan(add, sums, operands)[0]
        return new, jnp.stack([jnp.all(jnp.isfinite(x)) for x in new.values()])

    return jax.jit(step, donate_argnums=0)


def _padded(leaf: Any, size: int) -> Any:
    """An array with its first example repeated until there are `size`."""
    short = size - leaf.shape[0]
    if not short:
        return leaf
    like = np if isinstance(leaf, np.ndarray) else jnp
    return like.concatenate([leaf, like.repeat(leaf[:1], short, axis=0)])


def _taken_apart(batch: Any, number: int) -> tuple[Any, np.ndarray]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise RecipeError(f"batch {number} is {type(batch).__name__}, expected (inputs, labels) for kind='empirical'")
    return batch[0], np.asarray(batch[1])


def _check_logits(shape: tuple[int, ...], size: int, kind: Kind) -> None:
    if len(shape) < 2 or shape[0] != size:
        raise ShapeError(f"apply gave logits of shape {shape} for {size} examples, expected [{size}, …, classes]")
    if kind == "exact" and len(shape) > 2:
        raise ShapeError(
            f"apply gave logits of shape {shape}, several predictions per example, whose labels are too many to sum "
            "over; use kind='sampled'"
        )
    if shape[-1] < 2:
        raise RecipeError(
            f"apply gave logits of shape {shape}: the only class is certain; give a logit for every class"
        )


def _check_labels(labels: np.ndarray, shape: tuple[int, ...], classes: int, number: int) -> None:
    if labels.shape != shape or not np.issubdtype(labels.dtype, np.integer):
        raise ShapeError(
            f"batch {number}: found labels {labels.dtype}{list(labels.shape)}, expected integers of shape {list(shape)}"
        )
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise RecipeError(
            f"batch {number}: found the label {wrong[0]}, expected 0 to {classes - 1}, one of the {classes} classes of "
            "the logits; leave out examples without a label"
        )
