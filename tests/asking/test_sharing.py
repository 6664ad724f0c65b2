"""Questions about one picture that share the pass over it: the same answers as asked one by one."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch

import vlmfix
from tests.models import ARCHITECTURES, IMAGE, picture_prompt, plant_sinks
from vlmfix.asking.asker import Asker, ask_batch
from vlmfix.asking.batch import Batch
from vlmfix.asking.prefix import ContinuedBatch
from vlmfix.asking.words import spellings
from vlmfix.engine.attachment import Attachment, attached
from vlmfix.engine.wrap import effects, in_force, wrapped
from vlmfix.eval.benchmarks.benchmark import Item, benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run.batches import end_of_batch, share_of
from vlmfix.eval.run.runner import answer_all, answer_each
from vlmfix.eval.run.workers import Workers
from vlmfix.hooks import PAI, REGISTRY, VAR, HeadGain, ZeroTuning
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.registry import method_class, parse

METHODS = {
    "none": [],
    "var": [VAR(dims=(7,), tau=3.0, rho=0.0, min_visual_mass=0.0, skip_first=1)],
    "pai": [PAI(alpha=2.0, skip_first=1)],
    "zerotuning": [ZeroTuning(gamma=8.0)],
    "heads": [HeadGain(head_list="L1H2/L2H0", gain=2.0)],
}
SUFFIXES = [(0, [5, 6, 7]), (1, [8]), (0, [5, 9, 30, 31, 32]), (1, [8, 8])]
"""Picture and last tokens of each question."""


def joined(prompt, more):
    """A prompt of one sample with tokens appended."""
    out = dict(prompt)
    for name, x in prompt.items():
        if x.shape == prompt["input_ids"].shape:
            fill = torch.tensor([more]) if name == "input_ids" else torch.full((1, len(more)), int("attention" in name))
            out[name] = torch.cat([x, fill.to(x.dtype)], dim=1)
    return out


def padded(prompts):
    """Several prompts as one batch, padded on the left."""
    width = max(p["input_ids"].shape[1] for p in prompts)
    left = lambda x: torch.nn.functional.pad(x, (width - x.shape[1], 0))  # noqa: E731
    tokens = lambda p, x: x.shape == p["input_ids"].shape  # noqa: E731
    return {k: torch.cat([left(p[k]) if tokens(p, p[k]) else p[k] for p in prompts]) for k in prompts[0]}


def going_on(prefix, asked):
    """Ids and mask of (row of `prefix`, further ids) pairs, padded between the two, and the rows."""
    n, rest = prefix["input_ids"].shape[1], max(len(more) for _, more in asked)
    ids, mask = torch.zeros(2, len(asked), n + rest, dtype=torch.long)
    for b, (g, more) in enumerate(asked):
        ids[b, :n], mask[b, :n] = prefix["input_ids"][g], prefix["attention_mask"][g]
        ids[b, n + rest - len(more) :], mask[b, n + rest - len(more) :] = torch.tensor(more), 1
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([g for g, _ in asked])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_sharing_changes_no_logits_and_no_report(architecture, method):
    model = plant_sinks(ARCHITECTURES[architecture]())
    pictures = [picture_prompt(model, 1, seed=g, lengths=[2 + g]) for g in range(2)]
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [58, 59, 60, 61]}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with wrapped(model, METHODS[method]):
        alone, said = [], []
        for g, more in SUFFIXES:
            alone.append(torch.stack(model.generate(**joined(pictures[g], more), **settings).logits)[:, 0])
            said.append([one["samples"][0] for one in effects(model)])
        prefix = padded(pictures)
        given, picture = going_on(prefix, SUFFIXES)
        logits = []
        run = ContinuedBatch(
            model,
            None,
            [],
            given,
            {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [58, 59, 60, 61]},
            prefix_inputs=prefix,
            prefix_row=picture,
        )
        note = lambda _, scores: (logits.append(scores.clone()), scores)[1]  # noqa: E731
        run = replace(run, settings={**run.settings, "logits_processor": [note]})
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # that a method did nothing can be told at the end only
            tokens = run.generate()
        together = torch.stack(logits[-4:], dim=1)
        for b, (one, facts) in enumerate(zip(alone, said, strict=True)):
            kept = one.isfinite() & together[b].isfinite()
            torch.testing.assert_close(together[b][kept], one[kept], rtol=1e-3, atol=1e-3)
            assert tokens[b] == one.index_fill(1, torch.tensor([58, 59, 60, 61]), -torch.inf).argmax(-1).tolist()
            for mine, shared in zip(facts, effects(model), strict=True):
                assert _rounded(shared["samples"][b]) == _rounded(mine)
        plain = torch.stack([x for x in alone])
    if method != "none":
        with torch.no_grad():
            untouched = model.generate(**joined(pictures[0], SUFFIXES[0][1]), **settings).logits[0]
        assert not torch.allclose(untouched, plain[0, :1], atol=1e-2), "the method bites"


def _rounded(found):
    if isinstance(found, dict):
        return {k: _rounded(v) for k, v in found.items()}
    if isinstance(found, list):
        return [_rounded(v) for v in found]
    return pytest.approx(found, rel=1e-3, abs=1e-4) if isinstance(found, float) else found


def test_methods_that_look_at_the_whole_prompt_do_not_share():
    model, processor = vlmfix.load("organism")
    greedy = {"do_sample": False, "max_new_tokens": 4}
    plain = Asker(model, processor)
    assert plain.can_share(greedy) and not plain.can_share({**greedy, "do_sample": True})
    assert not plain.can_share({**greedy, "num_beams": 2}) and not plain.can_share({**greedy, "use_cache": False})
    sharing = {name for name in REGISTRY if method_class(name)().traits.shares_pictures}
    assert sharing >= {"pai", "var", "zerotuning"}
    for name in REGISTRY:
        one = method_class(name)()
        assert not (one.traits.shares_pictures and (one.traits.whole_prompt or one.acts_at("begin"))), name
        if name not in ("adaiat", "adhh", "allpath", "headgain"):  # which must be given heads, or a file
            assert Asker(model, processor, name).can_share(greedy) == (name in sharing), name
    cases = {"vhr": False, "headgain:head_list=L1H2": True, "pai:gamma=1.1": False, "pai+vhr": False}
    for spec, shares in cases.items():
        assert Asker(model, processor, spec).can_share(greedy) == shares, spec


@pytest.mark.filterwarnings("ignore:var will not act")
@pytest.mark.parametrize("method", ["none", "var", "var:p=0.9,rho=0", "headgain:head_list=L3H1/L4H2,gain=2"])
def test_records_are_those_of_the_plain_path(method):
    model, processor = vlmfix.load("organism")
    items = sorted(benchmark("pope").items(Data.load(limit=6)), key=lambda item: (item.prompt, item.image))
    asked = [(item.image, item.prompt) for item in items]
    words = {word: spellings(processor, word) for word in ("yes", "no")}
    with wrapped(model, parse(method), processor):
        shared, plain = (
            ask_batch(model, processor, asked, max_new_tokens=8, first_token=words, share=share)
            for share in (True, False)
        )
    assert len(asked) > len({item.image for item in items}) > 1
    assert sum(r.tokens for r in shared) < sum(r.tokens for r in plain) / 2
    free = ("seconds", "passes", "tokens", "effects", "first_token")
    for one, other in zip(shared, plain, strict=True):
        assert {k: v for k, v in vars(one).items() if k not in free} == {
            k: v for k, v in vars(other).items() if k not in free
        }
        assert _rounded(one.effects[0]) == other.effects[0] if one.effects else not other.effects
        assert one.first_token == pytest.approx(other.first_token, abs=1e-3)


def test_pictures_stay_together_between_processes_and_batches():
    items = [Item(str(i), f"picture{i % 3}", "?") for i in range(9)]
    whole = share_of(items, Workers())
    assert [item.image[-1] for item in whole] == list("000111222") and {i.id for i in whole} == {i.id for i in items}
    parts = [[item.image[-1] for item in share_of(items, Workers(rank, 2))] for rank in range(2)]
    assert parts == [list("000222"), list("111")]
    assert end_of_batch(whole, 0, 4) == 3 and end_of_batch(whole, 0, 6) == 6 and end_of_batch(whole, 3, 100) == 9
    assert end_of_batch(whole, 0, 2) == 2, "a picture with more questions than a batch holds"


def test_a_model_that_cannot_share_is_found_out(tmp_path, monkeypatch):
    """Its first shared batch is asked plainly, too; answers are the plain ones, in the order of the questions."""
    model, processor = vlmfix.load("organism")
    data, pope, wrong = Data.load(limit=6), benchmark("pope"), []
    good = answer_all(model, processor, (), pope, data, tmp_path / "good")

    def broken(self, *args, **kwargs):
        wrong.append(1)
        return [[7] for _ in Batch.generate(self, {**self.prefix_inputs}, **kwargs) for _ in range(9)][
            : len(self.prefix_row)
        ]

    monkeypatch.setattr(ContinuedBatch, "generate", broken)
    with pytest.warns(UserWarning, match="cannot share the pass"):
        run = answer_all(model, processor, (), pope, data, tmp_path / "bad", batch_size=16)
    assert len(wrong) == 1 and [r["text"] for r in run.records] == [r["text"] for r in good.records]
    assert [r["id"] for r in run.records] == [item.id for item in pope.items(data)] == [r["id"] for r in good.records]


# Several methods


@dataclass(frozen=True)
class EveryRow(Intervention):
    """Edits head outputs of all rows, whatever `rows` says."""

    traits = Traits(shares_pictures=True)

    def heads(self, o, site):
        """Half of it."""
        return o / 2


def test_which_methods_leave_the_pass_over_a_picture():
    specs = "var var:select=random var:rows=text pai pai:gamma=1.1 zerotuning headgain:head_list=L1H2,gain=2 vcd carve pyramiddrop"
    leave = [spec for spec in specs.split() if all(one.leaves_pictures for one in parse(spec))]
    assert leave == ["var", "var:select=random", "pai"] and not EveryRow().leaves_pictures


TURNS = [
    None,
    VAR(dims=(7,), tau=3.0, rho=0.0, min_visual_mass=0.0, skip_first=1),
    PAI(alpha=2.0, skip_first=1),
    VAR(dims=(7, 9), tau=2.0, rho=0.0, min_visual_mass=0.0, skip_first=0, p=0.3),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_methods_go_on_from_one_pass_that_is_the_untouched_models(architecture):
    model = plant_sinks(ARCHITECTURES[architecture]())
    pictures = [picture_prompt(model, 1, seed=g, lengths=[2 + g]) for g in range(2)]
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [58, 59, 60, 61]}
    methods = [one and Attachment(model, (one,)) for one in TURNS]
    before, asked = [], []
    for p in pictures:
        cut = int((p["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
        before.append({name: x[:, :cut] if x.shape == p["input_ids"].shape else x for name, x in p.items()})
    for g, more in SUFFIXES:
        asked.append((g, pictures[g]["input_ids"][0, before[g]["input_ids"].shape[1] :].tolist() + more))
    prefix = padded(before)
    given, picture = going_on(prefix, asked)
    run = ContinuedBatch(model, None, [], given, settings, prefix_inputs=prefix, prefix_row=picture)
    with in_force(model, Attachment.joint(methods[1:])):
        seen = run.make_prefix()
    untouched = run.make_prefix().cache
    for mine, plain in zip(seen.cache.layers, untouched.layers, strict=True):
        assert torch.equal(mine.keys, plain.keys) and torch.equal(mine.values, plain.values)
    firsts = []
    for method in [*methods, *methods[::-1]]:  # in any order, and nothing is used up
        with in_force(model, method):
            logits = []
            note = lambda _, scores: (logits.append(scores.clone()), scores)[1]  # noqa: B023, E731
            tokens = replace(run, settings={**settings, "logits_processor": [note]}, prefix=seen).generate()
            firsts.append(logits[0])
            told = effects(model)
            for b, (g, more) in enumerate(SUFFIXES):
                assert tokens[b] == model.generate(**joined(pictures[g], more), **settings)[0, -4:].tolist()
                for mine, shared in zip(effects(model), told, strict=True):
                    assert shared["samples"][b] == _rounded(mine["samples"][0])
    assert all(not torch.allclose(a, b, atol=1e-2) for i, a in enumerate(firsts[:4]) for b in firsts[:i]), "they bite"


TOGETHER = {
    "organism": "none var:rho=0 zerotuning:gamma=8 pai:alpha=0.5 none var:p=0.9,rho=0.3",
    "organism-qwen": "none var var:dims=22,tau=3,rho=0 pai:alpha=0.5",
}
FREE = ("seconds", "tokens", "effects", "first_token", "batch_size")


def in_turns(loaded, specs, out, **how):
    pictures, methods = Data.load(limit=8), [parse(spec) for spec in specs]
    return answer_each(*loaded, methods, benchmark("pope"), pictures, out, batch_size=20, **how)


@pytest.mark.filterwarnings("ignore:var will not act")
@pytest.mark.parametrize("name", TOGETHER)
def test_methods_asked_together_answer_as_alone(tmp_path, monkeypatch, name):
    """With one pass over a batch's pictures; what a half finished method has said is not asked again."""
    loaded, specs = vlmfix.load(name), TOGETHER[name].split()
    alone = [in_turns(loaded, [spec], tmp_path / "alone")[0] for spec in specs]
    path = in_turns(loaded, ["pai:alpha=0.5"], tmp_path / "together")[0].folder / "records.jsonl"
    kept = path.read_text().splitlines(keepends=True)[5:17]
    path.write_text("".join(kept))
    asked, told, answer = [], [], Asker._answer

    def note(self, questions, *settings):
        asked.append((settings[-1], len(questions)))
        return answer(self, questions, *settings)

    monkeypatch.setattr(Asker, "_answer", note)
    runs = in_turns(loaded, specs, tmp_path / "together", progress=lambda *said: told.append(said))
    for one, other in zip(runs, alone, strict=True):
        assert one.folder.name == other.folder.name
        assert {**one.header, "environment": 0} == {**other.header, "environment": 0}
        for mine, theirs in zip(one.records, other.records, strict=True):
            for key in set(theirs) - set(FREE):
                assert mine[key] == (pytest.approx(theirs[key], abs=0.5) if key == "passes" else theirs[key]), key
            assert mine["effects"] == _rounded(theirs["effects"])
            assert mine["first_token"] == pytest.approx(theirs["first_token"], abs=1e-3)
        done = [said[1] for said in told if said[0] == f"pope {one.header['label']}"]
        assert done == sorted(done) and done[-1] == len(one.records)
    assert all(run.records[0]["effects"][0]["acted"] for run, spec in zip(runs, specs, strict=True) if ":" in spec)
    assert set(kept) < set(path.read_text().splitlines(keepends=True))
    shared = [(prefixed.prefix, k) for prefixed, k in asked if prefixed is not None]
    n, n_methods = len(runs[0].records), len({spec for spec in specs if "zerotuning" not in spec})
    assert sum(k for _, k in shared) == n * n_methods - len(kept)
    assert len(shared) > 2 * len({id(seen) for seen, _ in shared})


