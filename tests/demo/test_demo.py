"""The demo page without a browser: answers and verdicts, what it says to wrong input, links, and what visitors cannot do."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image
from typer.testing import CliRunner

from tests import zoo
from vlmfix.asking.asker import ask
from vlmfix.asking.record import Record
from vlmfix.cli import app as cli
from vlmfix.demo import app, columns, compare, settings, studio, verdicts
from vlmfix.demo.links import Question
from vlmfix.engine.attachment import attached
from vlmfix.engine.wrap import wrapped
from vlmfix.hooks import REGISTRY
from vlmfix.method.registry import method_class, parse

ROOT = Path(__file__).parents[2]
DESCRIBE, YES_NO, _ = compare.PROMPTS.values()
RECORD = Record("organism", ["120x120"], ["?"], "Describe it.", [], "A dog.", [5, 6], "stop", 0.1, 1, {})
SCENE = studio.known_pictures()["test_0135"]  # a cat and a person
REST = ("none", "none")


@pytest.fixture(scope="module")
def organism():
    return studio.Studio.open("organism")


@pytest.fixture(scope="module")
def page():
    return app.build(studio.Studio.open("organism"))


@pytest.fixture(scope="module")
def asked(page):
    """The page's main handler: all its steps, each without message, state and link."""
    handler = next(f.fn for f in page.fns.values() if f.api_name == "compare")
    return lambda *inputs: [step[1:5] for step in handler(*inputs)]


@pytest.fixture
def scene():
    return Image.open(SCENE).convert("RGB")


def plain(html):
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def says(text, prompt="Describe it.", truth=("dog", "cat")):
    return verdicts.judged(dataclasses.replace(RECORD, text=text, prompt=prompt), frozenset(truth))


def made(organism, picture, spec, prompt=DESCRIBE):
    *_, (html, answers) = columns.stream(organism, picture, "mine.png", prompt, [spec])
    return html[0], answers


# Columns


def test_vhr_drops_what_none_invents(asked):
    left, right, *rest = asked(str(SCENE), DESCRIBE, 2, "none", "vhr", *REST)[-1]
    assert '<del class="wrong"' in left and "Invented: dining table" in plain(left)
    assert "<del" not in right and "Nothing invented" in right
    for answer, method in ((left, "none"), (right, "vhr")):
        assert re.search(rf"{method} \d+\.\d\d s · \d+ tokens · \d+ passes", plain(answer))
        assert '<span class="there">cat</span>' in answer
    assert rest == [compare.EMPTY] * 2


def test_all_columns_that_are_shown_answer(asked):
    html = asked(str(SCENE), DESCRIBE, 4, "none", "vhr", "beam", "truncate:words=3")[-1]
    assert [plain(h).split()[0] for h in html] == ["none", "vhr", "beam", "truncate:words=3"]
    assert "The image shows Nothing" in plain(html[3])


def test_words_come_as_they_are_written(organism, scene, monkeypatch):
    """The first of a long answer's words are shown before its last one is there."""
    going = threading.Event()

    class Slow(columns.Tokens):
        def put(self, value):
            super().put(value)
            if len(self.ids) == 4:
                going.wait(20)

    monkeypatch.setattr(columns, "Tokens", Slow)
    steps = columns.stream(organism, scene, "", DESCRIBE, ["none", "beam"])
    seen = []
    for (left, right), answers in steps:
        seen.append(plain(left))
        if "…" in seen[-1] and seen[-1].endswith("The image shows a"):
            assert answers is None
            if "260 passes" in plain(right):  # a method without words on the way is not waited for, nor waits
                going.set()
    assert going.is_set()
    assert "55 tokens" in seen[-1]


def test_nobody_waits_nobody_works(organism, scene, monkeypatch):
    tokens = []

    class Slow(columns.Tokens):
        def put(self, value):
            tokens.append(self)
            super().put(value)
            threading.Event().wait(0.03)

    monkeypatch.setattr(columns, "Tokens", Slow)
    steps = columns.stream(organism, scene, "", DESCRIBE, ["none"])
    next(steps)
    while not tokens:
        next(steps)
    steps.close()
    assert len(tokens) < 55


def test_columns_do_not_disturb_each_other_or_the_model(organism, scene):
    """All at once, and each by itself, under methods that edit, sample and stop early."""
    specs = ["vhr", "none", "chunks", "vhr:alpha=1.5", "rerank"]
    *_, (_, answers) = columns.stream(organism, scene, "", DESCRIBE, specs)
    assert attached(organism.model) is None
    for answer in answers:
        with wrapped(organism.model, parse(answer.spec), organism.processor):
            alone = ask(organism.model, organism.processor, scene, DESCRIBE)
        assert (answer.record.text, answer.record.passes) == (alone.text, alone.passes), answer.spec
    assert len(answers) == len(specs)


