"""Named set-ups: what they fix, what deviates, what others report; lists of images; ways of decoding."""

import json
import random
import string
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import vlmfix
from vlmfix.cli import app
from vlmfix.eval.benchmarks.benchmark import benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.pictures.lists import image_list
from vlmfix.eval.run.protocols import MODEL, PROTOCOLS, TEMPLATES, generation, published
from vlmfix.eval.run.runner import answer_all
from vlmfix.eval.scorers import chair
from vlmfix.eval.scorers.chair.variants import VARIANTS
from vlmfix.eval.scorers.yesno import MARGIN, PARSERS

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)
HUMAN = SYSTEM.replace("curious user", "curious human").replace("the user's", "the human's")


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_can_be_asked_and_scored(name):
    protocol = PROTOCOLS[name]
    assert protocol.template in (MODEL, *TEMPLATES) and generation(protocol.decoding)
    known = VARIANTS if protocol.benchmark == "chair" else (*PARSERS, MARGIN)
    assert set(protocol.scoring) <= set(known)
    assert ("{question}" in protocol.prompt) == (protocol.benchmark == "pope")
    if protocol.images:
        assert len(image_list(protocol.images)) >= 500


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("vicuna_v1", f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:"),
        ("llava_v1", f"{HUMAN} USER: <image>\nWhat? ASSISTANT:"),
        ("devils", f"{SYSTEM.replace('the user', 'the human')} USER: <image>\nWhat? ASSISTANT:"),
        ("pai", f"{SYSTEM}USER: <image> What? ASSISTANT:"),
        ("opera", "USER: <image> What? ASSISTANT:"),
        ("bare", "USER: <image>\nWhat? ASSISTANT:"),
    ],
)
def test_templates_to_the_letter(organism, template, text):
    from vlmfix.asking.batch import chat
    from vlmfix.eval.run.runner import _templated

    _, processor = organism
    own = processor.chat_template
    with _templated(processor, template):
        assert chat(processor, "What?", 1) == text
    assert processor.chat_template == own


def test_lists_of_images():
    assert image_list("first500")[:3] == (42, 73, 74) and image_list("first500")[-1] == 7108
    assert image_list("opera500")[:2] == (226988, 337443) and len(image_list("pope500")) == 500
    ids = sorted(chair.coco_truth(split="val"))
    assert image_list("sorted-seed-3") == tuple(random.Random(3).sample(ids, 500))
    both = image_list("first500+opera500")
    assert both[:500] == image_list("first500") and 500 < len(both) < 1000 and len(set(both)) == len(both)


def test_lists_of_ones_own(tmp_path):
    (tmp_path / "ids.txt").write_text("COCO_val2014_000000000042.jpg\n\n73\n")
    assert image_list(str(tmp_path / "ids.txt")) == (42, 73)
    (tmp_path / "captions_val2014.json").write_text(
        json.dumps({"images": [{"id": i} for i in (5, 3, 9)], "annotations": []})
    )
    drawn = image_list(f"coco-seed-1@{tmp_path / 'captions_val2014.json'}")
    random.seed(1)
    assert drawn == tuple(random.sample([5, 3, 9], 3)), "the order of the file, as the lineage of VHR draws"
    (tmp_path / "twice.txt").write_text("42\n42\n")
    with pytest.raises(ValueError, match="each once"):
        image_list(str(tmp_path / "twice.txt"))
    with pytest.raises(ValueError, match="is no list of images; expected a file, or one of first500, opera500"):
        image_list("opera501")


def test_published_figures_carry_their_mark():
    said = {(one.method, one.mark): one.figures[""] for one in published("pai-512")}
    assert said["PAI", "paper:PAINT"] == {"CHAIR_S": 24.6, "CHAIR_I": 6.8, "F1": 74.7}
    assert said["PAI", "issue PAI#20"]["CHAIR_S"] == 44.6
    vcd = {one.decoding: one.figures for one in published("vcd-pope") if one.method == "none"}
    assert (
        vcd["sample"]["adversarial"] == {"accuracy": 79.0, "F1": 77.6} and vcd["greedy"]["random"]["accuracy"] == 88.5
    )
    kinds = ("paper", "code", "issue", "measured", "second-hand")
    for name in PROTOCOLS:
        for one in published(name):
            assert one.mark.startswith(kinds) and all(0 <= x <= 200 for f in one.figures.values() for x in f.values())


