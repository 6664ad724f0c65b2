"""Tokens that leave a model halfway: what its later layers get in their place, masks and rotary embeddings cut to fit.

Used by PyramidDrop. The model hands the mask and the rotary embeddings of all tokens to every layer, also to those
after tokens left; here they are cut to the tokens that a layer still has, once per pass and stage. A stage is a run of
layers that hold the same tokens; stage -1 comes before any token left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vlmfix.method.site import Site


class PromptTokens:
    """Which of a prompt's P tokens each stage keeps, in one generation, and tensors cut to fit."""

    def __init__(self, site: Site):
        g = site.geometry
        self.valid, self.last, self.n = g.valid, g.last_prompt, g.n
        begins = g.image.clone()
        begins[:, 1:] &= ~g.image[:, :-1]
        self.images: Tensor = begins.cumsum(1) * g.image
        """(B, P) number of the image of each token: image tokens side by side are one image; 0: no image token."""
        sizes = self.images.new_zeros(len(g.image), int(self.images.max()) + 1)
        self.sizes = sizes.scatter_add(1, self.images, self.images * 0 + 1)
        """(B, images + 1) tokens of each image."""
        self.kept: list[Tensor] = []
        """(B, P) bool, of each stage so far."""
        self.index: list[Tensor | None] = []
        """(B, P') positions of the tokens that each stage holds, in order; `None`: all."""
        self.dropped: list[bool] = []
        """Whether each stage has lost any token."""
        self.columns: dict[int, Tensor] = {}
        self.masks: dict[int, tuple[Any, int, Any]] = {}
        self.rotary: tuple[Tensor, ...] = ()
        """Of all positions so far, for tokens that close up."""

    def columns_of(self, stage: int, n: int) -> Tensor | None:
        """(B, n') which of the first `n` tokens a stage has: those that it kept, and all that came later. `None`:
        all."""
        import torch

        index = self.index[stage] if stage >= 0 else None
        if index is None:
            return None
        columns = self.columns.get(stage)
        if columns is None or int(columns.shape[1]) != index.shape[1] + n - self.n:
            later = torch.arange(self.n, n, device=index.device).expand(len(index), -1)
            columns = self.columns[stage] = torch.cat([index, later], dim=1)
        return columns

    def keep(self, kept: Tensor, leave: bool) -> None:
        """Begin a stage with these tokens, (B, P) bool. With `leave`, the others are gone from later layers, and all
        samples must keep as many."""
        counts = kept.sum(1)
        if leave and bool((counts != counts[0]).any()):
            raise ValueError(
                f"pyramiddrop needs equal numbers of image tokens in all samples of a batch, got "
                f"{self.sizes[:, 1:].sum(1).tolist()}; ask one by one, or use form=mask"
            )
        self.kept.append(kept)
        self.dropped.append(bool((counts < self.n).any()))
        order = None
        if leave and self.dropped[-1]:
            order = kept.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts[0])]
        self.index.append(order)

    def remember_rotary(self, embeddings: tuple[Tensor, ...], start: int) -> None:
        """Keep the rotary embeddings of all positions so far: tokens that close up get lower positions, which are
        among them."""
        import torch

        old = self.rotary or tuple(x[..., :0, :] for x in embeddings)
        joined = []
        for before, new in zip(old, embeddings, strict=True):
            joined.append(torch.cat([before[..., :start, :], new], dim=-2))
        self.rotary = tuple(joined)


def masked(inputs: dict[str, Any], tokens: PromptTokens, stage: int, site: Site) -> dict[str, Any]:
    """Inputs of a layer in which nobody sees the tokens that the stage does not keep."""
    if stage < 0 or not tokens.dropped[stage]:
        return inputs
    mask = inputs.get("attention_mask")

    def hidden() -> Tensor:
        return hide(mask, tokens.kept[stage], site.geometry.n, site.start, inputs["hidden_states"].device)

    return {**inputs, "attention_mask": _once(tokens, stage, mask, site, hidden)}


