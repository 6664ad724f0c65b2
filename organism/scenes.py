"""Procedural scenes: sprites of COCO classes on painted backgrounds, in sets that occur together in COCO.

A scene is a function of two numbers, seed and index. Object sets come from CHAIR's ground truth of COCO 2014: its train
split for training and calibration, its val split for the test scenes.

    scene = Painter().scene(object_sets("train")[7], seed=0, index=7)
    write(folder, object_sets("val"), seed=1, n=500)        # pictures, instances.json and captions.json in COCO format
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image

from vlmfix.eval.scorers import chair
from vlmfix.organism import sprites

SIZE = 120
"""Edge of a scene, in pixels."""
CLASSES: tuple[str, ...] = chair.Vocabulary.load().nodes
"""The 80 classes, in COCO's order."""
_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = tuple(number for number in range(1, 91) if number not in _UNUSED_IDS)
"""COCO's category ids of the classes."""
BACKGROUNDS = ("street", "field", "beach", "snow", "kitchen", "room")
TONES = (
    ((150, 180, 205), (115, 112, 110)),
    ((165, 205, 235), (105, 155, 80)),
    ((150, 210, 240), (225, 205, 150)),
    ((175, 195, 220), (235, 238, 244)),
    ((222, 212, 192), (150, 132, 120)),
    ((205, 190, 205), (140, 105, 82)),
)
"""Colours above and below the horizon, for each background."""
ROOM = BACKGROUNDS.index("room")
_HOMES = {
    "street": "bicycle,car,motorcycle,bus,train,truck,traffic light,fire hydrant,stop sign,parking meter,bench,handbag",
    "field": "horse,sheep,cow,elephant,bear,zebra,giraffe,dog,baseball bat,baseball glove,sports ball,frisbee,"
    "tennis racket",
    "beach": "boat,surfboard,kite,bird,umbrella,airplane",
    "snow": "skis,snowboard",
    "kitchen": "bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,"
    "donut,cake,microwave,oven,toaster,sink,refrigerator",
}
HOME: dict[str, int] = {}
for _place, _names in _HOMES.items():
    HOME |= dict.fromkeys(_names.split(","), BACKGROUNDS.index(_place))
"""Class -> the background where it is at home, if it is one of the first five; else a room, or anywhere."""
_SMALL = (
    "bird,frisbee,sports ball,kite,baseball bat,baseball glove,bottle,wine glass,cup,fork,knife,spoon,banana,apple,"
    "orange,carrot,donut,mouse,remote,cell phone,scissors,hair drier,toothbrush,tie,handbag,book,clock"
)
SMALL = frozenset(_SMALL.split(","))
"""Classes that are drawn small."""
STEPS = np.round(np.geomspace(15, 64, 11)).astype(int)
"""Sizes of sprites, in pixels of the longer edge."""
ANGLES = (-10, 0, 0, 10)
ATTEMPTS = 8
"""To find a place for an object where it hides little of others."""


@dataclass(frozen=True)
class Placed:
    """One object of a scene."""

    label: int
    """Index into CLASSES."""
    box: tuple[int, int, int, int]
    """Of the visible part: left, top, width, height."""
    area: int
    """Visible pixels."""

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box, across and down, 0 to 1."""
        return (self.box[0] + self.box[2] / 2) / SIZE, (self.box[1] + self.box[3] / 2) / SIZE


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and what is on it."""

    pixels: np.ndarray
    """(SIZE, SIZE, 3), uint8."""
    objects: tuple[Placed, ...]
    background: str
    labels: np.ndarray = field(repr=False)
    """(SIZE, SIZE), index of the class that each pixel shows; len(CLASSES) where it is background."""

    @property
    def present(self) -> tuple[int, ...]:
        """Classes on the picture, in the order of CLASSES."""
        return tuple(sorted({placed.label for placed in self.objects}))

    def patches(self, edge: int, share: float = 0.12) -> np.ndarray:
        """Class of each patch of so many pixels, row by row: the one that covers most of it, if at least the share."""
        n = SIZE // edge
        return main_classes(self.labels.reshape(n, edge, n, edge).swapaxes(1, 2).reshape(n * n, edge * edge), share)


