"""What vlmfix finds on a model, before anything is changed: parts, sinks, methods with their effect and cost.

    print(vlmfix.describe(model, processor).text())

Every figure is measured on a few pictures with the model as it is: the untouched answer is written once, and each
method then says how likely it finds the same tokens.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vlmfix.asking.asker import Asker
from vlmfix.asking.identity import processor_digest
from vlmfix.engine.attachment import attached
from vlmfix.hooks.parts import sinks
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.names import REGISTRY
from vlmfix.method.registry import Interventions, as_interventions, parse, spec_of
from vlmfix.method.site import Site
from vlmfix.method.stages import ATTENTION_STAGES
from vlmfix.model.anatomy import Anatomy, anatomy

PROMPT = "Please describe this image in detail."
N_TOKENS = 12
"""Of the untouched answer, along which methods are compared."""
SCENES = {"organism": "organism/calibration", "organism-qwen": "organism/calibration"}
"""Pictures that embedded models know; other models get photos."""


@dataclass(frozen=True)
class MethodFacts:
    """One method on this model."""

    method: str
    runs: bool
    why_not: str = ""
    """Why it cannot run, or does nothing here."""
    kl: float | None = None
    """KL(method || untouched) of the next token, mean along the untouched answer, nats; `None` where it works on whole
    answers."""
    rows: float | None = None
    """Share of the prompt's rows that it edits."""
    passes: float | None = None
    """Forward passes, of those of the untouched model."""
    tokens: float | None = None
    """Rows through the decoder, of those of the untouched model."""
    layers_again: int = 0
    """Layers whose attention is computed again, in the edited rows: as many times are their keys read once more."""


@dataclass(frozen=True)
class Description:
    """What was found. All fields are JSON-ready."""

    model: str
    model_type: str
    text_type: str
    n_layers: int
    n_heads: int
    attention_layers: int
    hidden_size: int
    dtype: str
    device: str
    kernel: str
    """Implementation of attention."""
    lacks: dict[str, str]
    image_tokens: list[int]
    """Image tokens of each picture."""
    prompt_tokens: int
    processor_digest: str
    template: str
    """How a question is written, with the picture's tokens as one."""
    sinks: dict[str, Any]
    """`dims`, where from, `tokens` a picture, and shares of the last row's attention."""
    unchanged: bool
    """Whether the model's logits are the same to the bit after all methods came on and went off."""
    methods: list[MethodFacts]
    conflict: str = ""
    """Why the methods that were given cannot be in force together; empty if they can."""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def text(self, width: int = 80) -> str:
        """One screen."""
        same = "the same to the bit" if self.unchanged else "NOT THE SAME, please report this,"
        facts = [
            f"{self.model}: {self.model_type} around {self.text_type}, {self.n_layers} layers x {self.n_heads} heads, "
            f"width {self.hidden_size}, {self.dtype} on {self.device}, attention by {self.kernel}",
            f"prompt: {self.prompt_tokens} tokens, {max(self.image_tokens)} of them image: {self.template!r}",
            _sink_line(self.sinks),
            f"untouched: logits are {same} after every method came on and went off",
            *(f"without {part}: {reason}" for part, reason in self.lacks.items()),
            *self.notes,
        ]
        lines = [line for fact in facts for line in textwrap.wrap(fact, width, subsequent_indent="  ")]
        running = [each for each in self.methods if each.runs]
        if running:
            lines += ["", *self._table(running, width)]
        cannot = [each for each in self.methods if not each.runs]
        if cannot:
            lines += ["", "cannot run here:"]
            for each in cannot:
                lines.append(_cut(f"  {each.method}: {each.why_not.removeprefix(f'{each.method}: ')}", width))
        return "\n".join(lines)

    def _table(self, running: Sequence[MethodFacts], width: int) -> list[str]:
        names = max(12, min(width - 52, max(len(each.method) for each in running)))
        lines = [f"{'method':<{names}}  effect  prompt rows  passes  rows x  attention again"]
        for each in running:
            effect = "text" if each.kl is None else f"{each.kl:.3f}"
            again = f"{each.layers_again} of {self.n_layers} layers" if each.layers_again else ""
            cells = f"{effect:>6}  {100 * (each.rows or 0):9.1f} %  {each.passes:6.2f}  {each.tokens:6.2f}  {again}"
            lines.append(f"{_cut(each.method, names):<{names}}  {cells}".rstrip())
        foot = (
            f"effect: KL to the untouched model's next token, nats, along {N_TOKENS} tokens on "
            f"{len(self.image_tokens)} pictures; text: works on whole answers. passes, rows: through the decoder, of "
            f"the untouched model's."
        )
        return [*lines, *textwrap.wrap(foot, width)]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def _sink_line(found: dict[str, Any]) -> str:
    if not found.get("attention"):
        return f"attention: not looked at, {found['why']}"
    shares = {key: f"{100 * share:.0f} %" for key, share in found["attention"].items()}
    line = (
        f"the prompt's last row looks at the image by {shares['image']}, at the first token by {shares['first_token']}"
    )
    if not found["dims"]:
        return f"{line}; no visual sinks: {found['why']}"
    dims = ", ".join(map(str, found["dims"]))
    return (
        f"{line}, at visual sinks by {shares['visual_sinks']} ({found['tokens']:.0f} tokens a picture, told by "
        f"dimension {dims}, {found['origin']})"
    )


