"""Tiles: the rule, the measurements and their file; buckets of lengths."""

import json
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from speechbrain_stablequant.core.encoder_spec import describe_encoder
from speechbrain_stablequant.runtimes.triton.executor import (
    bucket_samples,
    round_frames,
)
from speechbrain_stablequant.runtimes.triton.kernels import (
    architectures,
    attention,
    group_conv,
    layer_norm,
    matmul,
    tiles,
    trial,
    tuning,
    wave_conv,
)
from speechbrain_stablequant.runtimes.triton.kernels.architectures import (
    ARCHITECTURES,
    Card,
    architecture_of,
)
from speechbrain_stablequant.runtimes.triton.kernels.library import OPERATORS
from speechbrain_stablequant.runtimes.triton.kernels.tiles import Config
from speechbrain_stablequant.runtimes.triton.kernels.tuning import Tuner
from speechbrain_stablequant.runtimes.triton.network import count_frames
from speechbrain_stablequant.utils.store import Store

SLOW, FAST = Config(128, 128, 128, 8, 3), Config(64, 64, 128, 4, 4)
HOPPER = Card(ARCHITECTURES[9, 0], 132, (3, 8))
#: Of torch 2.11, whose Triton may not use Hopper's own instruction.
EARLY = replace(HOPPER, version=(3, 6))
SMALL = Card(ARCHITECTURES[8, 6], 82)


def make_tuner(path, log, device="a card", fail=(), tune=True):
    """A tuner whose clock says how large the tile is."""

    def measure(run):
        log.append(None)
        run()
        config = log[-1]
        return float("inf") if config in fail else float(config.block_m)

    folder, name = (path.parent, path.name) if path else (None, "tiles.json")
    return Tuner(Store(folder), name, device, measure, tune)


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


def test_the_best_outlines_are_measured_then_forms_of_the_fastest():
    log, many = [], [Config(2**i, 64, 64, 4, 2) for i in range(12, 2, -1)]
    forms = [replace(c, num_stages=n) for c in many for n in (2, 3)]
    found = make_tuner(None, log).choose("key", forms, log.append)
    best = many[tuning.MEASURED - 1]
    other = replace(best, num_stages=3)
    assert [c for c in log if c] == [*many[: tuning.MEASURED], other]
    assert found.outline == best.outline


def test_without_tuning_the_first_right_tile_is_taken(caplog):
    log = []
    tuner = make_tuner(None, log, fail=(SLOW,), tune=False)
    wrong = iter(["differs", None])
    many = [SLOW, FAST, replace(FAST, block_k=64), replace(FAST, block_k=32)]
    found = tuner.choose("key", many, log.append, lambda: next(wrong))
    assert found == many[2]
    assert [c for c in log if c] == many[:3]
    assert "differs; it is not used" in caplog.text


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
    with pytest.raises(RuntimeError, match="key: this device runs none of"):
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


def swapped(x):
    """Two rows of each entry in the place of each other."""
    wrong = x.clone()
    wrong[:, [0, 1]] = wrong[:, [1, 0]]
    return wrong


@pytest.mark.parametrize("first_is_wrong", [True, False])
def test_a_tile_that_swaps_two_rows_is_not_chosen(first_is_wrong, caplog):
    """Also the first one, with which nothing could be compared before."""
    right = torch.randint(-127, 128, (3, 9, 40), dtype=torch.int8)
    out, log = torch.empty_like(right), []
    wrong = SLOW if first_is_wrong else FAST

    def run(tile):
        log.append(tile)
        out.copy_(swapped(right) if tile == wrong else right)

    check = tuning.compared(out, right.__getitem__)
    with make_tuner(None, log).active():
        found = tuning.select("key", [SLOW, FAST], run, check)
    assert found == (FAST if first_is_wrong else SLOW)
    assert f"key: the result of {wrong}" in caplog.text
    assert "it is not used, please report" in caplog.text
    with (
        pytest.raises(
            RuntimeError, match=r"key: .* none of the tiles correctly"
        ),
        make_tuner(None, log).active(),
    ):
        tuning.select("key", [wrong], run, check)


