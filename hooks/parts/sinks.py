"""D_sink: the few dimensions of a language model's residual stream in which sink tokens carry massive activations.

Sun et al., "Massive Activations in Large Language Models", arXiv 2402.17762. A dimension counts if it is massive on
the first token (or another carrier) of ordinary text, over most layers, and small on other tokens; one that is large
on all tokens is an outlier feature and is rejected. The rule is ours; its thresholds are stated at their lines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.model.anatomy import Anatomy

TEXTS = (
    "The harbour wakes before the town does. Crates are stacked along the quay, and gulls wait for the first boat.\n"
    "By noon the market is full. Someone sells bread, someone else repairs nets, and nobody is in a hurry.",
    "To make tea, boil fresh water and warm the pot. Add one spoon of leaves for each cup.\nWait four minutes.\n"
    "Pour it slowly, and keep the lid on while you do. Milk is a matter of taste.",
    "A prime number has exactly two divisors. There is no largest one.\nSuppose there were: multiply them all, add "
    "one, and look at the divisors of the result. None of the old ones fits.",
    "Dear Ada,\nthe trains were late again, so I walked. The bridge is finished now, and the river looks smaller from "
    "up there.\nWrite soon, and tell me how the garden is doing this spring.",
)


@dataclass(frozen=True)
class Known:
    """Published dimensions of one language model, with the text config by which it is recognised."""

    name: str
    kinds: tuple[str, ...]
    hidden: int
    layers: int
    vocab: tuple[int, int]
    dims: tuple[int, ...]
    source: str


_ANY = (0, 10**9)
_QWEN_VL = ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text")
_SECOND_HAND = "published by third parties without a calibration program"
TABLE = (
    Known("LLaMA-2-7B", ("llama",), 4096, 32, (31000, 34000), (2533, 1415), "seilk/VisAttnSink; Sun et al."),
    Known("LLaMA-2-13B", ("llama",), 5120, 40, (31000, 34000), (4743, 2100), "seilk/VisAttnSink; Sun et al."),
    Known(
        "Llama-3-8B", ("llama",), 4096, 32, (120000, 140000), (788, 1384, 4062), "locuslab/massive-activations, plots"
    ),
    Known("Llama-3.1-70B", ("llama",), 8192, 80, _ANY, (1532, 6857, 7306), _SECOND_HAND),
    Known("Mistral-7B", ("mistral",), 4096, 32, _ANY, (2070,), "locuslab/massive-activations, plots"),
    Known("Qwen2-7B, Qwen2.5-7B", _QWEN_VL, 3584, 28, _ANY, (2570, 458), _SECOND_HAND),
    Known("Qwen2.5-VL-3B", _QWEN_VL, 2048, 36, _ANY, (1874, 1819, 318), _SECOND_HAND),
    Known("Qwen2.5-VL-32B", _QWEN_VL, 5120, 64, _ANY, (4675, 3094), _SECOND_HAND),
    Known("Qwen2-VL-2B", _QWEN_VL, 1536, 28, _ANY, (1073, 534, 940), _SECOND_HAND),
    Known("Qwen3-VL-2B", ("qwen3_vl_text",), 2048, 28, _ANY, (1793, 1999, 1401), _SECOND_HAND),
    Known("Qwen3-VL-4B", ("qwen3_vl_text",), 2560, 36, _ANY, (0,), _SECOND_HAND),
    Known("Qwen3-VL-8B", ("qwen3_vl_text",), 4096, 36, _ANY, (1838,), _SECOND_HAND),
    Known("InternVL3.5-1B", ("qwen3",), 1024, 28, _ANY, (35, 13), _SECOND_HAND),
    Known("InternVL3.5-4B", ("qwen3",), 2560, 36, _ANY, (4, 396, 0), _SECOND_HAND),
    Known("InternVL3.5-8B", ("qwen3",), 4096, 36, _ANY, (2276, 233), _SECOND_HAND),
    Known("InternVL3.5-38B", ("qwen3",), 5120, 64, _ANY, (731,), _SECOND_HAND),
)


@dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`."""

    dims: tuple[int, ...]
    """D_sink by falling strength; empty if there is none."""
    tau: float
    tier: str
    """`strict`: beyond 100 and 1000 times the median; `relative`: only beyond 100 times the median; `none`."""
    onset: int | None
    """First layer whose input shows them."""
    origin: str
    peak: tuple[int, float, float]
    """The loudest (dimension, phi, |x| / median |x|) seen on a carrier token, for the message when nothing is found."""
    massive: tuple[int, ...] = ()
    """All dimensions that passed, the weaker ones that are not part of `dims` included."""
    dropped: tuple[tuple[int, str], ...] = ()
    """Candidates rejected, with the reason."""

    def explain(self) -> str:
        """Why nothing was found, in one clause."""
        dim, phi, ratio = self.peak
        rejected = "".join(f"; dimension {other} rejected: {why}" for other, why in self.dropped)
        return (
            f"the loudest is {dim} with phi {phi:.3g} (tau {self.tau:.3g}) and {ratio:.3g} times the median activation "
            f"(at least 100 is massive){rejected}; give dims=... if you know them"
        )


