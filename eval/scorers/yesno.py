"""Yes/no questions about pictures: reading files, reading answers, joining the two, and the figures.

All yes/no benchmarks are scored here; `pope`, `amber`, `mme`, `hallusion` and `dash` add their questions, groups and
figures of their own. Evaluators in use read the same answers in different ways, so the parser is part of every
figure's name.

    questions = read_questions("questions.jsonl")
    scores = score_answers(questions, read_answers("answers.jsonl"), "strict")
    for group, part in by_group(scores).items():
        sums = {name: column.sum() for name, column in counts(part).items()}
        METRICS["accuracy"](sums), METRICS["F1"](sums), METRICS["yes_ratio"](sums)
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any, Literal

import numpy as np

from vlmfix.eval.scorers.chair import f1, ratio
from vlmfix.eval.scorers.reading import read_records, shown

Label = Literal["yes", "no"]


@dataclass(frozen=True)
class Question:
    """One question and the right answer."""

    id: Hashable
    """What answers are joined by; unique among the questions that are scored together."""
    image: str
    """Name of the image file; empty if there is none."""
    text: str
    object: str
    """What is asked for, empty if the benchmark does not say."""
    label: Label
    group: str = ""
    """Part of the benchmark with figures of its own: POPE's split, MME's task, ..."""
    pair: Hashable | None = None
    """Questions of one group with the same value belong together: a pair is right if all of its answers are."""

    @property
    def split(self) -> str:
        """POPE's word for the group: how the negatives were drawn."""
        return self.group


@dataclass(frozen=True)
class Answer:
    """What a model said to one question."""

    id: Hashable
    """The id of the question."""
    text: str | None = None
    margin: float | None = None
    """log p(yes) - log p(no) of the first generated token, natural logarithm; None if it was not measured."""
    question: str = ""
    """The question or prompt as it was asked, if known; must contain the question's text, or be part of it."""
    image: str = ""
    """The image that was shown, if known."""


Answers = Mapping[Hashable, str] | Iterable[tuple[Hashable, str]] | Iterable[Answer]
"""Answers by question id: a mapping, pairs, or `Answer`s with what else is known of them; in any order."""


# Files

ANSWER_KEYS = ("answer", "text", "response", "model_prediction")
"""Keys that the text of an answer is looked for under; an entry may have only one of them."""


def text_field(record: Mapping[str, Any], where: str, name: str) -> str:
    """The text under a key of a record. Raises ValueError if there is none."""
    value = record.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{where} has {shown(value)} under {name!r}; expected text.")
    return value


def id_field(record: Mapping[str, Any], where: str, *names: str) -> int | str:
    """The id under the first of these keys that a record has. Raises ValueError if it is neither number nor text."""
    value = next((record[name] for name in names if name in record), None)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{where} has {shown(value)} as {' or '.join(names)}; expected a whole number or text.")
    return value


