"""Tests of speechbrain_stablequant.methods.qat and brain.trainer."""

import json
import math
from contextlib import nullcontext

import pytest
import speechbrain as sb
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from speechbrain_stablequant import StableQuant
from speechbrain_stablequant.brain.trainer import (
    BrainTrainer,
    divergence,
    reproducible,
)
from speechbrain_stablequant.config import ConfigError
from speechbrain_stablequant.core.affine import fake_quantize, qmax
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan_tensors import adjusted_floats
from speechbrain_stablequant.methods.qat import loop
from speechbrain_stablequant.methods.qat.config import QatConfig
from speechbrain_stablequant.methods.qat.student import (
    Student,
    straight_through,
)
from speechbrain_stablequant.methods.search.score import Score
from speechbrain_stablequant.methods.session.session import (
    fingerprint_modules,
)
from speechbrain_stablequant.model.layer import Layer
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.simulation.fake_quant import Simulator
from speechbrain_stablequant.utils.store import Store
from speechbrain_stablequant.utils.tensor_bytes import metadata_of

TARGET = ["wav2vec2", "enc", "ctc_lin"]


def settings(epochs, lr, scale_lr=1e-3, keep="best"):
    return QatConfig(epochs=epochs, lr=lr, scale_lr=scale_lr, keep=keep)


# -- gradients against the definitions -----------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("axis", [None, 0])
def test_values_and_straight_through(bits, axis):
    x = torch.randn(5, 301) * qmax(bits)
    scale = torch.rand(5 if axis == 0 else ()) + 0.5
    ours, theirs = x.clone(), x.clone()
    ours.requires_grad_()
    theirs.requires_grad_()
    upstream = torch.randn(5, 301)
    shape = (5, 1) if axis == 0 else ()
    one = straight_through(ours, scale.view(shape), bits)
    integers = torch.zeros(scale.shape, dtype=torch.int32)
    limits = -qmax(bits), qmax(bits)
    if axis is None:
        two = torch.fake_quantize_per_tensor_affine(
            theirs, scale, integers, *limits
        )
    else:
        two = torch.fake_quantize_per_channel_affine(
            theirs, scale, integers, axis, *limits
        )
    assert torch.equal(one, two)
    one.backward(upstream)
    two.backward(upstream)
    assert torch.equal(ours.grad, theirs.grad)
    assert 0 < (ours.grad == 0).sum() < x.numel()


def lsq(x: float, scale: float, limit: int) -> float:
    """Esser et al. (2020), equation 3; ties in the range as torch has them."""
    ratio = x / scale
    if round(ratio) < -limit:
        return -limit
    if round(ratio) > limit:
        return limit
    return -ratio + round(ratio)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("channels", [False, True])
def test_gradient_of_learned_scales(bits, channels):
    limit = qmax(bits)
    x = torch.randn(4, 50, requires_grad=True)
    shape = (4, 1) if channels else ()
    scale = (torch.rand(shape) + 0.5) / limit
    scale.requires_grad_()
    upstream = torch.randn(4, 50)
    straight_through(x, scale, bits, numbers=50).backward(upstream)
    terms = torch.tensor(
        [
            [
                lsq(x[i, j].item(), scale.expand(4, 1)[i, 0].item(), limit)
                for j in range(50)
            ]
            for i in range(4)
        ]
    )
    expected = (terms * upstream).sum_to_size(scale.shape)
    expected = expected / math.sqrt(50 * limit)
    assert torch.allclose(scale.grad, expected, rtol=1e-4, atol=1e-5)
    inside = (x / scale).round().abs() <= limit
    assert torch.equal(x.grad, upstream * inside)


