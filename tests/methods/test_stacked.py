"""Scanned models, whose leaves hold one tensor per layer, merge like unrolled ones."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge as jm
from jaxmerge.trees.lazy import ArrayTensor
from tests.methods.everything import DETERMINISTIC, EVERYTHING, KEY, Entry, each
from tests.methods.models import NAMES, WITH_EMBEDDING, assert_close, make_models, on_device

LAYERS = 3
RULES = jm.Rules(stacked=("blocks/.*",))

VARYING = {
    "by depth": jm.task_arithmetic(jm.by_depth([0.1, 0.9], outside=0.5)),
    "density by depth": jm.ties(jm.by_depth([0.1, 0.9]), scope="tensor"),
    "weights by depth": jm.linear({name: jm.by_depth([i, 1.0]) for i, name in enumerate(NAMES, 1)}),
}
METHODS = {name: entry for name, entry in DETERMINISTIC.items() if name != "partition"}
METHODS |= {name: Entry(method) for name, method in VARYING.items()}


def stacked(model):
    """`blocks/kernel` of shape [L, ...] in place of `blocks/0/kernel`, …"""
    inside = {name.split("/")[-1] for name in model if name.startswith("blocks/")}
    rest = {name: value for name, value in model.items() if not name.startswith("blocks/")}
    return {f"blocks/{part}": np.stack([model[f"blocks/{i}/{part}"] for i in range(LAYERS)]) for part in inside} | rest


def models():
    base, experts = make_models(shapes=WITH_EMBEDDING)
    unrolled = on_device(base), on_device(experts)
    return unrolled, (on_device(stacked(base)), {name: on_device(stacked(x)) for name, x in experts.items()})


@each(METHODS)
def test_scanned_and_unrolled_models_merge_alike(entry):
    (base, experts), (scanned_base, scanned_experts) = models()
    experts, scanned_experts = ({name: x[name] for name in NAMES[: entry.experts]} for x in (experts, scanned_experts))
    merged = jm.merge(entry.method, scanned_experts, base=scanned_base, rules=RULES)
    wanted = stacked(jax.device_get(jm.merge(entry.method, experts, base=base)))
    assert_close({name: merged[name] for name in wanted}, wanted, ulps=2)


def test_layers_of_a_scanned_model_draw_independently():
    base = {"layers": jnp.zeros((4, 50, 50))}
    merged = jm.merge(
        jm.dare(0.5), [{"layers": jnp.ones((4, 50, 50))}], base=base, key=KEY, rules=jm.Rules(stacked=("layers",))
    )
    kept = np.asarray(merged["layers"]) != 0
    agreement = [(kept[i] == kept[j]).mean() for i in range(4) for j in range(i)]
    assert all(abs(share - 0.5) < 0.06 for share in agreement)
    np.testing.assert_allclose(kept.mean(axis=(1, 2)), 0.5, atol=0.05)


@each({name: EVERYTHING[name] for name in ("ties", "ties_per_tensor", "dare", "della", "model_stock")})
def test_scanned_models_merge_lazily_and_under_jit(entry):
    _, (base, experts) = models()
    wanted = jm.merge(entry.method, experts, base=base, key=KEY, rules=RULES)
    jitted = jax.jit(lambda b, e: jm.merge(entry.method, e, base=b, key=KEY, rules=RULES))(base, experts)
    assert_close(jitted, wanted, ulps=2)
    lazy = jm.merge(entry.method, {n: as_lazy(x) for n, x in experts.items()}, base=as_lazy(base), key=KEY, rules=RULES)
    for tensor, value in wanted.items():
        assert_close({tensor: lazy[tensor][...]}, {tensor: value})
        if tensor.startswith("blocks"):
            assert_close({tensor: lazy[tensor][1]}, {tensor: value[1]})


def as_lazy(model):
    return {name: ArrayTensor(np.asarray(value)) for name, value in model.items()}
