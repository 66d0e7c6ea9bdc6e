"""One recognizer, many threads: each gets the answer to its own input."""

import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_folder
import torch

from speechbrain_stablequant.folder import recognizer as recognizer_module

INPUTS = range(6)


@pytest.fixture(scope="module")
def folder(make_tiny_modules, tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("threads") / "quantized"
    tiny_folder.write(folder, make_tiny_modules("wav2vec2-large"))
    return folder


@pytest.fixture(scope="module")
def answers(folder):
    """What one thread gets, by runtime and input."""
    made = {}

    def of(backend):
        if backend not in made:
            recognizer = tiny_folder.load(folder, backend)
            made[backend] = [recognizer(tiny_folder.wave(i)) for i in INPUTS]
        return made[backend]

    return of


def wrong(recognizers, expected, threads, calls) -> list[int]:
    """Inputs whose answer was another than expected; all threads begin at
    once, and each has the inputs in an order of its own."""
    start = threading.Barrier(threads)

    def work(number):
        order = random.Random(number).choices(INPUTS, k=calls)
        start.wait()
        return [
            i
            for place, i in enumerate(order)
            if not torch.equal(
                recognizers[(number + place) % len(recognizers)](
                    tiny_folder.wave(i)
                ),
                expected[i],
            )
        ]

    with ThreadPoolExecutor(threads) as pool:
        return [i for found in pool.map(work, range(threads)) for i in found]


@pytest.mark.parametrize("backend", tiny_folder.BACKENDS)
@pytest.mark.parametrize("threads", [4, 16])
def test_cold_and_warm(folder, answers, backend, threads):
    expected = answers(backend)
    assert not torch.equal(expected[0][:, :8], expected[1][:, :8])
    recognizer = tiny_folder.load(folder, backend)
    assert recognizer.runtime is None
    for _ in ("cold", "warm"):
        assert wrong([recognizer], expected, threads, 6) == []


@pytest.mark.parametrize("backend", tiny_folder.BACKENDS)
def test_two_recognizers(folder, answers, backend):
    pair = [tiny_folder.load(folder, backend) for _ in range(2)]
    assert wrong(pair, answers(backend), 4, 8) == []


def test_a_runtime_is_built_once(folder, monkeypatch):
    built = []

    def build(*args, **kwargs):
        built.append(threading.get_ident())
        return original(*args, **kwargs)

    original = recognizer_module.build_forwards
    monkeypatch.setattr(recognizer_module, "build_forwards", build)
    recognizer = tiny_folder.load(folder, "torch")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(recognizer, [tiny_folder.wave(0)] * 8))
    assert len(built) == 1


def test_a_failed_first_use_leaves_nothing(folder, answers, monkeypatch):
    """The next call builds again, and finds no module half replaced."""

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    original = recognizer_module.build_forwards
    monkeypatch.setattr(recognizer_module, "build_forwards", fail)
    recognizer = tiny_folder.load(folder, "torch_int8")
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            recognizer(tiny_folder.wave(0))
    assert recognizer.runtime is None
    monkeypatch.setattr(recognizer_module, "build_forwards", original)
    expected = answers("torch_int8")
    assert torch.equal(recognizer(tiny_folder.wave(1)), expected[1])


def test_a_copy_is_made_while_others_compute(folder, answers):
    recognizer = tiny_folder.load(folder, "torch")
    expected = answers("torch")
    recognizer(tiny_folder.wave(0))
    failures = []
    done = threading.Event()

    def compute():
        while not done.is_set():
            failures.extend(wrong([recognizer], expected, 1, 1))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        twins = [copy.deepcopy(recognizer) for _ in range(20)]
    finally:
        done.set()
        thread.join()
    assert failures == []
    assert twins[-1].runtime is None
    assert wrong(twins[-1:], expected, 2, 2) == []
