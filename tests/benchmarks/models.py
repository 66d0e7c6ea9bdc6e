"""The models of the benchmarks: real shapes, random weights, or a folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCTC,
    HubertConfig,
    HubertForCTC,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan import LayerPlan, QuantizationPlan
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.folder.stored_floats import float_state
from speechbrain_stablequant.folder.weights_file import save_checkpoint
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.simulation.observers import ResidualPeak

FAMILIES = {
    "hubert": (HubertConfig, HubertForCTC),
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2ForCTC),
}
SHAPES = {
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "conv_bias": True,
    },
}
NAMES = [f"{family}-{shape}" for family in FAMILIES for shape in SHAPES]
SAMPLE_RATE = 16000


class Encoder(nn.Module):
    """What SpeechBrain's wrapper is around a HuggingFace model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, wavs: torch.Tensor) -> torch.Tensor:
        """[batch, samples] to [batch, frames, channels]."""
        return self.model(wavs).last_hidden_state


class Recognizer(nn.Module):
    """Encoder and head in one module: wave to logits."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        self.wav2vec2 = modules["wav2vec2"]
        self.ctc_lin = modules["ctc_lin"]

    def forward(self, wavs: torch.Tensor) -> torch.Tensor:
        """[batch, samples] to [batch, frames, labels]."""
        return self.ctc_lin(self.wav2vec2(wavs))


def save_random(name: str, folder: str | Path) -> None:
    """Writes one of ``NAMES`` with random weights, always the same ones."""
    torch.manual_seed(0)
    family, shape = name.split("-")
    config, kind = FAMILIES[family]
    settings = {"layerdrop": 0.0, "vocab_size": 32, **SHAPES[shape]}
    kind(config(**settings)).save_pretrained(folder)


def load_modules(folder: str | Path) -> dict[str, nn.Module]:
    """``wav2vec2`` and ``ctc_lin`` of a folder with a HuggingFace CTC model, as
    float."""
    ctc = AutoModelForCTC.from_pretrained(folder, dtype=torch.float32)
    ctc.eval().requires_grad_(False)
    encoder = getattr(ctc, ctc.base_model_prefix)
    return {"wav2vec2": Encoder(encoder), "ctc_lin": ctc.lm_head}


def make_wavs(seconds: float, batch: int) -> torch.Tensor:
    """Noise with a slow envelope, normalized: float32 [batch, samples]."""
    generator = torch.Generator().manual_seed(1)
    samples = round(seconds * SAMPLE_RATE)
    wavs = torch.randn(batch, samples, generator=generator)
    wavs *= 1 + torch.sin(torch.arange(samples) / 2000)
    return torch.layer_norm(wavs, (samples,))


@dataclass
class _Range:
    amax: float = field(default=0.0)

    def __call__(self, module: nn.Module, inputs: tuple) -> None:
        self.amax = max(self.amax, float(inputs[0].abs().max()))


@torch.no_grad()
def save_quantized(
    modules: Mapping[str, nn.Module],
    wavs: torch.Tensor,
    bits: int,
    folder: Path,
) -> None:
    """Writes integers of every layer by the ranges of one pass over ``wavs``
    [batch, samples]; ``bits`` of weights and activations."""
    layers = find_layers(modules, list(modules))
    ranges = {layer.name: _Range() for layer in layers}
    hooks = [
        layer.module.register_forward_pre_hook(ranges[layer.name])
        for layer in layers
    ]
    residual = ResidualPeak([modules["wav2vec2"].model.encoder])
    with residual.watch():
        Recognizer(modules)(wavs)
    for hook in hooks:
        hook.remove()
    rows, integers = [], {}
    for layer in layers:
        amax = ranges[layer.name].amax
        quant = LayerQuant(bits, bits, amax)
        integers[layer.name] = integer_layer(layer, quant)
        rows.append(
            LayerPlan(
                layer.name, layer.unit, layer.kind, quant, amax, 100.0, ""
            )
        )
    plan = QuantizationPlan(
        *("max", bits, bits, "", {}, {}, [], rows),
        residual_amax=residual.value,
    )
    folder.mkdir(parents=True, exist_ok=True)
    floats = float_state(modules, list(integers))
    save_checkpoint(folder, plan, integers, floats)
    modules["wav2vec2"].model.config.save_pretrained(folder)
