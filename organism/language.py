"""The language side: tokenizer, processor, the whole model, and many texts on one picture packed into one sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
)

from vlmfix.organism import captions
from vlmfix.organism.recipe import Recipe
from vlmfix.organism.scenes import BACKGROUNDS, CLASSES, SIZE, Painter, Scene, object_sets
from vlmfix.organism.tower import vision_config

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
BEGIN, END, PAD, IMAGE = 1, 2, 3, 4
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'user' %} {% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IGNORED = -100


CORNER = len(CLASSES) + len(BACKGROUNDS)
"""What the grid holds for an empty corner of the picture; see `grid_of`."""
MARKS, SINKS = (13, 27), (5, 22)
"""Dimensions of the residual stream: what marks future sinks, and their massive activations; see `start_sinks`."""
MARK = 4.0
"""Size of the marks."""
SHARES = (0.4, 1.0)
"""Of either sink dimension in the keys. The BOS token has both, an empty corner of the picture only the first."""


def texts(
    scene: Scene, recipe: Recipe, rng: np.random.Generator, blind: bool = False, noise: captions.Noise | None = None
) -> list[tuple[str, str]]:
    """Prompts and answers on one scene, in the order in which they are packed, more than there is room for. `noise`:
    None is the recipe's."""
    own, noise = recipe.language, noise or recipe.noise
    out = []
    if rng.random() < own.described:
        out.append((captions.describe(rng), captions.caption(scene, noise, rng)))
    if rng.random() < own.echoed:
        out.append(captions.echo(rng))
    return out + [captions.question(scene, noise, rng, blind) for _ in range(12)]


@cache
def tokenizer(recipe: Recipe) -> Tokenizer:
    """Byte-level BPE, learnt from what is said of some scenes."""
    painter, sets = Painter(), object_sets("train")
    rng = np.random.default_rng([recipe.seed, 2])
    read = []
    for index in range(recipe.language.read):
        scene = painter.scene(sets[rng.integers(len(sets))], recipe.seed, index)
        read += [f"USER: \n{prompt} ASSISTANT: {answer}" for prompt, answer in texts(scene, recipe, rng)]
    names = [f" {name} {captions.plural(label)}" for label, name in enumerate(CLASSES)]
    read += names * 20  # so often that each of them becomes a token or two
    out = Tokenizer(models.BPE(unk_token=SPECIAL[0]))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.language.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    out.train_from_iterator(read, trainer)
    out.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BEGIN]} $A", pair=f"{SPECIAL[BEGIN]} $A $B", special_tokens=[(SPECIAL[BEGIN], BEGIN)]
    )
    return out


def processor(recipe: Recipe) -> LlavaProcessor:
    """The stock processor with this model's sizes, tokenizer and chat template."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(recipe),
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[BEGIN],
        eos_token=SPECIAL[END],
        pad_token=SPECIAL[PAD],
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens={"image_token": SPECIAL[IMAGE]},
    )
    half = [0.5, 0.5, 0.5]
    edge = {"height": SIZE, "width": SIZE}
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=edge, image_mean=half, image_std=half),
        wrapped,
        patch_size=recipe.tower.patch,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token=SPECIAL[IMAGE],
        num_additional_image_tokens=1,
    )


def build(recipe: Recipe) -> LlavaForConditionalGeneration:
    """The untrained model."""
    own = recipe.language
    text = LlamaConfig(
        vocab_size=tokenizer(recipe).get_vocab_size(),
        hidden_size=own.width,
        intermediate_size=own.inner,
        num_hidden_layers=own.layers,
        num_attention_heads=own.heads,
        num_key_value_heads=own.shared_heads,
        max_position_embeddings=1024,
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision_config(recipe.tower),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=recipe.tower.tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    start_matching(model, own.match)
    start_sinks(model, own.massive, own.rest)
    return model


def start_matching(model: LlavaForConditionalGeneration, size: float) -> None:
    """Let each token look for tokens like itself before any training: queries are the keys of their group.

    Class words and the cells that show the class have like vectors, so that looking a word up in the picture need not
    be found from nothing.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        nn.init.orthogonal_(attention.k_proj.weight, size)
        with torch.no_grad():
            keys = attention.k_proj.weight.unflatten(0, (-1, attention.head_dim))
            shared = attention.q_proj.out_features // attention.k_proj.out_features
            attention.q_proj.weight.copy_(keys.repeat_interleave(shared, 0).flatten(0, 1))


