"""The tab Compare: one picture, one prompt, two to four methods side by side."""

from __future__ import annotations

import json
from abc import ABCMeta
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from vlmfix.asking.pictures import open_picture
from vlmfix.demo.columns import stream
from vlmfix.demo.links import COLUMNS, Question
from vlmfix.demo.settings import METHODS, settings
from vlmfix.demo.studio import (
    LONGEST_PROMPT,
    Shared,
    Studio,
    known_pictures,
    picture_name,
    problem,
    read_picture,
    read_prompt,
    truth,
)
from vlmfix.demo.verdicts import COPY
from vlmfix.method.registry import method_class

SCENES = ("test_0135", "test_0100", "test_0053", "test_0140", "test_0009", "test_0093")
"""Picked by hand, no sample: VHR invents less on the first four scenes, as much on the fifth, more on the last."""
PHOTOS = ("000000000544", "000000184324", "000000311303", "000000577539", "000000005001", "000000168974")
PROMPTS = {"Describe": "Please describe this image in detail.", "Yes or no": "Is there a dog in the image?", "Free": ""}
FIRST = ("none", "vhr", "pai", "beam")
SHARED = """<p class="small">Columns are answered at the same time and share the machine: compare passes rather than
seconds.</p>"""
UNKNOWN = """<p class="small">Not annotated: words that name objects are shaded where they looked little at the
picture.</p>"""
EMPTY = '<p class="small">The answer appears here.</p>'
FIELD = """
<label data-of="choice">Method</label><select></select><p class="about"></p>
<details><summary>Settings</summary><p class="expect"></p><div class="form"></div>
<label data-of="text">As text</label><input class="spec" maxlength="300" spellcheck="false"></details>
"""
METHOD_JS = (files("vlmfix.demo") / "method.js").read_text("utf-8")
TO_LINK = """query => {
  const url = new URL(location), theme = url.searchParams.get('__theme');
  url.search = query;
  if (theme) url.searchParams.set('__theme', theme);
  history.replaceState(null, '', url);
}"""
TO_FILE = """text => {
  if (!text) return;
  const at = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  Object.assign(document.createElement('a'), {href: at, download: 'vlmfix.json'}).click();
  setTimeout(() => URL.revokeObjectURL(at), 1000);
}"""
READY = "() => ({__type__: 'update', interactive: true})"
TO_CLIPBOARD = "() => { navigator.clipboard.writeText(location.href); }"
FOCUS = "() => { document.querySelector('#prompt textarea, #prompt input').focus(); return ''; }"


# A plain subclass would have gradio write a stub file beside this one.
Picture: Any = ABCMeta.__new__(
    type(gr.Image),
    "Picture",
    (gr.Image,),
    {"is_template": True, "preprocess": lambda self, payload: payload and payload.path},
)
"""`gr.Image` that leaves it to `read_picture` to open an upload, and to say in a sentence what is wrong with it."""


def forms() -> str:
    """What the method fields need to know of all methods, for the page's head."""
    found: dict[str, Any] = {"none": {"about": "the untouched model", "expect": "", "settings": []}}
    for name in METHODS[1:]:
        cls = method_class(name)
        found[name] = {
            "about": f"{cls.summary} ({cls.paper})",
            "expect": f"Expect: {cls.expect}. Cost: {cls.cost}.",
            "settings": [vars(one) for one in settings(name)],
        }
    text = json.dumps(found).replace("<", "\\u003c")
    return f'<script type="application/json" id="vlmfix-methods">{text}</script>'


