"""Tools that rank heads: planted heads are found, switching off is what it says, nothing stays behind."""

import copy
import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

import vlmfix
from tests.models import ARCHITECTURES, llava, picture_prompt
from vlmfix.asking.asker import Asker
from vlmfix.asking.words import spellings
from vlmfix.engine import attention
from vlmfix.engine.wrap import wrapped
from vlmfix.eval.benchmarks.chair import Chair
from vlmfix.eval.benchmarks.pope import Pope
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.report.headmap import head_map
from vlmfix.eval.scorers import chair, naming
from vlmfix.eval.tune import separate
from vlmfix.eval.tune.ablate import Ablate
from vlmfix.eval.tune.log_probs import kl, log_probs_at
from vlmfix.eval.tune.measurement import Measurement
from vlmfix.eval.tune.object_words import Words
from vlmfix.eval.tune.random import Random
from vlmfix.eval.tune.registry import TOOLS as REGISTRY
from vlmfix.eval.tune.registry import find_tool
from vlmfix.eval.tune.separate import Separate
from vlmfix.eval.tune.subspace import Subspace, subspace_angle
from vlmfix.eval.tune.switch_off import SwitchOff, each_head_off, tiled
from vlmfix.eval.tune.tool import Subject, rank
from vlmfix.eval.tune.vhd import VHD
from vlmfix.eval.tune.visual import Visual, retrieval
from vlmfix.hooks.parts.views import View
from vlmfix.method.heads import HeadList
from vlmfix.method.intervention import Intervention
from vlmfix.model.anatomy import anatomy

DATA = Data.load("calibration", 8)
SMALL = Data.load("calibration", 7)
"""The fewest pictures of which POPE's questions can be made."""
TOOLS = [
    VHD(),
    VHD(relative=True),
    Ablate(),
    Ablate("margin"),
    Ablate("token"),
    Subspace(),
    Visual(),
    Visual("top1"),
    Separate(),
]


@pytest.fixture(autouse=True)
def few_questions(monkeypatch, request):
    """Four of POPE's questions are enough; angles between subspaces take nine."""
    how = request.node.callspec.params.get("how") if hasattr(request.node, "callspec") else None
    n, every = 9 if isinstance(how, Subspace) else 4, Pope.items
    monkeypatch.setattr(Pope, "items", lambda self, data: every(self, data)[:n])


@pytest.fixture(scope="module")
def captions(organism):
    """What the embedded model says of the pictures."""
    return Subject(*organism, DATA).captions(64)


@pytest.fixture
def captions_at_hand(monkeypatch, captions):
    """Tools get them without asking the model."""
    monkeypatch.setattr(Subject, "captions", lambda subject, _: captions[: len(subject.data.images)])


def columns(model, layer, head):
    """The columns of the output projection that carry one head."""
    parts = anatomy(model)
    d = parts.layers[0].head_dim
    return parts.layers[layer].out_proj.weight[:, head * d : head * d + d]


def without(model, layer, head):
    """A copy of the model in which a head says nothing."""
    less = copy.deepcopy(model)
    with torch.no_grad():
        columns(less, layer, head).zero_()
    return less


def only(model, layer, head):
    """A copy of the model in which one head alone speaks."""
    less = copy.deepcopy(model)
    with torch.no_grad():
        kept = columns(less, layer, head).clone()
        for one in anatomy(less).layers:
            one.out_proj.weight.zero_()
        columns(less, layer, head).copy_(kept)
    return less


def first(found):
    return found.ranking()[0]


