"""AdaRound and StableQuant-plus in an unedited recipe, and their folders."""

import json
from pathlib import Path

import pytest
from trained_recipe import (
    ONE_SET,
    check_holds_plan,
    check_integers_near_simulation,
    probe_size,
)

BLOCK = """
quantize: !apply:speechbrain_stablequant.register
    target: [wav2vec2, enc, ctc_lin]
    weight_bits: 4
    activation_bits: 6
    calibration: {num_utterances: 4}
    search: {num_utterances: 4, cutoffs: [100, 99]}
    adaround: {iterations: 20, lr: 0.1}
    plus: {strengths: [0.5]}
    output_folder: !ref <output_folder>/quantized
"""
VARIANTS = """\
    variants:
        - {name: ada, method: adaround}
        - {name: plus, method: stablequant_plus, plus: {asymmetric: True}}
        - name: mixed
          method: stablequant_plus
          plus:
              equalize: False
              cutoffs: none
              budget: {size: 0.45, bits: [4, 16]}
"""


@pytest.fixture(scope="module")
def written(trained) -> Path:
    """The folder of a run of all of them."""
    output = trained.root / "methods"
    finished = trained.run(output, *ONE_SET, block=BLOCK + VARIANTS)
    assert finished.code == 0, finished.out + finished.err
    return output / "quantized"


def test_comparison(written):
    table = json.loads((written / "comparison.json").read_text("utf-8"))
    rows = {row["variant"]: row for row in table["rows"]}
    assert set(rows) == {"ada", "plus", "mixed"}
    for name, row in rows.items():
        size = (written / name / "model/model.safetensors").stat().st_size
        assert row["size_mb"] == size / 1e6
        # The probe has one size, and this model is smaller than it.
        model = size - probe_size(written / name)
        assert 0 < model / 1e6 < table["float_mb"]
        assert row["effort"]["seconds"] > 0
    # AdaRound measures nothing; the others decide without transcripts.
    assert rows["ada"]["effort"]["utterances"] == {"calibration": 4}
    sets = {"calibration": 4, "search": 4}
    assert rows["plus"]["effort"]["utterances"] == sets
    assert rows["plus"]["effort"]["transcribed"] == []
    picture = (written / "comparison_clean.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    text = (written / "comparison.md").read_text("utf-8")
    assert "| MB |" in text


@pytest.mark.parametrize("name", ["ada", "plus", "mixed"])
def test_folder_holds_what_the_plan_decided(written, name):
    assert (written / name / "plan.safetensors").exists()
    check_holds_plan(written / name)


def test_folder_recognizes(trained, written):
    audio = min((trained.root / "corpus").glob("clean-*.wav"))
    check_integers_near_simulation(written / "plus", audio)


def test_the_plan_is_used_again(trained, written, tmp_path):
    plan = written / "plus" / "plan.json"
    output = tmp_path / "again"
    block = BLOCK + f"    plan: {plan}\n"
    finished = trained.run(output, *ONE_SET, block=block)
    assert finished.code == 0, finished.out + finished.err
    names = ("plan.safetensors", "wer_clean.txt", "model/model.safetensors")
    for name in names:
        one = (output / "quantized" / name).read_bytes()
        two = (written / "plus" / name).read_bytes()
        assert len(one) == len(two)
        if name != "model/model.safetensors":  # its header is in any order
            assert one == two
    damaged = tmp_path / "plan.json"
    damaged.write_bytes(plan.read_bytes())
    block = BLOCK + f"    plan: {damaged}\n"
    finished = trained.run(tmp_path / "no", *ONE_SET, block=block)
    assert finished.code != 0
    said = finished.out + finished.err
    assert "plan.safetensors: cannot read the tensors" in said
