"""vlmfix: make vision-language models say what is in the picture."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlmfix.asking.asker import Asker, ask, ask_batch
    from vlmfix.asking.record import Record
    from vlmfix.carry.bake import bake
    from vlmfix.engine.wrap import effects, unwrap, wrap
    from vlmfix.eval.tune.describe import describe
    from vlmfix.eval.tune.tune import tune
    from vlmfix.method.intervention import Intervention
    from vlmfix.method.site import Site
    from vlmfix.model.loading import load

_HOMES = {
    "Asker": "asking.asker",
    "Intervention": "method.intervention",
    "Record": "asking.record",
    "Site": "method.site",
    "effects": "engine.wrap",
    "describe": "eval.tune.describe",
    "ask": "asking.asker",
    "ask_batch": "asking.asker",
    "bake": "carry.bake",
    "load": "model.loading",
    "tune": "eval.tune.tune",
    "unwrap": "engine.wrap",
    "wrap": "engine.wrap",
}
__all__ = [
    "Asker",
    "Intervention",
    "Record",
    "Site",
    "__version__",
    "ask",
    "ask_batch",
    "bake",
    "describe",
    "effects",
    "load",
    "tune",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"vlmfix.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'vlmfix' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