def main_classes(tiles: np.ndarray, share: float) -> np.ndarray:
    """The class that covers most of each tile; len(CLASSES), background, where that is less than a share of it.

    Args:
        tiles: class of each pixel, (tiles, pixels).
        share: of the pixels, 0 to 1.
    """
    n_tiles, n_pixels = tiles.shape
    n_values = len(CLASSES) + 1
    # One count for all tiles at once: the classes of each tile have numbers of their own.
    numbers = tiles.astype(np.int64) + n_values * np.arange(n_tiles)[:, None]
    counts = np.bincount(numbers.ravel(), minlength=n_tiles * n_values).reshape(n_tiles, n_values)
    best = counts[:, :-1].argmax(1)
    return np.where(counts[np.arange(n_tiles), best] >= share * n_pixels, best, len(CLASSES))


@cache
def object_sets(split: Literal["train", "val"], most: int = 7) -> np.ndarray:
    """COCO's sets of 1 to `most` classes, one an image: bool (images, 80)."""
    truth = chair.coco_truth("rohrbach", split)
    label_of = {name: label for label, name in enumerate(CLASSES)}
    kept = [truth[key] for key in sorted(truth) if 1 <= len(truth[key]) <= most]
    sets = np.zeros((len(kept), len(CLASSES)), bool)
    for row, names in zip(sets, kept, strict=True):
        row[[label_of[name] for name in names]] = True
    return sets


@cache
def frequency(split: Literal["train", "val"] = "train") -> np.ndarray:
    """Share of images that show each class, (80,)."""
    return object_sets(split).mean(0)


@cache
def conditional(split: Literal["train", "val"] = "train") -> np.ndarray:
    """How often class j is where class i is, (80, 80), 0 on the diagonal."""
    sets = object_sets(split).astype(np.float32)
    together = sets.T @ sets
    shares = together / np.maximum(np.diag(together), 1)[:, None]
    np.fill_diagonal(shares, 0)
    return shares


def balanced(rng: np.random.Generator, most: int = 9) -> np.ndarray:
    """A set that COCO would not have: 3 to `most` classes, rare ones nearly as often as common ones. bool (80,)."""
    weights = frequency() ** 0.25
    labels = rng.choice(len(CLASSES), rng.integers(3, most + 1), replace=False, p=weights / weights.sum())
    chosen = np.zeros(len(CLASSES), bool)
    chosen[labels] = True
    return chosen


