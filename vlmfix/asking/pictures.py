"""Pictures and prompts as users give them, opened and checked: the same picture gives the same pixels by every way in.

Pictures are turned upright, transparent ones are laid over white, deeper ones are scaled to eight bits, never
clipped: 16-bit values keep their high byte, as in 16-bit colours that Pillow reads.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmfix.asking.conversation import Conversation

Picture = str | Path | Image.Image | np.ndarray | bytes
"""A path, a data URL or base64 text, a picture that is open already, an array (height x width, or height x width x 1 to
4 channels: gray, gray and alpha, RGB, RGBA), or the bytes of a file."""

_LONGEST_NAME = 200
"""Characters of a path or prompt in a message."""
_KINDS = (str, os.PathLike, Image.Image, np.ndarray, bytes, bytearray, memoryview, io.IOBase)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{16,}={0,2}\s*")
"""No picture is shorter than this many characters."""


class PictureError(ValueError):
    """A picture that cannot be shown to a model."""


class ProcessorError(PictureError):
    """A model's processor cannot take a question."""

    def __init__(self, images: Sequence[Image.Image], prompt: str, reason: Exception) -> None:
        sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
        super().__init__(f"the model's processor cannot take it ({sizes} pixels) {_about(prompt)}: {_reason(reason)}")
        self.images = images


def open_picture(picture: Picture) -> Image.Image:
    """A picture as RGB, turned upright.

    Raises:
        ValueError: there is no such picture, or it cannot be read; the message names it.
        TypeError: this is nothing that a picture can be made of.
    """
    if not isinstance(picture, _KINDS):
        raise TypeError(
            f"image: expected a path or a PIL image, got {type(picture).__name__}; an array (height x width x "
            f"channels), the bytes of an image file, base64 and a data URL can be read too"
        )
    name = picture_name(picture)
    try:
        with _opened(picture) as opened:
            return _as_rgb(opened)
    except FileNotFoundError:
        raise PictureError(f"no such image file: {name}") from None
    except UnidentifiedImageError as error:
        raise PictureError(f"{name} is no image that can be read: its format is not known") from error
    except Exception as error:  # decoders raise whatever they like: SyntaxError, struct.error, IndexError ...
        raise PictureError(f"{name} is no image that can be read: {_reason(error)}") from error


def picture_name(picture: object) -> str:
    """What a message calls a picture: its path where there is one, never its content."""
    if isinstance(picture, Image.Image):
        return f"the PIL image of {picture.width}x{picture.height} pixels"
    if isinstance(picture, np.ndarray):
        return f"the array of shape {picture.shape} and type {picture.dtype}"
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return f"the picture given as {len(picture)} bytes"
    if isinstance(picture, (str, os.PathLike)):
        text = os.fsdecode(picture).strip()
        if text[:5].lower() == "data:":
            return f"the data URL of {len(text)} characters ({_shortened(text, 40)})"
        if isinstance(picture, str) and _is_base64_picture(picture):
            return f"the base64 text of {len(text)} characters ({_shortened(text, 40)})"
        return _shortened(text) or "the empty path"
    return f"the picture given as {type(picture).__name__}"


# ---- ways in -----------------------------------------------------------------------------------------------------


@contextmanager
def _opened(picture: Any) -> Iterator[Image.Image]:
    """A picture as Pillow has it, as it lies in its file. A picture that came open stays open."""
    if isinstance(picture, Image.Image):
        yield picture
        return
    if isinstance(picture, np.ndarray):
        yield _from_array(picture)
        return
    with Image.open(_file(picture)) as opened:
        yield opened


def _file(picture: Any) -> io.BytesIO:
    """The content of a picture's file, as a file. Pillow, given a path, maps some files into memory, and then misreads
    those that are stored turned."""
    if isinstance(picture, io.IOBase):
        return io.BytesIO(_content(picture))
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return io.BytesIO(bytes(picture))
    content = _decoded(picture) if isinstance(picture, str) else None
    return io.BytesIO(Path(picture).read_bytes() if content is None else content)


def _content(file: Any) -> bytes:
    """All of an open file, from its beginning, its position left as it was."""
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    if not isinstance(content, bytes):
        raise ValueError("it is open as text; open it with 'rb'")
    return content


def _decoded(text: str) -> bytes | None:
    """The bytes in a data URL or in base64; `None` for a path."""
    if text.lstrip()[:5].lower() == "data:":
        header, comma, payload = text.partition(",")
        if not comma:
            raise ValueError("it has no comma, behind which the picture stands")
        content = urllib.parse.unquote_to_bytes(payload)
        is_base64 = header.lower().rstrip().endswith(";base64")
        return _from_base64(content.decode("ascii", "replace")) if is_base64 else content
    if re.match(r"(?i)https?://", text):
        raise ValueError("nothing is downloaded; save it to a file first")
    if not _BASE64.fullmatch(text) or _is_file(text):
        return None
    content = _from_base64(text)
    return content if _is_picture(content) else None


