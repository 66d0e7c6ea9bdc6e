"""Tests of speechbrain_stablequant.simulation.observers."""

import pytest
import torch
from torch import nn

from speechbrain_stablequant.core.histogram import Histogram
from speechbrain_stablequant.model.encoders import conv_frames, find_encoders
from speechbrain_stablequant.model.layer import Layer
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.simulation.observers import (
    Observer,
    ResidualPeak,
    real_frames,
)

TARGET = ["wav2vec2", "enc", "ctc_lin"]
LENGTHS = [8000, 4321, 1999]
TOTAL = max(LENGTHS)


def recognizer(modules):
    """The forward pass of a recipe."""

    def forward(wavs, lengths):
        relative = torch.tensor(lengths) / wavs.shape[1]
        features = modules["wav2vec2"](wavs, relative)
        return modules["ctc_lin"](modules["enc"](features))

    return forward


def observer_of(modules, **options):
    (encoder,) = find_encoders(modules)
    layers = find_layers(modules, TARGET)
    return Observer(layers, encoder.conv_geometry(), **options)


def padded_batch(fill=0.0):
    """Three utterances of different lengths."""
    wavs = torch.full((len(LENGTHS), TOTAL), fill)
    for row, length in zip(wavs, LENGTHS, strict=True):
        row[:length] = torch.randn(length)
    return wavs


class Inputs:
    """The inputs of some layers, with the time axis as axis 1."""

    def __init__(self, layers):
        self.by_name = {}
        self.handles = [
            layer.module.register_forward_pre_hook(self.hook(layer))
            for layer in layers
        ]

    def hook(self, layer):
        def keep(module, args):
            axis = 1 if layer.kind == "linear" else 2
            self.by_name[layer.name] = args[0].movedim(axis, 1).clone()

        return keep

    def __enter__(self):
        return self.by_name

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def frames_alone(modules, length):
    """Frames at each layer when one utterance is run by itself: its real
    frames, found without any formula."""
    with Inputs(find_layers(modules, TARGET)) as inputs:
        recognizer(modules)(torch.randn(1, length), [length])
    return {name: x.shape[1] for name, x in inputs.items()}


def width(module):
    """Values of one frame at the input of a layer."""
    is_conv = isinstance(module, nn.Conv1d)
    return module.in_channels if is_conv else module.in_features


@torch.no_grad()
def observe(modules, wavs, lengths):
    """An observer after one batch, and what the layers were given."""
    observer = observer_of(modules)
    with observer.watch(), Inputs(observer.layers) as inputs:
        observer.start_batch(wavs.shape[1], lengths)
        recognizer(modules)(wavs, lengths)
    return observer, inputs


# -- padding -------------------------------------------------------------------


def test_padding_is_never_counted(tiny_modules):
    observer, inputs = observe(tiny_modules, padded_batch(1e4), LENGTHS)
    real = [frames_alone(tiny_modules, length) for length in LENGTHS]
    model = tiny_modules["wav2vec2"].model
    last = model._get_feat_extract_output_lengths(torch.tensor(LENGTHS))
    assert [row["ctc_lin.w"] for row in real] == last.tolist()
    for layer in observer.layers:
        frames = [row[layer.name] for row in real]
        assert frames[0] == inputs[layer.name].shape[1]
        assert frames[0] > frames[1] > frames[2] > 0
        histogram = observer.histograms[layer.name]
        assert histogram.count == sum(frames) * width(layer.module)
        # Not only as many values as are real: those and no others.
        expected = Histogram()
        rows = zip(inputs[layer.name], frames, strict=True)
        for row, count in rows:
            expected.add(row[:count])
        assert torch.equal(histogram.counts, expected.counts)
        assert histogram.max == expected.max


def test_huge_padding_does_not_reach_the_first_histogram(tiny_modules):
    wavs = padded_batch(1e4)
    observer, _ = observe(tiny_modules, wavs, LENGTHS)
    first = observer.histograms[observer.layers[0].name]
    rows = zip(wavs, LENGTHS, strict=True)
    largest = max(row[:n].abs().max().item() for row, n in rows)
    assert first.max == largest < 10


def test_one_utterance_is_counted_as_it_is(tiny_modules):
    wavs = torch.randn(1, 3001)
    observer, inputs = observe(tiny_modules, wavs, [3001])
    raw = Histogram()
    raw.add(wavs)
    first = observer.histograms[observer.layers[0].name]
    assert first.to_dict() == raw.to_dict()
    for layer in observer.layers:
        expected = Histogram()
        expected.add(inputs[layer.name])
        histogram = observer.histograms[layer.name]
        assert histogram.to_dict() == expected.to_dict()


def test_equal_lengths_are_counted_whole(make_tiny_modules):
    modules = make_tiny_modules("wav2vec2-base")
    observer, inputs = observe(modules, torch.randn(2, 1600), [1600, 1600])
    for layer in observer.layers:
        count = observer.histograms[layer.name].count
        assert count == inputs[layer.name].numel()


def test_batches_add_up(make_tiny_modules):
    modules = make_tiny_modules("hubert-large")
    observer = observer_of(modules)
    batches = [(torch.randn(1, n), [n]) for n in (1000, 2000)]
    first = Histogram()
    with observer.watch(), torch.no_grad():
        for wavs, lengths in batches:
            observer.start_batch(wavs.shape[1], lengths)
            recognizer(modules)(wavs, lengths)
            first.add(wavs)
    name = observer.layers[0].name
    assert observer.histograms[name].to_dict() == first.to_dict()


