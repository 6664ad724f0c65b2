"""A tiny model with random weights of every model type that transformers maps to image-text-to-text, and prompts.

One shrinker cuts the default config of any type down: every width in a model becomes the same small number, so what
fits together at full size fits together here. `SPECIAL` holds what that cannot know.
"""

import inspect
import re
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
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_TOKENS = {"image_token_id": 150, "video_token_id": 151}
_OPT = {"image_token_index": 150}
_SAM = {"global_attn_indexes": [1], "window_size": 2, "output_channels": 32, "num_pos_feats": 32, "image_size": 64}
_EIGHTH = {"vision_config": {"deepstack_visual_indexes": [0, 1]}}
_GEMMA4 = {
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": 16,
        "patch_size": PATCH,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    },
    "text_config": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16},
}
_CODES = {"base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "num_attention_heads": 1}
_WIDE = {
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "head_dim": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
"""Layers with more heads than others."""
_DEEP = {"text_config": {"layers": LAYERS}}
SPECIAL = {
    "aria": {"projector_patch_to_query_dict": {"16": 4}, "max_value_projector_patch_to_query_dict": 4},
    "blip-2": _OPT,
    "instructblip": _OPT,
    "instructblipvideo": {"video_token_index": 150},
    "chameleon": {
        "vocabulary_map": {"<image>": 150} | {f"IMGIMG{letter}Z": 100 + i for i, letter in enumerate("ABCDEFGH")},
        "vq_config": _CODES | {"num_embeddings": 8},
        "image_token_id": 150,
    },
    "emu3": {
        "vocabulary_map": {"<image>": 150, "<|extra_200|>": 108}
        | {f"<|visual token {i:06}|>": 100 + i for i in range(8)},
        "vq_config": _CODES | {"codebook_size": 8, "hidden_size": 32},
        "image_token_id": 150,
    },
    "dots3_note": {"text_config": {"per_layer_config": {"1": _WIDE, "3": _WIDE}}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
    }
    | _EIGHTH,
    "deepseek_ocr2": {
        "vision_config": {"sam_config": _SAM | {"downsample_channels": [32, WIDTH]}},
        "text_config": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": _SAM},
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}, "moe_intermediate_size": [32, 16]}
    },
    "gemma4": _GEMMA4,
    "diffusion_gemma": _GEMMA4,
    "gemma4_unified": {
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "patch_size": PATCH,
            "pooling_kernel_size": 1,
            "mm_embed_dim": WIDTH,
            "output_proj_dims": WIDTH,
            "mm_posemb_size": 64,
        },
        "text_config": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16},
    },
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glmga": _MROPE,
    "glm_ocr": _MROPE,
    "glm4v_moe": _HALF_MROPE,
    "qwen2_vl": _MROPE,
    "qwen2_5_vl": _MROPE | {"vision_config": {"fullatt_block_indexes": [1], "window_size": 16}},
    "qwen3_vl": _EIGHTH,
    "qwen3_vl_moe": _EIGHTH,
    "cosmos3_omni": _EIGHTH,
    "qwen2_5_omni_thinker": _MROPE
    | {"vision_config": {"fullatt_block_indexes": [1], "window_size": 16}, "vision_start_token_id": 152},
    "qwen3_omni_moe_thinker": _MROPE | _EIGHTH | {"vision_start_token_id": 152},
    "paddleocr_vl": _MROPE,
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": {"mrope_section": [2, 2, 2, 2]}}},
    "granite4_vision": {
        "deepstack_layer_map": [[-2, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1],
        "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
        "text_config": {"attention_multiplier": 0.25},
    },
    "granite_docling": {
        "vision_config": {"deepstack_visual_indexes": [0, 1], "scale_factor": 2},
        "text_config": {"attention_multiplier": 0.25},
    },
    "llava_next": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "vipllava": {"vision_feature_layer": [-2, -1]},
    "gemma3n": {
        "text_config": {
            "intermediate_size": [WIDTH] * 4,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
        },
        "audio_config": {"hidden_size": WIDTH, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 4},
        "vision_soft_tokens_per_image": 16,
    },
    "kosmos-2": _DEEP,
    "kosmos-2.5": _DEEP,
    "kimi_k25": {"text_config": {"qk_rope_head_dim": 16, "head_dim": 16, "first_k_dense_replace": 1}},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "llama4": {
        "vision_config": {
            "projector_input_dim": WIDTH,
            "projector_output_dim": WIDTH,
            "vision_output_dim": WIDTH,
            "intermediate_size": 4 * WIDTH,
        }
    },
    "minicpmv4_6": _TOKENS | {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}},
    "minicpmv4_7": _TOKENS | {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}},
    "minicpm_ocr": _TOKENS | {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}},
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [1, 0]},
        "vision_config": {"num_position_embeddings": 16},
        "text_config": {"rope_scaling_layers": [0, 1, 2, 3]},
    },
    "nemotron_h_omni": _TOKENS
    | {
        "vision_config": {"patch_dim": 192, "video_patch_dim": 384, "max_img_size": 64},
        "text_config": {
            "n_groups": 2,
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention", "moe"],
        },
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 512,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 16,
        }
    },
    "step3p7": {
        "text_config": {
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "sliding_window": 256,
            "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        }
    },
    "unlimited_ocr": {"vision_config": {"sam_config": _SAM | {"downsample_channels": [32, WIDTH]}}},
    "got_ocr2": {"vision_config": _SAM},
    "pp_chart2table": {"vision_config": _SAM},
}


