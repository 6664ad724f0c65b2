"""PAINT, paying attention to informed tokens: PAI's boost, on two kinds of image tokens only.

Arif et al., "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model", CVPR
2025 workshop, arXiv 2501.12206; official code hasanar1f/PAINT (Apache-2.0; its PAI part MIT). The class token of the
vision tower tells which patches count: in its first layer the local ones, in its last but one the summary tokens,
outliers. In every head, the score of local tokens is raised by `alpha` times its own size, that of summary tokens by
`beta`.

At the paper's setting the method makes captions loop rather than see better. On the 500 captions per setting that the
authors published (LLaVA-1.5-7B), alpha 0.7 and beta 0.4 give CHAIR_S 17.6 at recall 59.8, with 37 % of captions mostly
repeated phrases; near-baseline captions cut to 44 words give 17.4 at 59.7. So the default here is not the paper's: 0.5
is the largest published alpha whose captions do not degrade. `variant="paper"` is the published setting. What the first
version's abstract says of spatial tokens and of single heads is in none of the code, and not here.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.contrast import Contrast
from vlmfix.hooks.parts.tower import class_attention, tower
from vlmfix.method.intervention import LATER, Intervention, ScoreMod, Traits
from vlmfix.method.kinds import Layers, Range
from vlmfix.method.site import Site, Step

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.method.prompt import Prompt
    from vlmfix.model.anatomy import Anatomy


def choose(first: Tensor, late: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Local and summary tokens, (images, N) bool, from the class token's attention (images, N) in two layers: the
    int(N rho) largest of the first without summary tokens, and the upper boxplot outliers of the late one."""
    import torch

    quartiles = torch.quantile(late, late.new_tensor([0.25, 0.75]), dim=-1)[..., None]
    summary = late > quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])
    top = first.topk(int(first.shape[-1] * rho), dim=-1).indices
    local = torch.zeros_like(summary).scatter(-1, top, True)
    return local & ~summary, summary


