"""Runs: what is asked, written, resumed, scored and compared."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import vlmfix
from vlmfix.eval import report
from vlmfix.eval.benchmarks import benchmark
from vlmfix.eval.data import Data
from vlmfix.eval.results import BrokenFile, Run, compare
from vlmfix.eval.runner import PlainProgress, answer_all
from vlmfix.heads import HeadList, picture_id
from vlmfix.intervention import parse

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "vlmfix"]


@pytest.fixture(scope="module")
def tiny():
    return vlmfix.load("tiny")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """CHAIR and POPE on a few scenes, untouched and with VHR."""
    out, data = tmp_path_factory.mktemp("runs"), Data.load(limit=24)
    return [
        answer_all(*tiny, parse(method), benchmark(name), data, out)
        for name in ("chair", "pope")
        for method in ("none", "vhr")
    ]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def test_records_hold_what_it_takes_to_ask_again(tiny, runs):
    run = runs[1]
    record = run.records[3]
    model, processor = tiny
    with vlmfix.attachment.wrapped(
        model,
        [vlmfix.intervention.from_json({k: v for k, v in m.items() if k != "facts"}) for m in record["method"]],
        processor,
    ):
        path = ROOT / "assets" / "scenes" / "images" / record["image"][0]
        again = vlmfix.ask(model, processor, path, record["prompt"], **record["generation"])
    assert (again.text, again.token_ids, again.image_sha256) == (
        record["text"],
        record["token_ids"],
        record["image_sha256"],
    )
    assert record["did"][0]["acted"] and record["finish"] == "stop"
    assert {"model", "dtype", "weights_digest", "data_digest", "max_new_tokens", "seed", "vlmfix"} <= set(
        run.header["identity"]
    )
    assert {"command", "torch", "transformers", "platform", "batch_size"} <= set(run.header["environment"])


def test_batched_answers_equal_single_answers(tiny, runs):
    model, processor = tiny
    for record in runs[0].records[:6]:
        path = ROOT / "assets" / "scenes" / "images" / record["image"][0]
        assert vlmfix.ask(model, processor, path, record["prompt"]).text == record["text"]


def test_heads_are_not_judged_by_the_pictures_they_were_chosen_on(tiny, tmp_path):
    data, path = Data.load(limit=3), str(tmp_path / "heads.json")
    ids = [picture_id(file) for file in data.images.values()]
    scores = [[1.0] * 8] * 6
    HeadList("tiny", "visual", scores, data={"ids": ["0" * 16, ids[1]]}).select(top=2).save(path)
    with pytest.raises(ValueError, match=r"heads\.json was made on 1 of the 3 pictures that are asked about"):
        answer_all(*tiny, parse(f"vhr:head_list={path}"), benchmark("chair"), data, tmp_path)
    assert not (tmp_path / "chair").exists()
    HeadList("tiny", "visual", scores, data={"ids": ["0" * 16]}).select(top=2).save(path)
    run = answer_all(*tiny, parse(f"vhr:head_list={path}"), benchmark("chair"), data, tmp_path)
    assert run.header["identity"]["method"][0]["facts"]["head_list"]["tool"] == "visual"
    assert all(record["did"] == [{"acted": True}] for record in run.records)


def test_no_question_is_asked_twice(runs):
    for run in runs:
        ids = [r["id"] for r in run.records]
        assert len(ids) == len(set(ids))
    data, pope = Data.load(limit=24), benchmark("pope")
    assert len(runs[2].records) == len(pope.items(data)) < len(pope.questions(data))


def test_a_finished_run_is_not_asked_again(tiny, runs, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a finished run asks nothing")

    monkeypatch.setattr("vlmfix.eval.runner.ask_batch", refuse)
    out = runs[0].folder.parents[2]
    again = answer_all(*tiny, (), benchmark("chair"), Data.load(limit=24), out)
    assert again.folder == runs[0].folder and again.records == runs[0].records


def test_different_settings_never_share_a_folder(tiny, runs, tmp_path):
    data = Data.load(limit=2)
    folders = {
        answer_all(*tiny, parse(m), benchmark("chair"), data, tmp_path, max_new_tokens=n).folder
        for m, n in [("none", 5), ("none", 6), ("vhr", 5), ("vhr:alpha=1.5", 5)]
    }
    folders |= {answer_all(*tiny, (), benchmark("chair"), Data.load(limit=3), tmp_path, max_new_tokens=5).folder}
    assert len(folders) == 5


def test_a_torn_line_is_redone_and_a_broken_one_is_named(tiny, tmp_path):
    data, bench = Data.load(limit=5), benchmark("chair")
    run = answer_all(*tiny, (), bench, data, tmp_path, batch_size=2)
    path = run.folder / "records.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-40])
    with pytest.raises(
        BrokenFile, match=r"ends in a line that was cut off; 4 answers before it are whole: run .* again"
    ):
        Run.read(path)
    again = answer_all(*tiny, (), bench, data, tmp_path, batch_size=2)
    assert [(r["id"], r["text"]) for r in again.records] == [(r["id"], r["text"]) for r in run.records]
    lines = whole.splitlines(keepends=True)
    path.write_text(lines[0] + "{broken\n" + "".join(lines[1:]))
    with pytest.raises(BrokenFile, match=r"records\.jsonl, line 2, is no record"):
        answer_all(*tiny, (), bench, data, tmp_path)
    assert path.read_text().startswith(lines[0] + "{broken"), "nothing was lost"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_and_resumed(tmp_path, runs, how):
    command = [*COMMAND, "eval", "--benchmark", "chair", "--method", "none", "--limit", "24", "--batch-size", "2"]
    command += ["--output", str(tmp_path), "--json"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    records = lambda: next(iter(tmp_path.rglob("records.jsonl")), None)  # noqa: E731
    while time.time() < deadline and not ((path := records()) and path.read_text().count("\n") >= 4):
        time.sleep(0.02)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    kept = records().read_text()
    n = kept.count("\n")
    assert 4 <= n < 24, "the test must interrupt a run that is under way"
    if how == signal.SIGINT:
        assert process.returncode == 130 and "To go on: vlmfix eval" in stderr and "Traceback" not in stderr
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    assert records().read_text().startswith("".join(kept.splitlines(keepends=True)[:n])), "nothing is asked twice"
    texts = [json.loads(line)["text"] for line in records().read_text().splitlines()]
    assert texts == [r["text"] for r in runs[0].records], "the same answers as in one go"
    assert json.loads(done.stdout)[0]["rows"][0]["n"] == 24


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
    markdown = report.markdown(chair)
    assert "| CHAIR (rohrbach), 24 pictures | CHAIR_S % |" in markdown and "| `vhr` |" in markdown
    data = json.loads(json.dumps(chair.to_json()))
    assert data["rows"][1]["differences"]["CHAIR_S"]["n"] == 24 and len(data["runs"]) == 2


def test_chair_of_the_run_equals_the_scorer_by_hand(runs):
    data = Data.load(limit=24)
    none = compare(runs[:1], 10)[0].rows[0]
    from vlmfix.eval import chair

    scores = [chair.score_captions([(r["id"], r["text"])], data.truth)[0] for r in runs[0].records]
    assert none.estimates["CHAIR_S"].value == pytest.approx(sum(s.chair_s for s in scores) / 24)
    assert none.estimates["words"].value == pytest.approx(sum(len(r["text"].split()) for r in runs[0].records) / 24)


def test_an_idle_method_is_said_so(tiny, tmp_path):
    with pytest.warns(UserWarning, match="will not act"):
        run = answer_all(*tiny, parse("var"), benchmark("chair"), Data.load(limit=2), tmp_path)
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
    assert [c.benchmark.title for c in usual] == ["CHAIR (rohrbach)", "POPE"]
    assert [c.benchmark.title for c in strict] == ["CHAIR (strict)", "POPE (parser lmms_eval)"]
    assert strict[0].to_json()["scoring"] == "strict"
    with pytest.raises(ValueError, match="did you mean 'rohrbach'"):
        compare(runs, 10, {"chair": "rorbach"})
    with pytest.raises(ValueError, match="did you mean 'negword'"):
        compare(runs, 10, {"pope": "negwords"})


def test_calibration_scenes_are_other_pictures():
    digests = [
        {hashlib.sha256(path.read_bytes()).hexdigest() for path in Data.load(name).images.values()}
        for name in ("calibration", "scenes")
    ]
    assert [len(d) for d in digests] == [120, 400] and not digests[0] & digests[1]


def test_real_photos_go_through_end_to_end(tiny, tmp_path):
    """Photos of all sizes; the tiny model's answers are nonsense, the plumbing is real."""
    data = Data.load("photos")
    assert len({Image.open(p).size for p in data.images.values()}) > 3
    found = [
        answer_all(*tiny, parse(method), benchmark(name), data, tmp_path, batch_size=8)
        for name in ("chair", "pope")
        for method in ("none", "vhr")
    ]
    chair, pope = compare(found, 200)
    assert chair.rows[0].n == len(data.images) and all(row.n > 0 for row in pope.rows)
    assert 0 <= chair.rows[1].estimates["recall"].value < 0.5 and chair.rows[1].differences["CHAIR_S"].n == len(
        data.images
    )
