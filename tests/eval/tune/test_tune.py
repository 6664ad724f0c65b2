"""`vlmfix tune`: what is tried, what wins, and that a call that was cut off goes on."""

import json
from dataclasses import replace

import numpy as np
import pytest

import vlmfix
from vlmfix.asking.fix import FixFile
from vlmfix.eval.benchmarks.benchmark import Group, benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.tune import space
from vlmfix.eval.tune import tune as module
from vlmfix.eval.tune.goal import Goal, Limits, Trial
from vlmfix.eval.tune.labels import self_labelled
from vlmfix.eval.tune.page import in_words, write_page
from vlmfix.eval.tune.race import growing
from vlmfix.eval.tune.space import Candidate, merged, neighbours, pairs, searched, singles
from vlmfix.hooks import VAR, HeadGain
from vlmfix.method.heads import HeadList, parse_heads
from vlmfix.method.names import REGISTRY
from vlmfix.method.registry import method_class, parse

N = 40


def trial(invented=20, named=30, words=50, repeated=4, passes=1.0):
    """Of 40 pictures that show an object each: counts of captions, as CHAIR has them."""
    columns = {name: np.zeros(N) for name in ("mentions", "hallucinated_mentions", "unique_mentions")}
    columns |= {"captions": np.ones(N), "truth": np.ones(N), "words": np.full(N, float(words))}
    columns |= {"hallucinated_captions": np.arange(N) < invented, "true_unique": np.arange(N) < named}
    columns |= {"repeated": np.arange(N) >= N - repeated}
    made = Trial(Candidate((), "made"))
    records = [{"passes": 10 * passes, "token_ids": [0] * 10}] * N
    made.add(
        [Group("", list(range(N)), {name: np.asarray(column, float) for name, column in columns.items()})], records
    )
    return made


@pytest.mark.parametrize(
    ("change", "score", "broken"),
    [
        ({"invented": 10}, -25.0, {}),
        ({"invented": 10, "named": 29}, -25.0 + 4 * 2.0, {"recall": 2.0}),
        ({"invented": 10, "repeated": 6}, -25.0 + 2 * 3.0, {"repetition": 3.0}),
        ({"invented": 10, "words": 45}, -25.0 + 5.0, {"words": 5.0}),
        ({"invented": 10, "passes": 2.0}, -25.0 + 0.2 * 90, {"cost": 90.0}),
        ({"invented": 30}, 25.0, {}),
    ],
)
def test_score_and_limits(change, score, broken):
    verdict = Goal(benchmark("chair"), Limits()).verdict(trial(**change), trial())
    assert verdict.score == pytest.approx(score)
    assert verdict.broken == pytest.approx(broken)


def test_only_whole_intervals_put_a_candidate_out():
    goal = Goal(benchmark("chair"), Limits())
    assert goal.verdict(trial(named=29), trial()).surely_broken == ()
    assert goal.verdict(trial(named=10), trial()).surely_broken == ("recall",)
    assert goal.verdict(trial(repeated=30, words=20), trial()).surely_broken == ("repetition", "words")


def test_yes_no_questions_are_for_accuracy():
    bench = benchmark("pope")
    goal = Goal(bench, Limits())
    assert goal.objective == "accuracy" and goal.sign == -1 and goal.figures == ("accuracy",)


def test_searched_settings_are_valid():
    """A search space beside the fields of each method: every value fits its field, and is tried."""
    for name in REGISTRY:
        cls = method_class(name)
        assert set(cls.search) <= set(cls.__dataclass_fields__), name
        assert len(list(searched(cls))) == np.prod([len(values) for values in cls.search.values()]) * bool(cls.search)
    names = {part.name for candidate in singles([]) for part in candidate.methods}
    assert {"var", "pai", "vhr"} <= names and not {"beam", "rerank"} & names
    assert "beam" in {part.name for candidate in singles([], decoding=True) for part in candidate.methods}


