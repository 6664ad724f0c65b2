"""Who answers: all about a model and its processor that an answer depends on, as digests that do not hold paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

PLACES = {
    *("_name_or_path", "name_or_path", "_commit_hash", "vocab_file", "merges_file", "tokenizer_file"),
    *("is_local", "local_files_only", "transformers_version", "added_tokens_decoder"),
}
"""Settings of configurations that say where something came from, or repeat what stands elsewhere."""
PARTS = ("image_processor", "video_processor", "feature_extractor")
"""Of a processor, beside its tokenizer."""


def model_identity(model: Any) -> dict[str, Any]:
    """All about a model that could change an answer: where it came from, its configuration, and its weights."""
    return {
        "model": model.config._name_or_path,
        "revision": getattr(model.config, "_commit_hash", None),
        "config_digest": _digest(model.config.to_dict()),
        "weights_digest": weights_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def weights_digest(model: Any) -> str:
    """A hash of every weight and stored buffer; a second for each one or two gigabytes."""
    digest = hashlib.sha256()
    for name, tensor in _stored(model):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.device.type != "meta":
            content = tensor.detach().flatten().contiguous().cpu()
            if content.numel():
                digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def processor_digest(processor: Any) -> str:
    """A hash of all that a processor makes of a question: its settings, those of its parts, its tokenizer, and the text
    of its template. It stays the same when the processor is used, copied or moved."""
    parts = {name: _settings(getattr(processor, name, None)) for name in PARTS}
    tokenizer = getattr(processor, "tokenizer", None)
    template = getattr(processor, "chat_template", None)
    return _digest([_settings(processor), parts, _tokenizer_settings(tokenizer), template])


def _stored(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights and buffers that a checkpoint holds."""
    yield from model.named_parameters()
    for module_name, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{module_name}.{name}", buffer


def _settings(part: Any) -> list[Any]:
    to_dict = getattr(part, "to_dict", None)
    return [type(part).__name__, to_dict() if callable(to_dict) else None]


def _tokenizer_settings(tokenizer: Any) -> list[Any]:
    """Of a fast tokenizer all that its file holds but padding and truncation, which every call sets anew."""
    if tokenizer is None:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: dict[str, Any] = tokenizer.get_vocab()
    else:
        rules = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    template = getattr(tokenizer, "chat_template", None)
    special = getattr(tokenizer, "special_tokens_map", None)
    return [type(tokenizer).__name__, rules, special, getattr(tokenizer, "init_kwargs", None), template]


def _digest(value: Any) -> str:
    text = json.dumps(_without_places(value), sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _without_places(value: Any) -> Any:
    """The same, ready for JSON, without `PLACES` at any depth."""
    if isinstance(value, dict):
        return {str(key): _without_places(entry) for key, entry in value.items() if key not in PLACES}
    if isinstance(value, (list, tuple)):
        return [_without_places(entry) for entry in value]
    return value
