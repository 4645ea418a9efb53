"""TSV-M, Iso-C, Iso-CTS and EnchTable in NumPy and float64, as simply as their formulas allow."""

import numpy as np

from tests.methods.reference import W, task_vectors


def leading(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank].T


def polar(matrix):
    """The polar factor over the numerical rank."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-10 * s[0]
    return u[:, kept] @ vt[kept]


def tsv_m_matrix(deltas, rank=None, drop_zero=False):
    rank = rank or max(min(deltas[0].shape) // len(deltas), 1)
    parts = [leading(delta, rank) for delta in deltas if delta.any() or not drop_zero]
    u, s, v = (np.concatenate(each, axis=-1) for each in zip(*parts, strict=True))
    return polar(u) * s @ polar(v).T


def iso_c_matrix(deltas):
    total = sum(deltas)
    s = np.linalg.svd(total, compute_uv=False)
    return s[s > 1e-10 * s[0]].mean() * polar(total)


def iso_cts_matrix(deltas, common):
    size, count = min(deltas[0].shape), len(deltas)
    own = round((size - int(common * size)) / count)
    parts = [leading(sum(deltas), size - own * count)]
    for delta in deltas:
        rest = delta - parts[0][0] @ (parts[0][0].T @ delta)
        if delta.any() and own:
            parts.append(leading(rest, own))
    u, s, v = (np.concatenate(each, axis=-1) for each in zip(*parts, strict=True))
    return s.mean() * polar(u) @ polar(v).T


def spectral(base, experts, matrix, others="mean", weights=W, scale=1.0, **options):
    """A method that merges matrices with the function `matrix`, as (out, in): Flax kernels are transposed."""
    merged = {}
    for name, x in base.items():
        deltas = [w * (expert[name] - x) for w, expert in zip(weights, experts, strict=True)]
        if x.ndim != 2:
            delta = sum(deltas) / {"mean": np.sum(weights), "sum": 1, "base": np.inf}[others]
        elif name.endswith("kernel"):
            delta = matrix([delta.T for delta in deltas], **options).T
        else:
            delta = matrix(deltas, **options)
        merged[name] = x + scale * delta
    return merged


def tsv_m(base, experts, **options):
    return spectral(base, experts, tsv_m_matrix, **options)


def iso_c(base, experts, **options):
    return spectral(base, experts, iso_c_matrix, **options)


def iso_cts(base, experts, **options):
    return spectral(base, experts, iso_cts_matrix, **options)


def enchtable(base, experts, beta, gain, safety=1, rank_share=0.5):
    deltas = task_vectors(base, experts)
    task, other = deltas[1 - safety], deltas[safety]
    sizes = [np.sqrt(sum((x**2).sum() for x in delta.values())) for delta in (task, other)]
    merged = {}
    for name, x in base.items():
        added = beta * sizes[0] / sizes[1] * other[name]
        if x.ndim == 2:
            rank = int(rank_share * min(x.shape))
            parts = [leading(task[name], rank), leading(added, rank)]
            u, s, v = (np.concatenate(each, axis=-1) for each in zip(*parts, strict=True))
            one = np.eye(2 * rank)
            added = added * np.exp(-gain * np.abs((u.T @ u - one) * s @ (v.T @ v - one)).mean())
        merged[name] = x + task[name] + added
    return merged
