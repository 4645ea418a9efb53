"""What streaming a checkpoint took: a table in a terminal, HTML in a notebook."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmerge.streaming.budget import AccessPlan
from jaxmerge.streaming.sizes import format_bytes


@dataclasses.dataclass(frozen=True)
class StreamReport:
    """A checkpoint that was written by streaming.

    Attributes:
        path: where it stands: a path, or a URL as text.
        tensors: number of tensors in it, tied ones counted once.
        merged: how many of those were merged; the others were copied.
        bytes_read: bytes fetched, without headers, from each checkpoint that was given by path or opened, by the
            expert's name (`"the base"` for the base). What was given as a tree is not counted.
        bytes_written: bytes of tensors written.
        seconds: wall time by phase: `open` (and check), `choose` (what is read within an I/O budget), `plan` (and
            compile), `stream` (read, compute, write), `publish` (make durable and rename, or upload).
        worker_seconds: time of all workers together in the phase `stream`, by activity: `read`, `compute`, `hash`
            (of what is written, for the manifest), `write`.
        workers: number of workers.
        memory_planned: bytes that the work was planned to need at most, beside the libraries; within `memory_budget`.
        memory_peak: largest resident memory of this process since it started, libraries included, in bytes.
        io_plan: the blocks that were read from the experts within an I/O budget; None without one. What was fetched is
            in `bytes_read`, what was planned in `io_plan.planned`; the first is never more.
        bytes_analysed: bytes read before that, from each checkpoint by name, for statistics that no catalog had.
        resumed: how many tensors a killed run had written; they were read back, and not counted in `bytes_written`.
        reused: how many tensors were copied from an earlier output.
        reused_blocks: how many blocks of other tensors, of which the rest was merged.
        processes: how many processes shared the work. Bytes, seconds of workers and their number are those of all
            together, memory is that of the one with the most, and phases are as process 0 saw them.
    """

    path: Any
    tensors: int
    merged: int
    bytes_read: Mapping[str, int]
    bytes_written: int
    seconds: Mapping[str, float]
    worker_seconds: Mapping[str, float]
    workers: int
    memory_planned: int
    memory_peak: int
    io_plan: AccessPlan | None = None
    bytes_analysed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    resumed: int = 0
    reused: int = 0
    reused_blocks: int = 0
    processes: int = 1

    def rows(self) -> list[tuple[str, str]]:
        """The table: what, how much."""
        total = sum(self.seconds.values())
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in self.seconds.items())
        activities = ", ".join(f"{activity} {seconds:.2f}" for activity, seconds in self.worker_seconds.items())
        analysed, plan = sum(self.bytes_analysed.values()), self.io_plan
        planned = {} if plan is None else {name: f" ({format_bytes(n)} planned)" for name, n in plan.planned.items()}
        among = "" if self.processes == 1 else f" in {self.processes} processes"
        return [
            ("tensors", f"{self.merged} merged, {self.tensors - self.merged} copied"),
            *([("taken over from a killed run", f"{self.resumed} tensors")] if self.resumed else []),
            *([("copied from an earlier output", self._copied())] if self.reused or self.reused_blocks else []),
            *([("read before, for statistics", format_bytes(analysed))] if analysed else []),
            *((f"read from {name}", format_bytes(n) + planned.get(name, "")) for name, n in self.bytes_read.items()),
            *([] if plan is None else [row for row in plan.rows() if not row[0].startswith("planned from")]),
            ("written", format_bytes(self.bytes_written)),
            ("seconds", f"{total:.2f} ({phases})"),
            (f"seconds of {self.workers} workers" + among, activities),
            ("memory planned", format_bytes(self.memory_planned)),
            ("peak memory of the process", format_bytes(self.memory_peak)),
        ]

    def _copied(self) -> str:
        blocks = f" and {self.reused_blocks} blocks of others" if self.reused_blocks else ""
        return f"{self.reused} tensors{blocks}"

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=str(self.path), title_justify="left", show_header=False)
        for row in self.rows():
            table.add_row(*row)
        console = Console(width=max(100, len(str(self.path)) + 4))
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip("\n")

    def __repr__(self) -> str:
        return (
            f"StreamReport({str(self.path)!r}: {self.tensors} tensors, "
            f"{format_bytes(sum(self.bytes_read.values()))} read, {format_bytes(self.bytes_written)} written, "
            f"{sum(self.seconds.values()):.2f} s)"
        )

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in self.rows())
        return f"<table><caption>{html.escape(str(self.path))}</caption><tbody>{rows}</tbody></table>"


def peak_memory() -> int:
    """Largest resident memory of this process since it started, in bytes."""
    with contextlib.suppress(OSError):  # Linux; getrusage would tell of the program that started this one, too
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
