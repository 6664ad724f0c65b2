"""Pictures by every way in: the same picture gives the same pixels, whatever a decoder does is one sentence."""

import base64
import io
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageOps, UnidentifiedImageError

import vlmfix
from vlmfix.asking.asker import ask_batch
from vlmfix.asking.pictures import open_picture, picture_name, read_questions

ONE_FOLDER = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pixels(picture):
    opened = open_picture(picture)
    assert opened.mode == "RGB"
    return np.asarray(opened)


def saved(picture, ending, **options):
    file = io.BytesIO()
    picture.save(file, ending, **options)
    return file.getvalue()


def ways_in(content, folder):
    """The same file given in every way."""
    path = folder / "picture"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    return {
        "path": path,
        "text": str(path),
        "object": Image.open(io.BytesIO(content)),
        "object opened by path": Image.open(path),
        "bytes": content,
        "bytearray": bytearray(content),
        "file": io.BytesIO(content),
        "base64": text,
        "base64 in lines": base64.encodebytes(content).decode(),
        "base64 for URLs, unpadded": base64.urlsafe_b64encode(content).decode().rstrip("="),
        "data URL behind a blank": f" data:image/png;charset=x;base64,{text}",
        "data URL": f"data:image/png;base64,{text}",
        "data URL, quoted": "data:image/png," + "".join(f"%{byte:02x}" for byte in content),
    }


PICTURES = st.builds(
    lambda mode, width, height, seed: Image.frombytes(
        mode,
        (width, height),
        np.random.default_rng(seed).bytes(width * height * len(Image.new(mode, (1, 1)).tobytes())),
    ),
    st.sampled_from(["L", "LA", "RGB", "RGBA", "I;16"]),
    st.integers(4, 24),
    st.integers(4, 24),
    st.integers(0, 1000),
)


