"""The Whisper recipe on a tiny random checkpoint, made here."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_whisper import save_whisper

ASR = Path(__file__).resolve().parents[2] / "recipes/LibriSpeech/ASR"
WHISPER = ASR / "whisper"
DEMO = ASR / "CTC/demo/LibriSpeech"
BLOCK = {
    "calibration": {"num_utterances": 2},
    "search": {"num_utterances": 2, "max_float_wer": 10000, "cutoffs": [99.9]},
    "backend": "torch",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    save_whisper(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Three utterances of each split of the demo."""
    root = tmp_path_factory.mktemp("corpus")
    for split in ("dev-demo", "test-demo"):
        source = sorted((DEMO / split).glob("*/*/*.trans.txt"))[0]
        folder = root / source.parent.relative_to(DEMO)
        folder.mkdir(parents=True)
        lines = source.read_text(encoding="utf-8").splitlines()[:3]
        text = "\n".join(lines)
        (folder / source.name).write_text(f"{text}\n", encoding="utf-8")
        for line in lines:
            shutil.copy(source.parent / f"{line.split()[0]}.flac", folder)
    return root


@pytest.mark.parametrize(
    ("beam", "method"),
    [
        pytest.param(1, "stablequant_plus", marks=pytest.mark.slow),
        (2, "max"),
    ],
)
def test_whisper(run, corpus, checkpoint, tmp_path, beam, method):
    finished = run(
        tmp_path,
        "--data_folder",
        corpus,
        "--whisper_hub",
        checkpoint,
        "--dev_splits=[dev-demo]",
        "--test_splits=[test-demo]",
        f"--test_beam_size={beam}",
        f"--quantize={json.dumps({**BLOCK, 'method': method})}",
        "--max_decode_ratio=0.01",
        hparams="hparams/quant_whisper.yaml",
        recipe=WHISPER,
    )
    assert finished.code == 0, finished.err[-3000:]
    folder = tmp_path / "quantized"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    row = report["test"]["test-demo"]
    rates = {each["rate"] for each in row["metrics"].values()}
    assert rates == {"WER", "CER"}
    # The normalizer writes what was said in lower case.
    stored = json.loads(
        (folder / "transcripts_test-demo.json").read_text(encoding="utf-8")
    )
    texts = [row["reference"] for row in stored["content"]["transcripts"]]
    assert len(texts) == row["float"]["utterances"]
    assert all(text == text.lower() for text in texts)
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    names = [layer["name"] for layer in plan["layers"]]
    for part in (
        "encoder.conv1",
        "encoder.layers.1.fc2",
        "decoder.layers.1.fc2",
        "decoder.output_projection",
    ):
        assert f"whisper.model.{part}" in names
    assert (plan["method"], report["method"]) == (method, method)
    if method == "stablequant_plus":
        assert plan["search"]["rule"] == "divergence"
    assert (tmp_path / "wer_test-demo.txt").is_file()
