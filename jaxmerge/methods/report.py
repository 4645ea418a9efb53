"""What happened to each tensor of a merge: a table in a terminal, HTML in a notebook, and a plot."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One tensor of a merge.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: its dtype.
        action: `"merged"`, or `"copied"` for tensors that are not floating point.
        notes: what was counted: `squared_norms` `[K]` and `squared_merged_norm` relative to the base (or the first
            expert without one); for task-vector methods `kept` `[K]`, the entries that survived in each expert, and
            `conflicts`, the entries whose surviving signs differ.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: str
    notes: dict[str, Any]

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """A merge in memory, tensor by tensor.

    Attributes:
        experts: names of the experts.
        tensors: one entry per tensor.
    """

    experts: tuple[str, ...]
    tensors: list[TensorReport]

    def rows(self) -> list[tuple[str, ...]]:
        """The table: name, shape, action, norm of each task vector, norm of the merged one, kept share, conflicts."""
        rows = []
        for tensor in self.tensors:
            notes = tensor.notes
            norms = " ".join(f"{math.sqrt(float(x)):.3g}" for x in notes.get("squared_norms", ()))
            merged = f"{math.sqrt(float(notes['squared_merged_norm'])):.3g}" if "squared_merged_norm" in notes else ""
            kept = " ".join(f"{float(x) / max(tensor.size, 1):.0%}" for x in notes.get("kept", ()))
            conflicts = f"{float(notes['conflicts']) / max(tensor.size, 1):.1%}" if "conflicts" in notes else ""
            shape = f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]"
            rows.append((tensor.name, shape, tensor.action, norms, merged, kept, conflicts))
        return rows

    _HEAD = ("tensor", "type", "action", "norms of task vectors", "merged norm", "kept", "sign conflicts")

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(*self._HEAD, title=f"merged {len(self.tensors)} tensors of {', '.join(self.experts)}")
        for row in self.rows():
            table.add_row(*row)
        console = Console(width=140, file=None, record=False)
        with console.capture() as captured:
            console.print(table)
        return captured.get()

    def __repr__(self) -> str:
        merged = sum(tensor.action == "merged" for tensor in self.tensors)
        copied = len(self.tensors) - merged
        return f"MergeReport({merged} tensors merged, {copied} copied, experts {', '.join(self.experts)})"

    def _repr_html_(self) -> str:
        from html import escape

        head = "".join(f"<th>{escape(cell)}</th>" for cell in self._HEAD)
        body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in self.rows())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def plot(self) -> Figure:
        """A bar per tensor: the norm of the merged task vector beside the mean norm of the experts' (extra `plot`)."""
        from matplotlib.figure import Figure

        merged = [tensor for tensor in self.tensors if tensor.action == "merged"]
        figure = Figure(figsize=(8, 1 + 0.22 * len(merged)), layout="constrained")
        axes = figure.subplots()
        places = range(len(merged))
        means = [sum(math.sqrt(float(x)) for x in t.notes["squared_norms"]) / len(self.experts) for t in merged]
        axes.barh([p - 0.2 for p in places], means, height=0.4, label="experts (mean)")
        result = [math.sqrt(float(t.notes["squared_merged_norm"])) for t in merged]
        axes.barh([p + 0.2 for p in places], result, height=0.4, label="merged")
        axes.set_yticks(list(places), [tensor.name for tensor in merged], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("distance from the base (L2 norm)")
        axes.legend()
        return figure
