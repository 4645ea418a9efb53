"""Learning the logits of a concrete mask: Concrete subspace (arXiv 2312.06173) and DAM (arXiv 2410.13910).

A step draws a mask, adapts the method's own coefficients to it for one step from their start (the inner step), and
follows the gradient of the loss after that by the logits (the outer step). What the inner step did is a constant to the
outer one, and is forgotten afterwards: logits are learned that coefficients can be adapted to, not coefficients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.errors import NonFiniteError, RecipeError
from jaxmerge.learning.batches import NO_MORE, BatchOfStep
from jaxmerge.learning.coefficients import Coefficients
from jaxmerge.learning.learn import Learned, LearnState, OnStep
from jaxmerge.learning.losses import Loss, entropy
from jaxmerge.learning.objective import as_optax_computes, scalar
from jaxmerge.learning.progress import counting
from jaxmerge.methods.assignment import ExpertTrees, assign
from jaxmerge.methods.coefficients import Coefficient, Learnable, coefficient
from jaxmerge.methods.concrete import ConcreteMask, concrete_mask
from jaxmerge.methods.merge import merge
from jaxmerge.methods.method import Method
from jaxmerge.methods.stages import Chain, chain
from jaxmerge.trees.checks import name_experts
from jaxmerge.trees.info import Rules
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import Params
from jaxmerge.trees.task_vectors import accumulation_dtype

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True)
class Adversary:
    r"""DAM's adversary for `learn_concrete`: a perturbation that all inputs get, against which the mask is learned too.

    Between the inner and the outer step, one perturbation $\delta$ of every array of inputs moves to raise the
    cross-entropy of $f(x + \delta)$ with the merged model's own answers $\arg\max f(x)$. The logits then lower
    $L + \alpha \sum_t H(f_t(\mathrm{clip}(x + \delta)))$. A backdoor is an input change that decides the answer alone;
    $\delta$ stands for those nobody knows of.

    This is what FusionBench does, with $L$ the entropy. The abstract speaks of two masks, one of which finds backdoors,
    and we have not read more. Inputs are clipped for the logits only, not for $\delta$, as there. Source: arXiv
    2410.13910.

    Attributes:
        apply: `(params, batch) -> logits`, or a pytree of logits, one per task. Batches are pytrees of floating-point
            inputs with the examples along the first axis, such as `{task: images}`.
        weight: $\alpha$; with 0 there is no adversary.
        optimizer: of $\delta$; `optax.adam(1e-4)` when None.
        bounds: what inputs are clipped to, or None.
    """

    apply: Callable[[Params, Any], Any]
    weight: float = 0.1
    optimizer: optax.GradientTransformation | None = None
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def start(self, batch: Any) -> tuple[Any, Any]:
        """The first perturbation, zero, and the optimizer's state."""
        perturbation = jax.tree.map(_zero_example, batch)
        with as_optax_computes():
            return perturbation, self._optimizer.init(perturbation)

    def move(self, params: Params, batch: Any, perturbation: Any, optimizer_state: Any) -> tuple[Any, Any]:
        """The perturbation after a step against these parameters, and the optimizer's state."""
        import optax

        answers = jax.tree.map(lambda x: jnp.argmax(x, axis=-1), self.apply(params, batch))

        def agreement(perturbation: Any) -> Any:
            logits = self.apply(params, jax.tree.map(_added, batch, perturbation))
            parts = jax.tree.leaves(jax.tree.map(_mean_log_probability, logits, answers))
            return sum(parts[1:], parts[0])

        gradient = jax.grad(agreement)(perturbation)
        with as_optax_computes():
            updates, optimizer_state = self._optimizer.update(gradient, optimizer_state, perturbation)
            return optax.apply_updates(perturbation, updates), optimizer_state

    def loss(self, params: Params, batch: Any, perturbation: Any) -> Any:
        """What is added to the loss."""
        perturbed = jax.tree.map(_added, batch, perturbation)
        if self.bounds is not None:
            low, high = self.bounds
            perturbed = jax.tree.map(lambda x: jnp.clip(x, low, high), perturbed)
        return self.weight * entropy(self.apply)(params, perturbed)

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        import optax

        return optax.adam(1e-4) if self.optimizer is None else self.optimizer


