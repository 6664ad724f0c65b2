"""Words and signs of a caption, each with its place in it, parted as NLTK's `word_tokenize` parts them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

_SENTENCE_END = re.compile(r"""[.!?](?=[)";}\]*:@'({\[‘’“”«»!?]|\s+\S)""")
"""A sign that may end a sentence; signs that no word holds may follow it at once."""
_CLOSED = re.compile(r"""["')\]}‘’“”«»]+(?:\s+|(?=--)|$)""")
"""What stands at the start of a sentence and belongs to the one before."""

_CLOSERS = frozenset("""])}>"'»”’""")
_SYMBOLS = r"""\[\](){}<>;@#$%&?!*"«»“”‘’„\u2012-\u2015"""
_SCAN = re.compile(
    rf"(?P<symbol>\.\.+|--|`+|''|[{_SYMBOLS}]|[:,](?!\d))"
    rf"|(?:[^\s`{_SYMBOLS}.\-',:]+|(?!\.\.|--|''|[:,](?!\d))[.\-',:])+"
)
_BLANK = re.compile(r"\s")
_CHUNK = re.compile(r"\S+")
_OPENING_QUOTE = re.compile(r"'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)")
_ENDING = re.compile(r"(.*[^'])(n't|'ll|'re|'ve|'s|'m|'d|')")
_TWO_WORDS = frozenset(("cannot", "gonna", "gotta", "gimme", "lemme", "wanna"))  # each parts after its third letter


class Token(NamedTuple):  # made by the million; a dataclass takes twice the time
    """A word or sign of a caption: its text in lower case, and its characters in the caption (end excluded)."""

    text: str
    start: int
    end: int


def tokenize(caption: str, form: Callable[[str], str] | None = None) -> list[Token]:
    """Words and signs of a caption, lower-cased, as NLTK's `word_tokenize` (Punkt, then Treebank rules) parts them.

    Needs no NLTK and no data. Known abbreviations ("Mr.", "p.m.") keep no full stop here; no object depends on them.

    Args:
        caption: Any text.
        form: What becomes of each word, such as its singular.
    """
    text, origin = lower(caption)
    tokens = []
    for sentence_start, sentence_end in punkt_sentences(text):
        words = words_of(text, sentence_start, sentence_end)
        tokens += [Token(word if form is None else form(word), start, end) for word, start, end in words]
    if isinstance(origin, range):  # nearly always
        return tokens
    return [Token(word, origin[start], origin[end - 1] + 1) for word, start, end in tokens]


def lower(caption: str) -> tuple[str, Sequence[int]]:
    """The caption in lower case, and for each of its characters the one in the caption that it comes from."""
    text = caption.lower()
    if len(text) == len(caption):
        return text, range(len(text))
    # Some characters grow in lower case (U+0130 becomes two), so places in the text are not places in the caption.
    origin: list[int] = []
    for place, character in enumerate(caption):
        origin += [place] * len(character.lower())
    return text, origin


def token_at(text: str, start: int, end: int, origin: Sequence[int]) -> Token:
    """The token from `start` to `end` of a lower-cased text, at its place in the caption (`lower` gives both)."""
    return Token(text[start:end], origin[start], origin[end - 1] + 1)


def punkt_sentences(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each sentence, as NLTK's Punkt parts a text in lower case (but for abbreviations).

    In "**a dog.** a cat." the first full stop ends a sentence, so that it is no part of "dog".
    """
    start = 0
    for end in _sentence_ends(text):
        if end < start:  # within what the sentence before has taken
            continue
        next_start = end
        while next_start < len(text) and text[next_start].isspace():
            next_start += 1
        if closed := _CLOSED.match(text, next_start):
            next_start = closed.end()
        yield start, next_start if closed else end
        start = next_start
    yield start, len(text)


def _sentence_ends(text: str) -> Iterator[int]:
    """Where sentences end; of several places in one run of characters without blanks, only the last counts."""
    last_end = None
    for sign in _SENTENCE_END.finditer(text):
        if last_end is not None and _BLANK.search(text, last_end, sign.start()):
            yield last_end
        last_end = sign.end()
    if last_end is not None:
        yield last_end


def sentences(text: str, gaps: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Start and end of each sentence; `gaps` matches what stands between two of them."""
    start = 0
    for gap in gaps.finditer(text):
        yield start, gap.start()
        start = gap.end()
    yield start, len(text)


def words_of(text: str, start: int, end: int) -> list[tuple[str, int, int]]:
    """The words of the sentence that stands at these places of a text, each with its own place in the text: a final
    full stop is a word of its own, inner ones stay in theirs."""
    closed = end  # before closing quotes, brackets and blanks
    while closed > start and (text[closed - 1] in _CLOSERS or text[closed - 1].isspace()):
        closed -= 1
    stop = closed - 1
    has_final_stop = stop > start and text[stop] == "." and text[stop - 1] != "."
    if not has_final_stop:
        return _between_blanks(text, start, end)
    return [*_between_blanks(text, start, stop), (".", stop, closed), *_between_blanks(text, closed, end)]


def _between_blanks(text: str, start: int, end: int) -> list[tuple[str, int, int]]:
    words = []
    for match in _CHUNK.finditer(text, start, end):
        place = match.start()
        for word, word_start, word_end in _words_of_chunk(match[0]):
            words.append((word, place + word_start, place + word_end))
    return words


@lru_cache(maxsize=1 << 16)  # captions share a few thousand of them
def _words_of_chunk(chunk: str) -> tuple[tuple[str, int, int], ...]:
    """Words and signs of a text without blanks, each with its place in it."""
    words = []
    for match in _SCAN.finditer(chunk):
        run, start = match[0], match.start()
        nothing_to_part = match.lastgroup or ("'" not in run and run not in _TWO_WORDS)  # a symbol, or one word
        for piece in [run] if nothing_to_part else _pieces(run):
            words.append((piece, start, start + len(piece)))
            start += len(piece)
    return tuple(words)


def _pieces(word: str) -> list[str]:
    """Part quotes, contractions and fused words: "'dogs'" -> ' dogs ', "isn't" -> is n't, "cannot" -> can not."""
    before, after = [], []
    if "'" in word:
        if _OPENING_QUOTE.match(word):
            before, word = ["'"], word[1:]
        if contraction := _ENDING.fullmatch(word):
            word, after = contraction[1], [contraction[2]]
    middle = [word[:3], word[3:]] if word in _TWO_WORDS else [word]
    return [*before, *middle, *after]
