"""Every recorded call of a published implementation gives our result, or is declined by a rule that is tested too."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.methods.method import pytree
from jaxmerge.methods.sce import Sce
from jaxmerge.methods.stages import Chain, Stage, TaskVectors
from tests.golden import calls, interference_calls, spectral_calls, table
from tests.golden.calls import Merge
from tests.golden.golden_set import GOLDEN, Case
from tests.golden.table import our_call

RECORDS = GOLDEN.index["cases"]
COMPARED = [
    record
    for record in RECORDS
    if not {record["family"], (record["family"], record["reference"]["implementation"])} & table.NOT_IMPLEMENTED
]
INTERMEDIATE = {"scale", "clamped"}
"""Outputs that a reference has computed on its way to others, which show whether it was right."""


FEW_TENSORS = ("bias", "wide", "conv", "dead_expert")
"""Of the bundles of two and of five experts: a vector, fewer outputs than five experts have directions, a window, and a
matrix in which one expert equals the base."""
ON_THREE = {(record["family"], record["reference"]["call"]) for record in RECORDS if record["bundle"] == "k3_f32"}


def param(record):
    """Cases with the same programs share a worker, which compiles them once."""
    return pytest.param(record, id=record["id"], marks=pytest.mark.xdist_group(record["family"]))


def chosen_case(record, call):
    """The case, with few of its tensors where each is a program of its own and the call on three experts shows all."""
    case, method = GOLDEN.case(record), getattr(call, "method", None)
    by_tensor = isinstance(method, jm.Method) and method.granularity is jm.Granularity.TENSOR
    shown = record["bundle"] in ("k2_f32", "k5_f32") and (record["family"], record["reference"]["call"]) in ON_THREE
    return case.of_tensors(FEW_TENSORS) if by_tensor and shown else case


@pytest.mark.parametrize("record", map(param, COMPARED))
def test_case(record):
    call = our_call(record)
    case = chosen_case(record, call)
    found = call.outputs(case)
    failed = record.get("reference_errors", {})
    assert all(np.isfinite(found[name]).all() for name in failed), "we merge what the reference cannot"
    for name, wanted in case.wanted.items():
        if name.startswith("keepmask_") or name in INTERMEDIATE:
            continue
        declined = declined_for(case, name)
        if declined is not None:
            declined.check(case, name, wanted, found[name])
            continue
        how = record["compare"] | record.get("compare_overrides", {}).get(name, {})
        if name.startswith("f32acc/"):
            how |= F32ACC.get(record["family"], F32ACC["any other"])
        COMPARISONS[how["kind"]](case, call, name, wanted, found, how)


def test_every_family_has_a_row_or_is_not_implemented_yet():
    families = {record["family"] for record in RECORDS}
    assert families <= {family for family, _, _ in table.ROWS} | table.NOT_IMPLEMENTED


# How outputs are compared

F32ACC = {"any other": {"rtol": 1e-5, "atol": 1e-6}, "nuslerp": {"rtol": 1e-4, "atol": 1e-5}}
"""By family, for outputs of the reference on half-precision inputs that were upcast first: the tolerance of float32
cases. Arcs between nearly opposite vectors magnify rounding."""


def compare_values(case: Case, call: Any, name: str, wanted: Any, found: Any, how: Any) -> None:
    wanted, ours = widened(wanted), widened(found[name])
    twin = case.wanted.get(f"f32acc/{name}")
    if twin is not None:
        # Where the reference in half precision is far from itself in float32, its value is rounding, not a result.
        sound = np.isclose(wanted, twin, how["rtol"], how["atol"])
        assert sound.mean() > 0.5, f"{name}: nothing left to compare"
        wanted, ours = wanted[sound], ours[sound]
    np.testing.assert_allclose(ours, wanted, how["rtol"], how["atol"], err_msg=name)


def widened(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) if x.dtype.itemsize < 4 else x


def compare_multisets(case: Case, call: Any, name: str, wanted: Any, found: Any, how: Any) -> None:
    axis = min(1, wanted.ndim - 1)
    np.testing.assert_allclose(
        np.sort(found[name], axis), np.sort(wanted, axis), how["rtol"], how["atol"], err_msg=name
    )


def compare_finite(case: Case, call: Any, name: str, wanted: Any, found: Any, how: Any) -> None:
    assert np.isfinite(found[name]).all(), name


def compare_statistics(case: Case, call: Any, name: str, wanted: Any, found: Any, how: Any) -> None:
    """`found` within `z` standard errors of the difference of two independent estimates."""
    draws = case.record["params"]["draws"]
    if name == "stderr":  # of an entry that is there or not: the fewer are kept, the less certain is their spread
        rate = np.clip(case.wanted["keep_rate"], 1 / draws, 1 - 1 / draws)
        error = np.hypot(wanted, found[name]) * np.sqrt((1 / (rate * (1 - rate)) - 2) / (4 * draws))
    elif name == "l1_std":  # of a sum of many entries, so nearly normal
        error = np.hypot(wanted, found[name]) / np.sqrt(2 * draws)
    elif name == "keep_rate":
        error = np.sqrt((wanted * (1 - wanted) + found[name] * (1 - found[name])) / draws)
    elif name == "mean":
        error = np.hypot(case.wanted["stderr"], found["stderr"])
    elif name == "l1_mean":
        error = np.hypot(case.wanted["l1_std"], found["l1_std"]) / np.sqrt(draws)
    else:
        assert name == "l1_input", f"unknown statistic {name!r}"
        error = 0
    rounding = 1e-5 * np.abs(wanted) + 1e-7
    assert (np.abs(found[name] - wanted) <= how["z"] * error + rounding).all(), name


def compare_tied(case: Case, call: Any, name: str, wanted: Any, found: Any, how: Any) -> None:
    """Where equal magnitudes lie on the cut: our choice obeys our rule, and the reference's choice gives its values."""
    if isinstance(call.method, Sce):
        compare_tied_selection(case, call, name, wanted, found, how)
        return
    assert isinstance(call, Merge) and isinstance(call.method, Chain)
    prune, *rest = call.method.stages
    tensor = name.removeprefix("f32acc/")
    upcast = [calls.upcast(x) for x in (case.base, *case.experts[: call.experts])]
    base, *experts = [{tensor: x[tensor]} for x in upcast]
    for expert in experts:
        check_kept(case.record["params"], expert[tensor] - base[tensor], pruned(prune, expert, base)[tensor])

    masks = tuple(case.wanted[f"keepmask_e{i}/{name}"].astype(bool) for i in range(len(experts)))
    method = jm.chain(keep_entries(masks), *rest)
    merged = np.asarray(jm.merge(method, calls.on_device(experts), base=calls.on_device(base))[tensor])
    compare_values(case, call, tensor, wanted, {tensor: merged}, how)


