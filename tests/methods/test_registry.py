"""The table of methods: complete, true, and readable."""

import inspect

import pytest

import jaxmerge as jm
from jaxmerge.methods.method import Granularity
from tests.public import public_names

TABLE = jm.list_methods()


def test_every_public_function_that_builds_a_method_or_stage_is_there():
    """What a constructor says that it returns decides."""
    built = {"Method", "Stage", "Chain"}
    functions = {name: f for name, f in public_names().items() if inspect.isfunction(f)}
    assert set(TABLE) == {name for name, f in functions.items() if f.__annotations__.get("return") in built}
    assert all(TABLE[name].constructor is functions[name] for name in TABLE)


@pytest.mark.parametrize("entry", TABLE.values(), ids=lambda entry: entry.name)
def test_summary_is_one_plain_sentence(entry):
    assert 0 < len(entry.summary) < 150
    assert not set("$\\\n") & set(entry.summary)


@pytest.mark.parametrize(
    ("name", "granularity", "needs", "source"),
    [
        ("linear", Granularity.ELEMENT, (), "model soups, arXiv 2203.05482"),
        ("slerp", Granularity.ELEMENT, (), "Shoemake 1985"),
        ("nearswap", Granularity.ELEMENT, (), "mergekit `nearswap` (no paper)"),
        ("ties", Granularity.MODEL, ("base",), "arXiv 2306.01708"),
        ("dare", Granularity.ELEMENT, ("base", "key"), "arXiv 2311.03099"),
        ("della", Granularity.TENSOR, ("base", "key"), "arXiv 2406.11617"),
        ("della_linear", Granularity.TENSOR, ("base", "key"), "arXiv 2406.11617"),  # "arguments as for `della`"
        ("passthrough", Granularity.ELEMENT, (), ""),
        ("chain", None, (), ""),
        ("trim", None, (), "arXiv 2306.01708, §3.1"),
    ],
)
def test_what_is_read_off_the_constructors(name, granularity, needs, source):
    entry = TABLE[name]
    assert (entry.granularity, entry.needs, entry.source) == (granularity, needs, source)


def test_parameters_are_those_of_the_function():
    assert TABLE["trim"].signature == "density, scope='model', inclusive=False, count='kept'"
    assert TABLE["chain"].signature == "*stages"
    assert list(TABLE["ties"].parameters) == list(inspect.signature(jm.ties).parameters)


def test_table_prints_in_a_terminal_and_in_a_notebook():
    assert len(repr(TABLE).splitlines()) == len(TABLE)
    page = TABLE._repr_html_()
    assert page.count("<tr>") == len(TABLE) + 1 and "DARE, then TIES&#x27; election" in page
