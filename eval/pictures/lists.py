"""Lists of images that published evaluations use. No torch.

| list | images of COCO val2014 |
|---|---|
| `first500` | the 500 lowest ids: AdaIAT's list |
| `opera500`, `paint500`, `devils500`, `allpath500` | as in the released files of OPERA, PAINT, Devils and AllPath |
| `pope500` | those of POPE's questions |
| `sorted-seed-S` | `random.Random(S).sample(sorted(ids), 500)` |
| `coco-seed-S@FILE` | drawn like this from the ids in the order of FILE, `captions_val2014.json`: VHR, AD-HH |
| `first-N` | the first N pictures of the data, of COCO format or embedded (`data.py`) |
| a file | a JSON list of ids, or lines that each end in one |

Names joined by `+` follow one another, each image once. Recipes that draw from `os.listdir` (PAI, VISTA, ...) depend on
a file system and cannot be repeated; `paint500` and `devils500` are two realised draws of PAI's.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from vlmfix.eval.benchmarks import pope_questions
from vlmfix.eval.scorers import chair

SAMPLE = 500
_FILE = files("vlmfix.assets") / "protocols" / "image_lists.json"


def image_list(name: str) -> tuple[int, ...]:
    """Image ids of a list, in its order.

    Raises:
        ValueError: there is no list of that name, and no file either, or it holds anything but ids.
    """
    if "+" in name and not Path(name).exists():
        joined: list[int] = []
        for part in name.split("+"):
            joined += image_list(part)
        return tuple(dict.fromkeys(joined))
    return _of_file(Path(name)) if _is_own_file(name) else _named(name)


def _is_own_file(name: str) -> bool:
    """Whether a name is of a file that may change at any time, and of nothing that comes with the package."""
    return name not in (*_listed(), "first500", "pope500") and Path(name).is_file()


@cache
def _named(name: str) -> tuple[int, ...]:
    listed = _listed()
    if name in listed:
        return listed[name]
    if name == "first500":
        return tuple(sorted(chair.coco_truth(split="val"))[:SAMPLE])
    if name == "pope500":
        return tuple(dict.fromkeys(chair.image_key(question.image) for question in pope_questions.load()))
    sorted_draw = re.fullmatch(r"sorted-seed-(\d{1,9})", name)
    if sorted_draw:
        return _drawn(int(sorted_draw[1]), sorted(chair.coco_truth(split="val")))
    file_draw = re.fullmatch(r"coco-seed-(\d{1,9})@(.+)", name)
    if file_draw:
        return _drawn(int(file_draw[1]), [chair.image_key(key) for key in chair.read_coco(file_draw[2]).imgs])
    known = ", ".join(["first500", *listed, "pope500", "sorted-seed-S", "coco-seed-S@captions_val2014.json"])
    raise ValueError(f"{name!r} is no list of images; expected a file, or one of {known}")


def _drawn(seed: int, ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(random.Random(seed).sample(ids, min(SAMPLE, len(ids))))


@cache
def _listed() -> dict[str, tuple[int, ...]]:
    return {name: tuple(ids) for name, ids in json.loads(_FILE.read_text("utf-8")).items()}


def _of_file(path: Path) -> tuple[int, ...]:
    try:
        text = path.read_text("utf-8-sig")
        entries = json.loads(text) if text.lstrip().startswith("[") else text.split("\n")
        ids = [chair.image_key(entry) for entry in entries if not isinstance(entry, str) or entry.strip()]
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no list of images ({error}); expected ids or file names, one a line") from error
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(f"{path} lists {len(ids)} images, {len(set(ids))} different ones; expected each once")
    return tuple(ids)
