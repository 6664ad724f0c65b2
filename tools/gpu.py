"""All that is to be measured on a GPU, in under ten minutes, as soon as one is at hand: `make gpu`.

A 7B model at full depth with random weights, bfloat16; sdpa, and FlashAttention where it is installed; eager, and
compiled with a cache of fixed size; one sample and eight. Variants are measured in turn. Each run leaves its JSON in
OUT (or build/gpu), and all of them the tables for docs/performance.md. A run that fails, or would begin after the
budget is spent, is told there, not left out.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

METHODS = "pai,var,vhr,headgain:head_list={heads},contrast"
HEADS = "/".join(f"L{layer}H1" for layer in range(32))
"""A head in every layer, more than lists have."""
BUDGET = 540
"""Seconds in all."""
COMMON = ["--dtype", "bfloat16", "--rounds", "5", "--new-tokens", "32", "--no-naive"]
RUNS = {
    "eager, batch 1": ["--batch-size", "1"],
    "compiled, batch 1": ["--batch-size", "1", "--compiled"],
    "eager, batch 8": ["--batch-size", "8"],
    "compiled, batch 8": ["--batch-size", "8", "--compiled"],
    "eager, batch 1, FlashAttention": ["--batch-size", "1", "--attention", "flash_attention_2"],
    "eager, batch 8, FlashAttention": ["--batch-size", "8", "--attention", "flash_attention_2"],
}
"""The most telling first."""


def main(shape: str = "llava-1.5-7b", layers: str = "32", device: str = "cuda") -> int:
    """Measure, write, and say what is missing."""
    out = Path(os.environ.get("OUT", "build/gpu"))
    out.mkdir(parents=True, exist_ok=True)
    began, page, failed = time.monotonic(), [], 0
    methods = METHODS.format(heads="/".join(HEADS.split("/")[: int(layers)]))
    for name, options in RUNS.items():
        left = BUDGET - (time.monotonic() - began)
        command = ["bench", "--shape", shape, "--layers", layers, "--device", device, "--method", methods]
        command += [*COMMON, *options, "--json"]
        said = run(command, options, left)
        failed += isinstance(said, str)
        page += [
            f"**{name}**: `vlmfix {' '.join(command)}`",
            "",
            *(table(said) if isinstance(said, dict) else [said]),
            "",
        ]
        if isinstance(said, dict):
            (out / f"{name.replace(', ', '-').replace(' ', '-')}.json").write_text(json.dumps(said))
        (out / "tables.md").write_text("\n".join(page))
    print("\n".join(page))
    return failed == len(RUNS)


def run(command: list[str], options: list[str], seconds: float) -> dict | str:
    """What a bench found, or why there is nothing."""
    if seconds < 30:
        return "Not run: the budget was spent."
    if "flash_attention_2" in options and importlib.util.find_spec("flash_attn") is None:
        return "Not run: flash-attn is not installed."
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vlmfix", *command], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"Not finished: it was stopped after {seconds:.0f} s."
    return json.loads(done.stdout) if done.returncode == 0 else f"Failed: {done.stderr.strip().splitlines()[-1]}"


def table(found: dict) -> list[str]:
    """Markdown, with the machine."""
    machine = found["machine"]
    lines = ["| | prefill | per token | peak memory |", "|---|---|---|---|"]
    for row in found["rows"]:
        cells = [f"×{row[k]['ratio']:.2f} [{row[k]['interval'][0]:.2f}, {row[k]['interval'][1]:.2f}]" for k in KEYS]
        lines.append(f"| `{row['variant'].partition(':')[0]}` | {' | '.join(cells)} |")
    prefill, token = (1e3 * found["rows"][0][figure]["median"] for figure in ("prefill", "token"))
    lines += [
        "",
        f"Untouched: {prefill:.0f} ms a prefill, {token:.1f} ms a token; "
        f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}, transformers {machine['transformers']}.",
    ]
    return lines


KEYS = ("prefill", "token", "memory")

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
