"""Questions about one picture share the pass over it: system text, image and common words go through the model once,
and each question continues from a copy of the cache. Several methods may share one pass that ends with the picture.
Answers are those of the questions asked one by one."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from vlmfix.asking.batch import MAX_NEW_TOKENS, Batch, chat, processed, quiet
from vlmfix.engine.attachment import Attachment, Left, attached
from vlmfix.engine.decoding import as_keywords, decoding_of
from vlmfix.engine.wrap import in_force

BOTH_WAYS = ("token_type_ids",)
"""Inputs of models whose prompts see both ways: there a question changes what comes before it."""
PLAIN = {"do_sample", "max_new_tokens", "num_beams", "temperature", "top_p", "top_k"}
"""Settings of `generate` that are known to go together with sharing."""
LISTENING = {"logits_processor", "stopping_criteria"}
"""What callers may add that follows an answer; the pass over the pictures goes without."""
HARMLESS = {*PLAIN, "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "repetition_penalty"}
"""Settings of a model's own configuration that are."""


def can_share(model: Any, attachment: Attachment | None, settings: dict[str, Any]) -> bool:
    """Whether the model, what is attached to it and the settings of `generate` let questions share a picture: greedy
    decoding, and methods that say so."""
    decoding = decoding_of(model, settings)
    windows = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)  # padding would narrow them
    if decoding.config.do_sample or decoding.n_beams > 1 or windows:
        return False
    own = {name for name, value in decoding.settings.items() if value or not name.startswith("output_")}
    if set(settings) - PLAIN - LISTENING or own - HARMLESS:
        return False
    if attachment is None:
        return True
    methods_share = all(
        method.traits.shares_pictures and not method.acts_at("begin") for _, method in attachment.active()
    )
    return methods_share and attachment.anatomy.generator is model


@dataclass(frozen=True)
class Prefix:
    """A pass that several questions continue from: what it has left, one row per picture."""

    cache: Any
    state: Left | None
    """Of the interventions that were in force."""
    offset: Tensor | None
    """Of positions in M-RoPE models, per sample."""
    seconds: float = 0.0
    """Wall time that it took, where other batches than the one that made it have to account for it."""


@dataclass(frozen=True)
class ContinuedBatch(Batch):
    """A batch of questions, several of them about one picture. `inputs` holds ids and mask alone; in each row the part
    that is shared comes first, then padding, then the rest of the question."""

    prefix_inputs: dict[str, Any] | None = None
    """What goes through the model once: one row per picture, padded on the left."""
    prefix_row: Tensor | None = None
    """(B,) row of `prefix_inputs` that each question continues from."""
    prefix: Prefix | None = None
    """The pass over the pictures, where it has been made already and other methods continue from it, too."""

    @classmethod
    def of_pictures(
        cls,
        model: Any,
        processor: Any,
        questions: list[tuple[list[Image.Image], str]],
        settings: dict[str, Any],
        seed: int | None = None,
        ends: Collection[int] = (),
    ) -> Batch:
        """Build the inputs; those of a plain batch where no two questions are about the same picture objects, or where
        these cannot share the pass over it. With `ends`, ids of image tokens, the pass ends at the last of them."""
        row_of: dict[tuple[int, ...], int] = {}
        rows = [row_of.setdefault(tuple(map(id, images)), len(row_of)) for images, _ in questions]
        shares = len(row_of) < len(questions) and can_share(model, attached(model), settings)
        parts = _split(processor, questions, rows, ends) if shares else None
        if parts is None:
            return Batch.of(model, processor, questions, settings, seed)
        prefix_inputs, ids, mask = parts
        settings = as_keywords(settings, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        return cls(
            model,
            processor,
            questions,
            {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)},
            settings,
            seed,
            prefix_inputs=dict(prefix_inputs.to(model.device, dtype=model.dtype)),
            prefix_row=torch.tensor(rows, device=model.device),
        )

    def make_prefix(self) -> Prefix:
        """The pass over the pictures, with the interventions in force."""
        assert self.prefix_inputs is not None
        attachment = attached(self.model)
        settings = {**quiet(self.settings), "max_new_tokens": 1, **dict.fromkeys(LISTENING)}
        settings["return_dict_in_generate"] = True
        if attachment is not None:
            settings["prompt_end"] = self.prefix_inputs["input_ids"].shape[1] + 1  # the prompt goes on
        cache = self.model.generate(**self.prefix_inputs, **settings).past_key_values
        offset = getattr(getattr(self.model, "model", None), "rope_deltas", None)
        state = None if attachment is None else attachment.left(cache)
        return Prefix(cache, state, offset if isinstance(offset, Tensor) else None)

    def generate(self, inputs: dict[str, Any] | None = None, **changes: Any) -> list[list[int]]:
        """As `Batch.generate`, for the whole batch."""
        assert inputs is None
        return super().generate({**self.inputs, "past_key_values": self._continued_cache()}, **changes)

    def _continued_cache(self) -> Any:
        """The cache that the questions continue from, a row for each."""
        assert self.prefix_row is not None
        prefix, attachment = self.prefix or self.make_prefix(), attached(self.model)
        cache = prefix.cache if self.prefix is None else copy.deepcopy(prefix.cache)
        cache.reorder_cache(self.prefix_row)
        if attachment is not None and prefix.state is not None:
            attachment.go_on(cache, self.prefix_row, prefix.state)
        if prefix.offset is not None:
            self.model.model.rope_deltas = prefix.offset[self.prefix_row.to(prefix.offset.device)]
        return cache


