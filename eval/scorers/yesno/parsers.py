"""How an answer is read as yes or no: the rules of the evaluators in use, and two of our own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vlmfix.eval.scorers.yesno.questions import Label, yes_or_no


@dataclass(frozen=True)
class Parser:
    """One way to read an answer as yes or no, and what becomes of answers that are neither."""

    read: Callable[[str, Label], Label | None]
    """Answer and label of the question -> yes, no or None. No parser but `vcd` looks at the label."""
    unparsed: Literal["never", "wrong", "dropped"]
    """None counts as a wrong answer, or leaves every count, or does not occur."""
    rule: str
    """What it reads, in words, and whose code does so."""

    def __call__(self, answer: str, label: Label) -> Label | None:
        """Read one answer."""
        return self.read(answer, label)


def _first_sentence(answer: str) -> list[str]:
    return answer.partition(".")[0].replace(",", "").split(" ")


def _pope(answer: str, label: Label) -> Label | None:
    return "yes" if {"No", "not", "no"}.isdisjoint(_first_sentence(answer)) else "no"


def _negword(answer: str, label: Label) -> Label | None:
    words = answer.replace(".", "").replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no", "NO") or word.endswith("n't") for word in words) else "yes"


def _vcd(answer: str, label: Label) -> Label | None:
    return "yes" if (label in answer.lower()) == (label == "yes") else "no"


def _repope(answer: str, label: Label) -> Label | None:
    text = answer.lower()
    if "yes" in text:
        return "yes"
    return "no" if "no" in text else None


def _lmms_eval(answer: str, label: Label) -> Label | None:
    return yes_or_no(answer.lower().strip())


def _vlmevalkit(answer: str, label: Label) -> Label | None:
    text = bare = answer.lower()
    grouped = re.search(r"\d,\d", text)  # a comma within a number makes every sign vanish
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        touches_blank = f"{sign} " in text or f" {sign}" in text
        bare = bare.replace(sign, "" if grouped or touches_blank else " ")
    words = re.sub(r"(?<!\d)\.(?!\d)", "", bare, count=32).split()
    return _either("yes" in words, "no" in words)


def _either(yes: bool, no: bool) -> Label | None:
    """The one that holds, None where both or neither do."""
    if yes == no:
        return None
    return "yes" if yes else "no"


def _amber(answer: str, label: Label) -> Label | None:
    return {"Yes": "yes", "No": "no"}.get(answer)  # type: ignore[return-value]


def _mme(answer: str, label: Label) -> Label | None:
    return _repope(f"{answer}\n".lower()[:4], label)


def _mme_lmms_eval(answer: str, label: Label) -> Label | None:
    text = answer.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or _repope(text[:4], label)  # type: ignore[return-value]


def _icd(answer: str, label: Label) -> Label | None:
    if _pope(answer, label) == "no":
        return "no"
    says_yes = not {"Yes", "yes"}.isdisjoint(_first_sentence(answer))
    return "yes" if says_yes else None


def _strict(answer: str, label: Label) -> Label | None:
    first_word = re.search(r"[^\W\d_]+", answer)
    return yes_or_no(first_word[0].lower()) if first_word else None


_HEDGES = (
    *("not sure", "unsure", "unclear", "not know", "n't know", "cannot tell", "can't tell", "cannot determine"),
    *("can't determine", "cannot be determined", "not possible to", "unable to"),
)
_NEGATIONS = ("no", "not", "none", "nothing", "cannot")


def _sentence(answer: str, label: Label) -> Label | None:
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", answer.lower())
    if words and words[0] in ("yes", "yeah", "yep"):
        return "yes"
    if words and words[0] in ("no", "nope"):
        return "no"
    text = " ".join(words)
    if any(hedge in text for hedge in _HEDGES):
        return None
    negated = any(word in _NEGATIONS or word.endswith("n't") for word in words)
    return _either("yes" in words, negated)


def heard(answer: str) -> Label | None:
    """What a reader hears: the first word, else a yes or a negation; `None` where it is neither."""
    return _strict(answer, "no") or _sentence(answer, "no")


def says_nothing(answer: str) -> bool:
    """Whether an answer holds no Latin letter, or says that it does not know: nothing that could be read as yes."""
    is_hedge = any(hedge in " ".join(answer.lower().split()) for hedge in _HEDGES)
    return heard(answer) is None and (is_hedge or re.search("[a-zA-Z]", answer) is None)


PARSERS: dict[str, Parser] = {
    "pope": Parser(
        _pope,
        "never",
        "no if a word before the first full stop is No, not or no, else yes: POPE's evaluate.py, LLaVA, HALC",
    ),
    "negword": Parser(
        _negword, "never", "no if any word is No, not, no, NO or ends in n't, else yes: OPERA, PAI, VISTA"
    ),
    "vcd": Parser(_vcd, "never", "right if the label's letters occur anywhere, so it knows the label: VCD, cd_rethink"),
    "vaf": Parser(_vcd, "never", "as vcd, for VAF's 'no or not' are the letters no: VAF"),
    "repope": Parser(_repope, "dropped", "the letters yes, else the letters no ('snow' is no): RePOPE"),
    "lmms_eval": Parser(
        _lmms_eval,
        "wrong",
        "exactly yes or no, so 'Yes.' is wrong: lmms-eval 0.7.3",
    ),
    "vlmevalkit": Parser(_vlmevalkit, "wrong", "the word yes or the word no, not both: VLMEvalKit without a judge"),
    "icd": Parser(_icd, "dropped", "as pope, but yes needs Yes or yes: ICD"),
    "dashb": Parser(_repope, "wrong", "as repope, but an answer that is neither is wrong: DASH-B"),
    "amber": Parser(_amber, "wrong", "exactly Yes or No, so 'no' and 'No.' are wrong: AMBER's inference.py"),
    "mme": Parser(_mme, "wrong", "the letters yes, else no, among the first four ('know' is no): MME's calculation.py"),
    "mme_lmms_eval": Parser(
        _mme_lmms_eval, "wrong", "as mme without outer blanks and full stops, y and n also count: lmms-eval 0.7.3"
    ),
    "strict": Parser(_strict, "wrong", "the first word is yes or no: vlmfix"),
    "sentence": Parser(_sentence, "wrong", "first word, else a yes or a negation without a hedge: vlmfix"),
}
"""Rules for reading answers, by the name that goes with every figure."""

MARGIN = "margin"
"""In place of a parser: answers are read from the first token's probabilities."""


def rule(parser: str) -> str:
    """What a parser reads, and what becomes of answers that are neither yes nor no."""
    if parser == MARGIN:
        return "the first token's margin, log p(yes) - log p(no): yes above 0"
    consequence = {"never": "", "wrong": "; unparsed answers are wrong", "dropped": "; unparsed answers are left out"}
    return PARSERS[parser].rule + consequence[PARSERS[parser].unparsed]
