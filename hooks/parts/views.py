"""Which pixels of a picture an image token stands for: the grid of a model's tokens, and the rectangle it covers.

Read from the processor's output for the very inputs and from the processor's own settings. Models that show a picture
twice, whole and cut into tiles, are looked at through the view of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

WHOLE_FIRST = ("llava_next", "llava_onevision")
"""Models whose first tokens of a picture are its whole view, tiles and row ends after it."""
WHOLE_LAST = ("internvl", "idefics3", "smolvlm")
"""Models whose last tile is the whole view, where there are several tiles."""


@dataclass(frozen=True)
class View:
    """A grid of image tokens over a picture, row-major from the top left."""

    rows: int
    columns: int
    first: int
    """Of the grid's tokens, among the picture's image tokens."""
    box: tuple[int, int, int, int]
    """x0, y0, x1, y1, half open, in pixels of the picture; larger than the picture where the processor pads."""


def view(config: Any, processor: Any, inputs: dict[str, Any], size: tuple[int, int], n: int) -> View:
    """The view of one picture of `size` (width, height) whose `n` image tokens are in `inputs`.

    `TypeError` where tokens lie on no grid, or on one that is not known; `ValueError` where their number does not fit.
    """
    check_grid(config)
    kind, whole = config.model_type, (0, 0, *size)
    vision: Any = getattr(config, "vision_config", None)
    grid, pixels = inputs.get("image_grid_thw"), inputs.get("pixel_values")
    if grid is not None:
        rows, columns = (int(x) // vision.spatial_merge_size for x in grid[0, 1:])
        grid_view = View(rows, columns, 0, whole)
    elif kind in WHOLE_FIRST:
        side = vision.image_size // vision.patch_size
        grid_view = View(side, side, 0, whole)
    else:
        if pixels is None or pixels.dim() < 4:
            raise TypeError(f"cannot tell the grid of image tokens of a {kind} model from its inputs")
        n_tiles = math.prod(pixels.shape[:-3])
        if n_tiles > 1 and kind not in WHOLE_LAST:
            raise TypeError(f"a {kind} model cut the picture into {n_tiles} tiles, and their order is not known here")
        height, width = pixels.shape[-2:]
        per_tile = n // n_tiles
        rows = math.isqrt(per_tile * height // width)
        columns = per_tile // max(rows, 1)
        if not rows or rows * columns * n_tiles != n or rows * width != columns * height:
            raise TypeError(f"the {n} image tokens of a {kind} model lie on no grid over {n_tiles} x {width}x{height}")
        grid_view = View(rows, columns, n - per_tile, whole if n_tiles > 1 else covered(processor, size))
    n_on_grid = grid_view.rows * grid_view.columns
    if grid_view.first + n_on_grid > n or (grid is not None and n_on_grid != n):
        raise ValueError(
            f"expected at least {grid_view.rows} x {grid_view.columns} image tokens of the picture, got {n}"
        )
    return grid_view


def check_grid(config: Any) -> None:
    """`TypeError` for models whose image tokens are the answers of a Q-Former: they stand for no pixels."""
    if getattr(config, "qformer_config", None) is not None:
        raise TypeError(f"the image tokens of a {config.model_type} model (Q-Former) lie on no grid over the picture")


def covered(processor: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The rectangle that reaches the model, of a processor that pads to a square, cuts out the centre, or stretches."""
    images = getattr(processor, "image_processor", processor)
    width, height = size
    if getattr(images, "do_pad", False) and hasattr(images, "pad_to_square"):
        side = max(size)
    elif getattr(images, "do_center_crop", False) and (shortest := _get(images.size, "shortest_edge")):
        side = round(min(size) * (_get(images.crop_size, "height") or shortest) / shortest)
    else:
        return 0, 0, width, height
    x0, y0 = int((width - side) / 2), int((height - side) / 2)  # towards 0, so that padding is rounded as processors do
    return x0, y0, x0 + side, y0 + side


def _get(size: Any, key: str) -> int | None:
    return size.get(key) if isinstance(size, dict) else getattr(size, key, None)
