"""Kinds of settings: what a field may hold, read from its annotation.

`float`, `int`, `bool`, `str`, `Literal[...]`, tuples of numbers, head lists (`Heads`), and unions of these. A `Range`
among the annotations bounds a number, or each number of a tuple. A kind says in words what it expects, reads text as it
is written on the command line, and checks values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin

from vlmfix.method.heads import head_names


@dataclass(frozen=True)
class Range:
    """Bounds of a number, as in `Annotated[float, Range(0, 1)]` or `Annotated[float, Range(above=0)]`. The numbers
    `least` and `most` belong to the range, `above` does not. Infinity and NaN are in no range."""

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def holds(self, number: Any) -> bool:
        """Whether a number lies inside."""
        if not math.isfinite(number):
            return False
        high_enough = self.least is None or number >= self.least
        beyond_open_end = self.above is None or number > self.above
        low_enough = self.most is None or number <= self.most
        return high_enough and beyond_open_end and low_enough

    def __str__(self) -> str:
        """`in 0..1`, `above 0`, `above 0 and up to 1`, `1 or more`; empty if there are no bounds."""
        if self.above is not None:
            return f"above {self.above:g}" + ("" if self.most is None else f" and up to {self.most:g}")
        if self.least is not None:
            return f"{self.least:g} or more" if self.most is None else f"in {self.least:g}..{self.most:g}"
        return "" if self.most is None else f"up to {self.most:g}"


NO_BOUNDS = Range()


class Kind(Protocol):
    """What all kinds can do. `read` and `fit` raise `ValueError`, without words, where something does not fit."""

    @property
    def name(self) -> str:
        """What is expected, bounds left out."""

    @property
    def expected(self) -> str:
        """What is expected, bounds included."""

    def read(self, text: str) -> Any:
        """A value from how it is written on the command line; bounds are not checked."""

    def fit(self, value: Any) -> Any:
        """The value as the field holds it."""


@dataclass(frozen=True)
class Number:
    """A number, or a whole number."""

    whole: bool = False
    range: Range = NO_BOUNDS

    @property
    def name(self) -> str:
        """In words."""
        return "a whole number" if self.whole else "a number"

    @property
    def expected(self) -> str:
        """In words, with bounds."""
        bounds = str(self.range)
        return bounds if bounds.endswith("more") else f"{self.name} {bounds}".strip()

    def read(self, text: str) -> int | float:
        """`2` stays a whole number where fractions are allowed too, so that labels read as they were written."""
        try:
            return int(text)
        except ValueError:
            if self.whole:
                raise
            return float(text)

    def fit(self, value: Any) -> Any:
        """`True` and `False` are no numbers."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            raise ValueError
        if not self.range.holds(value):
            raise ValueError
        return value


@dataclass(frozen=True)
class Truth:
    """`bool`."""

    name = expected = "true or false"

    def read(self, text: str) -> bool:
        """In any case of letters."""
        words = {"true": True, "false": False}
        if text.lower() not in words:
            raise ValueError
        return words[text.lower()]

    def fit(self, value: Any) -> bool:
        """Nothing else counts as true."""
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclass(frozen=True)
class Choice:
    """`Literal[...]`: one of several words."""

    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """`a, b or c`."""
        *others, last = self.words
        return f"{', '.join(others)} or {last}" if others else last

    expected = name

    def read(self, text: str) -> str:
        """The word itself."""
        return self.fit(text)

    def fit(self, value: Any) -> str:
        """Exactly as written."""
        if not isinstance(value, str) or value not in self.words:
            raise ValueError
        return value


@dataclass(frozen=True)
class Text:
    """`str`."""

    name = expected = "text"

    def read(self, text: str) -> str:
        """As it stands."""
        return text

    def fit(self, value: Any) -> str:
        """Any."""
        if not isinstance(value, str):
            raise ValueError
        return value


@dataclass(frozen=True)
class Numbers:
    """A tuple of numbers; one number stands for a tuple of one."""

    each: Number
    length: int | None = None
    """`None`: any."""

    @property
    def name(self) -> str:
        """With an example of how it is written."""
        if self.length is not None:
            return f"{self.length} numbers such as {'/'.join(map(str, range(1, self.length + 1)))}"
        return "whole numbers such as 1/18-31" if self.each.whole else "numbers such as 0.5/0.25"

    @property
    def expected(self) -> str:
        """With the bounds of each number."""
        return f"{self.name}, each {self.each.range}" if str(self.each.range) else self.name

    def read(self, text: str) -> tuple[Any, ...]:
        """`1/18-31`: whole numbers, ranges with both ends; `0.5/0.25`; nothing for an empty tuple."""
        values: list[Any] = []
        for part in filter(None, text.split("/")):
            first, dash, last = part.partition("-")
            if self.each.whole and dash and first.isdigit() and last.isdigit():
                values += range(int(first), int(last) + 1)
            else:
                values.append(self.each.read(part))
        return tuple(values)

    def fit(self, value: Any) -> tuple[Any, ...]:
        """A tuple; a list is taken as one."""
        entries = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if self.length is not None and len(entries) != self.length:
            raise ValueError
        return tuple(self.each.fit(entry) for entry in entries)


@dataclass(frozen=True)
class HeadNames:
    """Attention heads: the file of a head list, or heads such as `L3H1/L3H5`; kept as text. Pairs of layer and head
    become such text."""

    name = expected = "the file of a head list, or heads such as L3H1/L3H5"

    def read(self, text: str) -> str:
        """A path or names of heads."""
        return text

    def fit(self, value: Any) -> str:
        """Neither empty text nor no heads at all."""
        if isinstance(value, (tuple, list)):
            pair = Numbers(Number(whole=True, range=Range(0)), length=2)
            value = head_names(pair.fit(entry) for entry in value)
        if not isinstance(value, str) or not value:
            raise ValueError
        return value


@dataclass(frozen=True)
class Anything:
    """Any other annotation, of a method of one's own: not checked, and text stays text."""

    name = expected = "anything"

    def read(self, text: str) -> str:
        """As it stands."""
        return text

    def fit(self, value: Any) -> Any:
        """As it is."""
        return value


Layers = Annotated[tuple[int, ...], Range(0)]
"""Decoder layers, 0-based. That they are layers of the model is checked when it is known."""
Heads = Annotated[str | tuple[tuple[int, int], ...], HeadNames()]
"""Attention heads of a model, see `HeadNames`."""


def kinds_of(annotation: Any, bounds: Range = NO_BOUNDS) -> list[Kind]:
    """What a field with this annotation may hold, in the order in which text is tried; `None` left out."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        for note in parts[1:]:
            if isinstance(note, HeadNames):
                return [note]
            if isinstance(note, Range):
                bounds = note
        return kinds_of(parts[0], bounds)
    if origin in (Union, UnionType):
        alternatives: list[Kind] = []
        for part in parts:
            alternatives += [] if part is type(None) else kinds_of(part, bounds)
        return alternatives
    if origin is Literal:
        return [Choice(parts)]
    if origin is tuple and parts[0] in (int, float):
        length = None if parts[-1] is Ellipsis else len(parts)
        return [Numbers(Number(parts[0] is int, bounds), length)]
    simple: dict[Any, Kind] = {
        bool: Truth(),
        int: Number(True, bounds),
        float: Number(False, bounds),
        str: Text(),
    }
    return [simple.get(annotation, Anything())]