# ---- switching off --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_off_is_its_columns_gone(architecture):
    """On every architecture, many heads in a batch or one by one, and with nothing left behind."""
    model = ARCHITECTURES[architecture]()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    read = lambda inputs: log_probs_at(model, inputs, [-1, -2])  # noqa: E731
    before, state = read(prompt), [list(vars(m)) for m in model.modules()]
    together = {(layer, h): x[i] for layer, heads, x in each_head_off(model, prompt, read) for i, h in enumerate(heads)}
    alone = {(layer, heads[0]): x[0] for layer, heads, x in each_head_off(model, prompt, read, rows=1)}
    assert list(together) == list(alone) == [(layer, h) for layer in range(4) for h in range(6)]
    for layer, head in ((0, 0), (1, 4), (3, 5)):
        less = without(model, layer, head)
        wanted = log_probs_at(less, prompt, [-1, -2])
        torch.testing.assert_close(together[layer, head], wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(alone[layer, head], wanted, rtol=0, atol=1e-4)
        assert (wanted - before).abs().max() > 1e-3
    assert torch.equal(read(prompt), before)
    assert [list(vars(m)) for m in model.modules()] == state


@torch.no_grad()
@pytest.mark.parametrize("mode", ["output", "uniform"])
def test_eps_1_changes_nothing(mode):
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    plain = model(**prompt).logits
    for eps, same in ((1.0, True), (0.5, False)):
        with wrapped(model, SwitchOff(1, (3, 0), mode, eps)):
            assert torch.equal(model(**prompt).logits, plain) == same
    with wrapped(model, SwitchOff(1, (3, -1), mode, 0.0)):  # each sequence has its own head, or none
        assert torch.equal(model(**prompt).logits[1], plain[1])


@dataclass(frozen=True)
class Rows(Intervention):
    """Reads attention after edits."""

    rows = "all"

    def weights(self, a, site):
        site.memo[site.layer] = (a, site.geometry)
        return a


@torch.no_grad()
def test_uniform_is_uniform_over_visible_keys():
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    _, (_, memo) = Asker(model, None, [SwitchOff(1, (3, 0), "uniform", 1e-7), Rows()]).forward(prompt)
    a, geometry = memo[1]
    n = a.shape[-1]
    visible = torch.ones(n, n).tril().bool() & geometry.valid[:, None]
    uniform = visible / visible.sum(-1, keepdim=True).clamp(min=1)
    for b, head in ((0, 3), (1, 0)):
        real = geometry.valid[b]
        torch.testing.assert_close(a[b, head][real], uniform[b][real], rtol=0, atol=1e-4)
        assert (a[b, 1][real] - uniform[b][real]).abs().max() > 0.01


def test_an_exception_leaves_nothing_behind():
    model = llava()
    prompt = picture_prompt(model)
    model(**prompt)  # transformers itself adds attributes on the first pass
    state, calls = [list(vars(m)) for m in model.modules()], []

    def read(inputs):
        calls.append(1)
        if len(calls) == 6:  # in the second layer
            raise KeyboardInterrupt
        return log_probs_at(model, inputs, [-1])

    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        list(each_head_off(model, prompt, read, rows=2))
    assert [list(vars(m)) for m in model.modules()] == state
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_below_are_not_computed_again():
    model = llava()
    prompt, passes = picture_prompt(model), [0] * 4
    for i, layer in enumerate(anatomy(model).layers):
        layer.attention.q_proj.register_forward_hook(lambda *_, i=i: passes.__setitem__(i, passes[i] + 1))
    first = anatomy(model).layers[0].module
    own = first.__dict__["forward"] = first.forward  # as libraries leave it that place layers on devices
    with torch.no_grad():
        list(each_head_off(model, prompt, lambda inputs: log_probs_at(model, inputs, [-1])))
    assert first.__dict__["forward"] is own
    assert passes == [2, 3, 4, 5]  # once plain, then once for each layer from the lowest to one's own


def test_tiling():
    batch = tiled({"x": torch.tensor([[1], [2]]), "n": 3}, 2)
    assert batch["x"][:, 0].tolist() == [1, 2, 1, 2] and batch["n"] == 3


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_kl():
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    q = torch.tensor([[[0.25, 0.75, 0.0]], [[0.5, 0.5, 0.0]]], dtype=torch.float64).log()
    wanted = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    torch.testing.assert_close(kl(p, q), torch.tensor([[wanted], [0.0]], dtype=torch.float64), rtol=0, atol=1e-9)
    some, other = (torch.randn(2, 1000, 50).log_softmax(-1) for _ in range(2))
    assert kl(some[0], other).min() >= -1e-9


def test_angles():
    plain = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    turned = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    found = subspace_angle(plain, torch.stack([plain, 2 * plain, turned]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 45.0], dtype=torch.float64), rtol=0, atol=1e-5)
    assert subspace_angle(plain, turned[None], rank=2)[0] > 45


