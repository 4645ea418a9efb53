"""Streaming gives what merging in memory gives, whatever the cut into chunks and the number of workers."""

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.checkpoints.layout import TensorSpec
from jaxmerge.checkpoints.writer import open_writer
from jaxmerge.streaming.engine import stream
from jaxmerge.streaming.plan import make_plan
from jaxmerge.streaming.progress import Progress
from jaxmerge.trees.lazy import ArrayTensor, Box, LazyTensor, StackedTensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EXACT = {
    "linear": jm.linear([0.3, 0.5, 0.2]),
    "task_arithmetic": jm.task_arithmetic(scale=0.4),
    "ties": jm.ties(0.3),
    "ties per tensor": jm.ties(0.3, scope="tensor"),
    "dare": jm.dare(0.5),
    "breadcrumbs": jm.breadcrumbs(0.6, gamma=0.1),
    "della": jm.della(0.5),
    "breadcrumbs by row": jm.breadcrumbs(0.5, gamma=0.2, axis=-1),
    "passthrough": jm.passthrough(source="b"),
    "partition": jm.partition({"one": jm.linear(), "other": jm.ties(0.5)}, {".*kernel": "other", ".*": "one"}),
}
ROUNDED = {"model_stock": jm.model_stock(), "lines": jm.lines(), "dare_ties": jm.dare_ties(0.5)}


def models(shapes: dict[str, tuple[int, ...]], dtype: np.dtype, count: int = 3) -> tuple[dict, dict[str, dict]]:
    rng = np.random.default_rng(0)
    base = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    experts = {
        expert: {
            name: (x.astype(np.float32) + 0.1 * rng.normal(size=x.shape)).astype(dtype) for name, x in base.items()
        }
        for expert in "abcdefgh"[:count]
    }
    return base, experts


def lazy(params: dict) -> dict:
    return {name: ArrayTensor(np.asarray(x)) for name, x in params.items()}


def lazily(method: jm.Method, base: dict | None, experts: dict[str, dict], **options: Any) -> dict:
    trees = {name: lazy(expert) for name, expert in experts.items()}
    return jm.merge(method, trees, base=None if base is None else lazy(base), **options)


def streamed(tree: dict, out: Path, budget: int = 1 << 29, **plan_changes: int) -> dict[str, np.ndarray]:
    plan = dataclasses.replace(make_plan(tree, budget), **plan_changes)
    with open_writer(out, [TensorSpec(name, x.dtype, x.shape) for name, x in tree.items()], overwrite=True) as writer:
        stream(plan, writer, Progress())
    with jm.open_checkpoint(out) as checkpoint:
        return {name: x[...] for name, x in checkpoint.params.items()}


def check_equal(found: dict[str, np.ndarray], expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], np.asarray(x), err_msg=name)
        assert found[name].dtype == x.dtype


