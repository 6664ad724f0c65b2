"""The lookback monitor against its formula, eager attention and itself; detectors and their calibration."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vlmfix
from tests.models import llava, picture_prompt
from vlmfix.cli import app
from vlmfix.engine.attachment import attached
from vlmfix.engine.wrap import wrapped
from vlmfix.eval.tune import lookback as calibration
from vlmfix.eval.tune.tool import Subject
from vlmfix.hooks import VHR, Lookback
from vlmfix.hooks.lookback import PRESETS, Detector
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry

SCENES = Path(__file__).parents[2] / "assets" / "organism" / "test" / "images"
PICTURES = [str(SCENES / f"test_{n:04d}.webp") for n in (1, 58, 77)]
DESCRIBE = "Please describe this image in detail."


@pytest.fixture(scope="module")
def detector(organism, tmp_path_factory):
    """A detector with arbitrary weights."""
    path, g = tmp_path_factory.mktemp("detector") / "lookback.json", torch.Generator().manual_seed(0)
    w = tuple(torch.randn(64, generator=g).tolist())
    Detector("organism", "lookback", "mean", False, 8, 8, w, 0.1, 0.4, 3, ("a",), {}).write(path)
    return str(path)


def one_row(monitor, a, image, prompt=None):
    """R (B, H) of a last prompt row, or with fewer prompt keys of the row of the last generated token."""
    image = torch.tensor([image])
    prompt = torch.ones_like(image) if prompt is None else torch.tensor([prompt])
    n, memo = image.shape[1], {}
    monitor.weights(
        a, Site(0, 1, Geometry(image, prompt, torch.ones_like(image)), torch.tensor([[True]]), n - 1, 0, memo)
    )
    return monitor.ratios(memo)[:, 0, 0]


def test_worked_example():
    a = torch.tensor([0.5, 0.2, 0.2, 0.1]).view(1, 1, 1, 4)
    image = [False, True, True, False]
    assert one_row(Lookback(agg="sum"), a, image).item() == pytest.approx(0.8)
    assert one_row(Lookback(), a, image).item() == pytest.approx(2 / 3)
    assert one_row(Lookback(preset="focus"), a, image).item() == pytest.approx(0.8)
    assert one_row(Lookback(preset="tracker"), a, image).item() == pytest.approx(0.2)
    text = one_row(Lookback(preset="lookback_text", E=1), a, image).item()
    assert text == pytest.approx(0.3 / 0.4)
    said = [True, True, False, False]  # two prompt keys, then two of the answer
    prelim = one_row(Lookback(preset="prelim"), a, [False] * 4, said).item()
    assert prelim == pytest.approx(0.3)
    assert one_row(Lookback(preset="prelim"), a, [False] * 4).isnan().all(), "nothing written yet"


def test_properties():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(1, 3, 1, 9, generator=g).softmax(-1)
    image = [False, False, True, True, True, False, False, False, False]

    @dataclass(frozen=True)
    class Swapped(Lookback):
        def _keys(self, g):
            return super()._keys(g)[::-1]

    for agg in ("mean", "sum"):
        r = one_row(Lookback(agg=agg), a, image)
        assert ((r > 0) & (r < 1)).all()
        torch.testing.assert_close(one_row(Swapped(agg=agg), a, image), 1 - r)
    uniform = torch.full_like(a, 1 / 9)
    assert torch.allclose(one_row(Lookback(), uniform, image), torch.tensor(0.5))
    assert torch.allclose(one_row(Lookback(agg="sum"), uniform, image), torch.tensor(3 / 7))
    mass = one_row(Lookback(preset="lookback_text", agg="sum", E=4), a, image)
    torch.testing.assert_close(mass, a[:, :, 0, :5].sum(-1), msg="A and B cover all keys: R is the mass of A")


def by_hand(preset, a, image, n_prompt, e):
    """R of one row: a (H, K) of the keys that it sees."""
    k = a.shape[1]
    at = torch.arange(k)
    image = torch.nn.functional.pad(image, (0, k - len(image)))
    said, after = at >= n_prompt, (at > image.nonzero().max()) & (at < n_prompt)
    looked, rest = {
        "lookback": (image, after | said),
        "focus": (image, after | said),
        "lookback_text": (at < n_prompt - e, at >= n_prompt - e),
        "tracker": (after, image),
        "prelim": (said, ~said),
    }[preset]
    agg, eps = PRESETS[preset]
    put = lambda s: a[:, s].mean(1) if agg == "mean" else a[:, s].sum(1)  # noqa: E731
    return put(looked) / (put(looked) + put(rest) + eps) if looked.any() else torch.full((len(a),), torch.nan)


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_equal_eager_attention(preset):
    model = llava("eager")
    prompt = picture_prompt(model, lengths=[6])
    n, image = prompt["input_ids"].shape[1], (prompt["input_ids"] == 60)[0]
    monitor = Lookback(preset=preset, E=3)
    with monitor(model):
        out = model.generate(
            **prompt, max_new_tokens=5, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
        r = monitor.ratios(attached(model).last().memos[0])
    assert r.shape == (1, 5, 4, 6)
    for t, layers in enumerate(out.attentions):
        for layer, a in enumerate(layers):
            want = by_hand(preset, a[0, :, -1], image, n, 3)
            torch.testing.assert_close(r[0, t, layer], want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_two_heads_of_a_list():
    model = llava()
    prompt = picture_prompt(model)
    with Lookback(head_list="L1H2/L3H0")(model):
        model.generate(**prompt, max_new_tokens=3, do_sample=False)
        found = attached(model)
        monitor, memo = found.entries[0].active, found.last().memos[0]
        (said,) = vlmfix.effects(model)[0]["samples"]
    r = monitor.ratios(memo)[0]
    assert said["score"] == pytest.approx(float((r[:, 1, 2] + r[:, 3, 0]).mean() / 2), abs=1e-6)
    with pytest.raises(ValueError, match=r"expected layers in 0\.\.3"):
        vlmfix.wrap(model, Lookback(head_list="L9H0"))


def test_cache_and_tokens_are_the_same_to_the_bit_and_no_image_is_told():
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    want = model.generate(**prompt, **settings)
    with Lookback()(model):
        got = model.generate(**prompt, **settings)
        assert torch.equal(got.sequences, want.sequences)
        for mine, theirs in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
        with pytest.warns(UserWarning, match="lookback did nothing .* held no image tokens"):
            model.generate(input_ids=torch.tensor([[1, 4, 5, 9]]), **settings)


def test_chunked_prefill_and_a_second_turn_leave_the_last_answer():
    model = llava()
    prompt = picture_prompt(model, lengths=[6])
    monitor = Lookback()
    settings = {"max_new_tokens": 4, "do_sample": False}
    with monitor(model):
        read = lambda: monitor.ratios(attached(model).last().memos[0])  # noqa: E731
        first = model.generate(**prompt, **settings, return_dict_in_generate=True)
        whole = read()
        turn = torch.cat([first.sequences, torch.tensor([[5, 8, 13]])], dim=1)
        model.generate(input_ids=turn, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False)
        assert read().shape[1] == 3
        del prompt["attention_mask"]
        embeds, mask = model.get_input_embeddings()(prompt["input_ids"]).detach(), prompt["input_ids"] == 60
        with torch.no_grad():
            scope = model(inputs_embeds=embeds[:, :9], image_mask=mask, use_cache=True)
            model(inputs_embeds=embeds[:, 9:], image_mask=mask, past_key_values=scope.past_key_values)
        assert read().shape[1] == 1 and whole.shape[1] == 4


def same(a, b):
    assert [x is None for x in a] == [x is None for x in b]
    np.testing.assert_allclose([x for x in a if x is not None], [x for x in b if x is not None], atol=1e-5)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.2, "seed": 3}])
def test_scores_of_an_answer(organism, sampling):
    """Per token and word, the same in a batch, alone, and without a cache."""
    model, processor = organism
    questions = [(PICTURES[0], DESCRIBE), (PICTURES[1], "Is there a person in the image?"), (PICTURES[2], DESCRIBE)]
    plain = vlmfix.ask_batch(model, processor, questions, max_new_tokens=20, **sampling)
    with Lookback()(model):
        batch = vlmfix.ask_batch(model, processor, questions, max_new_tokens=20, **sampling)
        again = vlmfix.ask_batch(model, processor, questions, max_new_tokens=20, use_cache=False, **sampling)
        single = vlmfix.ask(model, processor, *questions[1], max_new_tokens=20)
    assert [r.token_ids for r in batch] == [r.token_ids for r in plain] == [r.token_ids for r in again]
    for r, other in zip(batch, again, strict=True):
        (did,) = r.effects
        assert json.loads(r.to_json())["effects"] == r.effects
        assert did["acted"] and did["preset"] == "lookback" and len(did["per_token"]) == len(r.token_ids)
        assert did["score"] == pytest.approx(np.mean(did["per_token"]), abs=1e-5)
        same(did["per_token"], other.effects[0]["per_token"])
        assert [w["word"] for w in did["per_word"]] == r.text.split()
        for word in did["per_word"]:
            said = processor.decode([r.token_ids[step] for step in word["steps"]]).strip()
            assert said == word["word"]
            assert word["score"] == pytest.approx(np.mean([did["per_token"][s] for s in word["steps"]]), abs=1e-5)
    if not sampling:
        same(single.effects[0]["per_token"], batch[1].effects[0]["per_token"])


def test_place_in_the_list_and_going_on_from_accepted_text(organism):
    model, processor = organism
    scores = {}
    for name, methods in {"alone": [Lookback()], "first": [Lookback(), VHR()], "last": [VHR(), Lookback()]}.items():
        with wrapped(model, methods):
            record = vlmfix.ask(model, processor, PICTURES[1], DESCRIBE, max_new_tokens=12)
            scores[name] = record.effects[[e.name == "lookback" for e in methods].index(True)]["per_token"]
            if name == "alone":
                run = vlmfix.asking.batch.Batch.of(
                    model,
                    processor,
                    [([vlmfix.asking.pictures.open_picture(PICTURES[1])], DESCRIBE)],
                    {"max_new_tokens": 5},
                )
                end = run.inputs["input_ids"].shape[1]
                (more,) = run.generate(run.after(record.token_ids[:7]), prompt_end=end)
                assert more == record.token_ids[7:]
                found = attached(model)
                same(
                    found.entries[0]
                    .active.score(found.entries[0].active.ratios(found.last().memos[0])[0, :, None])
                    .tolist(),
                    scores[name],
                )
    assert scores["first"] == scores["last"] and scores["first"] != scores["alone"]


def test_sinks_are_no_image(organism):
    model, processor = organism
    with Lookback(exclude_sinks=True)(model):
        got = vlmfix.ask(model, processor, PICTURES[1], DESCRIBE, max_new_tokens=4)
        memo = attached(model).last().memos[0]
        sinks = {layer: int(s.sum()) for layer, s in memo["sinks"].items()}
    with Lookback()(model):
        plain = vlmfix.ask(model, processor, PICTURES[1], DESCRIBE, max_new_tokens=4)
    assert got.token_ids == plain.token_ids and max(sinks.values()) > 3
    assert all(a < b for a, b in zip(got.effects[0]["per_token"], plain.effects[0]["per_token"], strict=True))
    model, processor = vlmfix.load("organism-qwen")
    vlmfix.wrap(model, Lookback(exclude_sinks=True), processor)
    facts = vlmfix.effects(model)[0]["facts"]
    idle = vlmfix.ask(model, processor, PICTURES[1], DESCRIBE, max_new_tokens=4)
    assert "no sink" in facts["sinks"] or "loudest" in facts["sinks"]
    assert idle.effects[0]["acted"]


def test_weights_that_are_no_numbers_are_told():
    monitor, memo = Lookback(), {}
    image = torch.tensor([[True, False]])
    site = Site(3, 4, Geometry(image, image | True, image | True), torch.tensor([[True]]), 1, 0, memo)
    monitor.weights(torch.full((1, 2, 1, 2), torch.nan), site)
    with pytest.raises(ValueError, match="attention weights of layer 3 are no numbers at step 0"):
        monitor.effects(memo)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"preset": "lookbak"}, "preset: expected lookback, .* got 'lookbak'; did you mean 'lookback'"),
        ({"agg": "max"}, "agg: expected mean or sum"),
        ({"E": 0}, "E: expected 1 or more"),
        ({"detector": "x.json", "head_list": "L0H0"}, "leave out head_list"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Lookback(**settings)


def test_detector_scores_and_belongs_to_its_model(organism, detector, tmp_path):
    model, processor = organism
    own = Detector.read(detector)
    with Lookback()(model):
        vlmfix.ask(model, processor, PICTURES[0], DESCRIBE, max_new_tokens=6)
        r = Lookback().ratios(attached(model).last().memos[0])[0]
    with Lookback(detector=detector)(model):
        got = vlmfix.ask(model, processor, PICTURES[0], DESCRIBE, max_new_tokens=6).effects[0]
    by_layer_then_head = r.flatten(1) @ torch.tensor(own.w) + own.b
    same(got["per_token"], by_layer_then_head.sigmoid().tolist())
    for change, sentence in (
        ({"model": "other"}, "was fitted on model other; here: model organism"),
        ({"heads": 3}, "was fitted on heads 3; here: heads 8"),
        ({"preset": "focus", "agg": "sum"}, "was fitted on preset focus, agg sum; here"),
        ({"w": (1.0,)}, "has 1 weights, expected 64"),
    ):
        replace(own, **change).write(tmp_path / "other.json")
        with pytest.raises(ValueError, match=sentence):
            vlmfix.wrap(model, Lookback(detector=str(tmp_path / "other.json")))
    (tmp_path / "no.json").write_text('{"w": 3}')
    with pytest.raises(ValueError, match="is no detector: expected a JSON object with model, preset"):
        Detector.read(tmp_path / "no.json")
    with pytest.raises(ValueError, match="cannot be read"):
        Detector.read(tmp_path / "none.json")


def synthetic(rng, n, shift, shuffle=False):
    grounded = rng.random(n) < 0.7
    v = rng.normal(0.5, 0.05, (n, 8)) + shift * grounded[:, None]
    if shuffle:
        rng.shuffle(grounded)
    return calibration.Words(rng.integers(0, 60, n), grounded, v, v.mean(1), rng.integers(0, 40, n))


def test_auroc_of_what_can_and_cannot_be_told_apart(monkeypatch, organism):
    """The whole calibration on words made up: separable, and with shuffled labels."""
    from vlmfix.eval.pictures.data import Data

    scenes, others = Data.load("organism", 60), Data.load("calibration", 60)
    for shift, shuffle, low, high in ((0.5, False, 0.999, 1.0), (0.5, True, 0.4, 0.6)):
        rng = np.random.default_rng(0)
        monkeypatch.setattr(
            calibration, "read_words", lambda *_, made=(rng, 800, shift, shuffle), **__: synthetic(*made)
        )
        found = calibration.calibrate_lookback(*organism, Lookback(), others, scenes)
        assert low <= found.auroc["detector"]["value"] <= high
        assert 0.4 < found.auroc["position"]["value"] < 0.6
        assert found.n_images == len(found.ids) == 60 and found.auroc["words"] == 800
    two = {"a": np.array([0.1, 0.4, 0.35, 0.8]), "b": np.zeros(4)}
    words = calibration.Words(
        np.arange(4), np.array([False, False, True, True]), np.zeros((4, 1)), np.zeros(4), np.zeros(4)
    )
    figures = calibration.aurocs(two, words, 20)
    assert (figures["a"].value, figures["b"].value, figures["a - b"].value) == (0.75, 0.5, 0.25)
    metrics, rng = pytest.importorskip("sklearn.metrics"), np.random.default_rng(1)
    score, grounded, weights = rng.integers(0, 9, 60) / 9, rng.random(60) < 0.6, rng.integers(0, 4, (5, 60))
    want = [metrics.roc_auc_score(grounded, score, sample_weight=w) for w in weights]
    assert calibration.auroc(score, grounded, weights) == pytest.approx(want)


def test_calibration_splits_by_picture(organism, tmp_path):
    """One set of pictures for both: words of one picture never stand on both sides."""
    from vlmfix.eval.pictures.data import Data

    data = Data.load("calibration", 18)
    read, seen = calibration.read_words(Subject(*organism, data), Lookback(), max_new_tokens=80), []
    assert read.v.shape[1] == 64 and not read.grounded.all() and read.grounded.mean() > 0.5
    assert read.plain == pytest.approx(read.v.mean(1), abs=1e-5)

    def spy(*args, **kwargs):
        seen.append(args)
        return read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "read_words", spy)
        found = calibration.calibrate_lookback(*organism, Lookback(), data, data)
    assert len(seen) == 1 and found.n_images == 12
    assert (
        found.auroc["words"]
        == (~np.isin(read.image, list(data.images)[:18])).sum()
        + np.isin(read.image, [key for i, key in enumerate(data.images) if i % 3 == 2]).sum()
    )
    with pytest.raises(ValueError, match="no tracker"):
        calibration.calibrate_lookback(*organism, Lookback(preset="tracker"), data, data)
    assert json.loads(json.dumps(asdict(found)))["model"] == "organism"


def test_command_line(tmp_path):
    path = tmp_path / "deep" / "lookback.json"
    command = ["calibrate", "lookback", "--limit", "9", "--max-new-tokens", "80", "--output", str(path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "detector - position" in done.output and Detector.read(path).n_images == 9
    used = CliRunner().invoke(
        app,
        [
            *("eval", "--benchmark", "chair", "--data", "calibration", "--limit", "3", "--output", str(tmp_path)),
            *("--method", f"lookback:detector={path}"),
        ],
    )
    assert used.exit_code == 1 and "was made on 3 of the 3 pictures that are asked about" in used.output
    wrong = CliRunner().invoke(app, ["calibrate", "lookback", "--method", "vhr"])
    assert wrong.exit_code == 1 and "method: expected lookback with its settings, got 'vhr'" in wrong.output