@pytest.mark.parametrize("n_heads", [1, 3])
def test_retrieval(n_heads):
    """All attention on a box of 3 of 12 cells, and uniform attention."""
    box, grid, none = torch.zeros(12).bool(), torch.ones(12).bool(), torch.zeros(12).bool()
    box[2:5] = True
    top, mass = retrieval(box.float().repeat(n_heads, 1) / 3, box, grid, none)
    assert top.tolist() == [1] * n_heads and mass.tolist() == [1 - 3 / 12] * n_heads
    w = torch.full((n_heads, 12), 0.01)
    assert retrieval(w, box, grid, none)[1].abs().max() < 1e-7
    w[:, 7], w[:, 3] = 0.9, 0.05
    assert retrieval(w, box, grid, none)[0].tolist() == [0] * n_heads
    sink = none.clone()
    sink[7] = True
    assert retrieval(w, box, grid, sink)[0].tolist() == [1] * n_heads  # the sink does not count
    part = grid.clone()
    part[7:] = False  # tokens that belong to no cell
    assert retrieval(w, box, part, none)[0].tolist() == [1] * n_heads
    assert retrieval(w, box, part, none)[1].tolist() == pytest.approx([0.07 / 0.11 - 3 / 7] * n_heads)


def test_separation_is_the_rule_worked_out_by_hand(organism, monkeypatch):
    """Means .8 and .3, deviations .1 and .2; a head that tells nothing gets less than nothing."""
    v = np.array([[0.7, 0.5], [0.9, 0.5], [0.1, 0.4], [0.5, 0.6]])
    words = Words(np.array([1, 1, 1, 2]), np.array([True, True, False, False]), v, v[:, 0], np.arange(4))
    monkeypatch.setattr(separate, "read_words", lambda *a, **k: words)
    monkeypatch.setattr(Subject, "shape", (1, 2))
    found = Separate(n=1.0).measure(Subject(*organism, SMALL))
    np.testing.assert_allclose(found.scores(), [[0.5 - 0.1 - 0.2, -0.1]])
    assert found.extra["samples"] == {"invented": 2, "true": 2} and len(found.pictures) == len(SMALL.images)
    np.testing.assert_allclose(Separate(n=0).measure(Subject(*organism, SMALL)).scores(), [[0.5, 0]], atol=1e-12)
    monkeypatch.setattr(separate, "read_words", lambda *a, **k: words.of([2]))
    with pytest.raises(ValueError, match="hold no true objects; take more pictures"):
        Separate().measure(Subject(*organism, SMALL))


def test_means_intervals_and_agreement():
    """Samples are averaged, pictures resampled."""
    values = np.array([[[1.0, 0.0]], [[3.0, 0.0]], [[5.0, 4.0]]])
    found = Measurement.from_samples(["a", "b"], ("x", "y"), values, np.array([0, 0, 1]), np.array([0, 0, 0]))
    assert found.scores().tolist() == [[3.0, 4 / 3]] and found.counts["y"].tolist() == [0, 0]
    low, high = found.intervals()
    assert (low[0, 0], high[0, 0]) == (2, 5)
    assert found.scores(np.array([[2.0, 0.0], [0.0, 1.0]])).tolist() == [[[2, 0]], [[5, 4]]]
    same = np.random.default_rng(0).random((1, 2, 4)).repeat(4, 0)
    pictures, one = list("abcd"), np.zeros(4, int)
    assert Measurement.from_samples(pictures, ("x",), same, np.arange(4), one).agreement() == pytest.approx(1)
    same[1::2] *= -1
    assert Measurement.from_samples(pictures, ("x",), same, np.arange(4), one).agreement() == pytest.approx(-1)


