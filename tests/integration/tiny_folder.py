"""A quantized folder around a tiny random encoder: written in a moment, for
tests of how a recognizer computes rather than of what it says."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import pytest
import quantized_folder
import torch
from speechbrain.lobes.models.VanillaNN import VanillaNN
from speechbrain.nnet.linear import Linear
from torch import nn

from speechbrain_stablequant.folder.recognizer import QuantizedRecognizer
from speechbrain_stablequant.folder.weights_file import load_checkpoint
from speechbrain_stablequant.runtimes.registry import RUNTIMES

ENCODER = {**quantized_folder.SETTINGS, "output_norm": True}


def installed(backend: str) -> bool:
    """Whether the packages of a runtime are there."""
    return all(map(importlib.util.find_spec, RUNTIMES[backend].needs))


#: The runtimes of a CPU, as parameters of tests.
BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not installed(name), reason=f"the packages of {name} are missing"
        ),
    )
    for name in ("torch", "torch_int8", "openvino", "onnx")
]


def write(folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Writes the folder of ``make_tiny_modules``, quantized to eight bits."""
    quantized_folder.write(folder, modules, encoder=ENCODER)


def load(folder: Path, backend: str, **options) -> QuantizedRecognizer:
    """The recognizer of a folder, loaded but not used."""
    heads = {
        "enc": VanillaNN([None, None, 32], dnn_blocks=2, dnn_neurons=24),
        "ctc_lin": Linear(input_size=24, n_neurons=12),
    }
    checksum = load_checkpoint(folder).checksum
    recognizer = QuantizedRecognizer(checksum, ENCODER, heads, backend, options)
    recognizer.load(folder)
    return recognizer


def wave(number: int) -> torch.Tensor:
    """Noise of a length of its own, [1, samples]; the same for a number."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1, 3000 + 700 * number, generator=generator)
