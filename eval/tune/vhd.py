"""Vision-aware head divergence: whose output changes most when the image is taken away?

He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", ACL 2025, arXiv 2412.13949,
Eq. 4. The method `vhr` chooses heads by it for each picture; here it is averaged over pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vlmfix.asking.asker import Asker
from vlmfix.eval.benchmarks.chair import Chair
from vlmfix.eval.tune.measurement import Measurement
from vlmfix.eval.tune.tool import Subject, Tool
from vlmfix.hooks.vhr import Choice, choose
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.prompt import Prompt
from vlmfix.method.site import Site
from vlmfix.model.anatomy import anatomy


@dataclass(frozen=True)
class ReadHeads(Intervention):
    """Reads head outputs at the last prompt position, with the image and without; changes nothing."""

    @property
    def traits(self) -> Traits:
        """It needs head outputs of a pass of its own."""
        return Traits(captures=("heads",))

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        """Run the prompt once without its image tokens."""
        layers = range(len(anatomy(prompt.model).layers))
        memo.update(text=prompt.capture("heads", layers, image=False), visual={})

    def heads(self, o: Tensor, site: Site) -> Tensor:
        """Note the outputs (B, H, d) with the image."""
        row = (site.geometry.last_prompt - site.start)[:, None, None, None]
        site.memo["visual"][site.layer] = o.gather(1, row.expand(-1, 1, *o.shape[2:]))[:, 0]
        return o


def divergence(model: Any, inputs: Mapping[str, Any], distance: str = "sq_l2") -> dict[int, Choice]:
    """VHD of every head, and VHR's choice by it, per layer: one pass with the image and one without."""
    _, (memo,) = Asker(model, None, ReadHeads()).forward(inputs)
    text, visual = memo["text"], memo["visual"]
    return {layer: choose(text[layer], visual[layer], distance) for layer in sorted(visual)}


@dataclass(frozen=True)
class VHD(Tool):
    """VHR's vision-aware head divergence, averaged over pictures."""

    name: ClassVar[str] = "vhd"
    source: ClassVar[str] = "He et al., ACL 2025, arXiv 2412.13949"

    distance: Literal["sq_l2", "l2"] = "sq_l2"
    """Squared (release) or plain (paper, Eq. 4)."""
    relative: bool = False
    """Divide by the layer's mean over heads (ours): outputs grow with depth, so plain divergence favours late layers,
    while VHR compares heads of one layer only."""

    @property
    def meaning(self) -> str:
        """What a score is."""
        meaning = "distance of the head's output with and without the image, at the last prompt token"
        return f"{meaning}, over the layer's mean" if self.relative else meaning

    def measure(self, subject: Subject) -> Measurement:
        """Two passes per picture, one of them without the image."""
        items = Chair().items(subject.data)
        distances, choices = [], []
        for batch in subject.batches(items, "vhd"):
            layers = divergence(subject.model, subject.inputs(batch), self.distance).values()
            distances.append(torch.stack([layer.vhd.cpu() for layer in layers], 1))
            choices.append(torch.stack([layer.selected.float().cpu() for layer in layers], 1))
        vhd = torch.cat(distances).double()  # (P, L, H)
        if self.relative:
            vhd = vhd / vhd.mean(-1, keepdim=True)
        pictures = [item.image for item in items]
        one_sample_each, one_group = np.arange(len(items)), np.zeros(len(items), int)
        measurement = Measurement.from_samples(pictures, ("mean",), vhd.numpy(), one_sample_each, one_group)
        measurement.extra["chosen_by_vhr"] = torch.cat(choices).mean(0).tolist()
        return measurement
