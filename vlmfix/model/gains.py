"""A constant gain per attention head, as data: layer -> a factor for each head of the layer.

Scaling the output of head h by g is the same as scaling the columns of the output projection that read it:
W [.., g o_h, ..] = (W diag(.., g, ..)) o. So such gains need no hooks: weights can hold them, and adapters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmfix.model.anatomy import Anatomy, DecoderLayer, anatomy, core_of

Gains = dict[int, list[float]]
"""Decoder layer -> factor of each of its query heads; layers that are left out keep theirs."""
FILE = "head_gains.json"
"""How a folder names its gains."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that can be scaled one by one."""


def columns(layer: DecoderLayer, gains: list[float]) -> Tensor:
    """The gains of a layer's heads as one factor (float64) per input of its output projection, H * d of them."""
    return torch.tensor(gains, dtype=torch.float64).repeat_interleave(layer.head_dim)


def scaled(weight: Tensor, factors: Tensor) -> Tensor:
    """Columns of a weight (D, H * d) times their factors: computed in float64, rounded once to the weight's own type.
    Powers of two are exact in every type."""
    return (weight.double() * factors.to(weight.device)).to(weight.dtype)


@torch.no_grad()
def fold(model: nn.Module, gains: Gains) -> None:
    """Scale the output projections of a loaded model, in place.

    Raises `ValueError`, with what to do instead, where weights cannot hold gains; then nothing is changed.
    """
    parts = anatomy(core_of(model))
    check_fit(gains, parts)
    for number in gains:
        check_plain(parts, number)
    for number, per_head in gains.items():
        weight: Any = parts.layers[number].out_proj.weight  # type: ignore[union-attr]
        weight.copy_(scaled(weight, columns(parts.layers[number], per_head)))


def check_fit(gains: Gains, parts: Anatomy) -> None:
    """`ValueError` where gains are not those of a model with these parts."""
    for number, per_head in gains.items():
        if number not in parts.attention_layers:
            raise ValueError(
                f"head gains: layer {number} of this model has no attention heads, or there is no such layer"
            )
        n_heads = parts.layers[number].n_heads
        if len(per_head) != n_heads:
            raise ValueError(f"head gains: layer {number} has {n_heads} heads, got gains for {len(per_head)}")


def check_plain(parts: Anatomy, number: int) -> None:
    """`ValueError` where the weights of a layer's output projection are not plain numbers that belong to it alone."""
    layer, name = parts.layers[number], f"the output projection of layer {number}"
    projection: Any = layer.out_proj
    if hasattr(projection, "base_layer") or "peft" in type(projection).__module__:
        raise ValueError(
            f"{name} has an adapter in place; merge it first (model = model.merge_and_unload()), then bake the merged "
            f"model"
        )
    weight: Any = getattr(projection, "weight", None)
    plain = type(weight) is nn.Parameter and weight.dtype in FLOATS and weight.ndim == 2
    if not plain or weight.shape[1] != layer.n_heads * layer.head_dim:
        raise ValueError(
            f"{name} is quantised ({type(projection).__name__}); bake the model as it was before, and quantise the "
            f"baked one (or carry the gains beside the weights: vlmfix bake --format ia3)"
        )
    if weight.is_meta:
        raise ValueError(
            f"{name} is not in memory (device_map); bake the files instead: vlmfix bake --format checkpoint"
        )
    twins = [i for i, other in enumerate(parts.layers) if other.out_proj is projection and i != number]
    twins += [
        i
        for i, other in enumerate(parts.layers)
        if other.out_proj is not None and other.out_proj is not projection and other.out_proj.weight is weight
    ]
    if twins:
        raise ValueError(f"{name} is also that of layer {twins[0]}, so its columns cannot be scaled for one of them")


def projection_names(model: nn.Module, parts: Anatomy, gains: Gains) -> dict[int, str]:
    """Full name of the output projection of each layer that has gains."""
    names = {id(module): name for name, module in core_of(model).named_modules()}
    return {number: names[id(parts.layers[number].out_proj)] for number in gains}


def save_gains(model: nn.Module, gains: Gains, path: Path, about: dict[str, Any]) -> None:
    """Write gains as JSON: what is said `about` them (model, method, ...), and `layers`: number -> name of the output
    projection, `n_heads`, `head_dim`, and head -> factor, where that is not 1."""
    parts = anatomy(core_of(model))
    layers = {}
    for number, name in projection_names(model, parts, gains).items():
        layers[str(number)] = {
            "projection": name,
            "n_heads": parts.layers[number].n_heads,
            "head_dim": parts.layers[number].head_dim,
            "gains": {str(head): gain for head, gain in enumerate(gains[number]) if gain != 1},
        }
    path.write_text(json.dumps({**about, "layers": layers}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_gains(path: Path) -> tuple[Gains, dict[str, Any]]:
    """Gains and all that the file says. `ValueError` for a file that holds none."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        gains: Gains = {}
        for number, layer in about["layers"].items():
            gains[int(number)] = [1.0] * layer["n_heads"]
            for head, gain in layer["gains"].items():
                gains[int(number)][int(head)] = float(gain)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected head gains as vlmfix bake --format json writes them, got {error!r}"
        ) from None
    return gains, about
