"""Runs: what is asked, written, resumed, scored and compared."""

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import vlmfix
from vlmfix.asking.batch import chat
from vlmfix.asking.words import spellings
from vlmfix.cli import app
from vlmfix.eval.benchmarks.benchmark import benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.report import html, markdown, tables, terminal, words
from vlmfix.eval.report.csv_json import to_csv, to_json
from vlmfix.eval.report.study import study
from vlmfix.eval.run.controls import controls_of
from vlmfix.eval.run.progress import PlainProgress
from vlmfix.eval.run.results import BrokenFile, Run, compare
from vlmfix.eval.run.runner import answer_all
from vlmfix.hooks import REGISTRY
from vlmfix.method.heads import HeadList, picture_id
from vlmfix.method.registry import parse, spec_of

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "vlmfix"]


@pytest.fixture(scope="module")
def runs(organism, tmp_path_factory):
    """CHAIR and POPE on a few scenes, untouched and with VHR."""
    out, data = tmp_path_factory.mktemp("runs"), Data.load(limit=24)
    return [
        answer_all(*organism, parse(method), benchmark(name), data, out)
        for name in ("chair", "pope")
        for method in ("none", "vhr")
    ]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def test_records_hold_what_it_takes_to_ask_again(organism, runs):
    run = runs[1]
    record = run.records[3]
    model, processor = organism
    with vlmfix.engine.wrap.wrapped(
        model,
        [vlmfix.method.registry.from_json({k: v for k, v in m.items() if k != "facts"}) for m in record["method"]],
        processor,
    ):
        path = ROOT / "assets" / "organism" / "test" / "images" / record["image"][0]
        again = vlmfix.ask(model, processor, path, record["prompt"], **record["generation"])
    assert (again.text, again.token_ids, again.image_sha256) == (
        record["text"],
        record["token_ids"],
        record["image_sha256"],
    )
    assert record["effects"][0]["acted"] and record["finish"] == "stop"
    assert {"model", "dtype", "weights_digest", "data_digest", "max_new_tokens", "seed", "vlmfix"} <= set(
        run.header["identity"]
    )
    assert {"command", "torch", "transformers", "platform", "batch_size"} <= set(run.header["environment"])


def test_batched_answers_equal_single_answers(organism, runs):
    model, processor = organism
    for record in runs[0].records[:6]:
        path = ROOT / "assets" / "organism" / "test" / "images" / record["image"][0]
        assert vlmfix.ask(model, processor, path, record["prompt"]).text == record["text"]


def test_heads_are_not_judged_by_the_pictures_they_were_chosen_on(organism, tmp_path):
    data, path = Data.load(limit=3), str(tmp_path / "heads.json")
    ids = [picture_id(file) for file in data.images.values()]
    scores = [[1.0] * 8] * 8
    HeadList("organism", "visual", scores, data={"ids": ["0" * 16, ids[1]]}).select(top=2).save(path)
    with pytest.raises(ValueError, match=r"heads\.json was made on 1 of the 3 pictures that are asked about"):
        answer_all(*organism, parse(f"headgain:head_list={path}"), benchmark("chair"), data, tmp_path)
    assert not (tmp_path / "chair").exists()
    HeadList("organism", "visual", scores, data={"ids": ["0" * 16]}).select(top=2).save(path)
    run = answer_all(*organism, parse(f"headgain:head_list={path}"), benchmark("chair"), data, tmp_path)
    assert run.header["identity"]["method"][0]["facts"]["head_list"]["tool"] == "visual"
    assert all(record["effects"] == [{"acted": True}] for record in run.records)


def test_no_question_is_asked_twice(runs):
    for run in runs:
        ids = [r["id"] for r in run.records]
        assert len(ids) == len(set(ids))
    data, pope = Data.load(limit=24), benchmark("pope")
    assert len(runs[2].records) == len(pope.items(data)) < len(pope.questions(data))


