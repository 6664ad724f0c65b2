"""A run shared by several processes, and a machine with too little memory for the batch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vlmfix
from vlmfix.asking.asker import ask_in_turns
from vlmfix.cli import app
from vlmfix.eval.benchmarks.benchmark import Item, benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run import batches, folders, runner, sharing
from vlmfix.eval.run.workers import Workers

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
EVAL = [
    "-m",
    "vlmfix",
    "eval",
    "--benchmark",
    "chair",
    "--method",
    "none",
    "--limit",
    "12",
    "--batch-size",
    "1",
    "--json",
]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *EVAL]


def texts(out):
    (path,) = out.rglob("records.jsonl")
    return [(r["id"], r["text"]) for r in map(json.loads, path.read_text().splitlines())]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    in_one_process(out)
    return texts(out)


def in_one_process(out):
    assert CliRunner().invoke(app, [*EVAL[2:], "--output", str(out)]).exit_code == 0


def kill_one(command, out):
    """Start two processes, kill the second when both have answered; returns what was kept, and the end of it all."""
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 90
    written = lambda: [p.read_text().count("\n") for p in out.rglob("records.?.jsonl") if p.exists()]  # noqa: E731
    while time.time() < deadline and process.poll() is None and not (len(n := written()) == 2 and min(n) >= 2):
        time.sleep(0.01)
    assert process.poll() is None, f"it ended before both had answered: {process.communicate()}"
    parents = ["pgrep", "-P", str(process.pid)]
    workers = subprocess.run(parents, capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    kept = [line for p in out.rglob("records.?.jsonl") for line in p.read_text().splitlines() if line.endswith("}")]
    stdout, stderr = process.communicate(timeout=180)
    return kept, process.returncode, stdout, stderr


def check_kept(kept, out, alone):
    assert 4 <= len(kept) < 12 and texts(out) == alone
    (path,) = out.rglob("records.jsonl")
    again = {json.dumps(json.loads(line), sort_keys=True) for line in path.read_text().splitlines()}
    assert {json.dumps(json.loads(line), sort_keys=True) for line in kept} <= again, "nothing was asked twice"


def test_a_process_that_dies_loses_nothing(alone, tmp_path):
    kept, code, _, _ = kill_one([*TWO, "--output", str(tmp_path)], tmp_path)
    assert code != 0
    in_one_process(tmp_path)
    check_kept(kept, tmp_path, alone)


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes of a CPU")
def test_two_processes_go_on_when_one_dies_and_leave_what_one_leaves(alone, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--max_restarts", "1"]
    kept, code, said, why = kill_one([*launch, *EVAL, "--output", str(tmp_path)], tmp_path)
    assert code == 0, why
    assert [each["rows"][0]["n"] for each in json.loads(said)] == [12], "one process prints"
    assert not list(tmp_path.rglob("records.[0-9].jsonl"))
    check_kept(kept, tmp_path, alone)


def test_a_process_that_finds_the_run_begun_this_moment_joins_it(monkeypatch, tmp_path):
    """Between its look for the header and its look for other runs, another process may have written the header."""
    model, processor = vlmfix.load("organism")
    refuse, header = folders.refuse_other, folders.write

    def late(parent, mine):
        (parent / "written-meanwhile").mkdir(parents=True)
        header(parent / "written-meanwhile" / folders.HEADER, json.dumps(mine))
        refuse(parent, mine)

    monkeypatch.setattr(folders, "refuse_other", late)
    run = runner.answer_all(model, processor, (), benchmark("chair"), Data.load(limit=2), tmp_path, max_new_tokens=2)
    assert len(run.records) == 2


def test_batches_that_do_not_fit_are_halved(monkeypatch, tmp_path):
    model, processor = vlmfix.load("organism")
    asked = []

    def small_memory(askers, questions, **settings):
        asked.append(len(questions))
        if len(questions) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return ask_in_turns(askers, questions, **settings)

    monkeypatch.setattr(sharing, "ask_in_turns", small_memory)
    with pytest.warns(UserWarning, match="out of memory with 8 questions at once; going on with 4"):
        run = runner.answer_all(model, processor, (), benchmark("chair"), Data.load(limit=10), tmp_path, batch_size=8)
    assert asked == [8, 4, 2, 2, 2, 2, 2] and [r["id"] for r in run.records] == [str(i) for i in range(1, 11)]


def test_large_pictures_and_long_prompts_are_asked_first_and_records_keep_their_order(monkeypatch, tmp_path):
    model, processor = vlmfix.load("organism")
    data, asked = Data.load("photos"), []

    def noted(askers, questions, **settings):
        asked.extend((picture.width * picture.height, len(prompt)) for picture, prompt in questions)
        return ask_in_turns(askers, questions, **settings)

    monkeypatch.setattr(sharing, "ask_in_turns", noted)
    run = runner.answer_all(model, processor, (), benchmark("chair"), data, tmp_path, batch_size=3, max_new_tokens=2)
    assert asked == sorted(asked, reverse=True) and len(set(asked)) > 3
    assert [r["id"] for r in run.records] == [str(key) for key in data.images]
    same_size = [
        Item(str(k), str(next(iter(data.images.values()))), prompt) for k, prompt in enumerate(("a?", "a long one?"))
    ]
    assert batches.share_of(same_size, Workers()) == same_size, "questions about one picture stay as they are"


def test_other_errors_are_not_hidden(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(sharing, "ask_in_turns", broken)
    with pytest.raises(RuntimeError, match="something else"):
        runner.answer_all(*vlmfix.load("organism"), (), benchmark("chair"), Data.load(limit=2), tmp_path)
