"""The command line: output, and one clear sentence for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vlmfix.cli import app
from vlmfix.hooks import REGISTRY

ROOT = Path(__file__).parents[2]
SCENE = str(ROOT / "assets" / "organism" / "test" / "images" / "test_0003.webp")


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.mark.parametrize("command", [["--help"], ["methods"], ["methods", "--json"], ["eval", "--help"], ["--version"]])
def test_imports_no_torch(command):
    code = f"import sys; from vlmfix.cli import app; app({command!r}, standalone_mode=False); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_importing_has_no_side_effects():
    code = (
        "import sys, warnings, logging; before = (list(warnings.filters), logging.root.level);"
        "import vlmfix; assert 'torch' not in sys.modules and 'transformers' not in sys.modules;"
        "vlmfix.wrap, vlmfix.ask, vlmfix.load;"
        "from transformers.modeling_utils import AttentionInterface; assert 'vlmfix' not in AttentionInterface._global_mapping;"
        "assert before == (list(warnings.filters), logging.root.level) or 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_methods():
    found = json.loads(run("methods", "--json").stdout)
    assert [m["name"] for m in found] == list(REGISTRY)
    assert {m["name"]: m["stages"] for m in found}["pai"] == ["scores", "logits"]
    table = run("methods").stdout
    for m in found:
        assert m["name"] in table


def test_ask_side_by_side():
    done = run("ask", SCENE, "Please describe this image in detail.", "--method", "none,vhr:alpha=1.5", "--json")
    assert done.exit_code == 0, done.output
    plain, edited = (json.loads(line) for line in done.stdout.splitlines())
    assert plain["method"] == [] and edited["method"][0]["alpha"] == 1.5 and plain["text"] != edited["text"]
    table = run("ask", SCENE, "Is there a person in the image?")
    assert table.exit_code == 0 and "none" in table.stdout and "vhr" in table.stdout and "Yes" in table.stdout


def test_speed_goes_beside_the_methods(tmp_path):
    asked = [
        "ask",
        SCENE,
        "Please describe this image in detail.",
        "--method",
        "none,contrast",
        "--speed",
        "pyramiddrop",
    ]
    lines = [json.loads(line) for line in run(*asked, "--json").stdout.splitlines()]
    assert [[m["name"] for m in r["method"]] for r in lines] == [[], ["pyramiddrop"], ["contrast", "pyramiddrop"]]
    assert "contrast+pyramiddrop" in run(*asked).stdout
    options = ["--benchmark", "chair", "--limit", 2, "--output", tmp_path, "--json"]
    speed = "pyramiddrop:ratios=0.5/0.25,layers=2/4"
    done = run("eval", "--method", "none,vcd", "--speed", speed, "--controls", *options)
    assert done.exit_code == 0, done.output
    (table,) = json.loads(done.stdout)
    label = "pyramiddrop:ratios=0.5/0.25,layers=2/4"
    rows = ["none", label, f"vcd+{label}", f"vcd:alpha=0.0+{label}", f"{label},select=random"]
    assert [row["method"] for row in table["rows"]] == rows
    assert [row["differences"] is None for row in table["rows"]] == [True, False, False, False, False]
    kept = table["runs"][1]["identity"]["method"]
    assert kept[0]["name"] == "pyramiddrop" and kept[0]["ratios"] == [0.5, 0.25] and kept[0]["layers"] == [2, 4]


def test_eval_and_score(tmp_path):
    done = run(
        "eval",
        "--benchmark",
        "chair",
        "--method",
        "none,var:rho=0,vhr+var:dims=22,tau=3",
        "--limit",
        3,
        "--output",
        tmp_path,
    )
    assert done.exit_code == 0, done.output
    assert "CHAIR (rohrbach), model organism, 3 pictures" in done.stdout and "var:p=0.6" not in done.stdout
    assert "CHAIR_S %" in done.stdout and re.search(r"^none .*\[\d", done.stdout, re.MULTILINE)
    assert "testing only" in done.stdout
    folders = sorted(p.parent for p in tmp_path.rglob("records.jsonl"))
    assert len(folders) == 3
    again = run("score", *folders, "--json")
    assert again.exit_code == 0 and len(json.loads(again.stdout)[0]["rows"]) == 3
    strict = run("score", *folders, "--variant", "strict")
    assert strict.exit_code == 0 and "CHAIR (strict), model organism, 3 pictures" in strict.stdout
    wrong = run("score", *folders, "--variant", "strikt")
    assert wrong.exit_code == 1 and "did you mean 'strict'" in wrong.stderr


def test_heads(tmp_path):
    listed, plot = tmp_path / "lists" / "heads.json", tmp_path / "heads.png"
    args = ["heads", "--data", "organism", "--limit", 4, "--output", listed]
    done = run(*args, "--plot", plot)
    assert done.exit_code == 0, done.output
    assert "vhd on organism" in done.stdout and "64 heads, 16 selected; high is good" in done.stdout and plot.exists()
    first = re.search(r"1 +│ (L\dH\d) ", done.stdout)[1]
    found = json.loads(run(*args, "--top", 3, "--json").stdout)
    assert len(found["selected"]) == 3 and "L{}H{}".format(*found["selected"][0]) == first
    assert json.loads(listed.read_text()) == found
    ask = run("ask", SCENE, "Please describe this image.", "--method", f"headgain:head_list={listed}", "--json")
    assert json.loads(ask.stdout)["method"][0]["facts"]["head_list"]["data"]["name"] == "organism"
    judged = run(
        "eval", "--benchmark", "chair", "--limit", 2, "--output", tmp_path, "--method", f"headgain:head_list={listed}"
    )
    assert judged.exit_code == 1 and "was made on 2 of the 2 pictures that are asked about" in judged.stderr


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["heads", "--tool", "vdh"], "unknown tool 'vdh'; did you mean 'vhd'?"),
        (["heads", "--tool", "random", "--top", "99"], "top: expected a number of heads in 1..64, got 99"),
        (["heads", "--tool", "random", "--top", "9", "--share", "0.5"], "expected one of top, share, threshold, positive"),
        (["heads", "--tool", "random", "--plot", "heads.xyz"], "cannot draw heads.xyz"),
        (["ask", SCENE, "Hello?", "--method", "headgain:head_list=none.json"], "cannot read the head list none.json"),
        (["eval", "--method", "none,vrh"], "unknown method 'vrh'; did you mean 'vhr'?"),
        (["eval", "--method", "vhr:alhpa=2"], "vhr has no setting 'alhpa'; did you mean 'alpha'?"),
        (["eval", "--method", "vhr:alpha"], "expected setting=value after the colon, got 'alpha'"),
        (["eval", "--method", "vhr:alpha=much"], "vhr: alpha expects a number, got 'much'"),
        (["eval", "--method", "vhr:alpha=-1"], "alpha: expected a number above 0, got -1"),
        (["eval", "--method", "my.module:Thing"], "cannot be imported: No module named 'my'"),
        (["eval", "--method", "json.decoder:JSONDecoder"], "is not a subclass of vlmfix.Intervention"),
        (["eval", "--method", "none,pyramiddrop"], "pyramiddrop is made for speed and is no method; give --speed pyramiddrop"),
        (["eval", "--speed", "vhr"], "speed: expected an accelerator (pyramiddrop), got 'vhr'"),
        (["eval", "--speed", "pyramiddrop"], "var tells tokens by their place in the prompt, and pyramiddrop takes tokens out; with pyramiddrop:form=mask"),
        (["eval", "--benchmark", "chiar"], "unknown benchmark 'chiar'; did you mean 'chair'?"),
        (["eval", "--model", "no/such-folder/here"], "cannot load 'no/such-folder/here': expected an embedded model (organism, organism-qwen)"),
        (["eval", "--data", "/no/such/folder"], "does not exist; expected organism, calibration, photos, coco, aokvqa, gqa, coco_first_release or a folder: with images/"),
        (["eval", "--dtype", "float8"], "dtype: expected float32, bfloat16 or float16, got 'float8'"),
        (["ask", "no-such.png", "Hello?"], "no such image file: no-such.png"),
        (["ask", SCENE, " "], "prompt: expected some text, got ' '"),
        (["ask", SCENE, "Hello?", "--method", "vhr:layers=99"], "layers: expected numbers in 0..7, got [99]"),
        (["score", "/no/such/run"], "expected a run folder of `vlmfix eval`"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_sentence(args, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*args)
    assert done.exit_code == 1, done.output
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and lines[0].startswith("vlmfix: ") and sentence in lines[0], done.stderr
    assert done.exception is None or isinstance(done.exception, SystemExit)


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / "note.png").write_text("hello")
    done = run("ask", tmp_path / "note.png", "What?")
    assert done.exit_code == 1 and "is no image that can be read" in done.stderr
    Image.new("RGB", (50, 50), "red").save(tmp_path / "red.jpg")
    cut = (tmp_path / "red.jpg").read_bytes()[:300]
    (tmp_path / "cut.jpg").write_bytes(cut)
    done = run("ask", tmp_path / "cut.jpg", "What?")
    assert done.exit_code == 1 and "is no image that can be read" in done.stderr


def test_a_prompt_without_an_image():
    done = run("ask", "What is in the picture?")
    assert done.exit_code == 1 and "expected a picture and a prompt" in done.stderr


def test_a_model_that_takes_no_pictures(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path)
    done = run("ask", SCENE, "What?", "--model", tmp_path)
    assert done.exit_code == 1 and "is a llama model, which takes no image and text together" in done.stderr


def test_annotations_that_lack_an_image(tmp_path):
    scenes = ROOT / "assets" / "organism" / "test"
    (tmp_path / "images").mkdir()
    instances = json.loads((scenes / "instances.json").read_text())
    instances["images"] = instances["images"][:2]
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    done = run("eval", "--benchmark", "pope", "--data", tmp_path, "--output", tmp_path / "out")
    assert done.exit_code == 1 and "annotates" in done.stderr and "does not list" in done.stderr
    keep = {i["id"] for i in instances["images"]}
    instances["annotations"] = [a for a in instances["annotations"] if a["image_id"] in keep]
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    done = run("eval", "--benchmark", "chair", "--data", tmp_path, "--method", "none", "--output", tmp_path / "out")
    assert done.exit_code == 1 and "no such image file" in done.stderr


def test_a_truncated_answer_file(tmp_path):
    assert run("eval", "--benchmark", "chair", "--method", "none", "--limit", 2, "--output", tmp_path).exit_code == 0
    records = next(tmp_path.rglob("records.jsonl"))
    records.write_bytes(records.read_bytes()[:-20])
    done = run("score", records)
    assert done.exit_code == 1 and "ends in a line that was cut off; 1 answers before it are whole" in done.stderr
    assert records.read_bytes().count(b"\n") == 1, "finished answers are kept"


@pytest.mark.parametrize("name", REGISTRY)
def test_all_about_one_method(name):
    """On a page of 80 columns, with every setting; and the same as data."""
    page = run("methods", name).stdout
    assert max(map(len, page.splitlines())) <= 80 and page.startswith(f"{name}: ")
    (facts,) = json.loads(run("methods", name, "--json").stdout)
    settings = set(facts) - {"name", "summary", "expect", "cost", "paper", "stages", "needs"}
    assert settings == set(re.findall(r"^  (\w+)=", page, re.MULTILINE))
    for key in ("cost", "expect", "paper"):
        assert facts[key].split()[0] in page


def test_a_method_that_is_not_there():
    done = run("methods", "vra")
    assert done.exit_code == 1 and "unknown method 'vra'; did you mean" in done.stderr
    mine = run("methods", "tests.method.test_settings:Every")
    assert mine.exit_code == 0 and "share=0.5  a number in 0..1" in mine.stdout


def test_nothing_asked_five_lines():
    done = run()
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 5
    assert max(map(len, done.stdout.splitlines())) <= 80 and "vlmfix eval" in done.stdout


def test_an_embedded_model_says_that_photos_mean_nothing_to_it():
    photo = ROOT / "assets" / "photos" / "images" / "000000168974.jpg"
    asked = run("ask", photo, "Is there a person in the image?", "--method", "none")
    assert asked.exit_code == 0 and "drawn scenes only" in asked.stderr
    assert "drawn scenes only" not in run("ask", SCENE, "Is there a cat?", "--method", "none").stderr


@pytest.mark.parametrize("command", ["methods", "protocols"])
def test_lists_have_a_line_an_entry(command):
    lines = run(command).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    name = lines[0].split()[0]
    about = run(command, name).stdout
    assert about.startswith(name) and len(about.splitlines()) >= 3
    assert run(command, "nothing-of-the-kind").exit_code == 1
