"""MME, the four tasks on hallucination: existence, count, position and color, two questions per image.

Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models", arXiv 2306.13394; rule of
the official `calculation.py`. A task scores 100 accuracy + 100 accuracy+, the share of images with both answers right:
0 to 200, 800 in all. The official parser and that of lmms-eval differ much on odd answers, so name it.

    questions = load("MME_Benchmark_release_version")
    scores = score(questions, read_answers("answers.jsonl"))
    task_scores(scores), sum(task_scores(scores).values())

Images and questions are given out by the authors on request: see
github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import ClassVar

import numpy as np

from vlmfix.eval.benchmarks.benchmark import Figure, FileAnswers, FileOptions
from vlmfix.eval.benchmarks.questions import YES_NO_FIGURES, OriginalQuestions
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import yesno
from vlmfix.eval.scorers.reading import about_file
from vlmfix.eval.scorers.stats import ratio
from vlmfix.eval.scorers.yesno import Answer, Answers, AnswerScore, Question, by_group, counts

TASKS = ("existence", "count", "position", "color")


def load(folder: str | os.PathLike[str]) -> list[Question]:
    """Questions of the four tasks, from the folder of the images or from that of the result templates.

    Of each task it reads `<task>.txt` with the lines image TAB question TAB yes or no (a fourth column is passed
    over), or else the files `<task>/<image>.txt` with the lines question TAB yes or no.

    Raises:
        ValueError: a task is missing, a line has another form, or an image has not exactly two questions.
    """
    return [question for question, _ in _read_tasks(Path(folder))]


def read_results(folder: str | os.PathLike[str]) -> tuple[list[Question], list[Answer]]:
    """Questions and answers of filled result files, `<task>.txt` with image TAB question TAB yes or no TAB answer.

    Raises:
        ValueError: as `load`, or an answer is missing.
    """
    rows = _read_tasks(Path(folder))
    unanswered = [question.id for question, answer in rows if answer is None]
    if unanswered:
        raise ValueError(
            f"{len(unanswered)} lines have no fourth column, such as {unanswered[0]!r}; expected an answer there."
        )
    return [question for question, _ in rows], [Answer(question.id, answer) for question, answer in rows]


def _read_tasks(folder: Path) -> list[tuple[Question, str | None]]:
    rows: list[tuple[Question, str | None]] = []
    for task in TASKS:
        rows += _read_task(folder, task)
    return rows


def _read_task(folder: Path, task: str) -> list[tuple[Question, str | None]]:
    rows: list[tuple[Question, str | None]] = []
    for where, (image, text, word, answer) in _rows(folder, task):
        label = yesno.label_field({"label": word}, where, "label")
        rows.append((Question(f"{task}/{image}/{text}", image, text, "", label, group=task, pair=image), answer))
    uneven = [image for image, n in Counter(question.image for question, _ in rows).items() if n != 2]
    if not rows or uneven:
        raise ValueError(
            f"{folder}: {task} has {len(rows)} questions, {len(uneven)} images with other than two"
            f"{f' such as {uneven[0]!r}' if uneven else ''}; ask the authors of MME for the files, see this module."
        )
    return rows


def _rows(folder: Path, task: str) -> Iterator[tuple[str, tuple[str, str, str, str | None]]]:
    """Yield the place of each line and its image, question, label and answer."""
    table = folder / f"{task}.txt"
    if table.is_file():
        for where, cells in _cells(table, (3, 4)):
            yield where, (cells[0], cells[1], cells[2], cells[3] if len(cells) == 4 else None)
        return
    for path in sorted((folder / task).glob("*.txt")):
        beside = [other for other in path.parent.glob("*") if other.stem == path.stem and other != path]
        picture = min((other.name for other in beside), default=path.stem)
        for where, cells in _cells(path, (2,)):
            yield where, (picture, cells[0], cells[1], None)


def _cells(path: Path, widths: tuple[int, ...]) -> Iterator[tuple[str, list[str]]]:
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error}); expected UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        cells = line.rstrip("\r").split("\t")
        if len(cells) in widths:
            yield f"{path}, line {number}", cells
        elif line.strip():
            wanted = " or ".join(map(str, widths))
            raise ValueError(f"{path}, line {number} has {len(cells)} columns; expected {wanted}, parted by tabs.")


def score(questions: Iterable[Question], answers: Answers, parser: str = "mme") -> list[AnswerScore]:
    """Score answers; the parsers `mme` and `mme_lmms_eval` are those of the two programs in use.

    Raises:
        ValueError: as `yesno.score_answers`.
    """
    return yesno.score_answers(questions, answers, parser)


METRICS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "score": lambda n: 100 * (yesno.METRICS["accuracy"](n) + yesno.PAIR_METRICS["pair_accuracy"](n)),
    "accuracy": yesno.METRICS["accuracy"],
    "accuracy_plus": yesno.PAIR_METRICS["pair_accuracy"],
    "precision": yesno.METRICS["precision"],
    "recall": lambda n: ratio(n["tp"], n["tp"] + n["fn"]),
    "yes_ratio": yesno.METRICS["yes_ratio"],
    "MCC": yesno.METRICS["MCC"],
}
"""Metric -> its value from the *summed* counts of one task. Precision and recall pass over answers that are neither."""


def task_scores(scores: Iterable[AnswerScore]) -> dict[str, float]:
    """Points of each task, 0 to 200."""
    return {
        task: float(METRICS["score"]({name: column.sum() for name, column in counts(part).items()}))
        for task, part in by_group(scores).items()
    }


class Mme(OriginalQuestions):
    """MME: existence, count, position and color, two questions a picture."""

    name, heading, parser = "mme", "MME", "mme"
    figures: ClassVar[Mapping[str, Figure]] = {
        "score": Figure(METRICS["score"], "points, 100 accuracy + 100 accuracy_plus", "more", unit=""),
        "accuracy": YES_NO_FIGURES["accuracy"],
        "accuracy_plus": Figure(METRICS["accuracy_plus"], "pictures with both answers right", "more"),
        "precision": YES_NO_FIGURES["precision"],
        "recall": Figure(METRICS["recall"], "yes where yes is right, of the answers that say yes or no", "more"),
        "yes_ratio": YES_NO_FIGURES["yes_ratio"],
        "MCC": YES_NO_FIGURES["MCC"],
    }
    headline = ("score",)
    where = (
        "pictures and questions of MME are given out by its authors: "
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation"
    )
    file_options = ("parser", "questions", "key")

    def __init__(self, scoring: str = "", prompt: str = "{question}") -> None:
        super().__init__(scoring, prompt)
        self.file_questions: Sequence[Question] = ()
        """What answers in files answer, where that was said."""

    def find(self, data: Data) -> Sequence[Question]:
        """The questions in the folder of the data."""
        return load(data.asked or data.folder)

    @staticmethod
    def file(question: Question) -> str:
        """Pictures lie in the folder of their task."""
        return f"{question.group}/{question.image}"

    def prepare_files(self, options: FileOptions) -> None:
        """Read the questions, if they do not come with the answers."""
        super().prepare_files(options)
        if options.questions is not None:
            with about_file(options.questions):
                self.file_questions = load(options.questions)

    def read(self, path: Path) -> FileAnswers:
        """A folder of filled result files, which hold the questions too, or a file of answers by id."""
        remarks: list[str] = []
        if path.is_dir():
            own_questions, answers = read_results(path)
            scores = self.judge(self.file_questions or own_questions, answers)
        else:
            questions = self.file_questions or load(self.asked_of_files("the folder of MME's files"))
            answers = self.read_answers(path)
            answers_here = _with_question_ids(questions, answers)
            if len(answers_here) < len(answers):
                remarks.append(f"{len(answers) - len(answers_here)} answers to other tasks of MME left out")
            scores = self.judge(questions, answers_here)
        points = sum(task_scores(scores).values())
        return self.file_answers(scores, [f"{points:.1f} of 800 points", *remarks])


def _with_question_ids(questions: Sequence[Question], answers: Sequence[Answer]) -> list[Answer]:
    """Answers as LLaVA and SHIELD log them, `{"question_id": "existence/0001.jpg", "prompt": ..., "text": ...}`.

    Both questions about a picture have the same id there; which one was asked, the prompt tells. Answers to other tasks
    are left out. Answers that have the questions' own ids stay as they are.
    """
    own_ids = {question.id for question in questions}
    if all(answer.id in own_ids for answer in answers):
        return list(answers)
    asked_about: dict[str, list[Question]] = {}
    for question in questions:
        asked_about.setdefault(f"{question.group}/{_stem(question.image)}", []).append(question)
    tasks = {question.group for question in questions}
    renamed = []
    for answer in answers:
        task, _, image = str(answer.id).partition("/")
        if task in MME_TASKS and task not in tasks:
            continue  # of the ten tasks that are not about what is in the picture
        of_image = asked_about.get(f"{task}/{_stem(image)}", [])
        matches = [question for question in of_image if _bare(question.text) in answer.question]
        # The prompt has done its work; it may end in other words than the question does.
        renamed.append(replace(answer, id=matches[0].id, question="") if len(matches) == 1 else answer)
    return renamed


def _bare(question: str) -> str:
    return question.replace("Please answer yes or no.", "").strip()


def _stem(image: str) -> str:
    return PureWindowsPath(image).stem


MME_TASKS = frozenset(
    (
        *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
        *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
    )
)
"""All tasks of MME; four of them are asked here."""
