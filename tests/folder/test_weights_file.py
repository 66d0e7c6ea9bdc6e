"""Quantized models on disk: exact, small, and errors that say what is wrong."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan import LayerPlan, QuantizationPlan
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.folder import weights_file as checkpoint
from speechbrain_stablequant.folder.errors import CheckpointError
from speechbrain_stablequant.folder.stored_floats import (
    float_state,
    rounded_floats,
    stored_float,
)
from speechbrain_stablequant.folder.weights_file import (
    load_checkpoint,
    save_checkpoint,
)
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.utils.files import file_digest


def plan_of(layers, bits=8, left_float=()):
    """A plan that quantizes layers."""
    rows = [
        LayerPlan(
            layer.name,
            layer.unit,
            layer.kind,
            None
            if layer.name in left_float
            else LayerQuant(bits, max(bits, 4), 1.5 + 0.1 * index, "mse"),
            3.0,
            100.0,
            "a test",
        )
        for index, layer in enumerate(layers)
    ]
    return QuantizationPlan("max", bits, bits, "0" * 32, {}, {}, [], rows)


def quantized(modules, bits=8, left_float=()):
    """Plan and integer layers of modules."""
    layers = find_layers(modules, list(modules))
    plan = plan_of(layers, bits, left_float)
    quants = plan.quants()
    integers = {
        layer.name: integer_layer(layer, quants[layer.name])
        for layer in layers
        if layer.name in quants
    }
    return plan, integers


def small_modules():
    """A convolution with weight norm, a norm, a linear layer."""
    conv = weight_norm(nn.Conv1d(8, 16, 3, padding=1, groups=2), dim=2)
    return {
        "front": nn.Sequential(conv, nn.BatchNorm1d(16)),
        "head": nn.Linear(16, 5),
    }


def write(folder, bits=8, **options):
    """A small model on disk; gives its modules, plan and integer layers."""
    modules = small_modules()
    plan, integers = quantized(modules, bits)
    floats = float_state(modules, list(integers))
    save_checkpoint(folder, plan, integers, floats, **options)
    return modules, plan, integers


def assert_same(one, two, bias_dtype=torch.float32):
    """Two integer layers, bit for bit."""
    for key in ("name", "kind", "weight_bits", "activation_bits"):
        assert getattr(one, key) == getattr(two, key)
    for key in ("stride", "padding", "dilation", "groups"):
        assert getattr(one, key) == getattr(two, key)
    for key in ("weight", "weight_scale", "activation_scale"):
        assert getattr(one, key).dtype == getattr(two, key).dtype
        assert torch.equal(getattr(one, key), getattr(two, key))
    assert (one.bias is None) == (two.bias is None)
    if one.bias is not None:
        expected = one.bias.to(bias_dtype).float()
        assert torch.equal(expected, two.bias)


# -- round trips -------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_come_back(bits, tmp_path):
    _, plan, integers = write(tmp_path, bits, float_dtype="float32")
    found = load_checkpoint(tmp_path)
    assert found.plan == plan
    assert list(found.integers) == sorted(integers)
    for name, layer in integers.items():
        assert_same(layer, found.integers[name].loaded())


@pytest.mark.parametrize("bits", [8, 6])
def test_whole_model_comes_back(tiny_modules, bits, tmp_path):
    modules = dict(tiny_modules)
    plan, integers = quantized(modules, bits)
    floats = float_state(modules, list(integers))
    save_checkpoint(tmp_path, plan, integers, floats)
    found = load_checkpoint(tmp_path)
    for name, layer in integers.items():
        assert_same(layer, found.integers[name].loaded(), torch.float16)
    assert found.floats.keys() == floats.keys()
    for name, tensor in floats.items():
        if tensor.is_floating_point():
            tensor = stored_float(tensor, "float16").float()
        assert torch.equal(found.floats[name], tensor)


@pytest.mark.parametrize("bits", [8, 5])
def test_weights_left_in_the_file(bits, tmp_path):
    """They are those of the file that was checked, whatever follows it."""
    _, _, integers = write(tmp_path, bits, float_dtype="float32")
    found = load_checkpoint(tmp_path).integers
    (tmp_path / "model.safetensors").unlink()
    write(tmp_path, bits)
    for name, layer in integers.items():
        assert found[name].weight.is_meta
        assert found[name].weight.shape == layer.weight.shape
        assert_same(layer, found[name].loaded())
        assert found[name].weight.is_meta


def test_a_tensor_of_several_pieces(tmp_path):
    """The checksum of a file that is read in pieces is that of its tensors."""
    modules = {"head": nn.Linear(1500, 1501)}
    plan, integers = quantized(modules)
    floats = float_state(modules, list(integers))
    checksum = save_checkpoint(tmp_path, plan, integers, floats)
    found = load_checkpoint(tmp_path)
    assert found.checksum == checksum
    assert_same(
        integers["head"], found.integers["head"].loaded(), torch.float16
    )
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1_200_000] ^= 1
    path.write_bytes(bytes(content))
    assert "does not have the checksum" in one_line(tmp_path)


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    write(tmp_path)
    found = load_checkpoint(tmp_path).integers
    path = tmp_path / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 300)
    with pytest.raises(OSError, match="became shorter"):
        found["head"].loaded()
        found["front.0"].loaded()


def test_a_dtype_that_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2).to(torch.float8_e5m2)}, path)
    assert "'a' has dtype F8_E5M2" in one_line(tmp_path)


def test_layers_left_float_are_stored_as_floats(tmp_path):
    modules = small_modules()
    plan, integers = quantized(modules, left_float=["front.0"])
    floats = float_state(modules, list(integers))
    save_checkpoint(tmp_path, plan, integers, floats, "float32")
    found = load_checkpoint(tmp_path)
    assert list(found.integers) == ["head"]
    for name, tensor in modules["front"].state_dict(prefix="front.").items():
        assert torch.equal(found.floats[name], tensor)


def test_what_the_file_holds(tmp_path):
    """The integer weight stands for both parts of a weight norm."""
    write(tmp_path, 6)
    tensors = load_file(tmp_path / "model.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    half, single, packed = torch.float16, torch.float32, torch.uint8
    assert dtypes == {
        "front.0.weight": packed,
        "front.0.weight_scale": single,
        "front.0.activation_scale": single,
        "front.0.bias": half,
        "front.1.weight": half,
        "front.1.bias": half,
        "front.1.running_mean": half,
        "front.1.running_var": half,
        "front.1.num_batches_tracked": torch.int64,
        "head.weight": packed,
        "head.weight_scale": single,
        "head.activation_scale": single,
        "head.bias": half,
    }
    # 16 x 4 x 3 and 5 x 16 values of 6 bits.
    assert tensors["front.0.weight"].numel() == 144
    assert tensors["head.weight"].numel() == 60


@pytest.mark.parametrize("bits, ratio", [(8, 0.26), (6, 0.20), (4, 0.14)])
def test_size(bits, ratio, tmp_path):
    modules = {"head": nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))}
    plan, integers = quantized(modules, bits)
    floats = float_state(modules, list(integers))
    save_checkpoint(tmp_path, plan, integers, floats)
    before = 4 * sum(p.numel() for p in modules["head"].parameters())
    after = (tmp_path / "model.safetensors").stat().st_size
    assert after < ratio * before


def test_the_same_content_has_the_same_checksum(tmp_path):
    modules = small_modules()
    plan, integers = quantized(modules)
    floats = float_state(modules, list(integers))
    one = save_checkpoint(tmp_path, plan, integers, floats)
    assert save_checkpoint(tmp_path, plan, integers, floats) == one
    floats["head.bias"] = floats["head.bias"]
    floats["front.1.bias"] = floats["front.1.bias"] + 1
    assert save_checkpoint(tmp_path, plan, integers, floats) != one
    assert load_checkpoint(tmp_path).checksum != one


def test_tied_tensors(tmp_path):
    tied = torch.ones(3)
    plan = QuantizationPlan("max", 8, 8, "", {}, {}, [], [])
    save_checkpoint(tmp_path, plan, {}, {"a": tied, "b": tied})
    found = load_checkpoint(tmp_path).floats
    assert torch.equal(found["a"], found["b"])


def test_nothing_else_is_left_in_the_folder(tmp_path):
    write(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["model.safetensors", "plan.json"]


# -- half precision ----------------------------------------------------------


@pytest.mark.parametrize(
    "values, dtype",
    [
        ([0.1, 3.0], torch.float16),
        ([0.0, 0.0], torch.float16),
        ([], torch.float32),
        ([65504.0], torch.float16),
        ([7e4, 1.0], torch.float32),
        ([1e-7, 3e-7], torch.float32),
        ([1e-7, 1.0], torch.float16),
        ([float("nan")], torch.float32),
    ],
)
def test_half_precision_where_it_holds(values, dtype):
    stored = stored_float(torch.tensor(values), "float16")
    assert stored.dtype == dtype
    assert stored_float(torch.tensor(values), "float32").dtype == torch.float32


def test_modules_have_the_stored_values_for_a_while(tmp_path):
    modules = small_modules()
    before = {n: t.clone() for n, t in float_state(modules, []).items()}
    _, integers = quantized(modules)
    with rounded_floats(modules, list(integers), "float16"):
        plan, inside = quantized(modules)
        floats = float_state(modules, list(inside))
        save_checkpoint(tmp_path, plan, inside, floats)
        found = load_checkpoint(tmp_path)
        for name, tensor in floats.items():
            assert torch.equal(
                found.floats[name], tensor.to(found.floats[name].dtype)
            )
        for name, layer in inside.items():
            assert_same(layer, found.integers[name].loaded())
            assert torch.equal(layer.weight, integers[name].weight)
        assert not torch.equal(before["head.bias"], modules["head"].bias)
    after = float_state(modules, [])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_modules_are_themselves_again_after_an_error():
    shared = nn.Linear(4, 4)
    modules = {"a": nn.Sequential(shared), "b": shared}
    before = shared.weight.clone()
    with pytest.raises(KeyError), rounded_floats(modules, [], "float16"):
        assert not torch.equal(shared.weight, before)
        raise KeyError
    assert torch.equal(shared.weight, before)


# -- errors ------------------------------------------------------------------


def one_line(folder) -> str:
    """The error of a folder, which must be one line that names a file."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


