"""A run's identity holds all that its answers depend on, and nothing else."""

import copy
import importlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlmfix
from vlmfix.asking.asker import Asker
from vlmfix.asking.identity import methods_digest, model_identity, processor_digest, weights_digest
from vlmfix.eval.benchmarks.benchmark import Item, benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.pictures.lists import image_list
from vlmfix.eval.run.results import KIND, compare, pictures_digest
from vlmfix.eval.run.runner import answer_all
from vlmfix.hooks.headgain import HeadGain
from vlmfix.method.code import code_digest

ASSETS = Path(__file__).parents[3] / "assets"


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


OWN_METHOD = """
from dataclasses import dataclass

import vlmfix
from {helpers} import strength


@dataclass(frozen=True)
class Mine(vlmfix.Intervention):
    k: int = 1

    def logits(self, step):
        return step.logits * strength()
"""


@pytest.fixture
def own_method(tmp_path, monkeypatch):
    """A method in a file of one's own, with a helper beside it."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{name}.py").write_text(OWN_METHOD.format(helpers=f"{name}_helpers"))
    (tmp_path / f"{name}_helpers.py").write_text("def strength():\n    return 1.0\n")

    def change(ending, old, new):
        path = tmp_path / f"{name}{ending}.py"
        path.write_text(path.read_text().replace(old, new))
        for module in (name, f"{name}_helpers"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()

    yield f"{name}:Mine", change
    change("", "", "")


@pytest.mark.parametrize(("ending", "old", "new"), [("", "k: int = 1", "k: int = 1  #"), ("_helpers", "1.0", "9.0")])
def test_a_method_of_ones_own_is_more_than_its_name(organism, own_method, ending, old, new):
    spec, change = own_method
    before = Asker(*organism, spec).identity
    assert Asker(*organism, spec).identity == before
    change(ending, old, new)
    after = Asker(*organism, spec).identity
    assert after["method"] == before["method"] and after["method_digest"] != before["method_digest"]


def test_a_method_without_a_file_counts_by_its_code():
    def made(factor):
        space = {"__name__": "__nowhere__", "vlmfix": vlmfix, "dataclass": dataclass}
        code = f"def logits(self, step): return step.logits * {factor}\n"
        exec(f"@dataclass(frozen=True)\nclass Mine(vlmfix.Intervention):\n    {code}", space)
        return code_digest({space["Mine"]})

    assert made(1.0) == made(1.0) != made(2.0)


@pytest.mark.parametrize("change", ["heads", "nothing"])
def test_the_file_that_a_setting_names_counts(tmp_path, change):
    (tmp_path / "list.json").write_text("{}")
    method = HeadGain(head_list=str(tmp_path / "list.json"))
    before = methods_digest([method])
    if change == "heads":
        (tmp_path / "list.json").write_text("{ }")
    assert (methods_digest([method]) == before) == (change == "nothing")


def test_the_implementation_of_attention_counts(organism):
    model, _ = organism
    before = model_identity(model)
    model.set_attn_implementation("eager")
    try:
        assert model_identity(model) != before
    finally:
        model.set_attn_implementation("sdpa")
    assert model_identity(model) == before


@pytest.mark.parametrize("rule", ["clean_up_tokenization_spaces", "split_special_tokens"])
def test_rules_of_a_tokenizer_count(organism, rule):
    _, processor = organism
    before, old = processor_digest(processor), getattr(processor.tokenizer, rule)
    try:
        setattr(processor.tokenizer, rule, not old)
        assert processor_digest(processor) != before
    finally:
        setattr(processor.tokenizer, rule, old)
    assert processor_digest(processor) == before


def test_adapters_count_by_what_is_in_force():
    peft = pytest.importorskip("peft")
    model, _ = vlmfix.load("organism")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    before = model_identity(model)
    layer = next(module for module in model.modules() if hasattr(module, "merged_adapters"))
    old = layer.scaling["default"]
    layer.scaling["default"] = old * 2
    assert model_identity(model) != before
    layer.scaling["default"] = old
    with model.disable_adapter():
        assert model_identity(model) != before
    assert model_identity(model) == before


def test_weights_that_lie_elsewhere_count():
    accelerate = pytest.importorskip("accelerate")
    model, _ = vlmfix.load("organism")
    elsewhere = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = weights_digest(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), state_dict=elsewhere)
    assert next(model.parameters()).is_meta and weights_digest(model) == before
    name = next(name for name in elsewhere if name.endswith("q_proj.weight"))
    elsewhere[name].view(-1)[3] += 1
    assert weights_digest(model) != before


def test_scales_of_quantised_weights_count():
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantised(factor):
        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        weight = torch.linspace(-1, 1, 64 * 64).view(64, 64) * factor
        layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        return torch.nn.Sequential(layer.to("cpu"))

    one, two = quantised(1.0), quantised(2.0)
    if one[0].weight.dtype != torch.uint8:
        pytest.skip("this version quantises on an accelerator only")
    assert torch.equal(one[0].weight, two[0].weight) and weights_digest(one) != weights_digest(two)


def test_tied_weights_are_hashed_once_and_counted_everywhere():
    tied = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    apart = copy.deepcopy(tied)
    apart[1].weight = torch.nn.Parameter(tied[0].weight.detach().clone())
    assert weights_digest(tied) == weights_digest(apart)
    apart[1].weight.data[0, 0] += 1
    assert weights_digest(tied) != weights_digest(apart)


def test_a_list_and_ground_truth_that_change_are_read_again(tmp_path):
    """Also within one process."""
    (tmp_path / "ids.txt").write_text("1\n2\n")
    assert image_list(str(tmp_path / "ids.txt")) == (1, 2)
    (tmp_path / "ids.txt").write_text("2\n1\n")
    assert image_list(str(tmp_path / "ids.txt")) == (2, 1)
    content = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "mug"}]}
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1}]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    for words in ("cup, mug", "mug, cup"):
        (tmp_path / "synonyms.txt").write_text(words)
        assert Data.load(str(tmp_path)).truth[1] == {words.partition(",")[0]}
    (tmp_path / "images" / "early").mkdir(parents=True)
    assert not Data.load(str(tmp_path)).picture("a.png").is_file()
    os.utime(tmp_path / "images", ns=(0, 0))
    (tmp_path / "images" / "late").mkdir()
    (tmp_path / "images" / "late" / "a.png").write_bytes(b"x")
    assert Data.load(str(tmp_path)).picture("a.png").is_file()


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
