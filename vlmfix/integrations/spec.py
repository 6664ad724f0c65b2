"""Methods as other programs' command lines give them: text, or a name with its settings beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmfix.method.intervention import Intervention
from vlmfix.method.registry import method_class, parse, split_spec
from vlmfix.method.settings import did_you_mean, settings_of


def joined(method: str, settings: Mapping[str, Any], known: Sequence[str]) -> str:
    """`var` and `{"rho": 0.5}` as `var:rho=0.5`: settings belong to the last method. `ValueError` for names that are
    neither settings nor among the program's own (`known`)."""
    spec = method.strip().strip("'\"")
    if not settings:
        return spec
    before, plus, last = spec.rpartition("+")
    name, written = split_spec(last)
    names = [] if name == "none" else [setting.name for setting in settings_of(method_class(name))]
    for setting in settings:
        if setting not in names:
            raise ValueError(
                f"{setting}: no setting of {name} and no option; {did_you_mean(setting, [*names, *known])}"
            )
    more = [f"{setting}={_text(value)}" for setting, value in settings.items()]
    return f"{before}{plus}{name}:{','.join([*filter(None, [written]), *more])}"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def files_digest(spec: str, methods: Sequence[Intervention]) -> str | None:
    """A hash of the files that methods name, by which a cache can tell their versions apart; `None`: they name none."""
    named = [Path(spec)] + [
        Path(value)
        for method in methods
        for value in (getattr(method, setting.name) for setting in settings_of(type(method)))
        if isinstance(value, str) and "\n" not in value and len(value) < 4096
    ]
    files = [path for path in named if path.is_file()]
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read(spec: str) -> tuple[Intervention, ...]:
    """The methods of a text."""
    return parse(spec)
