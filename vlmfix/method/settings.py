"""Settings of a dataclass, by the annotations of its fields: listed, read from text, filled and checked."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any, get_type_hints

from vlmfix.method.kinds import Choice, Kind, Number, Numbers, Range, Truth, kinds_of

LATER: Any = None
"""Default of a setting that has its value from the `variant`, or from the loaded model."""


@dataclass(frozen=True)
class Setting:
    """One setting, as data: for checks, for help on the command line and for forms."""

    name: str
    kinds: tuple[Kind, ...]
    """What it may be; several where its annotation is a union."""
    default: Any
    doc: str
    """Meaning, unit and source: the string below the field, on one line; empty where the source is not at hand."""
    optional: bool
    """Whether it may be `None`."""

    @property
    def kind(self) -> str:
        """In words, without bounds: `a number`, `true or false`."""
        return ", or ".join(kind.name for kind in self.kinds)

    @property
    def expected(self) -> str:
        """In words, with bounds: `a number in 0..1`."""
        return ", or ".join(kind.expected for kind in self.kinds)

    @property
    def choices(self) -> tuple[str, ...]:
        """Its words, if it is one of several words and nothing else."""
        (first, *others) = self.kinds
        if others:
            return ()
        if isinstance(first, Truth):
            return ("true", "false")
        return first.words if isinstance(first, Choice) else ()

    @property
    def range(self) -> Range | None:
        """Bounds of the number, or of each number of a tuple; `None` if it is no number."""
        for kind in self.kinds:
            if isinstance(kind, Number):
                return kind.range
            if isinstance(kind, Numbers):
                return kind.each.range
        return None

    def read(self, text: str) -> Any:
        """A value from text. `ValueError`, without words, if it reads as none of its kinds."""
        if self.optional and text.lower() == "none":
            return None
        for kind in self.kinds:
            try:
                return kind.read(text)
            except ValueError:
                continue
        raise ValueError

    def fit(self, value: Any) -> Any:
        """The value as the field holds it. `ValueError` says what was expected."""
        if value is None and self.optional:
            return None
        for kind in self.kinds:
            try:
                return kind.fit(value)
            except ValueError:
                continue
        near = difflib.get_close_matches(str(value), self.choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{self.name}: expected {self.expected}, got {value!r}{hint}")

    def written(self, value: Any) -> str:
        """A value as it is written on the command line; `read` is the way back."""
        return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def settings_of(cls: Any) -> tuple[Setting, ...]:
    """The settings of a dataclass, in the order of its fields.

    `TypeError` if an annotation names something that is not there when the program runs.
    """
    return _settings_of(cls)


@cache
def _settings_of(cls: Any) -> tuple[Setting, ...]:
    try:
        annotations = get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise TypeError(f"{cls.__qualname__}: the annotations of settings cannot be read: {error}") from error
    docs = _docs(cls)
    settings = []
    for field in fields(cls):
        annotation = annotations[field.name]
        optional = field.default is None or type(None) in getattr(annotation, "__args__", ())
        kinds = tuple(kinds_of(annotation))
        settings.append(Setting(field.name, kinds, field.default, docs.get(field.name, ""), optional))
    return tuple(settings)


def fill_and_check(instance: Any, variants: dict[str, dict[str, Any]]) -> None:
    """For `__post_init__` of a frozen dataclass: give settings left `None` the values of its `variant`, and put every
    setting into the form of its annotation. `ValueError` names the first setting that does not fit."""
    settings = settings_of(type(instance))
    filled: dict[str, Any] = {}
    if variants:
        (choice,) = (setting for setting in settings if setting.name == "variant")
        filled = variants[choice.fit(instance.variant)]
    for setting in settings:
        value = getattr(instance, setting.name)
        if value is None:
            value = filled.get(setting.name)
        object.__setattr__(instance, setting.name, setting.fit(value))


def checked_settings(cls: Any, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a dataclass as they came from the command line (text) or from JSON (values and lists), as its
    constructor takes them. `ValueError` names unknown settings, and text that does not read as what is expected."""
    known = {setting.name: setting for setting in settings_of(cls)}
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}; {did_you_mean(key, known)}")
        values[key] = value
        if isinstance(value, list):
            values[key] = tuple(value)
        elif isinstance(value, str):
            try:
                values[key] = known[key].read(value)
            except ValueError:
                raise ValueError(f"{name}: {key} expects {known[key].kind}, got {value!r}") from None
    return values


def read_settings(text: str) -> dict[str, str]:
    """`p=0.4,layers=1/18-31` as a dictionary of texts."""
    settings = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: expected setting=value after the colon, got {item!r}")
        settings[key.strip()] = value.strip()
    return settings


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known ones, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."


def _docs(cls: type) -> dict[str, str]:
    """Field -> the string below it in the source, of a class and of the dataclasses that it comes from."""
    docs: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError, SyntaxError, ValueError):
            continue  # a class typed into a console has no source
        for field, below in pairwise(getattr(tree, "body", ())):
            if not isinstance(field, ast.AnnAssign) or not isinstance(below, ast.Expr):
                continue
            text = getattr(below.value, "value", None)
            if isinstance(text, str) and isinstance(field.target, ast.Name):
                docs[field.target.id] = " ".join(text.split())
    return docs
