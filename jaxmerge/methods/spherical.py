"""Means and interpolation of directions: NuSLERP, Multi-SLERP and the Karcher mean.

What is merged are vectors: the experts' tensors, or with a base their task vectors. All results lie in the span of the
inputs, so everything but one weighted sum at the end happens on the K x K matrix of inner products, which adds up over
chunks: the methods stream, and an iteration costs nothing that grows with the tensors. Where the directions cancel out
there is no mean direction, and all three give the straight weighted mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Coefficient, coefficient, per_expert
from jaxmerge.methods.measurements import Scope, Total
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.task_arithmetic import nonzero
from jaxmerge.trees.info import TensorInfo

Fibres = int | Literal["input", "output"] | None
"""Which entries form one vector: a whole tensor (None), or those along the input axes, the output axes or one axis."""


@pytree
class Nuslerp(Method):
    """See `nuslerp`."""

    weights: Any = 1.0
    axis: Fibres = static(default=None)

    @property
    def whole_tensor(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.axis is not None

    @property
    def passes(self) -> tuple[Scope, ...]:
        return () if self.whole_tensor else ("tensor",)

    def check(self, experts: tuple[str, ...], has_base: bool, tensors: Sequence[str]) -> None:
        super().check(experts, has_base, tensors)
        if len(experts) != 2:
            raise RecipeError(f"{self!r} goes between two experts: found {len(experts)}; multislerp takes any number")

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Nuslerp:
        return dataclasses.replace(self, weights=per_expert(self.weights, info, experts, "weights"))

    def measure(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Total:
        return Total(_inner_products(_vectors(base, experts), None))

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        a, b = _vectors(base, experts)
        aa, ab, bb = stats[0] if stats else _inner_products([a, b], fibre_axes(self.axis, info))
        of_a, of_b = (jnp.asarray(w, a.dtype) for w in self.weights)
        t = jnp.where(jnp.abs(of_a + of_b) < 1e-6, 0.5, of_b / nonzero(of_a + of_b))
        cosine = ab * _inverse_root(aa) * _inverse_root(bb)
        # Weights of nearly parallel vectors hardly depend on the angle, of which float32 knows little there.
        straight = jnp.abs(cosine) > 1 - 1e-6
        angle = jnp.arccos(jnp.where(straight, 0, cosine))
        merged = (
            jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle)) * a
            + jnp.where(straight, t, jnp.sin(t * angle) / jnp.sin(angle)) * b
        )
        return merged if base is None else base + merged


@pytree
class Multislerp(Method):
    """See `multislerp`."""

    weights: Any = 1.0
    normalize: bool = static(default=True)

    passes = ("tensor",)  # pyright: ignore[reportAssignmentType]

    def at(self, info: TensorInfo, experts: tuple[str, ...]) -> Multislerp:
        return dataclasses.replace(self, weights=per_expert(self.weights, info, experts, "weights"))

    def measure(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Total:
        vectors = _vectors(base, experts)
        lower = [[jnp.sum(a * b) for b in vectors[: i + 1]] for i, a in enumerate(vectors)]
        count = len(vectors)
        return Total(jnp.stack([jnp.stack([lower[max(i, j)][min(i, j)] for j in range(count)]) for i in range(count)]))

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        gram = stats[0]
        weights = jnp.stack([jnp.asarray(w, gram.dtype) for w in self.weights])
        if self.normalize:
            weights = weights / nonzero(jnp.sum(weights), below=1e-8)
        inverse = _inverse_root(jnp.diagonal(gram))
        cosines = gram * inverse[:, None] * inverse[None, :]
        # Squared, this is what rounding leaves of directions that cancel.
        cancelled = _squared_norm(weights, cosines) <= 1e-6 * jnp.sum(jnp.abs(weights)) ** 2
        direction = self.direction(jnp.where(cancelled, 1, weights), jnp.where(cancelled, 1, cosines))
        length = jnp.sum(weights * jnp.diagonal(gram) * inverse)
        factors = jnp.where(cancelled, weights, length * direction * inverse)
        start = jnp.zeros_like(experts[0]) if base is None else base
        return sum((f * x for f, x in zip(factors, _vectors(base, experts), strict=True)), start)

    def direction(self, weights: Float[Array, " K"], cosines: Float[Array, "K K"]) -> Float[Array, " K"]:
        """The mean direction, of length 1, as a combination of K unit vectors whose mean is not zero."""
        return weights / jnp.sqrt(_squared_norm(weights, cosines))


@pytree
class Karcher(Multislerp):
    """See `karcher`."""

    iterations: int = static(default=10)

    def direction(self, weights: Float[Array, " K"], cosines: Float[Array, "K K"]) -> Float[Array, " K"]:
        def step(_: Any, mean: Float[Array, " K"]) -> Float[Array, " K"]:
            to_mean = _applied(cosines, mean)
            pulls = weights * _angle_over_sine(to_mean)
            tangent = pulls - jnp.sum(pulls * to_mean) * mean
            length = jnp.sqrt(jnp.maximum(_squared_norm(tangent, cosines), 1e-14))
            moved = jnp.cos(length) * mean + jnp.sin(length) / length * tangent
            return moved / jnp.sqrt(_squared_norm(moved, cosines))

        return jax.lax.fori_loop(0, self.iterations, step, super().direction(weights, cosines))


def _vectors(base: Any, experts: list[Any]) -> list[Any]:
    return experts if base is None else [x - base for x in experts]


def _inner_products(pair: list[Any], axes: tuple[int, ...] | None) -> tuple[Any, Any, Any]:
    a, b = pair
    keep = axes is not None
    aa, ab, bb = (jnp.sum(x * y, axes, keepdims=keep) for x, y in ((a, a), (a, b), (b, b)))
    return aa, ab, bb


def fibre_axes(axis: Fibres, info: TensorInfo) -> tuple[int, ...] | None:
    """The axes along which a fibre runs; None, so that the whole is one fibre, for tensors without such axes."""
    if isinstance(axis, int):
        return (axis,) if len(info.shape) > 1 else None
    return (info.input_axes if axis == "input" else info.output_axes) or None


def _inverse_root(square: Any) -> Any:
    """`1 / sqrt(square)`, or 0 for 0: a zero vector has no direction."""
    return jnp.where(square > 0, 1 / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _applied(gram: Float[Array, "K K"], factors: Float[Array, " K"]) -> Float[Array, " K"]:
    """The product, which a matrix product would round to fewer digits on accelerators."""
    return jnp.sum(gram * factors[None, :], axis=1)


def _squared_norm(factors: Float[Array, " K"], gram: Float[Array, "K K"]) -> Float[Array, ""]:
    """Of a combination of vectors with these inner products."""
    return jnp.sum(factors * _applied(gram, factors))


def _angle_over_sine(cosine: Any) -> Any:
    near = cosine > 1 - 1e-4
    safe = jnp.where(near, 0, jnp.maximum(cosine, -1 + 1e-6))
    return jnp.where(near, 1 + (1 - cosine) / 3, jnp.arccos(safe) / jnp.sqrt(1 - safe * safe))


def nuslerp(weights: Coefficient = None, *, axis: Fibres = None) -> Method:
    r"""NuSLERP: spherical interpolation of two experts by weights, of tensors or of their fibres.

    With $t = w_2 / (w_1 + w_2)$ and $\varphi$ the angle between the vectors $x_1, x_2$:
    $[\sin((1-t)\varphi)\, x_1 + \sin(t\varphi)\, x_2] / \sin\varphi$. The vectors are the experts' tensors; with a base
    they are task vectors, and the base is added.

    Args:
        weights: $w_1, w_2$; equal by default. Where they cancel, $t$ is 0.5.
        axis: what one vector is: a whole tensor (None), the entries along the `"input"` axes (one vector per output
            unit), those along the `"output"` axes, or those along one axis by number. Vectors, biases and norms are
            always one vector.

    Directions closer than $|\cos\varphi| = 1 - 10^{-6}$ are interpolated on the straight line. Source: mergekit
    `nuslerp` (no paper).
    """
    return Nuslerp(1.0 if weights is None else coefficient(weights), axis)


def multislerp(weights: Coefficient = None, *, normalize: bool = True) -> Method:
    r"""Multi-SLERP: the mean direction of any number of experts, at the mean of their lengths.

    With $u_i = x_i / \|x_i\|$: $\sum_i w_i \|x_i\|$ times the unit vector along $\sum_i w_i u_i$. The vectors $x_i$ are
    the experts' tensors; with a base they are task vectors, and the base is added.

    Args:
        weights: $w_i$, one per expert; equal by default.
        normalize: divide the weights by their sum; without it they scale the length.

    Source: mergekit `multislerp` (no paper); BOOM (arXiv 2602.05787) merges with it. Where the directions cancel to
    less than a thousandth the result is the straight weighted mean.
    """
    return Multislerp(1.0 if weights is None else coefficient(weights), normalize)


def karcher(weights: Coefficient = None, *, iterations: int = 10) -> Method:
    r"""Karcher mean: the direction with the least squared angles to the experts, at the mean of their lengths.

    Starts at the direction of `multislerp` and iterates $u \leftarrow \exp_u \sum_i w_i \log_u u_i$ on the sphere. The
    vectors are the experts' tensors; with a base they are task vectors, and the base is added.

    Args:
        weights: $w_i$, one per expert; equal by default. They are divided by their sum.
        iterations: how many; all are run, on K numbers each. 0 is `multislerp`.

    Source: mergekit `karcher` (no paper); the mean is due to H. Karcher, 1977. Where the directions cancel there is no
    such mean, and the result is the straight weighted mean.
    """
    return Karcher(1.0 if weights is None else coefficient(weights), True, iterations)