def test_a_twin_shares_the_weights_and_no_hooks(organism):
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in organism.model.modules()]  # noqa: E731
    before = hooks()
    asker = organism.asker(parse("vhr"))
    with asker.applied() as twin:
        own = {id(x) for x in (*organism.model.parameters(), *organism.model.buffers())}
        assert {id(x) for x in (*twin.parameters(), *twin.buffers())} == own
        assert attached(twin) is not None and attached(organism.model) is None
        assert hooks() == before


@pytest.mark.parametrize("model_type", zoo.SLICE)
def test_twins_of_other_architectures_compute_the_same(model_type):
    model = zoo.tiny(model_type)
    inputs = zoo.prompt(model, ["tttIttt"])
    twin = studio.Studio(model, None).twin()
    with torch.inference_mode():
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
        own = {x.data_ptr() for x in (*model.parameters(), *model.buffers())}
        assert all(x.data_ptr() in own for x in twin.state_dict().values())


def test_settings_reach_the_method(organism, scene):
    text = lambda spec: made(organism, scene, spec)[1][0].record.text  # noqa: E731
    assert text("none") == text("vhr:alpha=1") == text(" ") != text("vhr:alpha=2")


@pytest.mark.parametrize(
    "name, spec, note",
    [
        ("organism-qwen", "var", "var does not act on this model: no sink"),
        ("organism", "truncate:words=999", "truncate changed nothing"),
    ],
)
def test_an_idle_method_says_so(scene, name, spec, note):
    assert plain(made(studio.Studio.open(name), scene, spec)[0]).count(note) == 1


def test_an_unknown_picture_is_shaded_and_not_judged(organism):
    html, (answer,) = made(organism, Image.new("RGB", (40, 30), "green"), "none")
    assert "nvented" not in html and "<del" not in html
    assert "doubt" in html
    assert answer.chosen == () and "--method none mine.png" in html  # the monitor is the page's, not the visitor's
    html, (answer,) = made(organism, Image.new("RGB", (40, 30), "green"), "beam")  # which no monitor can follow
    assert answer.record.text and "doubt" not in html


def test_the_words_that_looked_least_are_shaded_most():
    scores = [{"score": s} for s in (0.9, 0.8, 0.2, 0.1, 0.6, 0.3)]
    html = verdicts.shaded("dog & a cat on cars", scores)
    assert re.findall(r'--doubt: (\d+)%" title="lookback ([\d.]+)">(\w+)<', html) == [
        ("0", "0.90", "dog"),
        ("83", "0.10", "cat"),
        ("50", "0.30", "cars"),
    ]
    assert plain(html) == "dog &amp; a cat on cars"


# Wrong input


@pytest.mark.parametrize("prompt", [None, "", "  \n"])
def test_no_prompt(page, prompt):
    handler = next(f.fn for f in page.fns.values() if f.api_name == "compare")
    (step,) = handler(str(SCENE), prompt, 2, "none", "vhr", *REST)
    assert [plain(str(x)) for x in step[:2]] == ["Type a prompt first.", plain(compare.EMPTY)]


@pytest.mark.parametrize(
    "spec, sentence",
    [
        ("vhrr", "unknown method 'vhrr'; did you mean 'vhr'?"),
        ("vhr:alhpa=2", "did you mean 'alpha'?"),
        ("vhr:alpha=-1", "expected a number above 0"),
        ("vhr:alpha=much", "vhr: alpha cannot be 'much'; expected a number above 0"),
        ("vhr+", "unknown method"),
        ("vlmfix.hooks.vhr:VHR", "unknown method"),
        ("pyramiddrop", "unknown method"),
        ("<script>alert(1)</script>", "&lt;script&gt;"),
        ("carve", "CARVE cuts out what a question is about"),
    ],
)
def test_what_is_wrong_with_a_column_is_said_there(asked, spec, sentence):
    left, right, *_ = asked(str(SCENE), DESCRIBE, 2, spec, "none", *REST)[-1]
    assert sentence in left.replace("&#x27;", "'")
    assert "<script" not in left
    assert plain(right).startswith("none")  # the other column still answers


def test_what_nobody_foresaw_is_a_sentence_and_logged(organism, scene, monkeypatch, caplog):
    monkeypatch.setattr(studio.Studio, "ask", lambda *_, **__: 1 / 0)
    html, answers = made(organism, scene, "none")
    assert plain(html) == "This answer failed on the server, whose log says why."
    assert answers == () and "ZeroDivisionError" in caplog.text


