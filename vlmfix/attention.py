"""The one attention function of vlmfix: the original kernel computes everything, then only edited rows are done
again."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from vlmfix.intervention import Intervention, Rows, Site
from vlmfix.state import Call

NAME = "vlmfix"
PIECE = 256
"""Rows that are done at a time: bounds the memory of methods that edit or survey all rows of a long prompt."""
Edits = list[tuple[int, Intervention]]


class AttentionView:
    """What an attention module's config view points at: the original kernel and who edits this layer."""

    def __init__(self, module: nn.Module, layer: int, n_layers: int, edits: Edits, current: Callable[[], Call | None]):
        self.layer = layer
        self.n_layers = n_layers
        self.edits = edits
        self.current = current
        self.original: Any = copy.copy(
            module
        )  # shares all weights; kernels that read module.config find the original one

    def kernel(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The implementation that the model is set to (sdpa, eager, flash ...)."""
        eager: Any = getattr(sys.modules[type(self.original).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.original.config._attn_implementation, eager)


def attach(module: nn.Module, view: AttentionView) -> None:
    """Give one attention module its own config view; the decoder's config, and so the masks, stay as they were."""
    AttentionInterface.register(NAME, edited_attention)
    config = copy.copy(module.config)
    config.__dict__["_attn_implementation_internal"] = NAME
    config.__dict__["vlmfix_view"] = view
    module.config = config


def edited_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Stock attention, then the edited rows of its output overwritten. query (B, H, Q, d), key and value (B, Hk, K, d).

    The weights returned beside the output, where the kernel gives any, are the unedited ones.
    """
    view: AttentionView = module.config.vlmfix_view  # type: ignore[union-attr, assignment]
    out, weights = view.kernel()(view.original, query, key, value, attention_mask, **kwargs)
    call = view.current()
    if call is not None:
        unsupported = [k for k in ("softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]
        if unsupported:
            raise TypeError(
                f"attention with {', '.join(unsupported)} cannot be edited yet; use a method that edits head outputs"
            )
        edit_rows(view, call, out, query, key, value, attention_mask, kwargs.get("scaling"))
    return out, weights


def edit_rows(
    view: AttentionView,
    call: Call,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None,
) -> None:
    """Recompute the rows that an intervention may edit, in float32, and write those that it changed into `out` (B, Q,
    H, d).

    Work and memory are rows x keys; rows, heads and samples that no edit changed keep the kernel's output bit for bit.
    """
    edits = [(i, e) for i, e in view.edits if i in call.generation.force]
    index = call.row_index(frozenset(e.rows for _, e in edits)) if edits else torch.empty(0)
    surveys = [(i, e) for i, e in edits if call.n_prompt and e.acts_at("survey")]
    if index is not None and index.numel() == 0 and not surveys:
        return
    b, h, n_queries, d = query.shape
    hk, n_keys = key.shape[1:3]
    keys, values = key.float().transpose(-1, -2), value.float()

    def scores(picked: Any) -> tuple[Tensor, Tensor | None]:
        q = query[:, :, picked].float()
        n = q.shape[2]  # query heads of one key head side by side: keys and values are never repeated
        s = (q.reshape(b, hk, h // hk * n, d) @ keys).view(b, h, n, n_keys) * (scaling or d**-0.5)
        hidden = hidden_keys(attention_mask, call, n_queries, n_keys, picked, s.device)
        return (s if hidden is None else mask_scores(s, attention_mask, hidden, picked)), hidden

    def site(i: int, policy: Rows, picked: Any) -> Site:
        return call.site(i, policy, view.layer, view.n_layers, n_keys, picked, query.device)

    if surveys:
        for piece in torch.arange(n_queries, device=query.device).split(PIECE):
            a = scores(piece)[0].softmax(-1)
            for i, e in surveys:
                e.survey(a, site(i, "all", piece))
    picks: Any = [slice(None)] if index is None else index.to(query.device).split(PIECE)
    for picked in picks:
        s, hidden = scores(picked)
        a = stock = s.softmax(-1)
        sites = {i: site(i, e.rows, picked) for i, e in edits}
        if any(e.acts_at("scores") for _, e in edits):
            edited = s
            for i, e in edits:
                edited = e.scores(edited, sites[i])
            a = stock if edited is s else (edited if hidden is None else s.where(hidden, edited)).softmax(-1)
        for i, e in edits:
            a = e.weights(a, sites[i])
        if a is stock:
            continue
        admitted = torch.stack([each.rows for each in sites.values()]).any(0)
        changed = (a != stock).any(-1) & admitted[:, None]  # (B, H, R)
        if changed.device.type == "cpu" and not changed.any():  # elsewhere, asking would wait for the device
            continue
        n = a.shape[2]
        new = (a.reshape(b, hk, h // hk * n, n_keys) @ values).view(b, h, n, value.shape[-1]).transpose(1, 2)
        out[:, picked] = torch.where(changed.transpose(1, 2)[..., None], new.to(out.dtype), out[:, picked])


def hidden_keys(mask: Any, call: Call, n_queries: int, n_keys: int, picked: Any, device: torch.device) -> Tensor | None:
    """True where a row may not look, broadcastable to (B, H, R, K); `None` if every row sees every key."""
    if isinstance(mask, Tensor) and mask.dim() == 4:
        rows = mask[:, :, picked, :n_keys]
        return ~rows if rows.dtype == torch.bool else rows <= torch.finfo(rows.dtype).min / 2
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise TypeError(
            f"attention masks of type {type(mask).__name__} are not supported; load the model with sdpa or eager"
        )
    padding = None if mask is None else ~mask[:, None, None, -n_keys:].bool()
    if n_queries == 1 and n_keys <= call.start + 1:
        return padding
    position = torch.arange(n_queries, device=device)[picked, None] + min(call.start, n_keys - n_queries)
    future = (torch.arange(n_keys, device=device) > position)[None, None]
    return future if padding is None else future | padding


def mask_scores(s: Tensor, mask: Any, hidden: Tensor, picked: Any) -> Tensor:
    """Scores as the kernel sees them: a mask of numbers is added, anything else hides keys."""
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype != torch.bool:
        return s + mask[:, :, picked, : s.shape[-1]].float()
    return s.masked_fill(hidden, torch.finfo(s.dtype).min)
