"""Files in COCO format, and the numbers of images."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from pycocotools.coco import COCO


def image_key(image: float | str | os.PathLike[str]) -> int:
    """The number of an image: 42, "42", "COCO_val2014_000000000042.jpg" and any path to such a file give 42.

    The number is the last group of digits of the file name without its ending. Raises ValueError if there is none.
    """
    if isinstance(image, str) and len(image) <= 18 and image.isascii() and image.isdecimal():
        return int(image)
    if isinstance(image, (str, os.PathLike)):
        digits = re.findall(r"[0-9]+", PureWindowsPath(os.fsdecode(image)).stem)  # knows both kinds of slashes
        if digits and len(digits[-1]) <= 18:
            return int(digits[-1])
    elif isinstance(image, float) and image.is_integer() and 0 <= image < 10**15:
        return int(image)
    elif not isinstance(image, bool):
        with contextlib.suppress(TypeError):
            key = operator.index(image)  # type: ignore[arg-type]  # also the whole numbers of numpy
            if 0 <= key < 10**18:
                return key
    raise ValueError(
        f"{image!r} names no image; expected a number of up to 18 digits, or a file name that ends in one."
    )


def read_coco(path: str | os.PathLike[str]) -> COCO:
    """Read annotations in COCO format, plain or gzipped, without the messages that pycocotools prints.

    Raises:
        ValueError: the file is no JSON, or not in COCO format.
    """
    path = Path(path)
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    coco = COCO()
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            coco.dataset = json.load(file)
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON file in COCO format ({type(error).__name__}: {error}).") from error
    if not coco.imgs:
        raise ValueError(f"{path} lists no images; expected COCO format with the keys images and annotations.")
    for kind in ("images", "categories"):
        check_distinct([entry["id"] for entry in coco.dataset.get(kind, ())], f"{path}: {kind}", "id")
    return coco


def check_distinct(values: Sequence[Any], what: str, field: str) -> None:
    """`ValueError` if two entries of a file share a value: they would be taken for one."""
    shared = [value for value, number in Counter(values).items() if number > 1]
    if shared:
        raise ValueError(f"{what} share {len(shared)} of their {field}s, such as {shared[0]!r}; give each its own.")


def instance_categories(path: str | os.PathLike[str]) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Images of an instances file in COCO format (`id`, `file_name`, ...), each with the categories annotated on it.

    Crowd annotations count. Category names stand in the order of the image's annotations, each once.

    Raises:
        ValueError: an annotation refers to an image or a category that the file does not list, or two images or
            categories share an id, or categories a name.
    """
    coco = read_coco(path)
    if not coco.anns:
        raise ValueError(f"{path} holds no annotations; give an instances file.")
    unlisted = coco.imgToAnns.keys() - coco.imgs.keys()
    if unlisted:
        example = min(map(str, unlisted))
        raise ValueError(f"{path} annotates {len(unlisted)} images that it does not list, such as {example}.")
    images = []
    try:
        name_of = {key: category["name"] for key, category in coco.cats.items()}
        for key, name in name_of.items():
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"{path}: the name of category {key!r} is {name!r}; expected text.")
        folded_names = [" ".join(name.lower().split()) for name in name_of.values()]
        check_distinct(folded_names, f"{path}: categories", "name")
        for key, image in coco.imgs.items():
            names = [name_of[annotation["category_id"]] for annotation in coco.imgToAnns.get(key, ())]
            images.append((image, tuple(dict.fromkeys(names))))
        return images
    except KeyError as error:
        raise ValueError(f"{path} lacks the category or category name {error}; give an instances file.") from error
