"""Which pass is this? A table of what is seen of a pass, and what it then is."""

import pytest
import torch

from vlmfix.engine.passes import Seen, image_columns, valid_columns, which_pass
from vlmfix.engine.state import Generation
from vlmfix.model.geometry import Geometry


def generation():
    return Generation(Geometry.empty(1, torch.device("cpu")), [], frozenset())


NEW, MINE, THEIRS = generation(), generation(), generation()
"""A generation that begins, the one that this call of `generate` has begun, and the one that filled a cache."""

CASES = {
    # a loop by hand
    "a prompt, no cache": (Seen(7), (NEW, 0, 7, True, True, 7)),
    "a prompt into an empty cache": (Seen(7, cached=0), (NEW, 0, 7, True, True, 7)),
    "one row without a cache is a prompt, too": (Seen(1), (NEW, 0, 1, True, True, 1)),
    "a new token": (Seen(1, cached=7, of_cache=THEIRS), (THEIRS, 7, 0, True, False, 0)),
    "a further piece or turn": (Seen(4, cached=7, of_cache=THEIRS), (THEIRS, 7, 4, True, False, 4)),
    "an empty cache of before begins anew": (Seen(7, cached=0, of_cache=THEIRS), (NEW, 0, 7, True, True, 7)),
    # inside `generate`
    "prefill": (Seen(7, cached=0, prompt_end=7, columns=7), (NEW, 0, 7, True, True, 7)),
    "prefill of embeddings": (Seen(7, cached=0, prompt_end=7), (NEW, 0, 7, True, True, 7)),
    "prefill that holds some of the answer": (Seen(9, cached=0, prompt_end=7, columns=9), (NEW, 0, 7, True, True, 7)),
    "a token": (Seen(1, cached=7, prompt_end=7, columns=7, under_way=MINE), (MINE, 7, 0, True, False, 0)),
    "tokens that an assistant proposes": (
        Seen(4, cached=9, prompt_end=7, columns=7, under_way=MINE), (MINE, 9, 0, True, False, 0),
    ),
    "without a cache, all again": (Seen(9, prompt_end=7, columns=7, under_way=MINE), (MINE, 0, 7, True, False, 7)),
    "a candidate with a cache of its own": (
        Seen(7, cached=0, prompt_end=7, columns=7, under_way=MINE), (NEW, 0, 7, True, True, 7),
    ),
    "a further turn on a returned cache": (
        Seen(3, cached=9, prompt_end=12, columns=12, of_cache=THEIRS), (THEIRS, 9, 3, True, False, 3),
    ),
    "an answer that goes on from a returned cache": (
        Seen(1, cached=9, prompt_end=7, columns=10, of_cache=THEIRS), (THEIRS, 9, 0, True, False, 0),
    ),
    "a token after that belongs to the call": (
        Seen(1, cached=12, prompt_end=12, columns=12, under_way=MINE, of_cache=THEIRS), (MINE, 12, 0, True, False, 0),
    ),
    # in pieces
    "first piece": (Seen(5, cached=0, prompt_end=12, columns=12), (NEW, 0, 5, False, True, 12)),
    "second piece": (Seen(5, cached=5, prompt_end=12, columns=12, under_way=MINE), (MINE, 5, 5, False, False, 7)),
    "last piece": (Seen(2, cached=10, prompt_end=12, columns=12, under_way=MINE), (MINE, 10, 2, True, False, 2)),
    "a piece of embeddings": (Seen(5, cached=0, prompt_end=12), (NEW, 0, 5, False, True, 12)),
    "a prefix that questions go on from": (Seen(7, cached=0, prompt_end=8, columns=7), (NEW, 0, 7, False, True, 7)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_which_pass(case):
    seen, (belongs_to, start, n_prompt, ends, begins, n_known) = CASES[case]
    this_pass = which_pass(seen, begun=lambda: NEW)
    assert this_pass.generation is belongs_to
    assert (this_pass.start, this_pass.n_rows, this_pass.n_prompt) == (start, seen.n_rows, n_prompt)
    assert (this_pass.ends, this_pass.begins, this_pass.n_known) == (ends, begins, n_known)


@pytest.mark.parametrize("prompt_end", [None, 7])
def test_a_cache_of_nobody_is_refused(prompt_end):
    with pytest.raises(ValueError, match="cache holds 7 tokens that were computed without these interventions"):
        which_pass(Seen(1, cached=7, prompt_end=prompt_end), begun=lambda: NEW)


class Parts:
    """Of a model whose image token is 9."""

    image_token_ids = (9,)
    image_mask_argument = "image_embeds_position_mask"


IDS = torch.tensor([[1, 9, 9, 4], [1, 2, 9, 4]])
IMAGE = IDS == 9


@pytest.mark.parametrize(
    ("inputs", "image_mask", "image"),
    [
        ({"input_ids": IDS}, None, IMAGE),
        ({"input_ids": IDS, "image_embeds_position_mask": IDS == 4}, None, IDS == 4),
        ({"input_ids": IDS}, IDS == 1, IDS == 1),
        ({"inputs_embeds": IDS[..., None].float()}, IMAGE, IMAGE),
        ({"input_ids": IDS}, IMAGE[:1], IMAGE[:1].expand(2, -1)),
    ],
    ids=["by ids", "as the model is told", "as the caller says", "of embeddings", "beams share a row"],
)
def test_where_the_image_is(inputs, image_mask, image):
    assert torch.equal(image_columns(Parts, inputs, IDS, 0, 4, image_mask), image)


def test_an_image_that_nothing_tells_is_refused():
    embeds = {"inputs_embeds": IDS[..., None].float(), "input_ids": None}
    with pytest.raises(ValueError, match="give image_mask, bool of shape"):
        image_columns(Parts, embeds, IDS, 0, 4, None)
    with pytest.raises(ValueError, match=r"expected bool of shape \(2, 6\), got \(2, 4\)"):
        image_columns(Parts, embeds, IDS, 2, 4, IMAGE)


VALID = torch.tensor([[False, True, True, True], [True, True, True, True]])


@pytest.mark.parametrize(
    ("mask", "valid"),
    [
        (None, torch.ones(2, 4, dtype=torch.bool)),
        (VALID.long(), VALID),
        (VALID[:, None, None].expand(-1, 1, 4, -1), VALID),
        (torch.zeros(2, 1, 1, 4).masked_fill(~VALID[:, None, None], torch.finfo(torch.float32).min), VALID),
        ({"sliding_attention": None, "full_attention": VALID.long()}, VALID),
        (object(), torch.ones(2, 4, dtype=torch.bool)),
    ],
    ids=["none", "two-dimensional", "boolean", "added", "by kind of layer", "of another kind"],
)
def test_what_is_padding(mask, valid):
    assert torch.equal(valid_columns(mask, IMAGE, 0), valid)
    if isinstance(mask, torch.Tensor):
        assert torch.equal(valid_columns(mask, IMAGE[:, 2:], 2), valid[:, 2:])
