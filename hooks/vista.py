"""VISTA: steer what each layer writes towards what the image changed, and mix in what the layers before the last say.

Li et al., "The Hidden Life of Tokens: Reducing Hallucination of Large Vision-Language Models via Visual Information
Steering", ICML 2025, arXiv 2502.03628; official code LzVv123456/VISTA (MIT). Before the answer begins, the prompt is
read with and without its image; the difference of each layer's output at the last token is a direction. Every MLP
output is turned towards it, at its own length, and further the more it points away. In the second half, tokens are
chosen by a mixture of the last layer's logits with those of the layers before it, where words with meaning peak.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Layers, Range
from vlmfix.method.site import Site, Step

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.method.prompt import Prompt, Readable
    from vlmfix.model.anatomy import Anatomy

TINY = 1e-12
SHORTEST = 1e-3
"""A direction that is shorter, as a share of the layer's output, is none: of a layer that mixes few tokens, rounding
alone would be stretched to full length (ours)."""


def steered(x: Tensor, v: Tensor, lam: float) -> Tensor:
    """|x| unit(x/|x| + lam (1 + max(0, cos(x, -v))) v/|v|), of x (B, Q, D) and directions v (B, 1, D)."""
    length = x.norm(dim=-1, keepdim=True)
    x_unit, v_unit = x / length.clamp(min=TINY), v / v.norm(dim=-1, keepdim=True).clamp(min=TINY)
    against = (-(x_unit * v_unit).sum(-1, keepdim=True)).clamp(min=0)
    turned = x_unit + lam * (1 + against) * v_unit
    return length * turned / turned.norm(dim=-1, keepdim=True).clamp(min=TINY)


@dataclass(frozen=True)
class VISTA(Intervention):
    """Visual information steering, with token-logits augmentation. Acts on MLP outputs in all rows, those of the image
    among them (code), and on the logits of every new token."""

    name: ClassVar[str] = "vista"
    summary: ClassVar[str] = "steers MLP outputs towards what the image changed"
    paper: ClassVar[str] = "Li et al., ICML 2025, arXiv 2502.03628"
    cost: ClassVar[str] = "the prompt twice more, with and without image; the model's head six times more per token"
    expect: ClassVar[str] = (
        "captions, and lam=0.01 for yes/no; lam must be tuned for each model and task, and too much of it repeats. As "
        "published nothing on the embedded model (60 scenes, --method none,vista --limit 60): CHAIR_S −1.7 "
        "[−15.0, +10.0]"
    )

    lam: Annotated[float, Range(0)] = 0.17
    """`lambda`, strength of the steering, 0 or more: 0.17 for CHAIR, 0.01 for POPE (code); an author later advises 0.1
    to 0.15. 0: none."""
    gamma: Annotated[float, Range(0, 1)] = 0.3
    """Share of the inner layers' logits (code). 0: none."""
    layers: Layers | None = None
    """Layers whose MLP outputs are steered, 0-based. `None`: all (code)."""
    window: Layers | None = None
    """Layers whose outputs give the mixture's logits, 0-based. `None`: 25 to 30 of 32 (code), as large a share before
    the last layer of other models (ours)."""
    norm: bool = False
    """Whether these go through the last norm before the head; not in the released code."""
    variant: Literal["paper", "release"] = "paper"
    """`release`: the released code draws the direction through a PCA of one sample, which adds 1 to its first
    coordinate in the first layer, and nothing else."""

    select: Literal["image", "random"] = "image"
    """The direction: what the image changed, or, as a control (ours), a random one."""

    @property
    def traits(self) -> Traits:
        """Reads the outputs of layers, before the answer and, with the model's head, while it is written."""
        captures: tuple[Readable, ...] = ("hidden",) if self.lam > 0 else ()
        return Traits(whole_prompt=self.lam > 0, by_plan=self.gamma == 0, lens=self.gamma > 0, captures=captures)

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[VISTA, dict[str, Any]]:
        """Fill in the layers for the loaded model."""
        n_layers = len(anatomy.layers)
        layers = tuple(range(n_layers)) if self.layers is None else self.layers
        n_inner = max(round(6 * n_layers / 32), 1)
        last = tuple(range(n_layers - 1 - n_inner, n_layers - 1))
        return replace(self, layers=layers, window=last if self.window is None else self.window), {}

    def acts_at(self, stage: str) -> bool:
        """Either half may be off."""
        if stage in ("begin", "mlp"):
            return self.lam > 0
        return stage == "logits" and self.gamma > 0

    def at_layers(self, n_layers: int) -> tuple[int, ...]:
        """Steered layers."""
        return self.layers or ()

    def hidden_layers(self, n_layers: int) -> tuple[int, ...]:
        """Layers whose logits are mixed in."""
        return self.window or ()

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        """Take v_l = h_l with the image - h_l without it, at the last token of the prompt."""
        import torch

        memo["acted"] = has_image = prompt.geometry.image.any(1)
        if not bool(has_image.any()):
            return
        seeing = prompt.capture("hidden", self.layers or ())
        blind = prompt.capture("hidden", self.layers or (), image=False)
        memo["directions"] = {}
        for layer, hidden in seeing.items():
            v = hidden.float() - blind[layer].to(hidden.device).float()
            v = v * (v.norm(dim=-1, keepdim=True) > SHORTEST * hidden.float().norm(dim=-1, keepdim=True))
            if self.variant == "release" and layer == 0:
                v[:, 0] += 1
            if self.select == "random":
                draw = torch.Generator().manual_seed(layer)
                v = torch.randn(v.shape[1:], generator=draw).to(v).expand_as(v)
            memo["directions"][layer] = (v * has_image.to(v.device)[:, None])[:, None]  # (B, 1, D)

    def mlp(self, x: Tensor, site: Site) -> Tensor:
        """Turn x towards v_l; samples without an image have none."""
        if "directions" not in site.memo:
            return x
        v = site.memo["directions"][site.layer]
        sees = (v != 0).any(-1, keepdim=True)
        return steered(x.float(), v, self.lam).to(x.dtype).where(sees, x)

    def logits(self, scores: Tensor, step: Step) -> Tensor:
        """Give (1 - gamma) l + gamma mean_j l_j, of inner layers j."""
        import torch

        step.memo["acted"] = step.has_image
        inner = torch.stack([step.lens(layer, self.norm) for layer in step.states]).mean(0)
        raw = scores.float()
        out = (1 - self.gamma) * raw + self.gamma * inner.to(raw.device)[..., : raw.shape[-1]]
        out = out if step.as_logits else out.log_softmax(-1)
        return out.where(step.has_image[:, None], scores)

    def controls(self) -> tuple[Intervention, ...]:
        """A random direction, and each half without the other."""
        steering = (replace(self, select="random"), replace(self, lam=0.0)) if self.lam else ()
        return (*steering, *((replace(self, gamma=0.0),) if self.gamma and self.lam else ()))

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
