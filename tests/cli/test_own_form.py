"""Our own form of a recipe: what it means, and that what is wrong is said with its line."""

import json
from pathlib import Path

import jax
import pytest

import jaxmerge as jm
from jaxmerge.methods.registry import list_methods

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"


def method_of(text: str) -> jm.Method:
    return jm.load_recipe(f"{text}\nexperts: [a, b]\n").method


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method: linear", jm.linear()),
        (
            "method: ties\nparameters: {density: 0.3, scale: 1e-1, scope: tensor}",
            jm.ties(0.3, scale=0.1, scope="tensor"),
        ),
        ("method: {ties: 0.3}", jm.ties(0.3)),
        (
            "method: {ties: {density: [0.3, 0.4], weights: {a: 1, b: 2}}}",
            jm.ties([0.3, 0.4], weights={"a": 1.0, "b": 2.0}),
        ),
        ("method: {slerp: {by_depth: [0, 0.5]}}", None),
        ("method: {slerp: {t: {by_depth: [0, 0.5]}}}", jm.slerp(jm.by_depth([0.0, 0.5]))),
        (
            "method: {task_arithmetic: {scale: {.*norm: 0, .*: {by_depth: {values: [0, 1], outside: 0.5}}}}}",
            jm.task_arithmetic({".*norm": 0.0, ".*": jm.by_depth([0.0, 1.0], outside=0.5)}),
        ),
        ("method: {chain: [{trim: 0.3}, elect_sign, disjoint_mean]}", jm.ties(0.3)),
        ("method: {lines: {method: {ties: 0.3}, alpha: 0.5}}", jm.lines(jm.ties(0.3), alpha=0.5)),
        (
            "method: {partition: {methods: {x: linear, y: {slerp: 0.1}}, labels: {a.*: x, .*: y}}}",
            jm.partition({"x": jm.linear(), "y": jm.slerp(0.1)}, {"a.*": "x", ".*": "y"}),
        ),
        ("method: {masked: {method: linear, tensors: [a, b]}}", jm.masked(jm.linear(), ["a", "b"])),
        (
            "method: {masked: {method: linear, tensors: a.*, otherwise: {slerp: 0.1}}}",
            jm.masked(jm.linear(), "a.*", otherwise=jm.slerp(0.1)),
        ),
        ("method: {della: {axis: 1, restore: l1}}", jm.della(axis=1, restore="l1")),
        ("method: {dare: {restore: null, weights: null}}", jm.dare(restore=None)),
    ],
)
def test_method(text, expected):
    if expected is None:
        with pytest.raises(jm.RecipeError, match="slerp has no parameter 'by_depth'"):
            method_of(text)
    else:
        assert jax.tree.structure(method_of(text)) == jax.tree.structure(expected)
        assert jax.tree.leaves(method_of(text)) == jax.tree.leaves(expected)


def test_every_other_entry():
    recipe = jm.load_recipe(
        "method: linear\nbase: models/base\nexperts: {math: x/a, code: 'http://host/b'}\nseed: 3\ndtype: bfloat16\n"
        "rules: {stacked: ['layers/.*'], layout: flax, layer: 'block(\\d+)'}"
    )
    assert (recipe.base, recipe.experts) == ("models/base", {"math": "x/a", "code": "http://host/b"})
    assert (recipe.seed, recipe.dtype) == (3, "bfloat16")
    assert recipe.rules == jm.Rules(stacked=("layers/.*",), layout="flax", layer=r"block(\d+)")


def test_listed_experts_are_named_by_the_end_of_their_path():
    recipe = jm.load_recipe("method: linear\nexperts: [x/a/, y/b, z/b]")
    assert recipe.experts == {"a": "x/a/", "y/b": "y/b", "z/b": "z/b"}


WITH_DEFAULTS = [entry for entry in list_methods().values() if entry.granularity is not None]


