"""Merging again by blocks: of a tensor in which something has changed, the blocks in which nothing has are copied."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.cli.main import main
from jaxmerge.streaming.catalog import open_catalog
from jaxmerge.streaming.content import BLOCK_BYTES, ContentHash
from jaxmerge.streaming.manifest import load_manifest, verify_checkpoint

STEP = BLOCK_BYTES // 4  # entries of a block of float32
SIZE = 11 * STEP // 2  # five blocks and a half
BLOCKS = 6
COUNTER = itertools.count()


class Family:
    """A base, experts and a catalog that knows them."""

    def __init__(self, folder: Path, dtype: Any = np.float32):
        self.folder, self.dtype, self.catalog = folder, dtype, open_catalog(None)
        self.trees: dict[str, np.ndarray] = {}
        self.paths: dict[str, Path] = {}
        for seed, name in enumerate(("base", "a", "b")):
            noise = np.random.default_rng(seed).normal(size=SIZE)
            self.add(name, noise if name == "base" else self.trees["base"].astype(float) + 0.1 * noise)

    def add(self, name: str, values: np.ndarray) -> None:
        self.trees[name] = values.astype(self.dtype)
        tree = {"w": self.trees[name].reshape(11, -1), "small": self.trees[name][:10]}
        self.paths[name] = jm.save_checkpoint(self.folder / f"model-{next(COUNTER)}", tree)
        if name != "base":
            self.catalog.add(self.paths["base"], {name: self.paths[name]})

    def change(self, name: str, places: set[int]) -> None:
        """Saves an expert with other entries in a few places."""
        values = self.trees[name].copy()
        values[sorted(places)] += 1
        self.add(name, values)

    def merge(self, method: jm.Method, **options: Any) -> Any:
        """Merges; with `reuse` (or any catalog) it asks the catalog."""
        experts = {name: path for name, path in self.paths.items() if name != "base"}
        out = self.folder / f"out-{next(COUNTER)}"
        given = {"base": self.paths["base"], "out": out, "progress": False} | options
        return jm.merge_checkpoint(method, experts, **given)


def copied(report: Any) -> set[int]:
    """The numbers of the blocks of `w` that were copied."""
    found = load_manifest(report.path).run.copied
    assert found is not None
    return set(range(BLOCKS)) if "w" in found.tensors else set(found.blocks.get("w", ()))


def same(one: Any, other: Any) -> bool:
    file = "model.safetensors"
    told = [load_manifest(report.path).output for report in (one, other)]
    return (one.path / file).read_bytes() == (other.path / file).read_bytes() and told[0] == told[1]


places = st.sets(st.integers(0, SIZE - 1), max_size=3)


@settings(max_examples=8)
@given(moved=places, added=st.none() | places, name=st.sampled_from(["a", "b"]))
def test_only_blocks_that_depend_on_a_change_are_read(
    tmp_path_factory: pytest.TempPathFactory, moved: set[int], added: set[int] | None, name: str
) -> None:
    family, method = Family(tmp_path_factory.mktemp("family")), jm.task_arithmetic(0.3)
    first = family.merge(method, catalog=family.catalog)
    if moved:
        family.change(name, moved)
    if added is not None:  # an expert that is the base but for a few entries
        family.add("new", family.trees["base"])
        family.change("new", added)
    again = family.merge(method, catalog=family.catalog, reuse=first.path)
    assert same(again, family.merge(method))
    changed = {place // STEP for place in moved | (added or set())}
    assert copied(again) == set(range(BLOCKS)) - changed
    entries = sum(min(STEP, SIZE - number * STEP) for number in changed)
    small = 10 if any(place < 10 for place in moved | (added or set())) else 0
    assert set(again.bytes_read.values()) == {4 * (entries + small)}
    assert again.reused == 2 - bool(changed) - bool(small)
    assert again.reused_blocks == (BLOCKS - len(changed) if changed else 0)
    assert verify_checkpoint(again.path) == ()


@pytest.mark.parametrize(
    ("method", "options", "changed"),
    [
        (jm.linear(), {}, {3}),
        (jm.dare(0.5), {"key": 1}, {3}),
        (jm.task_arithmetic(weights=[0.3, 0.5]), {"dtype": "bfloat16"}, {1}),  # a block of it is two of the inputs'
        (jm.task_arithmetic(0.3), {"dtype": "float64"}, {6, 7}),  # and here two are one
        (jm.masked(jm.linear(), "small", otherwise=jm.passthrough(source="b")), {}, set()),  # where nothing has changed
        (jm.task_arithmetic(0.3), {"allow_nonfinite": True}, {3}),
        (jm.task_arithmetic(jm.by_depth([0.1, 0.5])), {"rules": jm.Rules(stacked=("w",))}, {3}),
        (jm.ties(0.5, scope="tensor"), {}, set(range(BLOCKS))),  # one threshold for all of it
    ],
    ids=["linear", "dare", "narrower", "wider", "passthrough", "nonfinite", "stacked", "measured"],
)
def test_methods_and_outputs(tmp_path: Path, method: jm.Method, options: dict, changed: set[int]) -> None:
    family = Family(tmp_path)
    first = family.merge(method, catalog=family.catalog, **options)
    family.change("a", {3 * STEP + 5})
    again = family.merge(method, catalog=family.catalog, reuse=first.path, **options)
    assert same(again, family.merge(method, **options))
    blocks = set(range(len(load_manifest(again.path).output.tensors["w"].blocks)))
    assert copied(again) == blocks - changed


def test_what_an_earlier_merge_of_a_budget_read_is_kept_by_blocks(tmp_path: Path) -> None:
    family, method = Family(tmp_path), jm.task_arithmetic(0.3)
    options: dict[str, Any] = {"catalog": family.catalog, "policy": "uniform_hash"}
    first = family.merge(method, io_budget="40%", **options)
    more = family.merge(method, io_budget="70%", reuse=first.path, **options)
    assert same(more, family.merge(method, io_budget="70%", **options))
    one, other = (np.stack([report.io_plan.chosen[x]["w"] for x in "ab"]) for report in (first, more))
    unchanged = {int(i) for i in (one == other).all(axis=0).nonzero()[0]}
    assert copied(more) == unchanged and 0 < len(unchanged) < BLOCKS
    assert sum(more.bytes_read[x] for x in "ab") < sum(more.io_plan.planned.values())


def test_blocks_of_another_method_or_draw_are_not_taken(tmp_path: Path) -> None:
    family = Family(tmp_path)
    first = family.merge(jm.dare(0.5), key=1, catalog=family.catalog)
    for method, key in ((jm.dare(0.4), 1), (jm.dare(0.5), 2)):
        again = family.merge(method, key=key, catalog=family.catalog, reuse=first.path)
        assert copied(again) == set() and same(again, family.merge(method, key=key))


def test_without_a_catalog_there_are_no_blocks(tmp_path: Path) -> None:
    family = Family(tmp_path)
    assert load_manifest(family.merge(jm.linear()).path).run.block_keys == {}
    found = load_manifest(family.merge(jm.linear(), catalog=family.catalog).path).run.block_keys
    assert found.keys() == {"w"} and len(set(found["w"])) == BLOCKS


def test_a_damaged_block_is_merged_again(tmp_path: Path) -> None:
    family, method = Family(tmp_path), jm.linear()
    first = family.merge(method, catalog=family.catalog)
    with jm.open_checkpoint(first.path) as checkpoint:
        offset = checkpoint.params["w"].offset
    with (first.path / "model.safetensors").open("r+b") as file:
        file.seek(offset + 4 * BLOCK_BYTES + 100)
        file.write(b"?")
    family.change("a", {0})
    with pytest.warns(UserWarning, match="'w' is not what was written there"):
        again = family.merge(method, catalog=family.catalog, reuse=first.path)
    assert copied(again) == {1, 2, 3, 5}
    assert same(again, family.merge(method))


def test_the_command_tells_which_blocks(tmp_path: Path, capsys: Any) -> None:
    family = Family(tmp_path)
    first = family.merge(jm.linear(), catalog=family.catalog)
    family.change("a", {0, 3 * STEP, 4 * STEP})
    again = family.merge(jm.linear(), catalog=family.catalog, reuse=first.path)
    assert "0 tensors and 3 blocks of others" in str(again)
    main(["explain", str(again.path)])
    assert "3 blocks of 1 others" in capsys.readouterr().out
    main(["explain", str(again.path), "--tensor", "w"])
    assert "merged again were the blocks 0, 3 to 4" in capsys.readouterr().out


@given(st.lists(st.integers(0, 3 * BLOCK_BYTES // 2), max_size=4))
@settings(max_examples=20)
def test_a_content_is_hashed_alike_however_it_comes(sizes: list[int]) -> None:
    data = np.random.default_rng(0).integers(0, 256, sum(sizes), np.uint8)
    whole, pieces = ContentHash(), ContentHash()
    whole.update(data)
    for piece in np.split(data, np.cumsum(sizes)[:-1]) if sizes else ():
        pieces.update(piece)
    assert whole.blocks() == pieces.blocks()
    assert len(whole.blocks()) == 32 * -(-data.size // BLOCK_BYTES)
