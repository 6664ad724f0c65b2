"""All knowledge about models: where a loaded model keeps its decoder, attention, heads and image tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention", "mixer")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "fc2")
"""The last is how OPT ends the MLP that it writes out in the layer itself."""
OUT_PROJ_NAMES = ("o_proj", "out_proj", "dense", "wo", "c_proj", "proj")
IMAGE_TOKEN_FIELDS = (
    "image_token_id", "image_token_index", "image_patch_id", "video_token_id", "video_token_index",
)  # fmt: skip
PICTURE_ARGUMENTS = ("pixel_values", "image_patches", "flattened_patches")
IMAGE_MASK_ARGUMENTS = ("image_embeds_position_mask",)
GENERATOR_NAMES = ("language_model", "text_model")
STREAM_FIELDS = ("hc_mult", "hc_count", "altup_num_inputs")
NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "layer_norm", "embedding_norm")
HEAD_SCALES = ("logits_scaling", "output_multiplier", "logits_mup_width_multiplier")
"""Fields by which models scale logits after their head, each in its own way."""


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer. In hybrid decoders, layers without softmax attention (linear attention, convolution,
    state space, plain MLP) have no attention and no heads to edit."""

    module: nn.Module
    attention: nn.Module | None = None
    out_proj: nn.Module | None = None
    """The output projection that joins the heads."""
    n_heads: int = 0
    """Query heads H of this layer (grouped keys do not matter)."""
    head_dim: int = 0
    """d = inputs of the output projection / H; not hidden size / H, and with latent attention not the keys' size."""
    mlp: nn.Module | None = None
    """The module whose output is that of the layer's MLP (or experts); some layers of hybrid decoders have none."""

    @property
    def cache_index(self) -> int | None:
        """Number of the layer by which its attention finds its keys and values in the cache."""
        return getattr(self.attention, "layer_idx", None)


