"""Re-ranking by sentences and by chunks: what is chosen, where it ends, what is recorded, what is refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import vlmfix
from tests.models import ARCHITECTURES, picture_prompt
from vlmfix.asking.batch import Batch
from vlmfix.asking.pictures import open_picture
from vlmfix.cli import app
from vlmfix.engine.attachment import attached
from vlmfix.engine.wrap import wrapped
from vlmfix.eval.pictures.data import Data
from vlmfix.hooks import Chunks, Lookback, Rerank
from vlmfix.hooks.parts.sampling import Candidate, proposals, round_seed
from vlmfix.hooks.parts.sentences import sentence_end
from vlmfix.hooks.parts.verifiers import says_yes

SCENES = Path(__file__).parents[2] / "assets" / "organism" / "test" / "images"
PICTURES = [str(SCENES / f"test_{n:04d}.webp") for n in (1, 58, 77)]
pytestmark = pytest.mark.usefixtures("unwrapped")
DESCRIBE = "Please describe this image in detail."
HERE = "tests.hooks.test_rerank"


def present(images, prompt, context, sentence, objects):
    return [(o, "present", 1.0) for o in objects]


def absent(images, prompt, context, sentence, objects):
    return [(o, "absent", 0.0) for o in objects]


def unsure(images, prompt, context, sentence, objects):
    return [(o, "unsure", 0.5) for o in objects]


def broken(images, prompt, context, sentence, objects):
    raise RuntimeError("the detector is down")


def nonsense(images, prompt, context, sentence, objects):
    return [(o, "maybe", 0.5) for o in objects]


def test_sentences():
    cases = {
        "A rope of 3.5 m lies there. It is red.": "A rope of 3.5 m lies there.",
        "Mr. Smith holds a cat. Good": "Mr. Smith holds a cat.",
        "Pets, e.g. a cat, sleep. Yes": "Pets, e.g. a cat, sleep.",
        "J. Smith sits. So": "J. Smith sits.",
        "Hi! There": "Hi!",
        'He says "no." Then': 'He says "no."',
        "Really?! Yes": "Really?!",
        "A list\n\nof things": "A list",
        "one line\nand more": None,
        "no period at all": None,
        "It is 3.": None,
        "": None,
        ". then. More": ". then.",
    }
    for text, first in cases.items():
        end = sentence_end(text)
        assert (None if end is None else text[:end]) == first, text


def say(organism, method, picture=PICTURES[1], **settings):
    model, processor = organism
    with wrapped(model, method, processor):
        return vlmfix.ask(model, processor, picture, DESCRIBE, **{"max_new_tokens": 100, **settings})


@pytest.mark.parametrize("verifier", [present, "tests.hooks.test_rerank:unsure"])
def test_greedy_first_with_a_content_verifier_is_greedy(organism, verifier):
    """Also where the text loops: its first sentences; token for token, the end token included."""
    for picture in PICTURES:
        want = say(organism, None, picture)
        got = say(organism, Rerank(n=2, greedy_first=True, verifier=verifier), picture)
        rounds, (did,) = got.effects[0]["rounds"], got.effects
        clean = next((i for i, r in enumerate(rounds) if r["candidates"][0]["repeat"]), len(rounds))
        n = sum(r["candidates"][0]["tokens"] for r in rounds[:clean])
        assert n > 8 and got.token_ids[:n] == want.token_ids[:n]
        if clean == len(rounds):
            assert got.token_ids == want.token_ids and got.finish == "stop"
            assert not did["acted"] and did["tokens_sampled"] == did["tokens_kept"] == n
    assert say(organism, Rerank(n=1, greedy_first=True, verifier=verifier), max_new_tokens=7).token_ids == (
        say(organism, None, max_new_tokens=7).token_ids
    ), "a sentence that hits the limit is one, too"


def test_what_was_said_before_is_not_said_again(organism):
    """The greedy answer to this picture repeats a sentence; every repeat is told, and none is taken."""
    (did,) = say(organism, Rerank(n=4, greedy_first=True, verifier=present)).effects
    before, repeats = set(), 0
    for r in did["rounds"]:
        for c in r["candidates"]:
            assert c["repeat"] == (c["text"] in before) == (not c["clean"])
            repeats += c["repeat"]
        assert not r["candidates"][r["chosen"]]["repeat"]
        before.add(r["candidates"][r["chosen"]]["text"])
    assert repeats and did["acted"]


def test_nothing_good_enough(organism):
    """`least` goes on, `drop` tries once more, `stop` ends; each ends."""
    least = say(organism, Rerank(n=2, verifier=absent, max_sentences=2))
    first = least.effects[0]["rounds"][0]
    assert len(least.effects[0]["rounds"]) <= 2 and first["all_bad"] and first["chosen"] is not None
    fewest = [(len(c["verdicts"]), -c["likelihood"]) for c in first["candidates"]]
    assert first["chosen"] == fewest.index(min(fewest)) and least.text.startswith(
        first["candidates"][first["chosen"]]["text"]
    )
    stop = say(organism, Rerank(n=2, verifier=absent, all_bad="stop"))
    drop = say(organism, Rerank(n=2, verifier=absent, all_bad="drop"))
    for record, n in ((stop, 1), (drop, 2)):
        assert record.text == "" and record.token_ids == [2] and record.finish == "stop"
        assert [r["chosen"] for r in record.effects[0]["rounds"]] == [None] * n
    a, b = ([c["text"] for c in r["candidates"]] for r in drop.effects[0]["rounds"])
    assert a != b, "the second try is another one"


def test_the_oracle_takes_the_fewest_inventions_and_is_no_result(organism, tmp_path):
    truth = Data.load("organism").truth
    for number in (1, 58):
        record = say(organism, Rerank(n=3, verifier="oracle"), SCENES / f"test_{number:04d}.webp")
        for r in record.effects[0]["rounds"]:
            wrong = [sum(o not in truth[number] for o, *_ in c["verdicts"]) for c in r["candidates"]]
            assert [sum(v == "absent" for _, v, _ in c["verdicts"]) for c in r["candidates"]] == wrong
            if not all(c["repeat"] for c in r["candidates"]):
                assert wrong[r["chosen"]] == min(
                    w for w, c in zip(wrong, r["candidates"], strict=True) if not c["repeat"]
                )
    done = CliRunner().invoke(
        app,
        [
            "eval",
            "--benchmark",
            "chair",
            "--limit",
            "1",
            "--method",
            "rerank:verifier=oracle",
            "--output",
            str(tmp_path),
        ],
    )
    assert done.exit_code == 1 and "rerank with these settings uses the right answers" in done.output
    with pytest.raises(ValueError, match="the oracle knows the pictures of 'calibration' only"):
        say(organism, Rerank(n=1, verifier="oracle", truth="calibration"))


def test_choice():
    def best(one, *candidates):
        found = [Candidate([1], [logp], (None, 0)) for logp, *_ in candidates]
        facts = []
        for _, verdicts, *repeat in candidates:
            told = [("x", v, 0.5) for v in verdicts]
            facts.append({"verdicts": told, "repeat": bool(repeat), "clean": not repeat and "absent" not in verdicts})
        return one._best(found, facts)

    p, a, u = "present", "absent", "unsure"
    some = [(-1.0, [a]), (-2.0, [p]), (-0.5, [p, p, u]), (-0.5, [p, p])]
    assert best(Rerank(), *some) == 1
    assert best(Rerank(choose="likely"), *some) == 2 and best(Rerank(choose="objects"), *some) == 2
    bad = [(-1.0, [a, a]), (-3.0, [a]), (-2.0, [a, p]), (-0.1, [], "repeat")]
    assert best(Rerank(), *bad) == 2
    assert best(Rerank(all_bad="stop"), *bad) is None and best(Rerank(all_bad="drop"), *bad) is None


def test_the_models_own_yes(organism):
    """The same answer as POPE's question gets, whatever is in force; one prompt per picture and object."""
    model, processor = organism
    objects = ["person", "cake", "orange", "bench", "giraffe"]
    question = lambda o: f"Is there a{'n' if o == 'orange' else ''} {o} in the image?"  # noqa: E731
    said = [vlmfix.ask(model, processor, PICTURES[1], question(o)).text for o in objects]
    vlmfix.wrap(model, ["vhr", Rerank(n=2)], processor)
    run = Batch.of(model, processor, [([open_picture(PICTURES[1])], DESCRIBE)], {})
    p = says_yes(run, objects)
    assert [x > 0.5 for x in p] == [text.startswith("Yes") for text in said] and len({x > 0.5 for x in p}) == 2
    with wrapped(model, Rerank(), processor):
        assert says_yes(run, objects) == p, "VHR has no say in it"
    first = vlmfix.ask(model, processor, PICTURES[1], DESCRIBE, max_new_tokens=30)
    kept = attached(model).kept[1]
    assert list(kept) == [tuple(first.image_sha256)] and {"keyboard"} <= set(kept[tuple(first.image_sha256)])
    again = vlmfix.ask(model, processor, PICTURES[1], DESCRIBE, max_new_tokens=30)
    assert again.effects == first.effects and again.passes < first.passes


