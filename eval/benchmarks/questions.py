"""What all benchmarks of yes/no questions share. No torch.

A parser reads each answer as yes, no or neither, or `margin` takes the first token's probabilities instead of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.eval.benchmarks.benchmark import Benchmark, Figure, FileAnswers, FileOptions, Group, Item
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import yesno
from vlmfix.eval.scorers.reading import printable
from vlmfix.eval.scorers.yesno import METRICS, Answer
from vlmfix.method.settings import did_you_mean

YES_NO_FIGURES: Mapping[str, Figure] = {
    "accuracy": Figure(METRICS["accuracy"], "right answers", "more"),
    "precision": Figure(METRICS["precision"], "yes that is right", "more"),
    "recall": Figure(METRICS["recall"], "yes where yes is right", "more"),
    "F1": Figure(METRICS["F1"], "harmonic mean of precision and recall", "more"),
    "TNR": Figure(METRICS["TNR"], "no where no is right", "more", shown=False),
    "yes_ratio": Figure(METRICS["yes_ratio"], "answers that say yes"),
    "MCC": Figure(METRICS["MCC"], "Matthews correlation, 0 is guessing", "more", unit=""),
}
"""Figures of yes/no questions where "yes" is the positive class."""


class YesNo(Benchmark):
    """Questions with the answer yes or no."""

    figures: ClassVar[Mapping[str, Figure]] = YES_NO_FIGURES
    headline: ClassVar[tuple[str, ...]] = ("accuracy", "yes_ratio")
    heading: ClassVar[str]
    """The benchmark's name in print."""
    parser: ClassVar[str]
    """How answers are read where nothing else is said."""
    max_new_tokens = 8
    running = "accuracy"
    scoring_option = "parser"
    takes_margins: ClassVar[bool] = True
    """Whether the first token's margin can take the place of the text."""
    id_keys: ClassVar[tuple[str, ...]] = ()
    """Keys in files of answers that together are a question's id."""

    def __init__(self, scoring: str = "", prompt: str = "{question}") -> None:
        scoring = scoring or self.parser
        parsers = (*yesno.PARSERS, yesno.MARGIN)
        if scoring not in parsers:
            raise ValueError(f"{scoring!r} is no parser; {did_you_mean(scoring, parsers)}")
        if scoring == yesno.MARGIN and not self.takes_margins:
            raise ValueError(f"{self.heading} is counted from texts; give a parser, not the margin.")
        if "{question}" not in prompt:
            raise ValueError(f"prompt: expected {{question}} in it, where the question goes, got {prompt!r}")
        super().__init__(scoring, prompt)
        self._questions_of: dict[Data, Sequence[Any]] = {}
        self._places_of: dict[Data, dict[str, list[int]]] = {}
        if scoring != self.parser:
            self.notes.append(self._rule)

    @property
    def _rule(self) -> str:
        return f"parser {self.scoring}: {yesno.rule(self.scoring)}"

    @property
    def edition(self) -> str:
        """What exactly was asked, behind the heading of files of answers; empty where there is one edition only."""
        return ""

    @property
    def title(self) -> str:
        """The benchmark and, if it is not the default, the parser. Of files: also the edition, and every parser."""
        if self.options is not None:
            return f"{' '.join(filter(None, [self.heading, self.edition]))}, parser {self.scoring}"
        return self.heading if self.scoring == self.parser else f"{self.heading} (parser {self.scoring})"

    # A run

    def questions(self, data: Data) -> Sequence[Any]:
        """All questions, in order."""
        if data not in self._questions_of:
            self._questions_of[data] = self.load(data)
        return self._questions_of[data]

    def load(self, data: Data) -> Sequence[Any]:
        """Find the questions about some data."""
        raise NotImplementedError

    @staticmethod
    def item_id(question: yesno.Question) -> str:
        """The item that asks a question."""
        return str(question.id)

    @staticmethod
    def file(question: yesno.Question) -> str:
        """The question's picture, below the folder of pictures."""
        return question.image

    def items(self, data: Data) -> list[Item]:
        """Each different question once. `ValueError` if two have the same name."""
        items: dict[str, Item] = {}
        picture_of = cache(data.picture)
        for question in self.questions(data):
            key = self.item_id(question)
            prompt = self.prompt.replace("{question}", question.text)
            item = Item(key, str(picture_of(self.file(question))), prompt)
            if items.setdefault(key, item) != item:
                raise ValueError(
                    f"two questions are both called {key!r}, once as text and once as a number; rename one"
                )
        return list(items.values())

    def check(self, data: Data) -> None:
        """No two questions that are scored together share their id."""
        yesno.check_ids(self.questions(data))

    def said(self, record: Mapping[str, Any]) -> Any:
        """The text, or how much likelier yes was than no as the first token."""
        if self.scoring != yesno.MARGIN:
            return record["text"]
        first = record.get("first_token")
        if not first or not {"yes", "no"} <= first.keys():
            raise ValueError(
                f"answer {record.get('id')!r} has no first_token probabilities; ask again, or take a parser"
            )
        return first["yes"] - first["no"]

    def score(self, data: Data, answers: Mapping[str, Any]) -> list[Group]:
        """Counts per picture, for each group of questions."""
        questions, places = self.questions(data), self._places(data)
        answered_places: list[int] = []
        for item in answers:
            answered_places += places.get(item, ())
        answered = [questions[place] for place in sorted(answered_places)]
        scores = self.judge(answered, {question.id: answers[self.item_id(question)] for question in answered})
        return [self.group(name, part) for name, part in self.parts(scores).items()]

    def _places(self, data: Data) -> Mapping[str, Sequence[int]]:
        """Item -> the places of the questions that it asks. A run in progress is scored at every batch."""
        if data not in self._places_of:
            places: dict[str, list[int]] = {}
            for place, question in enumerate(self.questions(data)):
                places.setdefault(self.item_id(question), []).append(place)
            self._places_of[data] = places
        return self._places_of[data]

    # Both

    def judge(self, asked: Sequence[Any], answers: Any) -> Sequence[Any]:
        """Read the answers to these questions, given by their ids: `yesno.Answers`, or margins."""
        if self.scoring == yesno.MARGIN:
            return yesno.score_margins(asked, answers)
        return yesno.score_answers(asked, answers, self.scoring)

    def parts(self, scores: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """Scores that have figures of their own, by name."""
        return yesno.by_group(scores)

    def group(self, name: str, scores: Sequence[Any]) -> Group:
        """A part of the scores with its counts."""
        return Group(printable(name), yesno.clusters(scores), yesno.counts(scores), scores)

    def asked(self, group: Group) -> frozenset[Any]:
        """Ids and labels of a group's questions."""
        return frozenset((score.question.id, score.question.label) for score in group.scores)

    def unparsed(self, group: Group) -> int:
        """Answers that the parser cannot read, and empty ones, which some parsers read as yes all the same."""
        return sum(score.prediction is None or self._is_empty(score) for score in group.scores)

    def _is_empty(self, score: Any) -> bool:
        return self.scoring != yesno.MARGIN and not score.answer.strip()

    def misheard(self, group: Group) -> int:
        """Answers that say yes and are read as no or the other way round, or say nothing and are read as either."""
        return sum(self._is_misheard(score) or self._is_guessed(score) for score in group.scores)

    def misheard_note(self, groups: Sequence[Group]) -> str:
        """How many there are, with the first of them."""
        scores = {score.question.id: score for group in groups for score in group.scores}.values()
        misheard = [score for score in scores if self._is_misheard(score)]
        guessed = [score for score in scores if self._is_guessed(score)]
        notes = []
        if misheard:
            notes.append(
                f"{len(misheard)} of {len(scores)} answers say the other word than parser {self.scoring} reads, "
                f"such as {_read_as(misheard[0])}; parser strict takes the first word"
            )
        if guessed:
            notes.append(
                f"{len(guessed)} of {len(scores)} answers say neither yes nor no, and parser {self.scoring} reads them "
                f"all the same, such as {_read_as(guessed[0])}"
            )
        return "; ".join(notes)

    def _is_misheard(self, score: Any) -> bool:
        if self.scoring in (yesno.MARGIN, "strict") or score.prediction is None:
            return False
        return yesno.heard(score.answer) not in (None, score.prediction)

    def _is_guessed(self, score: Any) -> bool:
        if self.scoring == yesno.MARGIN or score.prediction is None:
            return False
        return yesno.says_nothing(score.answer)

    def explain(self, score: Any) -> dict[str, Any]:
        """What was asked, answered, read and right."""
        question = score.question
        return {
            "id": question.id,
            "image": question.image,
            "question": question.text,
            "group": question.group,
            "label": question.label,
            "answer": score.answer,
            "prediction": score.prediction,
            "correct": score.correct,
        }

    # Files of answers

    def prepare_files(self, options: FileOptions) -> None:
        """Note which parser reads them: of a file it is always told."""
        super().prepare_files(options)
        self.notes = [self._rule]

    def read_answers(self, path: Path) -> list[Answer]:
        """The answers in a file."""
        return yesno.read_answers(path, key=self.options.key if self.options else None, id_keys=self.id_keys)

    def file_answers(self, scores: Sequence[Any], remarks: Sequence[str] = ()) -> FileAnswers:
        """A file whose answers are scored."""
        records = [{"id": str(score.question.id), "text": score.answer} for score in scores]
        return FileAnswers(records, self.file_groups(scores), list(remarks))

    def file_groups(self, scores: Sequence[Any]) -> list[Group]:
        """The groups of a file's answers; as those of a run, if not said otherwise."""
        return [self.group(name, part) for name, part in self.parts(scores).items()]

    def asked_of_files(self, what: str) -> str:
        """Where the questions lie that were asked. `ValueError` if that was not said."""
        if self.options is None or self.options.questions is None:
            raise ValueError(f"which questions were asked? Give {what} with --questions.")
        return self.options.questions


class OriginalQuestions(YesNo):
    """Questions that come with the package or in the original files; the pictures lie in the data's folder."""

    def load(self, data: Data) -> Sequence[Any]:
        """All questions, on the first pictures if there is a limit."""
        questions = self.find(data)
        if data.limit is None:
            return questions
        pictures = dict.fromkeys(self.file(question) for question in questions)
        first_pictures = set(list(pictures)[: data.limit])
        return [question for question in questions if self.file(question) in first_pictures]

    def find(self, data: Data) -> Sequence[Any]:
        """All questions."""
        raise NotImplementedError


def _read_as(score: Any) -> str:
    return f"{printable(score.answer[:40])!r}, read as {score.prediction}"


TOTAL, UNNAMED = "all", "no group"
"""In tables: the sum of the groups, and questions without a group beside others that have one."""


def all_and_groups(scores: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """All scores together, and each group of them if there are several; one without a name is called `UNNAMED`."""
    groups: dict[str, Sequence[Any]] = {**yesno.by_group(scores)}
    if len(groups) == 1:
        return groups
    return {TOTAL: scores, **{group or UNNAMED: part for group, part in groups.items()}}
