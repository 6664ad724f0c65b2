"""Several ways to go on with an answer, for methods that sample a few and keep one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmfix.asking.batch import Batch


@dataclass(frozen=True)
class Candidate:
    """One way to go on."""

    tokens: list[int]
    """The end token included."""
    logp: list[float]
    """Log-probability of each token, natural logarithm, before temperature and the like."""
    source: tuple[Any, int]
    """Generation and row that it came from."""

    @property
    def likelihood(self) -> float:
        """Mean log-probability of its tokens."""
        return sum(self.logp) / len(self.logp)

    def cut(self, n: int | None) -> Candidate:
        """Its first tokens; all for `None`."""
        return replace(self, tokens=self.tokens[:n], logp=self.logp[:n])


def proposals(
    run: Batch, accepted: Sequence[int], n: int, length: int, seed: int, stop: Any = None, **sampling: Any
) -> list[Candidate]:
    """`n` continuations of an answer to one question, of up to `length` tokens; greedy without `sampling`. `stop` says
    of the new tokens (n, T) of each continuation whether it has come to an end."""
    import torch
    from transformers import StoppingCriteriaList

    inputs, device = run.after(accepted), run.model.device
    start = inputs["input_ids"].shape[1]
    settings = {**run.settings, **(sampling or {"temperature": None, "top_p": None, "top_k": None})}
    settings.update(
        do_sample=bool(sampling),
        num_return_sequences=n,
        max_new_tokens=length,
        return_dict_in_generate=True,
        output_logits=True,
        stopping_criteria=None if stop is None else StoppingCriteriaList([lambda ids, _: stop(ids[:, start:])]),
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = run.model.generate(**inputs, **settings, prompt_end=run.inputs["input_ids"].shape[1])
    new = out.sequences[:, start:]
    logp = torch.stack(out.logits, 1).float().log_softmax(-1).gather(-1, new[..., None])[..., 0]  # (n, T)
    candidates = []
    for row, (tokens, values) in enumerate(zip(new.tolist(), logp.tolist(), strict=True)):
        candidate = Candidate(tokens, values, (run.last_generation, row))
        candidates.append(candidate.cut(run.end(tokens)))
    return candidates


def round_seed(run: Batch, n: int) -> int:
    """Seed of round `n`: belongs to the question, so that neither its batch nor what was asked before matters."""
    images, prompt = run.questions[0]
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.tobytes())
    digest.update(f"{prompt}|{run.seed or 0}|{n}".encode())
    return int.from_bytes(digest.digest()[:7], "big")


def one_by_one(
    run: Batch, answer: Callable[[Batch], tuple[list[int], dict[str, Any]]]
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """What a `decode` stage returns, question by question, each as a batch of its own."""
    answers, effects = [], []
    for i in range(len(run.questions)):
        single = run.single(i)
        tokens, effect = answer(single)
        if single.sources:  # none where not even one piece of an answer was accepted
            run.sources[i] = single.sources[0]
        answers.append(tokens)
        effects.append(effect)
    return answers, effects


def end_token(run: Batch) -> list[int]:
    """The model's end token, for answers that a method ends."""
    end = run.model.generation_config.eos_token_id
    return [] if end is None else [end[0] if isinstance(end, list) else end]
