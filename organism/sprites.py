"""Sprites of the 80 COCO classes: read from the sheet that is shipped, or drawn again from the font.

`python -m vlmfix.organism.sprites FONT` renders the sheet. FONT is Noto Color Emoji (Debian: fonts-noto-color-emoji,
SIL Open Font License 1.1, which does not cover pictures made with a font). Classes without a fitting emoji are drawn.
"""

from __future__ import annotations

import json
import math
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE = 64
"""Edge of a sprite on the sheet, in pixels."""
COLUMNS = 12
STRIKE = 109
"""The one size at which the font holds its bitmaps."""

EMOJI = {
    "person": "🚶🧍👨👩👦👧👴👵",
    "bicycle": "🚲",
    "car": "🚗🚙",
    "motorcycle": "🏍🛵",
    "airplane": "✈🛩",
    "bus": "🚌🚍",
    "train": "🚆🚂",
    "truck": "🚚🚛",
    "boat": "⛵🚤",
    "traffic light": "🚦🚥",
    "stop sign": "🛑",
    "bird": "🐦🦅🦆",
    "cat": "🐱🐈",
    "dog": "🐕🐶",
    "horse": "🐎🐴",
    "sheep": "🐑🐏",
    "cow": "🐄🐮",
    "elephant": "🐘",
    "bear": "🐻",
    "zebra": "🦓",
    "giraffe": "🦒",
    "backpack": "🎒",
    "umbrella": "☂🌂",
    "handbag": "👜👛",
    "tie": "👔",
    "suitcase": "🧳",
    "frisbee": "🥏",
    "skis": "🎿",
    "sports ball": "⚽🏀🏐",
    "kite": "🪁",
    "skateboard": "🛹",
    "bottle": "🍾🧴",
    "wine glass": "🍷",
    "cup": "☕🥤",
    "knife": "🔪",
    "spoon": "🥄",
    "bowl": "🥣🥗",
    "banana": "🍌",
    "apple": "🍎🍏",
    "sandwich": "🥪",
    "orange": "🍊",
    "broccoli": "🥦",
    "carrot": "🥕",
    "hot dog": "🌭",
    "pizza": "🍕",
    "donut": "🍩",
    "cake": "🎂🍰",
    "chair": "🪑💺",
    "couch": "🛋",
    "potted plant": "🪴",
    "bed": "🛏",
    "toilet": "🚽",
    "tv": "📺",
    "laptop": "💻",
    "mouse": "🖱",
    "keyboard": "⌨",
    "cell phone": "📱",
    "book": "📕📘📖",
    "clock": "🕐⏰",
    "vase": "🏺",
    "scissors": "✂",
    "teddy bear": "🧸",
    "toothbrush": "🪥",
}
"""Class -> emoji, one sprite each."""

