"""Own annotations, synonyms and questions: what could never match is folded or refused, nothing is merged silently."""

import json
import shutil
from importlib.resources import files

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlmfix
from vlmfix.eval.api import Task, prepare
from vlmfix.eval.benchmarks.benchmark import FileOptions, benchmark, benchmark_for_files
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import yesno
from vlmfix.eval.scorers.chair import Vocabulary, instance_categories, mentions
from vlmfix.eval.scorers.naming import namings

IN_FOLDER = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CATEGORIES = ["person", "dog", "cake", "bench", "car", "cat", "chair", "cup"]
OWN_WORDS = ["zebu", "okapi", "scissors", "bus", "quokka", "steel drum", "lens", "puppies", "wombat", "t-shirt", "Émeu"]


def change_case(word, choices):
    return "".join(letter.upper() if choice else letter for letter, choice in zip(word, choices, strict=False))


def annotations(path, objects, file_names=None, categories=CATEGORIES):
    """Instances of images, each with its objects."""
    images = [{"id": i + 1, "file_name": f"p_{i + 1}.png"} for i in range(len(objects))]
    for image, name in zip(images, file_names or [], strict=False):
        image["file_name"] = name
    pairs = [(i, name) for i, names in enumerate(objects) for name in names]
    notes = [
        {"id": n + 1, "image_id": i + 1, "category_id": categories.index(name) + 1} for n, (i, name) in enumerate(pairs)
    ]
    named = [{"id": k + 1, "name": name} for k, name in enumerate(categories)]
    path.write_text(json.dumps({"images": images, "annotations": notes, "categories": named}))


@IN_FOLDER
@given(
    words=st.lists(st.sampled_from(OWN_WORDS), min_size=1, max_size=4, unique=True),
    upper=st.lists(st.booleans(), min_size=12, max_size=12),
    blanks=st.sampled_from([", ", ",", " ,  ", ",\t"]),
    mark=st.booleans(),
)
def test_every_entry_is_found_as_it_is_written(tmp_path, words, upper, blanks, mark):
    """However an entry is written, a caption that holds it names its object, and the object can be annotated by it."""
    written = [change_case(word, upper) for word in words]
    text = "\n".join(blanks.join(["Thing" * (n + 1), word]) for n, word in enumerate(written))
    (tmp_path / "synonyms.txt").write_text(text, "utf-8-sig" if mark else "utf-8")
    vocabulary = Vocabulary.load(tmp_path / "synonyms.txt")
    for n, word in enumerate(written):
        node = "thing" * (n + 1)
        assert [mention.node for mention in mentions(f"I see a {word} here.", vocabulary)] == [node], word
        assert vocabulary.node(word) == vocabulary.node(word.upper()) == vocabulary.node("THING" * (n + 1)) == node


@pytest.mark.parametrize("entry", ["a toy of wood", "(cup)", "big red bus", "dog's bone", "cup;mug"])
def test_entries_that_could_never_match_are_refused_by_name(tmp_path, entry):
    (tmp_path / "synonyms.txt").write_text(f"cup, {entry}\n")
    with pytest.raises(ValueError, match="could never be found in a caption") as caught:
        Vocabulary.load(tmp_path / "synonyms.txt")
    assert repr(entry) in str(caught.value) and "synonyms.txt" in str(caught.value)


def test_a_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "synonyms.txt").write_text("émeu, zebu", "latin-1")
    with pytest.raises(ValueError, match=r"synonyms\.txt cannot be read as text .* expected UTF-8"):
        Vocabulary.load(tmp_path / "synonyms.txt")


