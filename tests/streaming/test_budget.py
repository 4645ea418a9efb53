"""The planner: what is chosen within a budget, what that costs and leaves out, and that a plan is always the same."""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.streaming.access import sum_weights
from jaxmerge.streaming.budget import AccessPlan, TensorBlocks, plan_access

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ("greedy_value", "uniform_hash")


def problem(
    seed: int, experts: int = 3, coupled: bool = False, blocks: Sequence[int] = (5, 1, 4)
) -> list[TensorBlocks]:
    """Tensors with blocks of 8 entries, the last one short, some of them like the base's, of 2 or 4 bytes per entry."""
    rng = np.random.default_rng(seed)
    tensors = []
    for number, count in enumerate(blocks):
        size = count * 8 - int(rng.integers(8))
        entries = np.minimum(8, size - 8 * np.arange(count))
        touched = rng.random((experts, count)) < 0.8
        norms = np.where(touched, rng.integers(1, 4, (experts, count)), 0).astype(float)  # with ties
        costs = np.outer(np.full(experts, rng.choice([2, 4])), entries)
        weights = None if coupled or rng.random() < 0.2 else rng.normal(size=experts)
        tensors.append(TensorBlocks(f"t{number}", size, 8, norms, touched, costs, weights, 1.0))
    return tensors


def names(count: int) -> dict[str, str]:
    return {f"e{k}": f"{7 * k % 11:04x}" for k in range(count)}


def planned(tensors: Sequence[TensorBlocks], budget: int | None = None, **options) -> AccessPlan:
    return plan_access(tensors, names(len(tensors[0].norms)), base="base", method="m", budget=budget, **options)


@settings(max_examples=100)
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0, 1.2),
    policy=st.sampled_from(POLICIES),
    coupled=st.booleans(),
    shuffle=st.randoms(use_true_random=False),
)
def test_plans_keep_the_budget_and_do_not_depend_on_order(seed, share, policy, coupled, shuffle) -> None:
    tensors = problem(seed, coupled=coupled)
    total = sum(int(tensor.costs.sum()) for tensor in tensors)
    plan = planned(tensors, int(share * total), policy=policy)
    assert sum(plan.planned.values()) <= share * total
    for k, name in enumerate(plan.experts):
        assert plan.planned[name] == sum(int(t.costs[k][plan.chosen[name][t.name]].sum()) for t in tensors)
        assert plan.full[name] == sum(int(t.costs[k].sum()) for t in tensors)
        for tensor in tensors:
            chosen = plan.chosen[name][tensor.name]
            assert not (chosen & ~tensor.touched[k]).any(), "what equals the base is free"
            if tensor.weights is None:  # all experts or none
                together = np.any([plan.chosen[other][tensor.name] for other in plan.experts], axis=0)
                np.testing.assert_array_equal(chosen, together & tensor.touched[k])

    order = list(range(3))
    shuffle.shuffle(order)
    moved = [
        dataclasses.replace(
            t,
            norms=t.norms[order],
            touched=t.touched[order],
            costs=t.costs[order],
            weights=None if t.weights is None else t.weights[order],
        )
        for t in reversed(tensors)
    ]
    experts = [list(names(3).items())[i] for i in order]
    again = plan_access(moved, dict(experts), base="base", method="m", budget=int(share * total), policy=policy)
    assert again.digest == plan.digest
    assert again.planned == plan.planned and again.bound == pytest.approx(plan.bound)


@settings(max_examples=60)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_greed_is_near_the_best(seed: int, share: float) -> None:
    """At least half of what the best choice has; the best one where all blocks cost the same."""
    (tensor,) = problem(seed, experts=2, blocks=(5,))
    if tensor.weights is None:
        return
    items = [(k, b) for k, b in itertools.product(range(2), range(5)) if tensor.touched[k, b]]
    value = {(k, b): (tensor.weights[k] * tensor.norms[k, b]) ** 2 for k, b in items}
    budget = int(share * tensor.costs.sum())
    fitting = [
        sum(value[item] for item in chosen)
        for n in range(len(items) + 1)
        for chosen in itertools.combinations(items, n)
        if sum(tensor.costs[item] for item in chosen) <= budget
    ]
    plan = planned([tensor], budget)
    found = sum(value[k, b] for k, b in items if plan.chosen[f"e{k}"]["t0"][b])
    assert found >= max(fitting) / 2 - 1e-12
    if len({tensor.costs[item] for item in items}) < 2:
        assert found == pytest.approx(max(fitting))
    assert plan.kept == pytest.approx(found / sum(value.values())) if value else plan.kept == 1


