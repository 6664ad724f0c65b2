"""Which objects are in an image: from annotations and human captions, from packed files, and that of COCO 2014."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from vlmfix.eval.scorers.chair.captions import mentions
from vlmfix.eval.scorers.chair.coco import image_key, instance_categories, read_coco
from vlmfix.eval.scorers.chair.variants import check_variant, version
from vlmfix.eval.scorers.chair.vocabulary import Vocabulary, coco_vocabulary

_TABLES = files("vlmfix.assets") / "chair"


@dataclass(frozen=True, eq=False, repr=False)
class GroundTruth(Mapping[int, frozenset[str]]):
    """Objects in each image, by `image_key`, with the variant that read them out of human captions."""

    objects: Mapping[int, frozenset[str]]
    variant: str | None = None
    """None where no caption was read: such a truth suits every variant."""
    source: str = "ground truth"
    """What it is, in a few words."""
    names: Mapping[int, str] = field(default_factory=dict)
    """Names of the images, where the ground truth gives them any."""

    def __getitem__(self, image: int) -> frozenset[str]:
        return self.objects[image]

    def __iter__(self) -> Iterator[int]:
        return iter(self.objects)

    def __len__(self) -> int:
        return len(self.objects)

    def __repr__(self) -> str:
        return f"<{self.source}, {self.variant or 'any variant'}: {len(self)} images>"


_TRUTHS = {
    "rohrbach": ("rohrbach",),
    "opera": ("opera",),
    "opera_approx": ("opera_approx", "opera"),  # an approximation of the exact one, so the exact truth is its truth
    "inflect": ("inflect", "rohrbach"),  # its own truth needs the captions of COCO; `label` tells the two apart
    "strict": ("strict",),
}
"""Variant of the captions -> variants of the ground truth that go with it, the first is its own."""


def label(variant: str, truth: Mapping[int, frozenset[str]] | None = None) -> str:
    """The name under which figures of a variant are recorded: `opera (nltk 3.10.4)`, `inflect (gt rohrbach)`.

    Raises:
        ValueError: the ground truth was made with another variant, or the variant is unknown or lacks what it needs.
    """
    check_variant(variant)
    made_with = truth.variant if isinstance(truth, GroundTruth) else None
    if made_with not in (None, *_TRUTHS[variant]):
        raise ValueError(
            f"{truth!r} does not go with captions read as {variant}; "
            f"give ground truth made with {' or '.join(_TRUTHS[variant])}, or score as {made_with}."
        )
    if variant == "inflect" and made_with == "rohrbach":
        return "inflect (gt rohrbach)"
    package = version(variant)
    return f"{variant} ({package})" if package else variant


def ground_truth(
    instances: str | os.PathLike[str],
    captions: str | os.PathLike[str] | None = None,
    vocabulary: Vocabulary | None = None,
    variant: str = "rohrbach",
) -> GroundTruth:
    """Objects in each image: its annotated instances, and what human captions name, by `image_key` of the image's id.

    Files are in COCO format, plain or gzipped. CHAIR's own ground truth uses both; captions are read by the variant
    that will read the captions to score. Captions of other images are passed over.

    Raises:
        ValueError: a category is not in the vocabulary, an image has no caption, or two images share a number: the same
            in their ids, or one in its file name and the other in its id.
    """
    check_variant(variant)
    vocabulary = vocabulary or coco_vocabulary()
    images = instance_categories(instances)
    truth: dict[int, set[str]] = {}
    for image, names in images:
        truth[image_key(image["id"])] = {vocabulary.node(name) for name in names}
    if len(truth) < len(images):
        raise ValueError(f"{instances}: {len(images)} image ids hold only {len(truth)} different numbers; number them.")
    for image, _ in images:
        _check_file_name(image, truth.keys(), instances)
    if captions is not None:
        _add_captions(truth, captions, vocabulary, variant)
    return GroundTruth(
        {key: frozenset(objects) for key, objects in truth.items()},
        variant=None if captions is None else variant,
        source=f"ground truth of {Path(instances).name}",
    )


def _check_file_name(image: dict[str, Any], keys: Collection[int], path: str | os.PathLike[str]) -> None:
    try:
        file_key = image_key(image["file_name"])
    except (KeyError, ValueError):
        return
    if file_key != image_key(image["id"]) and file_key in keys:
        raise ValueError(
            f"{path}: the file of image {image['id']} is {image['file_name']!r}, the number of another image; "
            "give images the ids that their file names bear."
        )


def _add_captions(
    truth: dict[int, set[str]], path: str | os.PathLike[str], vocabulary: Vocabulary, variant: str
) -> None:
    without_caption = set(truth)
    for annotation in read_coco(path).dataset["annotations"]:  # all of them, also where ids stand twice
        if not isinstance(annotation.get("caption"), str):
            raise ValueError(f"{path}: annotation {annotation['id']} has no caption; give a captions file.")
        key = image_key(annotation["image_id"])
        if key in truth:
            truth[key].update(mention.node for mention in mentions(annotation["caption"], vocabulary, variant))
            without_caption.discard(key)
    if without_caption:
        raise ValueError(
            f"{path} holds no caption for {len(without_caption)} of {len(truth)} images "
            f"({first_few(sorted(without_caption))}); "
            "give the captions of the same images, or none."
        )


def coco_truth(variant: str = "rohrbach", split: Literal["val", "train"] | None = None) -> GroundTruth:
    """The ground truth of COCO 2014 that goes with a variant: 40,504 val images and 82,783 train, 2017 has the same.

    It comes from the caches of Maxlinn/CHAIR-metric-standalone and shikiw/OPERA. `inflect` gets the truth of
    `rohrbach`, and a `label` that says so; `strict` that of `rohrbach`, and a bus wherever `opera` has one. Without a
    split, both.

    Raises:
        ValueError: the variant or the split is unknown.
    """
    check_variant(variant)
    if split not in ("val", "train", None):
        raise ValueError(f"{split!r} is no split of COCO 2014; choose val or train, or None for both.")
    return _coco_truth({"opera_approx": "opera", "inflect": "rohrbach"}.get(variant, variant), split)


@cache
def _coco_truth(variant: str, split: str | None) -> GroundTruth:
    if split is None:
        objects = {**_coco_truth(variant, "val"), **_coco_truth(variant, "train")}
    elif variant == "strict":
        bus = frozenset({"bus"})
        buses = _coco_truth("opera", split)
        objects = {image: nodes | (bus & buses[image]) for image, nodes in _coco_truth("rohrbach", split).items()}
    else:
        objects = dict(load_masks(str(_TABLES / "gt" / f"coco2014_{split}_{variant}.json.gz")))
    return GroundTruth(objects, variant, f"COCO 2014 {split or 'val and train'}")


def images_without_instances() -> frozenset[int]:
    """The 1,069 images of COCO 2014 that nobody annotated: their ground truth is what human captions name."""
    return frozenset(json.loads((_TABLES / "gt" / "images_without_instances.json").read_text("utf-8")))


def load_masks(path: str | os.PathLike[str], variant: str | None = None) -> GroundTruth:
    """Read a packed ground truth: JSON, plain or gzipped, `{"objects": [name, ...], "images": {"42": "10000", ...}}`.

    Each image has a hexadecimal mask; bit k stands for objects[k]. The file does not tell its variant: name the one
    that read its captions, or none if it was made without captions.

    Raises:
        ValueError: the file is in another format, or the variant is unknown.
    """
    if variant is not None:
        check_variant(variant)
    path = Path(path)
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            packed = json.load(file)
        objects = packed["objects"]
        masks = {image_key(image): int(mask, 16) for image, mask in packed["images"].items()}
        if any(mask < 0 or mask >> len(objects) for mask in masks.values()):
            raise ValueError(f"a mask has a bit beyond the {len(objects)} objects")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a packed ground truth ({type(error).__name__}: {error}).") from error
    objects_of_mask = {}  # many images share their objects, so each set is made once
    for mask in set(masks.values()):
        objects_of_mask[mask] = frozenset(name for bit, name in enumerate(objects) if mask >> bit & 1)
    return GroundTruth({image: objects_of_mask[mask] for image, mask in masks.items()}, variant, path.name)


def first_few(keys: Sequence[object], most: int = 3) -> str:
    """The first few keys, for an error message: "42, 73, 74, ..."."""
    return ", ".join(map(str, keys[:most])) + (", ..." if len(keys) > most else "")
