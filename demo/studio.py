"""What all tabs share: a model that many visitors ask at the same time, and what is known of its pictures."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from torch import nn

from vlmfix.asking.asker import Asker
from vlmfix.asking.pictures import open_picture
from vlmfix.asking.record import Record
from vlmfix.demo.settings import METHODS, interventions, settings
from vlmfix.eval.pictures.data import Data
from vlmfix.method.intervention import Intervention
from vlmfix.model.loading import EMBEDDED, load

MAX_NEW_TOKENS = 256
MAX_PIXELS = 40_000_000
LONGEST_PROMPT = 1000
"""Characters."""


@dataclass(frozen=True)
class Studio:
    """A loaded model and its processor. Nothing is ever attached to `model` itself: each question gets a twin."""

    model: nn.Module
    processor: Any
    sampling: Any = field(default_factory=threading.Lock)
    """Held by methods that draw random numbers, which in torch belong to all threads."""

    @classmethod
    def open(cls, name: str) -> Studio:
        """With a model by name. `ValueError` if it cannot be loaded."""
        return cls(*load(name))

    @property
    def name(self) -> str:
        """Of the model: a Hub id, a folder, or `organism`."""
        return self.model.config._name_or_path  # type: ignore[union-attr, return-value]

    @property
    def embedded(self) -> bool:
        """Whether the model is one of those that know drawn scenes only."""
        return self.name in EMBEDDED

    def twin(self) -> nn.Module:
        """A model that shares all weights of this one and no hooks, so that nobody else notices what is put on it."""
        tensors = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, tensors)  # what is in this memo already is not copied

    def asker(self, chosen: Sequence[Intervention] = ()) -> Asker:
        """A twin with some interventions, ready to be asked by one visitor."""
        return Asker(self.twin(), self.processor, list(chosen))

    def ask(
        self, picture: Image.Image, prompt: str, chosen: Sequence[Intervention] = (), streamer: Any = None
    ) -> Record:
        """One answer. `streamer` gets its tokens as they come (`put`, `end`); interventions that decode in their own
        way have none to give before they are done. Raises what `vlmfix.ask` raises."""
        return self.ask_with(self.asker(chosen), picture, prompt, streamer)

    def ask_with(self, asker: Asker, picture: Image.Image, prompt: str, streamer: Any = None) -> Record:
        """As `ask`, with an asker that one can look into afterwards."""
        active = [intervention for intervention in asker.interventions if intervention is not None]
        decodes = any(intervention.acts_at("decode") for intervention in active)
        streaming = {} if streamer is None or decodes else {"streamer": streamer}
        with self.sampling if decodes else nullcontext():
            record = asker.ask(picture, prompt, max_new_tokens=MAX_NEW_TOKENS, **streaming)
        settings = {key: value for key, value in record.generation.items() if key != "streamer"}
        return replace(record, generation=settings)


@dataclass(frozen=True, eq=False)  # a state of the page must be hashable, and pictures are not
class Answer:
    """What a column of the page holds once it is done."""

    spec: str
    chosen: tuple[Intervention, ...]
    picture: Image.Image
    """RGB, upright."""
    file: str
    """Name of the picture's file, as the visitor has it."""
    record: Record


@dataclass(frozen=True)
class Shared:
    """Components that all tabs read."""

    picture: gr.Image
    """Gives a path in the upload folder, or `None`; `read_picture` opens it."""
    prompt: gr.Textbox
    n_columns: gr.Radio
    """How many of the method fields are shown: 2 to 4."""
    methods: tuple[gr.components.Component, ...]
    """Method fields of all four columns; each gives a spec such as `vhr:alpha=1.5`, for `interventions`."""
    answers: gr.State
    """`tuple[Answer, ...]`: the last answers in Compare, left to right; empty before the first. Changes when all
    columns are done."""


@cache
def known_pictures() -> dict[str, Path]:
    """Embedded pictures by name: `test_0032`, `000000000544`."""
    return {path.stem: path for name in ("organism", "photos") for path in Data.load(name).images.values()}


@cache
def _known() -> dict[str, tuple[str, frozenset[str]]]:
    """Hash of the pixels of each embedded picture -> its name, and the objects in it."""
    by_pixels = {}
    for name in ("organism", "photos"):
        data = Data.load(name)
        objects = data.truth
        for key, path in data.images.items():
            by_pixels[pixel_hash(open_picture(path))] = path.stem, objects[key]
    return by_pixels


def pixel_hash(picture: Image.Image) -> str:
    """As in `Record.image_sha256`."""
    return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()


def truth(of: Record | Image.Image) -> frozenset[str] | None:
    """Objects in an embedded picture, as CHAIR's ground truth has them; `None` for any other picture."""
    sha = of.image_sha256[0] if isinstance(of, Record) else pixel_hash(of)
    return _known().get(sha, ("", None))[1]


def picture_name(picture: Image.Image) -> str | None:
    """Name of an embedded picture, by its pixels; `None` for any other."""
    return _known().get(pixel_hash(picture), (None, frozenset()))[0]


def read_picture(path: str | None) -> Image.Image:
    """What a visitor gave, as RGB, upright. `ValueError` says in a sentence what is wrong with it."""
    if path is None:
        raise ValueError("Choose a picture first.")
    try:
        with Image.open(path) as opened:  # reads no pixels yet
            width, height = opened.size
    except (OSError, Image.DecompressionBombError):
        raise ValueError("This file is no picture that can be read; take a PNG, JPEG or WebP.") from None
    if width * height > MAX_PIXELS:
        raise ValueError(f"The picture has {width} x {height} pixels; this page takes up to {MAX_PIXELS:,}.")
    try:
        return open_picture(path)
    except ValueError:
        raise ValueError("This picture is damaged; take another one.") from None


def read_prompt(prompt: str | None) -> str:
    """What a visitor typed. `ValueError` says in a sentence what is wrong with it."""
    prompt = (prompt or "").strip()
    if not prompt:
        raise ValueError("Type a prompt first.")
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"The prompt has {len(prompt)} characters; this page takes up to {LONGEST_PROMPT}.")
    return prompt


def problem(sentence: object) -> str:
    """A sentence on what is wrong with the input, as safe HTML."""
    return f'<p class="wrong">{escape(str(sentence))}</p>'


__all__ = [
    "METHODS",
    "Answer",
    "Shared",
    "Studio",
    "interventions",
    "known_pictures",
    "picture_name",
    "problem",
    "read_picture",
    "read_prompt",
    "settings",
    "truth",
]