def label_field(record: Mapping[str, Any], where: str, name: str) -> Label:
    """The label under a key of a record. Raises ValueError if it is neither yes nor no."""
    label = _yes_or_no(text_field(record, where, name).strip().lower())
    if label is None:
        raise ValueError(f"{where} has {shown(record[name])} under {name!r}; expected yes or no.")
    return label


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Questions of one's own: `{"id", "image", "question", "label", "group"?, "pair"?}`, formats as `read_records`.

    Raises:
        ValueError: a line lacks a key or holds something else under it, an id stands twice, or a pair has one question.
    """
    questions = [
        Question(
            id=id_field(record, where, "id"),
            image=text_field(record, where, "image"),
            text=text_field(record, where, "question"),
            object="",
            label=label_field(record, where, "label"),
            group="" if record.get("group") is None else str(id_field(record, where, "group")),
            pair=None if record.get("pair") is None else id_field(record, where, "pair"),
        )
        for where, record in read_records(path)
    ]
    check_ids(questions)
    members = Counter((question.group, question.pair) for question in questions if question.pair is not None)
    if single := [pair for (_, pair), n in members.items() if n == 1]:
        raise ValueError(f"{path}: {_listed(single, 'pairs have one question only; leave pair out there', 'pairs')}.")
    return questions


def read_answers(path: str | os.PathLike[str], *, key: str | None = None, id_keys: Sequence[str] = ()) -> list[Answer]:
    """Answers with the id under `question_id` or `id`, in the formats of `read_records`.

    An entry that has all of `id_keys` has their values as its id, joined by slashes. The text stands under `key`, or if
    that is None under one of `ANSWER_KEYS`. Where given, `question` or `prompt` and `image` are kept for the join, and
    `margin` (log p(yes) - log p(no), natural logarithm), or the probabilities `p_yes` and `p_no`, for `score_margins`.

    Raises:
        ValueError: a line has no id, neither text nor margin, text under several keys, or a value of the wrong kind.
    """
    return [_read_answer(record, where, key, id_keys) for where, record in read_records(path)]


def _read_answer(record: Mapping[str, Any], where: str, key: str | None, id_keys: Sequence[str]) -> Answer:
    names = [name for name in ((key,) if key else ANSWER_KEYS) if name in record]
    margin = _read_margin(record, where)
    if len(names) > 1:
        raise ValueError(f"{where} has {' and '.join(names)}; say which is the answer, as in key={names[0]!r}.")
    if not names and margin is None:
        wanted = key or f"{', '.join(ANSWER_KEYS[:-1])} or {ANSWER_KEYS[-1]}"
        raise ValueError(f"{where} has no {wanted} and no margin; expected an answer.")
    image = record.get("image")
    return Answer(
        id=_answer_id(record, where, id_keys),
        text=text_field(record, where, names[0]) if names else None,
        margin=margin,
        question=next((record[name] for name in ("question", "prompt") if isinstance(record.get(name), str)), ""),
        image="" if image is None else str(id_field(record, where, "image")),
    )


def _answer_id(record: Mapping[str, Any], where: str, id_keys: Sequence[str]) -> int | str:
    if id_keys and record.keys() >= set(id_keys):
        return "/".join(str(id_field(record, where, name)) for name in id_keys)
    return id_field(record, where, "question_id", "id")


def _read_margin(record: Mapping[str, Any], where: str) -> float | None:
    if record.get("margin") is not None:
        return _number(record, where, "margin")
    given = [name for name in ("p_yes", "p_no") if record.get(name) is not None]
    if not given:
        return None
    if len(given) == 1:
        raise ValueError(f"{where} has {given[0]} alone; give p_yes and p_no, or margin = log p(yes) - log p(no).")
    yes, no = (_number(record, where, name) for name in given)
    if not (0 <= yes <= 1 and 0 <= no <= 1 and yes + no > 0):
        raise ValueError(f"{where} has p_yes {yes} and p_no {no}; expected probabilities, not both 0.")
    return float(np.log(yes) - np.log(no)) if yes and no else math.inf if yes else -math.inf


def _number(record: Mapping[str, Any], where: str, name: str) -> float:
    value = record[name]
    if not _is_number(value):
        raise ValueError(f"{where} has {shown(value)} under {name!r}; expected a number.")
    return float(value)


# Parsers


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


def _amber(answer: str, label: Label) -> Label | None:
    return "yes" if answer == "Yes" else "no" if answer == "No" else None


def _mme(answer: str, label: Label) -> Label | None:
    return _repope(f"{answer}\n".lower()[:4], label)


def _mme_lmms_eval(answer: str, label: Label) -> Label | None:
    text = answer.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or _repope(text[:4], label)  # type: ignore[return-value]


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
    "vaf": Parser(_vcd, "never", "as vcd, for VAF's 'no or not' are the letters no: VAF"),
    "repope": Parser(_repope, "dropped", "the letters yes, else the letters no ('snow' is no): RePOPE"),
    "lmms_eval": Parser(_lmms_eval, "wrong", "exactly yes or no, so 'Yes.' is wrong: lmms-eval 0.7.3"),
    "vlmevalkit": Parser(_vlmevalkit, "wrong", "the word yes or the word no, not both: VLMEvalKit without a judge"),
    "icd": Parser(_icd, "dropped", "as pope, but yes needs Yes or yes: ICD"),
    "dashb": Parser(_repope, "wrong", "as repope, but an answer that is neither is wrong: DASH-B"),
    "amber": Parser(_amber, "wrong", "exactly Yes or No, so 'no' and 'No.' are wrong: AMBER's inference.py"),
    "mme": Parser(_mme, "wrong", "the letters yes, else no, among the first four ('know' is no): MME's calculation.py"),
    "mme_lmms_eval": Parser(
        _mme_lmms_eval, "wrong", "as mme without outer blanks and full stops, y and n also count: lmms-eval 0.7.3"
    ),
    "strict": Parser(_strict, "wrong", "the first word is yes or no: vlmfix"),
    "sentence": Parser(_sentence, "wrong", "first word, else a yes or a negation without a hedge: vlmfix"),
}
"""Rules for reading answers, by the name that goes with every figure."""


MARGIN = "margin"
"""In place of a parser: answers are read from the first token's probabilities."""


