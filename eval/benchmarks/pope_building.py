"""POPE's questions as its authors build them from annotated images. No torch.

    questions = build_questions(ordered_objects("instances_val2014.json"), k=3, n_images=500, seed=0)

Follows `utils.py` and `main.py` of RUCAIBox/POPE.
"""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from vlmfix.eval.benchmarks.pope_questions import SPLITS
from vlmfix.eval.scorers.chair import instance_categories
from vlmfix.eval.scorers.yesno import Label, Question
from vlmfix.method.settings import did_you_mean


def ordered_objects(instances: str | os.PathLike[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Image file names of an instances file in COCO format, each with its categories in the order of its annotations.

    Raises:
        ValueError: the file is not in COCO format, or an image has no file name.
    """
    images = instance_categories(instances)
    for image, _ in images:
        if not isinstance(image.get("file_name"), str):
            raise ValueError(f"{instances}: image {image['id']} has no file_name; questions need one.")
    return [(image["file_name"], names) for image, names in images]


@dataclass(frozen=True)
class Frequencies:
    """How often objects occur in the selected images. Lists go from the most frequent to the least."""

    names: Sequence[str]
    """All objects, in the order of their first appearance."""
    frequent: Sequence[str]
    beside: Mapping[str, Sequence[str]]
    """Object -> those that stand in one image with it."""


_CANDIDATES: dict[str, Callable[[Frequencies, str], Sequence[str]]] = {
    "random": lambda frequencies, positive: (),
    "popular": lambda frequencies, positive: frequencies.frequent,
    "adversarial": lambda frequencies, positive: frequencies.beside[positive],
}
"""Split -> objects that a negative is taken from, after a positive: the first that is absent. None leaves it to
chance."""


def build_questions(
    images: Sequence[tuple[str, Sequence[str]]],
    *,
    k: int = 3,
    n_images: int | None = None,
    seed: int,
    splits: Sequence[str] = SPLITS,
    article: Literal["correct", "official"] = "correct",
) -> list[Question]:
    """Questions on images with their objects in order, as `utils.py` and `main.py` of RUCAIBox/POPE build them.

    Images with fewer than `k` objects are left out, and of the others `n_images` drawn (None: all). Each gets, per
    split, its first `k` objects as positives, each followed by a negative: drawn at random, the most frequent object
    that is absent, or the absent one that stands most often with this positive. Ids count from 1 through all splits;
    each split, and the draw of images, starts from `seed` anew.

    `article="official"` keeps the misprint of the code, "Is there an orange in the imange?".

    Raises:
        ValueError: an unknown split or article, too few images, or images so full or so alike that negatives run out.
    """
    for split in splits:
        if split not in SPLITS:
            raise ValueError(f"{split!r} is no split of POPE; {did_you_mean(split, SPLITS)}")
    if article not in ("correct", "official"):
        raise ValueError(f"article is {article!r}; expected 'correct' or 'official'.")
    if k < 1:
        raise ValueError(f"k is {k}; expected at least one object per image.")
    full = [(name, tuple(dict.fromkeys(objects))) for name, objects in images]
    full = [(name, objects) for name, objects in full if len(objects) >= k]
    if not full or (n_images is not None and not 1 <= n_images <= len(full)):
        raise ValueError(
            f"{len(full)} of {len(images)} images have at least {k} objects, but {n_images or 'some'} are wanted; "
            "lower k or n_images, or give more images."
        )
    selected = full if n_images is None else random.Random(seed).sample(full, n_images)
    frequencies = _frequencies(selected)
    n_objects = len(frequencies.names)
    for name, objects in selected:
        if n_objects - len(objects) < k:
            raise ValueError(
                f"{name} holds {len(objects)} of the {n_objects} objects that the selected images have, which "
                f"leaves fewer than k = {k} to ask for in vain; lower k or give more images."
            )
    questions: list[Question] = []
    for split in splits:
        for image, name, label in _draw(selected, frequencies, split, k, random.Random(seed)):
            number = len(questions) + 1
            questions.append(Question(number, image, question_text(name, article), name, label, split))
    return questions


def question_text(name: str, article: Literal["correct", "official"] = "correct") -> str:
    """The question for an object. The official code puts "an" for every "a" of the question, hence "imange"."""
    if not name.lower().startswith(tuple("aeiou")):
        return f"Is there a {name} in the image?"
    return f"Is there an {name} in the {'imange' if article == 'official' else 'image'}?"


def _frequencies(images: Sequence[tuple[str, Sequence[str]]]) -> Frequencies:
    counts = Counter(chain.from_iterable(objects for _, objects in images))
    together: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for _, objects in images:
        for name in objects:
            together[name].update(other for other in objects if other != name)
    # `most_common` sorts stably: objects of equal count stay in the order of their first appearance.
    return Frequencies(
        names=list(counts),
        frequent=[name for name, _ in counts.most_common()],
        beside={name: [other for other, _ in others.most_common()] for name, others in together.items()},
    )


def _draw(
    images: Sequence[tuple[str, Sequence[str]]], frequencies: Frequencies, split: str, k: int, rng: random.Random
) -> Iterator[tuple[str, str, Label]]:
    """Yield image, object and label of each question. At least `k` objects must be absent from each image."""
    for image, objects in images:
        unavailable = set(objects)  # in the image, or asked for already
        for positive in objects[:k]:
            yield image, positive, "yes"
            candidates = _CANDIDATES[split](frequencies, positive)
            negative = next((name for name in candidates if name not in unavailable), None)
            while negative is None or negative in unavailable:
                negative = rng.choice(frequencies.names)
            unavailable.add(negative)
            yield image, negative, "no"
