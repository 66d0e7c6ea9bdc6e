"""Rounding by the data: against brute force, and behind quantized layers."""

import itertools
import math
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from speechbrain_stablequant.core.affine import (
    dequantize,
    quantize,
    weight_scale,
)
from speechbrain_stablequant.core.layer_quant import LayerQuant, LayerTensors
from speechbrain_stablequant.methods.adaround import AdaRound
from speechbrain_stablequant.methods.layerwise import gptq, reconstruct
from speechbrain_stablequant.methods.layerwise.gptq import Compensate
from speechbrain_stablequant.methods.layerwise.hessian import (
    LagSum,
    MomentSum,
    signals,
    slides,
    unfolded,
)
from speechbrain_stablequant.methods.layerwise.prefix_walk import PrefixWalk
from speechbrain_stablequant.methods.layerwise.reconstruct import (
    LayerStore,
    refine,
)
from speechbrain_stablequant.methods.registry import QuantizeConfig
from speechbrain_stablequant.methods.session.session import Session
from speechbrain_stablequant.simulation import fake_quant as simulate
from speechbrain_stablequant.simulation.fake_quant import quantize_input
from speechbrain_stablequant.simulation.prefix_cache import StopForward
from speechbrain_stablequant.utils.precision import allows_tf32
from speechbrain_stablequant.utils.store import Store

QUICK = AdaRound(iterations=300, lr=0.05)


def correlated(rows, inputs):
    """Inputs that move together, as those of real layers do."""
    mixing = torch.eye(inputs) + 0.8 * torch.randn(inputs, inputs)
    return torch.randn(rows, inputs) @ mixing


def gram_of(x, q=None):
    q = x if q is None else q
    return x.T @ q / len(x)


def error(weight, integers, scale, x, q=None):
    """Mean squared output error against the float weight on float input."""
    q = x if q is None else q
    difference = x @ weight.T - q @ dequantize(integers, scale).T
    return difference.square().sum(1).mean()


# -- the solvers ---------------------------------------------------------------


def best_rounding(weight, scale, x):
    """The least error that any rounding up or down gives."""
    best = torch.inf
    floor = (weight / scale[:, None]).clamp(-1, 1).floor().clamp(max=0)
    total = 0.0
    for row in range(len(weight)):
        best = min(
            float(
                error(
                    weight[row : row + 1],
                    floor[row : row + 1] + torch.tensor([ups]),
                    scale[row : row + 1],
                    x,
                )
            )
            for ups in itertools.product([0.0, 1.0], repeat=weight.shape[1])
        )
        total += best
    return total


def test_adaround_finds_the_best_rounding():
    """Inputs that mostly move together: the sum of a row matters."""
    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        weight = torch.randn(2, 4)
        x = torch.randn(500, 1) + 0.3 * torch.randn(500, 4)
        gram = gram_of(x)
        q, scale = QUICK(weight, 2, "max", gram, gram)
        assert q.dtype == torch.int8
        best = best_rounding(weight, scale, x)
        ratios.append(float(error(weight, q, scale, x)) / best)
    # Roundings are learned together, not tried: the best or next to it.
    assert max(ratios) < 1.1
    assert sum(ratio < 1.0001 for ratio in ratios) >= 3


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize(
    "solve", [QUICK, Compensate(cross=False)], ids=["adaround", "compensate"]
)
def test_better_than_nearest(solve, bits):
    weight, x = torch.randn(12, 32), correlated(2000, 32)
    gram = gram_of(x)
    q, scale = solve(weight, bits, "mse", gram, gram)
    assert q.abs().max() <= 2 ** (bits - 1) - 1
    nearest = quantize(weight, scale, bits)
    before = error(weight, nearest, scale, x)
    assert error(weight, q, scale, x) < 0.7 * before


def test_inputs_of_much_energy_are_not_cut_off():
    """A large weight of a strong input: the nearest scale would clip it."""
    weight, x = torch.randn(12, 256), correlated(2000, 256)
    weight[:, 5] = 5.0
    x[:, 5] *= 20
    gram = gram_of(x)
    q, scale = Compensate(cross=False)(weight, 3, "mse", gram)
    usual = weight_scale(weight, 3, "mse")
    nearest = quantize(weight, usual, 3)
    assert error(weight, q, scale, x) < 0.1 * error(weight, nearest, usual, x)
    assert (q[:, 5] * scale - 5).abs().max() < (
        nearest[:, 5] * usual - 5
    ).abs().min()


