"""Quantization-aware training, from a calibrated model.

The forward pass computes on the quantization grid, the backward pass takes
rounding for the identity and the clamp for what it is (the straight-through
estimator). Scales are those of the calibration, or are learned with the
weights (Esser et al., "Learned step size quantization", 2020). What is trained
are copies: the float model has its own parameters again afterwards, bit for
bit.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from ...core.affine import qmax, scale_from_amax
from ...core.plan import LayerQuant, read_quant
from ...core.plan_tensors import AdjustedTensors, LayerTensors
from ...core.weights import round_weight, weight_scale
from ...model.layers import Layer
from ...simulation.fake_quant import multiply
from ...utils.store import Store
from ...utils.typed import one_line, typed
from ..search.score import Score

Quants = dict[str, LayerQuant]
Optimizers = Mapping[str, torch.optim.Optimizer]
Measure = Callable[[Quants, AdjustedTensors], Score]


class _Quantize(torch.autograd.Function):
    """Numbers on the grid; the gradient passes where nothing was clamped."""

    @staticmethod
    def forward(ctx, x, scale, limit, factor):
        ctx.learns, ctx.factor = ctx.needs_input_grad[1], factor
        ctx.shape = scale.shape
        ratio = x * (1.0 / scale)
        rounded = ratio.round() if ctx.learns else ratio.round_()
        grid = rounded.clamp(-limit, limit)
        # As torch's operators: what rounds into the range is in it.
        kept = grid == rounded
        if ctx.learns:
            # By how much the output grows with the scale. At most 1/2 inside
            # of the range and at least 1 outside: it says which of the two.
            kept = torch.where(kept, rounded - ratio, grid)
        ctx.save_for_backward(kept)
        return grid.mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        (kept,) = ctx.saved_tensors
        if not ctx.learns:
            return gradient * kept, None, None, None
        by_scale = (gradient * kept).sum_to_size(ctx.shape) * ctx.factor
        by_input = None
        if ctx.needs_input_grad[0]:
            by_input = gradient * (kept.abs() <= 0.5)
        return by_input, by_scale, None, None


def straight_through(
    x: torch.Tensor, scale: torch.Tensor, bits: int, numbers: int = 0
) -> torch.Tensor:
    """Fake quantization with a gradient.

    The same values as :func:`~...core.affine.fake_quantize`,
    bit for bit.

    Arguments
    ---------
    x : torch.Tensor
        float32.
    scale : torch.Tensor
        Positive float32, of a shape that broadcasts to that of ``x``. Its
        gradient is that of LSQ.
    bits : int
        2 to 8.
    numbers : int
        Of ``x`` that one scale serves: LSQ divides the scale's gradient by
        ``sqrt(numbers * qmax)``. 0 leaves it as it is.

    Returns
    -------
    torch.Tensor
        The shape of ``x``.

    Example
    -------
    >>> x = torch.tensor([0.4, 0.8, 9.0], requires_grad=True)
    >>> scale = torch.tensor(0.5, requires_grad=True)
    >>> y = straight_through(x, scale, 3)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.5, 1.0, 1.5], [1.0, 1.0, 0.0])
    >>> round(scale.grad.item(), 4)  # 1 - 0.8, 2 - 1.6 and 3
    3.6
    """
    limit = qmax(bits)
    factor = (numbers * limit) ** -0.5 if numbers else 1.0
    return _Quantize.apply(x, scale, limit, factor)


# -- the model in training -----------------------------------------------------


class _TrainedLayer:
    """One layer that computes on the grid, with parameters of its own."""

    def __init__(
        self,
        layer: Layer,
        quant: LayerQuant,
        trains: bool,
        learns: bool,
        bfloat16: bool,
    ):
        module = layer.module
        self.module, self.quant = module, quant
        self.bfloat16 = bfloat16

        def parameter(value: torch.Tensor, wanted: bool) -> nn.Parameter:
            return nn.Parameter(value.detach().float().clone(), wanted)

        self.weight = parameter(module.weight, trains)
        self.bias = None
        if module.bias is not None:
            self.bias = parameter(module.bias, trains)
        weight_bits, method = quant.weight_bits, quant.weight_method
        self.weight_start = weight_scale(self.weight, weight_bits, method)
        amax = torch.tensor(quant.activation_amax)
        start = scale_from_amax(amax, quant.activation_bits)
        self.input_start = start.to(self.weight.device)
        # Logarithms of what the scales have grown by: a step of an optimizer
        # changes large and small scales alike, and none becomes negative.
        self.weight_growth = parameter(
            torch.zeros_like(self.weight_start), trains and learns
        )
        self.input_growth = parameter(
            torch.zeros_like(self.input_start), trains and learns
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that may be trained, by what it is."""
        names = ("weight", "bias", "weight_growth", "input_growth")
        found = {name: getattr(self, name) for name in names}
        return {name: p for name, p in found.items() if p is not None}

    def scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the weight's channels, of the input."""
        weight, inputs = self.weight_start, self.input_start
        if self.weight_growth.requires_grad:
            weight = weight * self.weight_growth.exp()
            inputs = inputs * self.input_growth.exp()
        return weight, inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight_scales, input_scale = self.scales()
        quant, weight = self.quant, self.weight
        shape = (-1,) + (1,) * (weight.dim() - 1)
        # A 16-bit product of grid values would round them a second time.
        with torch.autocast(x.device.type, enabled=False):
            grid = straight_through(
                x.float(), input_scale, quant.activation_bits, x[0].numel()
            )
            weight = straight_through(
                weight,
                weight_scales.view(shape),
                quant.weight_bits,
                weight[0].numel(),
            )
        with torch.autocast(x.device.type, torch.bfloat16, self.bfloat16):
            out = multiply(self.module, grid, weight, self.bias)
        return out.to(x.dtype)

    @torch.no_grad()
    def result(self) -> tuple[LayerQuant, LayerTensors]:
        """What it has become."""
        scale, inputs = self.scales()
        bits = self.quant.weight_bits
        tensors = LayerTensors(
            round_weight(self.weight, scale, bits),
            scale.clone(),
            None if self.bias is None else self.bias.detach().clone(),
        )
        if not self.input_growth.requires_grad:
            return self.quant, tensors
        amax = float(inputs) * qmax(self.quant.activation_bits)
        return replace(self.quant, activation_amax=amax), tensors


