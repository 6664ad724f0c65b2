"""The model that lmms-eval calls; imported by lmms-eval alone. Every method answers, those of `ask` too, and questions
about one picture share its pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

import vlmfix
from vlmfix.asking.conversation import Conversation
from vlmfix.integrations.spec import files_digest, joined, read

LOADING = ("dtype", "device_map", "attn_implementation", "revision", "trust_remote_code")
"""Options that go to `vlmfix.load`."""
GENERATE = (
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
)
"""What a task may say of decoding, beside its length."""


class VlmfixLMM(lmms):
    """A vision-language model with a method in force.

    Options (`--model_args`): `pretrained`, `method` (a name, with settings behind it as further options or in quotes:
    `method='var:p=0.4,rho=0.8'`), `tag` (any text; a new one is a new key of lmms-eval's cache), `share` (one pass for
    questions about one picture), and of loading `dtype`, `device_map`, `attn_implementation`, `revision`,
    `trust_remote_code`. Raises `ValueError` for anything else.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "organism",
        method: str = "none",
        tag: str = "",
        batch_size: int | str = 1,
        max_batch_size: Any = None,
        device: str | None = None,
        share: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        loading = {name: settings.pop(name) for name in LOADING if name in settings}
        spec = joined(method, settings, ("pretrained", "method", "tag", "share", *LOADING))
        methods = read(spec)
        digest = files_digest(spec, methods)
        if digest is not None and digest not in str(tag):
            raise ValueError(
                f"method {spec}: lmms-eval's cache does not see what is in the file; list heads as L3H1/L3H5, or add "
                f"tag={digest}, which stands for the file as it is now"
            )
        self.device = self.accelerator.device if self._world_size > 1 else torch.device(device or "cpu")
        if "device_map" not in loading and self.device.type != "cpu":
            loading["device_map"] = {"": self.device}
        self._model, self.processor = vlmfix.load(pretrained, **loading)
        self._asker = vlmfix.Asker(self._model, self.processor, list(methods))
        self._batch_size = int(batch_size) if str(batch_size).isdigit() else 1
        self._share = share

    @property
    def batch_size(self) -> int:
        """Questions at once."""
        return self._batch_size

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answers, in the order of the requests; those that decode alike share batches."""
        answers: list[Any] = [None] * len(requests)
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(place)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for places in alike.values():
                settings, until = _decoding(requests[places[0]].args[2])
                for start in range(0, len(places), self._batch_size):
                    batch = places[start : start + self._batch_size]
                    asked = [self._question(requests[place]) for place in batch]
                    records = self._asker.ask_batch(asked, share=self._share, **settings)
                    for place, record in zip(batch, records, strict=True):
                        counts = TokenCounts(output_tokens=len(record.token_ids))
                        answers[place] = GenerationResult(text=_cut(record.text, until), token_counts=counts)
                        bar.update(1)
        return answers

    def _question(self, request: Any) -> tuple[list[Any], str]:
        """Pictures and prompt of a request."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        images, messages = [], []
        for message in doc_to_messages(self.task_dict[task][split][doc_id]):
            parts: list[dict[str, str]] = []
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(part["url"])
                    parts.append({"type": "image"})
                elif part["type"] == "text":
                    parts.append({"type": "text", "text": part["text"]})
                else:
                    raise ValueError(f"task {task}: vlmfix takes pictures and text, got {part['type']}")
            messages.append({"role": message["role"], "content": parts})
        if len(messages) > 1 or not images:
            return images, Conversation(messages)
        return images, "\n".join(part["text"] for part in messages[0]["content"] if part["type"] == "text")

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Not here."""
        raise NotImplementedError("vlmfix answers questions; it does not score given answers")

    def generate_until_multi_round(self, requests: list[Any]) -> Any:
        """Not here."""
        raise NotImplementedError("vlmfix answers each question once; tasks of several rounds are not supported")


def _decoding(told: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings of `ask_batch`, and texts that end an answer. Greedy unless a task samples by a temperature above 0."""
    until = told.get("until") or []
    settings = {name: told[name] for name in GENERATE if told.get(name) is not None}
    sampling = bool(told.get("do_sample")) and bool(settings.get("temperature", 1.0))
    if not sampling:
        settings = {name: value for name, value in settings.items() if name not in ("temperature", "top_p", "top_k")}
    settings |= {"do_sample": sampling, "max_new_tokens": told.get("max_new_tokens", 256)}
    return settings, [until] if isinstance(until, str) else [text for text in until if text]


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.partition(end)[0]
    return text
