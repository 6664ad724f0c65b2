"""Follows the answers of a batch token by token: hands text on as it comes, and ends an answer at a stop text or when
nobody waits for it any longer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

LEAST = -1e4
"""Stands for the logarithm of nothing, which JSON does not know."""
MOST_SHOWN = 20
"""Words beside the first token's own."""


class Line:
    """One answer as it grows."""

    def __init__(
        self, processor: Any, end_ids: frozenset[int], stop: Sequence[str], tell: Callable[[str], None] | None
    ) -> None:
        self.tokens: list[int] = []
        self.ended, self.stopped = False, False
        self._processor, self._end_ids, self._stop, self._tell = processor, end_ids, stop, tell
        self._n_told = 0

    @property
    def done(self) -> bool:
        """Whether it takes no more tokens."""
        return self.ended or self.stopped

    def take(self, token: int) -> None:
        """The next token."""
        if self.done:
            return
        self.tokens.append(token)
        self.ended = token in self._end_ids
        if self._stop or self._tell is not None:
            text = self._written()
            cut = cut_at(text, self._stop)
            self.stopped = cut is not None
            self._tell_up_to(text if cut is None else cut, last=cut is not None)

    def text(self) -> str:
        """What was written, up to a stop text, without white space at both ends."""
        text = self._written()
        cut = cut_at(text, self._stop)
        return (text if cut is None else cut).strip()

    def finish(self) -> None:
        """Hand on what was held back."""
        self._tell_up_to(self.text(), last=True)

    def _written(self) -> str:
        return str(self._processor.decode(self.tokens, skip_special_tokens=True)).lstrip()

    def _tell_up_to(self, text: str, last: bool) -> None:
        """Half a character, white space that may be the end, and what may become a stop text are held back."""
        if self._tell is None:
            return
        if not last:
            text = text.removesuffix("\N{REPLACEMENT CHARACTER}")
            text = text[: len(text) - _held_back(text, self._stop)]
        text = text.rstrip()
        if len(text) > self._n_told:
            self._tell(text[self._n_told :])
            self._n_told = len(text)


def cut_at(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first stop text in it; `None` if there is none."""
    places = [text.find(each) for each in stop if each in text]
    return text[: min(places)] if places else None


def _held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end could begin a stop text."""
    lengths = (n for each in stop for n in range(min(len(each) - 1, len(text)), 0, -1) if each.startswith(text[-n:]))
    return max(lengths, default=0)


class Listener(StoppingCriteria):
    """Sees each step of a generation over a batch. A generation with other rows than questions (beams, or a method that
    decodes in its own way) is only ended, and only when nobody waits."""

    def __init__(self, lines: Sequence[Line], abandoned: Callable[[int], bool], pad_id: int | None, follow: bool):
        self.lines, self._abandoned, self._pad_id, self._follow = lines, abandoned, pad_id, follow
        self.n_prompt = [0] * len(lines)
        """Tokens of each prompt, once the first step was seen."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """A stopping criterion of `generate`: which rows are done."""
        n = len(self.lines)
        if not any(self.n_prompt):
            real = input_ids[:, :-1] if self._pad_id is None else input_ids[:, :-1] != self._pad_id
            width = input_ids.shape[1] - 1
            counts = [width] * len(input_ids) if self._pad_id is None else real.sum(1).tolist()
            self.n_prompt = [counts[min(row * len(counts) // n, len(counts) - 1)] for row in range(n)]
        abandoned = [self._abandoned(row) for row in range(n)]
        if not self._follow or len(input_ids) != n:
            return torch.full((len(input_ids),), all(abandoned), device=input_ids.device)
        for line, token in zip(self.lines, input_ids[:, -1].tolist(), strict=True):
            line.take(token)
        done = [line.done or left for line, left in zip(self.lines, abandoned, strict=True)]
        return torch.tensor(done, device=input_ids.device)


class FirstToken(LogitsProcessor):
    """Notes the log-probabilities of each answer's first token, after all methods; changes nothing."""

    listens = True

    def __init__(self) -> None:
        self._log_probs: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """A logits processor of `generate`."""
        if self._log_probs is None:
            self._log_probs = scores.float().log_softmax(-1).cpu()
        return scores

    def of(self, row: int, token: int, processor: Any, n_top: int) -> list[dict[str, Any]]:
        """`logprobs.content` as OpenAI has it, of the first token alone."""
        assert self._log_probs is not None
        log_probs = self._log_probs[row]
        top = log_probs.topk(min(n_top, MOST_SHOWN, len(log_probs))).indices.tolist()
        told = {"top_logprobs": [_entry(processor, each, log_probs) for each in top]}
        return [{**_entry(processor, token, log_probs), **told}]


def _entry(processor: Any, token: int, log_probs: torch.Tensor) -> dict[str, Any]:
    text, value = str(processor.decode([token])), float(log_probs[token])
    return {"token": text, "logprob": value if math.isfinite(value) else LEAST, "bytes": list(text.encode())}