def test_methods_that_cannot_go_together_are_found_out(tmp_path, monkeypatch):
    """An answer from a shared pass differs: all are asked plainly."""
    loaded, specs = vlmfix.load("organism"), ["none", "pai"]
    good = [in_turns(loaded, [spec], tmp_path / "good")[0] for spec in specs]
    answer, wrong = Asker._answer, []

    def broken(self, questions, settings, seed, first_token, share, prefixed):
        records = answer(self, questions, settings, seed, first_token, share, prefixed)
        if prefixed is not None and records[0].method:
            wrong.append(1)
            records[-1] = replace(records[-1], text="?", token_ids=[7])
        return records

    monkeypatch.setattr(Asker, "_answer", broken)
    with pytest.warns(UserWarning, match="cannot share the pass"):
        runs = in_turns(loaded, specs, tmp_path / "bad")
    assert wrong == [1]
    assert [[r["text"] for r in run.records] for run in runs] == [[r["text"] for r in run.records] for run in good]


def test_the_pass_that_methods_share_ends_with_the_picture(monkeypatch, tmp_path):
    """Some edit rows of the common words after it; a method alone shares these words, too."""
    loaded, ends, look = vlmfix.load("organism"), [], ContinuedBatch.make_prefix

    def noted(self):
        ends.append(set(self.prefix_inputs["input_ids"][:, -1].tolist()) == {loaded[0].config.image_token_id})
        return look(self)

    monkeypatch.setattr(ContinuedBatch, "make_prefix", noted)
    together = in_turns(loaded, ["none", "var:rho=0"], tmp_path / "together")
    n = len(ends)
    alone = in_turns(loaded, ["none"], tmp_path / "alone")
    assert ends == [True] * n + [False] * n and n > 1
    passes = [sum(r["passes"] for r in run.records) for run in (*together, *alone)]
    assert passes[:2] == pytest.approx([passes[2]] * 2), "each bears that pass in full"


