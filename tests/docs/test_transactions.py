"""The page on outputs and model stores: its code runs."""

from pathlib import Path

from tests.docs.code_blocks import code_blocks, run_python_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "transactions.md"


def test_its_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_python_blocks(PAGE)
    assert [version.number for version in found["store"].versions("chat")] == [2, 1]
    (commands,) = code_blocks(PAGE, "sh")
    assert all(line.startswith("jaxmerge ") for line in commands.text.splitlines())