def learn_concrete(
    method: Method,
    experts: ExpertTrees,
    batches: Sequence[Any] | Iterable[Any] | Callable[[int], Any],
    *,
    loss: Loss,
    steps: int,
    base: Params,
    optimizer: optax.GradientTransformation | None = None,
    inner_optimizer: optax.GradientTransformation | None = None,
    adversary: Adversary | None = None,
    start: float = 0.0,
    temperature: Coefficient = 0.5,
    seed: int | None = 0,
    key: Any = None,
    rules: Rules = Rules(),
    state: LearnState | None = None,
    on_step: OnStep | None = None,
    progress: bool | None = None,
) -> Learned:
    r"""Learns one soft mask for all experts, such that the masked merge does well by a loss.

    Every step draws $u$ and has $m = \sigma((\operatorname{logit} u + z) / T)$, rescaled per tensor as in
    `concrete_mask`. With $\lambda$ the `learnable` coefficients of the method:
    $\lambda' = \lambda_0 - \eta \nabla_\lambda L(\lambda_0, m)$ with the mask fixed, then a step of $z$ along
    $\nabla_z L(\lambda', m)$ with $\lambda'$ fixed. A method without a `learnable` has no inner step.

    Args:
        method: a chain of stages: `jm.task_arithmetic(0.3)` for the form without coefficients, `jm.adamerging()` for
            the one with them, or any other. The mask becomes its last stage.
        experts: parameter trees in memory, as for `merge`.
        batches: a list, which is gone through again and again; a function of the step's number (from 0); or an
            iterator, which is taken from once per step.
        loss: `(params, batch) -> scalar`, such as `jm.entropy(apply)`.
        steps: the step to stop at, counted from the first start.
        base: parameters that the experts were tuned from.
        optimizer: of the logits; `optax.adam(1e-3)` by default.
        inner_optimizer: of the inner step, whose state is kept; `optax.sgd(1.0)` by default. FusionBench has
            `optax.adam(1.0)`, which at first moves every coefficient by 1, whatever the gradient.
        adversary: makes it DAM.
        start: $z$ to start from.
        temperature: $T$.
        seed: of the draws of $u$, new ones in every step. None takes $u = 1/2$ always.
        key: for methods that draw; their draws are the same in every step.
        rules: how tensor names are read, as for `merge`.
        state: of an earlier run, to go on from.
        on_step: `(step, loss, state) -> whether to stop`, called after every step.
        progress: show a bar with the loss; by default in a terminal or notebook.

    Returns:
        A `Learned` whose method is the given one with `concrete_mask(z, temperature=temperature)` behind it and its
        coefficients at their start: `jm.learn` learns these under the mask. `state.coefficients` has the `"logits"`, by
        tensor name, and the adversary's `"perturbation"`.

    Raises:
        StructureError, ShapeError, DTypeError: experts and base differ.
        RecipeError: the method is no chain, experts are lazy, there is no batch, or the state is another method's.
        NonFiniteError: the loss or a gradient is not finite.

    One batch serves all that a step does; FusionBench takes a new one for each part. Source: arXiv 2312.06173, which we
    know from its abstract and FusionBench's code.
    """
    import optax

    if not isinstance(method, Chain):
        raise RecipeError(f"{method!r} is no chain of stages on task vectors, so there is nothing in it to mask")
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    inner_optimizer = optax.sgd(1.0) if inner_optimizer is None else inner_optimizer
    adversary = None if adversary is None or adversary.weight == 0 else adversary
    job = assign(method, experts, base, key, rules)
    if any(isinstance(leaf, LazyTensor) for leaf in job.leaves()):
        raise RecipeError("a mask is learned with experts in memory; materialise them (jm.materialize)")
    learned = Coefficients(method, (), True)
    if any(isinstance(x, Learnable) for x in jax.tree.leaves(method, is_leaf=lambda x: isinstance(x, Learnable))):
        learned = Coefficients.of(method, lambda part: list(job.tasks), job.experts)
    coefficients = learned.values
    trees = list(name_experts(experts).values())

    def step(state: LearnState, trees: list[Params], base: Params, batch: Any) -> tuple[LearnState, Any, Any]:
        noise = None if seed is None else jax.random.key_data(jax.random.fold_in(jax.random.key(seed), state.step))
        named = dict(zip(job.experts, trees, strict=True))

        def merged(values: Any, logits: dict[str, Any]) -> Params:
            inner: Any = learned.put(values, rows=True)
            mask = ConcreteMask(logits, coefficient(temperature), noise)
            return merge(chain(*inner.stages, mask), named, base=base, key=key, rules=rules)

        logits, values, states = state.coefficients["logits"], coefficients, dict(state.optimizer)
        new = dict(state.coefficients)
        if values:
            gradient = jax.grad(lambda values: scalar(loss(merged(values, logits), batch)))(values)
            with as_optax_computes():
                updates, states["inner"] = inner_optimizer.update(gradient, states["inner"], values)
                values = optax.apply_updates(values, updates)
        if adversary is not None:
            new["perturbation"], states["adversary"] = adversary.move(
                merged(values, logits), batch, new["perturbation"], states["adversary"]
            )

        def outer(logits: dict[str, Any]) -> Any:
            params = merged(values, logits)
            value = scalar(loss(params, batch))
            return value if adversary is None else value + adversary.loss(params, batch, new["perturbation"])

        value, gradient = jax.value_and_grad(outer)(logits)
        with as_optax_computes():
            updates, states["logits"] = optimizer.update(gradient, states["logits"], logits)
            new["logits"] = optax.apply_updates(logits, updates)
        finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((value, gradient, new))]
        return LearnState(state.step + 1, new, states), value, jnp.all(jnp.stack(finite))

    def first_state(batch: Any) -> LearnState:
        logits = {
            n: jnp.full(task.base.shape, start, accumulation_dtype(task.base.dtype)) for n, task in job.tasks.items()
        }
        with as_optax_computes():
            states = {"logits": optimizer.init(logits), "inner": inner_optimizer.init(coefficients)}
        begin: dict[str, Any] = {"logits": logits}
        if adversary is not None:
            begin["perturbation"], states["adversary"] = adversary.start(batch)
        return LearnState(jnp.zeros((), jnp.int32), begin, states)

    first = 0 if state is None else int(state.step)
    batch_at = BatchOfStep(batches, first)
    batch = batch_at(first)
    now = first_state(batch) if state is None else state
    if set(now.coefficients["logits"]) != set(job.tasks):
        raise RecipeError("the state has logits of other tensors; resume with the parameters the run was started with")
    program = jax.jit(step)
    losses: list[float] = []
    stopped = ""
    with counting(progress, "Learning a mask", max(0, steps - first)) as advance:
        for number in range(first, steps):
            batch = batch_at(number) if number > first else batch
            if batch is NO_MORE:
                stopped = f"there were no more batches at step {number}"
                break
            now, value, finite = program(now, trees, base, batch)
            losses.append(float(value))
            if not finite:
                raise NonFiniteError(
                    f"the loss is {losses[-1]} or a gradient is not finite at step {number}; check the loss on "
                    "jm.merge(method, experts, base=base) and this batch, or take smaller steps"
                )
            advance(1, f"loss {losses[-1]:.4g}")
            if on_step is not None and on_step(number + 1, losses[-1], now):
                stopped = f"on_step ended the run at step {number + 1}"
                break
    history = {"step": np.arange(first, first + len(losses)), "loss": np.array(losses)}
    masked = chain(*method.stages, concrete_mask(now.coefficients["logits"], temperature=temperature))
    return Learned(masked, now, history, stopped, dataclasses.replace(learned, method=masked))


def _zero_example(inputs: Any) -> Any:
    """Zeros like one of the examples."""
    if not jnp.issubdtype(jnp.result_type(inputs), jnp.floating) or np.ndim(inputs) == 0:
        raise RecipeError(
            f"the adversary perturbs inputs, but a batch holds {jnp.result_type(inputs)}{list(np.shape(inputs))}; "
            "expected floating-point arrays with the examples along the first axis (embed tokens before)"
        )
    return jnp.zeros(np.shape(inputs)[1:], jnp.result_type(inputs))


def _added(inputs: Any, perturbation: Any) -> Any:
    return inputs + perturbation[None]


def _mean_log_probability(logits: Any, answers: Any) -> Any:
    log_p = jax.nn.log_softmax(logits.astype(accumulation_dtype(logits.dtype)), axis=-1)
    return jnp.mean(jnp.take_along_axis(log_p, answers[..., None], axis=-1))
