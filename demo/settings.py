"""Methods as visitors of the page may ask for them: registered names, and no setting that names a file or code."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vlmfix.hooks import REGISTRY
from vlmfix.method.heads import parse_heads
from vlmfix.method.intervention import Intervention
from vlmfix.method.registry import method_class, parse
from vlmfix.method.settings import did_you_mean, read_settings

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
"""Settings of type `str` whose harmless values are known. The oracle would know the answers."""
HIDDEN = {"detector", "truth"}
"""Settings that name files."""


@dataclass(frozen=True)
class Setting:
    """One field of a method, for a form."""

    name: str
    default: str
    """As on the command line; empty for `None`."""
    choices: tuple[str, ...]
    """What it may be; empty if it is free."""
    about: str
    """Meaning, unit and source: the field's docstring, where an empty field stands for `None`."""


@cache
def settings(name: str) -> tuple[Setting, ...]:
    """The settings of a method that a visitor may set, in the order of its file."""
    cls, found = method_class(name), []
    kinds, about = get_type_hints(cls), _docstrings(cls)
    for f in fields(cls):
        if f.name not in HIDDEN:
            found.append(
                Setting(f.name, _text(f.default), _choices(name, f.name, kinds[f.name]), about.get(f.name, ""))
            )
    return tuple(found)


def _choices(name: str, key: str, kind: Any) -> tuple[str, ...]:
    if kind is bool:
        return ("true", "false")
    return () if get_origin(kind) is Union else _words(name, key, kind)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _docstrings(cls: type) -> dict[str, str]:
    """Field -> the string below it, of a class and those that it comes from."""
    found: dict[str, str] = {}
    for one in reversed([c for c in cls.__mro__ if issubclass(c, Intervention)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        body = tree.body  # type: ignore[attr-defined]
        for field, text in pairwise(body):
            said = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and text.value.value
            if isinstance(field, ast.AnnAssign) and isinstance(said, str):
                words = " ".join(said.split()).replace("`None`", "Empty").replace("`", "")
                found[field.target.id] = words  # type: ignore[union-attr]
    return found


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
            for key, value in read_settings(text).items():
                _check(name, key, value)
    return parse(spec)


def _check(name: str, key: str, value: Any) -> None:
    """Text is refused unless it is known to be harmless: it might name a file or code."""
    most = MOST.get((name, key))
    if most is not None and isinstance(value, (int, float)) and value > most:
        raise ValueError(f"{name}: {key} goes up to {most} on this page, got {value}")
    kind = get_type_hints(method_class(name)).get(key)
    if not isinstance(value, str) or kind is None or (name, key) in FREE_TEXT:
        return  # `parse` names unknown settings
    if key == "head_list" and parse_heads(value) is not None:
        return
    if key == "head_list" or key in HIDDEN:
        raise ValueError(f"{name}: {key} cannot be {value!r}; files are not read on this page")
    known = _words(name, key, kind)
    if value not in known:
        said = f"expected {', '.join(known)}" if known else "it is no number"
        raise ValueError(f"{name}: {key} cannot be {value!r}; {said}")


def _words(name: str, key: str, kind: Any) -> tuple[str, ...]:
    """What a setting may say in words."""
    parts = [kind, *get_args(kind)]  # `Literal[...]`, or a union that holds one
    literals = tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))
    return WORDS.get((name, key), literals)