def png(path):
    """The bytes of a picture as PNG."""
    file = io.BytesIO()
    Image.open(path).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"\x89PNG no picture", "no picture that can be read"),
        (b"", "no picture that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture that can be read"),
        (png(SCENE)[:2000], "damaged"),
    ],
)
def test_broken_pictures(page, tmp_path, content, sentence):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        studio.read_picture(str(tmp_path / "a.png"))
    assert sentence in compare.objects(str(tmp_path / "a.png"))


def test_pictures_of_too_many_pixels_are_not_opened(tmp_path, monkeypatch):
    Image.new("1", (9000, 9000)).save(tmp_path / "a.png")
    monkeypatch.setattr(studio, "open_picture", lambda _: pytest.fail("opened"))
    with pytest.raises(ValueError, match="9000 x 9000 pixels"):
        studio.read_picture(str(tmp_path / "a.png"))


def test_prompts_that_are_too_long():
    with pytest.raises(ValueError, match="1001 characters"):
        studio.read_prompt("x" * 1001)


# What visitors cannot do


@pytest.mark.parametrize(
    "spec",
    [
        "none+antigravity.x:Y",
        "rerank:verifier=os:system",
        "rerank:verifier=antigravity.x",
        "headgain:head_list=/etc/passwd",
        "act:head_list=heads.json",
        "zerotuning:head_list=heads",
        "chunks:head_list=heads",
        "lookback:detector=lookback.json",
        "chunks:detector=L1H1",
        "rerank:truth=/etc",
        "rerank:verifier=oracle",
        "beam:n=1000",
        "rerank:n=11",
        "chunks:k=1e9",
        "var:layers=0-99999999",
        "vhr" + " " * 300 + ":alpha=2",
    ],
)
def test_specs_name_no_code_no_file_and_ask_for_nothing_huge(spec, monkeypatch):
    monkeypatch.setattr("vlmfix.method.registry.make", lambda *_: pytest.fail("made"))
    with pytest.raises(ValueError):
        settings.interventions(spec)


@pytest.mark.parametrize(
    "spec",
    ["headgain:head_list=L3H1/L3H5", "zerotuning:head_list=0/5,span=image", "carve:general=Look", "var+vhr:alpha=1.5"],
)
def test_harmless_specs_mean_what_they_mean_elsewhere(spec):
    assert settings.interventions(spec) == parse(spec)


def test_no_text_setting_is_open_unless_it_is_known():
    """A new method with a setting that takes any text must be looked at before visitors may set it."""
    for name in settings.METHODS[1:]:
        for field in dataclasses.fields(method_class(name)):
            if (name, field.name) not in settings.FREE_TEXT:
                with pytest.raises(ValueError):
                    settings.interventions(f"{name}:{field.name}=anything")


def test_every_setting_is_explained():
    assert set(settings.METHODS) == {"none", *REGISTRY} - {"pyramiddrop"}
    for name in settings.METHODS[1:]:
        found = settings.settings(name)
        assert all(one.about for one in found)
        assert {one.name for one in found} == {f.name for f in dataclasses.fields(method_class(name))} - settings.HIDDEN
    var = {one.name: one for one in settings.settings("var")}
    assert var["min_visual_mass"].default == "0.2" and var["min_visual_mass"].about.startswith(
        "s: least attention mass"
    )
    assert var["variant"].choices[0] == "hallucination" and var["skip_last"].choices == ("true", "false")
    assert var["p"].default == "" and "Empty: the variant's" in var["p"].about


def test_forms_are_inert():
    assert "<" not in compare.forms().removeprefix("<script").removesuffix("</script>").partition(">")[2]


# The verdicts


def test_words_that_name_objects_are_marked():
    text, told = says("A dog, two cars & a wine glass.")
    gone = '<del class="wrong" title="not in the picture">'
    assert text == f'A <span class="there">dog</span>, two {gone}cars</del> &amp; a {gone}wine glass</del>.'
    assert plain(" ".join(told)) == "Invented: car, wine glass Missed: cat"


def test_model_output_is_escaped():
    attack = "<img src=x onerror=alert(1)> a dog <b>"
    for prompt in ("Describe it.", "Is there a dog in the image?"):
        for text in (attack, "Yes " + attack, "No " + attack):
            html, _ = says(text, prompt)
            assert set(re.findall(r"<(\w+)", html)) <= {"span", "del"}
            assert "&lt;img" in html
    assert "<img" not in verdicts.shaded(attack, [{"score": 0.5}] * 7)
    assert "<img" not in verdicts.running(attack, attack)


