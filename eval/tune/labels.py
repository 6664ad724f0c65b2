"""Pictures without labels: the model says itself what is in them, object by object, and that stands in for the truth.

Models invent objects in long captions that they deny when they are asked. So every object that captions of a picture
name, the greedy one and some sampled ones, is asked about by itself; it counts as shown where P(yes) is one half or
more. Objects that no caption names are not asked about, and count as absent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlmfix.asking.asker import Asker
from vlmfix.eval.benchmarks.chair import PROMPT
from vlmfix.eval.benchmarks.pope_building import question_text
from vlmfix.eval.pictures.data import Data, OriginalFolder
from vlmfix.eval.scorers import chair
from vlmfix.eval.tune.tool import ShowProgress, no_progress

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
SAMPLES = 3
"""Sampled captions a picture, beside the greedy one."""
LEAST = 0.5
"""P(yes) from which on an object counts as shown."""


def pictures_in(data: Data) -> dict[int, Path]:
    """Number and file of each picture, of annotated data or of a folder that holds pictures only."""
    if not isinstance(data, OriginalFolder):
        return data.images
    folder = data.pictures or data.folder
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"{folder} holds no pictures; expected files that end in {', '.join(PICTURES)}")
    return dict(enumerate(paths[: data.limit], start=1))


def self_labelled(
    model: Any,
    processor: Any,
    data: Data,
    folder: Path,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    progress: ShowProgress = no_progress,
) -> Data:
    """Data in COCO format, written to a folder, whose truth is what the untouched model says when it is asked. What is
    there already is not asked again."""
    if not (folder / "instances.json").is_file():
        pictures = pictures_in(data)
        vocabulary = chair.Vocabulary.load() if isinstance(data, OriginalFolder) else data.vocabulary
        paths = list(pictures.values())
        asker = Asker(model, processor)
        with asker.applied():
            named = _named(asker, paths, vocabulary, max_new_tokens, batch_size, seed, progress)
            shown = _shown(asker, paths, named, batch_size, progress)
        _write(folder, pictures, shown, _root(data))
    return Data.load(str(folder), pictures=_root(data))


def _root(data: Data) -> Path:
    return (data.pictures or (data.folder if isinstance(data, OriginalFolder) else data.folder / "images")).resolve()


def _named(
    asker: Asker,
    paths: Sequence[Path],
    vocabulary: chair.Vocabulary,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    progress: ShowProgress,
) -> list[set[str]]:
    """Objects that captions of each picture name."""
    named: list[set[str]] = [set() for _ in paths]
    ways: list[dict[str, Any]] = [{}] + [
        {"do_sample": True, "temperature": 1.0, "seed": seed + k} for k in range(SAMPLES)
    ]
    for number, way in enumerate(ways):
        for start in range(0, len(paths), batch_size):
            progress("captions to ask about", number * len(paths) + start, len(ways) * len(paths))
            batch = paths[start : start + batch_size]
            records = asker.ask_batch([(path, PROMPT) for path in batch], max_new_tokens=max_new_tokens, **way)
            for k, record in enumerate(records):
                named[start + k] |= {mention.node for mention in chair.mentions(record.text, vocabulary)}
    return named


def _shown(
    asker: Asker, paths: Sequence[Path], named: Sequence[set[str]], batch_size: int, progress: ShowProgress
) -> list[list[str]]:
    """Objects of each picture that the model says yes to."""
    questions = [(place, name) for place, names in enumerate(named) for name in sorted(names)]
    shown: list[list[str]] = [[] for _ in paths]
    for start in range(0, len(questions), batch_size):
        progress("is it there?", start, len(questions))
        batch = questions[start : start + batch_size]
        asked = [(paths[place], question_text(name)) for place, name in batch]
        for (place, name), p_yes in zip(batch, asker.p_yes(asked), strict=True):
            if p_yes >= LEAST:
                shown[place].append(name)
    progress("is it there?", len(questions), len(questions))
    return shown


def _write(folder: Path, pictures: dict[int, Path], shown: Sequence[Sequence[str]], root: Path) -> None:
    names = sorted({name for objects in shown for name in objects})
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for (key, path), objects in zip(pictures.items(), shown, strict=True):
        with Image.open(path) as picture:
            width, height = picture.size
        images.append({"id": key, "file_name": str(path.resolve().relative_to(root)), "width": width, "height": height})
        for name in objects:
            entry = {"id": len(annotations) + 1, "image_id": key, "category_id": names.index(name) + 1}
            annotations.append({**entry, "bbox": [0, 0, width, height], "area": width * height, "iscrowd": 0})
    categories = [{"id": place, "name": name} for place, name in enumerate(names, start=1)]
    folder.mkdir(parents=True, exist_ok=True)
    info = {"description": "what the model says when it is asked"}
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content), "utf-8")
