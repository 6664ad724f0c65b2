"""Draws the picture at the head of the README, light and dark: `make hero`.

Left a COCO photo with answers of LLaVA-1.5-7B that OPERA's authors released, right a scene of the embedded model with
answers of the main job; both marked by the verdicts of `vlmfix score --explain`. The scene is picked by a rule: the
first that the untouched model invents on, where the head list invents nothing and sees as much, while its control still
invents and the cut caption sees less. So it shows what can happen, not how often: the README's table tells that.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path
from typing import Any

from tools.main_job import restore

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "assets" / "figures"
PHOTO = ROOT / "assets" / "photos" / "images" / "000000168974.jpg"
ANSWERS = {
    "greedy": "LLaVA-1.5-7B, greedy search",
    "beam5": "beam search",
    "opera": "OPERA (Huang et al., CVPR 2024)",
}
SCENE = {
    "none": "untouched",
    "truncate:words=40": "cut after 40 words",
    "headgain:head_list=visual16": "16 listed heads amplified",
    "headgain:head_list=visual16,select=random": "its control: 16 random heads",
}
WIDTH, HEIGHT = 1200, 680
STYLES = {
    "light": "--ink:#1c2128;--quiet:#59636e;--paper:#ffffff;--line:#d8dee4;--wrong:#c4262e",
    "dark": "--ink:#e4e7eb;--quiet:#9aa4af;--paper:#0d1117;--line:#343b43;--wrong:#ff8078",
}
CSS = """
*{box-sizing:border-box} body{margin:0;background:var(--paper);color:var(--ink);font:14px/1.38 system-ui,"DejaVu Sans",
sans-serif;width:1200px;padding:12px 18px} .pair{display:grid;grid-template-columns:1fr 1fr;gap:30px}
.side{display:grid;grid-template-columns:140px 1fr;gap:16px;align-content:start} img{width:140px;border-radius:6px;
display:block} h2{font-size:16px;margin:0 0 8px;grid-column:1/3} .answer{margin:0 0 9px;
border-left:3px solid var(--line);padding-left:10px} b{display:block;font-size:13px;color:var(--quiet);
font-weight:600} small{color:var(--quiet);
font-size:12.5px;display:block;margin-top:6px} .present{border-bottom:2px dotted var(--quiet)} del{color:var(--wrong);
font-weight:700;text-decoration-thickness:2px} .legend{color:var(--quiet);font-size:13px;margin-top:6px}
"""


def verdicts(arguments: list[str], explained: Path) -> list[dict[str, Any]]:
    """What `vlmfix score --explain` writes."""
    command = [sys.executable, "-m", "vlmfix", "score", *arguments, "--explain", str(explained)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return [json.loads(line) for line in explained.read_text("utf-8").splitlines()]


def photo_answers(folder: Path) -> dict[str, dict[str, Any]]:
    """Way of decoding -> its scored answer to the photo."""
    files = [str(PHOTO.parents[1] / "answers" / f"{name}.jsonl") for name in ANSWERS]
    scored = verdicts([*files, "--benchmark", "chair"], folder / "photo.jsonl")
    return {answer["method"]: answer for answer in scored}


def scene_answers(folder: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """The picked scene, and method -> its scored answer."""
    runs = [run for run in restore(folder) if run.header["identity"]["benchmark"] == "chair" and run.label in SCENE]
    scored = verdicts([str(run.folder) for run in runs], folder / "scenes.jsonl")
    by_scene: dict[int, dict[str, dict[str, Any]]] = {}
    for answer in scored:
        by_scene.setdefault(answer["image_id"], {})[answer["method"]] = answer
    for scene in sorted(by_scene):
        plain, cut, method, control = (by_scene[scene][name] for name in SCENE)
        mends = invented(plain) and not invented(method) and set(method["missed"]) <= set(plain["missed"])
        if mends and invented(control) and set(cut["missed"]) > set(plain["missed"]):
            return scene, by_scene[scene]
    raise ValueError("no scene fits the rule")


def invented(answer: dict[str, Any]) -> list[str]:
    """Objects named that are not there, each once."""
    return list(dict.fromkeys(each["node"] for each in answer["mentions"] if each["verdict"] == "invented"))


def marked(answer: dict[str, Any]) -> str:
    """A caption as HTML: what is there dotted, what is invented struck."""
    text, end, parts = answer["caption"], 0, []
    for mention in answer["mentions"]:
        parts.append(escape(text[end : mention["start"]]))
        words = escape(text[mention["start"] : mention["end"]])
        parts.append(
            f"<del>{words}</del>" if mention["verdict"] == "invented" else f'<span class="present">{words}</span>'
        )
        end = mention["end"]
    return "".join(parts) + escape(text[end:])


def side(title: str, picture: Path, credit: str, answers: dict[str, dict[str, Any]], names: dict[str, str]) -> str:
    """One picture with its answers."""
    data = base64.b64encode(picture.read_bytes()).decode()
    kind = "webp" if picture.suffix == ".webp" else "jpeg"
    shown = []
    for method, name in names.items():
        wrong, missed = invented(answers[method]), answers[method]["missed"]
        told = f"invents {', '.join(wrong)}" if wrong else "invents nothing"
        told += f"; misses {', '.join(missed)}" if missed else ""
        shown.append(f'<p class="answer"><b>{escape(name)} – {escape(told)}</b>{marked(answers[method])}</p>')
    image = f'<img src="data:image/{kind};base64,{data}">'
    return (
        f'<div class="side"><h2>{title}</h2><div>{image}<small>{credit}</small></div><div>{"".join(shown)}</div></div>'
    )


def draw() -> None:
    """Write `hero-light.png` and `hero-dark.png`, at double size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scene, answers = scene_answers(folder)
        picture = ROOT / "assets" / "organism" / "test" / "images" / f"test_{scene:04d}.webp"
        credit = "COCO photo 168974, CC BY 2.0, flickr.com/photo.gne?id=2063838083. Answers: shikiw/OPERA, MIT."
        sides = side("A real photo, a 7B model", PHOTO, credit, photo_answers(folder), ANSWERS)
        note = f"Scene {scene} of 500 that come with vlmfix, with a model of 2.7 M parameters to try methods on."
        sides += side("A painted scene, the embedded model", picture, note, answers, SCENE)
        legend = (
            'Marked by <code>vlmfix score --explain</code>: <span class="present">in the picture</span>, '
            "<del>invented</del>. Drawn by <code>make hero</code>."
        )
        for theme, colours in STYLES.items():
            page = folder / f"{theme}.html"
            page.write_text(
                f'<!doctype html><meta charset="utf-8"><style>:root{{{colours}}}{CSS}</style>'
                f'<div class="pair">{sides}</div><div class="legend">{legend}</div>',
                "utf-8",
            )
            target = FIGURES / f"hero-{theme}.png"
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            options += ["--hide-scrollbars", "--force-device-scale-factor=2", f"--window-size={WIDTH},{HEIGHT}"]
            subprocess.run(
                ["chromium", *options, f"--user-data-dir={folder / 'browser'}", f"--screenshot={target}", str(page)],
                check=True,
                capture_output=True,
            )
            shrink(target)


def shrink(path: Path) -> None:
    """Few colours are enough, and a quarter of the bytes."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    draw()
