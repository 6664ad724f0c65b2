"""AdaIAT's statistics: how much heads attend to the answer so far when they name an object, real or invented."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.hooks.parts.calibrated import checksum, fingerprint, template_digest

if TYPE_CHECKING:
    from torch import nn

    from vlmfix.model.anatomy import Anatomy

FORMAT = "vlmfix.adaiat/1"
MADE = "make one for this model with vlmfix calibrate adaiat"


@dataclass(frozen=True)
class Statistics:
    """Means over object words of captions, of the mean weight on the tokens generated so far. A JSON file."""

    model: str
    """Name of the model."""
    fingerprint: str
    """Of its weights, see `calibrated.fingerprint`."""
    template: str | None
    """Digest of the template by which its prompts were written."""
    real: tuple[tuple[float, ...], ...]
    """P: L rows of H numbers; 0 where there is no head."""
    invented: tuple[tuple[float, ...], ...]
    """N, alike."""
    n_real: int
    n_invented: int
    """Object words."""
    match: str
    """`none`, or `position` where both are compared at the same places of captions."""
    data: dict[str, Any] = field(default_factory=dict)
    """What they were measured on: `name`, `n`, and `ids`, the `picture_id` of each picture."""

    @classmethod
    def read(cls, path: str | Path) -> Statistics:
        """From its file. `ValueError` if there is none, or it is something else, or was changed."""
        try:
            data = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read the statistics {path}: {error.strerror or error}; {MADE}") from error
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        names = {each.name for each in fields(cls)}
        if not isinstance(data, dict) or data.get("format") != FORMAT or not names <= set(data):
            raise ValueError(f"{path}: expected statistics of format {FORMAT!r}; {MADE}")
        if data.get("checksum") != checksum(data):
            raise ValueError(f"{path}: its content does not fit its checksum, so it was edited or cut; {MADE}")
        tables = {name: tuple(map(tuple, data[name])) for name in ("real", "invented")}
        return cls(**{**{name: data[name] for name in names}, **tables})

    def write(self, path: str | Path) -> None:
        """To a file. `ValueError` if that cannot be."""
        data = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps({**data, "checksum": checksum(data)}) + "\n", "utf-8")
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}") from error

    def check(self, path: str, model: nn.Module, anatomy: Anatomy, processor: Any) -> None:
        """`ValueError` if they were made on another model, or with prompts written otherwise."""
        shape, here = (len(self.real), len(self.real[0])), (len(anatomy.layers), anatomy.n_heads)
        if shape != here:
            raise ValueError(
                f"{path} was made on {self.model} with {shape[0]} layers x {shape[1]} heads, this model has "
                f"{here[0]} x {here[1]}; {MADE}"
            )
        if self.fingerprint != fingerprint(model, anatomy):
            raise ValueError(f"{path} was made on {self.model} with other weights than this model's; {MADE}")
        template = template_digest(processor)
        if template is not None and self.template not in (None, template):
            raise ValueError(f"{path} was made with another chat template than this processor's; {MADE}")
