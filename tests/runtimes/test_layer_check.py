"""Layers of a CPU runtime against exact arithmetic: what is right passes,
what is wrong is found, and is computed another way in the same runtime."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Wav2Vec2Model

from speechbrain_stablequant.core.affine import qmax
from speechbrain_stablequant.core.encoder_spec import describe_encoder
from speechbrain_stablequant.core.integer_layer import IntegerLayer
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.runtimes import cpu, layer_check
from speechbrain_stablequant.runtimes.algorithms import join_groups
from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.runtimes.cpu import (
    CpuClass,
    cpu_class,
    executed_integers,
)
from speechbrain_stablequant.runtimes.geometry import (
    FLOAT,
    JOINED_GROUPS,
    NATIVE,
    Geometry,
)
from speechbrain_stablequant.runtimes.layer_check import (
    UnusableRuntime,
    encoder_geometries,
    exact_algorithm,
    find_algorithms,
    with_algorithms,
)
from speechbrain_stablequant.runtimes.reference import (
    ReferenceExecutor,
    apply_layer,
)
from speechbrain_stablequant.runtimes.registry import RUNTIMES, load_function
from speechbrain_stablequant.runtimes.torch_int8 import linear as torch_linear
from speechbrain_stablequant.runtimes.trial_layer import (
    Results,
    difference,
    expected_results,
    make_trial,
)

DEMO = (
    Path(__file__).resolve().parents[2]
    / "recipes/LibriSpeech/ASR/CTC/demo/checkpoint"
)
BACKENDS = [name for name, row in RUNTIMES.items() if row.layer_runner]

#: Widest weights that this CPU executes.
WIDE = 8 if cpu_class().exact else 7


def runner_of(backend: str, **options):
    for package in RUNTIMES[backend].needs:
        pytest.importorskip(package, reason="needs an extra")
    return load_function(RUNTIMES[backend].layer_runner)(**options)


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """Each runtime of a CPU that is installed, in turn."""
    runner_of(request.param)
    return request.param


@pytest.fixture
def empty_memory(monkeypatch, tmp_path) -> Path:
    """Nothing is remembered of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    layer_check._say_once.cache_clear()
    return tmp_path / "own" / "speechbrain_stablequant" / "cpu"


def make_geometry(place, shape, then="", bits=(WIDE, 8), **other) -> Geometry:
    weight_bits, activation_bits = bits
    return Geometry(
        place,
        then,
        shape,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        **other,
    )


KINDS = {
    "first": make_geometry("first", (24, 1, 10), stride=5),
    "first with gelu": make_geometry(
        "first", (24, 1, 10), "gelu", stride=5, bias=False
    ),
    "front": make_geometry("front", (24, 16, 3), stride=2),
    "front with gelu": make_geometry(
        "front", (24, 16, 2), "gelu", stride=2, offset=True
    ),
    "position": make_geometry("position", (32, 4, 16), padding=8, groups=8),
    "linear": make_geometry("linear", (40, 24)),
    "shared": make_geometry("linear", (32, 32), "shared"),
    "gelu": make_geometry("linear", (64, 32), "gelu"),
    "sum": make_geometry("linear", (32, 64), "sum", offset=True),
}


def ways(runner, one: Geometry) -> list[str | None]:
    """What is wrong with each way of a runtime, None for nothing."""
    half = runner.half(one)
    trial = make_trial(one, half)
    expected = expected_results(one, trial, half)
    found = []
    for algorithm in runner.algorithms(one):
        layer = replace(trial.layer, algorithm=algorithm)
        results = runner.run(one, trial._replace(layer=layer))
        found.append(difference(results, expected))
    return found


