"""The stages at which a method may look at a generation or edit it, written down once, in the order of their coming.

Hooks, refusals, the list of model types, the documentation and the README are made from this table. A stage is a method
of `Intervention`; a subclass acts at the stages that it overrides.
"""

from __future__ import annotations

from collections.abc import Collection
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
    of: Literal["ask", "prompt", "layer", "attention", "heads", "cache", "mlp", "logits"]
    """What carries it: `vlmfix.ask`, the prompt as a whole, a decoder layer, its attention, its output projection, its
    part of the cache, its MLP, or the choice of a token."""
    edits: bool = True
    """Whether it edits; else it only looks."""
    need: str = ""
    """What a method that looks there needs of the model, in words."""
    part: str = ""
    """The part of a model without which it cannot happen, as `Anatomy.lacks` names it."""
    deed: str = ""
    """What a method does there, for the sentence that refuses a model without that part."""
    every_token: bool = False
    """Whether it must see every token in its turn: tokens that an assistant proposes are taken back at times."""


TABLE = (
    Stage("refine", "pictures and prompt of a question", "before they become inputs; in `ask` only", "ask"),
    Stage(
        "begin", "the whole prompt, before the prefill", "passes and second streams of its own", "prompt",
        edits=False, need="a pass before the first",
    ),
    Stage(
        "layer_input", "(B, Q, D) the input of a layer", "rows of the prompt", "layer",
        edits=False, need="layer inputs", part="residual stream", deed="looks at layer inputs",
    ),
    Stage("tokens", "what a decoder layer gets: hidden states, rotary embeddings, mask", "all rows", "layer"),
    Stage(
        "survey", "(B, H, R, K) float32 weights, before any edit of the layer", "all rows of the prompt", "attention",
        edits=False, need="attention of all rows once", part="attention", deed="edits attention",
    ),
    Stage(
        "scores", "(B, H, R, K) float32, before softmax", "rows named by `rows`", "attention",
        part="attention", deed="edits attention",
    ),
    Stage(
        "weights", "(B, H, R, K) float32, after softmax", "rows named by `rows`", "attention",
        part="attention", deed="edits attention",
    ),
    Stage("heads", "(B, Q, H, d) head outputs before the output projection, the model's dtype", "all rows", "heads"),
    Stage(
        "cache", "(B, Hk, K, d) keys and values that a layer has in the cache, after its attention",
        "all keys so far; later tokens see what it returns", "cache", every_token=True,
    ),
    Stage(
        "mlp", "(B, Q, D) output of a layer's MLP, before it joins the residual stream", "all rows", "mlp",
        part="mlp", deed="edits MLP outputs",
    ),
    Stage(
        "logits", "(B, V) float32 scores of the next token", "every new token; in `generate` only", "logits",
        every_token=True,
    ),
    Stage("decode", "a batch of questions; returns answers", "in the place of `generate`; in `ask` only", "ask"),
)  # fmt: skip
STAGES = tuple(stage.name for stage in TABLE if stage.edits)
"""Names of the stages that edit."""
ATTENTION_STAGES = tuple(stage.name for stage in TABLE if stage.of == "attention")
ASK_STAGES = tuple(stage.name for stage in TABLE if stage.of == "ask")
EVERY_TOKEN_STAGES = tuple(stage.name for stage in TABLE if stage.every_token)

GROUPS = {
    "attention": ("scores", "weights"),
    "heads": ("heads",),
    "hidden states": ("tokens", "mlp"),
    "cache": ("cache",),
    "logits": ("logits",),
    "decoding": ("decode",),
    "image": ("refine",),
}
"""In which methods are listed, by the stages that they edit."""


def group_of(stages: Collection[str]) -> str:
    """The group of a method that edits at some stages: the last one, but logits only where nothing else is edited,
    since several methods have a guidance besides. `monitors` where nothing is."""
    groups = [group for group, own in GROUPS.items() if not set(own).isdisjoint(stages)]
    others = [group for group in groups if group != "logits"]
    return (others or groups or ["monitors"])[-1]


@dataclass(frozen=True)
class Reading:
    """Something inside a layer that can be read without an edit: by `Prompt.capture`, and by `Step.hidden`."""

    name: str
    gets: str
    """What one reads, of one row per sample."""
    part: str = ""
    deed: str = ""
    """Both as of a `Stage`."""


READINGS = (
    Reading("heads", "(B, H, d) head outputs before the output projection"),
    Reading("mlp", "(B, D) output of the layer's MLP", "mlp", "reads MLP outputs"),
    Reading("hidden", "(B, D) output of the layer", "residual stream", "reads hidden states"),
)


def to_markdown() -> str:
    """The table of stages in CONTRIBUTING.md."""
    lines = ["| stage | what it gets | where |", "|---|---|---|"]
    for stage in TABLE:
        verb = "edits" if stage.edits else "sees"
        lines.append(f"| `{stage.name}` | {verb} {stage.gets} | {stage.where} |")
    return "\n".join(lines) + "\n"