def test_a_copy_of_cocos_list_is_cocos_list(tmp_path):
    text = (files("vlmfix.assets") / "chair" / "synonyms.txt").read_text("utf-8")
    (tmp_path / "synonyms.txt").write_text(text)
    assert Vocabulary.load(tmp_path / "synonyms.txt") is Vocabulary.load()
    (tmp_path / "synonyms.txt").write_text(f"{text}\nWombat\n")
    more, coco = Vocabulary.load(tmp_path / "synonyms.txt"), Vocabulary.load()
    folded = {" ".join(word.lower().split()): node for word, node in coco.node_of.items()}
    assert dict(more.node_of) == {**folded, "wombat": "wombat"}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda d: d["images"][1].update(id=1), "images share 1 of their ids, such as 1"),
        (lambda d: d["categories"][1].update(id=1), "categories share 1 of their ids, such as 1"),
        (lambda d: d["categories"][1].update(name=" PERSON"), "categories share 1 of their names, such as 'person'"),
        (lambda d: d["images"][1].update(file_name="p_1.png"), "images share 1 of their file_names, such as 'p_1.png'"),
    ],
)
def test_what_would_be_merged_is_refused(tmp_path, spoil, sentence):
    path = tmp_path / "instances.json"
    annotations(path, [["dog"], ["cup"]])
    dataset = json.loads(path.read_text())
    spoil(dataset)
    path.write_text(json.dumps(dataset))
    with pytest.raises(ValueError, match=sentence):
        instance_categories(path)
        _ = Data.load(str(tmp_path)).images


def test_pictures_whose_ids_hold_one_number_are_refused(tmp_path):
    annotations(tmp_path / "instances.json", [["dog"], ["cup"]])
    text = (tmp_path / "instances.json").read_text()
    text = text.replace('"id": 2, "file_name"', '"id": "b_1", "file_name"').replace(
        '"image_id": 2', '"image_id": "b_1"'
    )
    (tmp_path / "instances.json").write_text(text)
    with pytest.raises(ValueError, match="2 image ids hold only 1 different numbers"):
        _ = Data.load(str(tmp_path)).images


def test_a_picture_without_a_name_is_refused(tmp_path):
    annotations(tmp_path / "instances.json", [["dog"]])
    text = (tmp_path / "instances.json").read_text()
    (tmp_path / "instances.json").write_text(text.replace('"file_name": "p_1.png"', '"width": 3'))
    with pytest.raises(ValueError, match="image 1 has no file_name"):
        _ = Data.load(str(tmp_path)).images


@IN_FOLDER
@given(
    folders=st.lists(st.sampled_from(["", "a/", "b/", "a/deep/"]), min_size=4, max_size=8),
    seed=st.randoms(use_true_random=False),
)
def test_subfolders_change_no_question(tmp_path, folders, seed):
    """Names with folders give the questions that names without give, each about its own picture."""
    objects = [CATEGORIES[:3], CATEGORIES[3:6], *(seed.sample(CATEGORIES, 3) for _ in folders[2:])]
    names = [f"{folder}p_{n + 1}.png" for n, folder in enumerate(folders)]
    shutil.rmtree(tmp_path / "images", ignore_errors=True)  # the last example's
    annotations(tmp_path / "instances.json", objects)
    flat = benchmark("pope").questions(Data.load(str(tmp_path)))
    annotations(tmp_path / "instances.json", objects, names)
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    data = Data.load(str(tmp_path))
    below = benchmark("pope").questions(data)
    assert [(question.text, question.label) for question in below] == [(q.text, q.label) for q in flat]
    items = benchmark("pope").items(data)
    assert {item.image for item in items} == {str(tmp_path / "images" / name) for name in names}


