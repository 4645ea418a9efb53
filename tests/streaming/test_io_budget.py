"""Merges within an I/O budget: what is fetched is what was planned, and the result is the merge of what was read."""

import dataclasses
import itertools
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.checkpoints.orbax import ChunkCache, OrbaxTensor
from jaxmerge.checkpoints.stores import ByteCounter
from jaxmerge.streaming import merge_checkpoint as merge_checkpoint_module
from jaxmerge.streaming.budget import AccessPlan
from jaxmerge.streaming.budgeted import BudgetedTensor, Scratch, read_beside_base
from jaxmerge.streaming.catalog import Catalog, open_catalog
from jaxmerge.streaming.merge_checkpoint import plan_merge
from jaxmerge.streaming.statistics import default_block, smallest_read
from jaxmerge.trees.lazy import ArrayTensor, Box, LazyTensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NAMES = ("a", "b", "c")
METHODS = {
    "task_arithmetic": jm.task_arithmetic(0.4, weights={"a": 1.0, "b": 0.5, "c": -1.0}),
    "linear": jm.linear([0.5, 0.3, 0.2]),
    "ties": jm.ties(0.4),  # measured over the model: read more than once
    "ties per tensor": jm.ties(0.4, scope="tensor"),
    "dare": jm.dare(0.5),
    "widen": jm.widen(),  # whole tensors
    "by depth": jm.task_arithmetic(jm.by_depth([0.1, 0.9])),
    "mixed": jm.masked(jm.task_arithmetic(0.4), r"layers\.0\..*", otherwise=jm.ties(0.4)),
}


def make_models(folder: Path, format: str | None = None, suffix: str = "") -> tuple[Path, dict[str, Path]]:
    """A base with tied embeddings and an integer tensor, and experts whose task vectors are uneven."""
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(60, 16)).astype(BFLOAT16)
    base = {
        "embed": embedding,
        "head": embedding,
        "layers.0.w": rng.normal(size=(70, 16)).astype(np.float32),
        "layers.1.w": rng.normal(size=(16, 50)).astype(BFLOAT16),
        "norm": np.ones(16, np.float32),
        "positions": np.arange(9),
    }
    paths = {"base": jm.save_checkpoint(folder / f"base{suffix}", base, format=format)}
    for name in NAMES:
        moved: dict[str, Any] = {}
        for tensor, x in base.items():
            delta = rng.lognormal(-3, 1.5, (x.shape[0],) + (1,) * (x.ndim - 1)) * rng.normal(size=x.shape)
            delta[: len(delta) // 3] = 0
            moved[tensor] = (x.astype(np.float32) + delta).astype(x.dtype)
        moved |= {"head": moved["embed"], "positions": base["positions"]}
        paths[name] = jm.save_checkpoint(folder / f"{name}{suffix}", moved, format=format)
    return paths.pop("base"), paths


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path], Catalog]:
    """Models that no test changes, in a catalog with small blocks."""
    folder = tmp_path_factory.mktemp("models")
    base, experts = make_models(folder)
    catalog = open_catalog(folder / "models.catalog")
    catalog.add(base, experts, block_bytes=256)
    return base, experts, catalog


def loaded(path: str | Path) -> dict[str, np.ndarray]:
    with jm.open_checkpoint(path) as checkpoint:
        leaves = jm.named_leaves(checkpoint.params)
        arrays = {id(x): np.asarray(x) for x in leaves.values()}  # tied tensors stay tied
        return {name: arrays[id(x)] for name, x in leaves.items()}


def streamed(method: jm.Method, base: dict, experts: dict[str, dict], out: Path, **options: Any) -> dict[str, Any]:
    """The merge of trees in memory, by the programs that merge checkpoints."""
    jm.merge_checkpoint(method, experts, base=base, out=out, overwrite=True, **options)
    return loaded(out)


def restricted(base: dict[str, np.ndarray], expert: dict[str, np.ndarray], plan: AccessPlan, name: str) -> dict:
    """The expert of a plan, in memory: the base with the expert's entries in the chosen blocks."""
    result = dict(base)
    for tensor, chosen in plan.chosen[name].items():
        entries = np.repeat(chosen, plan.blocks[tensor][1])[: base[tensor].size].reshape(base[tensor].shape)
        result[tensor] = np.where(entries, expert[tensor], base[tensor])
    result["head"] = result["embed"]
    return result


