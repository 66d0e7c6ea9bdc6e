"""Where a pass of an invented encoder and decoder can resume."""

from contextlib import suppress
from functools import partial

import torch
from torch import nn

from speechbrain_stablequant.methods.session.block_cuts import (
    block_cuts,
    called_once,
)
from speechbrain_stablequant.model.layer import Layer
from speechbrain_stablequant.simulation.prefix_cache import Replay, StopForward


class Block(nn.Module):
    """Two layers beside a residual; a decoder's reads the encoder's output."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, memory=0.0):
        """[batch, 4] to the same."""
        return x + self.two((self.one(x) + memory).relu())


class Model(nn.Module):
    """Three blocks of an encoder, two of a decoder."""

    def __init__(self):
        super().__init__()
        self.front = nn.Linear(4, 4)
        self.encoder = nn.ModuleList(Block() for _ in range(3))
        self.decoder = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        """[batch, 4] to [batch, 3]."""
        x = self.front(x)
        for block in self.encoder:
            x = block(x)
        y = torch.ones_like(x)
        for block in self.decoder:
            y = block(y, x)
        return self.head(y)


class Recognizer:
    """Two batches of noise."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Model()
        self.modules = {"m": self.model}
        self.batches = [torch.randn(2, 4) for _ in range(2)]

    @torch.no_grad()
    def forward(self, subset, before_batch, first_only=False):
        """Until a hook stops it."""
        for index, batch in enumerate(self.batches[: 1 if first_only else 2]):
            before_batch(index)
            with suppress(StopForward):
                self.model(batch)

    @torch.no_grad()
    def outputs(self, subset, before_batch):
        """Two tensors of each batch."""
        for index, batch in enumerate(self.batches):
            before_batch(index)
            out = self.model(batch)
            yield [out, out.square()]


def units_of(model):
    """Blocks are units."""
    units = {}
    for name, module in model.named_modules(prefix="m"):
        if isinstance(module, nn.Linear):
            unit = ".".join(name.split(".")[:3])
            layer = Layer(name, module, "linear", unit)
            units.setdefault(unit, []).append(layer)
    return units


def cuts_of(recognizer, limit_bytes):
    """With passes over the first batch of the calibration set."""
    return block_cuts(
        recognizer.modules,
        units_of(recognizer.model),
        partial(recognizer.forward, "calibration", first_only=True),
        partial(recognizer.outputs, "calibration"),
        limit_bytes,
    )


def test_a_pass_resumes_behind_the_last_block_that_determines_the_rest():
    recognizer = Recognizer()
    model = recognizer.model
    cuts = cuts_of(recognizer, 10**6)
    encoder = model.encoder
    assert [(cut.unit, cut.module) for cut in cuts] == [
        ("m.encoder.1", encoder[0]),
        ("m.encoder.2", encoder[1]),
        ("m.decoder.0", encoder[2]),
        # Both read the encoder's output.
        ("m.decoder.1", encoder[2]),
        ("m.head", model.decoder[1]),
    ]
    assert cuts[1].skip == (model.front, encoder[0])
    assert cuts[3].skip == (model.front, encoder[0], encoder[1])


def test_decoding_resumes_before_what_is_called_for_each_token():
    recognizer = Recognizer()
    model, scored = recognizer.model, []

    @torch.no_grad()
    def score(before_batch, give_up_above):
        """Decodes three tokens of each batch."""
        for index, x in enumerate(recognizer.batches):
            before_batch(index)
            x = model.front(x)
            for block in model.encoder:
                x = block(x)
            y = torch.ones_like(x)
            for _ in range(3):
                for block in model.decoder:
                    y = block(y, x)
                scored.append(model.head(y))
            if give_up_above is not None and give_up_above < 0:
                break

    cuts = cuts_of(recognizer, 10**6)
    found = called_once(cuts, score)
    assert len(scored) == 3
    assert found[:4] == cuts[:4]
    assert (found[4].unit, found[4].module) == ("m.head", model.encoder[2])
    assert model.decoder[0] not in found[4].skip
    # Words are the same with what is kept, and without.
    scored.clear()
    score(lambda _: None, None)
    expected, units = scored.copy(), list(units_of(model))
    replay = Replay(found, units, 10**6)
    forward = partial(recognizer.forward, "search")
    for cut in found:
        scored.clear()
        assert replay.prepare(cut.unit, {}, forward)
        with replay.active():
            score(replay.start_batch, None)
        assert len(scored) == len(expected) == 6
        assert all(map(torch.equal, scored, expected))
    assert called_once([], score) == []


def test_no_memory_no_cuts():
    assert cuts_of(Recognizer(), 1) == []
