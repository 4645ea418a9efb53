"""The page on search without gradients does what it says."""

from pathlib import Path

import jax

from tests.docs.code_blocks import run_python_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "search.md"


def test_its_blocks_run():
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        found = run_python_blocks(PAGE)
    accuracy, experts = found["accuracy"], found["experts"]
    alone = max(float(accuracy(expert)) for expert in experts.values())
    assert found["swept"].scores.max() > alone
    assert found["found"].score > alone
    assert found["evolved"].score > alone
    assert abs(float(accuracy(found["again"])) - found["evolved"].score) < 0.005
