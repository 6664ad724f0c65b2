"""ask, load, records, and the model's own ways of being used while wrapped."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import pipeline

import vlmfix
from vlmfix.asking.asker import ask_batch
from vlmfix.asking.pictures import open_picture
from vlmfix.asking.record import Record

SCENES = Path(__file__).parents[2] / "assets" / "organism" / "test" / "images"
pytestmark = pytest.mark.usefixtures("unwrapped")
DESCRIBE = "Please describe this image in detail."


def test_record_goes_through_json(organism):
    vlmfix.wrap(organism[0], "vhr", organism[1])
    record = vlmfix.ask(*organism, SCENES / "test_0001.webp", DESCRIBE)
    again = Record.from_json(record.to_json())
    assert again == record and "\n" not in record.to_json()
    assert record.method[0]["layers"] == [1, 4, 5, 6, 7] and record.effects == [{"acted": True}]
    assert record.finish == "stop" and record.token_ids[-1] == 2 and record.model == "organism"
    for broken in ("[]", '{"text": "a"}', json.dumps({**json.loads(record.to_json()), "extra": 1})):
        with pytest.raises(ValueError, match="not a record"):
            Record.from_json(broken)


def test_cut_answers_say_so(organism):
    record = vlmfix.ask(*organism, SCENES / "test_0001.webp", DESCRIBE, max_new_tokens=3)
    assert record.finish == "length" and len(record.token_ids) == 3


def test_pictures_in_any_form(organism):
    path = SCENES / "test_0002.webp"
    texts = {vlmfix.ask(*organism, form, DESCRIBE).text for form in (path, str(path), Image.open(path), [path])}
    assert len(texts) == 1
    two = vlmfix.ask(*organism, [path, SCENES / "test_0003.webp"], DESCRIBE)
    assert len(two.image) == len(two.image_sha256) == 2
    grey = Image.open(path).convert("L")
    assert open_picture(grey).mode == "RGB" and vlmfix.ask(*organism, grey, DESCRIBE).image == ["120x120"]


def test_pictures_are_turned_upright(tmp_path):
    picture = Image.new("RGB", (20, 10))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (10, 20)


@pytest.mark.parametrize(
    ("image", "prompt", "error", "sentence"),
    [
        (None, DESCRIBE, ValueError, "no image was given for the prompt"),
        ([], DESCRIBE, ValueError, "no image was given for the prompt"),
        (SCENES / "test_0001.webp", "", ValueError, "prompt: expected some text, got ''"),
        ("nowhere.png", DESCRIBE, ValueError, "no such image file: nowhere.png"),
        ([3], DESCRIBE, TypeError, "image: expected a path or a PIL image, got int"),
        (Path(__file__), DESCRIBE, ValueError, "is no image that can be read"),
    ],
)
def test_bad_input(organism, image, prompt, error, sentence):
    with pytest.raises(error, match=sentence):
        vlmfix.ask(*organism, image, prompt)


def test_sampling_is_seeded(organism):
    picture, sampling = SCENES / "test_0001.webp", {"do_sample": True, "temperature": 1.5}

    def ask(seed):
        return vlmfix.ask(*organism, picture, DESCRIBE, seed=seed, **sampling)

    assert ask(1).text == ask(1).text and len({ask(seed).text for seed in range(5)}) > 1
    assert ask(3).generation["seed"] == 3


def test_pipeline_uses_the_wrapped_model(organism):
    model, processor = organism
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": str(SCENES / "test_0058.webp")}, {"type": "text", "text": DESCRIBE}]

    def say():
        chat = [{"role": "user", "content": content}]
        return pipe(text=chat, return_full_text=False, max_new_tokens=120, do_sample=False)[0]["generated_text"].strip()

    plain = say()
    vlmfix.wrap(model, "vhr", processor)
    edited = say()
    assert edited != plain and edited == vlmfix.ask(model, processor, SCENES / "test_0058.webp", DESCRIBE).text
    vlmfix.unwrap(model)
    assert say() == plain


def test_saved_and_loaded_again_from_a_folder(organism, tmp_path):
    model, processor = organism
    vlmfix.wrap(model, "vhr", processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = vlmfix.load(tmp_path, dtype=torch.float32, device_map="cpu")
    vlmfix.unwrap(model)
    path = SCENES / "test_0007.webp"
    assert vlmfix.ask(*again, path, DESCRIBE).text == vlmfix.ask(*organism, path, DESCRIBE).text
    assert vlmfix.ask(*again, path, DESCRIBE).model == str(tmp_path)


def test_load_says_what_it_cannot_load(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"cannot load 'tiney': expected an embedded model \(organism, organism-qwen\)",
    ):
        vlmfix.load("tiney")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a bert model, which takes no image and text together"):
        vlmfix.load(tmp_path)


def test_loading_takes_less_than_two_seconds():
    import time

    began = time.perf_counter()
    vlmfix.load("organism")
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), torch.nn.Sequential()])
def test_wrap_refuses_what_is_no_vlm(thing):
    with pytest.raises(TypeError, match=r"expected a transformers vision-language model .* got (Linear|Sequential)"):
        vlmfix.wrap(thing, "vhr")


def test_wrap_refuses_an_encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(TypeError, match="encoder-decoder"):
        vlmfix.wrap(model, "vhr")


def test_prompts_without_placeholders_need_a_mask():
    from tests.models import llava

    model = vlmfix.wrap(llava(), "vhr")
    embeds = torch.randn(1, 6, 48)
    with pytest.raises(ValueError, match=r"give image_mask, bool of shape \(batch, tokens\)"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"image_mask: expected bool of shape \(1, 6\), got \(1, 4\)"):
        model(inputs_embeds=embeds, image_mask=torch.zeros(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("name", ["inputs", "inputs_embeds", "input_ids", "pixel_values"])
def test_inputs_are_made_here(organism, name):
    model, processor = organism
    with pytest.raises(ValueError, match=f"^{name}: is made from pictures and prompt here"):
        vlmfix.ask(model, processor, Image.new("RGB", (30, 30)), "What?", **{name: torch.zeros(1, 3)})


@pytest.mark.parametrize("part", ["nothing", "tokenizer"])
def test_what_is_no_processor_is_refused(organism, part):
    model, processor = organism
    with pytest.raises(TypeError, match=r"^processor: expected what AutoProcessor loads"):
        vlmfix.ask(model, getattr(processor, part, None), Image.new("RGB", (30, 30)), "What?")


def test_no_question_has_no_answer(organism):
    assert ask_batch(*organism, []) == ask_batch(*organism, iter([])) == []
