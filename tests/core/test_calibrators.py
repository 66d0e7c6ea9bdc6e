"""Tests of speechbrain_stablequant.core.calibrators."""

import numpy as np
import pytest
import torch

from speechbrain_stablequant.core.affine import (
    MIN_AMAX,
    fake_quantize,
    scale_from_amax,
)
from speechbrain_stablequant.core.calibrators import (
    CALIBRATORS,
    calibrate,
    weight_amax,
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


def test_calibrate_passes_options_on():
    _, hist = draw(gaussian)
    assert calibrate("max", hist, 8) == hist.max
    expected = hist.quantile(0.9999)
    assert calibrate("percentile", hist, 8) == pytest.approx(expected)
    assert calibrate("percentile", hist, 8, percentile=50) == hist.quantile(0.5)
    assert calibrate("mse", hist, 8, upper=1.0) <= 1.0
    assert calibrate("entropy", hist, 8, start_bin=10**6) == hist.max


def test_unknown_method():
    _, hist = draw(gaussian, n=10)
    with pytest.raises(ValueError) as error:
        calibrate("kl", hist, 8)
    assert str(error.value) == (
        "unknown calibrator 'kl'; use one of max, percentile, entropy, mse"
    )


@pytest.mark.parametrize(
    "method, known",
    [
        ("max", "none"),
        ("percentile", "percentile"),
        ("entropy", "start_bin"),
        ("mse", "upper, num_candidates"),
    ],
)
def test_unknown_option(method, known):
    _, hist = draw(gaussian, n=10)
    with pytest.raises(ValueError) as error:
        calibrate(method, hist, 8, percentil=3)
    assert str(error.value) == (
        f"calibrator '{method}' has no option 'percentil'; it takes {known}"
    )


@pytest.mark.parametrize(
    "method, options",
    [
        ("percentile", {"percentile": 0}),
        ("percentile", {"percentile": 100.1}),
        ("percentile", {"percentile": float("nan")}),
        ("entropy", {"start_bin": 0}),
        ("mse", {"upper": -1.0}),
        ("mse", {"upper": float("nan")}),
        ("mse", {"num_candidates": 1}),
    ],
)
def test_bad_option(method, options):
    _, hist = draw(gaussian, n=10)
    with pytest.raises(ValueError, match=next(iter(options))) as error:
        calibrate(method, hist, 8, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", CALIBRATORS)
def test_bad_bits_and_no_data(method):
    _, hist = draw(gaussian, n=10)
    with pytest.raises(ValueError, match="bits must be"):
        calibrate(method, hist, 9)
    with pytest.raises(ValueError, match="no values were collected"):
        calibrate(method, Histogram(), 8)


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
    amax = calibrate(method, hist, bits)
    assert isinstance(amax, float)
    assert MIN_AMAX <= amax <= max(hist.max, MIN_AMAX)


def test_mse_of_silence_clipped_at_its_quantile():
    hist = Histogram()
    hist.add(torch.zeros(100))
    edge = hist.quantile(0.99)
    assert calibrate("mse", hist.clip(edge), 8, upper=edge) == MIN_AMAX


@pytest.mark.parametrize("method", CALIBRATORS)
def test_scaling_by_a_power_of_two_scales_amax(method):
    x, hist = draw(laplace)
    other = Histogram()
    other.add(x / 1024)
    expected = calibrate(method, hist, 8) / 1024
    assert calibrate(method, other, 8) == pytest.approx(expected, rel=1e-9)


# -- percentile --------------------------------------------------------------


@pytest.mark.parametrize("percentile", [50, 99, 99.9, 99.99])
def test_percentile_of_raw_values(percentile):
    x, hist = draw(laplace)
    expected = np.percentile(x.abs().double().numpy(), percentile)
    amax = calibrate("percentile", hist, 8, percentile=percentile)
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
def test_entropy_equals_the_published_procedure(data, bits):
    x = data(20000, torch.Generator().manual_seed(bits))
    hist = Histogram(512)  # the direct loop is slow
    hist.add(x)
    for start_bin in (16, 128):
        expected = reference_entropy(hist, bits, start_bin)
        amax = calibrate("entropy", hist, bits, start_bin=start_bin)
        assert amax == pytest.approx(expected, rel=1e-12)


def test_entropy_equals_the_published_procedure_at_full_size():
    x, _ = draw(laplace, n=20000)
    x = x.clamp(-7.9, 7.9) / 8 * 0.6  # 2048 to 4096 bins of 4096 in use
    for num_bins in (4096, 16384):
        hist = Histogram(num_bins)
        hist.add(x)
        # Four bits: the direct loop over 128 levels takes too long here.
        expected = reference_entropy(hist, 4, 128)
        assert calibrate("entropy", hist, 4) == pytest.approx(expected)


def test_entropy_takes_the_last_of_equal_candidates(monkeypatch):
    _, hist = draw(gaussian)
    divergence = torch.tensor([3.0, 1.0, 2.0, 1.0 + 1e-14, 4.0])
    monkeypatch.setattr(
        "speechbrain_stablequant.core.calibrators._kl_divergences",
        lambda *_: divergence.double(),
    )
    assert calibrate("entropy", hist, 8) == (128 + 3) * hist.bin_width


def test_entropy_clips_outliers():
    _, hist = draw(outliers)
    amax = calibrate("entropy", hist, 8)
    assert 2 < amax < 30 < hist.max


def test_entropy_ignores_a_spike_at_zero():
    x, hist = draw(gaussian)
    spike = Histogram()
    spike.add(torch.cat([x, torch.zeros(10 * x.numel())]))
    assert calibrate("entropy", spike, 8) == calibrate("entropy", hist, 8)


def test_entropy_of_few_bins_is_the_maximum():
    _, hist = draw(gaussian)
    clipped = hist.clip(100.5 * hist.bin_width)
    assert calibrate("entropy", clipped, 8) == clipped.max


# -- mse ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("data", DATA)
def test_mse_against_brute_force(data, bits):
    x, hist = draw(data)
    amax = calibrate("mse", hist, bits)
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
    amax = calibrate("mse", hist, bits)
    assert amax == pytest.approx(best, rel=0.03)
    assert error(amax) <= 1.005 * error(best)


def test_mse_respects_upper():
    _, hist = draw(laplace)
    free = calibrate("mse", hist, 8)
    for fraction in (0.5, 0.9):
        amax = calibrate("mse", hist, 8, upper=fraction * free)
        assert amax == pytest.approx(fraction * free)
        assert amax <= fraction * free
    assert calibrate("mse", hist, 8, upper=1e9) == free


def test_mse_on_a_clipped_histogram():
    x, hist = draw(outliers)
    edge = hist.quantile(0.999)
    dropped = hist.clip(edge, drop=True)
    amax = calibrate("mse", dropped, 6)
    kept = x[x.abs() <= edge]
    candidates = edge * np.linspace(0.2, 1, 300)
    brute = min(mean_error(kept, float(c), 6) for c in candidates)
    assert mean_error(kept, amax, 6) <= 1.01 * brute
    assert amax <= edge


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_of_saturated_data(bits):
    """The spike that saturation leaves at the edge is seen at the edge."""
    x, hist = draw(laplace)
    edge = 256 * hist.bin_width  # the left edge of a bin: a bin of no width
    amax = calibrate("mse", hist.clip(edge), bits)
    saturated = x.clamp(-edge, edge)
    candidates = edge * np.linspace(0.1, 1, 150)
    brute = min(mean_error(saturated, float(c), bits) for c in candidates)
    assert mean_error(saturated, amax, bits) <= 1.01 * brute


def test_mse_refines_a_coarse_grid():
    x, hist = draw(laplace)
    coarse, fine = (
        calibrate("mse", hist, 4, num_candidates=n) for n in (20, 3000)
    )
    assert coarse == pytest.approx(fine, rel=0.01)
    assert mean_error(x, coarse, 4) == pytest.approx(
        mean_error(x, fine, 4), rel=1e-4
    )


def test_mse_of_many_bins():
    x = laplace(50000, torch.Generator().manual_seed(0))
    fine, usual = Histogram(1 << 17), Histogram()
    fine.add(x)
    usual.add(x)
    errors = [mean_error(x, calibrate("mse", h, 6), 6) for h in (fine, usual)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


# -- weights -----------------------------------------------------------------


def weight_like(shape, seed=0):
    """Gaussian rows of different sizes, some with outliers, one dead."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=generator)
    flat = w.view(shape[0], -1)
    flat *= 10 ** (torch.rand(shape[0], 1, generator=generator) * 4 - 3)
    flat[::5, 0] *= 20
    flat[3] = 0
    return w


def row_errors(w, amax, bits):
    """Squared error of each output channel."""
    scale = scale_from_amax(amax, bits)
    difference = fake_quantize(w, scale, bits, axis=0) - w
    return difference.double().square().flatten(1).sum(1)


@pytest.mark.parametrize("shape", [(12, 64), (12, 4, 3)])
def test_weight_max(shape):
    w = weight_like(shape)
    amax = weight_amax(w, 8, "max")
    expected = [max(MIN_AMAX, float(row.abs().max())) for row in w]
    assert amax.dtype == torch.float32
    assert amax.tolist() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shape", [(24, 1024), (24, 16, 8), (24, 1, 10)])
def test_weight_mse_against_brute_force(shape, bits):
    w = weight_like(shape)
    amax = weight_amax(w, bits, "mse")
    top = weight_amax(w, bits, "max")
    assert amax.shape == (24,) and (amax <= top).all()
    errors = row_errors(w, amax, bits)
    brute = torch.full((24,), float("inf"), dtype=torch.float64)
    for fraction in torch.linspace(0.001, 1, 1000):
        brute = brute.minimum(row_errors(w, top * fraction, bits))
    live = torch.arange(24) != 3
    assert amax[3] == pytest.approx(MIN_AMAX) and errors[3] == 0
    ratio = errors[live] / brute[live]
    assert ratio.max() < 1.01
    # Never worse than max, whatever the channel.
    assert (errors <= row_errors(w, top, bits) * (1 + 1e-5)).all()


def test_weight_mse_beats_max_where_there_are_outliers():
    w = weight_like((24, 1024))
    better = row_errors(w, weight_amax(w, 4, "mse"), 4)
    worse = row_errors(w, weight_amax(w, 4, "max"), 4)
    assert better[5] < 0.5 * worse[5]


def test_weight_chunks_do_not_show(monkeypatch):
    w = weight_like((37, 50))
    whole = weight_amax(w, 6, "mse")
    monkeypatch.setattr(
        "speechbrain_stablequant.core.calibrators._CHUNK_CPU", 50 * 4
    )
    assert torch.equal(weight_amax(w, 6, "mse"), whole)


@pytest.mark.parametrize("method", ["max", "mse"])
def test_weight_axis_and_dtype(method):
    w = weight_like((12, 4, 3)).half()
    expected = weight_amax(w.float(), 6, method)
    assert torch.equal(weight_amax(w, 6, method), expected)
    for axis in (1, 2, -1):
        moved = w.movedim(0, axis)
        assert torch.equal(weight_amax(moved, 6, method, axis), expected)


def test_weight_leaves_its_input_alone():
    w = weight_like((12, 64)).requires_grad_()
    before = w.detach().clone()
    amax = weight_amax(w, 4, "mse")
    assert torch.equal(w, before) and not amax.requires_grad


def test_weight_refuses():
    w = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"'entropy'.*max, mse"):
        weight_amax(w, 8, "entropy")
    with pytest.raises(ValueError, match="bits must be"):
        weight_amax(w, 1)
    w[1, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        weight_amax(w, 8)
