"""What a calibrated file says of the model that it was made on, so that it is refused on another."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from vlmfix.model.anatomy import Anatomy

STRIDE = 997
"""One weight in so many is looked at."""


def fingerprint(model: nn.Module, anatomy: Anatomy) -> str:
    """A digest of a model's shape and of weights from every output projection, rounded to bfloat16: the same in each
    16-bit dtype, another one after fine-tuning, merged adapters and quantisation. Not the digest of a run's identity,
    which reads every byte; this one costs nothing when a method is put on."""
    import torch

    parts: list[Any] = [anatomy.model_type, anatomy.hidden_size, len(anatomy.layers), anatomy.n_heads]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for layer in anatomy.layers:
        weight: Any = getattr(layer.out_proj, "weight", None)
        if weight is None or weight.is_meta:  # offloaded: nothing to read here
            continue
        sample = weight.detach().flatten()[::STRIDE].float().to(torch.bfloat16).cpu()
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def template_digest(processor: Any) -> str | None:
    """A digest of the template by which prompts are written; `None` without a processor or a template."""
    template = getattr(processor, "chat_template", None)
    if template is None:
        return None
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16]


def checksum(data: dict[str, Any]) -> str:
    """Of a file's content, but for the checksum itself: tells a file that was edited or cut."""
    rest = {name: value for name, value in data.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]
