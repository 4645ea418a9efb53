"""Sharded merges on meshes of all forms: what travels, who computes what, and what is told when something is wrong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from jaxmerge.errors import StructureError
from tests.methods.models import assert_close
from tests.methods.test_sharding import largest_sent

SHAPE = (8, 16)
MATRICES = {f"layers/{i}/kernel": SHAPE for i in range(9)}  # two rounds on eight devices, the second nearly empty
SHAPES = MATRICES | {"norm/scale": (16,)}


def mesh_of(shape, kind=AxisType.Auto, devices=None):
    return jax.make_mesh(shape, ("a", "b", "c")[: len(shape)], axis_types=(kind,) * len(shape), devices=devices)


def models(shapes=SHAPES, experts=2):
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tuned = [{n: (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32) for n, x in base.items()}] * experts
    return base, [{n: x * (1 + i / 8) for n, x in expert.items()} for i, expert in enumerate(tuned)]


def put(model, mesh, spec):
    """The model on the mesh: matrices by `spec`, vectors on every device."""
    return {n: jax.device_put(x, NamedSharding(mesh, spec if x.ndim > 1 else P())) for n, x in model.items()}


def assert_sharded_alike(found, wanted):
    for name, value in found.items():
        assert value.sharding.is_equivalent_to(wanted[name].sharding, value.ndim), name


PLACEMENTS = {
    "8": (mesh_of((8,)), P(None, "a"), 8),
    "8x1": (mesh_of((8, 1), AxisType.Explicit), P("a", "b"), 8),
    "4x2 joint": (mesh_of((4, 2)), P(("a", "b")), 8),
    "2x2x2": (mesh_of((2, 2, 2)), P("c", ("a", "b")), 8),
    "2x2x2 in part": (mesh_of((2, 2, 2), AxisType.Explicit), P("a", "b"), 4),
}
"""Mesh, sharding of the matrices, and into how many different parts that cuts each."""
placements = pytest.mark.parametrize(("mesh", "spec", "parts"), PLACEMENTS.values(), ids=PLACEMENTS)


@placements
def test_each_matrix_is_factorised_by_one_device(mesh, spec, parts):
    base, experts = models()
    sharded, others = put(base, mesh, spec), [put(expert, mesh, spec) for expert in experts]
    method = jm.iso_c(0.7)
    program = jax.jit(lambda base, experts: jm.merge(method, experts, base=base)).lower(sharded, others).compile()
    merged = program(sharded, others)
    assert_close(jax.device_get(merged), jax.device_get(jm.merge(method, experts, base=base)), ulps=4)
    assert_sharded_alike(merged, sharded)

    # A device receives a whole matrix at a time. It gathers results only where several devices hold the same part.
    sent, entries = largest_sent(program), SHAPE[0] * SHAPE[1]
    assert sent.pop("all-to-all") <= entries
    assert max(sent.values(), default=0) <= (0 if parts == 8 else 8 * entries / parts)
    # There is one factorisation, of one matrix, which each device does twice for nine matrices.
    text = str(program.as_text())
    (factorisation,) = (line for line in text.splitlines() if "custom-call(" in line and "lapack_sgesdd" in line)
    assert "= (f32[16,8]{" in factorisation
    assert re.findall(r"known_trip_count\W+n\W+(\d+)", text) == ["2"]


@placements
def test_what_is_measured_travels_as_sums_and_counts(mesh, spec, parts):
    base, experts = models({"a/kernel": SHAPE, "b/kernel": SHAPE, "c/kernel": SHAPE})
    method = jm.partition(
        {"ties": jm.ties(0.3, scope="tensor"), "stock": jm.model_stock(), "plain": jm.task_arithmetic(0.4)},
        {"a/.*": "ties", "b/.*": "stock", "c/.*": "plain"},
    )
    sharded, others = put(base, mesh, spec), [put(expert, mesh, spec) for expert in experts]
    program = jax.jit(lambda base, experts: jm.merge(method, experts, base=base)).lower(sharded, others).compile()
    merged = program(sharded, others)
    assert_close(jax.device_get(merged), jax.device_get(jm.merge(method, experts, base=base)), ulps=4)
    assert_sharded_alike(merged, sharded)
    sent = largest_sent(program)
    assert 0 < max(sent.values()) <= 3 * mesh.size  # counts for three thresholds, or inner products of two experts


def test_outside_of_a_trace_too():
    mesh, spec, _ = PLACEMENTS["2x2x2"]
    base, experts = models()
    sharded, others = put(base, mesh, spec), [put(expert, mesh, spec) for expert in experts]
    merged, report = jm.merge(jm.iso_c(0.7), others, base=sharded, return_report=True)
    wanted, whole = jm.merge(jm.iso_c(0.7), experts, base=base, return_report=True)
    assert_close(jax.device_get(merged), jax.device_get(wanted), ulps=4)
    assert_sharded_alike(merged, sharded)
    assert [tensor.name for tensor in report.tensors] == [tensor.name for tensor in whole.tensors]
    for found, expected in zip(report.tensors, whole.tensors, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found.notes, expected.notes)

    others[1]["layers/4/kernel"] = others[1]["layers/4/kernel"].at[3, 3].set(jnp.nan)
    with pytest.raises(jm.NonFiniteError, match=r"expert_1.*layers/4/kernel|layers/4/kernel.*expert_1"):
        jm.merge(jm.iso_c(0.7), others, base=sharded)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_layers_that_are_stacked_are_spread(kind):
    base, (expert, _) = models({"layers/kernel": (9, *SHAPE)})
    rules = jm.Rules(stacked=(".*",))
    wanted, whole = jm.merge(jm.iso_c(), [expert], base=base, rules=rules, return_report=True)
    sharded, other = (put(x, mesh_of((4, 2), kind), P(None, "a", "b")) for x in (base, expert))
    merged, report = jm.merge(jm.iso_c(), [other], base=sharded, rules=rules, return_report=True)
    assert report.tensors[0].notes["directions"] == whole.tensors[0].notes["directions"] == 9 * SHAPE[0]
    merge = jax.jit(lambda base, expert: jm.merge(jm.iso_c(), [expert], base=base, rules=rules))
    program = merge.lower(sharded, other).compile()
    for found in (merged, program(sharded, other)):
        assert_close(jax.device_get(found), jax.device_get(wanted), ulps=4)
        assert_sharded_alike(found, sharded)
    sent = largest_sent(program)
    assert sent.pop("all-to-all") <= SHAPE[0] * SHAPE[1]
    assert not sent


def test_derivatives_and_sweeps_of_spread_tensors():
    mesh, spec, _ = PLACEMENTS["4x2 joint"]
    base, experts = models({f"layers/{i}/kernel": SHAPE for i in range(2)})
    sharded, others = put(base, mesh, spec), [put(expert, mesh, spec) for expert in experts]

    @jax.jit
    def loss_and_slopes(base, experts, scales):
        def loss(scale, experts):
            merged = jm.merge(jm.iso_c(scale), experts, base=base)
            return sum(jnp.sum(x**3) for x in merged.values())

        by_scale, by_experts = jax.grad(loss, (0, 1))(scales[0], experts)
        return jax.vmap(loss, (0, None))(scales, experts), by_scale, by_experts

    scales = np.array([0.5, 1.0], np.float32)
    found = jax.device_get(loss_and_slopes(sharded, others, scales))
    wanted = jax.device_get(loss_and_slopes(base, experts, scales))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


def test_a_donated_expert_gives_its_memory_to_the_result():
    mesh, spec, _ = PLACEMENTS["2x2x2 in part"]
    base, (first, second) = ([put(x, mesh, spec) for x in tree] for tree in ([models()[0]], models()[1]))
    merge = jax.jit(lambda base, first, second: jm.merge(jm.linear(), [first, second], base=base), donate_argnums=1)
    memory = merge.lower(*base, first, second).compile().memory_analysis()
    assert memory is not None
    own = sum(x.addressable_shards[0].data.nbytes for x in first.values())
    assert memory.alias_size_in_bytes == own
    merged = merge(*base, first, second)
    assert all(x.is_deleted() for x in first.values()) and not any(x.is_deleted() for x in second.values())
    assert_sharded_alike(merged, second)


def test_models_on_different_devices_are_an_error():
    devices = jax.devices()
    base, experts = models({"a/kernel": SHAPE})
    halves = [mesh_of((2, 2), devices=devices[:4]), mesh_of((2, 2), devices=devices[4:])]
    here, there = (put(base, half, P("a", "b")) for half in halves)
    with pytest.raises(StructureError, match=r"'a/kernel' of expert 'far'.*cpu:4.*the base.*cpu:0.*device_put"):
        jm.merge(jm.linear(), {"near": here, "far": there}, base=here)
    with pytest.raises(StructureError, match=r"'a/kernel' of expert 'far'.*of expert 'near'"):
        jm.merge(jm.linear(), {"near": here, "far": there})
    # What nobody has put anywhere goes where the base is.
    assert_sharded_alike(jm.merge(jm.linear(), experts, base=there), there)
