"""A run's identity holds all that its answers depend on, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlmfix
from vlmfix.asking.asker import Asker
from vlmfix.asking.identity import model_identity, processor_digest, weights_digest
from vlmfix.eval.benchmarks.benchmark import Item, benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run.results import KIND, compare, pictures_digest
from vlmfix.eval.run.runner import answer_all

ASSETS = Path(__file__).parents[3] / "assets"


@pytest.fixture(scope="module")
def organism():
    return vlmfix.load("organism")


def identity(folder):
    model, processor = vlmfix.load(str(folder))
    whole = Asker(model, processor).identity
    del whole["model"]
    return whole


CHANGES = [
    ("processor_config.json", '"do_normalize": true', '"do_normalize": false'),
    ("processor_config.json", '"resample": ', '"resample": 1'),
    ("processor_config.json", '"rescale_factor": 0.00392', '"rescale_factor": 0.00492'),
    ("tokenizer.json", '"single_word": false', '"single_word": true'),
    ("chat_template.jinja", "USER", "User"),
    ("config.json", '"rms_norm_eps": 1e-0', '"rms_norm_eps": 1e-1'),
]


@pytest.mark.parametrize(("name", "old", "new"), CHANGES)
def test_a_changed_file_changes_the_identity(tmp_path, name, old, new):
    shutil.copytree(ASSETS / "organism" / "model", tmp_path / "model")
    shutil.copytree(ASSETS / "organism" / "model", tmp_path / "elsewhere")
    before = identity(tmp_path / "model")
    assert identity(tmp_path / "elsewhere") == before, "where a model lies decides nothing"
    text = (tmp_path / "model" / name).read_text("utf-8")
    assert old in text
    (tmp_path / "model" / name).write_text(text.replace(old, new, 1), "utf-8")
    assert identity(tmp_path / "model") != before


def test_use_leaves_the_identity_as_it_is(organism):
    model, processor = organism
    before = processor_digest(processor), model_identity(model)
    pictures = sorted((ASSETS / "organism" / "test" / "images").glob("*.webp"))
    Asker(model, processor, "vhr").ask_batch([(pictures[0], "What?"), (pictures[1], "Is it a dog?")], max_new_tokens=2)
    assert (processor_digest(processor), model_identity(model)) == before


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_weight_counts(organism, data):
    model, _ = organism
    before = weights_digest(model)
    name = data.draw(st.sampled_from(sorted(dict(model.named_parameters()))))
    values = model.get_parameter(name).data.view(-1)
    place = data.draw(st.integers(0, len(values) - 1))
    old = values[place].clone()
    try:
        values[place] = torch.nextafter(old, old + 1)
        assert weights_digest(model) != before
    finally:
        values[place] = old
    assert weights_digest(model) == before


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=4), data=st.data())
def test_every_byte_of_a_picture_counts(tmp_path, contents, data):
    items = []
    for n, content in enumerate(contents):
        (tmp_path / f"{n}.png").write_bytes(content)
        items += [Item(f"{n}-{k}", str(tmp_path / f"{n}.png"), "What?") for k in range(2)]
    before = pictures_digest(items)
    n = data.draw(st.integers(0, len(contents) - 1))
    place = data.draw(st.integers(0, len(contents[n]) - 1))
    changed = bytearray(contents[n])
    changed[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / f"{n}.png").write_bytes(changed)
    assert pictures_digest(items) != before
    (tmp_path / f"{n}.png").write_bytes(contents[n])
    assert pictures_digest(items) == before


def test_a_changed_input_is_asked_again_and_never_compared_with_the_old_one(organism, tmp_path):
    shutil.copytree(ASSETS / "organism" / "test", tmp_path / "data")
    model, processor = organism
    folders, runs = [], []

    def ask():
        data = Data.load(str(tmp_path / "data"), limit=3)
        run = answer_all(model, processor, (), benchmark("chair"), data, tmp_path / "runs", max_new_tokens=4)
        folders.append(run.folder)
        runs.append(run)

    ask()
    ask()
    assert folders[0] == folders[1]
    pictures = sorted((tmp_path / "data" / "images").glob("*.webp"))
    shutil.copy(pictures[5], pictures[0])
    ask()
    processor.image_processor.do_normalize = False
    try:
        ask()
    finally:
        processor.image_processor.do_normalize = True
    model.generation_config.repetition_penalty = 1.5
    try:
        ask()
    finally:
        model.generation_config.repetition_penalty = None
    assert len(set(folders)) == 4
    assert json.loads((folders[-1] / "run.json").read_text())["identity"]["generation"]["repetition_penalty"] == 1.5
    assert len(compare([runs[0], runs[2], runs[3]], 10)) == 3
    assert {"pictures_digest", "processor_digest"} <= set(KIND)
