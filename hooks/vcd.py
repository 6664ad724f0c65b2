"""VCD, visual contrastive decoding: take off the logits what the model says when the image is drowned in noise.

Leng et al., "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding",
CVPR 2024, arXiv 2311.16922; official code DAMO-NLP-SG/VCD. The noise is that of a diffusion process at step `t`, added
to the normalised pixels once per image. The paper samples at temperature 1; most gains on POPE come from a shifted rate
of "yes" and from `beta` making sampling nearly greedy (arXiv 2504.10020), so look at the controls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Range
from vlmfix.method.site import Step

if TYPE_CHECKING:
    from torch import Tensor

    from vlmfix.method.prompt import Prompt

N_STEPS = 1000


def kept(t: int) -> float:
    """alpha-bar_t: the share of the image's energy that is left after diffusion step `t`."""
    product = 1.0
    for i in range(t + 1):
        sigmoid = 1 / (1 + math.exp(6 - 12 * i / (N_STEPS - 1)))
        product *= 1 - (sigmoid * (0.005 - 1e-5) + 1e-5)
    return product


def noise_like(pixels: Tensor, inputs: dict[str, Any], seed: int, frames: int, grid: str = "image_grid_thw") -> Tensor:
    """Standard normal noise for `pixel_values`, the same for every image: an answer does not depend on its batch.

    (N, ..., h, w) has one entry per image; flattened patches (P, C*frames*p*p) come with a `grid` among the inputs, and
    their `frames` copies of a still image get the same noise.
    """
    import torch

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(pixels)

    target = inputs.get("target_sizes")
    if target is not None:  # (1, C, p, patches * p): pictures one after the other
        widths = [int(n) * pixels.shape[2] for n in target.prod(-1)]
        return torch.cat([draw(1, *pixels.shape[1:3], n) for n in widths], dim=-1)
    if pixels.dim() > 2:
        return draw(1, *pixels.shape[1:])
    grids = inputs.get(grid, inputs.get("image_grid_hw"))
    if grids is None:
        raise TypeError(
            f"VCD cannot tell images apart in pixel values of shape {tuple(pixels.shape)} without their grid"
        )
    channels = 3
    side = pixels.shape[1] // (channels * frames)
    pieces = [draw(n, channels, 1, side).expand(-1, -1, frames, -1).flatten(1) for n in grids.prod(-1).tolist()]
    return torch.cat(pieces)


@dataclass(frozen=True)
class VCD(Intervention):
    """Visual contrastive decoding. Acts on the logits of every new token."""

    name: ClassVar[str] = "vcd"
    summary: ClassVar[str] = "takes off the logits what the model says of a noised image"
    paper: ClassVar[str] = "Leng et al., CVPR 2024, arXiv 2311.16922"
    cost: ClassVar[str] = "a second stream with the noised image: the prompt twice, and twice the rows per token"
    expect: ClassVar[str] = (
        "made for yes/no, where most of its published gain is a shifted rate of yes. On the embedded model "
        "captions invent far less, CHAIR_S −46.0 [−53.5, −38.5], and see less, recall −12.5 [−15.2, −9.9]; yes/no "
        "loses a point"
    )
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"alpha": (0.5, 1.0)}

    alpha: Annotated[float, Range(0)] = 1.0
    """Strength: out = (1 + alpha) c - alpha u (scripts; the function's own default is 0.5)."""
    beta: Annotated[float, Range(above=0, most=1)] = 0.1
    """Tokens less likely than `beta` times the likeliest are ruled out, 0 < beta <= 1 (paper; 0.2 in a POPE script)."""
    t: Annotated[int, Range(0, N_STEPS - 1)] = 500
    """Diffusion step of the noise, 0..999 (POPE script; other runs use 999, and it matters)."""
    seed: int = 55
    """Of the noise; independent of the seed of sampling (ours)."""

    @property
    def traits(self) -> Traits:
        """The second stream needs the whole prompt at once; penalties come after the contrast (code)."""
        return Traits(whole_prompt=True, before_penalties=True)

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        """Prepare the second stream; it starts when the first token is chosen."""
        from vlmfix.model.anatomy import PICTURE_ARGUMENTS

        pixels = {}
        for name, value in prompt.inputs.items():
            if name.startswith("pixel_values") and value.is_floating_point():
                pixels[name] = value
        memo["seen"] = prompt.geometry.image.any(1) & bool(pixels)
        for name in PICTURE_ARGUMENTS:
            if name != "pixel_values" and prompt.inputs.get(name) is not None:
                raise TypeError(f"vcd noises pixel_values; the pictures of this model come as {name}")
        if not pixels:
            return
        vision: Any = getattr(prompt.model.config, "vision_config", None)
        frames, share = getattr(vision, "temporal_patch_size", 1), kept(self.t)
        noised = {}
        for name, x in pixels.items():
            grid = "video_grid_thw" if name.endswith("videos") else "image_grid_thw"
            noise = noise_like(x, prompt.inputs, self.seed, frames, grid)
            noised[name] = x * share**0.5 + noise * (1 - share) ** 0.5
        memo["blurred"] = prompt.stream_with(**noised)

    def logits(self, scores: Tensor, step: Step) -> Tensor:
        """Give c + alpha (c - u) on plausible tokens; samples without an image are left alone."""
        from vlmfix.hooks.contrast import contrasted

        if "blurred" not in step.memo:
            return scores
        out = contrasted(scores, step.memo["blurred"].logits, self.alpha, self.beta, step.as_logits)
        return out.where(step.memo["seen"][:, None], scores)

    def controls(self) -> tuple[Intervention, ...]:
        """The plausibility rule alone."""
        return (replace(self, alpha=0.0),)

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`, whether there was an image to noise."""
        return [{"acted": seen} for seen in memo["seen"].tolist()] if "seen" in memo else []

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts came without pixel values."
