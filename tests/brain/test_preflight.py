"""What is said about the runtime that a variant gets."""

from types import SimpleNamespace

import pytest
import torch
from speechbrain.dataio.encoder import CTCTextEncoder
from torch import nn

from speechbrain_stablequant import QuantizeConfig
from speechbrain_stablequant.brain.coverage import check_references
from speechbrain_stablequant.brain.metrics import Row
from speechbrain_stablequant.brain.run_runtime import choose_runtime
from speechbrain_stablequant.config import ConfigError
from speechbrain_stablequant.methods.search import check_float_wer
from speechbrain_stablequant.runtimes import choice

FAILURE = "operator linear fails: no (tried on a card); use backend: torch"


def choose(device: str, **block):
    """The runtime of a Brain on a device, and what is to be said."""
    modules = nn.ModuleDict({"enc": nn.Linear(2, 2)})
    brain = SimpleNamespace(device=device, modules=modules)
    config = QuantizeConfig.from_dict({"target": ["enc"], **block})
    return choose_runtime(brain, config)


@pytest.fixture
def failing_card(monkeypatch):
    """A GPU whose kernels failed their trial."""
    monkeypatch.setattr(choice, "_why_not", lambda *_: FAILURE)


def test_a_card_that_fails_is_in_the_report(failing_card):
    said = "operator linear fails: no (tried on a card)."
    assert choose("cuda:0") == (
        "torch",
        [f"Evaluated by simulation: triton: {said}"],
    )


def test_a_card_that_fails_is_an_error_where_it_was_asked_for(failing_card):
    with pytest.raises(ConfigError, match=r"quantize\.backend: triton cannot"):
        choose("cuda:0", backend="triton")


def test_a_device_without_an_integer_runtime():
    name, warnings = choose(str(torch.device("meta")))
    assert name == "torch"
    assert warnings == [
        "Evaluated by simulation: no integer runtime for device meta."
    ]


def test_a_simulation_that_was_asked_for_needs_no_word():
    assert choose("cpu", backend="torch") == ("torch", [])


# -- the float model ---------------------------------------------------------


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
    assert warning.startswith("Of the words of test set 'clean' 4 of 5 cannot")


def test_a_few_words_that_labels_cannot_write_are_a_warning():
    warning = check_references(rows("A B", "C d"), capitals(), "dev", 90.0)
    assert "1 of 4 cannot be recognized: utterance u1 has 'd'" in warning
    assert check_references(rows("A B"), capitals(), "dev", 90.0) is None
    assert check_references(rows("a b"), None, "dev", 90.0) is None


def test_a_float_model_that_recognizes_nothing():
    check_float_wer(90.0, "the search set", 90.0)
    with pytest.raises(ValueError, match=r"is 90\.10 %, above .*max_float_wer"):
        check_float_wer(90.1, "the search set", 90.0)
    check_float_wer(250.0, "the search set", float("inf"))
