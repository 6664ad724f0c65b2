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


@dataclass(frozen=True)
class Mention:
    """An object as a caption names it."""

    label: int
    number: int
    centre: tuple[float, float]
    """Across and down, 0 to 1."""


def one(label: int) -> str:
    """A class with its article."""
    name = CLASSES[label]
    return SINGULARS.get(name) or f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def many(label: int) -> str:
    """A class in the plural."""
    name = CLASSES[label]
    return PLURALS.get(name) or name + ("es" if name.endswith(("s", "ch", "sh")) else "s")


def phrase(mention: Mention) -> str:
    """`a dog`, `three dogs`."""
    return one(mention.label) if mention.number == 1 else f"{NUMBERS[mention.number]} {many(mention.label)}"


def side(centre: tuple[float, float]) -> str:
    """Where in the picture, in words."""
    column, row = (("left", "", "right")[min(2, int(3 * centre[0]))], ("top", "", "bottom")[min(2, int(3 * centre[1]))])
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
    ordered = sorted(groups.items(), key=lambda item: -sum(p.area for p in item[1]))
    return [Mention(c, min(len(g), 6), max(g, key=lambda p: p.area).centre) for c, g in ordered]


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
    return noise.flipped * float(np.clip((likely - noise.flipped_from) / (noise.flipped_to - noise.flipped_from), 0, 1))


