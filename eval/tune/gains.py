"""How loud should each head be? One gain per head, from the model's own captions; no weight is trained.

Ours. Each caption says how a gain would change the log-probability of the object words in it: up for true ones, down
for invented ones, each object once. A gain's step is that push over its own unrest (its variance over captions, and how
much the head moves all other words), shrunk towards none where the push is not told apart from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vlmfix.asking.asker import Asker
from vlmfix.eval.scorers import naming
from vlmfix.eval.tune.measurement import Measurement
from vlmfix.eval.tune.tool import Subject, Tool
from vlmfix.method.intervention import Intervention
from vlmfix.method.kinds import Range
from vlmfix.method.site import Site


@dataclass(frozen=True)
class Scaled(Intervention):
    """Head outputs times gains that gradients flow to."""

    gains: Any = field(default=None, compare=False)
    """(L, H)."""

    def heads(self, o: Tensor, site: Site) -> Tensor:
        """o_h *= gain."""
        return o * self.gains[site.layer, : o.shape[2]].to(o.dtype)[None, None, :, None]


@dataclass(frozen=True)
class Gains(Tool):
    """Reads gradients of the model's own captions."""

    name: ClassVar[str] = "gains"
    source: ClassVar[str] = "ours"

    reach: Annotated[float, Range(above=0, most=4)] = 1.0
    """The largest step: gains lie in 2^-reach .. 2^reach."""
    keep: Annotated[float, Range(0)] = 1.0
    """What all other words weigh: how much a head that moves them is held back."""
    invented: Annotated[float, Range(0)] = 3.0
    """What an invented word weighs, of a true one: they are fewer."""
    max_new_tokens: Annotated[int, Range(1)] = 256
    """Of the captions."""

    @property
    def meaning(self) -> str:
        """What a score is."""
        return "gain of the head's output; 1 leaves it alone"

    def measure(self, subject: Subject) -> Measurement:
        """Two passes back through the model per caption. `ValueError` where no caption names an object."""
        captions = [caption for caption in subject.captions(self.max_new_tokens) if caption.named]
        if not captions:
            raise ValueError(f"no caption of {subject.data.name} names an object of its vocabulary")
        pushes, unrest = [], []
        for batch in subject.batches(captions, "gains", 1):
            push, others = self._gradients(subject, batch[0])
            pushes.append(push)
            unrest.append(others)
        push, moved = np.stack(pushes), np.stack(unrest)
        gains = self._gains(push, moved)
        return Measurement.of_all_pictures([caption.item.image for caption in captions], gains, captions=len(captions))

    def _gains(self, push: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """(L, H) gains from pushes and moves (captions, L, H)."""
        mean, n = push.mean(0), len(push)
        error = push.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.abs(mean)
        held_back = push.var(0) + self.keep * (moved**2).mean(0)
        towards_1 = np.clip(1 - error**2 / np.maximum(mean**2, 1e-24), 0, 1)  # as James and Stein shrink means
        step = towards_1 * mean / np.sqrt(held_back + 1e-12)
        largest = np.abs(step).max()
        return 2.0 ** (self.reach * step / largest) if largest else np.ones_like(step)

    def _gradients(self, subject: Subject, caption: naming.Caption) -> tuple[np.ndarray, np.ndarray]:
        """Of one caption: d(true - invented object words)/d gain, and d(all other words)/d gain, (L, H) each."""
        inputs, n_prompt = naming.told(subject.model, subject.processor, [caption])
        inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        with torch.inference_mode(False), torch.enable_grad():
            gains = torch.ones(subject.shape, device=inputs["input_ids"].device, requires_grad=True)
            inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
            with Asker(subject.model, None, Scaled(gains)).applied():
                logits = subject.model(**inputs, use_cache=False).logits[0, n_prompt - 1 : -1]
            tokens = torch.tensor(caption.tokens, device=logits.device)
            log_probs = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            signs = self._signs(caption.named, len(tokens)).to(log_probs.device)
            (push,) = torch.autograd.grad((log_probs * signs).sum(), gains, retain_graph=True)
            (others,) = torch.autograd.grad(log_probs[signs == 0].sum(), gains)
        return push.double().cpu().numpy(), others.double().cpu().numpy()

    def _signs(self, named: Sequence[naming.Naming], n_tokens: int) -> Tensor:
        """(tokens,) 1 where a true object is first named, -1 where an invented one is, 0 elsewhere."""
        signs, seen = torch.zeros(n_tokens), set()
        for word in named:
            if word.object not in seen and word.token < n_tokens:
                signs[word.token] = 1.0 if word.true else -self.invented
            seen.add(word.object)
        return signs