@dataclass(frozen=True)
class PAINT(Intervention):
    """Paying attention to informed tokens. Acts on attention scores of the last prompt row and of every new token, and,
    with `gamma`, on the logits of every new token. For models whose image tokens are the patches of a tower with a
    class token: LLaVA-1.5."""

    name: ClassVar[str] = "paint"
    summary: ClassVar[str] = "raises scores of image tokens that the vision tower looks at"
    paper: ClassVar[str] = "Arif et al., arXiv 2501.12206"
    cost: ClassVar[str] = (
        "the vision tower once more; attention of one row per token again in float32. With gamma: a second stream "
        "without the image"
    )
    expect: ClassVar[str] = (
        "captions: on the embedded model fewer inventions for more repetition, and shuffled tokens do as well: it is "
        "not the selection. On LLaVA-1.5 nothing at the default, and loops at the paper's setting. Yes/no: nothing"
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "safe": {"alpha": 0.5, "beta": 0.3, "gamma": None},
        "paper": {"alpha": 0.7, "beta": 0.4, "gamma": 1.1},
    }
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"alpha": (0.2, 0.5), "beta": (0.1, 0.3)}

    alpha: Annotated[float, Range(0)] = LATER
    """s += alpha |s| on local tokens. `None`: the variant's, 0.5 (ours: the largest published value whose captions do
    not degrade) or 0.7 (paper)."""
    beta: Annotated[float, Range(0)] = LATER
    """s += beta |s| on summary tokens. `None`: the variant's, 0.3 (code's default) or 0.4 (paper)."""
    rho: Annotated[float, Range(above=0, most=1)] = 0.25
    """Share of the patches that are local, above 0 and up to 1 (paper, code)."""
    layers: Layers | None = None
    """Edited layers, 0-based. `None`: all but the first two (code)."""
    gamma: Annotated[float, Range(above=0)] | None = None
    """Strength of PAI's guidance, out = c + (gamma - 1)(c - u). `None`: the variant's, off (ours) or 1.1 (code; the
    paper does not mention it). 1: none."""
    variant: Literal["safe", "paper"] = "safe"
    """Fills alpha, beta and gamma: ours, or the published setting, which makes captions loop and warns."""
    select: Literal["attention", "random"] = "attention"
    """Tokens by the tower's attention (paper); as a control (ours) as many others, shuffled alike in all pictures."""
    weaken: bool = False
    """As a control (ours): the chosen tokens pushed down instead."""

    @property
    def traits(self) -> Traits:
        """Tokens are chosen over the whole prompt."""
        return Traits(whole_prompt=True, by_plan=True)

    def __post_init__(self) -> None:
        """Warn where captions are known to loop."""
        super().__post_init__()
        if self.alpha > 0.5:
            warnings.warn(
                f"PAINT with alpha={self.alpha}: above 0.5 captions loop. Of the captions that its authors published "
                f"at alpha 0.7, beta 0.4, 37 % are mostly repeated phrases (none at 0.1), and recall is 59.8 instead "
                f"of 77.7 %; cutting captions to 44 words lowers CHAIR as much",
                stacklevel=3,
            )

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[PAINT, dict[str, Any]]:
        """Refuse towers without a class token and pictures cut into tiles."""
        tower(model)
        if getattr(model.config, "image_grid_pinpoints", None):
            raise ValueError(f"PAINT needs one image token per patch; {anatomy.model_type} cuts pictures into tiles")
        return self, {"layers": list(self.at_layers(len(anatomy.layers)))}

    def acts_at(self, stage: str) -> bool:
        """Without guidance there is nothing to do at the logits."""
        return super().acts_at(stage) and (self.gamma is not None or stage != "logits")

    def at_layers(self, n_layers: int) -> Iterable[int]:
        """Edited layers."""
        return range(2, n_layers) if self.layers is None else self.layers

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        """Choose tokens of every picture; prepare the stream without the image."""
        if self.gamma is not None:
            Contrast(gamma=self.gamma).begin(prompt, memo)
        if bool(prompt.geometry.image.any()):
            local, summary = memo["keys"] = self.keys(prompt, memo)
            memo["boost"] = (self.alpha * local + self.beta * summary) * (-1 if self.weaken else 1)  # (B, P)
            memo["shares"] = {}

    def keys(self, prompt: Prompt, memo: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Which keys are local and which are summary tokens, (B, P) bool; their numbers per picture into the memo."""
        import torch

        with torch.no_grad():
            patches = self.patches(prompt.model, prompt.inputs.get("pixel_values"))
        rows: Tensor = prompt.inputs["input_ids" if "input_ids" in prompt.inputs else "inputs_embeds"]
        n_beams = len(prompt.geometry.image) // len(rows)
        image, (n_pictures, n_patches) = prompt.geometry.image[::n_beams], patches[0].shape
        counts: list[int] = image.sum(1).tolist()
        if sum(counts) != n_pictures * n_patches or any(count % n_patches for count in counts):
            raise ValueError(
                f"PAINT needs one image token per patch: {n_pictures} pictures have {n_patches} patches each, and the "
                f"prompts of the batch have {counts} image tokens"
            )
        pictures_of = [count // n_patches for count in counts]  # each sample
        local_sizes, summary_sizes = (kind.sum(1).split(pictures_of) for kind in patches)
        memo["sizes"] = []
        for local, summary in zip(local_sizes, summary_sizes, strict=True):
            memo["sizes"] += [[local.tolist(), summary.tolist()]] * n_beams
        marked = [torch.zeros_like(image).masked_scatter(image, kind.to(image.device)) for kind in patches]
        local_keys, summary_keys = (keys.repeat_interleave(n_beams, dim=0) for keys in marked)
        return local_keys, summary_keys

    def patches(self, model: nn.Module, pixels: Any) -> tuple[Tensor, Tensor]:
        """Local and summary patches of pictures, (images, N) bool."""
        if pixels is None or pixels.dim() != 4:
            got = "none" if pixels is None else f"shape {tuple(pixels.shape)}"
            raise ValueError(f"PAINT chooses tokens by the picture: expected pixel_values (images, 3, h, w), got {got}")
        vision, layers = tower(model)
        x = vision(pixels, output_hidden_states=True).hidden_states  # input of each layer
        late = max(len(layers) - 2, 0)  # 22 of 0..23, the layer whose output LLaVA uses (code)
        local, summary = choose(class_attention(layers[0], x[0]), class_attention(layers[late], x[late]), self.rho)
        if self.select == "random":
            n_patches = local.shape[1]
            order = random.Random(0).sample(range(n_patches), n_patches)
            return local[:, order], summary[:, order]
        return local, summary

    def scores(self, s: Tensor, site: Site) -> Tensor:
        """s_j + c_j |s_j| on visible keys, with c = alpha on local and beta on summary tokens."""
        if "boost" not in site.memo or self.alpha == self.beta == 0:
            return s
        boost = site.kept("boost", s, lambda masks: site.memo["boost"][:, None, None])  # (B, 1, 1, K)
        out = s.addcmul(s.abs(), boost)
        if site.layer not in site.memo["shares"]:  # once, at the prompt
            site.memo["shares"][site.layer] = self._shares(s, out, site)
        return out

    def score_mod(self, s: Tensor, site: Site) -> ScoreMod:
        """The same, entry by entry; shares of attention are not told then."""
        if "boost" not in site.memo:
            return lambda s, b, h, q, k: s
        boost = site.kept("boost", s, lambda masks: site.memo["boost"][:, None, None])
        return lambda s, b, h, q, k: s + boost[b, 0, 0, k] * s.abs()

    @staticmethod
    def _shares(before: Tensor, after: Tensor, site: Site) -> Tensor:
        """(B, 2, 3) shares of attention, before and after, that local, summary and other image tokens have of the rows
        that are edited, mean over heads."""
        import torch

        hidden = before <= torch.finfo(before.dtype).min / 2
        local, summary = site.memo["keys"]
        kinds = site.kept(
            "kinds", before, lambda masks: torch.stack([local, summary, masks.image & ~local & ~summary], dim=1)
        )  # (B, 3, K)
        shares = []
        for scores in (before, before.where(hidden, after)):
            received = (scores.softmax(-1) * site.rows[:, None, :, None]).mean(1).sum(1)  # (B, K)
            shares.append((received[:, None] * kinds).sum(-1))
        return torch.stack(shares, dim=1)

    def logits(self, scores: Tensor, step: Step) -> Tensor:
        """Give c + (gamma - 1)(c - u) on plausible tokens."""
        return Contrast(gamma=self.gamma).logits(scores, step)  # type: ignore[arg-type]

    def controls(self) -> tuple[Intervention, ...]:
        """Random tokens, and the chosen ones pushed down."""
        return *super().controls(), replace(self, weaken=True)

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`; `local` and `summary`, tokens per picture; `attention`, shares of the last prompt row on
        local, summary and other image tokens, before and after, mean over heads and layers."""
        shares = [share.cpu() for share in memo.get("shares", {}).values()]
        mean = sum(shares[1:], shares[0]) / len(shares) if shares else None
        samples = []
        for b, (local, summary) in enumerate(memo.get("sizes", ())):
            acted = bool(local) and self.alpha + self.beta > 0
            sample: dict[str, Any] = {"acted": acted, "local": local, "summary": summary}
            if mean is not None:
                before, after = (dict(zip(("local", "summary", "other"), row, strict=True)) for row in mean[b].tolist())
                sample["attention"] = {"before": before, "after": after}
            samples.append(sample)
        return samples

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
