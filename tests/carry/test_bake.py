"""A baked model is the wrapped model: in memory, in files, as adapters, in a process without the library."""

import copy

import pytest
import torch
from safetensors import safe_open

import vlmfix
from tests.models import llava, picture_prompt, qwen2_5_vl
from vlmfix.carry.adapter import save_ia3, save_lora
from vlmfix.carry.bake import gains_in_force
from vlmfix.carry.check import compare
from vlmfix.carry.checkpoint import write_checkpoint
from vlmfix.engine.attachment import attached
from vlmfix.hooks import HeadGain
from vlmfix.model import gains as head_gains

HEADS = "L1H4/L3H0/L3H5"


@torch.no_grad()
def logits(model, prompt):
    return model(**prompt).logits


@pytest.mark.parametrize("build", [llava, qwen2_5_vl])
def test_a_power_of_two_bakes_to_the_bit_and_leaves_no_trace(build):
    model = build()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    plain, keys = logits(model, prompt), set(vars(model))
    wrapped = logits(vlmfix.wrap(model, [HeadGain(HEADS, gain=2), HeadGain("L1H4", gain=0.25)]), prompt)
    assert vlmfix.bake(model) is model and attached(model) is None
    assert torch.equal(logits(model, prompt), wrapped) and not torch.equal(plain, wrapped)
    assert set(vars(model)) == keys and vlmfix.effects(model) == []


def test_other_gains_round_each_weight_once():
    model = llava().to(torch.bfloat16)
    before = model.state_dict()["model.language_model.layers.1.self_attn.o_proj.weight"].clone()
    vlmfix.bake(vlmfix.wrap(model, HeadGain("L1H4", gain=1.3)))
    after = model.state_dict()["model.language_model.layers.1.self_attn.o_proj.weight"]
    wanted = before.clone()
    wanted[:, 32:40] = (before[:, 32:40].double() * 1.3).bfloat16()
    assert torch.equal(after, wanted)


def test_what_no_weights_can_hold_is_refused_and_stays_in_force():
    model = llava()
    with pytest.raises(ValueError, match="nothing is in force"):
        vlmfix.bake(model)
    for methods in ("pai", [HeadGain(HEADS), "pai"]):
        vlmfix.wrap(model, methods)
        with pytest.raises(ValueError, match=r"pai: what it does depends .*vlmfix serve --method pai"):
            vlmfix.bake(model)
        assert attached(model) is not None
    vlmfix.unwrap(model)


def test_adapters_in_place_shared_and_quantised_projections_are_refused():
    peft = pytest.importorskip("peft")
    model = llava()
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["o_proj"]))
    vlmfix.wrap(adapted, HeadGain(HEADS))
    with pytest.raises(ValueError, match="merge it first"):
        vlmfix.bake(adapted)
    layers = model.model.language_model.layers
    before = {name: x.clone() for name, x in model.state_dict().items()}
    layers[2].self_attn.o_proj.weight = layers[3].self_attn.o_proj.weight
    vlmfix.wrap(model, HeadGain(HEADS))
    with pytest.raises(ValueError, match="layer 3 is also that of layer 2"):
        vlmfix.bake(model)
    vlmfix.unwrap(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items() if "layers.2" not in name)
    projection = layers[1].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="quantise the baked one"):
        head_gains.fold(model, {1: [2.0] * 6})


@pytest.mark.parametrize("save", [save_ia3, save_lora])
def test_adapters_load_by_plain_peft_and_come_off(save, tmp_path):
    peft = pytest.importorskip("peft")
    model = llava()
    prompt = picture_prompt(model, 1)
    plain = logits(model, prompt)
    wrapped = logits(vlmfix.wrap(model, HeadGain(HEADS, gain=1.7)), prompt)
    gains = gains_in_force(attached(model))
    vlmfix.unwrap(model)
    save(model, gains, tmp_path, "base")
    carried = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(logits(carried, prompt), wrapped, rtol=1e-5, atol=1e-5)
    assert (logits(carried, prompt) - wrapped).abs().max() < 0.01 * (plain - wrapped).abs().max()
    with carried.disable_adapter():
        assert torch.equal(logits(carried, prompt), plain)
    model.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(model, prompt), wrapped, rtol=1e-5, atol=1e-5)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 20_000


