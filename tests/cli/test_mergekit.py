"""mergekit's form: its parameters, their precedence, and its recorded results."""

import json
import re
import shutil
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmerge as jm
from jaxmerge.cli.main import main
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
        ("merge_method: ties", "recipe:1: the recipe has no 'models' and no 'slices'"),
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
        (HEAD + "models:\n  - model: a\nmodules: {}", "recipe:5: 'modules' of mergekit is not supported yet"),
        (HEAD + "models:\n  - model: a\nslices: []", "recipe:5: the recipe has 'models' and 'slices'"),
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


# Slices and vocabularies

SOURCES = "slices:\n  - sources:\n      - {model: a, layer_range: [0, 2]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: passthrough\nslices: []", "recipe:2: there are no slices"),
        ("merge_method: passthrough\nslices:\n  - {}", "recipe:3: this slice has no 'sources'"),
        ("merge_method: passthrough\nslices:\n  - {sources: []}", "recipe:3: there are no models to merge"),
        (
            "merge_method: passthrough\nslices:\n  - sources:\n      - {model: a}",
            "recipe:4: this source has no 'layer_range'",
        ),
        (
            "merge_method: passthrough\nslices:\n  - sources:\n      - {layer_range: [0, 1]}",
            "recipe:4: this entry has no 'model'",
        ),
        (f"merge_method: passthrough\n{SOURCES}    residual_weight: 1", "recipe:5: unknown key 'residual_weight'"),
        (
            f"merge_method: linear\n{SOURCES}      - {{model: b, layer_range: [3, 6]}}",
            "recipe:5: found 3 layers, expected 2",
        ),
        (
            f"merge_method: linear\n{SOURCES}      - {{model: a, layer_range: [3, 5]}}",
            "recipe:5: the model 'a' is there twice",
        ),
        (f"merge_method: ties\n{SOURCES}", "recipe:3: ties compares models with a base; add 'base_model'"),
        (f"merge_method: ties\nbase_model: b\n{SOURCES}", "recipe:4: the base 'b' is not among the slice's sources"),
        (f"merge_method: ties\nbase_model: a\n{SOURCES}", "recipe:4: there are no models to merge"),
        (f"merge_method: linear\n{SOURCES}", "recipe:3: the parameter 'weight' of model 'a' has no value"),
        *(
            (f"merge_method: passthrough\n{SOURCES.replace('[0, 2]', wrong)}", f"recipe:4: {message}")
            for wrong, message in [
                ("[2, 2]", "the layer_range is [2, 2], expected [start, stop] with 0 <= start < stop"),
                ("[-1, 2]", "the layer_range is [-1, 2]"),
                ("[0, 1, 2]", "the layer_range is [0, 1, 2]"),
                ("[0, 1.5]", "found 1.5, expected a whole number"),
                ("2", "found 2, expected a list"),
            ]
        ),
        (f"{LINEAR}models: [{{model: a}}]\ntokenizer_source: b", "recipe:4: the model 'b' takes no part in this merge"),
        (f"{LINEAR}models: [{{model: a}}]\ntokenizer_source: base", "recipe:4: there is no base_model"),
        (f"{LINEAR}models: [{{model: a}}]\ntokenizer: {{}}\ntokenizer_source: union", "recipe:5: 'tokenizer' and"),
        (
            f"{LINEAR}models: [{{model: a}}]\ntokenizer:\n  sauce: union",
            "recipe:5: unknown key 'sauce', did you mean 'source'?",
        ),
        (
            f"{LINEAR}models: [{{model: a}}]\ntokenizer:\n  pad_to_multiple_of: 0",
            "recipe:5: found 0, expected a whole number from 1",
        ),
        *(
            (f"{LINEAR}models: [{{model: a}}]\ntokenizer:\n  tokens:\n    t: {rule}", f"recipe:6: {message}")
            for rule, message in [
                ("{source: b}", "the model 'b' takes no part"),
                ("{force: maybe}", "found 'maybe', expected true or false"),
                ("{source: {kind: random}}", "a source is the path of a model, or has the kind"),
                ("{source: {kind: model_token, model: a}}", "a source of kind 'model_token' needs a 'model'"),
                ("{source: {kind: model_token, model: b, token_id: 1}}", "the model 'b' takes no part"),
                ("zero", "found 'zero', expected a mapping"),
            ]
        ),
        (
            f"{LINEAR}models: [{{model: a}}]\nchat_template: chatml",
            "recipe:4: 'chat_template' by name ('chatml') is not supported",
        ),
    ],
)
def test_errors_in_slices_and_tokenizers_point_at_the_line(text, message):
    with pytest.raises(jm.RecipeError) as error:
        jm.load_recipe(text + "\n")
    assert str(error.value).startswith(message)


