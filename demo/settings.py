"""Methods as visitors of the page may ask for them: registered names, and no setting that names a file or code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from vlmfix.method.heads import parse_heads
from vlmfix.method.intervention import Intervention
from vlmfix.method.kinds import Choice, HeadNames, Kind, Number, Text
from vlmfix.method.names import REGISTRY
from vlmfix.method.registry import method_class, parse
from vlmfix.method.settings import Setting, did_you_mean, read_settings, settings_of

METHODS = ["none", *(name for name in REGISTRY if not method_class(name)().traits.accelerator)]
LONGEST_SPEC = 300
"""Characters."""
MOST = {
    ("beam", "n"): 10,
    ("rerank", "n"): 10,
    ("chunks", "k"): 16,
    ("carve", "look_tokens"): 128,
    ("carve", "side"): 2048,
}
"""Settings that multiply the work or the memory, and how far visitors may go."""
FREE_TEXT = {("carve", "general"), ("carve", "suffix")}
"""Settings that are words for the model."""
WORDS = {("rerank", "verifier"): ("self", "lookback")}
"""Settings that are text, and of which some words are known to be harmless. The oracle would know the answers."""
HIDDEN = {"detector", "truth"}
"""Settings that name files."""


@dataclass(frozen=True)
class FormField:
    """One setting of a method, for a form."""

    name: str
    default: str
    """As on the command line; empty for `None`."""
    choices: tuple[str, ...]
    """What it may be; empty if it is free."""
    about: str
    """Meaning, unit and source: the field's docstring, where an empty field stands for `None`."""


@cache
def settings(name: str) -> tuple[FormField, ...]:
    """The settings of a method that a visitor may set, in the order of its file."""
    form = []
    for setting in settings_of(method_class(name)):
        if setting.name in HIDDEN:
            continue
        default = "" if setting.default is None else setting.written(setting.default)
        if isinstance(setting.default, bool):
            default = default.lower()
        about = setting.doc.replace("`None`", "Empty").replace("`", "")
        choices = setting.choices or WORDS.get((name, setting.name), ())
        form.append(FormField(setting.name, default, choices, about))
    return tuple(form)


def interventions(spec: str | None) -> tuple[Intervention, ...]:
    """What a method field asks for, as `parse` reads it. `ValueError` says in a sentence what is wrong
    with it, and where a visitor asks for code, for a file or for too much."""
    spec = (spec or "").strip() or "none"
    if len(spec) > LONGEST_SPEC:
        raise ValueError(f"method: expected at most {LONGEST_SPEC} characters, got {len(spec)}")
    if re.search(r"\d-\s*\d{5}", spec):
        raise ValueError("method: a range such as 0-31 ends below 10000 on this page")
    for part in spec.split("+"):
        name, _, text = (piece.strip() for piece in part.strip().partition(":"))
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; {did_you_mean(name, METHODS)}")
        if name != "none":
            _check_settings(name, read_settings(text))
    return parse(spec)


def _check_settings(name: str, texts: dict[str, str]) -> None:
    known = {setting.name: setting for setting in settings_of(method_class(name))}
    for key, text in texts.items():
        if key in known:  # `parse` names unknown settings
            _check(name, known[key], text)


def _check(name: str, setting: Setting, text: str) -> None:
    """Text is refused unless it is known to be harmless: it might name a file or code."""
    key = setting.name
    if (name, key) in FREE_TEXT:
        return
    value, kind = _as_read(name, setting, text)
    most = MOST.get((name, key))
    if most is not None and isinstance(kind, Number) and value > most:
        raise ValueError(f"{name}: {key} goes up to {most} on this page, got {value}")
    if isinstance(kind, HeadNames):
        if parse_heads(text) is None:
            raise ValueError(f"{name}: {key} cannot be {text!r}; files are not read on this page")
    elif key in HIDDEN and value is not None:
        raise ValueError(f"{name}: {key} cannot be {text!r}; files are not read on this page")
    elif isinstance(kind, Text):
        words = WORDS.get((name, key), ())
        if text not in words:
            hint = f"expected {', '.join(words)}" if words else "it is no number"
            raise ValueError(f"{name}: {key} cannot be {text!r}; {hint}")


def _as_read(name: str, setting: Setting, text: str) -> tuple[Any, Kind | None]:
    """The value that a setting takes from text, and the kind that it is; `ValueError` where it reads as none."""
    if setting.optional and text.lower() == "none":
        return None, None
    for kind in setting.kinds:
        try:
            return kind.read(text), kind
        except ValueError:
            continue
    words: list[str] = []
    for kind in setting.kinds:
        words += kind.words if isinstance(kind, Choice) else ()
    hint = f"expected {', '.join(words)}" if words else f"expected {setting.expected}"
    raise ValueError(f"{name}: {setting.name} cannot be {text!r}; {hint}")
