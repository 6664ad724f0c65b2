"""All knowledge about models: where a loaded model keeps its decoder, attention, heads and image tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
OUT_PROJ_NAMES = ("o_proj", "out_proj", "dense", "wo", "c_proj", "proj")
IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer: the module, its attention module and the output projection that joins the heads."""

    module: nn.Module
    attention: nn.Module
    out_proj: nn.Module


@dataclass(frozen=True)
class Anatomy:
    """The parts of a vision-language model that interventions act on, read from the real objects."""

    model_type: str
    """Of the whole model, as transformers names it (`llava`, `qwen2_5_vl` ...)."""
    text_type: str
    """Of the language model inside (`llama`, `qwen2_5_vl_text` ...)."""
    decoder: nn.Module
    """The text decoder: takes `inputs_embeds`, returns hidden states."""
    layers: tuple[DecoderLayer, ...]
    n_heads: int
    """Query heads H (grouped keys do not matter)."""
    head_dim: int
    """d = inputs of the output projection / H; not hidden size / H."""
    hidden_size: int
    """D, width of the residual stream."""
    vocab_size: int
    image_token_ids: tuple[int, ...]
    """Placeholder ids of image and video tokens in `input_ids`; empty if the model has none."""
    bos_token_id: int | None


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def _layers(decoder: nn.Module) -> tuple[DecoderLayer, ...]:
    for child in decoder.children():
        if not (isinstance(child, nn.ModuleList) and len(child)):
            continue
        found = []
        for layer in child:
            attention = _child(layer, ATTENTION_NAMES)
            out_proj = None if attention is None else _child(attention, OUT_PROJ_NAMES)
            if attention is not None and out_proj is not None:
                found.append(DecoderLayer(layer, attention, out_proj))
        if len(found) == len(child):
            return tuple(found)
    raise TypeError(
        f"cannot find the attention layers of {type(decoder).__name__}: looked for a ModuleList whose layers have one "
        f"of {', '.join(ATTENTION_NAMES)} with one of {', '.join(OUT_PROJ_NAMES)} inside"
    )


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a loaded transformers model. `TypeError` names what was looked for and not found."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder") or not hasattr(config, "get_text_config"):
        raise TypeError(
            f"expected a transformers vision-language model such as LlavaForConditionalGeneration, got "
            f"{type(model).__name__}; load one with vlmfix.load(name)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{type(model).__name__} is an encoder-decoder; vlmfix supports models with a text decoder only"
        )
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    text = config.get_text_config(decoder=True)
    layers = _layers(decoder)
    n_heads = text.num_attention_heads
    width = getattr(layers[0].out_proj, "in_features", None)
    if width is None or width % n_heads:
        raise TypeError(
            f"cannot find the head size of {type(decoder).__name__}: its output projection takes {width} features, "
            f"which is no multiple of {n_heads} heads"
        )
    ids = (getattr(config, field, None) for field in IMAGE_TOKEN_FIELDS)
    return Anatomy(
        model_type=config.model_type,
        text_type=text.model_type,
        decoder=decoder,
        layers=layers,
        n_heads=n_heads,
        head_dim=width // n_heads,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        image_token_ids=tuple(dict.fromkeys(i for i in ids if isinstance(i, int))),
        bos_token_id=getattr(text, "bos_token_id", None),
    )
