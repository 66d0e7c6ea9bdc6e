"""Divergence of the outputs from those of the float model.

Sensitive long before a word changes, with few utterances and no transcript.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import torch

from ...utils.distributed import gathered
from .score import BeforeBatch, Score


def divergence(
    reference: torch.Tensor, output: torch.Tensor
) -> tuple[float, int]:
    """Sum of the divergence from a reference over frames, and the frames.

    [..., labels] both. KL divergence for log probabilities, else the squared
    error relative to the square of the reference.
    """
    a = reference.double().reshape(-1, reference.shape[-1])
    b = output.double().reshape(-1, output.shape[-1]).to(a.device)
    mass = a.logsumexp(1)
    if bool((mass.abs() < 1e-3).all()):
        p = a.exp()
        # 0 * -inf is NaN, and the limit is 0.
        rows = torch.where(p > 0, p * (a - b), 0.0).sum(1)
    else:
        rows = (a - b).square().sum(1) / a.square().sum(1).clamp(min=1e-12)
    return float(rows.sum()), len(rows)


class Divergence:
    """Scores a recognizer by the divergence from its float outputs.

    ``outputs`` runs the search set and yields each batch's output, a tensor or
    several; it calls its argument with the batch's index before each, in the
    float model's run ``before_batch``.
    """

    def __init__(
        self,
        outputs: Callable[
            [BeforeBatch], Iterator[torch.Tensor | Sequence[torch.Tensor]]
        ],
        before_batch: BeforeBatch = lambda _: None,
    ):
        self._outputs = outputs
        self._reference = [
            [x.cpu() for x in batch] for batch in self._run(before_batch)
        ]

    def _run(
        self, before_batch: BeforeBatch
    ) -> Iterator[Sequence[torch.Tensor]]:
        for output in self._outputs(before_batch):
            if isinstance(output, torch.Tensor):
                output = [output]
            if not output:
                raise ValueError(
                    "the recipe's compute_forward returns no tensor, so "
                    "outputs cannot be compared; set quantize.plus.cutoffs to "
                    "units or none"
                )
            yield output

    def score(
        self, before_batch: BeforeBatch, give_up_above: int | None = None
    ) -> Score:
        """The mean divergence per frame, as a score's loss."""
        batches = zip(self._reference, self._run(before_batch), strict=True)
        parts = gathered(
            [
                divergence(*pair)
                for pairs in batches
                for pair in zip(*pairs, strict=True)
            ]
        )
        total, frames = 0.0, 0
        # In the order of the set, so that any number of processes agrees.
        for row in zip_longest(*parts, fillvalue=(0.0, 0)):
            for more, count in row:
                total += more
                frames += count
        return Score(0, 1, total / frames)