@pytest.mark.parametrize("bits", [(WIDE, 8), (6, 6), (4, 8), (4, 4), (0, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_is_exact(backend, kind, bits):
    """No false alarm, and each other way is one."""
    one = replace(KINDS[kind], weight_bits=bits[0], activation_bits=bits[1])
    if not bits[0]:
        one = replace(one, offset=False)
    found = ways(runner_of(backend), one)
    assert found == [None] * len(found)


def test_every_way_of_a_head_is_exact():
    runner = runner_of("torch_int8")
    for one in (
        make_geometry("head", (12, 30)),
        make_geometry("head", (24, 16, 5), stride=2, padding=3),
        make_geometry("head", (24, 4, 5), padding=2, groups=4),
        make_geometry("head", (24, 4, 3), padding=2, dilation=2, groups=4),
        make_geometry("head", (24, 16, 3), dilation=2),
    ):
        found = ways(runner, one)
        assert found == [None] * len(found)


def test_every_way_is_exact_in_bfloat16():
    runner = runner_of("openvino", precision="bf16")
    for one in KINDS.values():
        for bits in ((WIDE, 8), (0, 0)):
            one = replace(
                one,
                weight_bits=bits[0],
                activation_bits=bits[1],
                offset=one.offset and bits[0] > 0,
            )
            assert runner.half(one)
            found = ways(runner, one)
            assert found == [None] * len(found)


#: Of HuBERT-Large and wav2vec2-Base.
LARGE = [
    make_geometry("first", (512, 1, 10), stride=5),
    make_geometry("first", (512, 1, 10), "gelu", stride=5, bias=False),
    make_geometry("front", (512, 512, 3), stride=2),
    make_geometry("front", (512, 512, 2), "gelu", stride=2, offset=True),
    make_geometry("position", (1024, 64, 128), padding=64, groups=16),
    make_geometry("position", (768, 48, 128), padding=64, groups=16),
    make_geometry("linear", (1024, 1024), "shared"),
    make_geometry("linear", (4096, 1024), "gelu"),
    make_geometry("linear", (1024, 4096), "sum", offset=True),
]


@pytest.mark.parametrize("one", LARGE, ids=str)
def test_geometries_of_real_models(backend, one):
    first = preferred(backend, one)
    assert exact_algorithm(one, runner_of(backend)) == (first, "", False)


def test_reference_of_the_check_is_that_of_the_package():
    """Exact results of a trial, by the arithmetic that defines a layer."""
    for one in KINDS.values():
        one = replace(one, then="")
        trial = make_trial(one)
        for x, expected in zip(
            trial.inputs, expected_results(one, trial, False), strict=True
        ):
            if one.is_conv:
                x = x.transpose(1, 2)
            out = apply_layer(trial.layer, x)
            out = out.transpose(1, 2) if one.is_conv else out
            found = out[0, expected.rows].double()
            assert (found - expected.values).abs().max() < 1e-4


def test_joined_groups_are_the_same_convolution():
    trial = make_trial(KINDS["position"])
    joined = join_groups(trial.layer)
    assert joined.groups == 1 and joined.weight.shape[1] == 32
    x = trial.inputs[0].transpose(1, 2)
    same = torch.equal(apply_layer(joined, x), apply_layer(trial.layer, x))
    assert same


# -- faults ----------------------------------------------------------------


def saturated(weight: torch.Tensor) -> torch.Tensor:
    """As if sums of two products did not fit: the largest are cut."""
    return weight.clamp(max=int(weight.max()) - 8)


def swapped(weight: torch.Tensor) -> torch.Tensor:
    """Two rows in each other's place."""
    order = torch.arange(len(weight))
    order[-1], order[-2] = len(weight) - 2, len(weight) - 1
    return weight[order]


def shifted(weight: torch.Tensor) -> torch.Tensor:
    """The window of a wrong kernel, or its inputs, by one place."""
    return weight.roll(1, -1 if weight.shape[-1] > 1 else 1)


#: By name: what becomes of the integers and of the scale in packing.
FAULTS = {
    "scale": (lambda weight: weight, 2.0),
    "swapped rows": (swapped, 1.0),
    "shifted": (shifted, 1.0),
    "saturated": (saturated, 1.0),
    "nothing computed": (torch.zeros_like, 1.0),
}


def preferred(backend: str, one: Geometry) -> str:
    """The algorithm that a runtime tries first here."""
    return runner_of(backend).algorithms(one)[0]


def break_algorithm(
    monkeypatch, backend, fault, algorithm=NATIVE, wrong=lambda shape: True
):
    """A runtime packs the weights of some layers wrongly, but only those that
    it computes by an algorithm.

    Arguments
    ---------
    wrong : callable
        Whether the weights of a layer [out, ...] are, by their shape.
    """
    damage, factor = FAULTS[fault]

    def damaged(layer: IntegerLayer) -> IntegerLayer:
        shape = tuple(layer.weight.shape)
        if layer.algorithm != algorithm or not wrong(shape):
            return layer
        return replace(
            layer,
            weight=damage(layer.weight).contiguous(),
            weight_scale=layer.weight_scale * factor,
        )

    if backend == "openvino":
        from speechbrain_stablequant.runtimes.openvino_.graph import (
            GraphBuilder,
        )

        weight = GraphBuilder.weight
        monkeypatch.setattr(
            GraphBuilder,
            "weight",
            staticmethod(lambda x, *a: weight(damaged(x), *a)),
        )
    elif backend == "torch_int8":
        # The layer's name for rows that several products share.
        init = torch_linear.IntegerLinear.__init__

        def pack(self, rows):
            if wrong(tuple(rows.weight.shape)):
                rows = replace(
                    rows,
                    weight=damage(rows.weight).contiguous(),
                    scale=rows.scale * factor,
                )
            init(self, rows)

        monkeypatch.setattr(torch_linear.IntegerLinear, "__init__", pack)
    else:
        from speechbrain_stablequant.runtimes.onnx_.graph import Graph

        stored = Graph.weight

        def weight(self, layer, weight, axis):
            broken = layer.algorithm == algorithm
            if broken and wrong(tuple(layer.weight.shape)):
                scale = layer.weight_scale * factor
                layer = replace(layer, weight_scale=scale)
                weight = damage(weight.movedim(axis, 0)).movedim(0, axis)
            return stored(self, layer, weight, axis)

        monkeypatch.setattr(Graph, "weight", weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_found(backend, kind, fault, monkeypatch):
    first = preferred(backend, KINDS[kind])
    break_algorithm(monkeypatch, backend, fault, first)
    algorithm, reason, _ = exact_algorithm(KINDS[kind], runner_of(backend))
    assert algorithm not in (None, first)
    rows = 49 if kind == "position" else 50
    assert reason.startswith(f"the result of {rows} rows is off by ")


def test_results_that_are_no_numbers():
    one = KINDS["linear"]
    trial = make_trial(one)
    expected = expected_results(one, trial, False)
    right = [apply_layer(trial.layer, x) for x in trial.inputs]
    assert difference(Results(right), expected) is None
    right[1][0, 499, 3] = float("nan")
    assert "500 rows is off by nan" in difference(Results(right), expected)
    found = difference(Results([x[:, :40] for x in right]), expected)
    assert found == "has shape [1, 40, 40]"


def test_an_input_that_is_cut_off_is_found():
    """Rounded down instead of to the nearest; not cut to the range."""
    one = KINDS["linear"]
    trial = make_trial(one)
    expected = expected_results(one, trial, False)
    layer, step = trial.layer, float(trial.layer.activation_scale)
    weight = layer.float_weight()
    limit = qmax(8)
    for grid in (
        lambda x: (x / step).floor().clamp(-limit, limit),
        lambda x: (x / step).round(),
        lambda x: (x / step).round().clamp(-limit - 1, limit),
    ):
        found = [grid(x) * step @ weight.T + layer.bias for x in trial.inputs]
        assert difference(Results(found), expected) is not None


# -- a model ---------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    """The encoder of the demo, quantized without a search."""
    model = Wav2Vec2Model.from_pretrained(DEMO).eval().float()
    layers = find_layers({"w": model}, ["w"])
    quant = LayerQuant(8, 8, 6.0)
    integers = {x.name: integer_layer(x, quant) for x in layers}
    executed = executed_integers(integers, cpu_class())
    spec = describe_encoder(model, "w", executed)
    wavs = torch.randn(2, 12000, generator=torch.Generator().manual_seed(3))
    return {
        "model": model,
        "integers": integers,
        "spec": spec,
        "wavs": wavs,
        "expected": ReferenceExecutor(spec)(wavs),
    }


GEOMETRIES = [
    (96, 1, 10),
    (96, 96, 3),
    (96, 96, 2),
    (256, 96),
    (256, 16, 64),
    (256, 256),
    (1024, 256),
    (256, 1024),
]


def test_these_are_the_geometries_of_the_demo(demo):
    found = encoder_geometries(demo["spec"]).values()
    assert sorted({x.shape for x in found}) == sorted(GEOMETRIES)


def packed_shapes(shape, groups) -> set[tuple[int, ...]]:
    """The shapes that the weights of a geometry have where they are packed."""
    outputs, *window = shape
    flat = (outputs // groups, math.prod(window))
    group = (outputs // groups, *window)
    return {shape, group, flat, (*flat, 1), (3 * outputs, flat[1])}


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_a_wrong_geometry_is_computed_another_way(
    backend, shape, demo, monkeypatch, empty_memory, caplog
):
    spec, model = demo["spec"], demo["model"]
    geometries = encoder_geometries(spec)
    groups = {x.shape: x.groups for x in geometries.values()}
    shapes = packed_shapes(shape, groups[shape])
    usual = {n: preferred(backend, x) for n, x in geometries.items()}
    (first,) = {usual[n] for n, x in geometries.items() if x.shape == shape}
    # Another scale would be no fault in front of a normalization.
    break_algorithm(
        monkeypatch, backend, "shifted", first, lambda s: s in shapes
    )
    found = with_algorithms(spec, runner_of(backend))
    changed = {x.name for x in found.layers() if x.algorithm != usual[x.name]}
    assert changed == {n for n, x in geometries.items() if x.shape == shape}
    lines = [x.message for x in caplog.records if "wrongly" in x.message]
    assert lines and all(backend in line for line in lines)
    integers = demo["integers"]
    (forward,) = build_forwards(backend, {"w": model}, integers).values()
    out = forward(demo["wavs"]).last_hidden_state
    assert error(out, demo["expected"]) < 0.03
    # Without the check the same runtime computes something else.
    monkeypatch.setattr(
        "speechbrain_stablequant.runtimes.build.with_algorithms",
        lambda spec, _: spec.with_layers(
            lambda x: replace(x, algorithm=usual[x.name])
        ),
    )
    (forward,) = build_forwards(backend, {"w": model}, integers).values()
    out = forward(demo["wavs"]).last_hidden_state
    assert error(out, demo["expected"]) > 0.03


def error(out, expected) -> float:
    """Relative error."""
    return float((out - expected).norm() / expected.norm())


def test_without_a_right_way(backend, monkeypatch, empty_memory):
    """One line that names the runtime, the layer and the difference; the next
    process tries again."""
    one = KINDS["gelu"]
    found = Results([torch.zeros(1, rows, 64) for rows in (50, 500)])
    runner = runner_of(backend)
    monkeypatch.setattr(type(runner), "run", lambda *_: found)
    for _ in range(2):
        with pytest.raises(UnusableRuntime) as raised:
            find_algorithms({"w.up": one}, runner)
        (line,) = str(raised.value).splitlines()
        assert line.startswith(f"backend: {backend} computes w.up wrongly on")
        assert "off by 1 of" in line and line.endswith("write backend: auto")
    monkeypatch.undo()
    assert find_algorithms({"w.up": one}, runner) == {"w.up": NATIVE}


def test_a_kernel_that_is_not_there(monkeypatch, empty_memory):
    """A build of torch without some operator."""

    def missing(*_):
        raise AttributeError("no attribute 'qlinear_prepack'\nmore")

    monkeypatch.setattr(torch_linear.IntegerLinear, "__init__", missing)
    runner = runner_of("torch_int8")
    reason = "it fails: no attribute 'qlinear_prepack' more"
    assert exact_algorithm(KINDS["linear"], runner) == (FLOAT, reason, True)


def test_autocast_around_the_first_call_changes_nothing():
    """It would round the products of a float layer to 8 bits of mantissa."""
    runner = runner_of("torch_int8")
    runner._dtype = torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = exact_algorithm(Geometry("linear", "", (64, 64)), runner)
    assert found == (NATIVE, "", False)


# -- what is remembered ----------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The geometries that are computed."""
    found = []

    def exact(one, runner):
        found.append(one)
        return exact_algorithm(one, runner)

    monkeypatch.setattr(layer_check, "exact_algorithm", exact)
    return found


def test_a_machine_is_asked_once(asked, empty_memory):
    runner = runner_of("torch_int8")
    layers = {f"w.{kind}": one for kind, one in KINDS.items()}
    layers["again"] = KINDS["linear"]
    for _ in range(2):
        found = find_algorithms(layers, runner)
        assert found == dict.fromkeys(layers, NATIVE)
    assert asked == list(KINDS.values())
    find_algorithms({"head": make_geometry("head", (8, 8))}, runner)
    assert len(asked) == len(KINDS) + 1
    find_algorithms(layers, runner)
    assert len(asked) == len(KINDS) + 1
    (file,) = empty_memory.iterdir()
    assert file.name.startswith("torch_int8-")


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41"),
        lambda patch: patch.setattr(cpu, "_flags", lambda: {"other"}),
        lambda patch: patch.setattr(layer_check, "_code_digest", lambda: "new"),
        lambda patch: patch.setattr(torch, "__version__", "99.0"),
    ],
    ids=["cap", "flags", "code", "library"],
)
def test_another_machine_is_asked_again(
    change, asked, empty_memory, monkeypatch
):
    layers = {"w": KINDS["linear"]}
    find_algorithms(layers, runner_of("torch_int8"))
    change(monkeypatch)
    for _ in range(2):
        find_algorithms(layers, runner_of("torch_int8"))
    assert len(asked) == 2


def test_another_way_is_said_by_each_process(
    asked, empty_memory, monkeypatch, caplog
):
    break_algorithm(monkeypatch, "torch_int8", "scale")
    layers = {"w": KINDS["linear"], "other": KINDS["linear"]}
    runner = runner_of("torch_int8")
    for _ in range(2):
        found = find_algorithms(layers, runner)
        assert found == dict.fromkeys(layers, FLOAT)
    assert len(asked) == len(caplog.messages) == 1
    layer_check._say_once.cache_clear()  # as in another process
    find_algorithms(layers, runner)
    assert len(asked) == 1
    first, second = caplog.messages
    assert first == second
    assert first.startswith("torch_int8 computes w wrongly on this CPU")
    assert first.endswith("this layer is computed as float instead")


def test_an_error_is_not_remembered(asked, empty_memory, monkeypatch):
    """Such as a lack of memory, which passes."""
    layers, runner = {"w": KINDS["linear"]}, runner_of("torch_int8")

    def fails(*_):
        raise RuntimeError("not enough memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch_linear.IntegerLinear, "__init__", fails)
        assert find_algorithms(layers, runner) == {"w": FLOAT}
    assert find_algorithms(layers, runner) == {"w": NATIVE}
    assert find_algorithms(layers, runner) == {"w": NATIVE}
    assert len(asked) == 2


def test_an_error_of_a_later_algorithm_is_not_remembered(asked, empty_memory):
    """Another time it may be the right one, and faster than the last."""

    class Runner:
        name, versions = "torch_int8", {}

        def half(self, geometry):
            return False

        def algorithms(self, geometry):
            return NATIVE, JOINED_GROUPS, FLOAT

        def run(self, geometry, trial):
            if trial.layer.algorithm == JOINED_GROUPS:
                raise RuntimeError("not enough memory")
            right = [apply_layer(trial.layer, x) for x in trial.inputs]
            if trial.layer.algorithm == NATIVE:
                return Results([2 * x for x in right])
            return Results(right)

    for _ in range(2):
        found = find_algorithms({"w": KINDS["linear"]}, Runner())
        assert found == {"w": FLOAT}
    assert len(asked) == 2


def test_a_home_that_cannot_be_written(asked, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    layers = {"w": KINDS["linear"]}
    for _ in range(2):
        find_algorithms(layers, runner_of("torch_int8"))
    find_algorithms({"v": KINDS["gelu"]}, runner_of("torch_int8"))
    # What is in memory is not computed again either.
    assert asked == [KINDS["linear"], KINDS["gelu"]]
    assert len(caplog.messages) == 1


# -- machines that are not this one ----------------------------------------


@pytest.fixture
def amx(monkeypatch):
    """A CPU with AMX, as far as its class says so."""
    kind = CpuClass("amx", True)
    for module in ("openvino_.layer_runner", "torch_int8.layer_runner"):
        name = f"speechbrain_stablequant.runtimes.{module}"
        module = pytest.importorskip(name)
        monkeypatch.setattr(module, "cpu_class", lambda: kind)


def test_narrow_groups_on_amx(amx):
    """They are not even tried natively."""
    narrow = make_geometry(
        "position", (256, 16, 64), padding=32, groups=16, bits=(8, 8)
    )
    wide = replace(narrow, shape=(1024, 64, 128), padding=64)
    left = replace(narrow, weight_bits=0, activation_bits=0)
    runner = runner_of("openvino", precision="f32")
    assert runner.algorithms(narrow)[0] == JOINED_GROUPS
    assert runner.algorithms(left)[0] == JOINED_GROUPS
    assert runner.algorithms(wide)[0] == NATIVE
    runner = runner_of("torch_int8")
    assert runner.algorithms(left)[0] == JOINED_GROUPS
    assert runner.algorithms(narrow)[0] == NATIVE
    assert NATIVE not in runner.algorithms(left)


def test_the_demo_on_amx(amx, demo, monkeypatch, empty_memory, caplog):
    """As it is computed there, by kernels of this CPU: in silence."""
    runner = runner_of("openvino", precision="f32")
    found = with_algorithms(demo["spec"], runner)
    changed = {x.name: x.algorithm for x in found.layers()}
    changed = {n: x for n, x in changed.items() if x != NATIVE}
    assert changed == {"w.encoder.pos_conv_embed.conv": JOINED_GROUPS}
    assert caplog.messages == []
    (forward,) = build_forwards(
        "openvino", {"w": demo["model"]}, demo["integers"], precision="f32"
    ).values()
    out = forward(demo["wavs"]).last_hidden_state
    assert error(out, demo["expected"]) < 0.03
