"""What prompts and decoding can bring, on at least four families each."""

import inspect
from dataclasses import dataclass

import pytest
import torch

import vlmfix
from tests import zoo
from tests.contract.examples import STEPWISE
from tests.contract.test_zoo import METHODS as EVERY
from tests.contract.test_zoo import answer, logits, same
from vlmfix.method.intervention import Intervention
from vlmfix.model.anatomy import anatomy

FAMILIES = ("llava", "gemma3", "qwen3_5", "qwen3_vl")
METHODS = {name: one for name, one in EVERY.items() if name not in ("lookback", "paint", "pyramiddrop")}
"""Methods that edit answers and that every family takes."""
SILENT = {name for name, one in METHODS.items() if one.acts_at("logits") or one.rows == "generated"} | STEPWISE
ATTENTION = [name for name in METHODS if name not in SILENT]
"""Of these, what a forward pass over a prompt shows."""


@dataclass(frozen=True)
class Look(Intervention):
    """Keeps what it sees of the last pass."""

    rows = "all"

    def weights(self, a, site):
        SEEN.append((a.clone(), site))
        return a


@dataclass(frozen=True)
class Again(Intervention):
    """Has every row done again, and changes nothing but by rounding."""

    rows = "all"

    def weights(self, a, site):
        return a * (1 + 1e-6)


SEEN: list = []


@pytest.fixture(autouse=True)
def _nothing_seen():
    SEEN.clear()


@pytest.fixture(params=FAMILIES)
def family(request):
    return zoo.tiny(request.param)


@pytest.mark.parametrize("layout", ["Ittt", "ttIttItt", "tttII", "tItttIttttItt"])
def test_where_pictures_stand(family, layout):
    """First, last, in a row, in several turns: geometry follows the placeholders, and every method acts."""
    inputs = zoo.prompt(family, [layout])
    with Look()(family):
        logits(family, inputs)
    image, ids = SEEN[-1][1].geometry.image, inputs["input_ids"]
    assert torch.equal(image, ids == zoo.image_token(family))
    g = SEEN[-1][1].geometry
    first, last = image[0].nonzero()[[0, -1], 0]
    assert g.system[0].sum() == first and g.instruction[0].sum() == ids.shape[1] - 1 - last
    for one in (METHODS[name] for name in METHODS if name != "var"):  # which goes by the picture's own activations
        plain = answer(family, inputs, 3)[1]
        with one(family):
            assert not torch.equal(answer(family, inputs, 3)[1], plain)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "glm4v", "kimi_k25", "lfm3_vl"])
def test_pictures_of_different_size_in_one_batch(model_type):
    model = zoo.tiny(model_type)
    layouts = ["tIttt", "ttJttItt"]
    inputs = zoo.prompt(model, layouts)
    for name in ATTENTION:
        with METHODS[name](model):
            together = answer(model, inputs, 3)[1]
            for b, layout in enumerate(layouts):
                same(answer(model, zoo.prompt(model, [layout], first=b), 3)[1][:, 0], together[:, b])


def video_token(model):
    return getattr(model.config, "video_token_id", None) or model.config.video_token_index


def film(model, layout):
    """Inputs of one sample, written as a layout: `t` a text token, `V` a video, `I` a picture after it."""
    inputs = zoo.prompt(model, [layout.replace("V", "")])
    g = torch.Generator().manual_seed(7)
    if "video_grid_thw" in inspect.signature(model.forward).parameters:
        clip = {
            "pixel_values_videos": torch.randn(2 * 4 * 4, 6 * zoo.PATCH**2, generator=g),
            "video_grid_thw": torch.tensor([[2, 4, 4]]),
        }
    else:
        clip = {"pixel_values_videos": torch.randn(1, 8, 3, zoo.SIDE, zoo.SIDE, generator=g)}
    with torch.no_grad():
        seen = getattr(model, "get_video_features", getattr(model.model, "get_video_features", None))(**clip)
    seen = seen.pooler_output if torch.is_tensor(seen.pooler_output) else torch.cat(list(seen.pooler_output))
    n, at = len(seen.reshape(-1, seen.shape[-1])), layout.index("V")
    for name, value in {"input_ids": video_token(model), "attention_mask": 1, "mm_token_type_ids": 2}.items():
        if (x := inputs.get(name)) is not None:
            inputs[name] = torch.cat([x[:, :at], torch.full((1, n), value), x[:, at:]], dim=1)
    return {**inputs, **clip}


