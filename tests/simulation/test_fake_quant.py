"""The fake-quantizing forward, against integer arithmetic."""

import copy
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from speechbrain_stablequant.core.affine import (
    quantize,
    scale_from_amax,
    weight_scale,
)
from speechbrain_stablequant.core.layer_quant import LayerQuant, LayerTensors
from speechbrain_stablequant.model.layer import Layer
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.simulation import fake_quant as simulate
from speechbrain_stablequant.simulation.fake_quant import Simulator

TARGET = ["wav2vec2", "enc", "ctc_lin"]
BITS = [(8, 8), (7, 7), (6, 6), (5, 5), (4, 4), (3, 3), (2, 2), (8, 4), (3, 7)]


# -- the reference: integers, and one float multiplication at the end ----------


def integer_linear(q_x, q_w):
    """int32 product of int8 tensors."""
    return torch.matmul(q_x.int(), q_w.int().T)


def integer_conv(q_x, q_w, conv):
    """int32 convolution of int8 tensors, as sums over windows."""
    (kernel,), (stride,) = conv.kernel_size, conv.stride
    (padding,), (dilation,) = conv.padding, conv.dilation
    groups = conv.groups
    padded = F.pad(q_x.int(), (padding, padding))
    windows = padded.unfold(2, (kernel - 1) * dilation + 1, stride)
    windows = windows[..., ::dilation]
    batch, channels, frames, _ = windows.shape
    windows = windows.reshape(batch, groups, channels // groups, frames, kernel)
    weight = q_w.int().reshape(groups, -1, channels // groups, kernel)
    out = torch.einsum("bgctk,gnck->bgnt", windows, weight)
    return out.reshape(batch, -1, frames)


def integer_reference(module, x, quant):
    """What an integer runtime computes for one layer, in float64 at the end."""
    weight = module.weight.detach()
    w_scale = weight_scale(weight, quant.weight_bits, quant.weight_method)
    x_scale = scale_from_amax(
        torch.tensor(quant.activation_amax), quant.activation_bits
    )
    q_w = quantize(weight, w_scale, quant.weight_bits)
    q_x = quantize(x, x_scale, quant.activation_bits)
    is_conv = isinstance(module, nn.Conv1d)
    shape = (-1, 1) if is_conv else (-1,)
    if is_conv:
        accumulator = integer_conv(q_x, q_w, module)
    else:
        accumulator = integer_linear(q_x, q_w)
    assert accumulator.dtype == torch.int32
    out = accumulator.double() * (x_scale.double() * w_scale.double()).view(
        shape
    )
    if module.bias is not None:
        out = out + module.bias.detach().double().view(shape)
    return out


def simulated(module, x, quant):
    simulator = Simulator([Layer("a", module, "", "head")])
    with torch.no_grad(), simulator.apply({"a": quant}):
        return module(x)


def assert_like_integers(module, x, quant):
    """Float rounding apart: far less than a step of any integer."""
    out = simulated(module, x, quant)
    expected = integer_reference(module, x, quant)
    assert out.shape == expected.shape
    assert out.dtype == x.dtype
    error = (out.double() - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max()


def quant_for(x, weight_bits=8, activation_bits=8, method="max"):
    """Cuts the largest inputs, so that the clamp is tested as well."""
    amax = 0.6 * x.abs().max().item()
    return LayerQuant(weight_bits, activation_bits, amax, method)


@pytest.mark.parametrize("weight_bits, activation_bits", BITS)
@pytest.mark.parametrize("method", ["max", "mse"])
def test_linear_is_integer_arithmetic(weight_bits, activation_bits, method):
    linear = nn.Linear(96, 40)
    x = torch.randn(3, 11, 96)
    quant = quant_for(x, weight_bits, activation_bits, method)
    assert_like_integers(linear, x, quant)


def test_linear_without_bias():
    x = torch.randn(5, 64)
    assert_like_integers(nn.Linear(64, 7, bias=False), x, quant_for(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("groups", [1, 4])
def test_conv_is_integer_arithmetic(groups, stride, padding, dilation, bias):
    conv = nn.Conv1d(
        16, 12, 5, stride, padding, dilation, groups=groups, bias=bias
    )
    x = torch.randn(2, 16, 53)
    assert_like_integers(conv, x, quant_for(x))


@pytest.mark.parametrize("weight_bits, activation_bits", BITS)
def test_conv_at_every_width(weight_bits, activation_bits):
    conv = nn.Conv1d(16, 8, 4, stride=2, padding=3, groups=4)
    x = torch.randn(2, 16, 31)
    quant = quant_for(x, weight_bits, activation_bits, "mse")
    assert_like_integers(conv, x, quant)


@pytest.mark.parametrize("bits", [8, 4])
def test_every_layer_of_the_models(tiny_modules, bits):
    """Weight norm and all, on the inputs that the layer has in the model."""
    layers = find_layers(tiny_modules, TARGET)
    inputs = layer_inputs(tiny_modules, layers)
    for layer in layers:
        x = inputs[layer.name]
        quant = quant_for(x, bits, bits, "mse")
        assert_like_integers(layer.module, x, quant)


def test_padding_of_another_kind():
    conv = nn.Conv1d(4, 4, 5, padding=2, padding_mode="reflect")
    plain = nn.Conv1d(4, 4, 5)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(1, 4, 20)
    quant = quant_for(x)
    expected = integer_reference(plain, F.pad(x, (2, 2), "reflect"), quant)
    error = (simulated(conv, x, quant) - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max()


def test_eight_bits_are_close_and_two_are_not():
    """The reference above could share an error with what it tests."""
    linear = nn.Linear(256, 64)
    x = torch.randn(50, 256)
    amax = x.abs().max().item()

    def error(bits):
        out = simulated(linear, x, LayerQuant(bits, bits, amax, "mse"))
        return ((out - linear(x)).square().mean() / linear(x).var()).sqrt()

    assert error(8) < 0.03 < error(4) < 0.5 < error(2)


def test_silence():
    """An amax of 0 gives the bias and no NaN."""
    linear = nn.Linear(4, 3)
    out = simulated(linear, torch.zeros(2, 4), LayerQuant(8, 8, 0.0))
    assert torch.equal(out, linear.bias.expand(2, 3))


# -- dtypes --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_half_precision_comes_back(dtype, kind):
    """The product itself is exact: only the output is rounded."""
    module = nn.Linear(32, 8) if kind == "linear" else nn.Conv1d(32, 8, 3)
    shape = (2, 9, 32) if kind == "linear" else (2, 32, 9)
    x = torch.randn(shape).to(dtype)
    quant = quant_for(x.float())
    out = simulated(module, x, quant)
    assert out.dtype == dtype
    assert torch.equal(out, simulated(module, x.float(), quant).to(dtype))


def test_model_in_half_precision():
    linear = nn.Linear(32, 8).to(torch.bfloat16)
    x = torch.randn(4, 32).to(torch.bfloat16)
    quant = quant_for(x.float())
    out = simulated(linear, x, quant)
    expected = simulated(copy.deepcopy(linear).float(), x.float(), quant)
    assert torch.equal(out, expected.to(torch.bfloat16))


def test_autocast_does_not_round_the_grid_again():
    linear = nn.Linear(32, 8)
    x = torch.randn(4, 32)
    quant = quant_for(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16  # autocast is on
        inside = simulated(linear, x, quant)
    assert torch.equal(inside, simulated(linear, x, quant))


def test_products_are_not_rounded_either(monkeypatch):
    """TF32 is left where the device knows it, see test_precision."""
    seen = []

    @contextmanager
    def noted(x):
        seen.append(x)
        yield

    monkeypatch.setattr(simulate, "plain_float32", noted)
    linear, x = nn.Linear(32, 8), torch.randn(4, 32)
    simulated(linear, x, quant_for(x))
    assert len(seen) == 1 and seen[0] is x


# -- the float model is itself again -------------------------------------------


def forward(modules, wavs):
    with torch.no_grad():
        features = modules["wav2vec2"](wavs)
        return modules["ctc_lin"](modules["enc"](features))


def layer_inputs(modules, layers):
    """The input of each layer for some audio."""
    inputs = {}

    def keep(name):
        def hook(module, args):
            inputs[name] = args[0].clone()

        return hook

    handles = [
        layer.module.register_forward_pre_hook(keep(layer.name))
        for layer in layers
    ]
    forward(modules, torch.randn(2, 2000))
    for handle in handles:
        handle.remove()
    return inputs


def quants_for(modules, layers, bits=8):
    inputs = layer_inputs(modules, layers)
    return {
        layer.name: LayerQuant(
            bits, bits, inputs[layer.name].abs().max().item()
        )
        for layer in layers
    }


def snapshot(modules):
    return {k: v.clone() for k, v in modules.state_dict().items()}


def assert_same_state(modules, state):
    now = modules.state_dict()
    assert list(now) == list(state)
    for name, value in state.items():
        assert torch.equal(now[name], value), name


def assert_untouched(modules, layers):
    for layer in layers:
        assert "forward" not in vars(layer.module)


def test_state_dict_and_outputs(tiny_modules):
    layers = find_layers(tiny_modules, TARGET)
    quants = quants_for(tiny_modules, layers, bits=6)
    wavs = torch.randn(2, 2000)
    state, before = snapshot(tiny_modules), forward(tiny_modules, wavs)
    simulator = Simulator(layers)
    with simulator.apply(quants):
        assert_same_state(tiny_modules, state)
        during = forward(tiny_modules, wavs)
        assert_same_state(tiny_modules, state)
    assert_same_state(tiny_modules, state)
    assert_untouched(tiny_modules, layers)
    assert not torch.equal(during, before)
    assert torch.equal(forward(tiny_modules, wavs), before)
    # And what is kept for the next time gives the same again.
    with simulator.apply(quants):
        assert torch.equal(forward(tiny_modules, wavs), during)


def test_every_layer_is_quantized(make_tiny_modules):
    """Each one alone changes the output: none is quantized in name only."""
    modules = make_tiny_modules("hubert-large")
    layers = find_layers(modules, TARGET)
    quants = quants_for(modules, layers, bits=3)
    wavs = torch.randn(1, 2000)
    before = forward(modules, wavs)
    simulator = Simulator(layers)
    for name, quant in quants.items():
        with simulator.apply({name: quant}):
            assert not torch.equal(forward(modules, wavs), before), name


def test_layers_that_are_not_named_stay_float(make_tiny_modules):
    modules = make_tiny_modules("wav2vec2-base")
    layers = find_layers(modules, TARGET)
    wavs = torch.randn(1, 2000)
    with torch.no_grad():
        features = modules["wav2vec2"](wavs)
        with Simulator(layers).apply({"ctc_lin.w": LayerQuant(4, 4, 1.0)}):
            assert torch.equal(modules["wav2vec2"](wavs), features)


def test_exception_inside(tiny_modules):
    layers = find_layers(tiny_modules, TARGET)
    wavs = torch.randn(1, 2000)
    state, before = snapshot(tiny_modules), forward(tiny_modules, wavs)
    with (
        pytest.raises(KeyboardInterrupt),
        Simulator(layers).apply(quants_for(tiny_modules, layers)),
    ):
        raise KeyboardInterrupt
    assert_untouched(tiny_modules, layers)
    assert_same_state(tiny_modules, state)
    assert torch.equal(forward(tiny_modules, wavs), before)


def test_checkpoint_loads_while_simulated(tiny_modules):
    layers = find_layers(tiny_modules, TARGET)
    wavs = torch.randn(1, 2000)
    state, before = snapshot(tiny_modules), forward(tiny_modules, wavs)
    with Simulator(layers).apply(quants_for(tiny_modules, layers)):
        result = tiny_modules.load_state_dict(state, strict=True)
        assert not result.missing_keys
        assert not result.unexpected_keys
    assert torch.equal(forward(tiny_modules, wavs), before)


def test_unknown_layer():
    layers = [Layer("a", nn.Linear(2, 2), "linear", "head")]
    quant = LayerQuant(8, 8, 1.0)
    with (
        pytest.raises(KeyError, match="nobody"),
        Simulator(layers).apply({"a": quant, "nobody": quant}),
    ):
        pass
    assert_untouched(None, layers)


def test_nested():
    """Neither simulation could be what a layer computes."""
    layers = [
        Layer(name, nn.Linear(2, 2), "linear", "head") for name in ("a", "b")
    ]
    simulator, quant = Simulator(layers), LayerQuant(2, 2, 1.0)
    x, module = torch.randn(3, 2), layers[1].module
    with simulator.apply({"b": quant}):
        during = module(x)
        with (
            pytest.raises(ValueError, match="Linear: its forward"),
            simulator.apply({"a": quant, "b": quant}),
        ):
            pass
        # The outer simulation goes on, the inner one left nothing.
        assert "forward" not in vars(layers[0].module)
        assert torch.equal(module(x), during)
    assert_untouched(None, layers)


def test_side_by_side():
    """Another layer may be simulated inside: a search adds to a prefix."""
    layers = [
        Layer(name, nn.Linear(2, 2), "linear", "head") for name in ("a", "b")
    ]
    simulator, quant = Simulator(layers), LayerQuant(8, 8, 1.0)
    with simulator.apply({"a": quant}), simulator.apply({"b": quant}):
        assert all("forward" in vars(layer.module) for layer in layers)
    assert_untouched(None, layers)


def test_bits_and_methods_are_kept_apart():
    """What is remembered of one setting must not serve another."""
    linear = nn.Linear(200, 4)
    nn.init.normal_(linear.weight)  # so that max and mse differ
    simulator = Simulator([Layer("a", linear, "linear", "head")])
    x = torch.randn(3, 200)
    outputs = []
    for quant in (
        LayerQuant(4, 8, 3.0, "max"),
        LayerQuant(4, 8, 3.0, "mse"),
        LayerQuant(3, 8, 3.0, "mse"),
        LayerQuant(4, 8, 1.0, "max"),
    ):
        with torch.no_grad(), simulator.apply({"a": quant}):
            outputs.append(linear(x))
        assert torch.equal(outputs[-1], simulated(linear, x, quant))
        assert not any(torch.equal(out, outputs[-1]) for out in outputs[:-1])


@pytest.fixture
def made(monkeypatch):
    """Weak references to all weights on the grid that are made."""
    made = []

    def noting(make):
        def make_and_note(*args):
            found = make(*args)
            made.append(weakref.ref(found))
            return found

        return make_and_note

    for name in ("fake_quantize", "dequantize"):
        monkeypatch.setattr(simulate, name, noting(getattr(simulate, name)))
    return made


def test_one_weight_of_a_layer_is_kept(made):
    """However many precisions are tried."""
    linear = nn.Linear(6, 4)
    simulator = Simulator([Layer("a", linear, "linear", "head")])
    for bits in (8, 4, 3):
        for amax in (1.0, 2.0, 1.0):
            with simulator.apply({"a": LayerQuant(bits, 8, amax, "mse")}):
                pass
    assert len(made) == 3
    assert [ref() is None for ref in made] == [True, True, False]


def test_decided_integers_are_restored_once(made):
    linear, x = nn.Linear(6, 4), torch.randn(3, 6)
    simulator = Simulator([Layer("a", linear, "linear", "head")])
    q = torch.randint(-7, 8, (4, 6), dtype=torch.int8)
    decided = LayerTensors(q, torch.rand(4), torch.rand(4))
    without = LayerTensors(q, decided.weight_scale)
    other = LayerTensors(q.clone(), decided.weight_scale)
    outputs = {}
    for tensors in (decided, decided, without, other, decided, None):
        simulator.tensors = {} if tensors is None else {"a": tensors}
        with torch.no_grad(), simulator.apply({"a": LayerQuant(4, 8, 3.0)}):
            found = linear(x)
        # What is kept of one must not serve another.
        assert torch.equal(outputs.setdefault(id(tensors), found), found)
    assert len(made) == 4
    assert sum(ref() is not None for ref in made) == 1
    bias = decided.bias - linear.bias
    one, two = outputs[id(decided)], outputs[id(without)]
    assert torch.allclose(one - two, bias, atol=1e-6)
    assert torch.equal(two, outputs[id(other)])
    assert not torch.equal(two, outputs[id(None)])
