"""The page: one model, a tab for each view on it."""

from __future__ import annotations

import warnings
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from vlmfix.demo import compare, inside, probe, results
from vlmfix.demo.studio import Studio

STYLE = (files("vlmfix.demo") / "style.css").read_text("utf-8")
INTRO = """<header><h1>vlmfix</h1><p>What {model} says of a picture, untouched and under published interventions.
Where the content of the picture is known, objects are marked: <span class="there">present</span>,
<del class="wrong">invented</del>.</p></header>"""
LIMITS: dict[str, Any] = {"max_file_size": "10mb", "state_session_capacity": 100}
HERE = ("127.0.0.1", "localhost", "::1")


def build(studio: Studio, runs: str | Path = "runs") -> gr.Blocks:
    """The page for a model, for `serve`. Run folders below `runs` can be looked at."""
    with gr.Blocks(title="vlmfix", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        with gr.Row(elem_classes="top"):
            gr.HTML(INTRO.format(model=f"<code>{escape(studio.name)}</code>"))
            dark = gr.Button("Light / dark", size="sm", min_width=90, elem_id="theme")
        dark.click(None, None, None, js="() => { document.body.classList.toggle('dark'); }")
        with gr.Tab("Compare"):
            shared = compare.tab(studio)
        with gr.Tab("Look inside"):
            inside.tab(studio, shared)
        with gr.Tab("Probe"):
            probe.tab(studio, shared)
        with gr.Tab("Results"):
            results.tab(runs)
    return page.queue(max_size=20, default_concurrency_limit=2)


def serve(page: gr.Blocks, **where: Any) -> None:
    """Put a page on the network: `server_name`, `server_port`, `share`, ... of `launch`. No file but uploads and what
    the page shows can be read through it."""
    page.launch(
        theme=gr.themes.Default(
            primary_hue="indigo",
            neutral_hue="slate",
            font=["ui-sans-serif", "system-ui", "sans-serif"],
            font_mono=["ui-monospace", "Consolas", "monospace"],
        ),
        head=f"<style>{STYLE}</style>{compare.forms()}",
        allowed_paths=[],
        footer_links=["gradio", "settings"],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        **LIMITS,
        **where,
    )


def launch(
    studio: Studio,
    runs: str | Path = "runs",
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
) -> None:
    """Serve the page until interrupted, on the first free port from 7860 if none is given. `ValueError` if the port is
    taken."""
    page = build(studio, runs)
    if share or host not in HERE:
        who = "whoever has the public link" if share else f"whoever can reach {host} on this machine"
        warnings.warn(f"{who} can use the model, without a password", stacklevel=2)
    try:
        serve(page, server_name=host, server_port=port, share=share)
    except OSError as error:
        raise ValueError(f"cannot serve on {host}, port {port or 'from 7860 on'}: {error}") from error
