"""The page on writing a method: its code runs, and does what the page says."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge as jm
from tests.docs.code_blocks import run_python_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "first-method.md"


def test_blocks_run_and_do_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_python_blocks(PAGE)
    experts, base = names["experts"], names["base"]

    median = np.median([expert["w"] for expert in experts], axis=0)
    np.testing.assert_array_equal(jm.merge(names["median"](), experts)["w"], median)
    np.testing.assert_array_equal(np.asarray(jm.open_checkpoint("median").params["w"]), median)

    equalized = jm.chain(names["equalize_norms"](), jm.total())
    norms = [float(jnp.linalg.norm(expert["w"])) for expert in experts]
    expected = sum(np.mean(norms) / norm * np.asarray(expert["w"]) for norm, expert in zip(norms, experts, strict=True))
    np.testing.assert_allclose(jm.merge(equalized, experts, base=base)["w"], expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(float(names["slope"])) and float(names["slope"]) != 0
    assert jax.tree.leaves(names["equalize_norms"](0.5)) == [0.5]