def test_a_large_result_is_compared_in_part(monkeypatch):
    monkeypatch.setattr(tuning, "_COMPARED", 100)
    asked, right = [], torch.arange(640.0).reshape(64, 10)

    def reference(entries):
        asked.append(entries)
        return right[entries]

    check = tuning.compared(right.clone(), reference)
    assert check() is check() is None
    (entries,) = asked
    assert len(entries) == 10 and entries.max() == 63 and entries.min() == 0
    last = right.clone()
    last[63] += 1
    assert "differs by up to 1" in tuning.compared(last, reference)()


def test_every_kernel_is_compared_with_its_reference(monkeypatch):
    """On a CPU the kernel does not run: what is there is found wrong."""
    seen = {}

    def refuse(key, candidates, run, check):
        seen[key.partition("/")[0]] = check()
        raise LookupError

    kinds = (attention, group_conv, layer_norm, matmul, wave_conv)
    for kind in kinds:
        monkeypatch.setattr(kind, "select", refuse)
    for name, arguments, _ in trial.trials():
        if name not in ("quantize", "wave_gram"):
            with suppress(LookupError):
                OPERATORS[name].launch(*arguments)
    assert len(seen) == 6 and all(seen.values())


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
        found = matmul._candidates(rows, columns, 1024, False, False, HOPPER)
        plain = tuning.select("key", found, None)
        return plain.block_m, plain.block_n

    assert best(32 * 1499, 4096) == (128, 256)
    # 128 tiles for 132 multiprocessors
    assert best(499, 4096) == (128, 128)
    assert best(249, 1024) == (64, 64)


def test_shapes_that_share_a_tile():
    buckets = [tiles.shape_bucket(n) for n in (1, 60, 65, 97, 250)]
    assert buckets == [64, 64, 96, 128, 256]


def test_blocks_go_on_where_not_all_fit_at_once():
    def lasting(*product):
        found = matmul._candidates(*product, HOPPER)
        return [tile for tile in found if tile.persistent]

    assert lasting(8000, 4096, 1024, False, False)
    wide = lasting(8000, 4096, 1024, False, True)
    assert wide and all(tile.block_n < 256 for tile in wide)
    assert not lasting(249, 1024, 1024, False, False)
    assert lasting(128000, 512, 1536, True, False)


@pytest.mark.parametrize("row", ARCHITECTURES.values(), ids=str)
@pytest.mark.parametrize("version", [(3, 6), (3, 8)])
def test_every_kernel_has_tiles_that_fit(row, version):
    card = Card(row, 100, version)
    taps = torch.empty(512, 10, dtype=torch.int8)
    wide = {
        "linear": matmul._candidates(499, 4096, 1024, False, True, card),
        "odd depth": matmul._candidates(499, 32, 1000, False, False, card),
        "conv": matmul._candidates(31999, 512, 1536, True, False, card),
        "narrow conv": matmul._candidates(31999, 32, 96, True, False, card),
        "attention": attention._candidates(499, 16, 64, 2, card),
        "float attention": attention._candidates(499, 16, 64, 4, card),
        "wide heads": attention._candidates(499, 16, 256, 2, card),
        "first": wave_conv._tiles(taps, False, card),
        "first, norm": wave_conv._tiles(taps, True, card),
    }
    for name, found in wide.items():
        assert found, name
        for tile in found:
            assert tile.gluon or card.allows(tile.block_m, tile.num_warps)
            if "attention" not in name and "heads" not in name:
                assert tile.shared_bytes(card) <= card.shared_bytes
    # copies overlap products, also behind a norm
    assert max(card.buffers(t.num_stages) for t in wide["conv"]) >= 2


