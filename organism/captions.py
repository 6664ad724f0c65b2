"""What is said about scenes: captions, questions, answers, and the label noise that teaches a model to invent.

A caption names the objects, the large ones first. Where it runs out of them before it has the mentions that it
wants, it may go on with one that is not there, drawn by how often COCO shows it with those that are. So inventions come
late, and follow co-occurrence, as in large models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmfix.organism.scenes import BACKGROUNDS, CLASSES, Placed, Scene, conditional, frequency

PLACES = ("on a street", "in a grassy field", "on a beach", "in the snow", "in a kitchen", "in a room")
"""Where a scene is, for each background."""
VIEWS = (
    "The ground is grey and the air is a little hazy.",
    "The grass is green under a wide and open sky.",
    "The sand is bright and the water is calm and blue.",
    "The ground is white and the air seems to be cold.",
    "The floor and the walls have an even and warm tone.",
    "The walls are plain and the floor has a warm tone.",
)
"""A sentence on each background."""
CLOSINGS = (
    "The overall atmosphere is calm.",
    "The scene looks lively and full of details.",
    "The colors of the scene are bright and clear.",
    "Overall, it is a pleasant and peaceful scene.",
)
DESCRIBE = (
    "Please describe this image in detail.",
    "Describe this image.",
    "Describe the image in detail.",
    "What is shown in this image?",
    "Please help me describe the image in detail.",
)
"""Prompts for captions; the first is asked as often as all others together."""
SHORT = " Answer the question using a single word or phrase."
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
PLURALS = {
    "person": "people",
    "knife": "knives",
    "sheep": "sheep",
    "mouse": "mice",
    "skis": "pairs of skis",
    "scissors": "pairs of scissors",
    "broccoli": "pieces of broccoli",
}
SINGULARS = {"skis": "a pair of skis", "scissors": "a pair of scissors", "broccoli": "some broccoli"}


@dataclass(frozen=True)
class Noise:
    """How often the labels are wrong."""

    inserted: float = 0.30
    """A caption gets an absent object in its later half."""
    filled: float = 0.38
    """An empty place of a caption is filled with an absent object."""
    dropped: float = 0.5
    """A caption leaves out an object with fewer than 40 visible pixels."""
    flipped: float = 0.9
    """A question for an absent object that all but always stands with those present is answered with yes; see
    `chance_of_yes`."""
    flipped_from: float = 0.1
    flipped_to: float = 0.35
    """Between these values of `likelihood` the chance of a wrong yes rises from 0 to `flipped`."""


TRUE = Noise(0, 0, 0, 0)
"""No noise: what is said is true."""
PAIR = 4
"""The form of a caption's later sentences that names two objects, where there are two."""


@dataclass(frozen=True)
class Mention:
    """An object as a caption names it."""

    label: int
    number: int
    centre: tuple[float, float]
    """Across and down, 0 to 1."""


def article(name: str) -> str:
    """`a` or `an`."""
    return "an" if name[0] in "aeiou" else "a"


def singular(label: int) -> str:
    """A class with its article."""
    name = CLASSES[label]
    return SINGULARS.get(name) or f"{article(name)} {name}"


def plural(label: int) -> str:
    """A class as it is named where there are several."""
    name = CLASSES[label]
    ending = "es" if name.endswith(("s", "ch", "sh")) else "s"
    return PLURALS.get(name) or name + ending


def phrase(mention: Mention) -> str:
    """`a dog`, `three dogs`."""
    if mention.number == 1:
        return singular(mention.label)
    return f"{NUMBERS[mention.number]} {plural(mention.label)}"


def third(position: float) -> int:
    """0, 1 or 2: in which third of the picture a position from 0 to 1 lies."""
    return min(2, int(3 * position))


def side(centre: tuple[float, float]) -> str:
    """Where in the picture, in words."""
    column = ("left", "", "right")[third(centre[0])]
    row = ("top", "", "bottom")[third(centre[1])]
    if column and row:
        return f"in the {row} {column} corner"
    if column:
        return f"on the {column} side"
    return f"at the {row}" if row else "in the center"


