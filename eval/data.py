"""Pictures with annotations: a folder with `images/`, `instances.json` and `captions.json` in COCO format."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from vlmfix.eval import chair, pope

EMBEDDED = ("scenes", "calibration", "photos")


@dataclass(frozen=True)
class Data:
    """Annotated pictures."""

    name: str
    """One of `EMBEDDED`, else the folder."""
    folder: Path
    limit: int | None = None
    """Only the first pictures; for trying out."""

    @classmethod
    def load(cls, name: str = "scenes", limit: int | None = None) -> Data:
        """Embedded pictures, or a folder. `ValueError` if it lacks what a benchmark reads."""
        folder = Path(str(files("vlmfix.assets") / name)) if name in EMBEDDED else Path(name).resolve()
        for needed in ("instances.json", "images"):
            if not (folder / needed).exists():
                raise ValueError(
                    f"data {name!r}: {folder / needed} does not exist; expected {', '.join(EMBEDDED)}, or a folder "
                    f"with images/, instances.json and, for CHAIR, captions.json in COCO format"
                )
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected a number of pictures above 0, got {limit}")
        return cls(name if name in EMBEDDED else str(folder), folder, limit)

    @cached_property
    def images(self) -> dict[int, Path]:
        """Image number -> file, in the order of the annotations."""
        found = {
            chair.image_key(image["id"]): self.folder / "images" / image["file_name"]
            for image, _ in chair.instance_categories(self.folder / "instances.json")
        }
        return dict(list(found.items())[: self.limit])

    @cached_property
    def truth(self) -> chair.GroundTruth:
        """CHAIR's ground truth: annotated categories and what the human captions name."""
        return self.truth_for("rohrbach")

    def truth_for(self, variant: str) -> chair.GroundTruth:
        """The same, with the captions read as a variant of CHAIR reads them."""
        captions = self.folder / "captions.json"
        return chair.ground_truth(
            self.folder / "instances.json", captions if captions.exists() else None, variant=variant
        )

    @cached_property
    def objects(self) -> list[tuple[str, tuple[str, ...]]]:
        """File name and objects of each picture, in order of annotation: what POPE is built from."""
        names = {path.name for path in self.images.values()}
        return [(name, found) for name, found in pope.ordered_objects(self.folder / "instances.json") if name in names]

    @cached_property
    def digest(self) -> str:
        """Hash of the annotations and of the list of pictures."""
        h = hashlib.sha256()
        for name in ("instances.json", "captions.json"):
            path = self.folder / name
            h.update(path.read_bytes() if path.exists() else b"-")
        h.update("\n".join(path.name for path in self.images.values()).encode())
        return h.hexdigest()[:16]
