"""The tools of `vlmfix heads`, one line each. No torch before a tool is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vlmfix.method.settings import checked_settings, did_you_mean, read_settings

if TYPE_CHECKING:
    from vlmfix.eval.tune.tool import Tool

TOOLS = {
    "vhd": "VHD",
    "ablate": "Ablate",
    "subspace": "Subspace",
    "visual": "Visual",
    "separate": "Separate",
    "gains": "Gains",
    "random": "Random",
}
"""Name -> class, in the file of that name in this folder."""


def find_tool(spec: str) -> Tool:
    """A tool from its name, or its name with settings: `ablate:see=margin,mode=uniform`. `ValueError` if unknown."""
    name, _, settings = spec.strip().partition(":")
    if name not in TOOLS:
        raise ValueError(f"unknown tool {name!r}; {did_you_mean(name, TOOLS)}")
    tool_class = getattr(import_module(f"vlmfix.eval.tune.{name}"), TOOLS[name])
    return tool_class(**checked_settings(tool_class, name, read_settings(settings)))
