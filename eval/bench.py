"""What methods cost, in time and memory: models of real shapes with random weights, on this machine.

All variants take turns within each round (A B C A B C ...), so that drift of the machine hits all alike; ratios to the
untouched model are taken within rounds. Prefill and tokens are timed apart, inside `generate`.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, LogitsProcessor
from transformers.modeling_utils import AttentionInterface

from vlmfix.asking.asking import Answering
from vlmfix.asking.prefix import Sharing, can_share
from vlmfix.engine import attention
from vlmfix.engine.wrap import wrapped
from vlmfix.hooks import VCD
from vlmfix.method.intervention import Intervention
from vlmfix.method.prompt import Prompt
from vlmfix.method.registry import parse, spec_of
from vlmfix.method.settings import did_you_mean
from vlmfix.method.stages import ASK_STAGES, ATTENTION_STAGES

SINK = 7
"""Dimension in which the first token and half of the image tokens carry a massive activation."""
SETTINGS = {
    "var": f"var:dims={SINK},tau=3,rho=0,min_visual_mass=0,skip_first=0,skip_last=false",
    "pai": "pai:skip_first=0",
}
"""What a bare name stands for here: the worst case, in which every head row of every layer is edited."""
BEFORE = 5
"""Text tokens before the image: of the rest of the text, the question is after it."""
NAIVE = "naive "
PICTURE = "pass over the picture"
_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


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
}
"""By name; the towers are small, since no method touches them, and the number of image tokens is a common one."""


def shape(name: str) -> Shape:
    """`ValueError` for unknown names."""
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; {did_you_mean(name, SHAPES)}")
    return SHAPES[name]


def build(name: str, layers: int | None, dtype: torch.dtype, device: str) -> Any:
    """The model, with sinks planted: one of its two image tokens carries a massive activation."""
    found = shape(name)
    text = {**found.text, "num_hidden_layers": layers or found.text["num_hidden_layers"]}
    image, sink = text["vocab_size"] - 1, text["vocab_size"] - 2
    tower = {**_TOWER, "depth": 1, "num_heads": 2, "out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [0]}
    config = AutoConfig.for_model(
        found.model_type, text_config=text, vision_config=tower, image_token_id=image, video_token_id=sink
    )
    config.image_token_index, config.image_token_id, config.video_token_id = image, image, sink
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # random models would stop at once
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:, SINK] = 0
        table[[1, sink], SINK] = 200.0  # far beyond what layers add, so that it lasts through all of them
    return model


def prompt(model: Any, name: str, batch: int, text_tokens: int) -> dict[str, Tensor]:
    """Random text around the image tokens of one picture; the same number in all samples, so without padding."""
    found, vocab = shape(name), model.config.get_text_config(decoder=True).vocab_size
    if text_tokens <= BEFORE:
        raise ValueError(f"text tokens: expected more than {BEFORE}, since so many stand before the image")
    g = torch.Generator().manual_seed(1)
    text = torch.randint(3, vocab - 2, (batch, text_tokens), generator=g)
    text[:, 0] = 1
    image = vocab - 1 - (torch.arange(found.image_tokens) % 2)
    ids = torch.cat([text[:, :BEFORE], image.expand(batch, -1), text[:, BEFORE:]], dim=1).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class TowerlessVCD(VCD):
    """VCD for prompts whose image tokens come without pixels, as here: the second stream gets the same tokens again, as
    many as a noised picture has. It costs what VCD costs but for the vision tower."""

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        """Prepare the second stream."""
        memo["seen"] = prompt.geometry.image.any(1)
        memo["blurred"] = prompt.stream_with()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` counts what the process computes, on all cores: for machines that are shared with other work."""


class _Stopwatch(LogitsProcessor):
    """Notes when the scores of each token are there, those of methods included."""

    listens = True

    def __init__(self, clock: str) -> None:
        self.clock, self.times = clock, [_now(clock)]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """A logits processor of `generate`."""
        self.times.append(_now(self.clock))
        return scores


def _now(clock: str) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCKS[clock]()


@dataclass(frozen=True)
class Timing:
    """One generation."""

    prefill: float
    """Seconds to the first token."""
    token: float
    """Seconds per further token, the median."""
    memory: float | None
    """Peak bytes, weights included: allocated on a GPU, resident on a CPU under Linux."""


