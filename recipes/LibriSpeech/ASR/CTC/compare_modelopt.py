#!/usr/bin/env python3
"""Chooses bits under a budget by the scores of NVIDIA modelopt's AutoQuantize.

Runs the recipe like `train.py`; where its `quantize:` block has a budget
(`method: stablequant_plus`, `plus: {budget: {size: 0.19}}`), modelopt's scores
decide instead of the divergence that each unit causes. Give it an output folder
of its own, and compare the two `comparison.md`.

The score of a format is the squared gradient of a likelihood at the layer's
output, times the squared error of the format there, summed over a calibration
set: one backward pass instead of an evaluation of each layer at each width.
The likelihood is that of labels drawn from the float model's output, so that
the score approximates the divergence from that output.

Needs `pip install "speechbrain_stablequant[modelopt]"` and one process.
> python compare_modelopt.py hparams/study.yaml --output_folder results/modelopt

Authors
 * The speechbrain_stablequant developers 2026
"""

import contextlib
import copy
import io
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import train
from torch import nn
from torch.nn.utils import parametrize

from speechbrain_stablequant.methods.plus import bits, plan
from speechbrain_stablequant.methods.plus.scales import FLOAT_BITS
from speechbrain_stablequant.methods.plus.work import FloatModel, Work
from speechbrain_stablequant.methods.session import Session
from speechbrain_stablequant.model.layers import Layer
from speechbrain_stablequant.utils.files import identity
from speechbrain_stablequant.utils.patching import hooked, shadowed
from speechbrain_stablequant.utils.typed import typed

SCORE_FILE = "auto_quantize.json"
# Of the log probabilities, between the recipe's and those of the copy.
TOLERANCE = 1e-3


def modelopt_harm(
    work: Work,
    model: FloatModel,
    percentiles: Mapping[str, float],
    widths: Sequence[int],
) -> dict[tuple[str, int], float]:
    """Scores by unit and bits, in place of our measured divergences."""
    session = work.session
    layers = [x for x in session.layers if x.name not in work.float_layers]
    integer = [width for width in widths if width != FLOAT_BITS]
    scores = {}
    if integer:
        scores = modelopt_scores(session, model.weights, layers, integer)
    return {
        (unit, width): sum(
            scores.get(x.name, {}).get(width, 0.0) for x in members
        )
        for unit, members in work.units.items()
        for width in widths
    }


def choose_bits(
    work: Work, model: FloatModel, percentiles: Mapping[str, float]
) -> dict[str, int]:
    """Ours, but the plan says whose scores decided."""
    with shadowed(bits, "measured_harm", modelopt_harm):
        found = bits.choose_unit_bits(work, model, percentiles)
    if found:
        work.parts[-1]["scores"] = "modelopt"
    return found


def modelopt_scores(
    session: Session,
    weights: str,
    layers: Sequence[Layer],
    widths: Sequence[int],
) -> dict[str, dict[int, float]]:
    """Scores of layers by bits, cached on disk."""
    recognizer, config = session.recognizer, session.config
    key = identity(
        [
            weights,
            recognizer.key("calibration", "inputs"),
            [layer.name for layer in layers],
            list(widths),
            config.activation_bits,
            config.seed,
            version("nvidia-modelopt"),
        ]
    )
    known = session.store.read(
        SCORE_FILE,
        key,
        "modelopt's scores",
        lambda raw: typed(raw, dict[str, list[float]], "content"),
    )
    if known is None:
        modules = {name: recognizer.modules[name] for name in config.target}
        order, batches = inputs_of_first(
            modules, lambda: recognizer.forward("calibration", lambda _: None)
        )
        scores = auto_quantize_scores(
            {name: modules[name] for name in order},
            batches,
            recognizer.forward("calibration", lambda _: None, True),
            layers,
            widths,
            config.activation_bits,
            config.seed,
        )
        known = {
            name: [row[bits] for bits in widths] for name, row in scores.items()
        }
        session.store.write(SCORE_FILE, key, known)
    return {
        name: dict(zip(widths, row, strict=True)) for name, row in known.items()
    }


