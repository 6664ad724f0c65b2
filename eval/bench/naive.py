"""The naive way to edit attention, for comparison: what most ports of these methods do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from vlmfix.asking.asker import Asker
from vlmfix.engine import attention
from vlmfix.method.intervention import Intervention


def naive_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention implementation of transformers: queries x keys in float32, the edits on the whole matrix, and no
    kernel."""
    view = module.config.vlmfix_view
    call, rows = view.current(), torch.arange(query.shape[2], device=query.device)
    if call is None:  # a second stream: no edit of attention is in force there
        return view.kernel()(view.original, query, key, value, attention_mask, **kwargs)
    scores = attention.Scores(view, call, query, key.float(), attention_mask, kwargs)
    s, hidden = scores.rows(rows)
    at = (view.layer, view.n_layers, scores.n_keys, rows, query.device)
    for i, e in view.edits:
        if call.n_prompt and e.acts_at("survey"):
            e.survey(attention.softmax(s, scores.extra, rows), call.site(i, "all", *at))
    sites = [(e, call.site(i, e.rows, *at)) for i, e in view.edits]
    for e, site in sites:
        s = site.admit(e.scores(s, site), s)
    a = attention.softmax(s if hidden is None else s.masked_fill(hidden, torch.finfo(s.dtype).min), scores.extra, rows)
    for e, site in sites:
        a = site.admit(e.weights(a, site), a)
    out = (attention.by_key_head(a, scores.group) @ value.float()).view(*a.shape[:3], -1)
    return out.transpose(1, 2).to(query.dtype), None


@contextmanager
def naively(model: Any, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Interventions in force, with `naive_attention` in the layers that they edit."""
    with Asker(model, None, interventions).applied():
        AttentionInterface.register(attention.NAME, naive_attention)
        try:
            yield
        finally:
            AttentionInterface.register(attention.NAME, attention.edited_attention)