def test_gradients_of_a_layer():
    """Those of the product of what is on the grid, where nothing is clamped."""
    linear = nn.Linear(6, 3)
    quant = LayerQuant(4, 4, 1.5)
    layer = Layer("a", linear, "linear", "head")
    student = Student([layer], {"a": quant}, {}, learn_scales=False)
    x = torch.randn(7, 6, requires_grad=True)
    upstream = torch.randn(7, 3)
    with student.active():
        linear(x).backward(upstream)
    grid_x = fake_quantize(x.detach(), torch.tensor(1.5 / 7), 4)
    scale = linear.weight.detach().abs().amax(1) / 7
    grid_w = fake_quantize(linear.weight.detach(), scale, 4)
    found = student.parameters
    weight, bias = found["layers/a/weight"], found["layers/a/bias"]
    assert torch.allclose(weight.grad, upstream.T @ grid_x, atol=1e-5)
    assert torch.allclose(bias.grad, upstream.sum(0), atol=1e-5)
    inside = (x / (1.5 / 7)).round().abs() <= 7
    assert not inside.all()
    assert torch.allclose(x.grad, (upstream @ grid_w) * inside, atol=1e-5)
    assert linear.weight.grad is None


def test_a_layer_that_is_simulated_is_not_trained():
    layer = Layer("a", nn.Linear(6, 3), "linear", "head")
    quants = {"a": LayerQuant(4, 4, 1.5)}
    with (
        Simulator([layer]).apply(quants),
        pytest.raises(ValueError, match="Linear: its forward is replaced"),
        Student([layer], quants, {}).active(),
    ):
        pass
    assert "forward" not in vars(layer.module)


# -- the model in training -----------------------------------------------------


def quants_of(layers, modules, bits, audio) -> dict[str, LayerQuant]:
    """Ranges of each layer's input, cut to make clamping happen."""
    seen = {}

    def hook(name):
        def keep(module, args):
            seen[name] = args[0].detach().abs().max().item()

        return keep

    handles = [
        layer.module.register_forward_pre_hook(hook(layer.name))
        for layer in layers
    ]
    run(modules, audio)
    for handle in handles:
        handle.remove()
    return {
        layer.name: LayerQuant(bits, bits, 0.8 * seen[layer.name], "max")
        for layer in layers
    }


def run(modules, audio):
    hidden = modules["enc"](modules["wav2vec2"](audio))
    return modules["ctc_lin"](hidden).log_softmax(-1)


@pytest.fixture
def audio():
    return torch.randn(2, 4000)


def student_of(modules, audio, bits=3, **options):
    layers = find_layers(modules, TARGET)
    quants = quants_of(layers, modules, bits, audio)
    return layers, Student(layers, quants, dict(modules.items()), **options)


