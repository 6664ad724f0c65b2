"""Runs VLMEvalKit's `run.py` with models of this library among those that it knows:

    python -m vlmfix.integrations.vlmevalkit RUN.PY organism+vhr:alpha=1.5 -- --data POPE --work-dir out

Before `--` stand models, each MODEL or MODEL+METHOD; behind it, run.py's own options. VLMEvalKit has no plug-ins, so
this reaches into its table of models; `vlmfix serve` and run.py's `--base-url` do without.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

MAX_NEW_TOKENS = 512


def register(spec: str) -> str:
    """Put MODEL+METHOD among VLMEvalKit's models; the name it has there, which becomes names of files."""
    import vlmeval.config
    from vlmeval.vlm.base import BaseModel

    from vlmfix.integrations.spec import read

    model, _, method = spec.partition("+")
    read(method or "none")  # a mistake is told now, not after the data was prepared

    class Vlmfix(BaseModel):
        """A model with a method in force."""

        INTERLEAVE = True

        def __init__(self, pretrained: str, method: str, **_: Any) -> None:
            super().__init__()
            import vlmfix

            self.asker = vlmfix.Asker(*vlmfix.load(pretrained), methods=None if method == "none" else method)

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            """The answer to pictures and texts."""
            images = [part["value"] for part in message if part["type"] == "image"]
            prompt = "\n".join(part["value"] for part in message if part["type"] == "text")
            return str(self.asker.ask(images, prompt, max_new_tokens=MAX_NEW_TOKENS).text)

    name = re.sub(r"[^\w.+-]+", "_", spec)
    vlmeval.config.supported_VLM[name] = partial(Vlmfix, pretrained=model, method=method or "none")
    return name


def main(arguments: Sequence[str]) -> None:
    """`RUN.PY MODEL ... -- OPTIONS`."""
    given = list(arguments)
    cut = given.index("--") if "--" in given else len(given)
    if cut < 2 or not Path(given[0]).is_file():
        sys.exit("usage: python -m vlmfix.integrations.vlmevalkit RUN.PY MODEL[+METHOD] ... -- OPTIONS OF RUN.PY")
    run, *specs = given[:cut]
    sys.path.insert(0, str(Path(run).resolve().parent))
    try:
        names = [register(spec) for spec in specs]
    except (ValueError, ImportError) as error:
        sys.exit(f"vlmfix: {error}")
    sys.argv = [run, "--model", *names, *given[cut + 1 :]]
    runpy.run_path(run, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
