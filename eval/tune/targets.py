"""Object words of captions with their targets: the image tokens that show the object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlmfix.eval.scorers import naming
from vlmfix.eval.tune.tool import Subject


@dataclass(frozen=True)
class Target:
    """One object word of a caption: where it is predicted, and where its object is."""

    picture: int
    """Index of the caption."""
    token: int
    """Index of the word's first token in the caption."""
    grid: np.ndarray
    """(image tokens,) bool: those that lie on the picture's grid, and so count."""
    shows: np.ndarray
    """(image tokens,) bool: those that show the object."""
    shows_other: np.ndarray | None = None
    """(image tokens,) bool: those that would show another picture's object, as a control."""


def find_targets(subject: Subject, captions: Sequence[naming.Caption]) -> list[Target]:
    """Words that name an object whose place in the picture is known, caption by caption."""
    annotations = naming.Annotations(subject.data)
    targets = []
    for picture, caption in enumerate(captions):
        place, n_tokens, size = naming.grid(subject.model, subject.processor, caption.item)
        cells = annotations.shown(caption.key, place, size)
        grid = np.zeros(n_tokens, bool)
        grid[place.first : place.first + place.rows * place.columns] = True
        for word in caption.named:
            if word.object in cells and word.token < len(caption.tokens):
                shows = np.zeros(n_tokens, bool)
                shows[grid] = cells[word.object]
                targets.append(Target(picture, word.token, grid, shows))
    return targets


def with_controls(targets: Sequence[Target]) -> list[Target]:
    """The same with their controls: the place of the next target of another picture with as many image tokens."""
    controlled = []
    for number, target in enumerate(targets):
        shows_other = None
        for other in (*targets[number + 1 :], *targets[:number]):
            if other.picture != target.picture and len(other.shows) == len(target.shows):
                shows_other = other.shows
                break
        controlled.append(replace(target, shows_other=shows_other))
    return controlled
