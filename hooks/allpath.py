"""AllPath, intervene all paths: switch off heads on bad paths from text to text, double those on good paths.

"Intervene-All-Paths: Unified Mitigation of LVLM Hallucinations across Alignment Formats", NeurIPS 2025, arXiv
2511.17254; official code SooLab/AllPath (MIT). Two scores say of every head, on labelled pictures, what it does on the
path from the text so far to the next word, and on the path from image to text. The worst text heads count 0, the best
text and image heads count double, in every row. The lists hold for one model and one kind of task.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.parts.listed import heads_by_layer, listed_heads
from vlmfix.hooks.parts.published import published
from vlmfix.method.heads import head_names, parse_heads, random_heads
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Heads, Range
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class AllPath(Intervention):
    """Gains of 0 and 2 on two lists of heads. Acts on head outputs in all rows of samples with an image."""

    name: ClassVar[str] = "allpath"
    summary: ClassVar[str] = "switches bad heads off and doubles good ones"
    paper: ClassVar[str] = "Intervene-All-Paths, NeurIPS 2025, arXiv 2511.17254"
    cost: ClassVar[str] = "nothing"
    expect: ClassVar[str] = (
        "captions and yes/no, by lists of its own for each; worth what the lists are worth; untested here"
    )

    bad: Heads | None = None
    """Heads that are switched off: the file of a head list (`vlmfix heads`), or heads such as `L3H1/L3H5`. `None` for
    both lists: those that the authors published for LLaVA-1.5-7B; other models are refused."""
    good: Heads | None = None
    """Heads that are strengthened. A head in both lists is left alone (code)."""
    task: Literal["chair", "pope", "mcq"] = "chair"
    """For which task the published lists are: captions, yes/no, or multiple choice (code)."""
    gain: Annotated[float, Range(0)] = 2.0
    """Factor on good heads (code)."""
    bad_gain: Annotated[float, Range(0)] = 0.0
    """Factor on bad heads (code)."""
    norm: bool = False
    """Whether a layer's factors are divided by their mean; a switch of the release that no run sets (code)."""

    select: Literal["listed", "random"] = "listed"
    """Which heads; as a control as many random ones of the model for each list (ours)."""

    @property
    def traits(self) -> Traits:
        """The heads are the same for every question."""
        return Traits(shares_pictures=True, by_plan=True)

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[AllPath, dict[str, Any]]:
        """Read the lists, take out what is in both, and look whether their heads fit the model."""
        bad: Any = self.bad
        good: Any = self.good
        origin: dict[str, Any] = {}
        if bad is None and good is None:
            checkpoint, lists = published(self.name, model, anatomy)
            own = lists[self.task]
            twice = parse_heads(f"{own['t2t_best']}/{own['i2t_best']}") or ()
            bad, good = own["t2t_worst"], head_names(dict.fromkeys(twice))
            origin = {"heads_origin": f"published for {checkpoint}, {self.task}"}
        facts: dict[str, Any] = {}
        names: list[str] = []
        for given in (bad, good):
            heads, own_facts = listed_heads(given, model, anatomy) if given else ("", {})
            names.append(heads)
            facts.update(own_facts)
        first, second = (set(parse_heads(each) or ()) for each in names)
        kept = [head_names(head for head in parse_heads(each) or () if head not in first & second) for each in names]
        if not any(kept):
            raise ValueError("allpath: every head is in both lists, so none is left to scale")
        if self.select == "random":
            counts, shape = [len(parse_heads(each) or ()) for each in kept], (len(anatomy.layers), anatomy.n_heads)
            kept = [head_names(random_heads(n, *shape, seed)) for seed, n in enumerate(counts)]
        resolved = replace(self, bad=kept[0] or None, good=kept[1] or None, select="listed")
        return resolved, {**facts, **origin, "select": self.select}

    def at_layers(self, n_layers: int) -> Iterable[int]:
        """Layers with listed heads."""
        return sorted({*heads_by_layer(self.bad), *heads_by_layer(self.good)})

    def heads(self, o: Tensor, site: Site) -> Tensor:
        """o_h *= g_h."""
        gains = site.memo.setdefault("gains", {})
        if site.layer not in gains or site.n_prompt:  # at the prefill, in each of its pieces
            has_image = site.memo["acted"] = site.has_image.to(o.device)
            g = o.new_ones(o.shape[2])
            g[heads_by_layer(self.bad).get(site.layer, [])] = self.bad_gain
            g[heads_by_layer(self.good).get(site.layer, [])] = self.gain
            if self.norm:
                g = g / g.mean().clamp(min=1e-6)
            gains[site.layer] = (1 + has_image[:, None] * (g - 1))[:, None, :, None]  # (B, 1, H, 1)
        return o * gains[site.layer]

    def controls(self) -> tuple[Intervention, ...]:
        """Random heads, and the two lists exchanged."""
        exchanged = replace(self, bad=self.good, good=self.bad)
        return (replace(self, select="random"), *([exchanged] if self.bad and self.good else []))

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