def header(protocol, **changed):
    """Of a run exactly as the protocol has it, but for what is changed."""
    identity = {
        "data": "coco", "asking": {"prompt": protocol.prompt}, "template": protocol.template, "limit": None,
        "max_new_tokens": protocol.max_new_tokens, "decoding": protocol.decoding, "seed": protocol.seed,
    }  # fmt: skip
    return {"identity": {**identity, **changed}, "data": {"name": "coco", "which": protocol.images}}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ()),
        ({"max_new_tokens": 64}, ("budget: 64 tokens instead of 512 tokens",)),
        ({"decoding": "beam5"}, ("decoding: beam5 instead of sample", )),
        ({"asking": {"prompt": "What?"}}, ("prompt: What? instead of Please describe this image in detail.",)),
        ({"template": "model"}, ("template: model instead of llava_v1",)),
        ({"seed": 7}, ("seed: 7 instead of 0",)),
        ({"data": "organism"}, ("images: organism opera500 instead of coco opera500",)),
        ({"limit": 3}, ("images: coco opera500, the first 3 pictures instead of coco opera500",)),
    ],
)  # fmt: skip
def test_every_deviation_is_named(changed, said):
    protocol = PROTOCOLS["shield-512"]
    assert protocol.deviations(header(protocol, **changed), SimpleNamespace(scoring="opera")) == said


def test_another_scorer_is_a_deviation():
    protocol = PROTOCOLS["vlmfix-512"]
    assert protocol.deviations(header(protocol), SimpleNamespace(scoring="rohrbach")) == ()
    (said,) = protocol.deviations(header(protocol), SimpleNamespace(scoring="strict"))
    assert said == "scorer: strict instead of opera and rohrbach"


def test_a_run_by_protocol(tmp_path):
    args = [
        "eval",
        "--protocol",
        "pai-512",
        "--data",
        "organism",
        "--limit",
        3,
        "--method",
        "none,pai",
        "--output",
        tmp_path,
    ]
    done = run(*args, "--template", "model", "--variant", "opera_approx", "--max-new-tokens", 100)
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "by pai-512+images+template+budget+scorer" in said and "(testing only: --limit 3)" in said
    assert "images: organism, the first 3 pictures instead of coco paint500" in said and "paper:PAINT" in said
    assert "one draw of the same recipe, stand in" in said
    folder = next(tmp_path.rglob("run.json")).parent
    record = json.loads((folder / "records.jsonl").read_text().splitlines()[0])
    assert record["prompt"] == "Please help me describe the image in detail."
    (data,) = json.loads(run("score", folder, "--variant", "opera_approx", "--json").stdout)
    assert data["protocol"] == "pai-512+images+template+budget+scorer" and len(data["published"]) == 6
    page = tmp_path / "page.html"
    assert run("report", tmp_path, "--output", page, "--markdown", tmp_path / "page.md").exit_code == 0
    assert "Published figures of this protocol" in page.read_text() and "issue PAI#20" in page.read_text()
    assert "Deviates from protocol" in (tmp_path / "page.md").read_text()


def test_each_way_of_scoring_gives_a_table(tmp_path):
    args = ["eval", "--protocol", "vlmfix-pope", "--data", "organism", "--limit", 12, "--method", "none", "--json"]
    done = run(*args, "--output", tmp_path)
    assert done.exit_code == 0, done.output
    assert [c["scoring"] for c in json.loads(done.stdout)] == ["strict", "margin"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--protocol", "pai-521"], "unknown protocol 'pai-521'; did you mean 'pai-512'?"),
        (["--protocol", "pai-512"], "name their folder with --images (the photos of COCO val2014 are at https://"),
        (["--protocol", "pai-512", "--benchmark", "pope", "--data", "organism"], "is of chair; leave out --benchmark"),
        (["--data", "coco", "--images", "."], "no such image file: "),
        (["--decoding", "beam"], "expected greedy, beam5, sample, sample:top_p=0.9 or checkpoint, got 'beam'"),
        (["--template", "vicuna"], "unknown template 'vicuna'; did you mean 'vicuna_v1'?"),
        (["--benchmark", "pope", "--prompt", "What?"], "expected {question} in it"),
        (["--list", "first501"], "is no list of images"),
        (["--benchmark", "amber", "--limit", "1"], "the pictures of AMBER are linked at https://github.com/"),
    ],
)
def test_mistakes_end_in_one_sentence(args, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("eval", "--method", "none", *args)
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("note:", "chair", "pope"))]
    assert done.exit_code == 1 and len(lines) == 1 and sentence in lines[0], (done.output, done.exception)


