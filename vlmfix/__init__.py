"""vlmfix: make vision-language models say what is in the picture."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlmfix.asking.asking import Record, ask, ask_batch
    from vlmfix.engine.wrap import effects, unwrap, wrap
    from vlmfix.method.intervention import Intervention
    from vlmfix.method.site import Site
    from vlmfix.model.loading import load

_HOMES = {
    "Intervention": "method.intervention",
    "Record": "asking.asking",
    "Site": "method.site",
    "effects": "engine.wrap",
    "ask": "asking.asking",
    "ask_batch": "asking.asking",
    "load": "model.loading",
    "unwrap": "engine.wrap",
    "wrap": "engine.wrap",
}
__all__ = ["Intervention", "Record", "Site", "__version__", "ask", "ask_batch", "effects", "load", "unwrap", "wrap"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"vlmfix.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'vlmfix' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