def test_adaround_only_rounds_up_or_down():
    weight, x = torch.randn(12, 32), correlated(2000, 32)
    gram = gram_of(x)
    q, scale = QUICK(weight, 3, "max", gram, gram)
    assert ((weight / scale[:, None]) - q).abs().max() < 1.0001


def test_compensation_of_earlier_errors():
    """Inputs that earlier layers have shrunk: only E[x q'] tells."""
    weight, x = torch.randn(12, 32), correlated(4000, 32)
    q = x * torch.linspace(0.5, 1, 32) + 0.1 * torch.randn_like(x)
    moments = gram_of(q), gram_of(x, q)
    plain = Compensate(cross=False)(weight, 8, "mse", *moments)
    aimed = Compensate(cross=True)(weight, 8, "mse", *moments)
    before = error(weight, *plain, x, q)
    assert error(weight, *aimed, x, q) < 0.2 * before


def test_many_rows_are_rounded_in_parts(monkeypatch):
    weight, x = torch.randn(12, 32), correlated(500, 32)
    gram = gram_of(x)
    whole = Compensate()(weight, 4, "mse", gram, gram)
    monkeypatch.setattr(gptq, "_ROWS", 5)
    q, scale = Compensate()(weight, 4, "mse", gram, gram)
    # Products of other shapes sum in another order.
    assert torch.allclose(scale, whole[1])
    assert (q != whole[0]).float().mean() < 0.02


@pytest.mark.parametrize("cross", [False, True])
def test_few_rows_do_not_fit_their_noise(cross):
    """As many inputs as tokens: errors on what the moments have not seen."""
    weight, x = torch.randn(16, 96), correlated(4096, 96)
    # Without a target of its own, rounding alone makes errors.
    q = x + 0.2 * cross * x.std() * torch.randn_like(x)
    rows = 96
    moments = gram_of(q[:rows]), gram_of(x[:rows], q[:rows])

    def unseen(count):
        found = Compensate(cross=cross)(weight, 4, "mse", *moments, count)
        return error(weight, *found, x[rows:], q[rows:])

    assert unseen(rows) < 0.8 * unseen(math.inf)


@pytest.mark.parametrize("solve", [QUICK, Compensate()])
def test_dead_inputs(solve):
    weight, x = torch.randn(3, 6), correlated(100, 6)
    x[:, 2] = 0
    gram = gram_of(x)
    q, scale = solve(weight, 8, "max", gram, gram)
    dead = quantize(weight, scale, 8)[:, 2]
    assert torch.isfinite(scale).all()
    assert (q[:, 2] - dead).abs().max() <= 1


def test_inputs_that_are_not_finite():
    gram = torch.full((4, 4), torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        Compensate()(torch.randn(2, 4), 8, "max", gram, gram)


# -- moments -------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, shape",
    [
        (lambda: nn.Linear(6, 4), (3, 9, 6)),
        (lambda: nn.Conv1d(6, 4, 5, 2, 1, 2), (3, 6, 31)),
        (
            lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2),
            (3, 4, 9, 11),
        ),
        (
            lambda: weight_norm(
                nn.Conv1d(8, 12, 4, padding=2, groups=4), dim=2
            ),
            (3, 8, 17),
        ),
    ],
)
@torch.no_grad()
def test_rows_give_the_output(build, shape):
    module, x = build(), torch.randn(shape)
    out = module(x)
    rows = unfolded(module, x)
    weight = module.weight.reshape(len(rows), -1, rows.shape[2])
    product = torch.einsum("grk,gok->rgo", rows, weight).flatten(1)
    product = product + module.bias
    if not isinstance(module, nn.Linear):
        out = out.movedim(1, -1)
    assert torch.allclose(product, out.reshape(product.shape), atol=1e-5)


