"""`learn`: the loop that optimises a method's coefficients by any loss of the merged parameters."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.errors import NonFiniteError, RecipeError
from jaxmerge.learning.batches import NO_MORE, BatchOfStep
from jaxmerge.learning.coefficients import Coefficients, Values, by_path, measured_once
from jaxmerge.learning.losses import Constraint, Loss
from jaxmerge.learning.objective import InMemory, Objective, Streamed, as_optax_computes
from jaxmerge.learning.progress import counting
from jaxmerge.methods.assignment import Assignment, ExpertTrees, assign
from jaxmerge.methods.lazy import LazyMerge, as_lazy, nonfinite_message
from jaxmerge.methods.method import Method
from jaxmerge.trees.info import Rules
from jaxmerge.trees.lazy import LazyTensor
from jaxmerge.trees.paths import Params

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True)
class LearnState:
    """All that a run of `learn` needs to go on: a pytree of arrays, which Orbax saves and restores.

    Attributes:
        step: how many steps were done.
        coefficients: what is learned, by name.
        optimizer: the optimizer's state.
    """

    step: Any
    coefficients: Any
    optimizer: Any


jax.tree_util.register_dataclass(LearnState)

OnStep = Callable[[int, float, LearnState], bool | None]
"""`(step, loss, state) -> whether to stop`."""


@dataclasses.dataclass(frozen=True, repr=False)
class Learned:
    """What `learn` gives.

    Attributes:
        method: the method with the coefficients that were learned: a value like any other, to be merged with in memory
            or streamed.
        state: where the run stands, to go on from.
        history: `step` and `loss` of the steps of this call, as arrays; a loss is that of the coefficients before the
            step.
        stopped: why the run ended before its last step; empty if it did not.
    """

    method: Method
    state: LearnState
    history: dict[str, np.ndarray]
    stopped: str
    _coefficients: Coefficients

    @property
    def coefficients(self) -> dict[str, Any]:
        """Every learned number, in nested dicts: by tensor, then by expert, as far as these have numbers of their own.

        With several learned coefficients in one method, first by the name of the coefficient.
        """
        return by_path(self.method, self._coefficients)

    def __repr__(self) -> str:
        losses = self.history["loss"]
        course = f", loss {losses[0]:.4g} -> {losses[-1]:.4g}" if losses.size else ""
        ended = f", stopped: {self.stopped}" if self.stopped else ""
        return f"Learned({self.method!r}, {int(self.state.step)} steps{course}{ended})"


def learn(
    method: Method,
    experts: ExpertTrees,
    batches: Sequence[Any] | Iterable[Any] | Callable[[int], Any],
    *,
    loss: Loss,
    steps: int,
    base: Params | None = None,
    optimizer: optax.GradientTransformation | None = None,
    constrain: Constraint | None = None,
    key: Any = None,
    rules: Rules = Rules(),
    state: LearnState | None = None,
    on_step: OnStep | None = None,
    progress: bool | None = None,
) -> Learned:
    r"""Learns a method's coefficients by minimising a loss of the merged parameters.

    What is learned are the method's `learnable` coefficients or, if it has none, all of its floating-point leaves. A
    step follows $\nabla_\lambda L(\mathrm{merge}_\lambda(\theta), x)$ and is one compiled program, however many tensors
    and experts there are. Memory beside the experts does not depend on their number.

    If a leaf is a `LazyTensor`, the experts stay where they are: each step reads them tensor by tensor, twice, and
    holds the merged parameters, their gradient and one tensor of every expert.

    Args:
        method: what to merge with, such as `jm.adamerging()` or `jm.ties(scale=jm.learnable(1.0, per_expert=False))`.
        experts: parameter trees, as for `merge`.
        batches: a list, which is gone through again and again; a function of the step's number (from 0), which makes
            resuming exact; or an iterator, which is taken from once per step.
        loss: `(params, batch) -> scalar`, such as `jm.entropy(apply)`.
        steps: the step to stop at, counted from the first start: a resumed run does the ones that are left.
        base: parameters that the experts were tuned from.
        optimizer: any of optax's, with its schedules; `optax.adam(1e-3)` by default.
        constrain: applied to every array of coefficients after every step: `jm.box()`, `jm.simplex()`.
        key: for methods that draw; draws are the same in every step.
        rules: how tensor names are read, as for `merge`.
        state: of an earlier run, to go on from. `learn(…, steps=0).state` has the structure that Orbax restores into.
        on_step: called after every step with its number (from 1), the loss and the state; ends the run by answering
            True. Save the state here, log, or decide when it is enough (`jm.stop_when_flat`).
        progress: show a bar with the loss; by default in a terminal or notebook.

    Returns:
        A `Learned` with the method, the history and the state.

    Raises:
        StructureError, ShapeError, DTypeError: experts and base differ.
        RecipeError: there is nothing to learn, no batch, an empty batch, a loss that is no number, a state of another
            method, or a method that needs the whole model in memory where experts are lazy.
        NonFiniteError: the loss is not finite at the start. Later the run ends with the last finite coefficients, a
            warning, and the reason in `stopped`.

    There are warnings about a batch of other shapes than those before, which compiles again, and about coefficients
    that the loss does not depend on, by name.
    """
    import optax

    optimizer = optax.with_extra_args_support(optax.adam(1e-3) if optimizer is None else optimizer)
    job = assign(method, experts, base, key, rules)
    infos = {name: task.info for name, task in job.tasks.items()}
    coefficients = Coefficients.of(
        method, lambda part: [name for name, info in infos.items() if method.for_tensor(info) is part], job.experts
    )
    job = assign(coefficients.method, experts, base, key, rules)
    measured = measured_once(coefficients, lambda: LazyMerge(job, False))

    def update(state: LearnState, value: Any, gradients: Values) -> tuple[LearnState, Any]:
        old = state.coefficients
        with as_optax_computes():
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, old, value=value)
            new = optax.apply_updates(old, updates)
        if constrain is not None:
            new = {name: constrain(x) for name, x in new.items()}  # pyright: ignore[reportAttributeAccessIssue, reportGeneralTypeIssues]
        finite = jnp.isfinite(value) & jnp.all(
            jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((gradients, new))])
        )
        done = LearnState(state.step + 1, new, optimizer_state)
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), done, state), finite

    objective: Objective
    if any(isinstance(leaf, LazyTensor) for leaf in job.leaves()):
        objective = Streamed(loss, update, measured, assign(measured.method, experts, base, key, rules))
    else:
        objective = InMemory(loss, update, measured, experts, base, key, rules)

    values = coefficients.values
    if state is not None:
        _check_state(state, values)
    with as_optax_computes():
        now = LearnState(jnp.zeros((), jnp.int32), values, optimizer.init(values)) if state is None else state
    first = int(now.step)
    batch_at = BatchOfStep(batches, first)
    losses: list[float] = []
    stopped = ""
    with counting(progress, "Learning", max(0, steps - first)) as advance:
        for step in range(first, steps):
            batch = batch_at(step)
            if batch is NO_MORE:
                stopped = f"there were no more batches at step {step}"
                break
            new, value, finite, gradients = objective.step(now, batch)
            value = float(value)
            if not finite:
                what = (
                    f"the loss is {value}" if not np.isfinite(value) else "the gradient of a coefficient is not finite"
                )
                if step == first:
                    _explain(job)
                    raise NonFiniteError(
                        f"{what} at step {step}, with the coefficients as they were given; check the loss on "
                        "jm.merge(method, experts, base=base) and this batch"
                    )
                stopped = f"{what} at step {step}; the coefficients are those before it"
                warnings.warn(f"learning stopped: {stopped}", stacklevel=2)
                break
            if step == first:
                _warn_of_unused(coefficients, gradients)
            now = new
            losses.append(value)
            advance(1, f"loss {value:.4g}")
            if on_step is not None and on_step(step + 1, value, now):
                stopped = f"on_step ended the run at step {step + 1}"
                break
    history = {"step": np.arange(first, first + len(losses)), "loss": np.array(losses)}
    return Learned(coefficients.put(now.coefficients), now, history, stopped, coefficients)


def _check_state(state: LearnState, values: Values) -> None:
    found = {name: np.shape(x) for name, x in state.coefficients.items()}
    expected = {name: np.shape(x) for name, x in values.items()}
    if found != expected:
        raise RecipeError(
            f"the state has coefficients {found}, but this method has {expected}; resume with the method, experts and "
            "tensors that the run was started with"
        )


def _explain(job: Assignment) -> None:
    """Raises the error for the first input that is not finite, if there is one."""
    for name, task in job.tasks.items():
        for index, leaf in enumerate(x for x in (task.base, *task.experts) if x is not None):
            if not np.isfinite(np.asarray(as_lazy(leaf)).astype(np.float32)).all():
                raise NonFiniteError(nonfinite_message(job.source_name(index), name))


def _warn_of_unused(coefficients: Coefficients, gradients: Values) -> None:
    """Warns of coefficients whose derivative is exactly zero."""
    unused: list[str] = []
    for name, gradient in jax.device_get(gradients).items():
        node = coefficients.node(name)
        if not gradient.any():
            unused.append(name)
        elif node is not None and node.keys:
            still = ~gradient.reshape(len(node.keys), -1).any(axis=1)
            unused += [f"{name} of {tensor}" for tensor, zero in zip(node.keys, still, strict=True) if zero]
        if gradient.any() and node is not None and node.experts:
            still = ~gradient.reshape(-1, len(node.experts)).any(axis=0)
            unused += [f"{name} of {expert}" for expert, zero in zip(node.experts, still, strict=True) if zero]
    if unused:
        shown = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
        warnings.warn(
            f"the loss does not depend on {shown}: the derivative is zero. Either the loss does not use these "
            "parameters, or the experts do not differ from the base there",
            stacklevel=3,
        )
