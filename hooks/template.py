"""NAME, what the letters stand for: what it does to the model, in a dozen words.

Authors, "Title", venue, arXiv number; official code owner/repository. Then in plain words: what is wrong with the
model, what the method does about it, and when. Copy this file to `hooks/<name>.py`, write the stage that your method
edits (the table in `vlmfix/method/stages.py` has all of them), and add a line to `vlmfix/method/names.py`; `make
contract METHOD=name` then tries it on many models. As it stands it multiplies the attention that image tokens get.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Range
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Template(Intervention):
    """Full name. Where it acts: attention weights of the last prompt row and of every new token."""

    name: ClassVar[str] = "template"
    summary: ClassVar[str] = "multiplies the attention that image tokens get"
    paper: ClassVar[str] = "Authors, venue, arXiv number"
    cost: ClassVar[str] = "no extra pass; attention of one row per token again in float32"
    expect: ClassVar[str] = "for which task, and what came out with its controls"

    gain: Annotated[float, Range(above=0)] = 1.5
    """The paper's symbol and default, what it means, its unit, and where the value is from (paper, code, ours)."""

    @property
    def traits(self) -> Traits:
        """While answering it is a function of tensors alone, so it costs little and compiles."""
        return Traits(by_plan=True)

    def at_layers(self, n_layers: int) -> range:
        """Edited layers."""
        return range(2, n_layers)

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """a_j *= gain for image keys j, then the row is divided by its sum. Masks over batch and heads, no loops."""
        has_image = site.memo.setdefault("acted", site.has_image)  # (B,)
        more = site.kept("more", a, lambda masks: (self.gain - 1) * masks.image[:, None, None])  # (B, 1, 1, K)
        edited = a + more * a
        return (edited / edited.sum(-1, keepdim=True)).where(has_image[:, None, None, None], a)

    def controls(self) -> tuple[Intervention, ...]:
        """The same push turned round. A setting `select` gives controls by itself."""
        return (replace(self, gain=1 / self.gain),)
