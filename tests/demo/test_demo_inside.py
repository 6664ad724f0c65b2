"""Look inside: what is read of the attention is what the model computes, and the maps show it where it belongs."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from tests.models import ARCHITECTURES, IMAGE, picture_prompt
from vlmfix.asking.batch import Batch
from vlmfix.demo import inside, looks, maps
from vlmfix.demo.studio import Answer, Shared, Studio, known_pictures
from vlmfix.demo.watch import Seen, Shown, Sinks, Watch, inspect, words_of
from vlmfix.engine.attachment import attached
from vlmfix.engine.wrap import wrapped
from vlmfix.hooks.parts import views
from vlmfix.method.registry import parse

DESCRIBE = "Please describe this image in detail."
SCENE = known_pictures()["test_0135"]  # a cat and a person; the untouched model invents a dining table
PHOTO = known_pictures()["000000000544"]  # 640 x 427: the processor cuts the sides off


@pytest.fixture(scope="module")
def studio():
    return Studio.open("organism")


@pytest.fixture(scope="module")
def looked(studio):
    """A look at a scene by method; each is asked once."""
    known, found = Sinks(origin="none are known"), {}

    def look(spec, prompt=DESCRIBE, path=SCENE):
        key = spec, prompt, path
        if key not in found:
            found[key] = inspect(studio, Image.open(path).convert("RGB"), prompt, parse(spec), known)
        return found[key]

    return look


# What is read


def test_looking_changes_no_answer(studio, looked):
    for spec in ("none", "vhr", "pai", "act"):
        plain = studio.ask(Image.open(SCENE).convert("RGB"), DESCRIBE, parse(spec))
        found = looked(spec)
        assert found.record.token_ids == plain.token_ids
        assert found.record.method == plain.method
        assert found.record.effects == plain.effects
        assert found.spec == spec


def test_it_is_the_attention_that_the_model_itself_computes(studio, looked):
    found = looked("none")
    twin = studio.twin()
    twin.set_attn_implementation("eager")
    run = Batch.of(twin, studio.processor, [([Image.open(SCENE).convert("RGB")], DESCRIBE)], {})
    inputs = run.after(found.record.token_ids[:-1])
    with torch.inference_mode():
        layers = twin(**inputs, use_cache=False, output_attentions=True).attentions
    image = (inputs["input_ids"] == twin.config.image_token_id)[0]
    n = len(found.record.token_ids)
    wanted = torch.stack([a[0, :, -n:][..., image] for a in layers]).permute(2, 0, 1, 3).numpy()
    assert found.before.image.shape == (n, 8, 8, 100)
    np.testing.assert_allclose(found.before.image, wanted, atol=5e-4)
    np.testing.assert_allclose(found.before.total, 1, atol=1e-5)
    assert found.after is found.before and found.untouched is None


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_so_it_is_on_other_models(kind):
    model = ARCHITECTURES[kind]("eager")
    inputs = picture_prompt(model)
    with wrapped(model, [Watch(moment="before"), Watch()]):
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        memos = attached(model).last().memos
    before, after = (Watch().seen(memo, 0, slice(4)) for memo in memos)
    grown = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if "mm_token_type_ids" in inputs:
        grown["mm_token_type_ids"] = (tokens[:, :-1] == IMAGE).int()
    with torch.no_grad():
        layers = model(input_ids=tokens[:, :-1], **grown, use_cache=False, output_attentions=True).attentions
    wanted = torch.stack([a[0, :, -4:][..., tokens[0, :-1] == IMAGE] for a in layers]).permute(2, 0, 1, 3)
    np.testing.assert_allclose(before.image, wanted.numpy(), atol=1e-3)
    np.testing.assert_array_equal(before.image, after.image)


def test_the_untouched_model_reads_the_same_words(looked):
    found = looked("lookback")  # a monitor: the model is as if untouched
    np.testing.assert_allclose(found.untouched.image, found.before.image, atol=1e-3)
    found = looked("vhr")
    assert found.untouched.image.shape == found.before.image.shape
    assert abs(found.untouched.image - found.before.image).max() > 0.09


def test_before_and_after_an_edit_of_scores_and_of_weights(looked):
    pai = looked("pai")
    assert (pai.after.shares(range(8)) - pai.before.shares(range(8))).min() > 0  # it raises image tokens only
    assert (pai.after.by_head([0]) - pai.before.by_head([0])).max() > 0.2
    act = looked("act")
    assert abs(act.after.image - act.before.image).max() > 0.09
    vhr = looked("vhr")
    assert vhr.after is vhr.before  # it edits heads, not attention


def test_heads_that_a_method_chose(looked):
    assert looked("pai").heads == {}
    assert list(looked("vhr").heads) == [1, 4, 5, 6, 7]
    assert all(len(heads) == 4 for heads in looked("vhr").heads.values())
    assert looked("headgain:head_list=L3H1/L3H5").heads == {3: (1, 5)}
    assert looked("act:head_list=L2H4").heads == {2: (4,)}


def test_what_rewrites_the_answer_is_followed(looked):
    found = looked("truncate:words=5")
    assert len(found.before.image) == len(found.record.token_ids) < 10
    np.testing.assert_allclose(found.untouched.image, found.before.image, atol=1e-3)
    with pytest.raises(ValueError, match="look inside follows one answer token by token; beam search"):
        looked("beam")


def test_carve_answers_from_two_pictures(looked):
    found = looked("carve", "Is there a person in the image?", PHOTO)
    first, second = found.shown
    assert (first.first, first.n, second.first, second.n) == (0, 100, 100, 100)
    assert first.picture.size == (640, 427) and second.picture.size != first.picture.size
    assert found.before.image.shape[-1] == 200 and found.untouched.image.shape[-1] == 100
    x = np.arange(200.0)
    assert first.grid(x)[0, 1] == 1 and second.grid(x)[0, 1] == 101
    html = looks.carved(found)
    assert html.count("<figure>") == 3 and "first look said" in html
    assert looks.carved(looked("vhr")) == ""


def test_a_picture_whose_sides_are_cut_off_keeps_its_place(looked):
    view = looked("none", DESCRIBE, PHOTO).original.view
    assert view.box == (106, 0, 533, 427)


def test_sinks_are_told_by_dimensions(studio, looked):
    other = Studio.open("organism-qwen")  # which has no visual sinks
    none = Sinks.of(other.model, other.processor)
    assert none.dims == () and "no sink dimension" in none.origin
    assert "No visual sinks are marked: none are known." in looks.sinks_text(looked("none"), range(8))
    own = Sinks.of(studio.model, studio.processor)
    assert own.dims == (22,) and own.origin == "calibrated"
    method = parse("var:dims=5/22,tau=2,rho=0")
    found = inspect(studio, Image.open(SCENE).convert("RGB"), DESCRIBE, method, none)
    assert found.sinks == Sinks((5, 22), 2.0, "as var was told")
    assert found.after.sinks.shape == (8, 100)
    n = int(found.after.marked(range(8)).sum())
    assert 10 < n < 30  # empty corners were made sinks
    assert f"✕ marks the {n} of 100 image tokens" in looks.sinks_text(found, range(8))


def test_words_hold_all_their_tokens(studio):
    tokens = studio.processor.tokenizer.encode("A dining table, a surfboard.", add_special_tokens=False)
    words = words_of(studio.processor, [*tokens, studio.model.generation_config.eos_token_id])
    assert " ".join(word.text for word in words) == "A dining table, a surfboard."
    assert sorted(step for word in words for step in word.steps) == list(range(len(tokens)))
    assert len(words[2].steps) > 1  # the comma is a token of its own


def test_visitors_do_not_see_each_other(studio, looked):
    specs = ["none", "vhr", "pai", "vhr"]
    picture = Image.open(SCENE).convert("RGB")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda spec: inspect(studio, picture, DESCRIBE, parse(spec), Sinks()), specs))
    for one, spec in zip(found, specs, strict=True):
        assert one.record.token_ids == looked(spec).record.token_ids
        np.testing.assert_allclose(one.after.image, looked(spec).after.image, atol=1e-3)
    assert attached(studio.model) is None


# Sums


def seen():
    image = np.zeros((2, 3, 2, 4), dtype=np.float32)
    image[0, 0, 0] = [0.1, 0.2, 0.3, 0.0]
    image[0, 0, 1] = [0.5, 0.0, 0.0, 0.0]
    image[1, 2, 1] = [0.0, 0.0, 0.0, 0.8]
    sinks = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]], dtype=bool)
    return Seen((0, 2, 5), image, np.ones((2, 3, 2), dtype=np.float32), sinks)


def test_heat_is_averaged_over_tokens_layers_and_heads():
    np.testing.assert_allclose(seen().heat([0], [0]), [0.3, 0.1, 0.15, 0])
    np.testing.assert_allclose(seen().heat([0], [0], 0), [0.1, 0.2, 0.3, 0])
    np.testing.assert_allclose(seen().heat([0, 1], [0, 2, 5]), [0.6 / 12, 0.2 / 12, 0.3 / 12, 0.8 / 12], rtol=1e-6)
    np.testing.assert_allclose(seen().heat([1], [5], 1), [0, 0, 0, 0.8])


def test_shares_are_of_all_attention():
    one = seen()
    np.testing.assert_allclose(one.shares([0]), [0.55, 0], rtol=1e-6)
    np.testing.assert_allclose(one.shares([0, 2], 1), [0.25, 0], rtol=1e-6)
    one.total[1, 2, 1] = 0.8  # a layer whose own sinks take the rest
    np.testing.assert_allclose(one.shares([5], 1), [0, 1], rtol=1e-6)
    np.testing.assert_allclose(one.by_head([0, 1]), [[0.3, 0.25], [0, 0], [0, 0.5]], rtol=1e-6)


def test_a_sink_is_one_in_half_of_the_layers():
    assert seen().marked([0, 2]).tolist() == [True, True, False, False]
    assert seen().marked([0, 2, 5]).tolist() == [True, True, False, False]
    assert seen().marked([2]).tolist() == [True, False, False, False]


def test_bands_are_thirds_of_the_layers_that_attend():
    assert list(looks.bands(range(6)))[:4] == ["All 6 layers", "Early: 0 to 1", "Middle: 2 to 3", "Late: 4 to 5"]
    found = looks.bands((3, 7, 11, 15, 19))
    assert found["Early: 3 to 7"] == (3, 7) and found["Layer 19"] == (19,) and len(found) == 1 + 2 + 5


# Pictures and tables


def test_heat_lies_over_its_cell():
    heat = np.zeros((2, 4))
    heat[1, 2], heat[0, 0] = 1.0, 0.5
    picture = Image.new("RGB", (400, 100), (90, 90, 90))
    drawn = maps.over(picture, heat, (0, -50, 400, 150), 1.0)
    assert drawn.size == (420, 105)
    grey, red, half = drawn.getpixel((157, 20)), drawn.getpixel((262, 80)), drawn.getpixel((50, 20))
    assert grey == (90, 90, 90)
    hot = [c * 225 / 255 + 90 * 30 / 255 for c in maps.HOT]
    np.testing.assert_allclose(red, hot, atol=2)
    assert half[0] > 150 and 90 < half[1] < 160
    marked = np.zeros((2, 4), dtype=bool)
    marked[1, 3] = True
    assert maps.over(picture, heat, (0, -50, 400, 150), 1.0, marked).getpixel((367, 104 - 0)) != grey


def test_what_the_model_has_not_seen_is_dark():
    drawn = maps.over(Image.new("RGB", (200, 100), (200, 200, 200)), np.zeros((2, 2)), (50, 0, 150, 100), 1.0)
    assert drawn.getpixel((210, 100)) == (200, 200, 200)
    assert max(drawn.getpixel((20, 100))) < 80 and max(drawn.getpixel((400, 100))) < 80


def test_nothing_at_all_is_drawn_grey():
    drawn = maps.over(Image.new("RGB", (10, 10), (90, 90, 90)), np.zeros((2, 2)), (0, 0, 10, 10), 0.0)
    assert drawn.getpixel((100, 100)) == (90, 90, 90)


def test_words_are_buttons_and_escaped():
    html = maps.strip([("<b>A", 0.25), ("dog.", 0.5)], ["", "invented"], 1)
    assert re.findall(r'data-word="(\d)" aria-pressed="(\w+)"', html) == [("0", "false"), ("1", "true")]
    assert "<b>" not in html and "&lt;b&gt;A" in html
    assert 'aria-label="dog., invented: 50 percent' in html and "--v:25.0%" in html


def test_heads_are_a_table_with_the_chosen_framed():
    html = maps.heads({1: [1.0, 2.0], 4: [0.0, 4.0]}, {4: (1,)}, "what")
    assert re.findall(r"<th scope=\"row\">(\d)</th>", html) == ["1", "4"]
    assert html.count("class=on") == 1 and 'title="layer 4, head 1: 4.0, chosen">4.0' in html
    assert 'style="--v:42%" title="layer 1, head 1: 2.0"' in html
    wide = maps.heads({0: [1.0] * 32, 2: [0.5] * 7 + [3.0] + [0.5] * 24}, {}, "what", " %")
    assert "many" in wide and ">1<" not in wide and "Highest: L2H7 3.0 %, L0H31 1.0 %" in wide
    assert "Highest" not in html


def test_maps_before_and_after(looked):
    titles = lambda html: re.findall(r"<figcaption><b>([^<]*)</b>", html)  # noqa: E731
    vhr = looked("vhr")
    step = int(abs(vhr.untouched.image - vhr.before.image).max(axis=(1, 2, 3)).argmax())
    word = next(i for i, word in enumerate(vhr.words) if step in word.steps)  # where VHR has moved most attention
    maps_of = lambda spec: looks.heat_maps(looked(spec), word, range(8), None)  # noqa: E731
    assert titles(maps_of("none")) == ["The picture", "none"]
    assert titles(maps_of("pai")) == [
        "The picture",
        "Untouched model, same words",
        "pai, before its edit",
        "pai, after",
    ]
    assert titles(maps_of("vhr")) == ["The picture", "Untouched model, same words", "vhr"]
    assert "does not edit the attention shown here" in maps_of("vhr")
    assert "the untouched model looks at the same" in maps_of("lookback")
    carve = looks.heat_maps(looked("carve", "Is there a person in the image?", PHOTO), 0, range(8), None)
    assert titles(carve) == ["The picture", "Untouched model, same words", "carve, picture 1", "carve, picture 2"]
    assert "has not seen" in carve and "has not seen" not in maps_of("vhr")


def test_captions_say_how_much(looked):
    found = looked("none")
    share = found.after.shares(range(8))[list(found.words[3].steps)].mean()
    assert f"{100 * share:.1f} % of the attention" in looks.heat_maps(found, 3, range(8), None)


def test_without_a_grid_there_is_a_sentence(looked):
    found = looked("none")
    gridless = Shown(found.original.picture, 0, 32, None, "the image tokens lie on no grid")
    html = looks.heat_maps(replace(found, shown=(gridless,)), 0, range(8), None)
    assert html.startswith('<p class="wrong">There is no map over the picture: the image tokens lie on no grid.')


def test_invented_words_are_found(looked):
    found = looked("none")
    kinds = dict(zip((word.text for word in found.words), looks.verdicts(found, frozenset({"cat"})), strict=True))
    assert kinds["cat"] == "present" and kinds["table"] == "invented" and kinds["image"] == ""
    assert set(looks.verdicts(found, None)) == {"", "object"}
    opened = inside.Opened(found, looks.verdicts(found, frozenset({"cat"})))
    assert found.words[opened.first()].text == "person"  # which this truth lacks
    assert inside.Opened(found, [""] * len(found.words)).first() == 0


def test_a_token_stands_for_its_cell():
    shown = Shown(Image.new("RGB", (10, 10)), 3, 7, views.View(2, 2, 1, (0, 0, 10, 10)))
    np.testing.assert_array_equal(shown.grid(np.arange(10)), [[4, 5], [6, 7]])


# The tab


@pytest.fixture(scope="module")
def handlers(studio):
    with gr.Blocks() as page:
        shared = Shared(gr.Image(type="filepath"), gr.Textbox(), gr.Radio([2, 3, 4]), (gr.Textbox(),), gr.State(()))
        inside.tab(studio, shared)
    return {f.fn.__name__: f.fn for f in page.fns.values()}


CHOICE = ("All 8 layers", "All heads")


def test_the_tab_answers_word_by_word(handlers):
    first, last = handlers["look"](str(SCENE), DESCRIBE, "vhr", *CHOICE)
    at, strip, drawn, by_head, vhd, refined = first
    assert strip.count("<button") > 10 and drawn.count("<figure>") == 3 and f"vhr on “{DESCRIBE}”" in strip
    assert by_head.count("class=on") == 20 and vhd == refined == ""
    assert last[4].count("class=on") == 20 and "VHD" in last[4]
    changed, *shown = handlers["choose"](at, *CHOICE, type("Event", (), {"word": 2}))
    assert changed == (at[0], 2) and "“shows”" in shown[0] and "“shows”" in shown[1]
    narrowed = handlers["narrow"](changed, "Layer 5", "Head 3")
    assert 'data-word="2" aria-pressed="true"' in narrowed[0] and narrowed[1] != shown[0]


@pytest.mark.parametrize("word", [None, -1, 10**6, "0", 1.0, [0], {}])
def test_what_a_browser_sends_may_be_anything(handlers, word):
    at = next(handlers["look"](str(SCENE), DESCRIBE, "none", *CHOICE))[0]
    event = type("Event", (), {"word": word})
    assert handlers["choose"](at, *CHOICE, event) == (at, inside.problem("Choose a word of the answer."), "")
    assert "look inside again" in handlers["choose"](None, *CHOICE, event)[1]


def test_the_shelf_is_bounded(handlers, looked):
    one = inside.Opened(looked("pai"), [])
    assert looked("pai").nbytes == 3 * looked("pai").before.image.nbytes
    assert looked("vhr").nbytes == 2 * looked("vhr").before.image.nbytes
    shelf = inside.Shelf(2 * one.inspection.nbytes)
    first, second, third = (shelf.put(one) for _ in range(3))
    assert shelf.get(second) is shelf.get(third) is one
    with pytest.raises(ValueError, match="no longer kept; look inside again"):
        shelf.get(first)
    small = inside.Shelf(0)
    assert small.get(small.put(one)) is one  # a single large one is kept
    assert handlers["narrow"](None, *CHOICE) == (gr.skip(),) * 3
    assert "no longer kept" in handlers["narrow"](("gone", 0), *CHOICE)[1]


@pytest.mark.parametrize(
    "path, prompt, spec, sentence",
    [
        (None, DESCRIBE, "vhr", "Choose a picture first."),
        (__file__, DESCRIBE, "vhr", "This file is no picture"),
        (SCENE, " ", "vhr", "Type a prompt first."),
        (SCENE, DESCRIBE, "vhrr", "unknown method"),
        (SCENE, DESCRIBE, "beam", "look inside follows one answer token by token"),
        (SCENE, DESCRIBE, "carve", "Leave carve out for captions"),
        (SCENE, "<image> and <image>", "none", "image"),
    ],
)
def test_what_is_wrong_is_one_sentence_in_place(handlers, path, prompt, spec, sentence):
    (shown,) = handlers["look"](path and str(path), prompt, spec, *CHOICE)
    assert shown[0] is None and shown[2:] == ("", "", "", "")
    assert shown[1].startswith('<p class="wrong">') and sentence in shown[1]


def test_an_idle_method_says_so(looked):
    other = Studio.open("organism-qwen")
    with pytest.warns(UserWarning, match="will not act"):
        idle = inspect(other, Image.open(SCENE).convert("RGB"), DESCRIBE, parse("var"), Sinks())
    assert "var does not act on this model: no sink dimension was found" in looks.notes(idle)
    assert looks.notes(looked("vhr")) == ""


def test_methods_that_were_compared_come_first(handlers, looked):
    record = looked("none").record
    answers = tuple(Answer(spec, (), Image.new("RGB", (9, 9)), "a.png", record) for spec in ("none", "pai:alpha=0.3"))
    update = handlers["offer"](answers)
    assert update["choices"][:2] == ["none", "pai:alpha=0.3"] and update["value"] == "pai:alpha=0.3"
