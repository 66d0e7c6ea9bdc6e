"""Options of ``method: stablequant_plus``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ...config import MethodConfig
from ...utils.typed import choice, option
from ..search import SEARCH_KEYS
from .bits import HARMS


@dataclass(frozen=True)
class BudgetConfig:
    """``quantize.plus.budget``: mixed precision, bits for each unit.

    Arguments
    ---------
    size : float or None
        Size of the model on disk as a fraction of its float32 size; None
        gives every unit ``weight_bits``.
    bits : tuple of int
        Bits to choose from; 16 leaves a unit float.
    scores : str
        Sensitivity of a unit: ``divergence``, that of quantizing it alone at
        each width.
    """

    size: float | None = option(
        None,
        lambda x: 0 < x <= 1,
        "a fraction of the float32 size, such as 0.22",
    )
    bits: tuple[int, ...] = option(
        (4, 5, 6, 8, 16),
        lambda row: len(row) > 0 and all(2 <= b <= 8 or b == 16 for b in row),
        "a list of bits from 2 to 8, or 16 for units that stay float",
    )
    scores: str = "divergence"


@dataclass(frozen=True)
class PlusConfig(MethodConfig):
    """``quantize.plus``: the parts of ``method: stablequant_plus``.

    Arguments
    ---------
    rotate : bool
        Rotates the residual stream of pre-norm encoders (QuaRot), which
        removes outlier channels. Costs two matrix products per frame.
    keep_first_conv_float : bool
        Keeps the first convolution float. Its input is the audio itself,
        which 8 bits distort most, and it has hardly any weights.
    equalize : bool
        Migrates scale from activation channels to weights (SmoothQuant).
    strengths : tuple of float
        Migration strengths to try, from 0 to 1; the one with the least
        divergence from the float model is taken.
    cutoffs : str
        Clipping percentiles: ``layers``, one for each layer by the divergence
        it causes; ``units``, one for each unit by WER, as StableQuant does;
        or ``none``.
    float_inputs : float
        Largest share of the multiply-adds of all layers whose inputs stay
        float: where they cause most of the divergence, as behind massive
        activations. 0 quantizes all. Needs ``cutoffs: layers``.
    compensate : bool
        Rounds weights with error compensation (GPTQ).
    damping : float
        Dampening of the Hessian, as a fraction of its mean diagonal; the ratio
        of inputs to calibration frames is added.
    earlier_errors : bool
        Whether GPTQ compensates errors of earlier layers as well.
    adaround : bool
        Rounds the layers of selected units by AdaRound instead, with the
        settings of ``quantize.adaround``.
    bias_correction : bool
        Subtracts the mean error of each output channel from its bias.
    asymmetric : bool
        Uses a zero point for inputs behind a GELU, which are hardly negative.
    budget : BudgetConfig
        Mixed precision.
    """

    block = "plus"
    also_reads = ("adaround", *SEARCH_KEYS)
    old_keys: ClassVar[Mapping[str, str | None]] = {
        "keep_wave": "keep_first_conv_float",
        "weight_groups": None,
    }

    rotate: bool = True
    keep_first_conv_float: bool = True
    equalize: bool = True
    strengths: tuple[float, ...] = option(
        (0.5, 0.75),
        lambda row: len(row) > 0 and all(0 <= x <= 1 for x in row),
        "a list of fractions from 0 to 1, such as 0.5",
    )
    cutoffs: str = choice("layers", "layers", "units", "none")
    float_inputs: float = option(
        0.02, lambda x: 0 <= x <= 1, "a fraction from 0 to 1, such as 0.02"
    )
    compensate: bool = True
    damping: float = option(
        0.01, lambda x: 0 < x <= 1, "a fraction above 0 and at most 1"
    )
    earlier_errors: bool = True
    adaround: bool = False
    bias_correction: bool = True
    asymmetric: bool = True
    budget: BudgetConfig = field(default_factory=BudgetConfig)

    @property
    def sets(self) -> dict[str, bool]:
        return {"search": self.cutoffs == "units"}

    def check(self) -> None:
        if self.adaround and self.cutoffs != "units":
            raise ValueError(
                "adaround: rounds the units that are selected; set "
                "plus.cutoffs to units"
            )
        if self.budget.scores not in HARMS:
            raise ValueError(
                f"budget.scores: '{self.budget.scores}' is not one of "
                f"{', '.join(HARMS)}"
            )
