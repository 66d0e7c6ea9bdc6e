"""AdaRound and StableQuant-plus through the session, on tiny models."""

import copy
import io
import re
import sys
from contextlib import ExitStack, suppress
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from speechbrain_stablequant import QuantizationPlan, QuantizeConfig
from speechbrain_stablequant.brain.keys import keys_text
from speechbrain_stablequant.config import CalibrationConfig, SearchConfig
from speechbrain_stablequant.core.affine import FLOAT_BITS, GELU_MIN
from speechbrain_stablequant.core.histogram import Histogram
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan_tensors import adjusted_floats
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.folder.stored_floats import rounded_weights
from speechbrain_stablequant.methods.plus.bits import HARMS
from speechbrain_stablequant.methods.plus.quarot import (
    is_rotated,
    rotated,
    rotated_parameters,
)
from speechbrain_stablequant.methods.plus.smoothquant import (
    channel_maxima,
    equalized,
    equalized_parameters,
    factors,
    find_sites,
)
from speechbrain_stablequant.methods.plus.zero_point import (
    asymmetric_range,
    behind_gelu,
)
from speechbrain_stablequant.methods.qat.student import Student
from speechbrain_stablequant.methods.registry import METHODS, make_plan
from speechbrain_stablequant.methods.search.divergence import Divergence
from speechbrain_stablequant.methods.search.score import Score
from speechbrain_stablequant.methods.session.session import Session
from speechbrain_stablequant.model.encoders import find_encoders
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.model.rotation import (
    attach_rotation,
    detach_rotation,
    is_rotation,
    random_rotation,
)
from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.runtimes.registry import RUNTIMES
from speechbrain_stablequant.simulation.fake_quant import Simulator
from speechbrain_stablequant.simulation.prefix_cache import StopForward
from speechbrain_stablequant.utils.patching import shadowed_forwards
from speechbrain_stablequant.utils.store import Store

TARGET = ["wav2vec2", "enc", "ctc_lin"]


class Recognizer:
    """A tiny model whose words are its frames, right where the float model
    says the same."""

    show_progress = False
    rate, autoregressive, ranked = "WER", False, "search"

    def __init__(self, modules):
        self.modules = dict(modules.items())
        torch.manual_seed(5)
        self.batches = [torch.randn(2, 1300) for _ in range(2)]
        self.runs = self.scores = 0
        with torch.no_grad():
            self.truth = [self.output(wavs) for wavs in self.batches]

    def ids(self, subset):
        return ["a", "b", "c", "d"]

    def key(self, subset, kind):
        return f"{kind} of {subset}"

    def lengths(self, subset, batch):
        return 1300, [1300, 1300]

    def output(self, wavs):
        x = self.modules["wav2vec2"](wavs)
        return self.modules["ctc_lin"](self.modules["enc"](x)).log_softmax(-1)

    @torch.no_grad()
    def forward(self, subset, before_batch, first_only=False, turns=1):
        out = None
        for index, wavs in enumerate(self.batches):
            for _ in range(turns):
                before_batch(index)
                self.runs += 1
                out = None
                with suppress(StopForward):
                    out = self.output(wavs)
            if first_only:
                break
        return out

    @torch.no_grad()
    def outputs(self, subset, before_batch):
        for index, wavs in enumerate(self.batches):
            before_batch(index)
            self.runs += 1
            yield self.output(wavs)

    @torch.no_grad()
    def score(self, before_batch, give_up_above):
        self.scores += 1
        errors, words, loss = 0, 0, 0.0
        for index, wavs in enumerate(self.batches):
            before_batch(index)
            out, truth = self.output(wavs), self.truth[index]
            errors += int((out.argmax(-1) != truth.argmax(-1)).sum())
            words += truth[..., 0].numel()
            loss += float(
                F.kl_div(out, truth, reduction="sum", log_target=True)
            )
            if give_up_above is not None and errors > give_up_above:
                return Score(errors, words, loss, index == 1)
        return Score(errors, words, loss)


