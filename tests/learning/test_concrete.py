"""Concrete masks: what a mask does, how its logits are learned, and what that does to a backdoor."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import jaxmerge as jm
from jaxmerge.errors import NonFiniteError, RecipeError, ShapeError, StructureError
from jaxmerge.learning.learn import LearnState
from jaxmerge.methods.concrete import uniform_draws
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.lazy import ArrayTensor
from tests.methods.models import assert_same, on_device

SHAPES = {"first": (4, 5), "head": (5, 3)}
NAMES = ("maths", "code")  # not in alphabetical order
RNG = np.random.default_rng(0)
BASE = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
EXPERTS = {
    expert: {n: (w + 0.4 * RNG.normal(size=w.shape)).astype(np.float32) for n, w in BASE.items()} for expert in NAMES
}
LOGITS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
INPUTS = {"a": RNG.uniform(size=(6, 4)).astype(np.float32), "b": RNG.uniform(size=(6, 4)).astype(np.float32)}
PLAIN = jm.task_arithmetic(0.5)


def network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["head"]


def apply(params, batch):
    return {task: network(params, x) for task, x in batch.items()}


LOSS = jm.entropy(apply)


def learn(method: jm.Method = PLAIN, batches: Any = (INPUTS,), steps: int = 2, **options: Any) -> jm.Learned:
    options = {"loss": LOSS, "base": BASE, "optimizer": optax.sgd(1.0), "progress": False} | options
    return jm.learn_concrete(method, EXPERTS, batches, steps=steps, **options)


def masked(logits, seed=None, temperature=0.5) -> jm.Method:
    return jm.chain(*PLAIN.stages, jm.concrete_mask(logits, seed=seed, temperature=temperature))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# In NumPy and float64


def merged_by_hand(logits, weights=(0.5, 0.5), temperature=0.5):
    merged = {}
    for name, base in BASE.items():
        mask = sigmoid(np.asarray(logits[name], np.float64) / temperature)
        total = sum(w * (EXPERTS[e][name].astype(np.float64) - base) for e, w in zip(NAMES, weights, strict=True))
        merged[name] = base + mask / mask.mean() * total
    return merged


def answers(params, x):
    logits = np.tanh(x.astype(np.float64) @ params["first"]) @ params["head"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def entropy_by_hand(params, batch):
    return sum(-(p * np.log(p)).sum(axis=1).mean() for p in (answers(params, x) for x in batch.values()))


def derivative(function, at):
    found = np.zeros(np.shape(at))
    for index in np.ndindex(*found.shape):
        step = np.zeros(found.shape)
        step[index] = 1e-5
        found[index] = (function(at + step) - function(at - step)) / 2e-5
    return found


# The mask


def test_a_mask_scales_entries_around_its_mean():
    """Before or after the sum, in memory, traced and lazily; equal logits change nothing, and zero stays zero."""
    found = jm.merge(masked(LOGITS), EXPERTS, base=BASE)
    expected = merged_by_hand(LOGITS)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
    before = jm.chain(jm.concrete_mask(LOGITS), *PLAIN.stages)
    for name, value in jm.merge(before, EXPERTS, base=BASE).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
    lazily = {name: ArrayTensor(x) for name, x in LOGITS.items()}
    experts = {e: {n: ArrayTensor(x) for n, x in expert.items()} for e, expert in EXPERTS.items()}
    streamed = jm.merge(masked(lazily), experts, base={n: ArrayTensor(x) for n, x in BASE.items()})
    assert_same({name: np.asarray(x) for name, x in streamed.items()}, jax.device_get(found))
    traced = jax.jit(lambda logits: jm.merge(masked(logits), EXPERTS, base=BASE))(on_device(LOGITS))
    for name in SHAPES:
        np.testing.assert_allclose(traced[name], found[name], rtol=1e-6, atol=1e-7)

    plain = jm.merge(PLAIN, EXPERTS, base=BASE)
    equal = jm.merge(masked({name: np.full(s, 0.7, np.float32) for name, s in SHAPES.items()}), EXPERTS, base=BASE)
    nothing = jm.merge(masked({name: np.full(s, -500, np.float32) for name, s in SHAPES.items()}), EXPERTS, base=BASE)
    for name in SHAPES:
        np.testing.assert_allclose(equal[name], plain[name], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(nothing[name], BASE[name])


def test_a_seed_draws_one_mask_for_all_experts():
    """By the seed and the tensor's name: not by the order of experts, not by how the merge is run."""
    flat = {name: np.zeros((5, 5), np.float32) for name in ("a", "b")}
    ones = {name: np.ones((5, 5), np.float32) for name in flat}

    def drawn(seed, experts):
        return jax.device_get(jm.merge(jm.chain(jm.total(), jm.concrete_mask(flat, seed=seed)), experts, base=flat))

    first = drawn(1, {"x": ones, "y": flat})
    assert_same(first, drawn(1, {"z": flat, "w": ones}))
    assert (first["a"] != first["b"]).any() and (first["a"] != drawn(2, [ones])["a"]).any()
    np.testing.assert_allclose(first["a"].mean(), 1, rtol=1e-6)

    info = TensorInfo("a", (100, 200))
    draws = np.asarray(uniform_draws(jnp.array([1, 2], jnp.uint32), info.shape, info)).ravel()
    assert draws.min() > 0 and draws.max() < 1
    count = draws.size
    np.testing.assert_allclose(np.sort(draws), (np.arange(count) + 0.5) / count, atol=1.63 / np.sqrt(count))  # 1 %


