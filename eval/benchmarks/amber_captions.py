"""AMBER, generative part: which objects of an annotated picture a description names, and which it makes up.

Wang et al., arXiv 2311.07397; the rule follows `inference.py` of junyangwang0410/AMBER. Its figures depend on a tagger
that finds the nouns and on word vectors that tell how similar two words are, so both belong to their name.

    items = load()                                                          # image, prompt, annotated objects
    scores = score(items, nltk_nouns(captions), "spacy:en_core_web_lg")     # the official back-ends
    sums = {name: column.sum() for name, column in counts(scores).items()}
    METRICS["CHAIR"](sums), METRICS["Cover"](sums), METRICS["Hal"](sums), METRICS["Cog"](sums)

With similarity "off" only equal words match, nothing needs to be installed, and the figures are not AMBER's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.eval.benchmarks.amber import Amber
from vlmfix.eval.benchmarks.amber import entries as amber_entries
from vlmfix.eval.benchmarks.benchmark import Benchmark, Figure, FileAnswers, Group, Item
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import yesno
from vlmfix.eval.scorers.stats import ratio
from vlmfix.eval.scorers.yesno import add_up

_FILES = files("vlmfix.assets") / "amber"
_SIMILAR = 0.8  # two words are taken for one above this

Similarity = Callable[[str, str], float]
"""How similar two words are: 1 for the same meaning."""


@dataclass(frozen=True)
class DescribedPicture:
    """A picture, what to ask, and which objects are there or are likely to be made up."""

    id: int
    image: str
    prompt: str
    truth: tuple[str, ...]
    """Objects in the picture; some stand twice."""
    hallu: tuple[str, ...]
    """Absent objects that a model, like a human, may expect here."""


@cache
def load() -> tuple[DescribedPicture, ...]:
    """The 1,004 pictures with the prompt as published."""
    return tuple(
        DescribedPicture(entry["id"], entry["image"], entry["query"], tuple(entry["truth"]), tuple(entry["hallu"]))
        for entry in amber_entries()
        if entry["type"] == "generative"
    )


@cache
def _associations() -> Mapping[str, list[str]]:
    return json.loads((_FILES / "relation.json").read_text("utf-8"))


@cache
def _vocabulary() -> frozenset[str]:
    """Nouns that count at all."""
    return frozenset(_associations()).union(*_associations().values())


@cache
def _safe_words() -> frozenset[str]:
    return frozenset((_FILES / "safe_words.txt").read_text("utf-8").split("\n"))


@dataclass(frozen=True)
class DescriptionScore:
    """The nouns of one caption, sorted."""

    item: DescribedPicture
    nouns: tuple[str, ...]
    """Those in the vocabulary of the benchmark, every naming."""
    hallucinated: tuple[str, ...]
    """Those of them that stand for no object in the picture."""
    covered: frozenset[int]
    """Which of `item.truth` the caption names."""
    hit: frozenset[int]
    """Which of `item.hallu` it names."""


def score(
    items: Iterable[DescribedPicture], nouns: Mapping[int, Sequence[str]], similarity: str | Similarity = "off"
) -> list[DescriptionScore]:
    """Score captions, given as their nouns by id (see `nltk_nouns`), in the order of the items.

    Args:
        items: what to score; leave out items without caption.
        nouns: every noun of each caption, in order, singular.
        similarity: "off" (equal words only), "spacy:<model>" (official: en_core_web_lg), or a function of two words.

    Raises:
        ValueError: an unknown or missing similarity, or ids that are missing, doubled or unknown.
    """
    items = list(items)
    ids = [item.id for item in items]
    if len(set(ids)) < len(ids) or set(ids) != set(nouns):
        raise ValueError(
            f"{len(ids)} items with {len(set(ids))} ids, {len(nouns)} captions, {len(set(ids) & set(nouns))} ids in "
            "common; give each item once, with the nouns of its caption."
        )
    alike = _similarity(similarity)
    return [_score(item, nouns[item.id], alike) for item in items]


def explain(score: DescriptionScore) -> dict[str, object]:
    """Every verdict on one caption, ready for JSON."""
    truth, hallu = score.item.truth, score.item.hallu
    return {
        "id": score.item.id,
        "image": score.item.image,
        "nouns": list(score.nouns),
        "hallucinated": list(score.hallucinated),
        "covered": [truth[place] for place in sorted(score.covered)],
        "hit": [hallu[place] for place in sorted(score.hit)],
    }


def _score(item: DescribedPicture, nouns: Sequence[str], alike: Similarity) -> DescriptionScore:
    truth, hallu = _candidates(item.truth), _candidates(item.hallu)
    kept = tuple(noun for noun in nouns if noun in _vocabulary())
    hallucinated: list[str] = []
    covered: set[int] = set()
    hit: set[int] = set()
    for noun in kept:
        if noun in _safe_words():
            continue
        named = _first(truth, noun, _equal)
        if not named:
            hit |= _first(hallu, noun, _equal) | _first(hallu, noun, alike)
            named = _first(truth, noun, alike)
        covered |= named
        if not named:
            hallucinated.append(noun)
    return DescriptionScore(item, kept, tuple(hallucinated), frozenset(covered), frozenset(hit))


def _candidates(objects: Sequence[str]) -> list[tuple[str, int]]:
    """Words that stand for an object, with its place: those associated with any object come before the objects."""
    associated: list[tuple[str, int]] = []
    for place, name in enumerate(objects):
        associated += [(word, place) for word in _associations().get(name, ())]
    return associated + [(name, place) for place, name in enumerate(objects)]


def _first(candidates: Sequence[tuple[str, int]], noun: str, alike: Similarity) -> set[int]:
    """Place of the object that the first fitting candidate stands for, if any fits."""
    return next(({place} for word, place in candidates if alike(noun, word) > _SIMILAR), set())


def _equal(word: str, other: str) -> float:
    return float(word == other)


def _similarity(similarity: str | Similarity) -> Similarity:
    if callable(similarity):
        return similarity
    kind, _, model = similarity.partition(":")
    if similarity == "off":
        return _equal
    if kind == "spacy" and model:
        return _spacy(model)
    raise ValueError(f"{similarity!r} is no similarity; give 'off', 'spacy:<model>' or a function of two words.")


def _spacy(model: str) -> Similarity:
    try:
        import spacy

        parsed = cache(spacy.load(model))
    except (ImportError, OSError) as error:
        raise ValueError(
            f"similarity 'spacy:{model}' needs spaCy and that model ({error}); run 'pip install spacy' and "
            f"'python -m spacy download {model}', or take similarity 'off'."
        ) from error
    return cache(lambda word, other: float(parsed(word).similarity(parsed(other))))  # 0 for words without a vector


def nltk_nouns(captions: Mapping[int, str]) -> dict[int, list[str]]:
    """Nouns of each caption as the official script finds them: tokens tagged NN*, as lemmas, not lower-cased.

    Raises:
        ValueError: NLTK or its data is missing.
    """
    try:
        import nltk
        from nltk.stem import WordNetLemmatizer

        lemma = WordNetLemmatizer().lemmatize
        return {
            key: [lemma(word) for word, tag in nltk.pos_tag(nltk.word_tokenize(text)) if tag.startswith("NN")]
            for key, text in captions.items()
        }
    except (ImportError, LookupError) as error:
        raise ValueError(
            "nouns by NLTK need it and its data; run 'pip install nltk' and 'python -m nltk.downloader punkt_tab "
            "averaged_perceptron_tagger_eng wordnet', or give the nouns yourself."
        ) from error


def clusters(scores: Sequence[DescriptionScore]) -> list[str]:
    """The image of each entry of `counts`: the unit of resampling."""
    return list(dict.fromkeys(score.item.image for score in scores))


def counts(scores: Sequence[DescriptionScore]) -> dict[str, np.ndarray]:
    """What the metrics are made of: additive counts, one float per image, in the order of `clusters`."""
    columns: dict[str, Callable[[DescriptionScore], int]] = {
        "captions": lambda s: 1,
        "hallucinated_captions": lambda s: bool(s.hallucinated),
        "nouns": lambda s: len(s.nouns),
        "hallucinated_nouns": lambda s: len(s.hallucinated),
        "truth": lambda s: len(s.item.truth),
        "covered": lambda s: len(s.covered),
        "hallu": lambda s: len(s.item.hallu),
        "hit": lambda s: len(s.hit),
    }
    place_of = {image: place for place, image in enumerate(clusters(scores))}
    places = [place_of[score.item.image] for score in scores]
    return {name: add_up(places, [count(score) for score in scores], len(place_of)) for name, count in columns.items()}


METRICS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "CHAIR": lambda n: ratio(n["hallucinated_nouns"], n["nouns"]),
    "Cover": lambda n: ratio(n["covered"], n["truth"]),
    "Hal": lambda n: ratio(n["hallucinated_captions"], n["captions"]),
    "Cog": lambda n: ratio(n["hit"], n["hallu"]),
}
"""Metric -> its value from *summed* counts, in [0, 1], nan if undefined. Lower is better for all but Cover."""


def official_figures(scores: Sequence[DescriptionScore]) -> dict[str, float]:
    """Percentages as the official script prints them: 0.001 added to every denominator, one decimal."""
    n = {name: float(column.sum()) for name, column in counts(scores).items()}
    return {
        "CHAIR": round(n["hallucinated_nouns"] / (n["nouns"] + 0.001) * 100, 1),
        "Cover": round(n["covered"] / (n["truth"] + 0.001) * 100, 1),
        "Hal": round(100 - (n["captions"] - n["hallucinated_captions"]) / (n["captions"] + 0.001) * 100, 1),
        "Cog": round(n["hit"] / (n["hallu"] + 0.001) * 100, 1),
    }


class AmberCaptions(Benchmark):
    """AMBER, one description a picture, with the objects that the tagger of NLTK finds in it."""

    name = "amber_captions"
    figures: ClassVar[Mapping[str, Figure]] = {
        "CHAIR": Figure(METRICS["CHAIR"], "nouns that name what is not there", "less"),
        "Cover": Figure(METRICS["Cover"], "objects in the pictures that are named", "more"),
        "Hal": Figure(METRICS["Hal"], "descriptions that name anything that is not there", "less"),
        "Cog": Figure(METRICS["Cog"], "absent objects that one may expect there, named", "less"),
    }
    max_new_tokens = 512
    describes = True
    where = Amber.where
    scoring_option = "similarity"
    file_options = ("similarity", "key")

    def __init__(self, scoring: str = "off", prompt: str = "{question}") -> None:
        if scoring != "off" and not scoring.startswith("spacy:"):
            raise ValueError(
                f"similarity: expected off or spacy:<model>, such as spacy:en_core_web_lg, got {scoring!r}"
            )
        super().__init__(scoring, prompt)
        if scoring == "off":
            self.notes.append("only equal words match (similarity off), so these are not the figures of AMBER's paper")

    @property
    def title(self) -> str:
        """The benchmark, and what its figures depend on."""
        return f"AMBER captions (nouns nltk, similarity {self.scoring})"

    @property
    def facts(self) -> dict[str, Any]:
        """What finds the nouns, and what takes two for one."""
        return {"nouns": "nltk", "similarity": self.scoring}

    def items(self, data: Data) -> list[Item]:
        """One description a picture."""
        return [
            Item(str(picture.id), str(data.picture(picture.image)), self.prompt.replace("{question}", picture.prompt))
            for picture in load()[: data.limit]
        ]

    def score(self, data: Data, answers: Mapping[str, str]) -> list[Group]:
        """Counts per picture. `ValueError` without NLTK and its data."""
        described = [picture for picture in load()[: data.limit] if str(picture.id) in answers]
        return [self._group(described, answers)]

    def _group(self, described: Sequence[DescribedPicture], descriptions: Mapping[str, str]) -> Group:
        nouns = nltk_nouns({picture.id: descriptions[str(picture.id)] for picture in described})
        scores = score(described, nouns, self.scoring)
        return Group("", clusters(scores), counts(scores), scores)

    def explain(self, score: DescriptionScore) -> dict[str, object]:
        """The nouns, and which of them stand for an object."""
        return explain(score)

    def read(self, path: Path) -> FileAnswers:
        """Descriptions of some of the pictures or of all. Answers to questions in the same file are passed over."""
        picture_of = {str(picture.id): picture for picture in load()}
        entries = yesno.read_answers(path, key=self.options.key if self.options else None)
        question_ids = {str(entry["id"]) for entry in amber_entries()}
        unknown = [entry.id for entry in entries if str(entry.id) not in question_ids]
        if unknown:
            raise ValueError(f"{yesno.listed(unknown, 'entries belong to nothing in AMBER, ids 1 to 15220')}.")
        described = [entry for entry in entries if str(entry.id) in picture_of]
        if not described:
            raise ValueError(f"{len(entries)} entries, none of them describes one of AMBER's pictures, ids 1 to 1004.")
        doubled = yesno.doubled(str(entry.id) for entry in described)
        if doubled:
            raise ValueError(f"{yesno.listed(doubled, 'pictures are described more than once; keep one each')}.")
        without_text = [entry.id for entry in described if entry.text is None]
        if without_text:
            raise ValueError(f"{yesno.listed(without_text, 'pictures have no description; give texts')}.")
        descriptions = {str(entry.id): entry.text or "" for entry in described}
        remarks = []
        if len(descriptions) < len(picture_of):
            remarks.append(f"{len(descriptions)} of {len(picture_of)} pictures are described")
        group = self._group([picture_of[key] for key in descriptions], descriptions)
        records = [{"id": key, "text": text} for key, text in descriptions.items()]
        return FileAnswers(records, [group], remarks)
