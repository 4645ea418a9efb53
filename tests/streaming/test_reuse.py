"""Merging again: what would come out as before is copied, bit for bit, and nothing of it is read from the models."""

import contextlib
import itertools
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.cli.main import main
from jaxmerge.streaming.catalog import Catalog, open_catalog
from jaxmerge.streaming.keys import output_keys
from jaxmerge.streaming.manifest import load_manifest, verify_checkpoint

LAYERS = tuple(f"layers.{i}.w" for i in range(4))
NAMES = (*LAYERS, "embed")
SCALES = dict.fromkeys(NAMES, 0.3)
COUNTER = itertools.count()


def make(name: str, seed: int, start: dict | None = None, changed: tuple[str, ...] = NAMES) -> dict:
    """A model: random, or another one in which some tensors were moved."""
    rng = np.random.default_rng(seed)
    shapes = {**dict.fromkeys(LAYERS, (20, 50)), "embed": (16, 10)}
    result = {}
    for tensor, shape in shapes.items():
        dtype = ml_dtypes.bfloat16 if tensor == "embed" else np.float32
        moved = rng.normal(size=shape)
        old = 0 if start is None else start[tensor].astype(np.float64)
        result[tensor] = (old + moved).astype(dtype) if start is None or tensor in changed else start[tensor]
    return {**result, "positions": np.arange(9)}


class Family:
    """A base and experts on disk, what a catalog knows of them, and a merge that was made before."""

    def __init__(self, folder: Path):
        self.folder, self.catalog = folder, open_catalog(None)
        self.trees = {"base": make("base", 0)}
        self.paths = {"base": self.save(self.trees["base"])}
        for seed, name in enumerate(("a", "b"), 1):
            self.trees[name] = make(name, seed, self.trees["base"])
            self.paths[name] = self.save(self.trees[name])
        self.catalog.add(self.paths["base"], self.experts())
        self.first = self.merge(task_arithmetic(), catalog=self.catalog)

    def save(self, params: dict) -> Path:
        return jm.save_checkpoint(self.folder / f"model-{next(COUNTER)}", params)

    def experts(self, **changed: Path) -> dict[str, Path]:
        return {**{name: path for name, path in self.paths.items() if name != "base"}, **changed}

    def merge(self, method: jm.Method, experts: dict[str, Path] | None = None, **options: Any) -> Any:
        out = self.folder / f"out-{next(COUNTER)}"
        given = {"base": self.paths["base"], "progress": False} | options
        return jm.merge_checkpoint(method, experts or self.experts(), out=out, **given)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"))


def task_arithmetic(**changed: float) -> jm.Method:
    return jm.task_arithmetic({**SCALES, **changed})


def copied(report: Any) -> set[str]:
    found = load_manifest(report.path).run.copied
    return set() if found is None else set(found.tensors)


def same(one: Any, other: Any) -> bool:
    file = "model.safetensors"
    return (one.path / file).read_bytes() == (other.path / file).read_bytes()


@settings(max_examples=8)
@given(
    moved=st.dictionaries(st.sampled_from(("a", "b")), st.sets(st.sampled_from(NAMES), max_size=2), max_size=2),
    scaled=st.sets(st.sampled_from(NAMES), max_size=2),
    added=st.none() | st.sets(st.sampled_from(NAMES), max_size=3),
)
def test_only_what_depends_on_a_change_is_merged_again(family: Family, moved: dict, scaled: set, added: Any) -> None:
    changed: dict[str, Path] = {}
    for name, tensors in moved.items():
        changed[name] = family.save(make(name, next(COUNTER), family.trees[name], tuple(tensors)))
    if added is not None:
        changed["new"] = family.save(make("new", next(COUNTER), family.trees["base"], tuple(added)))
    if changed:
        family.catalog.add(family.paths["base"], changed)
    method, experts = task_arithmetic(**dict.fromkeys(scaled, 0.5)), family.experts(**changed)
    again = family.merge(method, experts, catalog=family.catalog, reuse=family.first.path)
    scratch = family.merge(method, experts)
    assert same(again, scratch)
    assert load_manifest(again.path).output == load_manifest(scratch.path).output
    expected = {*NAMES, "positions"} - set().union(*moved.values(), scaled, added or ())
    if added is not None:
        expected -= {"positions"}  # it is compared with the new expert's
    assert copied(again) == expected
    assert again.reused == len(expected)
    rest = sum(x.nbytes for name, x in family.trees["base"].items() if name not in expected)
    assert set(again.bytes_read.values()) == {rest}


