"""A head list as a picture: layers x heads, the selected ones framed."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from vlmfix.eval.report.plots import available
from vlmfix.method.heads import HeadList

MOST_TICKS = 16
LETTERS_PER_INCH = 13
"""Of a title in small print."""


def head_map(heads: HeadList, path: Path) -> None:
    """Draw the scores into a file (PNG, PDF or SVG by its ending). `ValueError` if that cannot be."""
    if not available():
        raise ValueError("the heat map needs matplotlib; install it with: pip install 'vlmfix[plots]'")
    from matplotlib.figure import Figure

    scores = np.array(heads.scores)
    n_layers, n_heads = scores.shape
    cell = min(0.5, 7 / n_heads)  # inches
    width = n_heads * cell + 1.6
    title = _title(heads, int(LETTERS_PER_INCH * width))
    height = n_layers * cell + 0.7 + 0.2 * len(title)
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    ax = figure.subplots()
    image = ax.imshow(scores, **_colours(scores))
    ax.set_facecolor("0.8")  # heads without a score
    _frame(ax, heads, cell)
    every = max(1, round(max(n_layers, n_heads) / MOST_TICKS))
    ax.set_xticks(range(0, n_heads, every))
    ax.set_yticks(range(0, n_layers, every))
    ax.set(xlabel="head", ylabel="layer")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("\n".join(title), fontsize=9, loc="left")
    bar = figure.colorbar(image, ax=ax, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot draw {path}: {error}") from error


def _title(heads: HeadList, letters: int) -> list[str]:
    """What was measured, on which model and pictures, in lines of so many letters."""
    pictures = f", {heads.data['n']} pictures of {Path(heads.data['name']).name}" if heads.data.get("n") else ""
    framed = f"; framed: the {len(heads.selected)} selected" if heads.selected else ""
    measured = f"{heads.tool} on {Path(heads.model).name}{pictures}{framed}"
    return [*textwrap.wrap(measured, letters), *textwrap.wrap(str(heads.extra.get("score", "")), letters)]


def _colours(scores: np.ndarray) -> dict[str, Any]:
    """From white to blue; with scores below 0, from blue over white at 0 to red."""
    known = scores[np.isfinite(scores)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    if low >= 0:
        return {"vmin": 0, "vmax": high, "cmap": "Blues"}
    reach = max(-low, high)
    return {"vmin": -reach, "vmax": reach, "cmap": "RdBu_r"}


def _frame(ax: Any, heads: HeadList, cell: float) -> None:
    from matplotlib.patches import Rectangle

    for layer, head in heads.selected:
        corner = (head - 0.45, layer - 0.45)
        ax.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor="black", linewidth=3 * cell))