def _is_picture(content: bytes) -> bool:
    """Whether some bytes begin like a file that Pillow knows."""
    try:
        with Image.open(io.BytesIO(content)):
            return True
    except UnidentifiedImageError:
        return False


def _is_base64_picture(text: str) -> bool:
    try:
        return _decoded(text) is not None
    except ValueError:
        return False


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):  # longer than a path may be
        return False


def _from_base64(text: str) -> bytes:
    """Bytes from base64, also from its form for URLs, broken into lines, and without the signs at its end."""
    characters = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    padding = "=" * (-len(characters) % 4)
    return base64.b64decode(characters + padding, validate=True)


def _from_array(array: np.ndarray) -> Image.Image:
    """An image of eight bits from an array: height x width, or height x width x 1 to 4 channels."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and not 1 <= array.shape[2] <= 4):
        raise ValueError("expected height x width, or height x width x channels (1 to 4)")
    if not array.size:
        raise ValueError("it has no pixels")
    if np.ma.is_masked(array):
        raise ValueError("some of its values are masked; fill them first")
    values = np.asarray(array)
    if values.ndim == 2:
        return Image.fromarray(np.ascontiguousarray(_to_eight_bits(values)))
    n_colours = values.shape[2] - (values.shape[2] in (2, 4))
    # Alpha from 0 to 1 may stand beside colours from 0 to 255.
    parts = [_to_eight_bits(part) for part in (values[:, :, :n_colours], values[:, :, n_colours:]) if part.size]
    eight_bits = np.ascontiguousarray(np.concatenate(parts, axis=2))
    return Image.fromarray(eight_bits[:, :, 0] if values.shape[2] == 1 else eight_bits)


# ---- depth and transparency ---------------------------------------------------------------------------------------


def _as_rgb(picture: Image.Image) -> Image.Image:
    """Upright, eight bits a channel, over white where it is transparent."""
    deep_png = picture.mode == "I" and picture.format == "PNG"  # 16 bits, which older versions of Pillow open like this
    _load(picture)  # TIFF is turned upright by that, and must not be turned again
    upright = _upright(picture)
    if not upright.width or not upright.height:
        raise ValueError("it has no pixels")
    if upright.mode.startswith("I;16") or deep_png:
        return _deep_as_rgb(upright, np.asarray(upright).astype(np.uint16), _tiff_tag(picture, _PHOTOMETRIC))
    if upright.mode in ("I", "F"):
        values = np.asarray(upright)
        is_unsigned = _tiff_tag(picture, _BITS) == (32,) and _tiff_tag(picture, _SIGN) in (None, (1,))
        if upright.mode == "I" and is_unsigned:  # Pillow has no mode for that, and reads the upper half as negative
            values = values.view(np.uint32)
        return _deep_as_rgb(upright, values, _tiff_tag(picture, _PHOTOMETRIC))
    if upright.mode not in ("PA", "LA", "La", "RGBA", "RGBa") and "transparency" not in upright.info:
        return upright.convert("RGB")
    if upright.mode == "La":  # gray, multiplied by its alpha already
        upright = upright.convert("LA")
    layers = upright.convert("RGBA")
    white = Image.new("RGBA", layers.size, "white")
    return Image.alpha_composite(white, layers).convert("RGB")


def _load(picture: Image.Image) -> None:
    """Decode a picture that may have been opened by its path, which Pillow would map into memory, see `_file`."""
    path = getattr(picture, "filename", "")
    if not path or picture.format != "TIFF":
        picture.load()
        return
    try:
        picture.filename = ""  # type: ignore[attr-defined]
        picture.load()
    finally:
        picture.filename = path  # type: ignore[attr-defined]


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF entry says; where that is damaged, as the pixels lie."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # struct.error, SyntaxError, ...: of what stands beside the pixels, not of these
        return picture


_PHOTOMETRIC, _BITS, _SIGN = 262, 258, 339
"""Tags of TIFF: what black is, bits of a value, and whether it has a sign or is a fraction."""


def _tiff_tag(picture: Image.Image, tag: int) -> Any:
    tags = getattr(picture, "tag_v2", None)
    return None if tags is None else tags.get(tag)


def _deep_as_rgb(picture: Image.Image, values: np.ndarray, photometric: int | None) -> Image.Image:
    gray = _to_eight_bits(values)
    if photometric == 0:  # 0 is white: Pillow turns this round for eight bits only
        gray = np.uint8(255) - gray
    see_through = picture.info.get("transparency")
    if isinstance(see_through, int):  # of a gray PNG: the value that shows what lies behind
        gray = np.where(values == see_through, np.uint8(255), gray)
    return Image.fromarray(gray).convert("RGB")


def _to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Values as bytes: those of a known depth keep their high byte, others are scaled by the range that holds them.

    A type that does not tell a range is taken for 0 to 1 (fractions only), 0 to 255 or 0 to 65535, the first of these
    that holds all values, give or take what resizing and filters add at edges. Where values lie outside, black is the
    smallest value or white the largest: nothing is clipped.
    """
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    if values.dtype.kind not in "uif":
        raise ValueError("expected whole numbers, fractions or bool")
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are no numbers, or infinite")
    numbers = values.astype(np.float64)
    smallest, largest = float(numbers.min()), float(numbers.max())
    whites = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    white = next((white for white in whites if largest <= white * 3 / 2), None)
    if white is not None and smallest < -white / 2:
        white = None
    if white == 65535 and smallest >= 0 and largest <= white:
        return (numbers.astype(np.uint16) >> 8).astype(np.uint8)
    darkest, brightest = (smallest, largest) if white is None else (min(smallest, 0.0), max(largest, white))
    return np.rint((numbers - darkest) / ((brightest - darkest) or 1.0) * 255).astype(np.uint8)


