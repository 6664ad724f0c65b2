"""Questions about one picture share the pass over it: system text, image and common words go through the model once,
and each question goes on from a copy of the cache. Several methods may share one pass that ends with the picture.
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

from vlmfix.asking.asking import Answering, chat
from vlmfix.engine.attachment import Attachment, Left, attached
from vlmfix.engine.wrap import in_force

BOTH_WAYS = ("token_type_ids",)
"""Inputs of models whose prompts see both ways: there a question changes what comes before it."""
PLAIN = {"do_sample", "max_new_tokens", "num_beams", "temperature", "top_p", "top_k", "logits_processor"}
"""Settings of `generate` that are known to go together with sharing."""


def can_share(model: Any, settings: dict[str, Any]) -> bool:
    """Whether the model, the interventions in force and the settings of `generate` let questions share a picture:
    greedy decoding, and methods that say so."""
    n_beams = settings.get("num_beams") or model.generation_config.num_beams or 1
    windows = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)  # padding would narrow them
    if settings.get("do_sample") or n_beams > 1 or set(settings) - PLAIN or windows:
        return False
    found = attached(model)
    return found is None or (
        found.anatomy.generator is model
        and all(one.traits.shares_pictures and not one.acts_at("begin") for _, one in found.active())
    )


@dataclass(frozen=True)
class Seen:
    """What a pass over pictures left, one row per picture."""

    cache: Any
    left: Left | None
    """By the interventions in force."""
    offset: Tensor | None
    """Of positions in M-RoPE models, per sample."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Sharing(Answering):
    """A batch of questions, several of them about one picture. `inputs` holds ids and mask alone; in each row the part
    that is shared comes first, then padding, then the rest of the question."""

    prefix: dict[str, Any] | None = None
    """What goes through the model once: one row per picture, padded on the left."""
    picture: Tensor | None = None
    """(B,) row of `prefix` that each question goes on from."""
    seen: Seen | None = None
    """The pass over the pictures, where other methods go on from it, too."""

    @classmethod
    def of_pictures(
        cls,
        model: Any,
        processor: Any,
        questions: list[tuple[list[Image.Image], str]],
        settings: dict[str, Any],
        seed: int | None = None,
        ends: Collection[int] = (),
    ) -> Answering:
        """Build the inputs; those of a plain batch where no two questions are about the same picture objects, or where
        these cannot share the pass over it. With `ends`, ids of image tokens, the pass ends at the last of them."""
        known: dict[tuple[int, ...], int] = {}
        group = [known.setdefault(tuple(map(id, images)), len(known)) for images, _ in questions]
        shares = len(known) < len(questions) and can_share(model, settings)
        found = _split(processor, questions, group, ends) if shares else None
        if found is None:
            return Answering.of(model, processor, questions, settings, seed)
        prefix, ids, mask = found
        return cls(
            model,
            processor,
            questions,
            {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)},
            {"do_sample": False, **settings},
            seed,
            prefix=dict(prefix.to(model.device, dtype=model.dtype)),
            picture=torch.tensor(group, device=model.device),
        )

    def look(self) -> Seen:
        """The pass over the pictures, with the interventions in force."""
        assert self.prefix is not None
        n, found = self.prefix["input_ids"].shape[1], attached(self.model)
        settings = {**self.settings, "max_new_tokens": 1, "logits_processor": None, "temperature": None}
        settings = {**settings, "top_p": None, "top_k": None, "return_dict_in_generate": True}
        if found is not None:
            settings["prompt_end"] = n + 1  # the prompt goes on
        cache = self.model.generate(**self.prefix, **settings).past_key_values
        offset = getattr(getattr(self.model, "model", None), "rope_deltas", None)
        left = None if found is None else found.left(cache)
        return Seen(cache, left, offset if isinstance(offset, Tensor) else None)

    def _continued(self) -> Any:
        """The cache that the questions go on from, a row for each."""
        assert self.picture is not None
        seen, found = self.seen or self.look(), attached(self.model)
        cache = seen.cache if self.seen is None else copy.deepcopy(seen.cache)
        cache.reorder_cache(self.picture)
        if found is not None and seen.left is not None:
            found.go_on(cache, self.picture, seen.left)
        if seen.offset is not None:
            self.model.model.rope_deltas = seen.offset[self.picture.to(seen.offset.device)]
        return cache

    def generate(self, inputs: dict[str, Any] | None = None, **changes: Any) -> list[list[int]]:
        """As `Answering.generate`, for the whole batch."""
        assert inputs is None
        return super().generate({**self.inputs, "past_key_values": self._continued()}, **changes)