def test_a_finished_run_is_not_asked_again(organism, runs, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a finished run asks nothing")

    monkeypatch.setattr("vlmfix.eval.run.sharing.ask_in_turns", refuse)
    out = runs[0].folder.parents[2]
    again = answer_all(*organism, (), benchmark("chair"), Data.load(limit=24), out)
    assert again.folder == runs[0].folder and again.records == runs[0].records


def test_different_settings_never_share_a_folder(organism, runs, tmp_path):
    data = Data.load(limit=2)
    folders = {
        answer_all(*organism, parse(m), benchmark("chair"), data, tmp_path, max_new_tokens=n).folder
        for m, n in [("none", 5), ("none", 6), ("vhr", 5), ("vhr:alpha=1.5", 5)]
    }
    folders |= {answer_all(*organism, (), benchmark("chair"), Data.load(limit=3), tmp_path, max_new_tokens=5).folder}
    assert len(folders) == 5


def test_a_torn_line_is_redone_and_a_broken_one_is_named(organism, tmp_path):
    data, bench = Data.load(limit=5), benchmark("chair")
    run = answer_all(*organism, (), bench, data, tmp_path, batch_size=2)
    path = run.folder / "records.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-40])
    with pytest.raises(
        BrokenFile, match=r"ends in a line that was cut off; 4 answers before it are whole: run .* again"
    ):
        Run.read(path)
    again = answer_all(*organism, (), bench, data, tmp_path, batch_size=2)
    assert [(r["id"], r["text"]) for r in again.records] == [(r["id"], r["text"]) for r in run.records]
    lines = whole.splitlines(keepends=True)
    path.write_text(lines[0] + "{broken\n" + "".join(lines[1:]))
    with pytest.raises(BrokenFile, match=r"records\.jsonl, line 2, is no record"):
        answer_all(*organism, (), bench, data, tmp_path)
    assert path.read_text().startswith(lines[0] + "{broken"), "nothing was lost"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_and_resumed(tmp_path, runs, how):
    command = [*COMMAND, "eval", "--benchmark", "chair", "--method", "none", "--limit", "12", "--batch-size", "1"]
    command += ["--output", str(tmp_path), "--json"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are deaf to Ctrl-C
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment(), preexec_fn=heard, **pipes)  # noqa: PLW1509
    deadline = time.time() + 60
    records = lambda: next(iter(tmp_path.rglob("records.jsonl")), None)  # noqa: E731
    while time.time() < deadline and not ((path := records()) and path.read_text().count("\n") >= 4):
        time.sleep(0.02)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    kept = records().read_text()
    n = kept.count("\n")
    assert 4 <= n < 12, "the test must interrupt a run that is under way"
    if how == signal.SIGINT:
        assert process.returncode == 130 and "To go on: vlmfix eval" in stderr and "Traceback" not in stderr
    done = CliRunner().invoke(app, command[len(COMMAND) :])
    assert records().read_text().startswith("".join(kept.splitlines(keepends=True)[:n])), "nothing is asked twice"
    texts = [json.loads(line)["text"] for line in records().read_text().splitlines()]
    assert texts == [r["text"] for r in runs[0].records[:12]], "the same answers as in one go"
    assert json.loads(done.stdout)[0]["rows"][0]["n"] == 12


def test_comparison_and_tables(runs):
    chair, pope = compare(runs, n_resamples=500)
    assert [r.method for r in chair.rows] == ["none", "vhr"] and chair.rows[0].differences is None
    assert [(r.method, r.group) for r in pope.rows[:3]] == [
        ("none", "random"),
        ("none", "popular"),
        ("none", "adversarial"),
    ]
    none, vhr = chair.rows
    for metric in chair.benchmark.columns:
        gap = vhr.estimates[metric].value - none.estimates[metric].value
        assert vhr.differences[metric].value == pytest.approx(gap)
        assert none.estimates[metric].low <= none.estimates[metric].value <= none.estimates[metric].high
    assert chair.notes == ["testing only: the first 24 pictures"]
    text = markdown.tables(study(chair))
    assert "| CHAIR (rohrbach), 24 pictures (testing only: --limit 24) | `none` | `vhr` |" in text
    assert "| CHAIR_S % |" in text and "| CHAIR_S % at equal recall |" in text
    data = json.loads(json.dumps(chair.to_json()))
    assert data["rows"][1]["differences"]["CHAIR_S"]["n"] == 24 and len(data["runs"]) == 2


def test_chair_of_the_run_equals_the_scorer_by_hand(runs):
    data = Data.load(limit=24)
    none = compare(runs[:1], 10)[0].rows[0]
    from vlmfix.eval.scorers import chair

    scores = [chair.score_captions([(r["id"], r["text"])], data.truth)[0] for r in runs[0].records]
    assert none.estimates["CHAIR_S"].value == pytest.approx(sum(s.chair_s for s in scores) / 24)
    assert none.estimates["words"].value == pytest.approx(sum(len(r["text"].split()) for r in runs[0].records) / 24)


def test_an_idle_method_is_said_so(tmp_path):
    loaded = vlmfix.load("organism-qwen")  # which has no visual sinks
    with pytest.warns(UserWarning, match="will not act"):
        run = answer_all(*loaded, parse("var"), benchmark("chair"), Data.load(limit=2), tmp_path)
    (comparison,) = compare([run], 10)
    assert any("var did not act on this model" in note for note in comparison.notes)


def test_partial_answers_are_scored_and_counted(runs, tmp_path):
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "run.json").write_text((runs[3].folder / "run.json").read_text())
    lines = (runs[3].folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[:20]))
    (comparison,) = compare([Run.read(folder)], 10)
    assert any(f"20 of {len(lines)} answers so far" in note for note in comparison.notes)


