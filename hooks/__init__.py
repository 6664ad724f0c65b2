"""Interventions: one frozen dataclass, one file each. Names map to classes; files load on first use and import no
torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmfix.hooks.act import ACT
    from vlmfix.hooks.beam import Beam
    from vlmfix.hooks.chunks import Chunks
    from vlmfix.hooks.contrast import Contrast
    from vlmfix.hooks.lookback import Lookback
    from vlmfix.hooks.pai import PAI
    from vlmfix.hooks.rerank import Rerank
    from vlmfix.hooks.truncate import Truncate
    from vlmfix.hooks.var import VAR
    from vlmfix.hooks.vcd import VCD
    from vlmfix.hooks.vhr import VHR
    from vlmfix.hooks.zerotuning import ZeroTuning

REGISTRY = {
    "act": "vlmfix.hooks.act:ACT",
    "beam": "vlmfix.hooks.beam:Beam",
    "chunks": "vlmfix.hooks.chunks:Chunks",
    "contrast": "vlmfix.hooks.contrast:Contrast",
    "lookback": "vlmfix.hooks.lookback:Lookback",
    "pai": "vlmfix.hooks.pai:PAI",
    "rerank": "vlmfix.hooks.rerank:Rerank",
    "truncate": "vlmfix.hooks.truncate:Truncate",
    "var": "vlmfix.hooks.var:VAR",
    "vcd": "vlmfix.hooks.vcd:VCD",
    "vhr": "vlmfix.hooks.vhr:VHR",
    "zerotuning": "vlmfix.hooks.zerotuning:ZeroTuning",
}
_HOMES = {path.partition(":")[2]: path.partition(":")[0] for path in REGISTRY.values()}
__all__ = [
    "ACT",
    "PAI",
    "REGISTRY",
    "VAR",
    "VCD",
    "VHR",
    "Beam",
    "Chunks",
    "Contrast",
    "Lookback",
    "Rerank",
    "Truncate",
    "ZeroTuning",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlmfix.hooks' has no attribute {name!r}")
