"""Merging sharded parameters gives the unsharded result, in the base's sharding, on both kinds of mesh axes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from tests.methods.everything import EVERYTHING, KEY, each
from tests.methods.models import NAMES, assert_close, make_models, on_device

MESHES = {
    "auto": jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto)),
    "explicit": jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Explicit)),
}

meshes = pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
all_methods = each(EVERYTHING)


COLLECTIVES = ("all-gather", "all-to-all", "all-reduce", "collective-permute", "reduce-scatter")
SPECS = {"kernel": P("data", "model"), "bias": P("data"), "scale": P()}
SHAPES = {"blocks/0/kernel": (8, 16), "blocks/1/kernel": (8, 16), "blocks/1/bias": (16,), "norm/scale": (16,)}


def inputs(entry, mesh):
    """The models on one device, and sharded."""
    base, experts = make_models(shapes=SHAPES)
    models = on_device(base), {name: on_device(experts[name]) for name in NAMES[: entry.experts]}

    def put(model):
        return {n: jax.device_put(x, NamedSharding(mesh, SPECS[n.split("/")[-1]])) for n, x in model.items()}

    return models, (put(models[0]), {name: put(expert) for name, expert in models[1].items()})


@meshes
@all_methods
def test_sharded_merge_is_the_unsharded_one(entry, mesh):
    (base, experts), (sharded_base, sharded_experts) = inputs(entry, mesh)
    wanted = jm.merge(entry.method, experts, base=base, key=KEY)
    eager = jm.merge(entry.method, sharded_experts, base=sharded_base, key=KEY)
    shardings = jax.tree.map(lambda x: x.sharding, (sharded_base, sharded_experts))
    merge = jax.jit(
        lambda base, experts: jm.merge(entry.method, experts, base=base, key=KEY),
        in_shardings=shardings,
        out_shardings=shardings[0],
    )
    program = merge.lower(sharded_base, sharded_experts).compile()
    for merged in (eager, program(sharded_base, sharded_experts)):
        assert_close(jax.device_get(merged), wanted, ulps=16 if entry.sorts else 4)
        for name, value in merged.items():
            assert value.sharding.is_equivalent_to(sharded_base[name].sharding, value.ndim), name
    sent = largest_sent(program)
    matrix = sent.pop("all-to-all", 0)
    assert matrix <= (math.prod(SHAPES["blocks/0/kernel"]) if entry.sorts else 0)
    ranked = 2 * entry.experts * SHAPES["norm/scale"][0] if entry.sorts else 0  # vectors, which travel whole
    summed = 4 * SHAPES["blocks/0/kernel"][0] if entry.method.whole_tensor else 0  # some numbers for each row
    assert max(sent.values(), default=0) <= max(ranked, summed, 3 * mesh.size)  # counts of three ranks by every device


def largest_sent(program):
    """For each kind of collective in a compiled program, how many entries a device receives by one of them at most."""
    largest = {}
    for shapes, kind in re.findall(rf" = (.*) ({'|'.join(COLLECTIVES)})(?:-start)?\(", program.as_text()):
        entries = sum(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]", shapes))
        largest[kind] = max(entries, largest.get(kind, 0))
    return largest


@meshes
def test_experts_take_the_sharding_of_the_base(mesh):
    (base, experts), (sharded, _) = inputs(EVERYTHING["ties"], mesh)
    rows = NamedSharding(mesh, P("data"))
    elsewhere = {name: jax.device_put(expert, rows) for name, expert in experts.items()}
    merged = jm.merge(jm.ties(0.3), elsewhere, base=sharded)
    assert_close(jax.device_get(merged), jm.merge(jm.ties(0.3), experts, base=base), ulps=2)
    assert all(merged[name].sharding.is_equivalent_to(sharded[name].sharding, merged[name].ndim) for name in merged)


def test_without_a_base_the_first_expert_gives_the_sharding():
    (_, experts), (_, sharded) = inputs(EVERYTHING["linear"], MESHES["auto"])
    merged = jm.merge(jm.linear(), sharded)
    assert_close(jax.device_get(merged), jm.merge(jm.linear(), experts), ulps=2)
    first = sharded[NAMES[0]]
    assert all(merged[name].sharding.is_equivalent_to(first[name].sharding, merged[name].ndim) for name in merged)


@meshes
def test_stacked_layers_may_be_sharded_over_layers(mesh):
    rng = np.random.default_rng(0)
    base = {"layers/kernel": jnp.asarray(rng.standard_normal((8, 4, 6), np.float32))}
    experts = [{"layers/kernel": base["layers/kernel"] * (1 + 0.1 * i)} for i in range(1, 4)]
    sharding = NamedSharding(mesh, P("data", None, "model"))
    put = lambda tree: jax.device_put(tree, sharding)  # noqa: E731
    rules = jm.Rules(stacked=(".*",))
    for method in (jm.task_arithmetic(jm.by_depth([0.1, 0.9])), jm.ties(0.3), jm.dare(0.5)):
        merged = jm.merge(method, [put(x) for x in experts], base=put(base), key=KEY, rules=rules)
        wanted = jm.merge(method, experts, base=base, key=KEY, rules=rules)
        assert_close(jax.device_get(merged), wanted, ulps=2)
        assert merged["layers/kernel"].sharding.is_equivalent_to(sharding, 3)
