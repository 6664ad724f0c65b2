"""What a model or a way to decode does not give to a method: refused before it starts, in one sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vlmfix.engine.decoding import Decoding
from vlmfix.engine.plan import Placed
from vlmfix.engine.running import CHECKPOINTED, names_of
from vlmfix.method.intervention import Intervention
from vlmfix.method.stages import EVERY_TOKEN_STAGES, READINGS, TABLE
from vlmfix.model.anatomy import Anatomy


def check_model(one: Intervention, parts: Anatomy) -> None:
    """Raise a `TypeError` if an intervention needs a part of the model that cannot be reached, and a `ValueError` if it
    names layers that are not there."""
    name, n_layers = one.name or type(one).__name__, len(parts.layers)
    for deed, part in _needs(one, n_layers):
        if part in parts.lacks:
            raise TypeError(f"{name} {deed}, {parts.lacks[part]}")
    read = set(one.hidden_layers(n_layers)) - {-1}  # what the first layer gets
    layers = read | set(one.at_layers(n_layers))
    wrong = sorted(layer for layer in layers if not 0 <= layer < n_layers)
    if wrong:
        raise ValueError(f"{name} acts in layers {wrong}; expected numbers in 0..{n_layers - 1} on this model")


def _needs(one: Intervention, n_layers: int) -> Iterator[tuple[str, str]]:
    """What an intervention does with which part of the model."""
    for stage in TABLE:
        if one.acts_at(stage.name):
            yield stage.deed, stage.part
    reads = set(one.traits.captures) if one.acts_at("begin") else set()
    if one.acts_at("logits") and tuple(one.hidden_layers(n_layers)):
        reads.add("hidden")
    if one.acts_at("logits") and one.traits.lens:
        yield "reads inner layers with the model's head", "head"
    for reading in READINGS:
        if reading.name in reads:
            yield reading.deed, reading.part


def check_company(active: Sequence[Placed]) -> None:
    """Raise a `ValueError` if interventions cannot be in force together."""
    deciders = [one.name for _, one in active if one.acts_at("decode")]
    if len(deciders) > 1:
        raise ValueError(f"{' and '.join(deciders)} each decode in their own way; use one of them")
    for i, one in active:
        one.composes([other for j, other in active if j != i])


def check_decoding(in_force: Sequence[Placed], decoding: Decoding) -> None:
    """Raise a `ValueError` if an intervention cannot follow an answer in the way that it is decoded."""
    if not in_force:
        return
    config, names = decoding.config, names_of(in_force)
    elsewhere = decoding.from_elsewhere
    if elsewhere is not None:
        raise ValueError(
            f"{names} cannot act in {elsewhere}, whose code transformers loads from the hub; leave it out, give a "
            f"function as custom_generate, or unwrap the model"
        )
    if config.cache_implementation == "paged":
        raise ValueError(
            f"{names} cannot act in continuous batching, which packs prompts into one row; leave out "
            f"cache_implementation='paged'"
        )
    if config.guidance_scale is not None and config.guidance_scale != 1:
        raise ValueError(
            f"{names} cannot act beside guidance_scale={config.guidance_scale:g}, for which a second "
            f"prompt goes through the same model; leave it out, or use a method that guides (vcd, contrast)"
        )
    for _, one in in_force:
        sequential = one.traits.sequential or one.traits.stepwise
        if sequential and decoding.n_beams > 1:
            raise ValueError(f"{one.name} follows one answer token by token; beam search is not supported with it")
        if decoding.assisted and (sequential or any(map(one.acts_at, EVERY_TOKEN_STAGES))):
            raise ValueError(f"{one.name} needs every token in its turn; assisted generation is not supported")
        if one.traits.stepwise and not config.use_cache:
            raise ValueError(
                f"{one.name} goes by the pass over the token before, and without a cache there is none; leave out "
                f"use_cache=False"
            )


PACKED = ("cu_seq_lens_q", "cu_seqlens_q", "block_table")
"""Arguments of passes in which several prompts stand in one row."""


def check_pass(in_force: Sequence[Placed], parts: Anatomy, kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` for a forward pass in which interventions could not edit what they should."""
    names = names_of(in_force)
    if any(kwargs.get(name) is not None for name in PACKED):
        raise ValueError(
            f"{names} cannot act where several prompts are packed into one row (continuous batching, padding-free "
            f"batches); use generate or padded batches, or unwrap the model"
        )
    if torch.is_grad_enabled() and any(_checkpoints(layer.module) for layer in parts.layers):
        raise ValueError(f"{names} {CHECKPOINTED}")


def _checkpoints(layer: Any) -> bool:
    return layer.training and getattr(layer, "gradient_checkpointing", False)


def check_scoring(in_force: Sequence[Placed]) -> None:
    """Raise a `ValueError` if an intervention cannot act on an answer that is given as a whole."""
    for _, one in in_force:
        if one.acts_at("logits"):
            raise ValueError(
                f"{one.name} acts where generate chooses a token, so an answer cannot be scored with it in one forward "
                f"pass; use generate(output_scores=True)"
            )
        if one.traits.stepwise:
            raise ValueError(
                f"{one.name} goes by the pass over the token before, so an answer cannot be scored with it in one "
                f"forward pass; use generate(output_scores=True), or a loop with a cache"
            )
        if one.acts_at("cache"):
            raise ValueError(
                f"{one.name} edits the cache between one token and the next, so an answer cannot be scored with it in "
                f"one forward pass; use generate(output_scores=True), or a loop with a cache"
            )


def check_pieces(in_force: Sequence[Placed]) -> None:
    """Raise a `ValueError` if an intervention cannot begin with a piece of a prompt."""
    for _, one in in_force:
        if one.traits.whole_prompt:
            raise ValueError(f"{one.name} needs the whole prompt in one pass; leave out prefill_chunk_size")
