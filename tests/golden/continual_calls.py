"""Our calls for the recorded ones of the family `continual`: experts merged one after the other."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxmerge as jm
from tests.golden.golden_set import Case, Tensors


@dataclasses.dataclass(frozen=True)
class OneByOne:
    """OPCM of a bundle's experts in order, as outputs `after<n>/<tensor>`: as a state that grows, and as a method.

    Attributes:
        alpha: of `jm.opcm`.
    """

    alpha: float

    def outputs(self, case: Case) -> Tensors:
        state, found = jm.opcm_start(jax.device_put(case.base)), {}
        for n, expert in enumerate(case.experts, 1):
            state = jm.opcm_add(state, jax.device_put(expert), alpha=self.alpha)
            found |= {f"after{n}/{name}": value for name, value in jax.device_get(state.params()).items()}
        merged = jm.merge(jm.opcm(self.alpha), case.experts, base=case.base)
        for name, value in jax.device_get(merged).items():
            np.testing.assert_allclose(value, found[f"after{len(case.experts)}/{name}"], 1e-5, 1e-6, err_msg=name)
        return found


def fusion_bench_opcm(alpha: float) -> OneByOne:
    return OneByOne(alpha)


ROWS: dict[tuple[str, str, str], Callable[..., Any]] = {
    ("continual", "tanganke/fusion_bench", r"OPCM\.run \(order e0, e1, \.\.\.\)"): fusion_bench_opcm,
}
