"""The rows of the table for WUDI, OptMerge, SWUDI, ASWUDI and DOGE, and what we decline to reproduce; see `calls`.

One program merges all tensors that a case recorded. The losses that were recorded on the way are compared with those of
the NumPy references, step for step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge as jm
from jaxmerge.methods.doge import Doge, doge
from jaxmerge.methods.method import pytree
from jaxmerge.methods.wudi import aswudi, optmerge, swudi, wudi
from tests.golden.golden_set import Case, Tensors
from tests.methods import reference_interference as reference

QUICKLY: Any = {"xla_backend_optimization_level": 0}


def run_once(function: Callable[..., Any], *operands: Any) -> Any:
    """`function(*operands)` as a program that is compiled quickly rather than well."""
    program = jax.jit(function).lower(*operands).compile(QUICKLY)
    return jax.device_get(program(*operands))


def merge_recorded(method: jm.Method, case: Case, base: Tensors, experts: list[Tensors]) -> Tensors:
    """The merge of the tensors that were recorded."""
    names = [name for name in base if name in case.wanted]
    chosen = [{name: jnp.asarray(model[name]) for name in names} for model in (base, *experts)]
    return run_once(lambda base, *experts: jm.merge(method, experts, base=base), *chosen)


@dataclasses.dataclass(frozen=True)
class Merged:
    """A merge of a bundle's experts."""

    method: jm.Method

    def outputs(self, case: Case) -> Tensors:
        return merge_recorded(self.method, case, case.base, case.experts)


@dataclasses.dataclass(frozen=True)
class MergedInSteps:
    """The merged task vector of a bundle's experts, and the loss before each step for the matrices of `rows`."""

    method: jm.Method
    steps: int
    rate: float
    rows: tuple[str, ...]

    def outputs(self, case: Case) -> Tensors:
        deltas = [{name: expert[name] - x for name, x in case.base.items()} for expert in case.experts]
        zero = {name: np.zeros_like(x) for name, x in case.base.items()}
        losses = np.stack([self._losses([delta[name].astype(np.float64) for delta in deltas]) for name in self.rows])
        return merge_recorded(self.method, case, zero, deltas) | {"losses": losses}

    def _losses(self, deltas: list[np.ndarray]) -> np.ndarray:
        learned = [delta for delta in deltas if delta.any()]
        norms, losses = [reference.norm(delta) for delta in learned], []

        def gradient(tau: np.ndarray) -> Any:
            losses.append(reference.loss(tau, learned, learned, norms))
            return 2 * sum(((tau - d) @ d.T @ d / n**2 for d, n in zip(learned, norms, strict=True)), 0 * tau)

        reference.adam(gradient, np.sum(deltas, axis=0), self.rate, self.steps)
        return np.array(losses)


@pytree
class Corrected(Doge):
    """DOGE with corrections that are known already, by shape."""

    known: Any = None

    def correction(self, deltas: list[Any]) -> Any:
        return self.known[str(deltas[0].shape)]


@dataclasses.dataclass(frozen=True)
class WithCorrection:
    """DOGE on some tensors, which were recorded as `encoder.<tensor>.weight`, with its corrections and losses."""

    method: Doge
    tensors: tuple[str, ...]

    def outputs(self, case: Case) -> Tensors:
        base, *experts = [
            {f"encoder.{name}.weight": model[name] for name in self.tensors} for model in (case.base, *case.experts)
        ]
        deltas = {name: [expert[name] - base[name] for expert in experts] for name in base}
        corrections = run_once(lambda deltas: {name: self.method.correction(d) for name, d in deltas.items()}, deltas)
        known = {str(x.shape): jnp.asarray(x) for x in corrections.values()}
        fields = {field.name: getattr(self.method, field.name) for field in dataclasses.fields(self.method)}
        merged = merge_recorded(Corrected(**fields, known=known), case, base, experts)
        losses = [self._losses([delta.astype(np.float64) for delta in deltas[name]]) for name in base]
        return merged | {f"delta/{name}": x for name, x in corrections.items()} | {"loss_curve": np.array(losses)}

    def _losses(self, deltas: list[np.ndarray]) -> list[float]:
        method, losses = self.method, []
        reference.correction(deltas, method.eta, method.subspace, method.steps, method.learning_rate, losses)
        return losses


def fusion_bench_wudi(iter_num: int, lr: float, optimizer: str, loss_rows: list[str]) -> MergedInSteps:
    assert optimizer == "Adam(beta 0.9/0.999, eps 1e-8)", f"unknown optimizer {optimizer!r}"
    return MergedInSteps(wudi(steps=iter_num, learning_rate=lr), iter_num, lr, tuple(loss_rows))


