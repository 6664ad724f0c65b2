"""`ask`: picture and prompt in, record out. Evaluation, command line and demo all go through here."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import LogitsProcessor

from vlmfix.engine.attachment import Attachment, attached, describe

Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Record:
    """One answer, and all that it takes to get it again. One JSON line."""

    model: str
    """Name or path that the model was loaded from."""
    image: list[str]
    """Path of each picture, or its size where it came without one."""
    image_sha256: list[str]
    """Hash of each picture's RGB pixels."""
    prompt: str
    method: list[dict[str, Any]]
    """Interventions in force: name, settings as resolved on this model, facts found; empty for the untouched model."""
    text: str
    """The answer, special tokens removed."""
    token_ids: list[int]
    """Generated tokens, the end token included."""
    finish: str
    """`stop` if the model ended its answer, `length` if it was cut."""
    seconds: float
    """Wall time of the generation, shared equally by the answers of a batch. In `seconds`, `passes` and `tokens`, a
    pass over pictures that several methods share counts in full for each of them."""
    batch_size: int
    generation: dict[str, Any]
    """Settings given to `generate`."""
    did: list[dict[str, Any]] = field(default_factory=list)
    """What each intervention did to this answer, in short (`acted` ...)."""
    passes: float = 0.0
    """Forward passes of the text decoder that the answer took, those of methods included; a pass over a batch counts
    once for each sequence in it."""
    tokens: float = 0.0
    """Rows that went through the text decoder in these passes, padding included."""
    id: str | None = None
    """Name of the question within an evaluation."""
    first_token: dict[str, float] | None = None
    """Word -> natural log of the probability that the answer begins with it, where that was asked for."""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The way back. `ValueError` if the line is no record."""
        data = json.loads(line)
        known = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or not {"text", "prompt", "image"} <= set(data) or set(data) - known:
            raise ValueError(f"not a record: expected the fields {', '.join(sorted(known))}")
        return cls(**data)


def open_picture(picture: Picture) -> Image.Image:
    """A picture as RGB, turned upright. `ValueError` if there is none or it cannot be read."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if not isinstance(picture, (str, Path)):
        raise TypeError(f"image: expected a path or a PIL image, got {type(picture).__name__}")
    try:
        with Image.open(picture) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no such image file: {picture}") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture} is no image that can be read: {error}") from error


