"""Decoding by plan: what a pass over one new token does in each layer, laid down once, when the prompt is read.

The general way asks in every layer which pass this is, which rows an intervention admits and what it changed. Over one
new token all that is known beforehand: every intervention in force edits the one row of each sample. So a planned pass
is, per layer, row, functions, done; it reads nothing that changes from token to token but tensors, and can be compiled
whole. The functions are the stages themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmfix.method.intervention import Intervention
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry

Placed = tuple[int, Intervention]
"""An intervention and its place among those that the model is wrapped with, which is also that of its memo."""

PLANNED_STAGES = ("scores", "weights", "heads", "mlp")
"""Stages inside the layers that can be planned."""
OTHER_STAGES = ("tokens", "cache")
"""Those that cannot: they change how many keys there are, or the keys themselves."""

Edits = tuple[tuple[Intervention, Site], ...]
"""Interventions that act at one stage in one layer, in their order, each with its site."""


@dataclass
class Plan:
    """The passes over one new token of one generation."""

    edits: dict[tuple[str, int], Edits]
    """By stage and layer."""
    windows: dict[int, Tensor] = field(default_factory=dict)
    """Keys that are kept -> () position of the first of them, for layers that keep a window."""
    begun: bool = False
    """Whether the first of these passes, in which stages lay down what they need, is over."""

    def at(self, stage: str, layer: int) -> Edits:
        """What is to be done at a stage of a layer."""
        return self.edits.get((stage, layer), ())

    def advance(self, start: int) -> None:
        """Tell layers with a window where the pass over a token at position `start` finds the first of their keys."""
        for n_keys, first in self.windows.items():
            first.fill_(max(start + 1 - n_keys, 0))


def can_plan(edits: Sequence[Placed]) -> bool:
    """Whether all interventions in force can act by plan: those that do nothing inside the layers while answering can,
    and those that say so."""
    for _, one in edits:
        inside = any(one.acts_at(stage) for stage in PLANNED_STAGES)
        others = any(one.acts_at(stage) for stage in OTHER_STAGES)
        notes = one.acts_at("logits") and one.overrides("hidden_layers")
        if others or notes or (inside and not one.traits.by_plan):
            return False
    return True


def lay(
    edits: Sequence[Placed], geometry: Geometry, memos: list[dict[str, Any]], n_layers: int, windows: dict[int, int]
) -> Plan | None:
    """The plan for the rest of a generation, from the masks over its prompt and what each intervention remembers of it.
    `windows`: layer -> keys that it keeps, for those that keep a window. `None` where a sample shows no image: its rows
    stay as the kernel gives them, to the bit."""
    if not bool(geometry.image.any(1).all()):
        return None
    device = geometry.image.device
    plan = Plan({}, {n_keys: torch.zeros((), dtype=torch.long, device=device) for n_keys in windows.values()})
    rows = torch.ones_like(geometry.image[:, :1])
    for layer in range(n_layers):
        for stage in PLANNED_STAGES:
            placed = [(i, one) for i, one in edits if one.acts_at(stage) and layer in one.at_layers(n_layers)]
            if not placed:
                continue
            shift = plan.windows.get(windows.get(layer, -1))
            plan.edits[stage, layer] = tuple(
                (one, Site(layer, n_layers, geometry, rows, geometry.n, 0, memos[i], shift=shift)) for i, one in placed
            )
    return plan