@torch.inference_mode()
def measure(model: Any, inputs: dict[str, Tensor], new_tokens: int, clock: str = "wall") -> Timing:
    """Time one generation."""
    _forget_peak()
    watch = _Stopwatch(clock)
    model.generate(**inputs, max_new_tokens=new_tokens + 1, do_sample=False, logits_processor=[watch], pad_token_id=0)
    steps = np.diff(watch.times)
    return Timing(float(steps[0]), float(np.median(steps[1:])), _peak())


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float | None:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")] if status.exists() else []
    return 1024 * float(found[0].split()[1]) if found else None


def naive_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """What most ports do: queries x keys in float32, the edits on the whole matrix, and no kernel."""
    view = module.config.vlmfix_view
    call, rows = view.current(), torch.arange(query.shape[2], device=query.device)
    if call is None:  # a second stream: no edit of attention is in force there
        return view.kernel()(view.original, query, key, value, attention_mask, **kwargs)
    scores = attention.Scores(view, call, query, key.float(), attention_mask, kwargs)
    s, hidden = scores.rows(rows)
    at = (view.layer, view.n_layers, scores.n_keys, rows, query.device)
    for i, e in view.edits:
        if call.n_prompt and e.acts_at("survey"):
            e.survey(scores.softmax(s, rows), call.site(i, "all", *at))
    sites = [(e, call.site(i, e.rows, *at)) for i, e in view.edits]
    for e, site in sites:
        s = e.scores(s, site)
    a = scores.softmax(s if hidden is None else s.masked_fill(hidden, torch.finfo(s.dtype).min), rows)
    for e, site in sites:
        a = e.weights(a, site)
    out = (attention.by_key_head(a, scores.group) @ value.float()).view(*a.shape[:3], -1)
    return out.transpose(1, 2).to(query.dtype), None


