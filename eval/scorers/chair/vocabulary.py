"""The objects that CHAIR counts, and the words that name them."""

from __future__ import annotations

import difflib
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path

from vlmfix.eval.scorers.chair.singular import singularize
from vlmfix.eval.scorers.chair.tokens import tokenize

_TABLES = files("vlmfix.assets") / "chair"


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


@dataclass(frozen=True)
class Vocabulary:
    """The objects that count and the words that name them. `Vocabulary.load()` gives the 80 objects of COCO."""

    node_of: Mapping[str, str]
    """Word or pair of words -> its node, the name of the object. Nodes are among the words."""
    double_words: Mapping[str, str]
    """Two normalised words that are read as one, and what they are read as: "wine glas" -> "wine glass"."""

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> Vocabulary:
        """Read a synonyms file: one object a line, entries separated by commas, the first is the node.

        Without a path, the list of Rohrbach et al. for COCO. Their pairs of words ("hot dog", "train track") hold for
        every file, where they do not take a file's own entries apart; a file's own entries of two words are added to
        them. Captions are lower-cased and made singular before they are looked up, and so are the entries of a file:
        "Cup" is "cup", "fire_hydrants" is "fire hydrants", and both that and "scissors" are found by what captions are
        read as, "fire hydrant" and "scissor".

        Raises:
            ValueError: the file is no UTF-8, holds no entry, a word stands for two objects, or an entry could never be
                found in a caption, as it is longer than two words.
        """
        if path is None:
            return coco_vocabulary()
        try:
            text = Path(path).read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} cannot be read as text ({error}); expected UTF-8.") from error
        if _plain_lines(text) == _plain_lines(_coco_text()):  # a copy of that list, with what is never found in it
            return coco_vocabulary()
        return _parse_vocabulary(_folded_lines(text, str(path)), str(path), own=True)

    @cached_property
    def matters(self) -> frozenset[str]:
        """Words that name an object, begin a pair, or decide on others; all others can be passed over."""
        first_words = [pair.partition(" ")[0] for pair in self.double_words]
        return frozenset([*self.node_of, *first_words, "toilet"])

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the objects, in the order of the file."""
        return tuple(dict.fromkeys(self.node_of.values()))

    def node(self, name: str) -> str:
        """The object that a name or synonym stands for; ValueError, with the nearest names, for any other."""
        folded = folded_name(name)
        if folded in self.node_of:
            return self.node_of[folded]
        near = difflib.get_close_matches(name, self.node_of, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "add it to the synonyms file."
        raise ValueError(f"{name!r} is neither an object nor a synonym in this vocabulary: {hint}")


@cache
def coco_vocabulary() -> Vocabulary:
    """The 80 objects of COCO with the synonyms of Rohrbach et al., read once."""
    return _parse_vocabulary(_plain_lines(_coco_text()), "synonyms.txt", own=False)


def _coco_text() -> str:
    return (_TABLES / "synonyms.txt").read_text("utf-8")


def _plain_lines(text: str) -> list[list[str]]:
    """Entries of each line, as they stand there."""
    return [line.strip().split(", ") for line in text.splitlines() if line.strip()]


def folded_name(name: str) -> str:
    """The name of an object or a synonym as captions are read: in lower case, with single blanks, also in the place of
    underscores, and letters with their accents in one character."""
    return " ".join(unicodedata.normalize("NFC", name).lower().replace("_", " ").split())


def _folded_lines(text: str, source: str) -> list[list[str]]:
    """Entries of each line of somebody's own file, as captions are read; with the form that captions have of a word
    that changes there. A line that has all of COCO's synonyms of an object keeps those that are never found."""
    lines = []
    for line in text.splitlines():
        folded = [folded_name(entry) for entry in line.split(",")]
        entries = [entry for entry in folded if entry]
        if entries:
            lines.append(entries + _read_forms(entries, source))
    return lines


def _read_forms(entries: list[str], source: str) -> list[str]:
    """What captions have in the place of words that they never hold. `ValueError` for an entry that is no word and no
    pair of words."""
    of_coco = {entry for entry, node in coco_vocabulary().node_of.items() if node == entries[0]}
    published = {folded_name(entry) for entry in of_coco}
    kept = published if published <= set(entries) else set()
    forms = []
    for entry in entries:
        if entry in kept:
            continue
        words = [token.text for token in tokenize(entry)]
        is_words = all(any(map(str.isalnum, word)) for word in words)
        if " ".join(words) != entry or len(words) > 2 or not is_words:
            raise ValueError(
                f"{source}: {entry!r} could never be found in a caption, which is read as words and pairs of words; "
                f"give one word or two, without signs between them."
            )
        if len(words) == 1:
            forms += [form for form in _singular_forms(entry) if form not in entries]
    return forms


def _singular_forms(entry: str) -> Iterator[str]:
    """What captions are read as where they name an entry of one word or two: its singular, and what the rules for
    plurals make of that: "glasses", "a glass" and "the glass" are "glass", "glas" and "glas"."""
    singular = " ".join(map(singularize, entry.split()))
    yield singular
    yield " ".join(map(singularize, singular.split()))


def _parse_vocabulary(lines: Sequence[Sequence[str]], source: str, *, own: bool) -> Vocabulary:
    """Words of each line. Of somebody's `own` file, entries of two words are found in every form; of COCO's list in
    those that the published program finds."""
    node_of: dict[str, str] = {}
    for entries in lines:
        node = entries[0]
        for entry in entries:
            if node_of.setdefault(entry, node) != node:
                raise ValueError(
                    f"{source}: {entry!r} stands for both {node_of[entry]!r} and {node!r}; keep it in one of the lines."
                )
    if not node_of:
        raise ValueError(f"{source} holds no synonyms; expected one object per line: name, synonym, synonym.")
    double_words = json.loads((_TABLES / "double_words.json").read_text("utf-8"))
    for entry, node in node_of.items():
        first, _, second = entry.partition(" ")
        if not first or not second or " " in second:
            continue
        # A pair whose second word names the same object ("dining table") counts the same without being joined.
        needs_joining = node_of.get(second) != node
        singular, of_singular = _singular_forms(entry)
        for form in (entry, singular, of_singular) if own else (entry, singular):
            published = double_words.get(form)  # COCO's pair may be read as a word that this file does not have
            if (published is None and needs_joining) or (published is not None and published not in node_of):
                double_words[form] = entry
    return Vocabulary(node_of, double_words)
