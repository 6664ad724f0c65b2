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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmfix.eval.chair import GroundTruth, Vocabulary, image_key

CAPTION_KEYS = ("caption", "text", "answer", "output")
"""Keys that a caption is looked for under; a file may have only one of them."""
IMAGE_KEYS = ("image_id", "image", "id", "question_id")
"""Keys that a caption's image is looked for under; the first that the file has counts."""

_BLANK = re.compile(r"[ \t\r\n]*")


def read_objects(path: str | os.PathLike[str]) -> list[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, each with the place where it starts: "answers.jsonl, line 3".

    The file holds one object a line, objects one after the other over several lines each, or one array of objects. It
    is UTF-8, gzipped if its name ends in `.gz`.

    Raises:
        ValueError: the file is no such file; the message names the first broken line.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is no text ({error}); expected UTF-8, gzipped if its name ends in .gz.") from error
    entries = list(_values(text, path))
    if len(entries) == 1 and isinstance(entries[0][1], list):
        entries = [(f"{path}, entry {number}", entry) for number, entry in enumerate(entries[0][1], start=1)]
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is {_shown(entry)}; expected an object, such as {{...}}.")
    if not entries:
        raise ValueError(f"{path} is empty; expected JSON objects, one per image.")
    return entries


def _values(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder()
    line, counted, at = 1, 0, _skip(text, 0)
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            reason = error.msg if error.lineno == line else f"{error.msg} in line {error.lineno}"
            raise ValueError(f"{path}, line {line} starts broken JSON ({reason}); mend or delete it.") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
            raise ValueError(f"{path}, line {line} starts JSON that cannot be read ({error}).") from error
        yield f"{path}, line {line}", value
        at = _skip(text, end)


def _skip(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def _shown(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def read_captions(path: str | os.PathLike[str], caption_key: str | None = None) -> list[tuple[int, str]]:
    """Captions of a file, each with the number of its image (`image_key`), in order, ready for `score_captions`.

    The caption stands under one of `CAPTION_KEYS` or under the key given; the image under one of `IMAGE_KEYS`, as a
    number, a file name or a list of one file name (as in the records of `vlmfix.ask`).

    Raises:
        ValueError: the file is broken (see `read_objects`), has none of these keys or several for the caption, or has
            an image twice.
    """
    entries = read_objects(path)
    caption_key = caption_key or _caption_key(entries, path)
    image_at = _image_key(entries, path)
    captions: list[tuple[int, str]] = []
    places: dict[int, str] = {}
    for where, entry in entries:
        caption = entry.get(caption_key)
        if not isinstance(caption, str):
            found = _shown(caption) if caption_key in entry else f"only {_shown(', '.join(entry))}"
            raise ValueError(f"{where} has {found}; expected a text under {caption_key!r}.")
        captions.append((_image(entry, image_at, where, places), caption))
    return captions


def _caption_key(entries: Sequence[tuple[str, Mapping[str, Any]]], path: str | os.PathLike[str]) -> str:
    found = [key for key in CAPTION_KEYS if any(key in entry for _, entry in entries)]
    if len(found) > 1:
        raise ValueError(
            f"{path} may have its captions under {' or '.join(map(repr, found))}; name one as caption key."
        )
    if not found:
        keys = ", ".join(entries[0][1])
        raise ValueError(
            f"{path} has no captions under {', '.join(map(repr, CAPTION_KEYS))}, only {_shown(keys)}; name the key."
        )
    return found[0]


def _image_key(entries: Sequence[tuple[str, Mapping[str, Any]]], path: str | os.PathLike[str]) -> str:
    for key in IMAGE_KEYS:
        if any(key in entry for _, entry in entries):
            return key
    raise ValueError(f"{path} does not name its images; expected one of {', '.join(map(repr, IMAGE_KEYS))}.")


def _image(entry: Mapping[str, Any], key: str, where: str, places: dict[int, str]) -> int:
    """The number of an entry's image, noted in `places`. ValueError if it has none, or another entry had it."""
    image = entry.get(key)
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    try:
        number = image_key(image)
    except ValueError as error:
        raise ValueError(f"{where}: under {key!r}, {_shown(str(error))[1:-1]}") from error
    if number in places:
        raise ValueError(f"{where} is of image {number}, as is {places[number]}; keep one entry per image.")
    places[number] = where
    return number


def read_truth(path: str | os.PathLike[str], vocabulary: Vocabulary | None = None) -> GroundTruth:
    """Ground truth of own images: objects `{"image": "kitchen_0007.jpg", "objects": ["cup", "sofa"]}`.

    Objects bear names or synonyms of the vocabulary. Since no caption was read, it suits every variant.

    Raises:
        ValueError: the file is broken (see `read_objects`), an object is unknown, or an image comes twice.
    """
    vocabulary = vocabulary or Vocabulary.load()
    entries = read_objects(path)
    image_at = _image_key(entries, path)
    places: dict[int, str] = {}
    truth: dict[int, frozenset[str]] = {}
    for where, entry in entries:
        names = entry.get("objects")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{where} has {_shown(names)}; expected a list of names under 'objects'.")
        try:
            objects = frozenset(map(vocabulary.node, names))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        truth[_image(entry, image_at, where, places)] = objects
    return GroundTruth(truth, None, Path(path).name)