def test_head_lists_become_candidates():
    scores = [[4.0 * layer + head for head in range(4)] for layer in range(8)]
    good = HeadList(model="", tool="visual", scores=scores)
    bad = HeadList(model="", tool="ablate", scores=scores, direction="high is bad", settings={"see": "token"})
    found = singles([good, bad], bakeable=True)
    assert found[0].title == "visual:top=8,gain=2" and found[1].title == "ablate-token:top=8,gain=0.5"
    assert parse_heads(found[0].methods[0].head_list)[0] == (7, 3)
    assert {part.name for candidate in found for part in candidate.methods} == {"headgain"}


def test_sums_are_of_different_methods_and_gains_multiply():
    heads = Candidate((HeadGain(head_list="L1H2/L3H0", gain=2.0),), "visual:top=2,gain=2")
    others = Candidate((HeadGain(head_list="L3H0/L3H1", gain=0.5),), "ablate-token:top=2,gain=0.5")
    var = Candidate((VAR(p=0.9),), "var:p=0.9")
    found = pairs([heads, var, others], [heads, replace(var, methods=(VAR(),), title="var"), others])
    assert [candidate.title for candidate in found] == [
        "var + visual:top=2,gain=2",
        "var:p=0.9 + visual:top=2,gain=2",
        "ablate-token:top=2,gain=0.5 + visual:top=2,gain=2",
        "ablate-token:top=2,gain=0.5 + var:p=0.9",
        "ablate-token:top=2,gain=0.5 + var",
    ]
    (joint,) = found[2].methods
    assert joint.gains() == {(1, 2): 2.0, (3, 0): 1.0, (3, 1): 0.5}
    assert merged([*heads.methods, VAR()]) == (*heads.methods, VAR())
    near = [candidate.methods[0] for candidate in neighbours(var)]
    assert [(method.p, method.rho) for method in near] == [(0.675, 0.5), (0.9, 0.375), (0.9, 0.65)]


@pytest.mark.parametrize(("n", "sizes"), [(300, [20, 40, 80, 160]), (72, [24, 48]), (12, [4, 8])])
def test_rounds_grow(n, sizes):
    assert growing(n) == sizes


@pytest.mark.parametrize("text", ["", "0", "-5", "20 minutes", "m"])
def test_budgets_refused(text):
    with pytest.raises(ValueError, match="budget: expected a time such as 20m, 90s or 1h, or a number of questions"):
        module.Budget.read(text)
    assert module.Budget.read("1.5h") == module.Budget(5400, "seconds")


@pytest.fixture
def few(monkeypatch):
    """Few methods and tools, so that a search takes seconds."""
    monkeypatch.setattr(module, "TOOLS", {"vhd": 4})
    monkeypatch.setattr(space, "REGISTRY", ("pai",))


@pytest.fixture(scope="module")
def call(organism, tmp_path_factory):
    """What to call `tune` with."""
    data = Data.load("calibration", limit=20)
    folder = tmp_path_factory.mktemp("tune") / "tuned"
    return (*organism, data), {"budget": 160, "max_new_tokens": 24, "batch_size": 20, "output": folder}


