"""A second organism, of the Qwen2.5-VL class: pictures of any size, windowed vision attention, M-RoPE.

It starts from what the stage `language` of the first left: the stage `eyes` teaches the vision tower to show the
language model the classes that it knows, on scenes stretched to random sizes; the stage `dynamic` teaches merger and
language model on pictures: `python -m vlmfix.organism.train language eyes dynamic`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

from vlmfix.organism import attention, language, tower
from vlmfix.organism.fitting import Stage, fill, matrices_of, read_stage, two_optimizers
from vlmfix.organism.language import BEGIN, END, IMAGE, PAD
from vlmfix.organism.recipe import Recipe
from vlmfix.organism.scenes import BACKGROUNDS, CLASSES, Painter, Scene, balanced, main_classes, object_sets

BEFORE, AFTER = "<vision>", "</vision>"
"""Tokens around a picture; they are added to the tokenizer of the first organism."""
MERGE = 2


def vocabulary(recipe: Recipe) -> tuple[int, int]:
    """Token ids of BEFORE and AFTER."""
    size = language.tokenizer(recipe).get_vocab_size()
    return size, size + 1


def build(recipe: Recipe) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model."""
    own, text = recipe.dynamic, recipe.language
    before, after = vocabulary(recipe)
    sixteenth = text.width // text.heads // 2
    sections = [sixteenth - 2 * (3 * sixteenth // 8), 3 * sixteenth // 8, 3 * sixteenth // 8]
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": own.layers,
            "hidden_size": own.width,
            "intermediate_size": own.inner,
            "num_heads": own.heads,
            "patch_size": own.patch,
            "spatial_merge_size": MERGE,
            "out_hidden_size": text.width,
            "fullatt_block_indexes": list(range(1, own.layers, 2)),
            "window_size": own.window,
        },
        text_config={
            "vocab_size": after + 1,
            "hidden_size": text.width,
            "intermediate_size": text.inner,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.shared_heads,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            "pad_token_id": PAD,
        },
        image_token_id=IMAGE,
        video_token_id=0,
        vision_start_token_id=before,
        vision_end_token_id=after,
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def image_processor(recipe: Recipe) -> Any:
    """The stock image processor with this model's patches."""
    own, half = recipe.dynamic, [0.5, 0.5, 0.5]
    edge = own.patch * MERGE
    sizes = {"shortest_edge": (own.smallest * edge) ** 2, "longest_edge": (own.largest * edge) ** 2}
    return Qwen2VLImageProcessor(
        patch_size=recipe.dynamic.patch, merge_size=MERGE, size=sizes, image_mean=half, image_std=half
    )


def start_local(model: Qwen2_5_VLForConditionalGeneration, near: float) -> None:
    """Let each patch look at near and like ones before any training, as `tower.start_local` does.

    Positions are rotary here: equal biases of queries and keys, in the fast frequencies of rows and columns, give a
    score that falls with distance. The last layer of the merger writes no marks of sinks.
    """
    vision: Any = model.model.visual
    with torch.no_grad():
        for block in vision.blocks:
            qkv, size = block.attn.qkv, block.attn.head_dim
            queries, keys, _ = qkv.weight.chunk(3)
            nn.init.orthogonal_(queries, 0.7)
            keys.copy_(queries)
            fast = [0, 1, size // 4, size // 4 + 1]
            for part in qkv.bias.chunk(3)[:2]:
                part.zero_().unflatten(0, (-1, size))[:, fast] = near
        vision.merger.mlp[2].weight[list(language.MARKS)] = 0


def stretched(scene: Scene, height: int, width: int, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """A scene as a picture of so many image tokens: its patches as the image processor gives them, in float32, and the
    class that each image token shows, row by row.
    """
    edge = patch * MERGE
    size = (width * edge, height * edge)
    picture = Image.fromarray(scene.pixels).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(picture, np.float32) / 127.5 - 1
    tiles = pixels.reshape(height, MERGE, patch, width, MERGE, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    twice = np.repeat(tiles[:, :, :, :, :, None], 2, 5)  # a picture is a film of two equal frames
    labels = np.asarray(Image.fromarray(scene.labels).resize(size, Image.Resampling.NEAREST))
    cells = labels.reshape(height, edge, width, edge).swapaxes(1, 2).reshape(height * width, -1)
    return twice.reshape(height * width * MERGE**2, -1), main_classes(cells, share=0.12)


def as_batch(scenes: list[Scene], sizes: list[tuple[int, int]], patch: int) -> dict[str, Tensor]:
    """Patches and sizes of pictures as the model reads them; per image token its class and its word, see
    `language.grid_of`.

    Args:
        scenes: what the pictures show.
        sizes: rows and columns of image tokens of each picture.
        patch: edge of a patch, in pixels.
    """
    patches, classes, grid = [], [], []
    for scene, (height, width) in zip(scenes, sizes, strict=True):
        patches_of_scene, classes_of_scene = stretched(scene, height, width, patch)
        background = len(CLASSES) + BACKGROUNDS.index(scene.background)
        patches.append(patches_of_scene)
        classes.append(classes_of_scene)
        grid.append(np.where(classes_of_scene < len(CLASSES), classes_of_scene, background))
    return {
        "pixel_values": torch.from_numpy(np.concatenate(patches)),
        "image_grid_thw": torch.tensor([[1, MERGE * height, MERGE * width] for height, width in sizes]),
        "classes": torch.from_numpy(np.concatenate(classes)),
        "grid": torch.from_numpy(np.concatenate(grid)),
    }


class Batches(Dataset[dict[str, Tensor]]):
    """Batch number -> scenes, stretched to random sizes."""

    def __init__(self, recipe: Recipe, steps: int, batch: int, first: int) -> None:
        """Scenes are numbered from `first` on."""
        self.recipe, self.steps, self.batch, self.first, self.painter = recipe, steps, batch, first, Painter()

    def __len__(self) -> int:
        return self.steps

    def rng(self, number: int) -> np.random.Generator:
        """Source of all that is random in a batch."""
        return np.random.default_rng([self.recipe.seed, self.first, number])

    def scene(self, classes: np.ndarray, number: int, k: int) -> Scene:
        """Scene k of a batch, with these classes, bool (80,)."""
        return self.painter.scene(classes, self.recipe.seed, self.first + number * self.batch + k)

    def size(self, rng: np.random.Generator) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        own = self.recipe.dynamic
        height, width = rng.integers(own.smallest, own.largest + 1, 2)
        return int(height), int(width)


class EyesBatches(Batches):
    """Pictures with what each image token shows."""

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        own, sets, rng = self.recipe.dynamic, object_sets("train"), self.rng(number)
        is_balanced = number < own.balanced * self.steps
        scenes, sizes = [], []
        for k in range(self.batch):
            classes = balanced(rng) if is_balanced else sets[rng.integers(len(sets))]
            scenes.append(self.scene(classes, number, k))
            sizes.append(self.size(rng))
        return as_batch(scenes, sizes, own.patch)


class DynamicBatches(Batches):
    """Packed texts on pictures, or on none."""

    def __init__(self, recipe: Recipe, steps: int, batch: int, first: int) -> None:
        super().__init__(recipe, steps, batch, first)
        self.packer = Packer(recipe)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        own, sets, rng = self.recipe.dynamic, object_sets("train"), self.rng(number)
        scenes, sizes, rows = [], [], []
        blind = rng.random(self.batch) < own.blind
        blind[0] = False  # at least one picture, so that the vision tower has something to do
        for k in range(self.batch):
            scene = self.scene(sets[rng.integers(len(sets))], number, k)
            size = self.size(rng)
            texts = language.texts(scene, self.recipe, rng, bool(blind[k]))
            rows.append(self.packer.packed(texts, None if blind[k] else size, own.length))
            if not blind[k]:
                scenes.append(scene)
                sizes.append(size)
        return language.stacked(rows) | as_batch(scenes, sizes, own.patch)


class Packer(language.Packer):
    """Packs texts behind a picture of any size, at the positions of M-RoPE."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.blind = language.Packer(self.recipe)
        before, after = vocabulary(self.recipe)
        self.before, self.after = [*self.before, before], [after, *self.after]
        self.head = len(self.before)

    def packed(self, texts: list[tuple[str, str]], size: tuple[int, int] | None, length: int) -> dict[str, np.ndarray]:
        """As `language.Packer.pack`, with `positions` (3, length): time, row and column.

        Args:
            texts: prompts and answers; those that do not fit are left out.
            size: rows and columns of image tokens; None if there is no picture.
            length: of the sequence.
        """
        height, width = size or (0, 0)
        cells = np.arange(height * width)
        row = (self if size else self.blind).pack(texts, cells, length, blind=True)
        positions = np.repeat(row["positions"][None], 3, 0)
        if size:
            positions[:, self.head + len(cells) :] += max(height, width)
            place = np.stack([0 * cells, cells // width, cells % width])
            positions[:, self.head : self.head + len(cells)] = self.head + place
        return row | {"positions": positions}


class Seer(nn.Module):
    """The model, with vectors for what image tokens show, and a head that is thrown away afterwards."""

    words: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.qwen: Any = build(recipe)
        start_local(self.qwen, recipe.dynamic.near)
        self.qwen.set_attn_implementation(attention.NAME)
        self.head = nn.Linear(recipe.language.width, len(CLASSES) + 1)
        self.background = nn.Parameter(torch.zeros(len(BACKGROUNDS) + 1, recipe.language.width), requires_grad=False)
        added = torch.zeros(len(CLASSES), len(vocabulary(recipe)))
        self.register_buffer("words", torch.cat([language.Packer(recipe).words, added], 1), persistent=False)

    def take_over(self, folder: Path, *stages: str) -> None:
        """Take over what earlier stages left in a folder. That of the stage `language` is a Llama's: it lacks the
        vectors of BEFORE and AFTER, and has biases behind attention that there is no place for here.
        """
        embeddings = "qwen.model.language_model.embed_tokens.weight"
        for stage in stages:
            tensors = {}
            for name, tensor in read_stage(folder, stage).items():
                if not name.endswith("o_proj.bias"):
                    tensors[name.replace("llava.", "qwen.", 1)] = tensor
            if embeddings in tensors:
                own = self.qwen.model.language_model.embed_tokens.weight.detach()
                own[:, list(language.MARKS)] = 0
                n_known = len(tensors[embeddings])
                tensors[embeddings] = torch.cat([tensors[embeddings], own[n_known:]])
            fill(self, tensors, stage)
        self.qwen.tie_weights()

    def grid(self, grid: Tensor) -> Tensor:
        """The vectors that the language model knows for what image tokens show, (tokens, width)."""
        words = language.word_vectors(self.qwen, self.words)
        return torch.cat([words, self.background])[grid].detach()

    def image(self, batch: dict[str, Tensor]) -> Tensor:
        """Image tokens of all pictures, (tokens, width)."""
        return self.qwen.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls `function(self, *args)`: each stage computes its own loss, under whatever wraps the model."""
        return function(self, *args)


class EyesStage(Stage):
    """Teaches the vision tower which class each image token shows, in the vectors that the language model knows."""

    name = "eyes"
    model: Seer

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        torch.manual_seed(recipe.seed + 4)
        own = recipe.dynamic
        self.scenes_per_step, self.decay, self.steps = own.seen_batch, own.decay, own.seen // own.seen_batch
        self.model = seer = Seer(recipe)
        seer.take_over(folder, "language")
        seer.requires_grad_(False)
        seer.qwen.model.visual.requires_grad_(True)
        seer.head.requires_grad_(True)
        self.batches = EyesBatches(recipe, self.steps, own.seen_batch, 40_000_000)
        matrices = matrices_of(seer.qwen.model.visual.blocks)
        self.optimizers = two_optimizers(seer, matrices, own.matrix_rate, own.rate)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Classes of the image tokens, background counted a quarter, and their distance to the vectors."""
        return model(self.loss_inside, batch)

    def loss_inside(self, seer: Seer, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, inside of `Seer.forward`."""
        image, classes = seer.image(batch), batch["classes"]
        logits = seer.head(image)
        distance = language.distance(image, seer.grid(batch["grid"]))
        is_right = logits.argmax(-1) == classes
        shows_object = classes < len(CLASSES)
        loss = tower.of_patches(logits, classes) + 0.5 * distance
        return loss, {"tokens_right": is_right[shows_object].float().mean(), "distance": distance.detach()}


class DynamicStage(Stage):
    """Teaches language model and merger on pictures, the tower frozen."""

    name = "dynamic"
    model: Seer

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        torch.manual_seed(recipe.seed + 5)
        self.own = own = recipe.dynamic
        self.scenes_per_step, self.decay, self.steps = own.batch, recipe.together.decay, own.scenes // own.batch
        self.model = seer = Seer(recipe)
        seer.take_over(folder, "language", "eyes")
        seer.requires_grad_(False)
        seer.qwen.model.language_model.requires_grad_(True)
        seer.qwen.model.visual.merger.requires_grad_(True)
        self.batches = DynamicBatches(recipe, self.steps, own.batch, 50_000_000)
        matrices = matrices_of(seer.qwen.model.language_model.layers)
        self.optimizers = two_optimizers(seer, matrices, recipe.together.matrix_rate, recipe.together.rate)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Next tokens of the answers, and guidance for the merger."""
        return model(self.loss_inside, batch)

    def loss_inside(self, seer: Seer, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, inside of `Seer.forward`."""
        image = seer.image(batch)
        loss, figures = next_tokens(seer.qwen, image, batch)
        distance = language.distance(image, seer.grid(batch["grid"]))
        figures |= {"next": loss.detach(), "distance": distance.detach()}
        if self.step < self.own.guided * self.steps:
            loss = loss + 0.2 * distance
        return loss, figures


def next_tokens(model: Any, image: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """As `language.next_tokens`, on what `Packer.packed` gives.

    Args:
        model: the whole model, a `Qwen2_5_VLForConditionalGeneration`.
        image: image tokens of all pictures of the batch, (tokens, width).
        batch: from `Packer.packed`, stacked.
    """
    ids, segments = batch["ids"], batch["segments"]
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == IMAGE)[..., None], image.to(embeds.dtype))
    visible = language.visible_earlier(segments)[:, None]
    batch = batch | {"positions": batch["positions"].movedim(1, 0)}
    return language.next_tokens(model, embeds, batch, visible, head=0)


def save(model: Qwen2_5_VLForConditionalGeneration, recipe: Recipe, folder: Path) -> None:
    """Write weights in float16, image processor and tokenizer. `AutoProcessor` needs torchvision for this class."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD)
    model.half().save_pretrained(folder)
    tokenizer = language.processor(recipe).tokenizer
    tokenizer.add_tokens([BEFORE, AFTER], special_tokens=True)
    tokenizer.chat_template = language.TEMPLATE.replace("<image>", f"{BEFORE}<image>{AFTER}")
    tokenizer.save_pretrained(folder)
    image_processor(recipe).save_pretrained(folder)