def rule(parser: str) -> str:
    """What a parser reads, and what becomes of answers that are neither yes nor no."""
    if parser == MARGIN:
        return "the first token's margin, log p(yes) - log p(no): yes above 0"
    unparsed = {"never": "", "wrong": "; unparsed answers are wrong", "dropped": "; unparsed answers are left out"}
    return PARSERS[parser].rule + unparsed[PARSERS[parser].unparsed]


@dataclass(frozen=True)
class AnswerScore:
    """One answer and how it was read."""

    question: Question
    answer: str
    prediction: Label | None
    """What the answer says; None if the parser found neither yes nor no."""
    dropped: bool
    """Whether an answer that says neither leaves every count, as the parser's authors have it, or is wrong."""
    margin: float | None = None
    """The answer's margin, log p(yes) - log p(no), where it is known."""

    @property
    def correct(self) -> bool:
        """Whether the answer says what the label says."""
        return self.prediction == self.question.label


def score_answers(questions: Iterable[Question], answers: Answers, parser: str | Parser = "pope") -> list[AnswerScore]:
    """Score answers, given by question id in any order, in the order of the questions.

    Raises:
        ValueError: an unknown parser, an answer that is no text, ids that are missing, doubled or unknown, or an answer
            to another question or about another image than its id says.
    """
    if isinstance(parser, str) and parser not in PARSERS:
        raise ValueError(f"{parser!r} is no parser{did_you_mean(parser, PARSERS)}; there are {', '.join(PARSERS)}.")
    reader = PARSERS[parser] if isinstance(parser, str) else parser
    joined = _join(questions, _as_answers(answers, "text"))
    if silent := [answer.id for _, answer in joined if not isinstance(answer.text, str)]:
        raise ValueError(f"{_listed(silent, 'answers are no text; give strings')}.")
    scores = []
    for question, answer in joined:
        text = answer.text or ""
        prediction = reader(text, question.label)
        dropped = prediction is None and reader.unparsed == "dropped"
        scores.append(AnswerScore(question, text, prediction, dropped, answer.margin))
    return scores


def score_margins(
    questions: Iterable[Question],
    answers: Mapping[Hashable, float] | Iterable[tuple[Hashable, float]] | Iterable[Answer],
) -> list[AnswerScore]:
    """Score the first token instead of the text: yes above a margin of 0, no below, neither (and wrong) at 0 itself.

    Raises:
        ValueError: an answer without a margin or with nan, and all that `score_answers` refuses in ids.
    """
    joined = _join(questions, _as_answers(answers, "margin"))
    if lacking := [answer.id for _, answer in joined if not _is_number(answer.margin)]:
        raise ValueError(f"{_listed(lacking, 'answers have no margin; give log p(yes) - log p(no) as a number')}.")
    return [
        AnswerScore(question, answer.text or "", _sign(answer.margin or 0.0), False, answer.margin)
        for question, answer in joined
    ]


def _is_number(value: object) -> bool:
    """Whether a value is a number that a float can hold, infinity included."""
    if isinstance(value, (int, np.integer)):
        return not isinstance(value, bool) and abs(int(value)) < 10**300
    return isinstance(value, (float, np.floating)) and not np.isnan(value)


def _sign(margin: float) -> Label | None:
    return "yes" if margin > 0 else "no" if margin < 0 else None


def _as_answers(answers: Mapping[Hashable, Any] | Iterable[Any], field: str) -> list[Answer]:
    pairs: Iterable[Any] = answers.items() if isinstance(answers, Mapping) else answers
    return [pair if isinstance(pair, Answer) else Answer(pair[0], **{field: pair[1]}) for pair in pairs]


def _join(questions: Iterable[Question], answers: Sequence[Answer]) -> list[tuple[Question, Answer]]:
    questions = list(questions)
    check_ids(questions)
    answer_of = {answer.id: answer for answer in answers}
    known = {question.id for question in questions}
    for ids, what in (
        (_doubled(answer.id for answer in answers), "questions have more than one answer; keep one each"),
        ([q.id for q in questions if q.id not in answer_of], "questions have no answer; answer them or leave them out"),
        ([key for key in answer_of if key not in known], "answers belong to no question; give the questions' ids"),
    ):
        if ids:
            raise ValueError(f"{_listed(ids, what)}.")
    joined = [(question, answer_of[question.id]) for question in questions]
    for ids, what in (
        (
            [q.id for q, answer in joined if not same_image(q.image, answer.image)],
            "answers are about another image than the question with their id; give both from one edition and split",
        ),
        (
            [q.id for q, answer in joined if not _same_text(q.text, answer.question)],
            "answers are to another question than the one with their id; give both from one edition and split",
        ),
    ):
        if ids:
            raise ValueError(f"{_listed(ids, what)}.")
    return joined


