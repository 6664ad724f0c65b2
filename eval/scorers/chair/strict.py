"""The variant `strict`: the objects of COCO that a caption names in correct English.

It looks for the longest phrase at each word, so it needs no normal form of words: plurals and compounds stand in its
table (`strict_table.json`). A word that only describes another thing is no object: a baby elephant, an orange shirt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from vlmfix.eval.scorers.chair.tokens import Token, lower, sentences, token_at, words_of
from vlmfix.eval.scorers.chair.vocabulary import Mention


@dataclass(frozen=True)
class _Tables:
    nodes_of: Mapping[str, tuple[str, ...]]
    """Phrase or compound -> the objects that it names."""
    phrases: frozenset[str]
    forms_after: Mapping[str, frozenset[str]]
    """Modifier -> words before which it is no object of its own."""
    adjectives: frozenset[str]
    no_colour_before: frozenset[str]
    colour_after: frozenset[str]
    colours: frozenset[str]


@cache
def _tables() -> _Tables:
    tables = json.loads((files("vlmfix.assets") / "chair" / "strict_table.json").read_text("utf-8"))
    nodes_of = {phrase: (node,) for phrase, node in tables["phrases"].items()}
    nodes_of |= {phrase: tuple(nodes) for phrase, nodes in tables["compounds"].items()}
    forms_after: dict[str, frozenset[str]] = {}
    for rule in tables["modifiers"]:
        forms_after |= dict.fromkeys(rule["words"], frozenset(tables[rule["before"]]))
    orange = tables["orange"]
    return _Tables(
        nodes_of=nodes_of,
        phrases=frozenset(tables["phrases"]),
        forms_after=forms_after,
        adjectives=frozenset(tables["adjectives_only"]),
        no_colour_before=frozenset(orange["colour_if_next_is_word_not_in"]),
        colour_after=frozenset(orange["colour_if_previous_in"]),
        colours=frozenset(orange["colours"]),
    )


class _Object(NamedTuple):
    """An object named in a sentence, and the first and last of the tokens that name it."""

    word: str
    node: str
    first: int
    last: int


_STRAIGHT = str.maketrans("‘’“”", "''\"\"")
_SLASH = re.compile(r"(?<=\w)/(?=\w)")
_STRICT_END = re.compile(
    r"""(?<=[.!?])\s+|(?<=[.!?]["')\]])\s+"""
    r"|(?<=[^\W\d_][.!?])(?=[*;:@({\[])"  # **A car.** And
    r"|(?<=[^\W\d_]\.)(?=[^\W\d_]{2})"  # car.And
)
"""What stands between two sentences."""
_LONGEST = 3  # words in a phrase
_JOINERS = frozenset(("and", "or", ","))


def strict(caption: str) -> list[Mention]:
    """The objects of COCO that a caption names in correct English: buses and hair dryers, no orange shirts."""
    text, origin = lower(caption)
    text = _SLASH.sub(" ", text.translate(_STRAIGHT))
    mentions: list[Mention] = []
    tokens_before = 0  # in the sentences before this one
    for sentence_start, sentence_end in sentences(text, _STRICT_END):
        tokens: list[Token] = []
        for _, start, end in words_of(text, sentence_start, sentence_end):
            tokens += _unhyphenated(text, start, end, origin)
        for word, node, first, last in _objects([token.text for token in tokens]):
            mentions.append(Mention(word, node, tokens_before + first, tokens[first].start, tokens[last].end))
        tokens_before += len(tokens)
    return mentions


def _unhyphenated(text: str, start: int, end: int, origin: Sequence[int]) -> Iterator[Token]:
    """Skate-boards -> skateboards, laptop-computer -> laptop computer; what makes no phrase stays as it is."""
    phrases = _tables().phrases
    parts = text[start:end].split("-")
    joined = "".join(parts)
    if len(parts) > 1 and joined in phrases:
        yield Token(joined, origin[start], origin[end - 1] + 1)
    elif len(parts) > 1 and (" ".join(parts) in phrases or phrases.issuperset(parts)):
        for part in parts:
            yield token_at(text, start, start + len(part), origin)
            start += len(part) + 1
    else:
        yield token_at(text, start, end, origin)


def _objects(words: Sequence[str]) -> list[_Object]:
    objects: list[_Object] = []
    place = 0
    while place < len(words):
        phrase = _longest_phrase(words, place)
        last = place + phrase.count(" ")
        if not _describes(words, place, phrase):
            for node in _tables().nodes_of.get(phrase, ()):
                objects.append(_Object(phrase, node, place, last))
        place = last + 1
    if any(item.node == "toilet" for item in objects):  # the seat of a toilet is no chair
        objects = [item for item in objects if item.word not in ("seat", "seats")]
    return _merged(objects)


def _longest_phrase(words: Sequence[str], place: int) -> str:
    """The longest phrase of the table that starts at this word, or the word itself."""
    for length in range(_LONGEST, 1, -1):
        phrase = " ".join(words[place : place + length])
        if phrase in _tables().nodes_of:
            return phrase
    return words[place]


def _merged(objects: Sequence[_Object]) -> list[_Object]:
    """Neighbouring words for the same object are one naming: a pickup truck is one truck."""
    merged: list[_Object] = []
    for item in objects:
        previous = merged[-1] if merged else None
        if previous is not None and previous.node == item.node and previous.last + 1 == item.first:
            merged[-1] = _Object(f"{previous.word} {item.word}", item.node, previous.first, item.last)
        else:
            merged.append(item)
    return merged


def _describes(words: Sequence[str], place: int, word: str) -> bool:
    """Whether the word is part of the description of something else: a baby elephant, a female, an orange shirt."""
    tables = _tables()
    if word == "orange":
        return _is_colour(words, place)
    if word in tables.adjectives:
        return True
    following = (" ".join(words[place + 1 : place + 1 + length]) for length in range(1, _LONGEST + 1))
    return not tables.forms_after.get(word, frozenset()).isdisjoint(following)


def _is_colour(words: Sequence[str], place: int) -> bool:
    """Whether the "orange" at this place is a colour and no fruit, by the two words on either side."""
    tables = _tables()
    padded = ["", "", *words, "", ""]
    second_before, before, _, after, second_after = padded[place : place + 5]
    before_a_noun = after[:1].isalpha() and after not in tables.no_colour_before
    joined_to_colour_before = before in _JOINERS and second_before in tables.colours
    joined_to_colour_after = after in _JOINERS and second_after in tables.colours
    return before_a_noun or before in tables.colour_after or joined_to_colour_before or joined_to_colour_after
