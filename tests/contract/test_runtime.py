"""What runtimes can bring: kernels, compiled code, number formats, placement, adapters, copies. On several families."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from transformers import AttentionInterface, AutoModelForImageTextToText, BitsAndBytesConfig, CompileConfig

import vlmfix
from tests import zoo
from tests.contract.test_contract import footprint
from tests.contract.test_zoo import answer, logits, same
from tests.contract.test_zoo_features import ATTENTION, FAMILIES, METHODS, Again
from vlmfix.engine.wrap import effects, wrapped
from vlmfix.hooks import PAI, VHR


@pytest.fixture(params=FAMILIES)
def family(request):
    return zoo.tiny(request.param)


# ---- kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("model_type", ["llava", "gemma3", "mistral3", "internvl"])
def test_flex_attention_as_base_kernel(model_type, name):
    family = zoo.tiny(model_type)
    inputs = zoo.prompt(family, ["tttIttt", "ttIttttt"])
    with METHODS[name](family):
        want = logits(family, inputs)
    family.set_attn_implementation({"text_config": "flex_attention"})
    with METHODS[name](family), torch.compiler.set_stance("force_eager"):  # no compiled flex on every CPU
        found = logits(family, inputs)
    keep = inputs["attention_mask"].bool()
    same(found[keep], want[keep])


def test_eager_and_sdpa_as_base_kernel(family):
    inputs = zoo.prompt(family, ["tttIttt", "ttIttttt"])
    for one in (METHODS[name] for name in ATTENTION):
        found = {}
        for kernel in ("sdpa", "eager"):
            family.set_attn_implementation({"text_config": kernel})
            with one(family):
                found[kernel] = answer(family, inputs)[1]
        same(found["eager"], found["sdpa"])


def flash_on_paper(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **_):
    """What a flash kernel computes, from what a flash kernel gets: no mask, or the (B, K) mask of what is no padding."""
    assert attention_mask is None or attention_mask.dim() == 2
    n, m = query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    at, to = torch.arange(m - n, m)[:, None], torch.arange(m)[None]
    seen = ((to <= at) if module.is_causal and n > 1 else (to <= m)) & (to > at - (sliding_window or m))
    seen = seen[None, None] if attention_mask is None else seen & attention_mask[:, None, None, -m:].bool()
    scores = (query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)).masked_fill(~seen, -1e9)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl", "qwen3_5", "mistral3", "cohere2_vision"])
def test_flash_attention_by_its_code_path(model_type, monkeypatch):
    """Masks, windows and cache as flash kernels get them, here with a kernel that needs no GPU."""
    changes = {"text_config": {"sliding_window": 6}} if model_type in ("mistral3", "cohere2_vision") else None
    model = zoo.tiny(model_type, changes=changes)
    inputs = zoo.prompt(model, ["tttIttt", "ttIttttt"])
    want = {}
    for name in ATTENTION:
        with METHODS[name](model):
            want[name] = answer(model, inputs)[1]
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash_on_paper)
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    plain = answer(model, inputs)[1]
    with Again()(model):
        same(answer(model, inputs)[1], plain)
    for name in ATTENTION:
        with METHODS[name](model):
            same(answer(model, inputs)[1], want[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash kernels need a GPU")
def test_flash_attention_on_a_gpu(family):
    pytest.importorskip("flash_attn")
    model = family.to("cuda", torch.float16)
    inputs = {
        k: v.to("cuda", torch.float16) if v.is_floating_point() else v.to("cuda")
        for k, v in zoo.prompt(model, ["tttIttt", "ttIttttt"]).items()
    }
    for name in ATTENTION:
        found = {}
        for kernel in ("sdpa", "flash_attention_2"):
            model.set_attn_implementation({"text_config": kernel})
            with METHODS[name](model):
                found[kernel] = logits(model, inputs)
        same(found["flash_attention_2"], found["sdpa"], 5e-2)


# ---- compiled code --------------------------------------------------------------------------------------------------


def small(model_type):
    """One layer is enough for what compiled code can get wrong, and takes less time to compile."""
    one = {"num_hidden_layers": 1} | ({"layer_types": ["full_attention"]} if model_type != "llava" else {})
    return zoo.tiny(model_type, changes={"text_config": one})


@pytest.fixture
def compiles_anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def decoder(model):
    return getattr(model.get_decoder(), "language_model", model.get_decoder())


BOTH = [PAI(alpha=2.0, skip_first=0), VHR(layers=(0,))]
"""Edits of attention and of head outputs."""


def passes_of_compiled_code(model, part, interventions):
    """Compiled before it was wrapped: the edits come, and they go."""
    inputs = zoo.prompt(model, ["tttIttt"])
    with wrapped(model, interventions):
        edited = logits(model, inputs)
    plain = logits(model, inputs)
    part.forward = torch.compile(part.forward, backend="eager")
    assert torch.equal(logits(model, inputs), plain)
    with wrapped(model, interventions):
        assert torch.equal(logits(model, inputs), edited) and not torch.equal(edited, plain)
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("one", BOTH, ids=lambda one: one.name)
def test_compiled_layer(one, compiles_anew):
    model = small("llava")
    passes_of_compiled_code(model, decoder(model).layers[0], one)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_5", "qwen3_vl"])
def test_compiled_decoder(model_type, compiles_anew, request):
    if not request.config.getoption("--all-models"):
        pytest.skip("compiling takes its time; --all-models does it")
    model = small(model_type)
    passes_of_compiled_code(model, decoder(model), BOTH)


def test_compiled_in_one_piece_is_refused_with_the_reason(compiles_anew):
    model = small("llava")
    inputs = zoo.prompt(model, ["tttIttt"])
    layer = decoder(model).layers[0]
    layer.forward = torch.compile(layer.forward, backend="eager", fullgraph=True)
    logits(model, inputs)
    for one in BOTH:
        with one(model), pytest.raises(torch._dynamo.exc.Unsupported, match="cannot be compiled with fullgraph=True"):
            logits(model, inputs)


def test_static_cache_with_a_compiled_forward(compiles_anew, request):
    """What `generate` does by itself on a GPU."""
    if not request.config.getoption("--all-models"):
        pytest.skip("compiling takes its time; --all-models does it")
    model = small("llava")
    inputs = zoo.prompt(model, ["tttIttt"])
    config = CompileConfig(backend="eager")
    config._compile_all_devices = True
    with wrapped(model, BOTH):
        want = answer(model, inputs, cache_implementation="static", disable_compile=True)[1]
        same(answer(model, inputs, cache_implementation="static", compile_config=config)[1], want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"], "something was compiled"


# ---- number formats, placement, adapters, copies --------------------------------------------------------------------


def converted(inputs, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ATTENTION)
def test_half_precision(family, name, dtype):
    """The edit is the one of float32, as far as the format goes."""
    inputs = zoo.prompt(family, ["tttIttt"])
    with METHODS[name](family):
        exact, chose = logits(family, inputs), _heads(family)
    model, inputs = family.to(dtype), converted(inputs, dtype)
    plain = logits(model, inputs)
    with METHODS[name](model):
        edited, chosen = logits(model, inputs), _heads(model)
    assert edited.dtype == dtype and not torch.equal(edited, plain)
    # Which heads pass, or are chosen, may change with the last digit; GIFT with all heads is away by 0.09.
    if name not in ("var", "gift") and chosen == chose:
        away = lambda a: (a.float() - exact)[:, -1].norm()  # noqa: E731
        assert away(edited) < 0.3 * away(plain)


def _heads(model):
    (found,) = effects(model)
    layers = found["samples"][0]["layers"] if found["name"] == "vhr" else {}
    return {layer: one["heads"] for layer, one in layers.items()}


@pytest.mark.parametrize("model_type", ["llava", "gemma3", "mistral3", "qwen3_vl"])
def test_placed_by_device_map(model_type, tmp_path):
    """`device_map="auto"` with too little room: some layers on the processor, the others on disk."""
    model = zoo.tiny(model_type)
    inputs, want = zoo.prompt(model, ["tttIttt"]), {}
    for name, one in METHODS.items():
        with one(model):
            want[name] = answer(model, inputs)[1]
    model.save_pretrained(tmp_path / "model")
    room = int(0.6 * sum(p.numel() * p.element_size() for p in model.parameters()))
    placed = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": room}, offload_folder=tmp_path / "disk"
    )
    placed.generation_config.eos_token_id = None
    assert set(placed.hf_device_map.values()) == {"cpu", "disk"}
    for name, one in METHODS.items():
        with one(placed):
            same(answer(placed, inputs)[1], want[name], 1e-4)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("model_type", ["llava", "mistral3", "qwen3_5", "qwen3_vl"])
def test_weights_offloaded(model_type, name):
    family = zoo.tiny(model_type)
    inputs = zoo.prompt(family, ["tttIttt"])
    with METHODS[name](family):
        want = answer(family, inputs)[1]
    cpu_offload(family, execution_device=torch.device("cpu"))
    with METHODS[name](family):
        assert torch.equal(answer(family, inputs)[1], want)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model_type", ["llava", "gemma3", "mistral3", "qwen3_vl"])
def test_quantised_linear_layers(model_type, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    full = zoo.tiny(model_type)
    inputs = zoo.prompt(full, ["tttIttt"])
    full.save_pretrained(tmp_path)
    options = {"bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {}
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options),
        device_map="cpu",
        dtype=torch.float32,
    )
    model.generation_config.eos_token_id = None
    assert f"{bits}bit" in type(decoder(model).layers[0].self_attn.o_proj).__name__
    plain = answer(model, inputs)[1]
    before = footprint(model)
    with Again()(model):
        same(answer(model, inputs)[1], plain, 5e-2)
    for one in METHODS.values():
        with one(model):
            assert not torch.equal(answer(model, inputs)[1], plain)
    assert torch.equal(answer(model, inputs)[1], plain) and footprint(model) == before


@pytest.mark.parametrize("name", ATTENTION)
def test_lora_adapters(family, name):
    """Wrapped with an adapter on: the edit is that of the model with the adapter merged into it."""
    peft = pytest.importorskip("peft")
    inputs = zoo.prompt(family, ["tttIttt"])
    plain = logits(family, inputs)
    config = peft.LoraConfig(target_modules=r".*language_model.*\.(q_proj|o_proj)", init_lora_weights=False)
    model = peft.get_peft_model(family, config)
    adapted, found = logits(model, inputs), []
    assert not torch.equal(adapted, plain)
    for outside_or_inside in (model, family):
        with METHODS[name](outside_or_inside):
            found.append(answer(model, inputs)[1])
    assert torch.equal(*found) and torch.equal(logits(model, inputs), adapted)
    merged = model.merge_and_unload()
    with METHODS[name](merged):
        same(found[0], answer(merged, inputs)[1])


def test_an_adapter_that_comes_after_the_edits_is_told(family):
    peft = pytest.importorskip("peft")
    inputs = zoo.prompt(family, ["tttIttt"])
    vlmfix.wrap(family, METHODS["vhr"])
    model = peft.get_peft_model(family, peft.LoraConfig(target_modules=r".*language_model.*\.o_proj"))
    with pytest.raises(ValueError, match="replaced after it was wrapped"):
        answer(model, inputs)
    vlmfix.unwrap(family)
    vlmfix.wrap(family, METHODS["vhr"])
    answer(model, inputs)


@pytest.mark.parametrize("name", ATTENTION)
def test_copies_and_pickles(family, name):
    inputs = zoo.prompt(family, ["tttIttt"])
    vlmfix.wrap(family, METHODS[name])
    twins = [pickle.loads(pickle.dumps(family)), copy.deepcopy(family)]
    edited = logits(family, inputs)
    assert all(torch.equal(logits(twin, inputs), edited) for twin in twins)


def test_two_wrapped_models(family):
    other = zoo.tiny("llava", seed=1)
    inputs, theirs = zoo.prompt(family, ["tttIttt"]), zoo.prompt(other, ["ttIttttt"])
    vlmfix.wrap(family, METHODS["pai"])
    mine = answer(family, inputs)[1]
    vlmfix.wrap(other, METHODS["vhr"])
    edited = answer(other, theirs)[1]
    assert torch.equal(answer(family, inputs)[1], mine)
    vlmfix.unwrap(family)
    assert torch.equal(answer(other, theirs)[1], edited)
