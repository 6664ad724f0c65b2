"""lmms-eval end to end, in processes of its own: `make test-integrations`. It exits 0 also after a failure, so what counts
is the file of its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlmfix
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import chair

pytest.importorskip("lmms_eval")
ROOT = Path(__file__).parents[2]
LIMIT, TOKENS = 8, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where tasks, caches and results are; this checkout's entry point is among those that Python finds."""
    folder = tmp_path_factory.mktemp("lmms")
    info = folder / "found" / "vlmfix-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vlmfix\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[lmms_eval.models]\nvlmfix = vlmfix.integrations.lmms:manifests\n")
    run(folder, "-m", "vlmfix.integrations.lmms_tasks", folder / "tasks", "--limit", LIMIT, "--max-new-tokens", TOKENS)
    return folder


def run(folder, *arguments):
    path = os.pathsep.join([str(folder / "found"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hf"),
    }
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def evaluate(folder, model_args, *launcher):
    """Figures of a run, how many answers came from the cache, and what it said; `None` where there are no figures."""
    out = folder / f"out{len(list(folder.glob('out*')))}"
    said = run(
        folder, *(launcher or ("-m", "lmms_eval")), "--model", "vlmfix", "--model_args", model_args, "--tasks", "chair_vlmfix",
        "--include_path", folder / "tasks", "--batch_size", "4", "--device", "cpu", "--use_cache", folder / "cache",
        "--output_path", out,
    )  # fmt: skip
    files = list(out.rglob("*results.json"))
    figures = json.loads(files[0].read_text())["results"]["chair_vlmfix"] if files else None
    hits = [line.split("stats: ")[1].split(" hits")[0] for line in said.splitlines() if "stats: " in line]
    return figures, hits, said


def test_figures_are_those_of_ask_and_answers_are_kept_by_method(folder):
    data, (model, processor) = Data.load("organism", LIMIT), vlmfix.load("organism")
    asker = vlmfix.Asker(model, processor, "vhr:alpha=1.5")
    prompt = "Please describe this image in detail."
    captions = {key: asker.ask(path, prompt, max_new_tokens=TOKENS).text for key, path in data.images.items()}
    counts = {name: values.sum() for name, values in chair.counts(chair.score_captions(captions, data.truth)).items()}
    for hits in ("0", str(LIMIT)):
        figures, told, said = evaluate(folder, "pretrained=organism,method=vhr,alpha=1.5")
        assert figures is not None, said[-3000:]
        assert told == [hits]
        for metric in ("CHAIR_S", "CHAIR_I", "recall"):
            assert figures[f"{metric},none"] == pytest.approx(float(chair.METRICS[metric](counts)))
    assert evaluate(folder, "pretrained=organism,method=vhr,alpha=1.5,tag=again")[1] == ["0"]


def test_two_processes_share_the_questions(folder):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611", "-m", "lmms_eval")
    figures, _, said = evaluate(folder, "pretrained=organism,method=vhr,alpha=1.5,tag=two", *launcher)
    assert figures is not None, said[-3000:]
    assert figures == pytest.approx(evaluate(folder, "pretrained=organism,method=vhr,alpha=1.5")[0], nan_ok=True)


def test_misspelt_settings_and_files_without_their_digest_are_refused(folder):
    figures, _, said = evaluate(folder, "pretrained=organism,method=vhr,alhpa=1.5")
    assert figures is None and "did you mean 'alpha'" in said
    (folder / "heads.json").write_text("{}")
    figures, _, said = evaluate(folder, "pretrained=organism,method=headgain,head_list=heads.json")
    assert figures is None and "or add tag=" in said