@pytest.fixture(scope="module")
def tuned(call):
    """The embedded model, tuned on a few pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOOLS", {"vhd": 4})
        patch.setattr(space, "REGISTRY", ("pai",))
        return vlmfix.tune(*call[0], **call[1])


def test_tuning_the_embedded_model(call, tuned, few, monkeypatch):
    positional, options = call
    folder = options["output"]
    course = tuned.race.course
    blocks = [set(block.pictures) for block in course.blocks]
    assert [len(block) for block in blocks] == [4, 8, 8] and len(set.union(*blocks)) == 20
    tried = [trial for trial in tuned.race.trials if trial.n]
    assert len(tried) > 4 and max(trial.n for trial in tried) == 12, "nobody but finalists sees the last part"
    assert course.answers <= 160 and any(" with alpha=" in trial.candidate.title for trial in tried)
    assert all(trial.out for trial in tuned.race.trials if trial.n < 12)
    write_page(tuned, folder)
    assert "candidates were tried on up to 12 pictures" in " ".join(in_words(tuned))
    assert "<svg" in (folder / "index.html").read_text()
    assert json.loads((folder / "tune.json").read_text())["tried"][0]["n"]
    # once more: everything is on disk, nothing is asked, and all is decided as before
    monkeypatch.setattr(vlmfix.Asker, "ask_batch", None)
    again = vlmfix.tune(*positional, **options)
    assert [(trial.candidate.title, trial.n, trial.out) for trial in again.race.trials] == [
        (trial.candidate.title, trial.n, trial.out) for trial in tuned.race.trials
    ]


def test_a_fix_from_a_winner(organism, tuned, tmp_path):
    """What is written is the winner, for this model, with its evidence and the pictures that it was made on."""
    confirmed = tuned.finalists[0] if tuned.finalists else None
    if confirmed is None:
        block = len(tuned.race.course.blocks) - 1
        candidate = Candidate(parse("pai"), "pai")
        confirmed = module._on_others(tuned.race.course, tuned.goal, candidate, block, tuned.base)
    difference = replace(confirmed.verdict.differences["CHAIR_S"], value=-10.0, p=0.001)
    verdict = replace(confirmed.verdict, differences={**confirmed.verdict.differences, "CHAIR_S": difference})
    won = replace(tuned, finalists=[replace(confirmed, verdict=verdict, p_holm=0.001)])
    fix = module._fix(won, *organism, "vlmfix tune")
    fix.save(tmp_path / "fix.json")
    assert FixFile.load(tmp_path / "fix.json").methods == confirmed.candidate.methods
    assert len(fix.pictures) == 20 and fix.evidence["winner"]["p_holm"] == 0.001
    vlmfix.Asker(*organism, str(tmp_path / "fix.json"))
    lost = replace(tuned, finalists=[replace(confirmed, verdict=verdict, p_holm=0.2)])
    assert module._fix(lost, *organism, "vlmfix tune") is None, "not told apart from the untouched model"


def test_pictures_without_labels(organism, tmp_path):
    """The model's own yes and no stand in for the truth, and agree with it for most objects."""
    data = Data.load("calibration", limit=4)
    labelled = self_labelled(*organism, data, tmp_path, max_new_tokens=60)
    assert set(labelled.images) == set(data.images)
    own, truth = labelled.truth, data.truth
    shown = [(key, name) for key in own for name in own[key]]
    assert len(shown) >= 6
    assert np.mean([name in truth[key] for key, name in shown]) > 0.7


def test_yes_no_questions_of_ones_own(organism, few, tmp_path):
    """The best accuracy; heads cannot be ranked where nobody knows what is in the pictures."""
    scenes = Data.load("calibration").folder
    lines = (scenes / "attributes.jsonl").read_text().splitlines()
    pictures = sorted({json.loads(line)["image"] for line in lines})[:20]
    (tmp_path / "questions").mkdir()
    kept = [line for line in lines if json.loads(line)["image"] in pictures]
    (tmp_path / "questions" / "q.jsonl").write_text("\n".join(kept) + "\n")
    data = Data.load(str(tmp_path / "questions"), pictures=scenes / "images")
    tuned = vlmfix.tune(*organism, data, bench="yesno", budget=600, output=tmp_path / "tuned", batch_size=64)
    tried = [trial for trial in tuned.race.trials if trial.n]
    assert {part.name for trial in tried for part in trial.candidate.methods} == {"pai"}
    assert tuned.base.counts and len(tuned.base.images) == len(tuned.race.course.blocks[-1].pictures)
    n_questions = sum(block.n_questions for block in tuned.race.course.blocks)
    assert n_questions == len(kept) and tuned.base.n == 8
    asked = sum(tuned.base.counts[name].sum() for name in ("tp", "tn", "fp", "fn"))
    assert asked == tuned.race.course.blocks[-1].n_questions, "each answer counts once, whatever its group"
    write_page(tuned, tmp_path / "tuned")


def test_too_little(organism, tmp_path):
    with pytest.raises(ValueError, match="expected 20 pictures or more to tune on, got 6"):
        vlmfix.tune(*organism, Data.load("calibration", limit=6), output=tmp_path)