def test_logits_that_do_not_fit_are_refused():
    with pytest.raises(StructureError, match="no logits for tensor 'head'"):
        jm.merge(masked({"first": LOGITS["first"]}), EXPERTS, base=BASE)
    with pytest.raises(ShapeError, match="logits of tensor 'first': found shape"):
        jm.merge(masked(LOGITS | {"first": LOGITS["head"]}), EXPERTS, base=BASE)
    with pytest.raises(NonFiniteError, match="logits of tensor 'head': found NaN"):
        jm.merge(masked(LOGITS | {"head": LOGITS["head"] * np.nan}), EXPERTS, base=BASE)
    with pytest.raises(StructureError, match="found str"):
        jm.concrete_mask({"first": "z.npz"})
    with pytest.raises(RecipeError, match="temperature is 0"):
        jm.concrete_mask(LOGITS, temperature=0.0)


# Learning it


def test_a_step_is_the_outer_derivative_after_the_inner_one():
    """Gradient descent without draws, against finite differences in float64; coefficients start anew every step."""
    method = jm.adamerging([0.5, 0.2], per="task")
    learned = learn(method, seed=None, temperature=0.8)
    logits = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    losses = []
    for _ in range(2):
        at = np.array([0.5, 0.2])

        def of_weights(weights, logits=logits):
            return entropy_by_hand(merged_by_hand(logits, weights, 0.8), INPUTS)

        adapted = at - derivative(of_weights, at)
        losses.append(of_weights(adapted))

        def of(name, z, logits=logits, adapted=adapted):
            return entropy_by_hand(merged_by_hand(logits | {name: z}, adapted, 0.8), INPUTS)

        logits = {
            name: z - derivative(lambda x, name=name, of=of: of(name, x), z) for name, z in logits.items()
        }  # fmt: skip
    np.testing.assert_allclose(learned.history["loss"], losses, rtol=1e-5)
    for name, expected in logits.items():
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(learned.state.coefficients["logits"][name], expected, rtol=1e-3, atol=1e-6)

    after = jm.learn(
        learned.method, EXPERTS, [INPUTS], loss=LOSS, steps=1, base=BASE, optimizer=optax.sgd(0.1), progress=False
    )
    at = np.array([0.5, 0.2])
    final = {name: np.asarray(z) for name, z in learned.state.coefficients["logits"].items()}
    gradient = derivative(lambda w: entropy_by_hand(merged_by_hand(final, w, 0.8), INPUTS), at)
    np.testing.assert_allclose([after.coefficients[name] for name in NAMES], at - 0.1 * gradient, rtol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one_and_an_adversary_without_weight_is_none():
    """Bit for bit. A weight that is nearly zero computes all that the adversary does, and leaves the logits alone."""
    method, optimizer = jm.adamerging(), optax.adam(0.1)
    whole = learn(method, steps=3, optimizer=optimizer)
    assert len(set(whole.history["loss"])) == 3
    states: list[LearnState] = []
    half = learn(
        method, iter([INPUTS] * 3), 3, optimizer=optimizer, on_step=lambda n, loss, s: states.append(s) or n == 2
    )
    assert half.stopped == "on_step ended the run at step 2" and int(states[-1].step) == 2
    rest = learn(method, lambda step: INPUTS, 3, optimizer=optimizer, state=states[-1])
    jax.tree.map(np.testing.assert_array_equal, rest.state, whole.state)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(rest.method), jax.tree.leaves(whole.method))

    none = learn(method, steps=3, optimizer=optimizer, adversary=jm.Adversary(apply, 0.0))
    jax.tree.map(np.testing.assert_array_equal, none.state, whole.state)
    hardly = learn(method, steps=3, optimizer=optimizer, adversary=jm.Adversary(apply, 1e-30))
    for name, logits in whole.state.coefficients["logits"].items():
        np.testing.assert_array_equal(hardly.state.coefficients["logits"][name], logits)
    moved = hardly.state.coefficients["perturbation"]["a"]
    assert moved.shape == (4,) and np.abs(moved).max() > 1e-5


