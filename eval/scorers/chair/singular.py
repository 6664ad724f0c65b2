"""Plural to singular as pattern.en does it, which the `rohrbach` variant needs, mistakes included."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files


@dataclass(frozen=True)
class _SingularRules:
    prepositions: frozenset[str]
    suffixes_of_unchanged: frozenset[str]
    unchanged_endings: tuple[str, ...]
    irregular_endings: tuple[tuple[str, str], ...]
    rules: tuple[tuple[re.Pattern[str], str], ...]


@cache
def _singular_rules() -> _SingularRules:
    tables = json.loads((files("vlmfix.assets") / "chair" / "singular_rules.json").read_text("utf-8"))
    suffixes: set[str] = set()
    for word in tables["unchanged_if_suffix_of"]:
        suffixes.update(word[start:] for start in range(len(word) + 1))
    return _SingularRules(
        prepositions=frozenset(tables["prepositions"]),
        suffixes_of_unchanged=frozenset(suffixes),
        unchanged_endings=tuple(f"{ending}s" for ending in tables["unchanged_if_ends_with_plus_s"]),
        irregular_endings=tuple((plural, singular) for plural, singular in tables["irregular_endings"]),
        rules=tuple((re.compile(pattern), replacement) for pattern, replacement in tables["rules"]),
    )


@lru_cache(maxsize=1 << 16)
def singularize(word: str) -> str:
    """What pattern.en's `singularize` makes of a lower-case word: "women" -> "woman", but also "bus" -> "bu".

    Tables from clips/pattern, pattern/text/en/inflect.py (BSD-3-Clause).
    """
    tables = _singular_rules()
    parts = word.split("-")
    if len(parts) > 1 and parts[1] in tables.prepositions:  # mothers-in-law
        return "-".join((singularize(parts[0]), *parts[1:]))
    if word.endswith("'"):
        stem = word.rstrip("'")
        return singularize(stem) + "'s" * (len(word) - len(stem))
    if word in tables.suffixes_of_unchanged or word.endswith(tables.unchanged_endings):
        return word
    for plural, singular in tables.irregular_endings:
        if word.endswith(plural):
            return word.removesuffix(plural) + singular
    for pattern, replacement in tables.rules:
        if pattern.search(word):
            return pattern.sub(replacement, word)
    return word
