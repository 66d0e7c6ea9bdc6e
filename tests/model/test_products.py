"""Tests of speechbrain_stablequant.model.products."""

import copy
import threading

import pytest
import torch
from speechbrain.integrations.huggingface.whisper import Whisper
from speechbrain.nnet.attention import (
    MultiheadAttention,
    RelPosEncXL,
    RelPosMHAXL,
)
from tiny_whisper import save_whisper
from torch import nn
from torch.nn import functional as F
from torchaudio.models.wav2vec2.wavlm_attention import WavLMSelfAttention
from transformers import WavLMConfig
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from speechbrain_stablequant.core.affine import fake_quantize, scale_from_amax
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.folder.stored_floats import (
    fill_modules,
    float_state,
    rounded_weights,
)
from speechbrain_stablequant.model.layers import find_layers, visible_layers
from speechbrain_stablequant.model.products import (
    RowsLinear,
    modules_by_name,
    virtual_linears,
    visible,
    visible_forwards,
)
from speechbrain_stablequant.simulation.fake_quant import Simulator
from speechbrain_stablequant.simulation.observers import Observer
from speechbrain_stablequant.utils.patching import hooked

E, B, T, S = 16, 2, 5, 7


def randomized(module: nn.Module) -> nn.Module:
    """No zeros: a missing bias would not be seen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.eval()


def memory():
    return torch.randn(B, S, E)


def query():
    return torch.randn(B, T, E)


def torch_attention(**options):
    return lambda: nn.MultiheadAttention(E, 4, batch_first=True, **options)


def self_mha(module):
    x = query()
    return module(x, x, x)


def self_mha_fast(module):
    x = query()
    return module(x, x, x, need_weights=False)


def masked_mha(module):
    x = query()
    padding = torch.tensor([[False] * T, [False] * (T - 2) + [True] * 2])
    mask = torch.ones(T, T).triu(1).bool()
    return module(x, x, x, key_padding_mask=padding, attn_mask=mask)


def unbatched_mha(module):
    x = query()[0]
    return module(x, x, x)


def cross_mha(module):
    y = memory()
    return module(query(), y, y)


def three_inputs(module):
    return module(query(), memory(), memory())


def other_widths(module):
    return module(query(), memory()[..., :6], memory()[..., :8])


def relative(module):
    x = query()
    return module(x, x, x, RelPosEncXL(E)(x))


def relative_cross(module):
    x = query()
    return module(x, x + 1, x + 2, RelPosEncXL(E)(x))


def wavlm(module):
    return module(query())


def wavlm_masked(module):
    mask = torch.ones(B, T)
    mask[1, 3:] = 0
    return module(query(), attention_mask=mask)


def torchaudio_masked(module):
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[1, 3:] = True
    return module(query(), key_padding_mask=mask)


def hf_attention():
    config = WavLMConfig()
    return WavLMAttention(E, 4, 0.0, config.num_buckets)


def encoder_layer():
    return nn.TransformerEncoderLayer(E, 4, 32, batch_first=True)


def encoder():
    return nn.TransformerEncoder(encoder_layer(), 2)


def padded_encoder(module):
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[1, 3:] = True
    # torch's fast path gives zeros there.
    return module(query(), src_key_padding_mask=mask) * ~mask[..., None]


IN, QKV = ["in_proj_q", "in_proj_kv"], ["q_proj", "k_proj", "v_proj"]
OUT = ["out_proj"]
GATE = ["gru_rel_pos_linear"]
WIDE = [f"in_proj_{x}" for x in "qkv"]
CASES = {
    "self": (torch_attention(), self_mha, IN + OUT),
    "fast path": (torch_attention(), self_mha_fast, IN + OUT),
    "masks": (torch_attention(), masked_mha, IN + OUT),
    "no bias": (torch_attention(bias=False), self_mha, IN + OUT),
    "added keys": (torch_attention(add_bias_kv=True), self_mha, IN + OUT),
    "unbatched": (torch_attention(), unbatched_mha, [*IN, IN[1], *OUT]),
    "cross": (torch_attention(), cross_mha, IN + OUT),
    "three": (torch_attention(), three_inputs, [*IN, IN[1], *OUT]),
    "widths": (torch_attention(kdim=6, vdim=8), other_widths, WIDE + OUT),
    "speechbrain": (
        lambda: MultiheadAttention(4, E),
        self_mha,
        [f"att.{x}" for x in IN + OUT],
    ),
    "speechbrain cross": (
        lambda: MultiheadAttention(4, E),
        cross_mha,
        [f"att.{x}" for x in IN + OUT],
    ),
    "relative": (
        lambda: RelPosMHAXL(E, 4),
        relative,
        ["in_proj", "linear_pos", "out_proj"],
    ),
    "relative cross": (
        lambda: RelPosMHAXL(E, 4),
        relative_cross,
        ["in_proj"] * 3 + ["linear_pos", "out_proj"],
    ),
    "wavlm": (hf_attention, wavlm, GATE + QKV + OUT),
    "wavlm mask": (hf_attention, wavlm_masked, GATE + QKV + OUT),
    "torchaudio": (
        lambda: WavLMSelfAttention(E, 4, has_relative_attention_bias=True),
        wavlm,
        GATE + [f"attention.{x}" for x in IN + OUT],
    ),
    "torchaudio mask": (
        lambda: WavLMSelfAttention(E, 4, has_relative_attention_bias=True),
        torchaudio_masked,
        GATE + [f"attention.{x}" for x in IN + OUT],
    ),
    "encoder layer": (
        encoder_layer,
        wavlm,
        [f"self_attn.{x}" for x in IN + OUT] + ["linear1", "linear2"],
    ),
    "encoder": (
        encoder,
        padded_encoder,
        [
            f"layers.{i}.{x}"
            for i in range(2)
            for x in [
                *(f"self_attn.{x}" for x in IN + OUT),
                "linear1",
                "linear2",
            ]
        ],
    ),
}


def first(output):
    return output[0] if isinstance(output, tuple) else output


def run(call, module):
    torch.manual_seed(1)
    with torch.no_grad():
        return first(call(module))


def recorded(layers, calls):
    """Hooks that note the layers that are called and their inputs."""

    def hook(name):
        return lambda module, args: calls.append((name, args[0]))

    return hooked((x.module, hook(x.name)) for x in layers)


@pytest.fixture(params=CASES)
def case(request):
    make, call, names = CASES[request.param]
    return randomized(make()), call, [f"m.{name}" for name in names]


def test_every_product_is_called_and_nothing_else_changes(case):
    module, call, names = case
    state = list(module.state_dict())
    expected = run(call, module)
    layers = find_layers({"m": module}, ["m"])
    assert sorted({x.name for x in layers}) == sorted(set(names))
    calls = []
    with visible_layers(layers), recorded(layers, calls):
        torch.testing.assert_close(
            run(call, module), expected, atol=1e-5, rtol=0
        )
    assert [name for name, _ in calls] == names
    by_name = {layer.name: layer.module for layer in layers}
    for name, x in calls:
        # Utterances first, as in any other layer.
        rows = 1 if call is unbatched_mha or "linear_pos" in name else B
        assert x.shape[0] == rows and x.dim() == (4 if GATE[0] in name else 3)
        assert x.shape[-1] == by_name[name].weight.shape[1]
    assert list(module.state_dict()) == state
    assert "forward" not in vars(module)
    torch.testing.assert_close(run(call, module), expected, atol=0, rtol=0)


def test_nothing_is_called_outside(case):
    """What the hooks of before could not see."""
    module, call, _ = case
    layers = find_layers({"m": module}, ["m"])
    virtual = [x for x in layers if isinstance(x.module, RowsLinear)]
    calls = []
    with recorded(virtual, calls):
        run(call, module)
    assert calls == []


def test_a_copy_calls_its_own_products(case):
    module, call, names = case
    find_layers({"m": module}, ["m"])
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    expected = run(call, twin)
    layers, calls = find_layers({"m": twin}, ["m"]), []
    with visible_layers(layers), recorded(layers, calls):
        torch.testing.assert_close(run(call, twin), expected, atol=1e-4, rtol=0)
    assert [name for name, _ in calls] == names


def test_installed_forwards_are_copied():
    module = randomized(nn.MultiheadAttention(E, 4))
    for owner, forward in visible_forwards([module]).items():
        owner.forward = forward
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert run(self_mha, twin).abs().max() == 0
    assert run(self_mha, module).abs().max() > 0


@pytest.mark.parametrize("call", [self_mha, cross_mha, masked_mha])
def test_simulation_equals_explicit_quantization(call):
    module = randomized(nn.MultiheadAttention(E, 4, batch_first=True))
    layers = find_layers({"m": module}, ["m"])
    quants = {x.name: LayerQuant(6, 6, 2.0) for x in layers}
    with Simulator(layers).apply(quants):
        got = run(call, module)

    def grid(x):
        return fake_quantize(x, scale_from_amax(torch.tensor(2.0), 6), 6)

    def rows(weight):
        return fake_quantize(
            weight, scale_from_amax(weight.abs().amax(1), 6), 6
        )

    twin = copy.deepcopy(module)
    q, k, v = rows(module.in_proj_weight.detach()).chunk(3)
    bias = module.in_proj_bias

    def explicit(query, key, value, key_padding_mask=None, attn_mask=None):
        parts = (
            F.linear(grid(x), w, b).view(B, -1, 4, E // 4).transpose(1, 2)
            for x, w, b in zip(
                (query, key, value), (q, k, v), bias.chunk(3), strict=True
            )
        )
        hidden = attn_mask
        if hidden is not None:
            hidden = ~(hidden | key_padding_mask[:, None, None])
        out = F.scaled_dot_product_attention(*parts, attn_mask=hidden)
        out = out.transpose(1, 2).reshape(B, -1, E)
        weight, bias_out = twin.out_proj.weight, twin.out_proj.bias
        return F.linear(grid(out), rows(weight.detach()), bias_out)

    torch.testing.assert_close(got, run(call, explicit), atol=1e-5, rtol=0)
    plain = run(call, module)
    assert (got - plain).abs().max() > 0.01  # or this test shows nothing


def test_gradients_pass():
    module = randomized(nn.MultiheadAttention(E, 4)).train()
    torch.manual_seed(1)
    x = torch.randn(T, B, E)
    module(x, x, x)[0].square().sum().backward()
    expected = module.in_proj_weight.grad.clone()
    module.zero_grad()
    with visible([module]):
        module(x, x, x)[0].square().sum().backward()
    torch.testing.assert_close(
        module.in_proj_weight.grad, expected, atol=1e-4, rtol=1e-4
    )


def test_padding_is_not_observed():
    """torch's attention computes with the time first."""
    module = randomized(nn.MultiheadAttention(E, 4, batch_first=True))
    layers = find_layers({"m": module}, ["m"])
    x = torch.ones(B, T, E)
    x[1, 3:] = 100
    observer = Observer(layers)
    observer.start_batch(T, [T, 3])
    with observer.watch(), torch.no_grad():
        module(x, x, x)
    assert {observer.histograms[f"m.{n}"].max for n in IN} == {1.0}


