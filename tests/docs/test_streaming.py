"""The page on merging within an I/O budget does what it says."""

from pathlib import Path

from tests.docs.code_blocks import run_python_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "streaming.md"


def test_its_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_python_blocks(PAGE)
    plan = found["plan"]
    assert plan.digest == found["report"].io_plan.digest
    assert plan.kept > 0.8 and plan.bound < plan.merged_norm
