"""YAML with line numbers: what is read, what is refused, and where the message points."""

import pytest

from jaxmerge.cli.nodes import MAX_DEPTH, MAX_NODES, MAX_TEXT, parse
from jaxmerge.errors import RecipeError


def test_values_are_plain():
    text = "a: 1\nb: [0.5, 1e-4, -2E3, '1e-4', yes]\nc: {d: null, 3: 2024-01-01}\ne:\n"
    expected = {
        "a": 1,
        "b": [0.5, 1e-4, -2000.0, "1e-4", True],
        "c": {"d": None, "3": "2024-01-01"},
        "e": None,
    }
    assert parse(text, "recipe").plain() == expected


def test_lines_are_those_of_keys_and_items():
    root = parse("# comment\na:\n  b:\n    - 1\n    - c: 2\n", "r")
    a = root.entries()["a"]
    b = a.entries()["b"]
    assert [root.line, a.line, b.line, *(item.line for item in b.items())] == [2, 2, 3, 4, 5]


def test_unknown_key_points_at_its_line_and_suggests():
    with pytest.raises(RecipeError, match=r"^r:2: unknown key 'densty', did you mean 'density'\?$"):
        parse("weight: 1\ndensty: 2", "r").entries(("weight", "density"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r: the recipe is empty"),
        ("a: 1\n b: 2", "r:2: this is no YAML: mapping values are not allowed here"),
        ("a: [1, 2", "r:1: this is no YAML"),
        ("a: 1\nb: 2\na: 3", "r:3: the key 'a' is there twice"),
        ("a: 1\n---\nb: 2", "r:2: this is no YAML"),
        ("a: !!python/object/apply:os.system [echo]", "r:1: found the tag"),
        ("a: !!binary aGk=", "r:1: found the tag"),
        ("a: !!set {b}", "r:1: found the tag"),
        ("a: !!int twelve", "r:1: found 'twelve', expected a finite number"),
        ("a: .nan", "r:1: found '.nan', expected a finite number"),
        ("a: 1e999", "r:1: found '1e999', expected a finite number"),
        (f"a: {'9' * 5000}", "r:1: found '9999"),
        ("[a]: 1", "r:1: found a key that is a list"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "r:3: found a key that is a list, a mapping or <<"),
        ("a: \x00", "r: this is no YAML that can be read"),
        ("a: &x [*x]", f"r:1: the recipe has more than {MAX_DEPTH} levels"),
        ("[" * 60 + "]" * 60, f"r:1: the recipe has more than {MAX_DEPTH} levels"),
        ("[" * 5000, "r: this is no YAML that can be read: RecursionError"),
        ("a: " + "x" * MAX_TEXT, f"r: found {MAX_TEXT + 3} characters"),
    ],
)
def test_refused(text, message):
    with pytest.raises(RecipeError) as error:
        parse(text, "r")
    assert str(error.value).startswith(message)


def test_aliases_count_each_time_they_are_used():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(RecipeError, match=f"more than {MAX_NODES} values, with aliases written out"):
        parse("\n".join(lines), "r")


def test_aliases_in_reason_are_fine():
    assert parse("a: &x [1, 2]\nb: *x", "r").plain() == {"a": [1, 2], "b": [1, 2]}
