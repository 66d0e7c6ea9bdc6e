"""Log probabilities of references in one pass, as token by token."""

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from small_recipes import CONFORMER, CRDNN_RECIPE, FEATURES
from speechbrain.decoders.seq2seq import (
    S2SRNNBeamSearcher,
    S2SRNNGreedySearcher,
    S2STransformerBeamSearcher,
    S2STransformerGreedySearcher,
)

from speechbrain_stablequant.brain.pretrained_brain import (
    padded,
    teacher_forced,
)

RATIOS = {"min_decode_ratio": 0.0, "max_decode_ratio": 1.0}
MARKS = {"bos_index": 1, "eos_index": 2, **RATIOS}


def transformer(kind, **options):
    """A searcher around a Transformer; the width of its encoder's output."""
    text = CONFORMER.replace("decoder_layers: 0", "decoder_layers: 1")
    made = load_hyperpyyaml(FEATURES + text)
    modules = [made["Transformer"], made["ctc_lin"]]
    return kind(modules, **MARKS, **options).eval(), 48


def recurrent(kind, **options):
    """The same around a recurrent decoder."""
    made = load_hyperpyyaml(FEATURES + CRDNN_RECIPE)
    parts = made["emb"], made["dec"], made["seq_lin"]
    return kind(*parts, **MARKS, **options).eval(), 32


@pytest.mark.parametrize(
    ("make", "kind", "options"),
    [
        (transformer, S2STransformerGreedySearcher, {}),
        (transformer, S2STransformerBeamSearcher, {"beam_size": 2}),
        (recurrent, S2SRNNGreedySearcher, {}),
        (recurrent, S2SRNNBeamSearcher, {"beam_size": 2}),
    ],
)
@torch.no_grad()
def test_one_pass_is_step_by_step(make, kind, options):
    searcher, width = make(kind, **options)
    encoded, lengths = torch.randn(2, 20, width), torch.tensor([1.0, 0.6])
    rows = [[5, 7, 9, 4], [8, 3, 6]]
    found = teacher_forced(searcher, encoded, lengths, rows)
    assert found.shape == (2, 5, 24)
    frames = (lengths * 20).round().int()
    memory = searcher.reset_mem(2, "cpu")
    inputs, _ = padded([[1, *row] for row in rows], 2)
    for number, tokens in enumerate(inputs.T):
        step, memory, _ = searcher.forward_step(tokens, memory, encoded, frames)
        expected = step.log_softmax(-1)
        count = 2 if number < 4 else 1
        assert torch.allclose(
            found[:count, number], expected[:count], atol=1e-4
        )


def test_padded():
    tokens, parts = padded([[3, 4], [], [5]], 9)
    assert tokens.tolist() == [[3, 4], [9, 9], [5, 9]]
    assert parts.tolist() == [1.0, 0.0, 0.5]
    assert padded([[]], 0)[0].shape == (1, 1)
