r"""One step's loss and its derivatives by the coefficients, in memory and with experts that stay on disk.

A coefficient enters the loss through the merged tensors only, so its derivative is an inner product of the model's
gradient with what the coefficient scales: for task arithmetic
$\partial L / \partial \lambda_i^l = \langle \partial L / \partial \theta^l, \tau_i^l \rangle$. One backward pass of the
model gives all.

In memory that is what differentiating through the merge computes, in one program. Streamed, the merge and the inner
products are taken tensor by tensor, each from experts that are read for it, so that beside one tensor of every expert
there are never more than the merged parameters and their gradient.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxmerge.errors import RecipeError
from jaxmerge.learning.coefficients import Coefficients, Values
from jaxmerge.methods.assignment import Assignment, ExpertTrees, assign
from jaxmerge.methods.lazy import as_lazy
from jaxmerge.methods.merge import merge
from jaxmerge.methods.method import Method
from jaxmerge.methods.programs import merge_whole
from jaxmerge.trees.checks import name_experts
from jaxmerge.trees.info import Rules, TensorInfo
from jaxmerge.trees.paths import Params, with_leaves

Update = Callable[[Any, Any, Values], tuple[Any, Any]]
"""`(state, loss, gradients) -> (new state, whether all was finite)`, a function to be traced."""


class Objective(abc.ABC):
    """Takes a step: the state and a batch to the new state, the loss, whether all was finite, and the gradients."""

    @abc.abstractmethod
    def step(self, state: Any, batch: Any) -> tuple[Any, Any, Any, Values]: ...


class InMemory(Objective):
    """One program for the whole step, however many tensors and experts there are."""

    def __init__(
        self,
        loss: Callable[[Params, Any], Any],
        update: Update,
        coefficients: Coefficients,
        experts: ExpertTrees,
        base: Params | None,
        key: Any,
        rules: Rules,
    ):
        trees = name_experts(experts)
        names = tuple(trees)
        job = assign(coefficients.method, experts, base, key, rules)
        plain = not any(task.method.passes or task.method.whole_tensor for task in job.tasks.values())

        # Arrays that a method holds (masks, statistics) are as large as a model: no constants of a program.
        tensors = tuple(job.tasks)
        in_rows = coefficients.in_rows(tensors)
        leaves, treedef = jax.tree.flatten(in_rows.method)
        arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, np.ndarray | jax.Array) and x.ndim > 0}

        def merged(values: Values, arrays: dict[int, Any], trees: list[Params], base: Params | None) -> Params:
            given = jax.tree.unflatten(treedef, [arrays.get(i, x) for i, x in enumerate(leaves)])
            method = in_rows.put(values, given, rows=True)
            return merge(method, dict(zip(names, trees, strict=True)), base=base, key=key, rules=rules)

        # Task vectors are cheap to compute again and large to keep: without this, XLA keeps all K of them for the
        # derivatives. What a method measures or factorises is kept.
        once_more = jax.checkpoint(merged) if plain else merged

        def step(
            state: Any, arrays: dict[int, Any], trees: list[Params], base: Params | None, batch: Any
        ) -> tuple[Any, Any, Any, Values]:
            def of(values: Values) -> Any:
                return scalar(loss(once_more(values, arrays, trees, base), batch))

            value, gradients = jax.value_and_grad(of)(coefficients.rows_of(state.coefficients, tensors))
            gradients = coefficients.rows_added(gradients)
            new, finite = update(state, value, gradients)
            return new, value, finite, gradients

        self.program = jax.jit(step)
        self.inputs = (
            arrays,
            list(trees.values()),
            base,
        )  # a dict would come out of a jitted call with its keys sorted

    def step(self, state: Any, batch: Any) -> tuple[Any, Any, Any, Values]:
        return self.program(state, *self.inputs, batch)


class Streamed(Objective):
    """Programs for one tensor of each shape, and one for the model's gradient."""

    def __init__(self, loss: Callable[[Params, Any], Any], update: Update, coefficients: Coefficients, job: Assignment):
        passes = [scope for task in job.tasks.values() for scope in task.method.passes]
        stacked = [name for name, task in job.tasks.items() if task.stacked]
        if "model" in passes:
            raise RecipeError(
                f"{coefficients.method!r} measures over the whole model what depends on what is learned, so its "
                "experts cannot stay on disk; materialise them (jm.materialize), or measure per tensor"
            )
        if stacked:
            raise RecipeError(f"tensor {stacked[0]!r} is layer-stacked; materialise the experts (jm.materialize)")
        self.job = job
        copied = {name: np.asarray(leaf) for name, (leaf, _) in job.copied.items()}
        infos = {name: task.info for name, task in job.tasks.items()}

        def resolve(values: Values) -> dict[str, Method]:
            method = coefficients.put(values, rows=True)
            found = {name: method.for_tensor(info).at(info, job.experts) for name, info in infos.items()}
            return jax.tree.map(jnp.asarray, found)

        def of(merged: dict[str, Any], batch: Any) -> Any:
            return scalar(loss(with_leaves(job.reference, {**merged, **copied}), batch))

        def finish(state: Any, value: Any, by_tensor: dict[str, list[Any]]) -> tuple[Any, Any, Values]:
            _, pull_back = jax.vjp(
                lambda values: {n: _floats(m) for n, m in resolve(values).items()}, state.coefficients
            )
            (gradients,) = pull_back(by_tensor)
            return *update(state, value, gradients), gradients

        largest = max((as_lazy(task.experts[0]).nbytes for task in job.tasks.values()), default=0)
        self.memory = [_aligned(largest) for _ in range(1 + len(job.experts))]
        self.resolve, self.finish = jax.jit(resolve), jax.jit(finish)
        self.gradient = jax.jit(jax.value_and_grad(of))

    def step(self, state: Any, batch: Any) -> tuple[Any, Any, Any, Values]:
        methods = self.resolve(state.coefficients)
        merged = {name: self._tensor(name, methods[name], None) for name in methods}
        value, gradients = self.gradient(merged, batch)
        del merged
        by_tensor = {name: self._tensor(name, methods[name], gradients.pop(name)) for name in methods}
        new, finite, gradients = self.finish(state, value, by_tensor)
        return new, value, finite, gradients

    def _tensor(self, name: str, method: Method, gradient: Any) -> Any:
        """The merged tensor, or the derivatives of what it was merged with."""
        task = self.job.tasks[name]
        base = None if task.base is None else self._read(0, task.base)
        experts = [self._read(i + 1, expert) for i, expert in enumerate(task.experts)]
        info = task.info.for_program()
        if gradient is None:  # copied, since a method may answer with an input, whose memory is used again
            result = jnp.copy(merge_whole(method, base, experts, info, {})[0])
        else:
            result = _pulled_back(method, base, experts, info, gradient)
        return jax.block_until_ready(result)

    def _read(self, place: int, leaf: Any) -> Shaped[np.ndarray, "..."]:
        """A whole tensor, in the memory that the input of this number has for every tensor in turn.

        It is aligned so that JAX on the CPU computes straight from it; nothing may read it after the next call.
        """
        source = as_lazy(leaf)
        out = self.memory[place][: source.nbytes].view(source.dtype)
        source.read_flat(0, out)
        return out.reshape(source.shape)


