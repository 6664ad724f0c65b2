"""Which head looks at the object that the model is about to name?

Ours, after the retrieval heads of language models: Wu et al., "Retrieval Head Mechanistically Explains Long-Context
Factuality", arXiv 2404.15574.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vlmfix.asking.asker import Asker
from vlmfix.eval.scorers import naming
from vlmfix.eval.tune.measurement import Measurement
from vlmfix.eval.tune.targets import Target, find_targets, with_controls
from vlmfix.eval.tune.tool import Subject, Tool
from vlmfix.hooks.parts import sinks
from vlmfix.hooks.var import VAR
from vlmfix.method.intervention import Idle, Intervention
from vlmfix.method.kinds import Range
from vlmfix.method.site import Site
from vlmfix.model.anatomy import anatomy

FEW_PAIRS = 200
SCORES = ("top1", "mass")
"""What `retrieval` gives, in its order."""
MEANINGS = {
    "mass": "image attention on the object about to be named, less its share of the area",
    "top1": "how often the strongest image token shows the object about to be named",
}


def retrieval(w: Tensor, target: Tensor, grid: Tensor, sink: Tensor) -> Tensor:
    """(2, H): whether the strongest image token that is no sink shows the object, and the share of image attention on
    it less its share of the area. `w` (H, P) attention on image tokens; masks (P,)."""
    strongest = w.masked_fill(sink | ~grid, -1).argmax(-1)
    on_grid = w * grid
    share_of_attention = (on_grid * target).sum(-1) / on_grid.sum(-1).clamp(min=1e-12)
    share_of_area = (target & grid).sum() / grid.sum()
    return torch.stack([target[strongest].to(w.dtype), share_of_attention - share_of_area])


@dataclass(frozen=True)
class ReadTargets(Intervention):
    """Scores the attention of the rows that predict object words; changes nothing."""

    targets: Sequence[Target] = ()
    rows_of: Sequence[tuple[int, int]] = ()
    """Sequence of the batch and row of attention that predict each target's word."""
    dims: tuple[int, ...] = ()
    """Dimensions of visual sinks, which `top1` passes over; none: it passes over nothing."""
    tau: float = 0.0

    def acts_at(self, stage: str) -> bool:
        """Layer inputs are needed to find sinks only."""
        return super().acts_at(stage) and (stage != "layer_input" or bool(self.dims))

    def layer_input(self, x: Tensor, site: Site) -> None:
        """Mark sinks, by VAR's rule."""
        site.memo.setdefault("sink", {})[site.layer] = sinks.phi(x, self.dims) >= self.tau

    def survey(self, a: Tensor, site: Site) -> None:
        """Score the rows among these: `a` (B, H, R, K) is a piece of the prompt's rows, which come in order."""
        first_rows = site.memo.setdefault("first_row", {})
        first_row = first_rows.get(site.layer, 0)
        first_rows[site.layer] = first_row + a.shape[2]
        for number, (target, (sequence, row)) in enumerate(zip(self.targets, self.rows_of, strict=True)):
            if first_row <= row < first_row + a.shape[2]:
                keys = site.geometry.image[sequence]
                attention = a[sequence, :, row - first_row][:, keys]  # (H, image tokens)
                scores = self._scores(target, attention, self._sinks(site, sequence, keys))
                site.memo.setdefault("scores", {})[number, site.layer] = scores

    def _sinks(self, site: Site, sequence: int, keys: Tensor) -> Tensor:
        """(image tokens,) bool."""
        if not self.dims:
            return torch.zeros_like(keys[keys])
        return site.memo["sink"][site.layer][sequence][keys]

    def _scores(self, target: Target, attention: Tensor, sink: Tensor) -> Tensor:
        """(2, 2, H): `retrieval` of the object, and of the other picture's; NaN where there is none."""
        grid = torch.as_tensor(target.grid, device=attention.device)
        scores = []
        for shows in (target.shows, target.shows_other):
            if shows is None:
                scores.append(attention.new_full((2, len(attention)), torch.nan))
            else:
                scores.append(retrieval(attention, torch.as_tensor(shows, device=attention.device), grid, sink))
        return torch.stack(scores)


@dataclass(frozen=True)
class Visual(Tool):
    """Visual retrieval score: where a head looks when the model names an object."""

    name: ClassVar[str] = "visual"
    source: ClassVar[str] = "ours, after the retrieval head, Wu et al., arXiv 2404.15574"

    see: Literal["mass", "top1"] = "mass"
    """`mass`: the share of image attention on the object, less its share of the area. `top1`: how often the strongest
    image token that is no visual sink shows the object."""
    sinks: bool = False
    """Let `top1` count visual sinks too."""
    max_new_tokens: Annotated[int, Range(1)] = 256
    """Of the captions."""

    @property
    def meaning(self) -> str:
        """What a score is."""
        return MEANINGS[self.see]

    def measure(self, subject: Subject) -> Measurement:
        """One caption per picture, and one pass over it. `ValueError` where no named object has a place."""
        captions = subject.captions(self.max_new_tokens)
        targets = with_controls(find_targets(subject, captions))
        if not targets:
            raise ValueError(
                f"no object that the model names in {subject.data.name} has a box that its image tokens show; the "
                f"visual tool needs boxes or masks in instances.json"
            )
        values = self._scores(subject, captions, targets)  # (S, L, 2, H)
        pictures = [caption.item.image for caption in captions]
        picture_of = np.array([target.picture for target in targets])
        one_group = np.zeros(len(targets), int)
        measurement = Measurement.from_samples(pictures, ("words",), values[:, :, 0], picture_of, one_group)
        has_control = np.isfinite(values[:, 0, 1, 0])
        controls = values[has_control, :, 1]
        measurement.extra["control"] = controls.mean(0).tolist() if len(controls) else None
        measurement.extra["pairs"] = len(targets)
        if len(targets) < FEW_PAIRS:
            warnings.warn(
                f"only {len(targets)} named objects could be looked for; with fewer than {FEW_PAIRS} the ranking is "
                f"rough",
                stacklevel=3,
            )
        return measurement

    def _scores(self, subject: Subject, captions: Sequence[naming.Caption], targets: Sequence[Target]) -> np.ndarray:
        """(S, L, 2, H) score of each target, and that of its control."""
        dims, tau = self._sinks(subject)
        n_layers, kind = subject.shape[0], SCORES.index(self.see)
        pictures = list(dict.fromkeys(target.picture for target in targets))
        values = []
        for batch in subject.batches(pictures, "visual"):
            batch_captions = [captions[picture] for picture in batch]
            inputs, n_prompt = naming.told(subject.model, subject.processor, batch_captions)
            batch_targets = [target for target in targets if target.picture in batch]
            # the row before a token predicts it
            rows = [(batch.index(target.picture), n_prompt + target.token - 1) for target in batch_targets]
            reader = Asker(subject.model, subject.processor, ReadTargets(batch_targets, rows, dims, tau))
            _, (memo,) = reader.forward(inputs)
            for number in range(len(batch_targets)):
                by_layer = [memo["scores"][number, layer][:, kind].cpu() for layer in range(n_layers)]
                values.append(torch.stack(by_layer))
        return torch.stack(values).double().numpy()

    def _sinks(self, subject: Subject) -> tuple[tuple[int, ...], float]:
        """Dimensions and threshold of visual sinks, if the model has any and they are to be passed over."""
        if self.sinks or self.see == "mass":
            return (), 0.0
        try:
            var: Any = VAR().resolve(subject.model, anatomy(subject.model), subject.processor)[0]
        except Idle:
            return (), 0.0
        return var.dims, var.tau