@dataclass
class _Float:
    """A parameter that stays float, at all its places, and its copy."""

    original: nn.Parameter
    trained: nn.Parameter
    places: list[tuple[nn.Module, str]]

    def put(self, value: nn.Parameter) -> None:
        """Another parameter at its places."""
        for owner, name in self.places:
            owner._parameters[name] = value


class Student:
    """A model in training: layers on the grid, everything else float.

    Arguments
    ---------
    layers : iterable of Layer
        Layers of the model.
    quants : Mapping
        LayerQuant by name, from a calibration; layers that are not named
        stay float.
    modules : Mapping
        Modules by key whose parameters are trained.
    learn_scales : bool
        Whether scales are trained as well.
    frozen : callable
        Of the name of a layer or parameter: whether it stays as it is.
    bfloat16 : bool
        Whether products are computed in bfloat16 while training.

    Example
    -------
    >>> linear = nn.Linear(1, 1, bias=False)
    >>> layer = Layer("a", linear, "linear", "head")
    >>> student = Student([layer], {"a": LayerQuant(4, 4, 7.0)}, {"a": linear})
    >>> with student.active():
    ...     (linear(torch.ones(1)) ** 2).sum().backward()
    >>> list(student.weights), linear.weight.grad is None
    (['layers/a/weight'], True)
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        quants: Mapping[str, LayerQuant],
        modules: Mapping[str, nn.Module],
        learn_scales: bool = False,
        frozen: Callable[[str], bool] = lambda _: False,
        bfloat16: bool = False,
    ):
        self.layers = {
            layer.name: _TrainedLayer(
                layer,
                quants[layer.name],
                not frozen(layer.name),
                learn_scales,
                bfloat16,
            )
            for layer in layers
            if layer.name in quants
        }
        self.floats = self._find_floats(modules, frozen)
        self.parameters = {
            f"layers/{name}/{what}": parameter
            for name, layer in self.layers.items()
            for what, parameter in layer.parameters().items()
        }
        self.parameters.update(
            {f"floats/{name}": f.trained for name, f in self.floats.items()}
        )

    def _find_floats(
        self, modules: Mapping[str, nn.Module], frozen: Callable[[str], bool]
    ) -> dict[str, _Float]:
        taken = {
            id(parameter)
            for layer in self.layers.values()
            for parameter in layer.module.parameters()
        }
        found: dict[int, _Float] = {}
        names: dict[str, int] = {}
        for key, module in modules.items():
            for path, owner in module.named_modules(prefix=key):
                for attribute, parameter in owner._parameters.items():
                    name = f"{path}.{attribute}"
                    if parameter is None or id(parameter) in taken:
                        continue
                    if frozen(name):
                        continue
                    if id(parameter) not in found:
                        copy = nn.Parameter(parameter.detach().clone())
                        found[id(parameter)] = _Float(parameter, copy, [])
                        names[name] = id(parameter)
                    found[id(parameter)].places.append((owner, attribute))
        return {name: found[key] for name, key in names.items()}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """What is trained, but for scales, by name."""
        return {
            name: parameter
            for name, parameter in self.parameters.items()
            if parameter.requires_grad and not name.endswith("_growth")
        }

    @property
    def scales(self) -> dict[str, nn.Parameter]:
        """Scales that are trained, by name."""
        return {
            name: parameter
            for name, parameter in self.parameters.items()
            if parameter.requires_grad and name.endswith("_growth")
        }

    def _enter(self) -> None:
        for name, layer in self.layers.items():
            if "forward" in vars(layer.module):
                raise RuntimeError(f"{name}: is being simulated already")
            layer.module.forward = layer.forward
        for parameter in self.floats.values():
            parameter.put(parameter.trained)

    def _leave(self) -> None:
        for layer in self.layers.values():
            vars(layer.module).pop("forward", None)
        for parameter in self.floats.values():
            parameter.put(parameter.original)

    @contextmanager
    def active(self) -> Iterator["Student"]:
        """Context in which the model is the one in training."""
        try:
            self._enter()
            yield self
        finally:
            self._leave()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Context, inside of the other, in which it is the float model."""
        self._leave()
        try:
            yield
        finally:
            self._enter()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over what another one of the same model has learned.

        Arguments
        ---------
        tensors : Mapping
            Its ``parameters`` by name.
        """
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def result(self) -> tuple[Quants, AdjustedTensors]:
        """What the model has become.

        Returns
        -------
        dict
            LayerQuant by name.
        AdjustedTensors
            Integers, scales, biases, and the float parameters that changed.
        """
        found = {name: layer.result() for name, layer in self.layers.items()}
        floats = {
            name: parameter.trained.detach().float().clone()
            for name, parameter in self.floats.items()
            if not torch.equal(parameter.trained, parameter.original)
        }
        return (
            {name: quant for name, (quant, _) in found.items()},
            AdjustedTensors(
                {name: t for name, (_, t) in found.items()}, floats
            ),
        )


# -- finished epochs on disk ---------------------------------------------------


@dataclass
class EpochStore:
    """Finished epochs, so that a killed training goes on.

    An epoch's file holds all that the next one needs. Of finished trainings
    the result alone is kept.

    Arguments
    ---------
    store : Store
        Keeps a file for each.
    key : str
        Identifies all that decides the result.
    """

    store: Store
    key: str

    def _result(self) -> str:
        return f"{self.key[:16]}.safetensors"

    def _epoch(self, number: int) -> str:
        return f"{self.key[:16]}_epoch{number}.safetensors"

    def _found(self) -> list[int]:
        head = f"{self.key[:16]}_epoch"
        names = self.store.names(f"{head}*.safetensors")
        return sorted(
            int(name.removeprefix(head).removesuffix(".safetensors"))
            for name in names
        )

    def write(
        self,
        tensors: Mapping[str, torch.Tensor],
        history: list[dict],
        best: int,
    ) -> None:
        """Keeps the last epoch of a history, and the best one.

        Arguments
        ---------
        tensors : Mapping
            State after the epoch.
        history : list of dict
            An entry for each epoch, beginning with 0.
        best : int
            The epoch that is the best so far.
        """
        number = history[-1]["epoch"]
        self.store.write_tensors(
            self._epoch(number), self.key, tensors, history
        )
        for old in self._found():
            if old not in (number, best):
                self.store.delete(self._epoch(old))

    def read(
        self, number: int | None = None
    ) -> tuple[dict[str, torch.Tensor], list[dict]] | None:
        """An epoch's tensors and the history up to it.

        Arguments
        ---------
        number : int or None
            None: the last one that was finished.

        Returns
        -------
        tuple or None
            None when no epoch was finished.

        Raises
        ------
        ValueError
            A damaged file.
        """
        if number is None:
            if not self._found():
                return None
            number = self._found()[-1]
        return self.store.read_tensors(
            self._epoch(number), self.key, "finished epoch"
        )

    def finish(
        self, quants: Quants, tensors: AdjustedTensors, history: list[dict]
    ) -> None:
        """Keeps the result, and no epoch any more.

        Arguments
        ---------
        quants : dict
            LayerQuant by name.
        tensors : AdjustedTensors
            Their tensors.
        history : list of dict
            An entry for each epoch.
        """
        content = {
            "quants": {name: quant.to_dict() for name, quant in quants.items()},
            "history": history,
        }
        self.store.write_tensors(
            self._result(), self.key, tensors.flat(), content
        )
        for number in self._found():
            self.store.delete(self._epoch(number))

    def finished(self) -> tuple[Quants, AdjustedTensors, list[dict]] | None:
        """What :meth:`finish` was given; None when there is nothing.

        Returns
        -------
        tuple or None
        """
        known = self.store.read_tensors(
            self._result(), self.key, "result of a training"
        )
        if known is None:
            return None
        flat, raw = known
        try:
            rows = typed(raw, dict, "content")
            found = typed(rows.get("quants"), dict, "quants")
            quants = {
                name: read_quant(typed(row, dict, name), name)
                for name, row in found.items()
            }
            history = typed(rows.get("history"), list[dict], "history")
            return quants, AdjustedTensors.from_flat(flat), history
        except ValueError as error:
            raise ValueError(
                f"{self.store.folder / self._result()}: is damaged "
                f"({one_line(error)}); delete it to train again"
            ) from error


# -- the training --------------------------------------------------------------


class Trainer(Protocol):
    """A toolkit's training loop and its data."""

    ids: list[str]
    #: What decides the outcome beside them; JSON-safe.
    settings: Mapping[str, Any]

    def __len__(self) -> int:
        """Batches of an epoch."""

    def epoch(
        self,
        number: int,
        optimizers: Optimizers,
        before_batch: Callable[[int], None],
        distill: float,
        resting: Callable[[], AbstractContextManager[None]],
    ) -> float:
        """One epoch.

        Arguments
        ---------
        number : int
            Beginning with 1. What is random in an epoch depends on it alone.
        optimizers : Mapping
            Make the steps.
        before_batch : callable
            Called with the index of each batch before it is run.
        distill : float
            0: the recipe's loss; 1: the divergence from the float model; or
            a mixture.
        resting : callable
            Makes a context in which the model is the float model.

        Returns
        -------
        float
            The mean loss.
        """