@ONE_FOLDER
@given(picture=PICTURES, orientation=st.integers(1, 8), ending=st.sampled_from(["PNG", "TIFF"]))
def test_every_way_in_gives_the_same_pixels(tmp_path, picture, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(picture, ending, exif=exif)
    expected = pixels(content)
    for way, form in ways_in(content, tmp_path).items():
        assert np.array_equal(pixels(form), expected), way
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(pixels(np.asarray(upright)), expected)
    assert expected.shape[:2] == (picture.size[::-1] if orientation < 5 else picture.size)


@ONE_FOLDER
@given(values=arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_deeper_pictures_are_scaled_and_never_clipped(tmp_path, values):
    values[0, 0] = 255  # numbers without a depth are known by their largest
    deep = values.astype(np.uint16) * 257
    expected = np.repeat(values[:, :, None], 3, axis=2)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tiff")
    forms = {
        "png": tmp_path / "deep.png",
        "tiff": tmp_path / "deep.tiff",
        "I;16B": Image.frombytes("I;16B", deep.shape[::-1], deep.astype(">u2").tobytes()),
        "I, 16 bits": Image.fromarray(deep.astype(np.int32)),
        "I, 8 bits": Image.fromarray(values).convert("I"),
        "F, 8 bits": Image.fromarray(values).convert("F"),
        "F, 0 to 1": Image.fromarray(values.astype(np.float32) / 255),
        "uint16": deep,
        "uint16 colours": np.repeat(deep[:, :, None], 3, axis=2),
        "int64": values.astype(np.int64),
        "uint32": deep.astype(np.uint32),
        "float64": values / 255,
        "float16": (values / 255).astype(np.float16),
        "one channel": values[:, :, None],
    }
    for name, form in forms.items():
        tolerance = 1 if name == "float16" else 0
        assert np.abs(pixels(form).astype(int) - expected).max() <= tolerance, name


@settings(max_examples=60, deadline=None)
@given(
    values=arrays.arrays(
        st.sampled_from([np.int32, np.float32, np.uint16]),
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        elements=st.integers(0, 60000),
    )
)
def test_a_brighter_value_never_becomes_darker(values):
    shown = pixels(values)[:, :, 0].ravel()
    order = np.argsort(values.ravel())
    assert (np.diff(shown[order].astype(int)) >= 0).all()
    assert values.max() - values.min() < 512 or shown.max() > shown.min()


@settings(max_examples=60, deadline=None)
@given(
    values=arrays.arrays(np.uint8, st.tuples(st.integers(2, 6), st.integers(2, 6))),
    below=st.floats(0, 0.2),
    above=st.floats(0, 0.2),
    white=st.sampled_from([1.0, 255.0, 65535.0]),
)
def test_a_filter_that_shoots_beyond_the_range_changes_little(values, below, above, white):
    values[0, 0], values[0, 1] = 0, 255
    fractions = values / 255
    fractions[0, 0], fractions[0, 1] = -below, 1 + above
    shown = pixels((fractions * white).astype(np.float32))[:, :, 0].astype(float)
    assert np.abs(shown - values).max() <= 255 * (below + above) + 2
    assert shown[0, 0] == 0 and shown[0, 1] == 255


def test_negative_numbers_are_scaled_by_what_they_hold():
    values = np.linspace(-1, 1, 256).reshape(16, 16)
    assert np.array_equal(pixels(values)[:, :, 0].ravel(), np.arange(256))


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_alpha_has_a_range_of_its_own(white):
    colours = np.full((3, 3, 4), 100 / 255 * white)
    colours[0, 0, :3], colours[:, :, 3] = white, 1.0
    assert pixels(colours)[1, 1].tolist() == [100] * 3
    assert pixels(colours[:, :, [0, 3]])[1, 1].tolist() == [100] * 3


def tiff(values, photometric, sign):
    """A gray TIFF as Pillow does not write it."""
    height, width = values.shape
    content = values.tobytes()
    entries = [(256, 4, width), (257, 4, height), (258, 3, values.itemsize * 8), (259, 3, 1), (262, 3, photometric)]
    entries += [(273, 4, 8 + 2 + 10 * 12 + 4), (277, 3, 1), (278, 4, height), (279, 4, len(content)), (339, 3, sign)]
    order = ">" if values.dtype.str[0] == ">" else "<"
    file = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    for tag, kind, value in entries:
        file += struct.pack(f"{order}HHI", tag, kind, 1)
        file += struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
    return file + struct.pack(f"{order}I", 0) + content


@ONE_FOLDER
@given(
    values=arrays.arrays(np.uint8, st.tuples(st.integers(2, 9), st.integers(2, 9))),
    order=st.sampled_from("<>"),
    kind=st.sampled_from(["u1", "u2", "u4", "i4", "f4"]),
    white_is_0=st.booleans(),
)
def test_every_kind_of_gray_tiff(tmp_path, values, order, kind, white_is_0):
    values[0, 0], values[0, 1] = 0, 255
    scale = {"u1": 1, "u2": 257, "u4": 16843009, "i4": 8421504, "f4": 1 / 255}[kind]
    stored = (values * np.float64(scale)).astype(order + kind)
    content = tiff(stored, 0 if white_is_0 else 1, {"u": 1, "i": 2, "f": 3}[kind[0]])
    try:
        Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        assume(False)  # Pillow reads most of them, not all
    expected = (255 - values if white_is_0 else values).astype(int)
    for way, form in ways_in(content, tmp_path).items():
        assert np.abs(pixels(form)[:, :, 0] - expected).max() <= 1, way


@pytest.mark.parametrize("ending", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("entry", [b"Exif\0\0garbage", b"Exif\0\0II*\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_a_damaged_exif_entry_costs_no_picture(ending, entry):
    assert pixels(saved(Image.new("RGB", (8, 6), (200, 30, 30)), ending, exif=entry)).shape == (6, 8, 3)


@settings(max_examples=60, deadline=None)
@given(colour=st.tuples(*[st.integers(0, 255)] * 3), alpha=st.integers(0, 255))
def test_transparent_pictures_lie_over_white(colour, alpha):
    picture = Image.new("RGBA", (3, 2), (*colour, alpha))
    expected = np.array([value * alpha / 255 + 255 - alpha for value in colour])
    for form in (
        picture,
        np.asarray(picture),
        saved(picture, "PNG"),
        saved(picture, "WEBP", lossless=True, exact=True),
    ):
        assert np.abs(pixels(form)[0, 0] - expected).max() <= 1
    gray = Image.merge("LA", [picture.convert("RGB").getchannel(0), picture.getchannel("A")])
    assert np.abs(pixels(gray)[0, 0] - expected[0]).max() <= 1


def test_a_transparent_colour_shows_white():
    gray = Image.fromarray(np.array([[7, 200]], np.uint8))
    palette = gray.convert("P")
    forms = [
        saved(gray, "PNG", transparency=7),
        saved(palette, "PNG", transparency=int(np.asarray(palette)[0, 0])),
        saved(gray.convert("RGB"), "PNG", transparency=(7, 7, 7)),
        saved(gray, "GIF", transparency=7),
    ]
    deep = Image.fromarray(np.array([[7, 200 * 257]], np.uint16))
    deep.info["transparency"] = 7
    for form in [*forms, deep]:
        assert pixels(form)[0, 0].tolist() == [255] * 3 and pixels(form)[0, 1].tolist() == [200] * 3


PNG = saved(Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 30) % 251), "PNG")
JPEG = saved(Image.effect_noise((40, 30), 90), "JPEG")
TIFF = saved(Image.effect_noise((12, 9), 90), "TIFF")
WEBP = saved(Image.effect_noise((12, 9), 90), "WEBP")


@settings(max_examples=150, deadline=None)
@given(
    content=st.sampled_from([PNG, JPEG, TIFF, WEBP]),
    damage=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
    kept=st.floats(0, 1),
)
def test_a_damaged_file_is_a_picture_or_one_sentence(content, damage, kept):
    broken = bytearray(content)
    for place, byte in damage:
        broken[int(place * len(broken))] = byte
    try:
        open_picture(bytes(broken[: int(kept * len(broken))]))
    except ValueError as error:
        assert "bytes is no image that can be read: " in str(error) and "\n" not in str(error)
        assert len(str(error)) < 400


@pytest.mark.parametrize("error", [SyntaxError, IndexError, OverflowError, EOFError, KeyError, MemoryError, TypeError])
def test_whatever_a_decoder_raises_is_one_sentence(tmp_path, monkeypatch, error):
    Image.new("RGB", (4, 4)).save(tmp_path / "fine.png")

    def fail(self, *args):
        raise error("deep inside\nthe decoder")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(
        ValueError, match=r"fine\.png is no image that can be read: .*deep inside.* \(asked: 'What\?'\)"
    ):
        read_questions([(tmp_path / "fine.png", "What?")])


def test_a_picture_that_would_fill_the_memory_is_refused_by_name(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png is no image that can be read: .*decompression bomb"):
        open_picture(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        ("https://example.org/cat.png", "nothing is downloaded"),
        ("data:image/png;base64", "it has no comma"),
        ("data:image/png;base64,&&&", "is no image that can be read"),
        ("A" * 80, "no such image file: AAAA"),
        ("A" * 9000, "AAA"),
        (b"", "given as 0 bytes is no image that can be read"),
        (io.StringIO("text"), "open it with 'rb'"),
        (np.zeros((0, 4, 3)), "it has no pixels"),
        (np.zeros((2, 2, 2, 2)), "expected height x width"),
        (np.zeros((2, 2, 5)), "expected height x width"),
        (np.full((2, 2), np.nan), "no numbers"),
        (np.array([["a"]]), "expected whole numbers"),
        (np.ma.masked_array([[1, 2]], [[True, False]]), "masked"),
        ("", "^the empty path is no image"),
        (Image.new("RGB", (0, 3)), "it has no pixels"),
    ],
)
def test_what_is_no_picture_is_refused(picture, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        open_picture(picture)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("thing", [{"url": "x"}, 3, None, object(), {1, 2}])
def test_other_things_are_refused_by_their_type(thing):
    with pytest.raises(TypeError, match=f"expected a path or a PIL image, got {type(thing).__name__}; an array"):
        open_picture(thing)


def test_content_is_never_in_a_name():
    text = base64.b64encode(PNG).decode()
    for form in (text * 9, f"data:image/png;base64,{text}", PNG, np.zeros((2, 2)), io.BytesIO(PNG)):
        assert len(picture_name(form)) < 260
    assert read_questions([(text, "What?")])[0].pictures[0].name == "30x10"


def test_an_unreadable_base64_text_is_never_printed():
    broken = base64.b64encode(PNG[:-40]).decode()
    with pytest.raises(ValueError, match=r"^the base64 text of \d+ characters \(.{,40}\) is no image") as caught:
        open_picture(broken)
    assert broken[:60] not in str(caught.value)


@pytest.mark.parametrize("lazy", [iter, lambda pairs: (pair for pair in pairs)])
def test_pictures_that_are_made_on_the_way_are_never_mistaken(lazy):
    read = read_questions(lazy((np.full((4, 4), n, np.uint8), f"{n}?") for n in range(100)))
    assert [np.asarray(question.images[0])[0, 0, 0] for question in read] == list(range(100))


@pytest.mark.parametrize(
    "questions", [None, "ab", [("x",)], ["xy"], [{"image": 1, "prompt": 2}], [("a", "b", "c")], [3]]
)
def test_what_is_no_pair_is_refused_in_a_sentence(questions):
    with pytest.raises(TypeError, match=r"^questions: expected \(image, prompt\) pairs, got"):
        read_questions(questions)


def test_an_open_file_stays_as_it_is():
    file = io.BytesIO(PNG)
    file.seek(3)
    assert open_picture(file).size == (30, 10) and file.tell() == 3
    picture = Image.open(io.BytesIO(PNG))
    assert open_picture(picture).size == open_picture(picture).size == (30, 10)


@pytest.mark.parametrize("share", [False, True])
def test_a_processor_that_refuses_names_picture_and_question(tmp_path, share):
    model, processor = vlmfix.load("organism-qwen")
    Image.new("RGB", (56, 56)).save(tmp_path / "fine.png")
    Image.new("RGB", (3000, 10)).save(tmp_path / "line.png")
    questions = [(tmp_path / name, prompt) for name in ("fine.png", "line.png") for prompt in ("Is it?", "Why?")]
    with pytest.raises(ValueError, match=r"line\.png: .*3000x10 pixels.*asked: 'Is it\?'.*aspect ratio"):
        ask_batch(model, processor, questions, share=share, max_new_tokens=1)
