"""mergekit's form: its parameters, their precedence, and its recorded results."""

import json
import re
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmerge as jm
from jaxmerge.cli.mergekit import FORMS
from jaxmerge.methods.stages import Chain
from jaxmerge.trees.info import TensorInfo
from tests.golden.golden_set import GOLDEN
from tests.golden.test_golden import declined_for

LAYERS = 5
LINEAR = "merge_method: linear\nparameters: {weight: 1}\n"
HEAD = "merge_method: task_arithmetic\nbase_model: base\n"


def info(name: str) -> TensorInfo:
    layer = re.search(r"layers\.(\d+)\.", name)
    return TensorInfo(name, (4,), layer=int(layer[1]) if layer else None, num_layers=LAYERS if layer else 0)


def stages_at(text: str, tensor: TensorInfo) -> tuple[Any, ...]:
    """The stages of the task arithmetic that a recipe gives a tensor: weigh, total, scale."""
    method = jm.load_recipe(HEAD + text).method.for_tensor(tensor)
    assert isinstance(method, Chain)
    return method.stages


# How a parameter gets its value

PARTS = """
models:
  - model: a
    parameters:
      weight:
        - filter: mlp
          value: [0.0, 1.0]
        - filter: norm
          value: 3
  - model: b
    parameters: {weight: [1, 0.5, 0]}
  - model: base
    parameters: {weight: 99}
  - model: c
parameters:
  weight:
    - {filter: up, value: 1e-1}
    - {value: 0.25}
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.mlp.up", [0.0, 1.0, 0.1]),  # the model's own filter, its gradient, the global filter
        ("layers.1.mlp.down", [0.25, 0.75, 0.25]),
        ("layers.2.mlp.up", [0.5, 0.5, 0.1]),
        ("layers.4.mlp.up", [1.0, 0.0, 0.1]),
        ("layers.3.norm", [3.0, 0.25, 0.25]),
        ("layers.3.attn.up", [0.1, 0.25, 0.1]),  # no filter of the model's matches: the global setting
        ("embed.mlp", [0.0, 1.0, 0.25]),  # outside the layers a gradient has its first value
        ("head", [0.25, 1.0, 0.25]),
    ],
)
def test_precedence_of_filters_gradients_and_models(name, expected):
    weigh, _, _ = stages_at(PARTS, info(name))
    assert weigh.weights == pytest.approx(expected, abs=1e-12)


def test_a_single_layer_is_the_last():
    alone = TensorInfo("layers.0.mlp", (4,), layer=0, num_layers=1)
    weigh, _, _ = stages_at("models: [{model: a, parameters: {weight: [0.2, 0.7]}}]\n", alone)
    assert weigh.weights == (0.7,)


def test_gradient_of_a_switch_takes_one_of_its_values():
    text = "models: [{model: a}]\nparameters: {weight: 1, normalize: [true, false]}\n"
    found = [stages_at(text, info(f"layers.{i}.mlp"))[1].normalize for i in range(LAYERS)]
    assert found == [True] * (LAYERS - 1) + [False]


def test_parameters_that_do_not_vary_give_a_plain_method():
    text = HEAD + "models: [{model: a, parameters: {weight: 1}}, {model: b}]\nparameters: {weight: 0.5, lambda: 0.3}\n"
    expected = jm.task_arithmetic(0.3, weights=[1.0, 0.5])
    assert repr(jm.load_recipe(text).method) == repr(expected)


def test_parameters_of_other_methods_are_let_pass():
    text = HEAD + "models: [{model: a}]\nparameters: {weight: 1, density: [0.1, 0.2], t: 3, int8_mask: true}\n"
    assert isinstance(jm.load_recipe(text).method, jm.Method)


@pytest.mark.parametrize(
    ("text", "base", "experts"),
    [
        (HEAD + "models: [{model: a}, {model: base}, {model: x/b}]\nparameters: {weight: 1}\n", "base", ["a", "x/b"]),
        (LINEAR + "models: [{model: a}, {model: b}]\n", None, ["a", "b"]),
        # For linear the base is one model among others, listed or not; the first expert's side files are taken.
        (f"{LINEAR}base_model: b\nmodels: [{{model: a}}, {{model: b}}]\n", None, ["b", "a"]),
        (f"{LINEAR}base_model: b\nmodels: [{{model: a}}]\n", None, ["b", "a"]),
    ],
)
def test_base_and_experts(text, base, experts):
    recipe = jm.load_recipe(text)
    assert (recipe.base, list(recipe.experts.values())) == (base, experts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: tie\nmodels: [{model: a}]", "recipe:1: unknown merge_method 'tie', did you mean 'ties'?"),
        ("merge_method: ties\nmodels: [{model: a}]", "recipe:1: ties compares models with a base; add 'base_model'"),
        ("merge_method: ties", "recipe:1: the recipe has no 'models'"),
        ("merge_method: ties\nbase_model: a\nmodels: [{model: a}]", "recipe:3: there are no models to merge"),
        ("merge_method: ties\nbase_model: a\nmodels: []", "recipe:3: there are no models to merge"),
        ("merge_method: ties\nmodels:\n  - a", "recipe:3: found 'a', expected a mapping"),
        ("merge_method: ties\nmodels:\n  - parameters: {}", "recipe:3: this entry has no 'model'"),
        ("merge_method: linear\nmodels:\n  - model: a\n  - model: a", "recipe:4: the model 'a' is there twice"),
        ("merge_method: ties\nmodel: a", "recipe:2: unknown key 'model', did you mean 'models'?"),
        (HEAD + "models:\n  - model: a", "recipe:1: the parameter 'weight' of model 'a' has no value"),
        (HEAD + "models:\n  - model: a\n    parameters:\n      weigth: 1", "recipe:6: unknown key 'weigth', did you"),
        (HEAD + "models:\n  - model: a\nparameters:\n  weight: heavy", "recipe:6: found 'heavy', expected a number"),
        (
            HEAD + "models:\n  - model: a\nparameters:\n  weight: [1, {value: 1}]",
            "recipe:6: found 1, expected a mapping",
        ),
        (HEAD + "models:\n  - model: a\nparameters:\n  weight: {filter: x}", "recipe:6: a filter needs a 'value'"),
        (
            HEAD + "models:\n  - model: a\nparameters:\n  normalize: perhaps",
            "recipe:6: found 'perhaps', expected true or false",
        ),
        (HEAD + "models:\n  - model: a\nslices: []", "recipe:5: 'slices' of mergekit is not supported yet"),
        (HEAD + "models:\n  - model: a\ntokenizer_source: union", "recipe:5: 'tokenizer_source' of mergekit is not"),
        (HEAD + "models:\n  - model: a\nout_dtype: float16", "recipe:5: 'out_dtype' of mergekit is not supported yet"),
        (HEAD + "models: [{model: a}]\nparameters: {weight: 1}\ndtype: half", "recipe:5: unknown dtype 'half'"),
        (
            "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters: {weight: 1, density: 2}",
            "recipe:1: density is 2.0, expected a number in (0, 1]",
        ),
    ],
)
def test_errors_point_at_the_line(text, message):
    with pytest.raises(jm.RecipeError) as error:
        jm.load_recipe(text + "\n")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            "{weight: {filter: mlp, value: 1}}",
            "recipe:1: tensor 'head': the parameter 'weight' of model 'a' has no value",
        ),
        ("{weight: 1, density: [0.5, 7]}", "recipe:1: tensor 'layers.1.mlp': density is"),
    ],
)
def test_errors_of_single_tensors_name_them(parameters, message):
    text = f"merge_method: ties\nbase_model: b\nmodels: [{{model: a}}]\nparameters: {parameters}\n"
    model = {name: np.ones(4, np.float32) for name in ("layers.0.mlp", "layers.1.mlp", "head")}
    with pytest.raises(jm.RecipeError) as error:
        jm.merge(jm.load_recipe(text).method, [model], base=model)
    assert str(error.value).startswith(message)


# The result, from disk to disk


def write(folder, models: dict[str, dict[str, np.ndarray]]) -> None:
    for name, tensors in models.items():
        (folder / name).mkdir()
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / name / "model.safetensors")


def test_gradient_and_filter_by_hand(tmp_path, rng, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["embed", *(f"layers.{i}.{part}" for i in range(LAYERS) for part in ("mlp", "attn"))]
    models = {m: {name: rng.normal(size=(3, 4)).astype(np.float32) for name in names} for m in ("base", "a", "b")}
    write(tmp_path, models)
    text = """
        models:
          - {model: a, parameters: {weight: [{filter: mlp, value: [1, 0]}, {filter: "*", value: -2}]}}
          - {model: b}
        parameters: {weight: 0.5, lambda: [0.5, 1, 2]}
    """
    text = HEAD + re.sub("^ {8}", "", text, flags=re.MULTILINE)
    jm.load_recipe(text).run("out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    scales = {None: 0.5, 0: 0.5, 1: 0.75, 2: 1.0, 3: 1.5, 4: 2.0}
    for name in names:
        layer = info(name).layer
        of_a = 1 - (layer or 0) / (LAYERS - 1) if "mlp" in name else -2.0
        base, a, b = (models[m][name].astype(np.float64) for m in ("base", "a", "b"))
        expected = base + scales[layer] * (of_a * (a - base) + 0.5 * (b - base))
        np.testing.assert_allclose(found[name], expected, 1e-5, 1e-6, err_msg=name)


TENSORS = ("bias", "square", "conv")
"""Of each bundle: one of each rank, and so one of each program."""


def golden_records() -> list[dict]:
    """Calls of mergekit's registered methods on bundles that hold three experts and these tensors."""
    bundles = GOLDEN.index["bundles"].items()
    usable = {name for name, b in bundles if b["experts"] == 3 and set(TENSORS) <= set(b.get("base", ()))}
    calls = [(record, re.search(r"registry '(\w+)'", record["reference"]["call"])) for record in GOLDEN.index["cases"]]
    return [
        record | {"merge_method": call[1]}
        for record, call in calls
        if call and call[1] in FORMS and record["bundle"] in usable
    ]


