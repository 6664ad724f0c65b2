"""A batch of questions about to be answered: what the processor makes of them, and how to generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from vlmfix.asking.conversation import Conversation
from vlmfix.asking.pictures import ProcessorError
from vlmfix.asking.words import FirstWords, Written, p_yes, yes_no_tokens
from vlmfix.engine.attachment import Attachment, attached
from vlmfix.engine.decoding import GREEDY, Decoding, as_keywords, decoding_of
from vlmfix.method.intervention import Intervention

MAX_NEW_TOKENS = 256
"""Of an answer, where neither the caller nor a configuration of the caller's says anything else."""


def chat(processor: Any, prompt: str, n_images: int) -> str:
    """The prompt in the processor's own chat template, pictures first; without a template: placeholders, newline,
    prompt. A `Conversation` is rendered whole."""
    if isinstance(prompt, Conversation):
        return prompt.rendered(processor, n_images)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    return f"{getattr(processor, 'image_token', '<image>') * n_images}\n{prompt}"


def model_inputs(model: Any, processor: Any, questions: Sequence[tuple[list[Image.Image], str]]) -> dict[str, Any]:
    """The processor's output for questions (RGB pictures and prompt of each), padded on the left, on the model's
    device. `ProcessorError` for a question that the processor cannot take."""
    if not callable(processor) or (not hasattr(processor, "image_processor") and hasattr(processor, "vocab_size")):
        raise TypeError(
            f"processor: expected what AutoProcessor loads for the model, got {type(processor).__name__}, which makes "
            f"nothing of pictures"
        )
    texts = [chat(processor, prompt, len(images)) for images, prompt in questions]
    tokenizer = getattr(processor, "tokenizer", None)
    if len(texts) > 1 and tokenizer is not None and tokenizer.pad_token_id is None:
        raise ValueError(
            "the tokenizer has no padding token, so several questions cannot be asked at once; ask them one by one "
            "(batch size 1), or set processor.tokenizer.pad_token = processor.tokenizer.eos_token"
        )
    return dict(processed(processor, texts, questions).to(model.device, dtype=model.dtype))


def processed(processor: Any, texts: list[str], questions: Sequence[tuple[list[Image.Image], str]]) -> Any:
    """What the processor makes of texts with the pictures of questions, padded on the left.

    Raises:
        ProcessorError: it cannot take one of the questions, of which it is said which.
    """
    several = len(texts) > 1  # a tokenizer without padding token can still read one text
    pictures = [images for images, _ in questions] if any(images for images, _ in questions) else None
    options = {"return_tensors": "pt", "padding_side": "left"}
    try:
        return processor(text=texts, images=pictures, padding=several, **options)
    except Exception as error:
        for (images, prompt), text in zip(questions, texts, strict=True):
            try:
                processor(text=[text], images=[images] if images else None, **options)
            except Exception as reason:
                raise ProcessorError(images, prompt, reason) from error
        raise