def test_scores_of_ablation_are_those_of_weights_taken_out(organism):
    """margin and token, against a model without the head's columns, one question or word at a time."""
    model, processor = organism
    data = SMALL
    margin = rank(Ablate("margin"), model, processor, data)
    bench = Pope()
    label = {bench.item_id(q): q.label for q in bench.questions(data)}
    yes, no = (list(spellings(processor, word)) for word in ("yes", "no"))
    subject = Subject(model, processor, data)

    def margin_of(model, item):
        logits = model(**subject.inputs([item])).logits[0, -1]
        return float(logits[yes].exp().sum().log() - logits[no].exp().sum().log())

    with torch.no_grad():
        for layer, head in ((1, 0), (4, 7)):
            less = without(model, layer, head)
            drop = {"absent": [], "present": []}
            for item in bench.items(data):
                drop["present" if label[item.id] == "yes" else "absent"].append(
                    margin_of(model, item) - margin_of(less, item)
                )
            absent, present = np.mean(drop["absent"]), np.mean(drop["present"])
            assert margin.extra["parts"]["present"][layer][head] == pytest.approx(present, abs=1e-4)
            assert margin.score((layer, head)) == pytest.approx(absent - max(0, present), abs=1e-4)
    assert margin.direction == "high is bad" and margin.extra["samples"] == {k: len(v) for k, v in drop.items()}

    token = rank(Ablate("token"), model, processor, data)
    captions = subject.captions(64)
    less, drops = without(model, 2, 5), {True: [], False: []}
    with torch.no_grad():
        for caption in captions:
            inputs, n = naming.told(model, processor, [caption])
            a, b = (m(**inputs).logits[0].log_softmax(-1) for m in (model, less))
            for word in caption.named:
                at, said = n + word.token - 1, caption.tokens[word.token]
                drops[word.true].append(float(a[at, said] - b[at, said]))
    assert token.extra["parts"]["true"][2][5] == pytest.approx(np.mean(drops[True]), abs=1e-4)
    assert token.extra["parts"]["invented"][2][5] == pytest.approx(np.mean(drops[False]), abs=1e-4)


def test_visual_scores_are_those_of_the_models_own_attention(organism, monkeypatch):
    """Against the weights that eager attention gives out, one caption at a time; rows are read in pieces."""
    monkeypatch.setattr(attention, "PIECE", 16)
    processor = organism[1]
    captions = Subject(*organism, DATA).captions(256)
    with pytest.warns(UserWarning, match="with fewer than 200"):
        found = {see: rank(Visual(see, sinks=True), *organism, DATA) for see in ("mass", "top1")}
    model, _ = vlmfix.load("organism", attn_implementation="eager")
    place, where = naming.Annotations(DATA), View(10, 10, 0, (0, 0, 120, 120))
    mass, top = [], []
    for caption in captions:
        inputs, n = naming.told(model, processor, [caption])
        with torch.no_grad():
            a = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0]  # (L, H, Q, K)
        cells = place.shown(caption.key, where, (120, 120))
        for word in (w for w in caption.named if w.object in cells):
            shows = torch.tensor(cells[word.object])
            w = a[:, :, n + word.token - 1][..., inputs["input_ids"][0] == model.config.image_token_id]
            mass.append(w[..., shows].sum(-1) / w.sum(-1) - shows.float().mean())
            top.append(shows[w.argmax(-1)].float())
    assert found["mass"].extra["pairs"] == len(mass) > 5
    np.testing.assert_allclose(found["mass"].scores, torch.stack(mass).mean(0), atol=1e-5)
    np.testing.assert_allclose(found["top1"].scores, torch.stack(top).mean(0), atol=1e-6)


