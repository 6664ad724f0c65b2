"""Head lists: files, selection, and what is refused."""

import json
import math
import subprocess
import sys

import pytest

from vlmfix.method.heads import HeadList, check_heads, head_names, parse_heads, random_heads, resolve_heads

NAN = math.nan
LIST = HeadList(model="toy", tool="visual", scores=((0.1, -0.2, NAN), (0.7, 0.1, 0.0)), data={"n": 1, "ids": ["a"]})


def test_file_round_trip(tmp_path):
    chosen = LIST.select(top=2)
    chosen.save(tmp_path / "new" / "heads.json")
    text = json.loads((tmp_path / "new" / "heads.json").read_text())
    assert (text["layers"], text["heads"], text["format"]) == (2, 3, "vlmfix.heads/1")
    assert text["scores"][0][2] is None and text["selected"] == [[1, 0], [0, 0]]
    back = HeadList.load(tmp_path / "new" / "heads.json")
    assert repr(back) == repr(chosen)  # NaN is not equal to itself
    assert back.facts() == {
        "tool": "visual", "model": "toy", "direction": "high is good", "settings": {"select": {"top": 2}}, "data": {"n": 1},
    }  # fmt: skip


def test_ranking_and_selection():
    assert LIST.ranking() == ((1, 0), (0, 0), (1, 1), (1, 2), (0, 1))  # ties by place, heads without score left out
    assert LIST.select(top=3).selected == ((1, 0), (0, 0), (1, 1))
    assert LIST.select(share=0.4).selected == ((1, 0), (0, 0))
    assert LIST.select(share=0.01).selected == ((1, 0),)
    assert LIST.select(threshold=0.1).selected == ((1, 0), (0, 0), (1, 1))
    assert LIST.select(positive=True).selected == ((1, 0), (0, 0), (1, 1))
    assert LIST.select(positive=True).settings == {"select": {"positive": True}}


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({}, "expected one of top, share, threshold, positive, got None"),
        ({"top": 1, "share": 0.5}, "expected one of .*, got top, share"),
        ({"top": 6}, "top: expected a number of heads in 1..5, got 6"),
        ({"top": 0}, "got 0"),
        ({"share": 1.5}, "share: expected a number above 0 and up to 1, got 1.5"),
        ({"threshold": 0.8}, "no head is selected by {'threshold': 0.8}; the highest score is 0.7"),
    ],
)
def test_selection_refused(how, sentence):
    with pytest.raises(ValueError, match=sentence):
        LIST.select(**how)


def test_a_list_for_another_model():
    LIST.check(2, 3, "toy")
    with pytest.raises(ValueError, match="made on toy with 2 layers x 3 heads, but this model has 2 x 4"):
        LIST.check(2, 4)
    with pytest.warns(UserWarning, match="made on 'toy', this model is 'other'"):
        LIST.check(2, 3, "other")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scores": ((1.0, 2.0), (1.0,))}, r"one row per layer .* got rows of \[2, 1\]"),
        ({"scores": ()}, "one row per layer"),
        ({"scores": ((math.inf,),)}, "got infinity"),
        ({"selected": ((0, 3),)}, "expected layers in 0..1 and heads in 0..2, got L0H3"),
        ({"selected": ((0, 1), (0, 1))}, "L0H1 named twice"),
        ({"direction": "up"}, "direction: expected .* got 'up'"),
    ],
)
def test_tables_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        HeadList(**{"model": "toy", "tool": "visual", "scores": LIST.scores, **change})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: [], "got 'list'"),
        (lambda d: {**d, "format": "vlmfix.heads/9"}, "expected a head list of format 'vlmfix.heads/1'.* got 'vlmfix.heads/9'"),
        (lambda d: {k: v for k, v in d.items() if k != "scores"}, "lacks scores"),
        (lambda d: {**d, "layers": 7}, "says 7 layers x 3 heads, but its scores are 2 x 3"),
        (lambda d: {**d, "scores": [["x"]]}, "cannot be read"),
        (lambda d: {**d, "scores": 3}, "cannot be read"),
        (lambda d: {**d, "selected": [[1, 9]]}, "cannot be read: heads: .* got L1H9"),
    ],
)  # fmt: skip
def test_files_refused(tmp_path, change, sentence):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(change(LIST.to_json())))
    with pytest.raises(ValueError, match=f"^{path}: .*{sentence}"):
        HeadList.load(path)


def test_no_such_file_and_no_json(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the head list .*No such file"):
        HeadList.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("heads")
    with pytest.raises(ValueError, match="is no JSON"):
        HeadList.load(tmp_path / "text.json")
    with pytest.raises(ValueError, match="cannot write"):
        LIST.save(tmp_path / "text.json" / "deeper.json")


def test_heads_in_text():
    assert parse_heads("L3H1/L3H15") == ((3, 1), (3, 15))
    assert head_names(((3, 1), (3, 15))) == "L3H1/L3H15"
    assert parse_heads("heads.json") is parse_heads("L3H1/") is parse_heads("L3") is None


def test_a_setting_becomes_heads(tmp_path):
    assert resolve_heads("L1H2/L0H0", 2, 3, "toy") == (((1, 2), (0, 0)), {"heads_origin": "given"})
    with pytest.raises(ValueError, match="got L1H2"):
        resolve_heads("L1H2", 1, 3, "toy")
    path = str(tmp_path / "heads.json")
    LIST.save(path)
    with pytest.raises(ValueError, match=r"no heads: .* has none selected"):
        resolve_heads(path, 2, 3, "toy")
    LIST.select(top=2).save(path)
    heads, facts = resolve_heads(path, 2, 3, "toy")
    assert heads == ((1, 0), (0, 0)) and facts["head_list"]["file"] == path and facts["head_list"]["data"] == {"n": 1}


def test_heads_to_compare_with(tmp_path):
    path = str(tmp_path / "heads.json")
    LIST.select(top=2).save(path)
    assert resolve_heads(path, 2, 3, "toy", "least")[0] == ((0, 1), (1, 2))
    assert resolve_heads(path, 2, 3, "toy", "random")[0] == resolve_heads("L0H0/L0H1", 2, 3, "toy", "random")[0]
    with pytest.raises(ValueError, match="least score need the file of a head list, got L0H0"):
        resolve_heads("L0H0", 2, 3, "toy", "least")


def test_random_heads():
    found = random_heads(5, 2, 3)
    assert len(set(found)) == 5 and found == random_heads(5, 2, 3) != random_heads(5, 2, 3, seed=1)
    check_heads(found, 2, 3)


def test_no_torch():
    code = "import sys, vlmfix.method.heads; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
