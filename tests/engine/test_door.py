"""What stands in the place of a model's own methods goes off whole, whoever has put something around it since."""

import functools
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import vlmfix
from tests.contract.examples import INTERVENTIONS
from tests.contract.test_contract import answer, build, footprint, logits
from tests.models import picture_prompt
from vlmfix.engine.door import Door


def doors_of(model):
    """Doors that are within reach from a model's modules, also inside of functions put around them."""
    found = []
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Door):
                found.append((name, attribute))
    return found


@pytest.mark.parametrize("method", ["pai", "vhr", "vcd"])
@pytest.mark.parametrize("where", ["", "model"], ids=["the model", "its part without the head"])
def test_hooks_of_accelerate_that_came_later_keep_no_door(method, where):
    model = build("llava")
    prompt = picture_prompt(model)
    plain, before = logits(model, prompt), footprint(model)
    vlmfix.wrap(model, INTERVENTIONS[method])
    edited = answer(model, prompt)
    module = model.get_submodule(where)
    add_hook_to_module(module, ModelHook(), append=True)
    assert torch.equal(answer(model, prompt), edited)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vlmfix.unwrap(model)
    assert doors_of(model) == [] and torch.equal(logits(model, prompt), plain)
    vlmfix.wrap(model, INTERVENTIONS[method])
    assert torch.equal(answer(model, prompt), edited), "wrapped once more, under the hook"
    vlmfix.unwrap(model)
    remove_hook_from_module(module)
    module.__dict__.pop("forward")  # accelerate leaves the bound method there
    assert footprint(model) == before


def test_a_door_that_cannot_be_taken_out_is_said_and_does_nothing():
    model = build("llava")
    prompt = picture_prompt(model)
    plain = logits(model, prompt)
    vlmfix.wrap(model, INTERVENTIONS["pai"])
    edited = answer(model, prompt)
    model.forward = functools.partial(model.forward)
    with pytest.warns(UserWarning, match=r"forward was replaced while methods were in force.*does nothing"):
        vlmfix.unwrap(model)
    assert torch.equal(logits(model, prompt), plain)
    with INTERVENTIONS["pai"](model):
        assert torch.equal(answer(model, prompt), edited)
    assert torch.equal(logits(model, prompt), plain)


def test_a_model_that_knows_no_method_is_open():
    """Doors that refuse are gone after unwrap, and copies of a model have doors of their own."""
    model = build("llava")
    with INTERVENTIONS["pai"](model):
        for call in (model._replicate_for_data_parallel, model.init_continuous_batching):
            with pytest.raises(ValueError, match="pai cannot act in"):
                call()
    assert doors_of(model) == []
    assert type(model._replicate_for_data_parallel()) is type(model)
