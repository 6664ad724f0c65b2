"""Yes/no questions of one's own, in a file. No torch.

A line is `{"id", "image", "question", "label", "group"?, "pair"?}`; see `vlmfix.eval.scorers.yesno.read_questions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.eval.benchmarks.benchmark import Figure, FileAnswers, FileOptions
from vlmfix.eval.benchmarks.questions import TOTAL, UNNAMED, YES_NO_FIGURES, OriginalQuestions, all_and_groups
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import yesno
from vlmfix.eval.scorers.reading import about_file, printable
from vlmfix.eval.scorers.yesno import PAIR_METRICS, Question


class OwnQuestions(OriginalQuestions):
    """Questions of one's own, with figures for all and for each group."""

    name, heading, parser = "yesno", "yes/no", "strict"
    figures: ClassVar[Mapping[str, Figure]] = {
        **YES_NO_FIGURES,
        "pair_accuracy": Figure(PAIR_METRICS["pair_accuracy"], "pairs of questions with right answers only", "more"),
    }
    file_options = ("parser", "questions", "key")

    def __init__(self, scoring: str = "", prompt: str = "{question}") -> None:
        super().__init__(scoring, prompt)
        self.file_questions: Sequence[Question] = ()
        """What answers in files answer."""

    @property
    def title(self) -> str:
        """Of files, the name of the file of questions, and the parser."""
        if self.options is None:
            return super().title
        name = printable(Path(self.options.questions or "").name)
        return f"{name}, parser {self.scoring}"

    def find(self, data: Data) -> Sequence[Question]:
        """Those of the file."""
        return _own_questions(data.question_file("a file with id, image, question and label"))

    def parts(self, scores: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """All, and each group."""
        return all_and_groups(scores)

    def prepare_files(self, options: FileOptions) -> None:
        """Read the questions."""
        super().prepare_files(options)
        place = self.asked_of_files("a file with id, image, question and label")
        self.file_questions = _own_questions(place)

    def read(self, path: Path) -> FileAnswers:
        """An answer for each question of the file."""
        return self.file_answers(self.judge(self.file_questions, self.read_answers(path)))


def _own_questions(path: str | Path) -> list[Question]:
    """Questions of a file. `ValueError`, with its name, if it is broken, or a group is called as tables call others."""
    with about_file(path):
        questions = yesno.read_questions(path)
        names = {printable(question.group).lower() for question in questions}
        if TOTAL in names:
            raise ValueError(f"a group is called {TOTAL!r}, as is the sum of the groups; call it something else.")
        if UNNAMED in names:
            raise ValueError(f"a group is called {UNNAMED!r}, as are questions without one; call it something else.")
    return questions