WIDTH = 4
VOCABULARIES = {"base": ["a", "b", "c"], "x": ["c", "e", "b"], "y": ["e", "a", "<im>"]}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """Folders base, x and y: small models of four layers with vocabularies of their own."""
    folder, rng = tmp_path_factory.mktemp("llamas"), np.random.default_rng(3)
    for model, tokens in VOCABULARIES.items():
        shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (WIDTH,)}
        shapes |= {name: (len(tokens), WIDTH) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        for layer in range(4):
            shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (6, WIDTH)
            shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (6, WIDTH)
        write(folder, {model: {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}})
        added = [{"content": t, "id": i, "special": True} for i, t in enumerate(tokens) if t.startswith("<")]
        vocab = {t: i for i, t in enumerate(tokens) if not t.startswith("<")}
        files = {
            "config.json": {
                "num_hidden_layers": 4,
                "layer_types": ["w", "x", "y", "z"],
                "vocab_size": len(tokens),
                "eos_token_id": 0,
                "dtype": "float32",
            },
            "tokenizer.json": {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": added},
            "tokenizer_config.json": {"of": model, "chat_template": f"{{{{ {model != 'base'} }}}}"},
        }
        for name, content in files.items():
            (folder / model / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(llamas, tmp_path, monkeypatch):
    """Runs a recipe from the folder of the models; gives the output's tensors and a function that reads a JSON file."""
    monkeypatch.chdir(llamas)

    def run(text: str):
        (tmp_path / "recipe.yml").write_text(text)
        main(["merge", str(tmp_path / "recipe.yml"), "--out", "out", "--dry-run"])
        main(["merge", str(tmp_path / "recipe.yml"), "--out", str(tmp_path / "out")])
        found = load_file(tmp_path / "out" / "model.safetensors")
        return found, lambda name: json.loads((tmp_path / "out" / name).read_text())

    return run


def weights_of(*models: str) -> list[dict[str, np.ndarray]]:
    return [{n: x.astype(np.float64) for n, x in load_file(f"{model}/model.safetensors").items()} for model in models]


def layer(tensors: dict[str, np.ndarray], number: int, part: str = "mlp.up_proj") -> np.ndarray:
    return tensors[f"model.layers.{number}.{part}.weight"]


def test_passthrough_stacks_layers(run):
    found, told = run(
        """
merge_method: passthrough
slices:
  - sources: [{model: base, layer_range: [0, 3]}]
  - sources: [{model: x, layer_range: [1, 4], parameters: {scale: [{filter: layers.3.mlp, value: 2}, {value: 1}]}}]
  - sources: [{model: base, layer_range: [2, 3]}]
"""
    )
    base, x = weights_of("base", "x")
    expected = [
        layer(base, 0),
        layer(base, 1),
        layer(base, 2),
        layer(x, 1),
        layer(x, 2),
        2 * layer(x, 3),
        layer(base, 2),
    ]
    for number, value in enumerate(expected):
        np.testing.assert_array_equal(layer(found, number), value.astype(np.float32))
    assert len(found) == 2 * len(expected) + 3
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        np.testing.assert_array_equal(found[name], base[name])
    config = told("config.json")
    assert config["num_hidden_layers"] == 7 and config["layer_types"] == list("wxyxyzy")


def test_each_slice_has_its_own_models_and_parameters(run):
    found, told = run(
        """
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [1, 3]}
      - model: y
        layer_range: [0, 2]
        parameters: {weight: [{filter: layers.0, value: 5}, {filter: mlp, value: [0, 4]}]}
    parameters: {weight: 0.5}
  - sources:
      - {model: y, layer_range: [2, 4]}
      - {model: base, layer_range: [0, 2]}
    parameters: {lambda: [1, 3]}
parameters: {weight: [0.25, 0.75], lambda: 2}
dtype: float32
out_dtype: bfloat16
"""
    )
    base, y = weights_of("base", "y")

    def merged(part: str, of_base: int, of_y: int, factor: float) -> np.ndarray:
        b, v = layer(base, of_base, part), layer(y, of_y, part)
        return b + factor * (v - b)

    expected = {  # lambda times the weight that the slice's gradient, a filter on the source's name or the slice gives
        ("mlp.up_proj", 0): merged("mlp.up_proj", 1, 0, 2 * 5),
        ("mlp.up_proj", 1): merged("mlp.up_proj", 2, 1, 2 * 4),
        ("self_attn.q_proj", 1): merged("self_attn.q_proj", 2, 1, 2 * 0.5),
        ("mlp.up_proj", 2): merged("mlp.up_proj", 0, 2, 1 * 0.25),
        ("self_attn.q_proj", 3): merged("self_attn.q_proj", 1, 3, 3 * 0.75),
    }
    for (part, number), value in expected.items():
        np.testing.assert_allclose(layer(found, number, part).astype(np.float64), value, 2**-8, 1e-6)
    embed, norm = "model.embed_tokens.weight", "model.norm.weight"
    np.testing.assert_allclose(found[embed].astype(np.float64), base[embed] + (y[embed] - base[embed]), 2**-8, 1e-6)
    np.testing.assert_allclose(found[norm].astype(np.float64), base[norm] + 0.25 * (y[norm] - base[norm]), 2**-8, 1e-6)
    assert told("config.json")["dtype"] == "bfloat16" and found[embed].dtype.name == "bfloat16"


def test_union_of_vocabularies(run):
    found, told = run(
        """
merge_method: linear
base_model: base
models:
  - {model: x, parameters: {weight: 1}}
  - {model: y, parameters: {weight: 1}}
  - {model: base, parameters: {weight: 2}}
tokenizer:
  source: union
  tokens:
    e: {source: y}
    b: {source: {kind: model_token, model: x, token: c}, force: true}
    "<new>": {source: {kind: zero}}
  pad_to_multiple_of: 4
chat_template: auto
"""
    )
    base, x, y = weights_of("base", "x", "y")
    added = {entry["content"]: entry["id"] for entry in told("tokenizer.json")["added_tokens"]}
    assert told("tokenizer.json")["model"]["vocab"] == {"a": 0, "b": 1, "c": 2}
    assert added == {"e": 3, "<im>": 4, "<new>": 5}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        b, of_x, of_y = base[name], x[name], y[name]
        rows = [
            (2 * b[0] + b[0] + of_y[1]) / 4,
            of_x[0],
            (2 * b[2] + of_x[0] + b[2]) / 4,
            (2 * of_y[0] + of_x[1] + of_y[0]) / 4,
            of_y[2],
            np.zeros(WIDTH),
        ]
        np.testing.assert_allclose(found[name][:6], rows, 1e-5, 1e-6)
        np.testing.assert_allclose(found[name][6:], np.tile(np.mean(rows, axis=0), (2, 1)), 1e-5, 1e-6)
    assert told("config.json")["vocab_size"] == 8 and told("config.json")["eos_token_id"] == 0
    assert told("tokenizer_config.json") == {"of": "base", "chat_template": "{{ True }}"}


def test_vocabulary_of_one_model_over_slices(run):
    found, told = run(
        """
merge_method: passthrough
slices:
  - sources: [{model: base, layer_range: [0, 1]}]
  - sources: [{model: y, layer_range: [0, 1]}]
tokenizer_source: y
chat_template: "{{ messages }}"
"""
    )
    base, y = weights_of("base", "y")
    embed = base["model.embed_tokens.weight"]
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], [[0] * WIDTH, embed[0].tolist(), [0] * WIDTH])
    np.testing.assert_array_equal(found["lm_head.weight"], y["lm_head.weight"])
    assert told("tokenizer_config.json") == {"of": "y", "chat_template": "{{ messages }}"}
    config = told("config.json")
    assert (config["num_hidden_layers"], config["vocab_size"], config["eos_token_id"]) == (
        2,
        3,
        1,
    )  # a is 0 there, 1 here


def test_mistakes_that_only_the_models_show(run, llamas, tmp_path, capsys):
    head = "merge_method: linear\nparameters: {weight: 1}\n"
    for text, message in [
        (
            f"{head}models: [{{model: base}}, {{model: x}}, {{model: absent}}]\ntokenizer_source: union",
            "no checkpoint at",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: x, layer_range: [2, 6]}]}]",
            "model 'x' has layers 0 to 3",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: x, layer_range: [0, 999999999999]}]}]",
            "model 'x' has",
        ),
    ]:
        with pytest.raises(SystemExit):
            run(text)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    for content, message in [
        ("[", "x/tokenizer.json is no JSON"),
        (
            json.dumps({"model": {"vocab": {"p": 0, "q": 7}}}),
            "the token 'q' has id 7, and the embedding table has 3 rows",
        ),
        (None, "x: found no tokenizer.json"),
    ]:
        models = tmp_path / "models"
        shutil.rmtree(models, ignore_errors=True)
        shutil.copytree(llamas, models)
        place = models / "x" / "tokenizer.json"
        place.unlink() if content is None else place.write_text(content)
        with pytest.raises(jm.MergeError) as error:
            jm.load_recipe(f"{head}models: [{{model: {models}/base}}, {{model: {models}/x}}]\ntokenizer: {{}}\n").run(
                tmp_path / "out"
            )
        assert message in str(error.value)
        assert not (tmp_path / "out").exists()


