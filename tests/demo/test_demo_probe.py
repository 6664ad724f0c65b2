"""Probe: the probabilities are those of POPE's questions, and the bars are in the promised order."""

import re

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from vlmfix.asking.asker import ask_batch
from vlmfix.asking.words import spellings
from vlmfix.demo import probe
from vlmfix.demo.studio import Shared, Studio, known_pictures, truth
from vlmfix.eval.scorers.chair import coco_truth
from vlmfix.method.registry import parse

SCENE = known_pictures()["test_0135"]  # a cat and a person
GREY = Image.new("RGB", (300, 200), "grey")


@pytest.fixture(scope="module")
def studio():
    return Studio.open("organism")


@pytest.fixture(scope="module")
def picture():
    return Image.open(SCENE).convert("RGB")


def text(html):
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def rows(html):
    """Object -> its row, in the order of the page."""
    found = re.findall(
        r'<div class="row"><div>([^<]*)<small>.*?(?=<div class="row">|<h4>|<details>|</details>|$)', html
    )
    return found


def test_probabilities_are_those_of_the_first_token(studio, picture):
    names = ["person", "cat", "umbrella"] * 8  # more than one batch
    found = probe.p_yes(studio, picture, (), names[:3])
    words = {word: spellings(studio.processor, word) for word in ("yes", "no")}
    questions = [f"Is there {a} in the image?" for a in ("a person", "a cat", "an umbrella")]
    for name, question in zip(names, questions, strict=False):
        (record,) = ask_batch(
            studio.model, studio.processor, [(picture, question)], max_new_tokens=1, first_token=words
        )
        yes, no = (np.exp(record.first_token[word]) for word in ("yes", "no"))
        assert found[name] == pytest.approx(yes / (yes + no), abs=1e-4)
    assert found["cat"] > 0.9 > 0.3 > found["umbrella"]


def test_the_method_is_in_force_and_comes_off(studio, picture):
    plain = probe.p_yes(studio, picture, (), ["person", "giraffe"])
    under = probe.p_yes(studio, picture, parse("vhr"), ["person", "giraffe"])
    assert abs(plain["giraffe"] - under["giraffe"]) > 0.05
    assert probe.p_yes(studio, picture, (), ["person", "giraffe"]) == plain


def test_co_occurrence_is_counted_in_coco():
    pictures = coco_truth("rohrbach", "val")
    cats = [objects for objects in pictures.values() if "cat" in objects]
    dogs = [objects for objects in pictures.values() if "dog" in objects]
    of_cats, of_dogs = (sum("bed" in o for o in some) / len(some) for some in (cats, dogs))
    near = probe.beside(frozenset({"cat", "dog"}))
    assert near["bed"] == pytest.approx((of_cats + of_dogs) / 2, rel=1e-5)
    assert near["cat"] == pytest.approx(sum("cat" in o for o in dogs) / len(dogs), rel=1e-5)  # not with itself
    assert len(near) == 80
    assert set(probe.beside(frozenset()).values()) == {0.0}


def answers(yes):
    return {name: 0.51 if name in yes else 0.49 for name in probe.beside(frozenset())}


def test_what_is_there_comes_first_then_what_is_seen_with_it():
    known = frozenset({"cat", "dog"})
    html = probe.Probe(GREY, known, {"none": answers({"cat", "toaster"}), "vhr": answers({"cat", "dog"})}).html()
    names, near = rows(html), probe.beside(known)
    assert len(names) == 80 and set(names[:2]) == known
    absent = names[2:]
    shown = absent[: probe.NEAR + 1]
    assert shown[:-1] == sorted(set(near) - known, key=lambda n: (-near[n], n))[: probe.NEAR]
    assert shown[-1] == "toaster"  # far from cats and dogs, but a method says yes
    assert html.index("<details>") > html.index("toaster")
    assert "The other 67, no from all methods" in html
    assert absent[probe.NEAR + 1 :] == sorted(absent[probe.NEAR + 1 :], key=lambda n: (-near[n], n))