def rewrite(folder, change_header=None, change_tensors=None):
    """The model's file with another header or other tensors."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    tensors = load_file(path)
    if change_header is not None:
        change_header(header)
    if change_tensors is not None:
        change_tensors(tensors)
    save_file(tensors, path, header)


def resign(folder, change):
    """Another description or other tensors, with a checksum that is right."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    tensors = load_file(path)
    description = json.loads(header["description"])
    change(description, tensors)
    header["description"] = json.dumps(description)
    header["checksum"] = checkpoint._digest(header["description"], tensors)
    save_file(tensors, path, header)


@pytest.fixture
def folder(tmp_path):
    """A small model on disk."""
    write(tmp_path)
    return tmp_path


def test_no_file(tmp_path):
    assert "there is no such file" in one_line(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 8, 100, -1, -100])
def test_truncated(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "is damaged or no safetensors file" in one_line(folder)


def test_something_else_altogether(folder):
    (folder / "model.safetensors").write_bytes(b"not a model " * 1000)
    assert "is damaged or no safetensors file" in one_line(folder)


def test_a_flipped_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert "does not have the checksum" in one_line(folder)


def test_a_plain_float_model(folder):
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    assert "is not a quantized model" in one_line(folder)
    save_file(
        {"a": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"}
    )
    assert "(its format is 'pt')" in one_line(folder)


def test_another_version(folder):
    rewrite(folder, lambda header: header.update(version="3"))
    text = one_line(folder)
    assert "has version '3' of the format, this package reads 1 and 2" in text


def test_a_version_without_its_probe(folder):
    rewrite(folder, lambda header: header.update(version="2"))
    assert "its version is not that of its probe" in one_line(folder)


@pytest.mark.parametrize("description", ["", "[]", "{}", '{"layers": {}}'])
def test_a_header_without_description(folder, description):
    rewrite(folder, lambda header: header.update(description=description))
    assert "does not describe its layers" in one_line(folder)
    rewrite(folder, lambda header: header.pop("description"))
    assert "does not describe its layers" in one_line(folder)


def test_a_changed_description(folder):
    def fewer_bits(header):
        header["description"] = header["description"].replace(
            '"activation_bits": 8', '"activation_bits": 7'
        )

    rewrite(folder, fewer_bits)
    assert "does not have the checksum" in one_line(folder)


@pytest.mark.parametrize("name", ["head.weight", "head.bias"])
def test_a_renamed_tensor(folder, name):
    def rename(tensors):
        tensors["other"] = tensors.pop(name)

    rewrite(folder, change_tensors=rename)
    assert "does not have the checksum" in one_line(folder)


def test_a_renamed_layer(folder):
    def rename(description, tensors):
        row = description["layers"].pop("head")
        description["layers"]["tail"] = row
        for part in ("weight", "weight_scale", "activation_scale", "bias"):
            tensors[f"tail.{part}"] = tensors.pop(f"head.{part}")

    resign(folder, rename)
    text = one_line(folder)
    assert "layer 'head' is not there" in text
    assert "in plan.json it is linear W8A8" in text


@pytest.mark.parametrize(
    "part", ["weight", "weight_scale", "activation_scale", "bias"]
)
def test_a_missing_tensor(folder, part):
    resign(folder, lambda _, tensors: tensors.pop(f"head.{part}"))
    assert f"'head.{part}'" in one_line(folder)


@pytest.mark.parametrize(
    "part, needs",
    [
        ("weight", "80 values of 8 bits"),
        ("weight_scale", "needs [5]"),
        ("activation_scale", "needs [1]"),
        ("bias", "needs [5]"),
    ],
)
def test_a_wrong_shape(folder, part, needs):
    def cut(_, tensors):
        name = f"head.{part}"
        tensor = tensors[name]
        tensors[name] = tensor[:-1].clone() if tensor.dim() else torch.ones(2)

    resign(folder, cut)
    text = one_line(folder)
    assert "layer 'head': " in text
    assert needs in text


def test_a_wrong_bit_width(folder):
    def fewer(description, _):
        description["layers"]["head"]["weight_bits"] = 6

    resign(folder, fewer)
    assert "layer 'head' is linear W6A8" in one_line(folder)


def test_an_edited_plan(folder):
    path = folder / "plan.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"cutoff": 100.0', '"cutoff": 99.0'))
    text = one_line(folder)
    assert "plan.json: is not the file that model.safetensors was" in text


def test_the_plan_of_another_model(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write(other, 6)
    shutil.copy(other / "plan.json", folder)
    assert "plan.json: is not the file" in one_line(folder)
    shutil.copy(other / "model.safetensors", folder)
    assert load_checkpoint(folder).plan.weight_bits == 6


def test_no_plan(folder):
    (folder / "plan.json").unlink()
    assert "plan.json: there is no such file" in one_line(folder)


def test_companions_are_checked(tmp_path):
    (tmp_path / "labels.txt").write_text("a b c")
    write(tmp_path, companions=["labels.txt"])
    load_checkpoint(tmp_path)
    (tmp_path / "labels.txt").write_text("a c b")
    assert "labels.txt: is not the file" in one_line(tmp_path)
    (tmp_path / "labels.txt").unlink()
    assert "labels.txt: there is no such file" in one_line(tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/b", "..", "", "a\\b", "c:x"]
)
def test_paths_do_not_leave_the_folder(folder, name):
    def point(description, _):
        description["files"][name] = "0" * 64

    resign(folder, point)
    with pytest.raises(CheckpointError, match="is not the plain name"):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match="is not the plain name"):
        write(folder, companions=[name])


def test_layers_must_be_those_of_the_plan(tmp_path):
    plan, integers = quantized(small_modules())
    head = integers.pop("head")
    with pytest.raises(CheckpointError, match="'head' is not there"):
        save_checkpoint(tmp_path, plan, integers, {})
    integers["head"] = replace(head, weight_bits=7)
    with pytest.raises(CheckpointError, match="'head' is linear W7A8"):
        save_checkpoint(tmp_path, plan, integers, {})
    integers["head"] = integers["more"] = head
    with pytest.raises(CheckpointError, match="'more' is linear W8A8"):
        save_checkpoint(tmp_path, plan, integers, {})
    assert not list(tmp_path.iterdir())


def test_state_that_is_no_tensor():
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(CheckpointError, match=r"^a\._extra_state: is a dict"):
        float_state({"a": Odd(2, 2)}, [])


# -- files that are whole and right, and say impossible things ---------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "lstm"}, "kind: must be one of linear, conv1d, conv2d, not"),
        ({"kind": []}, "kind: must be one of linear, conv1d, conv2d, not []"),
        ({"shape": [5, 16, 1]}, "shape cannot be [5, 16, 1]"),
        ({"shape": [0, 10**18]}, "shape cannot be"),
        ({"shape": "516"}, "shape: must be a list"),
        ({"shape": [5, 10**30]}, "shape[1]: must be int"),
        ({"bias": 1}, "bias: must be bool, not 1"),
        ({"stride": 2}, "kind cannot be 'linear'"),
        ({"groups": 0}, "groups cannot be 0"),
        ({"activation_offset": 0.5}, "its activation_offset is 0.5, in plan"),
        ({"surprise": None}, "layers.head.surprise: unknown key"),
    ],
)
def test_an_impossible_description(folder, changes, message):
    def change(description, _):
        description["layers"]["head"].update(changes)

    resign(folder, change)
    assert message in one_line(folder)


