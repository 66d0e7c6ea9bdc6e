"""Machines that this one is not: another architecture or system, a build of
torch without its integer operators, packages that do not load. Faked."""

import importlib.util
import platform
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from speechbrain_stablequant.core.encoder_spec import describe_encoder
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.runtimes import choice, cpu, layer_check
from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.runtimes.choice import choose_backend
from speechbrain_stablequant.runtimes.cpu import (
    CpuClass,
    cpu_class,
    executed_integers,
    machine_identity,
)
from speechbrain_stablequant.runtimes.geometry import FLOAT, NATIVE
from speechbrain_stablequant.runtimes.layer_check import exact_algorithm
from speechbrain_stablequant.runtimes.reference import (
    ReferenceExecutor,
    apply_layer,
)
from speechbrain_stablequant.runtimes.torch_int8.layer_runner import (
    TorchInt8Runner,
)

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(
    not HAS_OPENVINO, reason="needs the extra cpu"
)


@pytest.fixture
def another_machine(monkeypatch, tmp_path):
    """Makes this machine pass for another one, of which nothing is known.

    ``cpuinfo``: text of /proc/cpuinfo, None for a system without.
    """

    def pretend(machine: str, system: str, cpuinfo: str | None = None):
        file = tmp_path / "cpuinfo"
        if cpuinfo is not None:
            file.write_text(cpuinfo)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(platform, "system", lambda: system)
        monkeypatch.setattr(cpu, "_CPUINFO", file)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        cpu_class.cache_clear()

    yield pretend
    cpu_class.cache_clear()


@pytest.fixture
def without_onednn(monkeypatch):
    """As torch is built for macOS."""
    monkeypatch.setattr(torch.ops, "onednn", SimpleNamespace())


