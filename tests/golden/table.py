"""The whole table: the rows of all families, and what no row is there for yet.

A new family moves from `NOT_IMPLEMENTED` to the rows of one of these files, with its recorded files in `data/`.
"""

import re
from collections.abc import Callable
from typing import Any

from tests.golden import (
    calls,
    continual_calls,
    interference_calls,
    learning_calls,
    omp_calls,
    spectral_calls,
    statistics_calls,
    subspace_calls,
)
from tests.golden.calls import FUSION_BENCH

ROWS: dict[tuple[str, str, str], Callable[..., Any]] = (
    calls.ROWS
    | omp_calls.ROWS
    | spectral_calls.ROWS
    | continual_calls.ROWS
    | interference_calls.ROWS
    | learning_calls.ROWS
    | statistics_calls.ROWS
    | subspace_calls.ROWS
)

NOT_IMPLEMENTED: frozenset[Any] = frozenset(
    {
        "alignment",
        ("lora", FUSION_BENCH),  # KnOTS
        ("lora", "gstoica27/KnOTS"),
        "peft",
    }
)


def our_call(record: dict[str, Any]) -> Any:
    """Our call for a recorded one.

    Raises:
        LookupError: no row, or more than one, fits the reference.
        TypeError, KeyError: a parameter or a value that the row does not know.
    """
    reference = record["reference"]
    rows = [
        make
        for (family, implementation, pattern), make in ROWS.items()
        if (family, implementation) == (record["family"], reference["implementation"])
        and re.fullmatch(pattern, reference["call"])
    ]
    if len(rows) != 1:
        raise LookupError(
            f"{len(rows)} rows for {record['family']}, {reference['implementation']}, {reference['call']!r}"
        )
    return rows[0](**{"lambda_" if name == "lambda" else name: value for name, value in record["params"].items()})
