"""Which runtime is chosen, and small parts that runtimes share."""

import pytest
import torch
from torch import nn

from speechbrain_stablequant.runtimes.choice import candidates, first_passing
from speechbrain_stablequant.runtimes.cpu import CpuClass, class_of_flags
from speechbrain_stablequant.runtimes.forwards import in_own_precision
from speechbrain_stablequant.runtimes.geometry import FLOAT, NATIVE
from speechbrain_stablequant.runtimes.probe_make import rounded_outputs
from speechbrain_stablequant.runtimes.torch_int8.conv import conv_algorithms


def test_candidates():
    assert candidates("torch", "cpu") == ["torch"]
    assert candidates("auto", "cpu") == ["openvino", "torch_int8", "torch"]
    with pytest.raises(ValueError, match="backend: 'none' is none of auto"):
        candidates("none", "cpu")


def test_the_first_runtime_that_is_right():
    def attempt(name):
        if name == "torch_int8":
            raise ValueError("backend: torch_int8 is wrong; report it")
        return name

    found = first_passing(["torch_int8", "torch"], attempt, "cpu")
    assert found == ("torch", ["torch_int8: is wrong"])
    with pytest.raises(ValueError, match="torch_int8 is wrong; report it"):
        first_passing(["torch_int8"], attempt, "cpu")


def test_classes_of_cpus():
    flags = {"avx2", "avx512f", "avx512_vnni", "avx512_bf16"}
    assert class_of_flags(flags) == CpuClass("avx512_vnni", bf16=True)
    assert not class_of_flags({"avx2", "avx_vnni"}, cap="AVX2").exact


def test_autocast_does_not_reach_a_runtime():
    forward = in_own_precision(lambda x: x @ x)
    with torch.autocast("cpu", torch.bfloat16):
        assert forward(torch.ones(1, 1)).dtype == torch.float32


def test_outputs_are_rounded_to_bfloat16():
    linear = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    with rounded_outputs({"a": linear}, torch.Generator()):
        y = linear(x)
    assert torch.equal(y, y.bfloat16().float())
    assert not torch.equal(y, linear(x))


def test_algorithms_of_a_convolution():
    grouped = conv_algorithms(True, groups=16, dilation=1)
    assert grouped == (NATIVE, "convolution", FLOAT)
    assert conv_algorithms(True, groups=16, dilation=2) == (NATIVE, FLOAT)
