"""The demo page in a real browser, Chromium, on the embedded model. Screenshots are kept in `build/demo`."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
from PIL import Image

from vlmfix.demo import app, columns, compare
from vlmfix.demo.links import Question
from vlmfix.demo.studio import Studio

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install vlmfix[dev])")
expect = playwright.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt install chromium)")
SHOTS = Path(__file__).parents[2] / "build" / "demo"
WAIT = 120_000
"""Milliseconds that a loaded machine may take: with ten processes on two cores, two visitors waited 100 s."""
JUMPS = """() => { window.jumps = []; new PerformanceObserver(list => {
  for (const one of list.getEntries()) if (!one.hadRecentInput) window.jumps.push(one.value);
}).observe({type: 'layout-shift'}); }"""

TOO_WIDE = """() => {
  const scrolls = one => one && (/auto|scroll/.test(getComputedStyle(one).overflowX) || scrolls(one.parentElement));
  const beyond = one => one.getBoundingClientRect().right > innerWidth + 1;
  const found = [...document.querySelectorAll('main *')].filter(one => one.checkVisibility() && beyond(one));
  return found.filter(one => !scrolls(one.parentElement)).map(one => one.outerHTML.slice(0, 80));
}"""
"""What reaches out of the window, or is cut off there, and cannot be scrolled to by itself."""


@pytest.fixture(scope="module")
def url():
    page = app.build(Studio.open("organism"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    app.serve(page, server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}/"
    page.close()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(url, chromium):
    """Opens the page, as another visitor each time; afterwards no visitor's console may hold an error."""
    errors, contexts = [], []

    def opened(query="", width=1400, theme="light"):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url + query)
        expect(page.get_by_role("button", name="Ask")).to_be_enabled(timeout=WAIT)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


def ask(page):
    page.get_by_role("button", name="Ask").click()


def answers(page, n=2):
    """Texts of the columns, when all are done."""
    expect(page.locator(".answer details:visible")).to_have_count(n, timeout=WAIT)
    return [one.inner_text() for one in page.locator(".block.answer:visible").all()]


def method(page, n):
    return page.locator(".block.method").nth(n)


def test_an_example_is_run_and_its_link_opens_the_same_page(visit):
    page = visit()
    expect(page).to_have_title("vlmfix")
    page.locator("#examples button").nth(2).click()  # a cat and a dining table
    expect(page.locator(".known p")).to_have_text("In the picture: cat, dining table", timeout=WAIT)
    ask(page)
    left, right = answers(page)
    assert left.startswith("none\n") and "Invented: cup" in left and right.startswith("vhr\n")
    expect(page).to_have_url(re.compile(r"picture=test_0053&prompt=Please.*&method=none&method=vhr$"))
    again = visit("?" + page.url.partition("?")[2])
    expect(again.locator(".known p")).to_have_text("In the picture: cat, dining table", timeout=WAIT)
    ask(again)
    text = lambda shown: shown.split("\n\n")[1]  # noqa: E731
    assert [text(x) for x in answers(again)] == [text(left), text(right)]


def test_methods_are_compared_with_the_keyboard_alone(visit):
    page = visit()
    page.get_by_label("3", exact=True).focus()
    page.keyboard.press("Space")
    expect(page.locator(".block.answer:visible")).to_have_count(3)
    method(page, 1).locator("summary").focus()
    page.keyboard.press("Enter")
    alpha = method(page, 1).get_by_label("alpha", exact=True)
    expect(alpha).to_have_attribute("placeholder", "2.0")
    expect(alpha).to_have_accessible_description("Scale of the chosen heads (paper).")
    alpha.focus()
    page.keyboard.type("1.5")
    method(page, 1).get_by_label("variant", exact=True).select_option("paper")
    expect(method(page, 1).get_by_label("As text")).to_have_value("vhr:alpha=1.5,variant=paper")
    method(page, 2).get_by_label("Method").select_option("vcd")
    page.locator("#prompt textarea, #prompt input").focus()
    page.keyboard.press("Enter")
    heads = [shown.splitlines()[0] for shown in answers(page, 3)]
    assert heads == ["none", "vhr:alpha=1.5,variant=paper", "vcd"]


