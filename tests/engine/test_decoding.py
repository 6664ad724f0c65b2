"""What `generate` will do is resolved as transformers resolves it, whichever way it is told."""

import random

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

import vlmfix
from tests.models import llava, picture_prompt
from vlmfix.engine.decoding import as_keywords, decoding_of

CHOICES = {
    "num_beams": [1, 2, 3],
    "do_sample": [True, False],
    "repetition_penalty": [1.0, 1.3],
    "use_cache": [True, False],
    "eos_token_id": [2, [2, 5]],
    "temperature": [0.5, 1.0],
    "return_dict_in_generate": [True, False],
    "cache_implementation": [None, "dynamic"],
    "num_return_sequences": [1],
    "max_new_tokens": [2, 3],
}


def drawn(rng):
    """Some settings with random values."""
    return {name: rng.choice(values) for name, values in CHOICES.items() if rng.random() < 0.4}


class Stop(Exception):
    """Ends a generation that has told its settings."""


def settings_of(config):
    """A configuration to compare; lengths are worked out later."""
    return {name: value for name, value in config.to_dict().items() if name not in ("max_length", "min_length")}


def calls(model, seed):
    """A random way to call `generate`: arguments by position and by name, after changing the model's own settings."""
    rng = random.Random(seed)
    for name, value in drawn(rng).items():
        setattr(model.generation_config, name, value)
    prompt = picture_prompt(model)
    ids = prompt.pop("input_ids")
    keywords = {**prompt, **drawn(rng)}
    config = GenerationConfig(**drawn(rng))
    way = rng.choice(["none", "keyword", "positional", "with processors"])
    if way == "none":
        return (), {"input_ids": ids, **keywords}
    if way == "keyword":
        return (), {"inputs": ids, "generation_config": config, **keywords}
    if way == "positional":
        return (ids, config), keywords
    return (ids, config, LogitsProcessorList()), keywords


@pytest.mark.parametrize("seed", range(25))
def test_settings_are_those_that_generate_resolves(seed, monkeypatch):
    model = llava()
    args, kwargs = calls(model, seed)
    heard = []

    def listen(config, *_, **__):
        heard.append(settings_of(config))
        raise Stop

    monkeypatch.setattr(model, "_prepare_special_tokens", listen)
    vlmfix.wrap(model, "vhr")
    resolved = settings_of(model.__dict__["_vlmfix"].wrapper.decoding(args, kwargs).config)
    with pytest.raises(Stop):
        model.generate(*args, **kwargs)
    assert heard == [resolved]


@pytest.mark.parametrize("seed", range(10))
def test_keywords_alone_say_the_same(seed):
    model = llava()
    rng = random.Random(seed)
    for name, value in drawn(rng).items():
        setattr(model.generation_config, name, value)
    settings = {**drawn(rng), "generation_config": GenerationConfig(**drawn(rng))}
    keywords = as_keywords(settings)
    assert "generation_config" not in keywords
    assert settings_of(decoding_of(model, settings).config) == settings_of(decoding_of(model, keywords).config)


WAYS = {
    "keywords": lambda model, ids, settings: ((), {"input_ids": ids, **settings}),
    "config": lambda model, ids, settings: ((), {"input_ids": ids, "generation_config": GenerationConfig(**settings)}),
    "positional": lambda model, ids, settings: ((ids, GenerationConfig(**settings)), {}),
    "processors": lambda model, ids, settings: ((ids, GenerationConfig(**settings), LogitsProcessorList()), {}),
}


def own(model, ids, settings):
    """The model's own configuration says it all."""
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return (ids,), {}


WAYS["the model's own"] = own


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"repetition_penalty": 1.5}, {"use_cache": False}])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["contrast:gamma=2,beta=0.01", "pai:alpha=2,skip_first=0"])
def test_every_way_to_say_it_gives_the_same_answer(method, way, settings):
    settings = {**settings, "max_new_tokens": 6, "suppress_tokens": [58, 59, 60, 61], "pad_token_id": 0}
    answers = []
    for each in ("keywords", way):
        model = llava()
        prompt = picture_prompt(model)
        ids = prompt.pop("input_ids")
        args, kwargs = WAYS[each](model, ids, settings)
        vlmfix.wrap(model, method)
        answers.append(model.generate(*args, **kwargs, **prompt))
    assert torch.equal(*answers)


@pytest.mark.parametrize("way", WAYS)
def test_refusals_hear_every_way(way):
    refused = {
        "beam search is not supported": {"num_beams": 2},
        "assisted generation is not supported": {"prompt_lookup_num_tokens": 2},
        "guidance_scale=1.5": {"guidance_scale": 1.5},
    }
    for sentence, settings in refused.items():
        model = llava()
        prompt = picture_prompt(model)
        args, kwargs = WAYS[way](model, prompt.pop("input_ids"), {**settings, "max_new_tokens": 2, "pad_token_id": 0})
        vlmfix.wrap(model, "lookback")
        with pytest.raises(ValueError, match=sentence):
            model.generate(*args, **kwargs, **prompt)