# ---- questions ----------------------------------------------------------------------------------------------------


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

    Raises `ValueError` for a missing or unreadable picture, which names picture and question, and for an empty prompt.
    """
    opened: dict[str | int, OpenedPicture] = {}

    def read(image: Picture, prompt: str) -> OpenedPicture:
        key = os.fsdecode(image) if isinstance(image, (str, os.PathLike)) else id(image)
        if key not in opened:
            try:
                pixels = open_picture(image)
            except PictureError as error:
                raise PictureError(f"{error} {_about(prompt)}") from error
            opened[key] = OpenedPicture(_recorded_name(image, pixels), pixels)
        return opened[key]

    checked = []
    for image, prompt in _pairs(questions):
        images: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
        shows_none = isinstance(prompt, Conversation) and not prompt.n_images
        if (not images or images[0] is None) and not shows_none:
            raise ValueError(
                f"no image was given for the prompt {_shortened(str(prompt))!r}; vlmfix needs at least one picture per "
                f"question"
            )
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt: expected some text, got {prompt!r}")
        if isinstance(prompt, Conversation) and len(images) != prompt.n_images:
            raise ValueError(f"the conversation shows {prompt.n_images} pictures, got {len(images)} beside it")
        checked.append(Question([read(each, prompt) for each in images], prompt))
    return checked


def _pairs(questions: Any) -> list[tuple[Any, Any]]:
    """The questions, all of which live until the last one is read: else one's `id` could become another's."""
    if isinstance(questions, (str, bytes, Image.Image, np.ndarray)) or not isinstance(questions, Iterable):
        raise TypeError(f"questions: expected (image, prompt) pairs, got {type(questions).__name__}")
    listed = list(questions)
    for question in listed:
        if not isinstance(question, (list, tuple)) or len(question) != 2:
            kind = type(question).__name__
            size = f" of {len(question)}" if isinstance(question, (list, tuple)) else ""
            raise TypeError(f"questions: expected (image, prompt) pairs, got a {kind}{size} among them")
    return listed


@contextmanager
def naming_pictures(questions: Sequence[Question]) -> Iterator[None]:
    """Let the error of a processor that cannot take a question say which pictures the question is about."""
    try:
        yield
    except ProcessorError as error:
        for question in questions:
            is_about = any(image is refused for image in question.images for refused in error.images)
            paths = [picture.name for picture in question.pictures if picture.name not in str(error)]
            if is_about and paths:
                raise PictureError(f"{', '.join(paths)}: {error}") from error
        raise


def _recorded_name(image: Picture, pixels: Image.Image) -> str:
    """A picture's path, or its size where it came without one."""
    is_path = isinstance(image, os.PathLike) or (isinstance(image, str) and _decoded(image) is None)
    return os.fsdecode(image) if is_path else f"{pixels.width}x{pixels.height}"  # type: ignore[arg-type]


def _reason(error: Exception) -> str:
    """Why a picture cannot be read, in one short line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _shortened(" ".join(text.split()) or type(error).__name__)


def _about(prompt: str) -> str:
    return f"(asked: {_shortened(prompt)!r})"


def _shortened(text: str, longest: int = _LONGEST_NAME) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
