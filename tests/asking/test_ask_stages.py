"""The contract of methods that act in `ask`: they refine pictures before the answer, or decode in their own way."""

import copy
import json
import warnings
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path

import pytest
import torch

import vlmfix
from tests.contract.test_contract import footprint
from vlmfix.hooks import CARVE, REGISTRY, Beam, Chunks, Rerank, Truncate
from vlmfix.method.intervention import Intervention
from vlmfix.method.registry import from_json, method_class
from vlmfix.method.stages import ASK_STAGES

SCENES = Path(__file__).parents[2] / "assets" / "organism" / "test" / "images"
PICTURES = [str(SCENES / f"test_{n:04d}.webp") for n in (1, 58, 77)]
DESCRIBE = "Please describe this image in detail."
INTERVENTIONS = {
    "beam": (Beam(n=3), DESCRIBE),
    "carve": (CARVE(), "Is there a car in the image?"),
    "chunks": (Chunks(c=6, k=2), DESCRIBE),
    "rerank": (Rerank(n=2), DESCRIBE),
    "truncate": (Truncate(words=9), DESCRIBE),
}
"""Each with a prompt on which it bites."""


def plain(record):
    return replace(record, seconds=0.0, batch_size=0, passes=0, tokens=0)


def test_every_method_is_under_contract():
    assert set(INTERVENTIONS) == {n for n in REGISTRY if set(ASK_STAGES) & set(method_class(n).stages())}


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_bites_and_comes_off(organism, method):
    one, prompt = INTERVENTIONS[method]
    model, processor = organism
    said = vlmfix.ask(model, processor, PICTURES[1], prompt, max_new_tokens=48)
    before = footprint(model)
    vlmfix.wrap(model, one)
    records = [vlmfix.ask(model, processor, p, prompt, max_new_tokens=48) for p in PICTURES]
    assert any(r.effects[0]["acted"] for r in records)
    assert records[1].effects[0]["acted"] is not False and records[1].method[0]["name"] == method
    again = [vlmfix.ask(model, processor, p, prompt, max_new_tokens=48) for p in PICTURES]
    assert [plain(r) for r in again] == [plain(r) for r in records], "nothing leaks from one picture to the next"
    assert json.loads(records[1].to_json())["effects"] == records[1].effects, "JSON all through"
    vlmfix.unwrap(model)
    assert footprint(model) == before
    assert plain(vlmfix.ask(model, processor, PICTURES[1], prompt, max_new_tokens=48)) == plain(said)


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_batch_equals_singles(organism, method):
    one, prompt = INTERVENTIONS[method]
    model, processor = organism
    other = "Is there a person in the image?" if "?" in prompt else "Please describe the image."
    questions = [(PICTURES[0], prompt), (PICTURES[1], other), (PICTURES[2], prompt)]
    with one(model):
        batch = vlmfix.ask_batch(model, processor, questions, max_new_tokens=24)
        singles = [vlmfix.ask(model, processor, *q, max_new_tokens=24) for q in questions]
    assert [(r.text, r.token_ids, r.finish) for r in batch] == [(r.text, r.token_ids, r.finish) for r in singles]


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_comes_off_after_an_exception_and_plain_generate_warns(organism, method, monkeypatch):
    one, prompt = INTERVENTIONS[method]
    model, processor = organism
    before, forward = footprint(model), type(model).forward

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    with one(model), monkeypatch.context() as patch:
        patch.setattr(model.get_decoder().layers[3].mlp, "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            vlmfix.ask(model, processor, PICTURES[0], prompt)
    assert footprint(model) == before and type(model).forward is forward
    inputs = processor(
        text="USER: <image>\nhi ASSISTANT:",
        images=vlmfix.asking.pictures.open_picture(PICTURES[0]),
        return_tensors="pt",
    )
    want = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with one(model), pytest.warns(UserWarning, match=f"{method} acts in vlmfix.ask only"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), want)


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_settings_are_frozen_and_round_trip_and_copies_work(organism, method):
    one, prompt = INTERVENTIONS[method]
    with pytest.raises(FrozenInstanceError):
        one.name = "other"
    assert from_json(json.loads(json.dumps(one.to_json()))) == one
    model, processor = organism
    with one(model):
        want = plain(vlmfix.ask(model, processor, PICTURES[1], prompt, max_new_tokens=24))
        for twin in (copy.deepcopy(model),):
            assert plain(vlmfix.ask(twin, processor, PICTURES[1], prompt, max_new_tokens=24)) == want


def test_truncation_cuts_words_and_no_more(organism):
    model, processor = organism
    whole = vlmfix.ask(model, processor, PICTURES[1], DESCRIBE)
    for words in (1, 5, 12):
        with Truncate(words=words)(model):
            cut = vlmfix.ask(model, processor, PICTURES[1], DESCRIBE)
        assert len(cut.text.split()) == words and whole.text.startswith(cut.text) and cut.effects == [{"acted": True}]
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    with Truncate(words=999)(model):
        same = vlmfix.ask(model, processor, PICTURES[1], DESCRIBE)
    assert same.token_ids == whole.token_ids and same.effects == [{"acted": False}]


