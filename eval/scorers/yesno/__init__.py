"""Yes/no questions about pictures: reading files, reading answers, joining the two, and the figures.

All yes/no benchmarks are scored here; they add their questions, groups and figures of their own. Evaluators in use read
the same answers in different ways, so the parser is part of every figure's name.

    questions = read_questions("questions.jsonl")
    scores = score_answers(questions, read_answers("answers.jsonl"), "strict")
    for group, part in by_group(scores).items():
        sums = {name: column.sum() for name, column in counts(part).items()}
        METRICS["accuracy"](sums), METRICS["F1"](sums), METRICS["yes_ratio"](sums)
"""

from vlmfix.eval.scorers.reading import read_records
from vlmfix.eval.scorers.yesno.figures import (
    METRICS,
    PAIR_METRICS,
    add_up,
    by_group,
    clusters,
    counts,
    labelled_no,
)
from vlmfix.eval.scorers.yesno.margins import auroc, average_precision, ranking
from vlmfix.eval.scorers.yesno.parsers import MARGIN, PARSERS, Parser, heard, rule, says_nothing
from vlmfix.eval.scorers.yesno.questions import (
    ANSWER_KEYS,
    Answer,
    Answers,
    Label,
    Question,
    check_ids,
    doubled,
    id_field,
    label_field,
    listed,
    read_answers,
    read_questions,
    text_field,
)
from vlmfix.eval.scorers.yesno.scores import AnswerScore, mended, same_image, score_answers, score_margins

__all__ = [
    "ANSWER_KEYS",
    "MARGIN",
    "METRICS",
    "PAIR_METRICS",
    "PARSERS",
    "Answer",
    "AnswerScore",
    "Answers",
    "Label",
    "Parser",
    "Question",
    "add_up",
    "auroc",
    "average_precision",
    "by_group",
    "check_ids",
    "clusters",
    "counts",
    "doubled",
    "heard",
    "id_field",
    "label_field",
    "labelled_no",
    "listed",
    "mended",
    "ranking",
    "read_answers",
    "read_questions",
    "read_records",
    "rule",
    "same_image",
    "says_nothing",
    "score_answers",
    "score_margins",
    "text_field",
]
