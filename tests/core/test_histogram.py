"""Tests of speechbrain_stablequant.core.histogram."""

import itertools
import json

import numpy as np
import pytest
import torch

from speechbrain_stablequant.core.histogram import Histogram


def make(*tensors, num_bins=4096):
    """A histogram of the given tensors, added in order."""
    hist = Histogram(num_bins)
    for tensor in tensors:
        hist.add(tensor)
    return hist


def wide(n=20000, seed=0):
    """Values over eight decades, both signs, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** (torch.rand(n, generator=generator) * 8 - 4)
    x = size * torch.randn(n, generator=generator).sign()
    x[::17] = 0
    return x


def same(a, b):
    """Whether two histograms are equal in every number."""
    return a.to_dict() == b.to_dict()


# -- counting ----------------------------------------------------------------


def test_counts_equal_numpy():
    x = wide()
    hist = make(x)
    edges = np.arange(4097) * (hist.range / 4096)
    expected, _ = np.histogram(x.abs().double().numpy(), edges)
    assert hist.counts.tolist() == expected.tolist()
    assert hist.counts.dtype == torch.int64
    assert hist.count == x.numel()
    assert hist.max == x.abs().max().item()
    assert hist.range / 2 <= hist.max < hist.range


@pytest.mark.parametrize("largest", [1.0, 2.0, 0.5, 1024.0, 1.999999])
def test_range_is_strictly_above_the_maximum(largest):
    hist = make(torch.tensor([largest, 0.1]))
    assert hist.max == torch.tensor(largest).item()
    assert hist.range == 2.0 ** (int(np.floor(np.log2(largest))) + 1)
    assert hist.count == 2


def test_every_order_gives_the_same():
    x = wide()
    parts = [x[:3], x[3:5000], x[5000:5001], x[5001:]]
    whole = make(x)
    for order in itertools.permutations(parts):
        assert same(make(*order), whole)


def test_every_split_gives_the_same():
    x = wide()
    whole = make(x)
    generator = torch.Generator().manual_seed(1)
    for size in (1, 7, 4096, 19999):
        shuffled = x[torch.randperm(x.numel(), generator=generator)]
        parts = shuffled[: 300 if size == 1 else None].split(size)
        rest = shuffled[300:] if size == 1 else shuffled[:0]
        assert same(make(*parts, rest), whole)


def test_chunks_inside_add_do_not_show():
    x = torch.randn(700001, generator=torch.Generator().manual_seed(0))
    assert same(make(x), make(*x.split(1000)))


def test_merge_equals_one_histogram():
    x = wide()
    parts = [x[x.abs() < 1e-3], x[x.abs() >= 1.0], x[:0]]
    middle = x[(x.abs() >= 1e-3) & (x.abs() < 1.0)]
    parts.append(middle)
    for order in itertools.permutations(parts):
        total = Histogram()
        for part in order:
            total.merge(make(part))
        assert same(total, make(x))


def test_merge_leaves_the_other_alone():
    a, b = make(torch.tensor([100.0])), make(torch.tensor([0.01]))
    before = b.to_dict()
    assert a.merge(b) is a
    a.add(torch.tensor([1e6]))
    assert b.to_dict() == before


def test_tiny_first_range_then_huge():
    hist = make(torch.tensor([1e-44, 1e-30]), torch.tensor([3e38]))
    assert hist.counts[0] == 2 and hist.count == 3
    assert hist.max == torch.tensor(3e38).item()
    assert hist.range == 2.0**128
    assert same(hist, make(torch.tensor([3e38, 1e-30, 1e-44])))


def test_a_share_is_the_inverse_of_a_quantile():
    hist = make(wide())
    for p in (0.001, 0.5, 0.9, 0.999, 0.9999):
        assert hist.share_above(hist.quantile(p)) == pytest.approx(1 - p)
    assert hist.share_above(hist.max) == hist.share_above(1e30) == 0.0
    assert hist.share_above(0.0) == pytest.approx(1.0)
    # What is counted, within a bin.
    x = torch.arange(1024.0)
    assert make(x).share_above(1000.0) == pytest.approx(24 / 1024)


def test_zeros_only():
    hist = make(torch.zeros(2, 3))
    assert hist.count == 6 and hist.max == 0.0
    assert hist.quantile(0.5) == 0.0 and hist.quantile(1.0) == 0.0


def test_silence_does_not_widen_the_range():
    x = torch.tensor([0.001, -0.003])
    silence = torch.zeros(4)
    hist = make(silence, x, silence)
    assert hist.range == make(x).range == 2.0**-8
    assert hist.max == make(x).max and hist.count == 10


def test_more_counts_than_float32_can_hold():
    hist = make(torch.ones(3))
    for _ in range(24):
        hist.merge(hist)
    hist.add(torch.ones(1))
    assert hist.count == 3 * 2**24 + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.double])
def test_other_dtypes(dtype):
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert same(make(x), make(x.float()))


def test_any_layout_and_gradients():
    x = torch.randn(6, 7, 8, requires_grad=True)
    assert same(make(x.permute(2, 0, 1)), make(x.detach().reshape(-1)))
    assert same(make(x[:, ::2]), make(x[:, ::2].contiguous()))


def test_inside_and_outside_of_inference_mode():
    x = wide()
    with torch.inference_mode():
        hist = make(x[:10] * 1e-6)
        hist.add(x[:5000])
    hist.add(x[5000:])
    with torch.inference_mode():
        hist.merge(make(x))
    hist.merge(make(x))
    assert same(hist, make(x[:10] * 1e-6, x, x, x))
    clipped = hist.clip(1.0)
    clipped.add(x)
    assert clipped.count == hist.count + x.numel()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_nan_and_inf_and_stays_as_it_was(bad):
    hist = make(torch.randn(10))
    before = hist.to_dict()
    x = torch.ones(600000)
    x[-1] = bad
    with pytest.raises(ValueError, match="NaN or Inf") as error:
        hist.add(x)
    assert "\n" not in str(error.value)
    assert hist.to_dict() == before


def test_counts_more_than_a_float_can():
    """26 M values: the first convolution's output for 16 s of audio."""
    x = torch.randn(26_000_000)
    hist = Histogram()
    hist.add(x)
    assert hist.count == x.numel()


