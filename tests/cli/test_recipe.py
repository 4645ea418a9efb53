"""Recipes that run, from files to a folder; and fuzzed text, which is a recipe or an error."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jaxmerge as jm
from jaxmerge.cli.mergekit import FORMS, PARAMETERS
from jaxmerge.methods.registry import list_methods

NAMES = ["embed.weight", *(f"layers.{i}.{part}.weight" for i in range(3) for part in ("mlp", "norm")), "head.weight"]


def model(rng: np.random.Generator, dtype: type) -> dict[str, np.ndarray]:
    return {name: rng.normal(size=(6,) if "norm" in name else (6, 5)).astype(dtype) for name in NAMES}


@pytest.fixture
def folders(tmp_path, rng, monkeypatch):
    """Folders base, a, b with models of different dtypes, and the current folder beside them."""
    monkeypatch.chdir(tmp_path)
    models = {"base": model(rng, np.float32), "a": model(rng, np.float32), "b": model(rng, ml_dtypes.bfloat16)}
    for name, tensors in models.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        config = {"model_type": "tiny", "torch_dtype": "float32", "of": name}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return models


def test_run_merges_to_a_folder_that_others_read(folders, tmp_path):
    recipe = jm.load_recipe("method: task_arithmetic\nparameters: {scale: 0.5}\nbase: base\nexperts: {a: a}\n")
    report = recipe.run("out")
    expected = jm.merge(recipe.method, {"a": folders["a"]}, base=folders["base"])
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(value, expected[name])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["of"] == "base"
    assert set(report.bytes_read) == {"the base", "a"}


def test_models_may_be_folders_files_and_urls(folders, tmp_path):
    places = ["base", "a/model.safetensors", f"file://{tmp_path}/a"]
    report = jm.load_recipe(f"method: linear\nexperts: {json.dumps(places)}\n").run("out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in NAMES:
        expected = (folders["base"][name] + 2 * folders["a"][name]) / 3
        np.testing.assert_allclose(found[name], expected, 1e-5, 1e-6)
    assert set(report.bytes_read) == {"base", "model.safetensors", "a"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_merges_mixed_inputs_and_rounds_once(folders, tmp_path, dtype):
    text = f"method: task_arithmetic\nparameters: {{scale: 0.5}}\nbase: base\nexperts: [a, b]\ndtype: {dtype}\n"
    jm.load_recipe(text).run("out")
    wide = {name: {n: x.astype(np.float32) for n, x in tensors.items()} for name, tensors in folders.items()}
    expected = jm.merge(jm.task_arithmetic(0.5), [wide["a"], wide["b"]], base=wide["base"])
    found = jm.open_checkpoint(tmp_path / "out").params
    for name in NAMES:
        np.testing.assert_array_equal(found[name][...], np.asarray(expected[name].astype(jnp.dtype(dtype))))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_without_dtype_mixed_inputs_are_an_error_and_nothing_is_written(folders, tmp_path):
    recipe = jm.load_recipe("method: linear\nbase: base\nexperts: [a, b]\n")
    with pytest.raises(jm.DTypeError, match="'b'"):
        recipe.run("out")
    assert not (tmp_path / "out").exists()


def test_tied_tensors_stay_tied_when_they_are_cast(tmp_path, rng, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shared = rng.normal(size=(8, 4)).astype(np.float32)
        jm.save_checkpoint(tmp_path / name, {"embed": shared, "head": shared})
    jm.load_recipe("method: linear\nexperts: [a, b]\ndtype: bfloat16\n").run("out")
    out = jm.open_checkpoint("out")
    assert out.aliases and out.params["embed"] is out.params["head"] and out.nbytes == 8 * 4 * 2


def test_seed_decides_the_draws(folders, tmp_path):
    text = "method: dare\nbase: base\nexperts: [a]\nseed: {}\n"
    for out, seed in (("one", 1), ("two", 2), ("again", 1)):
        jm.load_recipe(text.format(seed)).run(out)
    one, two, again = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two", "again"))
    assert one == again != two


def test_plan_checks_and_tells_but_reads_and_writes_nothing(folders, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    plan = jm.load_recipe("method: ties\nbase: base\nexperts: [a]\n").plan(memory_budget="64MiB")
    size = sum(x.nbytes for x in folders["base"].values())
    assert plan.to_write == size and plan.to_read >= 2 * size and 0 < plan.memory <= 64 << 20
    with pytest.raises(jm.RecipeError, match="base="):
        jm.load_recipe("method: ties\nexperts: [a]\n").plan()
    with pytest.raises(jm.RecipeError, match="memory_budget is 'lots'"):
        jm.load_recipe("method: ties\nbase: base\nexperts: [a]\n").plan(memory_budget="lots")
    assert sorted(tmp_path.rglob("*")) == before


# Any text is a recipe or a RecipeError

words = st.sampled_from(
    [
        *(
            "method",
            "merge_method",
            "models",
            "model",
            "base_model",
            "base",
            "experts",
            "parameters",
            "seed",
            "dtype",
            "rules",
        ),
        *(
            "value",
            "filter",
            "stages",
            "labels",
            "methods",
            "by_depth",
            "outside",
            "values",
            "tensors",
            "layer",
            "stacked",
            "tokenizer",
            "sources",
            "layer_range",
        ),
        *(*FORMS, *PARAMETERS, *list_methods(), "*", ".*", "mlp", "bfloat16", "slices", "(", "[[a]", "a{9999999999}"),
    ]
)
scalars = st.one_of(words, st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
data = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=20,
)
shares = st.sampled_from([0.1, 0.5, 1, "1e-1"])
settings = st.one_of(
    shares,
    st.lists(shares, min_size=1, max_size=3),
    st.fixed_dictionaries({"value": shares}, optional={"filter": words}),
    st.lists(
        st.fixed_dictionaries({"filter": words, "value": st.one_of(shares, st.lists(shares))}), min_size=1, max_size=3
    ),
)
most_settings = st.one_of(settings, settings, settings, data)
own = st.fixed_dictionaries(
    {
        "method": st.one_of(words, st.dictionaries(st.sampled_from(list(list_methods())), most_settings, min_size=1)),
        "experts": st.one_of(st.just(["a", "b"]), st.dictionaries(words, words, min_size=1)),
    },
    optional={"parameters": data, "base": scalars, "seed": scalars, "dtype": scalars, "rules": data},
)
models = st.fixed_dictionaries(
    {"model": st.sampled_from("abcdef")},
    optional={"parameters": st.dictionaries(st.sampled_from(["weight", "density", "scale"]), most_settings)},
)
mergekit = st.fixed_dictionaries(
    {
        "merge_method": st.sampled_from(list(FORMS)),
        "base_model": st.sampled_from("abc"),
        "parameters": st.dictionaries(st.sampled_from(PARAMETERS), most_settings, max_size=4),
        "models": st.lists(models, min_size=1, max_size=3),
    },
    optional={"dtype": st.sampled_from(["bfloat16", "half"])},
)
numbers = st.one_of(st.integers(-1, 4), st.just(10**400), st.floats())
sources = st.fixed_dictionaries(
    {
        "model": st.sampled_from("abc"),
        "layer_range": st.one_of(st.just([0, 2]), st.just([1, 3]), st.lists(numbers, max_size=3)),
    },
    optional={"parameters": st.dictionaries(st.sampled_from(["weight", "density", "scale"]), most_settings)},
)
rules = st.fixed_dictionaries(
    {},
    optional={
        "source": st.one_of(
            st.sampled_from("abcz"),
            st.fixed_dictionaries(
                {"kind": st.sampled_from(["zero", "model_token", "x"])},
                optional={"model": st.sampled_from("az"), "token": scalars, "token_id": numbers},
            ),
        ),
        "force": scalars,
    },
)
sliced = st.fixed_dictionaries(
    {
        "merge_method": st.sampled_from(list(FORMS)),
        "base_model": st.sampled_from("abc"),
        "parameters": st.dictionaries(st.sampled_from(PARAMETERS), most_settings, max_size=4),
        "slices": st.lists(st.fixed_dictionaries({"sources": st.lists(sources, min_size=1, max_size=3)}), max_size=3),
        "tokenizer": st.fixed_dictionaries(
            {},
            optional={
                "source": st.sampled_from(["union", "base", "a", "z"]),
                "tokens": st.dictionaries(st.sampled_from("tu"), st.one_of(rules, rules, data)),
                "pad_to_multiple_of": numbers,
            },
        ),
    },
    optional={"chat_template": st.sampled_from(["auto", "{{ x }}", "chatml"]), "out_dtype": words},
)


def check_recipe_or_error(text: str) -> None:
    try:
        recipe = jm.load_recipe(text + "\n")
    except jm.RecipeError:
        return
    assert isinstance(recipe.method, jm.Method) and recipe.experts


@pytest.mark.filterwarnings("ignore:Possible :FutureWarning")  # Python's, about unusual regular expressions
@given(st.one_of(st.text(), st.text(alphabet="[]{}:-,&*!|>#%@'\"\\ \n?<a1.~e"), data.map(json.dumps)))
@example("method: &a [*a]")
@example("\ud800")
def test_any_text(text):
    check_recipe_or_error(text)


@pytest.mark.filterwarnings("ignore:Possible :FutureWarning")
@given(st.one_of(own, mergekit, sliced), st.randoms())
def test_almost_recipes(entries, random):
    lines = yaml.safe_dump(entries, allow_unicode=True).split("\n")
    check_recipe_or_error("\n".join(lines))
    place = random.randrange(len(lines))
    lines[place] = lines[place][random.randrange(len(lines[place]) + 1) :]
    check_recipe_or_error("\n".join(lines))