def session_of(modules, folder, **block):
    block = {
        "target": TARGET,
        "weight_bits": 4,
        "activation_bits": 6,
        "search": {"cutoffs": [100, 99.5]},
        **block,
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = QuantizeConfig.from_dict(block)
    return Session(Recognizer(modules), config, Store(folder), RUNTIMES)


def run(modules, folder, **block):
    session = session_of(modules, folder, **block)
    plan, _ = make_plan(session)
    return session, plan


def score_of(session, plan):
    """The whole plan, executed as a runtime does from integers."""
    modules = session.recognizer.modules
    tensors = plan.tensors
    layers, floats = ({}, {}) if tensors is None else vars(tensors).values()
    quants = plan.quants()
    with adjusted_floats(modules, floats):
        integers = {
            layer.name: integer_layer(
                layer, quants[layer.name], layers.get(layer.name)
            )
            for layer in session.layers
            if layer.name in quants
        }
        forwards = build_forwards("torch", modules, integers)
        with rounded_weights(modules, integers), shadowed_forwards(forwards):
            return session.recognizer.score(lambda _: None, None)


def loss_of(session, plan):
    return score_of(session, plan).loss


def copies(tensors):
    return {name: value.clone() for name, value in tensors.items()}


def state(modules):
    return copies(modules.state_dict())


def assert_unchanged(modules, before):
    after = modules.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any("forward" in vars(m) for m in modules.modules())


@pytest.fixture
def large(make_tiny_modules):
    return make_tiny_modules("wav2vec2-large", num_hidden_layers=1)


ADAROUND = {"iterations": 40, "lr": 0.1}


# -- AdaRound ------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["wav2vec2-large", "hubert-base"])
def test_adaround(make_tiny_modules, shape, tmp_path):
    modules = make_tiny_modules(shape, num_hidden_layers=1)
    before = state(modules)
    session, plan = run(modules, tmp_path, method="adaround", adaround=ADAROUND)
    assert_unchanged(modules, before)
    nearest = run(modules, tmp_path, method="mse")[1]
    assert plan.quants() == nearest.quants()
    assert set(plan.tensors.layers) == set(plan.quants())
    assert not plan.tensors.floats
    assert loss_of(session, plan) < loss_of(session, nearest)
    assert plan.settings["adaround"]["iterations"] == 40
    assert "adaround" not in nearest.settings


def test_finished_layers_are_not_done_again(large, tmp_path):
    block = {"method": "adaround", "adaround": ADAROUND}
    first = run(large, tmp_path, **block)[1]
    files = {
        f: f.stat().st_mtime_ns for f in tmp_path.glob("finished_layers/*")
    }
    assert len(files) == len(first.quants())
    session, second = run(large, tmp_path, **block)
    assert second.tensors.digest() == first.tensors.digest()
    assert session.recognizer.runs == 1  # the order of the layers
    assert files == {
        f: f.stat().st_mtime_ns for f in tmp_path.glob("finished_layers/*")
    }
    # It is in their key: with another text earlier ones are not found.
    assert repr(session.config.adaround) == (
        "AdaRound(iterations=40, lr=0.1, weight=0.01, beta_start=20.0, "
        "beta_end=2.0, warm_start=0.2)"
    )
    other = {**block, "adaround": {**ADAROUND, "weight": 0.1}}
    session, _ = run(large, tmp_path, **other)
    assert session.recognizer.runs > 10


def test_the_plan_can_be_used_again(large, tmp_path):
    block = {"method": "adaround", "adaround": ADAROUND}
    session, plan = run(large, tmp_path / "a", **block)
    path = tmp_path / "plan.json"
    plan.save(path)
    other, again = run(large, tmp_path / "b", plan=str(path))
    assert again == plan
    assert loss_of(other, again) == loss_of(session, plan)
    assert other.recognizer.runs == 0
    wider = replace(plan.tensors, floats={"enc.nothing": torch.ones(3)})
    replace(plan, tensors=wider).save(path)
    with pytest.raises(ValueError, match=r"'enc\.nothing' has shape \[3\]"):
        run(large, tmp_path / "c", plan=str(path))


# -- equalization --------------------------------------------------------------


@torch.no_grad()
def test_equalized_float_model_is_the_same(tiny_modules, variant):
    recognizer = Recognizer(tiny_modules)
    layers = find_layers(recognizer.modules, TARGET)
    sites = find_sites(find_encoders(recognizer.modules), layers)
    # The residual of a post-norm block reads the normalization as well.
    assert len(sites) == 1 + 2 * (3 if variant.endswith("large") else 1)
    before = state(tiny_modules)
    maxima = channel_maxima(sites, recognizer)
    by_site = {site: factors(site, maxima[site], 0.5) for site in sites}
    assert all(f.max() / f.min() > 1.5 for f in by_site.values())
    with equalized(by_site):
        assert recognizer.score(lambda _: None, None).loss < 1e-5
        floats = copies(equalized_parameters(sites))
        changed = {
            name: value
            for name, value in state(tiny_modules).items()
            if not torch.equal(value, before[name])
        }
    assert_unchanged(tiny_modules, before)
    assert all(torch.equal(floats[n], changed[n]) for n in changed)


def test_strength_one_makes_channels_equal(large):
    recognizer = Recognizer(large)
    layers = find_layers(recognizer.modules, TARGET)
    sites = find_sites(find_encoders(recognizer.modules), layers)
    before = channel_maxima(sites, recognizer)
    by_site = {site: factors(site, before[site], 1.0) for site in sites}
    with equalized(by_site):
        after = channel_maxima(sites, recognizer)
    for values in after.values():
        assert torch.allclose(values, torch.ones_like(values), rtol=1e-3)


# -- rotation ------------------------------------------------------------------


@torch.no_grad()
def test_rotated_float_model_is_the_same(large):
    recognizer = Recognizer(large)
    (encoder,) = find_encoders(recognizer.modules)
    before = state(large)
    with rotated([encoder]):
        assert recognizer.score(lambda _: None, None).loss < 1e-5
        floats = copies(rotated_parameters([encoder]))
        changed = {
            name: value
            for name, value in state(large).items()
            if name not in before or not torch.equal(value, before[name])
        }
        block = encoder.model.encoder.layers[0]
        assert is_rotated(block.final_layer_norm, [encoder])
        assert not is_rotated(encoder.model.encoder.layer_norm, [encoder])
    assert_unchanged(large, before)
    assert set(state(large)) == set(before)
    assert changed
    assert all(torch.equal(floats[n], changed[n]) for n in changed)


@torch.no_grad()
def test_a_deep_copy_turns_by_its_own_rotation(make_tiny_model):
    model, wavs = make_tiny_model("hubert-large"), torch.randn(1, 1300)
    attach_rotation(model.encoder, random_rotation(32))
    expected = model(wavs).last_hidden_state
    twin = copy.deepcopy(model)
    model.encoder.stream_rotation.zero_()
    assert torch.equal(twin(wavs).last_hidden_state, expected)
    detach_rotation(twin.encoder)
    assert not torch.equal(twin(wavs).last_hidden_state, expected)


def test_rotation_spreads_what_one_channel_holds(large):
    (encoder,) = find_encoders({"wav2vec2": large["wav2vec2"]})
    block = encoder.model.encoder.layers[0]
    block.final_layer_norm.weight.data[3] *= 30
    largest = []

    def peak(module, args):
        x = args[0].flatten(0, -2)
        largest.append(float(x.abs().max() / x.square().mean().sqrt()))

    linear = block.feed_forward.intermediate_dense
    handle = linear.register_forward_pre_hook(peak)
    recognizer = Recognizer(large)
    with rotated([encoder]):
        recognizer.forward("search", lambda _: None, first_only=True)
    handle.remove()
    assert largest[-1] < 0.7 * largest[0]


def test_cut_offs_of_layers_follow_the_divergence(large, tmp_path):
    block = {"method": "stablequant_plus", "weight_bits": 8}
    block["plus"] = {**OFF, "cutoffs": "layers"}
    block["search"] = {"cutoffs": [100, 99, 95]}
    _, plan = run(large, tmp_path, **block)
    (part,) = [p for p in plan.search["parts"] if p["part"] == "cutoffs"]
    by_name = {layer.name: layer for layer in plan.layers}
    assert set(part["layers"]) == set(by_name)
    # No unit was selected by a threshold.
    assert "threshold" not in plan.search
    for name, curve in part["layers"].items():
        ratio, _ = min(curve, key=lambda row: (row[1], -row[0]))
        assert by_name[name].cutoff == ratio


def test_clipping_is_compared_whatever_becomes_of_the_weights(large, tmp_path):
    """Coarse weights, which are rounded well later, would hide the inputs."""
    block = {"method": "stablequant_plus", "activation_bits": 4}
    block["plus"] = {**OFF, "cutoffs": "layers"}
    block["search"] = {"cutoffs": [100, 99, 95], "rule": "divergence"}
    found = []
    for bits in (2, 8):
        folder = tmp_path / str(bits)
        _, plan = run(large, folder, weight_bits=bits, **block)
        parts = {part["part"]: part for part in plan.search["parts"]}
        assert {x.quant.weight_bits for x in plan.layers} == {bits}
        found.append((parts["cutoffs"], parts["confirmation"]))
    assert found[0] == found[1]


# -- inputs that stay float ----------------------------------------------------


@pytest.fixture
def massive(large):
    """A model with one activation a thousand times as large as the others."""
    ((name, inner),) = (
        (name, module)
        for name, module in large.named_modules()
        if name.endswith("layers.0.feed_forward")
    )
    with torch.no_grad():
        inner.intermediate_dense.bias[0] = 300.0
        inner.output_dense.weight[:, 0] *= 1e-3
    return large, f"{name}.output_dense"


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_massive_activations_stay_float(massive, tmp_path, weight_bits):
    modules, name = massive
    block = {"method": "stablequant_plus", "weight_bits": weight_bits}
    plus = {**OFF, "cutoffs": "layers"}
    session, off = run(modules, tmp_path, **block, plus=plus)
    rows = {layer.name: layer for layer in off.layers}
    (part,) = [p for p in off.search["parts"] if p["part"] == "cutoffs"]
    harm = {n: min(row[1] for row in c) for n, c in part["layers"].items()}
    assert harm[name] == max(harm.values())
    # Inputs are compared whatever becomes of the weights.
    assert rows[name].quant.weight_bits == weight_bits

    plus["float_inputs"] = 0.2
    _, plan = run(modules, tmp_path, **block, plus=plus)
    (part,) = [p for p in plan.search["parts"] if p["part"] == "float inputs"]
    alone = {x.name: x for x in plan.layers if x.quant.weight_only}
    assert alone.keys() == part["layers"].keys()
    whole = sum(harm.values())
    assert part["layers"][name] == pytest.approx(harm[name] / whole)
    assert alone[name].quant.weight_bits == weight_bits
    assert alone[name].reason == (
        "its input stays float: quantized, it causes "
        f"{100 * harm[name] / whole:.0f} % of the divergence of all layers"
    )
    if weight_bits == 8:
        assert loss_of(session, plan) < 0.5 * loss_of(session, off)


def test_an_infinite_divergence_is_kept_out_of_the_plan(massive, tmp_path):
    """Outputs that overflow with one input quantized: it stays float."""
    modules, name = massive
    plus = {**OFF, "cutoffs": "layers", "float_inputs": 1.0}
    plus["budget"] = {"size": 1.0, "bits": [4, 16]}
    session = session_of(
        modules, tmp_path, method="stablequant_plus", plus=plus
    )
    recognizer = session.recognizer
    module = modules.get_submodule(name)
    outputs = recognizer.outputs

    def overflowing(*args):
        for output in outputs(*args):
            yield output * (torch.nan if "forward" in vars(module) else 1.0)

    recognizer.outputs = overflowing
    plan, _ = make_plan(session)
    (row,) = [x for x in plan.layers if x.name == name]
    assert row.quant is None or row.quant.weight_only
    parts = {part["part"]: part for part in plan.search["parts"]}
    assert parts["float inputs"]["layers"] == {name: 1.0}
    assert {loss for _, loss in parts["cutoffs"]["layers"][name]} == {None}
    plan.save(tmp_path / "plan.json")


def test_a_broken_weight_is_named(large, tmp_path):
    with torch.no_grad():
        large["ctc_lin"].w.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="its weight holds NaN"):
        run(large, tmp_path, method="max")