def without(inputs: dict[str, Any], tokens: PromptTokens, stage: int, site: Site, close_up: bool) -> dict[str, Any]:
    """Inputs of a layer, but for the hidden states, cut to the tokens that the stage holds. They keep their rotary
    positions, or `close_up`."""
    if stage < 0 or not tokens.dropped[stage]:
        return inputs
    mask, n = inputs.get("attention_mask"), site.geometry.n
    columns: Any = tokens.columns_of(stage, n)
    fitted = _once(tokens, stage, mask, site, lambda: cut(mask, columns, n, rows=site.start == 0))
    out = {**inputs, "attention_mask": fitted}
    if getattr(out.get("past_key_values"), "is_compileable", False):
        raise ValueError("pyramiddrop needs a cache that grows; leave out cache_implementation, or use form=mask")
    if not isinstance(out.get("position_embeddings"), tuple):
        raise TypeError("pyramiddrop needs a decoder that hands rotary embeddings to its layers; use form=mask")
    if close_up:
        out["position_embeddings"] = _closed_up(tokens, stage, columns, site)
    elif site.start == 0:
        out["position_embeddings"] = tuple(_picked(x, columns) for x in out["position_embeddings"])
    if out.get("position_ids") is not None:
        out["position_ids"] = None  # kernels take gaps in them for borders of packed sequences
    return out


def hidden_states_of(x: Tensor, tokens: PromptTokens, stage: int, n: int) -> Tensor:
    """From the hidden states (B, Q, D) of the tokens that the stage before held to those of a stage, at the prefill."""
    import torch

    before, now = tokens.columns_of(stage - 1, n), tokens.columns_of(stage, n)
    assert now is not None
    if before is not None:
        now = torch.searchsorted(before, now)
    return x.gather(1, now.to(x.device)[..., None].expand(-1, -1, x.shape[-1]))


def put_back(x: Tensor, columns: Tensor, n: int) -> Tensor:
    """Hidden states (B, n, D) of all tokens again, with 0 for those that left."""
    where = columns.to(x.device)[..., None].expand(-1, -1, x.shape[-1])
    return x.new_zeros(len(x), n, x.shape[-1]).scatter(1, where, x)


def _once(tokens: PromptTokens, stage: int, mask: Any, site: Site, make: Any) -> Any:
    """The mask of a stage, made once for all of its layers. Without a mask there is nothing to tell passes apart by."""
    known = tokens.masks.get(stage)
    if known is None or known[0] is not mask or known[1] != site.geometry.n or mask is None:
        known = tokens.masks[stage] = (mask, site.geometry.n, make())
    return known[2]


def _closed_up(tokens: PromptTokens, stage: int, columns: Tensor, site: Site) -> tuple[Tensor, ...]:
    """Rotary embeddings of the lowest positions, as many as there are tokens."""
    n_lost = tokens.n - tokens.index[stage].shape[1]  # type: ignore[union-attr]
    first = 0 if site.start == 0 else site.start - n_lost
    n_rows = columns.shape[1] if site.start == 0 else site.geometry.n - site.start
    return tuple(x[..., first : first + n_rows, :] for x in tokens.rotary)


def _picked(x: Tensor, columns: Tensor) -> Tensor:
    """Rotary embeddings (..., n, d) at the places of the tokens that are left."""
    batched = x.expand(*x.shape[:-3], len(columns), -1, -1)
    where = columns[..., None].to(x.device).expand(*x.shape[:-3], -1, -1, x.shape[-1])
    return batched.gather(-2, where)


def cut(mask: Any, columns: Tensor, n: int, rows: bool) -> Any:
    """An attention mask (B, H, Q, n) or (B, n) with only these columns (B, n'), and only these rows too where the pass
    holds the whole prompt. `None`, causal, stays `None`."""
    if mask is None:
        return None
    columns = columns.to(mask.device)
    b, m = columns.shape
    if mask.dim() == 2:
        return mask.expand(b, -1).gather(1, columns)
    if mask.shape[-1] != n:
        raise ValueError(f"pyramiddrop: expected an attention mask over {n} keys, got {mask.shape[-1]}; use form=mask")
    mask = mask.expand(b, -1, -1, -1)
    if rows:
        mask = mask.gather(2, columns[:, None, :, None].expand(-1, mask.shape[1], -1, n))
    return mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], m))


def hide(mask: Any, kept: Tensor, n: int, start: int, device: Any) -> Tensor:
    """An attention mask in which nobody sees prompt tokens that are not kept (B, P), but each of these itself: in
    some kernels a row that sees nothing is NaN, and spoils the layers above."""
    import torch

    from vlmfix.model.geometry import fit

    if mask is not None and mask.dim() != 4:
        raise TypeError("pyramiddrop:form=mask needs 4-dimensional masks; load the model with sdpa or eager")
    keys, kept = (n, kept.to(device)) if mask is None else (mask.shape[-1], kept.to(mask.device))
    row = torch.arange(start, n, device=kept.device)[:, None]
    column = torch.arange(keys, device=kept.device)
    open_to = ~fit(~kept, keys)[:, None, None] | (column == row)
    if mask is None:
        return open_to & (column <= row)
    return mask & open_to if mask.dtype == torch.bool else mask.masked_fill(~open_to, torch.finfo(mask.dtype).min)
