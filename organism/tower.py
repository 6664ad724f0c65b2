"""The vision tower: CLIP's architecture, taught which class each patch shows and which classes the picture shows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlmfix.organism.recipe import Tower
from vlmfix.organism.scenes import CLASSES, SIZE


def vision_config(recipe: Tower) -> CLIPVisionConfig:
    """The configuration of the tower."""
    return CLIPVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        image_size=SIZE,
        patch_size=recipe.patch,
        projection_dim=recipe.width,
        hidden_act="relu",
    )


class Classifier(nn.Module):
    """The tower with the two heads that teach it and are thrown away afterwards."""

    def __init__(self, recipe: Tower) -> None:
        super().__init__()
        self.vision = CLIPVisionModel(vision_config(recipe))
        self.norm = nn.LayerNorm(recipe.width)
        self.patch_head = nn.Linear(recipe.width, len(CLASSES) + 1)
        self.picture_head = nn.Linear(recipe.width, len(CLASSES))
        start_local(self.vision)

    def forward(self, pixels: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the patches, (batch, patches, 81), and of the picture, (batch, 80).

        Args:
            pixels: (batch, 3, SIZE, SIZE).
            kept: patches to go on with, (batch, k), which makes it faster; None is all.
        """
        inner = core(self.vision)
        hidden = inner.pre_layrnorm(inner.embeddings(pixels))
        if kept is not None:
            seen = torch.cat([kept.new_zeros(len(kept), 1), kept + 1], 1)
            hidden = hidden.gather(1, seen[..., None].expand(-1, -1, hidden.shape[-1]))
        hidden = self.norm(inner.encoder(inputs_embeds=hidden).last_hidden_state)
        return self.patch_head(hidden[:, 1:]), self.picture_head(hidden[:, 0])


def core(vision: CLIPVisionModel) -> Any:
    """The module that holds embeddings and encoder, wherever this version of transformers keeps it."""
    return next(m for m in vision.modules() if hasattr(m, "embeddings") and hasattr(m, "encoder"))


def start_local(vision: CLIPVisionModel, strength: float = 0.6) -> None:
    """Let each patch look at itself and its neighbours before any training.

    Positions start as sines of rows and columns, and queries equal to keys, so that near patches have high scores;
    after Trockman and Kolter, arXiv 2305.09828.
    """
    inner = core(vision)
    config: Any = vision.config
    n = config.image_size // config.patch_size
    waves = torch.exp(-math.log(100.0) * torch.arange(config.hidden_size // 4) / (config.hidden_size // 4))
    place = torch.arange(n)[:, None] * waves
    half = torch.cat([place.sin(), place.cos()], 1)
    grid = torch.cat([half[:, None].expand(n, n, -1), half[None].expand(n, n, -1)], -1).reshape(n * n, -1)
    with torch.no_grad():
        inner.embeddings.position_embedding.weight[1:] = 0.5 * grid
        for layer in inner.encoder.layers:
            attention = layer.self_attn
            nn.init.orthogonal_(attention.q_proj.weight, math.sqrt(strength) * 2)
            attention.k_proj.weight.copy_(attention.q_proj.weight)


def of_patches(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of patches, background counted a quarter: logits (patches, 81) and classes (patches,)."""
    weights = torch.ones(len(CLASSES) + 1, device=classes.device)
    weights[-1] = 0.25
    return functional.cross_entropy(logits.float(), classes, weights)


def loss(outputs: tuple[Tensor, Tensor], patches: Tensor, present: Tensor) -> Tensor:
    """Cross-entropy of patches, background counted a quarter, and of the picture's classes.

    Args:
        outputs: of `Classifier`.
        patches: class of each patch, (batch, patches).
        present: which classes the picture shows, (batch, 80).
    """
    of_picture = functional.binary_cross_entropy_with_logits(outputs[1].float(), present.float())
    return of_patches(outputs[0].flatten(0, 1), patches.flatten()) + 4 * of_picture
