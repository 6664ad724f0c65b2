"""Pictures and what is known about them: embedded scenes, a folder in COCO format, published benchmarks. No torch.

| name | pictures | known |
|---|---|---|
| `organism`, `calibration`, `photos` | embedded | categories, captions |
| a folder with `instances.json` | its `images/` | categories; `captions.json`, `synonyms.txt` where there |
| `coco`, `coco_first_release`, `aokvqa`, `gqa` | yours | CHAIR's ground truth (`coco`); POPE's questions are on these |
| any other folder | its own | what a benchmark such as AMBER or MME finds there |
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlmfix.eval.benchmarks.pope_questions import SOURCES
from vlmfix.eval.pictures.lists import image_list
from vlmfix.eval.scorers import chair
from vlmfix.eval.scorers.chair.coco import check_distinct
from vlmfix.eval.scorers.reading import about_file

EMBEDDED = {"organism": "organism/test", "calibration": "organism/calibration", "photos": "photos"}
"""Name -> folder of the assets."""
PUBLISHED = tuple(SOURCES)
"""Data sets whose annotations come with the package: those that POPE's questions are about."""
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
        """Data by name, or a folder.

        Args:
            name: One of `EMBEDDED` or `PUBLISHED`, or a folder.
            limit: Only the first pictures; for trying out.
            which: Which pictures, see `lists.py`.
            pictures: Folder of the pictures, where they do not lie in that of the annotations.
            asked: File of the questions, where it does not lie there.

        Raises:
            ValueError: there is no such data.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected a number of pictures above 0, got {limit}")
        picture_folder = None if pictures is None else Path(pictures).resolve()
        question_file = None if asked is None else Path(asked).resolve()
        if name in PUBLISHED:
            return PublishedPictures(name, picture_folder or Path(name), limit, which, picture_folder, question_file)
        folder = Path(str(files("vlmfix.assets") / EMBEDDED[name])) if name in EMBEDDED else Path(name).resolve()
        known = name if name in EMBEDDED else str(folder)
        if (folder / "instances.json").exists():
            return cls(known, folder, limit, which, picture_folder, question_file)
        if not folder.is_dir():
            raise ValueError(
                f"data {name!r}: {folder} does not exist; expected {', '.join(EMBEDDED)}, {', '.join(PUBLISHED)} or a "
                "folder: with images/ and instances.json in COCO format, or with a benchmark's original files"
            )
        return OriginalFolder(known, folder, limit, which, picture_folder, question_file)

    @cached_property
    def images(self) -> dict[int, Path]:
        """Image number -> file, in the order of the annotations, or of the list."""
        path = self.folder / "instances.json"
        images = [image for image, _ in chair.instance_categories(path)]
        file_names: dict[int, str] = {}
        for image in images:
            if not isinstance(image.get("file_name"), str) or not image["file_name"].strip():
                raise ValueError(f"{path}: image {image['id']} has no file_name; give the name of its picture.")
            with about_file(path):
                file_names[chair.image_key(image["id"])] = image["file_name"]
        if len(file_names) < len(images):
            raise ValueError(
                f"{path}: {len(images)} image ids hold only {len(file_names)} different numbers; number them."
            )
        check_distinct(list(map(os.path.normpath, file_names.values())), f"{path}: images", "file_name")
        keys = _first(self.which, file_names.keys()) or _listed(self.which, file_names.keys())
        return {key: self.picture(file_names[key]) for key in keys[: self.limit]}

    def picture(self, name: str) -> Path:
        """The file of a picture, whether it is there or not."""
        return _find(self.pictures or self.folder / "images", name)

    @cached_property
    def vocabulary(self) -> chair.Vocabulary:
        """Objects and their synonyms: those of `synonyms.txt` in the folder, else COCO's."""
        synonyms = self.folder / "synonyms.txt"
        return chair.Vocabulary.load(synonyms if synonyms.is_file() else None)

    @property
    def truth(self) -> chair.GroundTruth:
        """CHAIR's ground truth: annotated categories and what the human captions name."""
        return self.truth_for("rohrbach")

    def truth_for(self, variant: str) -> chair.GroundTruth:
        """The same, with the captions read as a variant of CHAIR reads them."""
        return _truth(self.folder, variant, self._files_digest)

    @cached_property
    def _files_digest(self) -> str:
        """Hash of the files that ground truth is made of."""
        digest = hashlib.sha256()
        for name in ("instances.json", "captions.json", "synonyms.txt"):
            content = (self.folder / name).read_bytes() if (self.folder / name).is_file() else b""
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def question_file(self, what: str) -> Path:
        """The file of questions: as given, or the only file of JSON in the folder."""
        if self.asked is not None:
            return self.asked
        endings = (".json", ".jsonl", ".json.gz")
        files_of_json = [path for path in self.folder.glob("*") if path.name.endswith(endings)]
        if len(files_of_json) != 1:
            raise ValueError(f"{self.folder} holds {len(files_of_json)} files of JSON; name {what} with --questions")
        return files_of_json[0]

    @property
    def where(self) -> str:
        """Where missing pictures are to be had; empty if nobody knows."""
        return ""

    @property
    def spec(self) -> dict[str, Any]:
        """What `load` was given."""
        return {
            "name": self.name,
            "limit": self.limit,
            "which": self.which,
            "pictures": None if self.pictures is None else str(self.pictures),
            "asked": None if self.asked is None else str(self.asked),
        }

    @cached_property
    def digest(self) -> str:
        """Hash of the annotations and of the list of pictures."""
        digest = hashlib.sha256()
        for name in ("instances.json", "captions.json"):
            path = self.folder / name
            digest.update(path.read_bytes() if path.exists() else b"-")
        digest.update("\n".join(path.name for path in self.images.values()).encode())
        return digest.hexdigest()[:16]


