"""What is shown while a checkpoint is written: a bar in a terminal or notebook, nothing elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.progress


class Progress:
    """Something that is told what is done, from any thread. This one shows nothing."""

    def say(self, text: str) -> None:
        """Shows a line."""

    def begin(self, what: str, total: int) -> None:
        """Begins an activity that processes `total` bytes."""

    def advance(self, n: int) -> None:
        """Counts n more bytes of it as done."""


class _Bar(Progress):
    def __init__(self, bar: rich.progress.Progress):
        self._bar = bar
        self._current: Any = None

    def say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def begin(self, what: str, total: int) -> None:
        self._current = self._bar.add_task(what, total=total)

    def advance(self, n: int) -> None:
        self._bar.advance(self._current, n)


@contextlib.contextmanager
def showing(progress: bool | None) -> Iterator[Progress]:
    """A progress display for the time of the block.

    Args:
        progress: whether to show one; None shows it where it can be seen, in a terminal or a notebook.
    """
    if progress is False:
        yield Progress()
        return
    import rich.progress as rp
    from rich.console import Console

    console = Console(stderr=True)
    if progress is None and not (console.is_terminal or console.is_jupyter):
        yield Progress()
        return
    shown = (rp.TextColumn("{task.description}"), rp.BarColumn(), rp.DownloadColumn(True), rp.TransferSpeedColumn())
    with rp.Progress(*shown, rp.TimeRemainingColumn(), console=console) as bar:
        yield _Bar(bar)
