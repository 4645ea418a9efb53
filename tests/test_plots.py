"""Pictures show the numbers they are given."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from jaxmerge.plots import MAX_ANNOTATED, plot_cosines, plot_scores


def cosine_matrix(pairs: dict[tuple[int, int], float]) -> np.ndarray:
    matrix = np.eye(3)
    for (i, j), cosine in pairs.items():
        matrix[i, j] = matrix[j, i] = cosine
    return matrix


def test_cosines_stand_at_their_pair_and_layer(tmp_path) -> None:
    layers = {
        "blocks/0": cosine_matrix({(0, 1): 0.5, (0, 2): -0.25, (1, 2): 0.125}),
        "blocks/1": cosine_matrix({(0, 1): -0.001, (0, 2): np.nan, (1, 2): 0.0}),
    }
    figure = plot_cosines(layers, ["a", "b", "c"])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a – b", "a – c", "b – c"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["blocks/0", "blocks/1"]
    (image,) = axes.images
    shown = image.get_array()
    assert shown is not None
    np.testing.assert_array_equal(np.ma.filled(shown, np.nan), [[0.5, -0.001], [-0.25, np.nan], [0.125, 0.0]])
    assert image.get_clim() == (-0.5, 0.5)
    assert [text.get_text() for text in axes.texts] == ["0.50", "0.00", "-0.25", "0.12", "0.00"]
    figure.savefig(tmp_path / "cosines.png")
    assert (tmp_path / "cosines.png").stat().st_size > 1000


@pytest.mark.parametrize("layers", [MAX_ANNOTATED, MAX_ANNOTATED + 1])
def test_large_heat_maps_have_no_numbers(layers: int) -> None:
    figure = plot_cosines({str(i): np.eye(2) for i in range(layers)}, ["a", "b"])
    assert bool(figure.axes[0].texts) == (layers <= MAX_ANNOTATED)


def test_heat_map_of_zero_task_vectors_draws(tmp_path) -> None:
    plot_cosines({"layer": np.full((2, 2), np.nan)}, ["a", "b"]).savefig(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


def test_scores_are_bars_of_means_with_the_best_on_top(tmp_path) -> None:
    scores = {"worse": {"x": 0.25, "y": 0.5}, "best": {"x": 1.0, "y": 0.5}, "better": {"x": 0.5, "y": 0.75}}
    figure = plot_scores(scores, references={"base": 0.3}, label="accuracy")
    axes = figure.axes[0]
    bars = sorted((bar for bar in axes.patches if isinstance(bar, Rectangle)), key=Rectangle.get_y)
    np.testing.assert_allclose([bar.get_width() for bar in bars], [0.375, 0.625, 0.75])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["worse", "better", "best"]
    marks = {str(points.get_label()): np.array(points.get_offsets()) for points in axes.collections}
    np.testing.assert_allclose(marks["x"], [[0.25, 0], [0.5, 1], [1.0, 2]])
    np.testing.assert_allclose(marks["y"], [[0.5, 0], [0.75, 1], [0.5, 2]])
    assert [np.array(line.get_xdata()).tolist() for line in axes.lines] == [[0.3, 0.3]]
    assert axes.get_xlabel() == "accuracy"
    assert "base 30.0%" in [text.get_text() for text in axes.texts]
    figure.savefig(tmp_path / "scores.png")


def test_importing_plots_does_not_import_matplotlib() -> None:
    code = "import sys, jaxmerge.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
