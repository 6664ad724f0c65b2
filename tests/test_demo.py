"""The demo page: what it says about answers, what it says to wrong input, and that it comes up without the network."""

from __future__ import annotations

import dataclasses
import re
import socket
import urllib.request
import warnings

import pytest
from gradio_client import Client, handle_file
from PIL import Image
from typer.testing import CliRunner

from vlmfix.asking import Record
from vlmfix.attachment import attached
from vlmfix.cli import app as cli
from vlmfix.demo import app
from vlmfix.loading import load

RECORD = Record("tiny", ["96x96"], ["?"], "Describe it.", [], "A dog.", [5, 6], "stop", 0.1, 1, {})
SCENE = app.SCENES / "images" / "test_0032.png"  # a dining table and a vase


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture(scope="module")
def page():
    return app.build("tiny")


@pytest.fixture(scope="module")
def compare(page):
    """The page's handler, all its steps as a list."""
    handler = next(f.fn for f in page.fns.values() if f.api_name == "compare")
    return lambda *inputs: list(handler(*inputs))


@pytest.fixture
def scene():
    return Image.open(SCENE)


def plain(html):
    return re.sub(r"<[^>]*>", " ", html)


def says(text, prompt="Describe it.", truth=("dog", "cat")):
    return app.judged(dataclasses.replace(RECORD, text=text, prompt=prompt), frozenset(truth))


# The handler


def test_vhr_drops_what_none_invents(compare, scene):
    steps = compare(scene, app.PROMPTS[0], "none", "vhr")
    left, right = steps[-1]
    assert steps == [(left, ""), (left, right)]
    assert '<del class="wrong">person</del>' in left
    assert "Invented: person" in left
    assert "<del" not in right
    assert "Nothing invented" in right
    for answer, method in ((left, "none"), (right, "vhr")):
        assert re.search(rf"<strong>{method}</strong> · \d+\.\d\d s, \d+ tokens", answer)
        assert '<span class="there">vase</span>' in answer


def test_settings_reach_the_method_and_leave_nothing_behind(tiny, scene):
    asked = lambda spec: app.answer(*tiny, scene, app.PROMPTS[0], spec)  # noqa: E731
    without_head = lambda html: html.partition("</p>")[2]  # noqa: E731
    before, same, other = asked("none"), asked("vhr:alpha=1"), asked("vhr:alpha=1.5")
    assert without_head(before) == without_head(same) == without_head(asked(None)) != without_head(other)
    assert attached(tiny[0]) is None


def test_an_idle_method_says_so(tiny, scene):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = app.answer(*tiny, scene, app.PROMPTS[0], "var")
    assert html.count("Note: var will not act on this model") == 1


def test_an_unknown_picture_is_not_judged(tiny):
    html = app.answer(*tiny, Image.new("RGB", (40, 30), "green"), app.PROMPTS[0], "none")
    assert "nvented" not in html
    assert "<del" not in html
    assert " s, " in html


@pytest.mark.parametrize("prompt", [None, "", "  \n"])
def test_no_prompt(compare, scene, prompt):
    assert [plain(x).strip() for x in compare(scene, prompt, "none", "vhr")[-1]] == ["Type a prompt first.", ""]


def test_no_picture(compare):
    assert [plain(x).strip() for x in compare(None, "Hello", "none", "vhr")[-1]] == ["Choose a picture first.", ""]


@pytest.mark.parametrize(
    "spec, sentence",
    [
        ("vhrr", "unknown method &#x27;vhrr&#x27;; did you mean &#x27;vhr&#x27;?"),
        ("vhr:alhpa=2", "did you mean &#x27;alpha&#x27;?"),
        ("vhr:alpha=-1", "expected a number above 0"),
        ("vhr:alpha=much", "vhr: "),
        ("vhr+", "unknown method"),
        ("vlmfix.hooks.vhr:VHR", "unknown method"),
        ("<script>alert(1)</script>", "&lt;script&gt;"),
    ],
)
def test_unknown_methods_and_settings(compare, scene, spec, sentence):
    left, right = compare(scene, app.PROMPTS[1], spec, "none")[-1]
    assert sentence in left
    assert "<script" not in left
    assert "<strong>none</strong>" in right  # the other column still answers


