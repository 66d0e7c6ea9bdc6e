"""Tests of speechbrain_stablequant.core.calibrators."""

import numpy as np
import pytest
import torch

from speechbrain_stablequant.core import calibrators
from speechbrain_stablequant.core.affine import (
    MIN_AMAX,
    fake_quantize,
    scale_from_amax,
)
from speechbrain_stablequant.core.calibrators import (
    CALIBRATORS,
    clipped_mse,
    entropy_calibrator,
    mse_calibrator,
    percentile_calibrator,
)
from speechbrain_stablequant.core.histogram import Histogram

ALL_BITS = range(2, 9)


def gaussian(n, generator):
    return torch.randn(n, generator=generator)


def laplace(n, generator):
    uniform = torch.rand(n, generator=generator) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs() + 1e-7)


def heavy_tailed(n, generator):
    """Student's t with three degrees of freedom."""
    chi2 = torch.randn(3, n, generator=generator).square().mean(0)
    return torch.randn(n, generator=generator) / chi2.sqrt()


def gelu_like(n, generator):
    """One-sided, most of its mass close to zero."""
    return torch.nn.functional.gelu(2 * torch.randn(n, generator=generator))


def spiked(n, generator):
    """70 % exact zeros, as after a ReLU or in padding."""
    x = torch.randn(n, generator=generator)
    return x * (torch.rand(n, generator=generator) > 0.7)


def outliers(n, generator):
    """A Gaussian with one value in 20000 at about 60 sigma."""
    x = torch.randn(n, generator=generator)
    x[::20000] = 60 + x[::20000]
    return x


DATA = [gaussian, laplace, heavy_tailed, gelu_like, spiked, outliers]


def draw(data, n=50000, seed=0):
    """A sample and its histogram."""
    x = data(n, torch.Generator().manual_seed(seed))
    hist = Histogram()
    hist.add(x)
    return x, hist


def mean_error(x, amax, bits):
    """Mean squared quantization error of raw values."""
    scale = scale_from_amax(torch.tensor(amax), bits)
    return (fake_quantize(x, scale, bits) - x).double().square().mean().item()


# -- the registry ------------------------------------------------------------


def test_names():
    assert list(CALIBRATORS) == ["max", "percentile", "entropy", "mse"]


@pytest.mark.parametrize("method", CALIBRATORS)
def test_no_data(method):
    with pytest.raises(ValueError, match="no values were collected"):
        CALIBRATORS[method](Histogram(), 8)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("method", CALIBRATORS)
@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(100),
        torch.full((100,), 1e-12),
        torch.full((3,), 7.0),
        torch.tensor([1e-30, 1e30]),
        torch.tensor([0.0, 0.0, 5.0]),
        torch.tensor([3e38]),
    ],
)
def test_degenerate_data(method, bits, values):
    hist = Histogram()
    hist.add(values)
    amax = CALIBRATORS[method](hist, bits)
    assert isinstance(amax, float)
    assert MIN_AMAX <= amax <= max(hist.max, MIN_AMAX)


def test_mse_of_silence_clipped_at_its_quantile():
    hist = Histogram()
    hist.add(torch.zeros(100))
    edge = hist.quantile(0.99)
    assert mse_calibrator(hist.clip(edge), 8) == MIN_AMAX
    assert clipped_mse(hist, edge, 8) == 0.0


@pytest.mark.parametrize("method", CALIBRATORS)
def test_scaling_by_a_power_of_two_scales_amax(method):
    x, hist = draw(laplace)
    other = Histogram()
    other.add(x / 1024)
    expected = CALIBRATORS[method](hist, 8) / 1024
    assert CALIBRATORS[method](other, 8) == pytest.approx(expected, rel=1e-9)


# -- percentile --------------------------------------------------------------


@pytest.mark.parametrize("percentile", [50, 99, 99.9, 99.99])
def test_percentile_of_raw_values(percentile):
    x, hist = draw(laplace)
    expected = np.percentile(x.abs().double().numpy(), percentile)
    amax = percentile_calibrator(hist, 8, percentile=percentile)
    assert amax == pytest.approx(expected, abs=2 * hist.bin_width)


# -- entropy -----------------------------------------------------------------


def reference_kl(counts, i, levels):
    """KL(P || Q) of one candidate, step by step as it was published."""
    p = counts[:i].astype(np.float64)
    tail = counts[i:].sum()
    q = np.zeros(i)
    level = np.arange(i) * levels // i
    for k in range(levels):
        members = np.flatnonzero((level == k) & (counts[:i] > 0))
        if members.size:
            q[members] = counts[members].sum() / members.size
    p[-1] += tail
    if q.sum() == 0:
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    if ((p > 0) & (q == 0)).any():
        return np.inf
    kept = p > 0
    return float((p[kept] * np.log(p[kept] / q[kept])).sum())


def reference_entropy(hist, bits, start_bin):
    """amax by a loop over all candidates."""
    counts, width = hist.counts.numpy(), hist.bin_width
    counts = np.trim_zeros(counts, "b")
    while counts.size >= 4096:
        if counts.size % 2:
            counts = np.append(counts, 0)
        counts, width = counts.reshape(-1, 2).sum(1), 2 * width
    if counts.size > 1:
        counts[0] = counts[1]
    candidates = range(start_bin, counts.size + 1)
    kl = np.array(
        [reference_kl(counts, i, 2 ** (bits - 1)) for i in candidates]
    )
    best = np.flatnonzero(kl <= kl.min() + 1e-10)[-1]
    return min(candidates[int(best)] * width, hist.max)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("data", DATA)