@dataclass(frozen=True)
class Training:
    """How long and how fast.

    Arguments
    ---------
    epochs : int
        Over the training set.
    lr : float
        Learning rate of weights; falls to 0 along half a cosine.
    scale_lr : float
        That of scales, as a fraction of the scale.
    distill : float
        As of :meth:`Trainer.epoch`.
    keep : str
        ``"best"``: the epoch with the fewest errors, then the least loss,
        the calibrated model before the training being one of them. Or
        ``"last"``.

    Example
    -------
    >>> Training(epochs=2, lr=1.0).rate(0.0), Training(2, 1.0).rate(0.5)
    (1.0, 0.5)
    """

    epochs: int
    lr: float
    scale_lr: float = 1e-3
    distill: float = 0.0
    keep: str = "best"

    def kept(self, history: list[dict]) -> dict:
        """The entry of the epoch that is kept.

        Arguments
        ---------
        history : list of dict
            As of :meth:`run`.

        Returns
        -------
        dict
        """
        if self.keep == "last":
            return history[-1]

        def rank(entry: dict) -> tuple:
            loss = entry["valid_loss"]
            return entry["errors"], math.inf if loss is None else loss

        return min(history, key=rank)

    @staticmethod
    def _cosine(progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

    def rate(self, progress: float) -> float:
        """The learning rate of weights.

        Arguments
        ---------
        progress : float
            From 0 to 1.

        Returns
        -------
        float
        """
        return self.lr * self._cosine(progress)

    def optimizers(self, student: Student) -> dict[str, torch.optim.Optimizer]:
        """An Adam for the weights, and one for the scales if they learn.

        Arguments
        ---------
        student : Student
            The model in training.

        Returns
        -------
        dict
            Each clips its gradients for itself.
        """
        groups = {
            "weights": (student.weights, self.lr),
            "scales": (student.scales, self.scale_lr),
        }
        return {
            name: torch.optim.Adam(parameters.values(), lr=rate)
            for name, (parameters, rate) in groups.items()
            if parameters
        }

    def _set_rates(self, optimizers: Optimizers, progress: float) -> None:
        rates = {"weights": self.lr, "scales": self.scale_lr}
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * self._cosine(progress)

    def run(
        self,
        student: Student,
        trainer: Trainer,
        measure: Measure,
        store: EpochStore,
        on_batch: Callable[[int, int], None] = lambda epoch, index: None,
        on_epoch: Callable[[dict], None] = lambda entry: None,
    ) -> tuple[Quants, AdjustedTensors, list[dict]]:
        """Trains, or goes on with a training that was killed.

        Arguments
        ---------
        student : Student
            The model as it was calibrated.
        trainer : Trainer
            The loop and its data.
        measure : callable
            Gives the Score of a result; not called to keep the last epoch.
        store : EpochStore
            Finished epochs.
        on_batch : callable
            Called before each batch with the epoch and the batch's index.
        on_epoch : callable
            Called with the entry of each epoch that was just finished.

        Returns
        -------
        dict
            LayerQuant by name.
        AdjustedTensors
            Their tensors.
        list of dict
            ``{"epoch", "loss", "wer", "errors", "valid_loss"}``; the loss of
            epoch 0 is None, and so is what was not measured.
        """
        known = store.finished()
        if known is not None:
            return known
        optimizers = self.optimizers(student)
        saved = store.read()
        history: list[dict] = []
        if saved is not None:
            tensors, history = saved
            student.load(tensors)
            _load_optimizers(optimizers, tensors)
        for number in range(len(history), self.epochs + 1):
            loss = None
            if number:
                with student.active():
                    loss = trainer.epoch(
                        number,
                        optimizers,
                        partial(
                            self._before, number, trainer, optimizers, on_batch
                        ),
                        self.distill,
                        student.resting,
                    )
            history.append(self._entry(number, loss, student, measure))
            on_epoch(history[-1])
            state = {**student.parameters, **_state_of(optimizers)}
            store.write(state, history, self.kept(history)["epoch"])
        best = self.kept(history)["epoch"]
        if best != history[-1]["epoch"]:
            student.load(store.read(best)[0])
        quants, tensors = student.result()
        store.finish(quants, tensors, history)
        return quants, tensors, history

    def _before(
        self,
        number: int,
        trainer: Trainer,
        optimizers: Optimizers,
        on_batch: Callable[[int, int], None],
        index: int,
    ) -> None:
        done = number - 1 + index / len(trainer)
        self._set_rates(optimizers, done / self.epochs)
        on_batch(number, index)

    def _entry(
        self,
        number: int,
        loss: float | None,
        student: Student,
        measure: Measure,
    ) -> dict:
        entry = {"epoch": number, "loss": loss}
        entry.update({"wer": None, "errors": None, "valid_loss": None})
        if self.keep == "best":
            score = measure(*student.result())
            entry["wer"], entry["errors"] = score.wer, score.errors
            entry["valid_loss"] = score.to_dict()["loss"]
        return entry


def _state_of(optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """The state of optimizers as tensors with names."""
    return {
        f"optimizers/{name}/{index}/{what}": value
        for name, optimizer in optimizers.items()
        for index, state in optimizer.state_dict()["state"].items()
        for what, value in state.items()
    }


def _load_optimizers(
    optimizers: Optimizers, tensors: Mapping[str, torch.Tensor]
) -> None:
    for name, optimizer in optimizers.items():
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            owner, _, rest = rest.partition("/")
            if (kind, owner) == ("optimizers", name):
                index, _, what = rest.partition("/")
                state.setdefault(int(index), {})[what] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