def test_the_method_field_imports_no_code(monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(ValueError, match="unknown method"):
        app.interventions("none+antigravity.x:Y")


def test_placeholders_in_the_prompt_are_a_sentence(tiny, scene):
    html = app.answer(*tiny, scene, "<image> and <image>", "none")
    assert html.startswith('<p class="wrong">')
    assert "&lt;image&gt;" in html


# The verdicts


def test_words_that_name_objects_are_marked():
    text, verdict = says("A dog, two cars & a wine glass.")
    assert text == (
        'A <span class="there">dog</span>, two <del class="wrong">cars</del> &amp; a '
        '<del class="wrong">wine glass</del>.'
    )
    assert " ".join(plain(verdict).split()) == "Invented: car, wine glass Missed: cat"


def test_model_output_is_escaped():
    attack = "<img src=x onerror=alert(1)> a dog <b>"
    for prompt in ("Describe it.", "Is there a dog in the image?"):
        for text in (attack, "Yes " + attack, "No " + attack):
            html, _ = says(text, prompt)
            assert set(re.findall(r"<[^>]*>", html)) <= {
                '<span class="there">',
                "</span>",
                '<del class="wrong">',
                "</del>",
            }
            assert "&lt;img" in html


@pytest.mark.parametrize(
    "prompt, text, verdict",
    [
        ("Is there a dog in the image?", "Yes", "Right"),
        ("Is there a dog in the image?", "No, there is no dog.", "Wrong: dog is in the picture"),
        ("is there a sofa in this picture? ", "yes.", "Wrong: couch is not in the picture"),
        ("Is there a car in the image?", "No", "Right"),
        ("Is the dog black?", "No", ""),
        ("Is there a black dog in the image?", "No", ""),
        ("What is it?", "Nothing", "Nothing invented"),
        ("What is it?", "Northern lights and a dog", "Nothing invented"),
    ],
)
def test_yes_and_no(prompt, text, verdict):
    assert says(text, prompt)[1] == verdict


def test_what_chair_cannot_hear_is_not_called_missed():
    assert says("A dog and a bus.", truth=("dog", "bus"))[1].endswith("Nothing missed")


def test_all_scenes_are_known():
    assert len(app.known_scenes()) == 400
    assert all(app.Path(path).is_file() for path in app.EXAMPLES)


# The page


def test_the_page_is_served_and_answers_without_the_network(page, monkeypatch):
    connect, outside = socket.socket.connect, []

    def watched(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            outside.append(address)
            raise OSError("no network in this test")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    try:
        url = f"http://127.0.0.1:{port}/"
        with urllib.request.urlopen(url, timeout=20) as reply:
            html = reply.read().decode()
        client = Client(url, verbose=False, analytics_enabled=False)
        left, right = client.predict(handle_file(SCENE), app.PROMPTS[0], "none", "vhr", api_name="/compare")
    finally:
        page.close()
    assert app.PROMPTS[1] in html
    assert "googleapis" not in html
    assert "Invented: person" in left
    assert "Nothing invented" in right
    assert page.config["analytics_enabled"] is False
    assert outside == []


def test_one_question_at_a_time(page):
    (handler,) = [f for f in page.fns.values() if f.api_name == "compare"]
    assert handler.concurrency_limit == 1
    assert {event for _, event in handler.targets} == {"click", "submit"}


def test_the_command_says_what_is_wrong():
    done = CliRunner().invoke(cli, ["demo", "--model", "/no/such/model"])
    assert done.exit_code == 1
    assert done.stderr.startswith("vlmfix: cannot load '/no/such/model'")
    assert len(done.stderr.splitlines()) == 1


def test_the_command_hands_its_options_on(monkeypatch):
    given = {}

    class Page:
        def launch(self, **options):
            given.update(options)

    monkeypatch.setattr(app, "build", lambda name: given.update(model=name) or Page())
    done = CliRunner().invoke(cli, ["demo", "--model", "tiny-sinks", "--port", "1234", "--server-name", "0.0.0.0"])
    assert done.exit_code == 0
    assert given == {"model": "tiny-sinks", "server_port": 1234, "server_name": "0.0.0.0", "share": False}


def test_a_port_that_is_taken_is_said(monkeypatch):
    class Page:
        def launch(self, **_):
            raise OSError("Cannot find empty port in range: 80-80")

    monkeypatch.setattr(app, "build", lambda name: Page())
    done = CliRunner().invoke(cli, ["demo", "--port", "80"])
    assert done.exit_code == 1
    assert "cannot serve on 127.0.0.1, port 80" in done.stderr
