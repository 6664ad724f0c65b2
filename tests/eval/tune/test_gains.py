"""The head tool `gains`: its gradients are those of the object words, and what is not told apart from 0 stays at 1."""

import numpy as np
import pytest
import torch

from vlmfix.engine.wrap import wrapped
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import naming
from vlmfix.eval.tune.gains import Gains
from vlmfix.eval.tune.tool import Subject
from vlmfix.hooks import HeadGain


def test_steps_by_hand():
    """Two captions agree on the first head and not on the second."""
    push, moved = np.array([[[1.0, 1.0]], [[1.0, -1.0]]]), np.ones((2, 1, 2))
    np.testing.assert_allclose(Gains()._gains(push, moved), [[2, 1]])
    np.testing.assert_allclose(Gains(reach=2.0)._gains(-push, moved), [[0.25, 1]])


def test_a_push_is_what_a_little_more_gain_does_to_object_words(organism):
    subject, tool = Subject(*organism, Data.load("calibration", 4)), Gains()
    caption = next(each for each in subject.captions(64) if each.named)
    push, _ = tool._gradients(subject, caption)
    inputs, n_prompt = naming.told(*organism, [caption])
    signs = tool._signs(caption.named, len(caption.tokens))
    assert signs.any()

    def words(gain):
        with torch.no_grad(), wrapped(organism[0], HeadGain(head_list="L5H3", gain=gain)):
            log_probs = organism[0](**inputs, use_cache=False).logits[0, n_prompt - 1 : -1].log_softmax(-1)
        return float((log_probs.gather(1, torch.tensor(caption.tokens)[:, None])[:, 0] * signs).sum())

    slope = (words(1.02) - words(0.98)) / 0.04
    assert push[5, 3] == pytest.approx(slope, rel=0.02, abs=0.01) and abs(slope) > 0.05
