"""ZeroTuning: scale the attention to the first token, and with it, the other way round, that to all others.

Han et al., "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training", ICLR
2026, arXiv 2505.11739; repository FeijiangHan/ZeroTuning. A method for language models; its use on images is ours. In
chosen heads the weight of the first token is multiplied by `gamma` and the row divided by its sum, in every row; that
is the same as `log gamma` on the first token's score. Below 1 the first token gives to all others, above 1 it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.parts.listed import heads_by_layer, listed_heads
from vlmfix.method.heads import head_names
from vlmfix.method.intervention import Intervention, ScoreMod, Traits
from vlmfix.method.kinds import Heads, Layers, Range
from vlmfix.method.site import Rows, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.model.anatomy import Anatomy
    from vlmfix.model.geometry import Geometry


@dataclass(frozen=True)
class ZeroTuning(Intervention):
    """ZeroTuning. Acts on attention scores of one key, in all rows of the prompt and of every new token."""

    name: ClassVar[str] = "zerotuning"
    summary: ClassVar[str] = "scales the attention to the first token"
    paper: ClassVar[str] = "Han et al., ICLR 2026, arXiv 2505.11739"
    cost: ClassVar[str] = (
        "no extra pass; at the prefill attention of all rows again in float32, in pieces of rows; one row per token"
    )
    expect: ClassVar[str] = (
        "made for language models whose first token is a strong sink, as the embedded model's is. There captions do "
        "not gain at the default, and do with span=image,gamma=1.5: CHAIR_S −8.4 [−11.6, −5.4] at no loss of recall"
    )
    rows: ClassVar[Rows] = "all"
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"span": ("image", "first"), "gamma": (1.5, 0.6, 2.5)}

    gamma: Annotated[float, Range(above=0)] = 0.3
    """Factor on the first token's weight, above 0. No value fits all: 0.3 is the authors' for one yes/no task, 1.5 to 4
    theirs for classification; `vlmfix calibrate zerotuning` looks for one."""
    head_list: Annotated[tuple[int, ...], Range(0)] | Heads | None = None
    """Edited heads: numbers of heads in every layer such as 0/5 (authors' notebook), heads such as `L3H1/L3H5` or
    ((3, 1), (3, 5)), or the file of a head list. `None`: all."""
    layers: Layers | None = None
    """Edited layers, 0-based. `None`: all, or those of the heads."""
    span: Literal["first", "image", "system"] | tuple[int, int] = "first"
    """Which keys are scaled: the `first` attended one, all of the `image` or of the `system` text before it, or those
    from a first to before a second number, counted from the first attended one (code for a range)."""

    select: Literal["given", "random"] = "given"
    """Which heads: those listed, or, as a control (ours), as many random ones of the model."""

    @property
    def traits(self) -> Traits:
        """One key is scaled, whatever comes after it."""
        return Traits(shares_pictures=True, by_plan=True)

    def __post_init__(self) -> None:
        """Nothing to edit is a mistake, not a setting."""
        super().__post_init__()
        for key in ("layers", "head_list"):
            if getattr(self, key) == ():
                raise ValueError(f"no {key}: ZeroTuning would do nothing; leave {key} out for all of them")
        if isinstance(self.span, tuple) and not 0 <= self.span[0] < self.span[1]:
            raise ValueError(f"span: expected two rising numbers, got {self.span!r}")
        if self.select == "random" and self.head_list is None:
            raise ValueError("select=random needs a head_list to be compared with; without one all heads are edited")

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[ZeroTuning, dict[str, Any]]:
        """Fill in layers and heads for the loaded model."""
        n_layers = len(anatomy.layers)
        layers = tuple(range(n_layers)) if self.layers is None else self.layers
        if self.head_list is None:
            return replace(self, layers=layers), {"heads_origin": "all"}
        names: Any = self.head_list
        if isinstance(names, tuple):  # numbers of heads, in every layer
            pairs: list[tuple[int, int]] = []
            for layer in layers:
                pairs += [(layer, int(head)) for head in names]
            names = head_names(pairs)
        instead = "random" if self.select == "random" else None
        names, facts = listed_heads(names, model, anatomy, layers, instead)
        resolved = replace(self, layers=tuple(sorted(heads_by_layer(names))), head_list=names, select="given")
        return resolved, {**facts, "select": self.select}

    def acts_at(self, stage: str) -> bool:
        """A factor of 1 changes nothing."""
        return super().acts_at(stage) and self.gamma != 1

    def at_layers(self, n_layers: int) -> Iterable[int]:
        """Edited layers."""
        return self.layers or ()

    def scores(self, s: Tensor, site: Site) -> Tensor:
        """s_k + log gamma for keys k of the span, in chosen heads."""
        return s.addcmul(*self._bias_and_span(s, site))

    def score_mod(self, s: Tensor, site: Site) -> ScoreMod:
        """The same, entry by entry."""
        bias, span = self._bias_and_span(s, site)
        return lambda s, b, h, q, k: s + bias[b, h, 0, 0] * span[b, 0, 0, k]

    def _bias_and_span(self, s: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """(B, H, 1, 1) log gamma in chosen heads, and (B, 1, 1, K) which keys get it."""
        biases = site.memo.setdefault("biases", {})
        if site.layer not in biases or site.n_prompt:
            bias = s.new_zeros(1, s.shape[1], 1, 1)
            bias[:, self._heads_of(site.layer)] = math.log(self.gamma)
            site.memo["acted"] = self._span(site.prompt or site.geometry).any(1)
            biases[site.layer] = bias.expand(len(s), -1, -1, -1)
        span = site.kept("span", s, lambda masks: self._span(masks).to(s.dtype)[:, None, None])
        return biases[site.layer], span

    def _span(self, geometry: Geometry) -> Tensor:
        """(B, K) keys that are scaled."""
        if self.span == "first":
            return geometry.valid & (geometry.order == 0)
        if isinstance(self.span, str):
            return geometry.image if self.span == "image" else geometry.system
        start, end = self.span
        return geometry.prompt & (geometry.order >= start) & (geometry.order < end)

    def _heads_of(self, layer: int) -> Any:
        """Index of the heads edited in a layer."""
        return slice(None) if self.head_list is None else heads_by_layer(self.head_list).get(layer, [])

    def controls(self) -> tuple[Intervention, ...]:
        """The factor turned round, and random heads in the place of a list."""
        turned = replace(self, gamma=1 / self.gamma)
        return (turned,) if self.head_list is None else (turned, replace(self, select="random"))

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`, whether there were keys to scale."""
        return super().effects(memo)

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return f"the prompts held no keys of the span {self.span}."
