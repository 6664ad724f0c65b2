"""`load`: a model and its processor, embedded, from the Hub, or from a folder."""

from __future__ import annotations

import importlib.util
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import PROCESSOR_MAPPING, AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_torchvision_available, logging

EMBEDDED = {"organism": "organism/model", "organism-qwen": "organism/qwen"}


def load(name: str | Path, *, dtype: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """A vision-language model, ready to answer, and its processor.

    `name` is `"organism"` (the embedded model, of the LLaVA class) or `"organism-qwen"` (its sibling of the Qwen2.5-VL
    class), a Hub id or a local folder; also a folder that `vlmfix bake` wrote, or one of an adapter of PEFT: then its
    model is loaded, and what lies in the folder put on it.
    `dtype` defaults to float32 for embedded models and to the checkpoint's own otherwise; `device_map`,
    `quantization_config`, `attn_implementation`, `revision` and all else go to `from_pretrained`.

    Raises `ValueError` if nothing of that name can be loaded or if it is no image-text-to-text model.
    """
    base = _base_of(Path(name))
    if base is not None:
        return _put_on(Path(name), base, dtype, kwargs)
    embedded = EMBEDDED.get(str(name))
    path = str(resources.files("vlmfix.assets") / embedded) if embedded else str(name)
    progress = logging.is_progress_bar_enabled()
    if embedded:
        logging.disable_progress_bar()
    try:
        options: dict[str, Any] = {
            k: kwargs[k] for k in ("revision", "token", "trust_remote_code", "cache_dir") if k in kwargs
        }
        config = AutoConfig.from_pretrained(path, **options)
        if type(config) not in AutoModelForImageTextToText._model_mapping:
            raise ValueError(f"{name} is a {config.model_type} model, which takes no image and text together")
        model: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype or (torch.float32 if embedded else "auto"), **kwargs
        )
        processor = _processor(path, config, options)
    except OSError as error:
        known = ", ".join(EMBEDDED)
        raise ValueError(
            f"cannot load {name!r}: expected an embedded model ({known}), a local folder, or a Hub id that can be "
            f"reached ({str(error).splitlines()[0]})"
        ) from error
    finally:
        if progress:
            logging.enable_progress_bar()
    if embedded:
        model.config._name_or_path = str(name)
    if torch.cuda.is_available() and "device_map" not in kwargs and "quantization_config" not in kwargs:
        model.to("cuda")
    return model.eval(), processor


ADAPTER, GAINS = "adapter_config.json", "head_gains.json"
"""Files of folders that hold no model, but what is put on one."""


def _base_of(folder: Path) -> str | None:
    """What the model is loaded from that a folder of an adapter or of head gains goes on; `None` for other names."""
    try:
        if (folder / ADAPTER).is_file():
            return str(json.loads((folder / ADAPTER).read_text("utf-8"))["base_model_name_or_path"])
        if (folder / GAINS).is_file() and not (folder / "config.json").is_file():
            return str(json.loads((folder / GAINS).read_text("utf-8"))["base"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: cannot read for which model it is ({error!r})") from None
    return None


def _put_on(folder: Path, base: str, dtype: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """A model with an adapter, or with head gains folded into its weights, under the folder's name."""
    embedded = {str(resources.files("vlmfix.assets") / place): known for known, place in EMBEDDED.items()}
    model, processor = load(embedded.get(base, base), dtype=dtype, **options)
    if (folder / ADAPTER).is_file():
        if importlib.util.find_spec("peft") is None:
            raise ValueError(f"{folder} is an adapter of PEFT, which is not installed: pip install peft")
        model.load_adapter(str(folder))
    else:
        from vlmfix.model.gains import fold, read_gains

        fold(model, read_gains(folder / GAINS)[0])
    model.config._name_or_path = str(folder)
    return model.eval(), processor


def load_options(dtype: str | None, device_map: str | None = None, quantize: str | None = None) -> dict[str, Any]:
    """Arguments of `load` for choices that are given as text.

    Args:
        dtype: float32, bfloat16 or float16.
        device_map: Passed to `from_pretrained`, for instance `auto`.
        quantize: 8bit or 4bit; needs bitsandbytes.

    Raises:
        ValueError: another text.
    """
    options: dict[str, Any] = {}
    if dtype is not None:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")
        options["dtype"] = getattr(torch, dtype)
    if device_map is not None:
        options["device_map"] = device_map
    if quantize is not None:
        if quantize not in ("8bit", "4bit"):
            raise ValueError(f"quantize: expected 8bit or 4bit, got {quantize!r}")
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{quantize}": True})
    return options


class _Pictures:
    """Goes before a processor class whose part for videos, its last one, cannot be had: it takes all but videos."""

    video_processor = None

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]  # type: ignore[misc]

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        if videos is not None:
            raise ImportError("this processor takes pictures only; for videos, install torchvision and load it again")
        return super().__call__(images, text, **kwargs)  # type: ignore[misc]


def _processor(path: str, config: Any, options: dict[Any, Any]) -> Any:
    """The stock processor. Most that take videos too need torchvision for them; without it they take pictures only."""
    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None or is_torchvision_available() or kind.get_attributes()[-1] != "video_processor":
        return AutoProcessor.from_pretrained(path, **options)
    pictures_only: Any = type(kind.__name__, (_Pictures, kind), {})
    return pictures_only.from_pretrained(path, **options)
