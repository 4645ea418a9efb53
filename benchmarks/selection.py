"""Ways to the exact k-th largest magnitude, timed in turn: median milliseconds, and the ratio to ours.

Two populations: absolute values of normal draws, and differences of bfloat16 numbers (a fine-tuned and a base tensor),
which are full of ties. Every way must give the value that a full sort gives, or the benchmark fails. The ways take
turns for `--rounds` rounds, so that a disturbance hits them all; one that has used up `--seconds` sits out the rest.

    python benchmarks/selection.py --entries 16777216 --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from jaxmerge.methods.selection import OrderStatisticSearch, kth_largest, rank_words

CHUNK = 1 << 20
PIECE = 256  # entries of one sampled piece
SAMPLE = 1 << 18  # entries sampled


def populations(entries: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def normal(scale: float) -> np.ndarray:
        return np.float32(scale) * rng.standard_normal(entries, dtype=np.float32)

    base = normal(0.02).astype(ml_dtypes.bfloat16).astype(np.float32)
    tuned = (base + normal(1e-3)).astype(ml_dtypes.bfloat16).astype(np.float32)
    return {"normal": np.abs(normal(1e-3)), "bfloat16": np.abs(tuned - base)}


def one_bit_a_pass(values: jax.Array, k: jax.Array) -> jax.Array:
    """The usual bisection: one threshold, hence one bit of the answer, per pass."""
    patterns = lax.bitcast_convert_type(values, jnp.uint32)

    def fix_bit(i: jax.Array, answer: jax.Array) -> jax.Array:
        trial = answer | (jnp.uint32(1) << (30 - i).astype(jnp.uint32))
        return jnp.where(jnp.sum(patterns >= trial, dtype=jnp.int32) >= k, trial, answer)

    return lax.bitcast_convert_type(lax.fori_loop(0, 31, fix_bit, jnp.uint32(0)), jnp.float32)


def two_histograms(values: np.ndarray, k: int) -> np.floating:
    """Histogram of the upper 16 bits, then one of the lower 15 within the bin that holds the answer."""
    patterns, prefix = values.view(np.int32), 0
    for shift, bits in ((15, 16), (0, 15)):
        counts = np.bincount(patterns >> shift & (1 << bits) - 1, minlength=1 << bits)
        reaching = np.cumsum(counts[::-1])
        digit = int(np.searchsorted(reaching, k))
        k -= int(reaching[digit] - counts[::-1][digit])
        digit = (1 << bits) - 1 - digit
        prefix |= digit << shift
        patterns = patterns[patterns >> shift == prefix >> shift]
    return np.int32(prefix).view(np.float32)


def streamed(values: np.ndarray, k: int, sample: int) -> np.floating:
    search = OrderStatisticSearch(k, values.size)
    if sample:
        step = max(PIECE, values.size // (sample // PIECE))
        search.sample([values[i : i + PIECE] for i in range(0, values.size, step)])
    while not search.done:
        for start in range(0, values.size, CHUNK):
            search.update(values[start : start + CHUNK])
        search.end_pass()
    return search.result


def ways(values: np.ndarray, k: int, pool: ThreadPoolExecutor) -> dict[str, tuple[Callable[[], object], int]]:
    """Name → what to time, and how many searches it does."""
    array, words = jnp.asarray(values), rank_words(k)
    sort, top_k = jax.jit(lambda x: jnp.sort(x)[-k]), jax.jit(lambda x: lax.top_k(x, k)[0][-1])
    bisect = jax.jit(one_bit_a_pass)
    return {
        "jnp.sort": (lambda: sort(array), 1),
        "lax.top_k": (lambda: top_k(array), 1),
        "np.sort": (lambda: np.sort(values)[-k], 1),
        "np.partition (whole array, a copy)": (lambda: np.partition(values, values.size - k)[-k], 1),
        "np.bincount, two passes": (lambda: two_histograms(values, k), 1),
        "bisection, one bit a pass": (lambda: bisect(array, k), 1),
        "kth_largest": (lambda: kth_largest([array], words), 1),
        "OrderStatisticSearch, no sample": (lambda: streamed(values, k, 0), 1),
        "OrderStatisticSearch": (lambda: streamed(values, k, SAMPLE), 1),
        "OrderStatisticSearch, 2 in 2 threads, each": (
            lambda: next(iter(set(pool.map(lambda _: streamed(values, k, SAMPLE), range(2))))),
            2,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1 << 24)
    parser.add_argument("--density", type=float, default=0.2, help="which cut: the share of entries above it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="time after which a way sits out")
    args = parser.parse_args()
    k = max(1, int(args.density * args.entries))
    medians: dict[str, dict[str, float]] = {}
    for population, values in populations(args.entries).items():
        truth = np.sort(values)[-k]
        with ThreadPoolExecutor(2) as pool:
            timed = ways(values, k, pool)
            taken: dict[str, list[float]] = {name: [] for name in timed}
            for way, (run, _) in timed.items():
                if (found := np.asarray(run())) != truth:  # also compiles
                    raise SystemExit(f"{way} found {found}, the sorted array says {truth}")
            for _ in range(args.rounds):
                for way, (run, searches) in timed.items():
                    if sum(taken[way]) < args.seconds:
                        start = time.perf_counter()
                        jax.block_until_ready(run())
                        taken[way].append((time.perf_counter() - start) / searches)
        for way, seconds in taken.items():
            medians.setdefault(way, {})[population] = 1e3 * statistics.median(seconds)
    print(f"{args.entries} float32 entries, rank {k}; median ms (ratio to OrderStatisticSearch)")
    print(f"{'way':44}" + "".join(f"{population:>22}" for population in next(iter(medians.values()))))
    for way, by_population in medians.items():
        cells = (f"{ms:12.1f} ({ms / medians['OrderStatisticSearch'][p]:6.1f})" for p, ms in by_population.items())
        print(f"{way:44}" + " ".join(f"{cell:>21}" for cell in cells))


if __name__ == "__main__":
    main()