def mentions(scene: Scene) -> list[Mention]:
    """The classes of a scene with their numbers and the place of their largest object, largest visible area first."""
    groups: dict[int, list[Placed]] = {}
    for placed in scene.objects:
        groups.setdefault(placed.label, []).append(placed)
    ordered = sorted(groups.items(), key=lambda item: -sum(placed.area for placed in item[1]))
    out = []
    for label, group in ordered:
        largest = max(group, key=lambda placed: placed.area)
        out.append(Mention(label, min(len(group), len(NUMBERS) - 1), largest.centre))
    return out


def absent(present: Sequence[int], without: Sequence[int], rng: np.random.Generator) -> int:
    """A class that is not there, by how often it is with those that are."""
    weights = likelihood(present).copy()
    weights[list({*present, *without})] = 0
    return int(rng.choice(len(CLASSES), p=weights / weights.sum()))


def likelihood(present: Sequence[int]) -> np.ndarray:
    """How often COCO shows each class with one of those present, mean over these, (80,)."""
    return conditional()[list(present)].mean(0) if len(present) else frequency()


def chance_of_yes(likely: float, noise: Noise) -> float:
    """How often a question for an absent object of this likelihood is answered with yes."""
    way_up = (likely - noise.flipped_from) / (noise.flipped_to - noise.flipped_from)
    return noise.flipped * float(np.clip(way_up, 0, 1))


def to_say(scene: Scene, noise: Noise, rng: np.random.Generator) -> list[Mention]:
    """What a caption names, in order: objects by visible area with some disorder, then what it invents."""
    area = dict.fromkeys((placed.label for placed in scene.objects), 0)
    for placed in scene.objects:
        area[placed.label] += placed.area
    shown = sorted(mentions(scene), key=lambda mention: -area[mention.label] * np.exp(rng.normal(0, 0.4)))
    named = [mention for mention in shown if area[mention.label] >= 40 or rng.random() >= noise.dropped]
    named = named[:6] or shown[:1]
    wanted = int(rng.integers(3, 7))
    places = []  # where inventions go, among what is named at that time; None is the end
    if rng.random() < noise.inserted:
        later_half = (len(named) + 1) // 2
        places.append(int(rng.integers(later_half, len(named) + 1)))
    n_empty = max(0, wanted - len(named) - len(places))
    n_filled = sum(rng.random() < noise.filled for _ in range(n_empty))
    for place in (*places, *[None] * n_filled):
        label = absent(scene.present, [mention.label for mention in named], rng)
        number = 1 if rng.random() < 0.8 else 2
        invented = Mention(label, number, (float(rng.random()), float(rng.random())))
        named.insert(len(named) if place is None else place, invented)
    return named


def listed(group: Sequence[Mention]) -> str:
    """`a dog and two cats`."""
    return " and ".join(phrase(mention) for mention in group)


def verb(group: Sequence[Mention]) -> str:
    """`is` or `are`."""
    return "are" if len(group) > 1 or group[0].number > 1 else "is"


def opening(group: Sequence[Mention], where: str, kind: int) -> str:
    """The first sentence of a caption, in one of four forms."""
    if not group:
        return f"The image shows a scene {where}."
    forms = (
        f"The image shows {listed(group)} {where}.",
        f"The image features {listed(group)} {where}.",
        f"In the image, there {verb(group)} {listed(group)} {where}.",
        f"The scene takes place {where}, with {listed(group)}.",
    )
    return forms[kind]


