"""`ask` adds its defaults only where nobody says anything else, and records what was in force."""

import copy
from pathlib import Path

import pytest
from transformers import GenerationConfig

import vlmfix
from vlmfix.asking.asker import Asker

PICTURE = Path(__file__).parents[2] / "assets" / "organism" / "test" / "images" / "test_0058.webp"
QUESTIONS = [(PICTURE, "Is there a person in the image?"), (PICTURE, "Is there a cake in the image?")]


@pytest.fixture(autouse=True)
def _own_settings(organism):
    """The model's own configuration may be changed by a test."""
    model, _ = organism
    before, model.generation_config = model.generation_config, copy.deepcopy(model.generation_config)
    yield
    model.generation_config = before


def ask(organism, **settings):
    return vlmfix.ask(*organism, PICTURE, "Please describe this image in detail.", **settings)


@pytest.mark.parametrize(
    ("settings", "n"),
    [
        ({"generation_config": GenerationConfig(max_new_tokens=3)}, 3),
        ({"generation_config": GenerationConfig(max_new_tokens=3), "max_new_tokens": 5}, 5),
        ({"generation_config": GenerationConfig(num_beams=2), "max_new_tokens": 4}, 4),
    ],
)
def test_keywords_then_the_configuration_given_then_the_defaults(organism, settings, n):
    record = ask(organism, **settings)
    assert len(record.token_ids) == n == record.generation["max_new_tokens"]
    assert record.generation["do_sample"] is False


def test_a_length_that_counts_the_prompt_goes_before_the_default(organism):
    n_prompt = Asker(*organism).inputs(QUESTIONS[:1])["input_ids"].shape[1]
    record = vlmfix.ask(*organism, *QUESTIONS[0], max_length=n_prompt + 1)
    assert len(record.token_ids) == 1 == record.generation["max_new_tokens"]


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 1.3},
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_scores": True},
        {"num_beams": 2},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": [2, 5]},
        {"temperature": 0.3, "top_p": 0.9},
        {"suppress_tokens": [5, 6]},
    ],
)
def test_a_models_own_settings_work_and_are_recorded(organism, own):
    model, _ = organism
    before = ask(organism, max_new_tokens=12).generation
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    record = ask(organism, max_new_tokens=12)
    unheard = "temperature" in own  # greedy decoding
    assert record.generation == (before if unheard else {**before, **own})
    assert ask(organism, **record.generation).text == record.text, "the settings recorded give the answer again"
    together = vlmfix.ask_batch(*organism, QUESTIONS, max_new_tokens=4)
    assert [r.text for r in together] == [vlmfix.ask(*organism, *q, max_new_tokens=4).text for q in QUESTIONS]


def test_several_answers_are_refused_before_the_work(organism):
    with pytest.raises(ValueError, match="num_return_sequences: expected 1"):
        ask(organism, do_sample=True, num_return_sequences=3)
    organism[0].generation_config.num_return_sequences = 2
    with pytest.raises(ValueError, match="num_return_sequences"):  # transformers' own sentence
        ask(organism, num_beams=2)


def test_a_tokenizer_without_padding_token(organism, monkeypatch):
    model, processor = organism
    want = vlmfix.ask(model, processor, *QUESTIONS[0]).text
    monkeypatch.setattr(processor.tokenizer, "_special_tokens_map", {**processor.tokenizer._special_tokens_map})
    processor.tokenizer.pad_token = None
    assert vlmfix.ask(model, processor, *QUESTIONS[0]).text == want
    with pytest.raises(ValueError, match="no padding token"):
        vlmfix.ask_batch(model, processor, QUESTIONS)
