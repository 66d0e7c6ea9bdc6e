"""Sensitivities of layers by modelopt's AutoQuantize, to compare with.

NVIDIA's modelopt chooses a format for each layer by a score: the squared
gradient of a likelihood at the layer's output, times the squared error that
the format makes there, summed over a calibration set. One backward pass takes
the place of an evaluation of each layer at each width. Its formats have the
ranges of the largest value seen.

The likelihood is that of labels drawn from the float model's own output, so
that the score is what it approximates: the divergence from that output.
"""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ...model.layers import Layer

# Of the log probabilities, between the recipe's and those of the copy.
_TOLERANCE = 1e-3


def require_modelopt() -> None:
    """Raises if the package is not there.

    Raises
    ------
    ValueError
        Names the extra that brings it.
    """
    if find_spec("modelopt") is None:
        raise ValueError(
            "quantize.plus.budget.scores: modelopt needs package "
            "'nvidia-modelopt', which is not installed; run "
            "pip install 'speechbrain_stablequant[modelopt]'"
        )


def modelopt_version() -> str:
    """What the scores depend on beside the model and the data.

    Returns
    -------
    str
    """
    return version("nvidia-modelopt")


class Calls(nn.Module):
    """Copies of modules that a recipe calls one after the other.

    Arguments
    ---------
    modules : Mapping
        The modules by key, in the order of their calls. Parametrized weights
        (weight norm) become plain ones in the copies.

    Example
    -------
    >>> calls = Calls({"enc": nn.Linear(1, 2), "head": nn.Linear(2, 3)})
    >>> calls((torch.zeros(5, 1),)).exp().sum(-1).detach().round(decimals=4)
    tensor([1., 1., 1., 1., 1.])
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
        """Log probabilities of the last module's output.

        Arguments
        ---------
        args : tuple
            Positional arguments of the first module.

        Returns
        -------
        torch.Tensor
            [..., labels]
        """
        first, *rest = self.children()
        x = first(*args)
        for module in rest:
            x = module(x)
        return x.log_softmax(-1)


def _without_parametrizations(module: nn.Module) -> nn.Module:
    """The same with plain weights.

    Not by torch's function: it changes the class, which copies share.
    """
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
    """In which order modules are called, and what the first one gets.

    Arguments
    ---------
    modules : Mapping
        Modules by key.
    run : callable
        Runs a recognizer over some batches.

    Returns
    -------
    list of str
        Keys in the order of their first calls.
    list of tuple
        Positional arguments of the first one, for each batch.

    Example
    -------
    >>> modules = {"b": nn.Identity(), "a": nn.Identity()}
    >>> inputs_of_first(modules, lambda: modules["b"](modules["a"](1)))
    (['a', 'b'], [(1,)])
    """
    order: list[str] = []
    batches: list[tuple] = []

    def keep(key: str, args: tuple) -> None:
        if key not in order:
            order.append(key)
        if key == order[0]:
            batches.append(args)

    handles = [
        module.register_forward_pre_hook(
            lambda _, args, key=key: keep(key, args)
        )
        for key, module in modules.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
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
    """The score of each layer at each width.

    Arguments
    ---------
    modules : Mapping
        The float model's modules by key, in the order of their calls.
    batches : sequence of tuple
        Arguments of the first module.
    reference : torch.Tensor
        The recipe's log probabilities of the first batch.
    layers : iterable of Layer
        What is quantized; everything else stays float.
    widths : iterable of int
        Bits of weights. Inputs have as many, but not less than
        ``activation_bits``.
    activation_bits : int
        See there.
    seed : int
        Of the labels that are drawn.

    Returns
    -------
    dict
        For each layer's name, the score by bits. Layers that modelopt keeps
        together (query, key and value) have the whole score at one of them,
        and 0 at the others.

    Raises
    ------
    ValueError
        The modules one after the other do not give the recipe's log
        probabilities.
    """
    require_modelopt()
    calls = Calls(modules)
    with torch.no_grad():
        found = calls(batches[0])
    if found.shape != reference.shape or not torch.allclose(
        found, reference.to(found), rtol=0, atol=_TOLERANCE
    ):
        raise ValueError(
            "quantize.plus.budget.scores: modelopt needs log probabilities "
            f"that {', '.join(modules)} compute one after the other, and the "
            "recipe's are others; use scores: divergence"
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

    with _quiet():
        import modelopt.torch.quantization as mtq

        _, state = mtq.auto_quantize(
            calls,
            # What it would choose does not matter: all scores are measured.
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
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {
                "quantizer_name": "*weight_quantizer",
                "cfg": {"num_bits": weight_bits, "axis": 0},
            },
            {
                "quantizer_name": "*input_quantizer",
                "cfg": {"num_bits": activation_bits, "axis": None},
            },
        ],
        "algorithm": "max",
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Its progress bars are shown, what it prints and warns of is not."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


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
        # The formats are in the order of their bits, then none at all.
        for bits, score in zip(widths, entry["scores"], strict=False):
            found[members[0]][bits] = float(score)
    if missing:
        raise ValueError(
            f"{min(missing)}: modelopt gives no score for this layer; add it "
            "to quantize.exclude or use plus.budget.scores: divergence"
        )
    return found
