"""Captions against ground truth: verdicts, counts and figures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmfix.eval.scorers.chair.captions import mentions
from vlmfix.eval.scorers.chair.coco import image_key
from vlmfix.eval.scorers.chair.truth import GroundTruth, first_few, label
from vlmfix.eval.scorers.chair.vocabulary import Mention, Vocabulary, coco_vocabulary
from vlmfix.eval.scorers.stats import f1, ratio


@dataclass(frozen=True)
class CaptionScore:
    """One caption against the objects of its image. Figures of a single caption are 0 where they are undefined."""

    image_id: int
    caption: str
    mentions: tuple[Mention, ...]
    truth: frozenset[str]
    variant: str = "rohrbach"
    """How the caption was read, as `label` puts it."""

    @property
    def hallucinated(self) -> tuple[Mention, ...]:
        """The mentions of objects that are not in the image."""
        return tuple(mention for mention in self.mentions if mention.node not in self.truth)

    @property
    def objects(self) -> frozenset[str]:
        """The objects named, each once."""
        return frozenset(mention.node for mention in self.mentions)

    @property
    def missed(self) -> frozenset[str]:
        """The image's objects that are not named."""
        return self.truth - self.objects

    @property
    def words(self) -> int:
        """Length of the caption in white-space separated words."""
        return len(self.caption.split())

    @property
    def repeated(self) -> bool:
        """Whether more than a fifth of the caption's 4-grams of lower-case words are repeats of others."""
        words = self.caption.lower().split()
        four_grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
        return bool(four_grams) and 1 - len(set(four_grams)) / len(four_grams) > 0.2

    @property
    def chair_s(self) -> int:
        """1 if any mention is hallucinated, else 0."""
        return int(bool(self.hallucinated))

    @property
    def chair_i(self) -> float:
        """Share of the mentions that are hallucinated."""
        return len(self.hallucinated) / max(len(self.mentions), 1)

    @property
    def recall(self) -> float:
        """Share of the image's objects that are named."""
        return len(self.objects & self.truth) / max(len(self.truth), 1)

    @property
    def precision(self) -> float:
        """Share of the objects named that are in the image."""
        return len(self.objects & self.truth) / max(len(self.objects), 1)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * len(self.objects & self.truth) / max(len(self.objects) + len(self.truth), 1)


def score_captions(
    captions: Iterable[tuple[int | str | os.PathLike[str], str]] | Mapping[Any, str],
    truth: Mapping[int, frozenset[str]],
    vocabulary: Vocabulary | None = None,
    variant: str = "rohrbach",
    several: bool = False,
) -> list[CaptionScore]:
    """Score captions, given with their images (anything `image_key` takes) as pairs or as a dictionary, in order. An
    empty caption counts.

    Raises:
        ValueError: a caption is no text, an image comes twice (unless it may, by `several`), or the ground truth does
            not cover it, was made with another variant, or names objects outside the vocabulary.
    """
    variant_label = label(variant, truth)
    vocabulary = vocabulary or coco_vocabulary()
    given = captions.items() if isinstance(captions, Mapping) else captions
    pairs = [(image_key(image), caption) for image, caption in given]
    for key, caption in pairs:
        if not isinstance(caption, str):
            raise ValueError(f"the caption of image {key} is {type(caption).__name__}; expected text.")
    keys = [key for key, _ in pairs]
    _check_images(list(dict.fromkeys(keys)) if several else keys, truth, vocabulary)
    scores = []
    for key, caption in pairs:
        named = tuple(mentions(caption, vocabulary, variant))
        scores.append(CaptionScore(key, caption, named, truth[key], variant_label))
    return scores