_RESNET = (
    "resnet",
    {
        "embedding_size": 16,
        "hidden_sizes": [32, WIDTH],
        "depths": [1, 1],
        "layer_type": "basic",
        "hidden_size": WIDTH,
        "vocab_offset": 155,
        "vocab_size": 5,
        "rms_norm_eps": 1e-6,
    },
)
TOWERS = {
    "fast_vlm": _RESNET,
    "gemma3n": _RESNET,
    "perception_lm": (
        "clip_vision_model",
        {k: v for k, v in _CLIP.items() if k != "model_type"} | {"model_args": {"embed_dim": WIDTH}},
    ),
}


def merged(config, changes):
    """A dictionary with some entries replaced, dictionaries inside it too."""
    out = dict(config)
    for key, value in changes.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def tiny_config(model_type, changes=None):
    """The default config of a model type, small, with `changes` made to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls = CONFIG_MAPPING[model_type]
        small = merged(merged(shrink(cls().to_dict(), {}), SPECIAL.get(model_type, {})), changes or {})
        config = cls.from_dict(small)
        if model_type in TOWERS:
            kind, changes = TOWERS[model_type]
            config.__dict__["vision_config"] = CONFIG_MAPPING[kind](**changes)
        return config


def tiny(model_type, attn="sdpa", seed=0, changes=None):
    """A tiny model of one type."""
    torch.manual_seed(seed)
    cls = getattr(transformers, MAPPING[model_type])
    supported = attn != "sdpa" or cls._supports_sdpa
    model = cls._from_config(
        tiny_config(model_type, changes),
        attn_implementation=({"": attn, "vision_config": "eager"} if model_type in TOWERS else attn)
        if supported
        else "eager",
    )
    for parameter in model.parameters():  # projections that training starts from nothing would hide the pictures
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def _recipes(model, grid):
    """Ways to write down one picture, most special first: functions of a generator that give model inputs.

    `grid` is the number of patches down and across, where a model takes pictures of any size.
    """
    arguments = set(inspect.signature(model.forward).parameters)
    vision = getattr(model.config, "vision_config", None) or model.config
    p, side = getattr(vision, "patch_size", PATCH), getattr(vision, "image_size", None) or SIDE
    p, side = (x if isinstance(x, int) else x[0] for x in (p, side))
    h, w = grid
    n = h * w
    thw = {"image_grid_thw": torch.tensor([[1, h, w]])}
    hw = torch.tensor([[h, w]])

    def recipe(*shape, **more):
        return lambda g: {"pixel_values": torch.randn(*shape, generator=g), **more}

    if "image_grid_thw" in arguments:
        if "image_merge_sizes" in arguments:
            thw["image_merge_sizes"] = torch.tensor([2])
        for shape in ((n, 6 * p * p), (n, 3 * p * p), (n, 3, p, p), (1, n, 3, p, p)):
            yield recipe(*shape, **thw)
        yield recipe(4 * n, 3 * p * p, **thw)
        k = p * getattr(vision, "spatial_merge_size", 1)
        yield recipe(n, k, k, 3, **thw)
    if "flattened_patches" in arguments:

        def flat(g):
            at = torch.cartesian_prod(torch.arange(h), torch.arange(w))
            pixels = torch.randn(n, vision.patch_embed_hidden_size, generator=g)
            return {"flattened_patches": torch.cat([at, pixels], dim=1)[None]}

        yield flat
    if "image_grid_hw" in arguments:
        yield recipe(n, 3 * p * p, image_grid_hw=hw)
    if "image_position_ids" in arguments:
        at = torch.cartesian_prod(torch.arange(h), torch.arange(w))[None]
        yield recipe(1, n, 3 * p * p, image_position_ids=at)
    if "spatial_shapes" in arguments:
        yield recipe(1, n, 3 * p * p, spatial_shapes=hw, pixel_attention_mask=torch.ones(1, n, dtype=torch.long))
    if "target_sizes" in arguments:
        yield recipe(1, 3, p, n * p, target_sizes=hw.int())
    if "image_token_pooling" in arguments:
        pooling = {"image_token_pooling": torch.arange(16).view(4, 4), "image_grids": torch.tensor([[2, 2, 0, 0]])}
        yield recipe(1, 16, 3 * p * p, **pooling, image_num_crops=torch.tensor([1]))
    if "tile_fine_mask" in arguments:
        yield recipe(1, 1, 3, side, side, pixel_attention_mask=torch.ones(1, 1, dtype=torch.bool))
    if "high_res_pixel_values" in arguments:
        large = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        yield recipe(1, 3, side, side, high_res_pixel_values=large)
    ones, more = torch.ones(1, 3, dtype=torch.long), {}
    if "qformer_input_ids" in arguments:
        more = {"qformer_input_ids": ones, "qformer_attention_mask": ones}
    if "image_sizes" in inspect.signature(getattr(model, "get_image_features", model.forward)).parameters:
        more = {"image_sizes": torch.tensor([[side, side]])}
    yield recipe(1, 3, side, side, **more)
    yield recipe(1, 1, 3, side, side, **more)
    yield recipe(1, n, 3 * p * p)
    yield recipe(n, 2, p, p, 3)
    yield recipe(1, 4, 3, side, side, **more)
    if more:
        yield recipe(1, 5, 3, side, side, image_sizes=torch.tensor([[side, 2 * side]]))  # tiles and an overview
    yield recipe(1, 3, 64, 64, **more)


def _n_tokens(model, picture):
    """Image tokens of one picture: what the model's own vision side makes of it. `None` if it cannot take it."""
    get = getattr(model, "get_image_features", None) or getattr(model, "get_video_features", None)
    try:
        out = (get or model.model.get_image_features)(**picture)
    except Exception:
        return None
    features = next(
        f for f in (getattr(out, "pooler_output", None), getattr(out, "last_hidden_state", None), out) if f is not None
    )
    parts = features if isinstance(features, (list, tuple)) else [features]
    return sum(p.reshape(-1, p.shape[-1]).shape[0] for p in parts) if torch.is_tensor(parts[0]) else None


