"""ICD's second stream against plain passes over the disturbed prompt, and its rule by hand."""

import math

import pytest
import torch

import vlmfix
from tests.contract.test_contract import answer, build
from tests.models import ARCHITECTURES, IMAGE, picture_prompt
from vlmfix.hooks import ICD

WORDS = (5, 8, 13)


def disturbed(model, prompt, place):
    """The prompt of one sample with the words put in by hand; the first token of these prompts begins texts."""
    ids = prompt["input_ids"][0].tolist()
    at = 1 if place == "start" else max(i for i, token in enumerate(ids) if token == IMAGE) + 1
    ids = torch.tensor([ids[:at] + list(WORDS) + ids[at:]])
    more = {"mm_token_type_ids": (ids == IMAGE).int()} if "mm_token_type_ids" in prompt else {}
    return {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


@pytest.mark.parametrize("place", ["start", "question"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_second_stream_is_the_disturbed_prompt(architecture, place):
    """Token by token: (1 + alpha) c - alpha u, with u from generations of the plain model that are forced to the answer."""
    model = build(architecture)
    prompt = picture_prompt(model)
    settings = {"max_new_tokens": 4, "output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    with ICD(words=WORDS, place=place, alpha=0.7, beta=1e-30)(model):
        out = answer(model, prompt, **settings)
    said = out.sequences[0, prompt["input_ids"].shape[1] :].tolist()
    other = disturbed(model, prompt, place)
    n = other["input_ids"].shape[1]
    forced = answer(
        model, other, prefix_allowed_tokens_fn=lambda b, ids: [said[len(ids) - n]], suppress_tokens=None, **settings
    )
    for scores, c, u in zip(out.scores, out.logits, forced.logits, strict=True):
        seen = scores.isfinite()
        want = (1.7 * c - 0.7 * u).masked_fill(~seen, -math.inf).log_softmax(-1)
        torch.testing.assert_close(scores[seen], want[seen], rtol=1e-3, atol=1e-3)


def test_a_prompt_given_as_embeddings_is_disturbed_alike():
    model = build("llava")
    prompt = picture_prompt(model)
    mask = prompt["input_ids"] == IMAGE
    embeds = model.get_input_embeddings()(prompt["input_ids"]).detach()
    embeds[mask] = model.get_image_features(pixel_values=prompt["pixel_values"]).pooler_output[0].detach()
    settings = {"max_new_tokens": 3, "output_scores": True, "return_dict_in_generate": True}
    with ICD(words=WORDS, place="question", beta=1e-4)(model):
        want = answer(model, prompt, **settings).scores
        given = {"inputs_embeds": embeds, "attention_mask": prompt["attention_mask"], "image_mask": mask}
        out = answer(model, given, **settings).scores
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_the_sentence_comes_from_the_processor(organism, unwrapped):
    model, processor = organism
    with pytest.raises(ValueError, match=r"icd puts a sentence into the prompt, .* give wrap processor="):
        vlmfix.wrap(model, "icd")
    with pytest.raises(ValueError, match="words: expected at least one token id"):
        vlmfix.wrap(model, ICD(words=()))
    vlmfix.wrap(model, "icd:role=general", processor)
    (told,) = vlmfix.effects(model)
    assert "general overview" in told["facts"]["sentence"] and len(told["words"]) > 3


def test_controls_and_identity():
    model = build("llava")
    prompt = picture_prompt(model)
    assert ICD().controls() == (ICD(alpha=0.0),) and ICD(alpha=0.0).controls() == ()
    plain = answer(model, prompt)
    with ICD(words=WORDS, alpha=0.0, beta=1e-30)(model):
        assert torch.equal(answer(model, prompt), plain)
