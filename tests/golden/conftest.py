"""Golden cases run many programs on small tensors once, so the time of compiling them is nearly all there is."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    """Programs are compiled without LLVM's expensive passes: in less than half of the time, for the same results."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