def recipe_of(record: dict, count: int) -> str:
    """The recipe of a recorded call, from its recorded parameters."""
    params = dict(record["params"])
    params.pop("majority_sign", None)  # "total", the only one that mergekit's recipes have
    one_expert = params.pop("pair", None) or record["merge_method"] == "passthrough"
    weights = params.pop("weights", [None] * (1 if one_expert else count))
    models = [{"model": f"e{i}"} | ({} if w is None else {"parameters": {"weight": w}}) for i, w in enumerate(weights)]
    recipe = {"merge_method": record["merge_method"], "models": models, "parameters": params}
    if FORMS[record["merge_method"]].relative:
        recipe["base_model"] = "base"
    return json.dumps(recipe, indent=1)


@pytest.mark.parametrize("record", golden_records(), ids=lambda record: record["id"])
def test_recorded_results_of_mergekit(record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = GOLDEN.case(record)
    models = {"base": case.base} | {f"e{i}": expert for i, expert in enumerate(case.experts)}
    write(tmp_path, {model: {name: tensors[name] for name in TENSORS} for model, tensors in models.items()})
    jm.load_recipe(recipe_of(record, len(case.experts))).run("out")
    found = jm.open_checkpoint("out").params
    assert set(found) == set(TENSORS)
    for name in TENSORS:
        # In half precision mergekit's arithmetic loses too much, but its result on upcast inputs is recorded too.
        recorded = f"f32acc/{name}" if f"f32acc/{name}" in case.wanted else name
        # Ties at a cut and defects that are declined are no values to compare with.
        if declined_for(case, recorded) is None and recorded not in record.get("compare_overrides", {}):
            value, wanted = (x.astype(np.float32) for x in (found[name][...], case.wanted[recorded]))
            np.testing.assert_allclose(
                value, wanted, record["compare"]["rtol"], record["compare"]["atol"], err_msg=name
            )
