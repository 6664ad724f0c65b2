"""From a caption to its words, by each of the rules that CHAIR's variants follow.

A variant of CHAIR is a way to bring the words of a caption into the form in which they are looked up, together with
ground truth made in the same way. Scores of different variants do not compare.

| variant | words | needs | used by |
|---|---|---|---|
| `rohrbach` | every token made singular, as pattern.en does it | nothing | Rohrbach et al. 2018, POPE, HALC |
| `opera` | WordNet lemma of every token, by its part of speech | nltk and its data | OPERA and most since |
| `opera_approx` | table of the lemmas that matter (ours) | nothing | in place of `opera`, under its own name |
| `inflect` | `singular_noun` of the package inflect | inflect | ILVAD, VHR |
| `strict` | correct English (ours) | nothing | whoever wants buses counted and orange shirts not |

`NORMALISERS` holds the first four: caption -> its words, normalised, each with its place in the caption. `strict` finds
its objects by itself.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, NamedTuple

_TABLES = files("vlmfix.assets") / "chair"

_SENTENCE_END = re.compile(r"""(?<=[.!?])\s+|(?<=[.!?]["')\]])\s+""")
_CLOSERS = frozenset("""])}>"'»”’""")
_SYMBOLS = r"""\[\](){}<>;@#$%&?!*"«»“”‘’„\u2012-\u2015"""
_SCAN = re.compile(
    rf"(?P<symbol>\.\.+|--|`+|''|[{_SYMBOLS}]|[:,](?!\d))"
    rf"|(?:[^\s`{_SYMBOLS}.\-',:]+|(?!\.\.|--|''|[:,](?!\d))[.\-',:])+"
)
_OPENING_QUOTE = re.compile(r"'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)")
_ENDING = re.compile(r"(.*[^'])(n't|'ll|'re|'ve|'s|'m|'d|')")
_TWO_WORDS = frozenset(("cannot", "gonna", "gotta", "gimme", "lemme", "wanna"))  # each parts after its third letter


class Token(NamedTuple):  # made by the million; a dataclass takes twice the time
    """A word or sign of a caption: its text in lower case, and its characters in the caption (end excluded)."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Mention:
    """One naming of an object in a caption."""

    word: str
    """The synonym as looked up: in the variant's form, pairs joined."""
    node: str
    """The object."""
    index: int
    """Which token of the caption, the first where several make up the word."""
    start: int
    """First character in the caption."""
    end: int
    """Character after the last one."""


def tokenize(caption: str) -> list[Token]:
    """Words and signs of a caption, lower-cased, as NLTK's `word_tokenize` (Punkt, then Treebank rules) parts them.

    Needs no NLTK and no data. Known abbreviations ("Mr.", "p.m.") keep no full stop here; no object depends on them.
    """
    text, origin = _lower(caption)
    return [
        _token(text, sentence + start, sentence + end, origin)
        for sentence, after in _sentences(text, _SENTENCE_END)
        for start, end in _words(text[sentence:after])
    ]


def _lower(caption: str) -> tuple[str, Sequence[int]]:
    """The caption in lower case, and for each of its characters the one in the caption that it comes from."""
    text = caption.lower()
    if len(text) == len(caption):
        return text, range(len(text))
    return text, [at for at, char in enumerate(caption) for _ in char.lower()]  # U+0130 becomes two characters


def _token(text: str, start: int, end: int, origin: Sequence[int]) -> Token:
    return Token(text[start:end], origin[start], origin[end - 1] + 1)


def _sentences(text: str, ends: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    start = 0
    for gap in ends.finditer(text):
        yield start, gap.start()
        start = gap.end()
    yield start, len(text)


@lru_cache(maxsize=1 << 12)  # captions are scored again cut short, by other variants, with other truth
def _words(sentence: str) -> tuple[tuple[int, int], ...]:
    """Spans of the words in a sentence: a final full stop is a word of its own, inner ones stay in theirs."""
    last = len(sentence)
    while last and (sentence[last - 1] in _CLOSERS or sentence[last - 1].isspace()):
        last -= 1
    stop = last - 1
    if last < 2 or sentence[stop] != "." or sentence[stop - 1] == ".":
        return tuple(_scan(sentence, 0, len(sentence)))
    return (*_scan(sentence, 0, stop), (stop, last), *_scan(sentence, last, len(sentence)))


def _scan(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    for match in _SCAN.finditer(text, start, end):
        if match["symbol"]:
            yield match.span()
            continue
        at = match.start()
        for piece in _pieces(match[0]):
            yield at, at + len(piece)
            at += len(piece)


def _pieces(run: str) -> list[str]:
    """Part quotes, contractions and fused words: "'dogs'" -> ' dogs ', "isn't" -> is n't, "cannot" -> can not."""
    before, after = [], []
    if "'" in run:
        if _OPENING_QUOTE.match(run):
            before, run = ["'"], run[1:]
        if ending := _ENDING.fullmatch(run):
            run, after = ending[1], [ending[2]]
    return [*before, *((run[:3], run[3:]) if run in _TWO_WORDS else (run,)), *after]


@dataclass(frozen=True)
class _SingularRules:
    prepositions: frozenset[str]
    suffixes_of_unchanged: frozenset[str]
    unchanged_endings: tuple[str, ...]
    irregular_endings: tuple[tuple[str, str], ...]
    rules: tuple[tuple[re.Pattern[str], str], ...]


@cache
def _singular_rules() -> _SingularRules:
    tables = json.loads((_TABLES / "singular_rules.json").read_text("utf-8"))
    return _SingularRules(
        prepositions=frozenset(tables["prepositions"]),
        suffixes_of_unchanged=frozenset(
            word[at:] for word in tables["unchanged_if_suffix_of"] for at in range(len(word) + 1)
        ),
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


def rohrbach(caption: str) -> list[Token]:
    """Every token made singular, verbs and pronouns too."""
    return [Token(singularize(token.text), token.start, token.end) for token in tokenize(caption)]


@dataclass(frozen=True)
class _Nltk:
    version: str
    tokenize: Callable[[str], list[str]]
    tag: Callable[[list[str]], list[tuple[str, str]]]
    lemma: Callable[[str, str], str]


_OPERA_DATA = (
    "python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet "
    "(before NLTK 3.9: punkt averaged_perceptron_tagger wordnet)"
)
_WORDNET_TAG = {"J": "a", "V": "v", "N": "n", "R": "r"}  # first letter of a Penn Treebank tag -> part of speech


@cache
def _nltk() -> _Nltk:
    """NLTK with its tagger and WordNet, loaded once and tried on a word; nothing is ever downloaded."""
    try:
        import nltk
    except ImportError as error:
        raise ValueError(
            f"the variant opera needs NLTK, which is not installed: pip install nltk, then {_OPERA_DATA}; "
            "opera_approx needs neither."
        ) from error
    try:
        parts = _Nltk(
            version=nltk.__version__,
            tokenize=nltk.word_tokenize,
            tag=nltk.tag.PerceptronTagger().tag,  # what nltk.pos_tag loads anew for every caption
            lemma=lru_cache(maxsize=1 << 16)(nltk.stem.WordNetLemmatizer().lemmatize),
        )
        for word, _ in parts.tag(parts.tokenize("dogs")):
            parts.lemma(word, "n")  # WordNet opens its files only when asked
    except (LookupError, OSError, ValueError) as error:
        raise ValueError(
            f"the variant opera needs data of NLTK {nltk.__version__} that is not there; fetch it with: {_OPERA_DATA}, "
            "or name its folder in NLTK_DATA; opera_approx needs none."
        ) from error
    return parts


def opera(caption: str) -> list[Token]:
    """WordNet lemma of every token, by the part of speech that NLTK's tagger gives it (`chair.py` of shikiw/OPERA).

    Raises:
        ValueError: NLTK or its data is missing; the message names the command that fetches it.
    """
    nltk = _nltk()
    text, origin = _lower(caption)
    words = nltk.tokenize(text)
    lemmas = [nltk.lemma(word, _WORDNET_TAG.get(tag[:1], "n")) for word, tag in nltk.tag(words)]
    return [
        Token(lemma, origin[start], origin[end - 1] + 1)
        for lemma, (start, end) in zip(lemmas, _align(words, text), strict=True)
    ]


def _align(words: Iterable[str], text: str) -> Iterator[tuple[int, int]]:
    """Where NLTK's tokens stand in the text; it rewrites quotation marks to `` and ''."""
    at = 0
    for word in words:
        while at < len(text) and text[at].isspace():
            at += 1
        forms = (word, '"', "''", "``") if word in ("``", "''") else (word,)
        length = next((len(form) for form in forms if text.startswith(form, at)), None)
        if length is None:
            raise ValueError(f"NLTK's token {word!r} is not at character {at} of the caption {text!r}; report this.")
        yield at, at + length
        at += length


@dataclass(frozen=True)
class _Lemmas:
    of: Mapping[str, str]
    after: Mapping[str, str]
    """Previous token, blank, token -> lemma, where the context decides."""


@cache
def _lemmas() -> _Lemmas:
    tables = json.loads((_TABLES / "opera_approx.json").read_text("utf-8"))
    return _Lemmas(tables["lemma"], tables["after"])


def opera_approx(caption: str) -> list[Token]:
    """Lemmas as `opera` gives them, from a table of the words that can name an object of COCO. Not exact.

    On 25,414 captions that the table was not made from, 1.9 % name other objects than under `opera`, and a file's
    CHAIR_S moves by at most 0.4 points.
    """
    tables, tokens = _lemmas(), tokenize(caption)
    previous = ("<s>", *(token.text for token in tokens))
    return [
        Token(
            tables.after.get(f"{before} {token.text}") or tables.of.get(token.text, token.text), token.start, token.end
        )
        for before, token in zip(previous, tokens, strict=False)
    ]


@cache
def _singular_noun() -> Callable[[str], str]:
    try:
        from inflect import engine
    except ImportError as error:
        raise ValueError("the variant inflect needs the package inflect: pip install inflect.") from error
    singular_noun: Callable[[str], Any] = engine().singular_noun

    @lru_cache(maxsize=1 << 16)
    def singular(word: str) -> str:
        try:
            return singular_noun(word) or word
        except Exception:  # whatever the library makes of odd words, the reference keeps them
            return word

    return singular


def inflect(caption: str) -> list[Token]:
    """`singular_noun` of every token where the package inflect gives one.

    Raises:
        ValueError: the package is missing.
    """
    singular = _singular_noun()
    return [Token(singular(token.text), token.start, token.end) for token in tokenize(caption)]


NORMALISERS: Mapping[str, Callable[[str], list[Token]]] = MappingProxyType(
    {"rohrbach": rohrbach, "opera": opera, "opera_approx": opera_approx, "inflect": inflect}
)
"""Variant -> its way from a caption to the words that are looked up, each at its place in the caption."""

VARIANTS = (*NORMALISERS, "strict")
"""Names of all variants."""


def check_variant(name: str) -> None:
    """ValueError, with the nearest name, for anything but the name of a variant."""
    if name not in VARIANTS:
        near = difflib.get_close_matches(str(name), VARIANTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(VARIANTS)}."
        raise ValueError(f"{name!r} is no variant of CHAIR: {hint}")


def version(variant: str) -> str:
    """Name and version of the package whose words a variant's own name does not pin down; empty for the others.

    Raises:
        ValueError: the package or its data is missing.
    """
    return f"nltk {_nltk().version}" if variant == "opera" else ""


def best_opera() -> tuple[str, str]:
    """`opera` if NLTK and its data are there, else `opera_approx`; and one line to show, empty if it is the exact one.

    The only place that falls back: whoever asks for `opera` gets it or an error.
    """
    try:
        _nltk()
    except ValueError as error:
        return "opera_approx", f"opera_approx stands in for opera: {error}"
    return "opera", ""


# strict


@dataclass(frozen=True)
class _Strict:
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
def _strict_tables() -> _Strict:
    tables = json.loads((_TABLES / "strict_table.json").read_text("utf-8"))
    orange = tables["orange"]
    return _Strict(
        nodes_of={phrase: (node,) for phrase, node in tables["phrases"].items()}
        | {phrase: tuple(nodes) for phrase, nodes in tables["compounds"].items()},
        phrases=frozenset(tables["phrases"]),
        forms_after={word: frozenset(tables[rule["before"]]) for rule in tables["modifiers"] for word in rule["words"]},
        adjectives=frozenset(tables["adjectives_only"]),
        no_colour_before=frozenset(orange["colour_if_next_is_word_not_in"]),
        colour_after=frozenset(orange["colour_if_previous_in"]),
        colours=frozenset(orange["colours"]),
    )


_STRAIGHT = str.maketrans("‘’“”", "''\"\"")
_SLASH = re.compile(r"(?<=\w)/(?=\w)")
_STRICT_END = re.compile(_SENTENCE_END.pattern + r"|(?<=[^\W\d_]\.)(?=[^\W\d_]{2})")  # also car.And
_LONGEST = 3  # words in a phrase
_JOINERS = frozenset(("and", "or", ","))


def strict(caption: str) -> list[Mention]:
    """The objects of COCO that a caption names in correct English: buses and hair dryers, no orange shirts."""
    text, origin = _lower(caption)
    text = _SLASH.sub(" ", text.translate(_STRAIGHT))
    found: list[Mention] = []
    read = 0
    for sentence, after in _sentences(text, _STRICT_END):
        tokens = [
            part
            for start, end in _words(text[sentence:after])
            for part in _unhyphenated(text, sentence + start, sentence + end, origin)
        ]
        found += (
            Mention(word, node, read + first, tokens[first].start, tokens[last].end)
            for word, node, first, last in _strict_objects([token.text for token in tokens])
        )
        read += len(tokens)
    return found


def _unhyphenated(text: str, start: int, end: int, origin: Sequence[int]) -> Iterator[Token]:
    """Skate-boards -> skateboards, laptop-computer -> laptop computer; what makes no phrase stays as it is."""
    phrases = _strict_tables().phrases
    parts = text[start:end].split("-")
    if len(parts) > 1 and (joined := "".join(parts)) in phrases:
        yield Token(joined, origin[start], origin[end - 1] + 1)
    elif len(parts) > 1 and (" ".join(parts) in phrases or phrases.issuperset(parts)):
        for part in parts:
            yield _token(text, start, start + len(part), origin)
            start += len(part) + 1
    else:
        yield _token(text, start, end, origin)


def _strict_objects(words: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """Word, node, first and last token of each object in one sentence."""
    objects: list[tuple[str, str, int, int]] = []
    at = 0
    while at < len(words):
        word, nodes = _longest(words, at)
        last = at + word.count(" ")
        if not _describes(words, at, word):
            objects += ((word, node, at, last) for node in nodes)
        at = last + 1
    if any(node == "toilet" for _, node, _, _ in objects):
        objects = [item for item in objects if item[0] not in ("seat", "seats")]
    merged: list[tuple[str, str, int, int]] = []
    for word, node, first, last in objects:
        if merged and merged[-1][1] == node and merged[-1][3] + 1 == first:  # a pickup truck is one truck
            before, _, first_of_all, _ = merged.pop()
            merged.append((f"{before} {word}", node, first_of_all, last))
        else:
            merged.append((word, node, first, last))
    return merged


def _longest(words: Sequence[str], at: int) -> tuple[str, tuple[str, ...]]:
    nodes_of = _strict_tables().nodes_of
    phrases = (" ".join(words[at : at + length]) for length in range(_LONGEST, 1, -1))
    phrase = next((phrase for phrase in phrases if phrase in nodes_of), words[at])
    return phrase, nodes_of.get(phrase, ())


def _describes(words: Sequence[str], at: int, word: str) -> bool:
    """Whether the word is part of the description of something else: a baby elephant, a female, an orange shirt."""
    tables = _strict_tables()
    if word == "orange":
        return _is_colour(words, at)
    nexts = (" ".join(words[at + 1 : at + 1 + length]) for length in range(1, _LONGEST + 1))
    return word in tables.adjectives or not tables.forms_after.get(word, frozenset()).isdisjoint(nexts)


def _is_colour(words: Sequence[str], at: int) -> bool:
    tables = _strict_tables()
    before_last, before, _, after, after_next = (
        words[near] if 0 <= near < len(words) else "" for near in range(at - 2, at + 3)
    )
    return (
        (after[:1].isalpha() and after not in tables.no_colour_before)
        or before in tables.colour_after
        or (before in _JOINERS and before_last in tables.colours)
        or (after in _JOINERS and after_next in tables.colours)
    )
