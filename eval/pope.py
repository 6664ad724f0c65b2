"""POPE: yes/no questions about objects that are, or are not, in the picture.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, arXiv 2305.10355; builder and
scorer follow the code of RUCAIBox/POPE. Evaluators in use read the same answers in different ways, so the parser is
part of every figure's name.

    questions = build_questions(ordered_objects("instances_val2014.json"), n_images=500, seed=0)
    scores = score_answers(questions, {question.id: ask(question) for question in questions})
    sums = {name: column.sum() for name, column in counts(scores).items()}
    METRICS["accuracy"](sums), METRICS["F1"](sums), METRICS["yes_ratio"](sums)
"""

from __future__ import annotations

import difflib
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np

from vlmfix.eval.chair import f1, instance_categories, ratio

Label = Literal["yes", "no"]


@dataclass(frozen=True)
class Question:
    """One question, the object it asks for and the right answer."""

    id: Hashable
    """What answers are joined by; unique among the questions that are scored together."""
    image: str
    """Name of the image file."""
    text: str
    object: str
    label: Label
    split: str
    """How the negatives were drawn: random, popular or adversarial."""


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


# How a split draws one negative: from the objects by frequency and those seen with the positive, both most frequent
# first. An empty list leaves it to chance.
_CANDIDATES: dict[str, Callable[[Sequence[str], Sequence[str]], Sequence[str]]] = {
    "random": lambda frequent, with_positive: (),
    "popular": lambda frequent, with_positive: frequent,
    "adversarial": lambda frequent, with_positive: with_positive,
}
SPLITS = tuple(_CANDIDATES)


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
            raise ValueError(f"{split!r} is no split of POPE{_near(split, SPLITS)}; there are {', '.join(SPLITS)}.")
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
    frequency = Counter(chain.from_iterable(objects for _, objects in selected))
    for name, objects in selected:
        if len(frequency) - len(objects) < k:
            raise ValueError(
                f"{name} holds {len(objects)} of the {len(frequency)} objects that the selected images have, which "
                f"leaves fewer than k = {k} to ask for in vain; lower k or give more images."
            )
    drawn = [
        (split, name, asked, label)
        for split in splits
        for name, asked, label in _draw(selected, frequency, split, k, random.Random(seed))
    ]
    return [
        Question(number, name, question_text(asked, article), asked, label, split)
        for number, (split, name, asked, label) in enumerate(drawn, start=1)
    ]


def question_text(name: str, article: Literal["correct", "official"] = "correct") -> str:
    """The question for an object. The official code puts "an" for every "a" of the question, hence "imange"."""
    if not name.startswith(tuple("aeiou")):
        return f"Is there a {name} in the image?"
    return f"Is there an {name} in the {'imange' if article == 'official' else 'image'}?"


def _draw(
    selected: Sequence[tuple[str, Sequence[str]]], frequency: Counter[str], split: str, k: int, rng: random.Random
) -> Iterable[tuple[str, str, Label]]:
    """Yield image, object and label of each question; needs `k` objects in `frequency` that are absent, per image."""
    together: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for _, objects in selected:
        for one in objects:
            together[one].update(other for other in objects if other != one)
    # Sorting is stable: objects of equal count stay in order of first appearance.
    frequent = [name for name, _ in frequency.most_common()]
    beside = {one: [name for name, _ in others.most_common()] for one, others in together.items()}
    names = list(frequency)
    for image, objects in selected:
        out = set(objects)
        for positive in objects[:k]:
            yield image, positive, "yes"
            candidates = _CANDIDATES[split](frequent, beside[positive])
            negative = next((name for name in candidates if name not in out), None)
            while negative is None or negative in out:
                negative = rng.choice(names)
            out.add(negative)
            yield image, negative, "no"


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


@dataclass(frozen=True)
class Parser:
    """One way to read an answer as yes or no, and what becomes of answers that are neither."""

    read: Callable[[str, Label], Label | None]
    """Answer and label of the question -> yes, no or None. No parser but `vcd` looks at the label."""
    unparsed: Literal["never", "wrong", "dropped"]
    """None counts as a wrong answer, or leaves every count, or does not occur."""
    rule: str
    """What it reads, in words, and whose code does so."""

    def __call__(self, answer: str, label: Label) -> Label | None:
        """Read one answer."""
        return self.read(answer, label)


def _first_sentence(answer: str) -> list[str]:
    return answer.partition(".")[0].replace(",", "").split(" ")