def check_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name].view(np.uint8), np.asarray(x).view(np.uint8), err_msg=name)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@settings(max_examples=3)
@given(share=st.integers(1, 99), policy=st.sampled_from(["greedy_value", "uniform_hash"]))
def test_fetched_is_planned_and_the_result_is_the_merge_of_it(
    method: jm.Method, share: int, policy: str, models: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base, experts, catalog = models
    out = tmp_path_factory.getbasetemp() / "within"
    budget = f"{share}%"
    report = jm.merge_checkpoint(
        method, experts, base=base, out=out, key=3, io_budget=budget, catalog=catalog, policy=policy, overwrite=True
    )
    plan = report.io_plan
    assert plan is not None and report.bytes_analysed == {}
    assert {name: report.bytes_read[name] for name in NAMES} == plan.planned
    assert sum(plan.planned.values()) <= share / 100 * sum(plan.full.values())
    reference = loaded(base)
    within = {name: restricted(reference, loaded(path), plan, name) for name, path in experts.items()}
    check_equal(loaded(out), streamed(method, reference, within, out.with_name("expected"), key=3))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_nothing_and_everything(method: jm.Method, models: Any, tmp_path: Path) -> None:
    """Without a byte of an expert the result is the base; with all of them that of a merge without a budget."""
    base, experts, catalog = models

    def merged(name: str, **options: Any) -> tuple[dict[str, np.ndarray], jm.StreamReport]:
        report = jm.merge_checkpoint(method, experts, base=base, out=tmp_path / name, key=3, **options)
        return loaded(tmp_path / name), report

    full, unlimited = merged("full")
    all_of_it, report = merged("all", io_budget="100%", catalog=catalog)
    check_equal(all_of_it, full)
    assert unlimited.io_plan is None and report.io_plan is not None
    assert all(0 < report.bytes_read[name] < report.io_plan.full[name] for name in NAMES), "a third is the base's"
    none, report = merged("none", io_budget=0, catalog=catalog)
    assert {report.bytes_read[name] for name in NAMES} == {0}
    check_equal(none, loaded(base))


@pytest.mark.parametrize("format, suffix", [("npz", ".npz"), ("orbax", "")])
@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
def test_other_formats(name: str, format: str, suffix: str, tmp_path: Path) -> None:
    base, experts = make_models(tmp_path, format, suffix)
    method = METHODS[name]
    report = jm.merge_checkpoint(method, experts, base=base, out=tmp_path / "out", io_budget="60%")
    plan = report.io_plan
    assert plan is not None and 0 < sum(plan.planned.values()) <= 0.6 * sum(plan.full.values())
    assert {expert: report.bytes_read[expert] for expert in NAMES} == plan.planned
    reference = loaded(base)
    within = {expert: restricted(reference, loaded(path), plan, expert) for expert, path in experts.items()}
    check_equal(loaded(tmp_path / "out"), streamed(method, reference, within, tmp_path / "expected"))


def test_experts_in_different_formats_are_cut_alike(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    (tmp_path / "other").mkdir()
    _, others = make_models(tmp_path / "other", "orbax")
    mixed = {**experts, "b": others["b"]}
    with open_catalog(tmp_path / "models.catalog") as catalog:
        catalog.add(base, mixed, block_bytes=256)
        report = jm.merge_checkpoint(
            METHODS["ties"], mixed, base=base, out=tmp_path / "out", io_budget="70%", catalog=catalog
        )
    plan = report.io_plan
    assert plan is not None and plan.planned == {name: report.bytes_read[name] for name in NAMES}
    within = {name: restricted(loaded(base), loaded(path), plan, name) for name, path in experts.items()}
    check_equal(loaded(tmp_path / "out"), streamed(METHODS["ties"], loaded(base), within, tmp_path / "expected"))


def test_layer_stacked_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    trees = {name: {"layers": rng.normal(size=(4, 30, 8)).astype(np.float32)} for name in ("base", *NAMES)}
    paths = {name: jm.save_checkpoint(tmp_path / name, tree) for name, tree in trees.items()}
    base, rules = paths.pop("base"), jm.Rules(stacked=("layers",))
    with open_catalog(None) as catalog:
        catalog.add(base, paths, block_bytes=512)  # blocks that do not end where layers do
        for method in (METHODS["by depth"], METHODS["ties per tensor"]):
            report = jm.merge_checkpoint(
                method,
                paths,
                base=base,
                out=tmp_path / "out",
                rules=rules,
                io_budget="40%",
                catalog=catalog,
                overwrite=True,
                memory_budget="64MiB",
            )
            plan = report.io_plan
            assert plan is not None and plan.planned == {name: report.bytes_read[name] for name in NAMES}
            whole = plan_merge(method, paths, base=base, rules=rules, io_budget="40%", catalog=catalog)
            assert whole.to_read == sum(plan.planned.values()) + report.bytes_read["the base"]
            assert report.bytes_read["the base"] <= 2 * trees["base"]["layers"].nbytes
            within = {
                name: {"layers": restricted({**trees["base"], "embed": 0}, trees[name], plan, name)["layers"]}  # pyright: ignore
                for name in NAMES
            }
            expected = streamed(method, trees["base"], within, tmp_path / "expected", rules=rules)
            check_equal(loaded(tmp_path / "out"), expected)


def test_the_base_is_read_once(models: Any, tmp_path: Path) -> None:
    base, experts, catalog = models
    size = jm.open_checkpoint(base).nbytes
    for budget in (0, "30%"):
        report = jm.merge_checkpoint(
            METHODS["linear"],
            experts,
            base=base,
            out=tmp_path / "out",
            io_budget=budget,
            catalog=catalog,
            overwrite=True,
        )
        assert report.bytes_read["the base"] == size


def test_bytes_do_not_grow_with_the_number_of_experts(models: Any, tmp_path: Path) -> None:
    base, experts, catalog = models
    read, without = [], []
    for count in (1, 2, 3):
        some = dict(itertools.islice(experts.items(), count))
        options: dict[str, Any] = {"base": base, "out": tmp_path / "out", "overwrite": True}
        report = jm.merge_checkpoint(jm.task_arithmetic(), some, io_budget=1500, catalog=catalog, **options)
        read.append(sum(report.bytes_read[name] for name in some))
        report = jm.merge_checkpoint(jm.task_arithmetic(), some, **options)
        without.append(sum(report.bytes_read[name] for name in some))
    assert all(1500 - 256 <= n <= 1500 for n in read)
    assert without == [without[0], 2 * without[0], 3 * without[0]]


def test_other_dtypes(models: Any, tmp_path: Path) -> None:
    """An expert in bfloat16 costs what it holds, not what it is cast to."""
    base, experts, _ = models
    wide = {name: x.astype(np.float32) if x.dtype == BFLOAT16 else x for name, x in loaded(base).items()}
    wide_base = jm.save_checkpoint(tmp_path / "wide", wide | {"head": wide["embed"]})
    report = jm.merge_checkpoint(
        METHODS["linear"], experts, base=wide_base, out=tmp_path / "out", dtype="bfloat16", io_budget="50%"
    )
    assert report.io_plan is not None
    assert {name: report.bytes_read[name] for name in NAMES} == report.io_plan.planned
    assert report.io_plan.full["a"] == jm.open_checkpoint(experts["a"]).nbytes - 72


def test_a_cold_run_says_what_it_read(models: Any, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    base, experts, _ = models
    options: dict[str, Any] = {"base": base, "io_budget": "50%", "catalog": tmp_path / "my.catalog"}
    (tmp_path / "there").mkdir()
    with pytest.raises(jm.ConflictError):  # before anything is read
        jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "there", **options)
    report = jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "cold", progress=True, **options)
    assert report.bytes_analysed == {name: jm.open_checkpoint(base).nbytes for name in ("the base", *NAMES)}
    assert "statistics of 3 experts are gathered first" in " ".join(capfd.readouterr().err.split())
    assert "read before, for statistics" in str(report)
    again = jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "warm", **options)
    assert again.bytes_analysed == {} and again.io_plan is not None and report.io_plan is not None
    assert again.io_plan.digest == report.io_plan.digest
    check_equal(loaded(tmp_path / "warm"), loaded(tmp_path / "cold"))
    with open_catalog(tmp_path / "my.catalog") as catalog:
        runs = catalog.runs()
    assert [Path(run["out"]).name for run in runs] == ["cold", "warm"]
    assert runs[1]["plan"] == again.io_plan.digest and len(runs[1]["inputs"]) == 4
    for given_to in runs[1]["inputs"]:
        assert given_to["fetched"] == again.bytes_read[given_to["name"]]


