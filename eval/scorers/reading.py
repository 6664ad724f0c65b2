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
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from vlmfix.eval.scorers.chair import GroundTruth, Vocabulary, coco_truth, ground_truth, image_key, load_masks

CAPTION_KEYS = ("caption", "text", "answer", "output")
"""Keys that a caption is looked for under; a file may have only one of them."""
IMAGE_KEYS = ("image_id", "image", "file_name", "id", "question_id")
"""Keys that a caption's image is looked for under; the first that the file has counts."""
_IMAGE_NAMES = ("image_id", "image", "file_name")
"""Those of them that name an image and nothing else; where an entry has several, they must agree."""
_COCO_NAME = re.compile(r"(?:COCO_)?(?:train|val|test)20[0-9]{2}_([0-9]+)")

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


@dataclass(frozen=True)
class NamedCaption:
    """A caption and its image: the number that it is joined by, and the name that the file gives it."""

    image: int
    name: str
    text: str


def read_captions(
    path: str | os.PathLike[str], caption_key: str | None = None, image_under: str | None = None
) -> list[tuple[int, str]]:
    """Captions of a file, each with the number of its image (`image_key`), in order, ready for `score_captions`.

    The caption stands under one of `CAPTION_KEYS` or under the key given; the image under one of `IMAGE_KEYS`, as a
    number, a file name or a list of one file name (as in the records of `vlmfix.ask`). What the program of CHAIR writes
    (`{"overall_metrics": ..., "sentences": [...]}`) is read too.

    Raises:
        ValueError: the file is broken (see `read_records`), has none of these keys or several for the caption, or some
            images have more captions than others.
    """
    return [(entry.image, entry.text) for entry in named_captions(path, caption_key, image_under)]


def named_captions(
    path: str | os.PathLike[str], caption_key: str | None = None, image_under: str | None = None
) -> list[NamedCaption]:
    """As `read_captions`, with the names of the images."""
    entries = _without_wrapper(read_records(path), path)
    caption_key = caption_key or _caption_key(entries, path)
    image_key_name = image_under or _image_key(entries, path)
    captions: list[NamedCaption] = []
    places: dict[int, list[str]] = {}
    name_of: dict[int, str] = {}
    for where, entry in entries:
        caption = entry.get(caption_key)
        if not isinstance(caption, str):
            present = shown(caption) if caption_key in entry else f"only {shown(', '.join(entry))}"
            raise ValueError(f"{where} has {present}; expected a text under {caption_key!r}.")
        number = _image_number(entry, image_key_name, where)
        if image_under is None:
            _check_one_image(entry, where)
        name = str(_only(entry[image_key_name]))
        if name_of.setdefault(number, name) != name:
            raise ValueError(
                f"{where} is of image {number}, as is {places[number][0]}, and their names are {shown(name)} and "
                f"{shown(name_of[number])}; give each image one name, or name another key with --image-key."
            )
        places.setdefault(number, []).append(where)
        captions.append(NamedCaption(number, name, caption))
    _check_even(places, captions)
    return captions


def _without_wrapper(
    entries: list[tuple[str, dict[str, Any]]], path: str | os.PathLike[str]
) -> list[tuple[str, dict[str, Any]]]:
    """The sentences that the program of CHAIR has written, else the entries as they are."""
    sentences = entries[0][1].get("sentences") if len(entries) == 1 else None
    if not isinstance(sentences, list) or not sentences or not all(isinstance(entry, dict) for entry in sentences):
        return entries
    return [(f"{path}, sentence {number}", entry) for number, entry in enumerate(sentences, start=1)]


def _only(image: Any) -> Any:
    """The one thing in a list."""
    return image[0] if isinstance(image, list) and len(image) == 1 else image


def _check_one_image(entry: Mapping[str, Any], where: str) -> None:
    """`ValueError` if an entry names two different images."""
    number_of = {key: _image_number(entry, key, where) for key in _IMAGE_NAMES if _is_named(entry.get(key))}
    if len(set(number_of.values())) > 1:
        pairs = " and ".join(f"{key} {number}" for key, number in number_of.items())
        raise ValueError(f"{where} names two images, {pairs}; say which counts with --image-key.")


