"""What cannot be merged is refused in words: which expert, which tensor, what to do."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm

BASE = {"blocks": {"0": {"kernel": jnp.ones((2, 3))}, "1": {"kernel": jnp.ones((2, 3))}}, "head": jnp.ones(3)}


def model(**changes):
    """The base with some tensors of block 1 changed; None takes the tensor out."""
    block = {"kernel": jnp.ones((2, 3)), **changes}
    return BASE | {"blocks": BASE["blocks"] | {"1": {k: v for k, v in block.items() if v is not None}}}


WRONG_TREES = {
    "missing": (model(kernel=None), jm.StructureError, r"expert 'b' lacks 'blocks/1/kernel'.*the base"),
    "extra": (model(bias=jnp.ones(3)), jm.StructureError, r"expert 'b' has 'blocks/1/bias' besides"),
    "reshaped": (model(kernel=jnp.ones((3, 2))), jm.ShapeError, r"'b'.*'blocks/1/kernel'.*\(3, 2\).*\(2, 3\)"),
    "other dtype": (
        model(kernel=jnp.ones((2, 3), jnp.bfloat16)),
        jm.DTypeError,
        r"'b'.*'blocks/1/kernel'.*bfloat16.*jm\.cast",
    ),
    "no array": (model(kernel="weights"), jm.MergeError, r"'b'.*'blocks/1/kernel'"),
    "NaN": (
        model(kernel=jnp.full((2, 3), jnp.nan)),
        jm.NonFiniteError,
        r"expert 'b'.*'blocks/1/kernel'.*allow_nonfinite",
    ),
    "infinity": (model(kernel=jnp.full((2, 3), -jnp.inf)), jm.NonFiniteError, r"expert 'b'.*'blocks/1/kernel'"),
}


@pytest.mark.parametrize(("expert", "error", "message"), WRONG_TREES.values(), ids=WRONG_TREES)
def test_wrong_expert_is_named(expert, error, message):
    with pytest.raises(error, match=message):
        jm.merge(jm.task_arithmetic(0.5), {"a": BASE, "b": expert}, base=BASE)
    with pytest.raises(error):
        jm.merge(jm.linear(), {"a": BASE, "b": expert})


def test_nonfinite_base_is_named_and_may_pass():
    bad = model(kernel=jnp.full((2, 3), jnp.inf))
    with pytest.raises(jm.NonFiniteError, match=r"the base.*'blocks/1/kernel'"):
        jm.merge(jm.task_arithmetic(0.5), [BASE], base=bad)
    merged = jm.merge(jm.linear(), [BASE, bad], allow_nonfinite=True)
    assert np.isinf(merged["blocks"]["1"]["kernel"]).all()
    assert np.isfinite(merged["head"]).all()


def test_a_result_that_overflows_is_no_bad_input():
    """Where the result tells whether inputs are finite, they are looked at before anybody is blamed."""
    large = {"a": jnp.full(4, 60000, jnp.float16)}
    assert np.isinf(jm.merge(jm.linear([1.0, 1.0], normalize=False), [large, large])["a"]).all()
    base = {"a": jnp.zeros(4, jnp.float16)}
    hidden = {"a": jnp.array([0, 0, jnp.nan, 0], jnp.float16)}
    for weights in ([1.0, 0.0], [0.0, 0.0]):
        with pytest.raises(jm.NonFiniteError, match="'bad'"):
            jm.merge(jm.linear(weights, normalize=False), {"good": base, "bad": hidden})
        with pytest.raises(jm.NonFiniteError, match="'bad'"):
            jm.merge(jm.task_arithmetic(0.0, weights=weights), {"good": base, "bad": hidden}, base=base)
    with pytest.raises(jm.NonFiniteError, match="the base"):  # which linear does not even use
        jm.merge(jm.linear(), [base, base], base=hidden)


def test_many_missing_tensors_are_counted():
    base = {f"layers/{i}": jnp.ones(2) for i in range(9)}
    with pytest.raises(jm.StructureError, match=r"and 5 more"):
        jm.merge(jm.linear(), [base, {"layers/8": jnp.ones(2)}])


def test_two_leaves_of_one_name():
    with pytest.raises(jm.StructureError, match=r"both named 'a/b'"):
        jm.merge(jm.linear(), [{"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}])


K2 = {"a": BASE, "b": BASE}
WRONG_METHODS = {
    "too few weights": (jm.linear([1.0]), K2, r"weights: found 1 values, expected 2.*\(a, b\)"),
    "too many weights": (jm.task_arithmetic(weights=jnp.ones(3)), K2, r"found 3 values, expected 2"),
    "a matrix of weights": (jm.linear(jnp.ones((2, 2))), K2, r"not an array of shape \(2, 2\)"),
    "a scale for each": (jm.task_arithmetic([0.3, 0.5]), K2, r"the scale is \[0\.3, 0\.5\].*given as weights"),
    "weights of others": (jm.linear({"a": 1.0, "c": 2.0}), K2, r"\['a', 'c'\].*\['a', 'b'\]"),
    "too few densities": (jm.ties([0.2]), K2, r"densities: found 1"),
    "unknown tensor": (
        jm.task_arithmetic({"blocks/7/kernel": 1.0, ".*": 0.5}),
        K2,
        r"'blocks/7/kernel' matches no tensor.*blocks/[01]/kernel",
    ),
    "no rule left": (jm.task_arithmetic({"blocks/.*": 1.0}), K2, r"'head'.*'\.\*'"),
    "no regular expression": (jm.task_arithmetic({"(": 1.0, ".*": 0.5}), K2, r"no regular expression"),
    "unknown pattern of a mask": (jm.masked(jm.linear(), "attention.*"), K2, r"'attention\.\*' matches no tensor"),
    "unknown label": (jm.partition({"x": jm.linear()}, lambda info: "y"), K2, r"labelled 'y'"),
    "slerp of three": (jm.slerp(0.5), K2, r"a base and 2 experts"),
    "nearswap of three": (jm.nearswap(0.5), K2, r"a base and 2 experts"),
    "model stock of one": (jm.model_stock(), {"a": BASE}, r"found 1, expected 2 or more"),
    "passthrough of two": (jm.passthrough(), K2, r"found 2 experts; name one"),
    "passthrough of nobody": (jm.passthrough(source="c"), K2, r"'c'; there are a, b"),
    "model share by depth": (jm.ties(jm.by_depth([0.1, 0.9])), K2, r"density over the whole model.*scope='tensor'"),
    "model share by name": (
        jm.chain(jm.keep_middle({"head": 0.5, ".*": 0.9}, scope="model"), jm.total()),
        K2,
        r"density over the whole model",
    ),
    "model share by expert and depth": (jm.ties([0.5, jm.by_depth([0.1, 0.9])]), K2, r"density over the whole model"),
    "no key": (jm.dare(0.5), K2, r"key=jax\.random\.key"),
    "no experts": (jm.linear(), [], r"no experts"),
    "one tree as experts": (jm.linear(), {"a": jnp.ones(2), "b": jnp.ones(2)}, r"\[params\]"),
}


@pytest.mark.parametrize(("method", "experts", "message"), WRONG_METHODS.values(), ids=WRONG_METHODS)
def test_method_that_does_not_fit_is_refused(method, experts, message):
    with pytest.raises(jm.RecipeError, match=message):
        jm.merge(method, experts, base=BASE)


NEEDS_BASE = [jm.task_arithmetic(), jm.ties(), jm.dare(), jm.della(), jm.breadcrumbs(), jm.lines(), jm.model_stock()]


@pytest.mark.parametrize("method", NEEDS_BASE, ids=repr)
def test_task_vector_methods_need_a_base(method):
    with pytest.raises(jm.RecipeError, match=r"base="):
        jm.merge(method, K2, key=0)


@pytest.mark.parametrize(
    "density", [0, 0.0, -0.1, 1.0001, float("nan"), [0.5, 2.0], {"head": 0.0, ".*": 0.5}], ids=repr
)
@pytest.mark.parametrize(
    "make",
    [
        jm.trim,
        jm.ties,
        jm.drop,
        jm.dare,
        jm.dare_ties,
        jm.magprune,
        jm.della,
        jm.della_linear,
        jm.keep_middle,
        jm.breadcrumbs,
    ],
)
def test_density_lies_above_zero_and_not_above_one(make, density):
    with pytest.raises(jm.RecipeError, match=r"density is .*\(0, 1\]"):
        make(density)


def test_chains_need_exactly_one_stage_that_combines():
    with pytest.raises(jm.RecipeError, match="none does"):
        jm.chain(jm.trim(0.2))
    with pytest.raises(jm.RecipeError, match="2 stages do"):
        jm.chain(jm.total(), jm.task_arithmetic())
    with pytest.raises(jm.RecipeError, match="elect_sign"):
        jm.merge(jm.chain(jm.disjoint_mean()), K2, base=BASE)


def test_stages_before_the_one_that_combines():
    with pytest.raises(jm.RecipeError, match="after the stage"):
        jm.merge(jm.chain(jm.scale_by_depth(0.5), jm.total()), K2, base=BASE)


def test_keep_probabilities_lie_between_zero_and_one():
    with pytest.raises(jm.RecipeError, match=r"choose epsilon below 0\.05"):
        jm.merge(jm.della(0.05, epsilon=0.07), K2, base=BASE, key=0)


WRONG_KINDS = """
import jaxmerge as jm, numpy as np
model = {"w": np.ones(2, np.float32)}
for call in (lambda: jm.merge(jm.elect_sign(), [model], base=model), lambda: jm.merge(jm.linear(), np.ones(2)),
             lambda: jm.chain(jm.linear())):
    try:
        call()
    except jm.RecipeError as error:
        print(error)