def test_wrong_answers_are_named_and_counted():
    known = frozenset({"cat", "dog"})
    html = probe.Probe(GREY, known, {"none": answers({"cat", "toaster"}), "vhr": answers({"cat", "dog"})}).html()
    assert "none 78 of 80 right, 1 invented, 1 missed; yes to 2" in text(html)
    assert "vhr 80 of 80 right, 0 invented, 0 missed; yes to 2" in text(html)
    assert 'title="none: 0.510 invented"' in html and 'title="none: 0.490 missed"' in html
    assert html.count("class=wrong") == 2
    assert "In the picture: 2" in html and "Not in the picture: 78" in html


def test_an_unknown_picture_is_not_judged():
    html = probe.Probe(GREY, None, {"none": answers({"cat", "toaster"}), "vhr": answers({"dog"})}).html()
    assert set(rows(html)[:2]) == {"cat", "toaster"}  # what the first method says is there
    assert "Said to be there: 2" in html and "no answer is called right or wrong" in html
    assert "class=wrong" not in html and "none yes to 2" in text(html)


def test_methods_have_letters_and_colours():
    html = probe.Probe(GREY, None, {"vhr": answers(()), "none": answers(()), "<b>": "no <such> method"}).html()
    keys = re.findall(r'<li><b class="key" style="--c:(#\w+)">(\w)</b>', html)
    assert [key for _, key in keys] == ["A", "B", "C"] and len({colour for colour, _ in keys}) == 3
    assert keys[1][0] == probe.UNTOUCHED
    assert "<such>" not in html and "&lt;b&gt;" in html and "no &lt;such&gt; method" in html
    assert 'class="key">C</b><i>' not in html  # no bars where there is no answer


def test_bars_come_method_by_method(studio):
    first, last = probe.probe(studio, str(SCENE), ["none", " none ", "vhr"])
    assert text(first).startswith("A none") and "B vhr …" in text(first)
    assert re.match(r"A none \d+ of 80 right.* B vhr \d+ of 80 right", text(last))
    assert "C" not in re.findall(r'class="key"[^>]*>(\w)<', last)  # the same method twice is asked once
    assert set(rows(last)[:2]) == truth(Image.open(SCENE)) == {"cat", "person"}


@pytest.mark.parametrize(
    "path, specs, sentence",
    [
        (None, ["none"], "Choose a picture first."),
        (__file__, ["none"], "This file is no picture"),
        (str(SCENE), ["vhrr"], "unknown method"),
        (str(SCENE), ["beam", "vhr:alpha=much"], "beam works on whole answers"),
        (str(SCENE), ["carve:layers=99"], "layers: expected"),
    ],
)
def test_what_is_wrong_is_one_sentence_in_place(studio, path, specs, sentence):
    *_, html = probe.probe(studio, path, specs)
    assert sentence in html and "<h4>" not in html and 'class="wrong"' in html


def test_one_bad_method_does_not_stop_the_others(studio):
    *_, html = probe.probe(studio, str(SCENE), ["vhrr", "none"])
    assert "unknown method" in html and "In the picture: 2" in html


def test_the_tab_takes_the_methods_of_the_columns_that_are_shown(studio, monkeypatch):
    monkeypatch.setattr(probe, "probe", lambda *given: iter([given[1:]]))
    with gr.Blocks() as page:
        methods = tuple(gr.Textbox() for _ in range(4))
        shared = Shared(gr.Image(type="filepath"), gr.Textbox(), gr.Radio([2, 3, 4]), methods, gr.State(()))
        probe.tab(studio, shared)
    (run,) = [f.fn for f in page.fns.values() if f.api_name == "probe"]
    assert list(run("p.png", 3, "none", "vhr", "pai", "vcd")) == [("p.png", ("none", "vhr", "pai"))]
