"""GIFT, gaze shifts: raise the image tokens at which the model looked up while it read the question.

"Gaze Shift-Guided Cross-Modal Fusion Enhancement", ICML 2026, arXiv 2510.22067; official code amazon-science/GIFT (CC
BY-NC: only its maths is used). In one layer, how much more each word of the question attends to an image token than
the word before it does is a map of what the question is about. The layers after it fuse image and question: there, in
the heads that look at the image most, image tokens gain by that map, and in the heads that look at the question most
the question gains as much, so that the balance of both stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Layers, Range
from vlmfix.method.layers import layers_of
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.model.anatomy import Anatomy

TINY = 1e-12
SIGMAS = 3
"""Beyond so many standard deviations a map is cut off (code)."""


def gaze_map(shifts: Tensor, image: Tensor) -> Tensor:
    """(B, K) map in 0..1 over image keys `image` (B, K), 0 elsewhere. Of shifts (B, H, K), summed over words and 0 but
    on image keys: the mean of the half of the heads with the largest sum, cut off at 3 sigma and stretched."""
    n_heads = shifts.shape[1]
    best = shifts.sum(-1).topk(max(n_heads // 2, 1), dim=1).indices  # (B, H/2)
    m = shifts.gather(1, best[..., None].expand(-1, -1, shifts.shape[-1])).mean(1)
    n = image.sum(1, keepdim=True).clamp(min=1)
    mean = (m * image).sum(1, keepdim=True) / n
    sigma = (((m - mean) * image).square().sum(1, keepdim=True) / n).sqrt()
    m = m.maximum(mean - SIGMAS * sigma).minimum(mean + SIGMAS * sigma)
    least = m.masked_fill(~image, float("inf")).amin(1, keepdim=True)
    most = m.masked_fill(~image, float("-inf")).amax(1, keepdim=True)
    return ((m - least) / (most - least).clamp(min=TINY)).masked_fill(~image, 0)


@dataclass(frozen=True)
class GIFT(Intervention):
    """Gaze shifts. Acts on attention weights of the last prompt row and of every new token; rows keep their sum."""

    name: ClassVar[str] = "gift"
    summary: ClassVar[str] = "raises image tokens at which the question made the model look"
    paper: ClassVar[str] = "GIFT, ICML 2026, arXiv 2510.22067"
    cost: ClassVar[str] = (
        "no extra pass (the release has one); attention of all rows of one layer at the prefill, of one row per token "
        "in a third of the layers again in float32"
    )
    expect: ClassVar[str] = "captions and yes/no, published up to 20.7 % over greedy; untested here"

    alpha: Annotated[float, Range(0)] = 5.0
    """Image tokens are multiplied by exp(alpha m), with a map m in 0..1; 5 for LLaVA-1.5-7B, 4 for
    Qwen2-VL-7B (code)."""
    look: Annotated[int, Range(0)] | None = None
    """The layer in which the question is read, 0-based. `None`: 11 of 32 (code; 14 of 28 for Qwen2-VL-7B), the same
    depth of other models (ours)."""
    layers: Layers | None = None
    """Edited layers, 0-based, all after `look`. `None`: 12 to 22 of 32 (code; 5 to 18 of 28 for Qwen2-VL-7B)."""

    select: Literal["gaze", "mirrored", "uniform"] = "gaze"
    """What the map is: the gaze shifts, or, as controls (ours), these in the reverse order of image tokens, or 1/2 on
    all of them."""

    @property
    def traits(self) -> Traits:
        """The map belongs to the whole question, so prompts that begin alike do not share it."""
        return Traits(whole_prompt=True, by_plan=True)

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[GIFT, dict[str, Any]]:
        """Fill in the layers for the loaded model; in hybrid decoders the nearest one with attention reads."""
        n_layers, attending = len(anatomy.layers), anatomy.attention_layers
        wanted = layers_of(11, 31, n_layers).start if self.look is None else self.look
        if self.look is not None and self.look not in attending:
            raise ValueError(f"look: expected a layer with attention, such as {attending[-1]}, got {self.look}")
        look = min(attending, key=lambda layer: (abs(layer - wanted), layer))
        layers = self.layers
        if layers is None:
            fusing = range(look + 1, max(layers_of(12, 22, n_layers).stop, look + 2))
            # Where no layer with attention follows, the one that is looked at is edited itself.
            layers = tuple(layer for layer in fusing if layer in attending) or (look,)
        if not layers or min(layers) < look:
            raise ValueError(f"layers: expected some from the one that is looked at on, {look}, got {layers}")
        return replace(self, look=look, layers=layers), {}

    def acts_at(self, stage: str) -> bool:
        """Strength 0 changes nothing."""
        return super().acts_at(stage) and self.alpha != 0

    def at_layers(self, n_layers: int) -> list[int]:
        """The layer that is looked at, and the edited ones."""
        return sorted({*(self.layers or ()), *(() if self.look is None else (self.look,))})

    def survey(self, a: Tensor, site: Site) -> None:
        """Add up relu(a_q - a_(q-1)) over the rows q of the question; rows come in pieces. The release keeps words with
        content, by a tagger; here all tokens after the image count (ours)."""
        import torch

        if site.layer != self.look:
            return
        memo, rows = site.memo, site.positions.to(a.device)
        if int(rows[0]) == site.start:  # before the first row of a pass nothing is known
            memo["shifts"], memo["row_before"] = torch.zeros_like(a[:, :, 0]), a[:, :, :1]
        before = torch.cat([memo["row_before"], a[:, :, :-1]], dim=2)
        asked = site.geometry.instruction[:, rows - site.first_key][:, None, :, None]  # (B, 1, R, 1)
        memo["shifts"] = memo["shifts"] + ((a - before).clamp(min=0) * asked).sum(2)
        memo["row_before"] = a[:, :, -1:]

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """Multiply a_I by exp(alpha m) and a_Q by r in the heads that look there most, then restore the row's sum."""
        memo = site.memo
        if site.layer == self.look and site.n_prompt:
            self._lay_map(site)
        if site.layer not in (self.layers or ()):
            return a
        image = site.kept("image", a, lambda g: g.image[:, None, None].to(a.dtype))
        question = site.kept("question", a, lambda g: g.instruction[:, None, None].to(a.dtype))
        rise = site.kept("rise", a, lambda _: memo["gain"][:, None, None] - 1)  # (B, 1, 1, K) exp(alpha m) - 1
        on_image, on_question = (a * image).sum(-1, keepdim=True), (a * question).sum(-1, keepdim=True)
        seeing, asking = half(on_image), half(on_question)  # (B, H, R, 1)
        total = (on_image * seeing).sum(1, keepdim=True)
        r = ((a * rise).sum(-1, keepdim=True) * seeing).sum(1, keepdim=True) / total.clamp(min=TINY)  # less 1
        out = a * (1 + rise * seeing + r * question * asking)
        return out * (a.sum(-1, keepdim=True) / out.sum(-1, keepdim=True))

    def _lay_map(self, site: Site) -> None:
        """Make the map, once the whole question is read."""
        import torch

        memo, image = site.memo, site.geometry.image
        memo["acted"] = image.any(1)
        m = image.float() / 2 if self.select == "uniform" else gaze_map(memo["shifts"] * image[:, None], image)
        if self.select == "mirrored":
            m = mirrored(m, image)
        del memo["shifts"], memo["row_before"]
        memo["gain"] = torch.nn.functional.pad((self.alpha * m).exp(), (site.first_key, 0), value=1.0)

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."


def half(mass: Tensor) -> Tensor:
    """1 for the half of the heads with the most of (B, H, R, 1), 0 for the others. Of heads that are alike to 1/4096
    the first are taken (ours): several may look nowhere else, and rounding would choose."""
    order = (mass * 4096).round().argsort(dim=1, descending=True, stable=True)
    best = order[:, : max(mass.shape[1] // 2, 1)]
    return mass.new_zeros(mass.shape).scatter(1, best, 1.0)


def mirrored(m: Tensor, image: Tensor) -> Tensor:
    """Values (B, K) of image keys in their reverse order."""
    order = image.cumsum(1) * image  # 1, 2, ... on image keys
    last = order.amax(1, keepdim=True)
    place = m.new_zeros(m.shape[0], m.shape[1] + 1).scatter(1, order, m)  # by order; 0 holds nothing of use
    return place.gather(1, (last + 1 - order) * image) * image
