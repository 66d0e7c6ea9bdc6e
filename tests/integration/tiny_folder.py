"""A quantized folder around a tiny random encoder: written in a moment, for
tests of how a recognizer computes rather than of what it says."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.lobes.models.VanillaNN import VanillaNN
from speechbrain.nnet.linear import Linear
from torch import nn

from speechbrain_stablequant.core.integer_layer import (
    IntegerLayer,
    integer_layer,
)
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan import LayerPlan, QuantizationPlan
from speechbrain_stablequant.folder.recognizer import QuantizedRecognizer
from speechbrain_stablequant.folder.weights_file import load_checkpoint
from speechbrain_stablequant.folder.write import RecognizerSource, write_folder
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.runtimes.probe import Probe
from speechbrain_stablequant.runtimes.registry import RUNTIMES

ENCODER = {
    "key": "wav2vec2",
    "use_lengths": True,
    "normalize_wav": True,
    "output_norm": True,
}


HEADS = {
    "enc": """\
enc: !new:speechbrain.lobes.models.VanillaNN.VanillaNN
    input_shape: [null, null, 32]
    dnn_blocks: 2
    dnn_neurons: 24
""",
    "ctc_lin": """\
ctc_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 24
    n_neurons: 12
""",
}


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


def plan_of(
    modules: Mapping[str, nn.Module], bits: tuple[int, int] = (8, 8)
) -> tuple[QuantizationPlan, dict[str, IntegerLayer]]:
    """A plan for all layers of ``make_tiny_modules``, and its integers."""
    quant = LayerQuant(*bits, 3.0)
    layers = find_layers(modules, list(modules))
    rows = [
        LayerPlan(x.name, x.unit, x.kind, quant, 3.0, 100.0, "") for x in layers
    ]
    integers = {x.name: integer_layer(x, quant) for x in layers}
    return QuantizationPlan("max", *bits, "", {}, {}, [], rows), integers


def write(
    folder: Path,
    modules: Mapping[str, nn.Module],
    bits: tuple[int, int] = (8, 8),
) -> Probe:
    """Writes a folder with one label for each output.

    Arguments
    ---------
    folder : Path
        Where to; is made.
    modules : Mapping
        Those of ``make_tiny_modules``.
    bits : tuple of int
        Of weights and activations.
    """
    plan, integers = plan_of(modules, bits)
    folder.mkdir()
    config = modules["wav2vec2"].model.config.to_dict()
    source = RecognizerSource(
        encoder=ENCODER,
        config=json.dumps(config),
        heads=HEADS,
        tokenizer_class="speechbrain.dataio.encoder.CTCTextEncoder",
        tokenizer_file="label_encoder.txt",
        tokenizer=_labels(folder),
        blank_index=0,
        sample_rate=16000,
    )
    return write_folder(folder, modules, plan, integers, "float16", source)


def _labels(folder: Path) -> bytes:
    encoder = CTCTextEncoder()
    encoder.insert_blank("<blank>", 0)
    for label in "ABCDEFGHIJK":
        encoder.add_label(label)
    path = folder / "label_encoder.txt"
    encoder.save(str(path))
    return path.read_bytes()


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
