"""Which methods a server offers, and which a client may name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vlmfix.method.heads import parse_heads
from vlmfix.method.names import REGISTRY
from vlmfix.method.registry import parse
from vlmfix.method.settings import settings_of
from vlmfix.serve.wire import Refused

PLAIN = re.compile(r"[\w.,:+=/ -]*")
"""Characters of methods that clients may name."""


@dataclass(frozen=True)
class Offer:
    """The names of a server's models: `NAME` is the first method, `NAME+METHOD` any other."""

    name: str
    listed: tuple[str, ...]
    """Chosen by whoever runs the server: these may name files and classes of their own."""
    only_listed: bool = False
    """Refuse methods that are not listed."""

    @property
    def models(self) -> list[str]:
        """For `/v1/models`."""
        return [self.name, *(f"{self.name}+{spec}" for spec in self.listed)]

    def spec_of(self, model: str) -> str:
        """The method of a model's name. `Refused` for another model, and for methods that clients may not choose."""
        if model == self.name:
            return self.listed[0]
        if not model.startswith(f"{self.name}+"):
            sentence = f"model: {model[:100]!r} is not here; there is {', '.join(self.models)}"
            raise Refused(sentence, 404, "not_found_error")
        spec = model[len(self.name) + 1 :]
        if spec in self.listed:
            return spec
        if self.only_listed:
            sentence = f"model: method {spec[:100]!r} is not offered; there is {', '.join(self.models)}"
            raise Refused(sentence, 404, "not_found_error")
        _check(spec)
        return spec


def _check(spec: str) -> None:
    """Clients choose methods of the registry and their settings, and neither code nor files of the server."""
    for part in spec.split("+"):
        name = part.partition(":")[0].strip()
        if name != "none" and name not in REGISTRY:
            raise Refused(f"model: unknown method {name[:100]!r}; there is {', '.join(['none', *REGISTRY])}", 404)
    if not PLAIN.fullmatch(spec):
        raise Refused("model: a method's settings are written with letters, digits and . , : + = / - alone")
    try:
        methods = parse(spec)
    except (ValueError, TypeError) as error:
        raise Refused(f"model: {error}") from None
    for method in methods:
        plain = type(method)
        for setting in settings_of(plain):
            value = getattr(method, setting.name)
            if not isinstance(value, str) or value == setting.default or parse_heads(value) is not None:
                continue
            if "/" in value or "." in value or Path(value).exists():
                raise Refused(f"model: {setting.name} may name no file of the server; list heads as L3H1/L3H5")
