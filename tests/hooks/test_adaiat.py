"""AdaIAT's edit against its formula, by hand, and what its statistics are refused for."""

import json
from pathlib import Path

import pytest
import torch

import vlmfix
from tests.contract.test_contract import answer, build
from tests.models import picture_prompt
from vlmfix.hooks import AdaIAT
from vlmfix.hooks.parts.attention_to_answer import Statistics
from vlmfix.hooks.parts.calibrated import fingerprint
from vlmfix.method.site import Site
from vlmfix.model.anatomy import anatomy
from vlmfix.model.geometry import Geometry

IMAGE = torch.tensor([[False, True]])
PROMPT = Geometry(IMAGE, IMAGE | True, IMAGE | True)


def edited(one, a, layer=5):
    """Two keys of prompt, the others generated; there may be room for more."""
    site = Site(layer, 32, PROMPT.fitted(a.shape[-1]), torch.tensor([[True]]), 3, 0, {}, prompt=PROMPT)
    return one.weights(a, site)


def statistics(path, model, *, real=3.0, invented=2.0, **changes):
    parts = anatomy(model)

    def table(x):
        return tuple(x if isinstance(x, tuple) else (x,) * parts.n_heads for _ in parts.layers)

    facts = {"model": "tiny", "fingerprint": fingerprint(model, parts), "template": None, "n_real": 5, "n_invented": 4}
    tables = {"real": table(real), "invented": table(invented)}
    Statistics(**{**facts, "match": "none", **tables, **changes}).write(path)
    return str(path)


def test_worked_row():
    """Factor 1 + 6 (1.1 - 1) = 1.6 on .2 and .1; the row, now 1.18, is divided by its sum."""
    a = torch.tensor([0.5, 0.2, 0.2, 0.1]).view(1, 1, 1, 4)
    out = edited(AdaIAT(ratio=1.1, threshold=0.151), a)  # r = (.2 + .1) / 2
    torch.testing.assert_close(out.flatten(), torch.tensor([0.4237, 0.1695, 0.2712, 0.1356]), rtol=0, atol=1e-4)
    assert torch.equal(edited(AdaIAT(ratio=1.1, threshold=0.15), a), a), "r reaches T"
    assert torch.equal(edited(AdaIAT(ratio=1.0, threshold=9), a), a), "M = 1"


def test_r_is_a_sum_over_heads_and_room_of_a_static_cache_counts_nothing():
    a = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.6, 0.2, 0.2, 0.0]]).view(1, 2, 1, 4)
    for weights in (a, torch.nn.functional.pad(a, (0, 3))):
        assert torch.equal(edited(AdaIAT(ratio=2, threshold=0.2499), weights), weights)
        assert not torch.equal(edited(AdaIAT(ratio=2, threshold=0.2501), weights), weights)


def test_factors_end_at_zero_but_in_the_release():
    a = torch.tensor([0.5, 0.2, 0.2, 0.1]).view(1, 1, 1, 4)
    torch.testing.assert_close(edited(AdaIAT(ratio=0.5, threshold=9), a).flatten(), torch.tensor([5 / 7, 2 / 7, 0, 0]))
    out = edited(AdaIAT(ratio=0.5, threshold=9, variant="release"), a).flatten()  # 1 - 3 = -2 times .3
    torch.testing.assert_close(out, torch.tensor([5.0, 2.0, -4.0, -2.0]))


def test_statistics_give_thresholds_and_ratios(tmp_path):
    """P and N of 3 and 2 in each of six heads: T = 6 (2 + .5), M = 1.5."""
    model = build("llava")
    path = statistics(tmp_path / "s.json", model)
    one = AdaIAT(statistics=path)
    threshold, m = one._threshold_and_ratios(2, 6)
    assert threshold == 15 and m == [1.5] * 6
    real, invented = (3.0, 1.0, 0.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    uneven = statistics(tmp_path / "u.json", model, real=real, invented=invented)
    assert AdaIAT(statistics=uneven)._threshold_and_ratios(0, 6)[1] == [3.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    (control,) = AdaIAT(statistics=uneven).controls()
    assert control._threshold_and_ratios(0, 6)[1] == pytest.approx([7 / 6] * 6)
    prompt = picture_prompt(model)
    plain = answer(model, prompt, max_new_tokens=3, output_scores=True, return_dict_in_generate=True).scores
    with AdaIAT(statistics=path, layers=(0, 1, 2, 3))(model):
        out = answer(model, prompt, max_new_tokens=3, output_scores=True, return_dict_in_generate=True).scores
        (told,) = vlmfix.effects(model)
    assert torch.equal(out[0], plain[0]) and not torch.equal(out[1], plain[1])
    assert told["facts"]["statistics"]["n_real"] == 5 and told["samples"] == [{"acted": True}]


def test_statistics_are_refused_on_another_model(tmp_path):
    model = build("llava")
    path = statistics(tmp_path / "s.json", model)
    with torch.no_grad():
        model.get_decoder().layers[1].self_attn.o_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"made on tiny with other weights .* vlmfix calibrate adaiat"):
        vlmfix.wrap(model, AdaIAT(statistics=path))
    assert (
        fingerprint(build("llava").half(), anatomy(build("llava"))) == json.loads(Path(path).read_text())["fingerprint"]
    )
    with pytest.raises(ValueError, match=r"4 layers x 6 heads, this model has 2 x 6"):
        vlmfix.wrap(build("llava").__class__(_two_layers(model.config)), AdaIAT(statistics=path))
    written = statistics(tmp_path / "t.json", build("llava"), template="0123")

    class Other:
        chat_template = "{{ messages }}"

    with pytest.raises(ValueError, match="another chat template"):
        vlmfix.wrap(build("llava"), AdaIAT(statistics=written), Other())


def _two_layers(config):
    import copy

    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = 2
    return config


def test_files_that_were_changed_and_settings_that_do_not_go_together(tmp_path):
    model = build("llava")
    path = tmp_path / "s.json"
    statistics(path, model)
    path.write_text(path.read_text().replace('"n_real": 5', '"n_real": 6'))
    with pytest.raises(ValueError, match="does not fit its checksum"):
        vlmfix.wrap(model, AdaIAT(statistics=str(path)))
    with pytest.raises(ValueError, match=r"expected statistics=FILE, got none; make one .* vlmfix calibrate adaiat"):
        vlmfix.wrap(model, "adaiat")
    with pytest.raises(ValueError, match="cannot read the statistics"):
        vlmfix.wrap(model, "adaiat:statistics=nowhere.json")
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected statistics of format"):
        vlmfix.wrap(model, AdaIAT(statistics=str(path)))
    for settings in ({"ratio": 1.0}, {"threshold": 1.0}, {"statistics": "x", "ratio": 1.0, "threshold": 1.0}):
        with pytest.raises(ValueError, match="give statistics, or both ratio and threshold"):
            AdaIAT(**settings)