def test_one_large_value_is_not_lost_to_many_small_ones() -> None:
    norms = np.array([[1.1, 8.0]])  # the first has more value per byte, and leaves no room for the second
    costs = np.array([[1, 100]])
    tensor = TensorBlocks("t", 2, 1, norms, norms > 0, costs, np.ones(1))
    assert planned([tensor], 100).chosen["e0"]["t"].tolist() == [False, True]
    assert planned([tensor], 99).chosen["e0"]["t"].tolist() == [True, False]


def random_deltas(rng: np.random.Generator, orthogonal: bool) -> tuple[np.ndarray, TensorBlocks]:
    """`[K, B, n]` task vectors with log-normal norms, and what the planner is told of them."""
    deltas = rng.normal(size=(8, 256, 16)) if not orthogonal else np.zeros((8, 256, 16))
    if orthogonal:
        deltas[np.arange(8), :, np.arange(8)] = 1
    deltas *= rng.lognormal(0, 1, (8, 256, 1)) / np.linalg.norm(deltas, axis=2, keepdims=True)
    norms = np.linalg.norm(deltas, axis=2)
    costs = np.full(norms.shape, 32)
    return deltas, TensorBlocks("t", 256 * 16, 16, norms, norms > 0, costs, rng.normal(size=8))


def error(deltas: np.ndarray, tensor: TensorBlocks, plan: AccessPlan) -> float:
    assert tensor.weights is not None
    left_out = ~np.stack([plan.chosen[name]["t"] for name in plan.experts])
    return float(np.linalg.norm(np.einsum("k,kbn,kb->bn", tensor.weights, deltas, left_out.astype(float))))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_error_is_within_the_bound(policy, rng: np.random.Generator) -> None:
    for share in (0, 0.1, 0.5, 0.9, 1):
        deltas, tensor = random_deltas(rng, orthogonal=False)
        plan = planned([tensor], int(share * tensor.costs.sum()), policy=policy)
        assert plan.bound is not None
        assert error(deltas, tensor, plan) <= plan.bound * (1 + 1e-12)
    assert plan.bound == 0


def test_the_error_of_orthogonal_experts_is_what_is_expected_and_falls(rng: np.random.Generator) -> None:
    deltas, tensor = random_deltas(rng, orthogonal=True)
    plans = [planned([tensor], budget) for budget in range(0, int(tensor.costs.sum()) + 1, 4096)]
    errors = [error(deltas, tensor, plan) for plan in plans]
    np.testing.assert_allclose(errors, np.array([plan.expected for plan in plans]), rtol=1e-6, atol=1e-9)
    assert sorted(errors, reverse=True) == errors


