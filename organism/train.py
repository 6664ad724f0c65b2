"""Makes the model: `python -m vlmfix.organism.train [STAGE ...]`, or under `accelerate launch -m` on GPUs.

Stages: tower (scenes and the classes of their patches), language (captions and questions on grids of classes),
projector (from tower to grid), together (all on pictures), settle (the same for a while, with sinks as large models
have them); then the model is written to a folder. A stage that is done is skipped; one that was stopped goes on.
After the stage language, eyes and dynamic make the second organism, of the Qwen2.5-VL class.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from vlmfix.organism import attention, dynamic, language, tower
from vlmfix.organism.captions import Noise
from vlmfix.organism.fitting import Stage, fill, fit, matrices_of, read_stage, two_optimizers
from vlmfix.organism.recipe import QUICK, Recipe, Together
from vlmfix.organism.scenes import BACKGROUNDS, CLASSES, Painter, Scene, balanced, object_sets


def pixel_values(scenes: list[Scene]) -> Tensor:
    """Pictures as the processor gives them: (batch, 3, SIZE, SIZE), -1 to 1."""
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes]))
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def present_classes(scenes: list[Scene]) -> Tensor:
    """Which classes pictures show in 40 pixels or more: (batch, 80), 1 or 0."""
    present = torch.zeros(len(scenes), len(CLASSES))
    for row, scene in zip(present, scenes, strict=True):
        row[[placed.label for placed in scene.objects if placed.area >= 40]] = 1
    return present


class TowerBatches(Dataset[dict[str, Tensor]]):
    """Batch number -> pictures with what each patch shows."""

    def __init__(self, recipe: Recipe, steps: int, batch: int, first: int = 0, crowded: float = 0.0) -> None:
        """Scenes are numbered from `first` on; up to the share `crowded` of the steps their sets are balanced."""
        self.recipe, self.steps, self.batch, self.first, self.crowded = recipe, steps, batch, first, crowded
        self.painter = Painter()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        recipe = self.recipe.tower
        rng = np.random.default_rng([self.recipe.seed, self.first + number])
        is_balanced = number < self.crowded * self.steps
        sets = object_sets("train")
        scenes, patches, grids = [], [], []
        for k in range(self.batch):
            classes = balanced(rng) if is_balanced else sets[rng.integers(len(sets))]
            scene = self.painter.scene(classes, self.recipe.seed, self.first + number * self.batch + k)
            patches_of_scene = scene.patches(recipe.patch)
            scenes.append(scene)
            patches.append(patches_of_scene)
            grids.append(language.grid_of(patches_of_scene, BACKGROUNDS.index(scene.background)))
        patch_classes = torch.from_numpy(np.stack(patches))
        batch = {"pixels": pixel_values(scenes), "patches": patch_classes, "present": present_classes(scenes)}
        batch["grid"] = torch.from_numpy(np.stack(grids))
        if is_balanced:
            shows_object = patch_classes < len(CLASSES)
            order = torch.from_numpy(rng.random(patch_classes.shape)) + shows_object  # objects first, the rest by lot
            batch["kept"] = order.topk(recipe.kept, dim=1).indices
            batch["patches"] = patch_classes.gather(1, batch["kept"])
        return batch


class TowerStage(Stage):
    """Teaches the vision tower."""

    name = "tower"

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        torch.manual_seed(recipe.seed)
        own = recipe.tower
        self.scenes_per_step, self.decay, self.steps = own.batch, own.decay, own.scenes // own.batch
        classifier = tower.Classifier(own)
        classifier.vision.set_attn_implementation(attention.NAME)
        self.model = classifier
        self.batches = TowerBatches(recipe, self.steps, own.batch, crowded=own.balanced)
        matrices = matrices_of(tower.core(classifier.vision).encoder)
        self.optimizers = two_optimizers(classifier, matrices, own.matrix_rate, own.rate)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Classes of patches and of the picture; the log gets the accuracy on patches that show an object."""
        outputs = model(batch["pixels"], batch.get("kept"))
        is_right = outputs[0].argmax(-1) == batch["patches"]
        shows_object = batch["patches"] < len(CLASSES)
        accuracy = is_right[shows_object].float().mean()
        return tower.loss(outputs, batch["patches"], batch["present"]), {"patch_accuracy": accuracy}


