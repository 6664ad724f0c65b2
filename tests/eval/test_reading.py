"""Caption files in every form that people have them in, and broken ones."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfix.eval.scorers import chair, reading

PAIRS = [(42, "A dog.\nAnd\u2028more."), (73, "Ein Hündchen “\ud800”"), (74, "")]


def records(image="image_id", caption="caption"):
    return [{image: key, caption: text} for key, text in PAIRS]


def written(folder, text, name="captions.json"):
    path = folder / name
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


FORMS = {
    "array": json.dumps,
    "pretty array": lambda entries: json.dumps(entries, indent=2),
    "lines": lambda entries: "\n".join(map(json.dumps, entries)),
    "lines with blanks and a byte order mark": lambda entries: (
        "\ufeff\n" + "\r\n\n".join(map(json.dumps, entries)) + "\n"
    ),
    "one after the other": lambda entries: "\n".join(json.dumps(entry, indent=4) for entry in entries),
    "without line breaks": lambda entries: " ".join(map(json.dumps, entries)),
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path, form, name):
    assert reading.read_captions(written(tmp_path, FORMS[form](records()), name)) == PAIRS


def test_one_line_alone(tmp_path):
    path = written(tmp_path, '{"image_id": 42, "caption": "A dog."}')
    assert reading.read_captions(str(path)) == [(42, "A dog.")]


@pytest.mark.parametrize("caption", reading.CAPTION_KEYS)
@pytest.mark.parametrize("image", reading.IMAGE_KEYS)
def test_keys(tmp_path, image, caption):
    path = written(tmp_path, json.dumps(records(image, caption)))
    assert reading.read_captions(path) == PAIRS


@pytest.mark.parametrize("image", [42, "42", "COCO_val2014_000000000042.jpg", "/x/000000000042.jpg", ["x/42.png"]])
def test_images(tmp_path, image):
    assert reading.read_captions(written(tmp_path, json.dumps({"image": image, "text": "A dog."}))) == [(42, "A dog.")]


def test_the_image_goes_before_the_question(tmp_path):
    entry = {
        "question_id": 1,
        "id": 2,
        "image": "COCO_val2014_000000000042.jpg",
        "text": "A dog.",
        "prompt": "Describe.",
    }
    assert reading.read_captions(written(tmp_path, json.dumps(entry))) == [(42, "A dog.")]


def test_several_caption_keys(tmp_path):
    path = written(tmp_path, '{"image_id": 1, "text": "Describe."}\n{"image_id": 2, "answer": "A dog.", "text": "?"}')
    with pytest.raises(ValueError, match=r"captions\.json may have its captions under 'text' or 'answer'; name one"):
        reading.read_captions(path)
    with pytest.raises(ValueError, match=r"line 1 has only 'image_id, text'; expected a text under 'answer'"):
        reading.read_captions(path, "answer")
    assert reading.read_captions(path, caption_key="text") == [(1, "Describe."), (2, "?")]


GOOD = '{"image_id": 1, "caption": "A dog."}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[]", "is empty"),
        (GOOD + '{"image_id": 2, "caption": "A d', r"line 2 is broken \(Unterminated string"),
        (
            GOOD + '\n{"image_id": 2,\n "caption" "A"}',
            r"line 4 is broken \(Expecting ':' delimiter, in what starts in line 3\)",
        ),
        (GOOD + "nonsense", r"line 2 is broken \(Expecting value\)"),
        (GOOD + "7\n", r"line 2 is 7; expected a JSON object"),
        (GOOD + "[1]\n", r"line 2 is \[1\]; expected a JSON object"),
        ("[[1]]", r"entry 1 is \[1\]; expected a JSON object"),
        (b"\xff\xfe" + GOOD.encode(), "cannot be read as text"),
        ('{"image_id": 1, "caption": "A dog.", "caption": ""}', "line 1 is broken .the key 'caption' stands twice"),
        ("[" * 100_000, "line 1 is broken"),
        ('{"image_id": ' + "9" * 5000 + ', "caption": ""}', "line 1 is broken"),
        ('{"image_id": 1}', r"no captions under 'caption', 'text', 'answer', 'output', only 'image_id'; name the key"),
        (
            '{"caption": ""}',
            r"does not name its images; expected one of 'image_id', 'image', 'file_name', 'id', 'question_id'",
        ),
        (GOOD + '{"image_id": 2, "caption": null}', r"line 2 has None; expected a text under 'caption'"),
        (GOOD + '{"image_id": 2, "text_": ""}', r"line 2 has only 'image_id, text_'; expected a text under 'caption'"),
        (GOOD + '{"image": "dog.jpg", "caption": ""}', r"line 2: under 'image_id', None names no image"),
        ('{"image": "dog.jpg", "caption": ""}', r"line 1: under 'image', 'dog\.jpg' names no image"),
        ('{"image_id": true, "caption": ""}', "True names no image"),
        ('{"image_id": NaN, "caption": ""}', "nan names no image"),
        ('{"image": ["1.jpg", "2.jpg"], "caption": ""}', "names no image"),
        (GOOD + '{"image_id": "x_1.png", "caption": ""}', r"line 2 is of image 1, as is \S*captions\.json, line 1"),
        (f"[{GOOD}, {GOOD}]", r"entry 2 is of image 1, as is \S*captions\.json, entry 1"),
    ],
)
def test_broken_files(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        reading.read_captions(written(tmp_path, text))
    assert "captions.json" in str(error.value)
    assert len(str(error.value)) < 400


def test_broken_archive(tmp_path):
    path = tmp_path / "captions.jsonl.gz"
    whole = gzip.compress(GOOD.encode())
    for content in (b"plain", whole[:-9], whole[:14] + b"\0\0\0" + whole[17:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as text"):
            reading.read_captions(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        reading.read_captions(tmp_path / "none.jsonl")


def test_truth_of_own_images(tmp_path):
    path = written(
        tmp_path, '{"image": "kitchen_7.jpg", "objects": ["puppy", "sofa"]}\n{"image": "8.png", "objects": []}'
    )
    truth = reading.read_truth(path)
    assert truth == {7: {"dog", "couch"}, 8: frozenset()}
    assert truth.variant is None
    scores = chair.score_captions([("kitchen_7.jpg", "A dog, a cat.")], truth, variant="strict")
    assert [mention.node for mention in scores[0].hallucinated] == ["cat"]
    assert scores[0].missed == {"couch"}


def test_truth_in_own_words(tmp_path):
    vocabulary = chair.Vocabulary.load(written(tmp_path, "drone, quadcopter\ncloud\n", "things.txt"))
    path = written(tmp_path, '{"image": "sky_7.jpg", "objects": ["quadcopter"]}')
    truth = reading.read_truth(path, vocabulary)
    (score,) = chair.score_captions([("sky_7.jpg", "Drones in a cloud.")], truth, vocabulary)
    assert [mention.node for mention in score.hallucinated] == ["cloud"]
    with pytest.raises(ValueError, match="not in the vocabulary"):
        chair.score_captions([("sky_7.jpg", "Drones.")], truth)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": 1, "objects": ["frisbe"]}', r"line 1: 'frisbe' is neither .* did you mean 'frisbee'"),
        ('{"image": 1, "objects": "dog"}', r"line 1 has 'dog'; expected a list of names under 'objects'"),
        ('{"image": 1, "objects": [1]}', r"line 1 has \[1\]; expected a list of names"),
        ('{"image": 1}', "line 1 has None; expected a list of names"),
        ('{"objects": []}', "does not name its images"),
        ('{"image": 1, "objects": []}\n{"image": "1", "objects": []}', r"line 2 is of image 1, as is .*line 1"),
        ("", "is empty"),
    ],
)
def test_broken_truth(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        reading.read_truth(written(tmp_path, text))


# Anything

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from((*reading.CAPTION_KEYS, *reading.IMAGE_KEYS, "objects"))
ENTRIES = st.lists(st.dictionaries(KEYS, JSON_VALUES, max_size=4) | JSON_VALUES, max_size=4)
TEXTS = ENTRIES.map(lambda entries: "\n".join(map(json.dumps, entries)).encode()) | st.binary(max_size=60)


@settings(max_examples=300, deadline=None)
@given(TEXTS | TEXTS.map(lambda text: text[: len(text) // 2]), st.sampled_from(["a.json", "a.gz"]))
def test_any_file_is_read_or_refused(content, name):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        for read in (reading.read_captions, reading.read_truth):
            try:
                assert read(path)
            except ValueError as error:
                assert str(path) in str(error)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.integers(0, 10**18 - 1), st.text(st.characters()), min_size=1, max_size=5),
    st.sampled_from(sorted(FORMS)),
)
def test_what_is_written_is_read(captions, form):
    entries = [{"image_id": key, "caption": text} for key, text in captions.items()]
    with tempfile.TemporaryDirectory() as folder:
        assert reading.read_captions(written(Path(folder), FORMS[form](entries))) == list(captions.items())


def test_letters_as_they_are(tmp_path):
    entry = {"image_id": 1, "caption": "Ein Hündchen\u2028“…”"}
    assert reading.read_captions(written(tmp_path, json.dumps(entry, ensure_ascii=False)))[0][1] == entry["caption"]