def test_stale_statistics_are_gathered_anew(tmp_path: Path) -> None:
    base, experts = make_models(tmp_path)
    options: dict[str, Any] = {"base": base, "io_budget": "40%", "catalog": tmp_path / "my.catalog", "overwrite": True}
    first = jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "out", **options)
    file = experts["b"] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = np.float32(1e6).tobytes()  # the end of the data
    file.write_bytes(content)
    second = jm.merge_checkpoint(jm.linear(), experts, out=tmp_path / "out", **options)
    assert second.bytes_analysed["b"] > 0 and "a" not in second.bytes_analysed
    assert first.io_plan is not None and second.io_plan is not None
    assert second.io_plan.digest != first.io_plan.digest


def test_an_expert_like_the_base_is_not_read(models: Any, tmp_path: Path) -> None:
    base, _, _ = models
    shutil.copytree(base, tmp_path / "same")
    report = jm.merge_checkpoint(jm.linear(), [tmp_path / "same"], base=base, out=tmp_path / "out", io_budget="100%")
    assert report.bytes_read["expert_0"] == 0
    check_equal(loaded(tmp_path / "out"), loaded(base))


def test_tied_in_one_expert_only(models: Any, tmp_path: Path) -> None:
    base, experts, _ = models
    untied = loaded(experts["b"])
    untied["head"] = untied["head"] + np.asarray(1, BFLOAT16)
    mixed = {**experts, "b": jm.save_checkpoint(tmp_path / "untied", untied)}
    for method in (METHODS["linear"], METHODS["ties"]):
        full = jm.merge_checkpoint(method, mixed, base=base, out=tmp_path / "full", overwrite=True)
        report = jm.merge_checkpoint(method, mixed, base=base, out=tmp_path / "out", io_budget="100%", overwrite=True)
        assert report.io_plan is not None and full.tensors == report.tensors == 6
        assert {name: report.bytes_read[name] for name in NAMES} == report.io_plan.planned
        check_equal(loaded(tmp_path / "out"), loaded(tmp_path / "full"))