def test_without_a_catalog_files_tell_what_is_the_same(family: Family, tmp_path: Path) -> None:
    plain = family.merge(task_arithmetic())
    again = family.merge(task_arithmetic(embed=0.5), reuse=plain.path)
    assert copied(again) == {*LAYERS, "positions"}
    assert sum(again.bytes_read.values()) == 3 * family.trees["base"]["embed"].nbytes
    # What the catalog knew when the first merge was made does not stand in the way.
    assert copied(family.merge(task_arithmetic(), reuse=family.first.path)) == {*NAMES, "positions"}
    # Another model with the same time, size and beginning is another model.
    path = shutil.copytree(family.paths["a"], tmp_path / "a", copy_function=shutil.copy2)
    assert copied(family.merge(task_arithmetic(), family.experts(a=path), reuse=plain.path)) == set()


def test_an_output_is_replaced_by_what_changed_in_it(family: Family, tmp_path: Path) -> None:
    """In a chain of outputs that copy from each other, the first of which has another format."""
    out = tmp_path / "merged"
    options: dict[str, Any] = {"base": family.paths["base"], "out": out, "progress": False}
    jm.merge_checkpoint(task_arithmetic(), family.experts(), format="orbax", **options)
    for scale in (0.4, 0.5):
        method = task_arithmetic(**{LAYERS[0]: scale})
        report = jm.merge_checkpoint(method, family.experts(), reuse=out, overwrite=True, **options)
        assert report.reused == len(NAMES) and same(report, family.merge(method))
        assert verify_checkpoint(out) == ()


@pytest.mark.parametrize("position", ["first", "last"])
def test_experts_that_change_nothing_count_unless_they_are_last(family: Family, position: str) -> None:
    """A sum of task vectors is compiled for all experts: zeros at its end keep its rounding, others may not."""
    idle = family.save(family.trees["base"])
    family.catalog.add(family.paths["base"], {"idle": idle})
    experts = {"idle": idle, **family.experts()} if position == "first" else {**family.experts(), "idle": idle}
    again = family.merge(task_arithmetic(), experts, catalog=family.catalog, reuse=family.first.path)
    assert copied(again) == (set(NAMES) if position == "last" else set())
    assert same(again, family.merge(task_arithmetic(), experts))


def test_what_a_method_depends_on(family: Family) -> None:
    rng = family.save(make("c", 7, family.trees["a"], (LAYERS[0],)))
    family.catalog.add(family.paths["base"], {"c": rng})
    one_tensor, added = family.experts(a=rng), family.experts(c=family.paths["a"])
    every = {*NAMES, "positions"}
    rest = every - {LAYERS[0]}
    kept = jm.masked(jm.linear(), LAYERS[1], otherwise=jm.passthrough(source="base"))
    sums = jm.task_arithmetic(jm.by_depth([0.1, 0.5]))
    stacked: dict[str, Any] = {"rules": jm.Rules(stacked=(LAYERS[0], LAYERS[1])), "dtype": "float16"}
    # method, experts afterwards, options before, options afterwards, what is copied
    cases: list[tuple[jm.Method, Any, dict[str, Any], dict[str, Any], set[str]]] = [
        (jm.linear(), one_tensor, {}, {}, rest),
        (jm.linear(), added, {}, {}, set()),  # the mean has another divisor
        (jm.linear(), None, {}, {"dtype": "float16"}, {"positions"}),
        (jm.linear(), None, {}, {"memory_budget": "3MiB"}, every),
        (jm.task_arithmetic(normalize=True), added, {}, {}, set()),
        (kept, added, {}, {}, set(NAMES) - {LAYERS[1]}),
        (sums, one_tensor, stacked, stacked, rest),
        (sums, None, {}, {**stacked, "dtype": None}, every - {LAYERS[0], LAYERS[1]}),
        (jm.ties(0.5, scope="tensor"), one_tensor, {}, {}, rest),
        (jm.ties(0.5, scope="model"), one_tensor, {}, {}, {"positions"}),  # one threshold for all
        (jm.dare(0.5), None, {"key": 1}, {"key": 1}, every),
        (jm.dare(0.5), None, {"key": 1}, {"key": 2}, {"positions"}),
    ]
    for number, (method, experts, before, after, expected) in enumerate(cases):
        first = family.merge(method, catalog=family.catalog, **before)
        again = family.merge(method, experts, catalog=family.catalog, reuse=first.path, **after)
        assert copied(again) == expected, number
        assert same(again, family.merge(method, experts, **after)), number