@contextmanager
def naively(model: Any, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Interventions in force, with `naive_attention` in the layers that they edit."""
    with wrapped(model, list(interventions)):
        AttentionInterface.register(attention.NAME, naive_attention)
        try:
            yield
        finally:
            AttentionInterface.register(attention.NAME, attention.edited_attention)


def variants(model: Any, methods: Sequence[tuple[Intervention, ...]], naive: bool) -> dict[str, Callable[[], Any]]:
    """What is compared, by name, and how it is put in force: the untouched model twice, which tells the noise."""
    found: dict[str, Callable[[], AbstractContextManager[Any]]] = {"none": nullcontext, "none again": nullcontext}
    for method in methods:
        if method:
            name = "+".join(one.name for one in method)
            name = name if name not in found else spec_of(method)
            found[name] = lambda method=method: wrapped(model, list(method))  # type: ignore[misc]
            if naive and any(one.acts_at(stage) for one in method for stage in ATTENTION_STAGES):
                found[NAIVE + name] = lambda method=method: naively(model, method)  # type: ignore[misc]
    return found


def find_methods(specs: Sequence[str]) -> list[tuple[Intervention, ...]]:
    """Methods by name; a bare name stands for its worst case (`SETTINGS`). `ValueError` for those that act in `ask`
    only, which is not what is measured here."""
    found = [parse(SETTINGS.get(spec, spec)) for spec in specs]
    for one in (one for method in found for one in method if any(map(one.acts_at, ASK_STAGES))):
        raise ValueError(f"{one.name} acts in vlmfix.ask only; what it costs there is in the records of vlmfix eval")
    return [tuple(_towerless(one) if type(one) is VCD else one for one in method) for method in found]


def _towerless(vcd: VCD) -> TowerlessVCD:
    return TowerlessVCD(**{f.name: getattr(vcd, f.name) for f in fields(vcd)})


def footprint(model: Any) -> int:
    """How many hooks are on a model's modules."""
    return sum(len(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))


def compare(
    model: Any,
    inputs: dict[str, Tensor],
    methods: Sequence[tuple[Intervention, ...]],
    *,
    new_tokens: int,
    rounds: int,
    clock: str = "wall",
    naive: bool = True,
    tell: Callable[[str, int, int], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """Measure all variants in turn. `RuntimeError` if anything of a method stays on the model."""
    found = variants(model, methods, naive)
    times: dict[str, list[Timing]] = {name: [] for name in found}
    with torch.inference_mode():
        before, hooks = model(**inputs, logits_to_keep=1).logits, footprint(model)
    for number in range(rounds + 1):
        for name, put_on in found.items():
            with put_on():
                timing = measure(model, inputs, new_tokens, clock)
            if number:  # the first round warms up
                times[name].append(timing)
        tell("rounds", number, rounds)
    with torch.inference_mode():
        same = torch.equal(before, model(**inputs, logits_to_keep=1).logits)
    if not same or footprint(model) != hooks:
        raise RuntimeError("the model is not what it was before the methods were put on and taken off")
    return [{"variant": name, **summary(timings, times["none"])} for name, timings in times.items()]


def summary(timings: Sequence[Timing], plain: Sequence[Timing]) -> dict[str, Any]:
    """Medians with quartiles, and ratios to the untouched model within rounds with 95 % bootstrap intervals."""
    row: dict[str, Any] = {}
    for key in ("prefill", "token", "memory"):
        values, reference = ([getattr(t, key) for t in many] for many in (timings, plain))
        if None in values or None in reference:
            continue
        row[key] = {
            "median": statistics.median(values),
            "quartiles": np.percentile(values, [25, 75]).tolist(),
            **ratio(values, reference),
        }
    return row


def ratio(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Median of the ratios within rounds, and the 95 % interval of a bootstrap over rounds."""
    ratios = np.array(values) / np.array(reference)
    medians = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
    return {"ratio": float(np.median(ratios)), "interval": np.percentile(medians, [2.5, 97.5]).tolist()}


def share_questions(
    model: Any,
    inputs: dict[str, Tensor],
    method: tuple[Intervention, ...],
    *,
    questions: int,
    own_tokens: int,
    new_tokens: int,
    rounds: int,
    clock: str = "wall",
) -> dict[str, Any]:
    """How fast `questions` about one picture are answered one by one, as one batch, and sharing the pass over it, and
    how long that pass alone takes. They differ in their last `own_tokens`. `ValueError` where the method cannot share.
    """
    ids = inputs["input_ids"][:1].repeat(questions, 1)
    ends = torch.randint(3, 100, (questions, own_tokens), generator=torch.Generator().manual_seed(2))
    ids[:, -own_tokens:] = ends.to(ids.device)
    mask, n = torch.ones_like(ids), ids.shape[1] - own_tokens
    settings = {"do_sample": False, "max_new_tokens": new_tokens}

    def asking(rows: slice) -> Answering:
        return Answering(model, None, [], {"input_ids": ids[rows], "attention_mask": mask[rows]}, settings)

    prefix = {"input_ids": ids[:1, :n], "attention_mask": mask[:1, :n]}
    together = Sharing(
        model, None, [], asking(slice(None)).inputs, settings, prefix=prefix,
        picture=torch.zeros(questions, dtype=torch.long, device=ids.device),
    )  # fmt: skip
    ways: dict[str, Callable[[], Any]] = {
        "one by one": lambda: [asking(slice(i, i + 1)).generate()[0] for i in range(questions)],
        "one batch": asking(slice(None)).generate,
        "sharing": together.generate,
        PICTURE: together.look,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with wrapped(model, list(method)), torch.inference_mode():
        if not can_share(model, settings):
            raise ValueError(f"{spec_of(method)} cannot share the pass over a picture: it depends on the question")
        for _ in range(rounds):
            for name, answer in ways.items():
                began = _now(clock)
                answer()
                times[name].append(_now(clock) - began)
    speed = {name: ratio(times["one by one"], times[name]) for name in ways if name != PICTURE}
    return {
        "method": spec_of(method),
        "questions": questions,
        "own_tokens": own_tokens,
        "seconds": {name: statistics.median(seconds) for name, seconds in times.items()},
        "times_faster": speed,
        PICTURE: ratio(times[PICTURE], times["sharing"]),
    }


def environment(model: Any) -> dict[str, Any]:
    """The machine, in words."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def shape_facts(name: str, model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What was measured on."""
    found = asdict(shape(name))
    return {
        "shape": name,
        "layers": model.config.get_text_config(decoder=True).num_hidden_layers,
        "image_tokens": found["image_tokens"],
        "prompt_tokens": inputs["input_ids"].shape[1],
        "batch_size": len(inputs["input_ids"]),
    }