def check_ids(questions: Iterable[Question]) -> None:
    """Raises ValueError if two of the questions share their id."""
    if doubled := _doubled(question.id for question in questions):
        raise ValueError(f"{_listed(doubled, 'questions share their id; score each split by itself')}.")


def _listed(ids: Sequence[Hashable], what: str, kind: str = "ids") -> str:
    return f"{len(ids)} {what} ({kind}: {', '.join(map(shown, ids[:10]))}{', ...' if len(ids) > 10 else ''})"


def _doubled(ids: Iterable[Hashable]) -> list[Hashable]:
    return [key for key, n in Counter(ids).items() if n > 1]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Part of an error message: " (did you mean 'strict'?)", or nothing if no known name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def same_image(one: str, other: str) -> bool:
    """Whether two names may be of one image: folders do not matter, nor what stands before a bare COCO number.

    An empty name may be of any image.
    """
    first, second = (PureWindowsPath(name) for name in (one, other))  # knows both kinds of slashes
    if not one or not other or first.name == second.name:
        return True
    bare = re.fullmatch("[0-9]+", first.stem) or re.fullmatch("[0-9]+", second.stem)
    return bool(bare) and _number_of(first) == _number_of(second)


def _number_of(name: PureWindowsPath) -> str | None:
    digits = re.search(r"[0-9]+$", name.stem)
    return digits[0].lstrip("0") if digits else None


def mended(text: str) -> str:
    """A text with single blanks and without the misprint "imange" of POPE's first release."""
    return " ".join(text.replace("imange", "image").split())


def _same_text(question: str, asked: str) -> bool:
    """Whether one text contains the other, since prompts add to questions; an empty one fits all."""
    question, asked = mended(question), mended(asked)
    return question in asked or asked in question


# Figures


def by_group(scores: Iterable[AnswerScore]) -> dict[str, list[AnswerScore]]:
    """Scores of each group, groups in order of first appearance."""
    groups: defaultdict[str, list[AnswerScore]] = defaultdict(list)
    for score in scores:
        groups[score.question.group].append(score)
    return dict(groups)


def clusters(scores: Sequence[AnswerScore]) -> list[str]:
    """The unit of resampling, one name per entry of `counts`: the image, in order of first appearance.

    Images that share a pair are one cluster, named by the first of them.
    """
    return _clusters(scores)[0]


def _clusters(scores: Sequence[AnswerScore]) -> tuple[list[str], dict[str, int]]:
    """Names of the clusters, and for each image the place of its cluster."""
    at = {image: number for number, image in enumerate(dict.fromkeys(score.question.image for score in scores))}
    earlier = list(range(len(at)))  # an image of the same cluster that appears earlier, or the image itself

    def first(image: str) -> int:
        number = at[image]
        while earlier[number] != number:
            earlier[number] = earlier[earlier[number]]
            number = earlier[number]
        return number

    image_of: dict[Hashable, str] = {}
    for question in (score.question for score in scores if score.question.pair is not None):
        tied = first(image_of.setdefault((question.group, question.pair), question.image)), first(question.image)
        earlier[max(tied)] = min(tied)
    names = [image for image, number in at.items() if earlier[number] == number]
    place = {at[image]: number for number, image in enumerate(names)}
    return names, {image: place[first(image)] for image in at}


