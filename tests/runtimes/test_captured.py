"""Captured parts: signatures, capture, quantized sites, execution, choice."""

import copy
import logging
import threading
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

pytest.importorskip("openvino")

from speechbrain.dataio.dataio import length_to_mask
from transformers import modeling_utils
from transformers.modeling_outputs import BaseModelOutput

from speechbrain_stablequant.core.float_reason import weights_alone
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.parts import Part
from speechbrain_stablequant.core.plan import QuantizationPlan
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.folder.stored_floats import (
    fill_modules,
    float_state,
)
from speechbrain_stablequant.model.encoders import find_encoders
from speechbrain_stablequant.model.layer import Layer
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.runtimes.build import (
    build_forwards,
    in_place_forwards,
)
from speechbrain_stablequant.runtimes.captured import capture as capturing
from speechbrain_stablequant.runtimes.captured import select
from speechbrain_stablequant.runtimes.captured.calls import (
    Call,
    CaptureError,
    Signature,
    signature_of,
)
from speechbrain_stablequant.runtimes.captured.capture import capture_part
from speechbrain_stablequant.runtimes.captured.executor import part_forward
from speechbrain_stablequant.runtimes.captured.select import Selection
from speechbrain_stablequant.runtimes.cpu import cpu_class, executed_integers
from speechbrain_stablequant.runtimes.simulated import simulated_forwards
from speechbrain_stablequant.utils.patching import shadowed_forwards

WIDTH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.conv(x.transpose(1, 2)).transpose(1, 2).relu()
        return x + self.out(y)


class Encoder(nn.Module):
    """Takes relative lengths, gives a tuple with more than is read."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x, wav_len=None, scale=1.0):
        if wav_len is not None:
            keep = length_to_mask(torch.round(wav_len * x.shape[1]))
            x = x * keep.unsqueeze(2)
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]) * scale)
        return states[-1], states, None


@pytest.fixture
def encoder():
    return Encoder().eval()


def calls_of(*lengths, batch=1):
    return [
        Call((torch.randn(batch, t, WIDTH), torch.ones(batch)), {})
        for t in lengths
    ]


def sites_of(module, name="enc"):
    return {
        path: child
        for path, child in module.named_modules(prefix=name)
        if isinstance(child, nn.Linear | nn.Conv1d)
    }


def kind_of(module):
    return "linear" if isinstance(module, nn.Linear) else "conv1d"


def integers_of(sites, amax=4.0, **quant):
    """The integers that this CPU executes."""
    made = {
        name: integer_layer(
            Layer(name, module, kind_of(module), name),
            LayerQuant(8, 8, amax, **quant),
        )
        for name, module in sites.items()
    }
    return executed_integers(made, cpu_class())


def simulated(module, integers, *args):
    forwards = simulated_forwards({"enc": module}, integers)
    with torch.no_grad(), shadowed_forwards(forwards):
        return module(*args)


# -- signatures ---------------------------------------------------------


@pytest.mark.parametrize("way", capturing.WAYS)
def test_capturing_reads_no_loss_of_transformers(
    make_tiny_modules, monkeypatch, way
):
    """Reading it warns, where transformers knows none for the model."""
    said = []
    monkeypatch.setattr(
        modeling_utils.logger, "warning_once", lambda x, *_: said.append(x)
    )
    module = make_tiny_modules("wav2vec2-large")["wav2vec2"]
    model = module.model
    monkeypatch.setattr(capturing, "WAYS", (way,))
    calls = [Call((torch.randn(1, n),), {}) for n in (4000, 5600)]
    part = capture_part("enc", module, calls, [])
    assert (part.way, said) == (way, [])
    assert "_loss_function" not in vars(model)
    assert model.loss_function is not None
    assert said == [x for x in said if "loss_type=None" in x] != []


def test_signature_tells_what_changes():
    one, two = calls_of(9, 6)
    signature = signature_of([two, one._replace(kwargs={})])
    x, lengths = signature.leaves
    assert (x.shape, x.dynamic, x.batched) == ([1, 9, WIDTH], [1], True)
    assert (lengths.shape, lengths.value) == ([1], [1.0])
    assert signature.tensors(calls_of(50, batch=3)[0]) is not None


@pytest.mark.parametrize(
    "other",
    [
        Call((torch.zeros(1, 5, WIDTH + 1), torch.ones(1)), {}),
        Call((torch.zeros(1, 5, WIDTH), torch.ones(1).long()), {}),
        Call((torch.zeros(1, 5, WIDTH),), {"wav_len": torch.ones(1)}),
        Call((torch.zeros(1, 5, WIDTH), None), {}),
    ],
)
def test_another_call_has_another_signature(other):
    assert signature_of(calls_of(9, 6)).tensors(other) is None


def test_constants_belong_to_the_signature():
    (call,) = calls_of(5)
    signature = signature_of([Call(call.args, {"scale": 2})])
    assert signature.tensors(Call(call.args, {"scale": 2})) is not None
    assert signature.tensors(Call(call.args, {"scale": 3})) is None
    assert signature.tensors(Call(call.args, {"scale": 2.0})) is None


def test_signature_survives_a_plan():
    signature = signature_of(calls_of(9, 6))
    leaves = [replace(leaf) for leaf in signature.leaves]
    assert Signature.loads(signature.dumps(), leaves) == signature


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([Call((1,), {})], "not called with a tensor"),
        ([Call((torch.ones(1, 2), object()), {})], "called with a object"),
        ([Call((torch.ones(1, 2), i), {}) for i in (1, 2)], "1 and others"),
        (
            [Call((torch.ones(1, 2),), k) for k in ({}, {"a": None})],
            "different arguments",
        ),
        ([Call((torch.tensor([[5, 7]]),), {})], "called with labels"),
        (
            [Call((torch.ones(1, 3, 2), torch.ones(1, 9, 2)), {})],
            "two sequences",
        ),
    ],
)
def test_calls_without_a_signature(calls, reason):
    with pytest.raises(CaptureError, match=reason):
        signature_of(calls)


# -- capture ---------------------------------------------------------


def test_a_captured_part_is_of_any_length(encoder):
    part = capture_part("enc", encoder, calls_of(12, 9), sites_of(encoder))
    assert part.way == "trace"
    forward = part_forward(part, encoder, {})
    for length, batch in ((12, 1), (31, 3), (5, 2)):
        (call,) = calls_of(length, batch=batch)
        with torch.no_grad():
            expected = encoder(*call.args)
        found = forward(*call.args)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-2, atol=1e-2)
        assert len(found[1]) == 3
        assert found[2] is None


def test_calls_of_one_length_are_cut(encoder):
    part = capture_part("enc", encoder, calls_of(12), sites_of(encoder))
    assert part.leaves[0].dynamic == [1]


class Positions(nn.Module):
    """Takes positions, which have no batch."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, positions):
        return self.out(x) + self.out(positions).view(1, -1, WIDTH)


