"""A tiny model with random weights of every model type that transformers maps to image-text-to-text, and prompts.

One shrinker cuts the default config of any type down: every width in a model becomes the same small number, so what
fits together at full size fits together here. `SPECIAL` holds what that cannot know.
"""

import inspect
import re
import traceback
import warnings

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPING

WIDTH, HEADS, HEAD_DIM, LAYERS, VISION_LAYERS, VOCAB, SIDE, PATCH = 64, 4, 16, 4, 2, 160, 32, 8

SIZES = {  # one regular expression over the name of a field -> its size in a tiny model
    r"(.*_)?(hidden_size|d_model|embed_dim|projection_dim|out_hidden_size|output_dim|out_dim|in_dim|input_size)": WIDTH,
    r"(text|vision|image_text|encoder|merged|projector|projection)_(hidden_size|output_dim|input_dim|hidden_dim)": WIDTH,
    r"(vision_output_dim|projector_input_dim|projector_output_dim|adapter_.*_dim|.*_embed_proj_dim|projection_dim)": WIDTH,
    r"(output_channels|.*_hidden_dim|alignment_intermediate_size|image_token_embed_dim)": WIDTH,
    r".*(intermediate_size|ffn_dim|mlp_dim|d_ff|intermediate_size_mlp|share_expert_dim)": WIDTH,
    r"(num_|encoder_|decoder_|swa_num_|conf_num_|linear_num_|resampler_n_|num_sliding_|mamba_num_)?(attention_)?heads": HEADS,
    r"(linear_num_value_heads|resampler_heads|index_n_heads|num_sliding_attention_heads)": HEADS,
    r"(linear_num_key_heads|index_n_heads|mamba_num_heads)": HEADS,
    r".*num_key_value_heads": 2,
    r"(head_dim|swa_head_dim|linear_.*head_dim|mamba_head_dim|v_head_dim|qk_nope_head_dim|index_head_dim|d_kv)": HEAD_DIM,
    r"(resampler_head_dim|resampler_dim_head|linear_head_dim|global_head_dim)": HEAD_DIM,
    r"qk_rope_head_dim": 8,
    r"(kv_lora_rank|q_lora_rank)": 32,
    r"(num_hidden_layers|num_layers|n_layers|decoder_layers|num_decoder_layers)": LAYERS,
    r"(depth|encoder_layers|layers|num_global_layers|resampler_depth|num_add_layers|aligner_num_add_layers)": VISION_LAYERS,
    r"(n_routed_experts|num_experts|num_local_experts|moe_num_experts)": 4,
    r"(num_experts_per_tok|moe_topk|moe_k|top_k_experts)": 2,
    r"(n_group|topk_group|n_shared_experts|moe_num_shared_experts)": 1,
    r"(num_query_tokens|resampler_n_latents|resampler_num_latents|latent_query_num)": 4,
    r"(image_size|max_image_size|force_image_size)": SIDE,
    r"patch_size": PATCH,
    r"(vocab_size|.*_vocab_size)": VOCAB,
    r"(max_position_embeddings|original_max_position_embeddings)": 512,
    r"(sliding_window|attention_chunk_size|sliding_window_size)": 256,
    r"(initializer_range|init_std)": 0.2,
    r"(mm_tokens_per_image|vision_soft_tokens_per_image)": 4,
    r"(image_seq_length|num_image_tokens)": 16,
}
TOKEN = re.compile(r".*token_(id|index)|.*_(start|end|newline|patch|slice)_id|newline_id|eod_token_id")
BASIC = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}


def _size(key):
    return next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, key)), None)


def shrink(config, ids, text=True):
    """A config as a dictionary, with small sizes; `ids` collects the special tokens' new numbers."""
    out, layers = {}, config.get("num_hidden_layers")
    for key, value in config.items():
        small = _size(str(key))
        if key == "per_layer_config":
            continue
        elif isinstance(value, dict):
            inside = text and not any(word in key for word in ("vision", "audio", "qformer", "encoder", "perceiver"))
            out[key] = value if key in ("id2label", "label2id") else shrink(value, ids, inside)
        elif key in BASIC:
            out[key] = BASIC[key]
        elif TOKEN.fullmatch(str(key)) and isinstance(value, int):
            out[key] = ids.setdefault(value, VOCAB - 1 - len(ids))
        elif key == "mrope_section":
            out[key] = [2, 3, 3]
        elif key in ("image_size", "patch_size") and isinstance(value, list):
            out[key] = [_size(key)] * len(value)
        elif isinstance(value, list) and layers and len(value) == layers and layers > 3:
            kinds = list(dict.fromkeys(value))
            n = LAYERS if text else VISION_LAYERS
            out[key] = [kinds[i % len(kinds)] for i in range(n)]
        elif small is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
            if small == LAYERS and not text and "layers" in key:
                small = VISION_LAYERS
            out[key] = small if value or not isinstance(value, int) else value
        else:
            out[key] = value
    if "num_key_value_heads" in out and (config.get("kv_lora_rank") or config["num_key_value_heads"] == 1):
        out["num_key_value_heads"] = HEADS if config.get("kv_lora_rank") else 1
    return out


