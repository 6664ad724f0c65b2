"""Caption files and ground truth as people have them: JSON, JSON lines, one object after the other, gzipped or not.

    score_captions(read_captions("answers.jsonl"), read_truth("my_images.jsonl"))

Whatever a file lacks is an error that names the line.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmfix.eval.scorers.chair import GroundTruth, Vocabulary, coco_truth, ground_truth, image_key, load_masks

CAPTION_KEYS = ("caption", "text", "answer", "output")
"""Keys that a caption is looked for under; a file may have only one of them."""
IMAGE_KEYS = ("image_id", "image", "id", "question_id")
"""Keys that a caption's image is looked for under; the first that the file has counts."""

_BLANK = re.compile(r"[ \t\r\n]*")


def read_records(path: str | os.PathLike[str]) -> list[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, each with the place where it starts: "answers.jsonl, line 3".

    The file holds one object a line, objects one after the other over several lines each, or one array of objects. It
    is UTF-8, gzipped if its name ends in `.gz`.

    Raises:
        ValueError: the file is empty, no UTF-8 or no JSON (also a torn last line), holds anything but objects, or an
            object has a key twice; the message names the line.
    """
    entries = list(_values(_text(Path(path)), Path(path)))
    if len(entries) == 1 and isinstance(entries[0][1], list):
        entries = [(f"{path}, entry {number}", entry) for number, entry in enumerate(entries[0][1], start=1)]
    if not entries:
        raise ValueError(f"{path} is empty; expected JSON objects, such as one per line.")
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is {shown(entry)}; expected a JSON object, such as {{...}}.")
    return entries


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as text ({error}); expected UTF-8, gzipped if its name ends in .gz."
        ) from error


def _values(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder(object_pairs_hook=_without_double_keys)
    line, counted_to, start = 1, 0, _skip(text, 0)
    while start < len(text):
        line += text.count("\n", counted_to, start)
        counted_to = start
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            first_line = f", in what starts in line {line}" if error.lineno != line else ""
            raise ValueError(
                f"{path}, line {error.lineno} is broken ({error.msg}{first_line}); expected JSON, mend or delete it."
            ) from error
        except (ValueError, RecursionError) as error:  # a key twice, thousands of digits, brackets thousands deep
            raise ValueError(f"{path}, line {line} is broken ({error}); expected JSON, mend or delete it.") from error
        yield f"{path}, line {line}", value
        start = _skip(text, end)


def _skip(text: str, start: int) -> int:
    """Where the next value begins."""
    blanks = _BLANK.match(text, start)
    return blanks.end() if blanks else start


def _without_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value_of = dict(pairs)
    if len(value_of) < len(pairs):
        times = Counter(key for key, _ in pairs)
        doubled = next(key for key, n in times.items() if n > 1)
        raise ValueError(f"the key {shown(doubled)} stands twice in one object")
    return value_of


def shown(value: object) -> str:
    """A value for an error message: short, and printable whatever it holds."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def printable(text: str) -> str:
    """A text for a terminal: as it is, or with escapes in place of what cannot be printed."""
    return text if text.isprintable() else ascii(text)


@contextmanager
def about_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors in reading a file become a `ValueError` that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep to be read.") from error
    except (ValueError, TypeError) as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def read_captions(path: str | os.PathLike[str], caption_key: str | None = None) -> list[tuple[int, str]]:
    """Captions of a file, each with the number of its image (`image_key`), in order, ready for `score_captions`.

    The caption stands under one of `CAPTION_KEYS` or under the key given; the image under one of `IMAGE_KEYS`, as a
    number, a file name or a list of one file name (as in the records of `vlmfix.ask`).

    Raises:
        ValueError: the file is broken (see `read_records`), has none of these keys or several for the caption, or has
            an image twice.
    """
    entries = read_records(path)
    caption_key = caption_key or _caption_key(entries, path)
    image_key_name = _image_key(entries, path)
    captions: list[tuple[int, str]] = []
    places: dict[int, str] = {}
    for where, entry in entries:
        caption = entry.get(caption_key)
        if not isinstance(caption, str):
            present = shown(caption) if caption_key in entry else f"only {shown(', '.join(entry))}"
            raise ValueError(f"{where} has {present}; expected a text under {caption_key!r}.")
        captions.append((_image(entry, image_key_name, where, places), caption))
    return captions


def _caption_key(entries: Sequence[tuple[str, Mapping[str, Any]]], path: str | os.PathLike[str]) -> str:
    candidates = [key for key in CAPTION_KEYS if any(key in entry for _, entry in entries)]
    if len(candidates) > 1:
        raise ValueError(
            f"{path} may have its captions under {' or '.join(map(repr, candidates))}; name one as caption key."
        )
    if not candidates:
        keys = ", ".join(entries[0][1])
        raise ValueError(
            f"{path} has no captions under {', '.join(map(repr, CAPTION_KEYS))}, only {shown(keys)}; name the key."
        )
    return candidates[0]


def _image_key(entries: Sequence[tuple[str, Mapping[str, Any]]], path: str | os.PathLike[str]) -> str:
    for key in IMAGE_KEYS:
        if any(key in entry for _, entry in entries):
            return key
    raise ValueError(f"{path} does not name its images; expected one of {', '.join(map(repr, IMAGE_KEYS))}.")


def _image(entry: Mapping[str, Any], key: str, where: str, places: dict[int, str]) -> int:
    """The number of an entry's image, noted in `places`. ValueError if it has none, or another entry had it."""
    image: Any = entry.get(key)
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    try:
        number = image_key(image)
    except ValueError as error:
        raise ValueError(f"{where}: under {key!r}, {shown(str(error))[1:-1]}") from error
    if number in places:
        raise ValueError(f"{where} is of image {number}, as is {places[number]}; keep one entry per image.")
    places[number] = where
    return number


def read_truth(path: str | os.PathLike[str], vocabulary: Vocabulary | None = None) -> GroundTruth:
    """Ground truth of own images: objects `{"image": "kitchen_0007.jpg", "objects": ["cup", "sofa"]}`.

    Objects bear names or synonyms of the vocabulary. Since no caption was read, it suits every variant.

    Raises:
        ValueError: the file is broken (see `read_records`), an object is unknown, or an image comes twice.
    """
    vocabulary = vocabulary or Vocabulary.load()
    entries = read_records(path)
    image_key_name = _image_key(entries, path)
    places: dict[int, str] = {}
    truth: dict[int, frozenset[str]] = {}
    for where, entry in entries:
        names = entry.get("objects")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{where} has {shown(names)}; expected a list of names under 'objects'.")
        try:
            objects = frozenset(map(vocabulary.node, names))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        truth[_image(entry, image_key_name, where, places)] = objects
    return GroundTruth(truth, None, Path(path).name)


def find_truth(place: str, variant: str = "rohrbach", vocabulary: Vocabulary | None = None) -> GroundTruth:
    """Ground truth by its place: `coco` (COCO 2014, comes with the package), a file, or a folder with such a file.

    A file holds own images (`read_truth`), packed masks (`load_masks`), or instances in COCO format; beside a file
    `instances_x.json`, the human captions in `captions_x.json` count too if they are there.

    Raises:
        ValueError: the file is in no such format, or the folder holds none or several `instances*.json`.
    """
    if place == "coco":
        return coco_truth(variant)
    path = Path(place)
    if path.is_dir():
        instance_files = [*path.glob("instances*.json"), *path.glob("instances*.json.gz")]
        if len(instance_files) != 1:
            raise ValueError(
                f"{path} holds {len(instance_files)} files instances*.json; expected one, or name the file to take."
            )
        path = instance_files[0]
    text = _text(path)
    if '"annotations"' in text:
        captions = path.with_name(path.name.replace("instances", "captions"))
        human = captions if captions != path and captions.is_file() else None
        return ground_truth(path, human, vocabulary, variant)
    return load_masks(path) if '"images"' in text else read_truth(path, vocabulary)
