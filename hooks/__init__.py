"""Interventions: one frozen dataclass, one file each. Their names are in `vlmfix.method.names`; files load on first use
and import no torch."""

from __future__ import annotations

import importlib
from typing import Any

from vlmfix.method.names import REGISTRY

_HOMES = {path.partition(":")[2]: path.partition(":")[0] for path in REGISTRY.values()}
__all__ = ["REGISTRY", *_HOMES]  # noqa: PLE0604 - computed from the registry


def __getattr__(name: str) -> Any:
    """`from vlmfix.hooks import VAR` loads `hooks/var.py`, and no other file."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlmfix.hooks' has no attribute {name!r}")