class Painter:
    """Paints scenes; keeps the sprites that it has scaled."""

    def __init__(self) -> None:
        self.sprites = sprites.load()
        self.scaled: dict[tuple[str, int, int, int, bool], np.ndarray] = {}
        self.noise = np.random.default_rng(0).normal(0, 1, (2 * SIZE, 2 * SIZE, 3)).astype(np.float32)

    def sprite(self, name: str, kind: int, size: int, angle: int, flip: bool) -> np.ndarray:
        """A sprite, scaled and turned: (height, width, 4), float32, colours 0 to 255 and opacity 0 to 1."""
        key = (name, kind, size, angle, flip)
        if key not in self.scaled:
            picture = Image.fromarray(self.sprites[name][kind])
            if flip:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if angle:
                picture = picture.rotate(angle, Image.Resampling.BILINEAR, expand=True)
            picture = picture.crop(picture.getbbox())
            scale = size / max(picture.size)
            picture = picture.resize([max(4, round(scale * edge)) for edge in picture.size], Image.Resampling.BOX)
            pixels = np.asarray(picture, np.float32).copy()
            pixels[..., 3] /= 255
            self.scaled[key] = pixels
        return self.scaled[key]

    def background(self, place: int, rng: np.random.Generator) -> np.ndarray:
        """Two tones, a wavy horizon, coarse noise, stripes or tiles, translucent boxes: (SIZE, SIZE, 3), float32."""
        above, below = (np.asarray(tone, np.float32) + rng.normal(0, 12, 3).astype(np.float32) for tone in TONES[place])
        x = np.arange(SIZE)
        horizon = SIZE * rng.uniform(0.3, 0.6) + rng.uniform(0, 6) * np.sin(x * rng.uniform(0.02, 0.12))
        canvas = np.where((x[:, None] < horizon[None])[..., None], above, below)
        cell = int(rng.choice((10, 15, 20, 30)))
        n_cells = SIZE // cell
        coarse = rng.normal(0, rng.uniform(3, 10), (n_cells, n_cells, 1)).astype(np.float32)
        canvas += coarse.repeat(cell, 0).repeat(cell, 1)
        is_inside = place >= BACKGROUNDS.index("kitchen")
        if is_inside or rng.random() < 0.2:
            period, depth = int(rng.integers(8, 24)), rng.uniform(5, 16)
            lines = np.zeros((SIZE, SIZE, 1), np.float32)
            lines[::period] = 1
            if rng.random() < 0.5:  # tiles instead of stripes
                lines[:, ::period] = 1
            canvas -= depth * lines
        for _ in range(rng.integers(0, 4)):
            top, left = rng.integers(0, SIZE - 10, 2)
            height, width = rng.integers(10, 70, 2)
            box = canvas[top : top + height, left : left + width]
            box += 0.35 * (rng.uniform(40, 230, 3).astype(np.float32) - box)
        return canvas

    def scene(self, classes: np.ndarray, seed: int, index: int) -> Scene:
        """A scene that shows the classes, bool (80,); what others hide wholly is not among its objects."""
        rng = np.random.default_rng([seed, index])
        labels = rng.permutation(np.flatnonzero(classes))
        place = self._home(labels, rng)
        canvas = self.background(place, rng)
        owner = np.full((SIZE, SIZE), -1, np.int16)  # which of the copies each pixel shows
        copies: list[int] = []
        for label in labels:
            copies += [int(label)] * int(1 if rng.random() < 0.8 else rng.integers(2, 4))
        largest = max(5, len(STEPS) - max(0, len(copies) - 2))  # the more objects, the smaller
        for number, label in enumerate(copies):
            name = CLASSES[label]
            step = rng.integers(0, 6) if name in SMALL else rng.integers(2, largest)
            kind, angle = rng.integers(len(self.sprites[name])), ANGLES[rng.integers(len(ANGLES))]
            drawn = self.sprite(name, int(kind), int(STEPS[step]), angle, bool(rng.random() < 0.5))
            self._place(canvas, owner, number, drawn, rng)
        canvas *= rng.uniform(0.85, 1.12)
        y, x = rng.integers(0, SIZE, 2)
        canvas += rng.uniform(2, 8) * self.noise[y : y + SIZE, x : x + SIZE]
        shown = [_visible(owner == number, label) for number, label in enumerate(copies)]
        objects = tuple(placed for placed in shown if placed is not None)
        label_of = np.array([*copies, len(CLASSES)], np.uint8)  # the last one is that of owner -1, the background
        return Scene(canvas.clip(0, 255).astype(np.uint8), objects, BACKGROUNDS[place], label_of[owner])

    @staticmethod
    def _home(labels: np.ndarray, rng: np.random.Generator) -> int:
        """A background: mostly one where one of the objects is at home."""
        homes = []
        for label in labels:
            name = CLASSES[label]
            anywhere = int(rng.integers(len(BACKGROUNDS))) if name == "person" else ROOM
            homes.append(HOME.get(name, anywhere))
        if homes and rng.random() < 0.9:
            return int(rng.choice(homes))
        return int(rng.integers(len(BACKGROUNDS)))

    @staticmethod
    def _place(canvas: np.ndarray, owner: np.ndarray, number: int, drawn: np.ndarray, rng: np.random.Generator) -> None:
        """Paint a sprite where there is room for it, if such a place is hit in a few attempts, and note its pixels."""
        height, width = drawn.shape[:2]
        for attempt in range(ATTEMPTS):
            y = int(rng.integers(-height // 6, max(1, SIZE - height + height // 6)))
            x = int(rng.integers(-width // 6, max(1, SIZE - width + width // 6)))
            rows, columns = slice(max(y, 0), min(y + height, SIZE)), slice(max(x, 0), min(x + width, SIZE))
            under = owner[rows, columns]
            is_last = attempt == ATTEMPTS - 1
            if is_last or rng.random() < 0.08 or (under >= 0).mean() < 0.12:
                break
        part = drawn[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x]
        opacity = part[..., 3:] * rng.uniform(0.85, 1)
        colour = part[..., :3] * (rng.uniform(0.8, 1.15) * rng.uniform(0.92, 1.08, 3)).astype(np.float32)
        region = canvas[rows, columns]
        region += opacity * (colour - region)
        under[part[..., 3] > 0.5] = number


def _visible(mask: np.ndarray, label: int) -> Placed | None:
    """An object by its visible pixels, bool (SIZE, SIZE); None if there is none."""
    area = int(mask.sum())
    if not area:
        return None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return Placed(label, (left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1), area)
