"""`vlmfix bench`: what it compares, and that it leaves nothing behind."""

import json

import pytest
import torch
from typer.testing import CliRunner

from vlmfix.cli import app
from vlmfix.engine.wrap import effects, wrapped
from vlmfix.eval.bench import compare, shapes, timing
from vlmfix.eval.bench.naive import naively


@pytest.fixture(scope="module")
def tiny():
    model = shapes.build("tiny", None, torch.float32, "cpu")
    return model, shapes.build_prompt(model, "tiny", 2, 20)


def test_the_naive_reference_gives_the_same_answers(tiny):
    model, prompt = tiny
    settings = {"do_sample": False, "max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**prompt, **settings).logits
    for method in compare.find_methods(["var", "pai", "zerotuning", "act:alpha=1.1,beta=0"]):
        with wrapped(model, list(method)):
            ours = model.generate(**prompt, **settings).logits
            shares = effects(model)[0]["samples"][0]
        with naively(model, method):
            naive = model.generate(**prompt, **settings).logits
        torch.testing.assert_close(torch.stack(naive), torch.stack(ours), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(ours[0], plain[0], atol=1e-4), method
        if method[0].name == "var":
            assert all(layer["selected"] == 1 for layer in shares["layers"].values()), "the worst case: every head row"
    assert all(torch.equal(a, b) for a, b in zip(plain, model.generate(**prompt, **settings).logits, strict=True))


def test_a_naive_edit_beside_a_second_stream(tiny):
    model, prompt = tiny
    (method,) = compare.find_methods(["pai:gamma=1.1,skip_first=0"])
    settings = {"do_sample": False, "max_new_tokens": 3, "output_scores": True, "return_dict_in_generate": True}
    with wrapped(model, list(method)):
        ours = model.generate(**prompt, **settings).scores
    with naively(model, method):
        naive = model.generate(**prompt, **settings).scores
    torch.testing.assert_close(torch.stack(naive), torch.stack(ours), rtol=1e-3, atol=1e-4)


def test_what_is_compared_and_what_stays(tiny, monkeypatch):
    model, prompt = tiny
    methods = compare.find_methods(["none", "var", "vhr"])
    rows = compare.compare(model, prompt, methods, new_tokens=2, rounds=2)
    assert [row["variant"] for row in rows] == ["none", "none again", "var", "naive var", "vhr"]
    for row in rows:
        for key in ("prefill", "token"):
            low, high = row[key]["interval"]
            assert row[key]["median"] > 0 and low <= row[key]["ratio"] <= high
    assert rows[0]["prefill"]["ratio"] == rows[0]["token"]["ratio"] == 1
    monkeypatch.setattr("vlmfix.engine.attachment.Attachment.detach", lambda self: None)
    with pytest.raises(RuntimeError, match="not what it was before"):
        compare.compare(model, prompt, compare.find_methods(["vhr"]), new_tokens=1, rounds=1)


def test_compiled_ones_are_twins_on_the_same_weights(tiny):
    model, prompt = tiny
    twin = compare.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    rows = compare.compare(model, prompt, compare.find_methods(["pai"]), new_tokens=2, rounds=1, compiled=True)
    assert [row["variant"] for row in rows] == ["none", "none again", "pai"] and rows[2]["token"]["median"] > 0


def test_vcd_has_a_second_stream_though_the_prompt_has_no_pixels(tiny):
    model, prompt = tiny
    (method,) = compare.find_methods(["vcd:alpha=2.0"])
    rows = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["inputs_embeds"])), with_kwargs=True
    )
    with wrapped(model, list(method)):
        timing.measure(model, prompt, 2)
        assert effects(model)[0]["alpha"] == 2 and all(s["acted"] for s in effects(model)[0]["samples"])
    handle.remove()
    assert rows == [2, 2, 4, 4], "both prompts, then two tokens of both at once"


def test_ratios_are_taken_within_rounds():
    found = timing.ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0])
    assert found["ratio"] == 2 and found["interval"] == [2, 2]
    assert timing.ratio([1.0, 3.0], [1.0, 1.0])["interval"] == [1, 3]


def test_the_command(monkeypatch):
    run = CliRunner().invoke
    small = ["bench", "--shape", "tiny", "--rounds", "1", "--new-tokens", "2"]
    done = run(app, [*small, "--method", "none,var", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {"shape", "layers", "machine", "command", "rows", "batch_size"} <= set(found)
    assert "naive var" in {row["variant"] for row in found["rows"]} and found["image_tokens"] == 64
    done = run(app, [*small, "--method", "none,var", "--questions", "3"])
    assert done.exit_code == 0 and "times as fast" in done.stdout and "] of sharing" in " ".join(done.stdout.split())
    for wrong, said in (
        (["--shape", "tinny"], "did you mean 'tiny'"),
        (["--dtype", "int8"], "expected float32"),
        (["--method", "rerank"], "acts in vlmfix.ask only"),
    ):
        done = run(app, [*small, *wrong])
        assert done.exit_code == 1 and said in done.stderr and "Traceback" not in done.stderr
    done = run(app, [*small, "--method", "vhr", "--questions", "3"])
    assert done.exit_code == 1 and "cannot share the pass over a picture" in done.stderr
