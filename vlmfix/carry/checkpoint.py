"""A checkpoint with scaled heads, made from the files of another: every file is copied byte by byte, and only the
numbers of the scaled columns are written anew. Names, types, shards and the processor's files stay as they are, and no
more than one tensor is in memory."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vlmfix.model.anatomy import anatomy, core_of
from vlmfix.model.gains import FLOATS, Gains, check_fit, check_plain, columns, projection_names, scaled
from vlmfix.model.loading import EMBEDDED

OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.tflite")
"""The same weights in other forms, which would stay as they were: left out."""
LEFT_OUT = (*OTHER_WEIGHTS, "README.md", ".git", ".gitattributes", ".cache", "*.incomplete")


def checkpoint_folder(name: str, revision: str | None = None) -> Path:
    """The folder with a model's files: embedded, a folder, or from the Hub's cache. `ValueError` without safetensors
    files."""
    if name in EMBEDDED:
        folder = Path(str(resources.files("vlmfix.assets") / EMBEDDED[name]))
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=list(OTHER_WEIGHTS)))
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} holds an adapter, no weights of a model; merge it into its model and save that one first"
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{name} has no safetensors files; load it, vlmfix.bake the wrapped model, and save_pretrained it"
        )
    return folder


def write_checkpoint(model: nn.Module, gains: Gains, source: Path, target: Path) -> None:
    """Copy a model's folder and scale its heads in the copy. `model` is the one loaded from `source`, as it is there.

    Raises `ValueError` where the scaled weights do not stand in the files as they are in the model.
    """
    places = weights_in_files(model, gains, source)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
    parts = anatomy(core_of(model))
    for number, (shard, name) in places.items():
        with safe_open(source / shard, "pt") as file:
            weight = file.get_tensor(name)
        overwrite(target / shard, name, scaled(weight, columns(parts.layers[number], gains[number])))


def weights_in_files(model: nn.Module, gains: Gains, folder: Path) -> dict[int, tuple[str, str]]:
    """Layer -> file and name of the weight of its output projection.

    transformers renames weights while it loads them, and files have kept the names of many years. So a weight is known
    by its numbers; its name only says where to look first.
    """
    parts = anatomy(core_of(model))
    check_fit(gains, parts)
    stored = _stored(folder)
    places = {}
    for number, module in projection_names(model, parts, gains).items():
        check_plain(parts, number)
        weight: Any = parts.layers[number].out_proj.weight  # type: ignore[union-attr]
        wanted = f"{module}.weight"
        alike = [place for place, shape in stored.items() if shape == tuple(weight.shape)]
        alike.sort(key=lambda place: -_common_end(place[1], wanted))
        found = next((place for place in alike if _holds(folder, place, weight)), None)
        if found is None:
            raise ValueError(
                f"the files in {folder} do not hold {wanted} as it is in the model; load the model, vlmfix.bake it, "
                f"and save_pretrained it"
            )
        places[number] = found
    return places


def overwrite(path: Path, name: str, tensor: Tensor) -> None:
    """Write the numbers of one tensor of a safetensors file anew: 8 bytes with the length of the header, the header
    (JSON, with each tensor's place), the numbers."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
        numbers = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        if len(numbers) != end - begin:
            raise ValueError(f"{path}: {name} has {end - begin} bytes, got {len(numbers)}")
        file.seek(8 + length + begin)
        file.write(numbers)


def _stored(folder: Path) -> dict[tuple[str, str], tuple[int, ...]]:
    """File and name of each weight that can be scaled -> its shape."""
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dictionary
                shapes[path.name, name] = tuple(file.get_slice(name).get_shape())
    return shapes


def _common_end(name: str, other: str) -> int:
    """How many parts two names have in common, from the last one on."""
    pairs = zip(reversed(name.split(".")), reversed(other.split(".")), strict=False)
    n = 0
    for part, its_part in pairs:
        if part != its_part:
            break
        n += 1
    return n


def _holds(folder: Path, place: tuple[str, str], weight: Tensor) -> bool:
    """Whether a tensor in a file is the model's weight, up to the type that it was loaded in."""
    shard, name = place
    with safe_open(folder / shard, "pt") as file:
        stored = file.get_tensor(name)
    return stored.dtype in FLOATS and torch.equal(stored.to(weight.dtype), weight.detach().cpu())
