"""Pictures and what is known about them: embedded scenes, a folder in COCO format, published benchmarks. No torch.

| name | pictures | known |
|---|---|---|
| `organism`, `calibration`, `photos` | embedded | categories, captions |
| a folder with `instances.json` | its `images/` | categories; `captions.json`, `synonyms.txt` where there |
| `coco`, `coco_first_release`, `aokvqa`, `gqa` | yours | CHAIR's ground truth (`coco`), POPE's questions |
| any other folder | its own | what a benchmark such as AMBER or MME finds there |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlmfix.eval.benchmarks import pope
from vlmfix.eval.pictures import hub
from vlmfix.eval.pictures.lists import image_list
from vlmfix.eval.scorers import chair

EMBEDDED = {"organism": "organism/test", "calibration": "organism/calibration", "photos": "photos"}
"""Name -> folder of the assets."""
PUBLISHED = tuple(pope.SOURCES)
WHERE = {
    "coco": "the photos of COCO val2014 are at https://images.cocodataset.org/zips/val2014.zip",
    "gqa": "the photos of GQA are at https://cs.stanford.edu/people/dorarad/gqa/download.html",
}
"""Where pictures can be had that may not come with the package."""


@dataclass(frozen=True)
class Data:
    """Annotated pictures: a folder with `images/`, `instances.json` and `captions.json` in COCO format."""

    name: str
    """As given to `load`; the absolute path of a folder."""
    folder: Path
    """Where the annotations are, or where all is."""
    limit: int | None = None
    """Only the first pictures; for trying out."""
    which: str | None = None
    """Which pictures, and in which order: a name of `lists.py`, or a file of ids; None is all."""
    pictures: Path | None = None
    """Folder of the pictures, where they do not lie in `folder`."""
    asked: Path | None = None
    """File of the questions, where it does not lie in `folder`."""

    @classmethod
    def load(
        cls,
        name: str = "organism",
        limit: int | None = None,
        which: str | None = None,
        pictures: str | Path | None = None,
        asked: str | Path | None = None,
    ) -> Data:
        """Data by name, or a folder. `ValueError` if there is none."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected a number of pictures above 0, got {limit}")
        place, file = (None if path is None else Path(path).resolve() for path in (pictures, asked))
        if name in PUBLISHED:
            return Published(name, place or Path(name), limit, which, place, file)
        folder = Path(str(files("vlmfix.assets") / EMBEDDED[name])) if name in EMBEDDED else Path(name).resolve()
        known = name if name in EMBEDDED else str(folder)
        if (folder / "instances.json").exists():
            return cls(known, folder, limit, which, place, file)
        if not folder.is_dir():
            raise ValueError(
                f"data {name!r}: {folder} does not exist; expected {', '.join(EMBEDDED)}, {', '.join(PUBLISHED)} or a "
                "folder: with images/ and instances.json in COCO format, or with a benchmark's original files"
            )
        return Folder(known, folder, limit, which, place, file)

    @cached_property
    def images(self) -> dict[int, Path]:
        """Image number -> file, in the order of the annotations, or of the list."""
        found = {
            chair.image_key(image["id"]): image["file_name"]
            for image, _ in chair.instance_categories(self.folder / "instances.json")
        }
        keys = _listed(self.which, found.keys())
        return {key: self.picture(found[key]) for key in keys[: self.limit]}

    def picture(self, name: str) -> Path:
        """The file of a picture, whether it is there or not."""
        return _find(self.pictures or self.folder / "images", name)

    @cached_property
    def vocabulary(self) -> chair.Vocabulary:
        """Objects and their synonyms: those of `synonyms.txt` in the folder, else COCO's."""
        own = self.folder / "synonyms.txt"
        return chair.Vocabulary.load(own if own.is_file() else None)

    @property
    def truth(self) -> chair.GroundTruth:
        """CHAIR's ground truth: annotated categories and what the human captions name."""
        return self.truth_for("rohrbach")

    def truth_for(self, variant: str) -> chair.GroundTruth:
        """The same, with the captions read as a variant of CHAIR reads them."""
        return _truth(self.folder, variant)

    def questions(self, k: int, seed: int) -> Sequence[pope.Question]:
        """POPE's questions, built from the annotations of the pictures by the reference's samplers."""
        names = {path.name for path in self.images.values()}
        objects = pope.ordered_objects(self.folder / "instances.json")
        return pope.build_questions([(name, found) for name, found in objects if name in names], k=k, seed=seed)

    def question_file(self, what: str) -> Path:
        """The file of questions: as given, or the only file of JSON in the folder."""
        if self.asked is not None:
            return self.asked
        found = sorted(path for ending in ("json", "jsonl", "json.gz") for path in self.folder.glob(f"*.{ending}"))
        if len(found) != 1:
            raise ValueError(f"{self.folder} holds {len(found)} files of JSON; name {what} with --questions")
        return found[0]

    @property
    def where(self) -> str:
        """Where missing pictures are to be had; empty if nobody knows."""
        return ""

    @property
    def spec(self) -> dict[str, Any]:
        """What `load` was given."""
        given = {"name": self.name, "limit": self.limit, "which": self.which}
        paths = {"pictures": self.pictures, "asked": self.asked}
        return {**given, **{key: None if path is None else str(path) for key, path in paths.items()}}

    @cached_property
    def digest(self) -> str:
        """Hash of the annotations and of the list of pictures."""
        h = hashlib.sha256()
        for name in ("instances.json", "captions.json"):
            path = self.folder / name
            h.update(path.read_bytes() if path.exists() else b"-")
        h.update("\n".join(path.name for path in self.images.values()).encode())
        return h.hexdigest()[:16]


