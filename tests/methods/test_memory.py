"""What docs/memory.md states holds: memory of the compiled programs, and how often inputs are read."""

import re
from pathlib import Path

import pytest

import jaxmerge as jm
from benchmarks._memory import working_set
from jaxmerge.methods import enchtable, isotropic, tsv
from tests.public import public_names

PAGE = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
NAMES = {**vars(enchtable), **vars(isotropic), **vars(tsv), **public_names()}
TABLE = re.findall(r"^\| (`.*`) \| (.*) \| (\d) \| (\d) \|(.*)\|$", PAGE, re.MULTILINE)
ROWS = {call: row for calls, *row in TABLE for call in re.findall(r"`([^`]+)`", calls)}
COMPILED = (
    "linear()",
    "task_arithmetic()",
    "dare()",
    "multislerp()",
    "karcher()",
    "model_stock()",
    'ties(scope="tensor")',
    "sce()",
    "pcb()",
    "tsv_m()",
)  # the cheap ones, and one for each kind of measurement
EXPERTS, SHAPE = 4, (96, 96)
SMALL = 0.1  # what scalars, ranks and counts take beside tensors this small


def method(call: str) -> jm.Method:
    return eval(call, NAMES)


@pytest.mark.parametrize("call", COMPILED)
def test_temporary_memory(call):
    stated = eval(re.sub(r"(\d) K", r"\1 * K", ROWS[call][0]), {"K": EXPERTS})
    found = working_set(method(call), EXPERTS, SHAPE)
    assert found.temporary <= stated + SMALL
    assert found.inputs == pytest.approx(EXPERTS + 1, abs=SMALL)
    assert found.output == pytest.approx(1, abs=SMALL)


@pytest.mark.parametrize("call", ["linear()", "multislerp()", "karcher()"])
def test_without_a_base(call):
    found = working_set(method(call), EXPERTS, SHAPE, with_base=False)
    assert found.temporary <= (EXPERTS + 1) / 4 + SMALL
    assert found.inputs == pytest.approx(EXPERTS, abs=SMALL)


def test_the_table_has_rows():
    assert len(ROWS) > 20
    assert set(COMPILED) <= set(ROWS)


@pytest.mark.parametrize("call", ROWS)
def test_readings(call):
    """A tensor is measured and merged from one reading where it fits; a measurement over the model is its own."""
    _, fits, larger, whole = ROWS[call]
    found = method(call)
    assert int(fits) == 1 + found.passes.count("model")
    assert int(larger) == 1 + len(found.passes)
    assert bool(whole.strip()) == found.whole_tensor
