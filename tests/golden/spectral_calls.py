"""The rows of the table for spectral methods, and what of the references is compared otherwise; see `calls`."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge as jm
from jaxmerge.methods.enchtable import interference
from tests.golden.calls import FUSION_BENCH, Merge, MergedTaskVector, expert_number, on_device
from tests.golden.golden_set import Case, Tensors
from tests.methods import reference_spectral


@dataclasses.dataclass(frozen=True)
class InRecordedPrecision:
    """A call with inputs upcast to float64 where that is how the reference was run."""

    call: Merge | MergedTaskVector

    @property
    def method(self) -> jm.Method:
        return self.call.method

    def outputs(self, case: Case) -> Tensors:
        wide = any(value.dtype == np.float64 for value in case.wanted.values())
        dtype = np.float64 if wide else np.float32
        base, *experts = [{n: x.astype(dtype) for n, x in model.items()} for model in (case.base, *case.experts)]
        with jax.enable_x64(wide):
            return self.call.outputs(dataclasses.replace(case, base=base, experts=experts))


@dataclasses.dataclass(frozen=True)
class SafetyMerge:
    """EnchTable on the tensors that were recorded, and the factors by which it damps unscaled safety matrices."""

    beta: float | None
    task: int
    safety: int
    rank_share: float
    gain: float

    @property
    def method(self) -> jm.Method:
        return jm.enchtable(self.beta, safety="safety", rank_share=self.rank_share, gain=self.gain)

    def outputs(self, case: Case) -> Tensors:
        names = [name for name in case.wanted if name in case.base]
        base, task, safety = (
            on_device({name: model[name] for name in names})
            for model in (case.base, case.experts[self.task], case.experts[self.safety])
        )
        merged = jax.device_get(jm.merge(self.method, {"task": task, "safety": safety}, base=base))
        damping = {}
        of_matrices = jax.jit(lambda task, safety: interference(task, safety, self.rank_share))
        for name in names:
            if base[name].ndim == 2:
                found = of_matrices(task[name] - base[name], safety[name] - base[name])
                damping[f"interference_weight/{name}"] = np.asarray(jnp.exp(-self.gain * found))
        return merged | damping


def fusion_bench_tsv_m(alpha: float) -> InRecordedPrecision:
    return InRecordedPrecision(Merge(jm.tsv_m(alpha)))


def fusion_bench_tsv_m_by_eigenvectors() -> InRecordedPrecision:
    return InRecordedPrecision(MergedTaskVector(jm.tsv_m()))


def fusion_bench_iso_c(scaling_factor: float) -> InRecordedPrecision:
    return InRecordedPrecision(Merge(jm.iso_c(scaling_factor)))


def fusion_bench_iso_cts(common_space_fraction: float, scaling_factor: float) -> InRecordedPrecision:
    return InRecordedPrecision(Merge(jm.iso_cts(common_space_fraction, scaling_factor)))


def enchtable(
    adaptive: bool, ada_alpha: float, task: str, safety: str, rank_ratio: float, interference_gain: float
) -> SafetyMerge:
    beta = ada_alpha if adaptive else None
    return SafetyMerge(beta, expert_number(task), expert_number(safety), rank_ratio, float(interference_gain))


def has_expert_without_change(case: Case, name: str) -> bool:
    """An expert equals the base in a matrix and another does not, where its singular vectors count."""
    if not re.search("SingularVector|ISO_CTS", case.record["reference"]["call"]) or case.base[name].ndim != 2:
        return False
    changed = [bool((expert[name] != case.base[name]).any()) for expert in case.experts]
    return any(changed) and not all(changed)


def check_arbitrary_directions(case: Case, name: str, wanted: np.ndarray, found: np.ndarray) -> None:
    """The recorded result has directions for the expert without a change, the first axes in TSV-M; ours has none."""
    base = case.base[name].astype(np.float64)
    deltas = [expert[name].astype(np.float64) - base for expert in case.experts]
    if "ISO_CTS" in case.record["reference"]["call"]:  # recorded without the vectors that it took
        common = case.record["params"]["common_space_fraction"]
        np.testing.assert_allclose(found, base + reference_spectral.iso_cts_matrix(deltas, common), 1e-4, 1e-5)
        return
    arbitrary = reference_spectral.tsv_m_matrix(deltas)
    without = reference_spectral.tsv_m_matrix(deltas, drop_zero=True)
    np.testing.assert_allclose(wanted, base + arbitrary, 1e-4, 1e-5, err_msg=name)
    np.testing.assert_allclose(found, base + without, 1e-4, 1e-5, err_msg=name)


ROWS: dict[tuple[str, str, str], Callable[..., Any]] = {
    ("spectral", FUSION_BENCH, r"TaskSingularVectorMerging\.run"): fusion_bench_tsv_m,
    ("spectral", FUSION_BENCH, r"TSVM_utils\.compute_and_sum_svd_mem_reduction_2"): fusion_bench_tsv_m_by_eigenvectors,
    ("spectral", FUSION_BENCH, r"ISO_C_Merge\.run"): fusion_bench_iso_c,
    ("spectral", FUSION_BENCH, r"ISO_CTS_Merge\.run"): fusion_bench_iso_cts,
    ("enchtable", "AntCPLab/EnchTable", r"models/enchtable\.py: enchtable_merge .*"): enchtable,
}

DECLINED: list[tuple[str, Callable[..., bool], Callable[..., None]]] = [
    (
        "where an expert equals the base in a matrix, FusionBench takes the arbitrary singular vectors of zero for its "
        "directions; ours has none",
        has_expert_without_change,
        check_arbitrary_directions,
    ),
]
