import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmerge.methods import selection
from jaxmerge.methods.selection import (
    OrderStatisticSearch,
    from_ordered_keys,
    kth_largest,
    ordered_keys,
    rank_words,
    ranks_along_last,
)

LARGEST = float(np.finfo(np.float32).max)
SPECIAL = [0.0, 1e-45, 1.1754942e-38, 1.1754944e-38, 1.0, float(np.nextafter(np.float32(1), 2)), LARGEST, np.inf]
magnitudes = st.one_of(st.sampled_from(SPECIAL), st.floats(0, LARGEST, width=32))


@st.composite
def populations(draw, max_size=60):
    """Adversarial float32 magnitudes: ties, constants, sorted runs, denormals, infinity."""
    few = draw(st.lists(magnitudes, min_size=1, max_size=4))
    entries = st.one_of(magnitudes, st.sampled_from(few))
    values = np.array(draw(st.lists(entries, min_size=1, max_size=max_size)), np.float32)
    return np.sort(values) if draw(st.booleans()) else values


def by_sorting(values, rank):
    return np.sort(np.asarray(values).ravel())[::-1][rank - 1]


def search(values, rank, sample=None, chunk=1 << 18):
    """The streamed answer and the number of passes it took."""
    found, passes = OrderStatisticSearch(rank, values.size, values.dtype), 0
    if sample is not None:
        found.sample(sample)
    while not found.done:
        for start in range(0, values.size, chunk):
            found.update(values[start : start + chunk])
        found.end_pass()
        passes += 1
    return found.result, passes


def pieces(values, step=4096, size=64):
    return [values[start : start + size] for start in range(0, values.size, step)]


def bfloat16_differences(rng, n):
    base = jnp.asarray(0.02 * rng.standard_normal(n, dtype=np.float32), jnp.bfloat16)
    tuned = (base.astype(jnp.float32) + 1e-3 * rng.standard_normal(n, dtype=np.float32)).astype(jnp.bfloat16)
    return np.asarray(jnp.abs(tuned.astype(jnp.float32) - base.astype(jnp.float32)))


# In memory


@given(populations(max_size=24), st.data())
def test_one_population_of_several_arrays_is_ranked_as_by_sorting(values, data):
    padded = np.zeros(25, np.float32)  # one shape, so one compilation; the zeros rank last
    padded[: values.size] = values
    rank = data.draw(st.integers(1, values.size))
    parts = padded[:9].reshape(3, 3), padded[9], padded[10:].reshape(1, 5, 3)
    found = kth_largest([jnp.asarray(part) for part in parts], rank_words(rank))
    assert found == by_sorting(padded, rank)
    assert found.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64])
def test_every_rank_at_once_is_the_sorted_array(rng, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        values = jnp.asarray(np.abs(rng.standard_normal((5, 8))), dtype)
        found = kth_largest([values], rank_words(np.arange(1, 41)))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, np.sort(np.asarray(values).ravel())[::-1])


def test_the_ends_of_the_ranks_and_nan_are_defined():
    values = [jnp.asarray([3.0, jnp.nan, jnp.inf, 0.5])]
    found = kth_largest(values, rank_words(np.array([-1, 0, 1, 2, 3, 4, 5, 2**40])))
    np.testing.assert_array_equal(found, [np.inf, np.inf, np.nan, np.inf, 3.0, 0.5, 0.0, 0.0])


def test_ranks_may_be_traced_mapped_and_of_any_number_type(rng):
    values = jnp.asarray(np.abs(rng.standard_normal(50, dtype=np.float32)))
    sorted_values = np.sort(np.asarray(values))[::-1]
    of_rank = jax.jit(lambda rank: kth_largest([values], rank_words(rank)))
    for rank in (jnp.int32(7), jnp.uint32(7), jnp.float32(7.9), 7, 7.5):
        assert of_rank(rank) == sorted_values[6]
    ranks = jnp.arange(1, 51).reshape(5, 10)
    np.testing.assert_array_equal(jax.vmap(of_rank)(ranks), sorted_values.reshape(5, 10))
    tables = jnp.stack([values, 2 * values, jnp.zeros(50)])
    mapped = jax.vmap(lambda table: kth_largest([table], rank_words(7)))(tables)
    np.testing.assert_array_equal(mapped, [sorted_values[6], 2 * sorted_values[6], 0.0])


