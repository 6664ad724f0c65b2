"""Log-probabilities that a model gives in one pass, without decoding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def log_probs_at(model: Any, inputs: dict[str, Any], columns: Sequence[int]) -> Tensor:
    """Log-probabilities (B, R, V), float32, of what follows each of R columns of the prompt; -1 is the last."""
    n_columns = inputs["input_ids"].shape[1]
    index = torch.tensor([column % n_columns for column in columns], device=inputs["input_ids"].device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, use_cache=False, logits_to_keep=index).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, index]
    return logits.float().log_softmax(-1)


def kl(plain: Tensor, edited: Tensor) -> Tensor:
    """KL(p || q) (..., B) of log-probabilities (B, V) and (..., B, V); 1e-12 is added to both, as in the release of
    arXiv 2410.13708."""
    p, q = plain.double().exp() + 1e-12, edited.double().exp() + 1e-12
    return (p * (p.log() - q.log())).sum(-1)
