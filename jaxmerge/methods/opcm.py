r"""OPCM (arXiv 2501.09522): merging experts one after the other, each projected away from what was merged before.

The recursion as it is published, with $\lambda_1 = 1$ and $T_1 = \tau_1$, rescales the whole model after every step:

$$N_t = \lambda_{t-1} T_{t-1} + \mathrm{away}_{T_{t-1}}(\tau_t), \qquad
\lambda_t = \|N_t\| \,/\, \mathrm{mean}_{i \le t} \|\tau_i\|, \qquad T_t = N_t / \lambda_t .$$

Since $\lambda_{t-1} T_{t-1} = N_{t-1}$, and the projection depends on singular vectors and ratios of singular values,
which $T$ and $N$ share, the factors cancel: $N_t = N_{t-1} + \mathrm{away}_{N_{t-1}}(\tau_t)$. Norms of the model are
needed once, at the end. That makes OPCM a method with one measurement, and its state one tree and two numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmerge.methods.coefficients import Coefficient, check_range, coefficient
from jaxmerge.methods.factorisation import compact_svd, dot
from jaxmerge.methods.measurements import Scope, Total
from jaxmerge.methods.merge import merge
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.spectral import Factored, as_matrix, from_matrix, is_factored, sharded_like, unsharded
from jaxmerge.methods.task_arithmetic import nonzero
from jaxmerge.trees.checks import check_same_tensors, is_mergeable
from jaxmerge.trees.info import Rules, TensorInfo
from jaxmerge.trees.paths import Params, named_leaves, with_leaves
from jaxmerge.trees.task_vectors import apply_task_vector, task_vector


@pytree
class Opcm(Method):
    """See `opcm`."""

    alpha: Any = 0.5
    factored: Factored = static(default="kernels")

    needs_base = True
    whole_tensor = True
    in_one_place = True

    @property
    def passes(self) -> tuple[Scope, ...]:
        return ("model",)

    def measure(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Total:
        deltas = [x - base for x in experts]
        return Total(jnp.stack([jnp.sum(x * x) for x in (self._total(deltas, info), *deltas)]))

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        norms = _root(stats[0])
        return base + jnp.mean(norms[1:]) / nonzero(norms[0]) * self._total([x - base for x in experts], info)

    def _total(self, deltas: list[Any], info: TensorInfo) -> Any:
        total = deltas[0]
        for delta in deltas[1:]:
            total = total + _new_part(total, delta, info, self.alpha, self.factored)
        return total


@pytree
class Absorb(Method):
    """One step of it: of two task vectors, what was merged so far and a new one, the sum $N_t$."""

    alpha: Any = 0.5
    factored: Factored = static(default="kernels")

    whole_tensor = True
    in_one_place = True

    def merge_tensor(self, base: Any, experts: list[Any], info: TensorInfo, stats: tuple[Any, ...]) -> Array:
        total, delta = experts
        return total + _new_part(total, delta, info, self.alpha, self.factored)


def _new_part(total: Any, delta: Any, info: TensorInfo, alpha: Any, factored: Factored) -> Any:
    """What of a task vector is added to what was merged so far."""
    if not is_factored(info, factored):
        return delta
    before, new = [as_matrix(unsharded(x), info) for x in (total, delta)]
    return sharded_like(from_matrix(projected_away(before, new, alpha), info), total)


def projected_away(
    total: Float[Array, "m n"], delta: Float[Array, "m n"], alpha: Float[Array, ""] | float
) -> Float[Array, "m n"]:
    """A task vector without what it does along the singular directions of another.

    Args:
        total: the other one. Directions below its numerical rank are arbitrary, so nothing is taken away along them.
        delta: the task vector.
        alpha: the share of the sum of singular values that the leading block may reach.
    """
    # What is taken away lies in the space of the singular vectors, so the complement that full factors would span,
    # and where the published code keeps everything, needs no factor of its own.
    u, s, v = compact_svd(total)
    sums = jnp.cumsum(s)
    leading = sums <= alpha * sums[-1]
    taken = (leading[:, None] & leading[None, :]) | jnp.eye(len(s), dtype=bool)
    return delta - dot(u, dot(jnp.where(taken, dot(u.T, dot(delta, v)), 0), v.T))


def opcm(alpha: Coefficient = 0.5, *, factored: Factored = "kernels") -> Method:
    r"""OPCM: the experts one after the other, each projected away from what was merged before it.

    $N_1 = \tau_1$ and $N_t = N_{t-1} + \tau_t - U\,(M \odot U^\top \tau_t V)\,V^\top$, where
    $N_{t-1} = U \Sigma V^\top$ and $M$ marks the diagonal and the leading block of directions whose singular values
    add up to at most $\alpha$ of the sum of all. $\theta = \theta_0 + N_K\,\overline{\|\tau_i\|} \,/\, \|N_K\|$ with
    norms over the whole model. Tensors that are not factorised add up: $N_t = N_{t-1} + \tau_t$.

    Args:
        alpha: from 0, where only the diagonal is taken away, to 1, where everything is that lies in the row and column
            space of what was merged.
        factored: `"kernels"` projects kernels, those of convolutions with their window and input axes joined;
            `"matrices"` every tensor with two axes, embeddings included.

    Raises:
        RecipeError: alpha lies outside of [0, 1].

    The order of the experts matters: give a list where they are arguments of `jax.jit`, which sorts dicts by key. All
    experts are held, and each matrix is factorised 2 (K - 1) times; `opcm_add` holds one and takes K factorisations.
    Source: arXiv 2501.09522; the block as in FusionBench's code.
    """
    check_range("opcm's alpha", alpha, 0, 1)
    return Opcm(coefficient(alpha), factored)


@dataclasses.dataclass(frozen=True)
class OpcmState:
    r"""What has been merged so far: made by `opcm_start`, grown by `opcm_add`, a pytree like any parameters.

    Attributes:
        base: parameters that the experts were tuned from.
        total: $N_t$, a task vector in float32, before it is scaled.
        norm_sum: $\sum_i \|\tau_i\|$ over the experts so far.
        count: how many there are.
    """

    base: Params
    total: Params
    norm_sum: Any
    count: Any

    def params(self) -> Params:
        """The merged model: the base where nothing has been merged."""
        mean = self.norm_sum / nonzero(jnp.asarray(self.count, jnp.result_type(self.norm_sum)))
        return apply_task_vector(self.base, self.total, mean / nonzero(_norm(self.total)))

    def restored(self, params: Params) -> OpcmState:
        """The state with the numbers of a saved one.

        Args:
            params: what `jm.open_checkpoint(path).load()` gives where a state of the same model was saved.

        Raises:
            StructureError, ShapeError, DTypeError: it is the state of another model.
        """
        leaves = named_leaves(params)
        check_same_tensors(named_leaves(self), {"the saved state": leaves}, "this one")
        return with_leaves(self, leaves)


jax.tree_util.register_dataclass(OpcmState)


def opcm_start(base: Params) -> OpcmState:
    """The state of OPCM before anything is merged.

    Args:
        base: parameters that the experts were tuned from.
    """
    return OpcmState(base, task_vector(base, base), jnp.zeros(()), jnp.zeros((), jnp.int32))


def opcm_add(
    state: OpcmState,
    expert: Params,
    *,
    alpha: Coefficient = 0.5,
    factored: Factored = "kernels",
    rules: Rules = Rules(),
) -> OpcmState:
    """Merges one more expert by OPCM; the fiftieth costs what the first did, in time and memory.

    Args:
        state: what was merged so far; it stays as it is.
        expert: parameters like the base.
        alpha: as for `opcm`.
        factored: as for `opcm`.
        rules: how tensor names are read; which leaves are layer-stacked.

    Returns:
        The new state. Pure: it runs under `jax.jit`, `jax.grad` and `jax.vmap`.

    Raises:
        StructureError, ShapeError, DTypeError: the expert differs from the base.
        NonFiniteError: NaN or infinity in the expert.
        RecipeError: alpha lies outside of [0, 1], or a rule matches nothing.

    Source: arXiv 2501.09522.
    """
    check_range("opcm's alpha", alpha, 0, 1)
    delta = task_vector(expert, state.base)
    step = Absorb(coefficient(alpha), factored)
    total = merge(step, {"what was merged": state.total, "the new one": delta}, rules=rules)
    return OpcmState(state.base, total, state.norm_sum + _norm(delta), state.count + 1)


def _norm(tree: Params) -> Float[Array, ""]:
    """The norm of all floating-point tensors together."""
    square = jnp.zeros(())
    for leaf in named_leaves(tree).values():
        if is_mergeable(leaf):
            # Each sum waits for the one before: on CPU devices the collectives of two programs at once may deadlock.
            square = _plus_square(square, leaf)
    return _root(square)


@jax.jit
def _plus_square(square: Float[Array, ""], x: Float[Array, "..."]) -> Float[Array, ""]:
    return square + jnp.sum(x * x).astype(square.dtype)


def _root(square: Float[Array, "..."]) -> Float[Array, "..."]:
    """The square root, with a derivative at zero."""
    return jnp.where(square > 0, jnp.sqrt(nonzero(square)), 0)
