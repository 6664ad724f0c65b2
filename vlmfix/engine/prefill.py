"""Before the first pass of a generation: interventions may look at the prompt in passes of the untouched model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vlmfix.engine.passes import Pass
from vlmfix.engine.running import Running
from vlmfix.engine.state import Capture, Generation
from vlmfix.engine.streams import Stream
from vlmfix.method.prompt import Prompt, Readable
from vlmfix.model.anatomy import PICTURE_ARGUMENTS, Anatomy, DecoderLayer

MISPLACES_CACHE = ("instructblipvideo",)
"""Models whose own forward pass hands the cache to their vision side, where it does not belong."""


@dataclass(frozen=True)
class UntouchedPasses:
    """Passes of the untouched model over the prompt of a generation that is about to begin: `Prompt.passes`."""

    model: Any
    parts: Anatomy
    running: Running
    module: nn.Module
    """Whose forward pass is about to run: the model, or the language model inside."""
    named: dict[str, Any]
    """The arguments of that pass, by name."""
    n_prompt: int
    generation: Generation

    def embeddings(self) -> Tensor:
        """(B, T, D) text embeddings of the prompt; under image tokens they mean nothing."""
        embeds = self.named.get("inputs_embeds")
        if embeds is not None:
            return embeds[:, : self.n_prompt]
        embed = self.model.get_input_embeddings()
        ids = self.named["input_ids"][:, : self.n_prompt]
        return embed(ids.clamp(max=embed.weight.shape[0] - 1))  # some placeholder ids lie outside the table

    def text(self, x: Tensor, mask: Tensor, kinds: dict[str, Tensor]) -> Any:
        """Through the plain text decoder; where the model goes by kinds of tokens, through its own forward pass."""
        run = self.module if kinds else self.parts.decoder
        return run(inputs_embeds=x, attention_mask=mask.long(), use_cache=False, **kinds)

    def whole(self) -> Any:
        """Over the whole prompt, image included."""
        return self.module(**{**self.named, "past_key_values": None, "use_cache": False})

    @torch.no_grad()
    def capture(
        self, reading: Readable, run: Callable[[], Any], positions: Tensor, layers: Iterable[int]
    ) -> dict[int, Tensor]:
        """What the hooks of layers note in the pass `run`. `ValueError` for layers that have none of these hooks."""
        capture = Capture(reading, positions)
        with self.running.capturing(capture):
            run()
        wanted = [layer for layer in layers if _has(reading, self.parts.layers[layer])]
        missing = [layer for layer in wanted if layer not in capture.outputs]
        if missing:
            raise ValueError(
                f"capture: nothing reads {reading} in layers {missing}; the method must name {reading!r} in "
                f"Traits.captures and these layers in at_layers"
            )
        return {layer: capture.outputs[layer] for layer in wanted}

    def stream(self, inputs: dict[str, Any]) -> Stream:
        """A second stream, which the generation carries along."""
        config = self.model.config.get_text_config(decoder=True)
        inputs["past_key_values"] = DynamicCache(config=config)
        stream = Stream(self._run_stream, inputs, rows=len(self.generation.geometry.image))
        self.generation.streams.append(stream)
        return stream

    @torch.no_grad()
    def _run_stream(self, inputs: dict[str, Any]) -> Any:
        seeing = any(inputs.get(argument) is not None for argument in PICTURE_ARGUMENTS)
        if seeing and self.parts.model_type in MISPLACES_CACHE:
            raise TypeError(f"{self.parts.model_type} cannot run a second stream with pictures of its own")
        module = self.model if seeing else self.parts.generator
        last_row = {"logits_to_keep": 1} if module in self._keep_last_row else {}
        with self.running.only(()):
            return module(**inputs, **last_row)

    @cached_property
    def _keep_last_row(self) -> list[nn.Module]:
        """Modules that can be told to make no more logits than one needs."""
        modules = (self.model, self.parts.generator)
        return [module for module in modules if "logits_to_keep" in inspect.signature(module.forward).parameters]


def begin(
    this_pass: Pass, model: nn.Module, module: nn.Module, parts: Anatomy, running: Running, named: dict[str, Any]
) -> None:
    """Let interventions prepare, before the first pass of a generation."""
    scope = running.thread.scope
    named = {name: value for name, value in named.items() if value is not None}
    generation = this_pass.generation
    prompt = Prompt(
        generation.geometry,
        model=model,
        inputs=named if scope is None else scope.inputs,
        prefill=named,
        passes=UntouchedPasses(model, parts, running, module, named, this_pass.n_prompt, generation),
    )
    for i, one in running.in_force():
        if one.acts_at("begin"):
            one.begin(prompt, generation.memos[i])


def _has(reading: Readable, layer: DecoderLayer) -> bool:
    """Whether a layer has the part of which something is read."""
    part = {"heads": layer.out_proj, "mlp": layer.mlp, "hidden": layer.module}[reading]
    return part is not None
