"""The rows of the table for masks and candidates that are learned: concrete masks and Frank-Wolfe selection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge as jm
from jaxmerge.learning.frank_wolfe import Granularity, _cosine, select
from jaxmerge.methods.concrete import soft_mask
from tests.golden.calls import FUSION_BENCH, on_device
from tests.golden.golden_set import Case, Tensors


@dataclasses.dataclass(frozen=True)
class Masked:
    """The masks that given draws make, and task arithmetic under them.

    A method draws by its own seed; draws that are given enter it as what they add to the logits.
    """

    logit: float
    temperature: float
    weight: float

    def outputs(self, case: Case) -> Tensors:
        draws = {name.removeprefix("uniform/"): u for name, u in case.given.items()}
        logits = {name: self.logit + np.log(u) - np.log1p(-u) for name, u in draws.items()}
        mask = jm.concrete_mask(logits, temperature=self.temperature)
        method = jm.chain(*jm.task_arithmetic(self.weight).stages, mask)
        merged = jax.device_get(jm.merge(method, on_device(case.experts), base=on_device(case.base)))
        found = {}
        for name, u in draws.items():
            constant = jnp.full(u.shape, self.logit, jnp.float32)
            found[f"mask/{name}"] = np.asarray(soft_mask(constant, self.temperature, jnp.asarray(u, jnp.float32)))
            found[f"merged/{name}"] = merged[name]
        return found


@dataclasses.dataclass(frozen=True)
class Selection:
    """The candidates that a gradient chooses, by number, and how they align with it."""

    granularity: Granularity
    order: Sequence[str]

    def outputs(self, case: Case) -> Tensors:
        scores = {
            str(i): {n: float(_cosine(jnp.asarray(case.given[f"grad/{n}"]), jnp.asarray(x[n]))) for n in self.order}
            for i, x in enumerate(case.experts)
        }
        chosen = select(scores, self.granularity, {})
        numbers = np.array([int(chosen[name]) for name in self.order])
        return {
            "scores": np.array([sum(by_tensor.values()) for by_tensor in scores.values()]),
            "alignment": np.asarray(sum(scores[chosen[name]][name] for name in self.order)),
            "chosen": numbers if self.granularity == "layer" else numbers[0],
        }


def frank_wolfe_selection(granularity: Granularity, tensor_order: Sequence[str]) -> Selection:
    return Selection(granularity, tensor_order)


ROWS: dict[tuple[str, str, str], Callable[..., Any]] = {
    ("adamerging", FUSION_BENCH, r"MaskModel\.sample_mask\(continuous\) then .*"): Masked,
    ("adamerging", FUSION_BENCH, r"FrankWolfeHardAlgorithm\.frank_wolfe_selection"): frank_wolfe_selection,
}