@torch.inference_mode()
def seen_by_all(
    model: Any,
    processor: Any,
    questions: Sequence[tuple[Image.Image, str]],
    settings: dict[str, Any],
    methods: Sequence[Attachment | None],
) -> Sharing | None:
    """A batch after the pass over its pictures, for each of several methods to go on from: they see that pass and leave
    it as it is (`leaves_pictures`). `None` where this cannot be done."""
    began, joint = time.perf_counter(), Attachment.joint([one for one in methods if one is not None])
    asked = [([picture], prompt) for picture, prompt in questions]
    with in_force(model, joint):
        if not (ends := joint.anatomy.image_token_ids):
            return None
        run = Sharing.of_pictures(model, processor, asked, settings, ends=ends)
        if not isinstance(run, Sharing):
            return None
        seen = run.look()
    return replace(run, seen=replace(seen, seconds=time.perf_counter() - began))


def _split(
    processor: Any, questions: list[tuple[list[Image.Image], str]], group: list[int], ends: Collection[int]
) -> tuple[Any, Tensor, Tensor] | None:
    """The processor's output for what questions about a picture share, and ids and mask (B, T) of the whole prompts.
    `None` if that cannot be told apart."""
    tokenizer = getattr(processor, "tokenizer", None)
    first = [group.index(g) for g in range(max(group) + 1)]
    texts = [chat(processor, prompt, len(images)) for images, prompt in questions]
    if tokenizer is None or tokenizer.pad_token_id is None:
        return None
    out = processor(
        text=[texts[i] for i in first], images=[questions[i][0] for i in first], return_tensors="pt", padding=True,
        padding_side="left",
    )  # fmt: skip
    if any(name in out for name in BOTH_WAYS) or "attention_mask" not in out:
        return None
    plain = [tokenizer(text)["input_ids"] for text in texts]
    prompts: list[list[int]] = []
    pictures_end = []
    for i, ids in enumerate(plain):
        shown, mask = out["input_ids"][group[i]], out["attention_mask"][group[i]].bool()
        whole, one = shown[mask].tolist(), plain[first[group[i]]]
        before = _alike([whole, one])
        after = _alike([whole[::-1], one[::-1][: len(one) - before]])
        if ids[: len(one) - after] != one[: len(one) - after]:
            return None
        prompts.append(whole[: len(whole) - after] + ids[len(one) - after :])
        pictures_end.append(len(whole) - after)
    shared = []
    for g in range(len(first)):
        members = [prompt for prompt, at in zip(prompts, group, strict=True) if at == g]
        shared.append(min(_alike(members), min(map(len, members)) - 1))
        if shared[-1] < pictures_end[first[g]]:
            return None
        if ends:
            shared[-1] = max((i + 1 for i in range(shared[-1]) if members[0][i] in ends), default=0)
            if not shared[-1]:
                return None
    n, rest = max(shared), max(len(p) - shared[g] for p, g in zip(prompts, group, strict=True))
    ids = torch.full((len(prompts), n + rest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for b, (prompt, g) in enumerate(zip(prompts, group, strict=True)):
        for end, part in ((n, prompt[: shared[g]]), (n + rest, prompt[shared[g] :])):
            ids[b, end - len(part) : end] = torch.tensor(part)
            mask[b, end - len(part) : end] = 1
    whole_shape, real = out["input_ids"].shape, out["attention_mask"].bool()
    for name, x in list(out.items()):
        if isinstance(x, Tensor) and x.shape == whole_shape:
            rows = [row[m][:k] for row, m, k in zip(x, real, shared, strict=True)]
            out[name] = torch.stack([torch.nn.functional.pad(r, (n - len(r), 0)) for r in rows])
    out["input_ids"] = ids[first, :n]
    return out, ids, mask


def _alike(rows: Sequence[Sequence[int]]) -> int:
    """How many entries all rows have in common from the first on."""
    differ = (i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)
    return next(differ, min(map(len, rows)))
