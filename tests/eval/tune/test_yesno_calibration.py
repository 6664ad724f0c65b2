"""Temperature and threshold of yes/no margins, on answers written by hand."""

import math

import numpy as np
import pytest

from vlmfix.eval.scorers import yesno
from vlmfix.eval.scorers.yesno import Question
from vlmfix.eval.tune.yesno import AS_IT_IS, Calibration, accuracy_at, calibration_error, fit, measure


def answers(margins, labels):
    questions = [Question(n, f"{n}.jpg", "Is it?", "", label) for n, label in enumerate(labels)]
    return yesno.score_margins(questions, dict(enumerate(margins)))


def shifted(seed, n=4000, temperature=2.0, threshold=1.0):
    """Labels drawn by the chance that a calibration with these settings gives to each margin."""
    generator = np.random.default_rng(seed)
    margins = generator.normal(1, 4, n)
    is_yes = generator.random(n) < Calibration(temperature, threshold, 0).p_yes(margins)
    return answers(margins.tolist(), ["yes" if yes else "no" for yes in is_yes])


def test_what_the_labels_were_drawn_by_is_found_again():
    fitted = fit(shifted(0))
    assert fitted.temperature == pytest.approx(2, abs=0.2) and fitted.threshold == pytest.approx(1, abs=0.25)


def test_it_is_measured_on_other_answers():
    measured = measure(fit(shifted(0)), shifted(1), n_resamples=100)
    before, after = measured.ece
    assert after < before / 2
    assert measured.differences["accuracy"].low > 0 and measured.differences["yes_ratio"].high < 0
    shares = list(measured.coverage.values())
    assert shares == sorted(shares) and shares[0] == pytest.approx(measured.after["accuracy"].value)


def test_calibration_error_by_hand():
    """Two answers with confidence .8, one of them right; two with confidence 1, both right: (|1.6 - 1| + 0) / 4."""
    p_yes = np.array([0.8, 0.8, 1.0, 0.0])
    assert calibration_error(p_yes, np.array([True, False, True, False])) == pytest.approx(0.15)


def test_the_surest_answers_come_first():
    p_yes, is_yes = np.array([0.6, 0.1, 0.9, 0.45]), np.array([False, False, True, True])
    assert accuracy_at(p_yes, is_yes, [1.0, 0.5, 0.1]) == {1.0: 0.5, 0.5: 1.0, 0.1: 1.0}
    assert float(AS_IT_IS.p_yes(np.array([math.log(3)]))[0]) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("margins", "labels", "message"),
    [
        ([1, -1], ["yes", "yes"], "all 2 labels are the same"),
        ([1, -1], ["yes", "no"], "without an error; calibrate on more questions"),
        ([1, -1, 2, -2], ["no", "yes", "no", "yes"], "no larger where yes is right"),
    ],
)
def test_what_no_temperature_can_tell(margins, labels, message):
    with pytest.raises(ValueError, match=message):
        fit(answers(margins, labels))
