"""Reading a set of golden vectors: inputs, parameters and outputs recorded from published implementations.

The set in `data/` holds the families that have a row in `table.ROWS`. The environment variable JAXMERGE_GOLDEN names
another folder of the same format.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded call.

    Attributes:
        record: the case as it stands in the index.
        base: the base model's tensors; empty where the case has inputs of its own.
        experts: the experts' tensors.
        given: inputs that belong to this case only.
        wanted: output name → recorded array.
    """

    record: dict[str, Any]
    base: Tensors
    experts: list[Tensors]
    given: Tensors
    wanted: Tensors

    @property
    def half_precision(self) -> bool:
        return any(x.dtype == ml_dtypes.bfloat16 for x in self.base.values())

    def of_tensors(self, names: Sequence[str]) -> Case:
        """The case with the outputs of these tensors of the base only, and with those that are of no one tensor."""
        others = self.base.keys() - set(names)
        return dataclasses.replace(
            self, wanted={n: x for n, x in self.wanted.items() if n.split("/")[-1] not in others}
        )

    def with_inputs(self, names: Container[str]) -> Case:
        """The case with these tensors of base and experts only."""
        base, *experts = [{n: x for n, x in model.items() if n in names} for model in (self.base, *self.experts)]
        return dataclasses.replace(self, base=base, experts=experts)


class GoldenSet:
    """A folder of golden vectors."""

    def __init__(self, root: Path):
        self.root = root
        self.index = json.loads((root / "index.json").read_text())
        self._file = functools.cache(lambda name: np.load(root / name))

    def case(self, record: dict[str, Any]) -> Case:
        base, experts = {}, []
        if record["bundle"] is not None:
            bundle = self.index["bundles"][record["bundle"]]
            base = self._tensors(bundle["file"], bundle["base"]) if "base" in bundle else {}
            experts = [self._tensors(bundle["file"], expert) for expert in bundle["expert"]]
        inputs = record.get("inputs", {"file": "", "arrays": {}})
        wanted = self._tensors(record["outputs"]["file"], record["outputs"]["arrays"])
        return Case(record, base, experts, self._tensors(inputs["file"], inputs["arrays"]), wanted)

    def _tensors(self, file: str, entries: dict[str, dict[str, Any]]) -> Tensors:
        return {name: self._array(file, entry) for name, entry in entries.items()}

    def _array(self, file: str, entry: dict[str, Any]) -> np.ndarray:
        stored = self._file(file)[entry["key"]]
        return stored.view(ml_dtypes.bfloat16) if entry["dtype"] == "bfloat16" else stored


GOLDEN = GoldenSet(Path(os.environ.get("JAXMERGE_GOLDEN") or Path(__file__).parent / "data"))
