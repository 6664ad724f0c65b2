"""Pointwise edits of scores inside FlexAttention: its kernel computes them entry by entry, nothing is done again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import flex_attention as integration

from vlmfix.engine.passes import Pass
from vlmfix.engine.plan import Placed


def takes(edits: Sequence[Placed], implementation: str, extra: dict[str, Any]) -> bool:
    """Whether all that these interventions do in a layer's attention can be done by a FlexAttention kernel. Attention
    sinks that are parameters take their share after the kernel, so there they cannot."""
    if implementation != "flex_attention" or extra.get("s_aux") is not None or not edits:
        return False
    for _, one in edits:
        if not one.overrides("score_mod") or one.acts_at("weights") or one.acts_at("survey"):
            return False
    return True


def attend(
    edits: Sequence[Placed], this_pass: Pass, layer: int, n_layers: int, query: Tensor, key: Tensor, value: Tensor,
    mask: Any, extra: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Output (B, Q, H, d) of the kernel with the edits inside. `mask` is a block mask, or `None`."""
    n_keys, mods = key.shape[2], []
    shape = query.new_empty((), dtype=torch.float32).expand(*query.shape[:2], 1, n_keys)
    for i, one in edits:
        site = this_pass.site(i, one.rows, layer, n_layers, n_keys, slice(None), query.device)
        mods.append((one.score_mod(shape, site), site.rows if site.n_prompt else None))
    cap, bias = extra.get("softcap"), extra.get("position_bias")

    def score_mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if cap is not None:
            s = cap * torch.tanh(s / cap)
        if bias is not None:
            s = s + bias[b, h, q, k]
        for mod, rows in mods:
            new = mod(s, b, h, q, k)
            s = new if rows is None else torch.where(rows[b, q], new, s)
        return s

    out: Any = integration.compile_friendly_flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=mask,
        enable_gqa=key.shape[1] != query.shape[1],
        scale=extra.get("scaling"),
        kernel_options=extra.get("kernel_options"),
        training=False,
    )
    return out.transpose(1, 2).contiguous()
