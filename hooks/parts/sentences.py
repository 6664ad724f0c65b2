"""Where a sentence ends, for methods that write one sentence after another."""

from __future__ import annotations

import re

ABBREVIATIONS = frozenset(["mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "e.g", "i.e", "approx"])
_END = re.compile(r"[.!?]+[\"')\]]*(?=\s)|\n\s*\n")


def sentence_end(text: str) -> int | None:
    """Characters up to the end of the first sentence, its closing mark included; `None` if none has ended yet.

    A full stop, ! or ? before white space (more of a number may follow else), or a blank line; not after an
    abbreviation or initial.
    """
    for mark in _END.finditer(text):
        before = text[: mark.start()]
        if not before.strip():
            continue
        if mark[0].startswith(".") and _is_short_form(before.rsplit(None, 1)[-1]):
            continue
        return mark.end() if mark[0].strip() else mark.start()
    return None


def _is_short_form(word: str) -> bool:
    """Whether a full stop after a word says that it is an abbreviation or an initial."""
    return word.strip("(\"'").lower() in ABBREVIATIONS or re.fullmatch(r"[A-Z]", word) is not None
