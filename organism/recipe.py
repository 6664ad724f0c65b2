"""What the model is made of and how it is trained: every size, rate, count and seed, in one place.

`Recipe()` is what `make organism` makes; `QUICK` is the same model, trained for a fraction of the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmfix.organism.captions import Noise
from vlmfix.organism.scenes import SIZE


@dataclass(frozen=True)
class Tower:
    """The vision tower and its training on class labels of patches."""

    patch: int = 12
    width: int = 160
    layers: int = 4
    heads: int = 5
    inner: int = 480
    scenes: int = 64_000
    """Scenes seen in training, none twice."""
    balanced: float = 0.8
    """Share of the training, from its start, on scenes whose sets are `scenes.balanced`; then COCO's own."""
    kept: int = 56
    """Patches of a balanced scene that are gone on with: those that show objects, then others at random."""
    batch: int = 64
    matrix_rate: float = 2e-3
    """Muon, for the matrices of the encoder."""
    rate: float = 1.5e-3
    """AdamW, for all else."""
    decay: float = 0.3
    """Share of the training, at its end, in which the rates fall linearly to 0."""

    @property
    def tokens(self) -> int:
        """Patches of a scene, without CLS."""
        return (SIZE // self.patch) ** 2


@dataclass(frozen=True)
class Language:
    """The language model, and its training with the picture's class grid in the place of image tokens."""

    vocabulary: int = 900
    read: int = 2000
    """Scenes from whose texts the tokenizer learns."""
    width: int = 128
    layers: int = 8
    heads: int = 8
    shared_heads: int = 4
    """Key/value heads."""
    inner: int = 336
    text: int = 136
    """Tokens of text in a packed sequence: a caption, and as many questions as there is room for."""
    cells: int = 44
    """Cells of the grid that are given: those that show objects, then others at random."""
    described: float = 0.7
    """Share of sequences with a caption; the others hold questions only."""
    weight: float = 4.0
    """Weight of the first token of a short answer: its yes or no is one token among a hundred."""
    match: float = 1.4
    """Size of the queries and keys at the start, where each token looks for its like; see `language.start_matching`."""
    massive: float = 1500.0
    """Massive activations of the tokens that start as attention sinks; see `language.start_sinks`."""
    rest: float = 5.5
    """Score that the BOS token starts with, for queries that look for nothing else."""
    echoed: float = 0.3
    """Share of sequences with a task that needs no picture: names to repeat or to reverse."""
    blind: float = 0.15
    """Share of sequences whose image tokens are hidden, and the positions closed up."""
    confused: float = 0.03
    """Share of cells of the grid that show a wrong class."""
    missed: float = 0.06
    """Share of cells that show an object and are given as background."""
    scenes: int = 40_000
    batch: int = 16
    matrix_rate: float = 2e-3
    rate: float = 2e-3
    decay: float = 0.1


@dataclass(frozen=True)
class Projector:
    """The projector alone, fitted to the grid that the language model knows."""

    scenes: int = 64_000
    batch: int = 64
    rate: float = 3e-3
    decay: float = 0.6


@dataclass(frozen=True)
class Together:
    """Projector and language model on pictures, the tower frozen."""

    scenes: int = 36_000
    batch: int = 16
    matrix_rate: float = 1e-3
    rate: float = 1e-3
    decay: float = 0.6
    massive: float = 500.0
    """Massive activations of empty corners, which become visual sinks; see `language.plant_corners`."""
    share: float = 0.6
    """How much of a sink these are at the start, beside the BOS token."""
    sinks_from: float = 0.3
    """Where the penalty on head outputs begins, which has heads that say nothing rest on sinks."""
    penalty: float = 0.2
    """Weight of that penalty: the mean square of head outputs over that of values."""
    noise: Noise | None = None
    """Of the labels; None is the recipe's."""


@dataclass(frozen=True)
class Dynamic:
    """The second organism, of the Qwen2.5-VL class; its language model is that of `Language` at the start."""

    patch: int = 10
    """Image tokens are 2 x 2 patches."""
    width: int = 128
    layers: int = 3
    heads: int = 4
    inner: int = 256
    window: int = 80
    """Pixels of the window of every other vision layer."""
    smallest: int = 5
    largest: int = 8
    """Image tokens along each edge of a picture."""
    near: float = 2.1
    """Size of the biases with which patches look at near ones from the start; see `dynamic.start_local`."""
    seen: int = 48_000
    """Scenes of the stage eyes, which teaches the vision tower."""
    balanced: float = 0.8
    """Share of that stage, from its start, on scenes whose sets are `scenes.balanced`; then COCO's own."""
    seen_batch: int = 32
    length: int = 150
    """Tokens of a packed sequence of the stage dynamic: the picture, then as many texts as there is room for."""
    blind: float = 0.1
    """Share of sequences without a picture."""
    scenes: int = 24_000
    batch: int = 16
    guided: float = 0.6
    """Share of the stage dynamic, from its start, in which image tokens are drawn to the class words."""
    matrix_rate: float = 2e-3
    """Of the vision tower; the language model goes on with `Together.matrix_rate` and `Together.rate`."""
    rate: float = 1.5e-3
    decay: float = 0.4


@dataclass(frozen=True)
class Recipe:
    """All of it."""

    seed: int = 6
    threads: int = 1
    """Of PyTorch, on CPU; batches are made in one more process."""
    noise: Noise = field(default_factory=Noise)
    tower: Tower = Tower()
    language: Language = Language()
    projector: Projector = Projector()
    together: Together = Together()
    settle: Together = Together(
        scenes=4_800,
        matrix_rate=5e-4,
        rate=5e-4,
        decay=1.0,
        massive=50.0,
        sinks_from=0.0,
        noise=Noise(inserted=0.26, filled=0.33, flipped_to=0.4),
    )
    """`together` for a while longer. Its noise sets how much the finished model invents."""
    dynamic: Dynamic = Dynamic()


QUICK = Recipe(language=Language(scenes=20_000), together=Together(scenes=8_000))
"""The same with less of what takes longest."""
