"""SCE, PCB, WIDEN, Consensus, TALL masks, EMR and ComPEFT in NumPy and float64, as simply as their formulas allow."""

import numpy as np

from tests.methods.models import NAMES
from tests.methods.reference import per_tensor, plus, task_vectors, total, trimmed


@per_tensor
def sce(base, experts, density):
    deltas = np.stack([x - base for x in experts])
    variance = deltas.var(axis=0)
    kept = int(density * np.count_nonzero(variance))
    cut = np.sort(variance.ravel())[::-1][kept - 1] if kept else np.inf
    deltas = np.where(variance >= cut, deltas, 0)
    energies = (deltas**2).reshape(len(deltas), -1).sum(axis=1)
    sign = np.where(deltas.sum(axis=0) >= 0, 1, -1)
    weights = energies.reshape(-1, *[1] * base.ndim) * (np.sign(deltas) == sign)
    divisor = weights.sum(axis=0)
    return base + (weights * deltas).sum(axis=0) / np.where(divisor == 0, 1, divisor)


def joined(delta):
    return np.concatenate([x.ravel() for x in delta.values()])


def to_unit(x):
    return (x - x.min()) / (x.max() - x.min())


def pcb(base, experts, density, weight=1.0, tails=1e-4, normalized=False):
    deltas = np.stack([joined(delta) for delta in task_vectors(base, experts)])
    count, size = deltas.shape
    sizes = np.sort(np.abs(deltas))
    low, high = sizes[:, [int(size * tails)]], sizes[:, [int(size * (1 - tails) - 1)]]
    clamped = np.clip(np.abs(deltas), low, high)
    within = np.stack([to_unit(row) for row in clamped])
    votes = (np.sign(deltas) * within if normalized else deltas).sum(axis=0)
    scores = np.exp(count * within**2) * np.tanh(deltas * votes)
    cuts = np.sort(scores)[:, [int(size * (1 - density))]]
    shares = np.stack([to_unit(row) for row in np.maximum(scores, cuts)])
    merged = weight * (shares * np.sign(deltas) * clamped).sum(axis=0) / np.maximum(shares.sum(axis=0), 1e-12)
    parts = np.split(merged, np.cumsum([x.size for x in base.values()])[:-1])
    return {name: x + part.reshape(x.shape) for (name, x), part in zip(base.items(), parts, strict=True)}


def widen(base, experts, ratio, calibration):
    def scores(significance):
        stacked = np.stack(significance)
        soft = np.exp(stacked) / np.exp(stacked).sum(axis=0)
        return np.where(stacked > ratio * stacked.mean(axis=1, keepdims=True), calibration, soft)

    def ranks(changes):
        return [np.argsort(np.argsort(c, kind="stable")) / c.size for c in changes]

    merged = {}
    for name, before in base.items():
        after = [expert[name] for expert in experts]
        if before.ndim == 1:
            weights = scores([np.abs(x - before) for x in after])
        else:  # both Flax kernels and embeddings index inputs first
            norm = np.linalg.norm(before, axis=1)
            longer = [np.abs(np.linalg.norm(x, axis=1) - norm) for x in after]
            turned = [1 - (x * before).sum(axis=1) / np.linalg.norm(x, axis=1) / norm for x in after]
            weights = ((scores(ranks(longer)) + scores(ranks(turned))) / 2)[:, :, None]
        merged[name] = before + sum(w * (x - before) for w, x in zip(weights, after, strict=True))
    return merged


def tall_masks(base, experts, threshold):
    deltas = task_vectors(base, experts)
    summed = total(deltas)
    return summed, [{n: np.abs(d[n]) > threshold * np.abs(summed[n] - d[n]) for n in base} for d in deltas]


def consensus_merging(base, experts, threshold, minimum, scale):
    summed, masks = tall_masks(base, experts, threshold)
    return plus(base, {n: summed[n] * (sum(mask[n] for mask in masks) >= minimum) for n in base}, scale)


def tall_mask(base, experts, threshold, expert):
    summed, masks = tall_masks(base, experts, threshold)
    return plus(base, {n: summed[n] * masks[NAMES.index(expert)][n] for n in base})


def emr(base, experts, expert=None, average="tensor"):
    deltas = task_vectors(base, experts)
    summed, unified = total(deltas), {}
    for name, x in summed.items():
        sign = np.where(x > 0, 1, -1)
        unified[name] = sign * np.max([np.abs(d[name]) * (np.sign(d[name]) == sign) for d in deltas], axis=0)
    if expert is None:
        return plus(base, unified)
    own = deltas[NAMES.index(expert)]
    masked = {n: unified[n] * (own[n] * unified[n] > 0) for n in base}
    over = np.mean if average == "tensor" else np.sum
    own_mean, masked_mean = (sum(float(over(np.abs(x))) for x in vector.values()) for vector in (own, masked))
    return plus(base, masked, own_mean / masked_mean)


def compeft(base, experts, density, scale):
    deltas = task_vectors(base, experts)
    kept = zip(deltas, trimmed(deltas, density), strict=True)
    return plus(
        base, total([{n: joined(d).std(ddof=1) * np.sign(x) for n, x in left.items()} for d, left in kept]), scale
    )


def arcee_fusion(base, experts):
    """Flax kernels and embeddings have their input axis first."""

    def softmax(x):
        e = np.exp(x - x.max(axis=0))
        return e / e.sum(axis=0)

    merged = {}
    for name, a in base.items():
        b = experts[0][name]
        p, q = softmax(b), softmax(a)
        importance = np.abs(b - a) * (p * np.log(p / q)).sum(axis=0)
        first, median, third = np.sort(importance.ravel())[[int(s * (a.size - 1)) for s in (0.25, 0.5, 0.75)]]
        merged[name] = np.where(importance >= median + 1.5 * (third - first), b, a)
    return merged
