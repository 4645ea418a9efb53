"""The page on merging with statistics does what it says."""

from pathlib import Path

from tests.docs.code_blocks import run_python_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "statistics.md"


def test_its_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_python_blocks(PAGE)
    assert set(found["grams"]["maths"]) == {"params/Dense_0/kernel", "params/Dense_1/kernel"}
    assert found["report"].path
