"""The page on merging while loading does what it says."""

from pathlib import Path

import jax
import numpy as np

import jaxmerge as jm
from tests.docs.code_blocks import run_python_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sharded-loading.md"


def test_its_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_python_blocks(PAGE)
    models = {name: jm.open_checkpoint(name).load() for name in ("base", "math", "code")}
    experts = [models["math"], models["code"]]
    wanted = jm.named_leaves(found["naming"](jm.merge(jm.task_arithmetic(0.5), experts, base=models["base"])))
    state = jm.named_leaves(found["state"])
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(state[name], value, rtol=3e-7, atol=3e-7)  # two units in the last place
    kernel = found["model"].model.layers[0].mlp.down_proj.kernel
    assert kernel.get_value().sharding.spec == jax.sharding.PartitionSpec("model", None)