def test_the_order_of_experts_changes_neither_plan_nor_result(models: Any, tmp_path: Path) -> None:
    base, experts, catalog = models
    reports = []
    for order in (("a", "b"), ("b", "a")):
        some = {name: experts[name] for name in order}
        method = jm.task_arithmetic(0.5, weights={"a": 1.0, "b": 0.3})
        out = tmp_path / "".join(order)
        reports.append(jm.merge_checkpoint(method, some, base=base, out=out, io_budget="30%", catalog=catalog))
    assert reports[0].io_plan.digest == reports[1].io_plan.digest
    for name, x in loaded(tmp_path / "ab").items():  # sums of products may be rounded differently in another order
        np.testing.assert_allclose(loaded(tmp_path / "ba")[name].astype(np.float32), x.astype(np.float32), 1e-6, 1e-7)
    other = plan_merge(
        jm.task_arithmetic(0.5, weights={"a": 1.0, "b": 0.31}), some, base=base, io_budget="30%", catalog=catalog
    )
    assert other.io_plan is not None and other.io_plan.digest != reports[1].io_plan.digest


def test_the_error_is_within_the_bound(models: Any, tmp_path: Path) -> None:
    base, experts, catalog = models
    method = METHODS["task_arithmetic"]
    trees = {name: loaded(path) for name, path in experts.items()}
    wide = {name: x.astype(np.float64) for name, x in loaded(base).items() if name not in ("head", "positions")}
    weights = {"a": 0.4, "b": 0.2, "c": -0.4}
    full = {n: sum(w * (trees[e][n].astype(np.float64) - x) for e, w in weights.items()) for n, x in wide.items()}
    for policy in ("greedy_value", "uniform_hash"):
        plan = plan_merge(method, experts, base=base, io_budget="30%", catalog=catalog, policy=policy).io_plan
        assert plan is not None and plan.bound is not None and plan.merged_norm is not None
        left_out = 0.0
        for name, x in wide.items():
            found = sum(
                w * (restricted(loaded(base), trees[e], plan, e)[name].astype(np.float64) - x)
                for e, w in weights.items()
            )
            left_out += np.sum(np.square(full[name] - found))
        assert 0 < np.sqrt(left_out) <= plan.bound
        exact = np.sqrt(sum(np.sum(np.square(x)) for x in full.values()))
        assert plan.merged_norm == pytest.approx(exact, rel=0.3)