@pytest.mark.parametrize(
    "prompt, text, verdict",
    [
        ("Is there a dog in the image?", "Yes", "Right"),
        ("Is there a dog in the image?", "No, there is no dog.", "Wrong: dog is there"),
        ("is there a sofa in this picture? ", "yes.", "Wrong: couch is not there"),
        ("Is there a car in the image?", "No", "Right"),
        ("Is the dog black?", "No", ""),
        ("Is there a black dog in the image?", "No", ""),
        ("What is it?", "Nothing", "Nothing invented"),
        ("What is it?", "Northern lights and a dog", "Nothing invented"),
    ],
)
def test_yes_and_no(prompt, text, verdict):
    assert plain(" ".join(says(text, prompt)[1])) == verdict


def test_what_chair_cannot_hear_is_not_called_missed():
    assert says("A dog and a bus.", truth=("dog", "bus"))[1][-1] == "Nothing missed"


def test_examples_are_known():
    assert len(studio.known_pictures()) == 510
    for name in (*compare.SCENES, *compare.PHOTOS):
        picture = studio.read_picture(str(studio.known_pictures()[name]))
        assert studio.picture_name(picture) == name and studio.truth(picture)


# Copy as code


@pytest.mark.parametrize("spec", ["none", "vhr:alpha=1.5,variant=paper", "pai+vcd", "rerank"])
def test_the_code_gives_the_same_text(organism, scene, spec, monkeypatch, capsys):
    _, (answer,) = made(organism, scene, spec)
    monkeypatch.chdir(ROOT)
    code = verdicts.python(answer)
    assert code.count("\n") == (2 if spec == "none" else 3)
    exec(code, {})
    assert capsys.readouterr().out.strip() == answer.record.text
    program, *arguments = shlex.split(verdicts.command(answer))
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert program == "vlmfix" and json.loads(done.stdout)["text"] == answer.record.text


def test_code_quotes_what_visitors_type(organism, scene):
    _, (answer,) = made(organism, scene, "none", prompt='What\'s "this"; $(rm) `x`?')
    tree = verdicts.python(answer)
    assert repr(answer.record.prompt) in tree
    assert shlex.split(verdicts.command(answer))[-1] == answer.record.prompt


# Links and files


def test_links_and_files_give_back_what_was_asked(organism, scene):
    _, answers = made(organism, scene, "vhr")
    for asked in (
        Question("test_0135", "Is there a dog & a cat? ä", ("none", "vhr:alpha=1.5,variant=paper", "var+vhr")),
        Question(None, "", ("none", "none")),
    ):
        assert Question.from_query("?" + asked.query()) == asked
        assert Question.from_json(asked.to_json(answers)) == asked
    kept = json.loads(asked.to_json(answers))["answers"]
    assert [Record(**one) for one in kept] == [answers[0].record]


@pytest.mark.parametrize("query", ["", "?__theme=dark", "x=1&y"])
def test_other_queries_are_left_alone(query):
    assert Question.from_query(query) is None


@pytest.mark.parametrize(
    "read, said, sentence",
    [
        (Question.from_query, "picture=../../etc/passwd", "none of the examples"),
        (Question.from_query, "prompt=" + "x" * 1001, "up to 1000 characters"),
        (Question.from_query, "method=vhr", "expected 2 to 4, got 1"),
        (Question.from_query, "&".join(["method=vhr"] * 5), "expected 2 to 4, got 5"),
        (Question.from_query, "&".join(["method=vhr"] * 50), "Max number of fields"),
        (Question.from_query, "method=none&method=" + "v" * 301, "up to 300 characters"),
        (Question.from_json, b"[" * 100_000, "no JSON"),
        (Question.from_json, b"\xff\xfe\x00", "no JSON"),
        (Question.from_json, "[1]", "no page saved here"),
        (Question.from_json, '{"picture": null, "prompt": "", "methods": "none"}', "expected a list"),
        (Question.from_json, '{"picture": ["x"], "prompt": "", "methods": ["none", "none"]}', "none of the examples"),
        (Question.from_json, '{"picture": null, "prompt": 1, "methods": ["none", "none"]}', "prompt: expected"),
        (Question.from_json, b" " * 1_000_001, "1,000,001 bytes"),
    ],
)
def test_hostile_links_and_files_are_sentences(read, said, sentence):
    message, *updates = compare.restored(read, said)
    assert sentence in plain(message)
    assert len(updates) == 7


