"""Pictures of merges: scores of methods, cosines of task vectors, learned coefficients. Needs the extra `plot`.

Figures are made without pyplot, so that drawing changes no global state and works without a display.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ANNOTATED = 300
"""Heat maps with more cells than this are drawn without numbers."""


def plot_cosines(cosines: Mapping[str, Float[np.ndarray, "K K"]], experts: Sequence[str]) -> Figure:
    """Draws the cosines between the experts' task vectors: a column per layer, a row per pair of experts.

    Colours are relative to the largest cosine shown. A pair whose cosine is NaN (a task vector of zero) stays grey.

    Args:
        cosines: layer → symmetric matrix of cosines between the task vectors in that layer.
        experts: the K names, in the order of the matrices; at least two.

    Returns:
        A figure; `figure.savefig(path)` writes it.
    """
    from matplotlib.figure import Figure

    pairs = list(itertools.combinations(range(len(experts)), 2))
    labels = [f"{experts[i]} – {experts[j]}" for i, j in pairs]
    grid = np.array([[matrix[pair] for matrix in cosines.values()] for pair in pairs])
    limit = np.nanmax(np.abs(grid), initial=1e-3)

    width, height = 2.6 + 0.62 * len(cosines), 1.9 + 0.32 * len(pairs)
    figure = Figure(figsize=(max(width, 5.0), max(height, 3.0)), layout="constrained", dpi=150)
    axes = figure.subplots()
    axes.set_facecolor("0.8")
    image = axes.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(cosines)), list(cosines), rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(pairs)), labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if grid.size <= MAX_ANNOTATED:
        for (row, column), cosine in np.ndenumerate(grid):
            if np.isfinite(cosine):
                text = f"{round(cosine, 2) + 0.0:.2f}"  # adding zero turns -0.00 into 0.00
                color = "white" if abs(cosine) > 0.65 * limit else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_title("Cosine between task vectors, by layer", loc="left")
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    return figure


def plot_coefficients(coefficients: Any) -> Figure:
    """Draws learned coefficients: a row per tensor, a column per expert.

    White is the middle of all of them, so that one sees which tensors take more of an expert, and which less.

    Args:
        coefficients: `{tensor: {expert: number}}`, or what `learn` returned; `{name: number}` is one column.

    Returns:
        A figure; `figure.savefig(path)` writes it.
    """
    from matplotlib.figure import Figure

    table: Mapping[str, Any] = getattr(coefficients, "coefficients", coefficients)
    table = {name: row if isinstance(row, Mapping) else {"": row} for name, row in table.items()}
    rows, columns = list(table), list(next(iter(table.values())))
    grid = np.array([[table[row][column] for column in columns] for row in rows], dtype=float)
    middle = float(np.mean(grid))
    reach = float(np.max(np.abs(grid - middle), initial=1e-3))

    height = min(1.6 + 0.16 * len(rows), 40.0)
    figure = Figure(figsize=(max(3.6 + 0.6 * len(columns), 5.0), max(height, 2.4)), layout="constrained", dpi=150)
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="PiYG", vmin=middle - reach, vmax=middle + reach, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if grid.size <= MAX_ANNOTATED:
        for (row, column), value in np.ndenumerate(grid):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6)
    axes.set_title("Learned coefficients", loc="left")
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    return figure


def plot_scores(
    scores: Mapping[str, Mapping[str, float]], *, references: Mapping[str, float], label: str = "score"
) -> Figure:
    """Draws a bar per method for the mean of its scores, and a mark on it for each task. The best is at the top.

    Args:
        scores: method → task → score; every method has the same tasks.
        references: what to compare with, such as `{"base": 0.7}`; a vertical line each.
        label: what a score is.

    Returns:
        A figure; `figure.savefig(path)` writes it.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    means = {method: float(np.mean(list(by_task.values()))) for method, by_task in scores.items()}
    order = sorted(means, key=means.__getitem__)
    tasks = list(next(iter(scores.values())))

    figure = Figure(figsize=(9, 1.9 + 0.36 * len(order)), layout="constrained", dpi=150)
    axes = figure.subplots()
    axes.barh(order, [means[method] for method in order], color="#9db8d2", height=0.72, zorder=1)
    for i, task in enumerate(tasks):
        points = [scores[method][task] for method in order]
        axes.scatter(points, order, s=20, color=colormaps["Dark2"](i % 8), label=task, zorder=3)
    for place, method in enumerate(order):
        axes.text(0, place, f"  {means[method]:.1%}", va="center", fontsize=9, zorder=4)
    for name, value in references.items():
        axes.axvline(value, color="0.25", linestyle="--", linewidth=1, zorder=2)
        axes.annotate(
            f"{name} {value:.1%}", (value, 1), (0, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="bottom", fontsize=9, color="0.25",
        )  # fmt: skip
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=len(tasks), frameon=False, fontsize=9, title="marks: single tasks")
    return figure
