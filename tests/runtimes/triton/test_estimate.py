"""The estimates of ``tests/benchmarks/estimate.py``."""

import os

import estimate
import pytest
import shapes
import torch
from resources import Launch, Resources, count_instructions

from speechbrain_stablequant.runtimes.triton.kernels import matmul

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="interpreted kernels are not compiled",
)


@pytest.mark.parametrize("name", ["hubert-large", "wav2vec2-base"])
def test_operations_are_those_of_the_model(name):
    """Products of every weight, counted from the shapes of the real model."""
    from transformers import (
        HubertConfig,
        HubertModel,
        Wav2Vec2Config,
        Wav2Vec2Model,
    )

    model = shapes.MODELS[name]
    kind, config = (
        (HubertModel, HubertConfig)
        if name == "hubert-large"
        else (Wav2Vec2Model, Wav2Vec2Config)
    )
    with torch.device("meta"):
        real = kind(
            config(
                hidden_size=model.channels,
                intermediate_size=model.inner,
                num_hidden_layers=model.blocks,
                num_attention_heads=model.heads,
                do_stable_layer_norm=model.large,
                feat_extract_norm="layer" if model.large else "group",
            )
        )
    samples, expected = 5 * 16000, 0
    for stage in real.feature_extractor.conv_layers:
        weight, stride = stage.conv.weight, stage.conv.stride[0]
        samples = (samples - weight.shape[2]) // stride + 1
        expected += 2 * 3 * samples * weight.numel()
    for module in (real.feature_projection, real.encoder):
        for part in module.modules():
            if isinstance(part, torch.nn.Linear | torch.nn.Conv1d):
                expected += 2 * 3 * samples * part.weight.numel()
    ops = shapes.operators(name, 5.0, 3)
    found = sum(
        op.integer_ops * op.count for op in ops if "sums" not in op.name
    )
    assert found == expected
    (attention,) = (op for op in ops if op.float_ops)
    assert attention.count * attention.float_ops == (
        4 * 3 * samples**2 * model.channels * model.blocks
    )


def test_bytes_are_each_tensor_once():
    ops = {op.name: op for op in shapes.operators("hubert-large", 10.0, 1)}
    up = ops["up + GELU"]
    assert up.shape == (499, 4096, 1024)
    inputs, weight, output = 499 * 1024, 4096 * 1024, 499 * 4096
    vectors = 2 * 4 * 4096
    assert up.moved_bytes() == inputs + weight + output + vectors
    wide = 2 * (inputs + weight + output) + vectors
    assert up.moved_bytes(integer_size=2) == wide


def test_the_floor_is_the_longer_of_moving_and_computing():
    card = estimate.Card(90, 132, 1000.0, 100.0, 50.0)
    assert card.microseconds(1e6, 1e6, 0) == pytest.approx(1.0)
    assert card.microseconds(1e3, 1e9, 1e9) == pytest.approx(30.0)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [
        (32, 0, 4, 16),  # warps
        (255, 0, 8, 1),  # registers: 256 * 32 * 8 = 65536
        (40, 98304, 4, 2),  # shared memory
    ],
)
def test_occupancy(registers, shared, warps, blocks):
    found = Resources(registers, 0, shared, warps, 0, 0, "")
    launch = Launch(None, (264, 2), {}, {})
    fit = estimate.occupancy(found, launch, estimate.CARDS["H100"])
    assert fit.blocks == blocks
    assert fit.warps == blocks * warps / 64
    assert fit.waves == pytest.approx(528 / 132 / blocks)


def test_instructions_in_and_out_of_loops():
    listing = (
        " /*00*/ MOV R1, R2 ;\n.L_x_1:\n /*10*/ FADD R1, R1, R2 ;\n"
        " /*20*/ @P0 BRA `(.L_x_1) ;\n /*30*/ EXIT ;\n"
    )
    assert count_instructions(listing) == (2, 2)


def test_the_card_decides_the_tile():
    ops = {op.name: op for op in shapes.operators("hubert-large", 10.0, 1)}
    tiles = {
        name: estimate._tile(estimate.choose(ops["conv 2"], card))
        for name, card in estimate.CARDS.items()
    }
    # whole rows of 512 channels do not fit twice into 99 kB
    assert tiles["RTX3090"] != tiles["A100"]


def test_prints_every_operator_as_an_estimate(capsys):
    options = ["--model", "wav2vec2-base", "--seconds", "5", "--batch", "1"]
    estimate.main([*options, "--cards", "H100", "--no-compile"])
    text = capsys.readouterr().out
    assert "Estimates from data sheets; nothing below was measured" in text
    assert "wav2vec2-base, 5 s x 1, H100: estimate" in text
    for op in shapes.operators("wav2vec2-base", 5.0, 1):
        assert f"\n{op.name} " in text
    assert "ideal ratio" in text
    shares = [line for line in text.splitlines() if "%" in line]
    total = sum(float(s.split("%")[0].split()[-1]) for s in shares[:-1])
    assert total == pytest.approx(100, abs=1)


@pytest.mark.parametrize("option", ["--batch", "--seconds"])
def test_sizes_without_a_frame_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        estimate.main([option, "0"])
    assert f"argument {option}: must be at least" in capsys.readouterr().err


def test_compiles_what_it_prints(capsys):
    """One kernel on one card: registers and blocks stand in its line."""
    ops = [
        op
        for op in shapes.operators("wav2vec2-base", 5.0, 1)
        if op.name == "last norm"
    ]
    table = estimate._table("x", ops, "H100", estimate.CARDS["H100"], True)
    lines = list(table)
    numbers = lines[2].split()[-7:]
    registers, _, blocks = map(int, numbers[2:5])
    assert 8 <= registers <= 255
    assert blocks >= 1
    floor, issue = float(lines[2].split()[5]), float(numbers[0])
    longer = float(lines[-1].split()[-1])
    assert longer == pytest.approx(max(floor, issue), abs=0.11)


def test_time_of_instructions():
    """100 once and 10 in each of 8 passes, by 4 warps of 66 blocks."""
    sizes = {"DEPTH": 1000, "BLOCK_K": 128}
    launch = Launch(matmul.matmul_kernel, (66,), sizes, {})
    found = Resources(32, 0, 0, 4, 100, 10, "")
    card = estimate.CARDS["H100"]
    assert card.clock == pytest.approx(1830, abs=1)
    microseconds = 180 * 4 * 66 / (132 * 4 * card.clock)
    found = estimate.issue_microseconds(found, launch, card)
    assert found == pytest.approx(microseconds)
