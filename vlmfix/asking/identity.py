"""Who answers: all about a model and its processor that an answer depends on, as digests that do not hold paths."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from vlmfix.method.code import code_digest, file_digest
from vlmfix.method.intervention import Intervention

PLACES = {
    *("_name_or_path", "name_or_path", "_commit_hash", "vocab_file", "merges_file", "tokenizer_file"),
    *("is_local", "local_files_only", "transformers_version", "added_tokens_decoder"),
}
"""Settings of configurations that say where something came from, or repeat what stands elsewhere."""
PARTS = ("image_processor", "video_processor", "feature_extractor")
"""Of a processor, beside its tokenizer."""
RULES = ("clean_up_tokenization_spaces", "split_special_tokens")
"""Attributes of a tokenizer that stand in nothing that it would save."""
THREADS = 4
"""As many weights are hashed at once, and copied from the accelerator for that."""


def model_identity(model: Any) -> dict[str, Any]:
    """All about a model that could change an answer: where it came from, its configuration, and its weights."""
    return {
        "model": model.config._name_or_path,
        "revision": getattr(model.config, "_commit_hash", None),
        "config_digest": _digest(model.config.to_dict()),
        "weights_digest": weights_digest(model),
        "adapters_digest": _digest(_adapters(model)),
        "code_digest": code_digest({type(module) for module in model.modules()}),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": _attention(model.config),
    }


def processor_identity(processor: Any) -> dict[str, Any]:
    """All about a processor that could change an answer; its chat template is also there as it is written."""
    return {"processor_digest": processor_digest(processor), "template": getattr(processor, "chat_template", None)}


def weights_digest(model: Any) -> str:
    """A hash of all that a checkpoint of the model would hold, every byte of it, whatever holds it at the moment: also
    scales of quantised weights, and weights that lie elsewhere until they are needed.

    About a second a gigabyte on one core (docs/evaluation.md). Nothing cheaper tells all that counts: a sample of
    the weights misses an edit of one head, names and dates of files miss what was changed after loading.
    """
    stored = list(_stored(model))
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:  # hashing holds no lock
        hashes: dict[Any, Any] = {}
        for _, value in stored:  # tied weights once
            if _place(value) not in hashes:
                hashes[_place(value)] = pool.submit(_hash, value)
        digest = hashlib.sha256()
        for name, value in stored:
            digest.update(name.encode() + hashes[_place(value)].result())
    return digest.hexdigest()[:16]


def _stored(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and values that a checkpoint holds."""
    elsewhere = dict(_offloaded(model))
    for name, value in model.state_dict().items():
        yield name, elsewhere.get(name, value)


def _offloaded(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights that accelerate keeps apart, and puts in their place while a module computes."""
    for module_name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for part in (hook, *getattr(hook, "hooks", ())):
            weights: Any = getattr(part, "weights_map", None)
            for name, tensor in module.state_dict(keep_vars=True).items() if weights is not None else ():
                if tensor.is_meta and "." not in name:
                    yield f"{module_name}.{name}".removeprefix("."), weights[name]


def _place(value: Any) -> Any:
    """Tells values apart by where they lie, without a look at them."""
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return id(value)
    return value.data_ptr(), value.dtype, value.device, tuple(value.shape), value.stride()


def _hash(value: Any) -> bytes:
    if not isinstance(value, torch.Tensor):
        return hashlib.sha256(repr(value).encode()).digest()
    digest = hashlib.sha256(f"{tuple(value.shape)}{value.dtype}".encode())
    if not value.is_meta and value.numel():
        digest.update(value.detach().flatten().contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.digest()


def _adapters(model: nn.Module) -> list[Any]:
    """Which adapters of PEFT are in force, and how strongly: neither is a weight."""
    states = []
    for name, module in model.named_modules():
        if hasattr(module, "merged_adapters"):
            scaling = getattr(module, "scaling", None)
            states.append([name, module.active_adapters, module.disable_adapters, module.merged_adapters, scaling])
    return states


def _attention(config: Any) -> Any:
    """The implementation of attention, of each part where they differ."""
    parts = {name: getattr(config, name)._attn_implementation for name in config.sub_configs if hasattr(config, name)}
    own = config._attn_implementation
    return own if set(parts.values()) <= {own} else {"": own, **parts}


def processor_digest(processor: Any) -> str:
    """A hash of all that a processor makes of a question: its settings, those of its parts, its tokenizer, and the text
    of its template. It stays the same when the processor is used, copied or moved."""
    parts = {name: _settings(getattr(processor, name, None)) for name in PARTS}
    tokenizer = getattr(processor, "tokenizer", None)
    template = getattr(processor, "chat_template", None)
    classes = {type(processor), type(tokenizer), *(type(getattr(processor, name, None)) for name in PARTS)}
    own = {name: getattr(processor, name, None) for name in ("image_token_id", "video_token_id")}
    return _digest([_settings(processor), own, parts, _tokenizer_settings(tokenizer), template, code_digest(classes)])


def methods_digest(interventions: Sequence[Intervention]) -> str | None:
    """A hash of the code of some interventions, and of every file that their settings name: the same name and settings
    may stand for something else tomorrow. `None` where there is none."""
    parts = []
    for intervention in interventions:
        values = intervention.to_json().values()
        files = [file_digest(value) for value in values if isinstance(value, str)]
        parts.append([code_digest({type(intervention)}, versioned=()), files])
    return _digest(parts) if parts else None


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
    own = {name: getattr(tokenizer, name, None) for name in RULES}
    return [type(tokenizer).__name__, rules, own, special, getattr(tokenizer, "init_kwargs", None), template]


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