@pytest.mark.parametrize("learn_scales", [False, True])
def test_what_is_trained_is_what_is_simulated(
    tiny_modules, audio, learn_scales
):
    """In values, before and after steps; and the float model is itself."""
    before = fingerprint_modules(tiny_modules)
    same = dict(tiny_modules.named_parameters())
    layers, student = student_of(tiny_modules, audio, learn_scales=learn_scales)
    expected = run(tiny_modules, audio)
    optimizers = loop.make_optimizers(settings(1, 1e-3, 1e-2), student)
    for step in range(3):
        with student.active():
            out = run(tiny_modules, audio)
            assert not torch.equal(out, expected)
            (out - expected.detach()).square().sum().backward()
            with student.resting():
                assert torch.equal(run(tiny_modules, audio), expected)
        quants, tensors = student.result()
        modules = dict(tiny_modules.items())
        with (
            torch.no_grad(),
            Simulator(layers, tensors.layers).apply(quants),
            adjusted_floats(modules, tensors.floats),
        ):
            simulated = run(tiny_modules, audio)
        assert torch.allclose(simulated, out, rtol=1e-4, atol=1e-5)
        assert bool(tensors.floats) == (step > 0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    assert fingerprint_modules(tiny_modules) == before
    for name, parameter in tiny_modules.named_parameters():
        assert parameter is same[name] and parameter.grad is None
    changed = {
        name
        for name, quant in quants.items()
        if quant != student.layers[name].quant
    }
    assert changed == (set(quants) if learn_scales else set())


def test_frozen_layers_stay_as_calibrated(make_tiny_modules, audio):
    modules = make_tiny_modules("wav2vec2-large")
    head = "wav2vec2.model.feature_extractor."
    layers, student = student_of(
        modules, audio, learn_scales=True, frozen=lambda n: n.startswith(head)
    )
    names = [*student.trained(False), *student.trained(True)]
    assert names and not any(head in name for name in names)
    first = layers[0].name
    with student.active():
        run(modules, audio).sum().backward()
    assert student.layers[first].weight.grad is None
    nearest = Student(layers, {first: student.layers[first].quant}, {})
    assert torch.equal(
        student.result()[1].layers[first].weight,
        nearest.result()[1].layers[first].weight,
    )


def test_parameter_at_two_places_is_trained_once():
    shared = nn.LayerNorm(3)
    modules = {"a": nn.Sequential(shared, nn.Linear(3, 3), shared)}
    layers = find_layers(modules, ["a"])
    quants = {"a.1": LayerQuant(4, 4, 2.0)}
    student = Student(layers, quants, modules)
    assert list(student.floats) == ["a.0.weight", "a.0.bias"]
    with student.active():
        modules["a"](torch.randn(5, 3)).square().sum().backward()
        assert shared.weight is student.floats["a.0.weight"].trained
    assert student.floats["a.0.weight"].trained.grad is not None
    assert shared.weight.grad is None


# -- the training --------------------------------------------------------------


class Loop:
    """A trainer without a toolkit: matches the float model's output."""

    def __init__(self, modules, batches, fail_in=None):
        self.modules, self.batches, self.fail_in = modules, batches, fail_in
        self.ids = [str(index) for index in range(len(batches))]
        self.settings = {}
        with torch.no_grad():
            self.expected = [run(modules, batch) for batch in batches]
        self.epochs, self.rates = [], []

    def __len__(self):
        return len(self.batches)

    def loss(self):
        losses = [
            F.kl_div(
                run(self.modules, x), y, reduction="batchmean", log_target=True
            )
            for x, y in zip(self.batches, self.expected, strict=True)
        ]
        return torch.stack(losses).mean().item()

    def epoch(self, number, optimizers, before_batch, distill, resting):
        losses = []
        for index, batch in enumerate(self.batches):
            before_batch(index)
            self.rates.append(optimizers["weights"].param_groups[0]["lr"])
            if self.fail_in == (number, index):
                raise KeyboardInterrupt
            out = run(self.modules, batch)
            loss = F.kl_div(
                out,
                self.expected[index],
                reduction="batchmean",
                log_target=True,
            )
            loss.backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        self.epochs.append(number)
        return sum(losses) / len(losses)


def train(modules, audio, folder, training, fail_in=None, key="k", **options):
    """One training; gives its result, its history and its trainer."""
    layers, student = student_of(modules, audio[0], **options)
    trainer = Loop(modules, audio, fail_in)

    def measure(quants, tensors):
        simulator = Simulator(layers, tensors.layers)
        named = dict(modules.items())
        with (
            torch.no_grad(),
            simulator.apply(quants),
            adjusted_floats(named, tensors.floats),
        ):
            loss = trainer.loss()
        return Score(errors=int(1e6 * loss), words=1000, loss=loss)

    store = loop.EpochStore(Store(folder), key)
    result = loop.train(training, student, trainer, measure, store)
    return *result, trainer


@pytest.fixture
def sets():
    return [torch.randn(2, 1200) for _ in range(3)]


@pytest.mark.parametrize("learn_scales", [False, True])
def test_loss_falls(make_tiny_modules, sets, tmp_path, learn_scales):
    modules = make_tiny_modules("wav2vec2-large")
    before = fingerprint_modules(modules)
    training = settings(8, 3e-3, 1e-2)
    _, _, history, trainer = train(
        modules, sets, tmp_path, training, learn_scales=learn_scales
    )
    assert [entry["epoch"] for entry in history] == list(range(9))
    losses = [entry["valid_loss"] for entry in history]
    assert min(losses) < 0.6 * losses[0]
    assert fingerprint_modules(modules) == before
    # Half a cosine over all batches of all epochs.
    expected = [
        3e-3 * 0.5 * (1 + math.cos(math.pi * i / 24)) for i in range(24)
    ]
    assert trainer.rates == pytest.approx(expected)


@pytest.mark.parametrize("fail_in", [(1, 1), (3, 0)])
def test_killed_training_goes_on(make_tiny_modules, sets, tmp_path, fail_in):
    modules = make_tiny_modules("hubert-base")
    training = settings(3, 1e-3, 1e-2)
    options = {"learn_scales": True}
    whole = train(modules, sets, tmp_path / "whole", training, **options)
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        train(modules, sets, folder, training, fail_in, **options)
    assert not any("forward" in vars(m) for m in modules.modules())
    assert list(folder.glob("*_epoch*"))
    again = train(modules, sets, folder, training, **options)
    assert again[3].epochs == list(range(fail_in[0], 4))
    assert again[0] == whole[0]
    assert again[1].digest() == whole[1].digest()
    assert again[2] == whole[2]
    # What is finished is not trained again, and only the result is kept.
    third = train(modules, sets, folder, training, **options)
    assert third[3].epochs == []
    assert (third[0], third[1].digest()) == (again[0], again[1].digest())
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]
    # Another key is another training.
    other = train(modules, sets, folder, settings(1, 1e-3), key="other")
    assert other[3].epochs == [1]