@pytest.mark.filterwarnings("ignore:only .* named objects")
def test_top1_passes_over_visual_sinks(organism):
    """With them left out, heads point at objects more often."""
    model, processor = organism
    among, past = (np.mean(rank(Visual("top1", sinks=s), model, processor, DATA).scores) for s in (True, False))
    assert past > among


# ---- planted heads --------------------------------------------------------------------------------------------------


def test_vhd_finds_a_loud_head(organism):
    """Values a hundred times as large and a projection that makes up for it: the same model, and the two heads that share
    these values have all the VHD.
    """
    model, processor = copy.deepcopy(organism[0]), organism[1]
    d, loud = anatomy(model).layers[0].head_dim, {(4, 2), (4, 3)}
    plain = rank(VHD(), model, processor, DATA)
    assert not loud & set(plain.ranking()[:2])
    values = anatomy(model).layers[4].attention.v_proj
    with torch.no_grad():
        values.weight[d : 2 * d] *= 100
        values.bias[d : 2 * d] *= 100
        for head in loud:
            columns(model, *head).div_(100)
    found = rank(VHD(), model, processor, DATA)
    assert set(found.ranking()[:2]) == loud
    for head in loud:
        assert found.score(head) == pytest.approx(1e4 * plain.score(head), rel=1e-3)
    relative = rank(VHD(relative=True), model, processor, DATA)
    assert relative.score((4, 2)) + relative.score((4, 3)) > 7.9, "all of what the layer's eight heads have"
    np.testing.assert_allclose(np.mean(relative.scores, axis=1), 1, rtol=1e-6)
    assert set(rank(VHD(distance="l2"), model, processor, DATA).ranking()[:2]) == loud


@pytest.mark.parametrize("how", [Ablate(), Ablate(mode="uniform"), Subspace()])
def test_the_only_head_that_speaks_is_found(organism, how):
    model = only(organism[0], 3, 2)
    found = rank(how, model, organism[1], SMALL)
    assert first(found) == (3, 2) and found.score((3, 2)) > 1e-6
    rest = [found.score(head) for head in found.ranking()[1:]]
    assert max(map(abs, rest)) < min(1e-5, 0.01 * found.score((3, 2))), "heads that say nothing change nothing"


@pytest.mark.parametrize(("see", "head"), [("margin", (1, 0)), ("token", (1, 0))])
@pytest.mark.usefixtures("captions_at_hand")
def test_the_only_head_that_pushes_is_found(organism, see, head):
    """First where it harms; last where it helps, for then all others do more harm: none."""
    found = rank(Ablate(see), only(organism[0], *head), organism[1], DATA if see == "token" else SMALL)
    assert abs(found.score(head)) > 1e-3
    assert found.ranking()[0 if found.score(head) > 0 else -1] == head
    assert max(abs(found.score(other)) for other in found.ranking() if other != head) < 1e-6


@pytest.mark.parametrize("see", ["mass", "top1"])
@pytest.mark.usefixtures("captions_at_hand")
def test_the_only_head_that_looks_is_found(organism, see):
    """All other heads look everywhere alike."""
    model, processor = copy.deepcopy(organism[0]), organism[1]
    d = anatomy(model).layers[0].head_dim
    with torch.no_grad():
        for i, layer in enumerate(anatomy(model).layers):
            for part in (layer.attention.q_proj.weight, layer.attention.q_proj.bias):
                kept = part[3 * d : 4 * d].clone()
                part.zero_()
                if i == 0:
                    part[3 * d : 4 * d] = kept
    with pytest.warns(UserWarning, match="with fewer than 200"):
        found = rank(Visual(see, sinks=True), model, processor, DATA)
    assert first(found) == (0, 3) and found.score((0, 3)) > 0.02
    rest = [found.score(head) for head in found.ranking()[1:]]
    assert max(map(abs, rest)) < 1e-5 if see == "mass" else len(set(rest)) == 1


