"""Yes/no answers one can trust: temperature and threshold of the margin, chosen on other pictures. No torch.

    fitted = fit(answers_of(Run.read("runs/pope/organism/none-1a2b3c4d")))
    measured = measure(fitted, answers_of(Run.read("runs-test/pope/organism/none-5e6f7a8b")))
    measured.ece, measured.accuracy, measured.coverage

The chance of yes is sigmoid((margin - threshold) / temperature), both fitted by likelihood (Platt, "Probabilistic
outputs for support vector machines", 1999). A shifted threshold is also a baseline: many published gains on POPE are no
more than another share of yes. The expected calibration error is that of Guo et al., ICML 2017, arXiv 1706.04599.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmfix.eval.benchmarks.questions import YES_NO_FIGURES
from vlmfix.eval.run import results
from vlmfix.eval.run.results import Run
from vlmfix.eval.scorers import stats, yesno
from vlmfix.eval.scorers.stats import Difference, Estimate
from vlmfix.eval.scorers.yesno import AnswerScore

BINS = 15
"""Bins of equal width of the expected calibration error, as in Guo et al."""
COVERAGES = (1.0, 0.9, 0.8, 0.5)
"""Shares of the questions that are answered, those first of which the model is surest."""
FIGURES = ("accuracy", "F1", "yes_ratio")


@dataclass(frozen=True)
class Calibration:
    """How a margin becomes a chance."""

    temperature: float
    """Above 1: the model is surer than it is right."""
    threshold: float
    """Margin, log p(yes) - log p(no), from which on the answer is yes; 0 is the model's own."""
    questions: int
    """How many it was fitted on."""

    def p_yes(self, margins: np.ndarray) -> np.ndarray:
        """Chance of yes at each margin."""
        return 1 / (1 + np.exp(-np.clip((margins - self.threshold) / self.temperature, -500, 500)))


AS_IT_IS = Calibration(1.0, 0.0, 0)


@dataclass(frozen=True)
class Measured:
    """A calibration on questions that it was not fitted on, beside the untouched margins."""

    questions: int
    pictures: int
    ece: tuple[float, float]
    """Expected calibration error before and after, shares."""
    before: dict[str, Estimate]
    """`FIGURES` of the untouched margins."""
    after: dict[str, Estimate]
    differences: dict[str, Difference]
    """After minus before, on the same pictures."""
    coverage: dict[float, float]
    """Share of the questions answered -> accuracy on these."""
    text_f1: dict[str, float | None]
    """F1 by margin, by the first word of the text, and by POPE's rule."""
    elsewhere: float | None
    """Share of the answers whose first token is neither yes nor no with a chance above one half."""


def answers_of(run: Run) -> list[AnswerScore]:
    """The answers of a run to yes/no questions with their margins, each different question once.

    Raises:
        ValueError: the run is of another benchmark, or its records hold no probabilities of yes and no.
    """
    name = run.header["identity"]["benchmark"]
    (comparison,) = results.compare([run], 1, {name: yesno.MARGIN})
    scores = [score for group in comparison.groups[0] for score in group.scores]
    if not scores or not all(isinstance(score, AnswerScore) for score in scores):
        raise ValueError(f"{run.folder} holds no answers to yes/no questions; expected a run of pope, amber or yesno")
    return list({(score.question.image, score.question.text): score for score in scores}.values())


def fit(answers: Sequence[AnswerScore]) -> Calibration:
    """Temperature and threshold that make the labels likeliest.

    Raises:
        ValueError: all labels are the same, or yes and no are parted without an error, so that no temperature is best.
    """
    from scipy.optimize import minimize

    margins, is_yes = _margins(answers), _labels(answers)
    if is_yes.all() or not is_yes.any():
        raise ValueError(f"all {len(answers)} labels are the same; expected questions with yes and with no.")
    if margins[is_yes].min() > margins[~is_yes].max():
        raise ValueError(f"margins part all {len(answers)} yes from no without an error; calibrate on more questions.")
    signs = np.where(is_yes, 1.0, -1.0)

    def surprise(slope_and_bias: np.ndarray) -> float:
        slope, bias = slope_and_bias
        return float(np.logaddexp(0, -signs * (slope * margins + bias)).mean())

    slope, bias = minimize(surprise, np.array([1.0, 0.0]), method="BFGS").x
    if slope <= 0:
        raise ValueError("the margin is no larger where yes is right; a temperature cannot mend that.")
    return Calibration(float(1 / slope), float(-bias / slope), len(answers))