@dataclass(frozen=True)
class Anatomy:
    """The parts of a vision-language model that interventions act on, read from the real objects."""

    model_type: str
    """Of the whole model, as transformers names it (`llava`, `qwen2_5_vl` ...)."""
    text_type: str
    """Of the language model inside (`llama`, `qwen2_5_vl_text` ...)."""
    generator: nn.Module
    """Whose passes make the answer: the model, or the language model inside to which its own `generate` hands over."""
    decoder: nn.Module
    """The text decoder: takes `inputs_embeds`, returns hidden states."""
    layers: tuple[DecoderLayer, ...]
    hidden_size: int
    """D, width of the residual stream."""
    vocab_size: int
    image_token_ids: tuple[int, ...]
    """Placeholder ids of image and video tokens in `input_ids`; empty if the model has none."""
    image_mask_argument: str | None
    """Argument of the model's forward pass that tells which tokens are image tokens, where there is one."""
    bos_token_id: int | None
    attention_by_interface: bool
    """Whether attention goes through transformers' interface, in all layers: else nobody can come between."""
    final_norm: nn.Module | None
    """The norm after the last layer."""
    head: nn.Module | None
    """What makes logits of normed hidden states; `None` where the model scales them in a way of its own."""
    softcap: float | None
    """Logits x of the head become softcap tanh(x / softcap)."""
    n_streams: int
    """Residual streams per token: 1, but with hyper-connections. With more, no single layer input can be shown."""

    @property
    def lacks(self) -> dict[str, str]:
        """Parts that cannot be reached on this model, each with the reason as the end of a sentence."""
        lacks = {}
        if not self.attention_by_interface:
            lacks["attention"] = (
                f"which in {self.text_type} does not go through transformers' attention interface; use a method that "
                f"edits head outputs or logits"
            )
        if self.n_streams > 1:
            lacks["residual stream"] = f"but {self.text_type} has {self.n_streams} residual streams a token"
        if all(layer.mlp is None for layer in self.layers):
            lacks["mlp"] = f"but in the layers of {self.text_type} no module can be told that gives them"
        if self.head is None or self.final_norm is None:
            lacks["head"] = f"but {self.text_type} makes logits of hidden states in a way of its own"
        return lacks

    def lens(self, hidden: Tensor, norm: bool = True) -> Tensor:
        """(B, V) float32 logits that the model's head gives of hidden states (B, D) of any layer, with the norm after
        the last layer or without."""
        assert self.head is not None and self.final_norm is not None  # `lacks` tells
        logits = self.head(self.final_norm(hidden) if norm else hidden).float()
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def must_be_as_found(self) -> None:
        """Raise a `ValueError` if the layers are no longer those that were found: adapters may replace parts."""
        for layer in self.layers:
            as_found = _mlp(layer.module) is layer.mlp
            if layer.attention is not None:
                as_found = as_found and _child(layer.module, ATTENTION_NAMES) is layer.attention
                as_found = as_found and layer.out_proj in layer.attention._modules.values()
            if not as_found:
                raise ValueError(
                    "the model's projections were replaced after it was wrapped, by an adapter perhaps (or they were "
                    "put back by its removal); unwrap it and wrap it again"
                )

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have heads to edit: all, but in hybrid decoders."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.attention is not None)

    @property
    def n_heads(self) -> int:
        """Most query heads H of a layer; nearly all models have as many in each."""
        return max(layer.n_heads for layer in self.layers)


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a loaded transformers model. `TypeError` names what was looked for and not found."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder") or not hasattr(config, "get_text_config"):
        raise TypeError(
            f"expected a transformers vision-language model such as LlavaForConditionalGeneration, got "
            f"{type(model).__name__}; load one with vlmfix.load(name)"
        )
    name = type(model).__name__
    if not hasattr(model, "prepare_inputs_for_generation") or not model.can_generate():  # type: ignore[operator]
        raise TypeError(f"{name} does not generate text token by token")
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"{name} is an encoder-decoder; vlmfix supports models with a text decoder only")
    arguments = inspect.signature(model.forward).parameters
    text_model = model.get_decoder()  # type: ignore[operator]
    crossing = next((path for path, _ in text_model.named_modules() if "cross" in path.rpartition(".")[2]), None)
    if crossing is not None:
        raise TypeError(
            f"{name} reads the picture through cross-attention ({crossing}), so no decoder token is an image token"
        )
    text = config.get_text_config(decoder=True)
    decoder, layers = _layers(text_model, text)
    image_token_ids = tuple(dict.fromkeys(i for i in _fields(config, IMAGE_TOKEN_FIELDS) if isinstance(i, int)))
    mask_argument = next((a for a in IMAGE_MASK_ARGUMENTS if a in arguments), None)
    return Anatomy(
        model_type=config.model_type,
        text_type=text.model_type,
        generator=generator_of(model),
        decoder=decoder,
        layers=layers,
        hidden_size=next(_fields(text, ("hidden_size", "embed_dim", "d_model"))),
        vocab_size=text.vocab_size,
        image_token_ids=image_token_ids,
        image_mask_argument=mask_argument,
        bos_token_id=getattr(text, "bos_token_id", None),
        attention_by_interface=all(map(_through_interface, layers)),
        final_norm=_child(decoder, NORM_NAMES),
        head=_head(model, decoder, text),
        softcap=getattr(text, "final_logit_softcapping", None),
        n_streams=next(_fields(text, STREAM_FIELDS), 1),
    )


def core_of(model: Any) -> Any:
    """The transformers model that holds the weights, inside of what may stand around it: PEFT's adapters, the object
    that torch.compile makes, wrappers that spread work over devices. All of them run this one."""
    while True:
        inside = _inside(model)
        if not isinstance(inside, nn.Module) or inside is model:
            return model
        model = inside


def _inside(model: Any) -> Any:
    """What a wrapper holds; `None` for what is none."""
    if "_orig_mod" in getattr(model, "_modules", {}):  # torch.compile
        return model._orig_mod
    package, _, _ = type(model).__module__.partition(".")
    if package == "peft":
        return model.get_base_model() if hasattr(type(model), "get_base_model") else getattr(model, "model", None)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    return None


