"""A bar for work that counts steps, with a word on how it goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def counting(progress: bool | None, what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """Shows a bar for the time of the block.

    Args:
        progress: whether to show it; None shows it where it can be seen, in a terminal or a notebook.
        what: the activity.
        total: number of steps, None where it is not known.

    Yields:
        A function to be told how many more steps are done, and how it goes.
    """
    if progress is False:
        yield lambda n, text: None
        return
    import rich.progress as rp
    from rich.console import Console

    console = Console(stderr=True)
    if progress is None and not (console.is_terminal or console.is_jupyter):
        yield lambda n, text: None
        return
    columns = (rp.TextColumn("{task.description}"), rp.BarColumn(), rp.MofNCompleteColumn(), rp.TimeRemainingColumn())
    with rp.Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total)

        def advance(n: int, text: str) -> None:
            bar.update(task, advance=n, description=f"{what}: {text}" if text else what)

        yield advance