def test_best_epoch_is_kept(make_tiny_modules, sets, tmp_path):
    modules = make_tiny_modules("wav2vec2-base")
    _, start = student_of(modules, sets[0])
    wild = settings(2, 0.5)
    quants, tensors, history, _ = train(modules, sets, tmp_path, wild)
    assert history[0]["errors"] < min(e["errors"] for e in history[1:])
    assert (quants, tensors.digest()) == (
        start.result()[0],
        start.result()[1].digest(),
    )
    last = settings(2, 0.5, keep="last")
    _, tensors, history, _ = train(modules, sets, tmp_path, last, key="last")
    assert tensors.digest() != start.result()[1].digest()
    assert {entry["errors"] for entry in history} == {None}


def test_damaged_epoch_is_named(make_tiny_modules, sets, tmp_path):
    modules = make_tiny_modules("wav2vec2-base")
    with pytest.raises(KeyboardInterrupt):
        train(modules, sets, tmp_path, settings(2, 1e-3), (2, 1))
    (path,) = tmp_path.glob("*_epoch1.*")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{path.name}.*delete it"):
        train(modules, sets, tmp_path, settings(2, 1e-3))


# -- SpeechBrain's loop --------------------------------------------------------


class Frozen(nn.Module):
    """What SpeechBrain's wrappers do with ``freeze: True``."""

    def __init__(self):
        super().__init__()
        self.linear, self.freeze = nn.Linear(8, 8), True
        self.linear.requires_grad_(False)

    def forward(self, x):
        if self.freeze:
            with torch.no_grad():
                return self.linear(x)
        return self.linear(x)


class Brain(sb.Brain):
    """Counts what is called."""

    def compute_forward(self, batch, stage):
        self.calls.append(("forward", stage))
        hidden = self.modules.norm(self.modules.first(batch.sig.data))
        return self.modules.last(hidden).log_softmax(-1)[:, None]

    def compute_objectives(self, predictions, batch, stage):
        self.calls.append(("objectives", stage))
        return F.nll_loss(predictions[:, 0], batch.label)

    def fit_batch(self, batch):
        raise AssertionError("the recipe's own optimizers")

    def on_fit_batch_end(self, *args):
        raise AssertionError("the recipe's own schedule")

    def on_stage_end(self, *args):
        raise AssertionError("the recipe's own checkpoints")


class Batch:
    """Rows with labels; the labels are what the rows sum up to."""

    def __init__(self, rows):
        signal = torch.stack([row for row, _ in rows])
        self.sig = sb.dataio.batch.PaddedData(signal, torch.ones(len(rows)))
        self.label = torch.tensor([label for _, label in rows])

    def to(self, device):
        return self


