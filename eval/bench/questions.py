"""How fast many questions about one picture are answered: one by one, as one batch, and sharing the pass over it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmfix.asking.asker import Asker
from vlmfix.asking.batch import Batch
from vlmfix.asking.prefix import ContinuedBatch
from vlmfix.eval.bench.compare import Method
from vlmfix.eval.bench.timing import now, ratio
from vlmfix.method.registry import spec_of

ONE_BY_ONE = "one by one"
PICTURE = "pass over the picture"


def share_questions(
    model: Any,
    inputs: dict[str, Tensor],
    method: Method,
    *,
    questions: int,
    own_tokens: int,
    new_tokens: int,
    rounds: int,
    clock: str = "wall",
) -> dict[str, Any]:
    """How fast `questions` about the picture of the first prompt are answered in each way, and how long the pass over
    the picture alone takes. Questions differ in their last `own_tokens`. `ValueError` where the method cannot share.
    """
    settings = {"do_sample": False, "max_new_tokens": new_tokens}
    ids = different_ends(inputs["input_ids"][:1], questions, own_tokens)
    timings: dict[str, list[float]] = {}
    asker = Asker(model, None, method)
    with asker.applied(), torch.inference_mode():
        if not asker.can_share(settings):
            raise ValueError(f"{spec_of(method)} cannot share the pass over a picture: it depends on the question")
        ways = ways_to_answer(model, ids, own_tokens, settings)
        for _ in range(rounds):
            for name, answer in ways.items():
                start = now(clock)
                answer()
                timings.setdefault(name, []).append(now(clock) - start)
    to_answer = [name for name in timings if name != PICTURE]
    return {
        "method": spec_of(method),
        "questions": questions,
        "own_tokens": own_tokens,
        "seconds": {name: statistics.median(seconds) for name, seconds in timings.items()},
        "times_faster": {name: ratio(timings[ONE_BY_ONE], timings[name]) for name in to_answer},
        PICTURE: ratio(timings[PICTURE], timings["sharing"]),
    }


def different_ends(prompt: Tensor, questions: int, own_tokens: int) -> Tensor:
    """The prompt (1, N) as many (questions, N) that differ in their last tokens."""
    ids = prompt.repeat(questions, 1)
    ends = torch.randint(3, 100, (questions, own_tokens), generator=torch.Generator().manual_seed(2))
    ids[:, -own_tokens:] = ends.to(ids.device)
    return ids


def ways_to_answer(model: Any, ids: Tensor, own_tokens: int, settings: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: three ways to answer all questions, and the pass that the third of them shares."""

    def batch_of(ids: Tensor) -> Batch:
        return Batch(model, None, [], {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, settings)

    def one_by_one() -> None:
        for question in ids.split(1):
            batch_of(question).generate()

    all_at_once = batch_of(ids)
    sharing = ContinuedBatch(
        model,
        None,
        [],
        all_at_once.inputs,
        settings,
        prefix_inputs=batch_of(ids[:1, :-own_tokens]).inputs,
        prefix_row=torch.zeros(len(ids), dtype=torch.long, device=ids.device),
    )
    return {
        ONE_BY_ONE: one_by_one,
        "one batch": all_at_once.generate,
        "sharing": sharing.generate,
        PICTURE: sharing.make_prefix,
    }