@pytest.mark.parametrize("layout", ["ttVttt", "tVttIttt"])
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "llava_onevision", "video_llava", "llava_next_video"])
def test_videos_are_seen_like_pictures(model_type, layout):
    model = zoo.tiny(model_type)
    inputs = film(model, layout)
    with Look()(model):
        logits(model, inputs)
    video = inputs["input_ids"] == video_token(model)
    visual = video | (inputs["input_ids"] == zoo.image_token(model))
    assert torch.equal(SEEN[-1][1].geometry.image, visual) and video.sum() > 4
    plain = answer(model, inputs, 3)[1]
    for one in METHODS.values():
        with one(model):
            assert not torch.equal(answer(model, inputs, 3)[1], plain)
            assert vlmfix.effects(model)[0]["samples"][0]["acted"]


def merged(model, inputs):
    """The same prompt as embeddings with the pictures merged in, and where these are."""
    mask = inputs["input_ids"] == zoo.image_token(model)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"].masked_fill(mask, 0))
        seen = getattr(model, "get_image_features", None) or model.model.get_image_features
        out = seen(**{k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")})
    found = next(x for x in (out.pooler_output, out.last_hidden_state) if x is not None)
    features = found if torch.is_tensor(found) else torch.cat(list(found))
    embeds = embeds.masked_scatter(mask[..., None], features)
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}, mask


@pytest.mark.parametrize("model_type", ["llava", "internvl", "mistral3", "fuyu", "cohere2_vision"])
def test_geometry_told_by_the_caller(model_type):
    """Without placeholders in the prompt, `image_mask` says which tokens are image tokens, and is believed."""
    model = zoo.tiny(model_type)
    inputs = zoo.prompt(model, ["tttIttIt", "tIttIttttt"])
    own, mask = merged(model, inputs)
    one_image = mask & ((mask & ~mask.roll(1, 1)).cumsum(1) == 1)
    for one in (METHODS[name] for name in ("pai", "vhr", "contrast")):
        with one(model):
            want = answer(model, inputs, 3)[1]
            same(answer(model, own, 3, image_mask=mask)[1], want)
            beams = answer(model, own, 3, image_mask=mask, num_beams=2)[0]
            if model_type != "fuyu":  # whose beam search fails with pictures
                assert torch.equal(beams, answer(model, inputs, 3, num_beams=2)[0])
            assert not torch.equal(answer(model, own, 3, image_mask=one_image)[1], want)
            with pytest.raises(ValueError, match="give image_mask, bool of shape"):
                answer(model, own, 3)
            with pytest.raises(ValueError, match="image_mask: expected bool of shape"):
                answer(model, own, 3, image_mask=mask[:, 1:])


@pytest.mark.parametrize("name", ATTENTION)
def test_right_padding_equals_left_padding(family, name):
    layouts = ["tttIttt", "ttIttttttt"]
    left, right = (zoo.prompt(family, layouts, pad=pad) for pad in ("left", "right"))
    with METHODS[name](family):
        a, b = logits(family, left), logits(family, right)
    last = right["attention_mask"].sum(1) - 1
    same(a[:, -1], b[torch.arange(2), last])


WINDOWS = {
    "gemma3": {"text_config": {"sliding_window": 6}},
    "mistral3": {"text_config": {"sliding_window": 6}},
    "cohere2_vision": {"text_config": {"sliding_window": 6}},
    "exaone4_5": {"text_config": {"sliding_window": 6}},
    "gemma4": {"text_config": {"sliding_window": 6}},
    "muse_glimmer": {"text_config": {"sliding_window": 6}},
}


@pytest.mark.parametrize("model_type", WINDOWS)
def test_layers_that_keep_a_window_of_keys(model_type):
    model = zoo.tiny(model_type, changes=WINDOWS[model_type])
    inputs = zoo.prompt(model, ["tttIttttttt", "ttIttt"])
    plain = answer(model, inputs, 5)[1]
    with Again()(model):
        same(answer(model, inputs, 5)[1], plain)
    with Look()(model):
        answer(model, inputs, 5)
    seen = {site.geometry.n for _, site in SEEN[-4:]}
    assert min(seen) < inputs["input_ids"].shape[1], "some layer sees the last keys only"
    for a, site in SEEN:
        assert a.shape[-1] == site.geometry.n
        assert not (site.geometry.image & site.geometry.generated).any()
    for name in ATTENTION:
        with METHODS[name](model):
            edited = answer(model, inputs, 5)[1]
            same(answer(model, inputs, 5, use_cache=False)[1], edited)


@pytest.mark.parametrize("model_type", ["paligemma", "gemma3", "shieldgemma2", "gemma4_unified"])
def test_prefixes_and_pictures_that_see_both_ways(model_type):
    model = zoo.tiny(
        model_type, changes={"text_config": {"use_bidirectional_attention": "vision"}} if "4" in model_type else None
    )
    inputs = zoo.prompt(model, ["tttIttt"])
    with Look()(model):
        logits(model, inputs)
    image = (inputs["input_ids"] == zoo.image_token(model))[0]
    first, last = image.nonzero()[[0, -1], 0]
    assert all(a[0, :, first, last].min() > 0 for a, _ in SEEN), "the first image token sees the last one"


GPT_OSS = {"model_type": "gpt_oss", "layer_types": ["full_attention", "sliding_attention"] * 2, "num_local_experts": 4}


@pytest.mark.parametrize("model_type", ["llava", "internvl", "mistral3", "got_ocr2"])
def test_sinks_as_parameters(model_type):
    """Language models of the gpt-oss family can stand in any of these: rows sum to less than 1."""
    text = zoo.shrink(transformers_config("gpt_oss"), {}) | GPT_OSS | {"sliding_window": 64}
    model = with_text(model_type, text, "eager")
    for layer in model.get_decoder().layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    exact(model)
    with Look()(model):
        logits(model, zoo.prompt(model, ["tttIttt"]))
    assert all((a.sum(-1) < 0.999).any() for a, _ in SEEN)


@pytest.mark.parametrize("model_type", ["llava", "internvl", "mistral3", "paligemma"])
def test_softcap(model_type):
    text = zoo.shrink(transformers_config("gemma2"), {}) | {"attn_logit_softcapping": 0.5, "sliding_window": 64}
    model = with_text(model_type, text, "eager")
    exact(model)


def transformers_config(kind):
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind]().to_dict()


