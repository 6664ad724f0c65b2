"""Questions and answers, and the files that hold them."""

from __future__ import annotations

import math
import os
import posixpath
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

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
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as pandas writes ids
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{where} has {shown(value)} as {' or '.join(names)}; expected a whole number or text.")
    return value


def label_field(record: Mapping[str, Any], where: str, name: str) -> Label:
    """The label under a key of a record. Raises ValueError if it is neither yes nor no."""
    label = yes_or_no(text_field(record, where, name).strip().lower())
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
            image=_image_field(record, where),
            text=_question_field(record, where),
            object="",
            label=label_field(record, where, "label"),
            group="" if record.get("group") is None else str(id_field(record, where, "group")).strip(),
            pair=None if record.get("pair") is None else id_field(record, where, "pair"),
        )
        for where, record in read_records(path)
    ]
    check_ids(questions)
    members = Counter((question.group, question.pair) for question in questions if question.pair is not None)
    incomplete = [pair for (_, pair), number in members.items() if number == 1]
    if incomplete:
        fault = listed(incomplete, "pairs have one question only; leave pair out there", "pairs")
        raise ValueError(f"{path}: {fault}.")
    return questions


def _question_field(record: Mapping[str, Any], where: str) -> str:
    question = text_field(record, where, "question")
    if not question.strip():
        raise ValueError(f"{where} has no text under 'question'; expected what was asked.")
    return question


def _image_field(record: Mapping[str, Any], where: str) -> str:
    """The name of a picture, by which questions are known to be about the same: "./a.png" is "a.png"."""
    image = text_field(record, where, "image")
    return posixpath.normpath(image) if image else ""


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
    possible_keys = (key,) if key else ANSWER_KEYS
    text_keys = [name for name in possible_keys if name in record]
    margin = _read_margin(record, where)
    if len(text_keys) > 1:
        named = " and ".join(text_keys)
        raise ValueError(f"{where} has {named}; say which is the answer, as in --answer-key {text_keys[0]}.")
    if not text_keys and margin is None:
        expected = key or f"{', '.join(ANSWER_KEYS[:-1])} or {ANSWER_KEYS[-1]}"
        raise ValueError(f"{where} has no {expected} and no margin; expected an answer.")
    prompts = [record[name] for name in ("question", "prompt") if isinstance(record.get(name), str)]
    return Answer(
        id=_answer_id(record, where, id_keys),
        text=text_field(record, where, text_keys[0]) if text_keys else None,
        margin=margin,
        question=prompts[0] if prompts else "",
        image="" if record.get("image") is None else str(id_field(record, where, "image")),
    )


def _answer_id(record: Mapping[str, Any], where: str, id_keys: Sequence[str]) -> int | str:
    if id_keys and record.keys() >= set(id_keys):
        return "/".join(str(id_field(record, where, name)) for name in id_keys)
    return id_field(record, where, "question_id", "id")


def _read_margin(record: Mapping[str, Any], where: str) -> float | None:
    if record.get("margin") is not None:
        return _number(record, where, "margin")
    present = [name for name in ("p_yes", "p_no") if record.get(name) is not None]
    if not present:
        return None
    if len(present) == 1:
        raise ValueError(f"{where} has {present[0]} alone; give p_yes and p_no, or margin = log p(yes) - log p(no).")
    p_yes, p_no = _number(record, where, "p_yes"), _number(record, where, "p_no")
    if not (0 <= p_yes <= 1 and 0 <= p_no <= 1 and p_yes + p_no > 0):
        raise ValueError(f"{where} has p_yes {p_yes} and p_no {p_no}; expected probabilities, not both 0.")
    if p_no == 0:
        return math.inf
    if p_yes == 0:
        return -math.inf
    return float(np.log(p_yes) - np.log(p_no))


def _number(record: Mapping[str, Any], where: str, name: str) -> float:
    value = record[name]
    if not is_number(value):
        raise ValueError(f"{where} has {shown(value)} under {name!r}; expected a number.")
    return float(value)


def is_number(value: object) -> bool:
    """Whether a value is a number that a float can hold, infinity included."""
    if isinstance(value, (int, np.integer)):
        return not isinstance(value, bool) and abs(int(value)) < 10**300
    return isinstance(value, (float, np.floating)) and not np.isnan(value)


def yes_or_no(word: str) -> Label | None:
    """The label that a word is, None for any but "yes" and "no"."""
    if word == "yes":
        return "yes"
    return "no" if word == "no" else None


def check_ids(questions: Iterable[Question]) -> None:
    """Raises ValueError if two of the questions share their id."""
    shared = doubled(question.id for question in questions)
    if shared:
        raise ValueError(f"{listed(shared, 'questions share their id; score each split by itself')}.")


def doubled(ids: Iterable[Hashable]) -> list[Hashable]:
    """The ids that come more than once."""
    return [key for key, number in Counter(ids).items() if number > 1]


def listed(ids: Sequence[Hashable], fault: str, kind: str = "ids") -> str:
    """Part of an error message: how many there are, what is wrong with them, and the first ten."""
    more = ", ..." if len(ids) > 10 else ""
    return f"{len(ids)} {fault} ({kind}: {', '.join(map(shown, ids[:10]))}{more})"