@torch.no_grad()
def test_rows_leave_out_the_padding():
    conv, x = nn.Conv1d(2, 2, 4, 2), torch.randn(2, 2, 20)
    alone = torch.cat([unfolded(conv, x[:1]), unfolded(conv, x[1:, :, :9])], 1)
    assert torch.equal(unfolded(conv, x, [20, 9]), alone)
    linear, y = nn.Linear(3, 2), torch.randn(2, 5, 3)
    assert torch.equal(
        unfolded(linear, y, [5, 2])[0], torch.cat([y[0], y[1, :2]])
    )


def test_moments_by_hand():
    x, q = torch.randn(2, 50, 3), torch.randn(2, 50, 3)
    total = MomentSum(second=True, cross=True)
    for part in (slice(0, 20), slice(20, 50)):
        total.add(x[:, part], q[:, part])
    moments = total.result()
    assert torch.allclose(moments.gram[1], gram_of(q[1]), atol=1e-5)
    assert torch.allclose(moments.cross[0], gram_of(x[0], q[0]), atol=1e-5)
    assert torch.allclose(moments.float_mean, x.mean(1), atol=1e-6)
    with pytest.raises(ValueError, match="no frame"):
        MomentSum(True, True).result()


@pytest.mark.parametrize("frames", [None, [23, 11, 3]])
@pytest.mark.parametrize("padding, groups", [(0, 1), (4, 2), (5, 6)])
def test_moments_by_lags(frames, padding, groups):
    """The same as those of the windows themselves."""
    conv = nn.Conv1d(12, 6, 8, padding=padding, groups=groups)
    assert slides(conv)
    rows = MomentSum(True, True, (-0.7, 0.9))
    lags = LagSum(8, True, True, (-0.7, 0.9))
    for _ in range(2):
        x, q = torch.randn(3, 12, 23), torch.randn(3, 12, 23)
        rows.add(*(unfolded(conv, v, frames) for v in (x, q)))
        lags.add(*(signals(conv, v, frames) for v in (x, q)))
    expected, found = rows.result(), lags.result()
    assert torch.allclose(found.mean, expected.mean, atol=1e-6)
    assert torch.allclose(found.float_mean, expected.float_mean, atol=1e-6)
    for g in range(groups):
        assert torch.allclose(found.gram[g], expected.gram[g], atol=1e-5)
        assert torch.allclose(found.cross[g], expected.cross[g], atol=1e-5)


def test_moments_by_lags_of_some_groups():
    conv, x = nn.Conv1d(12, 6, 9, groups=6), torch.randn(1, 12, 20)
    total = LagSum(9, True, False)
    total.add(*[signals(conv, x, None, slice(2, 4))] * 2)
    windows = unfolded(conv, x, None, slice(2, 4))
    for g, matrix in enumerate(windows.mT @ windows / windows.shape[1]):
        assert torch.allclose(total.result().gram[g], matrix, atol=1e-5)
    with pytest.raises(ValueError, match="no frame"):
        LagSum(9, True, False).result()


# -- the walk ------------------------------------------------------------------


class Data:
    """A recognizer with batches for a tiny encoder."""

    show_progress = False
    autoregressive = False

    def __init__(self, modules, padded=False):
        self.modules = dict(modules.items())
        torch.manual_seed(3)
        self.batches = [torch.randn(2, 1300) for _ in range(2)]
        self.real = [1300, 900 if padded else 1300]
        self.runs = 0

    def lengths(self, subset, batch):
        return 1300, self.real

    @torch.no_grad()
    def forward(self, subset, before_batch, first_only=False, turns=1):
        for index, wavs in enumerate(self.batches):
            for _ in range(turns):
                before_batch(index)
                self.runs += 1
                with suppress(StopForward):
                    self.output(wavs)
            if first_only:
                break

    def output(self, wavs):
        relative = torch.tensor(self.real) / 1300
        x = self.modules["wav2vec2"](wavs, relative)
        return self.modules["ctc_lin"](self.modules["enc"](x))

    @torch.no_grad()
    def outputs(self):
        return torch.cat([self.output(wavs) for wavs in self.batches])


