"""Whisper's decoder as graphs: numbers, searchers' caches, choice, refusals."""

import copy

import pytest
import torch

pytest.importorskip("openvino")

from tiny_whisper import tiny_decoder

from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.model import products
from speechbrain_stablequant.model.layer import Layer
from speechbrain_stablequant.runtimes.build import (
    build_forwards,
    in_place_forwards,
)
from speechbrain_stablequant.runtimes.captured import calls
from speechbrain_stablequant.runtimes.captured.calls import Call, CaptureError
from speechbrain_stablequant.runtimes.captured.decoder import (
    decode,
    decoder_part,
    first_calls,
)
from speechbrain_stablequant.runtimes.captured.select import Selection
from speechbrain_stablequant.runtimes.cpu import cpu_class, executed_integers
from speechbrain_stablequant.runtimes.simulated import simulated_forwards
from speechbrain_stablequant.utils.patching import shadowed_forwards

NAME = "model.decoder"


class Model(torch.nn.Module):
    """Holds a decoder, as SpeechBrain's wrapper does."""

    def __init__(self):
        super().__init__()
        self.decoder = tiny_decoder()


@pytest.fixture(scope="module")
def modules():
    return {"model": Model().eval()}


@pytest.fixture(scope="module")
def layers(modules):
    rows = products.modules_by_name(modules).items()
    return {
        name: Layer(name, module, "linear", name)
        for name, module in rows
        if isinstance(module, torch.nn.Linear)
    }


@pytest.fixture(scope="module")
def integers(layers):
    found = {
        name: integer_layer(layer, LayerQuant(8, 8, 4.0))
        for name, layer in layers.items()
    }
    return executed_integers(found, cpu_class())


def inputs(utterances=1, hypotheses=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(utterances, 9, 16, generator=generator)
    states = states.repeat_interleave(hypotheses, 0)
    ids = torch.randint(0, 200, (len(states), 3), generator=generator)
    return {"input_ids": ids, "encoder_hidden_states": states}


@pytest.fixture(scope="module")
def part(modules, layers):
    call = Call((), {**inputs(), "past_key_values": None})
    return decoder_part(NAME, modules["model"].decoder, [call], list(layers))


@pytest.fixture(scope="module")
def graph(modules, integers, part):
    options = {"threads": 1, "precision": "f32"}
    return build_forwards(
        "openvino", modules, integers, parts=[part], **options
    )


def test_a_part_of_steps(part):
    assert (part.name, part.executes, part.way) == (NAME, "graph", "steps")


@pytest.mark.parametrize(
    ("utterances", "hypotheses"), [(1, 1), (2, 1), (1, 3), (2, 2)]
)
def test_steps_compute_the_plan(
    modules, integers, graph, utterances, hypotheses
):
    given = inputs(utterances, hypotheses)
    decoder = modules["model"].decoder
    # In integers: keys and values of the encoder's states only.
    with shadowed_forwards(simulated_forwards(modules, integers)):
        expected = decode(decoder, 4, **given)
    with shadowed_forwards(graph):
        found = decode(decoder, 4, **given)
    assert [tuple(x.shape[1:]) for x in found] == [(3, 264)] + [(1, 264)] * 4
    for one, two in zip(expected, found, strict=True):
        assert (one - two).abs().max() < 1e-3 * one.abs().max()
    # Rows that are hypotheses of another utterance than before differ.
    plain = decode(decoder, 4, **given)
    assert (plain[-1] - found[-1]).abs().max() > 1e-3 * plain[-1].abs().max()


def test_decodings_may_run_at_the_same_time(modules, graph):
    decoder = modules["model"].decoder
    rows = [inputs(seed=1), inputs(2, seed=2)]
    with torch.no_grad(), shadowed_forwards(graph):
        alone = [decode(decoder, 1, **given) for given in rows]
        begun = [decoder(**given, use_cache=True) for given in rows]
        for given, output, expected in zip(rows, begun, alone, strict=True):
            cache = output.past_key_values
            assert cache.length == 3
            if len(given["input_ids"]) > 1:
                cache.reorder_cache(torch.tensor([1, 0]))
            given = {**given, "input_ids": given["input_ids"][:, -1:]}
            step = decoder(**given, past_key_values=cache)
            logits = step.last_hidden_state @ decoder.embed_tokens.weight.T
            assert torch.equal(logits, expected[1])
            # As of the searcher that keeps it.
            twin = copy.deepcopy(cache)
            with pytest.raises(AttributeError, match="cannot be copied"):
                decoder(**given, past_key_values=twin)


def test_what_searchers_do_not_ask_for_is_computed_in_place(
    modules, integers, graph, caplog
):
    calls.say_uncaptured.cache_clear()
    decoder, given = modules["model"].decoder, inputs()
    mask = torch.tensor([[1, 1, 0]])
    found = []
    for forwards in (graph, in_place_forwards(modules, integers)):
        with torch.no_grad(), shadowed_forwards(forwards):
            output = decoder(**given, attention_mask=mask)
        found.append(output.last_hidden_state @ decoder.embed_tokens.weight.T)
    assert torch.equal(*found)
    (line,) = (x for x in caplog.messages if "in another way" in x)
    assert line.startswith("'WhisperDecoder' is called")


def test_a_decoder_is_selected_as_a_graph(modules, layers):
    decoder = modules["model"].decoder

    def recognize():
        return decode(decoder, 3, **inputs())

    def selected():
        (part,) = Selection(
            modules,
            list(layers.values()),
            [recognize],
            lambda integers: in_place_forwards(modules, integers),
            (8, 8),
            {},
        ).parts()
        return part

    part = selected()
    assert (part.name, part.way) == (NAME, "steps")
    assert set(part.ms) == {"graph", "layers", "float"}
    decoder.config.activation_function = "relu"
    try:
        part = selected()
    finally:
        decoder.config.activation_function = "gelu"
    assert not part.way
    assert "not captured (its activation is not GELU)" in part.reason
    assert set(part.ms) == {"layers", "float"}


def test_other_callers_are_refused():
    with pytest.raises(CaptureError, match="another way"):
        first_calls([Call((torch.ones(1),), {})])
