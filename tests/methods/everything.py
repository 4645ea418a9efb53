"""Every method of the library as a value, with what it expects, for the properties that hold over all of them."""

import dataclasses
from collections.abc import Callable

import pytest

import jaxmerge as jm
from tests.methods import (
    reference,
    reference_interference,
    reference_spectral,
    reference_spherical,
    reference_task_vectors,
)
from tests.methods.models import NAMES
from tests.methods.reference import Model, W

WEIGHTS = dict(zip(NAMES, W.tolist(), strict=True))
PAIR = {name: WEIGHTS[name] for name in NAMES[:2]}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method and what is known about it.

    Attributes:
        method: the value.
        reference: the same in NumPy and float64; None for methods that draw.
        experts: how many experts it takes.
        reduces: whether sums over a tensor or a model enter its result.
        sorts: whether it ranks entries of a fibre, which needs the fibre on one device.
        scales: whether scaling the task vectors scales the merged one.
        differentiates: whether its derivatives see all that it does; cuts are constants to them.
    """

    method: jm.Method
    reference: Callable[[Model, list[Model]], Model] | None = None
    experts: int = 3
    reduces: bool = False
    sorts: bool = False
    scales: bool = True
    differentiates: bool = True

    @property
    def draws(self) -> bool:
        return self.reference is None


def _bind(function: Callable[..., Model], **options: object) -> Callable[[Model, list[Model]], Model]:
    return lambda base, experts: function(base, experts, **options)


def _published_ties(combine: jm.Stage) -> jm.Method:
    return jm.chain(jm.trim(0.3, inclusive=True), jm.elect_sign(zero="majority"), combine)


def _partitioned(base: Model, experts: list[Model]) -> Model:
    kernels = reference.ties(base, experts, density=0.3, scope="tensor")
    rest = reference.linear(base, experts)
    return {name: (kernels if name.endswith("kernel") else rest)[name] for name in base}


EVERYTHING = {
    "linear": Entry(jm.linear(WEIGHTS), reference.linear),
    "linear_sum": Entry(jm.linear(WEIGHTS, normalize=False), _bind(reference.linear, normalize=False)),
    "slerp": Entry(jm.slerp(0.3), _bind(reference.slerp, t=0.3), experts=1, reduces=True),
    "nuslerp": Entry(jm.nuslerp(PAIR), reference_spherical.nuslerp, experts=2, reduces=True),
    "nuslerp_fibres": Entry(
        jm.nuslerp(PAIR, axis=-1), _bind(reference_spherical.nuslerp, axis=-1), experts=2, reduces=True
    ),
    "multislerp": Entry(jm.multislerp(WEIGHTS), _bind(reference_spherical.karcher, iterations=0), reduces=True),
    "karcher": Entry(jm.karcher(WEIGHTS), _bind(reference_spherical.karcher, iterations=10), reduces=True),
    "nearswap": Entry(jm.nearswap(0.05), _bind(reference.nearswap, t=0.05), experts=1),
    "passthrough": Entry(jm.passthrough(0.75), _bind(reference.passthrough, scale=0.75), experts=1),
    "model_stock": Entry(jm.model_stock(), reference.model_stock, reduces=True),
    "model_stock_angle": Entry(
        jm.model_stock(average="angle", clip=True),
        _bind(reference.model_stock, average="angle", clip=True),
        reduces=True,
    ),
    "model_stock_fibres": Entry(
        jm.model_stock(axis=-1, clip=True), _bind(reference.model_stock, fibres=True, clip=True), reduces=True
    ),
    "task_arithmetic": Entry(jm.task_arithmetic(0.4, weights=WEIGHTS), _bind(reference.task_arithmetic, scale=0.4)),
    "adamerging": Entry(jm.adamerging(WEIGHTS), _bind(reference.task_arithmetic, scale=1.0)),
    "task_arithmetic_mean": Entry(
        jm.task_arithmetic(0.4, weights=WEIGHTS, normalize=True),
        _bind(reference.task_arithmetic, scale=0.4, normalize=True),
    ),
    "ties": Entry(jm.ties(0.3, weights=WEIGHTS, scale=0.7), _bind(reference.ties, density=0.3, scale=0.7)),
    "ties_per_tensor": Entry(
        jm.ties(0.3, weights=WEIGHTS, scope="tensor"), _bind(reference.ties, density=0.3, scope="tensor")
    ),
    "ties_count": Entry(
        jm.ties(0.3, weights=WEIGHTS, elect="count", normalize=False),
        _bind(reference.ties, density=0.3, elect="count", reduction="sum"),
    ),
    "ties_published": Entry(
        _published_ties(jm.disjoint_mean()), _bind(reference.ties_published, density=0.3, reduction="mean")
    ),
    "ties_max": Entry(
        _published_ties(jm.disjoint_max()), _bind(reference.ties_published, density=0.3, reduction="max")
    ),
    "ties_rescaled": Entry(
        jm.chain(jm.trim(0.3, scope="tensor"), jm.rescale(), jm.weigh(WEIGHTS), jm.elect_sign(), jm.disjoint_mean()),
        _bind(reference.ties_rescaled, density=0.3),
        reduces=True,
    ),
    "breadcrumbs": Entry(
        jm.breadcrumbs(0.6, gamma=0.1, weights=WEIGHTS, scale=0.5),
        _bind(reference.breadcrumbs, density=0.6, gamma=0.1, scale=0.5),
    ),
    "breadcrumbs_fibres": Entry(
        jm.breadcrumbs(0.6, gamma=0.15, weights=WEIGHTS, scale=0.5, axis=-1),
        _bind(reference.breadcrumbs, density=0.6, gamma=0.15, scale=0.5, fibres=True),
        sorts=True,
    ),
    "breadcrumbs_ties": Entry(
        jm.breadcrumbs_ties(0.6, gamma=0.1, weights=WEIGHTS, scale=0.5),
        _bind(reference.breadcrumbs_ties, density=0.6, gamma=0.1, scale=0.5),
    ),
    "sce": Entry(jm.sce(0.4), _bind(reference_task_vectors.sce, density=0.4), reduces=True),
    "pcb": Entry(
        jm.pcb(0.3, weights=1.2),
        _bind(reference_task_vectors.pcb, density=0.3, weight=1.2),
        reduces=True,
        scales=False,
        differentiates=False,
    ),
    "pcb_normalized": Entry(
        jm.pcb(0.3, agreement="normalized", tails=0.01),
        _bind(reference_task_vectors.pcb, density=0.3, tails=0.01, normalized=True),
        reduces=True,
        scales=False,
        differentiates=False,
    ),
    "widen": Entry(
        jm.widen(1.1, calibration=0.9),
        _bind(reference_task_vectors.widen, ratio=1.1, calibration=0.9),
        reduces=True,
        sorts=True,
        scales=False,
    ),
    "consensus": Entry(
        jm.consensus(0.5, minimum=2),
        _bind(reference_task_vectors.consensus_merging, threshold=0.4, minimum=2, scale=0.5),
    ),
    "tall_mask": Entry(
        jm.tall_mask("code", threshold=0.6), _bind(reference_task_vectors.tall_mask, threshold=0.6, expert="code")
    ),
    "emr": Entry(jm.emr(), reference_task_vectors.emr),
    "emr_expert": Entry(jm.emr("code"), _bind(reference_task_vectors.emr, expert="code"), reduces=True),
    "emr_expert_model": Entry(
        jm.emr("code", average="model"),
        _bind(reference_task_vectors.emr, expert="code", average="model"),
        reduces=True,
    ),
    "compeft": Entry(
        jm.compeft(0.3, scale=1.5), _bind(reference_task_vectors.compeft, density=0.3, scale=1.5), reduces=True
    ),
    "arcee_fusion": Entry(
        jm.arcee_fusion(), reference_task_vectors.arcee_fusion, experts=1, reduces=True, scales=False
    ),
    "lines": Entry(jm.lines(alpha=0.2, beta=0.8), _bind(reference.lines, alpha=0.2, beta=0.8, layers=3)),
    "lines_measured": Entry(jm.lines(beta=0.8), _bind(reference.lines, alpha=None, beta=0.8, layers=3), reduces=True),
    "partition": Entry(
        jm.partition(
            {"kernels": jm.ties(0.3, weights=WEIGHTS, scope="tensor"), "rest": jm.linear(WEIGHTS)},
            {".*kernel": "kernels", ".*": "rest"},
        ),
        _partitioned,
    ),
    "dare": Entry(jm.dare(0.4, weights=WEIGHTS, scale=0.5)),
    "dare_l1": Entry(jm.dare(0.4, weights=WEIGHTS, restore="l1"), reduces=True),
    "dare_ties": Entry(jm.dare_ties(0.4, weights=WEIGHTS)),
    "dare_ties_trimmed": Entry(
        jm.dare_ties(0.4, trim_density=0.21)
    ),  # 0.2 of the entries is a whole number, a step of the result
    "della": Entry(jm.della(0.5, weights=WEIGHTS), sorts=True),
    "della_linear": Entry(jm.della_linear(0.5, restore="l1", axis=0), reduces=True, sorts=True),
    "tsv_m": Entry(
        jm.tsv_m(0.7, weights=WEIGHTS), _bind(reference_spectral.tsv_m, scale=0.7), reduces=True, sorts=True
    ),
    "iso_c": Entry(
        jm.iso_c(0.7, weights=WEIGHTS), _bind(reference_spectral.iso_c, scale=0.7), reduces=True, sorts=True
    ),
    "iso_cts": Entry(
        jm.iso_cts(0.5, 0.7, weights=WEIGHTS),
        _bind(reference_spectral.iso_cts, common=0.5, scale=0.7),
        reduces=True,
        sorts=True,
    ),
    "enchtable": Entry(
        jm.enchtable(0.5, safety="code"),
        _bind(reference_spectral.enchtable, beta=0.5, gain=200.0),
        experts=2,
        reduces=True,
        sorts=True,
        scales=False,
    ),
    "wudi": Entry(
        jm.wudi(0.7, weights=WEIGHTS),
        _bind(reference_interference.of_matrices(reference_interference.wudi), scale=0.7),
        reduces=True,
        sorts=True,
    ),
    "doge": Entry(
        jm.doge(steps=20),
        _bind(reference_interference.doge, steps=20),
        reduces=True,
        sorts=True,
        scales=False,
        differentiates=False,
    ),
}
"""By name. `KEY` is what those that draw are given."""

KEY = 7
DETERMINISTIC = {name: entry for name, entry in EVERYTHING.items() if not entry.draws}
ONE_OF_EACH = ("linear", "slerp", "dare", "ties_per_tensor", "ties", "lines_measured", "widen", "tsv_m")
"""One for each way to be merged: plain arithmetic, sums and order statistics over a tensor and over the model, draws,
tensors needed whole, and their factorisations. For what methods themselves have no part in."""


def each(entries: dict[str, Entry]) -> pytest.MarkDecorator:
    """Runs a test with each entry. The tests of one entry share a worker, which compiles its programs once for all."""
    return pytest.mark.parametrize(
        "entry", [pytest.param(entry, id=name, marks=pytest.mark.xdist_group(name)) for name, entry in entries.items()]
    )
