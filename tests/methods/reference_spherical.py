"""NuSLERP, Multi-SLERP and the Karcher mean of task vectors in NumPy and float64, on the tensors themselves."""

import numpy as np

from tests.methods.reference import W, per_tensor


def unit(x):
    return x / np.linalg.norm(x)


def slerp(a, b, t):
    angle = np.arccos(np.clip(unit(a) @ unit(b), -1, 1))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@per_tensor
def nuslerp(base, experts, axis=None):
    """`axis` is that of a matrix; vectors are one fibre."""
    t = W[1] / (W[0] + W[1])
    if axis is None or base.ndim == 1:
        return base + slerp(experts[0].ravel() - base.ravel(), experts[1].ravel() - base.ravel(), t).reshape(base.shape)
    fibres = [np.moveaxis(x - base, axis, 0).reshape(base.shape[axis], -1).T for x in experts]
    merged = np.stack([slerp(a, b, t) for a, b in zip(*fibres, strict=True)])
    return base + np.moveaxis(merged.T.reshape(np.moveaxis(base, axis, 0).shape), 0, axis)


@per_tensor
def karcher(base, experts, iterations):
    """No iteration is Multi-SLERP."""
    weights = W / W.sum()
    vectors = [x.ravel() - base.ravel() for x in experts]
    units = [unit(x) for x in vectors]
    mean = unit(sum(w * u for w, u in zip(weights, units, strict=True)))
    for _ in range(iterations):
        angles = [np.arccos(np.clip(u @ mean, -1, 1)) for u in units]
        logs = [a / np.sin(a) * (u - np.cos(a) * mean) for a, u in zip(angles, units, strict=True)]
        step = sum(w * x for w, x in zip(weights, logs, strict=True))
        mean = np.cos(np.linalg.norm(step)) * mean + np.sin(np.linalg.norm(step)) * unit(step)
    length = sum(w * np.linalg.norm(x) for w, x in zip(weights, vectors, strict=True))
    return base + length * mean.reshape(base.shape)