def mllm_optmerge(iters: int, lr: float, optimizer: str, init: Any) -> Merged:
    chosen: Any = {"Adam": "adam", "SGD": "sgd"}[optimizer]
    return Merged(optmerge(steps=iters, learning_rate=lr, optimizer=chosen, start=init))


def mllm_swudi(exp_time: float, truncate_rank_ratio: float | None, init_mode: Any) -> Merged:
    return Merged(swudi(time=exp_time, rank=truncate_rank_ratio, start=init_mode))


RULES = {"participation_sqrt": "participation_sqrt", "none": "full"}


def mllm_aswudi(auto_rank_method: str, init_mode: Any) -> Merged:
    rule: Any = RULES[auto_rank_method]
    return Merged(aswudi(rule=rule, start=init_mode))


def fusion_bench_doge(
    subspace: int, K_percent: float, lamda: float, lr: float, steps: int, tensors: list[str]
) -> WithCorrection:
    method: Any = doge(
        eta=lamda, density=K_percent / 100, subspace=subspace, steps=steps, learning_rate=lr, inclusive=True
    )
    return WithCorrection(method, tuple(tensors))


MLLM = "WalkerWorldPeace/MLLMerging"
FUSION_BENCH = "tanganke/fusion_bench"

ROWS: dict[tuple[str, str, str], Callable[..., Any]] = {
    ("wudi", FUSION_BENCH, r"wudi_merging"): fusion_bench_wudi,
    ("wudi", MLLM, r"InternVL/internvl_chat/model_merging\.py: wudi_merging2"): mllm_optmerge,
    ("wudi", MLLM, r"LLaMA-Factory/swudi_aswudi\.py: swudi_merge"): mllm_swudi,
    ("wudi", MLLM, r"LLaMA-Factory/swudi_aswudi\.py: aswudi_merge"): mllm_aswudi,
    ("doge", FUSION_BENCH, r"DOGE_TA_Algorithm\.run"): fusion_bench_doge,
}


# What we decline to reproduce: whether an output of a case shows the defect, and the assertion that ours does not.


def has_losses_of_no_task_vector(case: Case, name: str) -> bool:
    """WUDI divides by the norm of a task vector, which is zero where an expert equals the base."""
    return case.record["family"] == "wudi" and name == "losses"


def check_losses(case: Case, name: str, wanted: np.ndarray, found: np.ndarray) -> None:
    rows = case.record["params"]["loss_rows"]
    unlearned = [any((expert[row] == case.base[row]).all() for expert in case.experts) for row in rows]
    np.testing.assert_array_equal(np.isnan(wanted).all(axis=1), unlearned)
    assert np.isfinite(found).all()
    learned = np.logical_not(unlearned)
    np.testing.assert_allclose(found[learned], wanted[learned], case.record["compare"]["rtol"])


def divides_by_rounding(case: Case, name: str) -> bool:
    """Eigenvalues of zero are raised to 1e-8 without truncation, and what is rounding divided by that."""
    params = case.record["params"]
    whole = params.get("auto_rank_method") == "none" and case.record["family"] == "wudi"
    return whole and case.wanted[name].ndim == 2 and _rank(case, name) < case.wanted[name].shape[1]


def check_where_determined(case: Case, name: str, wanted: np.ndarray, found: np.ndarray) -> None:
    """On the rows of the task vectors both are the same, and beyond them ours is zero and the recorded one is not."""
    deltas = _deltas(case, name)
    within = np.linalg.pinv(np.concatenate(deltas)) @ np.concatenate(deltas)
    ours, theirs = found - case.base[name], wanted - case.base[name]
    how = case.record["compare"]
    np.testing.assert_allclose(ours, theirs @ within, how["rtol"], how["atol"], err_msg=name)
    assert np.abs(ours - ours @ within).max() < 1e-5 < np.abs(theirs - theirs @ within).max()


def _deltas(case: Case, name: str) -> list[np.ndarray]:
    return [expert[name].astype(np.float64) - case.base[name] for expert in case.experts]


def _rank(case: Case, name: str) -> int:
    return int(np.linalg.matrix_rank(np.concatenate(_deltas(case, name)), tol=1e-6))


DECLINED: list[tuple[str, Callable[..., bool], Callable[..., None]]] = [
    (
        "WUDI is not a number wherever an expert equals the base in a matrix; ours leaves that expert out",
        has_losses_of_no_task_vector,
        check_losses,
    ),
    (
        "ASWUDI without truncation divides rounding by 1e-8 where the task vectors' rows do not span all columns; ours "
        "learns nothing there",
        divides_by_rounding,
        check_where_determined,
    ),
]
