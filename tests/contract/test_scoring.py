"""An answer scored in one forward pass has the probabilities that it has token by token, or the method refuses."""

import warnings

import pytest
import torch

import vlmfix
from tests.contract.examples import INTERVENTIONS, STEPWISE
from tests.contract.test_contract import CASES, GUIDES, answer, build
from tests.models import picture_prompt

N_TOKENS = 5


def log_probabilities(logits, tokens):
    """(B,) of answers (B, T)."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].sum(1)


def whole(prompt, tokens):
    """Inputs of prompt and answer together."""
    inputs = {**prompt, "input_ids": torch.cat([prompt["input_ids"], tokens], dim=1)}
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in prompt:
            filler = torch.full_like(tokens, int(name == "attention_mask")).to(prompt[name].dtype)
            inputs[name] = torch.cat([prompt[name], filler], dim=1)
    return inputs


def labels_of(inputs, n):
    labels = inputs["input_ids"].clone()
    labels[:, :n] = -100
    return labels


WAYS = {
    "prompt_end": lambda model, inputs, n: model(**inputs, prompt_end=n),
    "labels": lambda model, inputs, n: model(**inputs, labels=labels_of(inputs, n)),
    "forward": lambda model, inputs, n: model.forward(**inputs, labels=labels_of(inputs, n)),
}


@pytest.mark.parametrize(("method", "architecture", "attn"), CASES)
@torch.no_grad()
def test_scored_in_one_pass_as_token_by_token(method, architecture, attn):
    model = build(architecture, attn)
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    n = prompt["input_ids"].shape[1]
    tokens = torch.tensor([[5, 9, 14, 7, 30], [8, 4, 40, 21, 6]])
    with INTERVENTIONS[method](model):
        if method in GUIDES | STEPWISE:
            for way in WAYS.values():
                with pytest.raises(ValueError, match=f"{method} .*in one forward pass"):
                    way(model, whole(prompt, tokens), n)
            return
        out = answer(
            model, prompt, max_new_tokens=N_TOKENS, output_logits=True, return_dict_in_generate=True,
            prefix_allowed_tokens_fn=lambda b, ids: [int(tokens[b, len(ids) - n])], suppress_tokens=None,
        )  # fmt: skip
        assert torch.equal(out.sequences[:, n:], tokens)
        want = log_probabilities(torch.stack(out.logits, dim=1), tokens)
        effects = vlmfix.effects(model)[0]["samples"]
        for name, way in WAYS.items():
            logits = way(model, whole(prompt, tokens), n).logits
            got = log_probabilities(logits[:, n - 1 : -1], tokens)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
            assert [s["acted"] for s in vlmfix.effects(model)[0]["samples"]] == [s["acted"] for s in effects]


@pytest.mark.parametrize("method", [name for name in INTERVENTIONS if name not in GUIDES | STEPWISE])
@torch.no_grad()
def test_a_loop_by_hand_without_cache(method):
    """Everything again for each token, with the end of the prompt told: as `generate(use_cache=False)`."""
    model = build("llava")
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    n = prompt["input_ids"].shape[1]
    with INTERVENTIONS[method](model):
        settings = {"use_cache": False, "output_logits": True, "return_dict_in_generate": True}
        out = answer(model, prompt, max_new_tokens=4, **settings)
        for step, logits in enumerate(out.logits):
            inputs = whole(prompt, out.sequences[:, n : n + step])
            by_hand = model(**inputs, prompt_end=n, use_cache=False).logits[:, -1]
            torch.testing.assert_close(by_hand, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["pai", "act", "vhr"])
@torch.no_grad()
def test_an_answer_scored_on_the_cache_of_its_prompt(method):
    """One picture, several candidate answers: each goes on from a copy of the prompt's cache."""
    model = build("llava")
    prompt, tokens = picture_prompt(model), torch.tensor([[5, 9, 14, 7]])
    n = prompt["input_ids"].shape[1]
    with INTERVENTIONS[method](model):
        want = model(**whole(prompt, tokens), prompt_end=n).logits[:, n:]
        cache = model(**prompt, use_cache=True).past_key_values
        rest = {"input_ids": tokens, "past_key_values": cache, "labels": tokens}
        torch.testing.assert_close(model(**rest).logits, want, rtol=1e-4, atol=1e-4)


def test_ends_that_cannot_be_are_refused():
    model = build("llava")
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    n = prompt["input_ids"].shape[1]
    ragged = labels_of(prompt, n - 2)
    ragged[0, n - 2] = -100
    refused = {
        "begin in different columns": {"labels": ragged},
        "before the picture ends": {"labels": prompt["input_ids"]},
        "prompt_end: expected the number of columns": {"prompt_end": 0},
        "got 2.5": {"prompt_end": 2.5},
        "before the picture": {"prompt_end": 6},
    }
    with INTERVENTIONS["pai"](model):
        for sentence, arguments in refused.items():
            with pytest.raises(ValueError, match=sentence):
                model(**prompt, **arguments)


def test_a_forward_pass_says_once_that_guidance_is_not_in_it():
    model = build("llava")
    prompt = picture_prompt(model)
    with INTERVENTIONS["vcd"](model):
        with pytest.warns(UserWarning, match="vcd acts where generate chooses a token"):
            model(**prompt)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**prompt)
            answer(model, prompt)