def to_say(scene: Scene, noise: Noise, rng: np.random.Generator) -> list[Mention]:
    """What a caption names, in order: objects by visible area with some disorder, then what it invents."""
    area = {p.label: 0 for p in scene.objects}
    for placed in scene.objects:
        area[placed.label] += placed.area
    there = sorted(mentions(scene), key=lambda m: -area[m.label] * np.exp(rng.normal(0, 0.4)))
    said = [m for m in there if area[m.label] >= 40 or rng.random() >= noise.dropped][:6] or there[:1]
    wanted = int(rng.integers(3, 7))
    places = [int(rng.integers((len(said) + 1) // 2, len(said) + 1))] if rng.random() < noise.inserted else []
    places += [-1] * sum(rng.random() < noise.filled for _ in range(max(0, wanted - len(said) - len(places))))
    for place in places:
        label = absent(scene.present, [m.label for m in said], rng)
        number = 1 if rng.random() < 0.8 else 2
        invented = Mention(label, number, (float(rng.random()), float(rng.random())))
        said.insert(len(said) if place < 0 else place, invented)
    return said


def sentences(said: Sequence[Mention], place: int, rng: np.random.Generator) -> str:
    """A caption that names these, in this order."""
    where, rest = PLACES[place], list(said)

    def take(n: int) -> list[Mention]:
        taken = rest[:n]
        del rest[:n]
        return taken

    def listed(taken: Sequence[Mention]) -> str:
        return " and ".join(phrase(m) for m in taken)

    def verb(taken: Sequence[Mention]) -> str:
        return "are" if len(taken) > 1 or taken[0].number > 1 else "is"

    first = take(1 + int(rng.random() < 0.4))
    opener = int(rng.integers(4))
    begin = (
        f"The image shows {listed(first)} {where}.",
        f"The image features {listed(first)} {where}.",
        f"In the image, there {verb(first)} {listed(first)} {where}." if first else f"The image is {where}.",
        f"The scene takes place {where}, with {listed(first)}.",
    )
    out = [begin[opener] if first else f"The image shows a scene {where}."]
    late = rng.random() < 0.5
    if not late:
        out.append(VIEWS[place])
    before = first[-1] if first else None
    while rest:
        kind = int(rng.integers(6))
        taken = take(2 if kind == 4 and len(rest) > 1 else 1)
        m = taken[0]
        if kind == 0:
            out.append(f"{phrase(m).capitalize()} can be seen {side(m.centre)} of the picture.")
        elif kind == 1:
            out.append(f"There {verb(taken)} also {listed(taken)} {side(m.centre)}.")
        elif kind == 2:
            out.append(f"{side(m.centre).capitalize()}, there {verb(taken)} {listed(taken)}.")
        elif kind == 3 and before is not None:
            relation = "to the left" if m.centre[0] < before.centre[0] else "to the right"
            name = many(before.label) if before.number > 1 else CLASSES[before.label]
            out.append(f"There {verb(taken)} {listed(taken)} {relation} of the {name}.")
        elif kind == 4:
            out.append(f"Additionally, there {verb(taken)} {listed(taken)} in the scene.")
        else:
            out.append(f"{phrase(m).capitalize()} {verb(taken)} visible {side(m.centre)}.")
        before = taken[-1]
    if late:
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
    return DESCRIBE[0 if rng.random() < 0.5 else rng.integers(1, len(DESCRIBE))]


def is_there(label: int, rng: np.random.Generator) -> str:
    """The question for a class, mostly in POPE's words."""
    article = "an" if CLASSES[label][0] in "aeiou" else "a"
    where = "in the image" if rng.random() < 0.8 else ("in this image", "in the picture")[rng.integers(2)]
    return f"Is there {article} {CLASSES[label]} {where}?"


def presence(scene: Scene, noise: Noise, rng: np.random.Generator, blind: bool = False) -> tuple[str, str]:
    """A question whether an object is there, with its answer; for half of them it is.

    Those for absent objects are random, popular and adversarial as in POPE. `blind`: all are random, so that to answer
    by how common a class is pays where there is nothing to see.
    """
    if rng.random() < 0.5 and scene.present:
        return is_there(int(rng.choice(scene.present)), rng), "Yes"
    here = list(scene.present)
    kind = 0 if blind else rng.integers(3)
    likely = likelihood(here)
    scores = (likely if kind == 2 else frequency()).copy()
    scores[here] = -1
    missing = np.flatnonzero(scores >= 0)
    if kind:
        missing = np.argsort(-scores)[: 14 if kind == 1 else 6]
    asked = int(rng.choice(missing))
    wrong = not blind and rng.random() < chance_of_yes(likely[asked], noise)
    return is_there(asked, rng), "Yes" if wrong else "No"


def attribute(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    """A question on number, place or relation: question, answer yes or no, and its group in AMBER's terms."""
    here = mentions(scene)
    m = here[rng.integers(len(here))]
    kind = rng.random()
    if kind < 0.35:
        asked = m.number if rng.random() < 0.5 else int(rng.choice([n for n in (1, 2, 3) if n != m.number]))
        said = f"Is there {one(m.label)}" if asked == 1 else f"Are there {NUMBERS[asked]} {many(m.label)}"
        if asked == 1:
            said = f"Is there exactly {one(m.label).replace('a ', 'one ', 1).replace('an ', 'one ', 1)}"
        return f"{said} in the image?", "Yes" if asked == m.number else "No", "number"
    if kind < 0.6:
        asked = BACKGROUNDS.index(scene.background) if rng.random() < 0.5 else int(rng.integers(len(PLACES)))
        return f"Is the scene {PLACES[asked]}?", "Yes" if BACKGROUNDS[asked] == scene.background else "No", "state"
    others = [o for o in here if abs(o.centre[0] - m.centre[0]) > 0.1 and o.label != m.label]
    if others and kind < 0.8:
        o = others[rng.integers(len(others))]
        left = bool(rng.random() < 0.5)
        right = (m.centre[0] < o.centre[0]) == left
        text = f"Is the {CLASSES[m.label]} to the {'left' if left else 'right'} of the {CLASSES[o.label]}?"
        return text, "Yes" if right else "No", "relation"
    column = ("left", "middle", "right")[min(2, int(3 * m.centre[0]))]
    asked_side = column if rng.random() < 0.5 else str(rng.choice(["left", "right"]))
    text = f"Is the {CLASSES[m.label]} on the {asked_side} side of the image?"
    if asked_side == "middle":
        text = f"Is the {CLASSES[m.label]} in the middle of the image?"
    return text, "Yes" if asked_side == column else "No", "state"


def question(scene: Scene, noise: Noise, rng: np.random.Generator, blind: bool = False) -> tuple[str, str]:
    """A question with its answer: mostly whether something is there. `blind`: see `presence`."""
    kind = rng.random()
    if kind < 0.75 or not scene.objects:
        asked, answer = presence(scene, noise, rng, blind)
    elif kind < 0.9:
        asked, answer, _ = attribute(scene, rng)
    else:
        here = mentions(scene)
        m = here[rng.integers(len(here))]
        if rng.random() < 0.5:
            return f"How many {many(m.label)} are in the image?", NUMBERS[m.number].capitalize()
        return f"Where is the {CLASSES[m.label]}?", f"{side(m.centre).capitalize()}."
    return asked + (SHORT if rng.random() < 0.15 else ""), answer


def echo(rng: np.random.Generator) -> tuple[str, str]:
    """A task without the picture: names to repeat, in the same or the opposite order."""
    names = [CLASSES[k] for k in rng.choice(len(CLASSES), rng.integers(2, 6), replace=False)]
    if rng.random() < 0.5:
        return f"Repeat these words: {', '.join(names)}.", ", ".join(names)
    return f"Reverse these words: {', '.join(names)}.", ", ".join(names[::-1])


def words(text: str) -> int:
    """Number of words."""
    return len(re.findall(r"\S+", text))