@pytest.mark.parametrize("length", [400, 401, 719, 720, 5003, 16000])
def test_real_frames_at_every_resolution(make_tiny_modules, length):
    modules = make_tiny_modules("hubert-base")
    (encoder,) = find_encoders(modules)
    geometry = encoder.conv_geometry()
    alone = frames_alone(modules, length)
    padded = frames_alone(modules, 16000)
    for name, frames in padded.items():
        x, lengths = torch.zeros(2, frames, 1), [16000, length]
        found = real_frames(x, 1, 16000, lengths, geometry)
        assert found == (None if length == 16000 else [frames, alone[name]])


def test_too_short_an_utterance_has_no_frame():
    assert conv_frames(9, [(10, 5)]) == 0
    assert conv_frames(10, [(10, 5)]) == 1
    x = torch.zeros(2, 79, 1)
    assert real_frames(x, 1, 400, [400, 9], [(10, 5)]) == [79, 0]


def test_unknown_resolution_is_a_fraction():
    x, lengths = torch.zeros(3, 2, 10), [400, 200, 1]
    assert real_frames(x, 2, 400, lengths, [(10, 5)]) == [10, 5, 1]


# -- what is told to the user --------------------------------------------------


def test_nan_names_the_layer(tiny_modules):
    wavs = torch.randn(1, 1600)
    wavs[0, 800] = float("nan")
    with pytest.raises(ValueError) as error:
        observe(tiny_modules, wavs, [1600])
    name = find_layers(tiny_modules, TARGET)[0].name
    assert str(error.value).startswith(f"layer {name}: the data hold NaN")
    assert "\n" not in str(error.value)


def test_inf_inside_the_model_names_the_layer(make_tiny_modules):
    modules = make_tiny_modules("hubert-large")
    with torch.no_grad():
        modules["enc"].linear.w.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"^layer enc\.linear_0\.w: "):
        observe(modules, torch.randn(1, 1600), [1600])


def test_nothing_is_left_behind(make_tiny_modules):
    modules = make_tiny_modules("wav2vec2-large")
    observer = observer_of(modules)
    with pytest.raises(RuntimeError, match="stop"), observer.watch():
        raise RuntimeError("stop")
    with torch.no_grad():
        recognizer(modules)(torch.randn(1, 1600), [1600])
    assert {h.count for h in observer.histograms.values()} == {0}
    for layer in observer.layers:
        assert not layer.module._forward_pre_hooks


def test_output_is_not_changed(make_tiny_modules):
    modules = make_tiny_modules("wav2vec2-large")
    wavs = torch.randn(2, 1600)
    observer = observer_of(modules)
    with torch.no_grad():
        before = recognizer(modules)(wavs, [1600, 1000])
        with observer.watch():
            observer.start_batch(1600, [1600, 1000])
            during = recognizer(modules)(wavs, [1600, 1000])
    assert torch.equal(before, during)


def test_call_order(tiny_modules):
    observer, _ = observe(tiny_modules, torch.randn(1, 1600), [1600])
    units = {layer.name: layer.unit for layer in observer.layers}
    called = [units[name] for name in observer.call_order]
    assert sorted(observer.call_order) == sorted(units)
    assert list(dict.fromkeys(called)) == list(dict.fromkeys(units.values()))


def test_call_order_notes_the_first_call_only():
    layers = [
        Layer(name, nn.Linear(2, 2), "linear", name) for name in ("a", "b")
    ]
    observer = Observer(layers)
    with observer.watch():
        for index in (1, 0, 1, 1):
            layers[index].module(torch.ones(1, 2))
    assert observer.call_order == ["b", "a"]


def test_check_all_called(tiny_modules):
    observer, _ = observe(tiny_modules, torch.randn(1, 1600), [1600])
    observer.check_all_called()


def test_check_all_called_names_the_layer():
    layers = [
        Layer(name, nn.Linear(2, 2), "linear", "head") for name in ("a", "b")
    ]
    observer = Observer(layers)
    with observer.watch():
        layers[0].module(torch.ones(1, 2))
    with pytest.raises(ValueError) as error:
        observer.check_all_called()
    assert str(error.value) == (
        "b: was never called while calibrating; add it to quantize.exclude"
    )


def test_num_bins():
    layer = Layer("a", nn.Linear(2, 2), "linear", "head")
    observer = Observer([layer], num_bins=256)
    assert observer.histograms["a"].num_bins == 256


def test_largest_value_of_the_residual_stream(make_tiny_model):
    """Between the blocks of a model that normalizes first."""
    model = make_tiny_model("hubert-large")
    wavs, values = torch.randn(2, 2000), []
    with ResidualPeak([model.encoder]).watch() as peak, torch.no_grad():
        found = model(wavs, output_hidden_states=True).hidden_states
        values = [float(x.abs().max()) for x in found[:-1]]
    peak.join()
    assert peak.value >= max(values) > 0
    with torch.no_grad():
        model(100 * wavs)
    assert peak.value < 100 * max(values)
    empty = ResidualPeak([])
    empty.join()
    assert empty.value is None