def test_beam_is_beam_search_and_composes(organism):
    model, processor = organism
    for inner in ((), ("vhr",)):
        with_inner = [*inner, Beam(n=3)]
        vlmfix.wrap(model, list(inner))
        want = vlmfix.ask(model, processor, PICTURES[1], DESCRIBE, num_beams=3)
        vlmfix.wrap(model, with_inner)
        got = vlmfix.ask(model, processor, PICTURES[1], DESCRIBE)
        assert got.text == want.text and got.passes == want.passes > 60
    vlmfix.unwrap(model)


def test_two_that_decode_are_refused(organism):
    model, _ = organism
    with pytest.raises(ValueError, match="beam and truncate each decode in their own way"):
        vlmfix.wrap(model, "beam+truncate")
    assert not vlmfix.effects(model)


def test_a_method_that_refines_reads_in_its_looks_only(organism):
    """Its other stages are in force in its looks, alone; the answer has everyone else's."""
    model, processor = organism
    seen = []

    @dataclass(frozen=True)
    class Peek(Intervention):
        name = "peek"

        def refine(self, look, images, prompt):
            looked = look(images, prompt, 3)
            look.kept["n"] = look.kept.get("n", 0) + 1
            return (
                [images[0].rotate(180)],
                prompt + " Please.",
                {"acted": True, "rows": looked.memo["rows"], "said": looked.text},
            )

        def heads(self, o, site):
            site.memo["rows"] = site.memo.get("rows", 0) + o.shape[1]
            return o * 0.5

    @dataclass(frozen=True)
    class Count(Intervention):
        name = "count"

        def heads(self, o, site):
            seen.append(o.shape[1])
            return o

    questions = [(PICTURES[0], DESCRIBE), (PICTURES[1], DESCRIBE)]
    turned = [[vlmfix.asking.pictures.open_picture(p).rotate(180)] for p, _ in questions]
    want = [vlmfix.ask(model, processor, p, DESCRIBE + " Please.", max_new_tokens=4) for p in turned]
    with vlmfix.engine.wrap.wrapped(model, [Peek(), Count()]):
        got = vlmfix.ask_batch(model, processor, questions, max_new_tokens=4)
        kept = vlmfix.engine.attachment.attached(model).kept[0]
    assert [r.text for r in got] == [r.text for r in want], "edits of the looks do not reach the answer"
    n = len(model.get_decoder().layers)
    assert len(seen) == 4 * n and kept == {"n": 2}
    assert all(r.effects[0]["rows"] > 3 * n and r.effects[1] == {"acted": False} for r in got)
    assert [(r.image, r.prompt) for r in got] == [([p], prompt) for p, prompt in questions], "as it was asked"
    assert got[0].passes == 3 + 4


def test_the_record_counts_every_pass(organism):
    model, processor = organism

    def cost(method, **settings):
        with vlmfix.engine.wrap.wrapped(model, method):
            r = vlmfix.ask(model, processor, PICTURES[1], DESCRIBE, max_new_tokens=5, **settings)
        return r.passes, r.tokens

    image = 100
    passes, tokens = cost(None)
    prompt = int(tokens) - 4
    assert passes == 5 and prompt > image
    assert cost("vhr") == (6, tokens + prompt - image)
    assert cost("contrast") == (10, 2 * tokens - image)
    assert cost("vcd") == (10, 2 * tokens)
    assert cost("beam:n=3") == (15, 3 * tokens)
    with vlmfix.engine.wrap.wrapped(model, None):
        batch = vlmfix.ask_batch(model, processor, [(p, DESCRIBE) for p in PICTURES], max_new_tokens=5)
    assert {(r.passes, r.tokens) for r in batch} == {(passes, tokens)}


IDLE = {
    "carve:variant=vicrop": ("What is this?", "carve did nothing in a whole answer: no part of the pictures was cut"),
    "truncate:words=99": (DESCRIBE, "truncate did nothing in a whole answer: no answer has more than 99 words"),
    "chunks:k=2,temperature=0.001": (DESCRIBE, "chunks did nothing in a whole answer: the candidates"),
    "rerank:verifier=self,hi=0,lo=0,greedy_first=true": (
        DESCRIBE,
        "rerank did nothing in a whole answer: the verifier self found no",
    ),
}
"""Settings under which a method of `ask` never acts."""


@pytest.mark.parametrize("method", IDLE)
def test_a_method_that_never_acts_says_so_once(organism, method):
    prompt, sentence = IDLE[method]
    asker = vlmfix.Asker(*organism, method)
    with asker.applied():
        with pytest.warns(UserWarning, match=sentence):
            record = asker.ask(PICTURES[0], prompt, max_new_tokens=8)
        assert not record.effects[0]["acted"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            asker.ask(PICTURES[0], prompt, max_new_tokens=8)


def test_every_method_of_ask_has_settings_that_never_act():
    always = {"beam"}
    told = {name.partition(":")[0] for name in IDLE}
    assert told == set(INTERVENTIONS) - always