@pytest.mark.parametrize("method", EXACT.values(), ids=EXACT.keys())
@settings(max_examples=4)
@given(  # each new length or shape is a compilation, so there are few
    chunk=st.sampled_from([16, 1 << 17]),
    workers=st.integers(1, 4),
    kind=st.sampled_from([((70, 30), BFLOAT16), ((1, 17), np.dtype(np.float32))]),
)
def test_same_as_in_memory(
    method: jm.Method,
    chunk: int,
    workers: int,
    kind: tuple[tuple[int, int], np.dtype],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    shape, dtype = kind
    base, experts = models({"0/kernel": shape, "1/kernel": shape, "scale": ()}, dtype)
    expected = jm.merge(method, experts, base=base, key=3)
    out = tmp_path_factory.getbasetemp() / "merged.safetensors"
    found = streamed(lazily(method, base, experts, key=3), out, chunk=chunk, workers=workers)
    check_equal(found, expected)


@pytest.mark.parametrize("method", ROUNDED.values(), ids=ROUNDED.keys())
@pytest.mark.parametrize("chunk", [100, 1 << 17])
def test_reductions_within_a_unit_in_the_last_place(method: jm.Method, chunk: int, tmp_path: Path) -> None:
    base, experts = models({"0/kernel": (90, 40), "1/kernel": (3, 5)}, BFLOAT16)
    expected = jm.merge(method, experts, base=base, key=3)
    found = streamed(lazily(method, base, experts, key=3), tmp_path / "merged.safetensors", chunk=chunk)
    for name, x in expected.items():
        steps = found[name].view(np.int16).astype(int) - np.asarray(x).view(np.int16)
        assert np.abs(steps).max() <= 1, name


@pytest.mark.parametrize("budget", [1 << 20, 1 << 29], ids=["read twice", "kept"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_sampled_order_statistics_are_exact(scope: Any, budget: int, tmp_path: Path) -> None:
    base, experts = models({"large": (1100, 1000), "small": (7, 1000)}, BFLOAT16)
    method = jm.ties(0.2, scope=scope)
    tree = lazily(method, base, experts)
    if budget < 1 << 29:
        plan = make_plan(tree, budget=1 << 29)
        budget = 2 * (plan.memory - 4 * base["large"].nbytes)
    check_equal(streamed(tree, tmp_path / "merged.safetensors", budget), jm.merge(method, experts, base=base))


def test_float64(tmp_path: Path) -> None:
    base, experts = models({"kernel": (40, 50)}, np.dtype(np.float64))
    with jax.enable_x64(True):
        expected = jm.merge(EXACT["ties"], experts, base=base)
        found = streamed(lazily(EXACT["ties"], base, experts), tmp_path / "merged.safetensors", chunk=300)
        check_equal(found, expected)
    narrow = streamed(lazily(EXACT["linear"], None, experts), tmp_path / "merged.safetensors", chunk=300)
    assert narrow["kernel"].dtype == np.float64
    np.testing.assert_allclose(narrow["kernel"], jm.merge(EXACT["linear"], experts)["kernel"], rtol=1e-6)


def test_layer_stacked_leaves_are_merged_layer_by_layer(tmp_path: Path) -> None:
    base, experts = models({"layers/kernel": (5, 30, 20), "bias": (9,)}, np.dtype(np.float32))
    method, rules = jm.ties(jm.by_depth([0.2, 0.8]), scope="tensor"), jm.Rules(stacked=("layers/.*",))
    expected = jm.merge(method, experts, base=base, rules=rules)
    check_equal(streamed(lazily(method, base, experts, rules=rules), tmp_path / "m.safetensors", chunk=77), expected)


@pytest.mark.parametrize("inner", ["ties per tensor", "ties", "della"])
def test_trees_derived_from_merges(inner: str, tmp_path: Path) -> None:
    """Merges of merges; renamed, transposed, cast, sliced and stacked merges."""
    base, experts = models({"0/kernel": (40, 30), "1/kernel": (40, 30)}, np.dtype(np.float32))
    once = jm.merge(EXACT[inner], experts, base=base, key=3)
    expected = jm.merge(jm.linear(), [once, base])
    tree = jm.merge(jm.linear(), [lazily(EXACT[inner], base, experts, key=3), lazy(base)])
    first = tree["0/kernel"]
    changed = {
        "renamed": first,
        "transposed": first.T,
        "half": first.astype(np.float16),
        "rows": first.window(slice(3, 20)),
        "both": first.T.astype(BFLOAT16),
        "stacked": StackedTensor([first, tree["1/kernel"]]).astype(BFLOAT16),
    }
    x, y = np.asarray(expected["0/kernel"]), np.asarray(expected["1/kernel"])
    wanted = {"renamed": x, "transposed": x.T, "half": x.astype(np.float16), "rows": x[3:20]}
    wanted |= {"both": x.T.astype(BFLOAT16), "stacked": np.stack([x, y]).astype(BFLOAT16)}
    check_equal(streamed(changed, tmp_path / "merged.safetensors", chunk=100), wanted)


def test_reused_memory_is_not_refilled_too_early(tmp_path: Path) -> None:
    """JAX computes straight from the memory that chunks are read into, and may hand it back as the result.

    Many chunks of random numbers, whose every mixture would show. A copy of float32 has no arithmetic that separates
    its result from its input.
    """

    class Copy(jm.Method):
        def merge_tensor(self, base, experts, info, stats):
            return experts[1]

    jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(Copy))
    base, experts = models({f"{i}/kernel": (300, 1024) for i in range(4)}, np.dtype(np.float32))
    for method in (Copy(), EXACT["linear"], EXACT["ties per tensor"]):
        expected = jm.merge(method, experts, base=base)
        for _ in range(3):
            tree = lazily(method, base, experts)
            check_equal(streamed(tree, tmp_path / "merged.safetensors", chunk=1 << 14, workers=3), expected)


class Watched(LazyTensor):
    """A tensor that calls a function before each of its reads."""

    def __init__(self, array: np.ndarray, before: Callable[[], object]):
        self.array, self.before = array, before
        self.shape, self.dtype, self.label = array.shape, array.dtype, "watched"

    def read(self, box: Box) -> np.ndarray:
        self.before()
        return self.array[box].copy()


def test_an_error_in_a_worker_is_raised_and_ends_all(tmp_path: Path) -> None:
    reads = itertools.count()

    def fail() -> None:
        if next(reads) == 5:
            raise ZeroDivisionError("in the reader")
        time.sleep(0.001)

    threads = threading.active_count()
    tree = {name: Watched(np.zeros((100, 10), np.float32), fail) for name in map(str, range(500))}
    with pytest.raises(ZeroDivisionError, match="in the reader"):
        streamed(tree, tmp_path / "merged")
    assert threading.active_count() == threads
    assert next(reads) < 50
    assert list(tmp_path.iterdir()) == []


def test_workers_read_while_others_compute(tmp_path: Path) -> None:
    """Two workers meet inside their reads: neither can go on before the other is there too."""
    meeting = threading.Barrier(2, timeout=60)
    tree = {name: Watched(np.zeros((100, 10), np.float32), lambda: meeting.wait()) for name in "ab"}
    streamed(tree, tmp_path / "merged.safetensors", workers=2)


def test_compiles_once_for_all_shapes(tmp_path: Path) -> None:
    """Programs are shared by tensors of all shapes, unless the method looks at the shape."""

    class Scaled(jm.Method):
        def merge_tensor(self, base, experts, info, stats):
            return experts[0] * info.shape[0]

    jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(Scaled))
    base, experts = models({f"{n}/kernel": (n, 7) for n in range(2, 5)}, np.dtype(np.float32))
    streamed(lazily(EXACT["linear"], None, experts), tmp_path / "merged.safetensors")  # compiles
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **kwargs: compiled.append(event) if "backend_compile" in event else None
    )
    base, experts = models({f"{n}/kernel": (n, 9) for n in range(2, 5)}, np.dtype(np.float32))
    streamed(lazily(EXACT["linear"], None, experts), tmp_path / "merged.safetensors")
    assert compiled == []
    found = streamed(lazily(Scaled(), None, experts), tmp_path / "merged.safetensors")
    assert len(compiled) == 3
    check_equal(found, jm.merge(Scaled(), experts))