@torch.no_grad()
def describe(
    model: Any,
    processor: Any,
    methods: Interventions = None,
    *,
    pictures: Sequence[str | Path] | None = None,
    prompt: str = PROMPT,
) -> Description:
    """Look at a model on a few pictures. It is left as it was found, to the bit, and nothing is downloaded.

    `methods`: those to look at, in force together; `None`: each of the registry by itself. Without `pictures`, three
    that come with the package. Raises `TypeError` for a model that cannot be wrapped.
    """
    parts = anatomy(model)
    name = model.config._name_or_path
    shown = [str(picture) for picture in pictures or _some_pictures(name)]
    questions = [(picture, prompt) for picture in shown]
    untouched = Asker(model, processor)
    with untouched.applied():
        inputs = untouched.inputs(questions)
        before = model(**inputs, use_cache=False).logits
        answers, plain = _untouched(untouched, questions)
    image = _image_mask(parts, inputs)
    real = inputs["attention_mask"].bool()
    facts, conflict = [], ""
    chosen = [parse(method) for method in REGISTRY] if methods is None else [as_interventions(methods)]
    for each in chosen:
        facts.append(_try(model, processor, each, questions, answers, plain, image, real))
    if methods is not None and not facts[0].runs:
        conflict = facts[0].why_not
    with untouched.applied():
        unchanged = torch.equal(before, model(**inputs, use_cache=False).logits)
    return Description(
        model=name,
        model_type=parts.model_type,
        text_type=parts.text_type,
        n_layers=len(parts.layers),
        n_heads=parts.n_heads,
        attention_layers=len(parts.attention_layers),
        hidden_size=parts.hidden_size,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        kernel=model.config._attn_implementation,
        lacks=parts.lacks,
        image_tokens=image.sum(1).tolist(),
        prompt_tokens=int(real.sum(1).max()),
        processor_digest=processor_digest(processor),
        template=_template(processor, inputs, image, real),
        sinks=_sinks(model, processor, parts, inputs),
        unchanged=unchanged,
        methods=facts,
        conflict=conflict,
        notes=[] if attached(model) is None else ["the model is wrapped; described is what lies below"],
    )


def _some_pictures(name: str) -> list[Path]:
    folder = Path(str(files("vlmfix.assets"))) / SCENES.get(name, "photos") / "images"
    return sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".webp", ".png"))[:3]


class _Along(LogitsProcessor):
    """Notes the log-probabilities of each next token, and has the given answers written, whatever is likely."""

    listens = True
    """Comes after the processors that edit."""

    def __init__(self, answers: Tensor | None = None) -> None:
        self.answers = answers
        """(B, tokens)."""
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """A logits processor of `generate`."""
        self.log_probs.append(scores.float().log_softmax(-1))
        if self.answers is None:
            return scores
        forced = torch.full_like(scores, float("-inf"))
        tokens = self.answers[: len(scores), len(self.log_probs) - 1].to(scores.device)
        forced[torch.arange(len(scores)), tokens] = 0
        return forced  # type: ignore[return-value]


Plain = tuple[list[Tensor], float, float]
"""Of the untouched model: log-probabilities along its answer, passes and rows a question."""


def _untouched(asker: Asker, questions: Sequence[Any]) -> tuple[Tensor, Plain]:
    """Its answers (B, tokens), and what it finds likely along them."""
    along = _Along()
    records = asker.ask_batch(questions, max_new_tokens=N_TOKENS, logits_processor=[along], share=False)
    answers = torch.stack([step.argmax(-1) for step in along.log_probs], 1)
    return answers, (along.log_probs, records[0].passes, records[0].tokens)


def _try(
    model: Any,
    processor: Any,
    method: Sequence[Intervention],
    questions: Sequence[Any],
    answers: Tensor,
    plain: Plain,
    image: Tensor,
    real: Tensor,
) -> MethodFacts:
    """A method's effect and cost, or why it cannot run."""
    label = spec_of(method)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            asker = Asker(model, processor, method)
            active = [one for one in asker.interventions if one is not None]
            idle = [each["facts"]["idle"] for each in asker.methods if "idle" in each["facts"]]
            if not active:
                return MethodFacts(label, False, f"idle: {'; '.join(idle)}" if idle else "nothing to do")
            whole = any(one.acts_at("decode") for one in active)
            along = _Along(None if whole else answers)
            options: dict[str, Any] = {} if whole else {"logits_processor": [along]}
            records = asker.ask_batch(questions, max_new_tokens=N_TOKENS, share=False, **options)
        except (ValueError, TypeError) as error:
            return MethodFacts(label, False, str(error))
    log_probs, passes, tokens = plain
    kls = [_kl(edited, untouched) for untouched, edited in zip(log_probs, along.log_probs, strict=False)]
    again = {layer for one in active for layer in _attention_layers(one, model)}
    return MethodFacts(
        label,
        True,
        "; ".join(idle),
        kl=None if whole or not kls else float(torch.stack(kls).mean()),
        rows=float(_rows(active, image, real)),
        passes=records[0].passes / passes,
        tokens=records[0].tokens / tokens,
        layers_again=len(again),
    )


