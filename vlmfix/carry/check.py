"""Does a baked model do what the wrapped one does? Asked in a fresh process that cannot import this library."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmfix.asking.asker import Asked, Asker
from vlmfix.carry import fresh

MAX_NEW_TOKENS = 32
ROUNDINGS = {torch.float32: 64}
OTHER_ROUNDINGS = 4
"""A difference of so many roundings of the largest logit passes, in float32 and in coarser numbers. Measured on the
embedded models with gains of 1.5: 11 in float32, 1 in bfloat16."""


@dataclass(frozen=True)
class Expected:
    """What the wrapped model makes of some questions, and the untouched one."""

    inputs: list[dict[str, Any]]
    logits: list[torch.Tensor]
    """(V,) of the prompt's last row, float32, per question."""
    answers: list[list[int]]
    untouched_logits: list[torch.Tensor]
    untouched_answers: list[list[int]]


@dataclass(frozen=True)
class Verdict:
    """How a baked model compares."""

    n: int
    difference: float
    """Largest difference of a logit from the wrapped model's."""
    largest: float
    """Largest logit, for a scale."""
    same_answers: int
    moved: float
    """Largest difference that the method makes to a logit of the untouched model."""
    changed_answers: int
    """Answers that differ from the untouched model's."""
    allowed: float
    exact_enough: bool
    """Float32 or better."""

    @property
    def passed(self) -> bool:
        """Up to rounding; and where numbers are exact enough to tell (float32), not beyond what the method does."""
        return self.difference <= self.allowed and (self.tells or not self.exact_enough)

    @property
    def tells(self) -> bool:
        """Whether rounding is less than what the method itself does to a logit."""
        return self.difference < self.moved or self.difference == 0

    def __str__(self) -> str:
        same = f"{self.same_answers} of {self.n} answers are the wrapped model's"
        changed = f"{self.changed_answers} differ from the untouched model's"
        if self.difference == 0:
            return f"no difference in any logit; {same}; {changed}"
        size = "" if self.tells else f", no less than what the method does to them, {self.moved:.2g}"
        return f"logits differ by {self.difference:.2g} (largest {self.largest:.3g}){size}; {same}; {changed}"


def expected_of(asker: Asker, questions: Sequence[Asked]) -> Expected:
    """What must come out, one question at a time."""
    untouched = Asker(asker.model, asker.processor)
    inputs = [untouched.inputs([question]) for question in questions]
    with asker.applied():
        logits, answers = _answers(asker.model, inputs)
    with untouched.applied():
        untouched_logits, untouched_answers = _answers(asker.model, inputs)
    return Expected(inputs, logits, answers, untouched_logits, untouched_answers)


def check(kind: str, base: Path, folder: Path, expected: Expected, dtype: torch.dtype, device: Any) -> Verdict:
    """Load what lies in `folder` in a fresh process, and compare.

    Raises `ValueError`, with that process' last line, where the model cannot be loaded there.
    """
    with tempfile.TemporaryDirectory() as scratch:
        job, answers = Path(scratch) / "job.pt", Path(scratch) / "answers.pt"
        told = {"kind": kind, "base": str(base.resolve()), "folder": str(folder.resolve()), "dtype": dtype}
        told |= {"device": str(device), "inputs": expected.inputs, "max_new_tokens": MAX_NEW_TOKENS}
        told["threads"] = torch.get_num_threads()
        torch.save(told, job)
        command = [sys.executable, "-I", fresh.__file__, str(job), str(answers)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise ValueError(f"what was written to {folder} does not load in a process without vlmfix: {reason}")
        given = torch.load(answers)
    return compare(expected, given["logits"], given["answers"], dtype)


def compare(
    expected: Expected, logits: Sequence[torch.Tensor], answers: Sequence[list[int]], dtype: torch.dtype
) -> Verdict:
    """Logits and answers beside the wrapped model's."""
    largest = max(float(x.abs().max()) for x in expected.logits)
    return Verdict(
        n=len(answers),
        difference=_distance(logits, expected.logits),
        largest=largest,
        same_answers=sum(a == b for a, b in zip(answers, expected.answers, strict=True)),
        moved=_distance(expected.untouched_logits, expected.logits),
        changed_answers=sum(a != b for a, b in zip(expected.answers, expected.untouched_answers, strict=True)),
        allowed=ROUNDINGS.get(dtype, OTHER_ROUNDINGS) * torch.finfo(dtype).eps * largest,
        exact_enough=torch.finfo(dtype).eps <= torch.finfo(torch.float32).eps,
    )


def _distance(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(some, others, strict=True))


@torch.inference_mode()
def _answers(model: Any, inputs: list[dict[str, Any]]) -> tuple[list[torch.Tensor], list[list[int]]]:
    logits, answers = [], []
    for each in inputs:
        logits.append(model(**each).logits[0, -1].float().cpu())
        out = model.generate(**each, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1)
        answers.append(out[0, each["input_ids"].shape[1] :].tolist())
    return logits, answers
