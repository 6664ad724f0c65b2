"""The training loop that all stages share: schedule, log, checkpoints; stopped at any time, it goes on where it was."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Stage(ABC):
    """One stage of the training: a model, batches that are a function of their number, and a loss."""

    name: str
    steps: int
    scenes_per_step: int
    decay: float
    """Share of the steps, at the end, in which the rates fall linearly to 0."""
    model: nn.Module
    batches: Any
    """Batch number -> batch, a torch data set."""
    step: int = 0
    """The step that is being taken."""
    optimizers: list[torch.optim.Optimizer]

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and figures for the log."""


def matrices_of(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that are matrices."""
    return [parameter for parameter in module.parameters() if parameter.ndim == 2]


def two_optimizers(
    model: nn.Module, matrices: Iterable[nn.Parameter], matrix_rate: float, rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices named, AdamW for all other parameters that are trained."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"training needs torch 2.9 or later, for torch.optim.Muon; found {torch.__version__}")
    muon = list(matrices)
    of_muon = {id(parameter) for parameter in muon}
    rest = []
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in of_muon:
            rest.append(parameter)
    return [
        torch.optim.Muon(muon, lr=matrix_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.05),
    ]


def read_stage(folder: Path, stage: str) -> dict[str, Tensor]:
    """What a stage left in a folder, by name, in float32. `ValueError` if it left nothing."""
    file = folder / f"{stage}.safetensors"
    if not file.exists():
        raise ValueError(f"{folder} holds no {file.name}; run the stage {stage} first")
    return {name: tensor.float() for name, tensor in load_file(file).items()}


def fill(model: nn.Module, tensors: dict[str, Tensor], stage: str) -> None:
    """Put into the model what a stage left. `ValueError` if it holds what the model does not."""
    unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{stage}.safetensors holds {unknown[0]}, which the recipe has no place for")


def scale(step: int, steps: int, decay: float, warm: int = 50) -> float:
    """What the rates are multiplied with: a short rise, a plateau, a linear fall to 0."""
    return min((step + 1) / warm, 1.0, (steps - step) / max(1.0, decay * steps))


def fit(stage: Stage, folder: Path, precision: str = "bf16", workers: int = 1, every: float = 120.0) -> None:
    """Train the stage to its end; `every` so many seconds write a checkpoint, and every 20 steps a line of the log.

    Args:
        stage: what is trained; its model is changed in place.
        folder: for `<stage>.pt`, from which it goes on, and `<stage>.jsonl`, the log.
        precision: accelerate's `mixed_precision`.
        workers: processes that make batches.
        every: seconds between checkpoints.
    """
    accelerator = Accelerator(mixed_precision=precision)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / f"{stage.name}.pt", folder / f"{stage.name}.jsonl"
    start, spent = 0, 0.0
    if checkpoint.exists():
        start, spent = resume(stage, checkpoint)
        if accelerator.is_main_process and log.exists():
            cut_log(log, start)
    model = accelerator.prepare(stage.model)
    optimizers = [accelerator.prepare(optimizer) for optimizer in stage.optimizers]
    peaks = [[group.setdefault("peak", group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
    own_batches = range(
        start * accelerator.num_processes + accelerator.process_index,
        stage.steps * accelerator.num_processes,
        accelerator.num_processes,
    )
    loader = DataLoader(stage.batches, batch_size=None, sampler=own_batches, num_workers=workers)
    began = saved_at = logged_at = time.monotonic()
    logged_steps = start

    def save(step: int) -> None:
        if accelerator.is_main_process:
            state = {
                "model": accelerator.unwrap_model(model).state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "seconds": spent + time.monotonic() - began,
            }
            # A program that is killed while it writes leaves the old checkpoint as it was.
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)

    model.train()
    for step, cpu_batch in enumerate(loader, start=start):
        stage.step = step
        factor = scale(step, stage.steps, stage.decay)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * factor
        batch = {key: value.to(accelerator.device) for key, value in cpu_batch.items()}
        with accelerator.autocast():
            loss, figures = stage.loss(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        now = time.monotonic()
        steps_done = step + 1
        if accelerator.is_main_process and steps_done % 20 == 0:
            rate = (steps_done - logged_steps) * stage.scenes_per_step / (now - logged_at)
            line = {"step": steps_done, "scenes": steps_done * stage.scenes_per_step, "loss": loss.item()}
            line |= {key: value.item() for key, value in figures.items()}
            line |= {"scenes_per_second": rate, "seconds": spent + now - began}
            with log.open("a") as file:
                file.write(json.dumps({key: round(value, 4) for key, value in line.items()}) + "\n")
            logged_steps, logged_at = steps_done, now
        if now - saved_at > every:
            save(steps_done)
            saved_at = now
    save(stage.steps)


def resume(stage: Stage, checkpoint: Path) -> tuple[int, float]:
    """Put the stage where a checkpoint left it: its steps and seconds so far."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    stage.model.load_state_dict(state["model"])
    for optimizer, saved in zip(stage.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]


def cut_log(log: Path, step: int) -> None:
    """Take lines behind a step off the log: they will be written again."""
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
    log.write_text("".join(f"{line}\n" for line in lines))
