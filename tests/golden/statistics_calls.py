"""Our calls for the recorded ones of the family `datadriven`: merges with statistics, given and collected."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge as jm
from tests.golden.calls import FUSION_BENCH, on_device
from tests.golden.golden_set import Case, Tensors

KERNEL = "weight"


@dataclasses.dataclass(frozen=True)
class GivenGrams:
    """RegMean of one linear layer with the Gram matrices of the case."""

    off_diagonal: float

    def outputs(self, case: Case) -> Tensors:
        count = sum(name.startswith("W") for name in case.given)
        experts = [{KERNEL: case.given[f"W{i}"], "bias": case.given[f"b{i}"]} for i in range(count)]
        grams = [{KERNEL: case.given[f"gram{i}"]} for i in range(count)]
        return jax.device_get(jm.merge(jm.regmean(grams, off_diagonal=self.off_diagonal), on_device(experts)))


@dataclasses.dataclass(frozen=True)
class GivenFishers:
    """A Fisher merge with the weights and the Fisher information of the case."""

    floor: float
    normalize: bool

    def outputs(self, case: Case) -> Tensors:
        weights = case.given["coefficients"].tolist()
        experts = [{name: case.given[f"p{i}/{name}"] for name in case.wanted} for i in range(len(weights))]
        fishers = [{name: case.given[f"F{i}/{name}"] for name in case.wanted} for i in range(len(weights))]
        method = jm.fisher_merge(fishers, weights, floor=self.floor, normalize=self.normalize)
        return jax.device_get(jm.merge(method, on_device(experts)))


@dataclasses.dataclass(frozen=True)
class Collected:
    """A merge of a bundle's experts with what `collect` gives for each on its examples."""

    collect: Callable[[Any, list[np.ndarray]], Any]
    method: Callable[[list[Any]], jm.Method]
    batch: int
    examples: int

    def outputs(self, case: Case) -> Tensors:
        experts, statistics = [on_device(expert) for expert in case.experts], []
        for i, expert in enumerate(experts):
            x = case.given[f"x{i}"]
            assert len(x) == self.examples
            statistics.append(self.collect(expert, list(x.reshape(-1, self.batch, x.shape[-1]))))
        return jax.device_get(jm.merge(self.method(statistics), experts))


def perceptron(params: Any, x: Any) -> Any:
    """The bundle's model: linear, layer norm, relu, linear, in PyTorch's layout."""
    hidden = x @ params["l1.weight"].T + params["l1.bias"][None]
    centred = hidden - jnp.mean(hidden, axis=1, keepdims=True)
    hidden = centred / jnp.sqrt(jnp.mean(centred**2, axis=1, keepdims=True) + 1e-5)
    hidden = jax.nn.relu(hidden * params["norm.weight"][None] + params["norm.bias"][None])
    return hidden @ params["l2.weight"].T + params["l2.bias"][None]


def regmean(reduce_non_diagonal_ratio: float) -> GivenGrams:
    return GivenGrams(reduce_non_diagonal_ratio)


def fisher(normalize: bool, floor: float) -> GivenFishers:
    return GivenFishers(floor, normalize)


def regmean_of_data(reduce_non_diagonal_ratio: float, batch: int, examples: int) -> Collected:
    def collect(params: Any, batches: list[np.ndarray]) -> Any:
        return jm.gram(perceptron, params, batches)

    return Collected(collect, lambda grams: jm.regmean(grams, off_diagonal=reduce_non_diagonal_ratio), batch, examples)


def fisher_of_data(normalize: bool, batch: int, examples: int) -> Collected:
    def collect(params: Any, batches: list[np.ndarray]) -> Any:
        return jm.fisher(perceptron, params, batches, kind="batch_square")

    return Collected(collect, lambda fishers: jm.fisher_merge(fishers, normalize=normalize), batch, examples)


ROWS: dict[tuple[str, str, str], Callable[..., Any]] = {
    ("datadriven", FUSION_BENCH, "merging_with_regmean_weights"): regmean,
    ("datadriven", FUSION_BENCH, "merging_with_fisher_weights"): fisher,
    ("datadriven", FUSION_BENCH, r"regmean_merging \(stub trainers\)"): regmean_of_data,
    ("datadriven", FUSION_BENCH, r"fisher_merging \(stub trainers\)"): fisher_of_data,
}
