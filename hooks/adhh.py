"""AD-HH, adaptive deactivation of hallucination heads: listed heads that look at text too much lose that part.

Yang et al., "Understanding and Mitigating Hallucination in Large Vision-Language Models via Modular Attribution and
Intervention", ICLR 2025; code TianyunYoung/Hallucination-Attribution. Some heads, found beforehand by switching each
one off, put words into a caption that the image does not show. Whenever the attention of one of them to the
instruction and the answer so far reaches `tau`, it is set to zero, and nothing is put in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.parts.listed import heads_by_layer, listed_heads
from vlmfix.hooks.parts.published import published
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Heads, Range
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class ADHH(Intervention):
    """Adaptive deactivation of hallucination heads. Acts on attention weights of the last prompt row and of every new
    token, in listed heads of samples with an image."""

    name: ClassVar[str] = "adhh"
    summary: ClassVar[str] = "takes text attention away from heads that invent"
    paper: ClassVar[str] = "Yang et al., ICLR 2025, Hallucination-Attribution"
    cost: ClassVar[str] = "no extra pass; attention of one row per token again in float32, in layers with listed heads"
    expect: ClassVar[str] = "captions; worth what its heads are worth; untested here"

    head_list: Heads | None = None
    """The heads: the file of a head list (`vlmfix heads`), or heads such as `L3H1/L3H5`. `None`: those that the authors
    published, 20 of LLaVA-1.5-7B, 35 of LLaVA-1.5-13B, 10 of LLaVA-NeXT-34B; other models are refused."""
    tau: Annotated[float, Range(0)] = 0.4
    """Attention to instruction and answer from which on it is taken away (code; 0.5 for MiniGPT-4)."""
    renorm: bool = False
    """Whether what is left is divided by its sum (ours); the released code does not."""

    select: Literal["listed", "random"] = "listed"
    """Which heads; as a control as many random ones of the model (ours)."""

    @property
    def traits(self) -> Traits:
        """A row is edited by its own weights alone. Decisions are per sample; the release sums over the batch."""
        return Traits(shares_pictures=True, by_plan=True)

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[ADHH, dict[str, Any]]:
        """Read the list, and look whether its heads fit the model."""
        head_list, origin = self.head_list, dict[str, Any]()
        if head_list is None:
            checkpoint, lists = published(self.name, model, anatomy)
            head_list, origin = lists["heads"], {"heads_origin": f"published for {checkpoint}"}
        instead = "random" if self.select == "random" else None
        names, facts = listed_heads(head_list, model, anatomy, instead=instead)
        return replace(self, head_list=names, select="listed"), {**facts, **origin, "select": self.select}

    def at_layers(self, n_layers: int) -> Iterable[int]:
        """Layers with listed heads."""
        return sorted(heads_by_layer(self.head_list))

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """a_k = 0 on instruction and answer, in listed heads whose weights there sum to tau or more."""
        site.memo.setdefault("acted", site.has_image)
        listed = self._listed(a, site)
        # What is kept of the prompt is 0 on all later keys, so it is kept turned round: 1 where nothing is taken away.
        text = 1 - site.kept("rest", a, lambda masks: (~masks.instruction).to(a.dtype)[:, None, None])
        deaf = listed * ((a * text).sum(-1, keepdim=True) >= self.tau)
        out = a * (1 - deaf * text)
        return out / out.sum(-1, keepdim=True).clamp(min=1e-12) if self.renorm else out

    def _listed(self, a: Tensor, site: Site) -> Tensor:
        """(B, H, 1, 1) listed heads; none in a sample without image."""
        kept = site.memo.setdefault("listed", {})
        if site.layer not in kept or site.n_prompt:
            listed = a.new_zeros(a.shape[1])
            listed[heads_by_layer(self.head_list)[site.layer]] = 1
            kept[site.layer] = (site.has_image.to(a.device)[:, None] * listed)[:, :, None, None]
        return kept[site.layer]

    def controls(self) -> tuple[Intervention, ...]:
        """As many random heads."""
        return (replace(self, select="random"),)

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
