"""How far the outputs are from those of the float model.

A word changes or does not; what an output distribution loses shows long
before, in a few utterances, and needs no transcript.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest

import torch

from ...utils.distributed import gathered
from .score import Score

BeforeBatch = Callable[[int], None]
Outputs = Callable[[BeforeBatch], Iterator[torch.Tensor]]


def divergence(
    reference: torch.Tensor, output: torch.Tensor
) -> tuple[float, int]:
    """Divergence of an output from its reference, summed over frames.

    Arguments
    ---------
    reference, output : torch.Tensor
        [..., labels]. Log probabilities are compared by Kullback-Leibler
        divergence; anything else by squared error relative to the
        reference's square.

    Returns
    -------
    float
        The sum.
    int
        Frames.

    Example
    -------
    >>> x = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    >>> divergence(x, x)
    (0.0, 2)
    >>> total, _ = divergence(x, x.flip(1))
    >>> round(total, 3)
    0.549
    """
    a = reference.double().reshape(-1, reference.shape[-1])
    b = output.double().reshape(-1, output.shape[-1]).to(a.device)
    mass = a.logsumexp(1)
    if bool((mass.abs() < 1e-3).all()):
        p = a.exp()
        # Where p is 0 its log may be -inf, and the term is 0.
        rows = torch.where(p > 0, p * (a - b), 0.0).sum(1)
    else:
        rows = (a - b).square().sum(1) / a.square().sum(1).clamp(min=1e-12)
    return float(rows.sum()), len(rows)


class Divergence:
    """Measures a recognizer by the divergence from its float outputs.

    Arguments
    ---------
    outputs : callable
        Runs the search set and gives the output of each batch; calls its
        argument with the batch's index before each.

    Example
    -------
    >>> linear = torch.nn.Linear(2, 2)
    >>> x = torch.randn(3, 2)
    >>> def outputs(before_batch):
    ...     before_batch(0)
    ...     yield linear(x).detach()
    >>> measure = Divergence(outputs)
    >>> measure.score(lambda _: None).loss
    0.0
    >>> _ = linear.weight.data.mul_(2)
    >>> measure.score(lambda _: None).loss > 0
    True
    """

    def __init__(self, outputs: Outputs):
        self._outputs = outputs
        self._reference = [x.cpu() for x in _given(outputs(lambda _: None))]

    def score(
        self, before_batch: BeforeBatch, give_up_above: int | None = None
    ) -> Score:
        """Measures.

        Arguments
        ---------
        before_batch : callable
            Called with the index of each batch before it is run.
        give_up_above : int or None
            Of no meaning here: no words are counted.

        Returns
        -------
        Score
            Mean divergence per frame as its loss; no errors, of one word.
        """
        outputs = _given(self._outputs(before_batch))
        parts = gathered(
            [
                divergence(reference, output)
                for reference, output in zip(
                    self._reference, outputs, strict=True
                )
            ]
        )
        total, frames = 0.0, 0
        # batch by batch in the order of the set, which the processes share
        for row in zip_longest(*parts, fillvalue=(0.0, 0)):
            for more, count in row:
                total += more
                frames += count
        return Score(0, 1, total / frames)


def _given(outputs: Iterable[torch.Tensor | None]) -> Iterator[torch.Tensor]:
    for output in outputs:
        if output is None:
            raise ValueError(
                "the recipe's compute_forward returns no tensor, so outputs "
                "cannot be compared; set quantize.plus.cutoffs to units or "
                "none"
            )
        yield output