def counts(scores: Sequence[AnswerScore]) -> dict[str, np.ndarray]:
    """What the metrics are made of: additive counts, one float per cluster, in the order of `clusters`.

    `tp`, `fp`, `tn`, `fn` count answers that say yes or no, `predictions` all of these, `yes_predictions` the yes among
    them; `unknown` those that say neither and are wrong, `unknown_yes` the ones among them whose label is yes;
    `dropped` those that leave every count but `questions`. `pairs` counts the pairs without dropped answers,
    `pairs_right` those of them with right answers only.
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
    pairs: defaultdict[Hashable, list[AnswerScore]] = defaultdict(list)
    for score in scores:
        if score.question.pair is not None:
            pairs[score.question.group, score.question.pair].append(score)
    whole = [members for members in pairs.values() if not any(score.dropped for score in members)]
    names, place = _clusters(scores)
    where = [place[score.question.image] for score in scores]
    where_pairs = [place[members[0].question.image] for members in whole]
    right = [all(score.correct for score in members) for members in whole]
    return {
        **{name: add_up(where, [count(score) for score in scores], len(names)) for name, count in columns.items()},
        "pairs": add_up(where_pairs, [1] * len(whole), len(names)),
        "pairs_right": add_up(where_pairs, right, len(names)),
    }


def add_up(places: Sequence[int], values: Sequence[float], n: int) -> np.ndarray:
    """Sum of the values at each of the places 0 .. n - 1."""
    return np.bincount(np.array(places, dtype=int), weights=np.array(values, dtype=float), minlength=n).astype(float)


def _mcc(n: Mapping[str, np.ndarray]) -> np.ndarray:
    tp, fp, tn, fn = (np.asarray(n[name], dtype=float) for name in ("tp", "fp", "tn", "fn"))
    return ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def labelled_no(n: Mapping[str, np.ndarray]) -> np.ndarray:
    """How many questions have the label no, from `counts`, without dropped answers."""
    return np.asarray(n["tn"], dtype=float) + n["fp"] + n["unknown"] - n["unknown_yes"]


METRICS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "accuracy": lambda n: ratio(n["tp"] + n["tn"], n["questions"] - n["dropped"]),
    "precision": lambda n: ratio(n["tp"], n["tp"] + n["fp"]),
    "recall": lambda n: ratio(n["tp"], n["tp"] + n["fn"] + n["unknown_yes"]),
    "F1": lambda n: f1(n["tp"], n["tp"] + n["fp"], n["tp"] + n["fn"] + n["unknown_yes"]),
    "TNR": lambda n: ratio(n["tn"], labelled_no(n)),
    "yes_ratio": lambda n: ratio(n["yes_predictions"], n["predictions"]),
    "MCC": _mcc,
}
"""Metric -> its value from *summed* counts (arrays of any shape); "yes" is the positive class; nan if undefined.

Wrong answers that say neither yes nor no lower accuracy, recall and TNR (the recall of "no"); precision, yes_ratio and
MCC are over predictions.
"""

PAIR_METRICS = {**METRICS, "pair_accuracy": lambda n: ratio(n["pairs_right"], n["pairs"])}
"""`METRICS`, and the share of pairs with right answers only."""


# Margins


def auroc(positive: Sequence[bool], margins: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Chance that a positive has a larger margin than a negative, ties half; nan without either.

    Weights say how often each counts, such as how often its image was drawn.
    """
    yes, no = _at_each_margin(positive, margins, weights)
    smaller = np.cumsum(no) - no
    return float(ratio(np.sum(yes * (smaller + no / 2)), yes.sum() * no.sum()))


def average_precision(
    positive: Sequence[bool], margins: Sequence[float], weights: Sequence[float] | None = None
) -> float:
    """Precision at the margin of each positive, averaged over the positives; nan without any."""
    yes, no = (column[::-1] for column in _at_each_margin(positive, margins, weights))
    precision = ratio(np.cumsum(yes), np.cumsum(yes + no))
    return float(ratio(np.sum(yes * np.nan_to_num(precision)), yes.sum()))


def _at_each_margin(
    positive: Sequence[bool], margins: Sequence[float], weights: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """How many positives and how many negatives there are at each distinct margin, in rising order."""
    values, is_yes = np.asarray(margins, dtype=float), np.asarray(positive, dtype=bool)
    share = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    if not values.shape == is_yes.shape == share.shape or np.isnan(values).any():
        raise ValueError(
            f"{len(values)} margins, {len(is_yes)} labels, {len(share)} weights; expected as many of each, without nan."
        )
    levels, level = np.unique(values, return_inverse=True)
    return (
        np.bincount(level, weights=share * is_yes, minlength=len(levels)),
        np.bincount(level, weights=share * ~is_yes, minlength=len(levels)),
    )


def ranking(scores: Sequence[AnswerScore], weights: Sequence[float] | None = None) -> dict[str, float]:
    """How well the margins tell yes from no wherever the threshold lies: `AUROC` and `average_precision`.

    They are no sums over images: to resample, give as weights how often the image of each score was drawn. Take each
    group by itself, see `by_group`.

    Raises:
        ValueError: a score has no margin.
    """
    if lacking := [score.question.id for score in scores if not _is_number(score.margin)]:
        raise ValueError(f"{_listed(lacking, 'answers have no margin; give log p(yes) - log p(no) as a number')}.")
    positive = [score.question.label == "yes" for score in scores]
    margins = [float(score.margin or 0.0) for score in scores]
    return {
        "AUROC": auroc(positive, margins, weights),
        "average_precision": average_precision(positive, margins, weights),
    }
