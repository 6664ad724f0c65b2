"""The plausibility rule of contrastive decoding: what the model itself finds implausible is never chosen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def plausible(c: Tensor, beta: float) -> Tensor:
    """(B, V) bool: tokens with c >= max c + log(beta), by logits or log-probabilities `c` (B, V); all with beta 0."""
    if beta == 0:
        return c.new_ones(c.shape).bool()
    return c >= c.amax(-1, keepdim=True) + math.log(beta)


def ruled(out: Tensor, allowed: Tensor, as_logits: bool) -> Tensor:
    """What a `logits` stage returns of its result (B, V): tokens that are not allowed get none. Log-probabilities, so
    that beams can be compared, unless penalties follow that want logits (`Step.as_logits`)."""
    out = out.masked_fill(~allowed, -math.inf)
    return out if as_logits else out.log_softmax(-1)