def test_what_has_no_batch_is_found_from_single_utterances():
    module = Positions().eval()
    calls = [
        Call((torch.randn(1, t, WIDTH), torch.randn(1, t, WIDTH)), {})
        for t in (12, 8)
    ]
    part = capture_part("enc", module, calls, sites_of(module))
    assert [leaf.batched for leaf in part.leaves] == [True, False]


class FixedLength(nn.Module):
    """Refuses other lengths, as Whisper's encoder does."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if x.shape[1] != 10:
            raise ValueError("10 frames are expected")
        return BaseModelOutput(self.out(x))


def test_a_fixed_length_stays_fixed():
    module = FixedLength().eval()
    calls = [Call((torch.randn(1, 10, WIDTH),), {})]
    part = capture_part("enc", module, calls, sites_of(module))
    assert part.leaves[0].dynamic == []
    found = part_forward(part, module, {})(torch.randn(4, 10, WIDTH))
    assert isinstance(found, BaseModelOutput)
    assert found.last_hidden_state.shape == (4, 10, WIDTH)


class Untraceable(FixedLength):
    def forward(self, x):
        if torch.jit.is_tracing():
            raise RuntimeError("no tracing")
        return self.out(x)


def test_what_is_not_traced_is_exported():
    module = Untraceable().eval()
    calls = [Call((torch.randn(1, t, WIDTH),), {}) for t in (12, 8)]
    level = logging.root.level
    part = capture_part("enc", module, calls, sites_of(module))
    assert part.way == "export"
    # Warnings of the process are still heard.
    assert logging.root.level == level
    x = torch.randn(3, 5, WIDTH)
    found = part_forward(part, module, integers_of(sites_of(module)))(x)
    assert found.shape == (3, 5, WIDTH)


class Baked(FixedLength):
    """Both ways make a constant of a length that is an int."""

    def forward(self, x):
        return self.out(x) + torch.arange(int(x.shape[1])).sum()


def test_what_both_ways_bake_is_refused_in_one_line():
    module = Baked().eval()
    calls = [Call((torch.randn(1, t, WIDTH),), {}) for t in (12, 8)]
    with pytest.raises(CaptureError) as error:
        capture_part("enc", module, calls, sites_of(module))
    text = str(error.value)
    assert "trace: for an input of 1x8x8 the graph is off by" in text
    assert "export: for an input of 1x8x8 the graph is off by" in text
    assert "\n" not in text


def test_a_site_outside_of_the_graph_is_named(encoder):
    encoder.unused = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(CaptureError, match=r"layer 'enc\.unused' is not in"):
        capture_part("enc", encoder, calls_of(12, 9), sites_of(encoder))


def test_masks_are_those_of_speechbrain():
    lengths = torch.tensor([3.0, 5.0, 1.0])
    for extra in ({}, {"max_len": 9}, {"dtype": torch.bool}):
        found = capturing._length_to_mask(lengths, **extra)
        assert torch.equal(found, length_to_mask(lengths, **extra))
        assert found.dtype == length_to_mask(lengths, **extra).dtype


def test_masks_are_those_of_transformers(make_tiny_model):
    model = make_tiny_model("wav2vec2-base")
    mask = torch.ones(2, 4000, dtype=torch.long)
    mask[1, 2500:] = 0
    frames = int(model._get_feat_extract_output_lengths(4000))
    assert torch.equal(
        capturing._feature_mask(model, frames, mask),
        model._get_feature_vector_attention_mask(frames, mask),
    )


# -- quantized graphs ---------------------------------------------------------


@pytest.fixture(scope="module")
def part():
    """Of any encoder: a part holds no weights."""
    module = Encoder().eval()
    return capture_part(
        "enc", module, calls_of(12, 9), sites_of(module), read=[0]
    )


def test_a_quantized_graph_computes_the_plan(encoder, part):
    integers = integers_of(sites_of(encoder))
    forward = part_forward(part, encoder, integers, precision="f32")
    for length, batch in ((12, 1), (31, 3)):
        (call,) = calls_of(length, batch=batch)
        found, states, none = forward(*call.args)
        expected = simulated(encoder, integers, *call.args)[0]
        # A tie that rounds the other way moves a value by a step.
        wrong = (found - expected).abs() > 1e-4
        assert wrong.float().mean() < 0.02
        assert states == [None, None, None]
        assert none is None


def test_weights_are_int8_in_the_graph(encoder, part):
    integers = integers_of(sites_of(encoder))
    forward = part_forward(part, encoder, integers)
    executor = forward.args[-1]
    kinds = {
        op.get_rt_info()["runtimePrecision"].astype(str)
        for op in executor._compiled.get_runtime_model().get_ops()
        if op.get_rt_info()["layerType"].astype(str)
        in ("FullyConnected", "Convolution")
    }
    assert kinds <= {"u8", "i8"}
    assert kinds


class Shared(nn.Module):
    """One layer that is called twice, and an input with a zero point."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.twin = copy.deepcopy(self.out)

    def forward(self, x):
        return self.twin(self.out(self.out(x).relu()))