def image_token(model):
    """The placeholder id of images; where a mask tells them, any id does."""
    fields = ("image_token_id", "image_token_index", "image_patch_id", "video_token_id", "video_token_index")
    return next((t for f in fields if isinstance(t := getattr(model.config, f, None), int)), 150)


def _marks(model):
    config = model.config
    start, end = (
        getattr(config, f"vision_{k}_token_id", getattr(config, f"image_{k}_token_id", None)) for k in ("start", "end")
    )
    return ([] if start is None else [start]), ([] if end is None else [end])


_FOUND = {}


@torch.no_grad()
def _find(model, grid):
    """The recipe that a model takes, and the number of image tokens of its picture: found by trying."""
    for i, recipe in enumerate(_recipes(model, grid)):
        inputs = recipe(torch.Generator().manual_seed(0))
        counted = _n_tokens(model, inputs)
        for n in range(1, 40) if counted is None else [counted]:
            try:
                model(**_write(model, [[5, (inputs, n), 6]]))
                return i, n
            except Exception as error:
                if not re.search("token|match|features", str(error)):
                    break
    raise RuntimeError(f"no recipe fits the pictures of {model.config.model_type}")


def picture(model, generator, grid=(4, 8)):
    """Inputs for one random picture, and the number of its image tokens."""
    kind = (model.config.model_type, model.config.get_text_config().model_type, grid)
    if kind not in _FOUND:
        _FOUND[kind] = _find(model, grid)
    i, n = _FOUND[kind]
    return list(_recipes(model, grid))[i](generator), n


