"""The main job, `vlmfix eval` without arguments: a look at what methods do, on a model that comes with the package.

The settings were chosen on calibration scenes (assets/organism/README.md), and so were the sixteen heads; the scenes
here are others. No torch.
"""

from __future__ import annotations

from vlmfix.eval.api import Task

METHODS = {
    "none": "the untouched model",
    "truncate:words=40": "its captions, cut after 40 words: what saying less does",
    "var": "attention taken from sinks and given to the image, at the paper's settings",
    "var:p=0.9,rho=0.3": "the same, at settings chosen on calibration scenes",
    "vhr": "heads that react to the image amplified, chosen anew for each picture",
    "headgain:head_list=visual16": "sixteen heads amplified that look at the object being named, listed once",
    "pai:alpha=0.2": "attention scores of image tokens raised",
}
"""Method -> what it does, in the order of the table."""
CONTROLS = {
    "var": "var:select=random",
    "var:p=0.9,rho=0.3": "var:p=0.9,rho=0.3,select=random",
    "vhr": "vhr:select=random",
    "headgain:head_list=visual16": "headgain:head_list=visual16,select=random",
    "pai:alpha=0.2": "pai:alpha=-0.2",
}
"""Method -> the one of its negative controls that is asked, too: the same push with the choice taken out of it, or
turned round."""
CAPTIONS, QUESTIONS = "first-200", "first-100"
"""Scenes that are described, and those that yes/no questions are about."""
SECONDS = 90
"""On two idle cores, about."""


def tour(output: str = "runs", limit: int | None = None) -> list[Task]:
    """The main job: captions under every method and its control, yes/no questions under every method but the cut.

    Args:
        output: Folder for answers and settings.
        limit: Only the first scenes; for trying out.
    """
    described, asked = [], []
    for method in METHODS:
        described.append(method)
        described += [CONTROLS[method]] if method in CONTROLS else []
        asked += [] if method.startswith("truncate") else [method]
    return [
        Task(methods=described, benchmarks="chair", data="organism", which=CAPTIONS, limit=limit, output=output),
        Task(methods=asked, benchmarks="pope", data="organism", which=QUESTIONS, limit=limit, output=output),
    ]


def first_lines(output: str) -> list[str]:
    """What happens, and how long it takes."""
    return [
        f"The embedded model (2.7 M parameters, nothing is downloaded) describes {CAPTIONS.partition('-')[2]} painted "
        f"scenes and answers yes/no questions on the first {QUESTIONS.partition('-')[2]} of them: untouched, cut "
        f"short, and under {len(CONTROLS)} interventions.",
        "Each intervention stands above its negative control: the same push without its choice of heads or tokens, or "
        "turned round.",
        f"This takes about {SECONDS} seconds on two idle cores. Answers go to {output}; stopped and started again, it "
        "goes on.",
    ]


def next_lines(output: str) -> list[str]:
    """What to try next."""
    return [
        f"next: vlmfix report {output}    # the pictures with invented words marked, in one page: report.html",
        "      vlmfix demo           # the same side by side, in a browser, with your own questions",
    ]
