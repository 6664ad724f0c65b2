"""The vision tower of a model whose image tokens are patches, and what its class token looks at. For PAINT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def tower(model: Any) -> tuple[nn.Module, Any]:
    """The vision tower and its layers. `TypeError` unless it has a class token and layers such as CLIP's."""
    encoder: Any = model.get_encoder(modality="image") if hasattr(model, "get_encoder") else None
    names = []
    if encoder is not None and encoder is not model:
        names = [name for name, _ in encoder.named_parameters()]
    if not any(name.endswith(("class_embedding", "cls_token")) for name in names):
        reason = f"{type(encoder).__name__} has none" if names else "no vision tower was found"
        raise TypeError(f"PAINT needs a vision tower with a class token, such as CLIP's in LLaVA-1.5: {reason}")
    for module in encoder.modules():
        layers: Any = list(module.children())
        if layers and all(_is_like_clip(layer) for layer in layers):
            return encoder, layers
    raise TypeError(
        f"PAINT reads layers such as CLIP's (layer_norm1, self_attn.q_proj); {type(encoder).__name__} has none"
    )


def class_attention(layer: Any, x: Tensor) -> Tensor:
    """(images, N) attention that the class token pays to each patch in one layer of the tower, summed over heads, from
    the layer's input (images, 1 + N, D); in float32, one row of attention and no more."""
    attention, x = layer.self_attn, layer.layer_norm1(x)

    def by_head(y: Tensor) -> Tensor:
        return y.float().unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    q, k = by_head(attention.q_proj(x[:, :1])), by_head(attention.k_proj(x))
    weights = (q @ k.transpose(-1, -2) * attention.head_dim**-0.5).softmax(-1)
    return weights[:, :, 0, 1:].sum(1)


def _is_like_clip(layer: Any) -> bool:
    return hasattr(layer, "layer_norm1") and hasattr(getattr(layer, "self_attn", None), "q_proj")
