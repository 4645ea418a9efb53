"""The loop that learns coefficients: its derivatives, its state, its ends, and the same with experts on disk."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import jaxmerge as jm
from jaxmerge.errors import NonFiniteError, RecipeError
from jaxmerge.learning.coefficients import Coefficients
from jaxmerge.learning.learn import LearnState
from jaxmerge.learning.objective import InMemory, Streamed
from jaxmerge.methods.assignment import assign
from jaxmerge.trees.info import Rules
from jaxmerge.trees.lazy import ArrayTensor

NAMES = ("maths", "code", "law")  # not in alphabetical order


def mlp(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"layers/0/kernel": (6, 8), "layers/0/bias": (8,), "layers/1/kernel": (8, 4)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


BASE = mlp(0)
EXPERTS = {name: jax.tree.map(lambda b, d: b + 0.3 * d, BASE, mlp(i + 1)) for i, name in enumerate(NAMES)}
BATCHES = [np.random.default_rng(i).normal(size=(5, 6)).astype(np.float32) for i in range(3)]


def apply(params, x):
    hidden = jnp.tanh(x @ params["layers/0/kernel"] + params["layers/0/bias"][None])
    return hidden @ params["layers/1/kernel"]


LOSS = jm.entropy(apply)


def lazy(tree):
    return {name: ArrayTensor(np.asarray(value)) for name, value in tree.items()}


def learn(method=None, batches=BATCHES, *, steps=6, experts=EXPERTS, base=BASE, **options):
    options = {"loss": LOSS, "optimizer": optax.adam(1e-2), "progress": False} | options
    return jm.learn(jm.adamerging() if method is None else method, experts, batches, steps=steps, base=base, **options)


def numbers(learned: jm.Learned) -> np.ndarray:
    return np.array([[row[name] for name in NAMES] for row in learned.coefficients.values()])


def gradients(method: jm.Method, streamed: bool):
    """The derivatives of one step, and the coefficients they belong to."""
    job = assign(method, EXPERTS, BASE, None, Rules())
    found = Coefficients.of(method, lambda part: list(job.tasks), job.experts)
    state = LearnState(jnp.zeros((), jnp.int32), found.values, ())

    def update(state, value, gradients):
        return state, jnp.isfinite(value)

    if streamed:
        lazily = assign(found.method, {n: lazy(x) for n, x in EXPERTS.items()}, lazy(BASE), None, Rules())
        objective = Streamed(LOSS, update, found, lazily)
    else:
        objective = InMemory(LOSS, update, found, EXPERTS, BASE, None, Rules())
    return found, jax.device_get(objective.step(state, BATCHES[0])[3])


@pytest.mark.parametrize("streamed", [False, True])
def test_derivatives_are_those_of_finite_differences(streamed):
    """In float64 NumPy, of the loss at merges by hand; columns follow names, not an order."""
    _, found = gradients(jm.adamerging(), streamed)

    def loss(table):
        merged = {
            n: BASE[n].astype(np.float64) + sum(w * (EXPERTS[e][n] - BASE[n]) for e, w in zip(NAMES, row, strict=True))
            for n, row in zip(BASE, table, strict=True)
        }
        hidden = np.tanh(BATCHES[0] @ merged["layers/0/kernel"] + merged["layers/0/bias"])
        logits = hidden @ merged["layers/1/kernel"]
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        return -(p * np.log(p)).sum(axis=1).mean()

    table, expected = np.full((3, 3), 0.3), np.zeros((3, 3))
    for at in np.ndindex(3, 3):
        step = np.zeros((3, 3))
        step[at] = 1e-5
        expected[at] = (loss(table + step) - loss(table - step)) / 2e-5
    rows = [list(BASE).index(name) for name in sorted(BASE)]  # a dict's leaves are in the order of its keys
    np.testing.assert_allclose(found["stages/0/weights"], expected[rows], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        jm.linear([0.2, 0.5, 0.6]),
        jm.task_arithmetic(0.4, weights=dict(zip(NAMES, (1.0, 0.5, 2.0), strict=True)), normalize=True),
        jm.ties(0.5, scope="tensor", scale=jm.learnable(0.7, per_expert=False)),
    ],
    ids=["linear", "task_arithmetic", "ties"],
)
def test_any_method_has_the_derivatives_of_merge(method):
    """Streamed and in memory as `jax.grad` through `jm.merge`, also where coefficients are given by position."""
    found, in_memory = gradients(method, streamed=False)
    streamed = gradients(method, streamed=True)[1]
    merged = lambda values: jm.merge(found.put(values), EXPERTS, base=BASE)  # noqa: E731
    expected = jax.jit(jax.grad(lambda values: LOSS(merged(values), BATCHES[0])))(found.values)
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 1e-3
        np.testing.assert_allclose(in_memory[name], gradient, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(streamed[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Bit for bit, through Orbax, with a schedule that counts on; and experts on disk give the same run."""
    optimizer = optax.chain(jm.pull_to_start(0.1), optax.adam(optax.cosine_decay_schedule(0.05, 6)))
    whole = learn(optimizer=optimizer)
    half = learn(optimizer=optimizer, steps=4)
    ocp.save(tmp_path / "state", half.state)
    template = learn(optimizer=optimizer, steps=0).state
    resumed = learn(optimizer=optimizer, state=ocp.load(tmp_path / "state", template))
    assert resumed.state.step == 6 and resumed.history["step"].tolist() == [4, 5]
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    np.testing.assert_array_equal(
        np.concatenate([half.history["loss"], resumed.history["loss"]]), whole.history["loss"]
    )

    streamed = learn(optimizer=optimizer, experts={n: lazy(x) for n, x in EXPERTS.items()}, base=lazy(BASE))
    np.testing.assert_allclose(numbers(streamed), numbers(whole), rtol=1e-5, atol=1e-6)
    with pytest.raises(RecipeError, match="the state has coefficients"):
        learn(jm.adamerging(per="task"), state=half.state)


