"""From attention maps of two passes to the part of a picture that a question is about: CARVE's maths, no model.

T steps, L layers, N = rows x columns image tokens. Pictures and maps over pixels are (height, width). The paper is
named in `carve.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1, half open."""
GUARD = 16
"""A box is at least 1/16 of the picture wide and high (ours): a thinner one would be enlarged without bounds."""
SQUARES = {256: 16, 576: 24, 1024: 32, 1600: 40, 1681: 41}
"""Numbers of tokens that the released code takes for square grids before it looks at the true grid."""


def fuse(
    q: Array,
    g: Array,
    lam: float,
    steps: str,
    ended: tuple[bool, bool] = (False, False),
    layers: Sequence[int] | None = None,
) -> Array:
    """Contrast q / (g + lam), summed over layers and weighted steps, (N,) float64.

    `q` (T_Q, L, N) and `g` (T_G, L, N) float32, of the question and of the general instruction; `ended` tells whether
    their last step emitted the end token, which `end` passes over. `steps`: `full` (weight t + 1), `uniform`, `start`,
    `end`. `ValueError` names the step and layer (of `layers`) of a contrast that is not finite.
    """
    if steps == "end":
        q, g = (x[-2:-1] if end and len(x) > 1 else x[-1:] for x, end in zip((q, g), ended, strict=True))
    n = 1 if steps in ("start", "end") else min(len(q), len(g))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (q[:n] / (g[:n] + np.float32(lam))).astype(np.float64)
    if not np.isfinite(ratio).all():
        step, layer, _ = np.argwhere(~np.isfinite(ratio))[0]
        raise ValueError(
            f"the contrast is not finite at step {step} of layer {layer if layers is None else layers[layer]} "
            f"(lam={lam:g}); where the general instruction pays no attention at all, lam must be above 0"
        )
    weights = np.arange(1.0, n + 1) if steps == "full" else np.ones(n)
    return np.einsum("t,tln->n", weights, ratio)


def spread(heat: Array, box: Box, size: tuple[int, int]) -> tuple[Array, Array]:
    """A map (rows, columns) over the pixels of a picture of `size` (width, height), where it covers `box`: bilinear,
    antialiased where a side shrinks. With it, which pixels it covers; others are 0."""
    (width, height), (x0, y0, x1, y1) = size, box
    large = Image.fromarray(heat.astype(np.float32)).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
    S, visible = np.zeros((height, width)), np.zeros((height, width), dtype=bool)
    inside = slice(max(y0, 0), min(y1, height)), slice(max(x0, 0), min(x1, width))
    shifted = slice(inside[0].start - y0, inside[0].stop - y0), slice(inside[1].start - x0, inside[1].stop - x0)
    S[inside], visible[inside] = np.asarray(large)[shifted], True
    return S, visible


def select(S: Array, visible: Array, p: float, K: int, rule: str, score: str) -> tuple[Array, float, int]:
    """The mask M, the threshold tau, and the number of regions found.

    A share `p` of the visible pixels has S >= tau; of its 4-connected regions the best stay: `K` of them (`max`) or
    max(K, int(n p)) (`official`), by `score` (`sum` of S or `size`; ties to the first met, row by row), or all but
    specks (`small`).
    """
    from scipy import ndimage

    tau = float(np.percentile(S[visible], 100 * (1 - p)))
    above = visible & (tau <= S)
    labels, n = ndimage.label(above)
    sizes = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    if score == "small":
        keep = np.flatnonzero(sizes >= int(above.sum() * 0.1 / 100))
    else:
        scores = sizes if score == "size" else np.bincount(labels.ravel(), weights=S.ravel(), minlength=n + 1)[1:]
        keep = np.argsort(-scores, kind="stable")[: K if rule == "max" else max(K, int(n * p))]
    kept = np.zeros(n + 1, dtype=bool)
    kept[keep + 1] = True
    return kept[labels], tau, n