@pytest.mark.parametrize("card", [HOPPER, EARLY], ids=["3.8", "3.6"])
def test_gluon_is_for_hopper(card, hopper, monkeypatch):
    def overlapped(card, depth=1024, norm=False):
        found = matmul._candidates(4000, 512, depth, norm, False, card)
        assert not all(tile.gluon for tile in found)
        return [tile.outline for tile in found if tile.gluon]

    assert len(set(overlapped(card))) == tuning.MEASURED // 2
    assert not overlapped(card, norm=True)
    assert not overlapped(card, depth=1088)
    for row in ARCHITECTURES.values():
        if row is not card.architecture:
            assert not overlapped(Card(row, 100))
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "INTERPRETED", True)
        assert not overlapped(card)
    # a Triton without it
    monkeypatch.setattr(matmul, "hopper", None)
    assert not overlapped(card)


class Kernel:
    """In the place of a kernel that computes a linear layer."""

    def __init__(self, wrong=False):
        self.wrong, self.count = wrong, 0

    def __getitem__(self, grid):
        return self

    def __call__(self, x, weight, out, scale, bias, *rest, **options):
        self.count += 1
        arguments = (scale, bias, None, options["GELU"], out.dtype)
        out.copy_(matmul.linear_reference(x, weight, *arguments))
        if self.wrong:
            out[7] = 0


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("tune", [False, True])
@pytest.mark.parametrize("card", [HOPPER, EARLY], ids=["3.8", "3.6"])
def test_gluon_is_used_only_after_its_trial(
    card, tune, wrong, hopper, monkeypatch, caplog
):
    plain, overlapped = Kernel(), Kernel(wrong)
    monkeypatch.setattr(architectures, "ASSUMED", card)
    monkeypatch.setattr(matmul, "matmul_kernel", plain)
    monkeypatch.setattr(hopper, "hopper_kernel", overlapped)
    q = torch.randint(-127, 128, (128, 512), dtype=torch.int8)
    weight = torch.randint(-127, 128, (256, 512), dtype=torch.int8)
    vector = torch.rand(256) * 1e-4
    arguments = (q, weight, vector, vector, None, True, torch.float16)

    def launches():
        """How often the kernel is launched for a layer."""
        overlapped.count = 0
        matmul.launch_linear(*arguments)
        return overlapped.count

    assert launches() == 0 < plain.count
    log = []

    def measure(run):
        """Each is slower than the one before."""
        run()
        log.append(overlapped.count)
        return float(len(log))

    tuner = Tuner(Store(None), "tiles.json", "a card", measure, tune)
    with tuner.active():
        assert launches() > 0
        (chosen,) = tuner.table.values()
        assert chosen.gluon != wrong
        # from now on without a trial
        assert launches() == (0 if wrong else 1)
    assert ("it is not used, please report" in caplog.text) == wrong


def test_tiles_that_mma_sync_fits_into_little_memory():
    """It keeps one buffer less than there are stages."""
    found = matmul._candidates(499, 4096, 1024, False, False, SMALL)
    large = Config(128, 256, 128, 8, 3)
    assert large in found and large.shared_bytes(SMALL) == 98304


def test_what_does_not_fit_anywhere_is_refused():
    none = Card(replace(SMALL.architecture, shared_kb=1), 1)
    with pytest.raises(ValueError, match="no tile of this kernel fits into 10"):
        matmul._candidates(1, 64, 64, False, False, none)


@pytest.mark.parametrize(
    ("card", "instruction", "said"),
    [
        (SMALL, "mma.sync", None),
        (HOPPER, "wgmma", None),
        (EARLY, "mma.sync", "Triton 3.6 does not compile int8 for wgmma corr"),
        (replace(EARLY, architecture=ARCHITECTURES[10, 0]), "mma.sync", "2.14"),
        (
            replace(HOPPER, architecture=ARCHITECTURES[10, 3]),
            "tcgen05",
            "in float16",
        ),
    ],
)
def test_what_a_user_is_told_of_a_card(card, instruction, said):
    assert card.instruction == instruction
    assert card.remark() is said or said in card.remark()


def test_an_unknown_card_is_taken_for_the_one_below():
    assert architecture_of((8, 7)) is ARCHITECTURES[8, 6]
    assert architecture_of((12, 1)) is ARCHITECTURES[12, 0]


def test_buckets_hold_what_they_must(make_tiny_model):
    spec = describe_encoder(make_tiny_model("hubert-large"), "enc", {})
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
