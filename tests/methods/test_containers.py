"""Whatever container parameters come in, the result comes in the same."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from flax.core import FrozenDict

import jaxmerge as jm


@struct.dataclass
class Block:
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plain:
    kernel: Any
    blocks: list[Block]


def block(x):
    return {"kernel": jnp.full((2, 3), x), "bias": jnp.full((3,), x)}


CONTAINERS = {
    "nested dict": lambda x: {"a": block(x), "b": {"c": block(2 * x)}},
    "FrozenDict": lambda x: FrozenDict({"a": block(x)}),
    "flat dict": lambda x: {"model.layers.0.mlp.weight": jnp.full((2, 3), x), "model.norm.weight": jnp.full((3,), x)},
    "flax dataclass": lambda x: Block(**block(x)),
    "dataclass with a list": lambda x: Plain(jnp.full((2,), x), [Block(**block(x)), Block(**block(2 * x))]),
    "tuple and None": lambda x: (jnp.full((2,), x), None, [jnp.full((), x)]),
    "linen boxes": lambda x: {"w": nn.Partitioned(jnp.full((2, 3), x), names=("rows", None))},
    "nnx state": lambda x: nnx.state(
        nnx.Linear(2, 3, kernel_init=nnx.initializers.constant(x), rngs=nnx.Rngs(0)), nnx.Param
    ),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_result_comes_in_the_container_of_the_base(make):
    base, experts = make(1.0), [make(2.0), make(4.0)]
    before = [np.array(leaf) for leaf in jax.tree.leaves((base, experts))]
    merge = lambda base, experts: jm.merge(jm.task_arithmetic(0.5), experts, base=base)  # noqa: E731
    for run in (merge, jax.jit(merge)):
        merged = run(base, experts)
        assert type(merged) is type(base)
        assert jax.tree.structure(merged) == jax.tree.structure(base)
        for found, *given in zip(jax.tree.leaves(merged), *map(jax.tree.leaves, (base, *experts)), strict=True):
            b, x, y = map(np.asarray, given)
            np.testing.assert_allclose(found, b + 0.5 * (x - b + y - b), rtol=1e-6)
            assert found.dtype == b.dtype
    for leaf, copy in zip(jax.tree.leaves((base, experts)), before, strict=True):
        np.testing.assert_array_equal(leaf, copy)


def test_base_and_experts_may_be_of_different_containers():
    base, expert = CONTAINERS["nested dict"](1.0), FrozenDict(CONTAINERS["nested dict"](3.0))
    merged = jm.merge(jm.task_arithmetic(0.5), [expert], base=base)
    assert isinstance(merged, dict)
    np.testing.assert_array_equal(merged["a"]["bias"], 2.0)
    assert isinstance(jm.merge(jm.linear(), [expert, base]), FrozenDict)


def test_dtypes_stay():
    base = {
        "a": jnp.ones(3, jnp.bfloat16),
        "b": jnp.ones(3, jnp.float16),
        "c": jnp.ones(3),
        "d": np.ones(3, np.float32),
    }
    base["e"] = jnp.ones(3, jnp.float8_e4m3fn)
    merged = jm.merge(jm.ties(0.5), [base, base], base=base)
    assert {name: x.dtype for name, x in merged.items()} == {name: x.dtype for name, x in base.items()}


class Tied(nnx.Module):
    def __init__(self, value):
        self.embed = nnx.Param(jnp.full((4, 2), value))
        self.head = self.embed
        self.scale = nnx.Param(jnp.full((2,), value))


def test_tied_parameters_stay_tied():
    base, expert = Tied(1.0), Tied(3.0)
    state = nnx.state(base, nnx.Param)
    assert set(jm.named_leaves(state)) == {"embed", "scale"}
    nnx.update(base, jm.merge(jm.linear(), [state, nnx.state(expert, nnx.Param)]))
    assert base.embed is base.head
    np.testing.assert_array_equal(base.head[...], 2.0)


def test_modules_are_refused():
    with pytest.raises(jm.StructureError, match=r"nnx\.state"):
        jm.merge(jm.linear(), [Tied(1.0), Tied(2.0)])


def test_leaves_that_are_not_floating_point_are_the_bases():
    def model(x):
        return {"w": jnp.full(3, x), "steps": jnp.arange(3), "on": np.array([True]), "key": jax.random.key(int(x))}

    base, expert = model(1.0), model(2.0)
    merged = jm.merge(jm.task_arithmetic(1.0), [expert], base=base)
    for name in ("steps", "on", "key"):
        assert merged[name] is base[name]
    np.testing.assert_array_equal(merged["w"], 2.0)
    report = jm.merge(jm.task_arithmetic(1.0), [expert], base=base, return_report=True)[1]
    assert {t.name: t.action for t in report.tensors} == {
        "w": "merged",
        "steps": "copied",
        "on": "copied",
        "key": "copied",
    }
    with pytest.raises(jm.StructureError, match=r"'expert_0'.*'steps'"):
        jm.merge(jm.task_arithmetic(1.0), [expert | {"steps": jnp.ones(3, jnp.int32)}], base=base)


def test_full_nnx_state_with_counters_and_keys_merges():
    class Model(nnx.Module):
        def __init__(self, seed):
            self.linear = nnx.Linear(2, 3, rngs=nnx.Rngs(seed))
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(seed))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    states = [nnx.state(Model(seed)) for seed in (0, 1)]
    merged = jm.merge(jm.linear(), states)
    assert jax.tree.structure(merged) == jax.tree.structure(states[0])
    found, *kernels = (jm.named_leaves(state)["linear/kernel"] for state in (merged, *states))
    np.testing.assert_allclose(found, (kernels[0] + kernels[1]) / 2, rtol=1e-6, atol=1e-7)


BY_ENTRY = (
    jm.linear(),
    jm.ties(0.5),
    jm.ties(1.0, scope="tensor"),
    jm.breadcrumbs(0.9, scale=0.5),
    jm.dare(1.0, scale=0.5),
    jm.model_stock(),
)
BY_FIBRE = (jm.della(1.0), jm.model_stock(axis=-1), jm.breadcrumbs(1.0, gamma=0.0, scale=0.5, axis=-1))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1), (2, 1, 3)], ids=str)
def test_odd_shapes(shape):
    base, experts = {"w": jnp.zeros(shape)}, [{"w": jnp.full(shape, 1.0)}, {"w": jnp.full(shape, 3.0)}]
    for method in BY_FIBRE if shape == (3, 0) else BY_ENTRY + BY_FIBRE:  # empty is empty where axes do not matter
        merged = jm.merge(method, experts, base=base, key=0)["w"]
        assert merged.shape == shape
        np.testing.assert_allclose(merged, np.full(shape, 2.0), rtol=1e-6)