def test_a_link_that_is_restored_fills_the_page():
    asked = Question("test_0100", "What?", ("pai", "none", "beam"))
    message, picture, prompt, n, *specs = compare.restored(Question.from_query, asked.query())
    assert (message, prompt, n, specs[:3]) == ("", "What?", 3, ["pai", "none", "beam"])
    assert studio.picture_name(picture) == "test_0100"
    assert len(specs) == 4


# The page


@pytest.fixture(scope="module")
def served(page):
    """Address of the running page, and the addresses outside this machine that it tried to reach."""
    connect, outside = socket.socket.connect, []

    def watched(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            outside.append(address)
            raise OSError("no network in this test")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        app.serve(page, server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
        try:
            yield f"http://127.0.0.1:{port}/", outside
        finally:
            page.close()


def call(url, name, data):
    """What the server says to a visitor who sends what he likes: the events of one call."""
    headers = {"Content-Type": "application/json"}
    sent = urllib.request.Request(f"{url}gradio_api/call/{name}", json.dumps({"data": data}).encode(), headers)
    with urllib.request.urlopen(sent, timeout=20) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/{name}/{event}", timeout=60) as reply:
        return reply.read().decode()


def test_the_page_is_served_and_answers_without_the_network(page, served):
    url, outside = served
    with urllib.request.urlopen(url, timeout=20) as reply:
        html = reply.read().decode()
    client = Client(url, verbose=False, analytics_enabled=False)
    inputs = (handle_file(SCENE), DESCRIBE, 2, "none", "vhr", *REST)
    message, left, right, *_, link = client.predict(*inputs, api_name="/compare")
    assert compare.PROMPTS["Yes or no"] in html
    assert not re.search(r"https?://(?!127\.0\.0\.1)[^\"']*\.(js|css|woff2?)\b", html)
    assert message == ""
    assert "Invented: dining table" in left and "Nothing invented" in right
    assert link == Question("test_0135", DESCRIBE, ("none", "vhr")).query()
    assert page.config["analytics_enabled"] is False
    assert outside == []


@pytest.mark.parametrize(
    "path", ["/etc/passwd", str(ROOT / "pyproject.toml"), "pyproject.toml", str(ROOT / "assets" / "README.md")]
)
def test_no_file_of_the_server_can_be_read(served, path):
    url, _ = served
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{url}gradio_api/file={path}", timeout=20)
    assert refused.value.code in (403, 404)
    given = {"path": path, "meta": {"_type": "gradio.FileData"}}
    said = call(url, "compare", [given, DESCRIBE, 2, "none", "none", *REST])
    assert said.startswith("event: error") and "The image" not in said


def test_limits(page):
    (handler,) = [f for f in page.fns.values() if f.api_name == "compare"]
    assert handler.concurrency_limit == 2
    assert {event for _, event in handler.targets} == {"click", "submit"}
    assert page._queue.max_size == 20
    assert app.LIMITS["max_file_size"] == "10mb"


def test_the_command_says_what_is_wrong():
    done = CliRunner().invoke(cli, ["demo", "--model", "/no/such/model"])
    assert done.exit_code == 1
    assert done.stderr.startswith("vlmfix: cannot load '/no/such/model'")
    assert len(done.stderr.splitlines()) == 1


class Page:
    """In the place of a page that is served until interrupted."""

    def __init__(self, given, error=None):
        self.given, self.error = given, error

    def launch(self, **options):
        self.given.update(options)
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    "options, exposed",
    [([], False), (["--server-name", "0.0.0.0"], True), (["--share"], True), (["--server-name", "localhost"], False)],
)
def test_the_command_hands_its_options_on_and_says_who_can_come_in(monkeypatch, options, exposed):
    given = {}
    monkeypatch.setattr(app, "build", lambda one, runs: given.update(model=one.name, runs=runs) or Page(given))
    done = CliRunner().invoke(cli, ["demo", "--model", "organism", "--port", "1234", "--runs", "there", *options])
    assert done.exit_code == 0
    host = "127.0.0.1" if "--server-name" not in options else options[1]
    wanted = {
        "model": "organism",
        "runs": Path("there"),
        "server_port": 1234,
        "server_name": host,
        "share": "--share" in options,
    }
    assert wanted.items() <= given.items()
    assert given["allowed_paths"] == []
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == exposed


def test_a_port_that_is_taken_is_said(monkeypatch):
    monkeypatch.setattr(app, "build", lambda *_: Page({}, OSError("Cannot find empty port in range: 80-80")))
    done = CliRunner().invoke(cli, ["demo", "--port", "80"])
    assert done.exit_code == 1
    assert "cannot serve on 127.0.0.1, port 80" in done.stderr