def _kl(edited: Tensor, plain: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities (B, V), mean over samples; tokens that p forbids count nothing."""
    possible = edited > float("-inf")
    return (edited.exp() * (edited - plain)).where(possible, 0.0).sum(-1).mean()


def _attention_layers(one: Intervention, model: Any) -> list[int]:
    edits = any(one.acts_at(stage) for stage in ATTENTION_STAGES)
    return list(one.at_layers(len(anatomy(model).layers))) if edits else []


def _rows(active: Sequence[Intervention], image: Tensor, real: Tensor) -> Tensor:
    """Share of the prompt's rows that are edited."""
    n = image.shape[1]
    after_last = torch.arange(n, device=image.device) > (image * torch.arange(n, device=image.device)).amax(1)[:, None]
    last = torch.zeros_like(image)
    last[:, -1] = True
    of_rows = {"last": last, "after_last_image": after_last, "text": ~image, "all": real, "generated": last & False}
    edited = torch.zeros_like(image)
    for one in active:
        if any(one.acts_at(stage) for stage in ("tokens", "heads", "cache", "mlp")):
            edited |= real
        if any(one.acts_at(stage) for stage in ("scores", "weights")):
            edited |= of_rows[one.rows]
    return (edited & real).sum() / real.sum()


def _image_mask(parts: Anatomy, inputs: dict[str, Any]) -> Tensor:
    """(B, T) bool: tokens of the picture, by their ids."""
    ids = inputs["input_ids"]
    return torch.isin(ids, torch.tensor(parts.image_token_ids, dtype=ids.dtype, device=ids.device))


def _template(processor: Any, inputs: dict[str, Any], image: Tensor, real: Tensor) -> str:
    """The first prompt as text, the picture's tokens as one."""
    ids, is_image = inputs["input_ids"][0], image[0]
    follows = torch.cat([is_image[:1] & False, is_image[:-1]])
    return processor.tokenizer.decode(ids[real[0] & ~(is_image & follows)])


@dataclass(frozen=True)
class _Look(Intervention):
    """Adds up where the last row of the prompt looks; edits nothing."""

    dims: tuple[int, ...] = ()
    tau: float = 1.0

    @property
    def traits(self) -> Traits:
        """It needs the row that sees everything."""
        return Traits(whole_prompt=True)

    def layer_input(self, x: Tensor, site: Site) -> None:
        """Mark sinks."""
        hit = sinks.phi(x, self.dims) >= self.tau if self.dims else x.new_zeros(x.shape[:2], dtype=torch.bool)
        site.memo.setdefault("sinks", {})[site.layer] = hit & site.geometry.valid

    def survey(self, a: Tensor, site: Site) -> None:
        """Shares of attention, mean over heads and samples."""
        at_last = site.positions == site.geometry.n - 1
        if not bool(at_last.any()):
            return
        row = a[:, :, at_last].squeeze(2).mean(1)  # (B, K)
        image, valid = site.geometry.image, site.geometry.valid
        sink = site.memo["sinks"][site.layer]
        first = valid & (valid.cumsum(1) == 1)
        masks = {"image": image, "visual_sinks": image & sink, "first_token": first}
        shares = site.memo.setdefault("shares", {})
        shares[site.layer] = {key: float((row * mask).sum(1).mean()) for key, mask in masks.items()}
        site.memo.setdefault("n", {})[site.layer] = float((image & sink).sum(1).float().mean())


def _sinks(model: Any, processor: Any, parts: Anatomy, inputs: dict[str, Any]) -> dict[str, Any]:
    """Visual sinks: dimensions, tokens a picture (in the layer with most), and shares of attention over layers."""
    if "residual stream" in parts.lacks or "attention" in parts.lacks:
        return {"dims": [], "why": parts.lacks.get("attention") or parts.lacks["residual stream"]}
    tau = sinks.default_tau(parts.hidden_size)
    with Asker(model, processor).applied():
        found = sinks.resolve(model, parts, tau, processor)
    _, (memo,) = Asker(model, processor, _Look(found.dims, tau)).forward(inputs)
    shares = list(memo.get("shares", {}).values())
    means = {key: sum(layer[key] for layer in shares) / len(shares) for key in shares[0]} if shares else {}
    facts = {
        "dims": list(found.dims),
        "origin": found.origin,
        "tau": tau,
        "tokens": max(memo["n"].values(), default=0.0),
    }
    return {**facts, "attention": means, "why": "" if found.dims else found.explain()}
