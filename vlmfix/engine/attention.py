"""The one attention function of vlmfix: the original kernel computes everything, then only edited rows are done
again."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from vlmfix.engine import flex
from vlmfix.engine.passes import Pass
from vlmfix.engine.plan import Edits, Placed
from vlmfix.engine.streams import JointCache
from vlmfix.method.site import Rows, Site

NAME = "vlmfix"
LOOK = "vlmfix_look"
PIECE = 256
"""Rows that are done at a time: bounds the memory of methods that edit or survey all rows of a long prompt."""
FLOATS = {"cpu": 2**19}
"""Entries of 16-bit keys that are float32 at a time: what the caches of a CPU core hold (2 MB)."""
MOST_FLOATS = 2**24
"""The same elsewhere, where few large steps are better."""
between_compiled_pieces: Any = torch.compiler.disable(
    reason="a method that does not act by plan runs between the compiled pieces of a model, so a model wrapped with it "
    "cannot be compiled with fullgraph=True"
)
"""Keeps a function out of what torch.compile makes."""


class AttentionView:
    """What an attention module's config view points at: the original kernel and who edits this layer."""

    def __init__(
        self, module: nn.Module, layer: int, n_layers: int, edits: list[Placed], current: Callable[[], Pass | None]
    ):
        self.layer = layer
        self.n_layers = n_layers
        self.edits = edits
        self.current = current
        # A copy that shares all weights: kernels that read module.config find the original one there.
        self.original: Any = copy.copy(module)

    def kernel(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The implementation that the model is set to (sdpa, eager, flash ...)."""
        eager: Any = getattr(sys.modules[type(self.original).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.original.config._attn_implementation, eager)


class _Name(str):
    """The name of an attention implementation under which `edited_attention` is found, though it reads and compares
    like the original one: some models ask for it by name to know what mask to make."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(NAME)

    def __eq__(self, other: object) -> bool:
        return other in (str(self), NAME)

    def __ne__(self, other: object) -> bool:
        return not self == other


class ConfigHandle:
    """Takes an attention module's config view off again, as the handles of hooks do."""

    def __init__(self, module: nn.Module, config: Any):
        self.module, self.config = module, config

    def remove(self) -> None:
        """The module has its own config again."""
        self.module.config = self.config


def attach(module: nn.Module, view: AttentionView) -> ConfigHandle:
    """Give one attention module its own config view; the decoder's config, and so the masks, stay as they were."""
    AttentionInterface.register(NAME, edited_attention)
    handle = ConfigHandle(module, module.config)
    config: Any = copy.copy(module.config)
    config.__dict__["_attn_implementation_internal"] = _Name(config._attn_implementation)
    config.__dict__["vlmfix_view"] = view
    module.config = config
    return handle


def edited_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Stock attention with edits. query (B, H, Q, d), key and value (B, Hk, K, d).

    The weights returned beside the output, where the kernel gives any, are edited in the same rows. Where second
    streams go along, their queries follow the first stream's, and each attends to its own keys by the kernel alone.
    """
    view: AttentionView = module.config.vlmfix_view  # type: ignore[union-attr, assignment]
    this_pass = view.current()
    if this_pass is None:
        return view.kernel()(view.original, query, key, value, attention_mask, **kwargs)
    if not isinstance(this_pass.cache, JointCache):
        return _attended(view, this_pass, query, key, value, attention_mask, kwargs)
    mask = None if attention_mask is None else this_pass.own(attention_mask)
    own, _ = _attended(view, this_pass, this_pass.own(query), key, value, mask, kwargs)
    kernel = partial(view.kernel(), view.original)
    return torch.cat([own, *this_pass.cache.attend(kernel, query, **kwargs)]), None


def _attended(
    view: AttentionView, this_pass: Pass, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """By plan where the pass has one, else the general way."""
    plan = this_pass.plan
    if plan is None or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)):
        return _edited(view, this_pass, query, key, value, mask, kwargs)
    scores, weights = plan.at("scores", view.layer), plan.at("weights", view.layer)
    if not scores and not weights:
        return view.kernel()(view.original, query, key, value, mask, **kwargs)
    out, a = _by_plan(scores, weights, query, key, value, mask, kwargs)
    return out, a.to(query.dtype) if view.original.config._attn_implementation == "eager" else None


def _by_plan(
    scores: Edits, weights: Edits, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extra: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The attention of one new token: its row of scores, the edits, its sums. Nothing is done twice, and no kernel
    runs. Output (B, 1, H, d) and weights (B, H, 1, K)."""
    n_keys, group = key.shape[2], query.shape[1] // key.shape[1]
    q = query.float() * (extra.get("scaling") or query.shape[-1] ** -0.5)
    s = products(by_key_head(q, group), key).view(*query.shape[:3], n_keys)
    s = _capped_and_biased(s, extra, slice(None))
    hidden = None
    if mask is not None:
        mask = mask[..., :n_keys]
        hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
        s = s if mask.dtype == torch.bool else s + mask.float()
    elif extra.get("sliding_window") is not None and extra["sliding_window"] < n_keys:
        hidden = torch.arange(n_keys, device=s.device) < n_keys - extra["sliding_window"]
    least = torch.finfo(s.dtype).min
    if hidden is not None:
        s = s.masked_fill(hidden, least)
    for one, site in scores:
        s = one.scores(s, site)
    if hidden is not None and scores:
        s = s.masked_fill(hidden, least)
    a = softmax(s, extra, slice(None))
    for one, site in weights:
        a = one.weights(a, site)
    out = batched(by_key_head(a, group).to(value.dtype), value).view(*query.shape[:3], value.shape[-1])
    return out.transpose(1, 2).to(query.dtype), a


@between_compiled_pieces
def _edited(
    view: AttentionView, this_pass: Pass, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The general way: the kernel's output, with the edited rows overwritten."""
    stock = cache(partial(view.kernel(), view.original, query, key, value, attention_mask, **kwargs))
    if this_pass.n_prompt and _as_cached(view, this_pass, key, value, kwargs):
        this_pass.generation.joinable.add(view.layer)
    if not view.edits:
        return stock()
    in_force = [(i, one) for i, one in view.edits if i in this_pass.generation.force]
    if flex.takes(in_force, view.original.config._attn_implementation, kwargs):
        place = view.layer, view.n_layers
        return flex.attend(in_force, this_pass, *place, query, key, value, attention_mask, kwargs), None
    scores = Scores(view, this_pass, query, key, attention_mask, kwargs)
    if not this_pass.n_prompt and query.device.type == "cpu" and view.original.config._attn_implementation == "sdpa":
        # The kernel runs only where a row stays as it is.
        return edit_rows(view, this_pass, stock, scores, value)
    stock()
    return edit_rows(view, this_pass, stock, scores, value)


def _as_cached(view: AttentionView, this_pass: Pass, key: Tensor, value: Tensor, extra: dict[str, Any]) -> bool:
    """Whether a kernel gets keys and values just as the cache gives them, and nothing else that has a row per sample.
    Then second streams can go along in a pass and bring their own."""
    if view.original.config._attn_implementation != "sdpa":
        return False
    layers = getattr(this_pass.cache, "layers", ())
    kept = layers[view.layer] if view.layer < len(layers) else None
    if getattr(kept, "keys", None) is not key or getattr(kept, "values", None) is not value:
        return False
    others = (x for name, x in extra.items() if name != "position_ids")
    return not any(isinstance(x, Tensor) and x.dim() > 1 for x in others)


class Scores:
    """Attention scores of one layer's pass, done again for some rows at a time: rows x keys, in float32. Keys of fewer
    bits become float32 piece by piece, so that scores are exact and no copy of all keys is made.

    `extra` is what the attention module tells its kernel: `scaling`, `softcap`, `position_bias` (B, H, Q, K), attention
    sinks as parameters (`s_aux` (H,), or `sinks` (B, H, Q, 1)), `sliding_window`, `is_causal`.
    """

    def __init__(
        self, view: AttentionView, this_pass: Pass, query: Tensor, key: Tensor, mask: Any, extra: dict[str, Any]
    ):
        self.this_pass, self.query, self.key, self.mask, self.extra = this_pass, query, key, mask, extra
        self.n_queries, self.n_keys = query.shape[2], key.shape[2]
        self.group = query.shape[1] // key.shape[1]
        causal = extra.get("is_causal")
        self.causal = getattr(view.original, "is_causal", True) if causal is None else causal

    def rows(self, picked: Any) -> tuple[Tensor, Tensor | None]:
        """(B, H, R, K) scores as the kernel sees them, and where a row may not look; `None`: nowhere."""
        q = self.query[:, :, picked].float()
        q = q * (self.extra.get("scaling") or q.shape[-1] ** -0.5)
        s = products(by_key_head(q, self.group), self.key).view(*q.shape[:3], self.n_keys)
        s = _capped_and_biased(s, self.extra, picked)
        hidden = self._hidden(picked, s.device)
        if hidden is None:
            return s, None
        if isinstance(self.mask, Tensor) and self.mask.dim() == 4 and self.mask.dtype != torch.bool:
            s = s + self.mask[:, :, picked, : self.n_keys].float()
        return s.masked_fill_(hidden, torch.finfo(s.dtype).min), hidden

    def _hidden(self, picked: Any, device: torch.device) -> Tensor | None:
        """True where a row may not look, broadcastable to (B, H, R, K); `None` if every row sees every key."""
        mask, n_queries, n_keys = self.mask, self.n_queries, self.n_keys
        start = self.this_pass.start
        if isinstance(mask, Tensor) and mask.dim() == 4:
            rows = mask[:, :, picked, :n_keys]
            return ~rows if rows.dtype == torch.bool else rows <= torch.finfo(rows.dtype).min / 2
        window = self.extra.get("sliding_window")
        window = None if window is None or window >= n_keys else window
        causal = self.causal and not (n_queries == 1 and n_keys <= start + 1)
        if mask is None and window is None and not causal:
            return None
        query, key = torch.arange(n_queries, device=device)[picked, None], torch.arange(n_keys, device=device)
        if hasattr(mask, "mask_mod"):  # flex attention: a function of batch, head, query and key
            sample = torch.arange(self.query.shape[0], device=device)[:, None, None, None]
            return ~mask.mask_mod(sample, torch.zeros_like(sample), query[None, None], key[None, None, None])
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise TypeError(
                f"attention masks of type {type(mask).__name__} are not supported; load the model with sdpa or eager"
            )
        hidden = None if mask is None else ~mask[:, None, None, -n_keys:].bool()
        position = query + min(start, n_keys - n_queries)
        if causal:
            hidden = _either(hidden, key > position)
        if window is not None:
            hidden = _either(hidden, key <= position - window)
        return hidden


def products(q: Tensor, key: Tensor) -> Tensor:
    """(B, Hk, R, K) of queries (B, Hk, R, d) with all keys (B, Hk, K, d)."""
    if key.requires_grad:  # pieces in one room could not be found again on the way back
        key = key.to(q.dtype)
    if key.dtype == q.dtype:
        return batched(q, key.transpose(-1, -2))
    b, n_key_heads, n_keys, d = key.shape
    most = FLOATS.get(key.device.type, MOST_FLOATS)
    piece_size = min(max(most // (b * n_key_heads * d), 1), n_keys)
    # One room for all pieces: fresh memory would cost more than the maths.
    room = q.new_empty(b, n_key_heads, piece_size, d)
    pieces = []
    for piece in key.split(piece_size, dim=2):
        floats = room[:, :, : piece.shape[2]].copy_(piece)
        pieces.append(q @ floats.transpose(-1, -2))
    return pieces[0] if piece_size == n_keys else torch.cat(pieces, dim=-1)


def batched(x: Tensor, y: Tensor) -> Tensor:
    """(B, Hk, n, m) of (B, Hk, n, k) and (B, Hk, k, m): `x @ y`, without the operations that it takes to find out that
    nothing is to be repeated."""
    product = torch.bmm(x.flatten(0, 1), y.flatten(0, 1))
    return product.view(*x.shape[:2], *product.shape[1:])


def _capped_and_biased(s: Tensor, extra: dict[str, Any], picked: Any) -> Tensor:
    """Scores as a model's cap and its bias by position leave them."""
    cap, bias = extra.get("softcap"), extra.get("position_bias")
    if cap is not None:
        s = cap * (s / cap).tanh()
    if bias is not None:
        s = s + bias[:, :, picked, : s.shape[-1]].float()
    return s


def softmax(s: Tensor, extra: dict[str, Any], picked: Any) -> Tensor:
    """Weights of scores. Sinks that are parameters take their share: rows then sum to less than 1."""
    per_head, per_row = extra.get("s_aux"), extra.get("sinks")
    if per_head is not None:
        sink = per_head.view(1, -1, 1, 1)
    elif per_row is not None:
        sink = per_row[:, :, picked]
    else:
        return s.softmax(-1)
    with_sink = torch.cat([s, sink.to(s).expand(*s.shape[:3], 1)], dim=-1)
    return with_sink.softmax(-1)[..., :-1]


def _either(hidden: Tensor | None, limit: Tensor) -> Tensor:
    """Where a row may not look for one reason (B, 1, 1 or R, K) or the other (R, K)."""
    return limit[None, None] if hidden is None else hidden | limit


def by_key_head(x: Tensor, group: int) -> Tensor:
    """(B, H, R, n) as (B, Hk, group * R, n): query heads of one key head side by side, so that keys and values are
    never repeated."""
    b, h, r, n = x.shape
    return x if group == 1 else x.reshape(b, h // group, group * r, n)


def edit_rows(
    view: AttentionView,
    this_pass: Pass,
    stock: Callable[[], tuple[Tensor, Tensor | None]],
    scores: Scores,
    value: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """What the original kernel gives by `stock`, its output (B, Q, H, d) and perhaps its weights (B, H, Q, K), with the
    rows that an intervention changed overwritten in both.

    Work and memory are rows x keys; rows, heads and samples that no edit changed keep the kernel's output bit for bit.
    Weights are edited in float32; the rows that they give are summed as kernels do it: weights in the dtype of the
    values, sums in float32.
    """
    edits = [(i, one) for i, one in view.edits if i in this_pass.generation.force]
    index = this_pass.row_index(frozenset(one.rows for _, one in edits)) if edits else torch.empty(0)
    surveys = [(i, one) for i, one in edits if this_pass.n_prompt and one.acts_at("survey")]
    if index is not None and index.numel() == 0 and not surveys:
        return stock()
    device = value.device

    def site(i: int, policy: Rows, picked: Any) -> Site:
        here = this_pass.site(i, policy, view.layer, view.n_layers, scores.n_keys, picked, device)
        here.values = value
        return here

    if surveys:
        for piece in torch.arange(scores.n_queries, device=device).split(PIECE):
            a = softmax(scores.rows(piece)[0], scores.extra, piece)
            for i, one in surveys:
                one.survey(a, site(i, "all", piece))
    edited: tuple[Tensor, Tensor | None] | None = None
    pieces: Any = [slice(None)] if index is None else index.to(device).split(PIECE)
    for picked in pieces:
        sites = {i: site(i, one.rows, picked) for i, one in edits}
        a, plain = _edited_weights(edits, sites, scores, picked)
        if a is plain:
            continue
        changed = (a != plain).any(-1)  # (B, H, R)
        if this_pass.n_prompt:  # all rows are admitted afterwards
            changed &= torch.stack([each.rows for each in sites.values()]).any(0)[:, None]
        on_cpu = changed.device.type == "cpu"  # elsewhere, asking would wait for the device
        all_changed = on_cpu and bool(changed.all())
        if on_cpu and not all_changed and not changed.any():
            continue
        new = (by_key_head(a, scores.group).to(value.dtype) @ value).view(*a.shape[:3], -1).transpose(1, 2)
        if index is None and all_changed and view.original.config._attn_implementation == "sdpa":
            return new.to(scores.query.dtype), None
        out, weights = _writable(*stock()) if edited is None else edited
        out[:, picked] = torch.where(changed.transpose(1, 2)[..., None], new.to(out.dtype), out[:, picked])
        if weights is not None and weights.shape[-1] == a.shape[-1]:
            weights[:, :, picked] = torch.where(changed[..., None], a.to(weights.dtype), weights[:, :, picked])
        edited = out, weights
    return stock() if edited is None else edited


def _writable(out: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a kernel gives, to be overwritten: copies where gradients are on, since the kernel keeps its output for
    the way back; else the tensors themselves."""
    if not out.requires_grad:
        return out, weights
    return out.clone(), None if weights is None else weights.clone()


def _edited_weights(edits: list[Placed], sites: dict[int, Site], scores: Scores, picked: Any) -> tuple[Tensor, Tensor]:
    """Attention weights (B, H, R, K) of some rows after all edits, and before them: the same tensor if none was."""
    s, hidden = scores.rows(picked)
    a = plain = softmax(s, scores.extra, picked)
    edited = s
    for i, one in edits:
        if one.acts_at("scores"):
            edited = sites[i].admit(one.scores(edited, sites[i]), edited)
    if edited is not s:
        a = softmax(edited if hidden is None else s.where(hidden, edited), scores.extra, picked)
    for i, one in edits:
        if one.acts_at("weights"):
            a = sites[i].admit(one.weights(a, sites[i]), a)
    return a, plain


class _Seen(Exception):
    """Carries queries, keys and scale out of a layer that need not run on."""


def queries_and_keys(layer: nn.Module, module: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    """Queries (B, H, Q, d), keys (B, Hk, Q, d) and scale that a decoder layer with the attention `module` computes from
    `inputs`: by the layer's own code, norms and rotary embeddings included, and no more of it. No cache is touched."""
    AttentionInterface.register(LOOK, _look)
    config = copy.copy(module.config)
    config.__dict__["_attn_implementation_internal"] = LOOK
    attention, twin = copy.copy(module), copy.copy(layer)  # share all weights
    attention.config = config
    twin.__dict__["_modules"] = {k: attention if v is module else v for k, v in layer._modules.items()}
    for copied in (attention, twin):
        copied.__dict__.pop("forward", None)  # accelerate's is bound to the original
    try:
        twin.forward(**{**inputs, "past_key_values": None, "use_cache": False})
    except _Seen as seen:
        return seen.args
    raise TypeError(f"{type(module).__name__} does not call transformers' attention interface")


def _look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unsupported:
        raise TypeError(f"attention with {', '.join(unsupported)} cannot be ranked by queries and keys alone")
    raise _Seen(query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5)