def test_lookback_verifier(organism):
    """Verdicts are the monitor's scores at the object's first token, in the answer so far."""
    got = say(organism, Rerank(n=2, verifier="lookback", hi=0.55, lo=0.5))
    (did,), step = got.effects, 0
    assert len(did["per_token"]) == len(got.token_ids)
    for r in did["rounds"]:
        c = r["candidates"][r["chosen"]]
        for name, verdict, score in c["verdicts"]:
            assert verdict == ("present" if score >= 0.55 else "absent" if score <= 0.5 else "unsure")
            told = did["per_token"][step : step + c["tokens"]]
            assert min(abs(score - t) for t in told) < 1e-5, name
        step += c["tokens"]
    words = {w["word"].strip(".,"): w for w in did["per_word"]}
    first = did["rounds"][0]
    name, _, score = first["candidates"][first["chosen"]]["verdicts"][0]
    named = words[name] if name in words else words[f"{name}s"]
    assert score == pytest.approx(did["per_token"][named["steps"][0]], abs=1e-5)
    with pytest.raises(ValueError, match="needs a calibrated threshold"):
        vlmfix.wrap(organism[0], "rerank:verifier=lookback")
    assert Rerank(verifier="self").acts_at("weights") is False


def test_seeds(organism):
    a = [say(organism, Rerank(n=2), seed=seed, max_new_tokens=30).token_ids for seed in (1, 1, 2)]
    assert a[0] == a[1] != a[2]
    b = [say(organism, Chunks(c=5, k=2), seed=seed, max_new_tokens=20).token_ids for seed in (1, 1, 2)]
    assert b[0] == b[1] != b[2]
    state = torch.get_rng_state()
    say(organism, Rerank(n=2), max_new_tokens=10)
    assert torch.equal(torch.get_rng_state(), state), "the caller's own draws are left alone"


