"""The page on costs does what it says."""

from pathlib import Path

from tests.docs.code_blocks import run_python_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def test_its_blocks_run():
    found = run_python_blocks(PAGE)
    large = found["llama"](80, 8192, 28672, 1024, 128256)
    sizes = [leaf.size for leaf in large.values()]
    assert f"{sum(sizes) / 1e9:.1f} G parameters" in PAGE.read_text()
