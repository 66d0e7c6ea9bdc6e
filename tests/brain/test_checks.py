"""What is checked before a search."""

import pytest
import speechbrain as sb
import torch
from speechbrain.dataio.encoder import CTCTextEncoder
from torch import nn

from speechbrain_stablequant import StableQuant
from speechbrain_stablequant.brain.checks import RecipeChecks, check_references
from speechbrain_stablequant.brain.metrics import Row
from speechbrain_stablequant.config import ConfigError
from speechbrain_stablequant.methods.search.score import check_float_wer


def test_the_variant_that_trains_is_named(tmp_path):
    brain = sb.Brain({"enc": nn.Linear(2, 2)}, run_opts={"device": "cpu"})
    variants = [{"name": "a"}, {"name": "b", "method": "qat"}]
    with pytest.raises(ConfigError, match=r"^quantize.method: qat trains, and"):
        StableQuant.attach(
            brain,
            train_set=[],
            target=["enc"],
            backend="torch",
            output_folder=str(tmp_path),
            variants=variants,
        )


class OfTwoLosses(sb.Brain):
    def compute_forward(self, batch, stage):
        encoded = self.modules.enc(batch)
        if stage == sb.Stage.TRAIN:
            return encoded, self.modules.ctc_lin(encoded)
        return encoded


def test_layers_of_the_training_alone_are_left_out(tmp_path, caplog):
    modules = {"enc": nn.Linear(2, 2), "ctc_lin": nn.Linear(2, 2)}
    brain = OfTwoLosses(modules, run_opts={"device": "cpu"})
    quantizer = StableQuant.attach(
        brain,
        target=["enc", "ctc_lin"],
        backend="torch",
        output_folder=str(tmp_path),
    )
    checks = RecipeChecks(brain, quantizer.config, quantizer.runs)
    checks.leave_out_idle(torch.ones(1, 2))
    (run,) = quantizer.runs
    assert [layer.name for layer in run.layers] == ["enc"]
    said = (
        "Not quantized, since the recipe never calls them to recognize: "
        "ctc_lin."
    )
    assert run.warnings[-1] == said
    assert said in caplog.text


# -- the transcripts -----------------------------------------------------------


def capitals() -> CTCTextEncoder:
    """Labels in capitals."""
    encoder = CTCTextEncoder()
    encoder.update_from_iterable("ABC ", sequence_input=False)
    return encoder


def rows(*references: str) -> list[Row]:
    """Utterances in which something was recognized."""
    return [
        Row(f"u{i}", (*r.split(),), ("A",)) for i, r in enumerate(references)
    ]


def test_transcripts_in_another_case_are_an_error():
    said = rows("A b", "c a", "a")
    with pytest.raises(ValueError) as caught:
        check_references(said, capitals(), "test set 'clean'", 90.0)
    text = str(caught.value)
    assert "\n" not in text
    for words in (
        "quantize: test set 'clean': utterance u0 has 'b', which no label",
        "4 of 5 words",
        "quantize.search.max_float_wer to 100",
    ):
        assert words in text, text
    warning = check_references(said, capitals(), "test set 'clean'", 100.0)
    assert warning.text.startswith(
        "Of the words of test set 'clean' 4 of 5 cannot"
    )


def test_a_few_words_that_labels_cannot_write_are_a_warning():
    warning = check_references(rows("A B", "C d"), capitals(), "dev", 90.0)
    assert "1 of 4 cannot be recognized" in warning.text
    assert "utterance u1 has 'd'" in warning.example
    assert check_references(rows("A B"), capitals(), "dev", 90.0) is None
    assert check_references(rows("a b"), None, "dev", 90.0) is None


def test_a_float_model_that_recognizes_nothing():
    check_float_wer(90.0, "the search set", 90.0)
    with pytest.raises(ValueError, match=r"is 90\.10 %, above .*max_float_wer"):
        check_float_wer(90.1, "the search set", 90.0)
    check_float_wer(250.0, "the search set", float("inf"))
