"""The ways between a method and its name, its text and its JSON."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from vlmfix.method.intervention import Intervention
from vlmfix.method.names import REGISTRY, name_of
from vlmfix.method.settings import checked_settings, did_you_mean, read_settings, settings_of

Interventions = None | str | Intervention | Sequence[str | Intervention]
FIX = "vlmfix.asking.fix:Fix"
"""What a name that ends in `.json` stands for: the methods in that fix file."""


def method_class(name: str) -> type[Intervention]:
    """The class behind a name of the registry or behind `package.module:Class`. `ValueError` if there is none."""
    path = name if ":" in name else REGISTRY.get(name)
    if path is None:
        raise ValueError(f"unknown method {name!r}; {did_you_mean(name, ['none', *REGISTRY])}")
    module, _, qualified_name = path.partition(":")
    try:
        cls: Any = importlib.import_module(module)
        for attribute in qualified_name.split("."):
            cls = getattr(cls, attribute)
    except (ImportError, AttributeError, ValueError) as error:
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
    """`"var"`, `"var:p=0.4,rho=0.8"`, `"var+vhr:alpha=1.5"`, `"my.module:Class:k=3"`, `"fix.json"` or `"none"`, as
    interventions."""
    interventions: list[Intervention] = []
    for part in spec.strip().split("+"):
        if is_fix(part):
            fix: Any = method_class(FIX)
            interventions += fix.read(part.strip())
            continue
        name, settings = split_spec(part)
        if name != "none" or settings:
            interventions.append(make(name, read_settings(settings)))
    return tuple(interventions)


def is_fix(part: str) -> bool:
    """Whether a part of a method's text names a fix file."""
    return part.strip().endswith(".json") and "=" not in part


def split_spec(part: str) -> tuple[str, str]:
    """Name and settings of one method: `("var", "p=0.4")`, `("my_module:Class", "k=3")`.

    After a name of the registry come settings. After any other name comes a class, and then settings. A module that
    has the name of a method is told from it by the second colon, which `spec_of` writes.
    """
    first, *rest = (piece.strip() for piece in part.strip().split(":"))
    names_a_class = rest and (len(rest) > 1 or first not in ("none", *REGISTRY)) and "=" not in rest[0]
    if names_a_class:
        return f"{first}:{rest[0]}", ":".join(rest[1:])
    return first, ":".join(rest)


def split_methods(text: str) -> list[str]:
    """Cut `"none,var:p=0.4,rho=0.8,vhr"` into its methods: a piece that reads `setting=value` belongs to the one
    before."""
    methods: list[str] = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        is_setting = "=" in piece and ":" not in piece.partition("=")[0]
        if methods and is_setting:
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
    for method in methods:
        for intervention in method:
            if intervention.traits.accelerator:
                name = intervention.name
                raise ValueError(f"{name} is made for speed and is no method; give --speed {name}")
    if speed is None:
        return list(methods)
    beside = parse(speed)
    if not beside or not all(intervention.traits.accelerator for intervention in beside):
        known = [name for name in REGISTRY if method_class(name)().traits.accelerator]
        raise ValueError(f"speed: expected an accelerator ({', '.join(known)}), got {speed!r}")
    accelerated = [(*method, *beside) for method in methods]
    if controls:
        for accelerator in beside:
            accelerated += [(control,) for control in accelerator.controls()]
    for method in accelerated:
        for place, intervention in enumerate(method):
            intervention.composes([*method[:place], *method[place + 1 :]])
    untouched = [method for method in methods if not method]
    return untouched + accelerated


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
        flat: list[Intervention] = []
        for item in given:
            flat += as_interventions(item)
        return tuple(flat)
    raise TypeError(f"interventions: expected a name, an Intervention or a list of these, got {type(given).__name__}")


def spec_of(interventions: Sequence[Intervention]) -> str:
    """A short label that `parse` reads back: names with the settings that are not the defaults; `none` for an empty
    list."""
    labels, waiting = [], list(interventions)
    while waiting:
        first = waiting.pop(0)
        of_file = first.content.methods if name_of(type(first)) == FIX else ()  # type: ignore[attr-defined]
        if of_file and tuple(waiting[: len(of_file)]) == of_file:
            del waiting[: len(of_file)]
            labels.append(first.file)  # type: ignore[attr-defined]
        else:
            labels.append(_label(first))
    return "+".join(labels) or "none"


def _label(intervention: Intervention) -> str:
    cls, name = type(intervention), name_of(type(intervention))
    if name == FIX:
        return f"{name}:file={intervention.file}"  # type: ignore[attr-defined]
    plain: Any = cls()
    variant = getattr(intervention, "variant", None)
    if variant != getattr(plain, "variant", None):
        plain = cls(variant=variant)  # type: ignore[call-arg]
    written = []
    for setting in settings_of(cls):
        value = getattr(intervention, setting.name)
        # A variant fills other settings, which then need no mention; it needs one itself.
        differs = value != setting.default if setting.name == "variant" else value != getattr(plain, setting.name)
        if differs:
            written.append(f"{setting.name}={setting.written(value)}")
    if written:
        return f"{name}:{','.join(written)}"
    module = name.partition(":")[0]
    return f"{name}:" if ":" in name and module in ("none", *REGISTRY) else name  # see `split_spec`
