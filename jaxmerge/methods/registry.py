"""The table of methods: what there is, under which name, from which paper.

Everything but the table itself is read off the constructors: parameters from the signature, summary and source from
the docstring, granularity and needs from a method that they build. A new method is one file and one name here.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
from collections.abc import Callable, Iterator, Mapping

from jaxmerge.methods.adamerging import adamerging, keep_elected
from jaxmerge.methods.arcee_fusion import arcee_fusion
from jaxmerge.methods.averaging import linear, model_stock
from jaxmerge.methods.breadcrumbs import breadcrumbs, breadcrumbs_ties, keep_middle
from jaxmerge.methods.choosing import masked, partition, passthrough
from jaxmerge.methods.compeft import compeft, ternarize
from jaxmerge.methods.concrete import concrete_mask
from jaxmerge.methods.doge import doge
from jaxmerge.methods.dropping import dare, dare_ties, della, della_linear, drop, magprune
from jaxmerge.methods.emr import emr, recover
from jaxmerge.methods.enchtable import enchtable
from jaxmerge.methods.fisher_merge import fisher_merge
from jaxmerge.methods.interpolation import nearswap, slerp
from jaxmerge.methods.isotropic import iso_c, iso_cts
from jaxmerge.methods.lines import lines, scale_by_depth
from jaxmerge.methods.localization import consensus, keep_consensus, keep_needed, tall_mask
from jaxmerge.methods.method import Granularity, Method
from jaxmerge.methods.opcm import opcm
from jaxmerge.methods.pcb import pcb
from jaxmerge.methods.regmean import regmean
from jaxmerge.methods.sce import sce
from jaxmerge.methods.segments import segments
from jaxmerge.methods.self_positioning import self_positioning
from jaxmerge.methods.spherical import karcher, multislerp, nuslerp
from jaxmerge.methods.stages import Stage, chain
from jaxmerge.methods.task_arithmetic import scale, task_arithmetic, total, weigh
from jaxmerge.methods.ties import disjoint_max, disjoint_mean, disjoint_sum, elect_sign, rescale, ties, trim
from jaxmerge.methods.tsv import tsv_m
from jaxmerge.methods.widen import widen
from jaxmerge.methods.wudi import aswudi, optmerge, swudi, wudi

_METHODS: tuple[Callable[..., Method], ...] = (
    linear,
    slerp,
    nuslerp,
    multislerp,
    karcher,
    nearswap,
    model_stock,
    task_arithmetic,
    ties,
    dare,
    dare_ties,
    della,
    della_linear,
    breadcrumbs,
    breadcrumbs_ties,
    sce,
    pcb,
    widen,
    consensus,
    tall_mask,
    emr,
    compeft,
    arcee_fusion,
    tsv_m,
    iso_c,
    iso_cts,
    wudi,
    optmerge,
    swudi,
    aswudi,
    doge,
    enchtable,
    opcm,
    fisher_merge,
    regmean,
    adamerging,
    self_positioning,
    lines,
    passthrough,
    segments,
    chain,
    partition,
    masked,
)
_STAGES: tuple[Callable[..., Stage], ...] = (
    weigh,
    trim,
    drop,
    magprune,
    keep_middle,
    rescale,
    elect_sign,
    keep_elected,
    total,
    disjoint_mean,
    disjoint_sum,
    disjoint_max,
    scale,
    scale_by_depth,
    keep_consensus,
    keep_needed,
    recover,
    ternarize,
    concrete_mask,
)


@dataclasses.dataclass(frozen=True)
class MethodEntry:
    """A method or a stage of the table.

    Attributes:
        constructor: the function that builds it, such as `jm.ties`.
    """

    constructor: Callable[..., Method | Stage]

    @property
    def name(self) -> str:
        """Its name, in Python and in recipes."""
        return self.constructor.__name__

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Its parameters by name, with their defaults."""
        return inspect.signature(self.constructor).parameters

    @property
    def signature(self) -> str:
        """Its parameters as one writes them: `density=0.2, scale=1.0, …`."""
        return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in self.parameters.values())

    @property
    def doc(self) -> str:
        """Its documentation."""
        return inspect.getdoc(self.constructor) or ""

    @property
    def summary(self) -> str:
        """The first sentence of its documentation, without the formula."""
        first = re.split(r"\.\s|\n\n|\$", self.doc, maxsplit=1)[0]
        return " ".join(first.split()).rstrip(":. ")

    @property
    def source(self) -> str:
        """The paper or program that it comes from; empty where it is from neither."""
        found = re.search(r"Source: (.*?)(?:[.;:](?:\s|$)|$)", self.doc, re.DOTALL)
        if found:
            return " ".join(found[1].split())
        like = re.search(r"(?:arguments as for|Args are those of) `(\w+)`", self.doc)
        return list_methods()[like[1]].source if like else ""

    @property
    def granularity(self) -> Granularity | None:
        """How much of a model it sees at once, with its default parameters; None for stages and combinations."""
        example = self._example()
        return None if example is None else example.granularity

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be given besides experts, with its default parameters: `"base"`, `"key"`."""
        example = self._example()
        if example is None:
            return ()
        return ("base",) * example.needs_base + ("key",) * example.draws

    def _example(self) -> Method | None:
        """The method with its default parameters, 0.5 for required numbers; None where parts must be given."""
        required = [p for p in self.parameters.values() if p.default is p.empty]
        if self.constructor in _STAGES or any(p.annotation != "Coefficient" for p in required):
            return None
        example = self.constructor(**{p.name: 0.5 for p in required})
        return example if isinstance(example, Method) else None


class MethodTable(Mapping[str, MethodEntry]):
    """Methods, then stages, by name. It prints as a table, in a terminal and in a notebook."""

    HEAD = ("name", "parameters", "granularity", "needs", "source", "what it does")

    def __init__(self, entries: Mapping[str, MethodEntry]):
        self._entries = entries

    def __getitem__(self, name: str) -> MethodEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def rows(self) -> list[tuple[str, ...]]:
        """The table: one row of text per entry, in the columns of `HEAD`."""
        rows = []
        for entry in self._entries.values():
            granularity = "" if entry.granularity is None else entry.granularity.value
            needs = ", ".join(entry.needs)
            rows.append((entry.name, entry.signature, granularity, needs, entry.source, entry.summary))
        return rows

    def __repr__(self) -> str:
        return "\n".join(f"{name:<18}{source:<30.28}{summary}" for name, _, _, _, source, summary in self.rows())

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{cell}</th>" for cell in self.HEAD)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self.rows())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def list_methods() -> MethodTable:
    """All methods and stages: `list_methods()["ties"]` is the entry of `jm.ties`.

    Returns:
        A mapping name → entry with `parameters`, `summary`, `source`, `granularity`, `needs` and `constructor`.
    """
    return MethodTable({f.__name__: MethodEntry(f) for f in (*_METHODS, *_STAGES)})