def test_a_wrapped_model_is_asked_without_and_stays_wrapped(monkeypatch, tmp_path):
    loaded, attach, n = vlmfix.load("organism"), Attachment.attach, []
    specs = ["zerotuning:gamma=8", "none"]
    bare = [in_turns(loaded, [spec], tmp_path / "bare")[0] for spec in specs]
    with wrapped(loaded[0], "pai:alpha=9"):
        before = attached(loaded[0])
        monkeypatch.setattr(Attachment, "attach", lambda self: n.append(self.requested[0].name) or attach(self))
        runs = in_turns(loaded, specs, tmp_path / "wrapped")
        assert attached(loaded[0]) is before
    assert n == ["zerotuning", "pai"], "on for all its questions"
    for one, other in zip(runs, bare, strict=True):
        assert [r["first_token"] for r in one.records] == [r["first_token"] for r in other.records]
    assert runs[0].records[0]["first_token"] != runs[1].records[0]["first_token"]
    assert attached(loaded[0]) is None


def test_a_batch_too_large_for_one_of_the_methods_is_halved_for_all(tmp_path, monkeypatch):
    loaded, specs, answer, sizes = vlmfix.load("organism"), ["none", "pai"], Asker._answer, []
    good = [in_turns(loaded, [spec], tmp_path / "good")[0] for spec in specs]

    def small_memory(self, questions, *settings):
        if self.methods and len(questions) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        sizes.append(len(questions))
        return answer(self, questions, *settings)

    monkeypatch.setattr(Asker, "_answer", small_memory)
    with pytest.warns(UserWarning, match="going on with"):
        runs = in_turns(loaded, specs, tmp_path / "small")
    assert sizes[0] > 8 >= max(sizes[1:])
    for one, other in zip(runs, good, strict=True):
        lines = (one.folder / "records.jsonl").read_text().splitlines()
        assert len(lines) == len(other.records) and [r["text"] for r in one.records] == [
            r["text"] for r in other.records
        ]
