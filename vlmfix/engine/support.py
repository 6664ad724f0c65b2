"""What vlmfix can do on each model type of the installed transformers: found out on the models, not written down."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlmfix.method.stages import TABLE
from vlmfix.model.anatomy import IMAGE_TOKEN_FIELDS, PICTURE_ARGUMENTS, Anatomy, anatomy

MODEL_TYPES = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
"""All types that transformers maps to image-text-to-text."""

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE}}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["sparse"] * 32, "num_experts_per_tok": 6}},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}},
    "emu3": {"vocabulary_map": {"<image>": 151851, "<|extra_200|>": 151846}},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0]], "downsample_rate": "1/2"},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
            "indexer_compress_ratio": 4,
        }
    },
}  # fmt: skip
"""What the default config of a type leaves out, so that no model can be built from it as it is."""


@dataclass(frozen=True)
class Support:
    """One model type."""

    model_type: str
    stages: tuple[str, ...] = ()
    """Stages that can be edited or seen; none if the type is not supported."""
    image_tokens: str = ""
    """How image tokens are found: fields of the config with their ids, or the argument that tells them."""
    note: str = ""
    """What is special about it, or why it is not supported."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "supported": bool(self.stages)}


def support(model_type: str) -> Support:
    """What can be done on models of one type, told from one that is built from its default config without weights."""
    try:
        model = _skeleton(model_type)
    except Exception as error:
        return Support(model_type, note=f"not looked at: its default config builds no model ({type(error).__name__})")
    if not any(argument in inspect.signature(model.forward).parameters for argument in PICTURE_ARGUMENTS):
        return Support(model_type, note=f"{type(model).__name__} takes no pictures")
    try:
        parts = anatomy(model)
    except TypeError as error:
        reason = str(error)
        for detail in (", so ", "; vlmfix", ": looked"):
            reason = reason.partition(detail)[0]
        return Support(model_type, note=reason)
    fields = [f for f in IMAGE_TOKEN_FIELDS if f in model.config.to_dict()]  # type: ignore[union-attr, operator]
    image_tokens = parts.image_mask_argument or " / ".join(fields) or "image_mask, given by the caller"
    return Support(model_type, _stages(parts), image_tokens, _note(model, parts))


def _stages(parts: Anatomy) -> tuple[str, ...]:
    """Stages that the parts of a model allow: those that edit, then what can be seen besides."""
    possible = [stage for stage in TABLE if stage.part not in parts.lacks]
    edits = [stage.name for stage in possible if stage.edits]
    sights = [stage.need for stage in possible if stage.name == "layer_input"]
    return *edits, *sights


def _skeleton(model_type: str) -> torch.nn.Module:
    """A model without weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = CONFIG_MAPPING[model_type]
        config = kind()
        if model_type in COMPLETIONS:
            config = kind.from_dict(_completed(config.to_dict(), COMPLETIONS[model_type]))
        if hasattr(getattr(config, "vision_config", None), "architecture"):  # timm's, which is not always installed
            clip: Any = CONFIG_MAPPING["clip_vision_model"]
            tower = clip(model_args={"embed_dim": 768}, vocab_offset=0, vocab_size=128, rms_norm_eps=1e-6)
            config.__dict__["vision_config"] = tower
        with torch.device("meta"):
            return getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])(config)


def _completed(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return {
        **config,
        **{k: _completed(config[k], v) if isinstance(config.get(k), dict) else v for k, v in more.items()},
    }


def _note(model: torch.nn.Module, parts: Anatomy) -> str:
    n, notes = len(parts.attention_layers), []
    if n < len(parts.layers):
        notes.append(f"hybrid decoder: {n} of {len(parts.layers)} layers have attention to edit")
    if parts.n_streams > 1:
        notes.append(f"{parts.n_streams} residual streams per token")
    if parts.generator is not model:
        notes.append("its own generate hands over to a language model inside")
    return "; ".join(notes)


def table(model_types: Sequence[str] = MODEL_TYPES) -> list[Support]:
    """What can be done on each of some types."""
    quiet = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return [support(name) for name in model_types]
    finally:
        transformers.logging.set_verbosity(quiet)


def to_markdown(rows: list[Support]) -> str:
    """The page docs/models.md."""
    supported = [row for row in rows if row.stages]
    refused = [row for row in rows if not row.stages]
    version = transformers.__version__
    lines = [
        "# Models",
        "",
        f"What `vlmfix models` finds with transformers {version}: {len(supported)} of {len(rows)} model types",
        "of its image-text-to-text mapping are supported. `vlmfix models --markdown` wrote this page; a test compares.",
        "",
        "Image tokens, those of videos among them, are found by their ids in the prompt, or by the argument that",
        "the model itself gets. A prompt of embeddings has no ids: then give `image_mask`, bool of shape (batch,",
        "tokens), to `generate` or the forward pass of a wrapped model; it goes before what the ids say.",
        "",
        "| model type | stages | image tokens by | |",
        "|---|---|---|---|",
        *(f"| `{row.model_type}` | {', '.join(row.stages)} | {row.image_tokens} | {row.note} |" for row in supported),
        "",
        "| not supported | why |",
        "|---|---|",
        *(f"| `{row.model_type}` | {row.note} |" for row in refused),
    ]
    return "\n".join(lines) + "\n"