def _is_named(image: Any) -> bool:
    try:
        image_key(_only(image))
    except ValueError:
        return False
    return True


def _check_even(places: Mapping[int, Sequence[str]], captions: Sequence[NamedCaption]) -> None:
    """`ValueError` unless all images have as many captions: a doubled line is a mistake, five captions each are not.

    Where every image has a caption twice, the file was written twice.
    """
    fewest = min(map(len, places.values()))
    texts_of: dict[int, set[str]] = {}
    for caption in captions:
        texts_of.setdefault(caption.image, set()).add(caption.text)
    written_twice = all(len(texts_of[image]) < len(lines) for image, lines in places.items())
    for number, lines in places.items():
        if len(lines) > fewest or written_twice:
            raise ValueError(
                f"{lines[1]} is of image {number}, as is {lines[0]}; keep one entry per image, or as many different "
                "ones of each."
            )


def same_name(one: str, other: str) -> bool:
    """Whether two names with the same number may be of one image.

    A number, and a name that COCO gives, say no more than the number. Otherwise the names must be equal, and their
    folders too as far as both tell them.
    """
    first, second = PureWindowsPath(one), PureWindowsPath(other)  # knows both kinds of slashes
    if _is_bare(first) or _is_bare(second):
        return True
    shared = zip(reversed(first.parts[:-1]), reversed(second.parts[:-1]), strict=False)
    same_folders = all(mine == theirs for mine, theirs in shared)
    return first.stem == second.stem and same_folders


def _is_bare(name: PureWindowsPath) -> bool:
    folders = name.parts[:-1]
    is_number = re.fullmatch(r"[0-9]+(?:\.0)?", name.name) or re.fullmatch("[0-9]+", name.stem)
    return bool(_COCO_NAME.fullmatch(name.stem) or (is_number and not folders))


def names_coco_image(name: str) -> bool:
    """Whether a name says which image of COCO it is: `..._226988_9.jpg` may be image 9 or image 226988."""
    stem = PureWindowsPath(name.removesuffix(".0")).stem
    coco_name = _COCO_NAME.search(stem)
    if coco_name:
        return coco_name.end() == len(stem)
    return len(re.findall("[0-9]+", stem)) < 2


def _caption_key(entries: Sequence[tuple[str, Mapping[str, Any]]], path: str | os.PathLike[str]) -> str:
    candidates = [key for key in CAPTION_KEYS if any(key in entry for _, entry in entries)]
    if len(candidates) > 1:
        raise ValueError(
            f"{path} may have its captions under {' or '.join(map(repr, candidates))}; name one with --caption-key."
        )
    if not candidates:
        keys = ", ".join(entries[0][1])
        raise ValueError(
            f"{path} has no captions under {', '.join(map(repr, CAPTION_KEYS))}, only {shown(keys)}; name the key "
            "with --caption-key."
        )
    return candidates[0]


def _image_key(entries: Sequence[tuple[str, Mapping[str, Any]]], path: str | os.PathLike[str]) -> str:
    for key in IMAGE_KEYS:
        if any(key in entry for _, entry in entries):
            return key
    raise ValueError(f"{path} does not name its images; expected one of {', '.join(map(repr, IMAGE_KEYS))}.")


def _image_number(entry: Mapping[str, Any], key: str, where: str) -> int:
    """The number of an entry's image. `ValueError` if it has none."""
    try:
        return image_key(_only(entry.get(key)))
    except ValueError as error:
        raise ValueError(f"{where}: under {key!r}, {shown(str(error))[1:-1]}") from error


def _image(entry: Mapping[str, Any], key: str, where: str, places: dict[int, str]) -> int:
    """The number of an entry's image, noted in `places`. ValueError if it has none, or another entry had it."""
    number = _image_number(entry, key, where)
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
    names: dict[int, str] = {}
    for where, entry in entries:
        listed = entry.get("objects")
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise ValueError(f"{where} has {shown(listed)}; expected a list of names under 'objects'.")
        try:
            objects = frozenset(map(vocabulary.node, listed))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        number = _image(entry, image_key_name, where, places)
        truth[number] = objects
        names[number] = str(_only(entry[image_key_name]))
    return GroundTruth(truth, None, Path(path).name, names)


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
