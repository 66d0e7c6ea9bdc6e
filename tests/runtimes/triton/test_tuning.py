"""Tiles: the rule, the measurements and their file; buckets of lengths."""

import json
from types import SimpleNamespace

import pytest
import torch

from speechbrain_stablequant.core.encoder_spec import describe_encoder
from speechbrain_stablequant.runtimes.triton.executor import (
    LeastRecent,
    bucket_samples,
    round_frames,
    samples_for,
)
from speechbrain_stablequant.runtimes.triton.kernels import (
    attention,
    group_conv,
    matmul,
    tiles,
    tuning,
)
from speechbrain_stablequant.runtimes.triton.kernels.tiles import Config
from speechbrain_stablequant.runtimes.triton.kernels.tuning import Tuner
from speechbrain_stablequant.runtimes.triton.network import count_frames
from speechbrain_stablequant.utils.store import Store

SLOW, FAST = Config(128, 128, 128, 8, 3), Config(64, 64, 128, 4, 4)
HOPPER = tiles.Limits(132, 227 * 1024, 4096)


def make_tuner(path, log, device="a card", fail=()):
    """A tuner whose clock says how large the tile is."""

    def measure(run):
        log.append(None)
        run()
        config = log[-1]
        return float("inf") if config in fail else float(config.block_m)

    folder, name = (path.parent, path.name) if path else (None, "tiles.json")
    return Tuner(Store(folder), name, device, measure)


def test_measures_a_shape_once_and_keeps_the_fastest(tmp_path):
    path, log = tmp_path / "new" / "tiles.json", []
    tuner = make_tuner(path, log)
    with tuner.active():
        for _ in range(3):
            assert tuning.select("linear/64", [SLOW, FAST], log.append) == FAST
    assert [c for c in log if c] == [SLOW, FAST]
    tuner.save()
    again = make_tuner(path, log)
    assert again.choose("linear/64", [SLOW, FAST], None) == FAST
    # outside the context the rule's first candidate runs, nothing is timed
    assert tuning.select("linear/64", [SLOW, FAST], None) == SLOW


def test_a_kept_tile_that_is_gone_is_measured_anew(tmp_path):
    path, log = tmp_path / "tiles.json", []
    gone = Config(16, 16, 16, 1, 1)
    tuner = make_tuner(path, log)
    tuner.choose("key", [gone], log.append)
    tuner.save()
    again = make_tuner(path, log)
    assert again.choose("key", [SLOW, FAST], log.append) == FAST


def test_only_the_rules_best_are_measured():
    log, many = [], [Config(2**i, 64, 64, 4, 2) for i in range(12, 2, -1)]
    tuner = make_tuner(None, log)
    found = tuner.choose("key", many, log.append)
    assert [c for c in log if c] == many[: tuning.MEASURED]
    assert found == many[tuning.MEASURED - 1]