class FirstToken(LogitsProcessor):
    """Notes how likely each of some words is as the first token, after all interventions; changes nothing."""

    listens = True
    """Comes after the processors that edit."""

    def __init__(self, words: Mapping[str, Sequence[int]]) -> None:
        self.words = words
        self.found: dict[str, list[float]] = {}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """A logits processor of `generate`."""
        if not self.found:
            logs = scores.float().log_softmax(-1)
            self.found = {word: logs[:, list(ids)].logsumexp(-1).tolist() for word, ids in self.words.items()}
        return scores

    def of(self, i: int, n: int) -> dict[str, float] | None:
        """Log-probabilities for the i-th of n questions, whose beams are alike at the first token."""
        if not self.found or any(len(logs) % n for logs in self.found.values()):
            return None
        return {word: max(logs[i * (len(logs) // n)], -1e4) for word, logs in self.found.items()}


def spellings(processor: Any, word: str) -> tuple[int, ...]:
    """Tokens that spell a word, in any case and with or without a blank before it. `ValueError` if there is none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    found = tuple(i for i, token in enumerate(tokens) if (token or "").lstrip("\u2581\u0120 ").lower() == word.lower())
    if not found:
        raise ValueError(f"no single token of the tokenizer spells {word!r}, so the first token cannot tell it")
    return found


def chat(processor: Any, prompt: str, n_images: int) -> str:
    """The prompt in the processor's own chat template, pictures first; without a template: placeholders, newline,
    prompt."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    return f"{getattr(processor, 'image_token', '<image>') * n_images}\n{prompt}"


def ask(
    model: Any,
    processor: Any,
    image: Picture | Sequence[Picture],
    prompt: str,
    *,
    max_new_tokens: int = 256,
    seed: int | None = None,
    **generate: Any,
) -> Record:
    """Ask a model, wrapped or not, about one picture (or several, given as a list). Greedy unless told otherwise.

    `generate` goes to the model's own `generate` (`do_sample`, `num_beams` ...); `seed` is set before sampling.
    Raises `ValueError` for a missing or unreadable picture and for an empty prompt.
    """
    return ask_batch(model, processor, [(image, prompt)], max_new_tokens=max_new_tokens, seed=seed, **generate)[0]


@dataclass(frozen=True)
class Looked:
    """One look of an intervention at a question: what the model was given, what it said, and what was seen."""

    inputs: dict[str, Any]
    """The processor's output, on the model's device."""
    token_ids: list[int]
    """Generated tokens, the end token included."""
    ended: bool
    """Whether the last token is an end token."""
    text: str
    memo: dict[str, Any]
    """What the intervention's stages left in `site.memo`."""
    geometry: Any
    """`Geometry` of the prompt."""


@dataclass(frozen=True)
class Look:
    """Asks the model on the way to an answer, for `Intervention.refine`: greedily, with one intervention in force."""

    model: Any
    processor: Any
    index: int
    """Of the intervention among those that the model is wrapped with."""

    @property
    def kept(self) -> dict[Any, Any]:
        """The intervention's own shelf, which lasts as long as the model stays wrapped with it."""
        return attached(self.model).kept[self.index]  # type: ignore[union-attr]

    def __call__(self, images: Sequence[Image.Image], prompt: str, max_new_tokens: int) -> Looked:
        """One look."""
        found: Attachment = attached(self.model)  # type: ignore[assignment]
        settings = {"max_new_tokens": max_new_tokens, "num_beams": 1}
        run = Answering.of(self.model, self.processor, [(list(images), prompt)], settings)
        with found.only({self.index}):
            (tokens,) = run.generate()
            last: Any = found.last()
        ended = run.end(tokens) is not None
        return Looked(run.inputs, tokens, ended, run.text(tokens), last.memos[self.index], last.geometry)


@dataclass(frozen=True)
class Answering:
    """A batch of questions about to be answered, as `Intervention.decode` gets it."""

    model: Any
    processor: Any
    questions: list[tuple[list[Image.Image], str]]
    """Pictures (RGB) and prompt of each."""
    inputs: dict[str, Any]
    """The processor's output for the batch, padded on the left, on the model's device."""
    settings: dict[str, Any]
    """Of `generate`."""
    seed: int | None = None
    sources: dict[int, tuple[Any, int]] = field(default_factory=dict)
    """Question -> generation (`Attachment.last`) and row of its batch that gave the answer, for `decode` stages that
    generate more than once. Without an entry: the last generation, and the row of the question."""

    @classmethod
    def of(
        cls,
        model: Any,
        processor: Any,
        questions: list[tuple[list[Image.Image], str]],
        settings: dict[str, Any],
        seed: int | None = None,
    ) -> Answering:
        """Build the inputs. Greedy unless told otherwise."""
        texts = [chat(processor, prompt, len(images)) for images, prompt in questions]
        pictures = [images for images, _ in questions]
        inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True, padding_side="left")
        inputs = dict(inputs.to(model.device, dtype=model.dtype))
        return cls(model, processor, questions, inputs, {"do_sample": False, **settings}, seed)

    def generate(self, inputs: dict[str, Any] | None = None, **changes: Any) -> list[list[int]]:
        """New tokens of each sequence, the end token included. `changes` go before the settings; `inputs` may be a part
        of the batch, or hold more tokens than the prompt (`prompt_end`, to wrapped models, says where the prompt
        ends)."""
        settings = {**self.settings, **changes}
        quiet = {} if settings["do_sample"] else {"temperature": None, "top_p": None, "top_k": None}
        inputs = self.inputs if inputs is None else inputs
        sequences = self.model.generate(**inputs, **quiet, **settings)
        answers = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [tokens[: self.end(tokens)] for tokens in answers]

    def after(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Inputs with the same tokens of an answer appended to every prompt, to go on from there. The rest is for
        `generate`, with `prompt_end`."""
        ids, longer = self.inputs["input_ids"], {}
        for name, x in self.inputs.items():
            longer[name] = x
            if isinstance(x, torch.Tensor) and x.shape == ids.shape:  # one entry per token: ids, mask, types (0: text)
                more = ids.new_tensor(list(tokens)) if name == "input_ids" else int(name == "attention_mask")
                longer[name] = torch.cat([x, torch.ones_like(x[:, :1]).expand(-1, len(tokens)) * more], dim=1)
        return longer

    def end(self, tokens: Sequence[int]) -> int | None:
        """Length of an answer up to its end token; `None` if it has none."""
        ends = self.model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        return next((n + 1 for n, token in enumerate(tokens) if token in ends), None)

    def text(self, tokens: Sequence[int]) -> str:
        """The words of an answer."""
        return self.processor.decode(tokens, skip_special_tokens=True).strip()


class _Meter:
    """Counts the sequences and rows that go through the text decoder in this thread."""

    def __init__(self, model: Any) -> None:
        self.thread, self.passes, self.tokens = threading.get_ident(), 0, 0
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        self.handle = decoder.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = [kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args]
        shape = next((x.shape for x in rows if isinstance(x, torch.Tensor)), None)
        if shape is not None and threading.get_ident() == self.thread:
            self.passes += shape[0]
            self.tokens += shape[0] * shape[1]

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@torch.inference_mode()
def ask_batch(
    model: Any,
    processor: Any,
    questions: Sequence[tuple[Picture | Sequence[Picture], str]],
    *,
    max_new_tokens: int = 256,
    seed: int | None = None,
    first_token: Mapping[str, Sequence[int]] | None = None,
    share: bool | Answering = True,
    **generate: Any,
) -> list[Record]:
    """`ask` for several (image, prompt) pairs at once, padded on the left; answers come in the order of the
    questions. `first_token` names words by the tokens that begin them (`spellings`); records hold their probability.
    Questions about the same path or picture object share the pass over it, where model, methods and decoding allow it;
    `share=False` does without, and a batch of these questions from `sharing.seen_by_all` has made that pass already.
    """
    from vlmfix.asking.prefix import Sharing

    opened, names = [], []
    known: dict[Any, Image.Image] = {}
    for image, prompt in questions:
        several = [image] if isinstance(image, (str, Path, Image.Image)) else list(image or ())
        if not several:
            raise ValueError(
                f"no image was given for the prompt {prompt!r}; vlmfix needs at least one picture per question"
            )
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt: expected some text, got {prompt!r}")
        pictures = []
        for one in several:
            key = id(one) if isinstance(one, Image.Image) else one
            if key not in known:
                known[key] = open_picture(one)
            pictures.append(known[key])
        opened.append((pictures, prompt))
        named = zip(several, pictures, strict=True)
        names.append([str(s) if isinstance(s, (str, Path)) else f"{p.width}x{p.height}" for s, p in named])
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate}
    if seed is not None:
        torch.manual_seed(seed)
    found = attached(model)
    began = time.perf_counter()
    with _Meter(model) as meter, nullcontext() if found is None else found.asking():
        refined, facts = _refine(model, processor, opened)
        first = FirstToken(first_token or {})
        noting = {"logits_processor": [*settings.get("logits_processor", ()), first]} if first_token else {}
        if isinstance(share, Answering):
            run = replace(share, settings={**settings, **noting}, seed=seed)
        else:
            build = Sharing.of_pictures if share else Answering.of
            run = build(model, processor, refined, {**settings, **noting}, seed)
        answers = _decode(run, facts)
    passes, tokens_run, seconds = meter.passes, meter.tokens, time.perf_counter() - began
    if isinstance(run, Sharing) and run.seen and run.prefix:
        ids = run.prefix["input_ids"]
        passes, tokens_run, seconds = passes + len(ids), tokens_run + ids.numel(), seconds + run.seen.seconds
    if seed is not None:
        settings["seed"] = seed
    method = [] if found is None else [describe(e) for e in found.entries]
    digests = {id(p): hashlib.sha256(p.tobytes()).hexdigest() for p in known.values()}
    records = []
    for i, (tokens, done) in enumerate(zip(answers, _done(run, answers), strict=True)):
        records.append(
            Record(
                model=model.config._name_or_path,
                image=names[i],
                image_sha256=[digests[id(p)] for p in opened[i][0]],
                prompt=opened[i][1],
                method=method,
                text=run.text(tokens),
                token_ids=tokens,
                finish="length" if run.end(tokens) is None else "stop",
                seconds=seconds / len(questions),
                batch_size=len(questions),
                generation=settings,
                did=[{**one, **facts[i].get(k, {})} for k, one in enumerate(done)],
                passes=passes / len(questions),
                tokens=tokens_run / len(questions),
                first_token=first.of(i, len(questions)),
            )
        )
    return records


def _refine(
    model: Any, processor: Any, questions: list[tuple[list[Image.Image], str]]
) -> tuple[list[tuple[list[Image.Image], str]], list[dict[int, dict[str, Any]]]]:
    """Pictures and prompts to answer from, after the interventions that refine, and what these say of it."""
    found = attached(model)
    facts: list[dict[int, dict[str, Any]]] = [{} for _ in questions]
    refiners = [] if found is None else [(i, e) for i, e in found.active() if e.acts_at("refine")]
    refined = []
    for (images, prompt), said in zip(questions, facts, strict=True):
        for i, one in refiners:
            images, prompt, said[i] = one.refine(Look(model, processor, i), images, prompt)  # noqa: PLW2901
        refined.append((images, prompt))
    return refined, facts


def _decode(run: Answering, facts: list[dict[int, dict[str, Any]]]) -> list[list[int]]:
    """The answers, by `generate` or by the intervention that decodes in its own way."""
    found = attached(run.model)
    for i, one in [] if found is None else found.active():
        if one.acts_at("decode"):
            answers, said = one.decode(run)
            for mine, more in zip(facts, said, strict=True):
                mine[i] = {**mine.get(i, {}), **more}
            return answers
    return run.generate()


def _done(run: Answering, answers: list[list[int]]) -> list[list[dict[str, Any]]]:
    """What each intervention did to each answer, without the detail per layer."""
    found = attached(run.model)
    if found is None:
        return [[] for _ in answers]
    reports: dict[int, list[list[dict[str, Any]]]] = {}
    done = []
    for i, tokens in enumerate(answers):
        last, row = run.sources.get(i, (found.last(), i))
        if id(last) not in reports:
            reports[id(last)] = [r["samples"] for r in found.effects(last)]
        said = []
        for k, (e, s) in enumerate(zip(found.entries, reports[id(last)], strict=True)):
            brief = {key: v for key, v in s[row].items() if key != "layers"} if row < len(s) else {"acted": False}
            if e.active is not None and last is not None and e.active.overrides("answered"):
                brief |= e.active.answered(last.memos[k], row, run, tokens)
            said.append(brief)
        done.append(said)
    return done
