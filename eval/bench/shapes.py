"""Models of real shapes with random weights, and prompts for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmfix.method.settings import did_you_mean

SINK = 7
"""Dimension in which the first token and half of the image tokens carry a massive activation."""
TEXT_BEFORE_IMAGE = 5
"""Tokens; the rest of the text, with the question, is after the image."""


@dataclass(frozen=True)
class Shape:
    """A model to measure on: its type, the config of its language model, and image tokens per picture."""

    model_type: str
    text: dict[str, Any]
    image_tokens: int


def _text(kind: str, hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocab,
        "max_position_embeddings": 32768, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip


_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
SHAPES = {
    "llava-1.5-7b": Shape("llava", _text("llama", 4096, 11008, 32, 32, 32, 32064), 576),
    "llava-1.5-13b": Shape("llava", _text("llama", 5120, 13824, 40, 40, 40, 32064), 576),
    "llava-next-7b": Shape("llava", _text("llama", 4096, 11008, 32, 32, 32, 32064), 2880),
    "qwen2.5-vl-7b": Shape("qwen2_5_vl", {**_text("qwen2_5_vl_text", 3584, 18944, 28, 28, 4, 152064), **_MROPE}, 1024),
    "internvl3-8b": Shape("internvl", _text("qwen2", 3584, 18944, 28, 28, 4, 151674), 1792),
    "tiny": Shape("llava", _text("llama", 64, 128, 4, 4, 2, 256), 64),
    "narrow": Shape("llava", _text("llama", 64, 128, 32, 8, 8, 256), 16),
}
"""By name; the number of image tokens is a common one."""
_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
"""Vision towers are small, since no method touches them."""


def find_shape(name: str) -> Shape:
    """`ValueError` for unknown names."""
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; {did_you_mean(name, SHAPES)}")
    return SHAPES[name]


def build(name: str, layers: int | None, dtype: torch.dtype, device: str, attention: str = "sdpa") -> Any:
    """The model, with sinks planted: one of its two image tokens carries a massive activation.

    `layers` is for fewer than the shape has, so that the model fits the machine.
    """
    shape = find_shape(name)
    text = {**shape.text, "num_hidden_layers": layers or shape.text["num_hidden_layers"]}
    image, image_sink = text["vocab_size"] - 1, text["vocab_size"] - 2
    tower = {**_TOWER, "depth": 1, "num_heads": 2, "out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [0]}
    config = AutoConfig.for_model(
        shape.model_type, text_config=text, vision_config=tower, image_token_id=image, video_token_id=image_sink
    )
    config.image_token_index, config.image_token_id, config.video_token_id = image, image, image_sink
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = None  # random models would stop at once
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, SINK] = 0
        embeddings[[1, image_sink], SINK] = 200.0  # far beyond what layers add, so that it lasts through all of them
    return model


def build_prompt(model: Any, name: str, batch: int, text_tokens: int) -> dict[str, Tensor]:
    """Random text around the image tokens of one picture; the same number in all samples, so without padding."""
    if text_tokens <= TEXT_BEFORE_IMAGE:
        raise ValueError(f"text tokens: expected more than {TEXT_BEFORE_IMAGE}, since so many stand before the image")
    vocab = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, vocab - 2, (batch, text_tokens), generator=generator)
    text[:, 0] = 1
    image = vocab - 1 - (torch.arange(find_shape(name).image_tokens) % 2)
    parts = [text[:, :TEXT_BEFORE_IMAGE], image.expand(batch, -1), text[:, TEXT_BEFORE_IMAGE:]]
    ids = torch.cat(parts, dim=1).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def shape_facts(name: str, model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What was measured on, for the results."""
    return {
        "shape": name,
        "layers": model.config.get_text_config(decoder=True).num_hidden_layers,
        "image_tokens": find_shape(name).image_tokens,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "batch_size": len(inputs["input_ids"]),
    }