Shape = tuple[str, tuple[float, ...], str]
DRAWN: dict[str, list[Shape]] = {
    "fire hydrant": [
        ("rectangle", (24, 22, 40, 58), "#d22"),
        ("ellipse", (22, 8, 42, 30), "#e33"),
        ("rectangle", (12, 30, 52, 38), "#b11"),
        ("rectangle", (18, 54, 46, 62), "#911"),
        ("ellipse", (27, 29, 37, 39), "#eee"),
    ],
    "parking meter": [
        ("rectangle", (29, 30, 35, 63), "#667"),
        ("ellipse", (18, 2, 46, 30), "#889"),
        ("rectangle", (18, 14, 46, 36), "#889"),
        ("rectangle", (23, 10, 41, 20), "#cfe"),
        ("rectangle", (29, 24, 35, 32), "#223"),
    ],
    "bench": [
        ("rectangle", (2, 18, 62, 24), "#963"),
        ("rectangle", (2, 27, 62, 33), "#a74"),
        ("rectangle", (2, 38, 62, 45), "#852"),
        ("rectangle", (8, 18, 12, 58), "#333"),
        ("rectangle", (52, 18, 56, 58), "#333"),
    ],
    "snowboard": [("line", (10, 54, 54, 10, 16), "#28f"), ("line", (26, 46, 40, 32, 6), "#ff0")],
    "baseball bat": [("line", (8, 56, 34, 30, 5), "#a63"), ("line", (30, 34, 58, 6, 11), "#c84")],
    "baseball glove": [
        ("ellipse", (8, 20, 54, 62), "#953"),
        ("line", (18, 30, 12, 8, 10), "#a64"),
        ("line", (30, 26, 28, 4, 10), "#a64"),
        ("line", (42, 28, 44, 6, 10), "#a64"),
        ("ellipse", (22, 34, 42, 54), "#fff"),
    ],
    "surfboard": [("ellipse", (20, 0, 44, 63), "#2cc"), ("line", (32, 4, 32, 60, 4), "#f52")],
    "tennis racket": [
        ("line", (8, 58, 30, 34, 6), "#222"),
        ("ellipse", (24, 2, 62, 40), "#2a4"),
        ("ellipse", (29, 7, 57, 35), "#efe"),
        ("line", (43, 7, 43, 35, 1), "#888"),
        ("line", (29, 21, 57, 21, 1), "#888"),
    ],
    "fork": [
        ("rectangle", (29, 26, 35, 62), "#aab"),
        ("rectangle", (20, 22, 44, 29), "#aab"),
        ("rectangle", (20, 2, 24, 26), "#aab"),
        ("rectangle", (30, 2, 34, 26), "#aab"),
        ("rectangle", (40, 2, 44, 26), "#aab"),
    ],
    "dining table": [
        ("polygon", (12, 18, 52, 18, 63, 34, 1, 34), "#b73"),
        ("rectangle", (1, 34, 63, 38), "#842"),
        ("rectangle", (5, 38, 10, 62), "#731"),
        ("rectangle", (54, 38, 59, 62), "#731"),
    ],
    "remote": [
        ("rectangle", (22, 2, 42, 62), "#222"),
        ("ellipse", (28, 6, 36, 14), "#f33"),
        ("rectangle", (26, 20, 31, 26), "#ccc"),
        ("rectangle", (34, 20, 39, 26), "#ccc"),
        ("rectangle", (26, 32, 31, 38), "#ccc"),
        ("rectangle", (34, 32, 39, 38), "#ccc"),
    ],
    "microwave": [
        ("rectangle", (2, 14, 62, 52), "#ccc"),
        ("rectangle", (6, 19, 44, 47), "#235"),
        ("rectangle", (49, 19, 58, 27), "#3f6"),
        ("ellipse", (49, 34, 58, 43), "#444"),
    ],
    "oven": [
        ("rectangle", (6, 4, 58, 62), "#eee"),
        ("rectangle", (11, 24, 53, 54), "#321"),
        ("rectangle", (16, 38, 48, 49), "#f72"),
        ("ellipse", (11, 8, 19, 16), "#333"),
        ("ellipse", (28, 8, 36, 16), "#333"),
        ("ellipse", (45, 8, 53, 16), "#333"),
    ],
    "toaster": [
        ("rectangle", (16, 4, 28, 28), "#c83"),
        ("rectangle", (36, 4, 48, 28), "#c83"),
        ("rectangle", (6, 22, 58, 58), "#99a"),
        ("rectangle", (56, 32, 63, 38), "#222"),
    ],
    "sink": [
        ("polygon", (2, 30, 62, 30, 50, 58, 14, 58), "#def"),
        ("ellipse", (8, 26, 56, 38), "#9bd"),
        ("line", (32, 30, 32, 8, 5), "#778"),
        ("line", (32, 8, 44, 8, 5), "#778"),
        ("line", (44, 8, 44, 18, 5), "#778"),
    ],
    "refrigerator": [
        ("rectangle", (14, 1, 50, 63), "#dee"),
        ("rectangle", (14, 22, 50, 25), "#677"),
        ("rectangle", (42, 8, 46, 18), "#445"),
        ("rectangle", (42, 30, 46, 46), "#445"),
    ],
    "hair drier": [
        ("ellipse", (22, 6, 58, 40), "#e4a"),
        ("polygon", (4, 14, 30, 10, 30, 36, 4, 32), "#e4a"),
        ("polygon", (36, 36, 50, 34, 46, 63, 34, 63), "#b27"),
        ("ellipse", (36, 16, 48, 30), "#fbe"),
    ],
}
"""Class -> shapes on a field of 64 x 64: kind, coordinates (a line's width last), colour."""


def load() -> dict[str, list[np.ndarray]]:
    """Class name -> sprites, each RGBA of (64, 64, 4), uint8."""
    folder = files("vlmfix.assets") / "sprites"
    names = json.loads((folder / "sheet.json").read_text())
    with (folder / "sheet.png").open("rb") as file:
        sheet = np.asarray(Image.open(file).convert("RGBA"))
    sprites: dict[str, list[np.ndarray]] = {}
    for number, name in enumerate(names):
        row, column = divmod(number, COLUMNS)
        top, left = TILE * row, TILE * column
        sprites.setdefault(name, []).append(sheet[top : top + TILE, left : left + TILE])
    return sprites


def emoji(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji, cut to its visible part."""
    picture = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(picture).text((10, 10), character, font=font, embedded_color=True)
    return picture.crop(picture.getbbox())


def drawing(shapes: list[Shape], scale: int = 4) -> Image.Image:
    """One drawn sprite, cut to its visible part."""
    picture = Image.new("RGBA", (TILE * scale, TILE * scale))
    draw = ImageDraw.Draw(picture)
    for kind, numbers, colour in shapes:
        points = [scale * number for number in numbers]
        if kind == "line":
            draw.line(points[:4], colour, width=int(points[4]))
        else:
            getattr(draw, kind)(points, colour)
    return picture.crop(picture.getbbox())


def tile(picture: Image.Image) -> Image.Image:
    """The picture, centred on a tile of the sheet."""
    scale = TILE / max(picture.size)
    picture = picture.resize([max(1, round(scale * edge)) for edge in picture.size], Image.Resampling.LANCZOS)
    centred = Image.new("RGBA", (TILE, TILE))
    centred.paste(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2))
    return centred


def main(font: str, folder: str) -> None:
    """Render the sheet and the list of its classes."""
    face = ImageFont.truetype(font, STRIKE)
    sprites = []
    for name, characters in EMOJI.items():
        sprites += [(name, emoji(character, face)) for character in characters]
    sprites += [(name, drawing(shapes)) for name, shapes in DRAWN.items()]
    rows = math.ceil(len(sprites) / COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
    for number, (_, picture) in enumerate(sprites):
        row, column = divmod(number, COLUMNS)
        sheet.paste(tile(picture), (column * TILE, row * TILE))
    sheet.quantize(256, Image.Quantize.FASTOCTREE).save(Path(folder) / "sheet.png", optimize=True)
    (Path(folder) / "sheet.json").write_text(json.dumps([name for name, _ in sprites]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], "assets/sprites")
