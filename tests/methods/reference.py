"""Every deterministic method again, in plain NumPy and float64, as simply as its formula allows.

A model is `{name: array}`; `W` are the weights of three experts in order.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Model = dict[str, np.ndarray]
Deltas = list[Model]
W = np.array([0.5, 1.5, 1.0])


def per_tensor(merge: Callable[..., Any]) -> Callable[..., Model]:
    def of_model(base: Model, experts: list[Model], **options: object) -> Model:
        return {name: merge(base[name], [expert[name] for expert in experts], **options) for name in base}

    return of_model


@per_tensor
def linear(base, experts, normalize=True):
    return sum(w * x for w, x in zip(W, experts, strict=True)) / (W.sum() if normalize else 1)


@per_tensor
def slerp(base, experts, t):
    a, b = base, experts[0]
    cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@per_tensor
def nearswap(base, experts, t):
    share = np.minimum(t / np.maximum(np.abs(base - experts[0]), 1e-6), 1)
    return share * experts[0] + (1 - share) * base


@per_tensor
def passthrough(base, experts, scale):
    return scale * experts[0]


@per_tensor
def model_stock(base, experts, average="cosine", fibres=False, clip=False):
    deltas = np.stack([x - base for x in experts])
    rows = deltas.reshape(len(deltas), -1, deltas.shape[-1] if fibres and base.ndim > 1 else base.size)
    merged = np.empty(rows.shape[1:])
    for i in range(rows.shape[1]):
        vectors = rows[:, i]
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines = (units @ units.T)[np.triu_indices(len(units), 1)]
        c = cosines.mean() if average == "cosine" else np.cos(np.arccos(cosines).mean())
        t = len(units) * c / (1 + (len(units) - 1) * c)
        merged[i] = (np.clip(t, 0, 1) if clip else t) * vectors.mean(axis=0)
    return base + merged.reshape(base.shape)


def task_vectors(base: Model, experts: list[Model]) -> Deltas:
    return [{name: expert[name] - base[name] for name in base} for expert in experts]


def plus(base: Model, merged: Model, scale: float = 1.0) -> Model:
    return {name: base[name] + scale * merged[name] for name in base}


def weighed(deltas: Deltas) -> Deltas:
    return [{name: w * x for name, x in delta.items()} for w, delta in zip(W, deltas, strict=True)]


def total(deltas: Deltas) -> Model:
    return {name: np.sum([delta[name] for delta in deltas], axis=0) for name in deltas[0]}


def magnitude_of_rank(x: np.ndarray, rank: int) -> float:
    """1 for the largest."""
    return np.sort(np.abs(x).ravel())[::-1][rank - 1]


def trimmed(deltas: Deltas, density: float, scope: str = "model", extra: int = 0) -> Deltas:
    result = []
    for delta in deltas:
        everything = np.concatenate([x.ravel() for x in delta.values()])
        kept = {}
        for name, x in delta.items():
            population = everything if scope == "model" else x
            cut = magnitude_of_rank(population, max(int(density * population.size), 1) + extra)
            kept[name] = np.where(np.abs(x) >= cut, x, 0)
        result.append(kept)
    return result


def middle(deltas: Deltas, density: float, gamma: float) -> Deltas:
    def of(x: np.ndarray) -> np.ndarray:
        outliers = int(gamma * x.size)
        largest, smallest = (magnitude_of_rank(x, outliers + r) for r in (1, int(density * x.size)))
        return np.where((np.abs(x) <= largest) & (np.abs(x) >= smallest), x, 0)

    return [{name: of(x) for name, x in delta.items()} for delta in deltas]


def middle_of_fibres(deltas: Deltas, density: float, gamma: float) -> Deltas:
    """Along the last axis, outliers first: they then count among the entries kept, as zeros."""

    def of(x: np.ndarray) -> np.ndarray:
        rows = x.reshape(-1, x.shape[-1]).copy()
        for row in rows:
            row[np.argsort(-np.abs(row), kind="stable")[: int(gamma * row.size)]] = 0
            row[np.argsort(-np.abs(row), kind="stable")[int(density * row.size) :]] = 0
        return rows.reshape(x.shape)

    return [{name: of(x) for name, x in delta.items()} for delta in deltas]


def l1_restored(deltas: Deltas, original: Deltas) -> Deltas:
    return [
        {name: x * np.abs(before[name]).sum() / np.abs(x).sum() for name, x in delta.items()}
        for delta, before in zip(deltas, original, strict=True)
    ]


def consensus(
    deltas: Deltas, weighted: bool, reduction: str = "mean", elect: str = "total", majority: bool = False
) -> Model:
    """Elects signs and combines what agrees; `deltas` are weighed already if `weighted`."""
    weights = W if weighted else np.ones(len(deltas))
    tally = {name: sum(d[name] if elect == "total" else np.sign(d[name]) for d in deltas) for name in deltas[0]}
    default = np.sign(sum(np.sign(x).sum() for x in tally.values())) if majority else 1
    merged = {}
    for name, votes in tally.items():
        sign = np.where(votes == 0, default, np.sign(votes))
        agree = [np.sign(d[name]) == sign for d in deltas]
        kept = [d[name] * a for d, a in zip(deltas, agree, strict=True)]
        divisor = sum(w * a for w, a in zip(weights, agree, strict=True))
        if reduction == "max":
            merged[name] = sign * np.max(np.abs(kept), axis=0)
        else:
            merged[name] = sum(kept) / (np.where(divisor == 0, 1, divisor) if reduction == "mean" else 1)
    return merged


def task_arithmetic(base, experts, scale, normalize=False):
    return plus(base, total(weighed(task_vectors(base, experts))), scale / (W.sum() if normalize else 1))


def ties(base, experts, density, scale=1.0, scope="model", elect="total", reduction="mean"):
    deltas = weighed(trimmed(task_vectors(base, experts), density, scope))
    return plus(base, consensus(deltas, True, reduction, elect), scale)


def ties_published(base, experts, density, reduction):
    deltas = trimmed(task_vectors(base, experts), density, extra=1)
    return plus(base, consensus(deltas, False, reduction, majority=True))


def ties_rescaled(base, experts, density):
    deltas = task_vectors(base, experts)
    kept = l1_restored(trimmed(deltas, density, "tensor"), deltas)
    return plus(base, consensus(weighed(kept), True))


def breadcrumbs(base, experts, density, gamma, scale, fibres=False):
    prune = middle_of_fibres if fibres else middle
    return plus(base, total(weighed(prune(task_vectors(base, experts), density, gamma))), scale)


def breadcrumbs_ties(base, experts, density, gamma, scale):
    deltas = weighed(middle(task_vectors(base, experts), density, gamma))
    return plus(base, consensus(deltas, True), scale)


def lines(base, experts, alpha, beta, layers):
    """On top of the plain sum; the layer is the second part of the name."""
    summed = total(task_vectors(base, experts))
    if alpha is None:
        alpha = 1 / len(experts)
    factors = {n: alpha + (beta * int(n.split("/")[1]) / (layers - 1) if n.startswith("blocks/") else 0) for n in base}
    return {name: base[name] + factors[name] * summed[name] for name in base}
