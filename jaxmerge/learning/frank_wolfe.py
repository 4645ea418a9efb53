r"""FW-Merging (arXiv 2503.12649): Frank-Wolfe steps among many candidates, of which one tensor is held at a time.

The merged model stays $\theta_0 + \sum_i a_i \tau_i$ throughout, tensor by tensor, so what is learned is the table of
the $a_i$: a step towards a candidate shrinks the row and adds to one entry. The candidates themselves are read for the
alignment with the gradient, and the chosen one once more for the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmerge.errors import NonFiniteError, RecipeError
from jaxmerge.learning.batches import each_batch
from jaxmerge.learning.coefficients import Coefficients
from jaxmerge.learning.learn import Learned, LearnState, OnStep, learn
from jaxmerge.learning.losses import Constraint, Loss
from jaxmerge.learning.objective import scalar
from jaxmerge.learning.progress import counting
from jaxmerge.methods.adamerging import adamerging
from jaxmerge.methods.assignment import ExpertTrees, assign
from jaxmerge.methods.coefficients import Learnable
from jaxmerge.methods.task_arithmetic import task_arithmetic
from jaxmerge.trees.info import Rules
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import Params, with_leaves
from jaxmerge.trees.task_vectors import accumulation_dtype

if TYPE_CHECKING:
    import optax

Granularity = Literal["task", "layer"]
Alignment = Literal["cosine", "inner_product"]
Tensors = dict[str, Any]

_START = "start"


def learn_frank_wolfe(
    candidates: ExpertTrees,
    batches: Sequence[Any],
    *,
    loss: Loss,
    base: Params,
    steps: int = 10,
    start: float = 0.3,
    step_size: float = 0.03,
    granularity: Granularity = "task",
    alignment: Alignment = "cosine",
    state: LearnState | None = None,
    on_step: OnStep | None = None,
    progress: bool | None = None,
) -> Learned:
    r"""FW-Merging, hard: steps towards the candidate that most decreases the linearised loss.

    With $g$ the gradient at the merged model $\theta$ and $l$ a parameter tensor:
    $s = \arg\min_i \sum_l \cos(g^l, \theta_i^l)$, $\theta \leftarrow \theta + \gamma_t (s - \theta)$,
    $\gamma_t = \frac{2}{t + 2} \eta$ for $t = 0, 1, …$. The model started from is a candidate too, named `"start"`.

    Args:
        candidates: parameter trees, as experts are for `merge`. Where leaves are lazy, one tensor of one candidate is
            held at a time, however many there are.
        batches: a list; the gradient of a step is the mean over all of them.
        loss: `(params, batch) -> scalar`, with labels or without.
        base: parameters that the candidates were tuned from.
        steps: the step to stop at, counted from the first start.
        start: the scale of the task arithmetic that is started from; 0 starts from the base.
        step_size: $\eta$ in [0, 1]. The published code has 0.1 times its scale of 0.3; 1 is Frank-Wolfe's own, whose
            first step goes all the way.
        granularity: one candidate for the whole model (`"task"`), or one for every tensor (`"layer"`).
        alignment: the `"cosine"` of the published code, per tensor and with the candidate's weights; or the
            `"inner_product"` of the paper. Where gradient or weights are zero both are 0.
        state: of an earlier run, to go on from.
        on_step: `(step, loss, state) -> whether to stop`, called after every step.
        progress: show a bar with the loss; by default in a terminal or notebook.

    Returns:
        A `Learned` whose method is task arithmetic with what was learned: `coefficients` has it by tensor and
        candidate, and `history["chosen"]` the candidates, `[steps]`, or `[steps, tensors]` with granularity `"layer"`.

    Raises:
        StructureError, ShapeError, DTypeError: candidates and base differ.
        RecipeError: a setting is none of those above, a candidate is called `"start"`, or there is no batch.
        NonFiniteError: the loss or its gradient is not finite.

    Source: arXiv 2503.12649; selection and steps as in FusionBench.
    """
    model = _Iterate(candidates, base, start, granularity, alignment, state)
    _check_step(step_size)
    if _START in model.names:
        raise RecipeError(f"a candidate is named {_START!r}, which the model started from is called; rename it")
    vertices = {**model.trees, _START: dict(model.merged)} if state is None else {**model.trees, _START: model.begun()}
    gradient_of = jax.jit(jax.value_and_grad(model.loss_of(loss)))

    def one(number: int) -> tuple[float, Any]:
        value, gradient = model.gradient(gradient_of, batches, number)
        chosen = model.choose(gradient, vertices, {})
        gamma = 2 / (number + 2) * step_size
        for name in model.tensors:
            towards = vertices[chosen[name]][name]
            row = model.started if chosen[name] == _START else model.vertex(chosen[name])
            model.move(name, [(gamma, towards, row)])
        return value, list(chosen.values()) if granularity == "layer" else next(iter(chosen.values()))

    return model.run(one, steps, on_step, progress)


def learn_frank_wolfe_soft(
    candidates: ExpertTrees,
    batches: Sequence[Any],
    *,
    losses: Mapping[str, Loss],
    base: Params,
    steps: int = 10,
    start: float = 0.0,
    granularity: Granularity = "task",
    alignment: Alignment = "cosine",
    inner_loss: Loss | None = None,
    inner_steps: int = 500,
    inner_start: float = 0.3,
    optimizer: optax.GradientTransformation | None = None,
    constrain: Constraint | None = None,
    state: LearnState | None = None,
    on_step: OnStep | None = None,
    progress: bool | None = None,
) -> Learned:
    r"""FW-Merging, soft: one candidate for every task's gradient, all of them mixed in with learned coefficients.

    For each task $t$ in order, $s_t$ is the candidate chosen as in `learn_frank_wolfe` by the gradient of its loss,
    among those no earlier task has taken. Then $\theta \leftarrow \theta + \sum_t \lambda_t^l (s_t - \theta)$, where
    `jm.learn` has learned the $\lambda_t^l$ by the sum of the losses.

    Args:
        candidates: as for `learn_frank_wolfe`. While coefficients are learned, those chosen are read as `learn` reads
            experts.
        batches: a list, for the gradients and for `learn`.
        losses: task → `(params, batch) -> scalar`; no more than there are candidates.
        base: parameters that the candidates were tuned from.
        steps: the step to stop at, counted from the first start.
        start: as for `learn_frank_wolfe`; the published code starts from the base.
        granularity: as for `learn_frank_wolfe`.
        alignment: as for `learn_frank_wolfe`.
        inner_loss: what the coefficients are learned by, such as `jm.entropy(apply)`; the sum of the losses when None.
        inner_steps: steps of `learn`, which takes one batch per step; 0 keeps `inner_start`.
        inner_start: what the coefficients start from, times $2 / (t + 2)$ in step $t$. The published code has 0.3 in
            the first step and 1e-8 later.
        optimizer: of the coefficients; `optax.adam(1e-3)` by default.
        constrain: applied to the coefficients after every inner step; `jm.simplex()` keeps the merged model within the
            convex hull of what it started from and the candidates.
        state: of an earlier run, to go on from.
        on_step: `(step, loss, state) -> whether to stop`, called after every step.
        progress: show a bar with the loss; by default in a terminal or notebook.

    Returns:
        As `learn_frank_wolfe`; `history["chosen"]` has an axis of tasks at the end, and `history["loss"]` the sum of
        the losses.

    Raises:
        RecipeError: there are more tasks than candidates; and what `learn_frank_wolfe` raises.

    Source: arXiv 2503.12649; the loop as in FusionBench, which also has a form without learned coefficients
    (`inner_steps=0`).
    """
    model = _Iterate(candidates, base, start, granularity, alignment, state)
    if not 0 < len(losses) <= len(model.names):
        raise RecipeError(f"found {len(losses)} tasks and {len(model.names)} candidates, expected one to each or more")
    gradients_of = {task: jax.jit(jax.value_and_grad(model.loss_of(loss))) for task, loss in losses.items()}

    def total(params: Params, batch: Any) -> Any:
        parts = [loss(params, batch) for loss in losses.values()]
        return sum(parts[1:], parts[0])

    def one(number: int) -> tuple[float, Any]:
        taken: dict[str, set[str]] = {}
        chosen: dict[str, dict[str, str]] = {}
        value = 0.0
        for task, gradient_of in gradients_of.items():
            part, gradient = model.gradient(gradient_of, batches, number)
            value += part
            chosen[task] = model.choose(gradient, model.trees, taken)
            for name, candidate in chosen[task].items():
                taken.setdefault(name, set()).add(candidate)
        vertices = {
            task: {name: model.trees[by_name[name]][name] for name in model.tensors} for task, by_name in chosen.items()
        }
        here = model.params()
        learned = learn(
            adamerging(2 / (number + 2) * inner_start),
            {task: model.like_base(vertex) for task, vertex in vertices.items()},
            batches,
            loss=total if inner_loss is None else inner_loss,
            steps=inner_steps,
            base=here,
            optimizer=optimizer,
            constrain=constrain,
            progress=False,
        )
        for name in model.tensors:
            shares = learned.coefficients[name]
            moves = [
                (shares[task], vertices[task][name], model.vertex(by_name[name])) for task, by_name in chosen.items()
            ]
            model.move(name, moves)
        if granularity == "layer":
            return value, [[chosen[task][name] for task in chosen] for name in model.tensors]
        return value, [next(iter(by_name.values())) for by_name in chosen.values()]

    return model.run(one, steps, on_step, progress)


class _Iterate:
    """The merged model, the coefficients that give it, and the candidates it is made of."""

    def __init__(
        self,
        candidates: ExpertTrees,
        base: Params,
        start: float,
        granularity: Granularity,
        alignment: Alignment,
        state: LearnState | None,
    ):
        if granularity not in ("task", "layer"):
            raise RecipeError(f"granularity is {granularity!r}, expected 'task' or 'layer'")
        if alignment not in ("cosine", "inner_product"):
            raise RecipeError(f"alignment is {alignment!r}, expected 'cosine' or 'inner_product'")
        job = assign(task_arithmetic(start), candidates, base, None, Rules())
        self.granularity: Granularity = granularity
        self.align = _cosine if alignment == "cosine" else _inner_product
        self.reference, self.names, self.tensors = job.reference, job.experts, tuple(job.tasks)
        self.copied = {name: _array(leaf) for name, (leaf, _) in job.copied.items()}
        self.bases = {name: task.base for name, task in job.tasks.items()}
        self.trees = {
            candidate: {name: task.experts[i] for name, task in job.tasks.items()}
            for i, candidate in enumerate(job.experts)
        }
        self.started = np.full(len(self.names), start)
        self.step = 0 if state is None else int(state.step)
        self.table = np.tile(self.started, (len(self.tensors), 1))
        if state is not None:
            given = np.asarray(state.coefficients["coefficients"], np.float64)
            if given.shape != self.table.shape:
                raise RecipeError(
                    f"the state has {given.shape[0]} tensors and {given.shape[1]} candidates, expected "
                    f"{self.table.shape[0]} and {self.table.shape[1]}; resume with what the run was started with"
                )
            self.table = given.copy()
        self.merged = {name: self._merged(name, row) for name, row in zip(self.tensors, self.table, strict=True)}

    def _merged(self, name: str, row: Any) -> Array:
        """The tensor with these coefficients, one candidate after the other."""
        base = _array(self.bases[name])
        merged = base.astype(accumulation_dtype(base.dtype))
        for candidate, weight in zip(self.names, row, strict=True):
            if weight != 0:
                merged = _moved(merged, base, _array(self.trees[candidate][name]), weight)
        return merged

    def begun(self) -> Tensors:
        """The model started from."""
        return {name: self._merged(name, self.started) for name in self.tensors}

    def vertex(self, candidate: str) -> Float[np.ndarray, " candidates"]:
        """The coefficients of a candidate."""
        return np.array([float(name == candidate) for name in self.names])

    def like_base(self, tensors: Tensors) -> Params:
        """A tree with these tensors and what is never merged."""
        return with_leaves(self.reference, {**tensors, **self.copied})

    def params(self, merged: Tensors | None = None) -> Params:
        """The merged model in the base's dtypes."""
        merged = self.merged if merged is None else merged
        return self.like_base({name: x.astype(self.bases[name].dtype) for name, x in merged.items()})

    def loss_of(self, loss: Loss) -> Loss:
        """The loss as a function of the tensors that are merged."""
        return lambda merged, batch: scalar(loss(self.params(merged), batch))

    def gradient(self, gradient_of: Any, batches: Sequence[Any], step: int) -> tuple[float, Tensors]:
        """Mean loss and gradient over the batches."""
        value, total, count = 0.0, None, 0
        for number, batch in each_batch(batches, "Frank-Wolfe", False):
            part, gradient = gradient_of(self.merged, batch)
            value, count = value + float(part), number + 1
            total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        assert total is not None
        if not np.isfinite(value) or not all(np.isfinite(np.asarray(jnp.sum(x))) for x in total.values()):
            raise NonFiniteError(
                f"the loss is {value / count} or its gradient is not finite at step {step}; check the loss on the "
                "merged model and these batches"
            )
        return value / count, {name: x / count for name, x in total.items()}

    def choose(
        self, gradient: Tensors, vertices: Mapping[str, Tensors], taken: Mapping[str, set[str]]
    ) -> dict[str, str]:
        """The candidate that is chosen for every tensor, all the same with granularity `"task"`."""
        scores = {
            candidate: {name: float(self.align(gradient[name], _array(leaves[name]))) for name in self.tensors}
            for candidate, leaves in vertices.items()
        }
        return select(scores, self.granularity, taken)

    def move(self, name: str, moves: Sequence[tuple[float, Any, np.ndarray]]) -> None:
        """Goes from a tensor towards others: pairs of a share and a place, and the place's coefficients."""
        here, row = self.merged[name], self.table[self.tensors.index(name)]
        merged, new = here, row.copy()
        for share, leaf, coefficients in moves:
            merged = _moved(merged, here, _array(leaf), share)
            new += share * (coefficients - row)
        self.merged[name], self.table[self.tensors.index(name)] = merged, new

    def run(self, one: Any, steps: int, on_step: OnStep | None, progress: bool | None) -> Learned:
        """Takes steps until the last."""
        first, losses, chosen, stopped = self.step, [], [], ""
        with counting(progress, "Frank-Wolfe", max(0, steps - first)) as advance:
            for number in range(first, steps):
                value, names = one(number)
                losses.append(value)
                chosen.append(names)
                self.step = number + 1
                advance(1, f"loss {value:.4g}")
                if on_step is not None and on_step(self.step, value, self.state):
                    stopped = f"on_step ended the run at step {self.step}"
                    break
        table = Learnable(self.tensors, self.table.astype(np.float32), self.names, True, True)
        method = adamerging(table)
        history = {
            "step": np.arange(first, first + len(losses)),
            "loss": np.array(losses),
            "chosen": np.array(chosen, str),
        }
        return Learned(method, self.state, history, stopped, Coefficients(method, ("stages/0/weights",), True))

    @property
    def state(self) -> LearnState:
        """Where the run stands."""
        return LearnState(np.asarray(self.step, np.int32), {"coefficients": self.table.copy()}, ())


