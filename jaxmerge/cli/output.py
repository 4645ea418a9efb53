"""What the commands print: tables, in natural order, and errors."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table as wide as the terminal, or as wide as it needs to be in a file."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for cell in head:
        table.add_column(cell, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:
        console.width = 1 + Console(width=10_000).measure(table).maximum
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def print_error(message: str) -> None:
    """Prints an error as one line, red where the terminal can."""
    from rich.console import Console

    line = f"error: {' '.join(message.split())}"
    Console(file=sys.stderr, soft_wrap=True).print(line, style="bold red", markup=False, highlight=False)


def natural_order(name: str) -> list[str | int]:
    """Sorting key: names as people sort them, with layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