def test_streamed_experts_are_read_twice_a_step():
    class Counted(ArrayTensor):
        def read_flat(self, start, out):
            reads.append(self.label)
            super().read_flat(start, out)

    reads: list[str] = []
    models = {
        name: {tensor: Counted(value, f"{name} {tensor}") for tensor, value in tree.items()}
        for name, tree in {"base": BASE, **EXPERTS}.items()
    }
    base = models.pop("base")
    learn(experts=models, base=base, steps=2)
    assert len(reads) == 2 * 2 * 4 * 3 and len(set(reads)) == 4 * 3


def test_one_program_for_all_steps_and_a_warning_for_another():
    traced = []

    def counted(params, batch):
        traced.append(batch.shape)
        return LOSS(params, batch)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(loss=counted, steps=5)
    assert traced == [(5, 6)]
    with pytest.warns(UserWarning, match=r"batch of step 3 has other shapes \(\(2, 6\)\)"):
        learn(batches=[*BATCHES, BATCHES[0][:2]], steps=4)


def test_constraints_hold_after_every_step():
    seen = []

    def keep(step, loss, state):
        seen.append(np.asarray(state.coefficients["stages/0/weights"]))

    learn(optimizer=optax.sgd(5.0), constrain=jm.simplex(), on_step=keep)
    assert (np.abs(seen[-1] - seen[0]) > 1e-3).any()
    for values in seen:
        np.testing.assert_allclose(values.sum(axis=1), 1, rtol=1e-5)
        assert values.min() >= 0
    learned = numbers(learn(optimizer=optax.sgd(5.0), constrain=jm.box(0.2, 0.4)))
    assert learned.min() == np.float32(0.2) and learned.max() == np.float32(0.4)


def test_projection_on_the_simplex_is_the_nearest_point(rng):
    values = rng.normal(size=(20, 5))
    found = np.asarray(jm.simplex(2.0)(jnp.asarray(values, jnp.float32)))
    for x, v in zip(found, values, strict=True):  # optimality: those kept moved by one shift, the others lie below it
        kept = x > 0
        shift = (v - x)[kept]
        np.testing.assert_allclose(shift, shift[0], atol=1e-6)
        assert (v[~kept] <= shift[0] + 1e-6).all()
        np.testing.assert_allclose(x.sum(), 2, rtol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_finite_coefficients():
    bad = [BATCHES[0], BATCHES[1], np.full_like(BATCHES[0], np.nan)]
    with pytest.warns(UserWarning, match="learning stopped: the loss is nan at step 2"):
        stopped = learn(batches=bad)
    before = learn(batches=bad, steps=2)
    jax.tree.map(np.testing.assert_array_equal, stopped.state, before.state)
    assert "the loss is nan at step 2" in stopped.stopped and len(stopped.history["loss"]) == 2
    with pytest.raises(NonFiniteError, match="the loss is nan at step 0, with the coefficients as they were given"):
        learn(batches=bad[2:])
    broken = EXPERTS | {"code": EXPERTS["code"] | {"layers/0/bias": np.full(8, np.inf, np.float32)}}
    with pytest.raises(NonFiniteError, match="'code'.*'layers/0/bias'"):
        learn(experts=broken)


def test_coefficients_that_do_not_matter_are_named():
    same = EXPERTS | {"code": BASE}
    with pytest.warns(UserWarning, match="does not depend on stages/0/weights of code"):
        learn(experts=same, steps=1)
    with pytest.warns(UserWarning, match="does not depend on stages/0/weights of layers/0/bias"):
        learn(loss=lambda p, x: LOSS(p | {"layers/0/bias": jnp.zeros(8)}, x), steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "empty list"),
        ({"batches": iter(())}, "no batch at all"),
        ({"batches": {"x": BATCHES[0]}}, r"give \[batch\]"),
        ({"batches": [BATCHES[0][:0]]}, r"step 0 is empty: it holds an array of shape \(0, 6\)"),
        ({"loss": apply}, r"the loss is float32\[5, 4\], expected one floating-point number"),
        ({"method": jm.model_stock()}, "has no coefficient to learn"),
        ({"method": jm.task_arithmetic(jm.learnable(0.3))}, "build it with per_expert=False"),
    ],
)
def test_what_cannot_be_learned_from_is_an_error(options, message):
    with pytest.raises(RecipeError, match=message):
        learn(**options)