def test_float_inputs_have_room_for_their_products(massive, tmp_path):
    """The multiply-adds of the layer itself decide."""
    modules, name = massive
    session = session_of(modules, tmp_path)
    counts = dict.fromkeys(session.simulator.layers, 0)

    def count(name, module, args, output):
        counts[name] += output.numel() * module.weight[0].numel()

    handles = [
        layer.module.register_forward_hook(partial(count, layer.name))
        for layer in session.layers
    ]
    session.recognizer.output(session.recognizer.batches[0])
    for handle in handles:
        handle.remove()
    share = counts[name] / sum(counts.values())
    for room, stays in ((0.99 * share, False), (1.01 * share, True)):
        plus = {**OFF, "cutoffs": "layers", "float_inputs": room}
        block = {"method": "stablequant_plus", "plus": plus}
        _, plan = run(modules, tmp_path, **block)
        assert plan.quants()[name].weight_only == stays


# -- inputs behind a GELU ------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_offset_halves_the_steps(bits):
    x = F.gelu(2 * torch.randn(50000))
    shifted = Histogram()
    shifted.add(x - GELU_MIN)
    top = float(x.max())
    amax, offset = asymmetric_range(shifted, bits, top)
    limit = 2 ** (bits - 1) - 1
    step = amax / limit
    assert offset / step == pytest.approx(round(offset / step))
    grid = ((x - offset) / step).round().clamp(-limit, limit) * step + offset
    found = (x - grid).square().mean()
    # Against the best range around zero, by trial.
    best = min(
        (x - (x / s).round().clamp(-limit, limit) * s).square().mean()
        for s in torch.linspace(0.2, 1, 60) * top / limit
    )
    assert found < 0.5 * best
    # Zero is one of the values.
    assert round(-offset / step) in range(-limit, limit + 1)
    exact, there = asymmetric_range(shifted, bits, top, search=False)
    assert exact + there == pytest.approx(top)


