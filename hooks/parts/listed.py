"""Heads that a setting lists, as they are on a loaded model. For methods that edit chosen heads."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from vlmfix.method.heads import head_names, parse_heads, resolve_heads

if TYPE_CHECKING:
    from torch import nn

    from vlmfix.model.anatomy import Anatomy


def listed_heads(
    setting: Any, model: nn.Module, anatomy: Anatomy, layers: Collection[int] | None = None, instead: str | None = None
) -> tuple[str, dict[str, Any]]:
    """The heads of a setting (names such as `L3H1/L3H5`, or the file of a head list) as names, and facts to record.

    Of these only heads in the `layers`, if any are given. As a control, `instead` asks for as many `random` heads of
    the model, whatever their layers, or for those with the `least` score. `ValueError` where nothing is left.
    """
    model_name = getattr(model.config, "_name_or_path", None)
    heads, facts = resolve_heads(str(setting), len(anatomy.layers), anatomy.n_heads, model_name, instead)
    if layers is not None and instead is None:
        heads = tuple(head for head in heads if head[0] in layers)
    if not heads:
        raise ValueError(f"no heads: none of {setting} lies in the layers {layers}")
    return head_names(heads), facts


def heads_by_layer(names: Any) -> dict[int, list[int]]:
    """Heads such as `L3H1/L3H5` as layer -> heads, in the order of the text; empty for `None` and for a file."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in parse_heads(str(names or "")) or ():
        by_layer.setdefault(layer, []).append(head)
    return by_layer
