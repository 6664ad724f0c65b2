"""Pictures and prompts as users give them, opened and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

Picture = str | Path | Image.Image
"""A path, or a picture that is open already."""


def open_picture(picture: Picture) -> Image.Image:
    """A picture as RGB, turned upright. `ValueError` if there is none or it cannot be read."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if not isinstance(picture, (str, Path)):
        raise TypeError(f"image: expected a path or a PIL image, got {type(picture).__name__}")
    try:
        with Image.open(picture) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no such image file: {picture}") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture} is no image that can be read: {error}") from error


@dataclass(frozen=True)
class OpenedPicture:
    """A picture that is asked about."""

    name: str
    """Its path, or its size where it came without one."""
    pixels: Image.Image
    """RGB, upright."""

    @cached_property
    def sha256(self) -> str:
        """Hash of the RGB pixels."""
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()


@dataclass(frozen=True)
class Question:
    """A prompt and the pictures that it is about, ready for a processor."""

    pictures: list[OpenedPicture]
    prompt: str

    @property
    def images(self) -> list[Image.Image]:
        """The pictures' pixels."""
        return [picture.pixels for picture in self.pictures]


def read_questions(questions: Sequence[tuple[Picture | Sequence[Picture], str]]) -> list[Question]:
    """(image or images, prompt) pairs, opened. The same path or picture object becomes the same opened picture: by that
    questions are known to be about one picture.

    Raises `ValueError` for a missing or unreadable picture and for an empty prompt.
    """
    opened: dict[str | Path | int, OpenedPicture] = {}

    def read(image: Picture) -> OpenedPicture:
        key = id(image) if isinstance(image, Image.Image) else image
        if key not in opened:
            pixels = open_picture(image)
            name = str(image) if isinstance(image, (str, Path)) else f"{pixels.width}x{pixels.height}"
            opened[key] = OpenedPicture(name, pixels)
        return opened[key]

    checked = []
    for image, prompt in questions:
        images = [image] if isinstance(image, (str, Path, Image.Image)) else list(image or ())
        if not images:
            raise ValueError(
                f"no image was given for the prompt {prompt!r}; vlmfix needs at least one picture per question"
            )
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt: expected some text, got {prompt!r}")
        checked.append(Question([read(each) for each in images], prompt))
    return checked