def test_a_description_of_a_convolution(folder):
    def change(description, _):
        description["layers"]["front.0"]["stride"] = -1

    resign(folder, change)
    assert "layer 'front.0': stride cannot be -1" in one_line(folder)


@pytest.mark.parametrize("name", ["a\nb", "a\x00", "\u2028"])
def test_names_that_are_no_line(folder, name):
    def change(description, tensors):
        description["layers"][name] = description["layers"]["head"]
        tensors[name] = torch.ones(1)

    resign(folder, change)
    assert "a tensor has the name" in one_line(folder)
    resign(folder, lambda _, tensors: tensors.pop(name))
    assert "does not describe its layers" in one_line(folder)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["weight_scale", "activation_scale"])
def test_impossible_scales(folder, part, value):
    resign(folder, lambda _, x: x[f"head.{part}"].view(-1)[:1].fill_(value))
    assert "layer 'head': " in one_line(folder)


def test_another_dtype(folder):
    def change(_, tensors):
        tensors["head.bias"] = tensors["head.bias"].to(torch.int64)

    resign(folder, change)
    assert "layer 'head': bias is torch.int64" in one_line(folder)


def test_scales_of_another_plan(folder):
    """What is executed and what the plan says must be the same."""
    path = folder / "plan.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    for row in raw["layers"]:
        if row["name"] == "head":
            row["quant"]["activation_amax"] *= 1.01
    path.write_text(json.dumps(raw), encoding="utf-8")

    def change(description, _):
        description["files"]["plan.json"] = file_digest(path)

    resign(folder, change)
    assert "layer 'head': its inputs have the scale" in one_line(folder)


def test_integers_beyond_their_bits(folder):
    def change(_, tensors):
        tensors["head.weight"][0, 0] = -128

    resign(folder, change)
    with pytest.raises(CheckpointError, match=r"'head.weight' holds -128, bey"):
        load_checkpoint(folder).integers["head"].loaded()


def test_a_tensor_of_a_shape_that_nobody_has(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    shape = [0, 10**18, 10**18]
    header["odd"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size_of = len(text).to_bytes(8, "little")
    path.write_bytes(size_of + text + data[8 + size :])
    assert "'odd' has the shape [0, 1000000000000000000, " in one_line(folder)


def test_files_that_a_loader_needs_are_checked(tmp_path):
    (tmp_path / "labels.txt").write_text("a b c")
    write(tmp_path, companions=["labels.txt"])
    load_checkpoint(tmp_path, needs=["labels.txt"])
    resign(tmp_path, lambda about, _: about["files"].pop("labels.txt"))
    load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not list labels"):
        load_checkpoint(tmp_path, needs=["labels.txt"])
