"""The page: one picture, one prompt, and the answers under two methods side by side."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from torch import nn

from vlmfix.asking import Record, ask, open_picture
from vlmfix.attachment import wrapped
from vlmfix.eval.chair import Vocabulary, ground_truth, image_key, mentions
from vlmfix.hooks import REGISTRY
from vlmfix.intervention import Intervention, did_you_mean, method_class, parse
from vlmfix.loading import load

SCENES = Path(str(files("vlmfix.assets") / "scenes"))
EXAMPLES = [str(SCENES / "images" / f"test_{n:04d}.png") for n in (32, 21, 10, 9, 1, 134)]
"""Picked by hand, no sample: VHR invents less on the first four scenes, as much on the fifth, more on the last."""
PROMPTS = ["Please describe this image in detail.", "Is there a dog in the image?"]
METHODS = ["none", *(name for name in REGISTRY if not method_class(name).accelerator)]
EXISTS = re.compile(r"(?:is|are) there (?:an?|any) ([\w ]+) in (?:the|this) (?:image|picture)\?", re.IGNORECASE)

STYLE = """
:root, :root .gradio-container {
  --font: ui-sans-serif, system-ui, sans-serif;
  --button-primary-background-fill: #334155; --button-primary-background-fill-hover: #475569;
  --block-info-text-color: color-mix(in srgb, var(--body-text-color) 65%, transparent);
}
:root { --wrong: #c62828; }
.dark { --wrong: #ff8a80; }
.vlmfix-picture img { width: 100% !important; height: 100% !important; object-fit: contain !important; }
.vlmfix-answer { min-height: 9em; overflow-wrap: anywhere; }
.vlmfix-answer p { margin: 0 0 0.4em; }
.vlmfix-answer .text { font-size: 1.1em; line-height: 1.6; white-space: pre-wrap; }
.vlmfix-answer .small { font-size: 0.85em; opacity: 0.8; }
.vlmfix .there, .vlmfix-answer .there { border-bottom: 1px dotted currentColor; }
.vlmfix .wrong, .vlmfix-answer .wrong { color: var(--wrong); }
"""
INTRO = """
# vlmfix
One picture, one prompt, two methods side by side. The content of the example scenes is known, so that objects in the
answers are marked there: <span class="there">present</span>, <del class="wrong">invented</del>.
"""


@cache
def known_scenes() -> dict[str, frozenset[str]]:
    """Objects in each embedded scene, by the hash of its pixels (`Record.image_sha256`)."""
    truth = ground_truth(SCENES / "instances.json", SCENES / "captions.json")
    paths = (SCENES / "images").glob("*.png")
    return {hashlib.sha256(open_picture(p).tobytes()).hexdigest(): truth[image_key(p)] for p in paths}


def interventions(spec: str | None) -> tuple[Intervention, ...]:
    """What a method field asks for. Registered methods only: `package.module:Class` would let visitors import code."""
    spec = (spec or "").strip() or "none"
    for part in spec.split("+"):
        name = part.partition(":")[0].strip()
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; {did_you_mean(name, METHODS)}")
    return parse(spec)


def marked(text: str, truth: frozenset[str]) -> str:
    """Text as safe HTML, with the words that name objects marked as present or invented."""
    pieces, end = [], 0
    for mention in mentions(text):
        word = escape(text[mention.start : mention.end])
        there = mention.node in truth
        pieces.append(escape(text[end : mention.start]))
        pieces.append(f'<span class="there">{word}</span>' if there else f'<del class="wrong">{word}</del>')
        end = mention.end
    return "".join([*pieces, escape(text[end:])])


def judged(record: Record, truth: frozenset[str]) -> tuple[str, str]:
    """The answer as safe HTML, and a line on how it compares with the picture.

    Yes or no to "Is there a dog in the image?" is right or wrong as a whole; after any other prompt it is left alone.
    """
    text = escape(record.text)
    first = re.match(r"(yes|no)\b", record.text, re.IGNORECASE)
    if first:
        question = EXISTS.fullmatch(record.prompt.strip())
        asked = Vocabulary.load().node_of.get(question[1].lower()) if question else None
        if asked is None:
            return text, ""
        if (asked in truth) == (first[1].lower() == "yes"):
            return text, "Right"
        return f'<del class="wrong">{text}</del>', f"Wrong: {asked} is {'' if asked in truth else 'not '}in the picture"
    named = {mention.node for mention in mentions(record.text)}
    invented = sorted(named - truth)
    missed = sorted(node for node in truth - named if mentions(node))  # CHAIR cannot hear "bus"
    told = [f'<span class="wrong">Invented: {", ".join(invented)}</span>' if invented else "Nothing invented"]
    if "?" not in record.prompt:
        told.append(f"Missed: {', '.join(missed)}" if missed else "Nothing missed")
    return marked(record.text, truth), "<br>".join(told)


def answer(model: nn.Module, processor: Any, picture: Image.Image, prompt: str, spec: str | None) -> str:
    """One answer as safe HTML. What is wrong with the input is said in a sentence, in its place."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with wrapped(model, interventions(spec), processor):
                record = ask(model, processor, picture, prompt)
        except (ValueError, TypeError) as error:
            return problem(str(error))
    truth = known_scenes().get(record.image_sha256[0])
    text, verdict = (escape(record.text), "") if truth is None else judged(record, truth)
    tokens = len(record.token_ids)
    cost = f"{record.seconds:.2f} s, {tokens} token{'s' * (tokens != 1)}" + ", cut" * (record.finish == "length")
    notes = dict.fromkeys(f"Note: {escape(str(w.message))}" for w in caught if w.category is UserWarning)
    small = "".join(f'<p class="small">{line}</p>' for line in filter(None, [verdict, *notes]))
    head = f'<p class="small"><strong>{escape(spec or "none")}</strong> · {cost}</p>'
    return f'{head}<p class="text">{text or "(no words)"}</p>{small}'


def problem(sentence: str) -> str:
    """A sentence on what is wrong with the input, as safe HTML."""
    return f'<p class="wrong">{escape(sentence)}</p>'


def build(model_name: str = "tiny") -> gr.Blocks:
    """The page for a model, ready to `launch`. `ValueError` if the model cannot be loaded."""
    model, processor = load(model_name)

    def compare(picture: Image.Image | None, prompt: str, left: str, right: str) -> Iterator[tuple[str, str]]:
        """Answer under both methods, one after the other: a method is in force on the whole model."""
        if picture is None:
            yield problem("Choose a picture first."), ""
        elif not (prompt or "").strip():
            yield problem("Type a prompt first."), ""
        else:
            first = answer(model, processor, picture, prompt, left)
            yield first, ""
            yield first, answer(model, processor, picture, prompt, right)

    with gr.Blocks(title="vlmfix", analytics_enabled=False) as page:
        gr.HTML(f"<style>{STYLE}</style>")
        gr.Markdown(INTRO, elem_classes="vlmfix")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                picture = gr.Image(
                    EXAMPLES[0],
                    type="pil",
                    sources=["upload", "clipboard"],
                    label="Picture",
                    height=280,
                    elem_classes="vlmfix-picture",
                )
                gr.Examples(EXAMPLES, picture, label="Scenes")
            with gr.Column(scale=2, min_width=280):
                prompt = gr.Textbox(PROMPTS[0], label="Prompt", max_length=1000)
                gr.Examples(PROMPTS, prompt, label="Presets")
                with gr.Row():
                    hint = "pick or type, e.g. vhr:alpha=1.5"
                    left, right = (
                        gr.Dropdown(METHODS, value=m, label="Method", info=hint, allow_custom_value=True, min_width=120)
                        for m in ("none", "vhr")
                    )
                button = gr.Button("Ask", variant="primary")
                answers = []
                with gr.Row():
                    for _ in (left, right):
                        with gr.Column(min_width=240):
                            answers.append(gr.HTML(container=True, elem_classes="vlmfix-answer"))
        gr.on(
            [button.click, prompt.submit],
            compare,
            [picture, prompt, left, right],
            answers,
            concurrency_limit=1,
            api_name="compare",
        )
    return page


def launch(model_name: str, host: str = "127.0.0.1", port: int | None = None, share: bool = False) -> None:
    """Serve the page until interrupted, on the first free port from 7860 if none is given.

    Raises `ValueError` if the model cannot be loaded or the port is taken.
    """
    page = build(model_name)
    try:
        page.launch(server_name=host, server_port=port, share=share)
    except OSError as error:
        raise ValueError(f"cannot serve on {host}, port {port or 'from 7860 on'}: {error}") from error
