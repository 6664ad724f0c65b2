"""AdaIAT: more attention to the answer so far, where and as much as each head gives it to real objects.

"AdaIAT: Adaptively Increasing Attention to Generated Text to Alleviate Hallucinations in LVLM", CVPR 2026, arXiv
2603.04908; official code XianguiKang/AdaIAT. On captions of labelled pictures it is measured how much each head
attends to the tokens generated so far when it names a real object (P) and an invented one (N). While answering, a
layer whose heads attend less than a threshold between both has this attention multiplied, in each head by how much P
exceeds N there. Invented objects come later, where each token has less of it: much of that difference is position
alone, so calibrate with `--match position` too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.parts.attention_to_answer import MADE, Statistics
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Layers, Range
from vlmfix.method.layers import layers_of
from vlmfix.method.site import Rows, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class AdaIAT(Intervention):
    """Adaptively increased attention to generated text. Acts on attention weights of new tokens, so not on an answer of
    one word. Answers of earlier turns count as prompt (ours)."""

    name: ClassVar[str] = "adaiat"
    summary: ClassVar[str] = "raises attention to the answer so far, head by head"
    paper: ClassVar[str] = "AdaIAT, CVPR 2026, arXiv 2603.04908"
    cost: ClassVar[str] = "no extra pass; attention of one row per token again in float32; calibration on captions"
    expect: ClassVar[str] = "long captions only, nothing on yes/no: the best F1 of all released captions; untested here"
    rows: ClassVar[Rows] = "generated"

    statistics: str | None = None
    """The file of `vlmfix calibrate adaiat`, made on this model. To be given, or the two settings below."""
    ratio: Annotated[float, Range(0)] | None = None
    """Instead of a file: one M for all heads (ours)."""
    threshold: Annotated[float, Range(0)] | None = None
    """Instead of a file: one T for all layers (ours)."""
    alpha: Annotated[float, Range(0)] = 6.0
    """Weights on the answer are multiplied by 1 + alpha (M - 1): 6 for LLaVA-1.5-7B, 9 for Qwen2.5-VL-7B (code)."""
    beta: Annotated[float, Range(0, 1)] = 0.5
    """Where the threshold lies between N and P, T = N + beta (P - N): 0.5, for Qwen2.5-VL-7B 0.25 (code)."""
    layers: Layers | None = None
    """Edited layers, 0-based. `None`: 5 to 17 of 32 (code; 5 to 15 of 28 for Qwen2.5-VL-7B), the same depth of other
    models (ours)."""
    variant: Literal["paper", "release"] = "paper"
    """`release`: factors of heads with M < 1 - 1/alpha are negative, as in the released code; else they end at 0."""

    select: Literal["heads", "constant"] = "heads"
    """Each head's own M; as a control (ours) every head of a layer gets their mean."""

    @property
    def traits(self) -> Traits:
        """A row is edited by its own weights alone."""
        return Traits(shares_pictures=True, by_plan=True)

    def __post_init__(self) -> None:
        """A file, or both of its stand-ins."""
        super().__post_init__()
        stands_in = (self.ratio is not None, self.threshold is not None)
        if any(stands_in) and (self.statistics is not None or not all(stands_in)):
            raise ValueError("adaiat: give statistics, or both ratio and threshold")

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[AdaIAT, dict[str, Any]]:
        """Look whether the statistics are this model's."""
        if self.ratio is not None:
            return self, {}
        if self.statistics is None:
            raise ValueError(f"adaiat: expected statistics=FILE, got none; {MADE}")
        found = Statistics.read(self.statistics)
        found.check(self.statistics, model, anatomy, processor)
        data = {name: fact for name, fact in found.data.items() if name != "ids"}
        told = {"n_real": found.n_real, "n_invented": found.n_invented, "match": found.match, "data": data}
        return self, {"statistics": {"file": self.statistics, "model": found.model, **told}}

    def acts_at(self, stage: str) -> bool:
        """Strength 0 changes nothing."""
        return super().acts_at(stage) and self.alpha != 0

    def at_layers(self, n_layers: int) -> range | tuple[int, ...]:
        """Edited layers."""
        return layers_of(5, 17, n_layers) if self.layers is None else self.layers

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """Where r = sum_h mean_k a_hk over generated k is below T: a_hk *= 1 + alpha (M_h - 1), then rows keep their
        sum."""
        site.memo.setdefault("acted", site.has_image)
        threshold, factor = self._of_layer(a, site)
        # What is kept is 0 on generated keys, and 1 on the prompt, padding included.
        generated = 1 - site.kept("prompt", a, lambda masks: (masks.image | True).to(a.dtype)[:, None, None])
        # Keys that a row may not see, such as the room of a static cache, have no weight in any head.
        n = ((a > 0).any(1, keepdim=True) * generated).sum(-1, keepdim=True).clamp(min=1)
        r = ((a * generated).sum(-1, keepdim=True) / n).sum(1, keepdim=True)  # (B, 1, R, 1)
        raised = a * (1 + (factor - 1) * generated)
        raised = raised * (a.sum(-1, keepdim=True) / raised.sum(-1, keepdim=True).clamp(min=1e-12))
        return raised.where(r < threshold, a)

    def _of_layer(self, a: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """(B, 1, 1, 1) T of this layer, -1 in a sample without image, and (B, H, 1, 1) factors."""
        import torch

        layers = site.memo.setdefault("layers", {})
        if site.layer not in layers:
            threshold, m = self._threshold_and_ratios(site.layer, a.shape[1])
            factor = 1 + self.alpha * (torch.tensor(m, device=a.device) - 1)
            factor = factor if self.variant == "release" else factor.clamp(min=0)
            sees = site.has_image.to(a.device)[:, None, None, None]
            layers[site.layer] = (
                torch.where(sees, threshold, -1.0),
                factor[None, :, None, None].expand(len(a), -1, -1, -1),
            )
        return layers[site.layer]

    def _threshold_and_ratios(self, layer: int, n_heads: int) -> tuple[float, list[float]]:
        """T, and M of each head; 1 where nothing is known."""
        if self.ratio is not None:
            return self.threshold or 0.0, [self.ratio] * n_heads
        found = Statistics.read(str(self.statistics))
        real, invented = found.real[layer][:n_heads], found.invented[layer][:n_heads]
        m = [p / n if n else 1.0 for p, n in zip(real, invented, strict=True)]
        if self.select == "constant":
            m = [sum(m) / n_heads] * n_heads
        return sum(invented) + self.beta * (sum(real) - sum(invented)), m

    def controls(self) -> tuple[Intervention, ...]:
        """One M for all heads of a layer, where there are several."""
        return () if self.ratio is not None else (replace(self, select="constant"),)

    def idle_hint(self) -> str:
        """The first suspects."""
        return "the prompts held no image tokens, or the answers had one token only."