def _aligned(size: int) -> Shaped[np.ndarray, " n"]:
    """Bytes that start at a multiple of 64, which JAX on the CPU does not copy."""
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


@jax.jit
def _pulled_back(method: Method, base: Any, experts: list[Any], info: TensorInfo, gradient: Any) -> list[Any]:
    """The derivatives of the floating-point leaves of a tensor's method, given the tensor's own."""

    def merged(floats: list[Any]) -> Any:
        return merge_whole(_with_floats(method, floats), base, experts, info, {})[0]

    (result,) = jax.vjp(merged, _floats(method))[1](gradient)
    return result


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _floats(method: Method) -> list[Any]:
    return [x for x in jax.tree.leaves(method) if _is_float(x)]


def _with_floats(method: Method, floats: list[Any]) -> Method:
    leaves, treedef = jax.tree.flatten(method)
    left = iter(floats)
    return jax.tree.unflatten(treedef, [next(left) if _is_float(x) else x for x in leaves])


def scalar(value: Any) -> Any:
    """The loss, checked to be one number.

    Raises:
        RecipeError: it is none.
    """
    if np.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise RecipeError(
            f"the loss is {jnp.result_type(value)}{list(np.shape(value))}, expected one floating-point number; "
            "take its mean"
        )
    return value


@contextlib.contextmanager
def as_optax_computes() -> Iterator[None]:
    """Optax relies on JAX's usual promotion, which a user may have made strict for code of their own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