def walk_of(data, cached=True):
    block = {"target": list(data.modules)}
    if not cached:
        block["search"] = {"cache_gb": 0}
    config = QuantizeConfig.from_dict(block)
    return PrefixWalk(Session(data, config, Store(None), ()), True)


def quants_of(walk, bits=4):
    return {
        name: LayerQuant(bits, 8, 6.0, "mse") for name in walk.simulator.layers
    }


@pytest.fixture
def modules(make_tiny_modules):
    return make_tiny_modules("hubert-large", num_hidden_layers=1)


def test_groups_share_inputs(tiny_modules):
    walk = walk_of(Data(tiny_modules))
    groups = [[x.name for x in group] for group in walk.groups()]
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(walk.simulator.layers)
    shared = [group for group in groups if len(group) > 1]
    assert len(shared) == 2
    for group in shared:
        ends = [name.rpartition(".")[2] for name in group]
        assert sorted(ends) == ["k_proj", "q_proj", "v_proj"]
    order = [name.split(".")[-2:] for name in names]
    assert order[-1] == ["ctc_lin", "w"]


def test_a_layer_called_twice_is_refused():
    class Twice(Data):
        def output(self, wavs):
            return self.modules["a"](self.modules["a"](wavs))

    walk = walk_of(Twice({"a": nn.Linear(1300, 1300)}))
    with pytest.raises(ValueError, match="a: is called twice"):
        walk.groups()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_moments_behind_a_prefix(modules, padded, cached):
    """As from hooks on a whole pass of the float and the quantized model."""
    data = Data(modules, padded)
    walk = walk_of(data, cached)
    quants = quants_of(walk, 3)
    names = list(walk.simulator.layers)
    for name in (names[2], names[8], names[-4], names[-1]):
        layer = walk.simulator.layers[name]
        decided = {n: quants[n] for n in names[: names.index(name)]}
        seen = [[], []]
        for turn, quantized in enumerate(({}, decided)):
            handle = layer.module.register_forward_pre_hook(
                lambda m, args, side=seen[turn]: side.append(args[0])
            )
            with walk.simulator.apply(quantized):
                data.outputs()
            handle.remove()
        x, q = (
            torch.cat(
                [
                    unfolded(layer.module, v, walk._frames(layer, v, 0))
                    for v in side
                ],
                1,
            )
            for side in seen
        )
        q = quantize_input(q, quants[name])
        moments = walk.moments(layer, quants[name], decided)
        for found, expected in (
            (moments.mean, q.mean(1)),
            (moments.float_mean, x.mean(1)),
            (moments.gram, q.mT @ q / q.shape[1]),
            (moments.cross, x.mT @ q / q.shape[1]),
        ):
            # Those of overlapping windows are made when they are asked for.
            each = torch.stack([found[g] for g in range(len(expected))])
            assert torch.allclose(each, expected, rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(m) for m in modules.modules())


def refined(modules, tmp_path, solve, centered=False, bits=4, key="k", **more):
    data = Data(modules)
    walk = walk_of(data)
    quants = quants_of(walk, bits)
    tensors = refine(
        walk,
        quants,
        LayerStore(Store(tmp_path), key),
        lambda layer: solve,
        lambda layer: centered,
        **more,
    )
    return walk, quants, tensors, data


def drift(walk, quants, data, tensors=()):
    """Mean squared change of the model's output."""
    walk.simulator.tensors = dict(tensors)
    expected = data.outputs()
    with walk.simulator.apply(quants):
        out = data.outputs()
    return (out - expected).square().mean()


@pytest.mark.parametrize(
    "solve, centered, models, gain",
    [
        (QUICK, False, 1, 0.2),
        (Compensate(cross=False), False, 8, 0.8),
        (Compensate(), True, 1, 0.1),
        (None, True, 8, 1.0),
    ],
    ids=["adaround", "compensate", "everything", "bias"],
)
def test_the_whole_model_gains(
    make_tiny_modules, tmp_path, solve, centered, models, gain
):
    """In the mean of several models, where one of them may lose: what is least
    for each layer need not be so for all together."""
    ratios = []
    for seed in range(models):
        torch.manual_seed(seed)
        modules = make_tiny_modules("hubert-large", num_hidden_layers=1)
        walk, quants, tensors, data = refined(
            modules, tmp_path / str(seed), solve, centered
        )
        assert set(tensors) == set(quants)
        after = drift(walk, quants, data, tensors)
        ratios.append(after / drift(walk, quants, data))
        for name, found in tensors.items():
            module = walk.simulator.layers[name].module
            assert found.weight.shape == module.weight.shape
            assert (found.bias is not None) == centered
    assert torch.stack(ratios).log().mean().exp() < gain