def test_how_a_tensor_is_cut_counts_where_sums_are_taken(family: Family) -> None:
    """Tensors in memory, whose content nobody has hashed, have no keys."""
    with contextlib.ExitStack() as opened:
        sources = {name: opened.enter_context(jm.open_checkpoint(path)) for name, path in family.paths.items()}
        base, *experts = (source.params for source in sources.values())
        for method, counts in ((jm.model_stock(), True), (jm.linear(), False)):
            merged = jm.named_leaves(jm.merge(method, experts, base=base))
            one, other = (output_keys(merged, sources, None, chunk).tensors for chunk in (1 << 14, 1 << 19))
            assert one.keys() == {*NAMES, "positions"}
            assert {name for name in NAMES if one[name] != other[name]} == (set(NAMES) if counts else set())
        in_memory = jm.merge(jm.linear(), [*experts, family.trees["a"]])
        assert output_keys(jm.named_leaves(in_memory), sources, None, 1 << 19) == ({}, {})


def test_within_a_budget_what_was_chosen_counts(family: Family) -> None:
    options = {"catalog": family.catalog, "io_budget": "50%"}
    first = family.merge(task_arithmetic(), **options)
    again = family.merge(task_arithmetic(), reuse=first.path, **options)
    assert copied(again) == {*NAMES, "positions"}
    assert set(again.bytes_read.values()) == {0}
    more = family.merge(task_arithmetic(), reuse=first.path, **{**options, "io_budget": "80%"})
    assert same(more, family.merge(task_arithmetic(), **{**options, "io_budget": "80%"}))
    plans = [report.io_plan for report in (first, more)]
    unchanged = {n for n in NAMES if all(np.array_equal(*(p.chosen[e][n] for p in plans)) for e in ("a", "b"))}
    assert copied(more) == {*unchanged, "positions"} != {*NAMES, "positions"}


def test_what_is_damaged_in_the_earlier_output_is_merged_again(family: Family) -> None:
    first = family.merge(task_arithmetic())
    with jm.open_checkpoint(first.path) as checkpoint:
        offset = checkpoint.params[LAYERS[2]].offset
    with (first.path / "model.safetensors").open("r+b") as file:
        file.seek(offset + 100)
        file.write(b"?")
    with pytest.warns(UserWarning, match="'layers.2.w' is not what was written there"):
        again = family.merge(task_arithmetic(), reuse=first.path)
    assert copied(again) == {*NAMES, "positions"} - {LAYERS[2]}
    assert same(again, family.merge(task_arithmetic()))
    with pytest.raises(jm.CheckpointError, match="there is no manifest"):
        family.merge(task_arithmetic(), reuse=family.paths["a"])


def test_the_command_copies_and_explains(family: Family, tmp_path: Path, capsys: Any) -> None:
    recipe = tmp_path / "recipe.yml"
    for number, scale in enumerate((0.3, 0.5)):
        scales = "{" + ", ".join(f"{name}: {scale if name == 'embed' else 0.3}" for name in NAMES) + "}"
        recipe.write_text(
            f"method: task_arithmetic\nparameters:\n  scale: {scales}\nbase: {family.paths['base']}\n"
            f"experts:\n  a: {family.paths['a']}\n  b: {family.paths['b']}\n"
        )
        reuse = ["--reuse", str(tmp_path / "out-0")] if number else []
        main(["merge", str(recipe), "--out", str(tmp_path / f"out-{number}"), *reuse])
    assert "copied from an earlier output" in capsys.readouterr().out
    for tensor, text in ((LAYERS[0], "it was copied from"), ("embed", "it was merged")):
        main(["explain", str(tmp_path / "out-1"), "--tensor", tensor])
        assert text in capsys.readouterr().out
    main(["explain", str(tmp_path / "out-1")])
    assert "5 tensors, from" in capsys.readouterr().out
    sources = f"- sources:\n  - {{model: {family.paths['a']}, layer_range: [0, 1]}}"
    recipe.write_text(f"merge_method: passthrough\nslices:\n{sources}")
    with pytest.raises(SystemExit):
        main(["merge", str(recipe), "--out", str(tmp_path / "out-2"), "--reuse", str(tmp_path / "out-0")])
    assert "leave --reuse out" in capsys.readouterr().err


def test_a_catalog_is_not_begun_by_a_merge_without_a_budget(family: Family, tmp_path: Path) -> None:
    family.merge(task_arithmetic(), catalog=tmp_path / "none.catalog")
    assert list(tmp_path.iterdir()) == []
    assert isinstance(family.catalog, Catalog)
