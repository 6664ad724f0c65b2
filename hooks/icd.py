"""ICD, instruction contrastive decoding: take off the logits what the model says when it is told to be confused.

Wang et al., "Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding", ACL
Findings 2024, arXiv 2403.18715; official code p1k0pan/ICD (Apache-2.0). A second stream sees the same image and reads
one sentence more, a role that disturbs: what it makes likelier is what the model invents. Made for yes/no questions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.contrast import contrasted
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Range
from vlmfix.method.site import Step

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.method.prompt import Prompt
    from vlmfix.model.anatomy import Anatomy

ROLES = {
    "recognize": "You are an object detector to recognize every different objects.",
    "focus": "You are an object detector to recognize every different objects by focusing the shapes, colors and "
    "relationships of objects.",
    "avoid": "I want you avoid any specific identification or categorization of the objects depicted.",
    "confused": "You are a confused objects detector to provide a fuzzy overview or impression of the image.",
    "general": "You are an object detector to provide a general overview or impression of the image.",
}
"""The sentences of the release, facts of its code."""


@dataclass(frozen=True)
class ICD(Intervention):
    """Instruction contrastive decoding. Acts on the logits of every new token. The release puts its sentence in the
    place of LLaVA's system message, which prompts of transformers' LLaVA lack: there `place=start` is the same."""

    name: ClassVar[str] = "icd"
    summary: ClassVar[str] = "takes off what the model says when told to be confused"
    paper: ClassVar[str] = "Wang et al., ACL Findings 2024, arXiv 2403.18715"
    cost: ClassVar[str] = "a second stream with image: the prompt twice, and twice the rows per token"
    expect: ClassVar[str] = (
        "made for yes/no; much of what contrast gains there is a shifted rate of yes (arXiv 2504.10020), so look at "
        "the controls; untested here"
    )

    alpha: Annotated[float, Range(0)] = 1.0
    """Strength: out = (1 + alpha) c - alpha u (code)."""
    beta: Annotated[float, Range(above=0, most=1)] = 0.1
    """Tokens less likely than `beta` times the likeliest are ruled out, 0 < beta <= 1 (code)."""
    role: Literal["recognize", "focus", "avoid", "confused", "general"] = "confused"
    """Which of the release's five sentences disturbs (code)."""
    place: Literal["start", "question"] = "start"
    """Where it stands: at the start of the prompt (the system message's place, code), or after the last image, before
    the question (AllPath's port)."""
    words: tuple[int, ...] | None = None
    """Token ids of the sentence. `None`: the processor's, so that `vlmfix.wrap` needs `processor=`."""

    @property
    def traits(self) -> Traits:
        """The second stream needs the whole prompt at once; penalties come after the contrast (code)."""
        return Traits(whole_prompt=True, before_penalties=True)

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[ICD, dict[str, Any]]:
        """Write the sentence in the model's tokens."""
        if self.words:
            return self, {}
        if self.words is not None:
            raise ValueError("words: expected at least one token id, got none")
        if processor is None:
            raise ValueError("icd puts a sentence into the prompt, in tokens of the processor; give wrap processor=...")
        tokenizer = getattr(processor, "tokenizer", processor)
        ids = tokenizer(f"{ROLES[self.role]} ", add_special_tokens=False)["input_ids"]
        return replace(self, words=tuple(ids)), {"sentence": ROLES[self.role]}

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        """Prepare the second stream; it starts when the first token is chosen."""
        geometry = prompt.geometry
        memo["seen"] = geometry.image.any(1)
        if not bool(memo["seen"].any()):
            return
        n_samples = len(prompt.inputs["input_ids"] if "input_ids" in prompt.inputs else prompt.inputs["inputs_embeds"])
        n_beams = len(geometry.image) // n_samples
        if self.place == "question":
            at = geometry.instruction.int().argmax(1)
        else:
            at = geometry.prompt.int().argmax(1) + self._begins(prompt).to(geometry.image.device).repeat_interleave(
                n_beams
            )
        memo["disturbed"] = prompt.stream_with_text(self.words or (), at[::n_beams])

    @staticmethod
    def _begins(prompt: Prompt) -> Tensor:
        """(B,) 1 where a prompt begins with the token that begins texts, which stays in front; else 0."""
        import torch

        ids = prompt.inputs.get("input_ids")
        config: Any = prompt.model.config
        bos = getattr(config.get_text_config(decoder=True), "bos_token_id", None)
        mask = prompt.inputs.get("attention_mask")
        if ids is None or bos is None:
            rows = ids if ids is not None else prompt.inputs["inputs_embeds"]
            return torch.zeros(len(rows), dtype=torch.long)
        first = torch.zeros_like(ids[:, 0]) if mask is None else (mask != 0).int().argmax(1)
        return (ids.gather(1, first[:, None])[:, 0] == bos).long()

    def logits(self, scores: Tensor, step: Step) -> Tensor:
        """Give c + alpha (c - u) on plausible tokens; samples without an image are left alone."""
        if "disturbed" not in step.memo:
            return scores
        out = contrasted(scores, step.memo["disturbed"].logits, self.alpha, self.beta, step.as_logits)
        return out.where(step.memo["seen"][:, None], scores)

    def controls(self) -> tuple[Intervention, ...]:
        """The plausibility rule alone."""
        return (replace(self, alpha=0.0),) if self.alpha else ()

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`, whether there was an image."""
        return [{"acted": seen} for seen in memo["seen"].tolist()] if "seen" in memo else []

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