def test_changed_annotations_are_noticed(runs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    header = json.loads((runs[0].folder / "run.json").read_text())
    header["identity"]["data_digest"] = "0" * 16
    (folder / "run.json").write_text(json.dumps(header))
    (folder / "records.jsonl").write_text((runs[0].folder / "records.jsonl").read_text())
    with pytest.raises(ValueError, match="are not those that"):
        compare([Run.read(folder)])


def test_plain_progress(capsys):
    tell = PlainProgress(seconds=0)
    tell("chair none", 0, 10)
    tell("chair none", 5, 10)
    tell("chair none", 10, 10)
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0] == "chair none: 0/10" and lines[1].startswith("chair none: 5/10, ") and lines[2] == "chair none: 10/10"
    )


def test_scoring_imports_no_torch(runs):
    code = "import sys; from vlmfix.cli import app; app(['score', *sys.argv[1:]], standalone_mode=False); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs[0].folder), str(runs[1].folder)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "CHAIR (rohrbach)" in done.stdout and "vhr" in done.stdout


def test_the_same_answers_scored_in_another_way(runs):
    usual = compare(runs, 10)
    strict = compare(runs, 10, {"chair": "strict", "pope": "lmms_eval"})
    assert [c.title for c in usual] == ["CHAIR (rohrbach)", "POPE"]
    assert [c.title for c in strict] == ["CHAIR (strict)", "POPE (parser lmms_eval)"]
    assert strict[0].to_json()["scoring"] == "strict"
    with pytest.raises(ValueError, match="did you mean 'rohrbach'"):
        compare(runs, 10, {"chair": "rorbach"})
    with pytest.raises(ValueError, match="did you mean 'negword'"):
        compare(runs, 10, {"pope": "negwords"})


def test_calibration_scenes_are_other_pictures():
    digests = [
        {hashlib.sha256(path.read_bytes()).hexdigest() for path in Data.load(name).images.values()}
        for name in ("calibration", "organism")
    ]
    assert [len(d) for d in digests] == [120, 500] and not digests[0] & digests[1]