def test_a_method_typed_as_text_fills_the_form(visit):
    page = visit()
    field = method(page, 0)
    field.locator("summary").click()
    field.get_by_label("As text").fill("pai:alpha=0.2")
    field.get_by_label("As text").press("Tab")
    expect(field.get_by_label("Method")).to_have_value("pai")
    expect(field.get_by_label("alpha", exact=True)).to_have_value("0.2")
    field.get_by_label("As text").fill("var+nonsense")
    field.get_by_label("As text").press("Tab")
    expect(field.get_by_label("Method")).to_have_value("")
    page.get_by_role("button", name="Yes or no").click()
    ask(page)
    expect(page.locator(".answer .wrong").first).to_contain_text("unknown method 'nonsense'", timeout=WAIT)
    expect(page.locator(".block.answer").nth(1)).to_contain_text("Right", timeout=WAIT)


def test_nothing_jumps_while_words_come(visit):
    page = visit()
    expect(page.locator(".picture img")).to_be_visible()
    page.evaluate(JUMPS)
    places = lambda: [one.bounding_box() for one in page.locator(".block.answer:visible, .share, #ask").all()]  # noqa: E731
    before = places()
    ask(page)
    answers(page)
    assert places() == before
    assert sum(page.evaluate("window.jumps")) < 0.02  # 0.1 is called good by the makers of the measure


def test_stop_ends_the_work(visit, monkeypatch):
    put = []

    class Slow(columns.Tokens):
        def put(self, value):
            put.append(time.sleep(0.25))
            super().put(value)

    monkeypatch.setattr(columns, "Tokens", Slow)
    page = visit()
    ask(page)
    expect(page.locator(".answer .text").first).to_contain_text("The image", timeout=WAIT)
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(800)
    done = len(put)
    page.wait_for_timeout(700)
    assert len(put) == done < 2 * 55
    monkeypatch.undo()
    ask(page)
    assert "55 tokens" in answers(page)[0]


def test_a_word_is_looked_into(visit):
    page = visit()
    page.get_by_role("tab", name="Look inside").click()
    page.get_by_role("button", name="Look inside").click()
    words = page.locator(".inside button[data-word]")
    words.filter(has_text="cat").first.click(timeout=WAIT)
    expect(words.filter(has_text="cat").first).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".inside").filter(has_text="Behind “cat”").first).to_be_visible(timeout=WAIT)


def test_all_objects_are_probed(visit):
    page = visit()
    page.get_by_role("tab", name="Probe").click()
    page.get_by_role("button", name="Probe").click()
    expect(page.locator(".block.probe").filter(has_text="vhr 80 of 80 right")).to_be_visible(timeout=WAIT)


def test_results_are_shown(visit):
    page = visit()
    page.get_by_role("tab", name="Results").click()
    expect(page.locator(".block.results table").first).to_be_visible()


