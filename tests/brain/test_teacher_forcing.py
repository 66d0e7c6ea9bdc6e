"""Brains that decode token by token are ranked without decoding."""

from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
from speechbrain.decoders.seq2seq import S2SBaseSearcher
from torch import nn

from speechbrain_stablequant.brain.passes import decoding_each_time
from speechbrain_stablequant.brain.recognizer import (
    TeacherForcing,
    compared_outputs,
)


class Searcher(S2SBaseSearcher):
    """Counts how often it decodes."""

    decoded = 0

    def forward(self, states, lengths):
        """One token for each utterance."""
        self.decoded += 1
        return [[7] for _ in states], None, None, None


class Seq2Seq(sb.Brain):
    """Decodes the validation set in every tenth epoch, as some recipes do."""

    reads_tokens = False

    def compute_forward(self, batch, stage):
        """Probabilities of frames and of tokens, lengths, hypotheses."""
        frames = self.modules.enc(batch.sig)
        hyps = None
        if self.hparams.epoch % self.hparams.valid_search_interval == 0:
            hyps, *_ = self.hparams.valid_search(frames, torch.ones(2))
            if self.reads_tokens:
                hyps = [hyp[0] for hyp in hyps]
        return None, frames.log_softmax(-1), torch.ones(2), hyps


@pytest.fixture
def brain():
    searcher = Searcher(0, 1, 0.0, 1.0)
    hparams = {"valid_search": searcher, "epoch": 3}
    return Seq2Seq(
        {"enc": nn.Linear(4, 5)},
        hparams={**hparams, "valid_search_interval": 10},
        run_opts={"device": "cpu"},
    )


BATCH = SimpleNamespace(sig=torch.ones(2, 3, 4))


def test_a_searcher_is_called_but_does_not_decode(brain):
    teacher = TeacherForcing(brain, BATCH)
    assert teacher.autoregressive
    *_, hyps = teacher.recognize(BATCH)
    assert hyps == [[], []]
    assert brain.hparams.valid_search.decoded == 0
    # Afterwards it decodes as before.
    with decoding_each_time(brain):
        *_, hyps = brain.compute_forward(BATCH, sb.Stage.VALID)
    assert hyps == [[7], [7]]
    assert brain.hparams.valid_search_interval == 10


def test_a_recipe_that_reads_the_tokens_decodes(brain, caplog):
    brain.reads_tokens = True
    teacher = TeacherForcing(brain, BATCH)
    assert teacher.autoregressive
    assert "reads what it decodes (list index out of range)" in caplog.text
    *_, hyps = teacher.recognize(BATCH)
    assert hyps == [7, 7]


def test_a_searcher_that_is_never_called(brain):
    brain.compute_forward = lambda batch, stage: batch.sig
    assert not TeacherForcing(brain, BATCH).autoregressive


def test_a_recipe_that_only_decodes(brain, caplog):
    def decode(batch, stage):
        hyps, *_ = brain.hparams.valid_search(batch.sig, torch.ones(2))
        return hyps, torch.ones(2)

    brain.compute_forward = decode
    teacher = TeacherForcing(brain, BATCH)
    assert not teacher.autoregressive
    assert "computes no probabilities" in caplog.text
    assert teacher.recognize(BATCH)[0] == [[7], [7]]


def test_a_broken_recipe_says_so(brain):
    def broken(batch, stage):
        raise KeyError("sig")

    brain.compute_forward = broken
    with pytest.raises(KeyError):
        TeacherForcing(brain, BATCH)


def test_outputs_that_are_compared():
    logits = torch.randn(2, 3, 4, 5)
    output = (None, logits, {"lens": torch.ones(2), "hyps": [[1], [2]]})
    (found,) = compared_outputs(output)
    assert found.shape == (24, 5)
    assert torch.allclose(found.exp().sum(1), torch.ones(24))
    # Anything else stays as it is.
    hidden = torch.randn(2, 3, 4)
    (same,) = compared_outputs([hidden])
    assert torch.equal(same, hidden.view(6, 4))
    # Of what is too large every so many rows.
    large = torch.zeros(1, 3, 2).expand(1 << 10, 1 << 12, 3, 2)
    (found,) = compared_outputs(large)
    assert found.shape == (1 << 22, 2)
