"""M2N2 beside what it is made of, on scikit-learn's digits at equal numbers of evaluations: mean and spread over seeds.

Two perceptrons 64-256-10 are trained from one start, one on the digits 0 to 4, one on 5 to 9 (Adam 3e-3, 10 full-batch
steps, as in the authors' pretrained setting). What evolves is judged on the training half, what is reported is accuracy
on the other half. The seeds run side by side under `jax.vmap`.

    python benchmarks/evolution.py --steps 1000 --seeds 10
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxmerge as jm

VARIANTS: dict[str, dict[str, Any]] = {
    "M2N2": {},
    "one angle per tensor": {"per_tensor": True},
    "no split point": {"split": False},
    "no attraction": {"attraction": False},
    "no competition": {"competition": 0.0},
    "genetic algorithm (neither)": {"competition": 0.0, "attraction": False},
}

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES, LABELS = jnp.asarray(IMAGES / 16.0, jnp.float32), jnp.asarray(LABELS)
TRAIN = np.arange(len(LABELS)) % 2 == 0


def logits(params: Any, x: Any) -> Any:
    hidden = jax.nn.relu(x @ params["layers/0/kernel"] + params["layers/0/bias"][None])
    return hidden @ params["layers/1/kernel"] + params["layers/1/bias"][None]


def solved(params: Any, which: Any = TRAIN) -> Any:
    return (logits(params, IMAGES[which]).argmax(axis=1) == LABELS[which]).astype(jnp.float32)


def train(params: Any, digits: Any, steps: int) -> Any:
    here = TRAIN & np.isin(LABELS, digits)
    optimizer = optax.adam(3e-3)

    def loss(params: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, IMAGES[here]), LABELS[here]).mean()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def make_experts(seed: int, steps: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    start = {}
    for layer, (inputs, outputs) in enumerate([(64, 256), (256, 10)]):
        bound = 1 / np.sqrt(inputs)
        start[f"layers/{layer}/kernel"] = jnp.asarray(rng.uniform(-bound, bound, (inputs, outputs)), jnp.float32)
        start[f"layers/{layer}/bias"] = jnp.asarray(rng.uniform(-bound, bound, outputs), jnp.float32)
    return {"low": train(start, range(5), steps), "high": train(start, range(5, 10), steps)}


def evolve(pairs: Any, steps: int, population: int, options: dict[str, Any]) -> np.ndarray:
    """Test accuracy of the best model of every seed."""
    starts = [jm.niches_start(pair, solved, population=population) for pair in pairs]
    starts = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    step = functools.partial(jm.niches_step, score=solved, like=pairs[0]["low"], **options)

    @jax.jit
    @jax.vmap
    def run(niches: Any, key: Any) -> Any:
        niches, _ = jax.lax.scan(lambda state, key: (step(state, key)[0], None), niches, jax.random.split(key, steps))
        return solved(niches.best, ~TRAIN).mean()

    return np.asarray(run(starts, jax.random.split(jax.random.key(0), len(pairs))))


def cma_es(pairs: Any, evaluations: int) -> np.ndarray:
    """The same for CMA-ES over one weight per tensor and expert."""
    start = jm.linear(jm.learnable(0.5), normalize=False)
    judge = jax.jit(lambda params: solved(params).mean())
    found = []
    for seed, pair in enumerate(pairs):
        best = jm.search(start, pair, lambda p: float(judge(p)), evaluations=evaluations, seed=seed, progress=False)
        found.append(float(solved(jm.merge(best.method, pair), ~TRAIN).mean()))
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--population", type=int, default=20)
    parser.add_argument("--training-steps", type=int, default=10)
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    pairs = [make_experts(seed, args.training_steps) for seed in range(args.seeds)]
    rows: dict[str, tuple[np.ndarray, float]] = {}

    def record(name: str, run: Any) -> None:
        began = time.perf_counter()
        rows[name] = (np.asarray(run()), time.perf_counter() - began)

    record("the better expert", lambda: [max(solved(x, ~TRAIN).mean() for x in pair.values()) for pair in pairs])
    record("average", lambda: [solved(jm.merge(jm.linear(), pair), ~TRAIN).mean() for pair in pairs])
    for name, options in VARIANTS.items():
        record(name, functools.partial(evolve, pairs, args.steps, args.population, options))
    record("CMA-ES, a weight per tensor and expert", lambda: cma_es(pairs, args.steps))
    print(f"| {args.seeds} seeds, {args.steps} evaluations | test accuracy | standard deviation | seconds in all |")
    print("| --- | --- | --- | --- |")
    for name, (found, seconds) in rows.items():
        print(f"| {name} | {100 * found.mean():.1f} | {100 * found.std(ddof=1):.1f} | {seconds:.0f} |")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({name: found.tolist() for name, (found, _) in rows.items()}, file, indent=1)


if __name__ == "__main__":
    main()
