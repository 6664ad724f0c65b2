"""A model, its processor and methods, ready to be asked."""

import json
from pathlib import Path

import pytest
import torch

import vlmfix
from tests.contract.test_contract import footprint
from vlmfix.asking.asker import Asker, ask_in_turns
from vlmfix.engine.attachment import attached
from vlmfix.hooks import Lookback

PICTURES = sorted((Path(__file__).parents[2] / "assets" / "organism" / "test" / "images").iterdir())[:2]
DESCRIBE = "Describe this image in detail."
STRONG = "pai:alpha=4"
"""Changes answers."""


@pytest.fixture(scope="module")
def organism():
    loaded = vlmfix.load("organism")
    vlmfix.ask(*loaded, PICTURES[0], DESCRIBE, max_new_tokens=1)  # transformers itself leaves something on first use
    return loaded


def answers(records):
    return [(record.token_ids, record.passes, record.tokens, record.method, record.effects) for record in records]


@pytest.mark.parametrize("spec", ["none", "vhr", "pai:alpha=0.2", "truncate:words=3", "carve:captions=true"])
def test_answers_are_those_of_the_wrapped_model(organism, spec):
    model, processor = organism
    before = footprint(model)
    questions = [(picture, DESCRIBE) for picture in PICTURES]
    asker = Asker(model, processor, spec)
    assert footprint(model) == before, "nothing is put on before it is asked"
    records = asker.ask_batch(questions, max_new_tokens=12)
    assert footprint(model) == before, "and all is off again"
    vlmfix.wrap(model, spec, processor)
    wanted = vlmfix.ask_batch(model, processor, questions, max_new_tokens=12)
    whole_effects = vlmfix.effects(model)
    vlmfix.unwrap(model)
    assert answers(records) == answers(wanted)
    assert [record.method for record in records] == [asker.methods] * 2
    assert asker.effects() == whole_effects
    assert answers([asker.ask(PICTURES[0], DESCRIBE, max_new_tokens=12)])[0][0] == records[0].token_ids


def test_it_asks_its_own_methods_whatever_the_model_is_wrapped_with(organism):
    model, processor = organism
    untouched = Asker(model, processor).ask(PICTURES[0], DESCRIBE, max_new_tokens=20)
    vhr = Asker(model, processor, STRONG).ask(PICTURES[0], DESCRIBE, max_new_tokens=20)
    assert untouched.token_ids != vhr.token_ids and untouched.method == [] and untouched.effects == []
    vlmfix.wrap(model, STRONG, processor)
    try:
        wrapping = attached(model)
        assert Asker(model, processor).ask(PICTURES[0], DESCRIBE, max_new_tokens=20).token_ids == untouched.token_ids
        assert Asker(model, processor, "none").can_share({"max_new_tokens": 1})
        assert attached(model) is wrapping, "as it was"
        of_wrapped = Asker.of_wrapped(model, processor)
        assert of_wrapped.ask(PICTURES[0], DESCRIBE, max_new_tokens=20).token_ids == vhr.token_ids
        assert of_wrapped.methods == vhr.method
    finally:
        vlmfix.unwrap(model)


def test_it_knows_who_answers(organism):
    model, processor = organism
    identity = Asker(model, processor, "vhr").identity
    assert json.loads(json.dumps(identity)) == identity and identity["model"] == "organism"
    assert identity["method"][0]["name"] == "vhr" and identity["template"] == processor.chat_template
    assert len(identity["weights_digest"]) == 16 and identity["dtype"] == "float32"
    other = Asker(model, processor, "vhr:alpha=2.5").identity
    assert {key for key in identity if identity[key] != other[key]} == {"method"}


def test_idle_methods_have_their_place():
    model, processor = vlmfix.load("organism-qwen")
    with pytest.warns(UserWarning, match="var will not act on this model"):
        asker = Asker(model, processor, "var+pai")
    assert asker.interventions[0] is None and asker.interventions[1].name == "pai"
    assert [method["name"] for method in asker.methods] == ["var", "pai"] and "idle" in asker.methods[0]["facts"]


def test_memos_of_a_monitor_while_it_is_on(organism):
    model, processor = organism
    asker = Asker(model, processor, Lookback())
    with pytest.raises(ValueError, match=r"expected a question asked inside `with asker.applied\(\):`"):
        asker.memos()
    with asker.applied() as applied:
        assert applied is model
        records = asker.ask_batch([(picture, DESCRIBE) for picture in PICTURES], max_new_tokens=6)
        (memo,) = asker.memos()
        (monitor,) = asker.interventions
        ratios = monitor.ratios(memo)
    assert len(ratios) == 2 and ratios.shape[1] == max(len(record.token_ids) for record in records)
    with pytest.raises(ValueError, match="no memos"):
        asker.memos()


def test_one_pass_over_inputs(organism):
    model, processor = organism
    inputs = Asker(model, processor).inputs([(PICTURES[0], DESCRIBE)])
    untouched, memos = Asker(model, processor).forward(inputs)
    assert memos == []
    with torch.no_grad():
        assert torch.equal(untouched.logits, model(**inputs, use_cache=False).logits)
    monitored, (memo,) = Asker(model, processor, Lookback()).forward(inputs)
    assert torch.equal(monitored.logits, untouched.logits) and memo
    edited, _ = Asker(model, processor, STRONG).forward(inputs)
    assert not torch.allclose(edited.logits, untouched.logits, atol=1e-2)
    assert not edited.logits.requires_grad and attached(model) is None


def test_askers_take_turns_over_one_pass(organism):
    model, processor = organism
    questions = [(PICTURES[0], f"Is there a {name} in the image?") for name in ("person", "dog", "car")]
    askers = [Asker(model, processor, spec) for spec in ("none", "pai:alpha=0.2", "pai:alpha=0.4")]
    in_turns = ask_in_turns(askers, questions, max_new_tokens=4)
    alone = [asker.ask_batch(questions, max_new_tokens=4, share=False) for asker in askers]
    tokens = [[[record.token_ids for record in records] for records in way] for way in (in_turns, alone)]
    assert tokens[0] == tokens[1]
    assert in_turns[0][0].tokens < alone[0][0].tokens
    # a method that edits the rows of the picture cannot join: each then makes a pass of its own
    mixed = ask_in_turns([askers[0], Asker(model, processor, "vhr")], questions, max_new_tokens=4)
    assert [record.token_ids for record in mixed[0]] == tokens[0][0]


@pytest.mark.parametrize("spec", ["vhrr", "vhr:alhpa=2"])
def test_unknown_methods_and_settings_are_told_with_a_hint(organism, spec):
    before = footprint(organism[0])
    with pytest.raises(ValueError, match="did you mean"):
        Asker(*organism, spec)
    assert footprint(organism[0]) == before
    with pytest.raises(TypeError, match="expected a transformers vision-language model"):
        Asker(torch.nn.Linear(2, 2), None, "vhr")
