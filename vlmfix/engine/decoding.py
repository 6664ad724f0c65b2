"""What a call of `generate` will do, resolved as transformers itself resolves it, and nowhere else.

Arguments may come by position or by name; settings may stand in keywords, in a given `GenerationConfig` or in the
model's own. Everything that must know a setting reads it from here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import GenerationConfig, GenerationMixin

from vlmfix.model.anatomy import core_of, generator_of

GREEDY = {"temperature": None, "top_p": None, "top_k": None}
"""Settings that a model's own configuration may hold and greedy decoding has no use for."""
NO_SETTINGS = {*inspect.signature(GenerationMixin.generate).parameters, "tokenizer", "assistant_tokenizer"} - {"kwargs"}
"""Arguments of `generate` that `GenerationConfig` does not take."""
MODES = ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation")
"""Ways to decode whose code transformers has itself."""
BESIDES = {"transformers_version", "bos_token_id", "pad_token_id"}
"""Entries of a configuration that decide no answer of a prompt that begins with its own tokens."""


@dataclass(frozen=True)
class Decoding:
    """One call of `generate`."""

    arguments: dict[str, Any]
    """By name, whichever way they came."""
    config: GenerationConfig
    """Every setting in force: keywords first, then the configuration given, then the model's own."""

    @property
    def n_beams(self) -> int:
        """Beams of each sample."""
        return self.config.num_beams or 1

    @property
    def mode(self) -> str:
        """As transformers names it."""
        return str(self.config.get_generation_mode(self.arguments.get("assistant_model")).value)

    @property
    def from_elsewhere(self) -> str | None:
        """The way to decode, in words, where transformers loads its code from the hub; `None` where it has it."""
        custom = self.arguments.get("custom_generate")
        if isinstance(custom, str):
            return f"custom_generate={custom!r}"
        if custom is not None or self.mode in MODES:
            return None
        return self.mode.replace("_", " ")

    @property
    def assisted(self) -> bool:
        """Whether something else proposes tokens, which the model then accepts or takes back."""
        return self.mode == "assisted_generation"

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ids = self.config.eos_token_id
        if ids is None:
            return frozenset()
        return frozenset(ids) if isinstance(ids, list) else frozenset({ids})

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the answer, JSON-ready: all settings that are not the defaults of transformers, and always
        `do_sample`, `max_new_tokens` and `num_beams`. They can be given to `generate` again."""
        defaults = GenerationConfig._get_default_generation_params()
        settings = {}
        for name, value in self.config.to_dict().items():
            is_default = value is None or (name in defaults and value == defaults[name])
            if not is_default and name not in BESIDES and not name.startswith("_"):
                settings[name] = value
        if self.config.max_new_tokens is not None:
            settings.pop("max_length", None)  # it gives way to max_new_tokens
        return {"do_sample": bool(self.config.do_sample), "num_beams": self.n_beams, **settings}


def resolve(
    generator: Any, generate: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Decoding:
    """What `generate(*args, **kwargs)` of a model will do. `generator` is the part of the model that decodes: the model
    itself, or a language model inside, which has a configuration of its own. Raises what transformers raises for
    settings that exclude each other."""
    arguments = by_name(generate, args, kwargs or {})
    settings = {name: value for name, value in arguments.items() if name not in NO_SETTINGS}
    config, _ = generator._prepare_generation_config(arguments.get("generation_config"), **settings)
    return Decoding(arguments, config)


def decoding_of(model: Any, settings: Mapping[str, Any]) -> Decoding:
    """What a model, wrapped or not, will do with these settings of `generate`."""
    return resolve(generator_of(model), core_of(model).generate, kwargs=settings)


def by_name(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name. `TypeError` for arguments that do not fit the function."""
    signature = inspect.signature(function)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


def as_keywords(settings: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Settings of `generate` as keywords alone: what a `generation_config` among them says goes before `defaults`, and
    keywords before that, as in transformers."""
    config = settings.get("generation_config")
    from_config = {}
    for name, value in vars(config).items() if config is not None else ():
        if value is not None and not name.startswith("_") and name != "transformers_version":
            from_config[name] = value
    keywords = {name: value for name, value in settings.items() if name != "generation_config"}
    keywords = {**from_config, **keywords}
    if keywords.get("max_length") is not None:
        defaults.pop("max_new_tokens", None)
    return {**defaults, **keywords}