def test_equal_names_in_two_folders_are_told_apart(tmp_path):
    for name in ("a/1.png", "b/1.png", "b/2.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    annotations(tmp_path / "instances.json", [["dog"]])
    data = Data.load(str(tmp_path))
    assert data.picture("2.png") == tmp_path / "images" / "b" / "2.png"
    assert data.picture("a/1.png") == tmp_path / "images" / "a" / "1.png"
    with pytest.raises(ValueError, match=r"1\.png lies in 2 folders of .*, such as a and b"):
        data.picture("1.png")


@IN_FOLDER
@given(numbers=st.lists(st.integers(0, 5), min_size=4, max_size=9).filter(lambda numbers: sum(n > 2 for n in numbers)))
def test_pictures_that_are_not_asked_about_are_counted(tmp_path, numbers):
    objects = [CATEGORIES[:n] for n in numbers]
    objects[numbers.index(max(numbers))] = CATEGORIES[-3:]
    annotations(tmp_path / "instances.json", [*objects, CATEGORIES[-4:]])
    data, pope = Data.load(str(tmp_path)), benchmark("pope")
    try:
        n_asked = len({question.image for question in pope.questions(data)})
    except ValueError:
        return
    notes = pope.coverage(data)
    n = len(data.images)
    assert notes == ([f"questions on {n_asked} of {n} pictures: no other one has 3 different objects"] * (n_asked < n))


def own_questions(folder, **changes):
    rows = [
        {"id": f"q{n}", "image": "1.png", "question": f"Is it {n}?", "label": "no", "group": "rare"} for n in (1, 2)
    ]
    rows[1].update(changes)
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "q.jsonl"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"group": "all"}, "a group is called 'all'"),
        ({"group": "All "}, "a group is called 'all'"),
        ({"id": "q1"}, "share their id"),
        ({"label": "maybe"}, "expected yes or no"),
        ({"pair": 3}, "pairs have one question only"),
    ],
)
def test_eval_refuses_what_score_refuses(tmp_path, changes, sentence):
    path = own_questions(tmp_path, **changes)
    with pytest.raises(ValueError, match=sentence):
        benchmark_for_files("yesno", FileOptions(questions=str(path)))
    with pytest.raises(ValueError, match=sentence):
        prepare(Task(benchmarks="yesno", data=str(tmp_path), questions=str(path), methods="none"))


def test_a_number_and_its_text_are_two_ids(tmp_path):
    path = own_questions(tmp_path, id=1)
    path.write_text(path.read_text().replace('"q1"', '"1"'))
    with pytest.raises(ValueError, match="two questions are both called '1'"):
        prepare(Task(benchmarks="yesno", data=str(tmp_path), questions=str(path), methods="none"))


def test_ground_truth_is_checked_before_a_model_is_loaded(tmp_path):
    annotations(tmp_path / "instances.json", [["dog", "wombat"]], categories=["dog", "wombat"])
    with pytest.raises(ValueError, match="'wombat' is neither an object nor a synonym"):
        prepare(Task(benchmarks="chair", data=str(tmp_path), methods="none"))


PLURALS = {
    "glasses": ["a glass", "glasses"],
    "wine glasses": ["a wine glass", "two wine glasses"],
    "wine_glass": ["a wine glass", "wine glasses"],
    "fire hydrants": ["a fire hydrant", "fire hydrants"],
    "Fire_Hydrants": ["a fire hydrant", "fire hydrants"],
    "baseball gloves": ["a baseball glove", "baseball gloves"],
    "buses": ["a bus", "two buses"],
    "mattresses": ["a mattress", "mattresses"],
    "knives": ["a knife", "knives"],
    "children": ["a child", "children"],
    "steel drums": ["a steel drum", "steel drums"],
    "cafe\u0301s": ["two caf\u00e9s", "a caf\u00e9"],
}


@IN_FOLDER
@given(
    entry=st.sampled_from(sorted(PLURALS)),
    synonyms=st.lists(st.sampled_from(["hydrants", "gloves", "drum", "thing", "glove"]), max_size=2, unique=True),
    first=st.booleans(),
)
def test_plurals_and_underscores_are_found_in_every_number(tmp_path, entry, synonyms, first):
    """Beside other words of the same object, and also where COCO's own pairs would take the words together."""
    words = [entry, *synonyms] if first else ["okapi", entry, *synonyms]
    (tmp_path / "synonyms.txt").write_text(", ".join(words), "utf-8")
    vocabulary = Vocabulary.load(tmp_path / "synonyms.txt")
    for caption in PLURALS[entry]:
        named = mentions(f"Here is {caption} to be seen.", vocabulary)
        assert [mention.node for mention in named] == [vocabulary.node(entry)], caption


