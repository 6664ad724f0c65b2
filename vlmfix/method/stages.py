"""The stages at which a method may look at a generation or edit it, written down once, in the order of their coming.

Hooks, refusals, the list of model types, the documentation and the README are made from this table. A stage is a method
of `Intervention`; a subclass acts at the stages that it overrides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stage:
    """One stage."""

    name: str
    """Of the method that a subclass overrides."""
    gets: str
    """What it gets; a stage that edits returns the same."""
    where: str
    """Where it happens, and for which rows."""
    of: Literal["ask", "prompt", "layer", "attention", "heads", "logits"]
    """What carries it: `vlmfix.ask`, the prompt as a whole, a decoder layer, its attention, its output projection, or
    the choice of a token."""
    edits: bool = True
    """Whether it edits; else it only looks."""
    need: str = ""
    """What a method that looks there needs of the model, in words."""


TABLE = (
    Stage("refine", "pictures and prompt of a question", "before they become inputs; in `ask` only", "ask"),
    Stage(
        "begin", "the whole prompt, before the prefill", "passes and second streams of its own", "prompt",
        edits=False, need="a pass before the first",
    ),
    Stage(
        "layer_input", "(B, Q, D) the input of a layer", "rows of the prompt", "layer", edits=False, need="layer inputs"
    ),
    Stage("tokens", "what a decoder layer gets: hidden states, rotary embeddings, mask", "all rows", "layer"),
    Stage(
        "survey", "(B, H, R, K) float32 weights, before any edit of the layer", "all rows of the prompt", "attention",
        edits=False, need="attention of all rows once",
    ),
    Stage("scores", "(B, H, R, K) float32, before softmax", "rows named by `rows`", "attention"),
    Stage("weights", "(B, H, R, K) float32, after softmax", "rows named by `rows`", "attention"),
    Stage("heads", "(B, Q, H, d) head outputs before the output projection, the model's dtype", "all rows", "heads"),
    Stage("logits", "(B, V) float32 scores of the next token", "every new token; in `generate` only", "logits"),
    Stage("decode", "a batch of questions; returns answers", "in the place of `generate`; in `ask` only", "ask"),
)  # fmt: skip
STAGES = tuple(stage.name for stage in TABLE if stage.edits)
"""Names of the stages that edit."""
ATTENTION_STAGES = tuple(stage.name for stage in TABLE if stage.of == "attention")
ASK_STAGES = tuple(stage.name for stage in TABLE if stage.of == "ask")