def test_real_photos_go_through_end_to_end(organism, tmp_path):
    """Photos of all sizes; the organism's answers are nonsense, the plumbing is real."""
    data = Data.load("photos")
    assert len({Image.open(p).size for p in data.images.values()}) > 3
    found = [
        answer_all(*organism, parse(method), benchmark(name), data, tmp_path, batch_size=8)
        for name in ("chair", "pope")
        for method in ("none", "vhr")
    ]
    chair, pope = compare(found, 200)
    assert chair.rows[0].n == len(data.images) and all(row.n > 0 for row in pope.rows)
    assert 0 <= chair.rows[1].estimates["recall"].value < 0.5 and chair.rows[1].differences["CHAIR_S"].n == len(
        data.images
    )


# The first token


def test_first_token_is_what_the_model_says(organism, runs):
    """Log-probabilities of yes and no in the records, against a plain forward pass."""
    model, processor = organism
    yes, no = (spellings(processor, word) for word in ("yes", "no"))
    assert {processor.tokenizer.decode(i).strip().lower() for i in yes} == {"yes"}
    for record, interventions in ((runs[2].records[5], []), (runs[3].records[5], parse("vhr"))):
        picture = Image.open(ROOT / "assets" / "organism" / "test" / "images" / record["image"][0]).convert("RGB")
        inputs = processor(text=chat(processor, record["prompt"], 1), images=picture, return_tensors="pt")
        with vlmfix.engine.wrap.wrapped(model, interventions, processor), torch.inference_mode():
            logits = model(**inputs).logits[0, -1].float().log_softmax(-1)
        for word, ids in (("yes", yes), ("no", no)):
            assert record["first_token"][word] == pytest.approx(float(logits[list(ids)].logsumexp(0)), abs=1e-3)
    changed = [a["first_token"] != b["first_token"] for a, b in zip(runs[2].records, runs[3].records, strict=True)]
    assert any(changed), "a method acts on the first token"
    assert runs[0].records[0]["first_token"] is None, "captions have none"


def test_pope_by_the_first_token(runs):
    (margin,) = compare(runs[2:], 20, {"pope": "margin"})
    assert margin.title == "POPE (parser margin)" and any("log p(yes) - log p(no)" in note for note in margin.notes)
    bench = benchmark("pope", "margin")
    wanted = {r["id"]: "yes" if r["first_token"]["yes"] > r["first_token"]["no"] else "no" for r in runs[2].records}
    for row, group in zip(margin.rows[:3], margin.groups[0], strict=True):
        right = [wanted[bench.item_id(s.question)] == s.question.label for s in group.scores]
        assert row.estimates["accuracy"].value == pytest.approx(sum(right) / len(right))
    without = [{**r, "first_token": None} for r in runs[2].records]
    with pytest.raises(ValueError, match="has no"):
        compare([replace(runs[2], records=without)], 20, {"pope": "margin"})


def test_a_method_that_leaves_the_first_token_alone_is_said_so(runs):
    same = replace(runs[3], records=runs[2].records)
    (found,) = compare([runs[2], same], 20, {"pope": "margin"})
    assert "vhr: does not act on the first token, so its margins are the untouched model's" in found.notes
    assert not any("does not act" in note for note in compare(runs[2:], 20, {"pope": "margin"})[0].notes)


def test_first_token_with_beams_and_padding(organism):
    model, processor = organism
    words = {"yes": spellings(processor, "yes"), "no": spellings(processor, "no")}
    image = Image.open(ROOT / "assets" / "organism" / "test" / "images" / "test_0001.webp")
    asked = [(image, "Is there a cat?"), (image, "Is there a very small dog anywhere in the image at all?")]
    alone = [vlmfix.ask_batch(model, processor, [q], first_token=words)[0].first_token for q in asked]
    for how in ({}, {"num_beams": 3}):
        together = vlmfix.ask_batch(model, processor, asked, first_token=words, max_new_tokens=4, **how)
        for one, record in zip(alone, together, strict=True):
            assert record.first_token == pytest.approx(one, abs=1e-3)
    with pytest.raises(ValueError, match="no single token of the tokenizer spells 'antidisestablishment'"):
        spellings(processor, "antidisestablishment")


