"""Sensitivities of layers by NVIDIA modelopt's AutoQuantize, for comparison.

The score of a format is the squared gradient of a likelihood at the layer's
output, times the squared error of the format there, summed over a calibration
set: one backward pass instead of an evaluation of each layer at each width.
The likelihood is that of labels drawn from the float model's output, so that
the score approximates the divergence from that output.
"""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ...model.layers import Layer
from ...utils.files import identity
from ...utils.patching import hooked
from ...utils.typed import typed
from ..session import Session

SCORE_FILE = "auto_quantize.json"
# Of the log probabilities, between the recipe's and those of the copy.
_TOLERANCE = 1e-3


def require_modelopt() -> None:
    """Raises a ValueError that names the extra to install."""
    if find_spec("modelopt") is None:
        raise ValueError(
            "quantize.plus.budget.scores: modelopt needs package "
            "'nvidia-modelopt', which is not installed; run "
            "pip install 'speechbrain_stablequant[modelopt]'"
        )


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
                plain = _without_parametrizations(module)
                setattr(self.get_submodule(parent), attribute, plain)
        self.requires_grad_(True).eval()

    def forward(self, args: tuple) -> torch.Tensor:
        """Log probabilities [..., labels] from the first module's arguments."""
        first, *rest = self.children()
        x = first(*args)
        for module in rest:
            x = module(x)
        return x.log_softmax(-1)


def _without_parametrizations(module: nn.Module) -> nn.Module:
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
    require_modelopt()
    calls = Calls(modules)
    with torch.no_grad():
        found = calls(batches[0])
    if found.shape != reference.shape or not torch.allclose(
        found, reference.to(found), rtol=0, atol=_TOLERANCE
    ):
        raise ValueError(
            "quantize.plus.budget.scores: modelopt needs a recipe whose log "
            f"probabilities are those of {', '.join(modules)} called one "
            "after the other; use scores: divergence"
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
                _format(bits, max(bits, activation_bits)) for bits in widths
            ],
            data_loader=batches,
            forward_step=lambda model, batch: model(batch),
            loss_func=loss,
            disabled_layers=others or None,
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
        )
    return _by_layer(state["candidate_stats"], names, widths)


def _format(weight_bits: int, activation_bits: int) -> dict[str, Any]:
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


def _by_layer(
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
        for bits, score in zip(widths, entry["scores"], strict=False):
            found[members[0]][bits] = float(score)
    if missing:
        raise ValueError(
            f"{min(missing)}: modelopt gives no score for this layer; add it "
            "to quantize.exclude or use plus.budget.scores: divergence"
        )
    return found