# Recorded results

TENSORS = ("bias", "square", "conv")
"""Of each bundle: one of each rank, and so one of each program."""


def golden_records() -> list[dict]:
    """Calls of mergekit's registered methods on three experts; on those in half precision the recipes are the same."""
    pattern = r"registry '(\w+)'|(multislerp)\(\) called directly"
    calls = [(record, re.search(pattern, record["reference"]["call"])) for record in GOLDEN.index["cases"]]
    return [
        record | {"merge_method": call[1] or call[2]}
        for record, call in calls
        if call and (call[1] or call[2]) in FORMS and record["bundle"] == "k3_f32"
    ]


def recipe_of(record: dict, count: int) -> str:
    """The recipe of a recorded call, from its recorded parameters."""
    params = dict(record["params"])
    params.pop("majority_sign", None)  # "total", the only one that mergekit's recipes have
    params = {f"nuslerp_{name}" if name in ("flatten", "row_wise") else name: value for name, value in params.items()}
    pair = params.pop("pair", None)
    one_expert = record["merge_method"] == "passthrough" or pair == ["base", "e0"]
    weights = params.pop("weights", [None] * (1 if one_expert else count))
    models = [{"model": f"e{i}"} | ({} if w is None else {"parameters": {"weight": w}}) for i, w in enumerate(weights)]
    recipe = {"merge_method": record["merge_method"], "models": models, "parameters": params}
    base = FORMS[record["merge_method"]].base
    if base == "required" or params.pop("with_base", "with base" in record["reference"]["call"]):
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
        # Ties at a cut and defects that are declined are no values to compare with.
        if declined_for(case, name) is None and name not in record.get("compare_overrides", {}):
            how = record["compare"]
            np.testing.assert_allclose(found[name][...], case.wanted[name], how["rtol"], how["atol"], err_msg=name)