def test_the_gradient_is_zero_and_does_not_get_in_the_way(rng):
    values = jnp.asarray(np.abs(rng.standard_normal(20, dtype=np.float32)))

    def kept_sum(x, density):
        return jnp.sum(jnp.where(x >= kth_largest([x], rank_words(density * x.size)), x, 0.0))

    to_values, to_density = jax.jit(jax.grad(kept_sum, (0, 1)))(values, 0.25)
    np.testing.assert_array_equal(to_values, np.asarray(values) >= by_sorting(values, 5))
    assert to_density == 0


def test_counts_do_not_overflow_beyond_32_bits():
    patterns = jnp.arange(1 << 24, dtype=jnp.uint32) % 256
    copies = 320  # 5 * 2^30 entries in all, of which the compiler counts one array only

    @jax.jit
    def reached(patterns, words):
        return selection._reached([patterns] * copies, [jnp.uint32(at) for at in (0, 51, 52, 255)], words)

    reaching = [n * (5 << 22) for n in (256, 205, 204, 1)]  # every pattern is there 5 * 2^22 times
    assert reaching[1] > 2**32 > reaching[2]
    for rank in (1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40, *reaching, *(n + 1 for n in reaching)):
        assert reached(patterns, rank_words(rank)) == [rank <= n for n in reaching]


def test_an_array_too_large_for_one_counter_is_counted_by_rows(rng, monkeypatch):
    monkeypatch.setattr(selection, "_COUNTABLE", 100)
    values = jnp.asarray(np.abs(rng.standard_normal((7, 5, 11), dtype=np.float32)))
    assert kth_largest([values], rank_words(123)) == by_sorting(values, 123)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_stay_where_they_are(rng, axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    tables = [np.abs(rng.standard_normal(shape, dtype=np.float32)) for shape in ((64, 32), (128, 16), (256,))]
    specs = P("x", "y"), P(None, "y"), P("x")
    values = [jax.device_put(t, NamedSharding(mesh, spec)) for t, spec in zip(tables, specs, strict=True)]
    program = jax.jit(kth_largest).lower(values, rank_words(np.array([1, 1000]))).compile()
    expected = np.sort(np.concatenate([table.ravel() for table in tables]))[::-1]
    np.testing.assert_array_equal(program(values, rank_words(np.array([1, 1000]))), expected[[0, 999]])
    gathers = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", str(program.as_text()))
    sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in gathers]
    assert max(sizes, default=0) <= 2 * mesh.size  # counts, one per device and rank


# Streamed