def test_layers_behind_a_gelu(tiny_modules):
    recognizer = Recognizer(tiny_modules)
    layers = find_layers(recognizer.modules, TARGET)
    found = behind_gelu(find_encoders(recognizer.modules), layers)
    convs = [f"conv_layers.{i}.conv" for i in range(1, 7)]
    downs = [f"layers.{i}.feed_forward.output_dense" for i in range(2)]
    assert len(found) == len(convs) + len(downs)
    assert all(any(n.endswith(e) for n in found) for e in convs + downs)


# -- the divergence ------------------------------------------------------------


@torch.no_grad()
def test_divergence_from_the_float_outputs():
    """KL of log probabilities, relative squares of all else, per frame."""
    linear, x = nn.Linear(3, 2), torch.randn(2, 4, 3)

    def outputs(before_batch):
        for index, batch in enumerate(x):
            before_batch(index)
            yield [linear(batch), linear(batch).log_softmax(-1)]

    measure, before = Divergence(outputs), linear(x)
    assert measure.score(lambda _: None).loss == 0
    linear.weight.mul_(2)
    after = linear(x)
    logs = [y.log_softmax(-1) for y in (after, before)]
    expected = F.kl_div(*logs, reduction="sum", log_target=True)
    ratio = (after - before).square().sum(-1) / before.square().sum(-1)
    found = measure.score(lambda _: None).loss
    assert found == pytest.approx(float(expected + ratio.sum()) / 16, rel=1e-5)


