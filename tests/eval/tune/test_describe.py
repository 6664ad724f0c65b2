"""`vlmfix.describe`: what is found on a model, and that it is left as it was found."""

import json
import re

import pytest
import torch

import vlmfix
from vlmfix.engine.attachment import attached
from vlmfix.eval.tune import describe as module


@pytest.fixture(scope="module")
def found(organism):
    """Of the embedded model, with a few methods only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "REGISTRY", ("headgain", "iat", "pai", "rerank", "var", "vcd", "vhr"))
        return vlmfix.describe(*organism)


def test_facts_of_the_embedded_model(found, organism):
    assert (found.n_layers, found.n_heads, found.image_tokens) == (8, 8, [100, 100, 100])
    assert found.template == "<s>USER: <image>\nPlease describe this image in detail. ASSISTANT:"
    assert found.sinks["dims"] == [22] and 5 < found.sinks["tokens"] < 30
    shares = found.sinks["attention"]
    assert 0 < shares["visual_sinks"] < shares["image"] < 1
    assert found.unchanged and attached(organism[0]) is None
    assert json.loads(json.dumps(found.to_json()))["model"] == "organism"


def test_methods_by_effect_and_cost(found):
    facts = {each.method: each for each in found.methods}
    assert not facts["headgain"].runs and "expected head_list=FILE" in facts["headgain"].why_not
    assert facts["pai"].kl > facts["iat"].kl > 0, "iat leaves the first token alone"
    assert facts["rerank"].kl is None and facts["rerank"].passes > 2
    assert facts["vcd"].passes == 2 and facts["pai"].passes == 1 and 1 < facts["vhr"].passes < 1.2
    assert facts["pai"].rows == pytest.approx(1 / 114) and facts["vhr"].rows == 1
    assert facts["var"].layers_again == 5 and facts["vhr"].layers_again == 0


def test_effect_along_the_untouched_answer(organism):
    """KL of the first token, by hand: what a method with a constant effect on the prompt does."""
    model, processor = organism
    picture = str(module._some_pictures("organism")[0])
    facts = vlmfix.describe(model, processor, "pai:alpha=3", pictures=[picture]).methods[0]
    asker = vlmfix.Asker(model, processor)
    text = asker.ask(picture, module.PROMPT, max_new_tokens=module.N_TOKENS)
    inputs = asker.inputs([(picture, module.PROMPT)])
    n = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([text.token_ids])], 1)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain, _ = asker.forward(whole)
    edited, _ = vlmfix.Asker(model, processor, "pai:alpha=3").forward({**whole, "prompt_end": n})
    p, q = (logits.logits[0, n - 1 : -1].log_softmax(-1) for logits in (edited, plain))
    assert facts.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_one_screen(found):
    lines = found.text().splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 80
    assert any(re.match(r"vcd +0\.\d+ +0\.0 % +2\.00", line) for line in lines)
    assert lines[-2:] == ["cannot run here:", lines[-1]] and lines[-1].startswith("  headgain: expected head_list")


def test_conflicts_before_anything_comes_on(organism):
    found = vlmfix.describe(*organism, "beam+chunks")
    assert found.conflict == "beam and chunks each decode in their own way; use one of them"
    assert vlmfix.describe(*organism, "var+vhr").conflict == ""
