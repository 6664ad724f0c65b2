"""ACT, attention calibration: take attention from keys that receive much of it, and give it to all others.

Yu et al., "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
Attention Calibration", ICML 2024, arXiv 2406.15765; official code GATECH-EIC/ACT. A method for language models; its use
on images is ours. A key is a sink of a head if the rows of the prompt give it more than `alpha / n` of their attention
on average; the first token never is. In chosen heads each row keeps a share `beta` of what it gives to sinks; the rest
goes to all other keys in proportion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.parts.listed import heads_by_layer, listed_heads
from vlmfix.hooks.parts.received import Received, random_keys, received
from vlmfix.method.intervention import LATER, Intervention, Traits
from vlmfix.method.kinds import Heads, Layers, Range
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.model.anatomy import Anatomy

LEAST_MASS = 1e-6
"""A row with less than this outside its sinks stays as it is (ours: the official code divides by zero)."""
NEWEST = 8
"""The report counts apart those sinks that fewer rows see: the end of the prompt, where a few rows decide."""


@dataclass(frozen=True)
class ACT(Intervention):
    """Attention calibration. Acts on attention weights, of the prompt's rows and of every new token."""

    name: ClassVar[str] = "act"
    summary: ClassVar[str] = "moves attention from keys that receive much of it to all others"
    paper: ClassVar[str] = "Yu et al., ICML 2024, arXiv 2406.15765"
    cost: ClassVar[str] = (
        "no extra pass; attention of all prompt rows again in float32, twice, in pieces of rows; then one row per token"
    )
    expect: ClassVar[str] = (
        "yes/no with calibrated heads: a little fewer yes, and less than a point of accuracy; captions: nothing. In "
        "all heads: no gain"
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"rule": "alpha"}, "official": {"rule": "abs"}}
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"beta": (0.4, 0.2), "sinks": ("all", "image")}

    alpha: Annotated[float, Range(above=0)] = 5.0
    """A sink receives more than alpha / n of the rows' attention, n tokens in the prompt (paper: 3, 5, 7)."""
    rule: Literal["alpha", "abs"] = LATER
    """`abs`: more than `tau`, whatever n is (code). The two agree at n = 50; with an image, n is ten times that.
    `None`: the variant's, `alpha` (paper) or `abs` (official)."""
    tau: Annotated[float, Range(above=0)] = 0.1
    """Threshold of the rule `abs` (code)."""
    beta: Annotated[float, Range(0, 1)] = 0.4
    """Share of its weight that a sink keeps, 0..1 (code)."""
    layers: Layers | None = None
    """Edited layers, 0-based. `None`: those of the listed heads, without a list 2 .. L-2 (code)."""
    head_list: Heads | None = None
    """Edited heads: the file of a head list (as published: heads whose edit helps on held-out data, `vlmfix calibrate
    act`), or heads such as `L3H1/L3H5` or ((3, 1), (3, 5)). `None`: all (ours)."""
    rows: Literal["all", "after_last_image", "last"] = "all"  # type: ignore[misc]
    """Prompt rows that are edited: `all` (code), `after_last_image` or `last` (ours)."""
    sinks: Literal["all", "image"] = "all"
    """`image`: only image tokens can be sinks (ours)."""
    receivers: Literal["all", "image"] = "all"
    """`image`: what sinks lose goes to image tokens only (ours)."""
    min_rows: Annotated[int, Range(1)] = 1
    """A key that fewer rows of the prompt see cannot be a sink (ours). With 1, as published, the end of a long prompt
    is full of sinks: attention to near tokens exceeds alpha / n easily."""
    answering: Literal["cached", "running"] = "cached"
    """While answering: the sinks of the prompt, or sums that go on, so that new tokens can become sinks (ours)."""
    variant: Literal["paper", "official"] = "paper"
    """`official`: rule `abs`, and the first key that is marked is spared, whatever it is, instead of the first token.
    For the prompt's rows; the released decoding is broken, so new tokens are treated as in the paper."""

    select: Literal["received", "random_tokens", "random_heads"] = "received"
    """As controls (ours): as many random tokens of the prompt in the place of each head's sinks, or as many random
    heads of the model in the place of those listed."""

    @property
    def traits(self) -> Traits:
        """It counts over the whole prompt. Running sums belong to one answer."""
        return Traits(whole_prompt=True, sequential=self.answering == "running")

    def __post_init__(self) -> None:
        """Nothing to edit is a mistake, not a setting."""
        super().__post_init__()
        if self.layers == ():
            raise ValueError("no layers: ACT would do nothing; give some, or None")
        if self.select == "random_heads" and self.head_list is None:
            raise ValueError("select=random_heads needs a head_list to be compared with; without one all are edited")

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[ACT, dict[str, Any]]:
        """Fill in layers and heads for the loaded model."""
        n_layers = len(anatomy.layers)
        if self.head_list is None:
            layers = tuple(range(2, n_layers - 1)) if self.layers is None else self.layers
            if not layers:
                raise ValueError(
                    f"no layers: ACT leaves the first two and the last alone, and this model has {n_layers}"
                )
            return replace(self, layers=layers), {"heads_origin": "all"}
        instead = "random" if self.select == "random_heads" else None
        names, facts = listed_heads(self.head_list, model, anatomy, self.layers, instead)
        resolved = replace(
            self,
            layers=tuple(sorted(heads_by_layer(names))),
            head_list=names,
            select="received" if instead else self.select,
        )
        return resolved, {**facts, "select": self.select}

    def acts_at(self, stage: str) -> bool:
        """A sink that keeps all of its weight is none."""
        return super().acts_at(stage) and self.beta < 1

    def at_layers(self, n_layers: int) -> Sequence[int]:
        """Edited layers."""
        return self.layers or ()

    def survey(self, a: Tensor, site: Site) -> None:
        """Add up what each key receives from the prompt's rows."""
        sums = site.memo.setdefault("received", {})
        more = received(a, site.rows & _prompt_rows(site), site.first_key)
        going_on = int(site.positions[0]) > 0
        sums[site.layer] = sums[site.layer].plus(more) if going_on else more
        site.memo.setdefault("sinks", {}).pop(site.layer, None)

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """A'_k = beta A_k on sinks, (1 + (1 - beta) s/r) A_k on receivers, in chosen heads."""
        import torch

        sink = self._sinks(a, site)  # (B, H, 1 or R, K)
        receiver = ~sink & site.geometry.image[:, None, None] if self.receivers == "image" else ~sink
        s, r = (a * sink).sum(-1), (a * receiver).sum(-1)  # (B, H, R)
        edit = (r >= LEAST_MASS) & (s > 0) & site.rows[:, None]
        moved = torch.where(edit, (1 - self.beta) * s, 0.0)
        keep = torch.where(edit, self.beta, 1.0)[..., None]
        gain = torch.where(edit, 1 + moved / r, 1.0)[..., None]
        counts = site.memo.setdefault("counts", {})
        here = torch.stack([edit.sum((1, 2)), site.rows.sum(1), moved.sum((1, 2))], dim=1)
        counts[site.layer] = counts.get(site.layer, 0) + here
        return a * torch.where(sink, keep, torch.where(receiver, gain, 1.0))

    def _sinks(self, a: Tensor, site: Site) -> Tensor:
        """Which keys are sinks of which head: (B, H, 1, K), or (B, H, R, K) where sums go on from row to row."""
        from torch.nn.functional import pad

        sums, first, end = site.memo["received"][site.layer], site.first_key, site.first_key + a.shape[-1]
        if self.answering == "running":
            sums = sums.plus(received(a, site.rows & ~_prompt_rows(site), first, each=True))
            site.memo["received"][site.layer] = sums.last()
            return self._mark(sums, site)
        by_layer = site.memo["sinks"]
        if site.layer not in by_layer:
            by_layer[site.layer] = pad(self._mark(sums, site), (first, 0))  # by position in the whole
        sink = by_layer[site.layer]
        return pad(sink, (0, max(end - sink.shape[-1], 0)))[..., first:end]

    def _mark(self, sums: Received, site: Site) -> Tensor:
        """Sinks among the keys of a site (B, H, R, K): keys that receive more than alpha / n on average."""
        g, keys = site.geometry, slice(site.first_key, site.first_key + site.geometry.n)
        total, seen, n = sums.total[..., keys], sums.seen[:, None, :, keys], sums.n[:, None, :, None]
        sink = total / seen.clamp(min=1) > (self.alpha / n if self.rule == "alpha" else self.tau)
        sink &= seen >= self.min_rows
        if self.head_list is not None:
            chosen = sink.new_zeros(sink.shape[1])
            chosen[heads_by_layer(self.head_list).get(site.layer, [])] = True
            sink &= chosen[:, None, None]
        first = (g.order == 0)[:, None, None]
        sink &= (sink.cumsum(-1) > 1) if self.variant == "official" else ~first
        image = g.image[:, None, None]
        if self.sinks == "image":
            sink &= image
        if self.select == "random_tokens":
            pool = g.image if self.sinks == "image" else g.prompt & (g.order > 0)
            sink = random_keys(sink, pool[:, None, None], g.order, site.layer)
        site.memo.setdefault("marks", {})[site.layer] = (sink & image, sink & ~image, sink & (seen < NEWEST))
        return sink

    def controls(self) -> tuple[Intervention, ...]:
        """Random tokens in the place of the sinks, and random heads in the place of a list."""
        tokens = replace(self, select="random_tokens")
        return (tokens,) if self.head_list is None else (tokens, replace(self, select="random_heads"))

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`; `rows_edited`, head rows edited per row; `mass_moved`, mean attention mass moved per
        edited head row; `layers`: per layer the same two, and sinks, summed over heads: `visual_sinks`, `text_sinks`,
        and `newest_sinks`, those of either kind that fewer than 8 rows of the prompt see.
        """
        counts = {layer: here.tolist() for layer, here in memo.get("counts", {}).items()}
        sinks = {}  # layer -> three lists of numbers, one for each sample
        for layer, marks in memo.get("marks", {}).items():
            sinks[layer] = [mark[:, :, -1].sum((1, 2)).tolist() for mark in marks]
        samples = []
        for b in range(len(next(iter(counts.values()), ()))):
            layers = {}
            for layer, per_sample in counts.items():
                visual, text, newest = (numbers[b] for numbers in sinks[layer])
                sinks_here = {"visual_sinks": visual, "text_sinks": text, "newest_sinks": newest}
                layers[layer] = {**sinks_here, **_means(*per_sample[b])}
            edited, rows, moved = (sum(per_sample[b][i] for per_sample in counts.values()) for i in range(3))
            samples.append({"acted": edited > 0, **_means(edited, rows, moved), "layers": layers})
        return samples

    def idle_hint(self) -> str:
        """The first suspects are the threshold and, where only image tokens count, the prompt."""
        if "image" in (self.sinks, self.receivers):
            return (
                "no image token was a sink, or none could receive; look at the prompt, then at alpha, tau and min_rows."
            )
        return "no key received enough; look at alpha (rule alpha), tau (rule abs) and min_rows."


def _prompt_rows(site: Site) -> Tensor:
    """(B, R) which rows are prompt."""
    return site.geometry.prompt[:, site.positions - site.first_key]


def _means(edited: float, rows: float, moved: float) -> dict[str, float]:
    return {"rows_edited": edited / rows if rows else 0.0, "mass_moved": moved / edited if edited else 0.0}