def quiet(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of `generate` without those that greedy decoding has no use for."""
    return settings if settings.get("do_sample") else {**GREEDY, **settings}


@dataclass(frozen=True)
class Batch:
    """A batch of questions about to be answered, as `Intervention.decode` gets it. The model has its interventions in
    force."""

    model: Any
    processor: Any
    questions: list[tuple[list[Image.Image], str]]
    """Pictures (RGB) and prompt of each."""
    inputs: dict[str, Any]
    """The processor's output for the batch, padded on the left, on the model's device."""
    settings: dict[str, Any]
    """Of `generate`."""
    seed: int | None = None
    sources: dict[int, tuple[Any, int]] = field(default_factory=dict)
    """Question -> generation and row of its batch that gave the answer, for `decode` stages that generate more than
    once. Without an entry: the last generation, and the row of the question."""

    @classmethod
    def of(
        cls,
        model: Any,
        processor: Any,
        questions: list[tuple[list[Image.Image], str]],
        settings: dict[str, Any],
        seed: int | None = None,
    ) -> Batch:
        """Build the inputs. Greedy unless told otherwise."""
        inputs = model_inputs(model, processor, questions)
        settings = as_keywords(settings, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        if "max_new_tokens" not in settings:  # what counts the prompt, too
            settings["max_new_tokens"] = settings["max_length"] - inputs["input_ids"].shape[1]
        return cls(model, processor, questions, inputs, settings, seed)

    @cached_property
    def decoding(self) -> Decoding:
        """What the model will do with these settings, those of its own configuration included."""
        return decoding_of(self.model, quiet(self.settings))

    def generate(self, inputs: dict[str, Any] | None = None, **changes: Any) -> list[list[int]]:
        """New tokens of each sequence, the end token included. `changes` go before the settings; `inputs` may be a part
        of the batch, or hold more tokens than the prompt (`prompt_end`, to wrapped models, says where the prompt
        ends)."""
        settings = quiet({**self.settings, **changes})
        inputs = self.inputs if inputs is None else inputs
        output = self.model.generate(**inputs, **settings)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        answers = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [tokens[: self.end(tokens)] for tokens in answers]

    def after(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Inputs with the same tokens of an answer appended to every prompt, to go on from there. The rest is for
        `generate`, with `prompt_end`."""
        ids = self.inputs["input_ids"]
        longer: dict[str, Any] = {}
        for name, x in self.inputs.items():
            longer[name] = x
            if isinstance(x, torch.Tensor) and x.shape == ids.shape:  # one entry per token: ids, mask, types (0: text)
                appended = ids.new_tensor(list(tokens)) if name == "input_ids" else int(name == "attention_mask")
                columns = torch.ones_like(x[:, :1]).expand(-1, len(tokens)) * appended
                longer[name] = torch.cat([x, columns], dim=1)
        return longer

    def end(self, tokens: Sequence[int]) -> int | None:
        """Length of an answer up to its end token; `None` if it has none."""
        return next((n + 1 for n, token in enumerate(tokens) if token in self.decoding.end_ids), None)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without special tokens and without white space at its ends."""
        return self.processor.decode(tokens, skip_special_tokens=True).strip()

    def written(self, tokens: Sequence[int]) -> Written:
        """The text of an answer, and which of its tokens wrote which characters."""
        return Written.by(self.processor, tokens)

    def single(self, i: int) -> Batch:
        """The i-th question as a batch of its own."""
        return Batch.of(self.model, self.processor, [self.questions[i]], self.settings, self.seed)

    def untouched_p_yes(self, questions: list[tuple[list[Image.Image], str]]) -> list[float]:
        """P(yes), of yes and no, that the untouched model gives as the first word of its answer to each of some
        questions. `ValueError` where the tokenizer has no token for these words."""
        first = FirstWords(yes_no_tokens(self.processor))
        settings = {"max_new_tokens": 1, "num_beams": 1, "logits_processor": [first]}
        with self._attachment.only(()):
            Batch.of(self.model, self.processor, questions, settings).generate()
        return [p_yes(first.of(i, len(questions)) or {}) for i in range(len(questions))]

    # ---- for the method that decodes ---------------------------------------------------------------------------------

    @property
    def last_generation(self) -> Any:
        """The state of the newest generation in this thread: its `memos` are those of the interventions in force."""
        return self._attachment.last()

    def index(self, intervention: Intervention) -> int:
        """Place of an intervention among those that the model is wrapped with, and so among the memos."""
        return next(i for i, active in self._attachment.active() if active is intervention)

    def kept(self, intervention: Intervention) -> dict[Any, Any]:
        """An intervention's own shelf, which lasts as long as the model stays wrapped with it."""
        return self._attachment.kept[self.index(intervention)]

    @property
    def _attachment(self) -> Attachment:
        attachment = attached(self.model)
        assert attachment is not None, "interventions of a batch are in force"
        return attachment