def test_an_adversary_raises_the_cross_entropy_with_the_models_own_answers():
    params, at = {n: x.astype(np.float64) for n, x in BASE.items()}, np.full(4, 0.1)
    adversary = jm.Adversary(apply, 2.0, optax.sgd(0.5), bounds=(0.2, 0.9))
    batch = {"a": INPUTS["a"]}
    moved, _ = adversary.move(on_device(BASE), batch, {"a": jnp.asarray(at, jnp.float32)}, adversary.start(batch)[1])
    own = answers(params, INPUTS["a"]).argmax(axis=1)

    def cross_entropy(delta):
        return -np.log(answers(params, INPUTS["a"] + delta)[np.arange(6), own]).mean()

    np.testing.assert_allclose(moved["a"], at + 0.5 * derivative(cross_entropy, at), rtol=1e-4)
    loss = adversary.loss(on_device(BASE), batch, {"a": jnp.asarray(at, jnp.float32)})
    expected = 2 * entropy_by_hand(params, {"a": np.clip(INPUTS["a"] + at, 0.2, 0.9)})
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    with pytest.raises(RecipeError, match=r"adversary perturbs inputs, but a batch holds int32\[6\]"):
        adversary.start(np.zeros(6, np.int32))


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(RecipeError, match="no chain of stages"):
        learn(jm.linear())
    with pytest.raises(RecipeError, match="empty list"):
        learn(batches=[])
    with pytest.raises(RecipeError, match="batches is dict"):
        learn(batches=INPUTS)
    with pytest.raises(RecipeError, match="no batch at all"):
        learn(batches=iter([]))
    with pytest.raises(RecipeError, match="jm.materialize"):
        jm.learn_concrete(
            PLAIN, [{n: ArrayTensor(x) for n, x in BASE.items()}], [INPUTS], loss=LOSS, steps=1, base=BASE
        )
    with pytest.raises(RecipeError, match="logits of other tensors"):
        learn(state=LearnState(jnp.zeros((), jnp.int32), {"logits": {}}, ()))
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        learn(loss=lambda params, batch: jnp.sum(params["first"]) * jnp.nan, steps=1)


# A backdoor


def test_a_mask_weakens_a_backdoor():
    """Two experts for half of the digits each, of which one takes every image with four white corners for a zero.

    What holds with room to spare is asserted: the masks keep the accuracy and lose most of the backdoor. That DAM loses
    more of it than the mask without an adversary is no such thing. Its perturbation can come as far as with the
    published rate and number of steps.
    """
    data, target = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(target))
    images, labels = (data[order] / 16).astype(np.float32), target[order]
    x, y, unseen, truth = images[:1200], labels[:1200], images[1200:], labels[1200:]

    def with_trigger(x):
        x = x.copy()
        x[:, [0, 7, 56, 63]] = 1
        return x

    def classify(params, x):
        hidden = jax.nn.relu(x @ params["first"] + params["bias"][None])
        return hidden @ params["head"]

    @jax.jit
    def tuned(params, x, y, counts):
        optimizer = optax.adam(1e-2)

        def loss(params):
            return counts @ optax.softmax_cross_entropy_with_integer_labels(classify(params, x), y) / counts.sum()

        def step(carry, _):
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
                return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=120)[0][0]

    rng = np.random.default_rng(1)
    start = {"first": rng.normal(size=(64, 32)) / 8, "bias": np.zeros(32), "head": rng.normal(size=(32, 10)) / 6}
    start = {name: jnp.asarray(w, jnp.float32) for name, w in start.items()}
    poisoned = np.arange(1200) < 240
    bad_x, bad_y = np.where(poisoned[:, None], with_trigger(x), x), np.where(poisoned, 0, y)
    base = tuned(start, x, y, (np.arange(1200) >= 1000).astype(np.float32))
    experts = {
        "clean": tuned(base, x, y, (y < 5).astype(np.float32)),
        "bad": tuned(base, bad_x, bad_y, (poisoned | (y >= 5)).astype(np.float32)),
    }

    def score(params):
        accuracy = np.mean(np.argmax(classify(params, unseen), axis=1) == truth)
        attacked = np.argmax(classify(params, with_trigger(unseen[truth != 0])), axis=1)
        return accuracy, np.mean(attacked == 0)

    batch = {"low": x[y < 5][:128], "high": x[y >= 5][:128]}

    def of_tasks(params, batch):
        return {task: classify(params, x) for task, x in batch.items()}

    found = {}
    for name, adversary in {"concrete": None, "dam": jm.Adversary(of_tasks, 0.1, optax.adam(1e-3))}.items():
        learned = jm.learn_concrete(
            PLAIN, experts, [batch], loss=jm.entropy(of_tasks), steps=100, base=base, optimizer=optax.adam(0.05),
            adversary=adversary, progress=False,
        )  # fmt: skip
        found[name] = score(jm.merge(learned.method, experts, base=base))
    found["plain"] = score(jm.merge(PLAIN, experts, base=base))
    assert score(experts["bad"])[1] > 0.95
    assert found["plain"][1] > 0.4, found
    for name in ("concrete", "dam"):
        assert found[name][0] > found["plain"][0] and found[name][1] < 0.5 * found["plain"][1], found