@pytest.mark.parametrize("entry", ["# comment", "& co", "- dog"])
def test_signs_are_no_words(tmp_path, entry):
    (tmp_path / "synonyms.txt").write_text(f"{entry}\ndog\n")
    with pytest.raises(ValueError, match="could never be found in a caption"):
        Vocabulary.load(tmp_path / "synonyms.txt")


@pytest.mark.parametrize("name", [5, None, "", "  ", ["cup"], {"a": 1}])
def test_a_category_without_a_name_is_refused(tmp_path, name):
    (tmp_path / "images").mkdir()
    annotations(tmp_path / "instances.json", [["cup"]])
    content = json.loads((tmp_path / "instances.json").read_text())
    content["categories"][0]["name"] = name
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances\.json: the name of category 1 is .*; expected text"):
        prepare(Task(data=str(tmp_path), benchmarks="chair", methods="none"))


@pytest.mark.parametrize("number", [10**18, 10**20, "a", -1, 1.5])
def test_ids_that_name_no_image_are_refused_with_their_file(tmp_path, number):
    content = {"images": [{"id": number, "file_name": "a.png"}], "categories": [{"id": 1, "name": "cup"}]}
    content["annotations"] = [{"id": 1, "image_id": number, "category_id": 1}]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances\.json: .* names no image"):
        _ = Data.load(str(tmp_path)).images


def test_one_file_under_two_names_is_refused(tmp_path):
    annotations(tmp_path / "instances.json", [["cup"], ["cup"]], ["a.png", "./a.png"])
    with pytest.raises(ValueError, match="share 1 of their file_names"):
        _ = Data.load(str(tmp_path)).images


@IN_FOLDER
@given(groups=st.lists(st.sampled_from(["", " ", None, "rare", "rare ", "often", 1, "1"]), min_size=1, max_size=6))
def test_every_row_has_a_name_and_every_question_its_row(tmp_path, groups):
    rows = []
    for n, group in enumerate(groups):
        rows.append({"id": n, "image": "a.png", "question": f"Is it {n}?", "label": "yes", "group": group})
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    bench = benchmark("yesno")
    scored = bench.score(Data.load(str(tmp_path), asked=path), {str(n): "yes" for n in range(len(rows))})
    sizes = {group.name: len(group.scores) for group in scored}
    assert len(sizes) == len(scored) and sizes.pop("all", len(rows)) == len(rows)
    assert sum(sizes.values()) == len(rows) and (len(scored) == 1 or all(name.strip() for name in sizes))


@IN_FOLDER
@given(
    folders=st.lists(st.sampled_from(["x", "y", "x/z", "y/z"]), min_size=2, max_size=4, unique=True),
    root=st.sampled_from(["", "/data/", "C:\\data\\", "./"]),
    shift=st.integers(0, 3),
    bare=st.booleans(),
)
def test_answers_about_a_namesake_in_another_folder_are_refused(tmp_path, folders, root, shift, bare):
    asked = [yesno.Question(n, f"{folder}/a.png", "Is it?", "", "yes") for n, folder in enumerate(folders)]
    shown = [folders[(n + shift) % len(folders)] for n in range(len(folders))]
    names = ["a.png" if bare else f"{root}{folder}/a.png" for folder in shown]
    answers = [yesno.Answer(n, "yes", image=name) for n, name in enumerate(names)]
    if bare or shown == folders:
        assert len(yesno.score_answers(asked, answers)) == len(folders)
    else:
        with pytest.raises(ValueError, match="answers are about another image"):
            yesno.score_answers(asked, answers)


def test_head_tools_know_the_words_of_own_data(tmp_path):
    (tmp_path / "synonyms.txt").write_text("okapi, forest giraffe\n")
    _, processor = vlmfix.load("organism")
    tokens = processor.tokenizer("a cup and a dog", add_special_tokens=False)["input_ids"]
    for words, expected in [("mug, cup", ["mug"]), ("okapi, zebu", [])]:
        (tmp_path / "synonyms.txt").write_text(words)
        named = namings(processor, tokens, frozenset({"mug"}), Vocabulary.load(tmp_path / "synonyms.txt"))
        assert [naming.object for naming in named] == expected
