"""``method: adaround``, adaptive rounding on the scales of a calibrator: Nagel
et al., "Up or Down?" (2020), AIMET's settings.

Learns for each weight whether it is rounded up or down, so that the layer's
output on quantized inputs is nearest to that of the float model.

Two differences. The paper draws minibatches; here the loss over the whole
calibration set is a quadratic form in the weights (see
:mod:`.layerwise.hessian`), so that gradients have no noise. And where output
errors are much larger than the regularizer, roundings would end half way: while
more than 1 % of them do, more iterations follow with ever larger regularizers.
"""

import math
from dataclasses import dataclass, replace

import torch

from ..config import MethodConfig
from ..core.affine import qmax, weight_scale
from ..core.calibrators import CALIBRATORS
from ..core.plan_tensors import AdjustedTensors
from ..utils.typed import choice, count, fraction, positive
from .calibrator import calibrator_plan
from .layerwise.reconstruct import rounded_layers
from .session.histograms import Calibration
from .session.session import Planned, Session

_LOW, _HIGH = -0.1, 1.1
# Of Adam.
_BETAS, _EPS = (0.9, 0.999), 1e-8
# The regularizer grows to at most 4^12 times the published weight.
_HARDENINGS = 12


@dataclass(frozen=True)
class AdaRound(MethodConfig):
    """``quantize.adaround``: finds integers by adaptive rounding.

    The loss is a quadratic form in the Hessian of the whole calibration set,
    so there is no batch size.

    Arguments
    ---------
    iterations : int
        Steps for each layer.
    lr : float
        Learning rate.
    weight : float
        Weight of the regularizer that drives each rounding to 0 or 1.
    beta_start, beta_end : float
        First and last exponent of the regularizer.
    warm_start : float
        Fraction of the steps without the regularizer.
    calibrator : str
        Calibrator of the activations: ``max``, ``percentile``, ``entropy`` or
        ``mse``.

    Example
    -------
    >>> weight = torch.tensor([[1.0, 0.45, 0.35]])
    >>> gram = torch.ones(3, 3)  # the inputs are equal
    >>> solve = AdaRound(iterations=200, lr=0.05)
    >>> q, scale = solve(weight, 2, "max", gram, gram)
    >>> int(q.sum())  # the nearest integers are 1, 0, 0
    2
    """

    block = "adaround"
    also_reads = ("calibration.percentile", "search.cache_gb")
    cross = True

    iterations: int = count(10000)
    lr: float = positive(0.01)
    weight: float = positive(0.01)
    beta_start: float = positive(20.0)
    beta_end: float = positive(2.0)
    warm_start: float = fraction(0.2)
    # Not in the repr, which identifies finished layers.
    calibrator: str = choice("mse", *CALIBRATORS, repr=False)

    @torch.no_grad()
    def __call__(
        self,
        weight: torch.Tensor,
        bits: int,
        method: str,
        gram: torch.Tensor,
        cross: torch.Tensor,
        rows: float = math.inf,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`~.layerwise.reconstruct.Solve`."""
        scale = weight_scale(weight, bits, method)
        steps = scale[:, None]
        limit = qmax(bits)
        # Outside the range there is nothing to decide.
        ratio = (weight / steps).clamp(-limit, limit)
        floor = ratio.floor().clamp_(max=limit - 1)
        aim = weight @ cross
        up = self._learn(floor, ratio - floor, steps, gram, aim)
        nearest = ratio.round()
        learned = floor + up
        # Never worse than the nearest integers, row by row.
        better = _errors(learned * steps, gram, aim) < _errors(
            nearest * steps, gram, aim
        )
        chosen = torch.where(better[:, None], learned, nearest)
        return chosen.to(torch.int8), scale

    def _learn(
        self,
        floor: torch.Tensor,
        fraction: torch.Tensor,
        steps: torch.Tensor,
        gram: torch.Tensor,
        aim: torch.Tensor,
    ) -> torch.Tensor:
        """1 where a weight is rounded up."""
        v = -torch.log((_HIGH - _LOW) / (fraction - _LOW) - 1)
        adam = _Adam(v, self.lr)

        def step(pull: float, beta: float) -> None:
            sigmoid = torch.sigmoid(v)
            soft = _soft(sigmoid)
            h = soft.clamp(0, 1)
            slope = 2 * (((floor + h) * steps) @ gram - aim) * steps
            if pull:
                # Of pull * sum(1 - |2h - 1|^beta).
                away = 2 * h - 1
                power = away.abs().pow_(beta - 1).mul_(away.sign())
                slope += power.mul_(-2 * beta * pull)
            slope *= sigmoid * (1 - sigmoid) * (_HIGH - _LOW)
            slope *= (soft > 0) & (soft < 1)
            adam.step(slope)

        warm = int(self.warm_start * self.iterations)
        swing = self.beta_start - self.beta_end
        for index in range(self.iterations):
            done = (index - warm) / max(1, self.iterations - warm)
            beta = self.beta_end + 0.5 * swing * (1 + math.cos(done * math.pi))
            step(self.weight if index >= warm else 0.0, beta)
        pull = self.weight
        for _ in range(_HARDENINGS):
            h = _soft(torch.sigmoid(v)).clamp(0, 1)
            if ((h > 0.05) & (h < 0.95)).float().mean() <= 0.01:
                break
            pull *= 4
            for _ in range(max(self.iterations // 10, 1)):
                step(pull, self.beta_end)
        return (_soft(torch.sigmoid(v)) >= 0.5).float()


def _soft(sigmoid: torch.Tensor) -> torch.Tensor:
    """A rounding between 0 (down) and 1 (up), and a little beyond."""
    return sigmoid * (_HIGH - _LOW) + _LOW


class _Adam:
    def __init__(self, value: torch.Tensor, lr: float):
        self.value, self.lr, self.steps = value, lr, 0
        self.first = torch.zeros_like(value)
        self.second = torch.zeros_like(value)

    def step(self, slope: torch.Tensor) -> None:
        self.steps += 1
        self.first.lerp_(slope, 1 - _BETAS[0])
        self.second.lerp_(slope * slope, 1 - _BETAS[1])
        mean = self.first / (1 - _BETAS[0] ** self.steps)
        spread = (self.second / (1 - _BETAS[1] ** self.steps)).sqrt_()
        self.value -= self.lr * mean / spread.add_(_EPS)


def _errors(
    grid: torch.Tensor, gram: torch.Tensor, aim: torch.Tensor
) -> torch.Tensor:
    """Mean squared output error of each row, up to a constant."""
    grid = grid.double()
    return (grid * (grid @ gram.double() - 2 * aim.double())).sum(1)


def adaround_plan(
    session: Session, weights: str, calibration: Calibration
) -> Planned:
    """Learns for each weight whether it is rounded up or down."""
    options = session.config.adaround
    plan, histograms = calibrator_plan(
        session,
        weights,
        calibration,
        options.calibrator,
        ", then adaptive rounding",
    )
    tensors = rounded_layers(
        session,
        weights,
        calibration.in_order,
        plan.quants(),
        "adaround",
        lambda _: options,
    )
    tensors = AdjustedTensors(layers=tensors)
    return replace(plan, tensors=tensors), histograms
