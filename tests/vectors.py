"""Reads tests/data/vectors and rebuilds the small models inside."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

VECTORS = Path(__file__).parent / "data" / "vectors"


def load(name):
    """All arrays of a file as tensors, and its `meta["cases"]`, and the whole meta."""
    with np.load(VECTORS / f"{name}.npz") as z:
        meta = json.loads(str(z["meta"]))
        arrays = {k: torch.from_numpy(np.asarray(z[k])) for k in z.files if k != "meta"}
    return arrays, meta["cases"], meta


def _weights(arrays):
    return {k.split("w.", 1)[1]: v for k, v in arrays.items() if "/w." in k or k.startswith("w.")}


def llama(arrays, config):
    """The random Llama of an end-to-end file."""
    settings = {k: v for k, v in config.items() if k not in ("arch", "rope_theta")}
    model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="sdpa"))
    model.load_state_dict(_weights(arrays))
    return model.eval()


def llava(arrays, case):
    """The random LLaVA of `var_vhr_paint_llava`."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**case["vision_config"]),
        text_config=LlamaConfig(**case["text_config"]),
        image_token_index=case["image_token_index"],
        image_seq_length=case["image_seq_length"],
        vision_feature_layer=case["vision_feature_layer"],
        vision_feature_select_strategy=case["vision_feature_select_strategy"],
    )
    model = LlavaForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(_weights(arrays), strict=False)
    assert not unexpected and all("position_ids" in m for m in missing), (missing, unexpected)
    return model.eval()


@torch.no_grad()
def greedy(model, n, **prompt):
    """Prefill logits (T, V), `n` greedy tokens, and the logits (n, V) after feeding each, one sample."""
    out = model(**prompt, use_cache=True)
    prefill, tokens, steps = out.logits[0], [], []
    for _ in range(n):
        tokens.append(int(out.logits[0, -1].argmax()))
        out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits[0, -1])
    return prefill, tokens, torch.stack(steps)
