"""A Brain that counts phonemes and characters instead of words."""

import json

from speechbrain.utils.metric_stats import ErrorRateStats
from test_bad_input import Recognizer, corpus, data_set, tiny_modules

from speechbrain_stablequant import StableQuant

__all__ = ["corpus"]


class PhonemeRecognizer(Recognizer):
    """Metrics with names of its own, as TIMIT's and CommonVoice's recipes."""

    def on_stage_start(self, stage, epoch=None):
        """New statistics."""
        self.per_metrics = ErrorRateStats()
        self.others = {"cer": ErrorRateStats(split_tokens=True)}

    def compute_objectives(self, predictions, batch, stage):
        """Two phonemes for each utterance, of which the first may be right."""
        said = [[f"w{row.sum(0).argmax()}", "sil"] for row in predictions]
        for metric in (self.per_metrics, self.others["cer"]):
            metric.append(batch.id, said, [[w, "aa"] for w in batch.wrd])
        return predictions.square().mean()


def test_phonemes_decide_and_all_rates_are_reported(corpus, tmp_path, capsys):
    brain = PhonemeRecognizer(
        tiny_modules(),
        hparams={"output_folder": str(tmp_path / "out")},
        run_opts={"device": "cpu", "noprogressbar": True},
    )
    StableQuant.attach(
        brain,
        data_set(corpus),
        backend="torch",
        search={"max_float_wer": 200.0, "cutoffs": [100.0, 99.0]},
    )
    brain.evaluate(data_set(corpus))
    assert "  PER %" in capsys.readouterr().out
    text = (tmp_path / "out/quantized/report.json").read_text(encoding="utf-8")
    (row,) = json.loads(text)["test"].values()
    assert row["rate"] == "PER"
    rates = {name: each["rate"] for name, each in row["metrics"].items()}
    assert rates == {"per_metrics": "PER", "others.cer": "CER"}
    for model in ("float", "quantized"):
        assert row["metrics"]["per_metrics"][model] == row[model]["WER"]
        assert row[model]["WER"] in (50.0, 100.0)
        assert 0 < row["metrics"]["others.cer"][model] < 100
