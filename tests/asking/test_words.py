"""Words and tokens: which tokens spell a word, which tokens wrote it, and how likely an answer begins with it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vlmfix
from vlmfix.asking.words import FirstWords, Written, p_yes, spellings, word_log_probs, yes_no_tokens

SCENES = Path(__file__).parents[2] / "assets" / "organism" / "test" / "images"
PIECES = ["A", " red", "dish", " cat", "</s>"]


def decode(tokens, skip_special_tokens):
    assert skip_special_tokens
    return "".join(PIECES[i] for i in tokens if PIECES[i] != "</s>")


PROCESSOR = SimpleNamespace(decode=decode)


def test_tokens_that_wrote_some_characters():
    written = Written.by(PROCESSOR, [0, 1, 2, 3])
    assert written.text == "A reddish cat" and written.ends == (1, 5, 9, 13)
    assert written.tokens_of(2, 9) == [1, 2] and written.tokens_of(10, 13) == [3] and written.tokens_of(0, 1) == [0]
    for start, end in ((10, 14), (-1, 2), (3, 3)):
        with pytest.raises(ValueError, match=r"span: expected characters within 0\.\.13"):
            written.tokens_of(start, end)


def test_words_and_their_tokens():
    written = Written.by(PROCESSOR, [0, 1, 2, 3, 4])
    assert written.words() == [("A", [0]), ("reddish", [1, 2]), ("cat", [3])], "the end token wrote nothing"
    assert Written.by(PROCESSOR, []).words() == []


def test_spellings_are_any_case_and_any_blank():
    pieces = ["yes", "\u2581Yes", "\u0120YES", "yesterday", "no", None, " yes"]
    tokenizer = type("Tokenizer", (), {"__len__": lambda _: len(pieces)})()
    tokenizer.convert_ids_to_tokens = lambda ids: [pieces[i] for i in ids]
    assert spellings(tokenizer, "yes") == (0, 1, 2, 6)
    assert yes_no_tokens(SimpleNamespace(tokenizer=tokenizer)) == {"yes": (0, 1, 2, 6), "no": (4,)}
    with pytest.raises(ValueError, match="no single token of the tokenizer spells 'maybe'"):
        spellings(tokenizer, "maybe")


def test_probabilities_of_words_by_hand():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    found = word_log_probs(logits, {"yes": [0, 1], "no": [2]})
    torch.testing.assert_close(
        {word: x.exp() for word, x in found.items()}, {"yes": logits.new_tensor([0.3]), "no": logits.new_tensor([0.3])}
    )
    assert p_yes({word: float(x) for word, x in found.items()}) == pytest.approx(0.5)
    assert p_yes({"yes": -1.0, "no": -2.0}) == pytest.approx(0.7310585786)
    assert p_yes({"yes": -1e4, "no": 0.0}) == pytest.approx(0) and p_yes({"yes": -1e4, "no": -1e4}) == 0.5


def test_the_first_token_is_noted_once_for_each_question():
    first = FirstWords({"yes": [0], "no": [1]})
    assert first.of(0, 1) is None, "nothing was generated"
    scores = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, -torch.inf], [0.0, -torch.inf]])  # two beams for each question
    assert first(None, scores) is scores
    first(None, -scores)
    assert first.of(0, 2) == pytest.approx({"yes": -0.126928, "no": -2.126928}, abs=1e-5)
    assert first.of(1, 2) == {"yes": 0.0, "no": -1e4}, "JSON has no infinity"
    assert first.of(0, 3) is None, "rows that are no multiple of the questions"


def test_p_yes_is_the_first_tokens():
    model, processor = vlmfix.load("organism")
    picture = SCENES / "test_0001.webp"
    questions = [(picture, f"Is there a {name} in the image?") for name in ("person", "dog")]
    asker = vlmfix.Asker(model, processor)
    p = asker.p_yes(questions)
    inputs = asker.inputs(questions)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    words = yes_no_tokens(processor)
    yes, no = (logits.softmax(-1)[:, list(words[word])].sum(-1) for word in ("yes", "no"))
    assert p == pytest.approx((yes / (yes + no)).tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="beam works on whole answers; it leaves the first token's probabilities"):
        vlmfix.Asker(model, processor, "beam").p_yes(questions)