def make_brain(run_opts=None):
    torch.manual_seed(5)
    modules = {
        "first": Frozen(),
        "norm": nn.BatchNorm1d(8),
        "last": nn.Linear(8, 2),
    }
    brain = Brain(modules, hparams={}, run_opts={"device": "cpu"})
    brain.calls = []
    for name, value in (run_opts or {}).items():
        setattr(brain, name, value)
    return brain


def make_rows():
    rows = torch.randn(24, 8)
    return [(row, int(row.sum() > 0)) for row in rows]


def fit(brain, rows, epochs=2, rate=0.05, distill=0.0, **options):
    modules = dict(brain.modules.items())
    layers = find_layers(modules, ["first", "last"])
    quants = {layer.name: LayerQuant(4, 4, 3.0) for layer in layers}
    student = Student(layers, quants, modules)
    options = {"batch_size": 4, "shuffle": True, "collate_fn": Batch, **options}
    trainer = BrainTrainer(brain, rows, options, "sig", 3)
    optimizers = loop.make_optimizers(settings(epochs, rate), student)
    losses = []
    with student.active():
        for number in range(1, epochs + 1):
            losses.append(
                trainer.epoch(
                    number,
                    optimizers,
                    lambda index: losses.append(index),
                    distill,
                    student.resting,
                )
            )
    return student, losses, trainer


def test_loop_is_speechbrains_and_leaves_no_trace():
    brain = make_brain({"test_only": True, "optimizer_step_limit": 1})
    before = fingerprint_modules(dict(brain.modules.items()))
    attributes = vars(brain).copy()
    noise = torch.random.get_rng_state()
    rows = make_rows()
    torch.random.set_rng_state(noise)
    student, losses, trainer = fit(brain, rows, 6)
    assert torch.equal(torch.random.get_rng_state(), noise)
    assert vars(brain) == attributes
    assert len(trainer) == 6
    assert losses[:6] == [0, 1, 2, 3, 4, 5]
    assert losses[-1] < 0.6 * losses[6]
    assert fingerprint_modules(dict(brain.modules.items())) == before
    frozen = brain.modules["first"]
    assert frozen.freeze is True
    assert not frozen.linear.weight.requires_grad
    assert brain.modules["last"].weight.requires_grad
    # Both layers and the normalization were trained, not its statistics.
    _, tensors = student.result()
    assert set(tensors.floats) == {"norm.weight", "norm.bias"}
    assert all(
        not torch.equal(layer.weight, layer.module.weight)
        for layer in student.layers.values()
    )
    assert set(brain.calls) == {
        ("forward", sb.Stage.TRAIN),
        ("objectives", sb.Stage.TRAIN),
    }


def test_epochs_do_not_depend_on_what_was_before():
    rows = make_rows()
    one, _, _ = fit(make_brain(), rows)
    torch.rand(9)
    two, _, _ = fit(make_brain(), rows)
    assert one.result()[1].digest() == two.result()[1].digest()


def test_random_numbers_of_the_gpu_in_use(monkeypatch):
    """Not those of all GPUs of the machine."""
    asked = []

    def fork(devices=None, **_):
        asked.append(devices)
        return nullcontext()

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for used in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda x=used: x)
        with reproducible(None):
            pass
    assert asked == [[], [3]]


def test_brains_options_hold():
    """Clipping and accumulation of gradients, as SpeechBrain does them."""
    rows = make_rows()
    free, _, _ = fit(make_brain(), rows, 1)
    clipped, _, _ = fit(make_brain({"max_grad_norm": 1e-9}), rows, 1)
    # Adam's steps do not shrink with the gradients until its epsilon counts.
    moved = [
        (s.layers["last"].weight - s.layers["last"].module.weight).abs().max()
        for s in (free, clipped)
    ]
    assert moved[1] < 0.2 * moved[0]
    brain = make_brain({"grad_accumulation_factor": 100})
    still, _, _ = fit(brain, rows, 1)
    assert torch.equal(
        still.layers["last"].weight, still.layers["last"].module.weight
    )
    with pytest.raises(ValueError, match="not finite"):
        brain = make_brain({"nonfinite_patience": 0})
        brain.compute_objectives = lambda out, *_: out.sum() * math.nan
        fit(brain, rows, 1)
    assert brain.modules["last"].weight.requires_grad