def compare_tied_selection(case: Case, call: Merge, name: str, wanted: Any, found: Any, how: Any) -> None:
    """As `compare_tied`, for entries that are selected by their variance over the experts."""
    base, deltas = case.base[name], [expert[name] - case.base[name] for expert in case.experts]
    variance = np.var(np.stack(deltas).astype(np.float64), axis=0)
    density = case.record["params"]["select_topk"]
    moved = found[name] != base
    if density < 1:
        kept, dropped = variance[moved], variance[~moved]
        assert kept.size >= int(density * np.count_nonzero(variance))
        assert dropped.max() < kept.min() * (1 + 1e-5)
    assert isinstance(call.method, Sce)
    method = dataclasses.replace(call.method, density=1.0)
    selected = [{name: jnp.asarray(base + (wanted != base) * delta)} for delta in deltas]
    compare_values(case, call, name, wanted, jm.merge(method, selected, base={name: jnp.asarray(base)}), how)


def check_kept(params: dict[str, Any], delta: np.ndarray, left: np.ndarray) -> None:
    """At least as many entries are kept as asked for, and among equal magnitudes all or none."""
    sizes = np.abs(delta)
    kept, dropped = sizes[left != 0], sizes[(left == 0) & (delta != 0)]
    outliers = int(params.get("gamma", 0) * delta.size)
    keep = max(int(params["density"] * delta.size), 1)
    outliers = min(outliers, delta.size - keep)
    assert kept.size >= min(keep, np.count_nonzero(delta) - outliers)
    if kept.size:
        assert not ((dropped >= kept.min()) & (dropped <= kept.max())).any()
        assert (dropped > kept.max()).sum() <= outliers
    np.testing.assert_array_equal(left[left != 0], delta[left != 0])