def with_text(model_type, text, attn):
    """A tiny model with another language model inside."""
    import transformers
    from transformers import CONFIG_MAPPING

    torch.manual_seed(0)
    config = zoo.tiny_config(model_type)
    config.text_config = CONFIG_MAPPING[text["model_type"]].from_dict(text)
    cls = getattr(transformers, zoo.MAPPING[model_type])
    model = cls._from_config(config, attn_implementation=attn).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def exact(model):
    """All rows done again give the model's own answer, and methods that edit attention act."""
    inputs = zoo.prompt(model, ["tttIttt", "ttIttttt"])
    plain = answer(model, inputs, 3)[1]
    with Again()(model):
        same(answer(model, inputs, 3)[1], plain)
    for name in set(ATTENTION) - {"var"} | ({"var"} if anatomy(model).n_streams == 1 else set()):
        with METHODS[name](model):
            assert not torch.equal(answer(model, inputs, 3)[1], plain)


@pytest.mark.parametrize("model_type", ["mistral_large4", "dots3_note", "minimax_m3_vl"])
def test_sparse_attention_that_picks_its_keys(model_type):
    """Some models ask for their attention's name to know how to hide keys that were not picked."""
    small = {"index_topk": 8, "index_topk_blocks": 1, "index_block_size": 4, "index_local_blocks": 1}
    model = zoo.tiny(
        model_type,
        changes={"text_config": {k: v for k, v in small.items() if k in vars(zoo.tiny_config(model_type).text_config)}},
    )
    exact(model)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "ernie4_5_vl_moe"])
@pytest.mark.parametrize("name", ["vhr", "contrast"])
def test_an_image_free_pass_leaves_position_state_alone(model_type, name):
    model = zoo.tiny(model_type)
    inputs = zoo.prompt(model, ["tttIttttt"])
    answer(model, inputs, 2)
    before = model.model.rope_deltas.clone()
    with METHODS[name](model):
        answer(model, inputs, 2)
        assert torch.equal(model.model.rope_deltas, before)


@pytest.mark.parametrize("name", ["var"])
def test_prefill_in_pieces(family, name):
    if family.config.model_type == "gemma3":
        pytest.skip("pictures see both ways, so transformers cannot cut its prompts")
    layouts = ["tttIttttttt"]
    inputs = zoo.prompt(family, layouts)
    embeds = family.get_input_embeddings()(inputs["input_ids"]).detach()
    mask = inputs["input_ids"] == zoo.image_token(family)
    with METHODS[name](family), torch.no_grad():
        whole = family(inputs_embeds=embeds, image_mask=mask).logits[:, -1]
        for cut in (2, 6, 9):
            first = family(inputs_embeds=embeds[:, :cut], image_mask=mask, use_cache=True)
            second = family(inputs_embeds=embeds[:, cut:], image_mask=mask, past_key_values=first.past_key_values)
            if family.config.model_type != "qwen3_5":  # linear layers round otherwise
                same(second.logits[:, -1], whole)


