"""Runs in a process of its own, which cannot import this library: loads a baked model as anyone would, and answers.

    python -I fresh.py JOB.pt ANSWERS.pt

JOB.pt: `kind` (checkpoint, ia3, lora, json), `base` and `folder`, `dtype`, `device`, `threads` (others would round sums
otherwise), and `inputs`, one dictionary of tensors per question. ANSWERS.pt: per question the logits of the prompt's
last row (float32), and the answer's ids.
"""

import json
import sys
from pathlib import Path
from typing import Any


class NoVlmfix:
    """An import hook: there is no vlmfix here."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        """Refuses one name."""
        if name.partition(".")[0] == "vlmfix":
            raise ImportError("vlmfix is not to be had in this process")


def load(kind: str, base: str, folder: str, dtype: Any) -> Any:
    """What a user of each format would write."""
    from transformers import AutoModelForImageTextToText

    if kind == "checkpoint":
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    if kind in ("ia3", "lora"):
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder)
    for layer in json.loads((Path(folder) / "head_gains.json").read_text())["layers"].values():
        weight = model.get_submodule(layer["projection"]).weight.data
        d = layer["head_dim"]
        for head, gain in layer["gains"].items():
            weight[:, int(head) * d : (int(head) + 1) * d] *= gain
    return model


def main(job_file: str, answers_file: str) -> None:
    """Load, answer, write."""
    sys.meta_path.insert(0, NoVlmfix)
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    job = torch.load(job_file)
    torch.set_num_threads(job["threads"])
    model = load(job["kind"], job["base"], job["folder"], job["dtype"]).eval().to(job["device"])
    logits, answers = [], []
    with torch.inference_mode():
        for inputs in job["inputs"]:
            there = {name: x.to(job["device"]) for name, x in inputs.items()}
            logits.append(model(**there).logits[0, -1].float().cpu())
            out = model.generate(**there, max_new_tokens=job["max_new_tokens"], do_sample=False, num_beams=1)
            answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    torch.save({"logits": logits, "answers": answers}, answers_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