JOINED = {"minicpmv4_6": {"pixel_values": 3}, "minicpmv4_7": {"pixel_values": 3}, "minicpm_ocr": {"pixel_values": 3}}
"""Where pictures are joined along another dimension than the first."""
BY_SAMPLE = ("idefics2", "idefics3", "smolvlm", "granite_docling")
"""Where pixel values have a dimension for samples and one for the pictures of a sample."""


def _write(model, samples, pad="left"):
    """Model inputs from samples, lists of token ids and pictures `(inputs, number of image tokens)`."""
    token, (start, end), kind = image_token(model), _marks(model), model.config.model_type
    rows, pictures = [], []
    for sample in samples:
        row, own = [], []
        for part in sample:
            if isinstance(part, int):
                row.append(part)
            else:
                own.append(part[0])
                row += [*start, *[token] * part[1], *end]
        rows.append(row)
        pictures += [{k: torch.cat([x[k] for x in own], dim=1) for k in own[0]}] if own and kind in BY_SAMPLE else own
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    ids = torch.tensor([f + row if pad == "left" else row + f for f, row in zip(fill, rows, strict=True)])
    mask = torch.tensor(
        [f + [1] * len(row) if pad == "left" else [1] * len(row) + f for f, row in zip(fill, rows, strict=True)]
    )
    inputs, arguments = {"input_ids": ids, "attention_mask": mask}, inspect.signature(model.forward).parameters
    for i, own in enumerate(pictures if "image_token_pooling" in arguments else []):
        own["image_token_pooling"] = own["image_token_pooling"] + 16 * i  # patches are numbered through the batch
    for key in pictures[0] if pictures else ():
        inputs[key] = torch.cat([x[key] for x in pictures], dim=JOINED.get(kind, {}).get(key, 0))
    if "image_embeds_position_mask" in arguments:
        inputs["image_embeds_position_mask"] = (ids == token).long()
    kinds = (ids == token).int() * (kind != "paligemma")  # there, 0 marks the prefix: all of a prompt
    return inputs | {k: kinds for k in ("mm_token_type_ids", "token_type_ids") if k in arguments}


def prompt(model, layouts, pad="left", first=0):
    """Inputs of a batch of samples, written as layouts: `t` a random text token, `I` a picture, `J` a smaller one.

    What a sample holds depends on its number alone, counted from `first`, not on the batch that it is in.
    """
    samples = []
    for b, layout in enumerate(layouts, first):
        g = torch.Generator().manual_seed(b)
        sizes = {"I": (4, 8), "J": (4, 4)}
        samples.append(
            [
                picture(model, g, sizes[c]) if c in sizes else int(torch.randint(10, 100, (), generator=g))
                for c in layout
            ]
        )
    return _write(model, samples, pad)


