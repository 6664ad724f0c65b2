"""The objects that CHAIR counts, and the words that name them."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from vlmfix.eval.scorers.chair.singular import singularize

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
        """Read a synonyms file: one object a line, entries separated by a comma and one blank, the first is the node.

        Without a path, the list of Rohrbach et al. for COCO. Their pairs of words ("hot dog", "train track") hold for
        every file; a file's own entries of two words are added to them. Captions are lower-cased and made singular
        before they are looked up, so an entry that `singularize` alters ("bus" -> "bu") needs that form as a synonym.

        Raises:
            ValueError: the file holds no entry, or a word stands for two objects.
        """
        return coco_vocabulary() if path is None else _parse_vocabulary(Path(path).read_text("utf-8"), str(path))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the objects, in the order of the file."""
        return tuple(dict.fromkeys(self.node_of.values()))

    def node(self, name: str) -> str:
        """The object that a name or synonym stands for; ValueError, with the nearest names, for any other."""
        if name in self.node_of:
            return self.node_of[name]
        near = difflib.get_close_matches(name, self.node_of, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "add it to the synonyms file."
        raise ValueError(f"{name!r} is neither an object nor a synonym in this vocabulary: {hint}")


@cache
def coco_vocabulary() -> Vocabulary:
    """The 80 objects of COCO with the synonyms of Rohrbach et al., read once."""
    return _parse_vocabulary((_TABLES / "synonyms.txt").read_text("utf-8"), "synonyms.txt")


def _parse_vocabulary(text: str, source: str) -> Vocabulary:
    node_of: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        entries = line.split(", ")
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
        is_pair = first and second and " " not in second
        # A pair whose second word names the same object ("dining table") counts the same without being joined.
        if is_pair and entry not in double_words and node_of.get(second) != node:
            double_words[entry] = entry
            double_words[f"{singularize(first)} {singularize(second)}"] = entry
    return Vocabulary(node_of, double_words)