@pytest.mark.parametrize("name", ATTENTION)
def test_ways_to_decode(family, name):
    inputs = zoo.prompt(family, ["tttIttt"])
    with METHODS[name](family):
        said = answer(family, inputs, 6)[0]
        if family.config.model_type != "qwen3_5":  # linear layers cannot take back what they guessed
            assert torch.equal(answer(family, inputs, 6, prompt_lookup_num_tokens=2)[0], said)
        static = answer(family, inputs, 6, cache_implementation="static", disable_compile=True)[0]
        assert torch.equal(static, said)
        draws = []
        for _ in range(2):
            torch.manual_seed(3)
            draws.append(
                family.generate(**inputs, do_sample=True, max_new_tokens=5, suppress_tokens=list(range(140, zoo.VOCAB)))
            )
        assert torch.equal(*draws)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model_type", ["llava", "mistral3", "qwen3_vl", "internvl", "qwen2_5_vl"])
def test_chunked_prefill_inside_generate(model_type, name):
    model = zoo.tiny(model_type)
    inputs = zoo.prompt(model, ["tttIttItttttt", "ttIttt"])
    with METHODS[name](model):
        whole = answer(model, inputs)[1]
        if METHODS[name].traits.whole_prompt:
            with pytest.raises(ValueError, match="leave out prefill_chunk_size"):
                answer(model, inputs, prefill_chunk_size=5)
        else:
            same(answer(model, inputs, prefill_chunk_size=5)[1], whole)


@pytest.mark.parametrize("name", METHODS)
def test_going_on_from_a_returned_cache(family, name):
    """An answer in two calls of `generate` is the answer in one; a further turn is edited, too."""
    inputs = zoo.prompt(family, ["tttIttt"])
    n, suppressed = inputs["input_ids"].shape[1], list(range(140, zoo.VOCAB))
    with METHODS[name](family):
        said, scores = answer(family, inputs, 6)
        first = family.generate(
            **inputs, max_new_tokens=3, do_sample=False, suppress_tokens=suppressed, return_dict_in_generate=True
        )
        second = {"input_ids": first.sequences, "past_key_values": first.past_key_values}
        rest = answer(family, second, 3, prompt_end=n)
        assert torch.equal(rest[0], said[:, 3:])
        same(rest[1], scores[3:])
    turn = torch.cat([inputs["input_ids"], said, torch.tensor([[5, 8, 13]])], dim=1)
    found = []
    for one in (METHODS[name], Look()):
        with one(family):
            first = family.generate(
                **inputs, max_new_tokens=7, do_sample=False, suppress_tokens=suppressed, return_dict_in_generate=True
            )
            SEEN.clear()
            found.append(answer(family, {"input_ids": turn, "past_key_values": first.past_key_values}, 2)[1])
    assert not torch.equal(*found), "the further turn is edited"
    g = SEEN[-1][1].geometry
    assert torch.equal(g.image[:, :n], inputs["input_ids"] == zoo.image_token(family)) and not g.image[:, n:].any()


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("model_type", ["llava", "gemma3", "mistral3", "qwen3_vl"])
def test_an_assistant_that_proposes_tokens(model_type, name):
    model, assistant = zoo.tiny(model_type), zoo.tiny(model_type, seed=1)
    inputs = zoo.prompt(model, ["tttIttt"])
    with METHODS[name](model):
        said = answer(model, inputs, 6)[0]
        assert torch.equal(answer(model, inputs, 6, assistant_model=assistant)[0], said)
        with METHODS[name](assistant):
            assert torch.equal(answer(model, inputs, 6, assistant_model=assistant)[0], said)


@pytest.mark.parametrize("name", METHODS)
def test_sampling_draws_from_the_edited_model(family, name):
    """The same with and without a cache; chances are those that greedy decoding chooses from."""
    inputs, draws = zoo.prompt(family, ["tttIttt"]), []
    with METHODS[name](family):
        first = answer(family, inputs, 1)[1][0]
        for cache in (True, name in STEPWISE):
            torch.manual_seed(3)
            draws.append(answer(family, inputs, 5, sampled=True, top_k=0, use_cache=cache))
        same(draws[0][1][0], first)
    assert torch.equal(draws[0][0], draws[1][0])


INSIDE = {
    "norm": ("qwen3_vl", "gemma3", "qwen3_5", "kimi_k25", "molmo2"),
    "gate": ("qwen3_5", "qwen3_5_moe", "qwen4_exp", "minicpmv4_6", "dots3_note"),
}


@pytest.mark.parametrize(("part", "model_type"), [(part, t) for part, types in INSIDE.items() for t in types])
def test_norms_and_gates_inside_attention(part, model_type):
    model = zoo.tiny(model_type)
    attention = next(layer.attention for layer in anatomy(model).layers if layer.attention is not None)
    inside = [name for name, _ in attention.named_children()]
    doubled = attention.q_proj.out_features == 2 * attention.o_proj.in_features if "q_proj" in inside else False
    assert any("norm" in name for name in inside) if part == "norm" else doubled or "g_proj" in inside
    exact(model)
