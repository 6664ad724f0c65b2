"""A head list as a picture: layers x heads, the selected ones framed."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from vlmfix.eval.report.plots import available
from vlmfix.method.heads import HeadList


def head_map(found: HeadList, path: Path) -> None:
    """Draw the scores into a file (PNG, PDF or SVG by its ending). `ValueError` if that cannot be."""
    if not available():
        raise ValueError("the heat map needs matplotlib; install it with: pip install 'vlmfix[plots]'")
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    scores = np.array(found.scores)
    known = scores[np.isfinite(scores)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    reach = max(-low, high)
    colours: dict[str, Any] = (
        {"vmin": -reach, "vmax": reach, "cmap": "RdBu_r"} if low < 0 else {"vmin": 0, "vmax": high, "cmap": "Blues"}
    )
    n_layers, n_heads = scores.shape
    cell = min(0.5, 7 / n_heads)
    width = n_heads * cell + 1.6
    where = f", {found.data['n']} pictures of {Path(found.data['name']).name}" if found.data.get("n") else ""
    framed = f"; framed: the {len(found.selected)} selected" if found.selected else ""
    title = [
        *textwrap.wrap(f"{found.tool} on {Path(found.model).name}{where}{framed}", int(13 * width)),
        *textwrap.wrap(str(found.extra.get("score", "")), int(13 * width)),
    ]
    figure = Figure(figsize=(width, n_layers * cell + 0.7 + 0.2 * len(title)), layout="constrained", dpi=150)
    ax = figure.subplots()
    image = ax.imshow(scores, **colours)
    ax.set_facecolor("0.8")  # heads without a score
    for layer, head in found.selected:
        ax.add_patch(
            Rectangle((head - 0.45, layer - 0.45), 0.9, 0.9, fill=False, edgecolor="black", linewidth=3 * cell)
        )
    every = max(1, round(max(n_layers, n_heads) / 16))
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
