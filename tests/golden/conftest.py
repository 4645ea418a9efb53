"""Golden cases run many programs on small tensors once, so the time of compiling them is nearly all there is."""

from collections.abc import Iterator

import jax
import pytest

OPTIMIZED = {"sce"}
"""Families that compare scores with a cut computed in another program: both must round alike."""


@pytest.fixture(autouse=True)
def compiled_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs are compiled without LLVM's expensive passes: in less than half of the time, for the same results."""
    case = getattr(request.node, "callspec", None)
    if case is not None and case.params.get("record", {}).get("family") in OPTIMIZED:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
