"""Pictures of a report with their captions: which ones are shown, and which words are marked. No torch."""

from __future__ import annotations

import base64
import io
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vlmfix.eval.report.study import Study
from vlmfix.eval.scorers.chair import CaptionScore, explain

THUMBNAIL = 320
"""Longest side of a picture, in pixels."""


@dataclass(frozen=True)
class Piece:
    """Part of a caption: words that name an object, or what stands between them."""

    text: str
    verdict: str = ""
    """`present` or `invented`, where an object is named."""
    node: str = ""
    """The object, as the scorer calls it."""


@dataclass(frozen=True)
class Answer:
    """One caption, and the methods that gave it."""

    names: list[str]
    pieces: list[Piece]
    missed: list[str]
    """Objects of the picture that it does not name."""


@dataclass(frozen=True)
class Card:
    """One picture with what the methods say about it."""

    image: int
    name: str
    """Of the file; empty if it is not known."""
    source: str | None
    """A small copy as a data address; `None` if the file cannot be read."""
    answers: list[Answer]


@dataclass(frozen=True)
class Gallery:
    """The pictures that a report shows."""

    differing: list[Card]
    """Where methods differ most, these first."""
    drawn: list[Card]
    """Drawn at random."""
    pictures: int
    """How many they were drawn from: those that all methods have described."""
    seed: int


def gallery(study: Study, most: int, sample: int, seed: int) -> Gallery | None:
    """Choose pictures; `None` if there is none that all methods have described."""
    shared = sorted(set.intersection(*map(set, study.captions))) if study.captions else []
    if not shared:
        return None
    spreads = {image: spread(study, image) for image in shared}
    ranked = sorted(shared, key=lambda image: -spreads[image])
    differing = [image for image in ranked if spreads[image] > 0]
    drawn = random.Random(seed).sample(shared, min(sample, len(shared)))
    return Gallery(
        differing=[card(study, image) for image in differing[:most]],
        drawn=[card(study, image) for image in drawn],
        pictures=len(shared),
        seed=seed,
    )


def spread(study: Study, image: int) -> float:
    """How much methods differ on a picture: in objects invented, then in objects missed."""
    scores = [captions[image] for captions in study.captions]
    invented = [len(score.objects - score.truth) for score in scores]
    missed = [len(score.missed) for score in scores]
    return max(invented) - min(invented) + (max(missed) - min(missed)) / 100


def card(study: Study, image: int) -> Card:
    """One picture; equal captions are shown once."""
    answers: dict[str, Answer] = {}
    for name, captions in zip(study.names, study.captions, strict=True):
        score = captions[image]
        if score.caption not in answers:
            answers[score.caption] = Answer([], marked(score), sorted(score.missed))
        answers[score.caption].names.append(name)
    path = study.data.images.get(image)
    return Card(
        image=image,
        name="" if path is None else path.name,
        source=None if path is None else thumbnail(path),
        answers=list(answers.values()),
    )


def marked(score: CaptionScore) -> list[Piece]:
    """A caption in pieces; those that name objects are marked as present or invented."""
    pieces: list[Piece] = []
    end = 0
    for mention in explain(score)["mentions"]:
        start, stop = max(mention["start"], end), mention["end"]
        if start >= stop:  # inside a mention that is marked already
            continue
        pieces.append(Piece(score.caption[end:start]))
        pieces.append(Piece(score.caption[start:stop], mention["verdict"], mention["node"]))
        end = stop
    pieces.append(Piece(score.caption[end:]))
    return [piece for piece in pieces if piece.text]


def thumbnail(path: Path) -> str | None:
    """A small copy of a picture as a data address; `None` if it cannot be read."""
    try:
        with Image.open(path) as picture:
            small = ImageOps.exif_transpose(picture).convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            file = io.BytesIO()
            small.quantize(256).save(file, "PNG", optimize=True)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        return None
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