def select(
    scores: Mapping[str, Mapping[str, float]], granularity: Granularity, taken: Mapping[str, set[str]]
) -> dict[str, str]:
    """The candidate with the lowest score, the first among equals.

    Args:
        scores: candidate → tensor → alignment with the gradient.
        granularity: the lowest sum over tensors for all, or the lowest for every tensor.
        taken: tensor → candidates that are not to be chosen.
    """
    tensors = list(next(iter(scores.values())))

    def best(names: Sequence[str]) -> str:
        free = [c for c in scores if not any(c in taken.get(name, ()) for name in names)]
        return min(free, key=lambda candidate: sum(scores[candidate][name] for name in names))

    if granularity == "task":
        return dict.fromkeys(tensors, best(tensors))
    return {name: best([name]) for name in tensors}


@jax.jit
def _cosine(gradient: Float[Array, "..."], weights: Float[Array, "..."]) -> Float[Array, ""]:
    weights = weights.astype(gradient.dtype)
    size = jnp.sqrt(jnp.sum(jnp.square(gradient))) * jnp.sqrt(jnp.sum(jnp.square(weights)))
    return jnp.where(size > 0, jnp.sum(gradient * weights) / jnp.where(size > 0, size, 1), 0)


@jax.jit
def _inner_product(gradient: Float[Array, "..."], weights: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sum(gradient * weights.astype(gradient.dtype))


@jax.jit
def _moved(merged: Array, start: Array, end: Array, share: Any) -> Array:
    """`merged + share * (end - start)`."""
    return merged + jnp.asarray(share, merged.dtype) * (end.astype(merged.dtype) - start.astype(merged.dtype))


def _array(leaf: Any) -> Array:
    return jnp.asarray(np.asarray(leaf) if isinstance(leaf, LazyTensor) else leaf)


def _check_step(step_size: float) -> None:
    if not 0 <= step_size <= 1:
        raise RecipeError(f"step_size is {step_size}, expected a number in [0, 1]")