@pytest.mark.parametrize("entry", WITH_DEFAULTS, ids=lambda entry: entry.name)
def test_every_method_can_be_written_with_all_its_defaults(entry):
    """Any default of any parameter has a form in YAML that reads as that default."""
    values = {name: 0.5 if p.default is p.empty else p.default for name, p in entry.parameters.items()}
    text = f"method: {entry.name}\nparameters: {json.dumps(values)}"
    assert repr(method_of(text)) == repr(entry.constructor(**values))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: linear", "recipe:1: the recipe has no 'experts'"),
        ("experts: [a]", "recipe:1: the recipe has no 'method'"),
        ("method: linear\nexperts: []", "recipe:2: there are no experts"),
        ("method: linear\nexperts: a", "recipe:2: found 'a', expected a list"),
        ("method: linear\nexperts: [a, 3]", "recipe:2: found 3, expected text"),
        ("method: linear\nexperts: [a, a]", "the model 'a' is there twice"),
        ("method: linear\nexpert: [a]", "recipe:2: unknown key 'expert', did you mean 'experts'?"),
        ("methods: linear", "recipe:1: unknown key 'methods', did you mean 'method'?"),
        ("method: teis\nexperts: [a]", "recipe:1: unknown method 'teis', did you mean 'ties'?"),
        ("method:\n  teis: 0.1\nexperts: [a]", "recipe:2: unknown method 'teis'"),
        ("method: ties\nparameters:\n  densty: 0.1\nexperts: [a]", "recipe:3: ties has no parameter 'densty', did"),
        ("method: ties\nparameters:\n  scale: 1\n  density: 2\nexperts: [a]", "recipe:4: density is 2.0, expected a"),
        ("method: ties\nparameters:\n  density: lots\nexperts: [a]", "recipe:3: found 'lots', expected a number"),
        ("method: ties\nparameters:\n  density: null\nexperts: [a]", "recipe:3: found nothing, expected a number"),
        ("method: ties\nparameters:\n  density: true\nexperts: [a]", "recipe:3: found True, expected a number"),
        ("method: ties\nparameters:\n  normalize: 1\nexperts: [a]", "recipe:3: found 1, expected true or false"),
        (
            "method: ties\nparameters:\n  scope: world\nexperts: [a]",
            "recipe:3: found 'world', expected 'tensor' or 'model'",
        ),
        ("method: nearswap\nexperts: [a]", "recipe:1: nearswap needs a value for 't'"),
        ("method: {trim: 0.1}\nexperts: [a]", "recipe:1: trim(density=0.1) is a stage, not a method"),
        ("method: {ties: {density: 0.1}}\nparameters:\n  scale: 1\nexperts: [a]", "recipe:2: a nested method has its"),
        ("method: {ties: 0.1, linear: 1}\nexperts: [a]", "recipe:1: found a mapping of 2, expected one method"),
        ("method:\n  chain:\n    - trim: 0.1\n    - linear\nexperts: [a]", "recipe:4: linear() does not go here"),
        ("method:\n  chain:\n    - trim: 0.1\nexperts: [a]", "recipe:2: exactly one stage of a chain combines"),
        ("method:\n  chain: {stages: [total]}\nexperts: [a]", "recipe:2: chain has no parameter 'stages'"),
        (
            "method: {chain: [{total: 1, scale: 2}]}\nexperts: [a]",
            "recipe:1: found a mapping of 2, expected one method",
        ),
        ("method: {chain: [{disjoint_max: 1}]}\nexperts: [a]", "recipe:1: disjoint_max has no parameters, found 1"),
        ("method: {partition: {methods: {x: linear}, labels: {.*: y}}}\nexperts: [a]", "recipe:1: the label 'y' has"),
        (
            "method: {partition: {methods: {x: {trim: 0.1}}, labels: {.*: x}}}\nexperts: [a]",
            "recipe:1: trim(density=0.1) does",
        ),
        ("method: {slerp: {t: {by_depth: 3}}}\nexperts: [a]", "recipe:1: found 3, expected a list"),
        ("method: {slerp: {t: {by_depth: []}}}\nexperts: [a]", "recipe:1: by_depth needs at least one value"),
        ("method: linear\nexperts: [a]\nseed: soon", "recipe:3: found 'soon', expected a whole number"),
        ("method: linear\nexperts: [a]\ndtype: bfloat", "recipe:3: unknown dtype 'bfloat', did you mean 'bfloat16'?"),
        ("method: linear\nexperts: [a]\ndtype: int8", "recipe:3: unknown dtype 'int8'"),
        ("method: linear\nexperts: [a]\nrules:\n  layer: (", "recipe:4: '(' is no regular expression"),
        ("method: linear\nexperts: [a]\nrules:\n  layers: x", "recipe:4: Rules has no parameter 'layers', did you"),
        ("method: linear\nexperts: [a]\nrules:\n  layout: keras", "recipe:4: found 'keras', expected 'flax' or"),
        ("- method: linear", "recipe:1: found a list of 1, expected a mapping"),
    ],
)
def test_errors_point_at_the_line(text, message):
    with pytest.raises(jm.RecipeError) as error:
        jm.load_recipe(text + "\n")
    assert str(error.value).startswith(message) or (not message.startswith("recipe") and message in str(error.value))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yml")), ids=lambda path: path.stem)
def test_examples_can_be_read(path):
    assert isinstance(jm.load_recipe(path).method, jm.Method)


@pytest.mark.parametrize("name", ["no/such/recipe.yml", "", "\0", "x" * 5000])
def test_recipe_that_is_not_there(name):
    with pytest.raises(jm.RecipeError, match="the recipe cannot be read"):
        jm.load_recipe(name)


def test_file_that_is_no_text(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_bytes(b"method: \xff\xfe")
    with pytest.raises(jm.RecipeError, match=r"recipe\.yml: the recipe cannot be read"):
        jm.load_recipe(path)