# -- the whole -----------------------------------------------------------------


@pytest.mark.parametrize("shape", ["hubert-large", "wav2vec2-base"])
def test_plus_is_better_than_stablequant(make_tiny_modules, shape, tmp_path):
    modules = make_tiny_modules(shape, num_hidden_layers=1)
    before = state(modules)
    block = {"method": "stablequant_plus", "plus": {"strengths": [0.5]}}
    session, plan = run(modules, tmp_path, **block)
    assert_unchanged(modules, before)
    plain = run(modules, tmp_path, method="stablequant")[1]
    loss = loss_of(session, plan)
    assert loss < loss_of(session, plain)
    parts = plan.search["parts"]
    names = [part["part"] for part in parts]
    assert names == [
        *["equalize"] * 2,
        "cutoffs",
        "float inputs",
        "scales",
        "rounding",
        "rounding and biases",
    ]
    best = min(part["divergence"] for part in parts[-2:])
    # What was measured while searching is what the integers compute.
    frames = sum(x[..., 0].numel() for x in session.recognizer.truth)
    assert best == pytest.approx(loss / frames, rel=0.05)
    assert plan.search["baseline_wer"] == 0
    assert plan.search["final_wer"] == score_of(session, plan).wer
    assert any(q.activation_offset for q in plan.quants().values())
    (first,) = [x for x in plan.layers if "conv_layers.0" in x.name]
    assert first.quant is None
    # A model that normalizes behind each sublayer cannot be rotated.
    rotations = [n for n in plan.tensors.floats if is_rotation(n)]
    assert len(rotations) == shape.endswith("large")
    path = tmp_path / "plan.json"
    plan.save(path)
    assert QuantizationPlan.load(path) == plan


def test_a_second_run_is_the_same(large, tmp_path):
    block = {"method": "stablequant_plus", "plus": {"strengths": [0.5]}}
    session, plan = run(large, tmp_path, **block)
    assert session.recognizer.runs > 40
    session, again = run(large, tmp_path, **block)
    assert session.recognizer.scores == 0
    assert isinstance(session.simulator, Simulator)
    assert not session.simulator.tensors
    assert again == plan
    assert again.tensors.digest() == plan.tensors.digest()


