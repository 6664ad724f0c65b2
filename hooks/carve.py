"""CARVE: look twice, mask, crop, answer again. And ViCrop, the crop without a mask that it builds on.

Ge et al., "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning", arXiv 2509.06461; official code
YuyaoGe/CARVE. The model is asked the question, then a general instruction. Where its attention A^Q on the image is
large for what it is with the general instruction, A^G, there is what the question is about: C = A^Q / (A^G + lam). That
part is cut out, the rest blackened, and the question asked again. ViCrop (Zhang et al., "MLLMs Know Where to Look",
ICLR 2025, arXiv 2502.17422) is `variant="vicrop"`: one layer, the first step, a square crop.

Paper and code differ; `variant="official"` computes what the code computes, but for three things: the grid of Qwen
models comes from the inputs, not from the picture's size, where the code is off for many sizes and then does nothing;
where the mask takes in everything, the picture is not shown twice; captioning prompts are refused.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.parts.captioning import asks_for_a_caption
from vlmfix.hooks.parts.refined import pack, redraw
from vlmfix.method.intervention import LATER, Idle, Intervention, Traits
from vlmfix.method.kinds import Layers, Range
from vlmfix.method.layers import layers_of
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor, nn

    from vlmfix.asking.look import Look, Looked
    from vlmfix.model.anatomy import Anatomy

PAPER: dict[str, Any] = {
    "p": 0.4,
    "K": 2,
    "lam": 1e-8,
    "steps": "full",
    "regions": "max",
    "geometry": "exact",
    "region": "mask",
    "suffix": "",
}
ONE_WORD = "Answer the question using a single word or phrase."
OFFICIAL_LAYERS = range(20, 26)
KEPT = 64
"""Pictures whose general instruction is remembered."""


@dataclass(frozen=True)
class CARVE(Intervention):
    """Contrastive attention refinement. Reads attention in two looks, changes the picture, and edits nothing."""

    name: ClassVar[str] = "carve"
    summary: ClassVar[str] = "asks again with what the question is about cut out of the picture"
    paper: ClassVar[str] = "Ge et al., arXiv 2509.06461; variant vicrop: Zhang et al., ICLR 2025, arXiv 2502.17422"
    cost: ClassVar[str] = "two short generations before the answer, which sees two pictures"
    expect: ClassVar[str] = (
        "questions about a part of the picture; refuses captioning prompts. Small models lose accuracy on POPE, and as "
        "much with masks at random places"
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": PAPER,
        "official": PAPER | {"p": 0.2, "K": 3, "regions": "official", "geometry": "official", "suffix": ONE_WORD},
        "vicrop": PAPER | {"lam": 0.0, "steps": "start", "geometry": "official", "region": "box"},
    }

    layers: Layers | None = None
    """Layers whose contrast is summed. `None`: 20-25 of 26 or more (paper), else the same part of the depth (ours). For
    `vicrop` one layer: 14 of LLaVA-1.5's 32 (code), 22 of Qwen2.5-VL (code), else the same part of the depth as 14."""
    steps: Literal["full", "start", "end", "uniform"] = LATER
    """Tokens that are looked at: `full`, those that both looks have, step t with weight t + 1 (paper, code); `start`,
    the first; `end`, each look's last before its end token; `uniform`, as `full` with weight 1."""
    lam: Annotated[float, Range(0)] = LATER
    """Added to A^G, 0 or more. `None`: 1e-8 (code), 0 for `vicrop`."""
    p: Annotated[float, Range(above=0, most=1)] = LATER
    """Share of the pixels that pass the threshold, 0 < p <= 1. `None`: 0.4 (the paper's best), 0.2 (code)."""
    K: Annotated[int, Range(1)] = LATER
    """Connected regions that are kept. `None`: 2 (paper), 3 (code)."""
    regions: Literal["max", "official"] = LATER
    """`max`: at most K (paper); `official`: max(K, int(n p)) of n (code)."""
    score: Literal["sum", "size", "small"] = "sum"
    """How regions are ranked: by their sum of S (paper), by size, or `small`, all but specks (earlier versions of the
    code)."""
    final: Literal["both", "refined"] = "both"
    """What the answer sees: the picture and the refined one (code), or the refined one alone (paper). With `refined`, a
    thing that is not there was asked for in a picture of which something always is left."""
    geometry: Literal["exact", "official"] = LATER
    """Pixels that the grid of tokens covers: what the processor showed the model (ours), or the whole picture, also
    where the processor cut out its centre (code). Such a processor cuts the ends off a refined picture that is not
    square as well, here as in the code."""
    region: Literal["mask", "box"] = LATER
    """`mask`: CARVE's masked regions; `box`: ViCrop's square window, not masked and not enlarged."""
    side: Annotated[int, Range(1)] | None = None
    """Least side of ViCrop's window, in pixels. `None`: the side of the model's input, 336 for LLaVA-1.5 (code); 224
    where the model has no fixed one, as Qwen2.5-VL (code)."""
    general: str = "Write a general description of the image."
    """The general instruction (code; best of five in the paper)."""
    suffix: str = LATER
    """Put after the question and the general instruction. `None`: nothing, or, for `official`, to answer in one word
    (code). A question that ends with it already is left as it is."""
    look_tokens: Annotated[int, Range(1)] = 32
    """Tokens that a look may take (code); 1 where `steps` is `start`."""
    captions: bool = False
    """Answer captioning prompts as well (ours). They ask what the general instruction asks: the contrast is noise."""
    select: Literal["contrast", "random"] = "contrast"
    """Where the mask or box lies: by contrast (paper), or, as a control (ours), the same one at a random place."""
    variant: Literal["paper", "official", "vicrop"] = "paper"
    """`paper`; `official`: what the released code computes; `vicrop`: the crop of ViCrop's relative attention."""

    @property
    def traits(self) -> Traits:
        """Its looks are over the whole prompt, for one answer at a time."""
        return Traits(whole_prompt=True, sequential=True)

    def __post_init__(self) -> None:
        """Refuse an empty instruction and no layers at all."""
        super().__post_init__()
        if not self.general.strip():
            raise ValueError("general: expected an instruction such as 'Write a general description of the image.'")
        if self.layers == ():
            raise ValueError("layers: expected numbers from 0 up, got none")

    def check_layers(self, n_layers: int) -> None:
        """The released code passes over layers that a model does not have."""
        if self.variant != "official":
            super().check_layers(n_layers)

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[CARVE, dict[str, Any]]:
        """Choose the layers for the model's depth. `TypeError` for models whose image tokens lie on no grid."""
        from vlmfix.hooks.parts import views

        config: Any = model.config
        views.check_grid(config)
        n = len(anatomy.layers)
        layers = self._default_layers(n, config.model_type) if self.layers is None else self.layers
        own_layers = tuple(layer for layer in layers if layer < n)
        if not own_layers:
            beyond = list(layers)
            raise Idle(f"the released code reads layers {beyond}, and this model has {n}; give layers that it has")
        side = self.side
        if side is None and self.region == "box":
            input_size = getattr(getattr(config, "vision_config", None), "image_size", None) or 224
            side = input_size if isinstance(input_size, int) else input_size[0]
        return replace(self, layers=own_layers, side=side), {}

    def _default_layers(self, n: int, kind: str) -> tuple[int, ...]:
        if self.variant == "vicrop":
            return (22,) if kind == "qwen2_5_vl" and n > 22 else tuple(layers_of(14, 14, n))
        if self.variant == "official" or n > OFFICIAL_LAYERS[-1]:
            return tuple(OFFICIAL_LAYERS)
        return tuple(layers_of(62, 78, n, of=100))

    def at_layers(self, n_layers: int) -> tuple[int, ...]:
        """Layers that are read."""
        return self.layers or ()

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """Keep the mean over heads of the row that predicts the next token; nothing is edited."""
        rows = site.memo.setdefault("rows", {}).setdefault(site.layer, [])
        rows.append((site.first_key, a[0, :, -1].mean(0)))
        return a

    def refine(self, look: Look, images: list[Image], prompt: str) -> tuple[list[Image], str, dict[str, Any]]:
        """Look twice and cut out what the question is about.

        For the record: `acted`; `question`, where the suffix was added to it; `first`, what the first look said; `T_Q`,
        `T_G`, tokens of the looks; `heat`, the contrast on the grid, and `covers`, the pixels under it; `box`, `size`,
        `mask` of the refined picture (see `redraw`); `n_regions`; `area` and `share`: what the mask holds of the
        visible pixels and of S.
        """
        if not images:
            return images, prompt, {"acted": False}
        if len(images) > 1:
            raise ValueError(f"CARVE refines one image per question; got {len(images)}")
        if not self.captions and (asks_for_a_caption(prompt) or prompt.strip() == self.general.strip()):
            raise ValueError(
                f"CARVE cuts out what a question is about, and {prompt!r} asks about all of the picture: question and "
                f"general instruction would be the same, and only noise decide. Leave carve out for captions, or set "
                f"captions=true to do it all the same"
            )
        (picture,) = images
        question, digest = self._suffixed(prompt), hashlib.sha256(picture.tobytes()).hexdigest()
        asked = look(images, question, self._look_length)
        q = self._maps(asked)
        g, general_ended = self._general_look(look, picture, (digest, picture.size, q.shape[-1]))
        heat, covers = self._heat(look, asked, picture, q, g, (asked.ended, general_ended))
        cut = self._cut(picture, heat, covers, random.Random(digest + prompt))
        facts: dict[str, Any] = {
            "acted": cut is not None,
            **({} if question == prompt else {"question": question}),
            "first": asked.text,
            "T_Q": len(q),
            "T_G": len(g),
            "covers": list(covers),
            "heat": [[float(f"{value:.4g}") for value in row] for row in heat.tolist()],
            **(cut or {}),
        }
        if cut is None:
            return images, question, facts
        refined = redraw(facts, picture)
        return ([picture, refined] if self.final == "both" else [refined]), question, facts

    def idle_hint(self) -> str:
        """The first suspect is the size of the picture."""
        if self.region == "box":
            return (
                f"no part of the pictures was cut out: the window is never smaller than side={self.side} pixels, and "
                f"there is none where the looks do not differ."
            )
        return "the mask took in all that the model saw, or there was no picture."

    @property
    def _look_length(self) -> int:
        """Tokens that a look may take."""
        return 1 if self.steps == "start" else self.look_tokens

    def _general_look(self, look: Look, picture: Image, key: Any) -> tuple[NDArray[Any], bool]:
        """Attention with the general instruction, and whether the look came to an end. It is the same for every
        question about a picture, and kept for the latest pictures."""
        known = look.kept.pop(key, None)
        if known is None:
            general = look([picture], self._suffixed(self.general), self._look_length)
            known = self._maps(general), general.ended
        look.kept[key] = known  # as the newest
        for oldest in list(look.kept)[:-KEPT]:
            look.kept.pop(oldest, None)
        return known

    def _suffixed(self, text: str) -> str:
        return text if text.rstrip().endswith(self.suffix) else f"{text} {self.suffix}"

    def _maps(self, looked: Looked) -> NDArray[Any]:
        """(T, L, N): attention of each token's row to the image tokens, per layer."""
        import torch
        from torch.nn.functional import pad

        n, maps = looked.geometry.n, []
        for layer in self.layers or ():
            rows = torch.stack([pad(row, (first, 0))[:n] for first, row in looked.memo["rows"][layer]])
            maps.append(rows[:, looked.geometry.image[0].to(rows.device)].cpu())
        return torch.stack(maps, dim=1)[: len(looked.token_ids)].numpy()

    def _heat(
        self, look: Look, asked: Looked, picture: Image, q: Any, g: Any, ended: tuple[bool, bool]
    ) -> tuple[NDArray[Any], tuple[int, int, int, int]]:
        """The fused contrast on the grid, and the pixels that the grid covers."""
        import numpy as np

        from vlmfix.hooks.parts import regions, views

        seen = views.view(look.model.config, look.processor, asked.inputs, picture.size, q.shape[-1])
        heat = regions.fuse(q, g, self.lam, self.steps, ended, self.layers)
        first, grid = seen.first, (seen.rows, seen.columns)
        if self.variant == "official":
            guess = regions.official_grid(len(heat), *grid)
            if guess is None:
                return np.zeros((1, 1)), (0, 0, *picture.size)
            first, grid = 0, guess
        heat = heat[first:][: grid[0] * grid[1]].reshape(grid)
        return heat, seen.box if self.geometry == "exact" else (0, 0, *picture.size)

    def _cut(self, picture: Image, heat: Any, covers: tuple[int, int, int, int], draw: random.Random) -> Any:
        """What `redraw` needs; `None` where the mask or box takes in all that the model saw."""
        from vlmfix.hooks.parts import regions

        exact, mask, within, facts = self.geometry == "exact", None, (0, 0, *picture.size), {}
        if self.region == "box":
            box = regions.sharpest_box(heat, covers, picture.size, self.side or 0)
            if box is None or box == within:
                return None
        else:
            S, visible = regions.spread(heat, covers, picture.size)
            mask, _, n = regions.select(S, visible, self.p, self.K, self.regions, self.score)
            if (mask == visible).all():
                return None
            within, box = regions.bounds(visible), regions.bounds(mask)
            share = float(S[mask].sum() / S.sum())
            facts = {"n_regions": n, "area": round(float(mask.sum() / visible.sum()), 4), "share": round(share, 4)}
        if self.select == "random":
            mask, box = regions.moved(mask, box, within, draw)
        if mask is None:
            return {"box": list(box), "size": [box[2] - box[0], box[3] - box[1]], "mask": None}
        if exact:
            box = regions.widened(box, picture.size)
        size = regions.enlarged(box, picture.size, exact)
        return {"box": list(box), "size": list(size), "mask": pack(mask), **facts}