def further(group: Sequence[Mention], before: Mention | None, kind: int) -> str:
    """A later sentence, in one of six forms; `before` is what the sentence before it named last."""
    mention = group[0]
    where = side(mention.centre)
    if kind == 0:
        return f"{phrase(mention).capitalize()} can be seen {where} of the picture."
    if kind == 1:
        return f"There {verb(group)} also {listed(group)} {where}."
    if kind == 2:
        return f"{where.capitalize()}, there {verb(group)} {listed(group)}."
    if kind == 3 and before is not None:
        relation = "to the left" if mention.centre[0] < before.centre[0] else "to the right"
        name = plural(before.label) if before.number > 1 else CLASSES[before.label]
        return f"There {verb(group)} {listed(group)} {relation} of the {name}."
    if kind == PAIR:
        return f"Additionally, there {verb(group)} {listed(group)} in the scene."
    return f"{phrase(mention).capitalize()} {verb(group)} visible {where}."


def sentences(named: Sequence[Mention], place: int, rng: np.random.Generator) -> str:
    """A caption that names these, in this order."""
    remaining = list(named)

    def take(n: int) -> list[Mention]:
        group = remaining[:n]
        del remaining[:n]
        return group

    first = take(1 + int(rng.random() < 0.4))
    out = [opening(first, PLACES[place], int(rng.integers(4)))]
    view_at_end = rng.random() < 0.5
    if not view_at_end:
        out.append(VIEWS[place])
    before = first[-1] if first else None
    while remaining:
        kind = int(rng.integers(6))
        group = take(2 if kind == PAIR else 1)
        out.append(further(group, before, kind))
        before = group[-1]
    if view_at_end:
        out.append(VIEWS[place])
    if rng.random() < 0.6:
        out.append(CLOSINGS[rng.integers(len(CLOSINGS))])
    return " ".join(out)


def caption(scene: Scene, noise: Noise, rng: np.random.Generator) -> str:
    """A caption of a scene, as true as the noise lets it be."""
    return sentences(to_say(scene, noise, rng), BACKGROUNDS.index(scene.background), rng)


def true_caption(scene: Scene, seed: int, index: int) -> str:
    """The caption without noise that comes with a written scene; it names every object."""
    rng = np.random.default_rng([seed, index, 1])
    return sentences(mentions(scene), BACKGROUNDS.index(scene.background), rng)


def describe(rng: np.random.Generator) -> str:
    """A prompt for a caption."""
    is_first = rng.random() < 0.5
    return DESCRIBE[0] if is_first else DESCRIBE[rng.integers(1, len(DESCRIBE))]


def is_there(label: int, rng: np.random.Generator) -> str:
    """The question for a class, mostly in POPE's words."""
    where = "in the image" if rng.random() < 0.8 else ("in this image", "in the picture")[rng.integers(2)]
    return f"Is there {article(CLASSES[label])} {CLASSES[label]} {where}?"


RANDOM, POPULAR, ADVERSARIAL = range(3)
"""How absent objects are chosen: at random, by how often COCO shows them, or by how often with those present."""


def presence(scene: Scene, noise: Noise, rng: np.random.Generator, blind: bool = False) -> tuple[str, str]:
    """A question whether an object is there, with its answer; for half of them it is.

    Those for absent objects are random, popular and adversarial as in POPE. `blind`: all are random, so that to answer
    by how common a class is pays where there is nothing to see.
    """
    if rng.random() < 0.5 and scene.present:
        return is_there(int(rng.choice(scene.present)), rng), "Yes"
    present = list(scene.present)
    kind = RANDOM if blind else rng.integers(3)
    likely = likelihood(present)
    scores = (likely if kind == ADVERSARIAL else frequency()).copy()
    scores[present] = -1
    candidates = np.flatnonzero(scores >= 0)
    if kind != RANDOM:
        candidates = np.argsort(-scores)[: 14 if kind == POPULAR else 6]
    label = int(rng.choice(candidates))
    is_wrong = not blind and rng.random() < chance_of_yes(likely[label], noise)
    return is_there(label, rng), "Yes" if is_wrong else "No"


