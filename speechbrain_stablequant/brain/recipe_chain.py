"""How a recipe gets from audio to what it decodes: observed on one batch.

Modules are those that the Brain or its hparams hold under a key. The chain is
followed from the decoder back to the audio by comparing tensors.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import speechbrain as sb
import speechbrain.decoders.ctc as ctc_decoders
import torch
from speechbrain.decoders.seq2seq import S2SBaseSearcher
from speechbrain.decoders.transducer import TransducerBeamSearcher
from torch import nn

from ..folder.errors import NoFolderError
from ..utils.patching import shadowed
from .passes import Call, recording, same

#: What decodes token by token.
SEARCHERS = (S2SBaseSearcher, TransducerBeamSearcher)
_CONSTANTS = bool | int | float | None


@dataclass
class Observed:
    """The calls of a recipe's modules on a batch, in order of their ends."""

    audio: tuple[torch.Tensor, torch.Tensor]
    calls: list[Call] = field(default_factory=list)
    #: The searcher that was called, and with what.
    searcher: Call | None = None
    #: The CTC decoder: a searcher or the index of the blank.
    ctc: ctc_decoders.CTCBaseSearcher | int | None = None
    #: What the CTC decoder was given.
    scores: torch.Tensor | None = None

    @property
    def decoded(self) -> torch.Tensor | None:
        """What the decoder gets of the audio."""
        if self.searcher is not None:
            return self.searcher.inputs[0]
        return self.scores


@contextmanager
def observing(
    modules: Mapping[str, nn.Module],
    audio: tuple[torch.Tensor, torch.Tensor],
) -> Iterator[Observed]:
    """Context that observes calls of modules and of SpeechBrain's decoders."""
    seen = Observed(audio)

    def record(call: Call) -> None:
        if isinstance(modules[call.key], SEARCHERS):
            seen.searcher = call
        else:
            seen.calls.append(call)

    greedy, kind = ctc_decoders.ctc_greedy_decode, ctc_decoders.CTCBaseSearcher
    beam = kind.__call__

    def greedily(scores: torch.Tensor, lengths: Any, blank_id: int = -1):
        seen.ctc, seen.scores = blank_id, scores
        return greedy(scores, lengths, blank_id)

    def beamwise(
        searcher: Any, scores: torch.Tensor, *args: Any, **kwargs: Any
    ):
        seen.ctc, seen.scores = searcher, scores
        return beam(searcher, scores, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(recording(modules, record))
        for owner in (sb.decoders, ctc_decoders):
            stack.enter_context(shadowed(owner, "ctc_greedy_decode", greedily))
        kind.__call__ = beamwise
        stack.callback(setattr, kind, "__call__", beam)
        yield seen


def chain_to(
    target: torch.Tensor,
    seen: Observed,
    modules: Mapping[str, nn.Module],
    brain: sb.Brain,
) -> list[dict[str, Any]]:
    """The calls of an ``EncoderChain`` from audio to a tensor."""
    wavs, lengths = (x.to(brain.device) for x in seen.audio)
    steps: list[dict[str, Any]] = []
    x, until = target, len(seen.calls)
    while not same(x, wavs):
        found = [
            (i, key)
            for i in range(until)
            for key, value in _outputs(seen.calls[i].output)
            if same(value, x)
        ]
        if not found:
            raise NoFolderError(
                f"what '{steps[0]['module']}' gets is the output of no module: "
                "the recipe changes it in between"
                if steps
                else "what is decoded is the output of no module"
            )
        until, key = found[-1]
        call = seen.calls[until]
        x, step = _step(call, modules[call.key], x, lengths, brain)
        if key is not None and "method" not in step:
            step["output"] = key
        steps.insert(0, step)
    return steps


def _step(
    call: Call,
    module: nn.Module,
    output: torch.Tensor,
    lengths: torch.Tensor,
    brain: sb.Brain,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """A call's input, and the call as data."""
    x = next((v for v in call.inputs if isinstance(v, torch.Tensor)), None)

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if same(value, x):
                return "input"
            return "lengths" if same(value, lengths) else _Other
        return value if isinstance(value, _CONSTANTS) else _Other

    args = [plain(value) for value in call.args]
    settings = {name: plain(value) for name, value in call.kwargs.items()}
    if _Other not in (*args, *settings.values()):
        step = {"module": call.key, "args": args}
        return x, step | ({"settings": settings} if settings else {})
    if not hasattr(module, "encode"):
        raise NoFolderError(
            f"'{call.key}' gets more than the audio's features and lengths"
        )
    given = "lengths" in (*args, *settings.values())
    args = ["input", "lengths"] if given else ["input"]
    settings = {k: v for k, v in settings.items() if k == "pad_idx"}
    with torch.no_grad(), brain.evaluation_ctx:
        found = module.encode(x, *[lengths] * given, **settings)
    found = found if isinstance(found, torch.Tensor) else found[0]
    if not torch.allclose(found, output, rtol=1e-4, atol=1e-4):
        raise NoFolderError(
            f"'{call.key}' encodes something else than its `encode` does"
        )
    step = {"module": call.key, "method": "encode", "args": args}
    return x, step | ({"settings": settings} if settings else {})


class _Other:
    """Stands for a value that a YAML cannot hold."""


def _outputs(output: Any) -> list[tuple[Any, Any]]:
    """A module's outputs by position or key; one has neither."""
    if isinstance(output, tuple | list):
        return list(enumerate(output))
    if isinstance(output, Mapping):
        return list(output.items())
    return [(None, output)]