# Asked otherwise


def test_an_unfinished_run_that_was_asked_otherwise_is_refused_with_a_diff(organism, tmp_path):
    data, bench = Data.load(limit=4), benchmark("chair")
    begun = answer_all(*organism, (), bench, data, tmp_path, max_new_tokens=5, command="vlmfix eval --max-new-tokens 5")
    path = begun.folder / "records.jsonl"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError) as refused:
        answer_all(*organism, (), bench, data, tmp_path, max_new_tokens=6, decoding="beam2")
    said = str(refused.value)
    assert 'max_new_tokens 5 there, 6 here; decoding "greedy" there, "beam2" here' in said
    assert "is unfinished (2 of 4 answers)" in said and "vlmfix eval --max-new-tokens 5" in said and "--beside" in said
    assert len(list(tmp_path.rglob("run.json"))) == 1, "nothing was begun"
    answer_all(*organism, parse("vhr"), bench, data, tmp_path, max_new_tokens=6)  # another method is another matter
    answer_all(*organism, (), bench, Data.load(limit=2), tmp_path, max_new_tokens=6)  # as is another --limit
    beside = answer_all(*organism, (), bench, data, tmp_path, max_new_tokens=6, beside=True)
    assert beside.folder != begun.folder
    answer_all(*organism, (), bench, data, tmp_path, max_new_tokens=5)
    texts = [[json.loads(line)["text"] for line in text.splitlines()] for text in (path.read_text(), whole)]
    assert texts[0] == texts[1], "resumed"
    answer_all(*organism, (), bench, data, tmp_path, max_new_tokens=7)  # both are finished


def test_versions_and_weights_are_part_of_what_is_asked(organism, tmp_path, monkeypatch):
    data, bench = Data.load(limit=3), benchmark("chair")
    run = answer_all(*organism, (), bench, data, tmp_path, max_new_tokens=3)
    path = run.folder / "records.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    monkeypatch.setattr("vlmfix.eval.run.runner.transformers.__version__", "99.0")
    with pytest.raises(ValueError, match=r'transformers "[\d.]+" there, "99.0" here'):
        answer_all(*organism, (), bench, data, tmp_path, max_new_tokens=3)


# While it runs


@pytest.mark.parametrize(("at", "metric"), [(0, "CHAIR_S"), (2, "accuracy")])
def test_the_running_figure_ends_as_the_tables(organism, runs, tmp_path, at, metric):
    told = []
    bench, data = benchmark(runs[at].header["identity"]["benchmark"]), Data.load(limit=24)
    answer_all(*organism, (), bench, data, tmp_path, batch_size=16, progress=lambda *said: told.append(said))
    done = [said[1] for said in told]
    assert done[0] == 0 and done[-1] == told[-1][2] and done == sorted(done) and told[0][3] == ""
    counts = [group.counts for group in bench.score(data, {r["id"]: r["text"] for r in runs[at].records})]
    whole = {name: sum(count[name].sum() for count in counts) for name in counts[0]}
    assert told[-1][3] == f"{metric} {100 * float(bench.metrics[metric](whole)):.1f} %"


def test_plain_progress_tells_the_figure(capsys):
    tell = PlainProgress(seconds=0)
    tell("chair none", 0, 10, "")
    tell("chair none", 5, 10, "CHAIR_S 40.0 %")
    assert capsys.readouterr().err.splitlines()[1].endswith(", CHAIR_S 40.0 % so far")


def test_limit_stands_in_every_output(runs, tmp_path):
    (one,) = compare(runs[:2], 50)
    studies = [study(one)]
    console = Console(width=200, record=True, file=io.StringIO())
    terminal.show(console, studies)
    mark = "testing only: --limit 24"
    assert (
        mark in " ".join(console.export_text().split())
        and mark in markdown.tables(studies[0])
        and mark in markdown.to_markdown(studies)
    )
    assert mark in html.page(studies) and json.loads(to_json(studies))[0]["limit"] == 24
    assert {line["limit"] for line in csv.DictReader(io.StringIO(to_csv(studies)))} == {"24"}


