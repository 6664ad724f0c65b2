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

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from vlmfix.eval.scorers.chair.singular import singularize
from vlmfix.eval.scorers.chair.tokens import Token, lower, tokenize
from vlmfix.method.settings import did_you_mean


def rohrbach(caption: str) -> list[Token]:
    """Every token made singular, verbs and pronouns too."""
    return tokenize(caption, singularize)


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
        functions = _Nltk(
            version=nltk.__version__,
            tokenize=nltk.word_tokenize,
            tag=nltk.tag.PerceptronTagger().tag,  # what nltk.pos_tag loads anew for every caption
            lemma=lru_cache(maxsize=1 << 16)(nltk.stem.WordNetLemmatizer().lemmatize),
        )
        for word, _ in functions.tag(functions.tokenize("dogs")):
            functions.lemma(word, "n")  # WordNet opens its files only when asked
    except (LookupError, OSError, ValueError) as error:
        raise ValueError(
            f"the variant opera needs data of NLTK {nltk.__version__} that is not there; fetch it with: {_OPERA_DATA}, "
            "or name its folder in NLTK_DATA; opera_approx needs none."
        ) from error
    return functions


def opera(caption: str) -> list[Token]:
    """WordNet lemma of every token, by the part of speech that NLTK's tagger gives it (`chair.py` of shikiw/OPERA).

    Raises:
        ValueError: NLTK or its data is missing; the message names the command that fetches it.
    """
    nltk = _nltk()
    text, origin = lower(caption)
    words = nltk.tokenize(text)
    tokens = []
    for (word, tag), (start, end) in zip(nltk.tag(words), _align(words, text), strict=True):
        lemma = nltk.lemma(word, _WORDNET_TAG.get(tag[:1], "n"))
        tokens.append(Token(lemma, origin[start], origin[end - 1] + 1))
    return tokens


def _align(words: Iterable[str], text: str) -> Iterator[tuple[int, int]]:
    """Where NLTK's tokens stand in the text; it rewrites quotation marks to `` and ''."""
    place = 0
    for word in words:
        while place < len(text) and text[place].isspace():
            place += 1
        spellings = (word, '"', "''", "``") if word in ("``", "''") else (word,)
        spelling = next((spelling for spelling in spellings if text.startswith(spelling, place)), None)
        if spelling is None:
            raise ValueError(f"NLTK's token {word!r} is not at character {place} of the caption {text!r}; report this.")
        yield place, place + len(spelling)
        place += len(spelling)


@dataclass(frozen=True)
class _Lemmas:
    of: Mapping[str, str]
    after: Mapping[str, str]
    """Previous token, blank, token -> lemma, where the context decides."""


@cache
def _lemmas() -> _Lemmas:
    tables = json.loads((files("vlmfix.assets") / "chair" / "opera_approx.json").read_text("utf-8"))
    return _Lemmas(tables["lemma"], tables["after"])


def opera_approx(caption: str) -> list[Token]:
    """Lemmas as `opera` gives them, from a table of the words that can name an object of COCO. Not exact.

    On 25,414 captions that the table was not made from, 1.9 % name other objects than under `opera`, and a file's
    CHAIR_S moves by at most 0.4 points.
    """
    lemmas = _lemmas()
    tokens = []
    previous_word = "<s>"
    for word, start, end in tokenize(caption):
        lemma = lemmas.after.get(f"{previous_word} {word}") or lemmas.of.get(word, word)
        tokens.append(Token(lemma, start, end))
        previous_word = word
    return tokens


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
    return tokenize(caption, _singular_noun())


NORMALISERS: Mapping[str, Callable[[str], list[Token]]] = MappingProxyType(
    {"rohrbach": rohrbach, "opera": opera, "opera_approx": opera_approx, "inflect": inflect}
)
"""Variant -> its way from a caption to the words that are looked up, each at its place in the caption."""

VARIANTS = (*NORMALISERS, "strict")
"""Names of all variants."""


def check_variant(name: str) -> None:
    """ValueError, with the nearest name, for anything but the name of a variant."""
    if name not in VARIANTS:
        raise ValueError(f"{name!r} is no variant of CHAIR; {did_you_mean(str(name), VARIANTS)}")


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