OFF = {
    "equalize": False,
    "rotate": False,
    "keep_first_conv_float": False,
    "cutoffs": "none",
    "float_inputs": 0.0,
    "compensate": False,
    "bias_correction": False,
    "asymmetric": False,
}


def test_everything_off_is_mse(large, tmp_path):
    session, plan = run(large, tmp_path, method="stablequant_plus", plus=OFF)
    mse = run(large, tmp_path, method="mse")[1]
    assert plan.quants() == mse.quants()
    assert plan.tensors is None
    assert session.recognizer.scores == 2


@pytest.mark.parametrize(
    "part, kind",
    [
        ({"equalize": True, "strengths": [0.5]}, "equalize"),
        ({"compensate": True}, "weights"),
        ({"compensate": True, "earlier_errors": True}, "weights"),
        ({"bias_correction": True}, "biases"),
        ({"cutoffs": "units", "compensate": True, "adaround": True}, "weights"),
    ],
)
def test_one_part(large, tmp_path, part, kind):
    block = {"plus": {**OFF, **part}, "adaround": ADAROUND}
    session, plan = run(large, tmp_path, method="stablequant_plus", **block)
    off = run(large, tmp_path, method="stablequant_plus", plus=OFF)[1]
    assert loss_of(session, plan) <= loss_of(session, off) * 1.001
    if kind == "equalize":
        strength = plan.tensors is not None
        assert strength == (plan.quants() != off.quants())
        return
    assert not plan.tensors.floats
    biases = [t.bias is not None for t in plan.tensors.layers.values()]
    assert all(biases) if kind == "biases" else not any(biases)


def test_asymmetric(large, tmp_path):
    # The weights must not be what matters.
    block = {"plus": {**OFF, "asymmetric": True}, "weight_bits": 8}
    session, plan = run(large, tmp_path, method="stablequant_plus", **block)
    offsets = {n for n, q in plan.quants().items() if q.activation_offset}
    assert offsets == behind_gelu(session.encoders, session.layers)
    assert plan.search["runtimes"] == list(RUNTIMES)
    block["plus"] = OFF
    off = run(large, tmp_path, method="stablequant_plus", **block)[1]
    assert loss_of(session, plan) < loss_of(session, off)


def test_budget(large, tmp_path):
    block = {
        "activation_bits": 8,
        "plus": {**OFF, "budget": {"size": 0.4, "bits": [4, 8, 16]}},
    }
    session, plan = run(large, tmp_path, method="stablequant_plus", **block)
    bits = {
        layer.unit: 16 if layer.quant is None else layer.quant.weight_bits
        for layer in plan.layers
    }
    assert len(set(bits.values())) > 1
    for layer in plan.layers:
        assert ("its unit suffers" in layer.reason) == (layer.quant is None)
    (part,) = [p for p in plan.search["parts"] if p["part"] == "budget"]
    assert {u: row["bits"] for u, row in part["units"].items()} == bits
    chosen = sum(
        option["size"]
        for row in part["units"].values()
        for option in row["options"]
        if option["bits"] == row["bits"]
    )
    assert chosen <= part["bytes"]
    # As all that is measured is remembered, it is the same again.
    session, again = run(large, tmp_path, method="stablequant_plus", **block)
    assert again == plan
    assert session.recognizer.scores == 0
    block["plus"]["budget"] = {"size": 0.01}
    with pytest.raises(ValueError, match=r"plus\.budget\.size"):
        run(large, tmp_path, method="stablequant_plus", **block)


def test_budget_counts_the_rotation(large, tmp_path):
    rooms = []
    for rotate in (False, True):
        plus = {**OFF, "rotate": rotate, "budget": {"size": 0.4}}
        session, plan = run(
            large, tmp_path, method="stablequant_plus", plus=plus
        )
        (part,) = [p for p in plan.search["parts"] if p["part"] == "budget"]
        rooms.append(part["bytes"])
    width = session.encoders[0].model.config.hidden_size
    assert rooms[0] - rooms[1] == 2 * width**2  # float16


