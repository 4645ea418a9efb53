"""Running the code blocks of a Markdown page as a reader would: from top to bottom, in one namespace."""

import re
from pathlib import Path
from typing import Any, NamedTuple


class Block(NamedTuple):
    language: str
    line: int  # number of lines before it
    text: str


def code_blocks(page: Path, *languages: str) -> list[Block]:
    """The page's fenced blocks in some languages, in order."""
    text = page.read_text()
    fenced = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], text[: m.start(2)].count("\n"), m[2]) for m in fenced if m[1] in languages]


def run_python_blocks(page: Path) -> dict[str, Any]:
    """Runs the page's Python blocks and returns their namespace; a traceback shows the page's own line numbers."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in code_blocks(page, "python"):
        exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
    return namespace
