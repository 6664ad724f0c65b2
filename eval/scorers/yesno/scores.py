"""Answers joined to their questions, and read."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import PureWindowsPath
from typing import Any

from vlmfix.eval.scorers.yesno.parsers import PARSERS, Parser
from vlmfix.eval.scorers.yesno.questions import Answer, Answers, Label, Question, check_ids, doubled, is_number, listed
from vlmfix.method.settings import did_you_mean


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
    if isinstance(parser, str):
        if parser not in PARSERS:
            raise ValueError(f"{parser!r} is no parser; {did_you_mean(parser, PARSERS)}")
        parser = PARSERS[parser]
    joined = _join(questions, _as_answers(answers, "text"))
    without_text = [answer.id for _, answer in joined if not isinstance(answer.text, str)]
    if without_text:
        raise ValueError(f"{listed(without_text, 'answers are no text; give strings')}.")
    scores = []
    for question, answer in joined:
        text = answer.text or ""
        prediction = parser(text, question.label)
        dropped = prediction is None and parser.unparsed == "dropped"
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
    without_margin = [answer.id for _, answer in joined if not is_number(answer.margin)]
    if without_margin:
        raise ValueError(
            f"{listed(without_margin, 'answers have no margin; give log p(yes) - log p(no) as a number')}."
        )
    scores = []
    for question, answer in joined:
        prediction = _sign(answer.margin or 0.0)
        scores.append(AnswerScore(question, answer.text or "", prediction, False, answer.margin))
    return scores


def _sign(margin: float) -> Label | None:
    if margin == 0:
        return None
    return "yes" if margin > 0 else "no"


def _as_answers(answers: Mapping[Hashable, Any] | Iterable[Any], field: str) -> list[Answer]:
    """Bare values, given by id or in pairs with it, become answers that have this field only."""
    entries: Iterable[Any] = answers.items() if isinstance(answers, Mapping) else answers
    return [entry if isinstance(entry, Answer) else Answer(entry[0], **{field: entry[1]}) for entry in entries]


def _join(questions: Iterable[Question], answers: Sequence[Answer]) -> list[tuple[Question, Answer]]:
    """Each question with the answer to it; ValueError, with the first ids, wherever they do not fit each other."""
    questions = list(questions)
    check_ids(questions)
    question_ids = {question.id for question in questions}
    answers = _with_ids_of(question_ids, answers)
    answer_of = {answer.id: answer for answer in answers}
    _refuse(doubled(answer.id for answer in answers), "questions have more than one answer; keep one each")
    _refuse(
        [question.id for question in questions if question.id not in answer_of],
        "questions have no answer; answer them or leave them out",
    )
    _refuse(
        [answer_id for answer_id in answer_of if answer_id not in question_ids],
        "answers belong to no question; give the questions' ids",
    )
    joined = [(question, answer_of[question.id]) for question in questions]
    images_named: dict[str, set[str]] = {}
    for question in questions:
        images_named.setdefault(PureWindowsPath(question.image).name, set()).add(question.image)
    _refuse(
        [question.id for question, answer in joined if not _is_shown(question.image, answer.image, images_named)],
        "answers are about another image than the question with their id; give both from one edition and split",
    )
    _refuse(
        [question.id for question, answer in joined if not _same_text(question.text, answer.question)],
        "answers are to another question than the one with their id; give both from one edition and split",
    )
    return joined


def _with_ids_of(question_ids: Collection[Hashable], answers: Sequence[Answer]) -> list[Answer]:
    """Answers by the questions' own ids: "1" is 1 where the questions have no "1", and the other way round."""
    id_of: dict[str, list[Hashable]] = {}
    for question_id in question_ids:
        id_of.setdefault(str(question_id), []).append(question_id)
    renamed = []
    for answer in answers:
        alike = id_of.get(str(answer.id), [])
        is_meant = answer.id not in question_ids and isinstance(answer.id, (int, str)) and len(alike) == 1
        renamed.append(replace(answer, id=alike[0]) if is_meant else answer)
    return renamed


def _refuse(ids: Sequence[Hashable], fault: str) -> None:
    if ids:
        raise ValueError(f"{listed(ids, fault)}.")


def same_image(one: str, other: str) -> bool:
    """Whether two names may be of one image: folders do not matter, nor what stands before a bare COCO number.

    An empty name may be of any image.
    """
    first, second = PureWindowsPath(one), PureWindowsPath(other)  # knows both kinds of slashes
    if not one or not other or first.name == second.name:
        return True
    either_is_bare = re.fullmatch("[0-9]+", first.stem) or re.fullmatch("[0-9]+", second.stem)
    return bool(either_is_bare) and _number_of(first) == _number_of(second)


def _is_shown(image: str, shown: str, images_named: Mapping[str, Collection[str]]) -> bool:
    """Whether an answer is about a question's image: their names may be of one, and where several images of the
    questions bear that name in different folders, none of them fits what was shown better."""
    if not same_image(image, shown):
        return False
    namesakes = images_named[PureWindowsPath(image).name]
    return _common_end(image, shown) == max(_common_end(other, shown) for other in namesakes)


def _common_end(one: str, other: str) -> int:
    """How many parts two paths share at their ends."""
    pairs = zip(reversed(PureWindowsPath(one).parts), reversed(PureWindowsPath(other).parts), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _number_of(name: PureWindowsPath) -> str | None:
    digits = re.search(r"[0-9]+$", name.stem)
    return digits[0].lstrip("0") if digits else None


def mended(text: str) -> str:
    """A text with single blanks and without the misprint "imange" of POPE's first release."""
    return " ".join(text.replace("imange", "image").split())


def _same_text(question: str, prompt: str) -> bool:
    """Whether one text contains the other, since prompts add to questions; an empty one fits all."""
    question, prompt = mended(question), mended(prompt)
    return question in prompt or prompt in question