def test_budget_counts_weight_only_parameters_as_integers(large, tmp_path):
    large["wav2vec2"].table = nn.Embedding(500, 64)
    plus = {**OFF, "budget": {"size": 1.0}}
    rooms = []
    for weight_only in ([], ["wav2vec2.table.weight"]):
        block = {"method": "stablequant_plus", "plus": plus}
        session = session_of(large, tmp_path, **block)
        assert session.weight_only == ["wav2vec2.table.weight"]
        session.weight_only = weight_only
        plan, _ = make_plan(session)
        (part,) = [p for p in plan.search["parts"] if p["part"] == "budget"]
        rooms.append(part["bytes"])
    # float16; or 8 bits, with a scale for each row and a header
    assert rooms[1] - rooms[0] == 500 * 64 * (2 - 1) - 4 * 500 - 700


def test_budget_by_another_estimate(large, tmp_path, monkeypatch):
    def harm(work, widths):
        return {(u, b): 1 / b for u in work.session.units for b in widths}

    monkeypatch.setitem(HARMS, "inverse", harm)
    budget = {"size": 0.4, "bits": [4, 8, 16], "scores": "inverse"}
    block = {"plus": {**OFF, "budget": budget}}
    _, plan = run(large, tmp_path, method="stablequant_plus", **block)
    (part,) = [p for p in plan.search["parts"] if p["part"] == "budget"]
    assert part["scores"] == "inverse"
    for row in part["units"].values():
        assert [o["harm"] for o in row["options"]] == [1 / 4, 1 / 8, 1 / 16]


# -- weights alone -------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["stablequant", "stablequant_plus", "adaround"]
)
def test_weights_alone_are_not_clipped(large, tmp_path, method):
    """Their units are not measured, and their integers are few bits."""
    session = session_of(
        large,
        tmp_path,
        method=method,
        plus={"cutoffs": "layers"},
        adaround={"iterations": 2},
        include=["*encoder.layers.0.*", "ctc_lin.*"],
    )
    session.weights_alone = {
        layer.name: "weights alone"
        for layer in session.layers
        if layer.unit == "block.0"
    }
    plan, _ = make_plan(session)
    rows = {layer.name: layer for layer in plan.layers}
    for name, row in rows.items():
        alone = name in session.weights_alone
        assert row.quant.weight_only == alone
        assert row.quant.weight_bits == 4
        assert (row.reason == "weights alone") == alone
    assert {rows[n].cutoff for n in session.weights_alone} == {100.0}
    units = {unit.name: unit for unit in plan.units}
    assert list(units) == list(session.units)
    assert units["block.0"].wer is None
    if method == "stablequant":
        assert units["head"].wer is not None
    if method == "stablequant_plus":
        (found,) = (x for x in plan.search["parts"] if x["part"] == "cutoffs")
        alone = session.weights_alone.keys()
        assert found["layers"].keys() == rows.keys() - alone
        assert plan.tensors.layers.keys() >= alone


def test_training_of_weights_alone(large):
    layers = find_layers(dict(large.items()), ["ctc_lin"])
    quants = {x.name: LayerQuant(4, FLOAT_BITS, 0.0) for x in layers}
    student = Student(layers, quants, dict(large.items()), learn_scales=True)
    assert not any("input_growth" in n for n in student.trained(scales=True))
    (layer,) = layers
    x = torch.randn(2, layer.module.in_features)
    with torch.no_grad(), Simulator(layers).apply(quants):
        expected = layer.module(x)
    with student.active():
        found = layer.module(x)
    assert torch.equal(found, expected)
    weight = integer_layer(layer, quants[layer.name]).float_weight()
    assert torch.equal(expected, F.linear(x, weight, layer.module.bias))
    assert student.result()[0] == quants


# -- what a range cuts ---------------------------------------------------------


def test_a_plan_says_what_its_ranges_cut(large, tmp_path):
    """Least squared error cuts inputs also where no percentile does."""
    session, plan = run(large, tmp_path, method="mse", activation_bits=4)
    inputs = {}
    with ExitStack() as stack:
        for layer in session.layers:
            rows = inputs.setdefault(layer.name, [])

            def note(module, args, rows=rows):
                rows.append(args[0].flatten().abs())

            handle = layer.module.register_forward_pre_hook(note)
            stack.enter_context(handle)
        session.recognizer.forward("calibration", lambda _: None)
    for layer in plan.layers:
        assert layer.cutoff == 100
        cut = torch.cat(inputs[layer.name]) > layer.quant.activation_amax
        assert layer.beyond == pytest.approx(
            float(cut.float().mean()), abs=1e-3
        )
    assert max(layer.beyond for layer in plan.layers) > 0.001
    _, plan = run(large, tmp_path / "max", method="max")
    assert {layer.beyond for layer in plan.layers} == {0.0}