SUPPORTED = tuple(
    [
        "aria",
        "aya_vision",
        "blip-2",
        "chameleon",
        "cohere2_vision",
        "cohere_compass",
        "cosmos3_edge",
        "cosmos3_omni",
        "deepseek_ocr2",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "dots3_note",
        "emu3",
        "ernie4_5_vl_moe",
        "exaone4_5",
        "fast_vlm",
        "fuyu",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4_unified",
        "glm46v",
        "glm4v",
        "glm4v_moe",
        "glm5_next",
        "glm_ocr",
        "glmga",
        "got_ocr2",
        "granite4_vision",
        "granite_docling",
        "hunyuan_vl",
        "hyperclovax_vision_v2",
        "idefics2",
        "idefics3",
        "inkling2",
        "inkling_mm_model",
        "instructblip",
        "instructblipvideo",
        "internvl",
        "janus",
        "kimi_k25",
        "kosmos-2",
        "kosmos-2.5",
        "lfm2_vl",
        "lfm3_vl",
        "lighton_ocr",
        "llama4",
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "minicpm_ocr",
        "minicpmv4_6",
        "minicpmv4_7",
        "minimax_m3_vl",
        "mistral3",
        "mistral_large4",
        "molmo2",
        "muse_glimmer",
        "muse_spark",
        "nemotron_h_omni",
        "ovis2",
        "paddleocr_vl",
        "paligemma",
        "perception_lm",
        "pp_chart2table",
        "qianfan_ocr",
        "qwen2_5_omni_thinker",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_omni_moe_thinker",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen4_exp",
        "shieldgemma2",
        "smolvlm",
        "step3p7",
        "unlimited_ocr",
        "video_llama_3",
        "video_llava",
        "vipllava",
    ]
)
"""Types whose tiny models pass the whole contract."""
SLICE = ("gemma3", "kimi_k25", "qwen3_5", "qwen3_vl")
"""Those that the default tests run: windows and bidirectional images, latent attention, a hybrid with gates, M-RoPE."""
QUIRKS = {
    "fuyu": ("beams",),  # as llama4
    "hunyuan_vl": ("batch",),  # a rotary axis counts the pictures of the whole batch
    "kosmos-2": ("batch", "cache"),  # tokens that come from a cache count the padding before them
    "kosmos-2.5": ("batch", "cache"),
    "llama4": ("beams",),  # its beam search fails: it does not repeat the pictures for each beam
}
"""What the untouched model does not keep."""
NO_LENS = {  # more between the last layer and the logits than a norm and a head, or several residual streams
    "gemma3n", "glm5_next", "granite_docling", "inkling2", "inkling_mm_model", "muse_glimmer", "muse_spark",
    "nemotron_h_omni", "qwen4_exp",
}  # fmt: skip
REFUSED = {
    "deco": NO_LENS,
    "dola": NO_LENS,
    "paint": set(SUPPORTED) - {"llava", "video_llava", "vipllava"},  # class token, one image token per patch
    "icd": {"instructblipvideo"},  # no second stream with pictures
    "kvsmooth": {"unlimited_ocr"},  # a cache of its own kind
    "pyramiddrop": {  # windows, hybrid decoders, learnt positions
        "aya_vision",
        "blip-2",
        "cohere2_vision",
        "dots3_note",
        "exaone4_5",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4_unified",
        "glm5_next",
        "idefics2",
        "inkling2",
        "inkling_mm_model",
        "instructblip",
        "instructblipvideo",
        "kosmos-2",
        "kosmos-2.5",
        "lfm3_vl",
        "llama4",
        "minicpm_ocr",
        "minicpmv4_6",
        "minicpmv4_7",
        "mistral_large4",
        "muse_glimmer",
        "muse_spark",
        "nemotron_h_omni",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen4_exp",
        "shieldgemma2",
        "step3p7",
        "unlimited_ocr",
    },
    "vista": NO_LENS,
    "vcd": {"instructblipvideo", "kosmos-2.5"},  # no second stream with pictures; no pixel values
    "var": {"gemma3n", "glm5_next", "qwen4_exp"},  # several residual streams
}
"""Methods that are refused, each with a reason that names it."""
