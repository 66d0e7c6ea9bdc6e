#!/usr/bin/env python3
"""Compares mixed precision by our divergence with NVIDIA modelopt's scores.

StableQuant-plus chooses the bits of each unit under a budget of bytes by the
divergence that the unit causes alone. modelopt's AutoQuantize scores a format
by the squared gradient of a likelihood at the layer's output, times the squared
error of the format there, summed over the calibration set: one backward pass
instead of an evaluation of each unit at each width. The likelihood is that of
labels drawn from the float model's output, so that the score approximates the
divergence from that output. This script adds `scores: modelopt` to the keys of
`quantize.plus.budget` and runs the recipe.

Needs `pip install "speechbrain_stablequant[modelopt]"` and one process.
> python compare_modelopt.py hparams/compare_modelopt.yaml

Authors
 * The speechbrain_stablequant developers 2026
"""

import contextlib
import copy
import io
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import train

try:
    import modelopt.torch.quantization as mtq
except ImportError as error:
    sys.exit(f"{error}; run pip install 'speechbrain_stablequant[modelopt]'")

import torch
from torch import nn
from torch.nn.utils import parametrize

from speechbrain_stablequant.core.affine import FLOAT_BITS
from speechbrain_stablequant.methods.plus.bits import HARMS
from speechbrain_stablequant.methods.plus.work import Work

# Of log probabilities, between the recipe's and those of the copies.
TOLERANCE = 1e-3


class Calls(nn.Module):
    """Copies of modules that the recipe calls one after the other.

    Parametrized weights (weight norm) become plain ones, and SpeechBrain's
    wrapper lets gradients through.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        for key, module in modules.items():
            self.add_module(key, copy.deepcopy(module))
        for name, module in list(self.named_modules()):
            if hasattr(module, "freeze"):
                module.freeze = False
            if parametrize.is_parametrized(module):
                parent, _, attribute = name.rpartition(".")
                plain = without_parametrizations(module)
                setattr(self.get_submodule(parent), attribute, plain)
        self.requires_grad_(True).eval()

    def forward(self, args: tuple) -> torch.Tensor:
        """Log probabilities [..., labels] from the first module's arguments."""
        first, *rest = self.children()
        x = first(*args)
        for module in rest:
            x = module(x)
        return x.log_softmax(-1)


def without_parametrizations(module: nn.Module) -> nn.Module:
    """A copy with plain weights; torch's function changes a shared class."""
    kind = parametrize.type_before_parametrizations(module)
    plain = kind.__new__(kind)
    plain.__dict__.update(module.__dict__)
    plain._parameters = dict(module._parameters)
    plain._modules = dict(module._modules)
    for name in plain._modules.pop("parametrizations"):
        value = getattr(module, name).detach().clone()
        plain.register_parameter(name, nn.Parameter(value))
    return plain


def auto_quantize_scores(
    modules: Mapping[str, nn.Module],
    batches: Sequence[tuple],
    reference: torch.Tensor,
    names: set[str],
    widths: Sequence[int],
    activation_bits: int,
    seed: int,
) -> dict[str, dict[int, float]]:
    """Scores by layer name and bits; layers without a name stay float.

    ``reference`` is the recipe's output for the last batch. Inputs have as many
    bits as weights, at least ``activation_bits``; ``seed`` draws the labels.
    Layers that modelopt groups (query, key and value) have the whole score at
    the first of them and 0 at the others.
    """
    calls = Calls(modules)
    with torch.no_grad():
        found = calls(batches[-1])
    if found.shape != reference.shape or not torch.allclose(
        found, reference.to(found), rtol=0, atol=TOLERANCE
    ):
        raise ValueError(
            f"quantize.target: {', '.join(modules)}, called one after the "
            "other, do not give the recipe's log probabilities, which "
            "modelopt's scores need"
        )
    others = [
        name
        for name, module in calls.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d)) and name not in names
    ]
    generator = torch.Generator(found.device).manual_seed(seed)

    def loss(output: torch.Tensor, _: tuple) -> torch.Tensor:
        rows = output.flatten(0, -2)
        with torch.no_grad():
            drawn = torch.multinomial(rows.exp(), 1, generator=generator)
        return -rows.gather(1, drawn).sum()

    # Without prints and warnings, but with progress bars.
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        _, state = mtq.auto_quantize(
            calls,
            # Any budget will do: only the scores are used.
            constraints={"effective_bits": float(widths[-1])},
            quantization_formats=[
                quantization_format(bits, max(bits, activation_bits))
                for bits in widths
            ],
            data_loader=batches,
            forward_step=lambda model, batch: model(batch),
            loss_func=loss,
            disabled_layers=others or None,
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
        )
    return by_layer(state["candidate_stats"], names, widths)


def quantization_format(
    weight_bits: int, activation_bits: int
) -> dict[str, Any]:
    """A scale for each row of weights and one for each input."""
    weights = {"num_bits": weight_bits, "axis": 0}
    inputs = {"num_bits": activation_bits, "axis": None}
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weights},
            {"quantizer_name": "*input_quantizer", "cfg": inputs},
        ],
        "algorithm": "max",
    }


def by_layer(
    stats: Mapping[str, Mapping[str, Any]],
    names: Iterable[str],
    widths: Sequence[int],
) -> dict[str, dict[int, float]]:
    """Scores by layer name and bits from modelopt's statistics of groups."""
    found = {name: dict.fromkeys(widths, 0.0) for name in sorted(names)}
    missing = set(names)
    for entry in stats.values():
        members = [name for name in entry["module_names"] if name in found]
        if not members:
            continue
        missing -= set(members)
        # One score for each format in our order, then one for float.
        for bits, score in zip(widths, entry["scores"], strict=False):
            found[members[0]][bits] = float(score)
    if missing:
        raise ValueError(
            f"{min(missing)}: modelopt gives no score for this layer; add it "
            "to quantize.exclude"
        )
    return found


def modelopt_harm(
    work: Work, widths: list[int]
) -> dict[tuple[str, int], float]:
    """Scores of AutoQuantize by unit and bits; float harms nothing."""
    session = work.session
    config, recognizer = session.config, session.recognizer
    modules = {key: recognizer.modules[key] for key in config.target}
    batches: list[tuple] = []
    handle = modules[config.target[0]].register_forward_pre_hook(
        lambda module, args: batches.append(args)
    )
    reference = recognizer.forward("calibration", lambda _: None)
    handle.remove()
    scores = auto_quantize_scores(
        modules,
        batches,
        reference,
        {x.name for layers in work.units.values() for x in layers},
        [bits for bits in widths if bits != FLOAT_BITS],
        config.activation_bits,
        config.seed,
    )
    return {
        (unit, bits): sum(scores[x.name].get(bits, 0.0) for x in layers)
        for unit, layers in work.units.items()
        for bits in widths
    }


def main() -> None:
    """Runs the recipe with modelopt's scores."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit("compare_modelopt.py runs in one process: leave out torchrun")
    HARMS["modelopt"] = modelopt_harm
    train.run(*train.prepare(sys.argv[1:]))


if __name__ == "__main__":
    main()
