"""A quantized folder around a tiny random encoder: written in a moment, for
tests of how a recogniser computes rather than of what it says."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from speechbrain.lobes.models.VanillaNN import VanillaNN
from speechbrain.nnet.linear import Linear
from torch import nn

from speechbrain_stablequant.checkpoint import (
    float_state,
    load_checkpoint,
    save_checkpoint,
)
from speechbrain_stablequant.inference import CONFIG_FILE, QuantizedRecogniser
from speechbrain_stablequant.integer import integer_layer
from speechbrain_stablequant.layers import find_layers
from speechbrain_stablequant.plan import (
    LayerPlan,
    LayerQuant,
    QuantizationPlan,
)

ENCODER = {
    "key": "wav2vec2",
    "use_lengths": True,
    "normalize_wav": True,
    "output_norm": True,
}


def write(folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Writes a folder without a tokenizer.

    Arguments
    ---------
    folder : Path
        Where to; is made.
    modules : Mapping
        Those of ``make_tiny_modules``.
    """
    quant = LayerQuant(8, 8, 3.0)
    layers = find_layers(modules, list(modules))
    rows = [
        LayerPlan(x.name, x.unit, x.kind, quant, 3.0, 100.0, "") for x in layers
    ]
    integers = {x.name: integer_layer(x, quant) for x in layers}
    plan = QuantizationPlan("max", 8, 8, "", {}, {}, [], rows)
    folder.mkdir()
    floats = float_state(modules, list(integers))
    config = modules["wav2vec2"].model.config.to_dict()
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    save_checkpoint(folder, plan, integers, floats, companions=[CONFIG_FILE])


def load(folder: Path, backend: str, **options) -> QuantizedRecogniser:
    """The recogniser of a folder, loaded but not used."""
    heads = {
        "enc": VanillaNN([None, None, 32], dnn_blocks=2, dnn_neurons=24),
        "ctc_lin": Linear(input_size=24, n_neurons=12),
    }
    checksum = load_checkpoint(folder, weights=False).checksum
    recogniser = QuantizedRecogniser(checksum, ENCODER, heads, backend, options)
    recogniser.load(folder)
    return recogniser


def wave(number: int) -> torch.Tensor:
    """Noise of a length of its own, [1, samples]; the same for a number."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1, 3000 + 700 * number, generator=generator)