def default_tau(hidden_size: int) -> float:
    """Threshold on phi: 20 (paper, on D = 4096), scaled to an equal share of the token's energy below D = 3584
    (ours)."""
    return 20.0 if hidden_size >= 3584 else 20.0 * (hidden_size / 4096) ** 0.5


def phi(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sink score max_d |x_d| / RMS(x) over `dims`, of x (..., D), in float32."""
    import torch

    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=wide).float()  # makes no float32 copy of x
    return x[..., list(dims)].float().abs().amax(-1) / (norm.square() / x.shape[-1] + 1e-6).sqrt()


def calibrate(x: Tensor, tau: float, first: int = 0) -> Calibration:
    """Find D_sink in layer inputs x (P prompts, L layers, T tokens, D) of plain texts whose first token stands at
    `first`."""
    x = x.float()
    n_layers, width = x.shape[1], x.shape[3]
    size = x.abs()
    loudest_token = size.amax(-1)  # (P, L, T)
    carrier = loudest_token.argmax(-1)
    quiet_first = loudest_token[..., first] < 0.1 * loudest_token.amax(-1)
    carrier = carrier.where(quiet_first, carrier.new_full((), first))  # (P, L)
    at = carrier[..., None, None].expand(-1, -1, 1, width)
    med = size.flatten(2).median(-1).values[..., None]  # (P, L, 1), lower median
    c = size.gather(2, at)[:, :, 0]  # (P, L, D)
    rms = (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    score = size / rms  # phi_d of every token
    energy = c.pow(2) / c.pow(2).sum(-1, keepdim=True)
    cand = ((energy >= 0.01) & (c >= 100 * med)).float().mean(0)  # (L, D), shares of the prompts
    strict = ((c > 100) & (c > 1000 * med)).float().mean(0)
    p_first = score.gather(2, at)[:, :, 0].mean(0)
    plain = size.new_ones(size.shape[:3])
    plain[..., first] = 0
    plain.scatter_(2, carrier[..., None], 0)
    others = score.masked_fill(plain[..., None] == 0, float("nan")).nanmedian(2).values.mean(0)
    # Layers 2 .. L-2 are considered: massive activations come in within the first layers and leave in the last.
    on = cand >= 0.5
    on[:2], on[n_layers - 1 :] = False, False
    inner = slice(min(2, n_layers - 1), max(n_layers - 1, 1))
    loudest = int(p_first[inner].argmax())
    layer, dim = loudest // width + (inner.start or 0), loudest % width
    peak = (dim, float(p_first[layer, dim]), float((c[:, layer, dim] / med[:, layer, 0]).mean()))
    layers = on.any(1).nonzero()[:, 0].tolist()
    if not layers:
        return Calibration((), tau, "none", None, "calibrated", peak)
    # From the first such layer to the last, a dimension must be massive in half of the layers, on carriers alone.
    span = slice(layers[0], layers[-1] + 1)
    share_on = on[span].float().mean(0)
    p_carrier, p_others = p_first[span].median(0).values, others[span].median(0).values
    dropped, kept = [], []
    for dim in (share_on >= 0.5).nonzero()[:, 0].tolist():
        if p_others[dim] >= 0.25 * p_carrier[dim] or p_others[dim] >= tau / 2:
            dropped.append((dim, "large on all tokens"))
        else:
            kept.append(dim)
    top = max((float(p_carrier[dim]) for dim in kept), default=0.0)
    if top < tau:
        dropped += [(dim, f"phi {float(p_carrier[dim]):.3g} is below tau") for dim in kept]
        return Calibration((), tau, "none", None, "calibrated", peak, dropped=tuple(dropped))
    strong = [dim for dim in kept if p_carrier[dim] >= 0.3 * top]
    strong.sort(key=lambda dim: -float(p_carrier[dim]))
    dims = tuple(strong[:3])
    is_strict = all(float(strict[span, dim].mean()) >= 0.5 for dim in dims)
    tier = "strict" if is_strict else "relative"
    return Calibration(dims, tau, tier, layers[0], "calibrated", peak, tuple(kept), tuple(dropped))


def resolve(model: nn.Module, anatomy: Anatomy, tau: float, processor: Any = None) -> Calibration:
    """D_sink of a loaded model: the table's, as far as the loaded weights bear it out, else what calibration finds."""
    calibration = calibrate(probe(model, anatomy, processor), tau)
    entry = recognise(anatomy)
    if entry is not None:
        confirmed = tuple(dim for dim in entry.dims if dim in calibration.massive)
        if confirmed:
            origin = f"table ({entry.name}: {entry.source}), verified on the weights"
            return replace(calibration, dims=confirmed, origin=origin)
    return calibration


def recognise(anatomy: Anatomy) -> Known | None:
    """The table's entry for this text config; names are not trusted, since fine-tuning and towers change models."""
    for entry in TABLE:
        same = anatomy.text_type in entry.kinds and anatomy.hidden_size == entry.hidden
        if same and len(anatomy.layers) == entry.layers and entry.vocab[0] <= anatomy.vocab_size <= entry.vocab[1]:
            return entry
    return None


def probe(model: nn.Module, anatomy: Anatomy, processor: Any = None) -> Tensor:
    """Layer inputs (P, L, T, D) of four short texts, without an image, cut to a common length.

    Real text in the model's own chat template with a processor or tokenizer; else ordinary random tokens after the BOS.
    """
    import torch

    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    prompts = [torch.tensor(ids, device=device) for ids in _token_ids(anatomy, processor)]
    length = min(len(ids) for ids in prompts)
    seen: list[Tensor] = []
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"])[0].detach().cpu()),
            with_kwargs=True,
        )
        for layer in anatomy.layers
    ]
    try:
        with torch.no_grad():
            for ids in prompts:
                embeds = model.get_input_embeddings()(ids[None, :length])  # type: ignore[operator]
                anatomy.decoder(inputs_embeds=embeds, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    n = len(anatomy.layers)
    return torch.stack([torch.stack(seen[i : i + n]) for i in range(0, len(seen), n)])


def _token_ids(anatomy: Anatomy, processor: Any) -> list[list[int]]:
    if processor is None:
        import random

        bos = [] if anatomy.bos_token_id is None else [anatomy.bos_token_id]
        ordinary = [i for i in range(anatomy.vocab_size // 100, anatomy.vocab_size) if i not in anatomy.image_token_ids]
        return [bos + random.Random(seed).choices(ordinary, k=48) for seed in range(4)]
    tokenizer = getattr(processor, "tokenizer", processor)
    texts: list[str] = list(TEXTS)
    if getattr(processor, "chat_template", None):
        chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in TEXTS]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    bos = tokenizer.bos_token
    return [tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"] for text in texts]