def bounds(mask: Array) -> Box:
    """The tight box of a mask; the whole picture if it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, mask.shape[1], mask.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def widened(box: Box, size: tuple[int, int]) -> Box:
    """The box, widened about its centre within the picture until each side is at least 1/16 of the picture's."""
    starts, stops = [], []
    for lo, hi, whole in zip(box[:2], box[2:], size, strict=True):
        side = max(hi - lo, math.ceil(whole / GUARD))
        start = min(max(lo - (side - (hi - lo)) // 2, 0), whole - side)
        starts.append(start)
        stops.append(start + side)
    return starts[0], starts[1], stops[0], stops[1]


def moved(mask: Array | None, box: Box, within: Box, draw: random.Random) -> tuple[Array | None, Box]:
    """The mask and its box at a random place `within` which the box fits."""
    dx, dy = (draw.randint(within[i] - box[i], within[i + 2] - box[i + 2]) for i in (0, 1))
    there = box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy
    return (None if mask is None else np.roll(mask, (dy, dx), (0, 1))), there


def enlarged(box: Box, size: tuple[int, int], exact: bool) -> tuple[int, int]:
    """Width and height of a crop made large enough that neither side is smaller than the picture's. `exact` rounds; the
    released code truncates, so that a side may come out one pixel short."""
    width, height = box[2] - box[0], box[3] - box[1]
    s = max(size[0] / width, size[1] / height)
    return (round(width * s), round(height * s)) if exact else (int(width * s), int(height * s))


def carve(picture: Image.Image, mask: Array | None, box: Box, size: tuple[int, int]) -> Image.Image:
    """The refined picture: black outside the mask, cut to the box, enlarged to `size` (Lanczos)."""
    if mask is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size), Image.fromarray(mask))
    crop = picture.crop(box)
    return crop if crop.size == size else crop.resize(size, Image.Resampling.LANCZOS)


def official_grid(n: int, rows: int, columns: int) -> tuple[int, int] | None:
    """The grid that the released CARVE code guesses for `n` tokens whose true grid is rows x columns (-1: not known);
    `None` where it drops the map. It uses the grid's first tokens."""
    if n <= 1:
        return None
    if n in SQUARES:
        return SQUARES[n], SQUARES[n]
    if rows > 0 and n >= rows * columns:
        return rows, columns
    side = math.isqrt(n)
    return (side, side) if side * side == n else None


RATIOS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)


def sharpest_box(heat: Array, covers: Box, size: tuple[int, int], side: int) -> Box | None:
    """ViCrop's box: of windows of RATIOS x `side` pixels, each at the place with the most heat, the one that stands out
    most from its neighbours. `heat` covers the pixels `covers` of a picture of `size`; `None`: the whole picture."""
    rows, columns = heat.shape
    width, height = covers[2] - covers[0], covers[3] - covers[1]
    best: tuple[float, Box | None] = (-math.inf, None)
    for ratio in RATIOS:
        b = side * ratio
        nx, ny = min(int(b * columns / width), columns), min(int(b * rows / height), rows)
        if nx < 1 or ny < 1 or (nx == columns and ny == rows):
            continue
        sums = np.lib.stride_tricks.sliding_window_view(heat, (ny, nx)).sum((2, 3))
        x, y = np.unravel_index(sums.T.argmax(), sums.T.shape)  # x outer, y inner, the first one wins
        near = [(y + dy, x + dx) for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))]
        around = [sums[i, j] for i, j in near if 0 <= i < sums.shape[0] and 0 <= j < sums.shape[1]]
        sharpness = (sums[y, x] - np.mean(around)) / (nx * ny)
        if sharpness > best[0]:
            centre = covers[0] + (x + nx / 2) * width / columns, covers[1] + (y + ny / 2) * height / rows
            best = float(sharpness), _around(centre, b, size)
    return best[1]


def _around(centre: tuple[float, float], b: float, size: tuple[int, int]) -> Box:
    """A square of side `b` about the centre, shifted into the picture and cut at its borders."""
    starts, stops = [], []
    for middle, whole in zip(centre, size, strict=True):
        start = min(max(round(middle - b / 2), 0), max(whole - round(b), 0))
        starts.append(start)
        stops.append(min(start + round(b), whole))
    return starts[0], starts[1], stops[0], stops[1]
