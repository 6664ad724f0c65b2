"""Questions about one picture that share the pass over it: the same answers as asked one by one."""

import warnings
from dataclasses import replace

import pytest
import torch

import vlmfix
from tests.models import ARCHITECTURES, picture_prompt, plant_sinks
from vlmfix.asking import Answering, ask_batch, spellings
from vlmfix.attachment import report, wrapped
from vlmfix.eval.benchmarks import Item, benchmark
from vlmfix.eval.data import Data
from vlmfix.eval.runner import Workers, _end_of_batch, _share, answer_all
from vlmfix.hooks import PAI, REGISTRY, VAR, VHR, ZeroTuning
from vlmfix.intervention import method_class, parse
from vlmfix.sharing import Sharing, can_share

METHODS = {
    "none": [],
    "var": [VAR(dims=(7,), tau=3.0, rho=0.0, min_visual_mass=0.0, skip_first=1)],
    "pai": [PAI(alpha=2.0, skip_first=1)],
    "zerotuning": [ZeroTuning(gamma=8.0)],
    "heads": [VHR(head_list="L1H2/L2H0")],
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
            said.append([one["samples"][0] for one in report(model)])
        prefix = padded(pictures)
        n, rest = prefix["input_ids"].shape[1], max(len(more) for _, more in SUFFIXES)
        ids, mask = torch.zeros(2, len(SUFFIXES), n + rest, dtype=torch.long)
        for b, (g, more) in enumerate(SUFFIXES):
            ids[b, :n], mask[b, :n] = prefix["input_ids"][g], prefix["attention_mask"][g]
            ids[b, n + rest - len(more) :], mask[b, n + rest - len(more) :] = torch.tensor(more), 1
        picture = torch.tensor([g for g, _ in SUFFIXES])
        logits = []
        run = Sharing(
            model,
            None,
            [],
            {"input_ids": ids, "attention_mask": mask},
            {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [58, 59, 60, 61]},
            prefix=prefix,
            picture=picture,
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
            for mine, shared in zip(facts, report(model), strict=True):
                assert _rounded(shared["samples"][b]) == _rounded(mine)
        plain = torch.stack([x for x in alone])
    if method != "none":
        with torch.no_grad():
            untouched = model.generate(**joined(pictures[0], SUFFIXES[0][1]), **settings).logits[0]
        assert not torch.allclose(untouched, plain[0, :1], atol=1e-2), "the method bites"


def _rounded(found):
    if isinstance(found, dict):
        return {k: _rounded(v) for k, v in found.items()}
    return pytest.approx(found, rel=1e-3, abs=1e-4) if isinstance(found, float) else found


def test_methods_that_look_at_the_whole_prompt_do_not_share():
    model, processor = vlmfix.load("tiny")
    greedy = {"do_sample": False, "max_new_tokens": 4}
    assert can_share(model, greedy) and not can_share(model, {**greedy, "do_sample": True})
    assert not can_share(model, {**greedy, "num_beams": 2}) and not can_share(model, {**greedy, "use_cache": False})
    sharing = {"pai", "var", "zerotuning"}
    for name in REGISTRY:
        one = method_class(name)
        assert not (one.shares_pictures is True and (one.whole_prompt is True or one.overrides("begin"))), name
        if name != "var":  # which is idle on this model
            with wrapped(model, name, processor):
                assert can_share(model, greedy) == (name in sharing), name
    for spec, shares in (("vhr", False), ("vhr:head_list=L1H2", True), ("pai:gamma=1.1", False), ("pai+vhr", False)):
        with wrapped(model, spec, processor):
            assert can_share(model, greedy) == shares, spec


@pytest.mark.filterwarnings("ignore:var will not act")
@pytest.mark.parametrize("method", ["none", "var", "var:dims=67/80,tau=4,rho=0", "vhr:head_list=L3H1/L4H2"])
def test_records_are_those_of_the_plain_path(method):
    model, processor = vlmfix.load("tiny-sinks")
    items = sorted(benchmark("pope").items(Data.load(limit=3)), key=lambda item: (item.prompt, item.image))
    asked = [(item.image, item.prompt) for item in items]
    words = {word: spellings(processor, word) for word in ("yes", "no")}
    with wrapped(model, parse(method), processor):
        shared, plain = (
            ask_batch(model, processor, asked, max_new_tokens=8, first_token=words, share=share)
            for share in (True, False)
        )
    assert len(asked) > len({item.image for item in items}) > 1
    assert sum(r.tokens for r in shared) < sum(r.tokens for r in plain) / 2
    free = ("seconds", "passes", "tokens", "did", "first_token")
    for one, other in zip(shared, plain, strict=True):
        assert {k: v for k, v in vars(one).items() if k not in free} == {
            k: v for k, v in vars(other).items() if k not in free
        }
        assert _rounded(one.did[0]) == other.did[0] if one.did else not other.did
        assert one.first_token == pytest.approx(other.first_token, abs=1e-3)


def test_pictures_stay_together_between_processes_and_batches():
    items = [Item(str(i), f"picture{i % 3}", "?") for i in range(9)]
    whole = _share(items, Workers())
    assert [item.image[-1] for item in whole] == list("000111222") and {i.id for i in whole} == {i.id for i in items}
    parts = [[item.image[-1] for item in _share(items, Workers(rank, 2))] for rank in range(2)]
    assert parts == [list("000222"), list("111")]
    assert _end_of_batch(whole, 0, 4) == 3 and _end_of_batch(whole, 0, 6) == 6 and _end_of_batch(whole, 3, 100) == 9
    assert _end_of_batch(whole, 0, 2) == 2, "a picture with more questions than a batch holds"


def test_a_model_that_cannot_share_is_found_out(tmp_path, monkeypatch):
    """Its first shared batch is asked plainly, too; answers are the plain ones, in the order of the questions."""
    model, processor = vlmfix.load("tiny")
    data, pope, wrong = Data.load(limit=3), benchmark("pope"), []
    good = answer_all(model, processor, (), pope, data, tmp_path / "good")

    def broken(self, *args, **kwargs):
        wrong.append(1)
        return [[7] for _ in Answering.generate(self, {**self.prefix}, **kwargs) for _ in range(9)][: len(self.picture)]

    monkeypatch.setattr(Sharing, "generate", broken)
    with pytest.warns(UserWarning, match="cannot share the pass"):
        run = answer_all(model, processor, (), pope, data, tmp_path / "bad", batch_size=16)
    assert len(wrong) == 1 and [r["text"] for r in run.records] == [r["text"] for r in good.records]
    assert [r["id"] for r in run.records] == [item.id for item in pope.items(data)] == [r["id"] for r in good.records]
