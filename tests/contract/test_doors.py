"""Every way to call the wrapped weights gives what `generate` gives, or says once that it does not; and every object
that holds the weights sees the one attachment."""

import copy
import warnings

import pytest
import torch

import vlmfix
from tests.contract.examples import INTERVENTIONS
from tests.contract.test_contract import GUIDES, PAIRS, answer, build, footprint
from tests.models import picture_prompt

N_TOKENS = 3


def head(model, output):
    return model.lm_head(output.last_hidden_state)


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).eval()


def compiled(model):
    return torch.compile(model, backend="eager")


DOORS = {
    "call": lambda model, **inputs: model(**inputs),
    "forward": lambda model, **inputs: model.forward(**inputs),
    "positional": lambda model, input_ids, **inputs: model.forward(input_ids, **inputs),
    "tuple": lambda model, **inputs: model(**inputs, return_dict=False),
    "headless": lambda model, **inputs: model.base_model(**inputs),
    "headless forward": lambda model, **inputs: model.base_model.forward(**inputs),
}
COPIES = {"cache": lambda cache: cache, "copied cache": copy.deepcopy}


def by_hand(model, door, copied, prompt):
    """Logits of the tokens of a loop by hand, (N_TOKENS, V), greedy without special tokens."""
    inputs, rows = {**prompt, "use_cache": True}, []
    for _ in range(N_TOKENS):
        output = door(model, **inputs)
        if isinstance(output, tuple):
            logits, cache = output[0], output[1]
        else:
            logits = output.logits if "logits" in output else head(model, output)
            cache = output.past_key_values
        rows.append(logits[0, -1])
        token = rows[-1].clone()
        token[[58, 59, 60, 61]] = -torch.inf
        inputs = {"input_ids": token.argmax()[None, None], "past_key_values": copied(cache), "use_cache": True}
    return torch.stack(rows)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("method", "architecture"), [pair for pair in PAIRS if pair[0] not in GUIDES])
@torch.no_grad()
def test_every_door_gives_what_generate_gives(method, architecture, door):
    model = build(architecture)
    prompt = picture_prompt(model)
    with INTERVENTIONS[method](model):
        out = answer(model, prompt, max_new_tokens=N_TOKENS, output_logits=True, return_dict_in_generate=True)
        acted = vlmfix.effects(model)[0]["samples"]
        for copied in COPIES.values():
            rows = by_hand(model, DOORS[door], copied, prompt)
            torch.testing.assert_close(rows, torch.stack(out.logits)[:, 0], rtol=1e-4, atol=1e-4)
            assert [s["acted"] for s in vlmfix.effects(model)[0]["samples"]] == [s["acted"] for s in acted]


@pytest.mark.parametrize("method", sorted(GUIDES))
def test_a_copied_cache_takes_its_streams_along(method):
    """The copy and the original go on one after the other, as if each were alone."""
    model = build("llava")
    prompt = picture_prompt(model)
    with INTERVENTIONS[method](model):
        first = answer(model, prompt, max_new_tokens=2, return_dict_in_generate=True)
        further = {"input_ids": torch.cat([first.sequences, torch.tensor([[5, 8]])], dim=1)}
        copied = copy.deepcopy(first.past_key_values)
        alone = answer(model, further, max_new_tokens=4, past_key_values=first.past_key_values)
        assert torch.equal(answer(model, further, max_new_tokens=4, past_key_values=copied), alone)


@pytest.mark.parametrize("method", [name for name in INTERVENTIONS if name not in GUIDES])
def test_a_part_that_cannot_know_the_image_says_once_that_nothing_is_in_force(method):
    model = build("llava")
    embeds = torch.randn(1, 5, 48)
    plain = model.get_decoder()(inputs_embeds=embeds).last_hidden_state
    with INTERVENTIONS[method](model):
        with pytest.warns(UserWarning, match=f"{method} is not in force in this pass"):
            part = model.get_decoder()(inputs_embeds=embeds).last_hidden_state
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.get_decoder()(inputs_embeds=embeds)
    assert torch.equal(part, plain)


@pytest.mark.parametrize("method", ["pai", "vhr", "vcd"])
def test_passes_in_which_edits_would_go_wrong_are_refused(method):
    model = build("llava")
    prompt = picture_prompt(model)
    with INTERVENTIONS[method](model):
        with pytest.raises(ValueError, match="packed into one row"):
            model(**prompt, cu_seq_lens_q=torch.tensor([0, 3, 5]))
        model.gradient_checkpointing_enable()
        model(**prompt)  # nothing is checkpointed in evaluation
        model.train()
        with pytest.raises(ValueError, match="gradient checkpointing"):
            model(**prompt)


@pytest.mark.parametrize("method", ["pai", "vhr", "contrast"])
@pytest.mark.parametrize("around", [lora, compiled], ids=["adapters", "compiled"])
def test_one_attachment_from_every_object(around, method):
    """Wrap by one object, look and unwrap by the other: one attachment, and nothing acts twice."""
    model = build("llava")
    prompt = picture_prompt(model)
    plain = answer(model, prompt, output_scores=True, return_dict_in_generate=True).scores[1]
    with INTERVENTIONS[method](model):
        edited = answer(model, prompt, output_scores=True, return_dict_in_generate=True).scores[1]
    outer = around(model)
    before = footprint(model)
    for one, other in ((outer, model), (model, outer)):
        assert vlmfix.wrap(one, INTERVENTIONS[method]) is one
        vlmfix.wrap(other, INTERVENTIONS[method])
        for handle in (one, other):
            scores = answer(handle, prompt, output_scores=True, return_dict_in_generate=True).scores[1]
            torch.testing.assert_close(scores, edited, rtol=1e-4, atol=1e-4)
            assert [effect["name"] for effect in vlmfix.effects(handle)] == [method]
        vlmfix.unwrap(other)
        assert vlmfix.effects(one) == [] and footprint(model) == before
        scores = answer(one, prompt, output_scores=True, return_dict_in_generate=True).scores[1]
        torch.testing.assert_close(scores, plain, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("method", ["pai", "vhr"])
def test_merged_adapters_leave_the_attachment_in_reach(method):
    model = build("llava")
    prompt = picture_prompt(model)
    with torch.no_grad():
        plain = model(**prompt).logits
        adapted = lora(model)
        vlmfix.wrap(adapted, INTERVENTIONS[method])
        edited = adapted(**prompt).logits
        whole = adapted.merge_and_unload()
        assert [effect["name"] for effect in vlmfix.effects(whole)] == [method]
        torch.testing.assert_close(whole(**prompt).logits, edited, rtol=1e-4, atol=1e-4)
        vlmfix.unwrap(whole)
        torch.testing.assert_close(whole(**prompt).logits, plain, rtol=1e-4, atol=1e-4)
