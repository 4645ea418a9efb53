"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

from jaxmerge.errors import RecipeError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(size: int | str, what: str) -> int:
    """A number of bytes.

    Args:
        size: a number, or text such as `"512MiB"`, `"5GB"` or `"1.5 GiB"`.
        what: what it is, for the message.

    Raises:
        RecipeError: it is neither, or not positive.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", str(size).strip().lower())
    n = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if n <= 0:
        raise RecipeError(f"{what} is {size!r}, expected a number of bytes or text such as '512MiB'")
    return n


def format_bytes(n: float) -> str:
    """Four digits and a unit: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} TiB"
