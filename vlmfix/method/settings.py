"""Settings of a dataclass from text and JSON: read, converted and checked by the annotations of its fields."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known ones, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."


def checked_settings(cls: Any, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a dataclass as they came from text or JSON. `ValueError` names unknown ones and wrong kinds."""
    known = [f.name for f in fields(cls)]
    for key in settings:
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}; {did_you_mean(key, known)}")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    for f in fields(cls):
        _check_kind(name, f.name, str(f.type), settings.get(f.name))
    return settings


def read_settings(text: str) -> dict[str, Any]:
    """`p=0.4,layers=1/18-31` as a dictionary."""
    settings = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: expected setting=value after the colon, got {item!r}")
        settings[key.strip()] = _value(value.strip())
    return settings


def _check_kind(name: str, key: str, annotation: str, value: Any) -> None:
    """Refuse text for a number and the like, going by the field's annotation."""
    kinds: dict[str, tuple[str, tuple[type, ...]]] = {
        "float": ("a number", (int, float)),
        "int": ("a whole number", (int,)),
        "bool": ("true or false", (bool,)),
        "tuple": ("whole numbers such as 1/18-31", (tuple, int)),
        "tuple[float": ("numbers such as 0.5/0.25", (tuple, int, float)),
    }
    word = re.split("[ ,]", annotation, maxsplit=1)[0]
    said, allowed = kinds.get(word, kinds.get(word.split("[", maxsplit=1)[0], ("", ())))
    wrong = isinstance(value, bool) and bool not in allowed
    wrong |= word == "tuple[int" and isinstance(value, tuple) and not all(isinstance(v, int) for v in value)
    if said and value is not None and (wrong or not isinstance(value, allowed)):
        raise ValueError(f"{name}: {key} expects {said}, got {value!r}")


def _value(text: str) -> Any:
    """`0.4`, `true`, `none`, `1/18-31` (a tuple of whole numbers, ranges inclusive; empty if nothing), `0.5/0.25`, else
    text."""
    simple = {"true": True, "false": False, "none": None}
    if text.lower() in simple:
        return simple[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    parts = text.split("/")
    ranges = [part.split("-") for part in parts if part]
    if all(len(r) <= 2 and all(x.isdigit() for x in r) for r in ranges):
        return tuple(n for r in ranges for n in range(int(r[0]), int(r[-1]) + 1))
    try:
        return tuple(float(part) for part in parts)
    except ValueError:
        return text