def test_contexts_nest():
    module = randomized(nn.MultiheadAttention(E, 4))
    layers, calls = find_layers({"m": module}, ["m"]), []
    outer, inner = visible_layers(layers), visible_layers(layers)
    with outer, inner, recorded(layers, calls):
        run(self_mha, module)
    assert len(calls) == len(layers)
    assert "forward" not in vars(module)


def test_threads_compute_their_own_input():
    module = randomized(nn.MultiheadAttention(E, 4))
    inputs = [torch.randn(3 + i, B, E) for i in range(8)]
    with torch.no_grad():
        expected = [module(x, x, x)[0] for x in inputs]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(20):
                x = inputs[i]
                found = module(x, x, x)[0]
                if not torch.allclose(found, expected[i], atol=1e-5):
                    wrong.append(i)

    with visible([module]):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_names():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, 4)})
    found = modules_by_name({"m": model, "again": model})
    linear = virtual_linears(model["a"])["in_proj_q"]
    assert found["m.a.in_proj_q"] is linear is found["again.a.in_proj_q"]
    assert linear.weight.data_ptr() == model["a"].in_proj_weight.data_ptr()
    assert len(find_layers({"m": model, "again": model}, ["m", "again"])) == 3
    assert linear not in set(model.modules())


@pytest.fixture
def whisper(tmp_path):
    save_whisper(tmp_path)
    arguments = {"save_path": str(tmp_path / "saved"), "freeze": False}
    return Whisper(source=str(tmp_path), **arguments).float().eval()


