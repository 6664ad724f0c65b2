"""Which keys are what: image tokens, system text, instruction, generated tokens, padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F


def fit(mask: Tensor, n: int) -> Tensor:
    """A (B, N) mask cut or filled with False on the right to (B, n)."""
    return mask[:, :n] if mask.shape[1] >= n else F.pad(mask, (0, n - mask.shape[1]))


@dataclass(frozen=True)
class Geometry:
    """Boolean masks of shape (B, K) over keys. Masks, never spans: several images and padding on either side are
    fine."""

    image: Tensor
    """Image tokens of all images (video tokens included); False on padding and on generated tokens."""
    prompt: Tensor
    """Tokens of the prompt, image tokens included; False on padding and on generated tokens."""
    valid: Tensor
    """Everything but padding."""

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> Geometry:
        """No keys yet."""
        nothing = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        return cls(nothing, nothing, nothing)

    @property
    def n(self) -> int:
        """Number of keys K."""
        return self.image.shape[1]

    def to(self, device: torch.device) -> Geometry:
        """On another device; layers of one model may lie on several."""
        if self.image.device == device:
            return self
        return Geometry(self.image.to(device), self.prompt.to(device), self.valid.to(device))

    def extended(self, start: int, image: Tensor, valid: Tensor) -> Geometry:
        """With a further piece of prompt at positions `start..`: what lies between was generated."""
        old = self.fitted(start)
        return Geometry(
            torch.cat([old.image, image & valid], dim=1),
            torch.cat([old.prompt, valid], dim=1),
            torch.cat([old.valid, valid], dim=1),
        )

    def fitted(self, n: int) -> Geometry:
        """Over exactly `n` keys: keys past the known ones are generated tokens."""
        if n == self.n:
            return self
        valid = self.valid[:, :n] if n < self.n else F.pad(self.valid, (0, n - self.n), value=True)
        return Geometry(fit(self.image, n), fit(self.prompt, n), valid)

    def last_keys(self, n: int) -> Geometry:
        """Over the last `n` keys only, for layers that keep a window: a key is there what it is in the whole."""
        part = Geometry(self.image[:, -n:], self.prompt[:, -n:], self.valid[:, -n:])
        for name in ("order", "system", "instruction"):
            part.__dict__[name] = getattr(self, name)[:, -n:]
        return part

    @cached_property
    def order(self) -> Tensor:
        """(B, K) how many attended keys come before each key: 0 at a sample's first token."""
        return self.valid.cumsum(1) - self.valid.long()

    @cached_property
    def system(self) -> Tensor:
        """Prompt keys before the first image token (first token included); all prompt keys of a sample without
        image."""
        return self.prompt & (self.image.cumsum(1) == 0)

    @cached_property
    def instruction(self) -> Tensor:
        """Prompt keys after the last image token; none in a sample without image."""
        seen = self.image.cumsum(1)
        return self.prompt & ~self.image & (seen == seen[:, -1:]) & (seen > 0)

    @cached_property
    def generated(self) -> Tensor:
        """Keys of generated tokens, the current one included."""
        return self.valid & ~self.prompt

    @cached_property
    def last_prompt(self) -> Tensor:
        """(B,) position of the last prompt token: the one that predicts the first answer token."""
        return (self.prompt * torch.arange(1, self.n + 1, device=self.prompt.device)).argmax(1)