def test_a_file_that_cannot_be_written_is_only_warned_of(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    path, log = tmp_path / "file" / "tiles.json", []
    tuner = make_tuner(path, log)
    tuner.choose("key", [SLOW, FAST], log.append)
    tuner.save()
    assert "tiles.json: cannot be written" in caplog.text
    assert tuner.choose("key", [SLOW, FAST], None) == FAST


def test_a_tile_that_cannot_run_is_not_chosen():
    log = []
    tuner = make_tuner(None, log, fail=(FAST,))
    assert tuner.choose("key", [SLOW, FAST], log.append) == SLOW
    tuner = make_tuner(None, log, fail=(FAST, SLOW))
    with pytest.raises(RuntimeError, match="key: this device can run none"):
        tuner.choose("key", [SLOW, FAST], log.append)


def test_a_tile_that_a_compiler_refuses_is_left_out(caplog):
    def refuse():
        raise RuntimeError("PassManager::run failed")

    def fill():
        raise torch.OutOfMemoryError("full")

    assert tuning.time_on_device(refuse) == float("inf")
    assert "a tile is left out: PassManager::run failed" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        tuning.time_on_device(fill)


def test_a_tile_that_computes_something_else_is_not_chosen(caplog):
    log, written = [], torch.zeros(100, dtype=torch.int8)
    right, other = torch.arange(100).to(torch.int8), torch.ones(100)
    values = {SLOW: right, FAST: other.to(torch.int8)}
    tuner = make_tuner(None, log)

    def run(tile):
        log.append(tile)
        written.copy_(values[tile])

    with tuner.active():
        assert tuning.select("key", [SLOW, FAST], run, lambda: written) == SLOW
        assert "key: the result of Config(block_m=64, " in caplog.text
        values[FAST] = right
        assert (
            tuning.select("other", [SLOW, FAST], run, lambda: written) == FAST
        )


def test_a_large_result_is_compared_in_part(monkeypatch):
    monkeypatch.setattr(tuning, "_COMPARED", 100)
    rows = torch.arange(64).expand(100, 64)
    found = tuning._sample(rows)
    assert 90 <= len(found) < 200
    assert len(found.unique()) == 64
    assert torch.equal(tuning._sample(rows[:1]), rows[0])


def test_saving_keeps_what_another_process_measured(tmp_path):
    path, log = tmp_path / "tiles.json", []
    one, other = make_tuner(path, log), make_tuner(path, log)
    one.choose("a", [SLOW, FAST], log.append)
    other.choose("b", [SLOW, FAST], log.append)
    one.save()
    other.save()
    assert set(json.loads(path.read_text())["content"]) == {"a", "b"}
    assert [file.name for file in tmp_path.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 1, "device"', "not valid JSON"),
        ('{"format": 9}', "not a tuning cache of a card and Triton"),
        ("[]", "not a tuning cache of a card"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    path = tmp_path / "tiles.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        make_tuner(path, [])


def test_a_file_of_another_card_is_refused(tmp_path):
    path, log = tmp_path / "tiles.json", []
    tuner = make_tuner(path, log)
    tuner.choose("a", [SLOW, FAST], log.append)
    tuner.save()
    with pytest.raises(ValueError, match=r"tiles.json: not a tuning cache"):
        make_tuner(path, log, device="another card")


def test_the_rule_fills_the_device():
    def best(rows, columns):
        return tiles.rank(matmul.TILES, rows, columns, HOPPER)[0]

    assert best(32 * 1499, 4096) == matmul.TILES[0]
    # 128 tiles for 132 multiprocessors
    wide = best(499, 4096)
    assert (wide.block_m, wide.block_n) == (128, 128)
    short = best(249, 1024)
    assert short.block_m * short.block_n <= 64 * 64


def test_shapes_that_share_a_tile():
    buckets = [tiles.shape_bucket(n) for n in (1, 60, 65, 97, 250)]
    assert buckets == [64, 64, 96, 128, 256]


def test_blocks_go_on_where_not_all_fit_at_once():
    def lasting(*product):
        found = matmul._candidates(*product, HOPPER)
        return sum(tile.persistent for tile in found)

    assert lasting(8000, 4096, 1024, False, False) == 3
    assert lasting(8000, 4096, 1024, False, True) == 2
    assert lasting(499, 4096, 1024, False, False) == 0
    assert lasting(128000, 512, 1536, True, False) == 1


def test_every_kernel_has_a_tile_for_small_shared_memory():
    small = tiles.Limits(82, 99 * 1024, 1024)
    assert matmul._candidates(499, 512, 1536, True, False, small)
    assert len(matmul._candidates(499, 1024, 4096, False, True, small)) > 2
    assert matmul._candidates(499, 1024, 1000, False, False, small)
    assert attention._candidates(499, 16, 64, 2, small)
    some = tuple(Config(m, 64, k, w, s) for m, k, w, s in group_conv.TILES)
    assert tiles.rank(some, 499, 1024, small)
    none = tiles.Limits(1, 100, 1024)
    with pytest.raises(ValueError, match="no tile of this kernel fits"):
        tiles.rank(matmul.TILES, 1, 1, none)
    with pytest.raises(ValueError, match="fits into 100 bytes"):
        attention._candidates(499, 16, 64, 2, none)


def test_buckets_hold_what_they_must(make_tiny_model):
    spec = describe_encoder(make_tiny_model("hubert-large"), "enc", {})
    assert samples_for(spec, 1) == 400
    buckets = set()
    for samples in range(400, 30000, 97):
        padded = bucket_samples(spec, samples)
        assert padded >= samples
        assert bucket_samples(spec, padded) == padded
        frames = spec.frames(padded)
        assert frames % 8 == 0
        assert frames <= 1.125 * spec.frames(samples) + 9
        buckets.add(padded)
    assert len(buckets) < 20
    assert all(round_frames(n) >= n for n in range(1, 3000))


def test_receptive_field_of_stacked_convolutions():
    stages = [
        SimpleNamespace(kernel=kernel, stride=stride)
        for kernel, stride in ((10, 5), (3, 2))
    ]
    counts = count_frames(torch.tensor([19, 20, 29, 30]), stages)
    assert counts.tolist() == [0, 1, 1, 2]


def test_what_is_not_used_is_discarded():
    gone = []
    kept = LeastRecent(2, gone.append)
    for key in "abacab":
        assert kept.get(key, str.upper) == key.upper()
    assert gone == ["B", "C"]


def test_what_is_discarded_is_gone_before_its_successor_is_made():
    class Memory:
        taken = 0

        def __init__(self, key):
            assert Memory.taken == 0
            Memory.taken = 1

        def __del__(self):
            Memory.taken = 0

    kept = LeastRecent(1, lambda old: None)
    for key in "ab":
        kept.get(key, Memory)
    assert Memory.taken == 1
