"""IAT: more attention to the text that the answer has so far.

From "AdaIAT", CVPR 2026, arXiv 2603.04908; official code XianguiKang/AdaIAT. Raising the attention to the image makes
captions repeat themselves. So IAT raises the scores of the tokens that the model has generated itself, which carry what
it saw, by `alpha` times their own size. This is the first half of the paper; the second is `adaiat`, which does it per
head, and where statistics say that it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from vlmfix.method.intervention import Intervention, ScoreMod, Traits
from vlmfix.method.kinds import Layers, Range
from vlmfix.method.layers import layers_of
from vlmfix.method.site import Rows, Site

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class IAT(Intervention):
    """Increased attention to generated text. Acts on attention scores of new tokens, so not on an answer of one word.
    Answers of earlier turns count as prompt (ours)."""

    name: ClassVar[str] = "iat"
    summary: ClassVar[str] = "raises the attention scores of the answer so far"
    paper: ClassVar[str] = "AdaIAT, CVPR 2026, arXiv 2603.04908"
    cost: ClassVar[str] = "no extra pass; attention of one row per token again in float32"
    expect: ClassVar[str] = (
        "long captions only, nothing on yes/no; of all released captions AdaIAT's have the best F1. Untested here"
    )
    rows: ClassVar[Rows] = "generated"
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"alpha": (0.4, 0.8, 0.2, -0.2)}

    alpha: Annotated[float, Range(-1)] = 0.8
    """s += alpha |s| on generated tokens (code)."""
    layers: Layers | None = None
    """Edited layers, 0-based. `None`: 5 to 17 of 32 (code), the same depth of other models (ours)."""

    @property
    def traits(self) -> Traits:
        """Only rows of new tokens are edited."""
        return Traits(shares_pictures=True, by_plan=True)

    def acts_at(self, stage: str) -> bool:
        """No push changes nothing."""
        return super().acts_at(stage) and self.alpha != 0

    def at_layers(self, n_layers: int) -> range | tuple[int, ...]:
        """Edited layers."""
        return layers_of(5, 17, n_layers) if self.layers is None else self.layers

    def scores(self, s: Tensor, site: Site) -> Tensor:
        """s_k + alpha |s_k| for generated keys k, the current token's among them."""
        return s.addcmul(s.abs(), self._raise_by(s, site))

    def score_mod(self, s: Tensor, site: Site) -> ScoreMod:
        """The same, entry by entry."""
        raise_by = self._raise_by(s, site)
        return lambda s, b, h, q, k: s + raise_by[b, 0, 0, k] * s.abs()

    def _raise_by(self, s: Tensor, site: Site) -> Tensor:
        """(B, 1, 1, K) alpha on generated keys. What is kept is 0 there, and 1 on the prompt, padding included."""
        site.memo.setdefault("acted", site.has_image | True)
        prompt = site.kept("prompt", s, lambda masks: (masks.image | True).to(s.dtype)[:, None, None])
        return self.alpha - self.alpha * prompt

    def controls(self) -> tuple[Intervention, ...]:
        """The push turned round, no further than to half of a score."""
        return (replace(self, alpha=-self.alpha / (1 + self.alpha)),) if self.alpha > 0 else ()

    def idle_hint(self) -> str:
        """The only suspect."""
        return "the answers had one token only."
