"""`ask`: picture and prompt in, record out. Evaluation, command line and demo all go through here."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmfix.attachment import attached, describe, report

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
    """Wall time of the generation, shared equally by the answers of a batch."""
    batch_size: int
    generation: dict[str, Any]
    """Settings given to `generate`."""
    did: list[dict[str, Any]] = field(default_factory=list)
    """What each intervention did to this answer, in short (`acted` ...)."""
    id: str | None = None
    """Name of the question within an evaluation."""

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


@torch.inference_mode()
def ask_batch(
    model: Any,
    processor: Any,
    questions: Sequence[tuple[Picture | Sequence[Picture], str]],
    *,
    max_new_tokens: int = 256,
    seed: int | None = None,
    **generate: Any,
) -> list[Record]:
    """`ask` for several (image, prompt) pairs at once, padded on the left; answers come in the order of the
    questions."""
    pictures, texts, names = [], [], []
    for image, prompt in questions:
        several = [image] if isinstance(image, (str, Path, Image.Image)) else list(image or ())
        if not several:
            raise ValueError(
                f"no image was given for the prompt {prompt!r}; vlmfix needs at least one picture per question"
            )
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt: expected some text, got {prompt!r}")
        opened = [open_picture(one) for one in several]
        pictures.append(opened)
        names.append(
            [
                str(s) if isinstance(s, (str, Path)) else f"{o.width}x{o.height}"
                for s, o in zip(several, opened, strict=True)
            ]
        )
        texts.append(chat(processor, prompt, len(several)))
    inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True, padding_side="left")
    inputs = inputs.to(model.device, dtype=model.dtype)
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate}
    quiet = {} if settings["do_sample"] else {"temperature": None, "top_p": None, "top_k": None}
    if seed is not None:
        torch.manual_seed(seed)
    began = time.perf_counter()
    sequences = model.generate(**inputs, **quiet, **settings)
    seconds = (time.perf_counter() - began) / len(questions)
    if seed is not None:
        settings["seed"] = seed
    answers = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    found = attached(model)
    method = [] if found is None else [describe(e) for e in found.entries]
    did = [r["samples"] for r in report(model)]
    records = []
    for i, (_, prompt) in enumerate(questions):
        stop = next((n + 1 for n, token in enumerate(answers[i]) if token in ends), None)
        tokens = answers[i][:stop]
        records.append(
            Record(
                model=model.config._name_or_path,
                image=names[i],
                image_sha256=[hashlib.sha256(p.tobytes()).hexdigest() for p in pictures[i]],
                prompt=prompt,
                method=method,
                text=processor.decode(tokens, skip_special_tokens=True).strip(),
                token_ids=tokens,
                finish="length" if stop is None else "stop",
                seconds=seconds,
                batch_size=len(questions),
                generation=settings,
                did=[{k: v for k, v in s[i].items() if k != "layers"} if i < len(s) else {"acted": False} for s in did],
            )
        )
    return records