class Published(Data):
    """A published data set whose annotations come with the package, and whose pictures are the user's.

    Without a list, CHAIR asks about `first500` of COCO val2014, POPE about its own 500 pictures.
    """

    @cached_property
    def images(self) -> dict[int, Path]:
        """Image number of COCO val2014 -> file."""
        keys = _listed(self.which or "first500", self.truth_for("rohrbach").keys())
        return {key: self.picture(f"COCO_val2014_{key:012d}.jpg") for key in keys[: self.limit]}

    def picture(self, name: str) -> Path:
        """The file of a picture; of COCO's also under its name of 2017."""
        return _find(self.pictures or Path(self.name), name, name.rpartition("_")[2])

    @cached_property
    def vocabulary(self) -> chair.Vocabulary:
        """COCO's."""
        return chair.Vocabulary.load()

    def truth_for(self, variant: str) -> chair.GroundTruth:
        """Of COCO val2014, as it comes with the package."""
        if self.name != "coco":
            raise ValueError(f"data {self.name!r} has questions only; take --data coco for captions")
        return chair.coco_truth(variant, "val")

    def questions(self, k: int, seed: int) -> Sequence[pope.Question]:
        """POPE's questions as published."""
        asked = [
            replace(question, id=f"{split}/{question.id}")  # unique over the three splits
            for split in pope.SPLITS
            for question in pope.load(self.name, split)
        ]
        names = list(dict.fromkeys(question.image for question in asked))
        if self.which is not None:
            wanted = set(image_list(self.which))
            names = [name for name in names if chair.image_key(name) in wanted]
        kept = set(names[: self.limit])
        return [question for question in asked if question.image in kept]

    @property
    def where(self) -> str:
        """Where the pictures are to be had."""
        return WHERE["gqa" if self.name == "gqa" else "coco"] + "; name their folder with --images"

    @cached_property
    def digest(self) -> str:
        """Of the data's name, the list and the limit: all else comes with the package."""
        keys = image_list(self.which) if self.which else []
        return hashlib.sha256(json.dumps([self.name, keys, self.limit]).encode()).hexdigest()[:16]


class Folder(Data):
    """A folder that holds the original files of a benchmark, or only its pictures."""

    def picture(self, name: str) -> Path:
        """The file of a picture."""
        return _find(self.pictures or self.folder, name)

    @cached_property
    def images(self) -> dict[int, Path]:
        """There is no list of pictures here."""
        raise ValueError(
            f"data {self.name!r}: {self.folder / 'instances.json'} does not exist; this benchmark needs annotations in "
            f"COCO format there, or the data {', '.join((*EMBEDDED, *PUBLISHED))}"
        )

    def truth_for(self, variant: str) -> chair.GroundTruth:
        """There is none here."""
        raise ValueError(f"data {self.name!r} has no instances.json, so there is no ground truth for captions")

    def questions(self, k: int, seed: int) -> Sequence[pope.Question]:
        """POPE's questions as they lie here: the file given, or a file of each split (`coco_pope_random.json`)."""
        if self.asked is not None or (self.folder / hub.QUESTIONS).exists():
            found = pope.read_questions(self.asked or self.folder / hub.QUESTIONS)
        else:
            files = [(split, path) for split in pope.SPLITS for path in sorted(self.folder.glob(f"*{split}*.json*"))]
            found = [question for split, path in files for question in pope.read_questions(path, split=split)]
        if not found or {question.split for question in found} - set(pope.SPLITS):
            raise ValueError(
                f"data {self.name!r}: {self.folder / 'instances.json'} does not exist, and there are no questions of "
                f"POPE that name their split ({', '.join(pope.SPLITS)}), in a category or in the name of their file"
            )
        kept = set(list(dict.fromkeys(question.image for question in found))[: self.limit])
        unique = (replace(question, id=f"{question.split}/{question.id}") for question in found)
        return [question for question in unique if question.image in kept]

    @cached_property
    def digest(self) -> str:
        """Nothing but the limit: what is asked has a hash of its own."""
        return hashlib.sha256(json.dumps(["folder", self.limit]).encode()).hexdigest()[:16]


class Elsewhere(Data):
    """Pictures that are not here: only what was said about them is."""

    @cached_property
    def images(self) -> dict[int, Path]:
        """None."""
        return {}


@cache
def _truth(folder: Path, variant: str) -> chair.GroundTruth:
    own, captions = folder / "synonyms.txt", folder / "captions.json"
    vocabulary = chair.Vocabulary.load(own if own.is_file() else None)
    return chair.ground_truth(
        folder / "instances.json", captions if captions.exists() else None, vocabulary, variant=variant
    )


def _listed(name: str | None, known: Iterable[int]) -> Sequence[int]:
    """The ids of a list, all of which must be known; without a list, all known ones."""
    keys = list(known)
    if name is None:
        return keys
    wanted = image_list(name)
    covered = set(keys)
    if unknown := [key for key in wanted if key not in covered]:
        raise ValueError(
            f"list {name!r}: {len(unknown)} of {len(wanted)} images, such as {unknown[0]}, are not among the "
            f"{len(keys)} of this data"
        )
    return wanted


def _find(folder: Path, *names: str) -> Path:
    """A picture below a folder: there, or in a folder in it."""
    for name in names:
        for place in (folder, *_subfolders(folder)):
            if (place / name).is_file():
                return place / name
    return folder / names[0]


@cache
def _subfolders(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if path.is_dir())) if folder.is_dir() else ()
