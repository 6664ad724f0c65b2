"""From a caption to the objects that it names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from vlmfix.eval.scorers.chair.strict import strict
from vlmfix.eval.scorers.chair.variants import NORMALISERS, check_variant
from vlmfix.eval.scorers.chair.vocabulary import Mention, Vocabulary, coco_vocabulary

_COCO_ONLY = ("opera_approx", "strict")  # variants made of tables for the words of COCO
_IN_CONTEXT = ("opera", "strict")  # variants in which what follows a word may change it
_STOP_INSIDE = re.compile(r"[.!?](?!\*+$)\S")


class _Item(NamedTuple):
    """What is looked up, a token's text or a joined pair of them, with its first and last token."""

    word: str
    first: int
    last: int


def mentions(caption: str, vocabulary: Vocabulary | None = None, variant: str = "rohrbach") -> list[Mention]:
    """Every object that a caption names, in order, one entry per naming (`utils/chair.py` of LisaAnne/Hallucination).

    Spans point into the caption as given. They are right also after "toilet seat", where the reference's indices slip.

    Raises:
        ValueError: the variant is unknown, lacks what it needs, or does not know the words of this vocabulary.
    """
    check_variant(variant)
    if variant in _COCO_ONLY and vocabulary not in (None, coco_vocabulary()):
        raise ValueError(f"the variant {variant} knows the words of COCO only; use rohrbach with other vocabularies.")
    if variant == "strict":
        return strict(caption)
    vocabulary = vocabulary or coco_vocabulary()
    tokens = NORMALISERS[variant](caption)
    items = list(_items([token.text for token in tokens], vocabulary))
    is_toilet_seat = any(item.word == "toilet" for item in items)  # it is no chair, and no other seat is either
    return [
        Mention(word, vocabulary.node_of[word], first, tokens[first].start, tokens[last].end)
        for word, first, last in items
        if word in vocabulary.node_of and not (word == "seat" and is_toilet_seat)
    ]


def _items(words: Sequence[str], vocabulary: Vocabulary) -> Iterator[_Item]:
    """Words that may name an object, and known pairs, which are joined greedily from the left."""
    double_words, matters = vocabulary.double_words, vocabulary.matters
    joined = -1  # the second word of the last pair
    for place, word in enumerate(words):
        if word not in matters or place == joined:
            continue
        pair = double_words.get(f"{word} {words[place + 1]}") if place + 1 < len(words) else None
        if pair is not None:
            joined = place + 1
            yield _Item(pair, place, joined)
        else:
            yield _Item(word, place, place)


def prefix_objects(
    words: Sequence[str], lengths: Sequence[int], vocabulary: Vocabulary | None = None, variant: str = "rohrbach"
) -> list[frozenset[str]]:
    """The objects that the first so many of a caption's white-space separated words name, for each of the lengths.

    As `mentions` of these words joined by blanks, in one pass where a word's form does not depend on those after it.
    """
    vocabulary = vocabulary or coco_vocabulary()
    caption = " ".join(words)
    grows_in_lower_case = len(caption.lower()) != len(caption)
    one_pass = variant not in _IN_CONTEXT and not grows_in_lower_case
    objects_of: dict[int, frozenset[str]] = {}
    apart = []  # lengths whose words are read by themselves
    for length in set(lengths):
        last_word = words[min(length, len(words)) - 1] if length and words else ""
        # The full stop inside "car.>" or "car.*hat." is part of the word, unless the caption ends there.
        if not one_pass or _STOP_INSIDE.search(last_word):
            apart.append(length)
    for length in apart:
        objects_of[length] = frozenset(
            mention.node for mention in mentions(" ".join(words[:length]), vocabulary, variant)
        )
    if one_pass:
        objects_of |= _objects_in_one_pass(words, sorted(set(lengths) - set(apart)), vocabulary, variant)
    return [objects_of[length] for length in lengths]


def _objects_in_one_pass(
    words: Sequence[str], lengths: Sequence[int], vocabulary: Vocabulary, variant: str
) -> dict[int, frozenset[str]]:
    """The objects that the first so many words name, for each of the lengths, which rise."""
    tokens = NORMALISERS[variant](" ".join(words))
    items = list(_items([token.text for token in tokens], vocabulary))
    word_ends = [0, *accumulate(map(len, words), lambda end, length: end + 1 + length)]  # in characters
    objects_of: dict[int, frozenset[str]] = {}
    synonyms: set[str] = set()  # of all whole items read so far
    toilet = False
    place = 0  # of the next item
    for length in lengths:
        end = word_ends[min(length, len(words))]
        while place < len(items) and tokens[items[place].last].end <= end:
            word = items[place].word
            toilet = toilet or word == "toilet"
            if word in vocabulary.node_of:
                synonyms.add(word)
            place += 1
        # The cut may go through a pair: of "hot dog" the first word is left, which may name an object by itself.
        half = set()
        if place < len(items):
            token = tokens[items[place].first]
            if token.end <= end and token.text in vocabulary.node_of:
                half = {token.text}
        seat = {"seat"} if toilet or "toilet" in half else set()
        objects_of[length] = frozenset(vocabulary.node_of[word] for word in (synonyms | half) - seat)
    return objects_of
