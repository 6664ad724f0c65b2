"""The fix file: methods that are chosen for one model come on to it, by path, and to no other."""

import json

import pytest

import vlmfix
from vlmfix.asking.fix import FixFile, inlined
from vlmfix.eval.benchmarks.benchmark import benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run.controls import controls_of
from vlmfix.eval.run.runner import answer_all
from vlmfix.method.heads import picture_id
from vlmfix.method.registry import from_json, parse, spec_of

SCENE = "assets/organism/test/images/test_0001.webp"


@pytest.fixture(scope="module")
def fix(organism, tmp_path_factory):
    """A fix for the embedded model, whose methods list heads by file."""
    methods = inlined(["headgain:head_list=visual16,gain=2", "var:p=0.9"], *organism)
    who = vlmfix.Asker(*organism).identity
    pictures = tuple(picture_id(path) for path in list(Data.load("organism").images.values())[:3])
    path = tmp_path_factory.mktemp("fix") / "fix.json"
    FixFile(methods, who, pictures=pictures).save(path)
    return str(path)


def test_a_fix_is_its_methods(organism, unwrapped, fix):
    question = (SCENE, "Please describe this image.")
    by_name = vlmfix.Asker(*organism, "headgain:head_list=visual16,gain=2+var:p=0.9").ask(*question, max_new_tokens=12)
    model, processor = organism
    vlmfix.wrap(model, fix, processor)
    by_fix = vlmfix.ask(model, processor, *question, max_new_tokens=12)
    assert by_fix.token_ids == by_name.token_ids
    assert [method["name"] for method in by_fix.method] == ["headgain", "var"]
    assert "L6H1" in by_fix.method[0]["head_list"], "heads by name: the file holds all that it needs"
    assert all(effect["acted"] for effect in by_fix.effects)


def test_a_fix_reads_back_as_text_and_json(fix):
    methods = parse(f"{fix}+pai")
    assert spec_of(methods) == f"{fix}+pai"
    assert tuple(from_json(method.to_json()) for method in methods) == methods
    controls = [spec_of(control) for control in controls_of(parse(fix))]
    assert controls and not any(fix in control for control in controls), "a changed fix is no longer the file's"
    assert FixFile.from_json(FixFile.load(fix).to_json()) == FixFile.load(fix)


def test_a_fix_of_another_model_is_refused(organism, fix, tmp_path):
    model, processor = organism
    bias = model.lm_head.weight.data
    kept = bias[0, 0].item()
    bias[0, 0] += 1
    try:
        with pytest.raises(ValueError, match=r"made for organism, and this model \(organism\) has another weights;"):
            vlmfix.wrap(model, fix)
    finally:
        bias[0, 0] = kept
    template = processor.chat_template
    processor.chat_template = template + " "
    try:
        with pytest.raises(ValueError, match="another chat template, processor; make a fix for it"):
            vlmfix.wrap(model, fix, processor)
    finally:
        processor.chat_template = template
    from vlmfix.engine.attachment import attached

    assert attached(model) is None


def test_a_fix_is_not_judged_by_its_own_pictures(organism, fix, tmp_path):
    data = Data.load("organism", limit=2)
    with pytest.raises(ValueError, match=r"fix.json was made on 2 of the 2 pictures"):
        answer_all(*organism, parse(fix), benchmark("chair"), data, tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "other/1"}, "expected a fix of format 'vlmfix.fix/1'"),
        ({"methods": []}, "the fix lacks methods"),
        ({"methods": [{"name": "vaar"}]}, "unknown method 'vaar'; did you mean 'var'"),
        ({"methods": [{"name": "var", "p": 7}]}, "p: expected a number in 0..1"),
        ({"methods": ["var"]}, "the fix cannot be read"),
    ],
)
def test_broken_fixes_are_refused(fix, tmp_path, change, sentence):
    data = {**FixFile.load(fix).to_json(), **change}
    (tmp_path / "broken.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=sentence):
        parse(str(tmp_path / "broken.json"))


def test_what_a_fix_cannot_hold(organism, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the fix none\.json"):
        parse("none.json")
    (tmp_path / "detector.json").write_text("{}")
    with pytest.raises(ValueError, match="names a file, which a fix cannot hold"):
        inlined([f"lookback:detector={tmp_path / 'detector.json'}"], *organism)
