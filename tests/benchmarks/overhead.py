"""What VAR and VHR cost on a LLaVA of real width, on this machine, against the untouched model and a naive edit; and
what PyramidDrop saves.

    python tests/benchmarks/overhead.py [--rounds 25] [--tokens 8] [--json]
    python tests/benchmarks/overhead.py --only pyramiddrop --images 5

The model has random weights: hidden size 4096, 32 heads, 4 layers, 576 image tokens a picture, bfloat16. All variants
take turns within each round (A B C D A B C D ...), so that drift of the machine hits all alike; ratios are taken within
rounds.
VAR edits every layer here and is made to select every head row (the worst case), or none (`var, none`); VHR reinforces
half of the layers, as on LLaVA-1.5-7B. `naive var` is the same maths as most ports have it: eager attention, all
queries x keys in float32, the edit on the full matrix. PyramidDrop drops before layers 1, 2 and 3 of 4 here, so that
ranking weighs eight times as much as in 32 layers; `--layers 8` halves that.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_utils import AttentionInterface

from vlmfix.attachment import attached, report, wrapped
from vlmfix.hooks import VAR, VHR, PyramidDrop
from vlmfix.intervention import Site

IMAGE, N_IMAGE, BEFORE, AFTER = 31999, 576, 5, 35
SINK = 7


def build(n_layers: int) -> LlavaForConditionalGeneration:
    """LLaVA-1.5-7B's language model with fewer layers; a small vision tower, which no method touches."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=n_layers,
            num_attention_heads=32,
            max_position_embeddings=4096,
        ),
        image_token_index=IMAGE,
        image_seq_length=N_IMAGE,
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = LlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(previous)
    with torch.no_grad():  # sinks: the first token, and about half of the image tokens
        model.get_input_embeddings().weight[1, SINK] = 50.0
        model.model.multi_modal_projector.linear_2.weight[SINK] = 0.0
        model.model.multi_modal_projector.linear_2.weight[SINK, :8] = 500.0
    return model


def naive(var: VAR, n_image: int) -> Callable:
    """Attention that materialises queries x keys in float32 and edits the whole matrix, its sinks known beforehand."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        queries, keys = query.shape[2], key.shape[2]
        s = (query.float() @ key.float().transpose(-1, -2)) * scaling
        future = torch.arange(keys) > torch.arange(queries)[:, None] + keys - queries
        a = s.masked_fill(future, torch.finfo(s.dtype).min).softmax(-1)
        rows = (torch.arange(queries) + keys - queries >= BEFORE + n_image)[None]
        memo = {"masks": {0: module.naive_masks}, "counts": {0: 0}}
        a = var.weights(a, Site(0, 4, None, rows, keys - queries, 0, memo))
        return (a @ value.float()).to(query.dtype).transpose(1, 2), None

    return attention


@contextmanager
def implementation(model: LlavaForConditionalGeneration, name: str) -> Iterator[None]:
    """Another attention implementation in every decoder layer, masks as for sdpa."""
    modules = [layer.self_attn for layer in model.get_decoder().layers]
    configs = [module.config for module in modules]
    for module in modules:
        module.config = copy.copy(module.config)
        module.config.__dict__["_attn_implementation_internal"] = name
    try:
        yield
    finally:
        for module, config in zip(modules, configs, strict=True):
            module.config = config


@torch.inference_mode()
def run(model: LlavaForConditionalGeneration, prompt: dict, tokens: int) -> tuple[float, float]:
    """Seconds of one prefill, and per generated token."""
    began = time.perf_counter()
    out = model(**prompt, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - began
    token = out.logits[:, -1:].argmax(-1)
    began = time.perf_counter()
    for _ in range(tokens):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return prefill, (time.perf_counter() - began) / tokens


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="These variants, and the untouched model.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    model = build(given.layers)
    g = torch.Generator().manual_seed(1)
    text = torch.randint(10, 30000, (1, BEFORE + AFTER), generator=g)
    text[:, 0] = 1
    n_image = given.images * N_IMAGE
    ids = torch.cat([text[:, :BEFORE], torch.full((1, n_image), IMAGE), text[:, BEFORE:]], dim=1)
    prompt = {"input_ids": ids, "pixel_values": torch.randn(given.images, 3, 336, 336, generator=g).bfloat16()}
    var = VAR(dims=(SINK,), tau=3.0, rho=0.0, min_visual_mass=0.0, skip_first=0, skip_last=False)
    shares = []
    if not given.only or "naive var" in given.only:
        with wrapped(model, var):
            run(model, prompt, 1)
            masks = attached(model)._last.memos[0]["masks"]
            shares = [round(layer["selected"], 3) for layer in report(model)[0]["samples"][0]["layers"].values()]
        for i, layer in enumerate(model.get_decoder().layers):
            layer.self_attn.naive_masks = masks[i].clone()
    AttentionInterface.register("naive_var", naive(var, n_image))
    variants = {
        "untouched": nullcontext,
        "var": lambda: wrapped(model, var),
        "var, none": lambda: wrapped(model, replace(var, min_visual_mass=1.0)),
        "vhr": lambda: wrapped(model, VHR(layers=tuple(range(given.layers // 2, given.layers)))),
        "naive var": lambda: implementation(model, "naive_var"),
        "pyramiddrop": lambda: wrapped(model, PyramidDrop()),
    }
    if given.only:
        variants = {name: variants[name] for name in ("untouched", *given.only)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for number in range(given.rounds + 1):
        for name, put_on in variants.items():
            with put_on():
                found = run(model, prompt, given.tokens)
            if number:  # the first round warms up
                times[name].append(found)
    rows = []
    for name, found in times.items():
        row = {"variant": name}
        for i, phase in enumerate(("prefill", "token")):
            seconds = [f[i] for f in found]
            ratios = np.array([f[i] / b[i] for f, b in zip(found, times["untouched"], strict=True)])
            medians = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
            row |= {f"{phase}_ms": 1000 * statistics.median(seconds), f"{phase}_ratio": float(np.median(ratios))}
            row |= {f"{phase}_ratio_95": np.percentile(medians, [2.5, 97.5]).tolist()}
        rows.append(row)
    setting = {
        "layers": given.layers,
        "image_tokens": n_image,
        "rounds": given.rounds,
        "tokens": given.tokens,
        "threads": torch.get_num_threads(),
        "head_rows_edited": shares,
    }
    if given.json:
        print(json.dumps({**setting, "rows": rows}))
        return
    print(setting)
    for r in rows:
        cells = [f"{r['variant']:11}"]
        for phase in ("prefill", "token"):
            low, high = r[f"{phase}_ratio_95"]
            cells.append(f"{phase} {r[f'{phase}_ms']:8.1f} ms  x{r[f'{phase}_ratio']:.3f} [{low:.3f}, {high:.3f}]")
        print("   ".join(cells))


if __name__ == "__main__":
    main()