def test_entropy_equals_the_published_procedure(data, bits, monkeypatch):
    x = data(20000, torch.Generator().manual_seed(bits))
    hist = Histogram(512)  # the direct loop is slow
    hist.add(x)
    for start_bin in (16, 128):
        expected = reference_entropy(hist, bits, start_bin)
        monkeypatch.setattr(calibrators, "_ENTROPY_START", start_bin)
        amax = entropy_calibrator(hist, bits)
        assert amax == pytest.approx(expected, rel=1e-12)


def test_entropy_equals_the_published_procedure_at_full_size():
    x, _ = draw(laplace, n=20000)
    x = x.clamp(-7.9, 7.9) / 8 * 0.6  # 2048 to 4096 bins of 4096 in use
    for num_bins in (4096, 16384):
        hist = Histogram(num_bins)
        hist.add(x)
        # Four bits: the direct loop over 128 levels takes too long here.
        expected = reference_entropy(hist, 4, 128)
        assert entropy_calibrator(hist, 4) == pytest.approx(expected)


def test_entropy_takes_the_last_of_equal_candidates(monkeypatch):
    _, hist = draw(gaussian)
    divergence = torch.tensor([3.0, 1.0, 2.0, 1.0 + 1e-14, 4.0])
    monkeypatch.setattr(
        calibrators, "_kl_divergences", lambda *_: divergence.double()
    )
    assert entropy_calibrator(hist, 8) == (128 + 3) * hist.bin_width


def test_entropy_clips_outliers():
    _, hist = draw(outliers)
    amax = entropy_calibrator(hist, 8)
    assert 2 < amax < 30 < hist.max


def test_entropy_ignores_a_spike_at_zero():
    x, hist = draw(gaussian)
    spike = Histogram()
    spike.add(torch.cat([x, torch.zeros(10 * x.numel())]))
    assert entropy_calibrator(spike, 8) == entropy_calibrator(hist, 8)


def test_entropy_of_few_bins_is_the_maximum():
    _, hist = draw(gaussian)
    clipped = hist.clip(100.5 * hist.bin_width)
    assert entropy_calibrator(clipped, 8) == clipped.max


# -- mse ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("data", DATA)
def test_mse_against_brute_force(data, bits):
    x, hist = draw(data)
    amax = mse_calibrator(hist, bits)
    candidates = hist.max * np.geomspace(1e-2, 1, 200)
    brute = min(mean_error(x, float(c), bits) for c in candidates)
    assert mean_error(x, amax, bits) <= 1.01 * brute
    assert amax <= hist.max


@pytest.mark.parametrize("bits", ALL_BITS)
def test_mse_of_a_gaussian_is_the_textbooks(bits):
    """Optimal uniform quantizers of a unit Gaussian, by integration."""
    _, hist = draw(gaussian, n=1_000_000)
    limit = 2 ** (bits - 1) - 1
    t = torch.linspace(0, 8, 80001, dtype=torch.float64)
    density = torch.exp(-t.square() / 2)

    def error(amax):
        step = amax / limit
        q = torch.round(t / step).clamp(max=limit) * step
        return float(((t - q).square() * density).sum())

    grid = np.linspace(0.5, 6, 1101)
    best = float(grid[np.argmin([error(a) for a in grid])])
    amax = mse_calibrator(hist, bits)
    assert amax == pytest.approx(best, rel=0.03)
    assert error(amax) <= 1.005 * error(best)


def test_clipped_mse_is_at_most_its_edge():
    _, hist = draw(laplace)
    free = mse_calibrator(hist, 8)
    for fraction in (0.5, 0.9):
        amax = clipped_mse(hist, fraction * free, 8)
        assert 0.5 * fraction * free < amax <= fraction * free
    assert clipped_mse(hist, 1e9, 8) == free


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_of_saturated_data(bits):
    """The spike that saturation leaves at the edge is seen at the edge."""
    x, hist = draw(laplace)
    edge = 256 * hist.bin_width  # the left edge of a bin: a bin of no width
    amax = mse_calibrator(hist.clip(edge), bits)
    saturated = x.clamp(-edge, edge)
    candidates = edge * np.linspace(0.1, 1, 150)
    brute = min(mean_error(saturated, float(c), bits) for c in candidates)
    assert mean_error(saturated, amax, bits) <= 1.01 * brute


def test_mse_refines_a_coarse_grid(monkeypatch):
    x, hist = draw(laplace)
    found = []
    for size in (20, 3000):
        monkeypatch.setattr(calibrators, "_MSE_GRID", size)
        found.append(mse_calibrator(hist, 4))
    assert found[0] == pytest.approx(found[1], rel=0.01)
    errors = [mean_error(x, amax, 4) for amax in found]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_mse_of_many_bins():
    x = laplace(50000, torch.Generator().manual_seed(0))
    fine, usual = Histogram(1 << 17), Histogram()
    fine.add(x)
    usual.add(x)
    errors = [mean_error(x, mse_calibrator(h, 6), 6) for h in (fine, usual)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
