"""Which numbers the recipe's train_logger gets."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from speechbrain.utils.train_logger import FileTrainLogger, TrainLogger

from speechbrain_stablequant.brain.loggers import log_results, log_search
from speechbrain_stablequant.core.error_rates import Transcript
from speechbrain_stablequant.methods.search.score import Score
from speechbrain_stablequant.report.results import Evaluation, SetResult, Turns


class Recorder(TrainLogger):
    """As TensorBoard's: whatever is logged is a number."""

    def __init__(self):
        self.rows = []

    def log_stats(self, stats_meta, verbose=False, **stats):
        (part,) = stats.values()
        assert all(
            float(x) >= 0 for x in [*stats_meta.values(), *part.values()]
        )
        self.rows.append((stats_meta, stats))


def brain_with(train_logger):
    return SimpleNamespace(hparams=SimpleNamespace(train_logger=train_logger))


def evaluation(text, turns=None):
    return Evaluation([Transcript("a", "ONE TWO", text)], turns=turns)


@pytest.mark.parametrize("simulated", [False, True])
def test_results(simulated):
    recorder = Recorder()
    turns = None if simulated else Turns([4.0], [2.0], [10.0])
    result = SetResult(evaluation("ONE TWO"), evaluation("ONE", turns))
    run = SimpleNamespace(
        brain=brain_with(recorder),
        name="w8",
        results={"clean": result},
        plan=SimpleNamespace(weight_bits=8, activation_bits=6),
        execution=lambda: SimpleNamespace(simulated=simulated, size=2_000_000),
    )
    log_results(run, "clean")
    ((meta, stats),) = recorder.rows
    assert list(meta.values()) == [8, 6]
    expected = {
        "clean w8 float WER": 0.0,
        "clean w8 quantized WER": 50.0,
        "clean w8 quantized MB": 2.0,
    }
    if not simulated:
        expected["clean w8 float real-time factor"] = 0.4
        expected["clean w8 quantized real-time factor"] = 0.2
    assert stats == {"test_stats": expected}


def test_search_and_a_disk_that_is_full(tmp_path, caplog):
    file = tmp_path / "log.txt"
    log_search(brain_with(FileTrainLogger(str(file))), 3, Score(1, 4, 0.5))
    assert file.read_text() == (
        "quantize evaluation: 3 - valid search WER: 25.00\n"
    )
    # A folder cannot be written.
    log_search(brain_with(FileTrainLogger(str(tmp_path))), 4, Score(1, 4, 0.5))
    assert "train_logger: " in caplog.text
    # Recipes without one, or with one of their own kind.
    log_search(brain_with(None), 1, Score(1, 4, 0.5))


def test_speechbrains_loggers_are_not_imported():
    """Their import warns where torchvision is not installed."""
    code = (
        "import sys, speechbrain_stablequant\n"
        "speechbrain_stablequant.quantize_pretrained\n"
        "assert 'speechbrain.utils.train_logger' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "torchvision" not in done.stderr
