"""Which head, switched off, changes what the model says next?

`kl` is SHIPS, in Zhou et al., "On the Role of Attention Heads in Large Language Model Safety", arXiv 2410.13708;
`margin` and `token` are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vlmfix.asking.words import yes_no_tokens
from vlmfix.eval.scorers import naming
from vlmfix.eval.tune.log_probs import kl, log_probs_at
from vlmfix.eval.tune.measurement import Measurement
from vlmfix.eval.tune.questions import Questions, lean
from vlmfix.eval.tune.switch_off import PAPER_EPS, Mode, Read, each_head_off
from vlmfix.eval.tune.tool import Direction, Subject, Tool
from vlmfix.method.kinds import Range

MEANINGS = {
    "kl": "KL divergence of the first answer token when the head is off",
    "margin": "push towards yes on absent objects, less the push on present ones, in nats",
    "token": "push towards invented objects in captions, less the push towards true ones, in nats",
}
Change = Callable[[Tensor, Tensor], Tensor]
"""Of what was read (B, ...) from the model as it is, and (heads, B, ...) with heads off -> (heads, S) for S samples."""


@dataclass(frozen=True)
class Ablate(Tool):
    """Switches one head off at a time and looks at the next token."""

    name: ClassVar[str] = "ablate"
    source: ClassVar[str] = "kl: SHIPS, Zhou et al., arXiv 2410.13708; margin and token: ours"

    see: Literal["kl", "margin", "token"] = "kl"
    """`kl`: KL(p || p with the head off) of the first answer token, on POPE's questions. `margin`: how much the head
    pushes log p(yes) - log p(no) up for absent objects, less what it does for present ones. `token`: how much the head
    raises the log-probability of objects that the model invents in captions, less that of true ones."""
    mode: Mode = "output"
    """How a head is switched off: no output, or uniform attention (code's "undifferentiated")."""
    eps: float | None = None
    """What is left of the output or of the scores. `None`: 0 for output, 1e-5 for uniform (code)."""
    max_new_tokens: Annotated[int, Range(1)] = 256
    """Of the captions, for `token`."""

    def __post_init__(self) -> None:
        """Fill `eps`, too."""
        super().__post_init__()
        if self.eps is None:
            object.__setattr__(self, "eps", PAPER_EPS[self.mode])

    @property
    def direction(self) -> Direction:
        """Heads that push to errors are bad."""
        return "high is good" if self.see == "kl" else "high is bad"

    @property
    def meaning(self) -> str:
        """What a score is."""
        return MEANINGS[self.see]

    def measure(self, subject: Subject) -> Measurement:
        """L * H passes per question or caption, without decoding. `ValueError` where one kind of objects is missing."""
        if self.see == "kl":
            return self._divergences(subject)
        if self.see == "margin":
            return harm(self._margins(subject), bad="absent", good="present", data=subject.data.name)
        return harm(self._object_words(subject), bad="invented", good="true", data=subject.data.name)

    def _divergences(self, subject: Subject) -> Measurement:
        """KL divergence of the first answer token; a sample is a question."""

        def first_token(inputs: dict[str, Any]) -> Tensor:
            return log_probs_at(subject.model, inputs, [-1])[:, 0]

        questions = Questions.of(subject)
        values = self._of_questions(subject, questions, first_token, kl)
        one_group = np.zeros(len(values), int)
        return Measurement.from_samples(questions.pictures, ("all",), values, questions.picture_of, one_group)

    def _margins(self, subject: Subject) -> Measurement:
        """The head's push to yes; a sample is a question."""
        tokens = yes_no_tokens(subject.processor)

        def first_lean(inputs: dict[str, Any]) -> Tensor:
            return lean(log_probs_at(subject.model, inputs, [-1])[:, 0], tokens)

        questions = Questions.of(subject)
        values = self._of_questions(subject, questions, first_lean, torch.sub)
        groups, group_of = ("absent", "present"), questions.present.astype(int)
        return Measurement.from_samples(questions.pictures, groups, values, questions.picture_of, group_of)

    def _object_words(self, subject: Subject) -> Measurement:
        """The head's push to object words in the model's own captions; a sample is a word."""
        captions = subject.captions(self.max_new_tokens)
        with_words = [(picture, caption) for picture, caption in enumerate(captions) if caption.named]
        values, picture_of, is_true = [np.zeros((0, *subject.shape))], [], []
        for batch in subject.batches(with_words, "ablate token", subject.prompts_per_pass):
            inputs, n_prompt = naming.told(subject.model, subject.processor, [caption for _, caption in batch])
            rows, columns, tokens = [], [], []
            for row, (picture, caption) in enumerate(batch):
                for word in caption.named:
                    rows.append(row)
                    columns.append(n_prompt + word.token - 1)  # where the word's first token is predicted
                    tokens.append(caption.tokens[word.token])
                    picture_of.append(picture)
                    is_true.append(word.true)
            values.append(self._of_words(subject, inputs, rows, columns, tokens))
        return Measurement.from_samples(
            [caption.item.image for caption in captions],
            ("invented", "true"),
            np.concatenate(values),
            np.array(picture_of, int),
            np.array(is_true, int),
        )

    def _of_questions(self, subject: Subject, questions: Questions, read: Read, change: Change) -> np.ndarray:
        """(Q, L, H) change of what `read` gives at the end of each question."""
        values = []
        for items in subject.batches(questions.items, f"ablate {self.see}", subject.prompts_per_pass):
            values.append(self._changes(subject, subject.inputs(items), read, change))
        return np.concatenate(values)

    def _of_words(
        self, subject: Subject, inputs: dict[str, Any], rows: list[int], columns: list[int], tokens: list[int]
    ) -> np.ndarray:
        """(W, L, H) change of the log-probability of W tokens, each in a row of the batch and after a column of it."""
        read_columns, column_of = np.unique(columns, return_inverse=True)
        own = torch.tensor(rows), torch.as_tensor(column_of), torch.arange(len(tokens))

        def all_words(inputs: dict[str, Any]) -> Tensor:
            return log_probs_at(subject.model, inputs, read_columns.tolist())[:, :, tokens]  # (B, R, W)

        def own_change(plain: Tensor, off: Tensor) -> Tensor:
            return plain[own] - off[:, own[0], own[1], own[2]]

        return self._changes(subject, inputs, all_words, own_change)

    def _changes(self, subject: Subject, inputs: dict[str, Any], read: Read, change: Change) -> np.ndarray:
        """(S, L, H) change of what `read` gives when each head is switched off in its turn."""
        assert self.eps is not None, "filled from the start"
        plain = read(inputs)
        runs = each_head_off(subject.model, inputs, read, mode=self.mode, eps=self.eps, rows=subject.batch_size)
        changes = torch.cat([change(plain, off).double().cpu() for _, _, off in runs])  # (L * H, S), heads in order
        return changes.T.reshape(-1, *subject.shape).numpy()


def harm(pushes: Measurement, *, bad: str, good: str, data: str) -> Measurement:
    """The push towards errors, less the push towards what is right, where there is one."""
    samples = pushes.samples()
    for group in (bad, good):
        if not samples[group]:
            raise ValueError(f"{data} has no {group} objects to look at; take more pictures")
    pushes.combine = lambda means: means[bad] - np.maximum(means[good], 0)
    pushes.extra = {"parts": pushes.group_means(), "samples": samples}
    return pushes