# -- reading -----------------------------------------------------------------


@pytest.mark.parametrize("p", [1e-6, 0.01, 0.5, 0.9, 0.999, 0.9999, 1.0])
def test_quantile_is_numpys_within_one_bin(p):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200001, generator=generator)
    hist = make(x)
    values = np.sort(x.abs().numpy())
    # The sample with the fraction p at or below it.
    expected = values[max(0, int(np.ceil(p * values.size)) - 1)]
    assert abs(hist.quantile(p) - expected) <= hist.bin_width


def test_quantile_is_monotonic_and_below_the_maximum():
    hist = make(wide())
    grid = np.linspace(1e-9, 1, 2003)
    values = [hist.quantile(float(p)) for p in grid]
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert values[-1] == hist.max
    assert max(values) == hist.max


def test_quantile_interpolates_inside_a_bin():
    hist = Histogram(4)
    hist.add(torch.tensor([0.1, 0.2, 0.3, 0.4, 3.0]))  # bins of width 1
    assert hist.quantile(0.4) == pytest.approx(0.5)
    assert hist.quantile(0.8) == pytest.approx(1.0)
    # The last bin reaches from 3 to the maximum, which is 3.
    assert hist.quantile(0.9) == 3.0


@pytest.mark.parametrize("p", [0.0, -0.1, 1.0001, float("nan")])
def test_quantile_refuses(p):
    with pytest.raises(ValueError, match="quantile"):
        make(torch.ones(1)).quantile(p)


def test_counts_is_a_copy():
    hist = make(torch.ones(5))
    hist.counts.zero_()
    assert hist.count == 5


@pytest.mark.parametrize("read", [lambda h: h.max, lambda h: h.quantile(0.5)])
def test_empty(read):
    hist = make(torch.zeros(0, 4))
    assert hist.count == 0
    with pytest.raises(ValueError, match="no values were collected") as error:
        read(hist)
    assert "\n" not in str(error.value)