@torch.no_grad()
def test_tied_output_projection(whisper):
    """SpeechBrain's Whisper multiplies by the embedding's weight outside of
    any module."""
    torch.manual_seed(0)
    modules, states = {"w": whisper}, torch.randn(1, 1500, 16)
    tokens = torch.tensor([[1, 2, 3]])

    def logits(*_):
        return whisper.forward_decoder(states, tokens)[0]

    *others, projection = find_layers(modules, ["w"])
    assert projection.name == "w.model.decoder.output_projection"
    assert not any(x.owners for x in others)
    calls, expected = [], logits()
    with visible_layers([projection]), recorded([projection], calls):
        torch.testing.assert_close(logits(), expected, atol=0, rtol=0)
    ((_, hidden),) = calls
    assert type(hidden) is torch.Tensor

    quant = LayerQuant(8, 4, 4.0)
    integers = {projection.name: integer_layer(projection, quant)}
    rows = integers[projection.name].float_weight()
    grid = fake_quantize(hidden, scale_from_amax(torch.tensor(4.0), 4), 4)
    with Simulator([projection]).apply({projection.name: quant}):
        simulated = logits()
    torch.testing.assert_close(simulated, F.linear(grid, rows))
    assert (simulated - expected).abs().max() > 1e-3

    # The embedding of a loaded model looks up rows of the same integers.
    floats = float_state(modules, integers)
    shared = "w.model.decoder.embed_tokens.weight"
    assert shared not in floats
    with rounded_weights(modules, integers):
        stored = logits()
    whisper.model.decoder.embed_tokens.weight.zero_()
    fill_modules(modules, integers, floats, "here")
    assert torch.equal(modules_by_name(modules)[projection.name].weight, rows)
    torch.testing.assert_close(logits(), stored, atol=0, rtol=0)
    assert (stored - expected).abs().max() > 0