# Honesty


def test_control_and_honest_columns_stand_next_to_chair(runs):
    (one,) = compare(runs[:2], 200)
    (table,) = tables.comparison_tables(study(one))
    names = [line.label for line in table.lines]
    for wanted in (
        "recall %",
        "F1 %",
        "CHAIR_I_unique %",
        "objects",
        "words",
        "repetition %",
        "CHAIR_S % at equal recall",
    ):
        assert wanted in names
    assert one.rows[0].control is None and one.rows[1].control.images == 24


def test_every_method_that_chooses_has_negative_controls():
    chosen = [name for name in REGISTRY if {"scores", "weights", "heads"} & set(parse(name)[0].stages())]
    chosen.remove("lookback")  # reads, and changes nothing
    assert {"pai", "var", "vhr"} <= set(chosen)
    for name in chosen:
        (method,) = parse(name)
        controls = method.controls()
        assert controls and all(type(c) is type(method) and c != method for c in controls), name
        assert all(spec_of([c]) != name for c in controls)


def test_controls_of_combined_methods():
    found = {spec_of(control) for control in controls_of(parse("vhr+pai"))}
    assert "vhr+pai:alpha=-0.5" in found and "vhr:select=random+pai" in found and len(found) == 4


def test_the_report_tells_whether_a_method_beats_its_controls(runs, tmp_path):
    def renamed(run, label, records):
        return replace(run, header={**run.header, "label": label}, records=records)

    none, vhr = runs[:2]
    worse = [{**r, "text": "A zebra and a giraffe on a surfboard."} for r in vhr.records]
    control, twin = renamed(vhr, "vhr:select=random", worse), renamed(vhr, "vhr:select=least", vhr.records)
    compared = study(compare([none, control, vhr, twin], 200)[0])
    said = {text.split("`")[1]: text for text in words.summary(compared)}
    assert "It is better than its negative control `vhr:select=random` (CHAIR_S −" in said["vhr"]
    assert "It is not told apart from its negative control `vhr:select=least` (CHAIR_S +0.0 points" in said["vhr"]
    assert said["vhr:select=random"].startswith("`vhr:select=random`, a negative control of `vhr`: CHAIR_S +")
    assert len(json.loads(to_json([compared]))[0]["against_controls"]) == 2


def test_every_verdict_of_a_run_can_be_written(runs, tmp_path):
    from typer.testing import CliRunner

    from vlmfix.cli import app

    path = tmp_path / "verdicts.jsonl"
    done = CliRunner().invoke(app, ["score", str(runs[0].folder), str(runs[2].folder), "--explain", str(path)])
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in path.read_text().splitlines()]
    captions, answers = [v for v in found if "mentions" in v], [v for v in found if "prediction" in v]
    assert len(captions) == 24 and {"start", "synonym", "node", "verdict"} <= set(captions[0]["mentions"][0])
    bench = benchmark("pope")
    assert len(answers) == len(bench.questions(Data.load(limit=24))) and {v["method"] for v in found} == {"none"}


def test_first_token_comes_after_methods_that_edit_the_scores(organism):
    model, processor = organism
    words = {"yes": spellings(processor, "yes"), "no": spellings(processor, "no")}
    asked = [
        (ROOT / "assets" / "organism" / "test" / "images" / "test_0001.webp", f"Is there a {name} in the image?")
        for name in ("person", "fork")
    ]
    plain = vlmfix.ask_batch(model, processor, asked, first_token=words, max_new_tokens=4)
    with vlmfix.engine.wrap.wrapped(model, parse("contrast:gamma=1.9"), processor):
        edited = vlmfix.ask_batch(model, processor, asked, first_token=words, max_new_tokens=4)
    for one, other in zip(plain, edited, strict=True):
        assert one.first_token != other.first_token, "the probabilities are those that the answer is chosen by"
        json.loads(json.dumps(other.first_token, allow_nan=False))
