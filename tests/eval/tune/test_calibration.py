"""Heads and settings chosen by yes/no questions: what is measured, how it is chosen, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vlmfix
from vlmfix.cli import app
from vlmfix.eval.benchmarks.benchmark import benchmark
from vlmfix.eval.benchmarks.pope_building import ordered_objects
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run.runner import answer_all
from vlmfix.eval.tune import zerotuning
from vlmfix.eval.tune.act import calibrate_act
from vlmfix.eval.tune.questions import Openings, Questions, openings
from vlmfix.eval.tune.tool import Subject
from vlmfix.eval.tune.zerotuning import calibrate_zerotuning
from vlmfix.hooks import ACT, ZeroTuning
from vlmfix.method.heads import HeadList, picture_id

DATA = Data.load("calibration", 8)
METHOD = ACT(alpha=2.0, beta=0.0, layers=(3,))


@pytest.fixture(scope="module")
def listed(organism):
    return calibrate_act(*organism, METHOD, DATA, batch_size=16)


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_questions_have_their_answers():
    questions = Questions.of(Subject(None, None, DATA))
    objects = dict(ordered_objects(DATA.folder / "instances.json"))
    for item, present in zip(questions.items, questions.present, strict=True):
        asked = item.prompt.removeprefix("Is there a").removeprefix("n").removesuffix(" in the image?").strip()
        assert (asked in objects[item.image.rsplit("/", 1)[1]]) == present
    assert 0 < questions.present.sum() < len(questions.items)
    assert questions.mean(questions.present.astype(float)) == 0.5


@torch.inference_mode()
def test_first_words_are_those_of_an_answer(organism):
    model, processor = organism
    subject = Subject(model, processor, DATA, 16)
    questions = Questions.of(subject)
    methods = [None, ACT(alpha=2.0, beta=0.0, layers=(4,), head_list=((4, 1),))]
    for method, found in zip(methods, openings(subject, questions, "", methods), strict=True):
        for i in (0, 7, 15):
            item = questions.items[i]
            with vlmfix.engine.wrap.wrapped(model, method):
                text = vlmfix.ask(model, processor, item.image, item.prompt, max_new_tokens=1).text
                logits = model(**subject.inputs([item])).logits[0, -1].double()
            p = logits.softmax(-1)
            words = {w: [k for k in range(len(p)) if processor.decode([k]).strip().lower() == w] for w in ("yes", "no")}
            lean = p[words["yes"]].sum().log() - p[words["no"]].sum().log()
            assert found.word[i] == {"yes": 1, "no": -1}.get(text.lower(), 0) != 0
            assert found.lean[i] == pytest.approx(float(lean), abs=1e-3)
            assert found.entropy[i] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-3)


def test_the_score_of_a_head_is_its_gain(organism, listed):
    model, processor = organism
    subject = Subject(model, processor, DATA, 64)
    questions = Questions.of(subject)
    with torch.inference_mode():
        plain, edited = openings(subject, questions, "", [None, replace(METHOD, head_list="L3H6")])
    gain = np.where(questions.present, 1, -1) * (edited.lean - plain.lean)
    want = (gain[questions.present].mean() + gain[~questions.present].mean()) / 2
    assert listed.score((3, 6)) == pytest.approx(want, abs=1e-4) and abs(want) > 1e-3
    assert listed.extra["parts"]["absent"][3][6] == pytest.approx(gain[~questions.present].mean(), abs=1e-4)
    assert {layer for layer, _ in listed.ranking()} == {3} and len(listed.ranking()) == 8, "other layers have no score"
    assert listed.extra["parts"]["present"][0] == [None] * 8
    low, high = (side[3][6] for side in listed.extra["interval"])
    assert low < want < high
    asked = {item.image for item in questions.items}
    assert sorted(listed.data["ids"]) == sorted(map(picture_id, asked)) and listed.data["name"] == "calibration"


def test_a_head_whose_output_nobody_reads_gains_nothing():
    model, processor = vlmfix.load("organism")
    with torch.no_grad():
        model.get_decoder().layers[3].self_attn.o_proj.weight[:, 6 * 16 : 7 * 16] = 0
    found = calibrate_act(model, processor, METHOD, DATA)
    assert found.score((3, 6)) == 0 and any(found.score(head) for head in found.ranking())


def test_a_list_is_used_on_other_pictures_only(organism, listed, tmp_path):
    path = str(tmp_path / "act.json")
    chosen = listed.select(positive=True)
    chosen.save(path)
    bench, method = benchmark("pope"), (replace(METHOD, head_list=path),)
    with pytest.raises(ValueError, match="must not be judged by pictures that they were chosen on"):
        answer_all(*organism, method, bench, DATA, tmp_path)
    (head,) = answer_all(*organism, method, bench, Data.load("organism", 6), tmp_path).header["identity"]["method"]
    assert head["head_list"].count("H") == len(chosen.selected) and head["facts"]["head_list"]["tool"] == "act"


# ---- ZeroTuning's search, on answers made up ------------------------------------------------------------------------


def made_up(monkeypatch, right, entropy=lambda method: 0.5):
    """Answers of a model: `right(method)` is the share of them that is right, the rest are no words at all."""

    def say(subject, questions, label, methods):
        answers = []
        for method in methods:
            place = np.where(questions.present, questions.present.cumsum() - 1, (~questions.present).cumsum() - 1)
            n = np.where(questions.present, questions.present.sum(), (~questions.present).sum())
            good = place < np.round(right(method) * n)
            word = np.where(good, np.where(questions.present, 1, -1), 0)
            answers.append(Openings(word.astype(float), np.full(len(word), entropy(method)), word))
        return answers

    monkeypatch.setattr(zerotuning, "openings", say)


def gamma_of(method):
    return 1.0 if method is None else method.gamma


def numbers_of(method):
    return range(8) if method is None or method.head_list is None else method.head_list


@pytest.mark.parametrize("sign", [1, -1])
def test_the_more_frequent_kind_of_heads_is_listed(organism, monkeypatch, sign):
    """Heads 0-4 like gamma 2 the more the higher their number (or dislike it), 5 and 6 the other way round, 7 neither."""
    effect = np.array([0.02, 0.04, 0.06, 0.08, 0.10, -0.12, -0.14, 0.0])

    def right(method):
        return 0.5 + sign * math.log2(gamma_of(method)) * sum(effect[h] for h in numbers_of(method))

    made_up(monkeypatch, right)
    tuned = calibrate_zerotuning(*organism, ZeroTuning(), Data.load("calibration"), share=0.4, gammas=(0.5, 1.0, 2.0))
    assert (tuned.up, tuned.down) == ((5, 2) if sign == 1 else (2, 5))
    assert sorted({h for _, h in tuned.listed}) == [3, 4] and len(tuned.listed) == 16
    assert tuned.best.heads == "listed" and tuned.best.gamma == (2.0 if sign == 1 else 0.5)
    assert tuned.heads.selected == tuned.listed and tuned.heads.settings["gamma"] == tuned.best.gamma
    assert tuned.best.accuracy == pytest.approx(0.68, abs=0.01) and tuned.best.parsed == tuned.best.accuracy
    assert tuned.best.yes == pytest.approx(0.34, abs=0.01)
    assert len(tuned.trials) == 6 and tuned.heads.score((0, 4)) == pytest.approx(sign * 0.1, abs=0.01)


def test_all_heads_may_be_best_and_ties_go_to_the_untouched_model(organism, monkeypatch):
    made_up(monkeypatch, lambda method: 0.5 + 0.01 * len(list(numbers_of(method))) * (gamma_of(method) == 2))
    tuned = calibrate_zerotuning(*organism, ZeroTuning(layers=(1, 2)), Data.load("calibration"))
    assert (tuned.best.heads, tuned.best.gamma) == ("all", 2.0) and len(tuned.heads.selected) == 16
    assert {layer for layer, _ in tuned.heads.selected} == {1, 2}
    probing = lambda m: m is not None and m.head_list is not None and len(m.head_list) == 1  # noqa: E731
    made_up(monkeypatch, lambda method: 0.9 if probing(method) else 0.5)
    tuned = calibrate_zerotuning(*organism, ZeroTuning(), DATA)
    assert (tuned.best.heads, tuned.best.gamma) == ("listed", 1.0)


def test_entropy_needs_no_labels(organism, monkeypatch):
    made_up(
        monkeypatch, lambda method: 0.5, lambda method: 1 - 0.1 * (gamma_of(method) > 1) * (4 in numbers_of(method))
    )
    with pytest.raises(ValueError, match=r"gamma=2.0 in no head number changes the accuracy"):
        calibrate_zerotuning(*organism, ZeroTuning(), DATA)
    tuned = calibrate_zerotuning(*organism, ZeroTuning(), DATA, by="entropy")
    assert {h for _, h in tuned.listed} == {4} and tuned.best.gamma == 1.5 and tuned.best.entropy == pytest.approx(0.9)


def test_refusals(organism):
    for method, settings, sentence in [
        (ZeroTuning(head_list=(1,)), {}, "leave out head_list"),
        (ZeroTuning(), {"by": "loss"}, "by: expected accuracy or entropy, got 'loss'"),
        (ZeroTuning(), {"share": 0.0}, "share: expected a number above 0"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            calibrate_zerotuning(*organism, method, DATA, **settings)
    with pytest.raises(ValueError, match="leave out head_list"):
        calibrate_act(*organism, replace(METHOD, head_list="L3H1"), DATA)


# ---- commands -------------------------------------------------------------------------------------------------------


def test_commands(tmp_path):
    path = tmp_path / "act.json"
    done = run("calibrate", "act", "--method", "act:beta=0,layers=4", "--limit", 7, "--top", 2, "-o", path)
    assert done.exit_code == 0, done.output
    assert "L4H1" in done.stdout and "absent" in done.stdout and len(HeadList.load(path).selected) == 2
    path = tmp_path / "zerotuning.json"
    done = run(
        "calibrate", "zerotuning", "--by", "entropy", "--limit", 7, "-o", path, "--method", "zerotuning:layers=0/1"
    )
    assert done.exit_code == 0, done.output
    found = HeadList.load(path)
    said = f"zerotuning:gamma={found.settings['gamma']:g},head_list={path}"
    assert "by entropy" in done.stdout and said in done.output.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["act", "--method", "vhr"], "expected act with its settings, got 'vhr'"),
        (["act", "--method", "act+vhr"], "expected act with its settings"),
        (["act", "--method", "act:head_list=L3H1"], "leave out head_list"),
        (["act", "--data", "/no/such/folder"], "does not exist"),
        (["zerotuning", "--method", "act"], "expected zerotuning with its settings"),
        (["zerotuning", "--share", "2"], "share: expected a number above 0 and up to 1"),
    ],
)
def test_mistakes_on_the_command_line(arguments, sentence):
    done = run("calibrate", *arguments)
    assert done.exit_code == 1 and sentence in done.output and "Traceback" not in done.output
