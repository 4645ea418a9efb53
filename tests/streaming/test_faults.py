"""What killed processes, full disks and races leave behind: the old version or the new one, and nothing else.

The faults are made by `faults.py`, in a process that can fork. It runs once for all tests here.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxmerge as jm

ROOT = Path(__file__).resolve().parents[2]
MEMORY = Path("/dev/shm")  # killing a process tries nothing of the disk, and there fsync costs nothing


@pytest.fixture(scope="module")
def told() -> Iterator[dict[str, Any]]:
    """What `faults.py` tells: for each kind of fault figures, and the rules that were broken."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as path:
        folder = Path(path)
        models = []
        for name in "xy":
            params: dict[str, Any] = {"a": rng.normal(size=(8, 5)).astype(np.float32), "ids": np.arange(4)}
            models.append(jm.save_checkpoint(folder / name, params))
        for name, weights in {"old": [1.0, 3.0], "new": [1.0, 1.0]}.items():
            jm.merge_checkpoint(jm.linear(weights=weights), models, out=folder / name, progress=False)
        command = [sys.executable, "-m", "tests.streaming.faults", path]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout)


@pytest.mark.parametrize(
    "fault, least",
    [
        ("kill_commits", {"steps": 40, "recoveries": 30}),
        ("kill_first", {"steps": 40}),
        ("kill_at_random", {"killed": 40}),
        ("kill_gc", {"steps": 8}),
        ("fill_disk", {"once": 35, "from then on": 35}),
        ("race", {"conflicts": 3}),
        ("kill_overwrites", {"steps": 20}),
        ("kill_overwrites_by_renames", {"steps": 20, "missing": 1}),
        ("watch_overwrites", {"looks": 50}),
        ("order", {"renames": 4}),
    ],
)
def test_old_or_new_and_nothing_else(told: dict[str, Any], fault: str, least: dict[str, int]) -> None:
    found = told[fault]
    assert not found["broken"], "\n".join(found["broken"])
    for what, number in least.items():  # otherwise too little was tried
        assert found["figures"][what] >= number, (what, found)


def test_an_exchange_leaves_no_gap(told: dict[str, Any]) -> None:
    assert told["kill_overwrites"]["figures"]["missing"] == 0