# ---- whole tools ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:only .* named objects")
@pytest.mark.parametrize("how", TOOLS, ids=lambda how: f"{how.name}-{getattr(how, 'see', '')}")
@pytest.mark.usefixtures("captions_at_hand")
def test_batches_and_padding_do_not_matter(organism, how):
    data = SMALL if how.name in ("ablate", "subspace") else DATA
    before = organism[0](**Subject(*organism, data).inputs(Chair().items(data)[:1])).logits
    one, many = (rank(how, *organism, data, batch_size=size) for size in (9, 64))
    np.testing.assert_allclose(one.scores, many.scores, rtol=1e-3, atol=2e-3 if how.name == "subspace" else 2e-5)
    assert (one.n_layers, one.n_heads, one.model, one.tool) == (8, 8, "organism", how.name)
    assert one.data["name"] == "calibration" and len(one.data["ids"]) == one.data["n"] <= len(data.images)
    assert find_tool(f"{how.name}:" + ",".join(f"{k}={v}" for k, v in one.settings.items())) == how
    after = organism[0](**Subject(*organism, data).inputs(Chair().items(data)[:1])).logits
    assert torch.equal(before, after)


def test_every_tool_has_its_line():
    apart = {"random", "gains"}  # test_gains.py
    assert {find_tool(name).name for name in REGISTRY} == set(REGISTRY) == {how.name for how in TOOLS} | apart


