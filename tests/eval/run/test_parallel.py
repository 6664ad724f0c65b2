"""Several processes take whole runs: the answers are those of one process."""

from vlmfix.eval.api import Task, compare, evaluate, prepare
from vlmfix.eval.run.parallel import answer_in_processes, units_of
from vlmfix.eval.tour import CONTROLS, METHODS, tour
from vlmfix.method.registry import parse, spec_of


def test_two_processes_answer_as_one(tmp_path):
    task = Task(
        methods="none,var,vhr", benchmarks="chair,pope", data="organism", limit=14, output=str(tmp_path / "two")
    )
    told = []
    runs = answer_in_processes([prepare(task)], 2, lambda *facts: told.append(facts), "vlmfix eval")
    alone = evaluate(Task(**{**task.to_json(), "output": str(tmp_path / "one")}))
    assert [run.label for run in runs] == ["none", "var", "vhr"] * 2 == [run.label for run in alone]
    for run, other in zip(runs, alone, strict=True):
        assert {r["id"]: r["text"] for r in run.records} == {r["id"]: r["text"] for r in other.records}
        assert run.header["fingerprint"] == other.header["fingerprint"]
    assert told[-1][1] == told[-1][2] and len(compare(runs)) == 2


def test_the_main_job_is_cut_into_units_that_share_pictures():
    setups = [prepare(task) for task in tour(limit=14)]
    units = units_of(setups)
    places = sorted(place for unit in units for place in unit.places)
    assert places == list(range(12 + 6))
    assert max(len(unit.places) for unit in units) == 4, "none, var twice and pai share the pass over a picture"


def test_controls_of_the_main_job_are_controls():
    for method, control in CONTROLS.items():
        assert control in [spec_of([each]) for part in parse(method) for each in part.controls()], method
    assert all(spec_of(parse(method)) == method for method in METHODS if method != "none")
