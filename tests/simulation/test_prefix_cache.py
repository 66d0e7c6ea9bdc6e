"""Tests of speechbrain_stablequant.simulation.prefix_cache."""

from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.model.encoders import find_encoders
from speechbrain_stablequant.model.layer import HEAD, Cut
from speechbrain_stablequant.model.layers import find_layers, group_units
from speechbrain_stablequant.simulation import prefix_cache as replay
from speechbrain_stablequant.simulation.fake_quant import Simulator
from speechbrain_stablequant.simulation.prefix_cache import Replay, StopForward

TARGET = ["wav2vec2", "enc", "ctc_lin"]
PLENTY = 10**9
# Audio, and relative lengths or None; the second batch is padded.
SIZES = [(1, 2000, None), (3, 3000, [1.0, 0.7, 0.4]), (2, 2500, None)]


class Search:
    """A recognizer with its batches and a replay, as a search has them."""

    def __init__(self, modules, limit_bytes=PLENTY):
        self.modules = modules
        self.batches = [
            (torch.randn(n, time), relative and torch.tensor(relative))
            for n, time, relative in SIZES
        ]
        self.layers = find_layers(modules, TARGET)
        self.units = group_units(self.layers)
        (encoder,) = find_encoders(modules)
        self.replay = Replay(encoder.cuts(), list(self.units), limit_bytes)
        self.simulator = Simulator(self.layers)
        self.calls = {name: 0 for name, _ in modules.named_modules()}
        for name, module in modules.named_modules():
            module.register_forward_hook(self._counter(name))

    def _counter(self, name):
        def count(module, args, output):
            self.calls[name] += 1

        return count

    def recognize(self, wavs, relative):
        features = self.modules["wav2vec2"](wavs, relative)
        return self.modules["ctc_lin"](self.modules["enc"](features))

    @torch.no_grad()
    def outputs(self, before_batch=lambda _: None):
        """The output for each batch; None where a hook stopped it."""
        outputs = []
        for index, (wavs, relative) in enumerate(self.batches):
            before_batch(index)
            try:
                outputs.append(self.recognize(wavs, relative))
            except StopForward:
                outputs.append(None)
        return outputs

    def prefix(self, quants, unit):
        """The quantized layers before a unit, as a replay is told."""
        names = list(self.units)
        before = names[: names.index(unit)]
        return {
            layer.name: (name, quants[layer.name])
            for name in before
            for layer in self.units[name]
            if layer.name in quants
        }

    def replayed(self, unit, quants):
        """Outputs with some layers quantized, from the cut at a unit on."""
        with self.simulator.apply(quants):
            assert self.replay.prepare(
                unit, self.prefix(quants, unit), self.outputs
            )
            with self.replay.active():
                return self.outputs(self.replay.start_batch)

    def full(self, quants):
        """The same without a replay."""
        with self.simulator.apply(quants):
            return self.outputs()

    def quants(self, *units):
        """Coarse quantization of some units."""
        return {
            layer.name: LayerQuant(4, 4, 2.0)
            for unit in units
            for layer in self.units[unit]
        }

    def forget_calls(self):
        self.calls = dict.fromkeys(self.calls, 0)


def assert_equal(outputs, expected):
    assert len(outputs) == len(expected) == len(SIZES)
    for out, reference in zip(outputs, expected, strict=True):
        assert torch.equal(out, reference)


def assert_no_shadow(modules):
    for name, module in modules.named_modules():
        assert "forward" not in vars(module), name


@pytest.fixture
def search(tiny_modules):
    return Search(tiny_modules)


# -- to the last bit -----------------------------------------------------------


def test_from_every_cut(search):
    """From nothing each time."""
    expected = search.outputs()
    units = list(search.units)
    assert [cut for cut in search.replay.cuts] == units[1:]
    for unit in units[1:]:
        search.replay.drop()
        assert_equal(search.replayed(unit, {}), expected)
        assert_no_shadow(search.modules)


def test_rolling_from_cut_to_cut(search):
    """With the units before quantized, as in the search for cut-offs; each
    cut's results come from those of the cut before."""
    units = list(search.units)
    for index, unit in enumerate(units[1:], start=1):
        before = search.quants(*units[:index])
        for extra in ({}, search.quants(unit)):
            quants = {**before, **extra}
            found = search.replayed(unit, quants)
            assert_equal(found, search.full(quants))
            assert_no_shadow(search.modules)
    # The quantization matters at all.
    assert not torch.equal(found[0], search.full({})[0])


