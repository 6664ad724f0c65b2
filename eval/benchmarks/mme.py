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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from vlmfix.eval.scorers import yesno
from vlmfix.eval.scorers.stats import ratio
from vlmfix.eval.scorers.yesno import Answer, Answers, AnswerScore, Question, by_group, clusters, counts

__all__ = ["METRICS", "TASKS", "clusters", "counts", "load", "read_results", "score", "task_scores"]

TASKS = ("existence", "count", "position", "color")


def load(folder: str | os.PathLike[str]) -> list[Question]:
    """Questions of the four tasks, from the folder of the images or from that of the result templates.

    Of each task it reads `<task>.txt` with the lines image TAB question TAB yes or no (a fourth column is passed
    over), or else the files `<task>/<image>.txt` with the lines question TAB yes or no.

    Raises:
        ValueError: a task is missing, a line has another form, or an image has not exactly two questions.
    """
    return [question for task in TASKS for question, _ in _read_task(Path(folder), task)]


def read_results(folder: str | os.PathLike[str]) -> tuple[list[Question], list[Answer]]:
    """Questions and answers of filled result files, `<task>.txt` with image TAB question TAB yes or no TAB answer.

    Raises:
        ValueError: as `load`, or an answer is missing.
    """
    rows = [row for task in TASKS for row in _read_task(Path(folder), task)]
    if empty := [question.id for question, answer in rows if answer is None]:
        raise ValueError(f"{len(empty)} lines have no fourth column, such as {empty[0]!r}; expected an answer there.")
    return [question for question, _ in rows], [Answer(question.id, answer) for question, answer in rows]


def _read_task(folder: Path, task: str) -> list[tuple[Question, str | None]]:
    rows = [
        (
            Question(f"{task}/{image}/{text}", image, text, "", _label(label, where), group=task, pair=image),
            answer,
        )
        for where, (image, text, label, answer) in _rows(folder, task)
    ]
    uneven = [image for image, n in Counter(question.image for question, _ in rows).items() if n != 2]
    if not rows or uneven:
        raise ValueError(
            f"{folder}: {task} has {len(rows)} questions, {len(uneven)} images with other than two"
            f"{f' such as {uneven[0]!r}' if uneven else ''}; ask the authors of MME for the files, see this module."
        )
    return rows


def _label(text: str, where: str) -> yesno.Label:
    return yesno.label_field({"label": text}, where, "label")


def _rows(folder: Path, task: str) -> Iterator[tuple[str, tuple[str, str, str, str | None]]]:
    """Yield the place of each line and its image, question, label and answer."""
    table = folder / f"{task}.txt"
    if table.is_file():
        for where, cells in _cells(table, (3, 4)):
            yield where, (cells[0], cells[1], cells[2], cells[3] if len(cells) == 4 else None)
        return
    for path in sorted((folder / task).glob("*.txt")):
        pictures = sorted(other.name for other in path.parent.glob("*") if other.stem == path.stem and other != path)
        for where, cells in _cells(path, (2,)):
            yield where, (pictures[0] if pictures else path.stem, cells[0], cells[1], None)


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