def test_batches_may_be_a_function_or_run_out():
    from_list, by_step = learn(steps=3), learn(batches=lambda step: BATCHES[step % 3], steps=3)
    np.testing.assert_array_equal(numbers(from_list), numbers(by_step))
    short = learn(batches=iter(BATCHES), steps=9)
    assert short.stopped == "there were no more batches at step 3" and short.state.step == 3
    np.testing.assert_array_equal(numbers(short), numbers(from_list))


def test_on_step_ends_the_run_and_a_flat_loss_does():
    assert learn(on_step=lambda step, loss, state: step == 2).state.step == 2
    flat = jm.stop_when_flat(window=2, tolerance=0.05)
    assert [flat(i, loss, None) for i, loss in enumerate([4.0, 4.0, 2.0, 2.0, 2.0, 2.0])] == [False] * 5 + [True]


def test_memory_beside_the_experts_does_not_depend_on_their_number():
    """What the compiler says one step needs: the merged model, but no task vectors."""
    size, temporary = 64 * 64, {}
    base = {f"w{i}": np.ones((64, 64), np.float32) for i in range(4)}
    for count in (2, 8):
        experts = {f"e{k}": {name: value + np.float32(k) for name, value in base.items()} for k in range(count)}
        job = assign(jm.adamerging(), experts, base, None, Rules())
        found = Coefficients.of(jm.adamerging(), lambda part, job=job: list(job.tasks), job.experts)
        state = LearnState(jnp.zeros((), jnp.int32), found.values, ())

        def loss(params, x):
            for w in params.values():
                x = jnp.tanh(x @ w)
            return jnp.mean(x)

        objective = InMemory(
            loss, lambda s, v, g: (dataclasses.replace(s, coefficients=g), v), found, experts, base, None, Rules()
        )
        lowered = objective.program.lower(state, *objective.inputs, np.ones((1, 64), np.float32))
        needed = lowered.compile().memory_analysis()
        assert needed is not None
        temporary[count] = needed.temp_size_in_bytes
    assert temporary[8] - temporary[2] < size * 4, temporary  # six more experts, not one more tensor


def test_nnx_parameters_and_a_learned_value_that_streams(tmp_path):
    """An `nnx.State` comes back as one; what was learned merges checkpoints as it merges in memory, and replays."""
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    graph, base = nnx.split(model, nnx.Param)
    experts = {n: jax.tree.map(lambda x, i=i: x + 0.1 * (i + 1) * jnp.cos(x + i), base) for i, n in enumerate(NAMES)}
    loss = jm.entropy(lambda params, x: nnx.merge(graph, params)(x))
    learned = learn(loss=loss, experts=experts, base=base, steps=2)
    assert set(learned.coefficients) == {"kernel", "bias"}
    merged = jm.merge(learned.method, experts, base=base)
    assert isinstance(merged, nnx.State)
    for name, params in {"base": base, **experts}.items():
        jm.save_checkpoint(tmp_path / name, jm.named_leaves(params))
    paths = {name: tmp_path / name for name in reversed(NAMES)}
    jm.merge_checkpoint(learned.method, paths, base=tmp_path / "base", out=tmp_path / "merged")
    streamed = jm.open_checkpoint(tmp_path / "merged").params
    for name, value in jm.named_leaves(merged).items():
        np.testing.assert_allclose(np.asarray(streamed[name]), value, rtol=1e-6)
    assert "2 tensors x 3 experts" in repr(learned)
    with pytest.raises(RecipeError, match="learned for the experts maths, code, law, but these are a, b, c"):
        jm.merge(learned.method, dict(zip("abc", experts.values(), strict=True)), base=base)
    with pytest.raises(RecipeError, match="'bias', which is no tensor; the nearest names are"):
        jm.merge(learned.method, [{"bios": x["bias"]} for x in experts.values()], base={"bios": base["bias"]})