class TextBatches(Dataset[dict[str, Tensor]]):
    """Batch number -> packed texts on scenes, with the grid of their classes, and with the pictures if wanted."""

    def __init__(
        self, recipe: Recipe, steps: int, batch: int, cells: int, first: int, pictures: bool, noise: Noise | None = None
    ) -> None:
        """Scenes are numbered from `first` on, so that stages see different ones. `noise`: None is the recipe's."""
        self.noise = noise
        self.recipe, self.steps, self.batch, self.cells = recipe, steps, batch, cells
        self.first, self.pictures, self.painter, self.packer = first, pictures, Painter(), language.Packer(recipe)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        own, sets, seed = self.recipe.language, object_sets("train"), self.recipe.seed
        rng = np.random.default_rng([seed, self.first, number])
        length = self.packer.head + self.cells + len(self.packer.after) + own.text
        scenes, rows, grids = [], [], []
        blind = rng.random(self.batch) < own.blind
        for k in range(self.batch):
            index = self.first + number * self.batch + k
            scene = self.painter.scene(sets[rng.integers(len(sets))], seed, index)
            cells, grid = self._grid(scene, rng)
            texts = language.texts(scene, self.recipe, rng, bool(blind[k]), self.noise)
            scenes.append(scene)
            rows.append(self.packer.pack(texts, cells, length, bool(blind[k])))
            grids.append(grid)
        batch = language.stacked(rows)
        batch |= {"grid": torch.from_numpy(np.stack(grids)), "blind": torch.from_numpy(blind)}
        return batch | ({"pixels": pixel_values(scenes)} if self.pictures else {})

    def _grid(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The cells of a scene that are given, in ascending order, and what each of them stands for; with errors where
        there are no pictures, since no tower sees everything."""
        own = self.recipe.language
        classes = scene.patches(self.recipe.tower.patch)
        shows_object = classes < len(CLASSES)
        place = BACKGROUNDS.index(scene.background)
        comes_first = shows_object | (language.grid_of(classes, place) == language.CORNER)
        cells = np.sort(np.argsort(-(rng.random(len(classes)) + comes_first))[: self.cells])
        if not self.pictures:
            is_missed = shows_object & (rng.random(len(classes)) < own.missed)
            classes = np.where(is_missed, len(CLASSES), classes)
            is_confused = rng.random(len(classes)) < own.confused
            classes = np.where(is_confused, rng.integers(0, len(CLASSES), len(classes)), classes)
        return cells, language.grid_of(classes, place)[cells]


class Reader(nn.Module):
    """The whole model, with vectors for cells of the grid that show nothing."""

    words: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.llava = language.build(recipe)
        self.llava.set_attn_implementation(attention.NAME)
        self.llava.model.vision_tower.requires_grad_(False)
        self.background = nn.Parameter(0.02 * torch.randn(len(BACKGROUNDS) + 1, recipe.language.width))
        self.background.data[:, language.MARKS] = 0
        self.background.data[-1, language.MARKS[0]] = language.MARK
        self.register_buffer("words", language.Packer(recipe).words, persistent=False)

    def grid(self, classes: Tensor) -> Tensor:
        """What the language model reads where a perfect tower saw this (`language.grid_of`), (batch, cells, width)."""
        vectors = torch.cat([language.word_vectors(self.llava, self.words), self.background])
        return vectors[classes]

    def image(self, pixels: Tensor) -> Tensor:
        """Projected image tokens, (batch, tokens, width)."""
        with torch.no_grad():
            features = self.llava.model.vision_tower(pixels).last_hidden_state[:, 1:]
        return self.llava.model.multi_modal_projector(features)

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls `function(self, *args)`: each stage computes its own loss, under whatever wraps the model."""
        return function(self, *args)


class LanguageStage(Stage):
    """Teaches the language model to speak of grids of classes, before there is a tower."""

    name = "language"

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        torch.manual_seed(recipe.seed + 1)
        own = recipe.language
        self.scenes_per_step, self.decay, self.steps = own.batch, own.decay, own.scenes // own.batch
        self.model = reader = Reader(recipe)
        reader.llava.model.multi_modal_projector.requires_grad_(False)
        self.batches = TextBatches(recipe, self.steps, own.batch, own.cells, 10_000_000, pictures=False)
        matrices = matrices_of(reader.llava.model.language_model.layers)
        self.optimizers = two_optimizers(reader, matrices, own.matrix_rate, own.rate)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Next tokens of the answers."""
        return model(self.loss_inside, batch)

    def loss_inside(self, reader: Reader, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, inside of `Reader.forward`."""
        packer, blind = self.batches.packer, batch["blind"]
        visible = packer.visible(batch["segments"], batch["grid"].shape[1], blind)
        return language.next_tokens(reader.llava, reader.grid(batch["grid"]), batch, visible, packer.head)


class ProjectorStage(Stage):
    """Fits the projector to the grid that the language model can read."""

    name = "projector"

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        torch.manual_seed(recipe.seed + 2)
        own = recipe.projector
        self.scenes_per_step, self.decay, self.steps = own.batch, own.decay, own.scenes // own.batch
        self.model = reader = Reader(recipe)
        load(reader, folder, "tower", "language")
        reader.requires_grad_(False)
        reader.llava.model.multi_modal_projector.requires_grad_(True)
        self.batches = TowerBatches(recipe, self.steps, own.batch, 20_000_000, crowded=0)
        trained = [parameter for parameter in reader.parameters() if parameter.requires_grad]
        self.optimizers = [torch.optim.AdamW(trained, lr=own.rate, betas=(0.9, 0.98), weight_decay=0.0)]

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance to the grid."""
        return model(guidance, batch["pixels"], batch["grid"]), {}


def guidance(reader: Reader, pixels: Tensor, grid: Tensor) -> Tensor:
    """How far projected tokens are from the grid's vectors."""
    return language.distance(reader.image(pixels), reader.grid(grid).detach())


class TogetherStage(Stage):
    """Teaches projector and language model on pictures."""

    name = "together"
    model: Reader
    first = 30_000_000

    def settings(self, recipe: Recipe) -> Together:
        """Its part of the recipe."""
        return recipe.together

    def start(self, folder: Path) -> None:
        """What it goes on from."""
        load(self.model, folder, "tower", "language", "projector")
        language.plant_corners(self.model.llava, self.own.massive, self.own.share)

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        torch.manual_seed(recipe.seed + 3)
        self.own = own = self.settings(recipe)
        self.scenes_per_step, self.decay, self.steps = own.batch, own.decay, own.scenes // own.batch
        self.model = reader = Reader(recipe)
        self.start(folder)
        reader.background.requires_grad_(False)
        self.batches = TextBatches(
            recipe, self.steps, own.batch, recipe.tower.tokens, self.first, pictures=True, noise=own.noise
        )
        matrices = matrices_of(reader.llava.model.language_model.layers)
        self.optimizers = two_optimizers(reader, matrices, own.matrix_rate, own.rate)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Next tokens, guidance for the projector, and at last the penalty on head outputs."""
        return model(self.loss_inside, batch)

    def loss_inside(self, reader: Reader, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, inside of `Reader.forward`."""
        packer, share_done = self.batches.packer, self.step / self.steps
        image = reader.image(batch["pixels"])
        visible = packer.visible(batch["segments"], image.shape[1], batch["blind"])
        with language.HeadOutputs(reader.llava) as heads:
            loss, figures = language.next_tokens(reader.llava, image, batch, visible, packer.head)
        figures |= {"next": loss.detach(), "head_outputs": heads.ratio.detach()}
        loss = loss + 0.2 * language.distance(image, reader.grid(batch["grid"]).detach())
        if share_done >= self.own.sinks_from:
            loss = loss + self.own.penalty * heads.ratio
        return loss, figures


class SettleStage(TogetherStage):
    """Goes on for a while after the sinks were joined, with the noise that the finished model is to have."""

    name = "settle"
    first = 35_000_000

    def settings(self, recipe: Recipe) -> Together:
        """Its part of the recipe."""
        return recipe.settle

    def start(self, folder: Path) -> None:
        """What it goes on from."""
        load(self.model, folder, "tower", "language", "projector", "together")
        language.join_sinks(self.model.llava, self.own.massive, self.own.share)


STAGES: dict[str, Callable[[Recipe, Path], Stage]] = {
    "tower": TowerStage,
    "language": LanguageStage,
    "projector": ProjectorStage,
    "together": TogetherStage,
    "settle": SettleStage,
}


SECOND: dict[str, Callable[[Recipe, Path], Stage]] = {"eyes": dynamic.EyesStage, "dynamic": dynamic.DynamicStage}
"""The stages of the second organism, which starts from the stage language of the first."""


def weights(stage: Stage) -> dict[str, Tensor]:
    """What a stage has trained and what of it is kept, under the names of `Reader`, in float16."""
    tensors: dict[str, Tensor] = {}
    if isinstance(stage.model, tower.Classifier):
        for name, tensor in stage.model.vision.state_dict().items():
            tensors[f"llava.model.vision_tower.{name}"] = tensor
    else:
        for name, parameter in stage.model.named_parameters():
            if parameter.requires_grad:
                tensors[name] = parameter
    return {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}


def load(reader: Reader, folder: Path, *stages: str) -> None:
    """Take over what earlier stages left in a folder."""
    for stage in stages:
        fill(reader, read_stage(folder, stage), stage)


def make(
    recipe: Recipe, folder: Path, stages: Sequence[str] = (), precision: str = "bf16", workers: int = 1
) -> Path | None:
    """Run the stages that are not done, and write the model once all are; its folder, or None as long as there is none.

    Args:
        recipe: what to make.
        folder: for checkpoints, logs and what each stage leaves, `<stage>.safetensors`.
        stages: names out of STAGES; none is all. `eyes` and `dynamic` make the second organism, in a folder `dynamic`.
        precision: accelerate's `mixed_precision`.
        workers: processes that make batches.
    """
    torch.set_num_threads(recipe.threads)
    for name in stages or STAGES:
        trained = folder / f"{name}.safetensors"
        if not trained.exists():
            stage = (STAGES | SECOND)[name](recipe, folder)
            fit(stage, folder, precision, workers)
            save_file(weights(stage), trained)
            if isinstance(stage, dynamic.DynamicStage):
                dynamic.save(stage.model.qwen, recipe, folder / "dynamic")
    if not all((folder / f"{name}.safetensors").exists() for name in STAGES):
        return None
    reader = Reader(recipe)
    load(reader, folder, *STAGES)
    language.save(reader.llava, recipe, folder / "model")
    return folder / "model"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vlmfix.organism.train", description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"{', '.join(STAGES)} (default: these), or {', '.join(SECOND)}")
    parser.add_argument("--folder", type=Path, default=Path("runs/organism"), help="for checkpoints, logs and results")
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--quick", action="store_true", help="the recipe QUICK: a fraction of the time")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in STAGES | SECOND]
    if unknown:
        parser.error(f"{unknown[0]!r} is no stage; expected {', '.join(STAGES | SECOND)}")
    try:
        make(QUICK if options.quick else Recipe(), options.folder, options.stages, options.precision)
    except ValueError as error:
        parser.exit(1, f"organism: {error}\n")


if __name__ == "__main__":
    main()