_MROPE = {"text_config": {"rope_parameters": {"mrope_section": [2, 3, 3]}}}
_HALF_MROPE = {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}}
_CLIP = {"model_type": "clip_vision_model", "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "image_size": SIDE, "patch_size": PATCH}
_TOKENS = {"image_token_id": 150, "video_token_id": 151}
_OPT = {"image_token_index": 150}
_SAM = {"global_attn_indexes": [1], "window_size": 2, "output_channels": 32, "num_pos_feats": 32, "image_size": 64}
_EIGHTH = {"vision_config": {"deepstack_visual_indexes": [0, 1]}}
_GEMMA4 = {"vision_config": {"model_type": "gemma4_vision", "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": 16, "patch_size": PATCH, "pooling_kernel_size": 2, "position_embedding_size": 64}, "text_config": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16}}
SPECIAL = {
    "aria": {"projector_patch_to_query_dict": {"16": 4}, "max_value_projector_patch_to_query_dict": 4},
    "blip-2": _OPT, "instructblip": _OPT, "instructblipvideo": {"video_token_index": 150},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}} | _EIGHTH,
    "deepseek_ocr2": {"vision_config": {"sam_config": _SAM | {"downsample_channels": [32, WIDTH]}}, "text_config": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2}},
    "deepseek_vl_hybrid": {"high_res_vision_config": _SAM},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}, "moe_intermediate_size": [32, 16]}},
    "gemma4": _GEMMA4, "diffusion_gemma": _GEMMA4,
    "gemma4_unified": {"vision_config": {"model_type": "gemma4_unified_vision", "patch_size": PATCH, "pooling_kernel_size": 1, "mm_embed_dim": WIDTH, "output_proj_dims": WIDTH, "mm_posemb_size": 64}, "text_config": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16}},
    "glm46v": _MROPE, "glm4v": _MROPE, "glmga": _MROPE, "glm_ocr": _MROPE, "glm4v_moe": _HALF_MROPE,
    "qwen2_vl": _MROPE, "qwen2_5_vl": _MROPE | {"vision_config": {"fullatt_block_indexes": [1], "window_size": 16}},
    "qwen3_vl": _EIGHTH, "qwen3_vl_moe": _EIGHTH, "cosmos3_omni": _EIGHTH,
    "qwen2_5_omni_thinker": _MROPE | {"vision_config": {"fullatt_block_indexes": [1], "window_size": 16}, "vision_start_token_id": 152},
    "qwen3_omni_moe_thinker": _MROPE | _EIGHTH | {"vision_start_token_id": 152},
    "paddleocr_vl": _MROPE, "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": {"mrope_section": [2, 2, 2, 2]}}},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0]], "downsample_rate": "1/2", "spatial_target_layers": [1], "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]], "text_config": {"attention_multiplier": 0.25}},
    "granite_docling": {"vision_config": {"deepstack_visual_indexes": [0, 1], "scale_factor": 2}, "text_config": {"attention_multiplier": 0.25}},
    "llava_next": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "vipllava": {"vision_feature_layer": [-2, -1]},
    "gemma3n": {"text_config": {"intermediate_size": [WIDTH] * 4, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0}, "audio_config": {"hidden_size": WIDTH, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 4}, "vision_soft_tokens_per_image": 16},
    "kimi_k25": {"text_config": {"qk_rope_head_dim": 16, "head_dim": 16, "first_k_dense_replace": 1}},
    "muse_glimmer": {"out_hidden_size": 256}, "muse_spark": {"out_hidden_size": 256},
    "llama4": {"vision_config": {"projector_input_dim": WIDTH, "projector_output_dim": WIDTH, "vision_output_dim": WIDTH, "intermediate_size": 4 * WIDTH}},
    "minicpmv4_6": _TOKENS | {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}}, "minicpmv4_7": _TOKENS | {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}}, "minicpm_ocr": _TOKENS | {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}, "vision_config": {"num_position_embeddings": 16}, "text_config": {"rope_scaling_layers": [0, 1, 2, 3]}},
    "nemotron_h_omni": _TOKENS | {"vision_config": {"patch_dim": 192, "video_patch_dim": 384, "max_img_size": 64}, "text_config": {"n_groups": 2, "layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention", "moe"]}},
    "qwen4_exp": {"text_config": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 512, "indexer_compress_ratio": 4, "hc_lowrank": 16}},
    "step3p7": {"text_config": {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 256, "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}}},
    "unlimited_ocr": {"vision_config": {"sam_config": _SAM | {"downsample_channels": [32, WIDTH]}}},
    "got_ocr2": {"vision_config": _SAM}, "pp_chart2table": {"vision_config": _SAM},
}


_RESNET = ("resnet", {"embedding_size": 16, "hidden_sizes": [32, WIDTH], "depths": [1, 1], "layer_type": "basic", "hidden_size": WIDTH, "vocab_offset": 155, "vocab_size": 5, "rms_norm_eps": 1e-6})
TOWERS = {"fast_vlm": _RESNET, "gemma3n": _RESNET, "perception_lm": ("clip_vision_model", {k: v for k, v in _CLIP.items() if k != "model_type"} | {"model_args": {"embed_dim": WIDTH}})}


def merged(config, changes):
    """A dictionary with some entries replaced, dictionaries inside it too."""
    out = dict(config)
    for key, value in changes.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def tiny_config(model_type):
    """The default config of a model type, small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls = CONFIG_MAPPING[model_type]
        small = merged(shrink(cls().to_dict(), {}), SPECIAL.get(model_type, {}))
        config = cls.from_dict(small)
        if model_type in TOWERS:
            kind, changes = TOWERS[model_type]
            config.vision_config = CONFIG_MAPPING[kind](**changes)
        return config


def tiny(model_type, attn="sdpa", seed=0):
    """A tiny model of one type."""
    torch.manual_seed(seed)
    cls = getattr(transformers, MAPPING[model_type])
    supported = attn != "sdpa" or cls._supports_sdpa
    model = cls._from_config(tiny_config(model_type), attn_implementation=({"": attn, "vision_config": "eager"} if model_type in TOWERS else attn) if supported else "eager")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def _vision(config):
    return getattr(config, "vision_config", None) or getattr(config, "vq_config", None) or config


def _noise(*shape):
    return lambda generator: torch.randn(*shape, generator=generator)


def recipes(model):
    """Ways to write down one picture, most special first: each a function of a generator that gives model inputs."""
    names, vision = set(inspect.signature(model.forward).parameters), _vision(model.config)
    p = getattr(vision, "patch_size", PATCH)
    p = p if isinstance(p, int) else p[0]
    side = getattr(vision, "image_size", None) or SIDE
    side = side if isinstance(side, int) else side[0]
    frames = getattr(vision, "temporal_patch_size", 1)
    ones = lambda *shape: torch.ones(*shape, dtype=torch.long)  # noqa: E731
    if "image_grid_thw" in names:
        n, grid = 24, {"image_grid_thw": torch.tensor([[1, 4, 6]])}
        if "image_merge_sizes" in names:
            grid["image_merge_sizes"] = torch.tensor([2])
        if model.config.model_type == "inkling2":
            yield lambda g: {"pixel_values": torch.randn(n * 4, 3 * p * p, generator=g), "image_grid_thw": torch.tensor([[1, 2, 3]])}
        for shape in ((n, 3 * frames * p * p), (n, 3, p, p), (n, 3 * p * p), (n, 3 * 2 * p * p), (1, n, 3, p, p), (n * 4, 3 * p * p)):
            yield lambda g, shape=shape: {"pixel_values": torch.randn(*shape, generator=g), **grid}
    if "image_grid_hw" in names:
        yield lambda g: {"pixel_values": torch.randn(24, 3 * p * p, generator=g), "image_grid_hw": torch.tensor([[4, 6]])}
    if "image_position_ids" in names:
        at = torch.tensor([[[x, y] for y in range(4) for x in range(4)]])
        yield lambda g: {"pixel_values": torch.randn(1, 16, 3 * p * p, generator=g), "image_position_ids": at}
    if "spatial_shapes" in names:
        yield lambda g: {"pixel_values": torch.randn(1, 16, 3 * p * p, generator=g), "spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": ones(1, 16)}
    if "target_sizes" in names:
        yield lambda g: {"pixel_values": torch.randn(1, 3, p, 16 * p, generator=g), "target_sizes": torch.tensor([[4, 4]], dtype=torch.int32)}
    if "image_token_pooling" in names:
        yield lambda g: {"pixel_values": torch.randn(1, 16, 3 * p * p, generator=g), "image_token_pooling": torch.arange(16).view(4, 4), "image_grids": torch.tensor([[2, 2, 0, 0]]), "image_num_crops": torch.tensor([1])}
    if "tile_fine_mask" in names:
        yield lambda g: {"pixel_values": torch.randn(1, 1, 3, side, side, generator=g), "pixel_attention_mask": ones(1, 1).bool()}
    if "high_res_pixel_values" in names:
        yield lambda g: {"pixel_values": torch.randn(1, 3, side, side, generator=g), "high_res_pixel_values": torch.randn(1, 3, 64, 64, generator=g)}
    get = getattr(model, "get_image_features", model.forward)
    sized = "image_sizes" in inspect.signature(get).parameters
    sizes = {"image_sizes": torch.tensor([[side, side]])} if sized else {}
    if "qformer_input_ids" in names:
        sizes = {"qformer_input_ids": ones(1, 3), "qformer_attention_mask": ones(1, 3)}
    for shape in ((1, 3, side, side), (1, 2, 3, side, side), (1, 5, 3, side, side)):
        tall = {"image_sizes": torch.tensor([[side, 2 * side]])} if shape[1] != 3 and "image_sizes" in sizes else {}
        yield lambda g, shape=shape, tall=tall: {"pixel_values": torch.randn(*shape, generator=g), **sizes, **tall}
    for size in (64, 16):
        yield lambda g, size=size: {"pixel_values": torch.randn(1, 3, size, size, generator=g), **sizes}


def inputs_of(model, n, picture, token):
    ids = [1, 5, 6, *marks(model)[0], *[token] * n, *marks(model)[1], 7, 8, 9]
    ids = torch.tensor([ids])
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture}
    names = set(inspect.signature(model.forward).parameters)
    if "mm_token_type_ids" in names:
        out["mm_token_type_ids"] = (ids == token).int()
    if "token_type_ids" in names:
        out["token_type_ids"] = (ids == token).int()
    return out


def marks(model):
    start, end = (getattr(model.config, f"vision_{k}_token_id", None) for k in ("start", "end"))
    return ([] if start is None else [start]), ([] if end is None else [end])


def image_token(model):
    return next((t for f in ("image_token_id", "image_token_index") if isinstance(t := getattr(model.config, f, None), int)), None)


@torch.no_grad()
def find(model, limit=40):
    """The recipe that the model takes, and how many image tokens a picture has: found by trying."""
    token, why = image_token(model), []
    for i, recipe in enumerate(recipes(model)):
        picture = recipe(torch.Generator().manual_seed(0))
        n = count(model, picture)
        for n in ([n] if n else []) + list(range(1, limit)):
            try:
                model(**inputs_of(model, n, picture, token))
                return i, n
            except Exception as e:
                tb = traceback.extract_tb(e.__traceback__)[-1]
                why.append(f"{i},{n}: {type(e).__name__} {str(e)[:150]!r} @{tb.filename.split('/')[-1]}:{tb.lineno}")
                if not re.search("token|match|shape", str(e)): break
                m = re.search(r"features:? (\d+)", str(e))
    raise RuntimeError("\n     ".join(dict.fromkeys(why[:1]+why[-3:])))


def count(model, picture):
    """Image tokens of one picture, as the model's own vision side makes them."""
    get = getattr(model, "get_image_features", None) or getattr(model.model, "get_image_features", None)
    if get is None:
        return None
    try:
        out = get(**picture)
    except Exception:
        return None
    out = getattr(out, "pooler_output", None) if getattr(out, "pooler_output", None) is not None else getattr(out, "last_hidden_state", out)
    parts = out if isinstance(out, (list, tuple)) else [out]
    return sum(p.reshape(-1, p.shape[-1]).shape[0] for p in parts) if torch.is_tensor(parts[0]) else None