def test_rolling_with_gaps(search):
    """From one cut over several units, not all of them quantized."""
    for unit in ("conv.3", "pos_conv", "block.1", HEAD):
        quants = {
            name: quant
            for name, quant in search.quants("conv.1", "projection").items()
            if name in search.prefix(search.quants(*search.units), unit)
        }
        quants.update(search.quants(unit))
        assert_equal(search.replayed(unit, quants), search.full(quants))


def test_going_back(search):
    """An earlier cut than the one that is kept starts from the audio."""
    expected = search.outputs()
    for unit in ("block.1", "conv.2", HEAD, "projection"):
        assert_equal(search.replayed(unit, {}), expected)


def test_another_prefix(search):
    """What was kept under other decisions is not used."""
    prefixes = [
        search.quants("conv.0"),
        search.quants("conv.1"),
        {},
        search.quants("conv.0", "conv.1"),
    ]
    expected = [search.full(quants) for quants in prefixes]
    for unit in ("conv.4", "block.0"):
        for quants, reference in zip(prefixes, expected, strict=True):
            assert_equal(search.replayed(unit, quants), reference)
    for quants, reference in zip(prefixes, expected, strict=True):
        for unit in ("conv.4", "block.0"):
            assert_equal(search.replayed(unit, quants), reference)


def test_same_layers_with_other_numbers(search):
    quants = search.quants("conv.0")
    for amax in (2.0, 1.0, 3.0):
        for name, quant in quants.items():
            quants[name] = LayerQuant(4, 4, amax, quant.weight_method)
        found = search.replayed("block.0", quants)
        assert_equal(found, search.full(quants))


def test_search_order(search):
    """Every unit alone first, then decisions in network order."""
    for unit in list(search.units)[1:]:
        quants = search.quants(unit)
        assert_equal(search.replayed(unit, quants), search.full(quants))
    decided = {}
    for unit in ("conv.1", "block.0", HEAD):
        decided.update(search.quants(unit))
        assert_equal(search.replayed(unit, decided), search.full(decided))


def test_all_hidden_states(make_tiny_modules):
    """Only the wrapper's output can stand for what came before."""
    modules = make_tiny_modules("wav2vec2-base")
    modules["wav2vec2"].output_all_hiddens = True
    search = Search(modules)
    assert list(search.replay.cuts) == [HEAD]
    assert_equal(search.replayed(HEAD, {}), search.outputs())


# -- it skips ------------------------------------------------------------------


def test_modules_before_the_cut_do_not_run(search):
    units = list(search.units)
    for index, unit in enumerate(units[1:], start=1):
        search.replayed(unit, {})
        search.forget_calls()
        search.replayed(unit, {})
        for place, (name, layers) in enumerate(search.units.items()):
            for layer in layers:
                expected = 0 if place < index else len(SIZES)
                assert search.calls[layer.name] == expected, (unit, name)


def test_rolling_forward_does_not_start_from_the_audio(search):
    quants = search.quants("conv.0")
    search.replayed("conv.1", quants)
    search.forget_calls()
    for unit in list(search.units)[2:]:
        search.replayed(unit, quants)
    assert search.calls[search.layers[0].name] == 0
    # Once to prepare conv.2; then its own result is kept.
    assert search.calls[search.layers[1].name] == len(SIZES)


def test_preparing_stops_at_the_cut(search):
    """No unit behind the cut computes while results are collected."""
    assert search.replay.prepare("pos_conv", {}, search.outputs)
    for unit in ("pos_conv", "block.0", "block.1", HEAD):
        for layer in search.units[unit]:
            assert search.calls[layer.name] == 0


def test_prepared_results_are_used_again(search):
    passes = []

    def forward(before_batch):
        passes.append(1)
        search.outputs(before_batch)

    for _ in range(3):
        assert search.replay.prepare("block.0", {}, forward)
    assert len(passes) == 1


# -- limits and what is left behind --------------------------------------------


def test_no_cut_before_the_first_unit(search):
    assert not search.replay.prepare("conv.0", {}, search.outputs)
    assert set(search.calls.values()) == {0}


def test_too_large(search):
    (encoder,) = find_encoders(search.modules)
    sizes = []
    handle = encoder.model.feature_projection.register_forward_hook(
        lambda module, args, out: (
            sizes.append(out[0].nbytes + out[1].nbytes)
            if isinstance(out, tuple)
            else sizes.append(out.nbytes)
        )
    )
    expected = search.outputs()
    handle.remove()
    for limit, fits in ((sum(sizes), True), (sum(sizes) - 1, False)):
        replay = Replay(encoder.cuts(), list(search.units), limit)
        assert replay.prepare("pos_conv", {}, search.outputs) is fits
        assert_no_shadow(search.modules)
        with replay.active():
            assert_equal(search.outputs(replay.start_batch), expected)


