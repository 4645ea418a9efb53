"""Merging lazy leaves: the same numbers as in memory, read only when and where they are asked for."""

import functools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.methods import lazy as lazy_module
from jaxmerge.trees.lazy import ArrayTensor
from tests.methods.everything import EVERYTHING, KEY, ONE_OF_EACH, each
from tests.methods.models import NAMES, assert_close, assert_same, make_models, on_device

all_methods = each(EVERYTHING)


class CountingTensor(jm.LazyTensor):
    """An array that counts the entries read from it."""

    def __init__(self, array, label="counted"):
        self.array, self.shape, self.dtype, self.label = array, array.shape, array.dtype, label
        self.entries = 0

    def read(self, box):
        value = self.array[box].copy()
        self.entries += value.size
        return value


def close_or_same(entry):
    """Sums over chunks round otherwise than over a whole tensor, by a few float32 units in the last place."""
    return functools.partial(assert_close, ulps=4) if entry.reduces else assert_same


def counted(model):
    return {name: CountingTensor(value, name) for name, value in model.items()}


def entries_read(models):
    return sum(tensor.entries for model in models for tensor in model.values())


@all_methods
def test_lazy_merge_is_the_merge_in_memory(entry):
    check_lazy_merge(entry, np.float32)


@each({name: EVERYTHING[name] for name in ONE_OF_EACH})
def test_lazy_merge_is_the_merge_in_memory_in_bfloat16(entry):
    check_lazy_merge(entry, ml_dtypes.bfloat16)


def check_lazy_merge(entry, dtype):
    base, experts = make_models(dtype=dtype)
    experts = {name: experts[name] for name in NAMES[: entry.experts]}
    wanted = jm.merge(entry.method, on_device(experts), base=on_device(base), key=KEY)
    lazy_base, lazy_experts = counted(base), {name: counted(x) for name, x in experts.items()}
    merged = jm.merge(entry.method, lazy_experts, base=lazy_base, key=KEY)
    sources = [lazy_base, *lazy_experts.values()]
    assert entries_read(sources) == 0
    assert all(isinstance(x, jm.LazyTensor) for x in merged.values())
    same = close_or_same(entry)
    for name, value in wanted.items():
        flat = np.empty(merged[name].size, merged[name].dtype)
        merged[name].read_flat(0, flat)
        same({name: flat.reshape(value.shape)}, {name: value})
        part = merged[name][1:3]
        same({name: part}, {name: value[1:3]})


def test_elementwise_methods_read_only_the_slice():
    base, experts = make_models()
    for method in (jm.task_arithmetic(0.3), jm.dare(0.5), jm.linear(), jm.lines(alpha=0.1)):
        sources = [counted(base), *map(counted, experts.values())]
        merged = jm.merge(method, sources[1:], base=sources[0], key=KEY)
        merged["blocks/1/kernel"][2:4, 1:5]
        used = sources if method.needs_base else sources[1:]
        assert [source["blocks/1/kernel"].entries for source in used] == [8] * len(used)
        assert sum(tensor.entries for s in sources for n, tensor in s.items() if n != "blocks/1/kernel") == 0


def test_measured_methods_measure_a_tensor_once():
    base, experts = make_models()
    sources = [counted(base), *map(counted, experts.values())]
    merged = jm.merge(jm.ties(0.3, scope="tensor"), sources[1:], base=sources[0])
    for row in range(8):
        merged["blocks/0/kernel"][row]
    whole = sources[0]["blocks/0/kernel"].size
    assert [source["blocks/0/kernel"].entries for source in sources] == [2 * whole] * 4
    assert sources[0]["blocks/1/kernel"].entries == 0


@pytest.mark.parametrize("name", ["ties", "ties_rescaled", "dare", "dare_l1", "slerp", "breadcrumbs", "lines_measured"])
@settings(max_examples=3)
@given(chunk=st.sampled_from([29, 150]), start=st.integers(0, 100), length=st.integers(1, 28))
def test_any_cut_into_chunks_gives_the_same(name, chunk, start, length):
    entry = EVERYTHING[name]
    base, experts = make_models()
    experts = {name: lazily(experts[name]) for name in NAMES[: entry.experts]}
    wanted = read(jm.merge(entry.method, experts, base=lazily(base), key=KEY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_module, "CHUNK", chunk)
        merged = jm.merge(entry.method, experts, base=lazily(base), key=KEY)
        part = np.empty(length, np.float32)
        merged["blocks/1/kernel"].read_flat(start, part)
        same = close_or_same(entry)
        same(read(merged), wanted)
        same({"part": part}, {"part": wanted["blocks/1/kernel"].reshape(-1)[start : start + length]})


def lazily(model):
    return {name: ArrayTensor(value) for name, value in model.items()}


def read(model):
    return {name: value[...] for name, value in model.items()}


def test_a_merge_of_merges_is_lazy():
    base, experts = make_models()
    sources = [counted(base), *map(counted, experts.values())]
    inner = jm.merge(jm.ties(0.3), sources[1:], base=sources[0])
    outer = jm.merge(jm.linear(), [inner, sources[1]])
    assert entries_read(sources) == 0
    memory = jm.merge(jm.ties(0.3), list(on_device(experts).values()), base=on_device(base))
    wanted = jm.merge(jm.linear(), [memory, on_device(experts[NAMES[0]])])
    assert_same(read(outer), wanted)


def test_lazy_and_arrays_mix():
    base, experts = make_models()
    wanted = jm.merge(jm.ties(0.3), on_device(experts), base=on_device(base))
    mixed = {name: lazily(x) if name == "code" else on_device(x) for name, x in experts.items()}
    assert_same(read(jm.merge(jm.ties(0.3), mixed, base=base)), wanted)


def test_derived_tensors_merge():
    """Transposed, cast and sliced leaves are leaves like any other."""
    base, experts = make_models(shapes={"w": (8, 16)})
    derived = [
        {"w": ArrayTensor(x["w"].T.copy()).T.astype(ml_dtypes.bfloat16).window(slice(1, 5))} for x in experts.values()
    ]
    merged = jm.merge(jm.linear(), derived)["w"]
    plain = [on_device({"w": x["w"].astype(ml_dtypes.bfloat16)[1:5]}) for x in experts.values()]
    assert_same({"w": merged[...]}, jm.merge(jm.linear(), plain))


def test_nonfinite_input_is_an_error_when_it_is_read():
    base, experts = make_models()
    experts["code"]["blocks/1/kernel"][3, 3] = np.inf
    merged = jm.merge(jm.linear(), {name: lazily(x) for name, x in experts.items()})
    merged["blocks/0/kernel"][...]
    with pytest.raises(jm.NonFiniteError, match=r"expert 'code'.*'blocks/1/kernel'"):
        merged["blocks/1/kernel"][...]
    passing = jm.merge(jm.linear(), {name: lazily(x) for name, x in experts.items()}, allow_nonfinite=True)
    assert np.isinf(passing["blocks/1/kernel"][3, 3])


def test_leaves_that_are_not_floating_point_are_compared_when_read():
    base = {"w": np.zeros(3, np.float32), "steps": np.arange(3)}
    good = jm.merge(jm.linear(), [lazily(base), lazily(base)])
    np.testing.assert_array_equal(good["steps"][...], base["steps"])
    bad = jm.merge(jm.linear(), {"a": lazily(base), "b": lazily(base | {"steps": np.ones(3, np.int64)})})
    with pytest.raises(jm.StructureError, match=r"'b'.*'steps'"):
        bad["steps"][...]
