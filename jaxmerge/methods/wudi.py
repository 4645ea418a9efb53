"""WUDI (arXiv 2503.08099), OptMerge (2505.19892) and SWUDI (2606.07289): one least-squares problem for each matrix.

The merged task vector should do to the inputs of each expert what that expert's does. Inputs are not known; the rows of
the task vector stand for them, since gradients of a linear layer are combinations of its inputs. What is minimised is

    sum_i |(tau - target_i) guide_i^T|^2 / |tau_i|^2,

and the methods differ in targets and guides (WUDI, SWUDI: the task vectors; OptMerge: what is left of them at low rank)
and in how far they go from the start towards the minimiser (all the way; some steps; along some eigenvectors).

Each row of the merged task vector is a least-squares problem with one matrix C for all rows, (in, in). With R half the
gradient at the start, the minimiser next to the start is start - R C⁺, and every closed form here is start - R g(C) for
a function g of the eigenvalues. Where the guides have fewer rows in all than columns, C = A^T A is not formed: there
A^T A g(A^T A) = A^T g(A A^T) A, and A A^T is the smaller matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmerge.errors import RecipeError
from jaxmerge.methods.coefficients import Coefficient, check_range, coefficient
from jaxmerge.methods.factorisation import dot, leading_svd
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.spectral import Factored, Others, Spectral
from jaxmerge.methods.task_arithmetic import nonzero

Start = Literal["sum", "mean", "zero"]
Optimizer = Literal["adam", "sgd"]
RankRule = Literal["participation_sqrt", "participation", "entropy", "stable", "full"]


@pytree
class Wudi(Spectral):
    """See `wudi`; its other forms override what is minimised (`problem`) or how far (`share`)."""

    learning_rate: Any = 1e-5
    cutoff: Any = None
    steps: int | None = static(default=None)
    start: Start = static(default="sum")
    optimizer: Optimizer = static(default="adam")

    @property
    def arrives(self) -> bool:
        """Whether it goes all the way along the eigenvectors that it goes along."""
        return True

    def merge_matrices(self, deltas: list[Float[Array, "m n"]]) -> Float[Array, "m n"]:
        start = _start(self.start, deltas)
        targets, guides = self.problem(deltas)
        norms = [jnp.sqrt(nonzero(jnp.sum(delta * delta))) for delta in deltas]
        rows = [guide / norm for guide, norm in zip(guides, norms, strict=True)]
        problem = LeastSquares(targets, rows, jnp.concatenate(rows))
        if self.steps is not None:
            gradient = problem.gradient_from(start)
            return start + descend(self.optimizer, self.learning_rate, gradient, jnp.zeros_like(start), self.steps)
        inverse = matrix_function(problem.gram, self, functools.partial(type(self).inverse, columns=start.shape[1]))
        merged = start - problem.change(start, inverse)
        # A Gram matrix loses half of the digits. From so near, what is left is seen without it.
        return merged - problem.change(merged, inverse) if self.arrives else merged

    def problem(self, deltas: list[Any]) -> tuple[list[Any], list[Any]]:
        """Targets and guides: what the merged task vector should agree with, and on which inputs."""
        return deltas, deltas

    def inverse(self, eigenvalues: Any, columns: int) -> Any:
        """Eigenvalues of the filtered pseudo-inverse, from those of C in ascending order."""
        eps = float(jnp.finfo(eigenvalues.dtype).eps)
        cutoff = eps * eigenvalues.size if self.cutoff is None else self.cutoff
        kept = eigenvalues > jnp.maximum(cutoff * eigenvalues[-1], 0)
        positive = jnp.where(kept, eigenvalues, 0)
        return jnp.where(kept, self.share(positive, columns) / nonzero(positive), 0)

    def share(self, eigenvalues: Any, columns: int) -> Any:
        """How far to go towards the minimiser along each eigenvector, from 0 to 1."""
        return jnp.ones_like(eigenvalues)


@pytree
class Optmerge(Wudi):
    """See `optmerge`."""

    centre: bool = static(default=True)

    def problem(self, deltas: list[Any]) -> tuple[list[Any], list[Any]]:
        rank = max(min(deltas[0].shape) // len(deltas), 1)
        centre = _start("mean" if self.centre else "zero", deltas)
        guides = [_largest(delta, rank)[1] for delta in deltas]
        # What is left of equal task vectors without their mean is rounding.
        sizes = [jnp.linalg.norm(jax.lax.stop_gradient(delta)) for delta in deltas]
        targets = [centre + _largest(d - centre, rank, size)[0] for d, size in zip(deltas, sizes, strict=True)]
        return targets, guides


@pytree
class Swudi(Wudi):
    """See `swudi`."""

    time: Any = 300.0
    rank: Any = 0.65

    @property
    def arrives(self) -> bool:
        return self.time is None

    def share(self, eigenvalues: Any, columns: int) -> Any:
        share = jnp.ones_like(eigenvalues) if self.time is None else -jnp.expm1(-self.time * eigenvalues)
        return share if self.rank is None else jnp.where(_among_largest(eigenvalues, self.rank * columns), share, 0)


@pytree
class Aswudi(Wudi):
    """See `aswudi`."""

    rule: RankRule = static(default="participation_sqrt")

    def share(self, eigenvalues: Any, columns: int) -> Any:
        if self.rule == "full":
            return jnp.ones_like(eigenvalues)
        rank = _effective_rank(self.rule, eigenvalues)
        return jnp.where(_among_largest(eigenvalues, rank), jnp.ones_like(eigenvalues), 0)


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """The minimisation of `sum_i |(x - targets_i) rows_i^T|^2`.

    Attributes:
        targets: K matrices.
        rows: K matrices, guides over norms.
        joined: A, all rows one below the other.
    """

    targets: list[Any]
    rows: list[Any]
    joined: Any

    @property
    def smaller(self) -> bool:
        """Whether A A^T is smaller than C."""
        return self.joined.shape[0] < self.joined.shape[1]

    @property
    def gram(self) -> Any:
        """A A^T, or C."""
        return dot(self.joined, self.joined.T) if self.smaller else dot(self.joined.T, self.joined)

    def misses(self, x: Any) -> Any:
        """What is squared, for all experts side by side."""
        return jnp.concatenate([dot(x - t, r.T) for t, r in zip(self.targets, self.rows, strict=True)], axis=1)

    def change(self, x: Any, inverse: Any) -> Any:
        """Half the gradient at x times g(C), from g of the Gram matrix."""
        if self.smaller:
            return dot(dot(self.misses(x), inverse), self.joined)
        return dot(dot(self.misses(x), self.joined), inverse)

    def gradient_from(self, start: Any) -> Callable[[Any], Any]:
        """The gradient as a function of the move from a start. Moves are small, so little is lost to rounding."""
        missed = self.misses(start)
        if self.smaller:
            return lambda move: 2 * dot(missed + dot(move, self.joined.T), self.joined)
        residual, gram = dot(missed, self.joined), self.gram
        return lambda move: 2 * (residual + dot(move, gram))


def descend(optimizer: Optimizer, rate: Any, gradient: Callable[[Any], Any], at: Any, steps: int) -> Any:
    """Where steps of Adam, or of gradient descent with momentum 0.9, lead from a point."""

    def step(number: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        x, first, second = state
        slope = gradient(x)
        if optimizer == "sgd":
            first = 0.9 * first + slope
            return x - rate * first, first, second
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope * slope
        count = (number + 1).astype(x.dtype)
        mean, square = (m / -jnp.expm1(count * math.log(decay)) for m, decay in ((first, 0.9), (second, 0.999)))
        root = jnp.where(square > 0, jnp.sqrt(nonzero(square)), 0)  # so that it has a derivative at 0
        return x - rate * mean / (root + 1e-8), first, second

    zero = jnp.zeros_like(at)
    return jax.lax.fori_loop(0, steps, step, (at, zero, zero))[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def matrix_function(gram: Any, parameters: Any, function: Callable[..., Any]) -> Any:
    """The symmetric matrix with the eigenvectors of `gram` and the eigenvalues `function(parameters, eigenvalues)`.

    Its derivative exists where eigenvalues coincide too, as they do on the null space, unlike that of eigenvectors.
    """
    eigenvalues, vectors = jnp.linalg.eigh(gram)
    return dot(vectors * function(parameters, eigenvalues)[None, :], vectors.T)


@matrix_function.defjvp
def _matrix_function_jvp(function: Any, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (gram, parameters), (d_gram, d_parameters) = primals, tangents
    eigenvalues, vectors = jnp.linalg.eigh(gram)
    values, d_values = jax.jvp(lambda p: function(p, eigenvalues), (parameters,), (d_parameters,))
    slopes = jax.jvp(lambda x: function(parameters, x), (eigenvalues,), (jnp.ones_like(eigenvalues),))[1]
    # Difference quotients of the function, or its slope where they would be lost to rounding.
    row, column = eigenvalues[:, None], eigenvalues[None, :]
    near = jnp.abs(row - column) <= 5e-4 * (jnp.abs(row) + jnp.abs(column))
    quotients = (values[:, None] - values[None, :]) / jnp.where(near, 1, row - column)
    quotients = jnp.where(near, (slopes[:, None] + slopes[None, :]) / 2, quotients)
    inner = quotients * dot(vectors.T, dot(d_gram, vectors)) + jnp.diag(d_values)
    return dot(vectors * values[None, :], vectors.T), dot(vectors, dot(inner, vectors.T))


def _start(start: Start, deltas: list[Any]) -> Any:
    if start == "zero":
        return jnp.zeros_like(deltas[0])
    return _added(deltas) / (len(deltas) if start == "mean" else 1)


def _added(parts: list[Any]) -> Any:
    return sum(parts[1:], parts[0])


def _largest(matrix: Any, rank: int, size: Any = 0.0) -> tuple[Any, Any]:
    """The best approximation of this rank, and its right factor with as many rows; `size` as for `leading_svd`."""
    u, s, v = leading_svd(matrix, rank, size)
    right = s[:, None] * v.T
    return dot(u, right), right


def _among_largest(eigenvalues: Any, rank: Any) -> Any:
    """Whether each of the ascending eigenvalues is among the largest ones: `rank` of them, rounded up, at least 1."""
    rank = jnp.maximum(jnp.ceil(rank * (1 - 2.0**-20)), 1)  # what is a whole number but for rounding is one
    return jnp.arange(eigenvalues.size, 0, -1, dtype=eigenvalues.dtype) <= rank


def _effective_rank(rule: RankRule, eigenvalues: Any) -> Any:
    total = nonzero(jnp.sum(eigenvalues))
    if rule == "stable":
        return jnp.sum(eigenvalues**2) / nonzero(eigenvalues[-1] ** 2)
    if rule == "entropy":
        shares = eigenvalues / total
        return jnp.exp(-jnp.sum(shares * jnp.log(nonzero(shares))))
    if rule == "participation":
        return total**2 / nonzero(jnp.sum(eigenvalues**2))
    return jnp.sum(jnp.sqrt(eigenvalues)) ** 2 / total


def wudi(
    scale: Coefficient = 1.0,
    *,
    weights: Coefficient = None,
    steps: int | None = None,
    learning_rate: Coefficient = 1e-5,
    cutoff: Coefficient = None,
    factored: Factored = "matrices",
    others: Others = "mean",
) -> Method:
    r"""WUDI-Merging: the task vector that interferes least with every expert on the expert's own rows.

    With $\tau_i$ as (out, in): $\tau = \arg\min \sum_i \|(\tau - \tau_i)\tau_i^\top\|_F^2 / \|\tau_i\|_F^2$ next to
    $\sum_i \tau_i$, which is $D C^+$ for $C = \sum_i \tau_i^\top \tau_i / \|\tau_i\|^2$ and
    $D = \sum_i \tau_i \tau_i^\top \tau_i / \|\tau_i\|^2$; $\theta = \theta_0 + \lambda \tau$.

    Args:
        scale: $\lambda$; the paper needs none.
        weights: factors of the task vectors; 1 each by default (the paper has none).
        steps: None for the minimiser itself (ours); 300 (paper, FusionBench's function) or 400 (its configuration) for
            the published method, which starts at the sum of the task vectors and takes steps of Adam.
        learning_rate: of Adam. At 1e-5 no entry moves further than about 1e-5 times the steps, whatever the size of the
            task vectors.
        cutoff: eigenvalues of $C$ up to this share of the largest count as zero: nothing is learned there. By default
            their number times the spacing of the floats at 1, which is 1e-4 for a thousand in float32.
        factored: which tensors are matrices: `"matrices"`, or `"kernels"` (as for `tsv_m`).
        others: what becomes of the rest: their `"mean"` or `"sum"` task vector times `scale`, or the `"base"`.

    The authors' script merges attention and MLP matrices and leaves all else at the base. An expert that equals the
    base in a matrix takes no part (the published code gives NaN). Source: arXiv 2503.08099.
    """
    _check_steps("wudi", steps)
    return Wudi(
        coefficient(scale),
        _weights(weights),
        factored,
        others,
        coefficient(learning_rate),
        coefficient(cutoff),
        steps,
    )


def optmerge(
    scale: Coefficient = 1.0,
    *,
    weights: Coefficient = None,
    steps: int | None = 300,
    learning_rate: Coefficient = None,
    centre: bool = True,
    start: Start = "sum",
    optimizer: Optimizer = "adam",
    factored: Factored = "matrices",
    others: Others = "mean",
) -> Method:
    r"""OptMerge: WUDI with targets and guides of low rank, stopped early.

    With $[\cdot]_r$ the best approximation of rank $r = \lfloor \min(m, n) / K \rfloor$ and $\bar\tau$ the mean of the
    task vectors: targets $\hat\tau_i = \bar\tau + [\tau_i - \bar\tau]_r$, guides $g_i = \Sigma_r V_r^\top$ of $\tau_i$;
    $\sum_i \|(\tau - \hat\tau_i) g_i^\top\|_F^2 / \|\tau_i\|_F^2$ is lowered for some steps.

    Args:
        scale: factor of the merged task vector; 0.1 in the authors' script for InternVL.
        weights: factors of the task vectors; 1 each by default (the published code has none).
        steps: how many; None for the minimiser next to the start (ours).
        learning_rate: 1e-5 for Adam and 1e-4 for SGD by default, as in the authors' scripts.
        centre: approximate $\tau_i - \bar\tau$ (their script for InternVL), or $\tau_i$ itself (for Qwen2-VL).
        start: from the `"sum"` (InternVL), the `"mean"` (Qwen2-VL), or `"zero"`. It stays where no guide looks.
        optimizer: `"adam"` (InternVL), or `"sgd"` with momentum 0.9 (Qwen2-VL).
        factored: which tensors are matrices: `"matrices"`, or `"kernels"` (as for `tsv_m`).
        others: what becomes of the rest: their `"mean"` or `"sum"` task vector times `scale`, or the `"base"`.

    The authors' scripts merge the matrices of the language model, less embeddings and head, and leave all else at the
    base. The rank is at least 1. Source: arXiv 2505.19892.
    """
    _check_steps("optmerge", steps)
    rate = {"adam": 1e-5, "sgd": 1e-4}[optimizer] if learning_rate is None else coefficient(learning_rate)
    return Optmerge(
        coefficient(scale), _weights(weights), factored, others, rate, None, steps, start, optimizer, centre
    )


def swudi(
    scale: Coefficient = 1.0,
    *,
    weights: Coefficient = None,
    time: Coefficient = 300.0,
    rank: Coefficient = 0.65,
    start: Start = "sum",
    cutoff: Coefficient = None,
    factored: Factored = "matrices",
    others: Others = "mean",
) -> Method:
    r"""SWUDI: WUDI stopped early along each eigenvector, in closed form.

    With $C = V \operatorname{diag}(\lambda_k) V^\top$ and $D$ as for `wudi` and $f_k = 1 - e^{-\lambda_k T}$ for the
    $\lceil \rho n \rceil$ largest of $n$ eigenvalues, 0 for the others:
    $\tau = \tau_s - (\tau_s C - D)\, V \operatorname{diag}(f_k / \lambda_k) V^\top$.

    Args:
        scale: factor of the merged task vector.
        weights: factors of the task vectors; 1 each by default (the published code has none).
        time: $T$: gradient descent would be there after steps of $\eta$ in all $T/2$; None goes to the minimiser.
        rank: $\rho$, in (0, 1]: the share of the eigenvectors along which anything is learned; None for all. The
            authors' code has 0.65, and advises 0.85 for language models.
        start: $\tau_s$: the `"sum"` of the task vectors, their `"mean"`, or `"zero"`.
        cutoff: as for `wudi`. The published code raises eigenvalues to 1e-8 instead.
        factored: which tensors are matrices: `"matrices"`, or `"kernels"` (as for `tsv_m`).
        others: what becomes of the rest: their `"mean"` or `"sum"` task vector times `scale`, or the `"base"`.

    Raises:
        RecipeError: a rank outside (0, 1].

    Source: arXiv 2606.07289; the formula and defaults are those of the authors' code.
    """
    check_range("rank", rank, 0.0, 1.0, open_low=True)
    return Swudi(
        coefficient(scale),
        _weights(weights),
        factored,
        others,
        cutoff=coefficient(cutoff),
        start=start,
        time=coefficient(time),
        rank=coefficient(rank),
    )


def aswudi(
    scale: Coefficient = 1.0,
    *,
    weights: Coefficient = None,
    rule: RankRule = "participation_sqrt",
    start: Start = "sum",
    cutoff: Coefficient = None,
    factored: Factored = "matrices",
    others: Others = "mean",
) -> Method:
    r"""ASWUDI (SWUDI-A in the paper): WUDI along as many eigenvectors as a rule finds in each matrix.

    As `swudi` with $T = \infty$, and in place of $\lceil \rho n \rceil$ an effective rank of $C$, rounded up.

    Args:
        scale: factor of the merged task vector.
        weights: factors of the task vectors; 1 each by default (the published code has none).
        rule: `"participation_sqrt"`: $(\sum_k \sqrt{\lambda_k})^2 / \sum_k \lambda_k$; `"participation"`:
            $(\sum_k \lambda_k)^2 / \sum_k \lambda_k^2$; `"entropy"`: $e^H$ for the shares of the $\lambda_k$;
            `"stable"`: $\sum_k \lambda_k^2 / \max_k \lambda_k^2$; `"full"`: all, which is `wudi` from this start.
        start: as for `swudi`.
        cutoff: as for `wudi`; such eigenvalues count as zero in the rule too.
        factored: which tensors are matrices: `"matrices"`, or `"kernels"` (as for `tsv_m`).
        others: what becomes of the rest: their `"mean"` or `"sum"` task vector times `scale`, or the `"base"`.

    Source: arXiv 2606.07289; the rules are those of the authors' code, without the one that it names after Gavish and
    Donoho.
    """
    return Aswudi(
        coefficient(scale),
        _weights(weights),
        factored,
        others,
        cutoff=coefficient(cutoff),
        start=start,
        rule=rule,
    )


def _weights(weights: Coefficient) -> Any:
    return 1.0 if weights is None else coefficient(weights)


def _check_steps(what: str, steps: int | None) -> None:
    if steps is not None and steps < 0:
        raise RecipeError(f"{what}: found {steps} steps, expected 0 or more, or None for the minimiser itself")