def test_shared_and_equal_layers():
    module = Shared().eval()
    sites = sites_of(module)
    integers = integers_of(sites)
    # Same weight, another input.
    integers["enc.twin"] = replace(
        integers["enc.twin"],
        activation_scale=integers["enc.twin"].activation_scale / 4,
        activation_offset=float(integers["enc.twin"].activation_scale) * 8,
    )
    calls = [Call((torch.randn(1, t, WIDTH),), {}) for t in (12, 8)]
    part = capture_part("enc", module, calls, sites)
    forward = part_forward(part, module, integers, precision="f32")
    x = torch.randn(2, 20, WIDTH)
    wrong = (forward(x) - simulated(module, integers, x)).abs() > 1e-4
    assert wrong.float().mean() < 0.05


def test_weights_may_be_absent(encoder, part):
    (call,) = calls_of(14)
    sites = sites_of(encoder)
    integers = integers_of(sites)
    expected = part_forward(part, encoder, integers)(*call.args)[0]
    for module in sites.values():
        module.weight = None
    found = part_forward(part, encoder, integers)(*call.args)[0]
    assert torch.equal(found, expected)


# -- execution ---------------------------------------------------------


def test_threads_get_their_own_results(encoder, part):
    forward = part_forward(part, encoder, {}, threads=1)
    calls = [c for t in (5, 9, 14, 20) for c in calls_of(t)]
    expected = [forward(*call.args)[0] for call in calls]
    wrong = []

    def work(index):
        for _ in range(20):
            found = forward(*calls[index].args)[0]
            if not torch.equal(found, expected[index]):
                wrong.append(index)

    threads = [
        threading.Thread(target=work, args=(i,)) for i in range(len(calls))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_build_forwards_with_parts(encoder, part, caplog):
    modules, integers = {"enc": encoder}, integers_of(sites_of(encoder))
    forwards = build_forwards("openvino", modules, integers, parts=[part])
    assert encoder in forwards
    (call,) = calls_of(14)
    with torch.no_grad(), shadowed_forwards(forwards):
        as_graph = encoder(*call.args)[0]
        assert "another way" not in caplog.text
        # A call that was not captured is computed by the layers.
        with caplog.at_level(logging.WARNING):
            by_layers = encoder(*call.args, 1.0)[0]
        assert "'enc' is called in another way" in caplog.text
    expected = simulated(encoder, integers, *call.args)[0]
    for found in (as_graph, by_layers):
        assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("executes", ["layers", "float"])
def test_only_graphs_replace_a_part(encoder, part, executes):
    parts = [replace(part, executes=executes)]
    integers = integers_of(sites_of(encoder))
    forwards = build_forwards(
        "openvino", {"enc": encoder}, integers, parts=parts
    )
    assert set(forwards) == set(sites_of(encoder).values())


@pytest.mark.parametrize("loaded", [False, True])
def test_a_described_encoder_stays_whole_beside_parts(
    make_tiny_modules, loaded
):
    modules = dict(make_tiny_modules("wav2vec2-base").items())
    layers = find_layers(modules, list(modules))
    integers = {
        layer.name: integer_layer(layer, LayerQuant(8, 8, 4.0))
        for layer in layers
    }
    (found,) = find_encoders(modules)
    parts = [Part("ctc_lin.w", "layers", "called repeatedly")]
    if loaded:  # as from a folder: weights of integers have left the modules
        fill_modules(modules, integers, float_state(modules, integers), "")
    forwards = build_forwards("openvino", modules, integers, parts=parts)
    assert found.model in forwards
    heads = {x.module for x in layers if not x.name.startswith(found.path)}
    assert set(forwards) == {found.model, *heads}


def test_an_encoder_whose_states_are_all_read_is_parts(make_tiny_modules):
    """No runtime gives them: where a plan has parts, they compute it."""
    modules = dict(make_tiny_modules("wav2vec2-base").items())
    (found,) = find_encoders(modules)
    found.model.config.output_hidden_states = True
    layers = find_layers(modules, list(modules))
    integers = {
        layer.name: integer_layer(layer, LayerQuant(8, 8, 4.0))
        for layer in layers
    }
    parts = [Part(found.path, "layers", "not captured")]
    forwards = build_forwards("openvino", modules, integers, parts=parts)
    assert set(forwards) == {x.module for x in layers}


def test_deep_copies_compute_the_same(encoder, part):
    forwards = build_forwards(
        "openvino",
        {"enc": encoder},
        integers_of(sites_of(encoder)),
        parts=[part],
    )
    for module, forward in forwards.items():
        module.forward = forward
    twin = copy.deepcopy(encoder)
    (call,) = calls_of(14)
    assert torch.equal(twin(*call.args)[0], encoder(*call.args)[0])


# -- the choice ---------------------------------------------------------


class Recognizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Block()
        self.head = nn.Sequential(nn.Linear(WIDTH, 3))

    def recognize(self, x):
        x = self.encoder(x, torch.ones(len(x)))[0]
        for _ in range(3):
            x = self.decoder(x)
        return self.head(x)


@pytest.fixture
def select_parts(monkeypatch):
    """Selects with given times."""

    def run(graphs=True, **ms):
        def timed(module, calls, ways):
            for way in ways.values():
                with way():
                    module(*calls[0].args, **calls[0].kwargs)
            return {name: ms[name] for name in ways}

        monkeypatch.setattr(select, "timed_ways", timed)
        model = Recognizer().eval()
        sites = sites_of(model, "model")
        layers = [Layer(n, m, kind_of(m), n) for n, m in sites.items()]
        modules = {"model": model}
        inputs = [torch.randn(1, t, WIDTH) for t in (14, 9)]
        return Selection(
            modules,
            layers,
            [lambda x=x: model.recognize(x) for x in inputs],
            lambda integers: in_place_forwards(modules, integers),
            (8, 8),
            {},
            graphs,
        ).parts()

    return run


def test_parts_are_the_largest_that_are_captured(select_parts):
    parts = select_parts(graph=1.0, layers=2.0, float=3.0)
    assert [(p.name, p.executes) for p in parts] == [
        ("model.encoder", "graph"),
        ("model.decoder", "layers"),
        ("model.head", "graph"),
    ]
    encoder, decoder, _ = parts
    # The recipe reads the first output only.
    assert encoder.read == [0]
    assert encoder.ms == {"graph": 1.0, "layers": 2.0, "float": 3.0}
    assert "called repeatedly" in decoder.reason
    assert decoder.ms == {"layers": 2.0, "float": 3.0}


def test_what_does_not_gain_stays_float(select_parts):
    # A gain of 2 % is chance, one of 4 % is not.
    parts = select_parts(graph=2.88, layers=2.94, float=3.0)
    found = {part.name: part.executes for part in parts}
    assert found["model.encoder"] == "graph"
    assert found["model.decoder"] == "float"
    parts = select_parts(graph=5.0, layers=4.0, float=3.0)
    assert {part.executes for part in parts} == {"float"}
    names = ("model.encoder.blocks.0.up", "model.encoder_two.up")
    layers = [Layer(name, nn.Identity(), "linear", name) for name in names]
    (name, reason), *others = weights_alone(parts, layers).items()
    assert (name, others) == (names[0], [])
    assert "'model.encoder' is as fast in floating point" in reason


def test_beside_a_described_encoder_only_steps_are_timed(select_parts):
    """Layer by layer, and only those that are called at each step."""
    parts = select_parts(graphs=False, layers=4.0, float=3.0)
    names = ["model.decoder.conv", "model.decoder.out"]
    assert [part.name for part in parts] == names
    assert {part.executes for part in parts} == {"float"}
    assert all(part.ms == {"layers": 4.0, "float": 3.0} for part in parts)
    layers = [
        Layer(name, nn.Identity(), "linear", name)
        for name in (*names, "model.decoder.out_two", "model.head.0")
    ]
    assert weights_alone(parts, layers).keys() == set(names)
    parts = select_parts(graphs=False, layers=3.0, float=4.0)
    assert {part.executes for part in parts} == {"layers"}


def test_timed_ways_take_turns():
    turns = []
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: turns.append("call"))

    class Way:
        def __init__(self, name):
            self.name = name

        def __call__(self):
            turns.append(self.name)
            return self

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    calls = [Call((torch.ones(1, 2),), {})] * 2
    ms = select.timed_ways(module, calls, {"a": Way("a"), "b": Way("b")})
    assert turns == ["a", "call", "call", "b", "call", "call"] * 3
    assert set(ms) == {"a", "b"}


# -- the plan ---------------------------------------------------------


def test_a_plan_keeps_its_parts(part, tmp_path):
    plan = QuantizationPlan("max", 8, 8, "f", {}, {}, [], [], parts=[part])
    plan.save(tmp_path / "plan.json")
    loaded = QuantizationPlan.load(tmp_path / "plan.json")
    assert loaded.parts == [part]
    assert asdict(loaded.parts[0]) == asdict(part)


def test_a_plan_without_parts_is_written_as_before(tmp_path):
    plan = QuantizationPlan("max", 8, 8, "f", {}, {}, [], [])
    plan.save(tmp_path / "plan.json")
    assert "parts" not in (tmp_path / "plan.json").read_text()
    assert QuantizationPlan.load(tmp_path / "plan.json").parts == []


def test_a_damaged_part_is_named(tmp_path):
    plan = QuantizationPlan(
        *("max", 8, 8, "f", {}, {}, [], []),
        parts=[Part("a", "graph", "b")],
    )
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text().replace('"graph"', '"magic"')
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"parts\[0\]\.executes"):
        QuantizationPlan.load(tmp_path / "plan.json")