def test_uploads(visit, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture at all")
    Image.new("RGB", (60, 40), "green").save(tmp_path / "my garden.png")
    page = visit()
    page.get_by_label("Remove Image").click()
    ask(page)
    expect(page.locator("#message")).to_have_text("Choose a picture first.", timeout=WAIT)
    page.locator(".picture input[type=file]").set_input_files(tmp_path / "broken.png")
    expect(page.locator(".known .wrong")).to_contain_text("no picture that can be read", timeout=WAIT)
    ask(page)
    expect(page.locator("#message .wrong")).to_contain_text("no picture that can be read", timeout=WAIT)
    page.get_by_label("Remove Image").click()
    page.locator(".picture input[type=file]").set_input_files(tmp_path / "my garden.png")
    expect(page.locator(".known p")).to_contain_text("Not annotated", timeout=WAIT)
    ask(page)
    left, _ = answers(page)
    assert "nvented" not in left
    expect(page.locator(".answer .doubt").first).to_be_visible()
    page.locator(".answer summary").first.click()
    expect(page.locator(".answer pre").first).to_contain_text("my garden.png")
    assert "picture=" not in page.url


def test_two_visitors_at_once(visit):
    """Each asks as soon as the page lets them: about what the link says, not what the page shows at first."""
    one = visit("?" + Question("test_0053", "Please describe this image in detail.", ("pai", "none")).query())
    two = visit("?" + Question("test_0135", "Is there a cat in the image?", ("vhr", "beam")).query())
    ask(one)
    ask(two)
    first, second = answers(one), answers(two)
    assert [a.splitlines()[0] for a in (*first, *second)] == ["pai", "none", "vhr", "beam"]
    assert all("cat" in a for a in first)
    assert all("\nRight" in a for a in second)


def test_a_page_is_saved_and_loaded(visit, tmp_path):
    page = visit()
    method(page, 1).get_by_label("Method").select_option("beam")
    ask(page)
    answers(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    download.value.save_as(tmp_path / "page.json")
    kept = json.loads((tmp_path / "page.json").read_text("utf-8"))
    assert (kept["picture"], kept["methods"]) == ("test_0135", ["none", "beam"])
    assert [one["text"][:9] for one in kept["answers"]] == ["The image", "The scene"]
    other = visit()
    other.locator(".share input[type=file]").set_input_files(tmp_path / "page.json")
    expect(method(other, 1).get_by_label("Method")).to_have_value("beam", timeout=WAIT)
    (tmp_path / "broken.json").write_text("[")
    other.locator(".share input[type=file]").set_input_files(tmp_path / "broken.json")
    expect(other.locator("#message .wrong")).to_contain_text("Not restored: the file is no JSON", timeout=WAIT)


def test_code_is_copied(visit):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page)
    answers(page)
    page.locator(".answer summary").nth(1).click()
    page.locator(".answer").nth(2).locator("button.copy").first.click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "vlmfix.wrap(model, 'vhr', processor)" in copied


@pytest.mark.parametrize("width", [380, 800, 1400])
def test_screenshots(visit, width, request):
    """With `--screenshots` they are taken, to be looked at; that nothing is wider than the window can be checked."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    asked = Question("test_0135", compare.PROMPTS["Describe"], ("none", "beam", "vhr"))
    page = visit("?" + asked.query(), width)
    expect(page.locator(".block.answer:visible")).to_have_count(3, timeout=WAIT)
    ask(page)
    answers(page, 3)
    for tab in ("Compare", "Look inside", "Probe", "Results"):
        page.get_by_role("tab", name=tab).click()
        if tab in ("Look inside", "Probe"):
            page.get_by_role("button", name=tab, exact=True).click()
        if tab == "Look inside":
            page.locator(".inside button[data-word]").last.click(timeout=WAIT)
            expect(page.locator(".inside img").nth(1)).to_be_visible(timeout=WAIT)
        if tab == "Probe":
            expect(page.locator(".block.probe").filter(has_text="vhr 80 of 80 right")).to_be_visible(timeout=WAIT)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        assert page.evaluate(TOO_WIDE) == [], tab
        for theme in ("light", "dark") if request.config.getoption("--screenshots") else ():
            name = f"{tab.lower().replace(' ', '-')}-{width}-{theme}.png"
            page.screenshot(path=SHOTS / name, full_page=True, animations="disabled")
            page.get_by_role("button", name="Light / dark").click()


def test_the_theme_is_the_visitors_own(visit):
    colour = "getComputedStyle(document.querySelector('.block.answer')).backgroundColor"
    light, dark = (visit("", theme=theme) for theme in ("light", "dark"))
    assert light.evaluate(colour) == "rgb(255, 255, 255)"
    assert dark.evaluate(colour) == "rgb(22, 29, 41)"
    dark.get_by_role("button", name="Light / dark").click()
    assert dark.evaluate(colour) == "rgb(255, 255, 255)"
