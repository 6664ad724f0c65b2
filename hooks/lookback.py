"""Lookback, a monitor: how much of the attention of each answer token looks at the image, and how much at text.

Chuang et al., "Lookback Lens: Detecting and Mitigating Contextual Hallucinations in Large Language Models Using Only
Attention Maps", EMNLP 2024, arXiv 2407.07071. Per head, the attention on the keys that are looked up (A) is set
against that on the rest (B): R = A / (A + B), of the row that predicts a token. Words that the model did not look up
are doubtful. The same statistic with other keys is Attention Tracker's (Hung et al., arXiv 2411.00348) and that of
attention to the text written so far (arXiv 2511.11502). It only reads: logits stay bit-identical.

`score` needs no training. A detector, logistic regression on the L*H ratios, is made by `vlmfix calibrate lookback`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isnan
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.parts import ratios
from vlmfix.hooks.parts.detector import Detector
from vlmfix.hooks.parts.listed import listed_heads
from vlmfix.hooks.var import VAR
from vlmfix.method.heads import parse_heads
from vlmfix.method.intervention import LATER, Idle, Intervention, Traits
from vlmfix.method.kinds import Heads, Range
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.asking.batch import Batch
    from vlmfix.model.anatomy import Anatomy
    from vlmfix.model.geometry import Geometry

PRESETS = {
    "lookback": ("mean", 0.0),
    "lookback_text": ("mean", 0.0),
    "tracker": ("sum", 1e-8),
    "focus": ("sum", 1e-8),
    "prelim": ("sum", 0.0),
}
"""Preset -> how weights are put together over a set of keys, and what is added to the denominator."""


@dataclass(frozen=True)
class Lookback(Intervention):
    """Lookback ratios of every generated token. Reads attention weights at its own place among the methods in force:
    put it first to read them before any edit."""

    name: ClassVar[str] = "lookback"
    summary: ClassVar[str] = "monitor: how much each token looks at the image; changes nothing"
    paper: ClassVar[str] = "Chuang et al., EMNLP 2024, arXiv 2407.07071; on images: ours"
    cost: ClassVar[str] = "no extra pass; attention of one row per token again in float32"
    expect: ClassVar[str] = (
        "captions: low scores mark words to doubt, better than a word's position does; a detector adds a little. "
        "Yes/no: untested"
    )

    preset: Literal["lookback", "lookback_text", "tracker", "focus", "prelim"] = "lookback"
    """Keys that are compared. `lookback` (ours), `focus` (ours): image against the prompt after it and the answer so
    far; `lookback_text` (paper): the prompt without its last `E` tokens against these and the answer; `tracker` (Hung
    et al., with the image as data): instruction against image at the first token; `prelim` (arXiv 2511.11502, from its
    abstract): the answer so far against all else, counted as risk, so that scores are 1 - R."""
    agg: Literal["mean", "sum"] = LATER
    """Mean or sum of the weights over a set of keys. `None`: the preset's, mean for `lookback` and `lookback_text`."""
    E: Annotated[int, Range(1)] = 5
    """Last tokens of the prompt that `lookback_text` counts as the rest: as many as a suffix like "ASSISTANT:" has."""
    exclude_sinks: bool = False
    """Take visual sinks (VAR's rule) out of the keys that are looked up (ours)."""
    dims: Annotated[tuple[int, ...], Range(0)] | None = None
    """Sink dimensions; `None`: found as VAR finds them."""
    tau: Annotated[float, Range(above=0)] | None = None
    """Sink threshold; `None`: as VAR."""
    head_list: Heads | None = None
    """Heads whose mean is the plain score: the file of a head list, or heads such as `L3H1/L3H5`. `None`: all."""
    detector: str | None = None
    """File of a detector (`vlmfix calibrate lookback`); `None`: the plain score, mean of R."""

    @property
    def traits(self) -> Traits:
        """Ratios belong to one answer's tokens."""
        return Traits(sequential=True)

    def __post_init__(self) -> None:
        """Fill in the preset's way to put weights together."""
        super().__post_init__()
        if self.agg is None:
            object.__setattr__(self, "agg", PRESETS[self.preset][0])
        if self.detector is not None and self.head_list is not None:
            raise ValueError("a detector weighs all heads; leave out head_list")

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[Intervention, dict[str, Any]]:
        """Find the sinks, and check that heads and detector are this model's."""
        resolved = self
        facts: dict[str, Any] = {}
        if self.head_list is not None:
            names, facts = listed_heads(self.head_list, model, anatomy)
            resolved = replace(self, head_list=names)
        if self.detector is not None:
            detector = Detector.read(self.detector)
            here = {
                "model": getattr(model.config, "_name_or_path", None),
                "layers": len(anatomy.layers),
                "heads": anatomy.n_heads,
                "preset": self.preset,
                "agg": self.agg,
                "exclude_sinks": self.exclude_sinks,
            }
            detector.check(self.detector, here)
            facts["detector"] = {
                "file": self.detector, "w": detector.w, "b": detector.b, "threshold": detector.threshold,
            }  # fmt: skip
        if self.exclude_sinks:
            try:
                var, var_facts = self._var().resolve(model, anatomy, processor)
                resolved, facts = replace(resolved, dims=var.dims, tau=var.tau), {**facts, **var_facts}
            except Idle as idle:
                facts["sinks"] = str(idle)
        return resolved, facts

    def _var(self) -> VAR:
        """VAR, whose rule says what a sink is."""
        return VAR(dims=self.dims, tau=self.tau)  # type: ignore[arg-type]

    def acts_at(self, stage: str) -> bool:
        """Layer inputs are needed to find sinks only."""
        return super().acts_at(stage) and (stage != "layer_input" or (self.exclude_sinks and self.dims is not None))

    def layer_input(self, x: Tensor, site: Site) -> None:
        """Mark sinks, as VAR does."""
        self._var().layer_input(x, site)

    def _keys(self, g: Geometry) -> tuple[Tensor, Tensor]:
        """A and B, bool of shape (B, K)."""
        if self.preset == "lookback_text":
            last = g.prompt & (g.prompt.flip(1).cumsum(1).flip(1) <= self.E)
            return g.prompt & ~last, last | g.generated
        if self.preset == "tracker":
            return g.instruction, g.image
        if self.preset == "prelim":
            return g.generated, g.prompt
        return g.image, g.instruction | g.generated

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """Note R of these rows; NaN where A or B has no keys yet."""
        import torch

        memo, this_pass = site.memo, (site.start, a.shape[-1], a.device)
        if site.n_prompt or memo.get("pass") != this_pass:  # for one new token, the sets are the same in all layers
            place = torch.arange(a.shape[-1], device=a.device) + site.first_key
            sees = place <= site.positions[:, None]  # (R, K)
            memo["pass"], memo["sets"] = this_pass, [keys[:, None] & sees for keys in self._keys(site.geometry)]
        looked, rest = memo["sets"]  # (B, R, K)
        if self.acts_at("layer_input"):
            sink = memo["sinks"][site.layer][:, site.first_key :][:, : a.shape[-1]]
            looked = looked & ~torch.nn.functional.pad(sink, (0, a.shape[-1] - sink.shape[1]))[:, None]
        sets = torch.stack([looked, rest], -1).to(a.dtype)  # (B, R, K, 2)
        n = sets.sum(2)[:, None]  # (B, 1, R, 2)
        mass = torch.einsum("bhrk,brks->bhrs", a, sets)
        mass = mass / n if self.agg == "mean" else mass
        ratio = mass[..., 0] / (mass.sum(-1) + PRESETS[self.preset][1])
        ratio = ratio.nan_to_num(nan=torch.inf).where((n > 0).all(-1), torch.nan)  # inf: the weights were no numbers
        ratios.note(ratio, site, this_pass)
        return a

    def ratios(self, memo: dict[str, Any]) -> Tensor:
        """R (B, T, L, H) of the answers of one generation, on the CPU; NaN where A or B was empty, after the last token
        of answers that were shorter, and for heads that a layer does not have. `ValueError` where attention weights
        were no numbers."""
        return ratios.in_order(memo)

    def score(self, r: Tensor) -> Tensor:
        """Score in 0..1, higher: more likely grounded, of spans of tokens; r (..., T, L, H) gives (...)."""
        import torch

        if self.detector is not None:
            return Detector.read(self.detector).score(r)
        heads, r = parse_heads(str(self.head_list or "")), r.nanmean(-3)  # (..., L, H)
        chosen = r.flatten(-2) if heads is None else torch.stack([r[..., layer, head] for layer, head in heads], -1)
        plain = chosen.nanmean(-1)
        return 1 - plain if self.preset == "prelim" else plain

    def _span(self, r: Tensor) -> Tensor:
        return self.score(r[..., :1, :, :] if self.preset == "tracker" else r)

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`, whether there was something to compare, and `score` of the whole answer."""
        r = self.ratios(memo)
        scores = self._span(r).tolist() if len(r) else []
        return [{"acted": not isnan(score), "score": _number(score)} for score in scores]

    def answered(self, memo: dict[str, Any], row: int, run: Batch, tokens: list[int]) -> dict[str, Any]:
        """`per_token`: the score of each token; `per_word`: of each word, with the `steps` of its tokens; `score`."""
        r = self.ratios(memo)
        if not len(r):
            return {}
        if row >= len(r) or not tokens:
            return {"preset": self.preset, "per_token": [], "per_word": [], "score": None}
        r = r[row, : len(tokens)]
        words = []
        for word, steps in run.written(tokens).words():
            if steps and steps[-1] < len(r):
                words.append({"word": word, "steps": steps, "score": _number(float(self.score(r[steps])))})
        per_token = [_number(x) for x in self.score(r[:, None]).tolist()]
        per_token += [None] * (len(tokens) - len(per_token))
        return {
            "preset": self.preset,
            "per_token": per_token,
            "per_word": words,
            "score": _number(float(self._span(r))),
        }

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens; preset=lookback_text needs none."


def _number(x: float) -> float | None:
    return None if isnan(x) else x