def generator_of(model: nn.Module) -> nn.Module:
    """The module whose `generate` decodes the answer: the model, or the language model inside that it calls."""
    model = core_of(model)
    names = inspect.unwrap(type(model).generate).__code__.co_names  # type: ignore[attr-defined]
    inside: Iterator[Any] = (getattr(model, name, None) for name in GENERATOR_NAMES if name in names)
    return next((module for module in inside if hasattr(module, "generate")), model)


def _fields(config: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """Values of a config, of those names that it has."""
    return (getattr(config, name) for name in names if getattr(config, name, None) is not None)


def _head(model: nn.Module, decoder: nn.Module, text: Any) -> nn.Module | None:
    """The module that makes logits; `None` where the model does more between its last layer and them."""
    scales = [scale for scale in _fields(text, HEAD_SCALES) if scale != 1]
    if scales or hasattr(decoder, "final_input"):
        return None
    return generator_of(model).get_output_embeddings()  # type: ignore[operator]


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def _layers(text_model: nn.Module, text: Any) -> tuple[nn.Module, tuple[DecoderLayer, ...]]:
    """The decoder and its layers; some models call a whole language model with its head their decoder."""
    for name, decoder in text_model.named_modules():
        if any(word in name for word in ("vision", "visual", "image")):
            continue
        for child in decoder.children():
            if isinstance(child, nn.ModuleList) and len(child):
                layers = tuple(_layer(module, text) for module in child)
                if any(layer.attention is not None for layer in layers):
                    return decoder, layers
    raise TypeError(
        f"cannot find the attention layers of {type(text_model).__name__}: looked for a ModuleList whose layers have "
        f"one of {', '.join(ATTENTION_NAMES)} with one of {', '.join(OUT_PROJ_NAMES)} inside"
    )


def _layer(module: nn.Module, text: Any) -> DecoderLayer:
    attention, mlp = _child(module, ATTENTION_NAMES), _mlp(module)
    out_proj = None if attention is None else _child(attention, OUT_PROJ_NAMES)
    if attention is None or out_proj is None or not _is_softmax(attention):
        return DecoderLayer(module, mlp=mlp)
    width = getattr(out_proj, "in_features", None)
    n_heads = next(_fields(attention, ("num_heads", "num_attention_heads", "n_heads")), None)
    head_dim = next(_fields(attention, ("v_head_dim", "head_dim")), None)
    if head_dim is None:
        n_heads = n_heads or text.num_attention_heads
        head_dim = None if width is None else width // n_heads
    if not (width and head_dim) or width % head_dim or (n_heads and width != n_heads * head_dim):
        raise TypeError(
            f"cannot find the head size of {type(attention).__name__}: its output projection takes {width} features, "
            f"which are not {n_heads} heads of {head_dim}"
        )
    return DecoderLayer(module, attention, out_proj, width // head_dim, head_dim, mlp)


def _mlp(layer: nn.Module) -> nn.Module | None:
    """The module that gives a layer's MLP output; `None` where there is none, or where experts beside it add theirs."""
    names = [name for name, _ in layer.named_children()]
    mlp = _child(layer, MLP_NAMES)
    if mlp is not None:
        shared = any(word in name for name in names for word in ("expert", "moe", "shared"))
        return None if shared else mlp
    mixer = _child(layer, ("mixer",))  # layers that are attention, or an MLP, or something else
    return mixer if any(word in type(mixer).__name__.lower() for word in ("mlp", "moe")) else None


def _is_softmax(attention: nn.Module) -> bool:
    """Whether a module is attention with queries and keys, and not one of its linear or recurrent replacements."""
    return not any(word in type(attention).__name__.lower() for word in ("linear", "delta", "mamba", "conv"))


def _through_interface(layer: DecoderLayer) -> bool:
    """Whether a layer's attention asks transformers' attention interface, which its own config names, for a kernel."""
    if layer.attention is None:
        return True
    functions = (inspect.unwrap(f) for f in vars(type(layer.attention)).values() if inspect.isfunction(f))
    return hasattr(layer.attention, "config") and any(
        "ALL_ATTENTION_FUNCTIONS" in f.__code__.co_names for f in functions
    )