def test_greed_pays_where_norms_are_uneven(rng: np.random.Generator) -> None:
    """Norms with a log-normal spread of 1 and a tenth of the bytes: half of the error of choosing blindly, or so."""
    deltas, tensor = random_deltas(rng, orthogonal=False)
    tensor = TensorBlocks("t", tensor.size, 16, tensor.norms, tensor.touched, tensor.costs, np.ones(8))
    full = np.linalg.norm(deltas.sum(axis=0))
    greedy, blind = (
        error(deltas, tensor, planned([tensor], int(tensor.costs.sum()) // 10, policy=policy)) / full
        for policy in POLICIES
    )
    assert greedy == pytest.approx(0.50, abs=0.05)
    assert blind == pytest.approx(0.95, abs=0.06)  # one draw: which large blocks are in the tenth is chance


def test_ties_are_broken_by_content_tensor_and_block() -> None:
    one = np.ones((2, 3))
    tensors = [TensorBlocks(name, 3, 1, one, one > 0, np.full((2, 3), 4), np.ones(2)) for name in "ba"]
    for experts in ({"x": "2", "y": "1"}, {"y": "1", "x": "2"}):
        plan = plan_access(tensors, experts, base="base", budget=16)
        assert plan.chosen["y"]["a"].all() and plan.chosen["y"]["b"].tolist() == [True, False, False]
        assert not plan.chosen["x"]["a"].any()


def test_floors(rng: np.random.Generator) -> None:
    norms = rng.random((3, 6)) * np.array([[1e-3], [1], [1]])
    tensors = [
        TensorBlocks(name, 6, 1, norms * factor, norms > 0, np.full((3, 6), 4), np.ones(3))
        for name, factor in (("large", 1.0), ("small", 1e-3))
    ]
    without = planned(tensors, 24)
    assert without.planned["e0"] == 0 and not any(without.chosen[name]["small"].any() for name in without.experts)
    plan = planned(tensors, 28, floors=(2, 1))
    assert sum(plan.planned.values()) == 28
    best = np.argsort(-norms[0])[:2]
    np.testing.assert_array_equal(np.flatnonzero(plan.chosen["e0"]["large"]), np.sort(best))
    assert sum(plan.chosen[name]["small"].sum() for name in plan.experts) == 1
    with pytest.raises(jm.BudgetError, match="floors of 4 blocks per expert"):
        planned(tensors, 24, floors=(4, 0))


def test_policies() -> None:
    tensors = problem(0)
    touched = sum(int(t.costs[t.touched].sum()) for t in tensors)
    for policy in ("greedy_value", "uniform_hash", "full"):
        plan = planned(tensors, touched, policy=policy)
        assert sum(plan.planned.values()) == touched and plan.kept == 1 and plan.bound == 0
    with pytest.raises(jm.BudgetError, match="reading all blocks takes"):
        planned(tensors, touched - 1, policy="full")
    with pytest.raises(jm.RecipeError, match="no policy 'best'"):
        planned(tensors, policy="best")
    blind = planned(problem(0, blocks=(40,)), 600, policy="uniform_hash")
    chosen = np.stack([blind.chosen[name]["t0"] for name in blind.experts])
    (tensor,) = problem(0, blocks=(40,))
    assert (chosen == (chosen.any(axis=0) & tensor.touched)).all(), "the same blocks of every expert"


def test_a_coefficient_of_zero_is_read_only_when_everything_is() -> None:
    one = np.ones((2, 3))
    tensor = TensorBlocks("t", 3, 1, one, one > 0, np.full((2, 3), 4), np.array([0.0, 1.0]))
    assert planned([tensor], 20).planned == {"e0": 0, "e1": 12}
    assert planned([tensor], 24).planned == {"e0": 12, "e1": 12}


def test_no_bound_for_what_is_no_sum() -> None:
    plan = planned(problem(1, coupled=True), 50)
    assert plan.bound is None and "no bound is known" in str(plan)
    assert planned(problem(1, coupled=True)).bound == 0


def test_a_saved_plan_is_the_same(tmp_path: Path) -> None:
    plan = planned(problem(3), 100, floors=(1, 0))
    plan.save(tmp_path / "plan.json")
    again = AccessPlan.load(tmp_path / "plan.json")
    assert again.digest == plan.digest and again.planned == plan.planned and again.bound == plan.bound
    for expert, tensors in plan.chosen.items():
        for name, chosen in tensors.items():
            np.testing.assert_array_equal(again.chosen[expert][name], chosen)
            for block in range(len(chosen)):
                assert again.explain(expert, name, block) == plan.explain(expert, name, block)
    told = json.loads((tmp_path / "plan.json").read_text())
    for broken in ({**told, "budget": 101}, {**told, "version": 99}, {"digest": ""}, []):
        (tmp_path / "plan.json").write_text(json.dumps(broken))
        with pytest.raises(jm.CheckpointError):
            AccessPlan.load(tmp_path / "plan.json")


def test_explanations() -> None:
    norms = np.array([[3.0, 2.0, 0.0, 1.0]])
    plan = planned([TensorBlocks("t", 4, 1, norms, norms > 0, np.full((1, 4), 4), np.ones(1))], 8)
    text = plan.explain("e0", "t", 1)
    assert "e0: read; it is number 2 of 3 by value per byte, and its value per byte is 1; the least" in text
    assert "left out; it is number 3 of 3" in plan.explain("e0", "t", 3)
    assert "equals the base's" in plan.explain("e0", "t", 2)
    for wrong in (("e1", "t", 0), ("e0", "s", 0), ("e0", "t", 4)):
        with pytest.raises(jm.RecipeError):
            plan.explain(*wrong)


def test_what_the_digest_depends_on() -> None:
    def digest(method="m", base="base", budget=100, block=8, content="0000", **options) -> str:
        tensors = [TensorBlocks(t.name, t.size, block, t.norms, t.touched, t.costs, t.weights) for t in problem(3)]
        experts = {**names(3), "e0": content}
        return plan_access(tensors, experts, base=base, method=method, budget=budget, **options).digest

    different = [
        digest(),
        digest(method="n"),
        digest(base="other"),
        digest(budget=101),
        digest(block=9),
        digest(content="0001"),
        digest(policy="uniform_hash"),
        digest(floors=(1, 0)),
    ]
    assert len(set(different)) == len(different)


def test_the_digest_is_the_same_in_another_process() -> None:
    script = (
        "from tests.streaming.test_budget import planned, problem\n"
        "print(planned(problem(5), 100).digest, planned(problem(5), 100, policy='uniform_hash').digest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == [
        planned(problem(5), 100).digest,
        planned(problem(5), 100, policy="uniform_hash").digest,
    ]


def test_planning_is_fast() -> None:
    """Twenty experts of 8 billion parameters in blocks of 1 MiB."""
    import time

    ones = np.random.default_rng(0).random((20, 55))
    tensors = [
        TensorBlocks(f"{t}", 55 << 19, 1 << 19, ones + t, ones > 0, np.full(ones.shape, 1 << 20), np.ones(20))
        for t in range(300)
    ]
    start = time.process_time()
    plan = planned(tensors, 300 * 20 * 55 << 17)
    assert plan.digest
    assert time.process_time() - start < 1.5  # 0.4 s on an idle core


INFO = jm.TensorInfo("layers.1.w", (4, 4), layer=1, num_layers=3)


@pytest.mark.parametrize(
    "method, expected",
    [
        (jm.task_arithmetic(0.5), [0.5, 0.5, 0.5]),
        (jm.task_arithmetic(0.5, weights=[1.0, 2.0, -1.0]), [0.5, 1.0, -0.5]),
        (jm.task_arithmetic(1.0, weights=[1.0, 2.0, 1.0], normalize=True), [0.25, 0.5, 0.25]),
        (jm.task_arithmetic(jm.by_depth([0.0, 1.0])), [0.5, 0.5, 0.5]),
        (jm.linear([1.0, 3.0, 0.0]), [0.25, 0.75, 0.0]),
        (jm.linear([1.0, 3.0, 0.0], normalize=False), [1.0, 3.0, 0.0]),
        (jm.lines(alpha=0.2, beta=0.6), [0.5, 0.5, 0.5]),
        (jm.passthrough(2.0, source="b"), [0.0, 2.0, 0.0]),
        (jm.passthrough(source="base"), [0.0, 0.0, 0.0]),
        (jm.ties(0.5), None),
        (jm.dare(0.5), None),
        (jm.lines(), None),
        (jm.model_stock(), None),
        (jm.slerp(0.5), None),
    ],
)
def test_which_methods_are_sums(method: jm.Method, expected: list[float] | None) -> None:
    experts = ("a", "b", "c")
    found = sum_weights(method.at(INFO, experts), INFO, 3)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        np.testing.assert_allclose(found, expected, atol=1e-6)
