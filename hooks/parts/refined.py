"""The refined picture of a record of CARVE: written down as box, size and mask, and drawn again from them."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from vlmfix.asking.pictures import Picture


def redraw(effect: dict[str, Any], picture: Picture) -> Image:
    """The refined picture of a record: `effect` is CARVE's part of `Record.effects`, `picture` what was asked about (an
    image or a path). The picture itself where CARVE did not act."""
    from vlmfix.asking.pictures import open_picture
    from vlmfix.hooks.parts import regions

    whole = open_picture(picture)
    if not effect["acted"]:
        return whole
    mask = None if effect["mask"] is None else unpack(effect["mask"])
    if mask is not None and mask.shape != whole.size[::-1]:
        raise ValueError(f"the record is of a picture of {mask.shape[::-1]} pixels, got one of {whole.size}")
    x0, y0, x1, y1 = effect["box"]
    return regions.carve(whole, mask, (x0, y0, x1, y1), tuple(effect["size"]))


def unpack(mask: str) -> NDArray[Any]:
    """The mask of a record, (height, width) bool."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(mask))))


def pack(mask: Any) -> str:
    """As a PNG of one bit per pixel, in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