def _pope(answer: str, label: Label) -> Label | None:
    return "yes" if {"No", "not", "no"}.isdisjoint(_first_sentence(answer)) else "no"


def _negword(answer: str, label: Label) -> Label | None:
    words = answer.replace(".", "").replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no", "NO") or word.endswith("n't") for word in words) else "yes"


def _vcd(answer: str, label: Label) -> Label | None:
    return "yes" if (label in answer.lower()) == (label == "yes") else "no"


def _repope(answer: str, label: Label) -> Label | None:
    text = answer.lower()
    return "yes" if "yes" in text else "no" if "no" in text else None


def _lmms_eval(answer: str, label: Label) -> Label | None:
    return _yes_or_no(answer.lower().strip())


def _yes_or_no(word: str) -> Label | None:
    return "yes" if word == "yes" else "no" if word == "no" else None


def _vlmevalkit(answer: str, label: Label) -> Label | None:
    text = bare = answer.lower()
    grouped = re.search(r"\d,\d", text)
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        touches_blank = f"{sign} " in text or f" {sign}" in text
        bare = bare.replace(sign, "" if grouped or touches_blank else " ")
    words = re.sub(r"(?<!\d)\.(?!\d)", "", bare, count=32).split()
    return _either("yes" in words, "no" in words)


def _either(yes: bool, no: bool) -> Label | None:
    return None if yes == no else "yes" if yes else "no"


def _icd(answer: str, label: Label) -> Label | None:
    says_yes = not {"Yes", "yes"}.isdisjoint(_first_sentence(answer))
    return "no" if _pope(answer, label) == "no" else "yes" if says_yes else None


def _strict(answer: str, label: Label) -> Label | None:
    letters = re.search(r"[^\W\d_]+", answer)
    return _yes_or_no(letters[0].lower()) if letters else None


_HEDGES = (
    *("not sure", "unsure", "unclear", "not know", "n't know", "cannot tell", "can't tell", "cannot determine"),
    *("can't determine", "cannot be determined", "not possible to", "unable to"),
)
_NEGATIONS = ("no", "not", "none", "nothing", "cannot")


def _sentence(answer: str, label: Label) -> Label | None:
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", answer.lower())
    if words and words[0] in ("yes", "yeah", "yep"):
        return "yes"
    if words and words[0] in ("no", "nope"):
        return "no"
    if any(hedge in " ".join(words) for hedge in _HEDGES):
        return None
    return _either("yes" in words, any(word in _NEGATIONS or word.endswith("n't") for word in words))


PARSERS: dict[str, Parser] = {
    "pope": Parser(
        _pope,
        "never",
        "no if a word before the first full stop is No, not or no, else yes: POPE's evaluate.py, LLaVA, HALC",
    ),
    "negword": Parser(
        _negword, "never", "no if any word is No, not, no, NO or ends in n't, else yes: OPERA, PAI, VISTA"
    ),
    "vcd": Parser(_vcd, "never", "right if the label's letters occur anywhere, so it knows the label: VCD, cd_rethink"),
    "repope": Parser(_repope, "dropped", "the letters yes, else the letters no ('snow' is no): RePOPE"),
    "lmms_eval": Parser(_lmms_eval, "wrong", "exactly yes or no, so 'Yes.' is wrong: lmms-eval 0.7.3"),
    "vlmevalkit": Parser(_vlmevalkit, "wrong", "the word yes or the word no, not both: VLMEvalKit without a judge"),
    "icd": Parser(_icd, "dropped", "as pope, but yes needs Yes or yes: ICD"),
    "strict": Parser(_strict, "wrong", "the first word is yes or no: vlmfix"),
    "sentence": Parser(_sentence, "wrong", "first word, else a yes or a negation without a hedge: vlmfix"),
}
"""Rules for reading answers, by the name that goes with every figure."""


@dataclass(frozen=True)
class AnswerScore:
    """One answer and how it was read."""

    question: Question
    answer: str
    prediction: Label | None
    """What the answer says; None if the parser found neither yes nor no."""
    dropped: bool
    """Whether an answer that says neither leaves every count, as the parser's authors have it, or is wrong."""

    @property
    def correct(self) -> bool:
        """Whether the answer says what the label says."""
        return self.prediction == self.question.label