def tab(studio: Studio) -> Shared:
    """Lay the tab out, inside `gr.Tab(...)`, and say what other tabs may read."""
    examples = [str(known_pictures()[name]) for name in (SCENES if studio.embedded else PHOTOS)]
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            picture = Picture(
                examples[0],
                type="filepath",
                format="png",  # no pixel is lost, so that examples are recognised
                sources=["upload", "webcam", "clipboard"],
                label="Picture",
                height=280,
                elem_classes="picture",
            )
            known = gr.HTML(objects(examples[0]), elem_classes="known")
            gr.Examples(examples, picture, label="Examples", elem_id="examples")
        with gr.Column(scale=3, min_width=260):
            prompt = gr.Textbox(
                PROMPTS["Describe"], label="Prompt", max_length=LONGEST_PROMPT, max_lines=4, elem_id="prompt"
            )
            with gr.Row(elem_classes="presets"):
                presets = [gr.Button(name, size="sm", min_width=80) for name in PROMPTS]
                counts = [*range(COLUMNS[0], COLUMNS[1] + 1)]
                n_columns = gr.Radio(counts, value=2, label="Columns", elem_classes="columns", min_width=160)
            with gr.Row(elem_classes="grid"):
                methods = [_field(spec, n) for n, spec in enumerate(FIRST)]
            with gr.Row(elem_classes="actions"):
                button = gr.Button("Ask", variant="primary", interactive=False, elem_id="ask")
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
                message = gr.HTML(elem_id="message")
            with gr.Row(elem_classes="grid"):
                shown = [_shown(n) for n in range(COLUMNS[1])]
            with gr.Row(elem_classes="share"):
                copy_link = gr.Button("Copy link", size="sm", min_width=80)
                save = gr.Button("Save", size="sm", min_width=80)
                load = gr.UploadButton("Load", size="sm", min_width=80, file_types=[".json"], type="binary")
            gr.HTML(SHARED)
    answers, link, file = gr.State(()), gr.Textbox(visible=False), gr.Textbox(visible=False)
    everything = [picture, prompt, n_columns, *methods]

    def ask(path: str | None, typed: str, n: int, *specs: str) -> Iterator[tuple[Any, ...]]:
        """Answer under all methods; what is wrong with the input is said in a sentence, in its place."""
        idle = [EMPTY] * COLUMNS[1]
        try:
            opened, question = read_picture(path), read_prompt(typed)
            chosen = _chosen(n, specs)
            query = Question(picture_name(opened), question, chosen).query()
        except ValueError as error:
            yield problem(error), *idle, gr.skip(), gr.skip()
            return
        for html, made in stream(studio, opened, Path(path or "").name, question, chosen):
            yield "", *html, *idle[len(html) :], gr.skip() if made is None else made, query

    hidden: dict[str, Any] = {"show_progress": "hidden"}
    quiet: dict[str, Any] = {**hidden, "api_visibility": "private"}
    outputs = [message, *shown, answers, link]
    asked = gr.on(
        [button.click, prompt.submit], ask, everything, outputs, concurrency_limit=2, api_name="compare", **hidden
    )
    asked.then(None, link, None, js=TO_LINK)
    stop.click(None, None, None, cancels=[asked])
    for preset, text in zip(presets, PROMPTS.values(), strict=True):
        preset.click(None, None, prompt, js=f"() => {json.dumps(text)}" if text else FOCUS)
    n_columns.change(_visible, n_columns, [*methods, *shown], **quiet)
    picture.change(objects, picture, known, **quiet)
    copy_link.click(None, None, None, js=TO_CLIPBOARD)
    save.click(saved, [*everything, answers], [message, file], **quiet).then(None, file, None, js=TO_FILE)
    load.upload(lambda data: restored(Question.from_json, data), load, [message, *everything], **quiet)
    page = gr.context.Context.root_block
    assert page is not None
    loaded = page.load(
        lambda query: restored(Question.from_query, query),
        link,
        [message, *everything],
        js="() => location.search",
        **quiet,
    )
    loaded.then(None, None, button, js=READY)  # a click before that would ask what the page shows at first
    return Shared(picture, prompt, n_columns, tuple(methods), answers)


def _field(spec: str, n: int) -> gr.HTML:
    return gr.HTML(
        spec,
        html_template=FIELD,
        js_on_load=METHOD_JS,
        apply_default_css=False,
        visible=n < COLUMNS[0],
        elem_classes="method",
    )


def _shown(n: int) -> gr.HTML:
    return gr.HTML(EMPTY, js_on_load=COPY, apply_default_css=False, visible=n < COLUMNS[0], elem_classes="answer")


def _visible(n: int) -> list[Any]:
    return [gr.update(visible=k < n) for _ in ("methods", "answers") for k in range(COLUMNS[1])]


def _chosen(n: int, specs: Sequence[str]) -> tuple[str, ...]:
    """Specs of the columns that are shown."""
    return tuple(spec or "none" for spec in specs[: min(max(int(n), COLUMNS[0]), COLUMNS[1])])


def objects(path: str | None) -> str:
    """What is known of a picture, or what is wrong with it, as safe HTML."""
    if path is None:
        return ""
    try:
        found = truth(read_picture(path))
    except ValueError as error:
        return problem(error)
    return UNKNOWN if found is None else f'<p class="small">In the picture: {", ".join(sorted(found))}</p>'


def saved(path: str | None, typed: str, n: int, *rest: Any) -> tuple[str, str]:
    """A message, and the text of the file; `rest` is the specs and the answers."""
    *specs, answers = rest
    try:
        name = None if path is None else picture_name(read_picture(path))
        return "", Question(name, typed or "", _chosen(n, specs)).to_json(answers)
    except ValueError as error:
        return problem(error), ""


def restored(read: Callable[[Any], Question | None], said: Any) -> list[Any]:
    """A message, and new values of picture, prompt, number of columns and methods."""
    as_is = [gr.skip()] * (3 + COLUMNS[1])
    try:
        found = read(said)
    except ValueError as error:
        return [problem(f"Not restored: {error}"), *as_is]
    if found is None:
        return [gr.skip(), *as_is]
    picture = gr.skip() if found.picture is None else open_picture(known_pictures()[found.picture])
    return ["", picture, found.prompt, len(found.methods), *found.methods, *FIRST[len(found.methods) :]]