# -- clipping ----------------------------------------------------------------


@pytest.mark.parametrize("edge", [0.01, 0.5, 1.0, 1.2345, 2.9, 3.999])
def test_saturating_equals_clamped_data(edge):
    x = torch.randn(50000, generator=torch.Generator().manual_seed(0))
    x = x.clamp(-3.9, 3.9)
    x[0] = 3.9995  # so that the range is 4 before and after
    edge = torch.tensor(edge).item()  # float32, as the data
    hist, before = make(x), make(x)
    clipped = hist.clip(edge)
    direct = make(torch.cat([x.clamp(-edge, edge), torch.tensor([3.9995])]))
    expected = direct.counts
    expected[int(3.9995 / direct.bin_width)] -= 1
    assert clipped.counts.tolist() == expected.tolist()
    assert clipped.max == edge and clipped.count == hist.count
    assert clipped.quantile(1.0) == edge
    assert same(hist, before)


def test_clipping_at_or_above_the_maximum_and_at_zero():
    hist = make(wide())
    assert same(hist.clip(hist.max), hist)
    assert same(hist.clip(2 * hist.max), hist)
    clipped = hist.clip(0.0)
    assert clipped.count == hist.count and clipped.max == 0.0
    silence = make(torch.zeros(5))
    assert same(silence.clip(silence.quantile(0.9)), silence)


# -- JSON --------------------------------------------------------------------


def test_json_round_trip():
    for hist in (
        make(wide()),
        make(torch.zeros(3)),
        Histogram(64),
        make(torch.tensor([0.1, 1 / 3]), num_bins=2),
        make(wide()).clip(1234.5),
    ):
        state = json.loads(json.dumps(hist.to_dict(), allow_nan=False))
        back = Histogram.from_dict(state)
        assert same(back, hist)
        back.add(torch.tensor([1e5]))
        hist.add(torch.tensor([1e5]))
        assert same(back, hist)


def test_json_is_trimmed():
    hist = make(torch.tensor([0.001, 1.0]))
    hist = hist.clip(0.01)
    assert len(hist.to_dict()["counts"]) < 30


@pytest.mark.parametrize(
    "change",
    [
        {"counts": [1] * 9},
        {"counts": [1, -1]},
        {"counts": [1, 0.5]},
        {"counts": [1]},
        {"max": 5.0},
        {"exponent": 9},
        {"exponent": 129},
        {"counts": [True, 1]},
        {"counts": [2**64, 1]},
        {"counts": [2**61, 0, 0, 0, 0, 2**61]},
        {"num_bins": 3},
        {"num_bins": 2**25},
    ],
)
def test_from_dict_refuses_contradictions(change):
    hist = make(torch.tensor([0.1, 2.5]), num_bins=8)
    state = hist.to_dict()
    assert same(Histogram.from_dict(state), hist)
    with pytest.raises(ValueError, match="contradict"):
        Histogram.from_dict(state | change)


@pytest.mark.parametrize(
    "change",
    [
        {"exponent": 2.0},
        {"exponent": True},
        {"counts": None},
        {"counts": {"0": 1}},
        {"max": "2.5"},
        {"max": None},
        {"max": float("nan")},
        {"num_bins": None},
        {"num_bins": 8.0},
        {"num_bins": [8]},
        {"other": 1},
    ],
)
def test_from_dict_names_a_wrong_type(change):
    state = make(torch.ones(1), num_bins=8).to_dict()
    with pytest.raises(ValueError, match=rf"a histogram\.{next(iter(change))}"):
        Histogram.from_dict(state | change)


@pytest.mark.parametrize("state", [None, [], "a", 1])
def test_from_dict_of_something_else(state):
    with pytest.raises(ValueError, match="a histogram: must be a block"):
        Histogram.from_dict(state)


def test_from_dict_names_what_is_missing():
    state = make(torch.ones(1)).to_dict()
    del state["max"]
    with pytest.raises(ValueError, match="a histogram: lacks 'max'"):
        Histogram.from_dict(state)