def score_answers(
    questions: Iterable[Question],
    answers: Mapping[Hashable, str] | Iterable[tuple[Hashable, str]],
    parser: str = "pope",
) -> list[AnswerScore]:
    """Score answers, given by question id in any order, in the order of the questions.

    Raises:
        ValueError: an unknown parser, an answer that is no text, or ids that are missing, doubled or unknown.
    """
    if parser not in PARSERS:
        raise ValueError(f"{parser!r} is no parser{_near(parser, PARSERS)}; there are {', '.join(PARSERS)}.")
    reader = PARSERS[parser]
    questions = list(questions)
    pairs = list(answers.items() if isinstance(answers, Mapping) else answers)
    answer_of = dict(pairs)
    known = {question.id for question in questions}
    for ids, what in (
        (_doubled(question.id for question in questions), "questions share their id; score each split by itself"),
        (_doubled(key for key, _ in pairs), "questions have more than one answer; keep one each"),
        ([q.id for q in questions if q.id not in answer_of], "questions have no answer; answer them or leave them out"),
        ([key for key in answer_of if key not in known], "answers belong to no question; give the questions' ids"),
        ([key for key, answer in pairs if not isinstance(answer, str)], "answers are no text; give strings"),
    ):
        if ids:
            shown = ", ".join(map(repr, ids[:10])) + (", ..." if len(ids) > 10 else "")
            raise ValueError(f"{len(ids)} {what} (ids: {shown}).")
    scores = []
    for question in questions:
        prediction = reader(answer_of[question.id], question.label)
        dropped = prediction is None and reader.unparsed == "dropped"
        scores.append(AnswerScore(question, answer_of[question.id], prediction, dropped))
    return scores


def _doubled(ids: Iterable[Hashable]) -> list[Hashable]:
    return [key for key, n in Counter(ids).items() if n > 1]


def clusters(scores: Sequence[AnswerScore]) -> list[str]:
    """The image of each entry of `counts`, in order of first appearance: the unit of resampling."""
    return list(dict.fromkeys(score.question.image for score in scores))


def counts(scores: Sequence[AnswerScore]) -> dict[str, np.ndarray]:
    """What the metrics are made of: additive counts, one float per image, in the order of `clusters`.

    `tp`, `fp`, `tn`, `fn` count answers that say yes or no, `predictions` all of these, `yes_predictions` the yes among
    them; `unknown` those that say neither and are wrong, `unknown_yes` the ones among them whose label is yes;
    `dropped` those that leave every count but `questions`.
    """
    columns: dict[str, Callable[[AnswerScore], bool]] = {
        "questions": lambda s: True,
        "predictions": lambda s: s.prediction is not None,
        "yes_predictions": lambda s: s.prediction == "yes",
        "tp": lambda s: s.prediction == "yes" and s.correct,
        "fp": lambda s: s.prediction == "yes" and not s.correct,
        "tn": lambda s: s.prediction == "no" and s.correct,
        "fn": lambda s: s.prediction == "no" and not s.correct,
        "unknown": lambda s: s.prediction is None and not s.dropped,
        "unknown_yes": lambda s: s.prediction is None and not s.dropped and s.question.label == "yes",
        "dropped": lambda s: s.dropped,
    }
    place = {image: at for at, image in enumerate(clusters(scores))}
    where = np.array([place[score.question.image] for score in scores], dtype=int)
    return {
        name: np.bincount(where, weights=[bool(count(score)) for score in scores], minlength=len(place))
        for name, count in columns.items()
    }


def _mcc(n: Mapping[str, np.ndarray]) -> np.ndarray:
    tp, fp, tn, fn = (np.asarray(n[name], dtype=float) for name in ("tp", "fp", "tn", "fn"))
    return ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


METRICS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "accuracy": lambda n: ratio(n["tp"] + n["tn"], n["questions"] - n["dropped"]),
    "precision": lambda n: ratio(n["tp"], n["tp"] + n["fp"]),
    "recall": lambda n: ratio(n["tp"], n["tp"] + n["fn"] + n["unknown_yes"]),
    "F1": lambda n: f1(n["tp"], n["tp"] + n["fp"], n["tp"] + n["fn"] + n["unknown_yes"]),
    "yes_ratio": lambda n: ratio(n["yes_predictions"], n["predictions"]),
    "MCC": _mcc,
}
"""Metric -> its value from *summed* counts (arrays of any shape); "yes" is the positive class; nan if undefined.

Wrong answers that say neither yes nor no lower accuracy and recall; precision, yes_ratio and MCC are over predictions.
"""
