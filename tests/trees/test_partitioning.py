import flax.linen as nn
import flax.linen.spmd
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxmerge as jm
from jaxmerge.trees.partitioning import partition_shardings, shardings_of
from jaxmerge.trees.paths import named_leaves

AUTO = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
EXPLICIT = jax.make_mesh((4, 2), ("data", "model"))
SHAPES = {"blocks/0/kernel": (8, 6), "blocks/0/bias": (6,), "step": ()}
PARAMS = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
RULES = {".*kernel": P("data", "model"), ".*": P()}


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_the_first_pattern_that_matches_wins(mesh):
    shardings = partition_shardings(PARAMS, mesh, {".*bias": P(("model",)), **RULES})
    wanted = {"blocks/0/kernel": P("data", "model"), "blocks/0/bias": P(("model",)), "step": P()}
    assert shardings == {name: NamedSharding(mesh, spec) for name, spec in wanted.items()}


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"kernel": P(), ".*": P()}, "'kernel' matches no tensor; the nearest names are blocks/0/kernel"),
        (
            {".*": P(), ".*kernel": P()},
            "'.*kernel' never applies: all that it matches, such as 'blocks/0/kernel'.*'.*'",
        ),
        ({".*kernel": P()}, "no rule matches 'blocks/0/bias', 'step'; add one, or '.*'"),
        ({".*p": P("data"), ".*": P()}, r"'step' of shape \(\): the rule '.\*p' gives .*1 entries for 0 dimensions"),
        ({".*s": P("data"), ".*": P()}, r"'blocks/0/bias'.* dimension 0 has 6 entries, which 4 devices along data=4"),
        ({".*s": P(("data", "model")), ".*": P()}, "8 devices along data=4, model=2 cannot"),
        ({".*kernel": P("data", "data"), ".*": P()}, "'data' twice, for dimensions 0 and 1"),
        ({".*kernel": P("expert"), ".*": P()}, "no axis 'expert': it has data=4, model=2"),
        ({".*kernel": P(P.UNCONSTRAINED), ".*": P()}, "leaves dimension 0 open"),
        ([("mlp", "model")], "name no logical axes"),
    ],
)
def test_rules_that_cannot_work(rules, told):
    with pytest.raises(jm.RecipeError, match=told):
        partition_shardings(PARAMS, AUTO, rules)


class Block(nnx.Module):
    def __init__(self):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        self.up = nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return nn.Dense(16, kernel_init=init, name="up")(x)


LOGICAL = [("batch", "data"), ("mlp", ("data", "model")), ("embed", "model"), ("embed", "data")]


def test_logical_axis_rules_give_what_flax_gives():
    with nnx.use_eager_sharding(False):
        state = nnx.state(nnx.eval_shape(Block), nnx.Param)
    one_each = [("batch", "data"), ("mlp", "model"), ("embed", None)]
    found = partition_shardings(state, AUTO, one_each)
    assert isinstance(found, nnx.State)
    with nn.logical_axis_rules(one_each):
        assert named_leaves(found) == named_leaves(nnx.get_named_sharding(state, AUTO))
    own_names = Mesh(AUTO.devices, ("embed", "mlp"))
    assert named_leaves(partition_shardings(state, own_names, ())) == named_leaves(
        nnx.get_named_sharding(state, own_names)
    )

    boxed = jax.eval_shape(LinenBlock().init, jax.random.key(0), jnp.zeros((1, 8)))
    wanted = flax.linen.spmd.logical_to_mesh_sharding(nn.get_partition_spec(boxed), AUTO, LOGICAL)
    assert named_leaves(partition_shardings(boxed, AUTO, LOGICAL)) == named_leaves(wanted)
    # Flax's own trees of shardings are as good.
    assert shardings_of(boxed, wanted) == named_leaves(wanted)

    with pytest.raises(jm.RecipeError, match=r"'up/kernel' has a logical axis 'embed', for which .* \('embed', None\)"):
        partition_shardings(state, AUTO, [("mlp", "model")])
    with pytest.raises(jm.RecipeError, match="its logical axes, gives .* no axis 'tensor'"):
        partition_shardings(state, AUTO, [("embed", None), ("mlp", "tensor")])


def test_explicit_shardings_are_checked_against_the_tensors():
    one = SingleDeviceSharding(jax.devices()[1])
    assert shardings_of(PARAMS, one) == dict.fromkeys(PARAMS, one)
    assert shardings_of(PARAMS, None) == dict.fromkeys(PARAMS)
    everywhere = NamedSharding(AUTO, P())
    good = dict.fromkeys(PARAMS, everywhere)
    assert shardings_of(PARAMS, good) == good
    for wrong, told in (
        ({"blocks/0/kernel": everywhere, "head": everywhere}, "lacks 'blocks/0/bias', 'step' and has 'head' besides"),
        (good | {"more": everywhere}, "has 'more' besides, of 3 tensors"),
    ):
        with pytest.raises(jm.StructureError, match=told):
            shardings_of(PARAMS, wrong)
    for wrong, told in (
        (good | {"step": P()}, "'step': found .* as its sharding"),
        (NamedSharding(AUTO, P("data")), "'blocks/0/bias'.* dimension 0 has 6 entries, which 4 devices"),
        (NamedSharding(AUTO.abstract_mesh, P()), "has no devices"),
    ):
        with pytest.raises(jm.RecipeError, match=told):
            shardings_of(PARAMS, wrong)


def test_a_mesh_may_be_the_plain_kind():
    mesh = Mesh(jax.devices()[:2], ("model",))
    assert partition_shardings(PARAMS, mesh, {".*kernel": P("model"), ".*": P()})["step"] == NamedSharding(mesh, P())