def test_too_large_is_remembered(tiny_modules):
    search = Search(tiny_modules, limit_bytes=10)
    assert not search.replay.prepare("block.0", {}, search.outputs)
    search.forget_calls()
    assert not search.replay.prepare("block.0", {}, search.outputs)
    assert set(search.calls.values()) == {0}


def test_half_of_what_a_gpu_has_left(search, monkeypatch):
    for name, found in (("mem_get_info", (70, 100)), ("memory_reserved", 50)):
        monkeypatch.setattr(torch.cuda, name, lambda _, x=found: x)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 20)
    assert replay._half_free(torch.device("cuda")) == 50
    assert replay._half_free(torch.device("cpu")) > PLENTY
    monkeypatch.setattr(replay, "_half_free", lambda device: 50)
    assert not search.replay.prepare("block.0", {}, search.outputs)


def test_no_memory_is_too_large(search):
    def fail(before_batch):
        for index, batch in enumerate(search.batches):
            before_batch(index)
            with suppress(StopForward):
                search.recognize(*batch)
            if index:
                raise torch.OutOfMemoryError("CUDA out of memory")

    with torch.no_grad():
        assert not search.replay.prepare("block.0", {}, fail)
    assert_no_shadow(search.modules)
    assert not search.replay.holds("block.0")
    assert not search.replay.prepare("block.0", {}, search.outputs)


def test_after_a_cut_that_was_too_large(search):
    """A later, smaller cut still works, with the decisions of the day."""
    (encoder,) = find_encoders(search.modules)
    sizes = dict.fromkeys(["conv.1", "block.1"], 0)
    for unit in sizes:
        replay = Replay(encoder.cuts(), list(search.units), PLENTY)
        replay.prepare(unit, {}, search.outputs)
        sizes[unit] = sum(tensor.nbytes for tensor in tree_leaves(replay._kept))
    assert sizes["conv.1"] > sizes["block.1"]
    search.replay.limit_bytes = sizes["block.1"]
    quants = search.quants("conv.0")
    prefix = search.prefix(quants, "conv.1")
    with search.simulator.apply(quants):
        assert not search.replay.prepare("conv.1", prefix, search.outputs)
    found = search.replayed("block.1", quants)
    assert_equal(found, search.full(quants))


def test_error_while_preparing(search):
    def fail(before_batch):
        before_batch(0)
        search.recognize(*search.batches[0])

    with pytest.raises(StopForward), torch.no_grad():
        search.replay.prepare("block.0", {}, fail)
    assert_no_shadow(search.modules)
    expected = search.outputs()  # no hook stops it
    # And nothing of the broken pass is taken for the whole.
    assert_equal(search.replayed("block.0", {}), expected)


def test_error_while_active(search):
    search.replayed("block.0", {})
    with pytest.raises(KeyboardInterrupt), search.replay.active():
        raise KeyboardInterrupt
    assert_no_shadow(search.modules)


def test_simulation_of_the_cut_module_survives():
    """Both a replay and a simulation shadow ``forward``."""
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    replay = Replay([Cut("b", a)], ["a", "b"], PLENTY)
    x = torch.randn(2, 3)

    @torch.no_grad()
    def forward(before_batch):
        before_batch(0)
        try:
            return b(a(x))
        except StopForward:
            return None

    a.forward = lambda x: 3 * x
    before = a.forward
    expected = forward(lambda _: None)
    assert replay.prepare("b", {}, forward)
    with replay.active():
        assert a.forward is not before
        assert torch.equal(forward(replay.start_batch), expected)
    assert a.forward is before


def test_nothing_kept_changes_nothing(search):
    expected = search.outputs()
    with search.replay.active():
        assert_no_shadow(search.modules)
        assert_equal(search.outputs(search.replay.start_batch), expected)


def test_transformers_outputs_are_trees(tiny_model):
    out = tiny_model(torch.randn(1, 1000), output_hidden_states=True)
    found = {id(x) for x in replay._tensors(out)}
    assert found >= {id(x) for x in (out.last_hidden_state, *out.hidden_states)}
    same = tree_map_only(torch.Tensor, lambda t: t, out)
    assert type(same) is type(out)
    assert torch.equal(same.last_hidden_state, out.last_hidden_state)
