"""PyramidDrop, an accelerator: fewer image tokens in deeper layers.

Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR
2025, arXiv 2410.17247; official code Cooperx521/PyramidDrop (MIT). At a few depths, the image tokens still there are
ranked by the attention that the last token of the prompt pays them, and only the best go on into later layers. Text
tokens stay. The cache of a layer holds the keys of its own tokens.

It is neutral to slightly harmful for what a model says (POPE 85.9 to 84.8 in the paper), and no cure of anything.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.model.anatomy import Anatomy

POSITION_STAGES = ("tokens", "survey", "layer_input", "scores", "weights", "heads", "cache", "mlp")
"""Stages that tell tokens by their place in the prompt."""


def attention_of(query: Tensor, key: Tensor, scale: float, visible: Tensor) -> Tensor:
    """(B, T) attention that one query (B, H, d) pays to keys (B, Hk, T, d), mean over heads, softmax over the visible
    keys (B, T) in float32."""
    s = query.float().unflatten(1, (key.shape[1], -1)) @ key.float().transpose(-1, -2) * scale  # (B, Hk, H / Hk, T)
    return s.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1).flatten(1, 2).mean(1)


def best(score: Tensor, image: Tensor, quota: Tensor) -> Tensor:
    """(B, T) bool: the `quota` (B, R + 1) tokens of each image with the highest score. `image` (B, T) numbers the image
    of each token, 1..R; 0 is for tokens that are not asked for."""
    by_score = score.argsort(dim=1, descending=True, stable=True)
    place = by_score.gather(1, image.gather(1, by_score).argsort(dim=1, stable=True)).argsort(dim=1)  # image by image
    sizes = image.new_zeros(quota.shape).scatter_add(1, image, image.new_ones(image.shape))
    first = sizes.cumsum(1) - sizes
    return (place - first.gather(1, image) < quota.gather(1, image)) & (image > 0)


class _Prompt:
    """What one generation remembers: which of the prompt's P tokens each stage keeps, and tensors cut to fit."""

    def __init__(self, site: Site):
        g = site.geometry
        self.valid, self.last, self.n = g.valid, g.last_prompt, g.n
        begins = g.image.clone()
        begins[:, 1:] &= ~g.image[:, :-1]
        self.images: Tensor = begins.cumsum(1) * g.image
        """(B, P) number of the image of each token: image tokens side by side are one image; 0: no image token."""
        sizes = self.images.new_zeros(len(g.image), int(self.images.max()) + 1)
        self.sizes = sizes.scatter_add(1, self.images, self.images * 0 + 1)
        self.kept: list[Tensor] = []
        """(B, P) bool, of each stage so far."""
        self.index: list[Tensor | None] = []
        """(B, P') positions of the tokens that each stage holds, in order; `None`: all."""
        self.dropped: list[bool] = []
        """Whether each stage has lost any token."""
        self.columns: dict[int, Tensor] = {}
        self.masks: dict[int, tuple[Any, int, Any]] = {}
        self.rotary: tuple[Tensor, ...] = ()

    def columns_of(self, stage: int, n: int) -> Tensor | None:
        """(B, n') which of the first `n` tokens a stage has: those that it kept, and all that came later."""
        import torch

        index = self.index[stage] if stage >= 0 else None
        if index is None:
            return None
        found = self.columns.get(stage)
        if found is None or int(found.shape[1]) != index.shape[1] + n - self.n:
            later = torch.arange(self.n, n, device=index.device).expand(len(index), -1)
            found = self.columns[stage] = torch.cat([index, later], dim=1)
        return found


