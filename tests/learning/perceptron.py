"""A small classifier in two forms: for JAX, and in NumPy and float64 with derivatives by hand."""

import jax
import jax.numpy as jnp
import numpy as np

IN, HIDDEN, CLASSES = 5, 4, 3
NAMES = ("a", "b", "c")


def make_params(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {
        "first": {"kernel": (IN, HIDDEN), "bias": (HIDDEN,)},
        "head": {"kernel": (HIDDEN, CLASSES), "bias": (CLASSES,)},
    }
    return {
        layer: {n: rng.standard_normal(shape).astype(dtype) for n, shape in parts.items()}
        for layer, parts in shapes.items()
    }


def make_batches(seed, sizes=(6, 6, 3)):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((size, IN)).astype(np.float32) for size in sizes]


def apply(params, x):
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"][None]


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def hidden_and_probabilities(params, x):
    """`[N, HIDDEN]` and `[N, CLASSES]` in float64."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    hidden = np.maximum(x.astype(np.float64) @ p["first"]["kernel"] + p["first"]["bias"], 0)
    logits = hidden @ p["head"]["kernel"] + p["head"]["bias"]
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return hidden, odds / odds.sum(axis=1, keepdims=True)


def gradient(params, x, hidden, signal):
    """The gradient of `signal @ logits` for one example."""
    back = np.asarray(params["head"]["kernel"], np.float64) @ signal * (hidden > 0)
    return {
        "first": {"kernel": np.outer(x.astype(np.float64), back), "bias": back},
        "head": {"kernel": np.outer(hidden, signal), "bias": signal},
    }