def _check_images(keys: Sequence[int], truth: Mapping[int, frozenset[str]], vocabulary: Vocabulary) -> None:
    """ValueError unless each image comes once and the ground truth has it, in words of the vocabulary."""
    doubled = [key for key, number in Counter(keys).items() if number > 1]
    if doubled:
        raise ValueError(f"{len(doubled)} images have more than one caption ({first_few(doubled)}); give one each.")
    unknown = [key for key in keys if key not in truth]
    if unknown:
        covered = f"{len(truth)} images, {min(truth)} to {max(truth)}" if truth else "no image"
        source = f" ({truth.source})" if isinstance(truth, GroundTruth) else ""
        raise ValueError(
            f"{len(unknown)} of {len(keys)} images have no ground truth ({first_few(unknown)}); "
            f"it covers {covered}{source}. "
            "Load the split that holds them, or make theirs with ground_truth(instances, captions)."
        )
    nodes = frozenset().union(*(truth[key] for key in keys))
    foreign = sorted(nodes.difference(vocabulary.nodes))
    if foreign:
        raise ValueError(
            f"the ground truth names {len(foreign)} objects that are not in the vocabulary ({first_few(foreign)}); "
            "give the vocabulary that it was made with."
        )


def explain(score: CaptionScore) -> dict[str, Any]:
    """Every verdict on one caption, ready for JSON: each mention and where it stands, and the objects left unnamed.

    `start` and `end` count characters of the caption (end excluded), `token` the tokens before the mention.
    """
    verdicts = []
    for mention in score.mentions:
        verdicts.append(
            {
                "text": score.caption[mention.start : mention.end],
                "start": mention.start,
                "end": mention.end,
                "token": mention.index,
                "synonym": mention.word,
                "node": mention.node,
                "verdict": "present" if mention.node in score.truth else "invented",
            }
        )
    return {
        "image_id": score.image_id,
        "variant": score.variant,
        "caption": score.caption,
        "mentions": verdicts,
        "missed": sorted(score.missed),
    }


def clusters(scores: Sequence[CaptionScore]) -> list[int]:
    """The image of each entry of `counts`, each once: the unit of resampling."""
    return list(dict.fromkeys(score.image_id for score in scores))


def counts(scores: Sequence[CaptionScore]) -> dict[str, np.ndarray]:
    """What the metrics are made of: additive counts, one float per image, in the order of `clusters`.

    Raises:
        ValueError: the captions were read by different variants.
    """
    variants = {score.variant for score in scores}
    if len(variants) > 1:
        raise ValueError(
            f"scores of different variants do not add up ({', '.join(sorted(variants))}); keep them apart."
        )
    columns: dict[str, Callable[[CaptionScore], float]] = {
        "captions": lambda score: 1,
        "hallucinated_captions": lambda score: score.chair_s,
        "mentions": lambda score: len(score.mentions),
        "hallucinated_mentions": lambda score: len(score.hallucinated),
        "unique_mentions": lambda score: len(score.objects),
        "true_unique": lambda score: len(score.objects & score.truth),
        "truth": lambda score: len(score.truth),
        "words": lambda score: score.words,
        "repeated": lambda score: score.repeated,
    }
    images = clusters(scores)
    place_of = {image: place for place, image in enumerate(images)}
    places = np.array([place_of[score.image_id] for score in scores], dtype=int)
    table = {}
    for name, count in columns.items():
        values = np.array([count(score) for score in scores], dtype=float)
        table[name] = np.bincount(places, weights=values, minlength=len(images)).astype(float)
    return table


METRICS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "CHAIR_S": lambda n: ratio(n["hallucinated_captions"], n["captions"]),
    "CHAIR_I": lambda n: ratio(n["hallucinated_mentions"], n["mentions"]),
    "recall": lambda n: ratio(n["true_unique"], n["truth"]),
    "precision": lambda n: ratio(n["true_unique"], n["unique_mentions"]),
    "F1": lambda n: f1(n["true_unique"], n["unique_mentions"], n["truth"]),
    "CHAIR_I_unique": lambda n: ratio(n["unique_mentions"] - n["true_unique"], n["unique_mentions"]),
    "words": lambda n: ratio(n["words"], n["captions"]),
    "repetition": lambda n: ratio(n["repeated"], n["captions"]),
}
"""Metric -> its value from *summed* counts (arrays of any shape): a share, for `words` a mean; nan where undefined.

Shares of mentions (CHAIR_I) and of captions (CHAIR_S, repetition) follow Rohrbach et al.; recall, precision, F1 and
CHAIR_I_unique count each object once per caption (LALBJ/PAI, `eval_script`).
"""
