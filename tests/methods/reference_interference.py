"""WUDI, OptMerge, SWUDI, ASWUDI and DOGE in NumPy and float64, as simply as their formulas allow.

A merge of matrices takes the K task vectors of one tensor as (out, in).
"""

import numpy as np

from tests.methods.reference import W, plus, task_vectors, trimmed


def of_matrices(merge):
    """A merge of models: kernels (transposed) and embeddings by `merge`, the weighted mean of everything else."""

    def of_models(base, experts, scale=1.0, weights=W, **options):
        merged = {}
        for name, x in base.items():
            deltas = [w * (expert[name] - x) for w, expert in zip(weights, experts, strict=True)]
            if x.ndim < 2:
                merged[name] = sum(deltas) / sum(weights)
            elif name.endswith("kernel"):
                merged[name] = merge([d.T for d in deltas], **options).T
            else:
                merged[name] = merge(deltas, **options)
        return plus(base, merged, scale)

    return of_models


def norm(delta):
    return np.linalg.norm(delta)


def starting_point(deltas, start):
    return {"sum": sum(deltas), "mean": sum(deltas) / len(deltas), "zero": 0 * deltas[0]}[start]


def loss(tau, targets, guides, norms):
    return sum(norm((tau - t) @ g.T) ** 2 / n**2 for t, g, n in zip(targets, guides, norms, strict=True))


def minimiser(start, targets, guides, norms):
    """By least squares on the stacked equations, without normal equations."""
    left = np.concatenate([g / n for g, n in zip(guides, norms, strict=True)])
    right = np.concatenate([(t - start) @ g.T / n for t, g, n in zip(targets, guides, norms, strict=True)], axis=1)
    return start + np.linalg.lstsq(left, right.T, rcond=None)[0].T


def adam(gradient, x, rate, steps):
    first = second = np.zeros_like(x)
    for step in range(1, steps + 1):
        g = gradient(x)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        x = x - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return x


def sgd(gradient, x, rate, steps):
    momentum = np.zeros_like(x)
    for _ in range(steps):
        momentum = 0.9 * momentum + gradient(x)
        x = x - rate * momentum
    return x


def lowered(start, targets, guides, norms, optimizer, rate, steps):
    def gradient(tau):
        return 2 * sum((tau - t) @ g.T @ g / n**2 for t, g, n in zip(targets, guides, norms, strict=True))

    return optimizer(gradient, start, rate, steps)


def wudi(deltas, steps=None, rate=1e-5):
    problem = (sum(deltas), deltas, deltas, [norm(d) for d in deltas])
    return minimiser(*problem) if steps is None else lowered(*problem, adam, rate, steps)


def approximated(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], s[:rank, None] * vt[:rank]


def optmerge(deltas, steps=None, rate=1e-5, centre=True, start="sum", optimizer=adam):
    rank = min(deltas[0].shape) // len(deltas)
    middle = sum(deltas) / len(deltas) if centre else 0
    targets = [middle + approximated(d - middle, rank)[0] for d in deltas]
    guides = [approximated(d, rank)[1] for d in deltas]
    problem = (starting_point(deltas, start), targets, guides, [norm(d) for d in deltas])
    return minimiser(*problem) if steps is None else lowered(*problem, optimizer, rate, steps)


def filtered(deltas, start, filters):
    """`filters(eigenvalues in descending order)` are shares of the way to the minimiser."""
    c = sum(d.T @ d / norm(d) ** 2 for d in deltas)
    d = sum(d @ d.T @ d / norm(d) ** 2 for d in deltas)
    eigenvalues, vectors = np.linalg.eigh(c)
    eigenvalues, vectors = eigenvalues[::-1], vectors[:, ::-1]
    f = filters(np.maximum(eigenvalues, 0)) * (eigenvalues > 1e-12)
    x = starting_point(deltas, start)
    return x - x @ (vectors * f) @ vectors.T + d @ (vectors * f / np.where(f > 0, eigenvalues, 1)) @ vectors.T


def swudi(deltas, time=300.0, rank=0.65, start="sum"):
    def filters(eigenvalues):
        shares = 1 - np.exp(-eigenvalues * time)
        shares[int(np.ceil(rank * eigenvalues.size - 1e-9)) :] = 0
        return shares

    return filtered(deltas, start, filters)


RULES = {
    "participation_sqrt": lambda x: np.sqrt(x).sum() ** 2 / x.sum(),
    "participation": lambda x: x.sum() ** 2 / (x**2).sum(),
    "entropy": lambda x: np.exp(-sum(p * np.log(p) for p in x / x.sum() if p > 1e-12)),
    "stable": lambda x: (x**2).sum() / x.max() ** 2,
    "full": lambda x: x.size,
}


def aswudi(deltas, rule="participation_sqrt", start="sum"):
    return filtered(deltas, start, lambda x: np.arange(x.size) < np.ceil(RULES[rule](x)))


def shared_directions(deltas, subspace):
    rank = min(deltas[0].shape) // len(deltas)
    leading = np.concatenate([np.linalg.svd(d, full_matrices=False)[0][:, :rank] for d in deltas], axis=1)
    return np.linalg.svd(leading)[0][:, : min(deltas[0].shape) // subspace]


def conflict(correction, deltas, eta=0.07):
    factors = [eta / norm(d) for d in deltas]
    total = sum(f * (d + correction) for f, d in zip(factors, deltas, strict=True))
    return sum(((d * (d - total)).sum(axis=1) ** 2).sum() for d in deltas)


def correction(deltas, eta=0.07, subspace=6, steps=400, rate=1e-4, losses=None):
    """If `losses` is a list, the loss before each step is appended to it."""
    factors = [eta / norm(d) for d in deltas]
    shared = shared_directions(deltas, subspace)

    def gradient(x):
        if losses is not None:
            losses.append(conflict(x, deltas, eta))
        total = sum(f * (d + x) for f, d in zip(factors, deltas, strict=True))
        full = -2 * sum(factors) * sum((d * (d - total)).sum(axis=1, keepdims=True) * d for d in deltas)
        return full - shared @ shared.T @ full

    return adam(gradient, np.zeros_like(deltas[0]), rate, steps)


def doge(base, experts, density=0.3, eta=0.07, subspace=6, steps=400, rate=1e-4):
    deltas = task_vectors(base, experts)
    matrices = [name for name, x in base.items() if x.ndim == 2]
    kept = trimmed([{name: delta[name] for name in matrices} for delta in deltas], density)
    merged = {name: np.mean([delta[name] for delta in deltas], axis=0) for name in base}
    for name in matrices:
        turn = (lambda x: x.T) if name.endswith("kernel") else (lambda x: x)
        own = [turn(delta[name]) for delta in deltas]
        shift = turn(correction(own, eta, subspace, steps, rate))
        parts = [
            eta / norm(delta[name]) * (mask[name] != 0) * (delta[name] + shift)
            for delta, mask in zip(deltas, kept, strict=True)
        ]
        merged[name] = np.sum(parts, axis=0)
    return plus(base, merged)
