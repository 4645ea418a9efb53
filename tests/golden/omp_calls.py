"""The calls of family `omp`: rows for the table in `calls.py`."""

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxmerge.methods.transplant import matching_pursuit
from tests.golden.golden_set import Case, Tensors


@dataclasses.dataclass(frozen=True)
class Pursuit:
    """Targets written as combinations of a donor's rows, and the same combinations of a model's rows.

    Attributes:
        atoms: how many rows are combined.
    """

    atoms: int

    def outputs(self, case: Case) -> Tensors:
        given = case.given
        indices, coefficients = matching_pursuit(given["targets"], given["donor_shared"], self.atoms)
        chosen, weights = np.asarray(indices), np.asarray(coefficients)
        # Compared within a tolerance by others, but the atoms and their order are exact.
        np.testing.assert_array_equal(chosen, case.wanted["indices"])
        transplanted = np.einsum("ba,bad->bd", weights, given["model_shared"][chosen])
        return {"indices": chosen, "coefficients": weights, "transplanted": transplanted}


def mergekit_omp(k: int) -> Pursuit:
    return Pursuit(k)


ROWS: dict[tuple[str, str, str], Callable[..., Pursuit]] = {
    ("omp", "arcee-ai/mergekit", r"tokensurgeon\.omp\.batch_omp\(targets, donor_shared, k\)"): mergekit_omp,
}
