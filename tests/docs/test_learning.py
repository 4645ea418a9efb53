"""The page on learning coefficients does what it says."""

from pathlib import Path

import numpy as np

import jaxmerge as jm
from tests.docs.code_blocks import run_python_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "learning.md"


def test_its_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_python_blocks(PAGE)
    loss = jm.entropy(found["logits"])
    before = jm.merge(jm.adamerging(), found["experts"], base=found["base"])
    assert loss(found["merged"], found["images"]) < 0.99 * loss(before, found["images"])
    assert found["rest"].history["step"].tolist() == list(range(20, 40))
    on_disk, experts, base = found["on_disk"], found["experts"], found["base"]
    streamed = jm.open_checkpoint("learned").params
    for name, value in jm.merge(on_disk.method, experts, base=base).items():
        np.testing.assert_array_max_ulp(np.asarray(streamed[name]), np.asarray(value), maxulp=2)
    assert found["careful"].state.step <= 60