@pytest.mark.parametrize("method", [Rerank(n=2), Chunks(c=6, k=2)])
def test_others_in_force_are_in_force_and_report_the_answer_taken(organism, method):
    """VHR and the monitor act while candidates are sampled; what they say belongs to the text that was kept."""
    model, processor = organism
    questions = [(p, DESCRIBE) for p in PICTURES[:2]]
    with wrapped(model, [Lookback(), "vhr", method], processor):
        both = vlmfix.ask_batch(model, processor, questions, max_new_tokens=64)
    with wrapped(model, [method], processor):
        alone = vlmfix.ask_batch(model, processor, questions, max_new_tokens=64)
    assert [r.token_ids for r in both] != [r.token_ids for r in alone]
    for record in both:
        monitor, vhr, _ = record.effects
        assert vhr == {"acted": True} and len(monitor["per_token"]) == len(record.token_ids)
        picture = next(p for p, _ in questions if record.image == [p])
        run = Batch.of(model, processor, [([open_picture(picture)], DESCRIBE)], {"max_new_tokens": 1})
        with wrapped(model, [Lookback(), "vhr"], processor):
            run.generate(run.after(record.token_ids[:-1]), prompt_end=run.inputs["input_ids"].shape[1])
            want = vlmfix.hooks.Lookback().ratios(attached(model).last().memos[0])[0].mean((1, 2)).tolist()
        assert monitor["per_token"] == pytest.approx(want, abs=1e-4)


def test_chunks_take_the_best_and_the_first_of_equals(organism, monkeypatch):
    got = say(organism, Chunks(c=6, k=4), max_new_tokens=20)
    (did,) = got.effects
    sizes = [r["candidates"][r["chosen"]]["tokens"] for r in did["rounds"]]
    assert got.finish == "length" and len(got.token_ids) == 20, "the last chunk is shorter"
    assert sum(sizes) == len(got.token_ids) == did["tokens_kept"] and all(n == 6 for n in sizes[:-1])
    step = 0
    for r, n in zip(did["rounds"], sizes, strict=True):
        scores = [c["score"] for c in r["candidates"]]
        if scores[0] is None:
            assert len({c["text"] for c in r["candidates"]}) == 1 and r["chosen"] == 0
        else:
            assert r["chosen"] == scores.index(max(scores))
            told = did["per_token"][step : step + n]
            assert scores[r["chosen"]] == pytest.approx(sum(told) / n, abs=1e-5)
        step += n
    one = Chunks(c=4, k=3)
    monkeypatch.setattr(Chunks, "score", lambda self, r: torch.zeros(r.shape[:-3]))
    assert {r["chosen"] for r in say(organism, one, max_new_tokens=8).effects[0]["rounds"]} == {0}


def test_one_candidate_is_sampling(organism):
    model, processor = organism
    got = say(organism, Chunks(c=20, k=1, temperature=1.3), max_new_tokens=20, seed=5)
    run = Batch.of(model, processor, [([open_picture(PICTURES[1])], DESCRIBE)], {"max_new_tokens": 20}, seed=5)
    torch.manual_seed(round_seed(run, 0))
    (want,) = run.generate(do_sample=True, temperature=1.3, top_p=0.95, top_k=0)
    assert got.token_ids == want and got.text != say(organism, None, max_new_tokens=20).text