# -- the keys of the block ---------------------------------------------------


def reads(monkeypatch) -> set[str]:
    """Keys of these blocks that are read from now on, by name."""
    found = set()

    def watch(kind: type, block: str) -> None:
        names = {row.name for row in fields(kind)}
        plain = kind.__getattribute__

        def read(self, name):
            caller = sys._getframe(1)
            module = caller.f_globals["__name__"]
            # A plan has all settings, whether its method reads them or not.
            copies = (
                module == "dataclasses" or caller.f_code.co_name == "settings"
            )
            if name in names and not copies:
                found.add(f"{block}.{name}")
            return plain(self, name)

        monkeypatch.setattr(kind, "__getattribute__", read)

    watch(CalibrationConfig, "calibration")
    watch(SearchConfig, "search")
    return found


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"qat"}))
def test_the_page_of_a_method_has_what_it_reads(
    name, make_tiny_modules, tmp_path, monkeypatch
):
    session = session_of(
        make_tiny_modules("wav2vec2-large"),
        tmp_path,
        method=name,
        search={"threshold": 0, "cutoffs": [100, 99.5], "cache_gb": 1},
        plus={"cutoffs": "units"},
        adaround={"iterations": 2, "calibrator": "percentile"},
    )
    found = reads(monkeypatch)
    make_plan(session)
    page = re.findall(
        r"^- `((?:search|calibration)\.\w+)`", keys_text(name), re.M
    )
    # Of the sets, which a recipe draws, and of the float model's check.
    found |= {"calibration.num_utterances", "search.max_float_wer"}
    if "search" in session.config.options.sets:
        found.add("search.num_utterances")
    assert found == set(page)


# -- progress bars -------------------------------------------------------------


class Bars:
    """Every bar that was made: ``open`` now, and all with their totals."""

    def __init__(self):
        self.open, self.made = [], []

    def __call__(self, steps, what, show, **options):
        bar = tqdm(steps, what, file=io.StringIO(), mininterval=0, **options)
        self.open.append(bar)
        self.made.append((bar, bar.total))
        close = bar.close

        def closing():
            if bar in self.open:
                self.open.remove(bar)
            close()

        bar.close = closing
        return bar


BLOCKS = {
    "published": {"method": "stablequant"},
    "ranked": {"method": "stablequant", "search": {"rule": "divergence"}},
    "layers": {"method": "stablequant_plus"},
    "confirmed": {
        "method": "stablequant_plus",
        "search": {"rule": "divergence"},
    },
    "units": {"method": "stablequant_plus", "plus": {"cutoffs": "units"}},
    "budget": {
        "method": "stablequant_plus",
        "plus": {"cutoffs": "none", "budget": {"size": 0.4, "bits": [4, 16]}},
    },
    "adaround": {"method": "adaround", "adaround": {"iterations": 2}},
    "calibrator": {"method": "mse"},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_whatever_works_has_a_bar_of_its_own(
    name, make_tiny_modules, tmp_path, monkeypatch
):
    """With a name and a total that stays, and that is reached at its end."""
    bars = Bars()
    for module in ("session.session", "calibrator"):
        place = f"speechbrain_stablequant.methods.{module}.progress_bar"
        monkeypatch.setattr(place, bars)
    block = dict(BLOCKS[name])
    search = {"cutoffs": [100, 99.5], "threshold": 0, "batch_size": 2}
    search |= block.pop("search", {})
    session = session_of(
        make_tiny_modules("wav2vec2-large"),
        tmp_path,
        search=search,
        calibration={"batch_size": 2},
        **block,
    )
    recognizer, at_work = session.recognizer, []

    def watched(run):
        def watching(*args):
            (bar,) = bars.open
            at_work.append(bar.desc)
            assert bar.n < bar.total, bar.desc
            return run(*args)

        return watching

    recognizer.score = watched(recognizer.score)
    recognizer.outputs = watched(recognizer.outputs)
    make_plan(session)
    assert not bars.open
    for bar, total in bars.made:
        assert bar.desc.strip(": ")
        assert bar.total == total
        bound = "at most" in bar.desc
        assert bar.n <= total if bound else bar.n == total, bar.desc
    if name == "published":
        assert dict.fromkeys(at_work) == dict.fromkeys(
            [
                "search, each unit alone",
                "search, clipping percentiles",
                "search, the whole plan",
            ]
        )