@given(populations(), st.data())
def test_a_search_finds_what_sorting_finds_whatever_the_chunks_and_the_sample(values, data):
    rank = data.draw(st.integers(1, values.size))
    several = populations(max_size=12).map(lambda entries: [entries[:5], entries[5:]])
    sample = data.draw(st.none() | st.just([np.empty(0, np.float32)]) | several)
    found, passes = search(values, rank, sample, chunk=data.draw(st.integers(1, values.size)))
    assert found == by_sorting(values, rank)
    assert found.dtype == np.float32
    assert passes <= (2 if sample and sample[0].size else 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_search_that_can_hold_little_still_ends(rng, monkeypatch, dtype):
    monkeypatch.setattr(selection, "_HELD", 1026)
    monkeypatch.setattr(selection, "_BLOCK", 100)
    values = np.exp(rng.uniform(-80, 80, 5000)).astype(dtype)  # of many exponents
    for rank in (1, 77, 2500, 5000):
        assert search(values, rank, chunk=777)[0] == by_sorting(values, rank)


@pytest.mark.parametrize(("dtype", "passes"), [(np.float32, 2), (np.float64, 4)])
def test_without_a_sample_few_passes_suffice(rng, dtype, passes):
    values = np.abs(rng.standard_normal(1_500_000)).astype(dtype)
    for rank in (1, 300_000, values.size):
        found, taken = search(values, rank)
        assert found == by_sorting(values, rank)
        assert taken <= passes


def test_with_a_sample_one_pass_suffices(rng):
    n = 4_000_000
    scale = np.repeat(rng.uniform(0.5, 2, n // 1000), 1000).astype(np.float32)  # a piece is not the population
    for values in (np.abs(rng.standard_normal(n, dtype=np.float32)), bfloat16_differences(rng, n)):
        for rank in (1, n // 100, n // 5, n // 2, n):
            assert search(values, rank, pieces(values)) == (by_sorting(values, rank), 1)
    uneven = scale * values
    assert search(uneven, n // 5, pieces(uneven)) == (by_sorting(uneven, n // 5), 1)


def test_heavy_ties_and_untouched_tensors_are_counted_not_held(rng):
    zeros = np.zeros(3_000_000, np.float32)
    assert search(zeros, 600_000, pieces(zeros)) == (0, 1)
    assert search(zeros, 600_000) == (0, 1)
    zeros[::3] = 1e-3
    assert search(zeros, 1_000_000, pieces(zeros)) == (np.float32(1e-3), 1)
    assert search(zeros, 1_000_001, pieces(zeros)) == (0, 1)


def test_a_misleading_sample_costs_passes_not_exactness(rng):
    values = np.sort(np.abs(rng.standard_normal(1_200_000, dtype=np.float32)))
    for part in (values[:4096], values[-4096:], values[600_000:600_010]):
        found, passes = search(values, 240_000, [part[::2], part[1::2]])
        assert found == by_sorting(values, 240_000)
        assert 1 < passes <= 3


def test_both_ways_agree_on_nan_and_the_ends():
    values = np.array([3.0, np.nan, np.inf, 0.5], np.float32)
    for rank in range(6):
        expected = kth_largest([jnp.asarray(values)], rank_words(rank))
        np.testing.assert_array_equal(search(values, rank)[0], expected)
    assert search(np.empty(0, np.float32), 1)[0] == kth_largest([jnp.empty(0)], rank_words(1)) == 0


def test_memory_does_not_grow_with_the_population(rng):
    chunk = np.abs(rng.standard_normal(1 << 20, dtype=np.float32))
    found = OrderStatisticSearch(1 << 21, 16 * chunk.size)
    tracemalloc.start()
    try:
        for factor in range(1, 17):
            found.update(chunk)
            chunk *= np.float32(1 + 1e-3 * factor)  # in place: each chunk brings patterns not seen before
        found.end_pass()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20  # the population has 67 MB, and without a sample all of it is looked into


def test_mistakes_are_told():
    found = OrderStatisticSearch(1, 3)
    with pytest.raises(ValueError, match="rank 1 is not known yet"):
        _ = found.result
    with pytest.raises(TypeError, match="over float32 entries, not float64"):
        found.update(np.zeros(3))
    found.update(np.ones(2, np.float32))
    with pytest.raises(ValueError, match="fed 2 entries of 3"):
        found.end_pass()


@pytest.mark.parametrize("length", [1, 5, 70_000])
def test_ranks_are_those_of_a_stable_sort(rng, length):
    """70 000 positions leave room for so few bits of a value that it takes three sorts."""
    values = np.abs(np.round(rng.standard_normal((2, length)), 3)).astype(np.float32)
    expected = np.argsort(np.argsort(values, axis=-1, kind="stable"), axis=-1)
    np.testing.assert_array_equal(ranks_along_last(jnp.asarray(values)), expected)


def test_keys_order_numbers_of_either_sign(rng):
    edges = [0.0, np.inf, -np.inf, *(s * x for s in (1, -1) for x in (1e-30, 1.2e-38, 3e38))]
    values = np.sort(np.concatenate([edges, rng.standard_normal(50)])).astype(np.float32)
    keys = ordered_keys(jnp.asarray(values))
    assert (np.diff(np.asarray(keys).view(np.uint32).astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(from_ordered_keys(keys), values)
    for rank in (1, 20, values.size):
        wanted = values[-rank]
        assert from_ordered_keys(kth_largest([keys], jnp.asarray(rank_words(rank)))) == wanted
        found = search(np.asarray(keys), rank)[0]
        assert from_ordered_keys(jnp.asarray(found)) == wanted
