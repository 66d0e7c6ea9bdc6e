"""Options of ``method: qat``."""

from dataclasses import dataclass

from ...config import MethodConfig
from ...core.calibrators import CALIBRATORS
from ...utils.typed import choice, count, fraction, positive


@dataclass(frozen=True)
class QatConfig(MethodConfig):
    """``quantize.qat``: quantization-aware training.

    The defaults train a tenth as long as the float model, with a hundredth of
    its learning rate.

    Arguments
    ---------
    epochs : int
        Epochs over the recipe's training set, with its loader options.
    lr : float
        Learning rate, decayed to 0 by a half cosine.
    learn_scales : bool
        Whether scales are trained (LSQ) or stay as calibrated.
    scale_lr : float
        Learning rate of scales, relative to the scale.
    calibrator : str
        Calibrator of the initial scales: ``max``, ``percentile``, ``entropy``
        or ``mse``.
    keep : str
        ``best``: the epoch with the lowest WER on the search set, the
        calibrated model included; or ``last``, which needs no search set.
    distill : float
        0: the recipe's loss; 1: the divergence from the float model, which
        needs no transcripts; in between: a mixture.
    freeze_feature_extractor : bool
        Whether the encoder's convolutions stay as calibrated, which saves
        time and memory.
    bfloat16 : bool
        Whether training multiplies in bfloat16, which is faster on devices
        that support it. Evaluation and the written model do not use it.
    """

    block = "qat"
    also_reads = (
        "calibration.percentile",
        "search.num_utterances",
        "search.batch_size",
    )

    epochs: int = count(3)
    lr: float = positive(1e-5)
    learn_scales: bool = False
    scale_lr: float = positive(1e-3)
    calibrator: str = choice("mse", *CALIBRATORS)
    keep: str = choice("best", "best", "last")
    distill: float = fraction(0.0)
    freeze_feature_extractor: bool = False
    bfloat16: bool = False

    @property
    def sets(self) -> dict[str, bool]:
        search = {"search": True} if self.keep == "best" else {}
        return {"train": self.distill < 1, **search}