def test_going_on_equals_one_generation(organism):
    """Greedy, cut anywhere: accepted tokens are answer, not prompt, to every method in force."""
    model, processor = organism
    for method in (None, "vhr", "pai"):
        whole = say(organism, method, max_new_tokens=20).token_ids
        with wrapped(model, method or Lookback(), processor):
            run = Batch.of(model, processor, [([open_picture(PICTURES[1])], DESCRIBE)], {"max_new_tokens": 20})
            for n in (1, 7, 13):
                (one,) = proposals(run, whole[:n], 1, 20 - n, seed=0)
                assert whole[:n] + one.tokens == whole and max(one.logp) <= 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_going_on_in_other_models(architecture):
    model = ARCHITECTURES[architecture]()
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [58, 59, 60, 61]}
    with Lookback()(model):
        run = Batch(model, None, [], picture_prompt(model), settings)
        (whole,) = run.generate()
        monitor, found = Lookback(), attached(model)
        want = monitor.ratios(found.last().memos[0])
        (one,) = proposals(run, whole[:5], 1, 3, seed=0)
        assert whole[:5] + one.tokens == whole
        torch.testing.assert_close(monitor.ratios(found.last().memos[0]), want, rtol=1e-3, atol=1e-4)
        assert len({tuple(c.tokens) for c in proposals(run, whole[:5], 3, 3, 0, temperature=5.0)}) > 1


def test_inputs_of_other_models_are_extended():
    ids = torch.tensor([[5, 6, 60, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 60).int()}
    run = Batch(SimpleNamespace(), None, [], {**inputs, "image_grid_thw": torch.tensor([[1, 2, 2]])}, {})
    longer = run.after([8, 9])
    assert longer["input_ids"].tolist() == [[5, 6, 60, 7, 8, 9]] and longer["attention_mask"].tolist() == [[1] * 6]
    assert longer["mm_token_type_ids"].tolist() == [[0, 0, 1, 0, 0, 0]]
    assert longer["image_grid_thw"].tolist() == [[1, 2, 2]]


def test_verifiers_that_fail_fail_the_answer(organism):
    with pytest.raises(RuntimeError, match="the detector is down"):
        say(organism, Rerank(n=1, verifier=broken))
    with pytest.raises(ValueError, match=r"nonsense: expected \(object, present/absent/unsure, score\)"):
        say(organism, Rerank(n=1, verifier=nonsense))


def test_refusals(organism):
    model, processor = organism
    with wrapped(model, "rerank", processor):
        for prompt in ("Is there a dog in the image?", "Look. Answer yes or no: a dog?"):
            with pytest.raises(ValueError, match="has nothing to re-rank; use it for descriptions"):
                vlmfix.ask(model, processor, PICTURES[0], prompt)
    for method in ("rerank", "chunks"):
        with wrapped(model, method, processor), pytest.raises(ValueError, match="beam search is not supported"):
            vlmfix.ask(model, processor, PICTURES[0], DESCRIBE, num_beams=2)
    with pytest.raises(ValueError, match="chunks and rerank each decode in their own way"):
        vlmfix.wrap(model, "chunks+rerank")


@pytest.mark.parametrize(
    ("cls", "settings", "sentence"),
    [
        (Rerank, {"n": 0}, "n: expected 1 or more"),
        (Rerank, {"temperature": 0}, "temperature: expected a number above 0"),
        (Rerank, {"top_p": 1.5}, "top_p: expected"),
        (Rerank, {"verifier": "slef"}, "verifier: unknown 'slef'; did you mean 'self'"),
        (Rerank, {"verifier": "no.such:thing"}, "verifier 'no.such:thing' cannot be imported"),
        (Rerank, {"verifier": f"{HERE}:PICTURES"}, "is no function"),
        (Rerank, {"hi": 0.4, "lo": 0.6}, "expected 0 <= lo <= hi <= 1"),
        (Rerank, {"all_bad": "panic"}, "all_bad: expected least, drop or stop"),
        (Rerank, {"choose": "best"}, "choose: expected first, likely or objects"),
        (Rerank, {"extract": "open"}, "extract: expected coco"),
        (Chunks, {"c": 0}, "c: expected 1 or more"),
        (Chunks, {"k": 0}, "k: expected 1 or more"),
        (Chunks, {"temperature": -1.0}, "temperature: expected a number above 0"),
    ],
)
def test_bad_settings(cls, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        cls(**settings)


def test_a_function_is_named(organism):
    one = Rerank(verifier=present)
    assert one.verifier == f"{HERE}:present" and one == replace(one)
    with pytest.raises(ValueError, match="cannot be imported"):
        Rerank(verifier=lambda *_: [])