def test_protocols_are_listed():
    done = run("protocols")
    assert done.exit_code == 0 and all(name in done.stdout for name in PROTOCOLS)
    rows = {row["name"]: row for row in json.loads(run("protocols", "--json").stdout)}
    assert rows["opera-512"]["decoding"] == "beam5" and rows["opera-512"]["published"][0]["mark"] == "measured"


def test_pictures_of_coco_by_either_name(tmp_path):
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "COCO_val2014_000000000042.jpg").touch()
    (tmp_path / "000000000073.jpg").touch()
    images = Data.load("coco", pictures=tmp_path, limit=3).images
    assert [path.exists() for path in images.values()] == [True, True, False] and list(images) == [42, 73, 74]


def test_published_questions_are_asked_once_each():
    data, bench = Data.load("coco", pictures="."), benchmark("pope")
    questions, items = bench.questions(data), bench.items(data)
    assert len(questions) == 9000 and len({q.id for q in questions}) == 9000 and 4000 < len(items) < 6500
    assert len({q.image for q in bench.questions(replace(data, limit=7))}) == 7
    right = {bench.item_id(q): q.label for q in questions}
    *splits, mean = bench.score(data, right)
    assert [float(g.counts["tp"].sum() + g.counts["tn"].sum()) for g in splits] == [3000] * 3
    assert mean.is_summary and len(mean.scores) == 9000


# Decoding


@given(
    st.text(alphabet=string.printable, max_size=30) | st.sampled_from(["beam0", "beam99", "sample:top_p=", "greedy "])
)
def test_any_decoding_is_known_or_refused(text):
    try:
        assert "do_sample" in generation(text)
    except ValueError as error:
        assert "decoding" in str(error)


def test_sampled_answers_depend_on_question_and_seed_alone(organism, tmp_path):
    data, bench = Data.load(limit=4), benchmark("chair")

    def said(out, **how):
        done = answer_all(*organism, (), bench, data, tmp_path / out, decoding="sample", **how)
        return {r["id"]: r["text"] for r in done.records}

    once = said("a", batch_size=3)
    assert said("b", batch_size=1) == once and said("c", seed=1) != once
    greedy = answer_all(*organism, (), bench, data, tmp_path / "d").records
    assert {r["id"]: r["text"] for r in greedy} != once and greedy[0]["generation"]["do_sample"] is False
    path = next((tmp_path / "b").rglob("records.jsonl"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert said("b") == once, "resumed in the middle"


def test_beams_and_the_checkpoints_own_settings(organism, tmp_path):
    data, bench = Data.load(limit=2), benchmark("chair")
    beams = answer_all(*organism, (), bench, data, tmp_path, decoding="beam3")
    assert beams.records[0]["generation"]["num_beams"] == 3
    own = answer_all(*organism, (), bench, data, tmp_path, decoding="checkpoint")
    assert own.records[0]["generation"]["do_sample"] in (False, True) and own.folder != beams.folder


def test_a_template_changes_what_is_asked(organism, tmp_path):
    data, bench = Data.load(limit=3), benchmark("chair")
    plain, other = (answer_all(*organism, (), bench, data, tmp_path, template=t) for t in (MODEL, "pai"))
    assert plain.folder != other.folder and [r["text"] for r in plain.records] != [r["text"] for r in other.records]
    image = Image.new("RGB", (96, 96))
    with pytest.raises(ValueError, match="unknown template"):
        answer_all(*organism, (), bench, data, tmp_path, template="nope")
    assert vlmfix.ask(*organism, image, "What?").text