class Calls(nn.Module):
    """Copies of modules that a recipe calls one after the other, as one module.

    Parametrized weights (weight norm) become plain ones in the copies.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        for key, module in modules.items():
            self.add_module(key, copy.deepcopy(module))
        for name, module in list(self.named_modules()):
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


def inputs_of_first(
    modules: Mapping[str, nn.Module], run: Callable[[], Any]
) -> tuple[list[str], list[tuple]]:
    """Keys of modules in the order of their calls, and the first one's inputs.

    ``run`` runs a recognizer over some batches.
    """
    order: list[str] = []
    batches: list[tuple] = []

    def keep(key: str, module: nn.Module, args: tuple) -> None:
        if key not in order:
            order.append(key)
        if key == order[0]:
            batches.append(args)

    with hooked((m, partial(keep, key)) for key, m in modules.items()):
        run()
    return order, batches


def auto_quantize_scores(
    modules: Mapping[str, nn.Module],
    batches: Sequence[tuple],
    reference: torch.Tensor,
    layers: Iterable[Layer],
    widths: Iterable[int],
    activation_bits: int,
    seed: int,
) -> dict[str, dict[int, float]]:
    """Scores by layer name and bits; layers that are not given stay float.

    ``modules`` in the order of their calls, ``batches`` of the first one's
    arguments; ``reference``: the recipe's log probabilities of the first batch,
    which the chained modules must give. Inputs have as many bits as weights, at
    least ``activation_bits``; ``seed`` draws the labels.

    Layers that modelopt groups (query, key and value) have the whole score at
    the first of them and 0 at the others.
    """
    calls = Calls(modules)
    with torch.no_grad():
        found = calls(batches[0])
    if found.shape != reference.shape or not torch.allclose(
        found, reference.to(found), rtol=0, atol=TOLERANCE
    ):
        raise ValueError(
            "modelopt needs a recipe whose log probabilities are those of "
            f"{', '.join(modules)} called one after the other"
        )
    names = {layer.name for layer in layers}
    others = [
        name
        for name, module in calls.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d)) and name not in names
    ]
    widths = sorted(widths)
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
        import modelopt.torch.quantization as mtq

        _, state = mtq.auto_quantize(
            calls,
            # Any budget will do: only the scores are used.
            constraints={"effective_bits": float(widths[-1])},
            quantization_formats=[
                format_of(width, max(width, activation_bits))
                for width in widths
            ],
            data_loader=batches,
            forward_step=lambda model, batch: model(batch),
            loss_func=loss,
            disabled_layers=others or None,
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
        )
    return by_layer(state["candidate_stats"], names, widths)


def format_of(weight_bits: int, activation_bits: int) -> dict[str, Any]:
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
    names: set[str],
    widths: Sequence[int],
) -> dict[str, dict[int, float]]:
    found = {name: dict.fromkeys(widths, 0.0) for name in sorted(names)}
    missing = set(names)
    for entry in stats.values():
        members = [name for name in entry["module_names"] if name in names]
        if not members:
            continue
        missing -= set(members)
        # One score for each format in our order, then one for float.
        for width, score in zip(widths, entry["scores"], strict=False):
            found[members[0]][width] = float(score)
    if missing:
        raise ValueError(
            f"{min(missing)}: modelopt gives no score for this layer; add it "
            "to quantize.exclude"
        )
    return found


def main() -> None:
    """Runs the recipe with modelopt's scores."""
    if find_spec("modelopt") is None:
        sys.exit("run pip install 'speechbrain_stablequant[modelopt]' first")
    with shadowed(plan, "choose_unit_bits", choose_bits):
        train.main()


if __name__ == "__main__":
    main()
