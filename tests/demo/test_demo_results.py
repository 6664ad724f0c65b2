"""Results: the leaderboard shows the committed figures, and reports are of runs below the root and of nothing else."""

import json
import os
import re
from html import unescape

import gradio as gr
import pytest

from vlmfix.demo import leaderboard, results
from vlmfix.eval.benchmarks.benchmark import benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.report.figures import figure
from vlmfix.eval.run.runner import answer_all
from vlmfix.method.registry import parse
from vlmfix.model.loading import load

CHAIR = "CHAIR (rohrbach): organism"


def text(html):
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def table(html):
    """Rows of the leaderboard as lists of text."""
    return [[text(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in re.findall(r"<tr.*?</tr>", html)]


# The leaderboard


def test_boards_hold_the_committed_results():
    boards = leaderboard.boards()
    assert list(boards) == [CHAIR, *(f"POPE, {split}: organism" for split in ("random", "popular", "adversarial"))]
    for board in boards.values():
        assert set(board.owned()) == {"none", "vhr", "pai", "contrast", "vcd"}
        assert board.command.startswith("vlmfix eval --benchmark") and "--controls --json" in board.command
    assert boards[CHAIR].pictures == 200 and boards["POPE, random: organism"].pictures == 55


def test_controls_belong_to_their_method():
    owned = leaderboard.boards()[CHAIR].owned()
    assert owned["vhr"] == ("vhr:select=random", "vhr:select=least", "vhr:alpha=0.5")
    assert owned["pai"] == ("pai:alpha=-0.5",) and owned["none"] == ()


def test_the_best_comes_first():
    board = leaderboard.boards()[CHAIR]
    of = {line.method: line.estimates for line in board.lines}
    fewest = board.ranked("CHAIR_S")
    assert fewest == sorted(board.owned(), key=lambda m: of[m]["CHAIR_S"].value)
    assert board.ranked("F1") == sorted(board.owned(), key=lambda m: -of[m]["F1"].value)
    assert fewest[-1] == "none"


def test_the_table_has_values_intervals_and_differences():
    board = leaderboard.boards()[CHAIR]
    head, *lines = table(board.html("recall"))
    assert head[:3] == ["method", "recall %", "difference to none"] and len(head) == len(board.columns) + 2
    assert len(lines) == len(board.lines)
    vhr = next(line for line in board.lines if line.method == "vhr")
    at = next(i for i, cells in enumerate(lines) if cells[0] == "vhr")
    assert lines[at][1] == figure(vhr.estimates["recall"], 100)
    assert lines[at][2] == figure(vhr.differences["recall"], 100, signed=True)
    assert [cells[0] for cells in lines[at + 1 : at + 4]] == [
        "control vhr: select= random", "control vhr: select= least", "control vhr: alpha= 0.5",
    ]  # fmt: skip
    assert next(cells for cells in lines if cells[0] == "none")[2] == ""
    assert board.command in text(board.html("recall"))


def test_only_clear_differences_are_coloured():
    def kinds(metric):
        lines = leaderboard.boards()[CHAIR].html(metric).replace("<wbr>", "").split("<tr")
        return {m[1]: m[2] for line in lines if (m := re.search(r"<code>(.*?)</code>.*?<b class=\"(\w*)\">", line))}

    assert kinds("CHAIR_S")["vcd"] == "good" and kinds("F1")["pai:alpha=-0.5"] == "bad"
    assert kinds("recall")["vhr"] == "bad" and kinds("recall")["contrast"] == ""
    assert kinds("F1")["contrast"] == "good" and kinds("words")["vhr"] == ""


def test_labels_are_escaped_and_short():
    assert leaderboard.wrapping("a:b=0.8999999999999999") == "a:<wbr>b=<wbr>0.9"
    assert leaderboard.wrapping("<b>") == "&lt;b&gt;"


# Runs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two methods on six scenes."""
    folder = tmp_path_factory.mktemp("runs")
    model, processor = load("organism")
    for spec in ("none", "vhr"):
        answer_all(model, processor, parse(spec), benchmark("chair"), Data.load("organism", 6), folder)
    answer_all(model, processor, (), benchmark("pope"), Data.load("organism", 6), folder)
    return folder


def test_runs_below_the_root_are_found(root):
    found, broken = results.find(root)
    assert not broken
    assert {(one.kind, one.label) for one in found} == {
        ("chair, model organism, organism, first 6", "none"),
        ("chair, model organism, organism, first 6", "vhr"),
        ("pope, model organism, organism, first 6", "none"),
    }
    assert results.find(root / "nowhere") == ([], [])


def test_filters(root):
    found, _ = results.find(root)
    assert results.chosen(found, [], []) == found
    assert [one.label for one in results.chosen(found, ["chair, model organism, organism, first 6"], ["vhr"])] == [
        "vhr"
    ]
    assert len(results.chosen(found, [], ["none"])) == 2
    assert results.chosen(found, ["../../etc"], []) == []


def test_the_report_is_the_one_of_the_command_line(root):
    page = results.report(results.find(root)[0])
    assert page.startswith("<!DOCTYPE html>") and "CHAIR (rohrbach), model organism" in page and "POPE" in page
    assert "<code>vhr</code>" in page and "; methods none, vhr; " in page  # the untouched model first
    one = results.report(results.chosen(results.find(root)[0], ["pope, model organism, organism, first 6"], []))
    assert "CHAIR (rohrbach)" not in one


def test_a_run_that_goes_on_is_read_again(root, tmp_path):
    folder = tmp_path / "run"
    source = next(one.folder for one in results.find(root)[0] if one.label == "vhr")
    folder.mkdir()
    (folder / "run.json").write_bytes((source / "run.json").read_bytes())
    whole = (source / "records.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "records.jsonl").write_bytes(b"".join(whole[:3]))
    assert "3 of 6 answers" in unescape(results.report(results.find(tmp_path)[0]))
    (folder / "records.jsonl").write_bytes(b"".join(whole))
    os.utime(folder / "records.jsonl", ns=(1, 1))
    assert "of 6 answers" not in unescape(results.report(results.find(tmp_path)[0]))


def test_broken_runs_are_named_and_do_not_hide_others(root, tmp_path):
    source = results.find(root)[0][0].folder
    for name in ("bad", "empty", "good"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_bytes(b"{" if name == "bad" else (source / "run.json").read_bytes())
    (tmp_path / "good" / "records.jsonl").write_bytes((source / "records.jsonl").read_bytes())
    found, broken = results.find(tmp_path)
    assert [one.folder.name for one in found] == ["good"]
    assert len(broken) == 2 and "is no header of a run" in broken[0] and "holds no answers yet" in broken[1]


def test_too_many_and_none_at_all(root):
    found, _ = results.find(root)
    with pytest.raises(ValueError, match="No run passes the filters"):
        results.report([])
    with pytest.raises(ValueError, match="takes up to 24; choose fewer"):
        results.report([found[0]] * 25)


def test_the_report_takes_the_theme_and_runs_nothing():
    page = "<style>@media (prefers-color-scheme: dark) { a }</style><script>alert(1)</script>'\""
    dark, light = results.framed(page, True), results.framed(page, False)
    assert dark.startswith("<iframe sandbox title=") and "<script" not in dark
    assert "@media all {" in unescape(dark) and "@media not all {" in unescape(light)
    assert unescape(re.search('srcdoc="([^"]*)"', light)[1]).endswith("<script>alert(1)</script>'\"")


# The tab


@pytest.fixture
def handlers(root):
    with gr.Blocks() as page:
        results.tab(root)
    return {f.fn.__name__: f.fn for f in page.fns.values()}


def test_the_tab_lists_runs_and_reports(handlers, root):
    kinds, methods, said = handlers["list_runs"]()
    assert kinds["choices"] == ["chair, model organism, organism, first 6", "pope, model organism, organism, first 6"]
    assert methods["choices"] == ["none", "vhr"] and "3 runs below" in said
    assert "<iframe sandbox" in handlers["make"](kinds["choices"][:1], [], False)
    assert "No run passes the filters" in handlers["make"](["../.."], [], False)
    (next(iter(results.find(root)[0])).folder / "records.jsonl").open("ab").write(b"{")
    assert "cut off" in handlers["make"]([], [], False)


def test_without_runs_there_is_a_sentence(tmp_path):
    with gr.Blocks() as page:
        results.tab(tmp_path / "nothing")
    list_runs = next(f.fn for f in page.fns.values() if f.fn.__name__ == "list_runs")
    *groups, said = list_runs()
    assert "There are no runs below" in said and "vlmfix eval --output" in said
    assert all(group["visible"] is False for group in groups)


def test_boards_are_picked_and_sorted(handlers):
    update, html = handlers["pick"]("POPE, random: organism")
    assert update["value"] == "accuracy" == update["choices"][0] and "accuracy %" in html
    assert handlers["sort"](CHAIR, "F1") == leaderboard.boards()[CHAIR].html("F1")
    assert handlers["sort"](CHAIR, "accuracy") == gr.skip()


def test_results_name_no_machine():
    for path in (results.Path(leaderboard.__file__).parent.parent / "assets" / "results").glob("*.json"):
        for comparison in json.loads(path.read_text("utf-8")):
            for run in comparison["runs"]:
                assert "platform" not in run["environment"] and run["folder"].startswith("runs/")
