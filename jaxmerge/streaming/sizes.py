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


def parse_share(size: int | str, total: int, what: str) -> int:
    """A number of bytes, maybe none, or a percentage.

    Args:
        size: a number, text such as `"2GiB"`, or a share of the total such as `"10%"`.
        total: what the percentage is of.
        what: what it is, for the message.

    Raises:
        RecipeError: it is none of these, or negative, or more than 100 %.
    """
    text = str(size).strip()
    if re.fullmatch(r"0+(\.0+)?\s*%?", text):
        return 0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    if found is None:
        return parse_bytes(size, what)
    if float(found[1]) > 100:
        raise RecipeError(f"{what} is {size!r}, expected at most 100%")
    return int(total * float(found[1]) / 100)


def format_bytes(n: float) -> str:
    """Four digits and a unit: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} TiB"
