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
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.parts import leaving
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Range
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
        "an accelerator (--speed pyramiddrop), no cure: for long image blocks. Where a picture has few tokens, yes/no "
        "loses a point or two, and captions invent more and see less, as with random tokens dropped"
    )

    ratios: Annotated[tuple[float, ...], Range(above=0, most=1)] = (0.5, 0.25, 0.125)
    """Shares of each image's tokens that go on, from each of `layers` on: of all its tokens, not of those before."""
    layers: Annotated[tuple[int, ...], Range(1)] | None = None
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
        """Shares must not rise, nor layers fall."""
        super().__post_init__()
        if not self.ratios or list(self.ratios) != sorted(self.ratios, reverse=True):
            raise ValueError(f"ratios: expected numbers above 0 and up to 1 that do not rise, got {self.ratios!r}")
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers: expected rising numbers from 1 on, got {self.layers!r}")
        if self.layers is not None and len(self.layers) != len(self.ratios):
            raise ValueError(f"expected as many ratios as layers, got {self.ratios!r} and {self.layers!r}")
        if self.positions == "renumber" and self.form == "mask":
            raise ValueError("positions=renumber needs form=drop: tokens that are only masked keep their places")

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[PyramidDrop, dict[str, Any]]:
        """Fill in the layers, and refuse models whose layers cannot lose tokens."""
        n, config = len(anatomy.layers), model.config
        n_stages = len(self.ratios)
        layers = self.layers or tuple((i + 1) * n // (n_stages + 1) for i in range(n_stages))
        if not 1 <= layers[0] <= layers[-1] < n or len(set(layers)) < len(layers):
            raise ValueError(f"layers: expected rising numbers in 1..{n - 1} on this model, got {list(layers)}")
        text: Any = config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        layer_types = getattr(text, "layer_types", None)
        limited = set(layer_types or ()) - {"full_attention"}
        if limited or (layer_types is None and getattr(text, "sliding_window", None)):
            raise ValueError(
                f"pyramiddrop needs layers that see all tokens; {anatomy.text_type} also has "
                f"{', '.join(sorted(limited)) or 'sliding windows'}"
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
            site.memo["prompt"] = leaving.PromptTokens(site)
        prompt: leaving.PromptTokens = site.memo["prompt"]
        n = site.geometry.n
        if prompt.sizes.shape[1] == 1:  # no image
            return inputs
        if site.layer == site.n_layers:
            columns = prompt.columns_of(stage, n) if site.start == 0 else None
            return (
                inputs if columns is None else {"hidden_states": leaving.put_back(inputs["hidden_states"], columns, n)}
            )
        if self.positions == "renumber" and site.layer == layers[0]:
            prompt.remember_rotary(inputs["position_embeddings"], site.start)
        if starting and stage == len(prompt.kept):
            before = self._fitted(inputs, prompt, stage - 1, site)
            prompt.keep(self._choose(prompt, stage, look, before), leave=self.form == "drop")
        fitted = self._fitted(inputs, prompt, stage, site)
        if self.form == "drop" and starting and site.start == 0 and fitted is not inputs:
            fitted["hidden_states"] = leaving.hidden_states_of(inputs["hidden_states"], prompt, stage, n)
        return fitted

    def _fitted(self, inputs: dict[str, Any], prompt: leaving.PromptTokens, stage: int, site: Site) -> dict[str, Any]:
        """All but the hidden states, as the layers of a stage need it."""
        if self.form == "mask":
            return leaving.masked(inputs, prompt, stage, site)
        return leaving.without(inputs, prompt, stage, site, close_up=self.positions == "renumber")

    def _choose(
        self, prompt: leaving.PromptTokens, stage: int, look: Callable[..., Any], inputs: dict[str, Any]
    ) -> Tensor:
        """(B, P) bool: the tokens that go on, all text and the best of each image."""
        device = inputs["hidden_states"].device
        index = prompt.index[-1] if prompt.index else None
        kept = prompt.kept[-1] if prompt.kept else prompt.valid.new_ones(prompt.valid.shape)

        def there(x: Tensor) -> Tensor:
            """Of (B, P), what belongs to the tokens that are still there."""
            return (x if index is None else x.gather(1, index)).to(device)

        images = there(prompt.images * kept)
        if self.select == "random":
            draw = random.Random(0)
            fixed = prompt.sizes.new_tensor([draw.randrange(2**40) for _ in range(prompt.n)])
            score = there(fixed[(prompt.images > 0).cumsum(1) - 1])
        else:
            query, key, scale = look(inputs)
            place = prompt.images.new_tensor(range(prompt.n)).expand_as(prompt.images)
            last = (there(place) == prompt.last[:, None].to(device)).int().argmax(1)
            query = query.gather(2, last[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3]))[:, :, 0]
            visible = there(kept & prompt.valid & (place <= prompt.last[:, None]))
            score = attention_of(query, key[:, :, : images.shape[1]], scale, visible)
        quota = (prompt.sizes.double() * self.ratios[stage]).floor().clamp(min=1).long()
        chosen = (best(score, images, quota.to(device)) | (images == 0)).to(kept.device)
        return kept & (chosen if index is None else kept.scatter(1, index, chosen))

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`; `image_tokens`, at first; `layers`: from which layer on, how many image tokens."""
        if "prompt" not in memo:
            return []
        prompt: leaving.PromptTokens = memo["prompt"]
        image = prompt.images > 0
        counts_by_stage = [(image & kept).sum(1).tolist() for kept in prompt.kept]
        samples = []
        for b, n_image in enumerate(image.sum(1).tolist()):
            layers = {}
            for first_layer, counts in zip(self.layers or (), counts_by_stage, strict=False):
                layers[first_layer] = {"image_tokens": counts[b]}
            acted = bool(counts_by_stage) and counts_by_stage[-1][b] < n_image
            samples.append({"acted": acted, "image_tokens": n_image, "layers": layers})
        return samples

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens, or all ratios are 1."