@torch.no_grad()
def test_corrected_bias_has_no_mean_error(modules, tmp_path):
    walk, quants, tensors, data = refined(modules, tmp_path, None, True)
    walk.simulator.tensors = tensors
    last = list(walk.simulator.layers)[-1]
    expected = data.outputs().mean((0, 1))
    with walk.simulator.apply(quants):
        out = data.outputs().mean((0, 1))
    assert last.startswith("ctc_lin")
    assert (out - expected).abs().max() < 1e-4


def test_a_decided_weight_is_restored_once(modules, tmp_path, monkeypatch):
    """Not for each batch of the calibration set."""
    restored = []

    def restore(q, scale):
        restored.append(q)
        return dequantize(q, scale)

    monkeypatch.setattr(simulate, "dequantize", restore)
    _, quants, _, data = refined(modules, tmp_path, Compensate())
    assert len(data.batches) > 1
    assert 0 < len(restored) < len(quants)


def test_precision_that_was_set_in_two_ways(modules, tmp_path):
    """torch then refuses to say what holds."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = allows_tf32()
    torch.set_float32_matmul_precision("high")
    matmul.allow_tf32 = False
    try:
        assert refined(modules, tmp_path, None, True)[2]
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.allow_tf32, cudnn.allow_tf32 = before


class Killed(Exception):
    """In place of a signal."""


@pytest.mark.parametrize("solve", [AdaRound(iterations=60), Compensate()])
def test_a_killed_run_goes_on(modules, tmp_path, solve):
    whole = refined(modules, tmp_path / "a", solve, True)[2]
    done = []

    def kill(name):
        done.append(name)
        if len(done) in (5, 14):
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            refined(modules, tmp_path / "b", solve, True, on_layer=kill)
    again = refined(modules, tmp_path / "b", solve, True)[2]
    assert set(again) == set(whole)
    for name, tensors in whole.items():
        assert torch.equal(again[name].weight, tensors.weight)
        assert torch.equal(again[name].weight_scale, tensors.weight_scale)
        assert torch.equal(again[name].bias, tensors.bias)
    # What is finished is not computed again: one pass for the order.
    assert refined(modules, tmp_path / "b", solve, True)[3].runs == 1
    other = refined(modules, tmp_path / "b", solve, True, key="other")
    assert other[3].runs > 9


def test_an_error_names_the_layer(modules, tmp_path):
    norm = modules["wav2vec2"].model.feature_projection.layer_norm
    norm.weight.data.fill_(torch.nan)
    reason = r"feature_projection\.projection: the Hessian of its inputs is not"
    with pytest.raises(ValueError, match=reason):
        refined(modules, tmp_path, Compensate())


def test_a_wide_convolution_in_parts(modules, tmp_path, monkeypatch):
    whole = refined(modules, tmp_path / "a", Compensate(), True)[2]
    monkeypatch.setattr(reconstruct, "MOMENT_BYTES", 1)
    parts = refined(modules, tmp_path / "b", Compensate(), True)[2]
    (name,) = [n for n in whole if "pos_conv" in n]
    same = parts[name].weight == whole[name].weight
    # Added up in another order, so a tie may fall to the other side.
    assert same.float().mean() > 0.99


def test_float_layers_stay_float(modules, tmp_path):
    data = Data(modules)
    walk = walk_of(data)
    quants = quants_of(walk)
    left = [n for n in quants if "layers.0" in n]
    for name in left:
        del quants[name]
    store = LayerStore(Store(tmp_path), "k")
    tensors = refine(walk, quants, store, lambda layer: Compensate())
    assert set(tensors) == set(quants)
    assert isinstance(tensors["ctc_lin.w"], LayerTensors)