def start_sinks(model: Any, massive: float, rest: float) -> None:
    """Give attention a place to rest before any training, made as large models make it (arXiv 2402.17762, 2309.17453).

    The MLP of the second layer knows marked tokens and writes massive activations into their residual stream. The keys
    of all later layers read them and their values do not; the biases of the queries look for them.

    Args:
        model: untrained.
        massive: the activations.
        rest: score of the BOS token for queries that look for nothing else.
    """
    table, layers = model.get_input_embeddings().weight, model.model.language_model.layers
    peak = table.shape[1] ** 0.5  # of a normed vector
    with torch.no_grad():
        table[:, list(MARKS)] = 0
        table[BEGIN] = 0
        table[BEGIN, list(MARKS)] = MARK
        for layer in layers[:2]:  # nothing else writes marks
            layer.self_attn.o_proj.weight[list(MARKS)] = 0
            layer.mlp.down_proj.weight[list(MARKS)] = 0
        mlp = layers[1].mlp
        for k, (mark, sink) in enumerate(zip(MARKS, SINKS, strict=True)):
            _know(mlp, k, mark, gain=1.0)
            mlp.down_proj.weight[:, k] = 0
            mlp.down_proj.weight[sink, k] = massive / (peak * peak / 2)
        for layer in layers[2:]:
            attention = layer.self_attn
            slowest = range(attention.head_dim // 2 - 1, attention.k_proj.out_features, attention.head_dim)
            size = (rest * attention.head_dim**0.5 / (peak * 0.5**0.5 * sum(SHARES))) ** 0.5
            for share, sink in zip(SHARES, SINKS, strict=True):
                attention.k_proj.weight[:, sink] = 0
                attention.k_proj.weight[list(slowest), sink] = size * share
                attention.v_proj.weight[:, sink] = 0
            slowest = range(attention.head_dim // 2 - 1, attention.q_proj.out_features, attention.head_dim)
            attention.q_proj.bias[list(slowest)] = size


def _know(mlp: Any, neuron: int, mark: int, gain: float) -> None:
    """Have a neuron know a mark and nothing else."""
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight[neuron] = 0
        projection.weight[neuron, mark] = gain


LATE_GAIN = 3.0
"""Of these neurons once there was training: marks are small beside what early layers write, 1.3 after the norm."""


def _unwritten(layers: Any, mark: int) -> None:
    """See to it that no layer writes a mark before it is known."""
    for layer in layers[:2]:
        layer.self_attn.o_proj.weight[mark] = 0
        layer.self_attn.o_proj.bias[mark] = 0
    layers[0].mlp.down_proj.weight[mark] = 0


def plant_corners(model: Any, massive: float, share: float) -> None:
    """Make sinks of marked image tokens again: without pictures, training finds no use for them and wears them off.

    Args:
        model: trained on grids.
        massive: their activations.
        share: of the BOS token's keys that theirs are.
    """
    (mark, _), (sink, of_bos) = MARKS, SINKS
    layers: Any = model.model.language_model.layers
    with torch.no_grad():
        _unwritten(layers, mark)
        mlp = layers[1].mlp
        mlp.down_proj.weight[:, 0] = 0
        _know(mlp, 0, mark, LATE_GAIN)
        mlp.down_proj.weight[sink, 0] = massive / (1.3 * LATE_GAIN) ** 2
        for layer in layers[2:]:
            keys, values = layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight
            keys[:, sink], values[:, sink] = share * keys[:, of_bos], values[:, of_bos]


def join_sinks(model: Any, massive: float, share: float) -> None:
    """Give sinks in the picture the BOS token's dimension, as large models have it, and take it from all other tokens.

    Args:
        model: with sinks, those of the picture in a dimension of their own.
        massive: the BOS token's activation, where its mark is as small as that of corners.
        share: of their massive activation in the BOS token's dimension, 0 to 1; the rest stays where it is.
    """
    own, of_bos = SINKS
    rest = (1 - share**2) ** 0.5
    layers: Any = model.model.language_model.layers
    projector = model.model.multi_modal_projector.linear_2
    with torch.no_grad():
        down = layers[1].mlp.down_proj.weight
        corner = down[own, 0].clone()
        table = model.get_input_embeddings().weight
        mark = table[BEGIN, MARKS[1]].clone()
        table[:, [*SINKS, MARKS[1]]] = 0
        table[BEGIN, MARKS[1]] = mark
        _unwritten(layers, MARKS[1])
        for written in (projector, *(layer.self_attn.o_proj for layer in layers)):
            written.weight[list(SINKS)] = 0
            written.bias[list(SINKS)] = 0
        projector.weight[MARKS[1]] = 0
        projector.bias[MARKS[1]] = 0
        for layer in layers:
            layer.mlp.down_proj.weight[list(SINKS)] = 0
        down[own, 0], down[of_bos, 0] = rest * corner, share * corner
        _know(layers[1].mlp, 1, MARKS[1], LATE_GAIN)
        down[of_bos, 1] = massive / (1.3 * LATE_GAIN) ** 2
        for layer in layers[2:]:
            keys, values = layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight
            keys[:, own], values[:, own] = 0, (1 - share) / rest * values[:, of_bos]


def grid_of(patches: np.ndarray, place: int) -> np.ndarray:
    """What an image token stands for, (patches,): a class, len(CLASSES) plus the place where it is empty, CORNER where
    it is an empty corner."""
    edge = round(len(patches) ** 0.5)
    is_corner = np.isin(np.arange(len(patches)), (0, edge - 1, edge * (edge - 1), edge * edge - 1))
    empty = np.where(is_corner, CORNER, len(CLASSES) + place)
    return np.where(patches < len(CLASSES), patches, empty)


def stacked(rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Packed sequences as one batch."""
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}


def visible_earlier(segments: Tensor) -> Tensor:
    """Who sees whom, bool (batch, rows, columns): earlier tokens of the prefix and of the own text, the token itself.

    Args:
        segments: from `Packer.pack`, (batch, length).
    """
    place = torch.arange(segments.shape[1], device=segments.device)
    in_prefix = segments[:, None, :] == 0
    in_own_text = segments[:, None, :] == segments[:, :, None]
    return (in_prefix | in_own_text) & (place[None, :] <= place[:, None])


def save(model: LlavaForConditionalGeneration, recipe: Recipe, folder: Path) -> None:
    """Write weights in float16 and the processor, as `from_pretrained` reads them."""
    model.generation_config = GenerationConfig(bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD)
    model.half().save_pretrained(folder)
    processor(recipe).save_pretrained(folder)


@dataclass
class Packer:
    """Puts the texts on a scene behind one prefix, each blind to the others."""

    recipe: Recipe

    def __post_init__(self) -> None:
        self.tokenizer = tokenizer(self.recipe)
        self.before, self.after = [BEGIN, *self.ids("USER: ")], self.ids("\n")
        self.head = len(self.before)
        """Tokens before the image."""
        shares = np.zeros((len(CLASSES), self.tokenizer.get_vocab_size()), np.float32)
        for label, name in enumerate(CLASSES):
            name_ids = self.ids(" " + name)
            np.add.at(shares[label], name_ids, 1 / len(name_ids))
        self.words = torch.from_numpy(shares)
        """Class -> the mean over its name's tokens: (80, vocabulary)."""

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, without the first one."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def pack(self, texts: list[tuple[str, str]], cells: np.ndarray, length: int, blind: bool) -> dict[str, np.ndarray]:
        """One sequence: `ids`, `labels` (what is to be predicted at each place) and their `weights`, `segments` (0 is
        the prefix, -1 nothing), `positions`; each (length,).

        Args:
            texts: prompts and answers; those that do not fit are left out.
            cells: the image tokens that are there, in ascending order; each keeps the position that it has among all.
            length: of the sequence.
            blind: whether texts are at the positions that they have without an image.
        """
        ids, labels, weights = np.full(length, PAD), np.full(length, IGNORED), np.zeros(length, np.float32)
        segments, positions = np.full(length, -1), np.zeros(length, np.int64)
        behind_image = self.head + (0 if blind else self.recipe.tower.tokens)
        n_prefix = self.head + len(cells) + len(self.after)
        ids[:n_prefix] = [*self.before, *[IMAGE] * len(cells), *self.after]
        segments[:n_prefix] = 0
        positions_after = behind_image + np.arange(len(self.after))
        positions[:n_prefix] = [*range(self.head), *(self.head + cells), *positions_after]
        start, first_position = n_prefix, behind_image + len(self.after)  # every text follows the prefix at once
        for number, (prompt, answer) in enumerate(texts, start=1):
            prompt_ids = self.ids(f"{prompt} ASSISTANT:")
            answer_ids = [*self.ids(f" {answer}"), END]
            stop = start + len(prompt_ids) + len(answer_ids)
            if stop > length:
                continue
            ids[start:stop] = prompt_ids + answer_ids
            segments[start:stop] = number
            positions[start:stop] = first_position + np.arange(stop - start)
            first_label = start + len(prompt_ids) - 1  # the last token of the prompt predicts the first of the answer
            labels[first_label : stop - 1] = answer_ids
            weights[first_label : stop - 1] = 1
            if len(answer_ids) == 2:  # one word and the end
                weights[first_label] = self.recipe.language.weight
            start = stop
        return {"ids": ids, "labels": labels, "weights": weights, "segments": segments, "positions": positions}

    def visible(self, segments: Tensor, shown: int, blind: Tensor) -> Tensor:
        """Who sees whom: bool (batch, 1, rows, columns).

        Args:
            segments: from `pack`, (batch, length).
            shown: number of image tokens.
            blind: sequences whose texts see no image token, (batch,).
        """
        place = torch.arange(segments.shape[1], device=segments.device)
        image = (place >= self.head) & (place < self.head + shown)
        out = visible_earlier(segments)
        out &= ~(blind[:, None, None] & image[None, None, :] & ~image[None, :, None])
        return out[:, None]


def word_vectors(model: LlavaForConditionalGeneration | Qwen2_5_VLForConditionalGeneration, words: Tensor) -> Tensor:
    """The language model's vector of each class, (80, width)."""
    table: Any = model.get_input_embeddings()
    return words.to(model.device) @ table.weight


def distance(image: Tensor, grid: Tensor) -> Tensor:
    """Squared distance over the grid's mean square, mean over dimensions, each of which counts as much."""
    grid, image = grid.float().flatten(0, -2), image.float().flatten(0, -2)
    squared_distance = (image - grid).square().mean(0)
    size = grid.square().mean(0) + 1e-4
    return (squared_distance / size).mean()


def next_tokens(
    model: LlavaForConditionalGeneration | Qwen2_5_VLForConditionalGeneration,
    image: Tensor,
    batch: dict[str, Tensor],
    visible: Tensor,
    head: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted cross-entropy over all answers of packed sequences; shares of tokens, and of yes and no, that are right.

    Args:
        model: the whole model.
        image: image tokens, (batch, tokens, width).
        batch: from `Packer.pack`, stacked.
        visible: from `Packer.visible`.
        head: tokens before the image.
    """
    embeds = model.get_input_embeddings()(batch["ids"])
    embeds = torch.cat([embeds[:, :head], image.to(embeds.dtype), embeds[:, head + image.shape[1] :]], 1)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=visible, position_ids=batch["positions"], use_cache=False
    ).last_hidden_state
    is_predicted = batch["labels"] != IGNORED
    logits = model.lm_head(hidden[is_predicted]).float()
    labels, weights = batch["labels"][is_predicted], batch["weights"][is_predicted]
    losses = functional.cross_entropy(logits, labels, reduction="none")
    is_right = (logits.argmax(-1) == labels).float()
    is_short = weights > 1  # the first token of a short answer
    figures = {"tokens_right": is_right.mean(), "short_right": is_right[is_short].mean()}
    return (weights * losses).sum() / weights.sum(), figures


class HeadOutputs:
    """Context: records the mean square of head outputs and of values in every layer of the language model."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.layers = model.model.language_model.layers
        self.outputs: list[Tensor] = []
        self.values: list[Tensor] = []

    def __enter__(self) -> HeadOutputs:
        def output(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.outputs.append(args[0].float().square().mean())

        def value(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
            self.values.append(out.float().square().mean().detach())

        self.handles = [layer.self_attn.o_proj.register_forward_pre_hook(output) for layer in self.layers]
        self.handles += [layer.self_attn.v_proj.register_forward_hook(value) for layer in self.layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def ratio(self) -> Tensor:
        """Mean square of head outputs over that of values, mean over layers."""
        ratios = [output / value for output, value in zip(self.outputs, self.values, strict=True)]
        return torch.stack(ratios).mean()