@pytest.fixture
def without_openvino(monkeypatch):
    """It is not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        choice.importlib.util,
        "find_spec",
        lambda name: None if name == "openvino" else find(name),
    )


ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("machine", "system", "cpuinfo"),
    [
        ("aarch64", "Linux", ARM),
        ("arm64", "Darwin", None),
        ("ARM64", "Windows", None),
    ],
)
def test_another_architecture(another_machine, machine, system, cpuinfo):
    another_machine(machine, system, cpuinfo)
    assert cpu_class() == CpuClass("other") and cpu_class().exact
    identity = machine_identity()
    assert (identity["machine"], identity["system"]) == (machine, system)
    if cpuinfo:
        assert identity["flags"] == ["asimd", "asimddp", "fp"]
        assert identity["cpu"] == ["0xd40"]


def test_x86_without_cpuinfo(another_machine, monkeypatch):
    """Windows, and macOS on Intel: what torch knows, and no more."""
    another_machine("AMD64", "Windows")
    checks = {
        "_is_vnni_supported": True,
        "_is_avx512_bf16_supported": True,
        "_is_amx_tile_supported": False,
    }
    for name, answer in checks.items():
        monkeypatch.setattr(torch.cpu, name, lambda a=answer: a, raising=False)
    assert cpu_class() == CpuClass("avx512_vnni", True)
    for name in checks:
        monkeypatch.delattr(torch.cpu, name)
    cpu_class.cache_clear()
    assert cpu_class() == CpuClass("avx2")


def test_older_name_of_the_cap(another_machine, monkeypatch):
    flags = "flags\t: avx2 avx512f avx512_vnni amx_int8 amx_bf16 avx512_bf16\n"
    another_machine("x86_64", "Linux", flags)
    assert cpu_class() == CpuClass("amx", True)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX512_CORE")
    cpu_class.cache_clear()
    assert cpu_class() == CpuClass("avx2", False)
    # Where both are there, oneDNN looks at the newer one.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    cpu_class.cache_clear()
    assert cpu_class() == CpuClass("avx512_vnni", True)


# -- what is chosen ---------------------------------------------------------


def test_torch_without_integer_operators(another_machine, without_onednn):
    another_machine("arm64", "Darwin")
    with pytest.raises(ValueError) as raised:
        choose_backend("torch_int8", "cpu")
    (line,) = str(raised.value).splitlines()
    assert line == (
        "backend: torch_int8 cannot run: it was tried on this CPU with a "
        "small layer: it fails: this build of torch has no oneDNN operators "
        "for integers; write backend: auto"
    )


@needs_openvino
def test_auto_takes_openvino_there(another_machine, without_onednn, caplog):
    another_machine("arm64", "Darwin")
    assert choose_backend("torch", "cpu") == ("torch", [])
    assert choose_backend("auto", "cpu") == ("openvino", [])
    assert caplog.messages == []


def test_auto_simulates_where_nothing_works(
    another_machine, without_onednn, without_openvino, caplog
):
    another_machine("arm64", "Darwin")
    name, reasons = choose_backend("auto", "cpu")
    assert name == "torch" and len(reasons) == 2
    (line,) = caplog.messages
    assert "quantization is simulated" in line
    assert "no oneDNN operators" in line and "'openvino' is not" in line


@needs_openvino
def test_a_package_that_does_not_load(another_machine, monkeypatch):
    another_machine("x86_64", "Linux", "flags\t: avx2\n")
    load = choice.load_function

    def broken(reference: str):
        if "openvino" in reference:
            raise OSError("libtbb.so.12: cannot open")
        return load(reference)

    monkeypatch.setattr(choice, "load_function", broken)
    with pytest.raises(ValueError, match=r"does not load \(libtbb.so.12: can"):
        choose_backend("openvino", "cpu")
    assert choose_backend("auto", "cpu") == ("torch_int8", [])


@needs_openvino
def test_heads_beside_openvino_without_integer_operators(
    another_machine, without_onednn, make_tiny_modules, caplog
):
    """The encoder is OpenVINO's; a head is multiplied as floats."""
    another_machine("aarch64", "Linux", ARM)
    modules = make_tiny_modules("hubert-large")
    layers = find_layers(dict(modules.items()), ["wav2vec2", "ctc_lin"])
    integers = {x.name: integer_layer(x, LayerQuant(7, 8, 3.0)) for x in layers}
    forwards = build_forwards("openvino", dict(modules.items()), integers)
    head = modules["ctc_lin"].w
    x = torch.randn(1, 5, 24)
    expected = apply_layer(integers["ctc_lin.w"], x)
    assert torch.allclose(forwards[head](x), expected, atol=1e-5)
    (line,) = (x for x in caplog.messages if "wrongly" in x)
    assert line.startswith("torch_int8 computes ctc_lin.w wrongly")
    assert "computed as float" in line


@pytest.mark.skipif(cpu_class().exact, reason="this CPU has VNNI")
def test_a_cpu_that_is_less_than_it_says(another_machine):
    """Sums that saturate are found where the class of the CPU is wrong, and
    computed as floats."""
    another_machine("aarch64", "Linux", ARM)
    one = replace(layer_check._SMALL, weight_bits=8)
    algorithm, reason, _ = exact_algorithm(one, TorchInt8Runner())
    assert algorithm == FLOAT and reason.startswith("the result of 50 rows")
    assert exact_algorithm(layer_check._SMALL, TorchInt8Runner()) == (
        NATIVE,
        "",
        False,
    )


@needs_openvino
def test_an_encoder_there(another_machine, make_tiny_model):
    another_machine("arm64", "Darwin")
    model = make_tiny_model("wav2vec2-base")
    integers = {
        x.name: integer_layer(x, LayerQuant(8, 8, 3.0))
        for x in find_layers({"w": model}, ["w"])
    }
    assert executed_integers(integers, cpu_class()) == integers
    (forward,) = build_forwards(
        "openvino", {"w": model}, integers, threads=1
    ).values()
    wavs = torch.randn(1, 4000)
    expected = ReferenceExecutor(describe_encoder(model, "w", integers))(wavs)
    out = forward(wavs).last_hidden_state
    assert (out - expected).norm() < 0.03 * expected.norm()


def test_a_model_without_layers_needs_no_trial():
    assert build_forwards("torch_int8", {"lin": nn.Linear(2, 2)}, {}) == {}
