"""The fix file: methods that were chosen for one model, how well they did, and what that model is.

    vlmfix tune --model organism --data calibration -o fix.json
    vlmfix.wrap(model, "fix.json", processor)

On the command line a fix stands wherever a method does (`--method none,fix.json`). It comes on to the model that it was
made for and to no other: the same heads, layers and settings mean something else elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vlmfix.method.heads import parse_heads
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import HeadNames
from vlmfix.method.registry import as_interventions, from_json, spec_of
from vlmfix.method.settings import settings_of

if TYPE_CHECKING:
    from torch import nn

    from vlmfix.model.anatomy import Anatomy

FORMAT = "vlmfix.fix/1"
OF_THE_MODEL = {
    "weights_digest": "weights",
    "config_digest": "configuration",
    "adapters_digest": "adapters",
    "code_digest": "code",
    "dtype": "dtype",
}
"""What a model must share with the one that a fix was made for: key of its identity -> in words."""
OF_THE_PROCESSOR = {"template": "chat template", "processor_digest": "processor"}


@dataclass(frozen=True)
class FixFile:
    """What is in a fix file."""

    methods: tuple[Intervention, ...]
    """In the order in which they act; heads are listed by name, so that no other file is needed."""
    model: dict[str, Any]
    """Who they were chosen for: the identity of model and processor, see `vlmfix.asking.identity`."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """What the choice rests on: data, figures with their intervals, control."""
    pictures: tuple[str, ...] = ()
    """`picture_id` of each picture that had a part in the choice: they must not judge it."""
    command: str = ""
    """That made it."""
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "format": FORMAT,
            "methods": [method.to_json() for method in self.methods],
            "model": self.model,
            "evidence": self.evidence,
            "pictures": list(self.pictures),
            "command": self.command,
            "created": self.created,
        }

    @classmethod
    def from_json(cls, data: Any) -> FixFile:
        """The way back. `ValueError` if it is no fix, or holds a method or setting that is not known here."""
        file_format = data.get("format") if isinstance(data, dict) else type(data).__name__
        if not isinstance(data, dict) or file_format != FORMAT:
            raise ValueError(f"expected a fix of format {FORMAT!r} (made by vlmfix tune), got {file_format!r}")
        missing = [key for key in ("methods", "model") if not data.get(key)]
        if missing:
            raise ValueError(f"the fix lacks {' and '.join(missing)}")
        try:
            known = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
            known["methods"] = tuple(from_json(method) for method in data["methods"])
            known["pictures"] = tuple(data.get("pictures", ()))
            return cls(**known)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the fix cannot be read: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write it. `ValueError` if that cannot be."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> FixFile:
        """Read it. `ValueError` if there is no such file, or if it is no fix."""
        try:
            data = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read the fix {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        try:
            return cls.from_json(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def differences(self, model: nn.Module, processor: Any = None) -> list[str]:
        """In what a model, and its processor where given, differ from those that this fix was made for."""
        from vlmfix.asking.identity import model_identity, processor_identity

        here, expected = model_identity(model), dict(OF_THE_MODEL)
        if processor is not None:
            here, expected = {**here, **processor_identity(processor)}, {**expected, **OF_THE_PROCESSOR}
        return [words for key, words in expected.items() if self.model.get(key) != here[key]]


@dataclass(frozen=True)
class Fix(Intervention):
    """Stands before the methods of a fix file, and lets them on to no other model than theirs."""

    name: ClassVar[str] = "fix"

    file: str
    """The fix file."""

    @classmethod
    def read(cls, path: str | Path) -> tuple[Intervention, ...]:
        """A fix file as interventions: this check, then the methods."""
        check = cls(str(path))
        return check, *check.content.methods

    @cached_property
    def content(self) -> FixFile:
        """What is in the file."""
        return FixFile.load(self.file)

    @property
    def traits(self) -> Traits:
        """It looks at the model, and leaves all it computes alone."""
        return Traits(only_checks=True, shares_pictures=True)

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[Fix, dict[str, Any]]:
        """`ValueError` if the fix was made for another model, or another processor where that is given."""
        differences = self.content.differences(model, processor)
        if differences:
            made_for, name = self.content.model.get("model"), getattr(model.config, "_name_or_path", "")
            raise ValueError(
                f"{self.file} was made for {made_for}, and this model ({name}) has another {', '.join(differences)}; "
                f"make a fix for it with vlmfix tune, or give the methods by name: {spec_of(self.content.methods)}"
            )
        return self, {}


def inlined(methods: Sequence[str | Intervention], model: nn.Module, processor: Any = None) -> tuple[Intervention, ...]:
    """Methods as a fix holds them: heads by name, as they are on this model. `ValueError` where a setting names another
    file, which would be missing elsewhere."""
    from vlmfix.model.anatomy import anatomy

    by_name = []
    for method in as_interventions(methods):
        lists = [getattr(method, name) for name in _head_settings(method)]
        if any(parse_heads(str(heads)) is None for heads in lists):
            resolved, _ = method.resolve(model, anatomy(model), processor)
            by_name.append(resolved)
        else:
            by_name.append(method)
    for method in by_name:
        for setting in settings_of(type(method)):
            value = getattr(method, setting.name)
            if isinstance(value, str) and Path(value).is_file():
                raise ValueError(f"{method.name}: {setting.name}={value} names a file, which a fix cannot hold")
    return tuple(by_name)


def _head_settings(method: Intervention) -> list[str]:
    """Settings of a method that list heads, where it has some listed."""
    listing = [setting.name for setting in settings_of(type(method)) if isinstance(setting.kinds[0], HeadNames)]
    return [name for name in listing if getattr(method, name) is not None]