def pruned(stage: Stage, expert: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    deltas = {name: value - base[name] for name, value in expert.items()}
    left = jm.merge(
        jm.chain(stage, jm.total()), [calls.on_device(deltas)], base=calls.on_device(calls.zeros_like(deltas))
    )
    return jax.device_get(left)


@pytree
class KeepEntries(Stage):
    """Keeps the entries that a mask per expert says."""

    masks: tuple[Any, ...]

    def apply(self, vectors: TaskVectors, info: Any, measured: Any) -> TaskVectors:
        deltas = [jnp.where(mask, d, 0) for mask, d in zip(self.masks, vectors.deltas, strict=True)]
        return vectors.replace(deltas=tuple(deltas))


def keep_entries(masks: tuple[np.ndarray, ...]) -> Stage:
    return KeepEntries(tuple(jnp.asarray(mask) for mask in masks))


def compare_exactly(case: Case, call: Any, name: str, wanted: Any, found: Any, how: Any) -> None:
    np.testing.assert_array_equal(found[name], wanted.astype(found[name].dtype), err_msg=name)


COMPARISONS: dict[str, Callable[..., None]] = {
    "allclose": compare_values,
    "equal": compare_exactly,
    "statistical": compare_statistics,
    "tied-topk": compare_tied,
    "multiset-along-axis1": compare_multisets,
    "finite-only": compare_finite,
    "reference-nan": compare_finite,
}


# What we decline to reproduce


@dataclasses.dataclass(frozen=True)
class Declined:
    """A defect of a reference that we do not copy.

    Attributes:
        reason: why.
        applies: whether an output of a case shows the defect.
        check: asserts that the recorded output is the defect and ours is not.
    """

    reason: str
    applies: Callable[[Case, str], bool]
    check: Callable[[Case, str, Any, Any], None]


def is_zeroed(case: Case, name: str) -> bool:
    return name.removeprefix("f32acc/") in case.record.get("quirks_zeroed", ())


def check_zeroed(case: Case, name: str, wanted: Any, found: Any) -> None:
    tensor = name.removeprefix("f32acc/")
    params, base = case.record["params"], case.base[tensor]
    assert int(params["gamma"] * base.size) == 0
    np.testing.assert_array_equal(wanted, base.astype(wanted.dtype))
    if any((expert[tensor] != base).any() for expert in case.experts):
        assert (found != base).any(), f"{name}: the task vectors were lost"


def has_two_numbers(case: Case, name: str) -> bool:
    return case.record["family"] == "lines" and len(re.findall(r"(?<=\.)\d+(?=\.)", name)) > 1


def check_first_number_counts(case: Case, name: str, wanted: Any, found: Any) -> None:
    params = case.record["params"]
    layer = int(re.findall(r"(?<=\.)\d+(?=\.)", name)[0])
    factor = params["alpha"] + params["beta"] * layer / (params["num_blocks"] - 1)
    np.testing.assert_allclose(found, factor * case.given[name], 1e-5, 1e-6, err_msg=name)


def has_an_axis_more(case: Case, name: str) -> bool:
    tensor = name.removeprefix("f32acc/")
    return case.record["family"] == "sce" and case.wanted[name].ndim > case.base[tensor].ndim


def check_nothing_selected(case: Case, name: str, wanted: Any, found: Any) -> None:
    np.testing.assert_array_equal(found, case.base[name.removeprefix("f32acc/")].astype(found.dtype), err_msg=name)
    np.testing.assert_array_equal(wanted[0], found.astype(wanted.dtype), err_msg=name)


def is_signed_mean(case: Case, name: str) -> bool:
    return case.record["params"].get("replace_factor") == calls.SIGNED_MEAN


def check_signed_mean(case: Case, name: str, wanted: Any, found: Any) -> None:
    np.testing.assert_array_equal(wanted != 0, found != 0, err_msg=name)
    everything = np.concatenate([case.experts[0][n].ravel() - case.base[n].ravel() for n in case.wanted])
    deviation, size = everything.std(ddof=1), np.abs(wanted).max()
    np.testing.assert_allclose(np.abs(found).max(), deviation if size else 0, rtol=1e-5)
    assert size < 0.1 * deviation


DECLINED = [
    Declined(
        "ComPEFT's baseline replaces survivors by the signed mean of all, which cancels to nearly nothing of any sign",
        is_signed_mean,
        check_signed_mean,
    ),
    Declined(
        "mergekit's SCE gives a tensor one axis more where nothing is selected",
        has_an_axis_more,
        check_nothing_selected,
    ),
    Declined(
        "mergekit's Breadcrumbs lose a tensor's whole task vector where int(gamma * n) is 0", is_zeroed, check_zeroed
    ),
    Declined(
        "LiNeS searches a name for '.0.', '.1.', … and takes the first found, so that a numbered part of a block "
        "steals the block's number; we take the number that comes first in the name",
        has_two_numbers,
        check_first_number_counts,
    ),
]

DECLINED += [Declined(*row) for row in (*spectral_calls.DECLINED, *interference_calls.DECLINED)]


def declined_for(case: Case, name: str) -> Declined | None:
    return next((declined for declined in DECLINED if declined.applies(case, name)), None)