"""


def test_things_of_the_wrong_kind_are_refused():
    """In a process of its own, without the type checker that watches over all tests."""
    done = subprocess.run([sys.executable, "-c", WRONG_KINDS], capture_output=True, text=True, check=True)
    stage, array, method = done.stdout.splitlines()
    assert "jm.chain" in stage
    assert "a list or a dict" in array
    assert "stages on task vectors" in method


def test_unknown_labels_and_empty_depths():
    with pytest.raises(jm.RecipeError, match="'y' has no method"):
        jm.partition({"x": jm.linear()}, {".*": "y"})
    with pytest.raises(jm.RecipeError, match="at least one"):
        jm.by_depth([])


def test_wrong_rules():
    with pytest.raises(jm.RecipeError, match="matches no tensor"):
        jm.merge(jm.linear(), K2, rules=jm.Rules(stacked=("layers/.*",)))
    with pytest.raises(jm.RecipeError, match="scalar"):
        jm.merge(jm.linear(), [{"s": jnp.ones(())}], rules=jm.Rules(stacked=("s",)))


def test_reports_are_not_made_inside_a_transformation():
    with pytest.raises(jm.RecipeError, match="return_report"):
        jax.jit(lambda base: jm.merge(jm.linear(), [base], return_report=True)[0])(BASE)


def test_structure_is_checked_under_jit_too():
    with pytest.raises(jm.ShapeError, match="blocks/1/kernel"):
        jax.jit(lambda x: jm.merge(jm.linear(), {"a": BASE, "b": x}))(WRONG_TREES["reshaped"][0])