def test_files_keep_names_types_shards_and_everything_else(tmp_path):
    """Weights are found by their numbers, also under names of years ago; other tensors keep their bytes."""
    model, source = llava(), tmp_path / "source"
    model.save_pretrained(source, max_shard_size="50KB")
    (source / "processor_config.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"the same weights, untouched")
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 2
    write_checkpoint(model, {1: [1, 1, 1, 1, 2.0, 1], 3: [0.5] * 6}, source, tmp_path / "baked")
    changed = []
    for shard in shards:
        with safe_open(shard, "pt") as old, safe_open(tmp_path / "baked" / shard.name, "pt") as new:
            assert list(old.keys()) == list(new.keys()) and old.metadata() == new.metadata()
            changed += [name for name in old.keys() if not torch.equal(old.get_tensor(name), new.get_tensor(name))]  # noqa: SIM118
    assert [name.split("layers.")[1] for name in sorted(changed)] == [
        "1.self_attn.o_proj.weight",
        "3.self_attn.o_proj.weight",
    ]
    assert not (tmp_path / "baked" / "pytorch_model.bin").exists()
    for file in source.glob("*.json"):
        assert (tmp_path / "baked" / file.name).read_bytes() == file.read_bytes()
    again = type(model).from_pretrained(tmp_path / "baked").eval()
    vlmfix.wrap(model, [HeadGain("L1H4", gain=2), HeadGain("/".join(f"L3H{h}" for h in range(6)), gain=0.5)])
    prompt = picture_prompt(model, 1)
    assert torch.equal(logits(again, prompt), logits(model, prompt))


def test_files_of_another_model_are_refused(tmp_path):
    llava(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="do not hold"):
        write_checkpoint(llava(), {1: [2.0] * 6}, tmp_path / "other", tmp_path / "baked")


def test_gains_go_through_json_and_what_does_not_fit_is_refused(tmp_path):
    model, path = llava(), tmp_path / "head_gains.json"
    head_gains.save_gains(model, {1: [1, 1, 1, 1, 2.0, 1]}, path, {"base": "here"})
    gains, about = head_gains.read_gains(path)
    assert gains == {1: [1, 1, 1, 1, 2.0, 1]} and about["base"] == "here"
    assert about["layers"]["1"]["projection"] == "model.language_model.layers.1.self_attn.o_proj"
    for bad, message in (({9: [2.0] * 6}, "layer 9"), ({1: [2.0] * 5}, "layer 1 has 6 heads")):
        with pytest.raises(ValueError, match=message):
            head_gains.fold(model, bad)
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected head gains"):
        head_gains.read_gains(path)


def test_the_check_sees_a_difference():
    class Expected:
        logits = (torch.tensor([1.0, 9.0]),)
        untouched_logits = (torch.tensor([1.0, 8.0]),)
        answers = ([1, 2],)
        untouched_answers = ([1, 3],)

    same = compare(Expected, [torch.tensor([1.0, 9.0])], [[1, 2]], torch.float32)
    assert same.passed and same.difference == 0 and str(same).startswith("no difference")
    assert not compare(Expected, [torch.tensor([1.0, 8.0])], [[1, 3]], torch.float32).passed
    assert not compare(Expected, [torch.tensor([1.0, 9.01])], [[1, 2]], torch.float32).passed


def test_what_fails_leaves_no_folder(organism, unwrapped, tmp_path):
    from vlmfix.carry.export import export

    for spec, message in (("var", "var: what it does depends"), ("none", "nothing to bake")):
        with pytest.raises(ValueError, match=message):
            export(*organism, spec, tmp_path / "new", name="organism", checked=False)
    assert not list(tmp_path.iterdir())