def attribute(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    """A question on number, place or relation: question, answer yes or no, and its group in AMBER's terms."""
    shown = mentions(scene)
    mention = shown[rng.integers(len(shown))]
    kind = rng.random()
    if kind < 0.35:
        return *number_question(mention, rng), "number"
    if kind < 0.6:
        return *place_question(scene, rng), "state"
    apart = [
        other for other in shown if abs(other.centre[0] - mention.centre[0]) > 0.1 and other.label != mention.label
    ]
    if apart and kind < 0.8:
        return *relation_question(mention, apart[rng.integers(len(apart))], rng), "relation"
    return *side_question(mention, rng), "state"


def yes_or_no(is_so: bool) -> str:
    """An answer."""
    return "Yes" if is_so else "No"


def number_question(mention: Mention, rng: np.random.Generator) -> tuple[str, str]:
    """Are there so many? Half of the time there are."""
    if rng.random() < 0.5:
        number = mention.number
    else:
        number = int(rng.choice([other for other in (1, 2, 3) if other != mention.number]))
    if number == 1:
        exactly_one = singular(mention.label).replace("a ", "one ", 1).replace("an ", "one ", 1)
        beginning = f"Is there exactly {exactly_one}"
    else:
        beginning = f"Are there {NUMBERS[number]} {plural(mention.label)}"
    return f"{beginning} in the image?", yes_or_no(number == mention.number)


def place_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Is the scene at this kind of place?"""
    is_true = rng.random() < 0.5
    place = BACKGROUNDS.index(scene.background) if is_true else int(rng.integers(len(PLACES)))
    return f"Is the scene {PLACES[place]}?", yes_or_no(BACKGROUNDS[place] == scene.background)


def relation_question(mention: Mention, other: Mention, rng: np.random.Generator) -> tuple[str, str]:
    """Is one object to the left, or to the right, of another?"""
    asks_left = bool(rng.random() < 0.5)
    is_left = mention.centre[0] < other.centre[0]
    direction = "left" if asks_left else "right"
    text = f"Is the {CLASSES[mention.label]} to the {direction} of the {CLASSES[other.label]}?"
    return text, yes_or_no(is_left == asks_left)


def side_question(mention: Mention, rng: np.random.Generator) -> tuple[str, str]:
    """Is an object on this side of the image, or in its middle?"""
    column = ("left", "middle", "right")[third(mention.centre[0])]
    is_true = rng.random() < 0.5
    in_question = column if is_true else str(rng.choice(["left", "right"]))
    where = "in the middle of the image" if in_question == "middle" else f"on the {in_question} side of the image"
    return f"Is the {CLASSES[mention.label]} {where}?", yes_or_no(in_question == column)


def question(scene: Scene, noise: Noise, rng: np.random.Generator, blind: bool = False) -> tuple[str, str]:
    """A question with its answer: mostly whether something is there. `blind`: see `presence`."""
    kind = rng.random()
    if kind < 0.75 or not scene.objects:
        prompt, answer = presence(scene, noise, rng, blind)
    elif kind < 0.9:
        prompt, answer, _ = attribute(scene, rng)
    else:
        return open_question(scene, rng)
    return prompt + (SHORT if rng.random() < 0.15 else ""), answer


def open_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """How many there are of an object, or where it is, with the answer."""
    shown = mentions(scene)
    mention = shown[rng.integers(len(shown))]
    if rng.random() < 0.5:
        return f"How many {plural(mention.label)} are in the image?", NUMBERS[mention.number].capitalize()
    return f"Where is the {CLASSES[mention.label]}?", f"{side(mention.centre).capitalize()}."


def echo(rng: np.random.Generator) -> tuple[str, str]:
    """A task without the picture: names to repeat, in the same or the opposite order."""
    labels = rng.choice(len(CLASSES), rng.integers(2, 6), replace=False)
    names = [CLASSES[label] for label in labels]
    if rng.random() < 0.5:
        return f"Repeat these words: {', '.join(names)}.", ", ".join(names)
    return f"Reverse these words: {', '.join(names)}.", ", ".join(names[::-1])


def words(text: str) -> int:
    """Number of words."""
    return len(re.findall(r"\S+", text))
