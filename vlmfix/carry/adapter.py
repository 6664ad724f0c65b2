"""Head gains as adapters of PEFT, beside the weights: loaded, switched and taken off without this library.

IA3 (Liu et al., NeurIPS 2022, arXiv 2205.05638) learns factors for activations; on the *inputs* of the output
projections they are exactly the heads' gains. LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) adds B A to a weight; with
A picking the scaled columns and B = (g - 1) W of these, W + B A is the scaled weight. Engines such as vLLM choose LoRA
adapters per request.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmfix.model.anatomy import anatomy, core_of
from vlmfix.model.gains import Gains, check_fit, check_plain, columns, projection_names

PREFIX = "base_model.model."
"""How PEFT begins the names of its weights."""


def save_ia3(model: nn.Module, gains: Gains, folder: Path, base: str) -> None:
    """An IA3 adapter, exact at every gain: one factor (float32) per input of an output projection."""
    parts = anatomy(core_of(model))
    check_fit(gains, parts)
    names = projection_names(model, parts, gains)
    tensors = {f"{PREFIX}{names[n]}.ia3_l": columns(parts.layers[n], gains[n]).float()[None] for n in gains}
    targets = list(names.values())
    _save(folder, base, tensors, peft_type="IA3", target_modules=targets, feedforward_modules=targets)


def save_lora(model: nn.Module, gains: Gains, folder: Path, base: str) -> None:
    """A LoRA adapter, exact up to rounding. Its rank is the number of scaled columns, the same in all layers (engines
    want one rank; rows of zeros fill it up)."""
    parts = anatomy(core_of(model))
    check_fit(gains, parts)
    names = projection_names(model, parts, gains)
    factors = {n: columns(parts.layers[n], gains[n]) for n in gains}
    rank = max(int((each != 1).sum()) for each in factors.values())
    tensors: dict[str, Tensor] = {}
    for number, name in names.items():
        check_plain(parts, number)
        weight: Any = parts.layers[number].out_proj.weight  # type: ignore[union-attr]
        a, b = _low_rank(weight.detach().cpu(), factors[number], rank)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    targets = list(names.values())
    _save(folder, base, tensors, peft_type="LORA", target_modules=targets, r=rank, lora_alpha=rank, lora_dropout=0.0)


def _low_rank(weight: Tensor, factors: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, H * d) and B (D, rank) with B A = W diag(factors - 1)."""
    scaled = (factors != 1).nonzero()[:, 0]
    a = weight.new_zeros(rank, weight.shape[1])
    a[torch.arange(len(scaled)), scaled] = 1
    b = weight.new_zeros(weight.shape[0], rank)
    b[:, : len(scaled)] = (weight[:, scaled].double() * (factors[scaled] - 1)).to(weight.dtype)
    return a, b


def _save(folder: Path, base: str, tensors: dict[str, Tensor], **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"base_model_name_or_path": base, "task_type": None, "inference_mode": True, **config}
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
