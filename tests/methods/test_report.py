"""A report says what happened to each tensor, in numbers, as text, HTML and a picture."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm

BASE = {"w": jnp.zeros((2, 4)), "b": jnp.zeros(2), "steps": jnp.arange(2)}
EXPERTS = {
    "math": BASE | {"w": jnp.asarray([[4.0, 3, 2, 1], [0, 0, 0, 0]]), "b": jnp.ones(2)},
    "co<de": BASE | {"w": jnp.asarray([[-4.0, 3, 1, 2], [0, 0, 0, 0]]), "b": jnp.ones(2)},
}


@pytest.fixture
def report():
    method = jm.ties(0.25, scope="tensor")
    merged, report = jm.merge(method, EXPERTS, base=BASE, return_report=True)
    np.testing.assert_array_equal(merged["w"], jm.merge(method, EXPERTS, base=BASE)["w"])
    return report


def notes(report):
    return {tensor.name: tensor.notes for tensor in report.tensors}


def test_numbers(report):
    of_w = notes(report)["w"]
    np.testing.assert_array_equal(of_w["kept"], [2, 2])
    assert of_w["conflicts"] == 1
    np.testing.assert_allclose(of_w["squared_norms"], [30, 30])
    np.testing.assert_allclose(of_w["squared_merged_norm"], 4**2 + 3**2)  # a zero total elects +
    assert notes(report)["steps"] == {}
    assert {t.name: (t.action, t.size) for t in report.tensors} == {
        "w": ("merged", 8),
        "b": ("merged", 2),
        "steps": ("copied", 2),
    }


def test_without_a_base_distances_are_from_the_first_expert():
    report = jm.merge(jm.linear(), EXPERTS, return_report=True)[1]
    np.testing.assert_allclose(notes(report)["w"]["squared_norms"], [0, 64 + 1 + 1])
    np.testing.assert_allclose(notes(report)["w"]["squared_merged_norm"], (64 + 1 + 1) / 4)


def test_stacked_layers_add_up():
    base = {"layers": jnp.zeros((3, 4))}
    expert = {"layers": jnp.asarray(np.arange(1.0, 13.0, dtype=np.float32).reshape(3, 4))}
    method = jm.ties(0.5, scope="tensor")
    report = jm.merge(method, [expert], base=base, rules=jm.Rules(stacked=("layers",)), return_report=True)[1]
    np.testing.assert_array_equal(notes(report)["layers"]["kept"], [6])
    np.testing.assert_allclose(notes(report)["layers"]["squared_norms"], [650])


def test_text(report):
    assert repr(report) == "MergeReport(2 tensors merged, 1 copied, experts math, co<de)"
    text = str(report)
    for piece in ("math", "co<de", "steps", "copied", "float32[2, 4]", "25%", "12.5%", "5.48", "5"):
        assert piece in text


def test_html_is_escaped(report):
    html = report._repr_html_()
    assert html.count("<tr>") == 4
    assert "<de" not in html


def test_plot(report):
    axes = report.plot().axes[0]
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    np.testing.assert_allclose(widths, [[np.sqrt(2), np.sqrt(30)], [np.sqrt(2), 5.0]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "w"]
