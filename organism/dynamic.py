"""A second organism, of the Qwen2.5-VL class: pictures of any size, windowed vision attention, M-RoPE.

One stage, `dynamic`, teaches everything at once with the stock forward: scenes are stretched to random sizes, each with
one text, and the vision tower also learns which class each image token shows. Not part of the default stages:
`python -m vlmfix.organism.train dynamic`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

from vlmfix.organism import captions, language
from vlmfix.organism.fitting import Stage, two_optimizers
from vlmfix.organism.language import BEGIN, END, IGNORED, IMAGE, PAD
from vlmfix.organism.recipe import Recipe
from vlmfix.organism.scenes import CLASSES, Painter, object_sets

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
    edge = recipe.dynamic.patch * MERGE
    half = [0.5, 0.5, 0.5]
    sizes = {"shortest_edge": (2 * edge) ** 2, "longest_edge": (16 * edge) ** 2}
    return Qwen2VLImageProcessor(
        patch_size=recipe.dynamic.patch, merge_size=MERGE, size=sizes, image_mean=half, image_std=half
    )


class DynamicBatches(Dataset[dict[str, Tensor]]):
    """Batch number -> stretched pictures, a text on each, and the class that each image token shows."""

    def __init__(self, recipe: Recipe, steps: int) -> None:
        self.recipe, self.steps, self.painter = recipe, steps, Painter()
        self.packer, self.processor = language.Packer(recipe), image_processor(recipe)
        self.before, self.after = vocabulary(recipe)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        own, sets, seed = self.recipe.dynamic, object_sets("train"), self.recipe.seed
        rng = np.random.default_rng([seed, 40_000_000, number])
        pictures, grids, rows = [], [], []
        for k in range(own.batch):
            scene = self.painter.scene(sets[rng.integers(len(sets))], seed, 40_000_000 + number * own.batch + k)
            height, width = (int(n) for n in rng.integers(own.smallest, own.largest + 1, 2))
            size = (width * own.patch * MERGE, height * own.patch * MERGE)
            pictures.append(Image.fromarray(scene.pixels).resize(size, Image.Resampling.BICUBIC))
            shown = Image.fromarray(scene.labels).resize(size, Image.Resampling.NEAREST)
            tiles = np.asarray(shown).reshape(height, size[1] // height, width, size[0] // width).swapaxes(1, 2)
            counts = (tiles.reshape(height * width, -1, 1) == np.arange(len(CLASSES))).mean(1)
            grids.append(np.where(counts.max(1) >= 0.12, counts.argmax(1), len(CLASSES)))
            describing = rng.random() < own.described
            prompt, answer = (
                (captions.describe(rng), captions.caption(scene, self.recipe.noise, rng))
                if describing
                else captions.question(scene, self.recipe.noise, rng)
            )
            asked = [BEGIN, *self.packer.ids("USER: "), self.before, *[IMAGE] * (height * width), self.after]
            asked += self.packer.ids(f"\n{prompt} ASSISTANT:")
            rows.append((asked, [*self.packer.ids(f" {answer}"), END]))
        length = max(len(asked) + len(told) for asked, told in rows)
        ids = np.full((own.batch, length), PAD)
        labels, mask = np.full_like(ids, IGNORED), np.zeros_like(ids)
        for k, (asked, told) in enumerate(rows):
            stop = len(asked) + len(told)
            ids[k, :stop], labels[k, len(asked) : stop], mask[k, :stop] = asked + told, told, 1
        made = self.processor(pictures, return_tensors="pt")
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "attention_mask": torch.from_numpy(mask),
            "mm_token_type_ids": torch.from_numpy((ids == IMAGE).astype(np.int64)),
            "pixel_values": made["pixel_values"],
            "image_grid_thw": made["image_grid_thw"],
            "shown": torch.from_numpy(np.concatenate(grids)),
        }


class Shower(nn.Module):
    """The model, and a head that says which class an image token shows; the head is thrown away afterwards."""

    qwen: Qwen2_5_VLForConditionalGeneration

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.qwen = build(recipe)
        self.head = nn.Linear(recipe.language.width, len(CLASSES) + 1)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss of the answers, and logits of the image tokens' classes, (tokens, 81)."""
        seen: list[Tensor] = []
        handle = self.qwen.model.visual.register_forward_hook(lambda _, __, out: seen.append(out.pooler_output))
        try:
            loss = self.qwen(**{key: value for key, value in batch.items() if key != "shown"}, use_cache=False).loss
        finally:
            handle.remove()
        return loss, self.head(seen[0])


class DynamicStage(Stage):
    """Teaches the second organism."""

    name = "dynamic"
    model: Shower

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        torch.manual_seed(recipe.seed + 4)
        own = recipe.dynamic
        self.scenes_per_step, self.decay, self.steps = own.batch, own.decay, own.scenes // own.batch
        self.model, self.batches = Shower(recipe), DynamicBatches(recipe, self.steps)
        qwen = self.model.qwen.model
        blocks = [*qwen.language_model.layers.parameters(), *qwen.visual.blocks.parameters()]
        self.optimizers = two_optimizers(self.model, [p for p in blocks if p.ndim == 2], own.matrix_rate, own.rate)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Next tokens of the answers and classes of the image tokens."""
        answers, classes = model(batch)
        shown = batch["shown"]
        weights = torch.ones(len(CLASSES) + 1, device=shown.device)
        weights[-1] = 0.25
        seen = functional.cross_entropy(classes.float(), shown, weights)
        right = (classes.argmax(-1) == shown)[shown < len(CLASSES)].float().mean()
        return answers + seen, {"next": answers.detach(), "patch_accuracy": right}


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