def test_a_plan_is_carried_out_as_it_was_saved(models: Any, tmp_path: Path) -> None:
    base, experts, catalog = models
    given: dict[str, Any] = {"base": base, "catalog": catalog}
    plan = plan_merge(METHODS["linear"], experts, io_budget="35%", **given).io_plan
    assert plan is not None
    plan.save(tmp_path / "plan.json")
    again = AccessPlan.load(tmp_path / "plan.json")
    jm.merge_checkpoint(METHODS["linear"], experts, out=tmp_path / "one", io_budget="35%", **given)
    shuffled = dict(reversed(experts.items()))
    with pytest.raises(jm.RecipeError, match=r"the method or a coefficient differs"):
        jm.merge_checkpoint(METHODS["linear"], shuffled, out=tmp_path / "two", io_budget=again, **given)
    report = jm.merge_checkpoint(METHODS["linear"], experts, out=tmp_path / "two", io_budget=again, **given)
    assert report.io_plan is again and {name: report.bytes_read[name] for name in NAMES} == plan.planned
    check_equal(loaded(tmp_path / "two"), loaded(tmp_path / "one"))
    with pytest.raises(jm.RecipeError, match="expert 'b' differs"):
        other = {**experts, "b": experts["c"]}
        jm.merge_checkpoint(METHODS["linear"], other, out=tmp_path / "three", io_budget=again, **given)


def test_floors_reach_the_planner(models: Any) -> None:
    base, experts, catalog = models
    plan = plan_merge(
        jm.linear([1e-6, 1, 1]), experts, base=base, io_budget="30%", catalog=catalog, floors=(1, 1)
    ).io_plan
    assert plan is not None and plan.floors == (1, 1) and plan.planned["a"] > 0
    for tensor in plan.blocks:
        assert any(plan.chosen[name][tensor].any() for name in NAMES)


def test_more_than_planned_is_an_error_and_leaves_nothing(models: Any, tmp_path: Path, monkeypatch: Any) -> None:
    base, experts, catalog = models
    planned = merge_checkpoint_module.plan_job

    def less(*arguments: Any) -> Any:
        plan, analysed = planned(*arguments)
        return dataclasses.replace(plan, planned={**plan.planned, "b": plan.planned["b"] - 1}), analysed

    monkeypatch.setattr(merge_checkpoint_module, "plan_job", less)
    with pytest.raises(jm.BudgetError, match="expert 'b': .* bytes were fetched"):
        jm.merge_checkpoint(jm.linear(), experts, base=base, out=tmp_path / "out", io_budget="50%", catalog=catalog)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_done(models: Any, tmp_path: Path) -> None:
    base, experts, catalog = models
    for error, message, options in (
        (jm.RecipeError, "needs a base", {"base": None}),
        (jm.RecipeError, "the base was given as a tree", {"base": loaded(base)}),
        (jm.RecipeError, "io_budget is 'much'", {"io_budget": "much"}),
        (jm.RecipeError, "at most 100%", {"io_budget": "101%"}),
        (jm.RecipeError, "no policy 'best'", {"policy": "best"}),
        (jm.BudgetError, "reading all blocks takes", {"policy": "full"}),
        (jm.BudgetError, "the floors of 100 blocks", {"floors": (100, 0)}),
        (jm.ConflictError, "holds, or is part of, the input", {"out": base}),
        (jm.ConflictError, "exists already", {"out": tmp_path}),
    ):
        given = {"base": base, "out": tmp_path / "out", "io_budget": "10%", "catalog": catalog, **options}
        with pytest.raises(error, match=message):
            jm.merge_checkpoint(jm.linear(), experts, **given)
    with pytest.raises(jm.RecipeError, match="expert is named 'the base'"):
        jm.merge_checkpoint(jm.linear(), {"the base": experts["a"]}, base=base, out=tmp_path / "out", io_budget=0)
    assert list(tmp_path.iterdir()) == []


def test_the_report_tells(models: Any, tmp_path: Path) -> None:
    base, experts, catalog = models
    report = jm.merge_checkpoint(
        jm.linear(), experts, base=base, out=tmp_path / "out", io_budget="10%", catalog=catalog
    )
    for text in (str(report), report._repr_html_()):
        for wanted in ("planned)", "value kept", "error, at most", "greedy_value", "read from a"):
            assert wanted in text


