"""lmms-eval finds `vlmfix` by the entry point `lmms_eval.models`:

lmms-eval --model vlmfix --model_args pretrained=ID,method=var,rho=0.5 --tasks pope
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """What lmms-eval's registry loads."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="vlmfix", chat_class_path="vlmfix.integrations.lmms_model.VlmfixLMM")]
