"""Tiny models with random weights, built from configs in milliseconds, and prompts for them."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.llama import modeling_llama

from vlmfix.engine import attention

IMAGE = 60
TEXT = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 32,
    "initializer_factor": 4.0,
}


def _finish(model, attn):
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None  # random models would stop at once
    model.generation_config.pad_token_id = 0
    return model.eval()


def llava(attn="sdpa", n_layers=4, seed=0):
    """LLaVA-1.5: CLIP + Llama with grouped keys, 16 image tokens."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, num_hidden_layers=n_layers),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return _finish(LlavaForConditionalGeneration(config), attn)


def llava_next(attn="sdpa", n_layers=4, seed=0):
    """LLaVA-NeXT: tiles and newline features."""
    torch.manual_seed(seed)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, num_hidden_layers=n_layers),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    return _finish(LlavaNextForConditionalGeneration(config), attn)


def qwen2_5_vl(attn="sdpa", n_layers=4, seed=0):
    """Qwen2.5-VL: dynamic resolution, M-RoPE, biases on the projections."""
    torch.manual_seed(seed)
    text = {k: v for k, v in TEXT.items() if k != "head_dim"}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "out_hidden_size": 48,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        },
        text_config={
            **text,
            "num_hidden_layers": n_layers,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=58,
        vision_end_token_id=59,
    )
    return _finish(Qwen2_5_VLForConditionalGeneration(config), attn)


ARCHITECTURES = {"llava": llava, "llava_next": llava_next, "qwen2_5_vl": qwen2_5_vl}


def _image(model, generator):
    """Pixels of one picture, the number of its image tokens, and what else the model wants to know of it."""
    kind = model.config.model_type
    noise = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    if kind == "llava":
        return {"pixel_values": noise(1, 3, 16, 16)}, 16
    if kind == "llava_next":  # 16 x 30 pixels: base view, two tiles, one newline per row of the cut grid
        return {"pixel_values": noise(1, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 30]])}, 16 + 4 * 8 + 4
    return {"pixel_values": noise(24, 96), "image_grid_thw": torch.tensor([[1, 4, 6]])}, 6


def picture_prompt(model, batch=1, n_images=1, seed=0, lengths=None, pad="left"):
    """Inputs of `batch` samples with `n_images` pictures each and random text around them, of different `lengths`."""
    g = torch.Generator().manual_seed(seed)
    rows, images = [], []
    for b in range(batch):
        after = (lengths or [5] * batch)[b]
        ids = [1, *torch.randint(3, 50, (3,), generator=g).tolist()]
        for _ in range(n_images):
            image, n = _image(model, g)
            images.append(image)
            marks = ([58], [59]) if model.config.model_type == "qwen2_5_vl" else ([], [])
            ids += [*marks[0], *[IMAGE] * n, *marks[1], *torch.randint(3, 50, (2,), generator=g).tolist()]
        rows.append(ids + torch.randint(3, 50, (after,), generator=g).tolist())
    width = max(map(len, rows))
    fill = lambda row, value: [value] * (width - len(row))  # noqa: E731
    left = pad == "left"
    ids = [fill(r, 0) + r if left else r + fill(r, 0) for r in rows]
    mask = [fill(r, 0) + [1] * len(r) if left else [1] * len(r) + fill(r, 0) for r in rows]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    inputs |= {k: torch.cat([i[k] for i in images]) for k in images[0]}
    if model.config.model_type == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return inputs


def plant_sinks(model, dim=7, size=400.0):
    """Massive activations: the first token and some image tokens carry one huge entry through the residual stream."""
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[[1, 3, 11, 17], dim] = size
        projector = getattr(model.model, "multi_modal_projector", None)
        out = projector.linear_2 if projector is not None else model.model.visual.merger.mlp[2]
        out.weight[dim] *= 0
        out.bias[dim] = 0
        out.weight[dim, 0] = size  # an image token is a sink where its first feature is large
    return model


def answer(model, prompt, **settings):
    """Five tokens, greedily, none of them special."""
    return model.generate(**prompt, max_new_tokens=5, do_sample=False, suppress_tokens=[58, 59, 60, 61], **settings)


@torch.no_grad()
def edited_as_a_whole(monkeypatch, one, edit):
    """Logits of an answer under an intervention; the same by eager attention over all queries and keys of prompt and
    answer, with `edit(a, layer, n)` on the weights (B, H, Q, K), n of them prompt; and those of the untouched model."""
    monkeypatch.setattr(attention, "PIECE", 5)
    model, prompt = llava(), picture_prompt(llava())
    with one(model):
        got = answer(model, prompt, output_logits=True, return_dict_in_generate=True)
    n = prompt["input_ids"].shape[1]
    whole = {**prompt, "input_ids": got.sequences[:, :-1], "attention_mask": torch.ones_like(got.sequences[:, :-1])}

    def eager(module, query, key, value, mask, scaling, **_):
        key, value = (modeling_llama.repeat_kv(x, 3) for x in (key, value))
        s = (query @ key.transpose(-1, -2)) * scaling
        t = s.shape[-1]
        a = s.masked_fill(torch.arange(t) > torch.arange(t)[:, None], -torch.inf).softmax(-1)
        a = edit(a, module.layer_idx, n)
        return (a @ value).transpose(1, 2), a

    plain = model(**whole).logits[0, n - 1 :]
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)
    return torch.stack(got.logits)[:, 0], llava("eager")(**whole).logits[0, n - 1 :], plain