def test_random_heads_are_random():
    model = llava()
    one, again, other = (rank(Random(seed), model, None, DATA) for seed in (0, 0, 1))
    assert one.scores == again.scores != other.scores and one.data["ids"] == []


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("vdh", "unknown tool 'vdh'; did you mean 'vhd'"),
        ("ablate:sea=kl", "ablate has no setting 'sea'; did you mean 'see'"),
        ("ablate:see=all", "see expects kl, margin or token, got 'all'"),
        ("ablate:mode=off", "mode expects output or uniform, got 'off'"),
        ("separate:preset=lookbak", "did you mean 'lookback'?"),
        ("visual:see=top", "see expects mass or top1, got 'top'"),
        ("vhd:distance=l3", "distance expects sq_l2 or l2, got 'l3'"),
        ("subspace:rank=0", "rank: expected 1 or more, got 0"),
        ("random:seed", "expected setting=value after the colon, got 'seed'"),
    ],
)
def test_tools_refused(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_tool(spec)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Ablate("all"), "see: expected kl, margin or token, got 'all'"),
        (lambda: Subspace(rank=0), "rank: expected 1 or more, got 0"),
        (lambda: Separate(n=-1), "n: expected 0 or more, got -1"),
        (lambda: SwitchOff(1, (3,), "off"), "mode: expected output or uniform, got 'off'"),
    ],
)
def test_settings_refused_in_python(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_too_little_to_look_at(organism, monkeypatch):
    one = Data.load("calibration", 1)
    captions = [replace(c, named=()) for c in Subject(*organism, one).captions(64)]
    monkeypatch.setattr(Subject, "captions", lambda *_: captions)
    with pytest.raises(ValueError, match="has no invented objects to look at"):
        rank(Ablate("token"), *organism, one)
    with pytest.raises(ValueError, match="no object that the model names in calibration has a box"):
        rank(Visual(), *organism, one)
    items = Pope().items(SMALL)[:7]
    monkeypatch.setattr(Pope, "items", lambda *_: items)
    with pytest.raises(ValueError, match="subspace compares at least 8 prompts"):
        rank(Subspace(), *organism, SMALL)


# ---- captions and boxes ---------------------------------------------------------------------------------------------


def test_the_model_reads_what_it_said(organism):
    """At every place of a caption the likeliest token is the one that was generated, whatever is beside it."""
    captions = Subject(*organism, DATA).captions(64)
    inputs, n = naming.told(*organism, captions)
    best = organism[0](**inputs).logits.argmax(-1)
    for row, caption in enumerate(captions):
        assert best[row, n - 1 : n - 1 + len(caption.tokens)].tolist() == list(caption.tokens)
    words = [(c.tokens[w.token], w.object) for c in captions for w in c.named]
    assert len(words) > 6
    synonyms = chair.Vocabulary.load().node_of.items()
    for token, name in words:  # the token begins the word
        piece = organism[1].tokenizer.decode([token]).strip()[:2]
        assert piece and any(word.startswith(piece) for word, node in synonyms if node == name), (piece, name)


def boxes(tmp_path, *annotations, size=(96, 96)):
    (tmp_path / "images").mkdir()
    Image.new("RGB", size).save(tmp_path / "images" / "1.png")
    instances = {
        "images": [{"id": 1, "file_name": "1.png", "width": size[0], "height": size[1]}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": c, "bbox": box, "area": 1, "iscrowd": 0, **more}
            for i, (c, box, more) in enumerate(annotations, start=1)
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    return naming.Annotations(Data.load(str(tmp_path)))


def test_cells_that_show_an_object(tmp_path):
    """A grid of 4 x 4 cells of 24 pixels: covered by half or more counts."""
    found = boxes(tmp_path, (1, [0, 0, 36, 24], {}), (1, [72, 72, 24, 24], {}), (2, [0, 48, 14, 24], {}))
    cells = found.shown(1, View(4, 4, 0, (0, 0, 96, 96)), (96, 96))
    assert np.flatnonzero(cells["dog"]).tolist() == [0, 1, 15]
    assert "cat" not in cells, "smaller than a cell"
    assert found.shown(1, View(4, 4, 0, (0, 0, 96, 96)), (96, 96), most=0.1) == {}, "large objects win by their area"


def test_cells_of_a_centre_crop_and_of_padding(tmp_path):
    """What lies outside the square is not seen; padding shows nothing."""
    found = boxes(tmp_path, (1, [0, 0, 40, 96], {}), (2, [96, 0, 24, 48], {}), size=(192, 96))
    cropped = found.shown(1, View(4, 4, 0, (48, 0, 144, 96)), (192, 96))
    assert list(cropped) == ["cat"] and np.flatnonzero(cropped["cat"]).tolist() == [2, 6]
    padded = found.shown(1, View(4, 4, 0, (0, -48, 192, 144)), (192, 96))
    assert np.flatnonzero(padded["dog"]).tolist() == [4, 8]


def test_masks_go_before_boxes(tmp_path):
    corner = {"segmentation": [[0, 0, 48, 0, 48, 48, 0, 48]]}
    found = boxes(tmp_path, (1, [0, 0, 96, 48], corner))
    cells = found.shown(1, View(2, 2, 0, (0, 0, 96, 96)), (96, 96))
    assert np.flatnonzero(cells["dog"]).tolist() == [0]


# ---- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [[[0.5, math.nan], [1.0, 2.0]], [[-1.0, 2.0]], [[math.nan]], [[0.0, 0.0]]])
def test_heat_maps(tmp_path, scores):
    pytest.importorskip("matplotlib")
    found = HeadList(
        "organism", "visual", scores, data={"n": 2, "name": "organism"}, extra={"score": "a long line " * 20}
    )
    known = found.select(top=1) if found.ranking() else found
    head_map(known, tmp_path / "new" / "map.png")
    with Image.open(tmp_path / "new" / "map.png") as drawn:
        assert drawn.width > 200 and len(drawn.convert("RGB").getcolors(10**6)) > 3
    with pytest.raises(ValueError, match=r"cannot draw .*map\.xyz"):
        head_map(known, tmp_path / "map.xyz")
