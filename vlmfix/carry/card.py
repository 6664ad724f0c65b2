"""The model card of a baked model: what was done to whom, how it was checked, and what is not known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vlmfix.carry.check import Verdict
from vlmfix.model.loading import EMBEDDED

LOAD = {
    "checkpoint": """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS FOLDER")
processor = AutoProcessor.from_pretrained("THIS FOLDER")""",
    "ia3": """from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "THIS FOLDER")  # model.disable_adapter() is the untouched model""",
    "json": """import json
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{base}")
for layer in json.load(open("THIS FOLDER/head_gains.json"))["layers"].values():
    weight, d = model.get_submodule(layer["projection"]).weight.data, layer["head_dim"]
    for head, gain in layer["gains"].items():
        weight[:, int(head) * d : (int(head) + 1) * d] *= gain""",
}
LOAD["lora"] = LOAD["ia3"] + "\n# vLLM: vllm serve {base} --enable-lora --lora-modules fixed=THIS_FOLDER"
WHAT = {
    "checkpoint": "The files of the model, with these heads' columns of the output projections scaled.",
    "ia3": "An IA3 adapter of PEFT: factors for the inputs of the output projections.",
    "lora": "A LoRA adapter of PEFT: what the scaled columns of the output projections have over the model's own.",
    "json": "The gains alone, with the names of the weights that they belong to.",
}


def card(
    base: str,
    spec: str,
    methods: Sequence[dict[str, Any]],
    heads: Sequence[str],
    format: str,
    verdict: Verdict | None,
    evidence: dict[str, Any],
) -> str:
    """A README.md in Markdown."""
    library = "peft" if format in ("ia3", "lora") else "transformers"
    front = ["---", f"base_model: {json.dumps(base)}", f"library_name: {library}", "tags: [vlmfix, head-gains]", "---"]
    check = "not checked" if verdict is None else f"{verdict}, over {verdict.n} questions in a process without vlmfix"
    lines = [
        *front,
        f"# {base} with head gains",
        "",
        f"{WHAT[format]} Outputs of these attention heads are multiplied by a constant, for every prompt:",
        "",
        ", ".join(heads),
        "",
        "```python",
        LOAD[format].replace("{base}", base),
        "```",
        "",
        f"- Model: `{base}`; its licence holds.",
        *([f'- It is embedded in vlmfix: `model, processor = vlmfix.load("{base}")`.'] if base in EMBEDDED else []),
        f"- Method: `{spec}`, by [vlmfix](https://pypi.org/project/vlmfix/).",
        *(f"- Origin: `{json.dumps(method['facts'])}`" for method in methods if method.get("facts")),
        f"- Against the wrapped model: {check}.",
        "- Prompts without a picture are changed, too: weights cannot tell. The wrapped model leaves them alone.",
        "",
        "## Effect",
        "",
    ]
    if evidence:
        lines += ["As measured when the method was chosen:", "", "```json", json.dumps(evidence, indent=1), "```"]
    else:
        lines += [
            "Not measured with this folder. On pictures that had no part in the choice of the heads:",
            "",
            "```bash",
            f"vlmfix eval --model {base} --method none,'{spec}' --controls",
            "vlmfix eval --model THIS_FOLDER --method none",
            "```",
        ]
    return "\n".join(lines) + "\n"
