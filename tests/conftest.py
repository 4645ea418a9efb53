"""How every test runs: eight simulated devices, strict promotion, reproducible examples, programs compiled once.

This file is loaded before any test, so nothing has touched a JAX backend or loaded SciPy's OpenBLAS (which JAX's
factorisations use on the CPU) yet; afterwards these settings would come too late.
"""

import os
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # two threads on two busy cores make one SVD ten times slower
os.environ["JAX_PLATFORMS"] = "cpu"  # also for the processes that tests start
# Most of the suite's time is XLA compiling. The workers share what each has compiled, and the next run finds it again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Examples take as long as a compilation takes, so there is no deadline per example.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file share a worker, and so its programs and fixtures, unless they are grouped otherwise."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