def measure(
    calibration: Calibration,
    answers: Sequence[AnswerScore],
    run: Run | None = None,
    n_resamples: int = stats.RESAMPLES,
) -> Measured:
    """What a calibration does to answers that it was not fitted on.

    Args:
        calibration: What `fit` gave.
        answers: Answers with margins.
        run: Their run, for what its texts say beside the margins.
        n_resamples: How often the bootstrap draws pictures.
    """
    margins, is_yes = _margins(answers), _labels(answers)
    questions = [score.question for score in answers]
    metrics = {name: YES_NO_FIGURES[name].formula for name in FIGURES}
    by_threshold = []
    for threshold in (AS_IT_IS.threshold, calibration.threshold):
        shifted = {score.question.id: float(margin - threshold) for score, margin in zip(answers, margins, strict=True)}
        by_threshold.append(yesno.counts(yesno.score_margins(questions, shifted)))
    images = yesno.clusters(answers)
    p_yes = calibration.p_yes(margins)
    return Measured(
        questions=len(answers),
        pictures=len(images),
        ece=(calibration_error(AS_IT_IS.p_yes(margins), is_yes), calibration_error(p_yes, is_yes)),
        before=stats.estimates(by_threshold[0], metrics, n_resamples),
        after=stats.estimates(by_threshold[1], metrics, n_resamples),
        differences=stats.differences(by_threshold[1], images, by_threshold[0], images, metrics, n_resamples),
        coverage=accuracy_at(p_yes, is_yes, COVERAGES),
        text_f1={"margin": _f1(by_threshold[0]), **({} if run is None else _f1_of_texts(run))},
        elsewhere=None if run is None else _elsewhere(run),
    )


def calibration_error(p_yes: np.ndarray, is_yes: np.ndarray) -> float:
    """Mean distance of confidence and accuracy over `BINS` of confidence, weighted by how many answers each has."""
    confidence, right = np.maximum(p_yes, 1 - p_yes), (p_yes > 0.5) == is_yes
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(p_yes))


def accuracy_at(p_yes: np.ndarray, is_yes: np.ndarray, coverages: Sequence[float]) -> dict[float, float]:
    """Accuracy on the surest share of the questions, for each of the shares; at least one question is answered."""
    surest_first = np.argsort(-np.abs(p_yes - 0.5), kind="stable")
    right = ((p_yes > 0.5) == is_yes)[surest_first]
    return {share: float(right[: max(1, round(share * len(right)))].mean()) for share in coverages}


def _margins(answers: Sequence[AnswerScore]) -> np.ndarray:
    return np.array([score.margin for score in answers], dtype=float)


def _labels(answers: Sequence[AnswerScore]) -> np.ndarray:
    return np.array([score.question.label == "yes" for score in answers])


def _f1(counts: dict[str, np.ndarray]) -> float | None:
    return stats.number_or_none(YES_NO_FIGURES["F1"].formula(stats.total(counts)))


def _f1_of_texts(run: Run) -> dict[str, float | None]:
    """F1 of the texts by two parsers."""
    f1 = {}
    for parser in ("strict", "pope"):
        (comparison,) = results.compare([run], 1, {run.header["identity"]["benchmark"]: parser})
        scores = [score for group in comparison.groups[0] for score in group.scores]
        once = {(score.question.image, score.question.text): score for score in scores}
        f1[f"text, parser {parser}"] = _f1(yesno.counts(list(once.values())))
    return f1


def _elsewhere(run: Run) -> float:
    chances = [sum(np.exp(value) for value in record["first_token"].values()) for record in run.records]
    return float(np.mean([chance < 0.5 for chance in chances]))
