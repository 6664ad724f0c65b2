"""Names of methods, and the ways between a method and its text or JSON."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vlmfix.method.intervention import Intervention
from vlmfix.method.settings import checked_settings, did_you_mean, read_settings

Interventions = None | str | Intervention | Sequence[str | Intervention]


def method_class(name: str) -> type[Intervention]:
    """The class behind a name of the registry or behind `package.module:Class`. `ValueError` if there is none."""
    from vlmfix.hooks import REGISTRY

    path = name if ":" in name else REGISTRY.get(name)
    if path is None:
        raise ValueError(f"unknown method {name!r}; {did_you_mean(name, ['none', *REGISTRY])}")
    module, _, attribute = path.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {name!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Intervention)):
        raise ValueError(f"method {name!r} is not a subclass of vlmfix.Intervention")
    return cls


def make(name: str, settings: dict[str, Any]) -> Intervention:
    """An intervention from its name and settings. `ValueError` names unknown settings."""
    cls = method_class(name)
    return cls(**checked_settings(cls, name, settings))


def from_json(data: dict[str, Any]) -> Intervention:
    """The way back from `Intervention.to_json`."""
    return make(data["name"], {k: v for k, v in data.items() if k != "name"})


def parse(spec: str) -> tuple[Intervention, ...]:
    """`"var"`, `"var:p=0.4,rho=0.8"`, `"var+vhr:alpha=1.5"`, `"my.module:Class:k=3"` or `"none"`, as interventions."""
    found = []
    for part in spec.strip().split("+"):
        pieces = part.strip().split(":")
        n_name = 2 if "." in pieces[0] and len(pieces) > 1 else 1
        name, text = ":".join(pieces[:n_name]), ":".join(pieces[n_name:])
        if name == "none" and not text:
            continue
        found.append(make(name, read_settings(text)))
    return tuple(found)


def split_methods(text: str) -> list[str]:
    """Cut `"none,var:p=0.4,rho=0.8,vhr"` into its methods: a piece that reads `setting=value` belongs to the one
    before."""
    methods: list[str] = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        continues = methods and "=" in piece and ":" not in piece.partition("=")[0]
        if continues:
            methods[-1] += "," + piece
        else:
            methods.append(piece)
    return methods


def with_accelerator(
    methods: Sequence[tuple[Intervention, ...]], speed: str | None, controls: bool = False
) -> list[tuple[Intervention, ...]]:
    """Each method (a list of interventions) with an accelerator beside it, and the untouched model, which stays the
    reference; with `controls`, the accelerator's own too. `ValueError` where one is given for the other, or where they
    do not go together."""
    from vlmfix.hooks import REGISTRY

    if wrong := [one.name for method in methods for one in method if one.traits.accelerator]:
        raise ValueError(f"{wrong[0]} is made for speed and is no method; give --speed {wrong[0]}")
    if speed is None:
        return list(methods)
    known = ", ".join(name for name in REGISTRY if method_class(name)().traits.accelerator)
    beside = parse(speed)
    if not beside or not all(one.traits.accelerator for one in beside):
        raise ValueError(f"speed: expected an accelerator ({known}), got {speed!r}")
    found = [(*method, *beside) for method in methods]
    if controls:
        found += [(control,) for one in beside for control in one.controls()]
    for method in found:
        for i, one in enumerate(method):
            one.composes([*method[:i], *method[i + 1 :]])
    return [method for method in methods if not method] + found


def as_interventions(given: Interventions) -> tuple[Intervention, ...]:
    """Any accepted form (a name, a name with settings, an instance, a list of these, `None`) as a tuple of
    instances."""
    if given is None:
        return ()
    if isinstance(given, str):
        return parse(given)
    if isinstance(given, Intervention):
        return (given,)
    if isinstance(given, Sequence):
        return tuple(one for item in given for one in as_interventions(item))
    raise TypeError(f"interventions: expected a name, an Intervention or a list of these, got {type(given).__name__}")


def spec_of(interventions: Sequence[Intervention]) -> str:
    """A short label that `parse` reads back: names with the settings that are not the defaults; `none` for an empty
    list."""
    parts = []
    for one in interventions:
        settings, plain = asdict(one), asdict(type(one)())
        if settings.get("variant") != plain.get(
            "variant"
        ):  # a variant fills other settings, which then need no mention
            plain = {**asdict(type(one)(variant=settings["variant"])), "variant": None}  # type: ignore[call-arg]
        shown = {k: v for k, v in settings.items() if v != plain[k]}
        text = [f"{k}={'/'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in shown.items()]
        parts.append(one.to_json()["name"] + (":" + ",".join(text) if text else ""))
    return "+".join(parts) or "none"
