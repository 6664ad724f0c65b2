"""Answers whose first word is not what the parser reads: the rule stays, and it is said how often."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmfix.eval.api import compare
from vlmfix.eval.benchmarks.benchmark import FileOptions
from vlmfix.eval.scorers import yesno

ANSWERS = {
    "Yes": ("yes", "yes"),
    "No, there is not.": ("no", "no"),
    "**No**": ("yes", "no"),
    "No! There is none": ("yes", "no"),
    "NO": ("yes", "no"),
    "*no*, I see a cat": ("yes", "no"),
    "Yes, there is no doubt": ("no", "yes"),
    "I cannot tell": ("yes", None),
    "": ("yes", None),
    "不是": ("yes", None),
    "Nope": ("yes", None),
    "There isn't": ("yes", None),
    "Not at all": ("yes", None),
    "I see a dog.": ("yes", None),
}
"""Answer -> what POPE's rule reads, and what its first word says."""
NEGATED = ("Nope", "There isn't", "Not at all")
NOTHING = ("I cannot tell", "", "不是")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    answers=st.lists(st.sampled_from(sorted(ANSWERS)), min_size=1, max_size=8),
    groups=st.lists(st.sampled_from(["rare", "often"]), min_size=8, max_size=8),
    parser=st.sampled_from(["pope", "strict"]),
)
def test_half_heard_answers_are_counted(tmp_path, answers, groups, parser):
    questions = [
        {"id": n, "image": f"{n}.png", "question": "Is it?", "label": "no", "group": groups[n]}
        for n in range(len(answers))
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    lines = [json.dumps({"id": n, "answer": answer}) for n, answer in enumerate(answers)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = FileOptions(questions=str(tmp_path / "q.jsonl"), parser=parser)
    comparison = compare([tmp_path / "a.jsonl"], benchmark="yesno", options=options, n_resamples=10)[0]
    misheard = [
        answer for answer in answers if ANSWERS[answer][1] not in (None, ANSWERS[answer][0]) or answer in NEGATED
    ]
    guessed = [answer for answer in answers if answer in NOTHING]
    right = sum(ANSWERS[answer][0 if parser == "pope" else 1] == "no" for answer in answers)
    total = comparison.rows[0]
    assert total.estimates["accuracy"].value == pytest.approx(right / len(answers)), "the rule itself stays"
    assert total.misheard == (len(misheard) + len(guessed) if parser == "pope" else 0)
    notes = [note for note in comparison.notes if "say the other word" in note]
    if parser == "strict" or not misheard:
        assert not notes
    else:
        assert notes[0].startswith(f"a: {len(misheard)} of {len(answers)} answers say the other word than parser")
        assert repr(misheard[0]) in notes[0] and "parser strict takes the first word" in notes[0]

    silent = [
        note for note in comparison.notes if f"{len(guessed)} of {len(answers)} answers say neither yes nor no" in note
    ]
    assert bool(silent) == bool(guessed and parser == "pope")


@pytest.mark.parametrize("answer", sorted(ANSWERS))
def test_both_rules_read_as_said(answer):
    assert (yesno.PARSERS["pope"](answer, "no"), yesno.PARSERS["strict"](answer, "no")) == ANSWERS[answer]