@torch.inference_mode()
def prefixed_for_all(
    model: Any,
    processor: Any,
    questions: list[tuple[list[Image.Image], str]],
    settings: dict[str, Any],
    attachments: Sequence[Attachment | None],
) -> ContinuedBatch | None:
    """A batch after the pass over its pictures, for each of several methods to continue from: they see that pass and
    leave it as it is (`leaves_pictures`). `None` where this cannot be done."""
    began = time.perf_counter()
    methods = [attachment for attachment in attachments if attachment is not None]
    if not methods or not all(method.leaves_pictures for each in methods for _, method in each.active()):
        return None
    joint = Attachment.joint(methods)
    image_tokens = joint.anatomy.image_token_ids
    if not image_tokens:
        return None
    with in_force(model, joint):
        batch = ContinuedBatch.of_pictures(model, processor, questions, settings, ends=image_tokens)
        if not isinstance(batch, ContinuedBatch):
            return None
        prefix = batch.make_prefix()
    return replace(batch, prefix=replace(prefix, seconds=time.perf_counter() - began))


def _split(
    processor: Any, questions: list[tuple[list[Image.Image], str]], rows: list[int], ends: Collection[int]
) -> tuple[Any, Tensor, Tensor] | None:
    """The processor's output for what questions about a picture share, and ids and mask (B, T) of the whole prompts.
    `None` if that cannot be told apart. `rows`: number of each question's picture."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or tokenizer.pad_token_id is None:
        return None
    first_of = [rows.index(row) for row in range(max(rows) + 1)]
    texts = [chat(processor, prompt, len(images)) for images, prompt in questions]
    inputs = processed(processor, [texts[i] for i in first_of], [questions[i] for i in first_of])
    if any(name in inputs for name in BOTH_WAYS) or "attention_mask" not in inputs:
        return None
    prompts = _expanded(tokenizer, texts, inputs, rows, first_of)
    if prompts is None:
        return None
    shared = []
    for row, first in enumerate(first_of):
        same_picture = [prompt for (prompt, _), its_row in zip(prompts, rows, strict=True) if its_row == row]
        n_shared = _n_shared(same_picture, prompts[first][1], ends)
        if n_shared is None:
            return None
        shared.append(n_shared)
    ids, mask = _padded_between([prompt for prompt, _ in prompts], [shared[row] for row in rows], tokenizer)
    return _cut(inputs, ids[first_of], shared), ids, mask


def _expanded(
    tokenizer: Any, texts: list[str], processed: Any, rows: list[int], first_of: list[int]
) -> list[tuple[list[int], int]] | None:
    """Token ids of each prompt, its images expanded, and where the tokens end that the processor has changed.

    A processor writes many tokens for an image's placeholder, and it has run on the first question of each picture
    only. What it changed there, compared with the tokenizer's own output, lies between a common beginning and a common
    end; the other questions about the picture get the same tokens in the same place. `None` where a question differs
    from the first one in that very place.
    """
    plain = [tokenizer(text)["input_ids"] for text in texts]
    prompts = []
    for row, own in zip(rows, plain, strict=True):
        real = processed["attention_mask"][row].bool()
        expanded, first = processed["input_ids"][row][real].tolist(), plain[first_of[row]]
        n_before = _n_alike([expanded, first])
        n_after = _n_alike([expanded[::-1], first[::-1][: len(first) - n_before]])
        changed_until = len(first) - n_after
        if own[:changed_until] != first[:changed_until]:
            return None
        pictures_end = len(expanded) - n_after
        prompts.append((expanded[:pictures_end] + own[changed_until:], pictures_end))
    return prompts


def _n_shared(prompts: list[list[int]], pictures_end: int, ends: Collection[int]) -> int | None:
    """How many tokens the prompts about one picture share, the last token of none among them; with `ends`, up to the
    last such token. `None` where the picture is not among them."""
    n = min(_n_alike(prompts), min(map(len, prompts)) - 1)
    if n < pictures_end:
        return None
    if ends:
        n = max((i + 1 for i in range(n) if prompts[0][i] in ends), default=0)
    return n or None


def _padded_between(prompts: list[list[int]], shared: list[int], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) of prompts whose first `shared` tokens end in one column, and whose others end in the last
    column."""
    n = max(shared)
    width = n + max(len(prompt) - n_shared for prompt, n_shared in zip(prompts, shared, strict=True))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for b, (prompt, n_shared) in enumerate(zip(prompts, shared, strict=True)):
        for end, part in ((n, prompt[:n_shared]), (width, prompt[n_shared:])):
            ids[b, end - len(part) : end] = torch.tensor(part)
            mask[b, end - len(part) : end] = 1
    return ids, mask


def _cut(processed: Any, ids: Tensor, shared: list[int]) -> Any:
    """The processor's output with all that goes by tokens cut to the first `shared` of each row, padded on the left."""
    n = max(shared)
    by_token, real = processed["input_ids"].shape, processed["attention_mask"].bool()
    for name, x in list(processed.items()):
        if isinstance(x, Tensor) and x.shape == by_token:
            rows = [row[kept][:n_shared] for row, kept, n_shared in zip(x, real, shared, strict=True)]
            processed[name] = torch.stack([pad(row, (n - len(row), 0)) for row in rows])
    processed["input_ids"] = ids[:, :n]
    return processed


def _n_alike(sequences: Sequence[Sequence[int]]) -> int:
    """How many entries all sequences have in common from the first on."""
    for i, column in enumerate(zip(*sequences, strict=False)):
        if len(set(column)) > 1:
            return i
    return min(map(len, sequences))