class PublishedPictures(Data):
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

    @property
    def where(self) -> str:
        """Where the pictures are to be had."""
        return WHERE["gqa" if self.name == "gqa" else "coco"] + "; name their folder with --images"

    @cached_property
    def digest(self) -> str:
        """Of the data's name, the list and the limit: all else comes with the package."""
        keys = image_list(self.which) if self.which else []
        return hashlib.sha256(json.dumps([self.name, keys, self.limit]).encode()).hexdigest()[:16]


class OriginalFolder(Data):
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

    @cached_property
    def digest(self) -> str:
        """Nothing but the limit: what is asked has a hash of its own."""
        return hashlib.sha256(json.dumps(["folder", self.limit]).encode()).hexdigest()[:16]


class Elsewhere(Data):
    """Pictures that are not here: only what somebody else's model said about them is."""

    @cached_property
    def images(self) -> dict[int, Path]:
        """None."""
        return {}


@cache
def _truth(folder: Path, variant: str, files_digest: str) -> chair.GroundTruth:
    """The ground truth in a folder, whose files have this content."""
    synonyms, captions = folder / "synonyms.txt", folder / "captions.json"
    vocabulary = chair.Vocabulary.load(synonyms if synonyms.is_file() else None)
    human_captions = captions if captions.exists() else None
    return chair.ground_truth(folder / "instances.json", human_captions, vocabulary, variant=variant)


def first_pictures(name: str | None) -> int | None:
    """How many pictures a list of the kind `first-200` holds, the first of any data; `None` for other lists."""
    match = re.fullmatch(r"first-([1-9]\d{0,8})", name or "")
    return int(match[1]) if match else None


def _first(name: str | None, known: Iterable[int]) -> Sequence[int]:
    """The ids of a list such as `first-200`; none for other lists."""
    n = first_pictures(name)
    return [] if n is None else list(known)[:n]


def _listed(name: str | None, known: Iterable[int]) -> Sequence[int]:
    """The ids of a list, all of which must be known; without a list, all known ones."""
    keys = list(known)
    if name is None:
        return keys
    listed, annotated = image_list(name), set(keys)
    unknown = [key for key in listed if key not in annotated]
    if unknown:
        raise ValueError(
            f"list {name!r}: {len(unknown)} of {len(listed)} images, such as {unknown[0]}, are not among the "
            f"{len(keys)} of this data"
        )
    return listed


def _find(folder: Path, *names: str) -> Path:
    """A picture below a folder: there, or in a folder in it. `ValueError` if several have one of this name."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
        places = [place for place in _subfolders(folder, _changed(folder)) if (place / name).is_file()]
        if len(places) > 1:
            raise ValueError(
                f"{name} lies in {len(places)} folders of {folder}, such as {places[0].name} and {places[1].name}; "
                f"give the names of pictures with their folder"
            )
        if places:
            return places[0] / name
    return folder / names[0]


def _changed(folder: Path) -> int:
    """When something last came into a folder or left it."""
    return folder.stat().st_mtime_ns if folder.is_dir() else 0


@cache
def _subfolders(folder: Path, changed: int) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if path.is_dir())) if folder.is_dir() else ()
