"""OPCM in plain NumPy and float64, as it is published: full factors, and the whole model rescaled after every step."""

from collections.abc import Iterator

import numpy as np

from tests.methods.reference import Model


def opcm(base: Model, experts: list[Model], alpha: float) -> Model:
    *_, last = opcm_steps(base, experts, alpha)
    return last


def opcm_steps(base: Model, experts: list[Model], alpha: float) -> Iterator[Model]:
    """The merged model after each expert."""
    merged: Model = {}
    factor, lengths = 1.0, []
    for expert in experts:
        delta = deltas_of(base, expert)
        lengths.append(norm(delta))
        if not merged:
            merged = delta
        else:
            new = {name: factor * merged[name] + _away(name, merged[name], delta[name], alpha) for name in base}
            factor = norm(new) / np.mean(lengths)
            merged = {name: x / factor for name, x in new.items()}
        yield {name: np.asarray(base[name], np.float64) + merged[name] for name in base}


def deltas_of(base: Model, expert: Model) -> Model:
    return {name: np.asarray(expert[name], np.float64) - np.asarray(base[name], np.float64) for name in base}


def norm(model: Model) -> float:
    return float(np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in model.values())))


def _away(name: str, total: np.ndarray, delta: np.ndarray, alpha: float) -> np.ndarray:
    if not name.endswith("kernel"):
        return delta
    u, s, vt = np.linalg.svd(total)
    inside = u.T @ delta @ vt.T
    split = int(np.argmax(np.cumsum(s) / s.sum() > alpha))
    inside[range(len(s)), range(len(s))] = 0
    inside[:split, :split] = 0
    return u @ inside @ vt
