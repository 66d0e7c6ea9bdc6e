"""What is remembered of a trial, and what is told to the user."""

import sys

import pytest
import torch

from speechbrain_stablequant.runtimes import triton
from speechbrain_stablequant.runtimes.choice import choose_backend
from speechbrain_stablequant.runtimes.triton import build
from speechbrain_stablequant.runtimes.triton.kernels import trial
from speechbrain_stablequant.runtimes.triton.kernels.plain import difference
from speechbrain_stablequant.utils.store import Store

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "expected", "reason"),
    [
        ([1.0, 2.0], [1.0, 2.0], None),
        ([1.0, 2.00001], [1.0, 2.0], None),
        ([1.0, 2.1], [1.0, 2.0], "differs by up to 0.1, where values are up"),
        ([1.0, float("nan")], [1.0, 2.0], "is not finite"),
        ([1.0], [1.0, 2.0], "has shape"),
        ([1], [1.0], "has dtype torch.int64 instead of torch.float32"),
        ([3, 4], [3, 5], None),
        ([3, 3], [3, 5], "1 of 2 integers up to 2 apart"),
        ([4, 4], [3, 5], "2 of 2 integers up to 1 apart"),
    ],
)
def test_difference(found, expected, reason):
    answer = difference(torch.tensor(found), torch.tensor(expected))
    assert answer is None if reason is None else answer.startswith(reason)


@pytest.fixture
def asked(monkeypatch):
    """Counts trials; what they answer can be set."""
    state = {"count": 0, "answer": None}

    def first_failure(_):
        state["count"] += 1
        return state["answer"]

    monkeypatch.setattr(trial, "first_failure", first_failure)
    return state


def store(folder) -> Store:
    """As of another process."""
    return Store(folder, private=True)


def test_a_card_that_passed_is_not_tried_again(asked, tmp_path):
    folder = tmp_path / "new"
    for _ in range(2):
        assert trial.failure_on_card(CPU, "a card", store(folder)) is None
    assert asked["count"] == 1
    assert trial.failure_on_card(CPU, "b/card", store(folder)) is None
    assert asked["count"] == 2
    files = sorted(file.name for file in folder.iterdir())
    assert files == ["a_card-passed.json", "b_card-passed.json"]
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("changed", ["kernels", "driver", "triton"])
def test_other_kernels_are_tried_again(asked, tmp_path, changed, monkeypatch):
    trial.failure_on_card(CPU, "card", store(tmp_path))
    version = {**trial._version(), changed: "others"}
    monkeypatch.setattr(trial, "_version", lambda: version)
    trial.failure_on_card(CPU, "card", store(tmp_path))
    assert asked["count"] == 2


def test_a_failure_is_not_remembered(asked, tmp_path):
    asked["answer"] = "operator linear: the result is not finite"
    for _ in range(2):
        found = trial.failure_on_card(CPU, "card", store(tmp_path))
        assert found == asked["answer"]
    assert asked["count"] == 2
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(asked, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    memory = store(tmp_path / "file")
    for _ in range(2):
        assert trial.failure_on_card(CPU, "card", memory) is None
    # Another process tries again, this one does not.
    assert asked["count"] == 1
    said = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 1 and "it is no folder" in said[0]
    assert trial.failure_on_card(CPU, "card", store(tmp_path / "file")) is None
    assert asked["count"] == 2


def test_a_card_that_fails_is_not_used(
    asked, pretended_card, monkeypatch, tmp_path, caplog
):
    """Explicitly: an error. By ``auto``: simulation, and why."""
    pretended_card("a new card", (9, 0))
    monkeypatch.setattr(build, "machine_store", lambda _: store(tmp_path))
    asked["answer"] = "operator linear: the result is not finite"
    reason = r"linear: the result is not finite \(tried on a new card\); use"
    with pytest.raises(ValueError, match=reason):
        choose_backend("triton", "cuda")
    assert choose_backend("auto", "cuda")[0] == "torch"
    assert "quantization is simulated" in caplog.text
    assert "result is not finite" in caplog.text
    assert asked["count"] == 1


def test_an_early_triton_is_not_used(pretended_card, monkeypatch, caplog):
    pretended_card("a card", (9, 0))
    monkeypatch.setattr(build, "MIN_TRITON", (3, 6))
    monkeypatch.setattr(build.triton, "__version__", "3.4.0")
    assert choose_backend("auto", "cuda")[0] == "torch"
    assert "triton 3.4.0 is too old: its kernels need more" in caplog.text


def test_a_triton_that_does_not_load_is_not_used(
    pretended_card, monkeypatch, caplog
):
    pretended_card("a card", (9, 0))
    monkeypatch.delattr(triton, "build")
    monkeypatch.setitem(sys.modules, f"{triton.__name__}.build", None)
    assert choose_backend("auto", "cuda")[0] == "torch"
    assert "triton: it does not load (" in caplog.text
    with pytest.raises(ValueError, match="triton cannot run: it does not load"):
        choose_backend("triton", "cuda")
