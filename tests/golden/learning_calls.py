"""The rows of the table for merges whose coefficients are learned; see `calls`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmerge as jm
from tests.golden.calls import FUSION_BENCH, lazy, on_device, read
from tests.golden.golden_set import Case, Tensors


@dataclasses.dataclass(frozen=True)
class GivenCoefficients:
    """AdaMerging with a case's coefficients: `[experts]`, or `[experts, tensors]` with the tensors in a given order."""

    order: Sequence[str] | None
    clamp: bool

    def outputs(self, case: Case) -> Tensors:
        weights = case.given["weights"]
        weights = jm.box()(weights) if self.clamp else weights
        if self.order is None:
            method = jm.adamerging([float(w) for w in weights], per="task")
        else:
            method = jm.adamerging(dict(zip(self.order, weights.T, strict=True)))
        merged = jm.merge(method, [lazy(expert) for expert in case.experts], base=lazy(case.base))
        return {name: read(tensor) for name, tensor in merged.items()}  # lazily, where one program serves every shape


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """Layer-wise AdaMerging of a bundle's MLPs on their own inputs, one set per task."""

    method: jm.Method
    rate: float
    steps: int
    order: Sequence[str]

    def outputs(self, case: Case) -> Tensors:
        learned = jm.learn(
            self.method,
            on_device(case.experts),
            [on_device(case.given)],
            loss=jm.entropy(mlp_logits),
            steps=self.steps,
            base=on_device(case.base),
            optimizer=optax.adam(self.rate),
            progress=False,
        )
        weights = np.array([list(learned.coefficients[name].values()) for name in self.order])
        merged = jax.device_get(jm.merge(learned.method, on_device(case.experts), base=on_device(case.base)))
        return {"weights": weights.T, **{f"merged/{name}": value for name, value in merged.items()}}


@dataclasses.dataclass(frozen=True)
class Projection:
    """The nearest point of a simplex."""

    total: float

    def outputs(self, case: Case) -> Tensors:
        return {"w": jax.device_get(jm.simplex(self.total)(jnp.asarray(case.given["v"])))}


def mlp_logits(params: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    def logits(x: Any) -> Any:
        hidden = x @ params["l1.weight"].T + params["l1.bias"][None]
        centred = hidden - hidden.mean(axis=1, keepdims=True)
        normed = centred / jnp.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        hidden = jax.nn.relu(normed * params["norm.weight"][None] + params["norm.bias"][None])
        return hidden @ params["l2.weight"].T + params["l2.bias"][None]

    return {task: logits(x) for task, x in inputs.items()}


def layer_wise(clamp: bool, tensor_order: Sequence[str]) -> GivenCoefficients:
    return GivenCoefficients(tensor_order, clamp)


def task_wise(clamp: bool) -> GivenCoefficients:
    return GivenCoefficients(None, clamp)


def test_time_adaptation(init: float, lr: float, steps: int, tensor_order: Sequence[str]) -> Adaptation:
    return Adaptation(jm.adamerging(init), lr, steps, tensor_order)


def projection_simplex(z: float) -> Projection:
    return Projection(float(z))


ROWS: dict[tuple[str, str, str], Callable[..., Any]] = {
    ("adamerging", FUSION_BENCH, r"LayerWiseMergedModel\.merge_weights"): layer_wise,
    ("adamerging", FUSION_BENCH, r"TaskWiseMergedModel\.merge_weights"): task_wise,
    ("adamerging", FUSION_BENCH, r"LayerWiseAdaMergingAlgorithm\.test_time_adaptation .*"): test_time_adaptation,
    ("adamerging", FUSION_BENCH, r"fw_soft\.projection_simplex_sort"): projection_simplex,
}