def test_loader_of_the_recipe_is_used():
    rows = make_rows()
    loader = DataLoader(rows, batch_size=12, collate_fn=Batch)
    _, losses, trainer = fit(make_brain(), loader, 1)
    assert len(trainer) == 2 and losses[:2] == [0, 1] and len(losses) == 3
    assert trainer.ids == [str(index) for index in range(24)]


@pytest.mark.parametrize("distill", [0.5, 1.0])
def test_distillation(distill):
    brain = make_brain()
    _, losses, _ = fit(brain, make_rows(), 6, 0.02, distill)
    assert losses[-1] < 0.7 * losses[6]
    forwards = brain.calls.count(("forward", sb.Stage.TRAIN))
    assert forwards == 2 * 6 * 6  # teacher and student
    learned = brain.calls.count(("objectives", sb.Stage.TRAIN))
    assert learned == (0 if distill == 1 else 6 * 6)


def test_divergence_of_real_frames():
    one = torch.randn(2, 5, 3).log_softmax(-1)
    two = torch.randn(2, 5, 3).log_softmax(-1)
    lengths = torch.tensor([1.0, 0.6])
    real = [(0, t) for t in range(5)] + [(1, t) for t in range(3)]
    expected = sum(
        (one[i, t].exp() * (one[i, t] - two[i, t])).sum() for i, t in real
    )
    found = divergence(one, two, lengths)
    assert torch.allclose(found, expected / 8, atol=1e-6)
    doubled = divergence(one.repeat(2, 1, 1), two.repeat(2, 1, 1), lengths)
    assert torch.allclose(doubled, found, atol=1e-6)


# -- in the life of a Brain ----------------------------------------------------


def attach(tiny_modules, tmp_path, **block):
    brain = sb.Brain(
        dict(tiny_modules.items()), hparams={"output_folder": str(tmp_path)}
    )
    return brain, StableQuant.attach(brain, method="qat", **block)


@pytest.mark.parametrize("train_set", [None, []])
def test_no_training_set_is_refused(make_tiny_modules, tmp_path, train_set):
    modules = make_tiny_modules("wav2vec2-large")
    brain, _ = attach(modules, tmp_path)
    with pytest.raises(ConfigError, match="training set is empty") as error:
        brain.fit([], train_set)
    assert "\n" not in str(error.value)


def test_no_training_set_for_a_variant(make_tiny_modules, tmp_path):
    modules = make_tiny_modules("wav2vec2-large")
    brain = sb.Brain(
        dict(modules.items()), hparams={"output_folder": str(tmp_path)}
    )
    variants = [{"name": "a"}, {"name": "b", "method": "qat"}]
    StableQuant.attach(brain, method="mse", variants=variants)
    with pytest.raises(ConfigError, match="training set is empty"):
        brain.fit([], [])


def test_history_is_json(make_tiny_modules, sets, tmp_path):
    modules = make_tiny_modules("wav2vec2-large")
    train(modules, sets, tmp_path, settings(1, 1e-3))
    (path,) = tmp_path.iterdir()
    raw = json.loads(metadata_of(path.read_bytes())["content"])
    assert [set(entry) for entry in raw["history"]] == 2 * [
        {"epoch", "loss", "wer", "errors", "valid_loss"}
    ]


def test_learning_rates_fall_along_half_a_cosine():
    training = settings(2, 1.0, 0.5)
    parameter = nn.Parameter(torch.zeros(1))
    names = ("weights", "scales")
    optimizers = {name: torch.optim.Adam([parameter]) for name in names}
    found = []
    for progress in (0.0, 0.5, 1.0):
        loop.set_rates(training, optimizers, progress)
        found.append([optimizers[name].param_groups[0]["lr"] for name in names])
    assert found == [
        [1.0, 0.5],
        [pytest.approx(0.5), pytest.approx(0.25)],
        [0.0, 0.0],
    ]
