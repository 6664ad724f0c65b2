"""Which head, switched off, turns the last hidden states of many prompts most?

Sahara, in Zhou et al., "On the Role of Attention Heads in Large Language Model Safety", arXiv 2410.13708.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from vlmfix.eval.tune.log_probs import log_probs_at
from vlmfix.eval.tune.measurement import Measurement
from vlmfix.eval.tune.questions import Questions
from vlmfix.eval.tune.switch_off import PAPER_EPS, Mode, each_head_off
from vlmfix.eval.tune.tool import Subject, Tool
from vlmfix.method.kinds import Range
from vlmfix.model.anatomy import anatomy


@dataclass(frozen=True)
class Subspace(Tool):
    """Switches one head off at a time and looks at the last hidden states of all prompts together."""

    name: ClassVar[str] = "subspace"
    source: ClassVar[str] = "Sahara, Zhou et al., arXiv 2410.13708"

    rank: Annotated[int, Range(1)] = 1
    """Leading left singular vectors that are compared; the largest principal angle counts (code: 1)."""
    mode: Mode = "output"
    """As in `ablate`."""

    @property
    def meaning(self) -> str:
        """What a score is."""
        return "angle between the leading directions of last hidden states, head on and off, in degrees"

    def measure(self, subject: Subject) -> Measurement:
        """L * H passes per prompt; the angle is between prompts, so there are no intervals."""
        questions = Questions.of(subject)
        n_prompts = len(questions.items)
        if n_prompts < max(8, self.rank + 1):
            raise ValueError(f"subspace compares at least 8 prompts; {subject.data.name} gives {n_prompts} questions")

        def read(inputs: dict[str, Any]) -> Tensor:
            return last_hidden_states(subject.model, inputs)

        plain, off = [], []
        for items in subject.batches(questions.items, "subspace", subject.prompts_per_pass):
            inputs = subject.inputs(items)
            plain.append(read(inputs).cpu())
            eps = PAPER_EPS[self.mode]
            runs = each_head_off(subject.model, inputs, read, mode=self.mode, eps=eps, rows=subject.batch_size)
            off.append(torch.cat([states.cpu() for _, _, states in runs]))  # (L * H, B, D): heads in order
        angles = subspace_angle(torch.cat(plain), torch.cat(off, 1), self.rank).view(subject.shape)
        return Measurement.of_all_pictures(questions.pictures, angles.numpy(), prompts=n_prompts)


def last_hidden_states(model: Any, inputs: dict[str, Any]) -> Tensor:
    """(B, D), float32: what the decoder gives at the last position, after its final norm."""
    states: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        states.append(output[0][:, -1].float())

    handle = anatomy(model).decoder.register_forward_hook(keep)
    try:
        log_probs_at(model, inputs, [-1])
    finally:
        handle.remove()
    return states[-1]


def subspace_angle(plain: Tensor, off: Tensor, rank: int = 1) -> Tensor:
    """Largest principal angle, in degrees, between the leading left singular vectors of `plain` (n, D) and of each of
    `off` (..., n, D)."""
    u, v = (torch.linalg.svd(x.double(), full_matrices=False).U[..., :rank] for x in (plain, off))
    smallest_cosine = torch.linalg.svdvals(u.mT @ v)[..., -1]
    return smallest_cosine.clamp(-1, 1).arccos().rad2deg()