def test_chunks_that_are_no_runs_of_rows_are_fetched_with_the_whole_array(tmp_path: Path) -> None:
    import tensorstore as ts

    counter, values = ByteCounter(), np.arange(70, dtype=np.float32).reshape(10, 7)
    for chunk, smallest in (([4, 7], 28), ([4, 3], 70)):
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        spec: Any = {"driver": "zarr3", "kvstore": "memory://", "metadata": {"chunk_grid": grid}}
        array = ts.open(spec, create=True, dtype=ts.float32, shape=[10, 7]).result()
        array.write(values).result()
        tensor = OrbaxTensor(array, "array", ChunkCache(), counter)
        assert smallest_read(tensor) == smallest_read(tensor.astype(np.float64)) == smallest
        assert default_block(tensor, block_bytes=128) == (56 if smallest == 28 else 70)
        scratch, before = Scratch(tmp_path), counter.total
        chosen = np.arange(-(-70 // smallest)) == 0
        budgeted = BudgetedTensor(tensor, ArrayTensor(-values), chosen, smallest, scratch)
        for start in range(0, 70, 10):
            out = np.empty(10, np.float32)
            budgeted.read_flat(start, out)
            entries = np.arange(start, start + 10)
            np.testing.assert_array_equal(out, np.where(entries < smallest, entries, -entries))
        assert counter.total - before == smallest * 4
        scratch.close()


@settings(max_examples=40)
@given(data=st.data())
def test_a_budgeted_tensor_reads_like_an_array(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(7, 5), (3, 4, 2), (20,), (), (4, 0)]))
    block = data.draw(st.sampled_from([1, 3, 8, 64]))
    size = int(np.prod(shape))
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=-(-size // block), max_size=-(-size // block))), bool)
    base = np.arange(size, dtype=np.float32).reshape(shape)
    kept = data.draw(st.booleans())
    scratch = Scratch(Path(os.curdir).absolute()) if kept and chosen.any() else None
    tensor = BudgetedTensor(ArrayTensor(np.asarray(base - 1000)), ArrayTensor(base), chosen, block, scratch)
    expected = np.where(np.repeat(chosen, block)[:size].reshape(shape), base - 1000, base)
    index = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape)
    for _ in range(2):
        np.testing.assert_array_equal(tensor[index], expected[index])
    start, stop = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    assert tensor.chosen_within(start, stop) == np.repeat(chosen, block)[start:stop].sum()
    if scratch is not None:
        scratch.close()


def test_entries_come_from_a_tensors_own_base() -> None:
    own, other = (ArrayTensor(np.full(6, x, np.float32)) for x in (1, 2))
    tensor = BudgetedTensor(other, own, np.zeros(2, bool), 3)
    for base, values, expected in ((own, np.full(4, 1.5), 1.5), (other, np.full(4, 2), 1), (None, None, 1)):
        out = np.empty(4, np.float32)
        read_beside_base(tensor, base, 1, out, None if values is None else values.astype(np.float32))
        np.testing.assert_array_equal(out, np.full(4, expected))


def test_each_block_is_fetched_once_whole_and_by_one_thread(tmp_path: Path) -> None:
    reads = []

    class Slow(LazyTensor):
        shape, dtype, label = (1000,), np.dtype(np.float32), "slow"

        def read(self, box: Box) -> np.ndarray:
            reads.append((box[0].start, box[0].stop))
            time.sleep(0.01)
            if len(reads) == 1:
                raise ZeroDivisionError("the first time")
            return np.arange(box[0].start, box[0].stop, dtype=np.float32)

    scratch = Scratch(tmp_path)
    tensor = BudgetedTensor(Slow(), ArrayTensor(np.zeros(1000, np.float32)), np.ones(10, bool), 100, scratch)
    with pytest.raises(ZeroDivisionError):
        tensor[50:70]
    found: list[Any] = [None] * 4

    def read(i: int) -> None:
        found[i] = tensor[10 * i : 1000 - i]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, values in enumerate(found):
        np.testing.assert_array_equal(values, np.arange(10 * i, 1000 - i))
    assert sorted(reads[1:]) == [(at, at + 100) for at in range(0, 1000, 100)]
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    scratch.close()
