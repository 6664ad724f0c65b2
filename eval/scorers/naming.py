"""Captions token by token: where each object is named, and which image tokens show it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from vlmfix.asking.batch import Batch, model_inputs
from vlmfix.asking.pictures import open_picture
from vlmfix.asking.words import Written
from vlmfix.eval.benchmarks.benchmark import Item
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import chair
from vlmfix.hooks.parts.views import View, view
from vlmfix.model.anatomy import anatomy


@dataclass(frozen=True)
class Naming:
    """One object named in a caption."""

    object: str
    """Its node in the vocabulary."""
    token: int
    """Index, among the caption's tokens, of the first one of the word."""
    true: bool
    """Whether CHAIR's ground truth has it."""


@dataclass(frozen=True)
class Caption:
    """A picture, what the untouched model says of it, and the objects that it names."""

    key: int
    """Number of the picture."""
    item: Item
    tokens: tuple[int, ...]
    named: tuple[Naming, ...]


def describe(
    model: Any,
    processor: Any,
    data: Data,
    items: Sequence[Item],
    *,
    max_new_tokens: int,
    batch_size: int,
    tell: Callable[[int, int], None],
) -> list[Caption]:
    """Captions of the untouched model, greedily; `tell` hears how many there are so far, and how many there will be."""
    captions: list[Caption] = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        run = Batch.of(model, processor, _questions(batch), {"max_new_tokens": max_new_tokens})
        for item, tokens in zip(batch, run.generate(), strict=True):
            key = chair.image_key(item.id)
            named = namings(processor, tokens, data.truth[key], data.vocabulary)
            captions.append(Caption(key, item, tuple(tokens), named))
        tell(len(captions), len(items))
    return captions


def namings(
    processor: Any, tokens: Sequence[int], truth: frozenset[str], vocabulary: chair.Vocabulary
) -> tuple[Naming, ...]:
    """Objects that a caption's tokens name, each naming once, with the first token of the word."""
    written = Written.by(processor, tokens)
    named = []
    for mention in chair.mentions(written.text, vocabulary):
        first_token = written.tokens_of(mention.start, mention.end)[0]
        named.append(Naming(mention.node, first_token, mention.node in truth))
    return tuple(named)


def told(model: Any, processor: Any, captions: Sequence[Caption]) -> tuple[dict[str, Any], int]:
    """Inputs in which the model reads its own captions, and the number of columns before them.

    Prompts are padded on the left, captions on the right. The token at column n + i of a caption is predicted at
    column n + i - 1.
    """
    run = Batch.of(model, processor, _questions([c.item for c in captions]), {})
    inputs, n = dict(run.inputs), run.inputs["input_ids"].shape[1]
    longest = max(len(caption.tokens) for caption in captions)
    ids = inputs["input_ids"].new_zeros(len(captions), longest)
    mask = inputs["attention_mask"].new_zeros(len(captions), longest)
    for row, caption in enumerate(captions):
        ids[row, : len(caption.tokens)] = torch.tensor(caption.tokens)
        mask[row, : len(caption.tokens)] = 1
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], inputs[name].new_zeros(len(captions), longest)], dim=1)
    return inputs, n


def _questions(items: Sequence[Item]) -> list[tuple[list[Image.Image], str]]:
    return [([open_picture(item.image)], item.prompt) for item in items]


@dataclass(frozen=True)
class Annotations:
    """Boxes and masks of a data set."""

    data: Data

    @cached_property
    def _coco(self) -> COCO:
        return chair.read_coco(self.data.folder / "instances.json")

    @cached_property
    def _nodes(self) -> dict[int, str]:
        return {key: self.data.vocabulary.node(category["name"]) for key, category in self._coco.cats.items()}

    @cached_property
    def _keys(self) -> dict[int, Any]:
        return {chair.image_key(key): key for key in self._coco.imgs}

    def shown(self, key: int, place: View, size: tuple[int, int], most: float = 0.6) -> dict[str, np.ndarray]:
        """Object -> cells of the grid that it covers by half or more, of a picture of `size` (width, height).

        Objects are left out that are smaller than a cell, that no cell shows, or that cover more than a share `most`
        of the cells.
        """
        x0, y0, x1, y1 = place.box
        pixels_per_cell = (x1 - x0) * (y1 - y0) / (place.rows * place.columns)
        masks: dict[str, np.ndarray] = {}
        for annotation in self._coco.imgToAnns.get(self._keys[key], ()):
            mask = self._mask(annotation, size)
            if mask.sum() >= pixels_per_cell:
                node = self._nodes[annotation["category_id"]]
                masks[node] = masks.get(node, np.zeros_like(mask)) | mask
        cells_of = {}
        for node, mask in masks.items():
            crop = Image.fromarray(mask.astype(np.float32)).crop(place.box)  # black outside the picture
            shares = np.asarray(crop.resize((place.columns, place.rows), Image.Resampling.BOX))
            covered = shares.reshape(-1) >= 0.5
            if covered.any() and covered.mean() <= most:
                cells_of[node] = covered
        return cells_of

    def _mask(self, annotation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        """(height, width) bool: the mask where there is one, else the box."""
        image = self._coco.imgs[annotation["image_id"]]
        if annotation.get("segmentation") and (image["width"], image["height"]) == size:
            return self._coco.annToMask(annotation).astype(bool)
        x, y, width, height = annotation["bbox"]
        corners = (round(x), round(y), round(x + width) - 1, round(y + height) - 1)
        mask = Image.new("1", size)
        ImageDraw.Draw(mask).rectangle(corners, fill=1)
        return np.asarray(mask)


def grid(model: Any, processor: Any, item: Item) -> tuple[View, int, tuple[int, int]]:
    """The grid of image tokens over an item's picture, the number of its image tokens, and its size in pixels."""
    (picture,), _ = question = _questions([item])[0]
    inputs = model_inputs(model, processor, [question])
    ids = inputs["input_ids"]
    n = sum(int((ids == token).sum()) for token in anatomy(model).image_token_ids)
    return view(model.config, processor, inputs, picture.size, n), n, picture.size