@dataclass(frozen=True)
class PyramidDrop(Intervention):
    """Fewer image tokens with depth. Acts on the inputs of decoder layers, at the prefill; later tokens find a shorter
    cache there. Hidden states of dropped tokens are 0 in the model's output."""

    name: ClassVar[str] = "pyramiddrop"
    summary: ClassVar[str] = "speed: drops image tokens in deeper layers"
    paper: ClassVar[str] = "Xing et al., CVPR 2025, arXiv 2410.17247"
    cost: ClassVar[str] = (
        "negative: about half of the prefill's work on image tokens; queries and keys of 3 layers twice"
    )
    expect: ClassVar[str] = (
        "an accelerator (--speed pyramiddrop), no cure: yes/no loses a point or two, and captions of the embedded "
        "model, with 64 image tokens, invent more and see less, as with random tokens dropped. For long image blocks"
    )

    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    """Shares of each image's tokens that go on, from each of `layers` on: of all its tokens, not of those before."""
    layers: tuple[int, ...] | None = None
    """First layer of each later stage. `None`: at equal distances; L/4, L/2, 3L/4 of L layers (paper: 8, 16, 24)."""
    positions: Literal["keep", "renumber"] = "keep"
    """Tokens keep their rotary positions (ours), or close up after each drop (code)."""
    form: Literal["drop", "mask"] = "drop"
    """`drop`: tokens leave. `mask` (ours): later layers cannot see them, the same answer without the speed; goes
    together with other methods and with samples that have different numbers of image tokens."""
    select: Literal["attention", "random"] = "attention"
    """Which go on: the best by attention (paper); as a control (ours) as many random ones, the same in all pictures."""

    @property
    def traits(self) -> Traits:
        """Tokens are ranked by the end of the prompt."""
        return Traits(whole_prompt=True, accelerator=True)

    def __post_init__(self) -> None:
        """Check ranges."""
        for key in ("ratios", "layers"):
            if isinstance(getattr(self, key), (int, float)):
                object.__setattr__(self, key, (getattr(self, key),))
        if (
            not self.ratios
            or not all(0 < r <= 1 for r in self.ratios)
            or list(self.ratios) != sorted(self.ratios)[::-1]
        ):
            raise ValueError(f"ratios: expected numbers above 0 and up to 1 that do not rise, got {self.ratios!r}")
        if self.layers is not None and (self.layers[:1] < (1,) or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(f"layers: expected rising numbers from 1 on, got {self.layers!r}")
        if self.layers is not None and len(self.layers) != len(self.ratios):
            raise ValueError(f"expected as many ratios as layers, got {self.ratios!r} and {self.layers!r}")
        for key, known in (
            ("positions", ("keep", "renumber")),
            ("form", ("drop", "mask")),
            ("select", ("attention", "random")),
        ):
            if getattr(self, key) not in known:
                raise ValueError(f"{key}: expected {' or '.join(known)}, got {getattr(self, key)!r}")
        if self.positions == "renumber" and self.form == "mask":
            raise ValueError("positions=renumber needs form=drop: tokens that are only masked keep their places")

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[PyramidDrop, dict[str, Any]]:
        """Fill in the layers, and refuse models whose layers cannot lose tokens."""
        n, config = len(anatomy.layers), model.config
        text: Any = config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        layers = self.layers or tuple((i + 1) * n // (len(self.ratios) + 1) for i in range(len(self.ratios)))
        if not 1 <= layers[0] <= layers[-1] < n or len(set(layers)) < len(layers):
            raise ValueError(f"layers: expected rising numbers in 1..{n - 1} on this model, got {list(layers)}")
        kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
        if kinds or (getattr(text, "layer_types", None) is None and getattr(text, "sliding_window", None)):
            raise ValueError(
                f"pyramiddrop needs layers that see all tokens; {anatomy.text_type} also has "
                f"{', '.join(sorted(kinds)) or 'sliding windows'}"
            )
        if self.positions == "renumber" and "mrope_section" in str(getattr(text, "rope_parameters", None)):
            raise ValueError(f"positions=renumber: {anatomy.text_type} has positions in three dimensions; use keep")
        deep = len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ())
        if self.form == "drop" and layers[0] < deep:
            raise ValueError(f"layers: this model adds image features in layers 0..{deep - 1}; start after them")
        return replace(self, layers=layers), {}

    def at_layers(self, n_layers: int) -> range:
        """All from the first that loses tokens."""
        return range((self.layers or (n_layers,))[0], n_layers)

    def composes(self, others: Sequence[Intervention]) -> None:
        """Refuse methods that tell tokens by their place, unless no token leaves."""
        for one in others:
            if one.acts_at("tokens"):
                raise ValueError(f"{one.name} and {self.name} both drop tokens; use one of them")
            if self.form == "drop" and not one.acts_at("refine") and any(map(one.acts_at, POSITION_STAGES)):
                raise ValueError(
                    f"{one.name} tells tokens by their place in the prompt, and pyramiddrop takes tokens out; with "
                    f"pyramiddrop:form=mask, which is no faster, both go together"
                )

    def tokens(
        self, inputs: dict[str, Any], site: Site, look: Callable[[dict[str, Any]], tuple[Tensor, Tensor, float]]
    ) -> dict[str, Any]:
        """Choose at the first layer of each stage, once; cut what the layer gets to the tokens that it has."""
        layers = self.layers or ()
        stage, starting = bisect_right(layers, site.layer) - 1, site.layer in layers
        if "prompt" not in site.memo:
            site.memo["prompt"] = _Prompt(site)
        prompt: _Prompt = site.memo["prompt"]
        x, n = inputs["hidden_states"], site.geometry.n
        if prompt.sizes.shape[1] == 1:  # no image
            return inputs
        if site.layer == site.n_layers:
            return self._put_back(inputs, prompt, stage, site)
        if self.positions == "renumber" and site.layer == layers[0]:
            self._remember(inputs, prompt, site.start)
        if starting and stage == len(prompt.kept):
            self._choose(prompt, stage, look, self._fitted(inputs, prompt, stage - 1, site))
        out = self._fitted(inputs, prompt, stage, site)
        if self.form == "drop" and starting and site.start == 0 and out is not inputs:
            was, now = prompt.columns_of(stage - 1, n), prompt.columns_of(stage, n)
            assert now is not None
            if was is not None:
                import torch

                now = torch.searchsorted(was, now)
            out["hidden_states"] = x.gather(1, now.to(x.device)[..., None].expand(-1, -1, x.shape[-1]))
        return out

    def _choose(self, prompt: _Prompt, stage: int, look: Callable[..., Any], inputs: dict[str, Any]) -> None:
        """Rank what is there, and note what goes on."""
        device = inputs["hidden_states"].device
        index = prompt.index[-1] if prompt.index else None
        kept = prompt.kept[-1] if prompt.kept else prompt.valid.new_ones(prompt.valid.shape)
        at = lambda x: (x if index is None else x.gather(1, index)).to(device)  # noqa: E731
        images = at(prompt.images * kept)
        if self.select == "random":
            draw = random.Random(0)
            fixed = prompt.sizes.new_tensor([draw.randrange(2**40) for _ in range(prompt.n)])
            score = at(fixed[(prompt.images > 0).cumsum(1) - 1])
        else:
            query, key, scale = look(inputs)
            place = prompt.images.new_tensor(range(prompt.n)).expand_as(prompt.images)
            last = (at(place) == prompt.last[:, None].to(device)).int().argmax(1)
            query = query.gather(2, last[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3]))[:, :, 0]
            visible = at(kept & prompt.valid & (place <= prompt.last[:, None]))
            score = attention_of(query, key[:, :, : images.shape[1]], scale, visible)
        quota = (prompt.sizes.double() * self.ratios[stage]).floor().clamp(min=1).long()
        chosen = (best(score, images, quota.to(device)) | (images == 0)).to(kept.device)
        kept = kept & (chosen if index is None else kept.scatter(1, index, chosen))
        counts = kept.sum(1)
        if self.form == "drop" and bool((counts != counts[0]).any()):
            raise ValueError(
                f"pyramiddrop needs equal numbers of image tokens in all samples of a batch, got "
                f"{prompt.sizes[:, 1:].sum(1).tolist()}; ask one by one, or use form=mask"
            )
        prompt.kept.append(kept)
        prompt.dropped.append(bool((counts < prompt.n).any()))
        order = None
        if self.form == "drop" and prompt.dropped[-1]:
            order = kept.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts[0])]
        prompt.index.append(order)

    def _fitted(self, inputs: dict[str, Any], prompt: _Prompt, stage: int, site: Site) -> dict[str, Any]:
        """All but the hidden states, as the layers of a stage need it."""
        if stage < 0 or not prompt.dropped[stage]:
            return inputs
        mask, device = inputs.get("attention_mask"), inputs["hidden_states"].device
        known = prompt.masks.get(stage)
        if known is None or known[0] is not mask or known[1] != site.geometry.n or mask is None:
            if self.form == "mask":
                fitted = hide(mask, prompt.kept[stage], site.geometry.n, site.start, device)
            else:
                columns = prompt.columns_of(stage, site.geometry.n)
                fitted = cut(mask, columns, site.geometry.n, rows=site.start == 0)  # type: ignore[arg-type]
            known = prompt.masks[stage] = (mask, site.geometry.n, fitted)
        out = {**inputs, "attention_mask": known[2]}
        if self.form == "drop":
            self._fit_rotary(out, prompt, stage, site)
        return out

    def _fit_rotary(self, out: dict[str, Any], prompt: _Prompt, stage: int, site: Site) -> None:
        """Rotary embeddings of the tokens of a stage."""
        if getattr(out.get("past_key_values"), "is_compileable", False):
            raise ValueError("pyramiddrop needs a cache that grows; leave out cache_implementation, or use form=mask")
        if not isinstance(out.get("position_embeddings"), tuple):
            raise TypeError("pyramiddrop needs a decoder that hands rotary embeddings to its layers; use form=mask")
        columns: Any = prompt.columns_of(stage, site.geometry.n)
        if self.positions == "renumber":
            begin = 0 if site.start == 0 else site.start - (prompt.n - prompt.index[stage].shape[1])  # type: ignore
            end = begin + (columns.shape[1] if site.start == 0 else site.geometry.n - site.start)
            out["position_embeddings"] = tuple(x[..., begin:end, :] for x in prompt.rotary)
        elif site.start == 0:
            out["position_embeddings"] = tuple(
                x.expand(*x.shape[:-3], len(columns), -1, -1).gather(
                    -2, columns[..., None].to(x.device).expand(*x.shape[:-3], -1, -1, x.shape[-1])
                )
                for x in out["position_embeddings"]
            )
        if out.get("position_ids") is not None:
            out["position_ids"] = None  # kernels take gaps in them for borders of packed sequences

    @staticmethod
    def _remember(inputs: dict[str, Any], prompt: _Prompt, start: int) -> None:
        """Keep the rotary embeddings of all positions so far: lower positions are among them."""
        import torch

        old = prompt.rotary or tuple(x[..., :0, :] for x in inputs["position_embeddings"])
        pairs = zip(old, inputs["position_embeddings"], strict=True)
        prompt.rotary = tuple(torch.cat([a[..., :start, :], b], dim=-2) for a, b in pairs)

    def _put_back(self, inputs: dict[str, Any], prompt: _Prompt, stage: int, site: Site) -> dict[str, Any]:
        """Hidden states of all tokens again, with 0 for those that left."""
        columns = prompt.columns_of(stage, site.geometry.n) if site.start == 0 else None
        if columns is None:
            return inputs
        x = inputs["hidden_states"]
        where = columns.to(x.device)[..., None].expand(-1, -1, x.shape[-1])
        return {"hidden_states": x.new_zeros(len(x), site.geometry.n, x.shape[-1]).scatter(1, where, x)}

    def controls(self) -> tuple[Intervention, ...]:
        """Random image tokens go on."""
        return (replace(self, select="random"),)

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`; `image_tokens`, at first; `layers`: from which layer on, how many image tokens."""
        if "prompt" not in memo:
            return []
        prompt: _Prompt = memo["prompt"]
        image = prompt.images > 0
        left = [(image & kept).sum(1).tolist() for kept in prompt.kept]
        return [
            {
                "acted": bool(left) and left[-1][b] < n,
                "image_tokens": n,
                "layers": {f: {"image_tokens": m[b]} for f, m in zip(self.layers or (), left, strict=False)},
            }
            for b, n in enumerate(image.sum(1).tolist())
        ]

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens, or all ratios are 1."


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
