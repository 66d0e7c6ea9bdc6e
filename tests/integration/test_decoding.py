"""Recipes that decode, or were transcribed, otherwise than their folder."""

import csv
import json
from pathlib import Path

import pytest
from speechbrain.inference.ASR import EncoderASR

SCRIPT = Path(__file__).resolve().with_name("decoding_recipe.py")
BLOCK = """
quantize: !apply:speechbrain_stablequant.register
    method: max
    calibration: {num_utterances: 2}
    backend: torch_int8
    output_folder: !ref <output_folder>/quantized
"""


@pytest.fixture(scope="module")
def run(trained):
    """Evaluates the trained recipe in a variation."""

    def run(variation: str, block: str = BLOCK):
        output = trained.root / f"decoding-{variation}"
        arguments = trained.test_arguments(output, block=block)
        finished = trained.starter.run(
            SCRIPT, *arguments, cwd=trained.root, VARIATION=variation
        )
        return finished, output / "quantized"

    return run


def read(folder: Path, name: str = "report.json") -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def first(log: str, words: str) -> int:
    """Where a log says something."""
    assert words in log, log[-3000:]
    return log.index(words)


def test_underscores_become_spaces(trained, run):
    """As in MEDIA's recipe; the folder writes words."""
    finished, folder = run("underscore")
    assert finished.code == 0, finished.out[-3000:]
    report = read(folder)
    assert report["test"]["clean"]["float"]["WER"] < 50
    # The folder decodes as the recipe does, and needs no rates of its own.
    assert not any("decodes differently" in w for w in report["warnings"])
    assert all("folder" not in row for row in report["test"].values())
    asr = EncoderASR.from_hparams(
        source=str(folder / "model"), overrides={"backend": "torch_int8"}
    )
    with open(trained.root / "corpus/clean.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    heard = [
        asr.transcribe_file(str(trained.root / f"corpus/{row['ID']}.wav"))
        for row in rows
    ]
    assert not any("_" in text for text in heard)
    words = [row["wrd"].split() for row in rows]
    assert (
        sum(
            text.split() == said
            for text, said in zip(heard, words, strict=True)
        )
        >= 2
    )


def test_another_decoder_is_said_at_once(run):
    """And the folder's own WER stands beside the recipe's."""
    finished, folder = run("shortened")
    assert finished.code == 0, finished.out[-3000:]
    said = first(
        finished.out, "The recipe decodes differently from its inference"
    )
    # Before the float model has been evaluated.
    assert said < first(finished.out, "test WER")
    report = read(folder)
    (warning,) = (w for w in report["warnings"] if "decodes differently" in w)
    assert f"{warning} For example, utterance " in finished.out
    # It is published with the model.
    assert "utterance" not in warning
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert warning in " ".join(card.split())
    content = read(folder, "transcripts_clean.json")["content"]
    for row in content["transcripts"]:
        assert row["id"] not in card
        # As warnings quote; a single letter is in every card.
        assert repr(row["hypothesis"]) not in card
    for row in report["test"].values():
        assert row["folder"]["float"]["words"] == row["float"]["words"]
    # What the model hears in noise depends on how the CPU rounded in training.
    row = report["test"]["clean"]
    assert row["folder"]["float"]["WER"] < row["float"]["WER"] - 10
    assert row["folder"]["quantized"]["WER"] < row["quantized"]["WER"] - 10
    assert "folder's WER %" in finished.out


def test_transcripts_in_capitals_are_an_error(run):
    """Before the float evaluation even begins."""
    finished, folder = run("capitals")
    assert finished.code == 1
    line = finished.err.splitlines()[-1]
    begin = "stablequant: quantize: the test set: utterance clean-0"
    assert line.startswith(begin)
    assert "no label of the recipe's tokenizer yields" in line
    assert "test WER" not in finished.out
    assert not (folder / "histograms.json").exists()


@pytest.mark.slow
def test_silence_and_another_activation(run):
    """One empty reference ends nothing; ReLU for GELU is no folder."""
    automatic = BLOCK.replace("backend: torch_int8", "backend: auto")
    finished, folder = run("silence,relu", automatic)
    assert finished.code == 0, finished.out[-3000:]
    report = read(folder)
    row = report["test"]["clean"]
    assert row["float"]["utterances"] == 4
    # The words of three utterances.
    assert 0 < row["float"]["words"] < 10
    assert row["float"]["insertions"] > 0
    assert row["delta_wer_ci"] is not None
    # No runtime knows this encoder: its own code is captured or executed.
    assert report["backend"] == "openvino"
    words = "No inference folder (EncoderASR cannot load it): 'wav2vec2.model."
    (warning,) = (w for w in report["warnings"] if w.startswith(words))
    assert first(finished.out, warning) < first(finished.out, "test WER")
    assert not (folder / "model/hyperparams.yaml").exists()
