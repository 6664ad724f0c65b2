"""Benchmarks whose pictures may not be shipped, asked from folders laid out as their authors do; and from the Hub."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vlmfix.cli import app
from vlmfix.eval import api
from vlmfix.eval.benchmarks import amber_captions
from vlmfix.eval.benchmarks.benchmark import FileOptions, benchmark, benchmark_class
from vlmfix.eval.pictures import hub
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.report import words
from vlmfix.eval.run.results import compare
from vlmfix.eval.run.runner import answer_all
from vlmfix.method.registry import parse

TASKS = ("existence", "count", "position", "color")
ASKED = "Is there a dog in the image?"


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), colour).save(path)


def lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def amber(folder):
    for number in (1, 2, 3):
        picture(folder / "image" / f"AMBER_{number}.jpg")


def mme(folder):
    for task in TASKS:
        for name in ("0001", "0002"):
            picture(folder / task / f"{name}.jpg")
            (folder / task / f"{name}.txt").write_text(f"{ASKED}\tYes\nIs there a cat in the image?\tNo\n")


def hallusion(folder):
    for question in benchmark("hallusionbench").load(Data.load(str(folder), limit=3)):
        picture(folder / "hallusion_bench" / question.image)


def dash(folder):
    lines(folder / "dashb.json", [{"img_id": f"{i}.jpg", "object_name": "dog", "gt": "yes"} for i in (1, 2)])
    for i in (1, 2):
        picture(folder / "images" / f"{i}.jpg")


def own(folder):
    questions = [
        {
            "id": i,
            "image": f"{i // 2}.png",
            "question": ASKED,
            "label": "no",
            "group": "ab"[i % 2],
            "pair": i // 2 + 10 * (i % 2),
        }
        for i in (0, 1)
    ]
    questions += [{**q, "id": q["id"] + 2, "question": "Is it red?", "label": "yes"} for q in questions]
    lines(folder / "questions.jsonl", questions)
    picture(folder / "0.png")


def pope(folder):
    for split in ("random", "popular", "adversarial"):
        asked = [("dog", "yes"), ("cat" if split == "random" else "car", "no")]
        lines(
            folder / f"coco_pope_{split}.json",
            [
                {
                    "question_id": i,
                    "image": "COCO_val2014_000000000042.jpg",
                    "text": f"Is there a {o} in the image?",
                    "label": label,
                }
                for i, (o, label) in enumerate(asked, start=1)
            ],
        )
    picture(folder / "val2014" / "COCO_val2014_000000000042.jpg")


LAID_OUT = {"amber": amber, "mme": mme, "hallusionbench": hallusion, "dashb": dash, "yesno": own, "pope": pope}


@pytest.mark.parametrize("name", LAID_OUT)
def test_asked_from_the_authors_folder(organism, tmp_path, name):
    """The pictures are found where the authors put them, and the figures are those of answers in a file."""
    LAID_OUT[name](tmp_path)
    limit = {"amber": 3, "hallusionbench": 3}.get(name)
    data, bench = Data.load(str(tmp_path), limit=limit), benchmark(name)
    questions = bench.questions(data)
    assert all(Path(item.image).is_file() for item in bench.items(data))
    runs = [answer_all(*organism, parse(m), bench, data, tmp_path / "out", max_new_tokens=4) for m in ("none", "vhr")]
    (found,) = compare(runs, 50)
    assert found.rows[0].differences is None and found.rows[-1].differences is not None
    texts = {r["id"]: r["text"] for r in runs[0].records}
    rights = sum(score.correct for group in bench.score(data, texts) if not group.is_summary for score in group.scores)
    wanted = sum(bench.judge([q], {q.id: texts[bench.item_id(q)]})[0].correct for q in questions)
    doubled = {"amber": None, "hallusionbench": None, "yesno": 2 * wanted}.get(name, wanted)
    assert doubled in (None, rights) and len(texts) == len({bench.item_id(q) for q in questions})
    metric = next(iter(bench.columns))
    assert found.rows[0].estimates[metric].value is not None


@pytest.mark.parametrize("name", ["dashb", "yesno", "mme"])
def test_a_run_scores_as_its_answers_in_a_file_do(organism, tmp_path, name):
    LAID_OUT[name](tmp_path)
    bench, data = benchmark(name), Data.load(str(tmp_path))
    done = answer_all(*organism, (), bench, data, tmp_path / "out", max_new_tokens=4)
    ids = {bench.item_id(q): q.id for q in bench.questions(data)}
    lines(tmp_path / "said.txt", [{"id": ids[r["id"]], "answer": r["text"]} for r in done.records])
    place = {"dashb": "dashb.json", "yesno": "questions.jsonl", "mme": ""}[name]
    options = FileOptions(questions=str(tmp_path / place))
    (outside,) = api.compare([tmp_path / "said.txt"], benchmark=name, options=options)
    (inside,) = compare([done], 50)
    assert [r.group for r in inside.rows] == [r.group for r in outside.rows]
    for mine, theirs in zip(inside.rows, outside.rows, strict=True):
        for metric, e in mine.estimates.items():
            assert e.value == theirs.estimates[metric].value, metric


def test_descriptions_of_amber(organism, tmp_path, monkeypatch):
    amber(tmp_path)
    monkeypatch.setattr(
        amber_captions,
        "nltk_nouns",
        lambda said: {key: [w.strip(".") for w in text.split()] for key, text in said.items()},
    )
    bench, data = benchmark("amber_captions"), Data.load(str(tmp_path), limit=3)
    assert [item.prompt for item in bench.items(data)] == ["Describe this image."] * 3
    done = answer_all(*organism, (), bench, data, tmp_path / "out", max_new_tokens=12)
    (found,) = compare([done], 50)
    assert found.rows[0].n == 3 and "similarity off" in found.title
    assert any("not the figures of AMBER's paper" in note for note in found.notes)
    lines(tmp_path / "said.jsonl", [{"id": int(r["id"]), "response": r["text"]} for r in done.records])
    (outside,) = api.compare([tmp_path / "said.jsonl"], benchmark="amber_captions")
    assert outside.rows[0].estimates["Cover"].value == found.rows[0].estimates["Cover"].value
    assert set(next(words.explanations(outside))) >= {"nouns", "hallucinated", "covered"}
    with pytest.raises(ValueError, match="expected off or spacy:"):
        benchmark("amber_captions", "fuzzy")


def test_what_is_missing_is_said_with_where_to_get_it(tmp_path):
    done = run("eval", "--benchmark", "mme", "--data", tmp_path, "--method", "none")
    assert done.exit_code == 1 and "ask the authors of MME" in done.stderr
    done = run("eval", "--benchmark", "chair", "--data", tmp_path, "--method", "none")
    assert done.exit_code == 1 and "instances.json does not exist" in done.stderr
    done = run("eval", "--benchmark", "pope", "--data", tmp_path, "--method", "none")
    assert done.exit_code == 1 and "no questions of POPE that name their split" in done.stderr
    done = run("eval", "--benchmark", "dashb", "--data", tmp_path, "--method", "none")
    assert done.exit_code == 1 and "name the authors' list of DASH-B with --questions" in done.stderr
    for name in ("amber", "mme", "hallusionbench", "dashb"):
        assert "https://github.com/" in benchmark_class(name).where


def test_ones_own_categories(organism, tmp_path):
    """A folder in COCO format with categories and synonyms that COCO does not have."""
    picture(tmp_path / "images" / "1.png")
    categories = [{"id": 1, "name": "anvil"}, {"id": 2, "name": "lute"}]
    annotations = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81}]
    instances = {"images": [{"id": 1, "file_name": "1.png"}], "categories": categories, "annotations": annotations}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    with pytest.raises(ValueError, match="'anvil' is neither an object nor a synonym"):
        Data.load(str(tmp_path)).truth_for("rohrbach")
    (tmp_path / "synonyms.txt").write_text("anvil\nlute, guitar\n")
    fresh = Data.load(str(tmp_path))
    (group,) = benchmark("chair").score(fresh, {"1": "An anvil, a lute and a guitar."})
    assert (group.counts["mentions"][0], group.counts["hallucinated_mentions"][0]) == (3, 2)
    run_ = answer_all(*organism, (), benchmark("chair"), fresh, tmp_path / "out", max_new_tokens=4)
    assert compare([run_], 20)[0].rows[0].n == 1


# The Hub


ROWS = {
    "pope": {"question_id": 7, "image_source": "COCO_val2014_000000000042", "question": ASKED, "answer": "yes", "category": "random"},
    "mme": {"question_id": "existence/0001.png", "question": f"{ASKED} Please answer yes or no.", "answer": "Yes"},
    "hallusionbench": {"filename": "./VD/../illusion/0_0.png", "question": "?"},
    "yesno": {"id": "a1", "image_id": "../../x", "question": ASKED, "answer": "No", "category": None},
}  # fmt: skip


@pytest.mark.parametrize("name", hub.READERS)
def test_rows_of_the_hub_are_laid_out_as_original_files(tmp_path, name):
    row = {**ROWS[name], "image": Image.new("RGB", (8, 8))}
    other = {**row, "question": "Is there a cat in the image? Please answer yes or no.", "answer": "no"}
    hub.lay_out([row, {**other, "id": "a2", "question_id": 8} if name != "mme" else other], name, tmp_path / "f")
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))
    assert files == [{"pope": "f/COCO_val2014_000000000042.png", "mme": "f/existence/0001.png",
                      "hallusionbench": "f/VD/illusion/0_0.png", "yesno": "f/x.png"}[name]]  # fmt: skip
    data = Data.load(str(tmp_path / "f"))
    if name == "pope":
        asked = benchmark("pope").questions(data)
        assert [(q.label, q.split) for q in asked] == [("yes", "random"), ("no", "random")]
    if name == "mme":
        assert (tmp_path / "f" / "existence.txt").read_text().startswith(f"0001.png\t{ASKED}")
    if name == "yesno":
        assert [q.label for q in benchmark("yesno").questions(data)] == ["no", "no"]
    with pytest.raises(ValueError, match="lacks"):
        hub.lay_out([{"image": None}], name, tmp_path / "g")
    assert not (tmp_path / "g" / hub.QUESTIONS).exists(), "a folder with questions is whole"


def test_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [
        {**ROWS["pope"], "question_id": i, "answer": label, "question": f"Is there a {o} in the image?", "image": Image.new("RGB", (8, 8))}
        for i, (o, label) in enumerate([("dog", "yes"), ("cat", "no")])
    ]  # fmt: skip
    (tmp_path / "repo").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "repo" / "test.parquet")
    args = ["eval", "--benchmark", "pope", "--data", f"hf:{tmp_path / 'repo'}", "--method", "none"]
    done = run(*args, "--output", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)
    assert next(row for row in found["rows"] if row["group"] == "random")["n"] == 1
    folder = next((tmp_path / "out").rglob("run.json")).parent
    assert run("score", folder).exit_code == 0, "without the data set"
    assert "cannot be loaded" in run("eval", "--benchmark", "pope", "--data", "hf:no/such", "--method", "none").stderr
    wrong = run("eval", "--benchmark", "chair", "--data", "hf:x/y", "--method", "none")
    assert wrong.exit_code == 1 and "from the Hub come pope, mme, hallusionbench, yesno" in wrong.stderr
