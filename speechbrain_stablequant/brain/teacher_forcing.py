"""Recognition without decoding, for Brains that decode token by token.

Beside what they decode, recipes with such a decoder compute the probabilities
of each reference token after the ones before it (teacher forcing). These take
one pass of the decoder.
"""

import logging
from contextlib import ExitStack
from typing import Any

import speechbrain as sb
import torch
from speechbrain.decoders.seq2seq import S2SBaseSearcher
from speechbrain.decoders.transducer import TransducerBeamSearcher
from torch import nn

from ..utils.patching import shadowed
from ..utils.typed import one_line
from .metrics import objects_of
from .passes import decoding_each_time, recognize, tensors

logger = logging.getLogger(__name__)

# Rows of outputs kept of a batch: the joint network of a transducer has one for
# each frame and token.
_MOST_VALUES = 1 << 23


class TeacherForcing:
    """Keeps the searchers of a Brain from decoding.

    ``batch``: tried in the VALID stage, to see whether it calls any.
    """

    def __init__(self, brain: sb.Brain, batch: Any):
        self.brain = brain
        self._called = False
        self._searchers = _searchers(brain)
        if self._searchers:
            self._try(batch)
        #: Whether the Brain decodes token by token.
        self.autoregressive = self._called

    def _try(self, batch: Any) -> None:
        try:
            output = self.recognize(batch)
        except Exception as error:
            if not self._called:
                raise
            logger.warning(
                "quantize: the recipe reads what it decodes (%s), so each pass "
                "of the search decodes, which takes longer",
                one_line(error),
            )
            self._searchers = []
            return
        if self._called and not compared_outputs(output):
            logger.warning(
                "quantize: the recipe computes no probabilities of the "
                "reference's tokens, so each pass of the search decodes"
            )
            self._searchers, self._called = [], False

    def recognize(self, batch: Any) -> Any:
        """The output of ``compute_forward`` in the VALID stage."""
        with ExitStack() as stack:
            for searcher in self._searchers:
                nothing = shadowed(searcher, "forward", self._nothing)
                stack.enter_context(nothing)
            stack.enter_context(decoding_each_time(self.brain))
            return recognize(self.brain, batch)

    def _nothing(self, states: torch.Tensor, *_: Any, **__: Any) -> tuple:
        """What searchers return, without a token for any utterance."""
        self._called = True
        empty = torch.zeros(len(states), 1)
        return [[] for _ in states], empty, empty, empty


def _searchers(brain: sb.Brain) -> list[nn.Module]:
    kinds = (S2SBaseSearcher, TransducerBeamSearcher)
    modules = getattr(brain, "modules", None) or {}
    found = [*(value for _, value in objects_of(brain)), *modules.values()]
    known = {id(x): x for x in found if isinstance(x, kinds)}
    return list(known.values())


def compared_outputs(output: Any) -> list[torch.Tensor]:
    """Each tensor of an output with a row for each frame or token, [rows,
    labels]; of a large one every so many rows. Logits of a joint network, of
    frames and tokens, become log probabilities."""
    found = []
    for x in tensors(output):
        if x.dim() > 2 and x.is_floating_point():
            rows = x.reshape(-1, x.shape[-1])
            rows = rows[:: max(1, -(-rows.numel() // _MOST_VALUES))]
            rows = rows.float()
            found.append(rows.log_softmax(-1) if x.dim() > 3 else rows)
    return found
