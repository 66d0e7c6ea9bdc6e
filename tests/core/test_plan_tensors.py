"""Tensors beside a plan: on disk, simulated, as integers, in folders."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from speechbrain_stablequant.core.affine import dequantize, weight_scale
from speechbrain_stablequant.core.integer_layer import reference_forward
from speechbrain_stablequant.core.layer_quant import LayerQuant, LayerTensors
from speechbrain_stablequant.core.plan import LayerPlan, QuantizationPlan
from speechbrain_stablequant.core.plan_tensors import (
    AdjustedTensors,
    adjusted_floats,
    write_tensors,
)
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.folder.stored_floats import (
    fill_modules,
    float_state,
    stored_layer,
)
from speechbrain_stablequant.folder.weights_file import (
    load_checkpoint,
    save_checkpoint,
)
from speechbrain_stablequant.methods.search.journal import evaluation_key
from speechbrain_stablequant.model.layer import Layer
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.simulation.fake_quant import (
    Simulator,
    quantize_input,
)
from speechbrain_stablequant.utils.patching import shadowed_forwards
from speechbrain_stablequant.utils.tensor_bytes import bytes_to_tensors


def modules_of() -> dict[str, nn.Module]:
    """A normalization, a Linear, and a convolution without a bias."""
    return {
        "enc": nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6)),
        "conv": nn.Conv1d(6, 4, 3, bias=False),
    }


def forward(modules, x):
    return modules["conv"](modules["enc"](x).transpose(1, 2))


def plan_of(modules, tensors=None, quant=None):
    quant = quant or LayerQuant(4, 8, 2.0)
    rows = [
        LayerPlan(x.name, x.unit, x.kind, quant, 2.0, 100.0, "test")
        for x in find_layers(modules, list(modules))
    ]
    return QuantizationPlan("x", 4, 8, "f", {}, {}, [], rows, tensors)


def decided(modules) -> AdjustedTensors:
    """Integers that no rounding would give, biases, and a changed norm."""
    layers = {}
    for layer in find_layers(modules, list(modules)):
        shape = layer.module.weight.shape
        layers[layer.name] = LayerTensors(
            torch.randint(-7, 8, shape).to(torch.int8),
            torch.rand(shape[0]) + 0.01,
            torch.randn(shape[0]),
        )
    return AdjustedTensors(layers, {"enc.0.weight": torch.rand(8)})


@pytest.fixture
def modules():
    return modules_of()


@pytest.fixture
def saved(modules, tmp_path):
    plan = plan_of(modules, decided(modules))
    plan.save(tmp_path / "plan.json")
    return plan, tmp_path / "plan.json"


def flat(tensors):
    return tensors.flat()


def test_round_trip(saved):
    plan, path = saved
    assert {f.name for f in path.parent.iterdir()} == {
        "plan.json",
        "plan.safetensors",
    }
    loaded = QuantizationPlan.load(path)
    assert loaded == plan
    one, two = flat(loaded.tensors), flat(plan.tensors)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype
        assert torch.equal(value, two[name])
    assert loaded.tensors.digest() == plan.tensors.digest()
    assert QuantizationPlan.load(path, with_tensors=False).tensors is None


def test_the_same_tensors_are_the_same_bytes(saved, tmp_path):
    _, path = saved
    again = tmp_path / "again"
    again.mkdir()
    QuantizationPlan.load(path).save(again / "plan.json")
    for name in ("plan.json", "plan.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_four_bits_take_four_bits(modules, tmp_path):
    integers = torch.zeros(64, 64, dtype=torch.int8)
    tensors = LayerTensors(integers, torch.ones(64))
    path = tmp_path / "t.safetensors"
    write_tensors(path, AdjustedTensors({"a": tensors}), {"a": 4})
    assert path.stat().st_size < 64 * 64 // 2 + 64 * 4 + 1000


def one_line(path) -> str:
    with pytest.raises(ValueError) as error:
        QuantizationPlan.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_file(saved):
    _, path = saved
    path.with_suffix(".safetensors").unlink()
    assert "plan.safetensors: cannot read the tensors" in one_line(path)


def test_another_file(saved):
    _, path = saved
    file = path.with_suffix(".safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "is not the file that the plan" in one_line(path)


def test_a_path_out_of_the_folder(saved):
    _, path = saved
    text = path.read_text()
    path.write_text(text.replace("plan.safetensors", "../plan.safetensors"))
    assert "damaged plan" in one_line(path)


def test_no_tensors_file(saved):
    import hashlib
    import json

    _, path = saved
    raw = json.loads(path.read_text())
    path.with_suffix(".safetensors").write_bytes(b"nothing")
    raw["tensors"]["sha256"] = hashlib.sha256(b"nothing").hexdigest()
    path.write_text(json.dumps(raw))
    assert "holds no tensors of a plan" in one_line(path)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"floats": {"enc.0.weight": torch.ones(9)}}, "enc.0.weight"),
        ({"floats": {"enc.9.weight": torch.ones(8)}}, "enc.9.weight"),
        (
            {"layers": {"enc.1": LayerTensors(bias=torch.ones(5))}},
            "enc.1.bias",
        ),
        (
            {
                "layers": {
                    "enc.1": LayerTensors(
                        torch.ones(6, 9, dtype=torch.int8), torch.ones(6)
                    )
                }
            },
            "enc.1.weight",
        ),
        (
            {
                "layers": {
                    "enc.1": LayerTensors(
                        torch.ones(6, 8, dtype=torch.int8), torch.ones(6, 3)
                    )
                }
            },
            "enc.1.weight_scale",
        ),
        ({"layers": {"enc.7": LayerTensors(bias=torch.ones(5))}}, "enc.7"),
    ],
)
def test_foreign_shapes(modules, change, name):
    plan = plan_of(modules, AdjustedTensors(**change))
    layers = find_layers(modules, list(modules))
    with pytest.raises(ValueError) as error:
        plan.check_fits(layers, modules, "old/plan.json")
    assert str(error.value).startswith("quantize.plan: old/plan.json: ")
    assert f"'{name}'" in str(error.value)
    assert "\n" not in str(error.value)


def test_own_shapes_fit(modules):
    plan = plan_of(modules, decided(modules))
    plan.check_fits(find_layers(modules, list(modules)), modules, "p")


def test_floats_are_changed_for_a_while(modules):
    before = {k: v.clone() for k, v in float_state(modules, []).items()}
    with (
        pytest.raises(RuntimeError, match="inside"),
        adjusted_floats(modules, {"enc.0.weight": torch.zeros(8)}),
    ):
        assert modules["enc"][0].weight.sum() == 0
        raise RuntimeError("inside")
    after = float_state(modules, [])
    assert all(torch.equal(after[name], before[name]) for name in before)
    with (
        pytest.raises(KeyError),
        adjusted_floats(
            modules, {"enc.0.weight": torch.zeros(8), "x": torch.zeros(1)}
        ),
    ):
        pass
    assert torch.equal(modules["enc"][0].weight, before["enc.0.weight"])


@torch.no_grad()
def test_simulation_integers_and_folder_agree(saved, modules, tmp_path):
    plan, path = saved
    plan = QuantizationPlan.load(path)
    layers = find_layers(modules, list(modules))
    x = torch.randn(2, 9, 8)
    quants, tensors = plan.quants(), plan.tensors
    # By hand: the integers, not the module's weights.
    linear, conv = (tensors.layers[layer.name] for layer in layers)
    norm = nn.functional.layer_norm(
        x, (8,), tensors.floats["enc.0.weight"], modules["enc"][0].bias
    )
    quant = plan.layers[0].quant
    weight = dequantize(linear.weight, linear.weight_scale)
    hidden = quantize_input(norm, quant) @ weight.T + linear.bias
    expected = nn.functional.conv1d(
        quantize_input(hidden.transpose(1, 2), quant),
        dequantize(conv.weight, conv.weight_scale),
        conv.bias,
    )
    with adjusted_floats(modules, tensors.floats):
        simulator = Simulator(layers, tensors.layers)
        with simulator.apply(quants):
            out = forward(modules, x)
        integers = {
            layer.name: stored_layer(
                integer_layer(
                    layer, quants[layer.name], tensors.layers[layer.name]
                ),
                "float32",
            )
            for layer in layers
        }
        floats = {k: v.clone() for k, v in float_state(modules, []).items()}
        save_checkpoint(
            tmp_path, plan, integers, float_state(modules, integers), "float32"
        )
    assert "enc.1.weight" in floats
    # A value at a tie may fall to either side: a step of one input.
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()
    checkpoint = load_checkpoint(tmp_path)
    fresh = modules_of()
    fill_modules(fresh, checkpoint.integers, checkpoint.floats, "here")
    forwards = build_forwards("torch", fresh, checkpoint.integers)
    with shadowed_forwards(forwards):
        loaded = forward(fresh, x)
    assert torch.allclose(loaded, out, atol=1e-5)
    # The model itself is as before.
    with torch.no_grad():
        plain = forward(modules, x)
    assert (plain - out).abs().max() > 0.1


def test_bias_is_as_stored(modules):
    layer = find_layers(modules, ["conv"])[0]
    tensors = LayerTensors(bias=torch.full((4,), 0.1))
    integers = integer_layer(layer, LayerQuant(8, 8, 1.0), tensors)
    assert torch.equal(integers.bias, tensors.bias)
    half = stored_layer(integers, "float16")
    assert torch.equal(half.bias, tensors.bias.half().float())


# -- what only some runtimes execute ---------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("offset", [0.0, 10 / 127, -3 / 127])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_activation_offset(kind, offset):
    module = nn.Linear(8, 5) if kind == "linear" else nn.Conv1d(8, 5, 3)
    x = torch.rand(2, 11, 8) if kind == "linear" else torch.rand(2, 8, 11)
    x = x * 1.3 - 0.2
    layer = Layer("a", module, kind, "head")
    quant = LayerQuant(8, 8, 1.0, activation_offset=offset)
    with Simulator([layer]).apply({"a": quant}):
        simulated = module(x)
    # By hand: the input on its grid, and the weight on its own.
    scale = weight_scale(module.weight, 8, "max")
    integers = integer_layer(layer, quant)
    weight = dequantize(integers.weight, scale)
    grid = ((x - offset) * 127).round().clamp(-127, 127) / 127 + offset
    by_hand = (
        nn.functional.linear(grid, weight, module.bias)
        if kind == "linear"
        else nn.functional.conv1d(grid, weight, module.bias)
    )
    assert torch.allclose(simulated, by_hand, atol=1e-5)
    assert torch.allclose(reference_forward(integers, x), by_hand, atol=1e-5)
    forwards = build_forwards("torch", {"a": module}, {"a": integers})
    assert torch.allclose(forwards[module](x), by_hand, atol=1e-5)


def test_offset_and_zero_padding_are_refused():
    layer = Layer("a", nn.Conv1d(4, 4, 3, padding=1), "conv1d", "head")
    quant = LayerQuant(8, 8, 1.0, activation_offset=0.5)
    with pytest.raises(ValueError, match="padding"):
        integer_layer(layer, quant)
    with (
        pytest.raises(ValueError, match="padding"),
        Simulator([layer]).apply({"a": quant}),
    ):
        pass


def test_an_offset_on_disk_and_back(tmp_path):
    modules = {"a": nn.Linear(8, 4)}
    quant = LayerQuant(4, 8, 1.0, activation_offset=32 / 127)
    plan = plan_of(modules, quant=quant)
    (layer,) = find_layers(modules, ["a"])
    integers = {"a": integer_layer(layer, quant)}
    save_checkpoint(tmp_path, plan, integers, float_state(modules, ["a"]))
    found = load_checkpoint(tmp_path).integers["a"].loaded()
    assert torch.equal(found.float_weight(), integers["a"].float_weight())
    assert found.activation_offset == 32 / 127


def test_keys_of_other_layers_stay_as_they_were():
    """A hash of a journal that was written before there were offsets."""
    quants = {"a": LayerQuant(8, 8, 1.0, "mse")}
    assert evaluation_key("m", quants) == "c673e415bb340d1c4c251ab48a2e8b9f"
    changed = {"a": replace(quants["a"], activation_offset=0.5)}
    assert evaluation_key("m", changed) != evaluation_key("m", quants)


def test_the_file_format_keeps_its_name(tmp_path):
    """Files that were written once must load for ever."""
    file = tmp_path / "plan.safetensors"
    write_tensors(file, AdjustedTensors(floats={"a": torch.ones(1)}), {})
    _, header = bytes_to_tensors(file.read_bytes())
    description = json.loads(header["description"])
    assert description["format"] == "speechbrain_stablequant.plan"
