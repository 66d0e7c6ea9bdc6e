"""Tests of speechbrain_stablequant.core.plan."""

import json
from dataclasses import replace

import pytest

from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan import (
    LayerPlan,
    QuantizationPlan,
    UnitPlan,
)
from speechbrain_stablequant.model.layer import Layer


def make_plan():
    """A plan with everything that a plan can hold."""
    return QuantizationPlan(
        method="stablequant",
        weight_bits=8,
        activation_bits=6,
        fingerprint="f" * 32,
        settings={"target": ["enc"], "search": {"threshold": 0.25}},
        search={"baseline_wer": 1 / 3, "evaluations": 12},
        units=[
            UnitPlan(
                "conv.0",
                wer=10 / 3,
                delta_wer=-1e-17,
                selected=True,
                cutoff=99.999,
                curve=[
                    {
                        "cutoff": 100.0,
                        "wer": 0.1 + 0.2,
                        "secondary": None,
                        "complete": False,
                    }
                ],
            ),
            UnitPlan("head"),
        ],
        layers=[
            LayerPlan(
                name="enc.0",
                unit="conv.0",
                kind="conv1d",
                quant=LayerQuant(8, 6, 5e-324, "mse"),
                observed_max=3.4028234663852886e38,
                cutoff=99.999,
                reason='because ‖x‖ \\ "it" is\nso',
                beyond=1e-7,
            ),
            LayerPlan(
                name="enc.w",
                unit="head",
                kind="linear",
                quant=None,
                observed_max=0.0,
                cutoff=100.0,
                reason="excluded",
            ),
        ],
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "plan.json"


def test_round_trip(path):
    plan = make_plan()
    plan.save(path)
    loaded = QuantizationPlan.load(path)
    assert loaded == plan
    assert isinstance(loaded.layers[0].quant, LayerQuant)
    assert isinstance(loaded.units[0], UnitPlan)
    again = path.with_name("again.json")
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_round_trip_of_an_empty_plan(path):
    plan = QuantizationPlan("max", 2, 3, "", {}, {}, [], [])
    plan.save(path)
    assert QuantizationPlan.load(str(path)) == plan


def test_quants_are_the_quantized_layers():
    plan = make_plan()
    assert plan.quants() == {"enc.0": plan.layers[0].quant}


def test_nothing_is_written_that_json_cannot_hold(path):
    plan = make_plan()
    layer = replace(plan.layers[0], observed_max=float("nan"))
    with pytest.raises(ValueError, match="cannot be JSON"):
        replace(plan, layers=[layer]).save(path)
    assert not path.exists()


# -- errors --------------------------------------------------------------------


def load_error(path) -> str:
    with pytest.raises(ValueError) as error:
        QuantizationPlan.load(path)
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_missing_file(path):
    text = load_error(path)
    assert text.startswith("cannot read the quantization plan ")
    assert "no such file" in text


def test_folder(tmp_path):
    assert "cannot read the quantization plan " in load_error(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"{'a': 1}"])
def test_not_json(path, content):
    path.write_bytes(content)
    assert load_error(path).startswith("cannot read the quantization plan ")


def test_truncated(path):
    make_plan().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "not valid JSON" in load_error(path)


@pytest.mark.parametrize(
    "content", [[], 1, None, "plan", {}, {"format": 2}, {"units": []}]
)
def test_foreign_json(path, content):
    path.write_text(json.dumps(content))
    text = load_error(path)
    assert f"{path}: not a quantization plan of format 1" in text
    assert "give the plan.json of a finished run" in text


def edited(path, edit):
    """A saved plan with a change."""
    make_plan().save(path)
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw.pop("method"),
        lambda raw: raw.pop("layers"),
        lambda raw: raw.pop("units"),
        lambda raw: raw.update(surprise=1),
        lambda raw: raw.update(layers=5),
        lambda raw: raw.update(layers={"a": 1}),
        lambda raw: raw["layers"][0].pop("quant"),
        lambda raw: raw["layers"][0].pop("cutoff"),
        lambda raw: raw["layers"][0].update(bits=8),
        lambda raw: raw["layers"][0].update(quant=8),
        lambda raw: raw["layers"][0]["quant"].pop("activation_amax"),
        lambda raw: raw["units"][0].pop("name"),
        lambda raw: raw["units"][0].update(surprise=1),
        lambda raw: raw["units"].append(None),
        lambda raw: raw["units"].append(raw["units"][0]),
        lambda raw: raw["layers"].append(raw["layers"][0]),
        lambda raw: raw["layers"][0].update(name="a\nb"),
        lambda raw: raw["layers"][0].update(name="x" * 1000),
        lambda raw: raw["layers"][0].update(kind="lstm"),
        lambda raw: raw["layers"][0].update(cutoff=0),
        lambda raw: raw["layers"][0].update(cutoff=True),
        lambda raw: raw["layers"][0].update(observed_max=-1),
        lambda raw: raw["units"][0].update(curve=[[]]),
        lambda raw: raw["units"][0].update(curve=[{"cutoff": "all"}]),
        lambda raw: raw["units"][0].update(delta_wer_ci=[1.0]),
        lambda raw: raw.update(settings=[]),
        lambda raw: raw.update(weight_bits=None),
        lambda raw: raw.update(tensors=[]),
        lambda raw: raw.update(tensors={"file": 5, "sha256": "0"}),
        lambda raw: raw.update(tensors={"file": "../a", "sha256": "0"}),
        lambda raw: raw.update(tensors={"file": "a\n", "sha256": "0"}),
    ],
)
def test_damaged_plan(path, edit):
    text = load_error(edited(path, edit))
    assert text.startswith(f"{path}: damaged plan (")


@pytest.mark.parametrize(
    "values",
    [
        {"weight_bits": "8"},
        {"weight_bits": 16},
        {"activation_bits": 1},
        {"activation_amax": "1.0"},
        {"activation_amax": None},
        {"activation_amax": -1.0},
        {"activation_amax": 1e39},
        {"activation_amax": 10**400},
        {"activation_offset": [1]},
        {"weight_bits": 8.0},
        {"weight_method": "median"},
    ],
)
def test_impossible_values(path, values):
    """A plan is a file that a user may edit."""

    def edit(raw):
        raw["layers"][0]["quant"].update(values)

    load_error(edited(path, edit))


def test_empty_quant_is_not_a_quantized_layer(path):
    load_error(edited(path, lambda raw: raw["layers"][0].update(quant={})))


# -- is it about this model? ---------------------------------------------------

KINDS = {"enc.0": "conv1d", "enc.w": "linear"}


def check_fits(kinds):
    layers = [Layer(name, None, kind, "u") for name, kind in kinds.items()]
    make_plan().check_fits(layers, {}, "old/plan.json")


def test_matches():
    check_fits(KINDS)


@pytest.mark.parametrize(
    "kinds, name, where",
    [
        ({"enc.w": "linear"}, "enc.0", "the model"),
        ({"enc.0": "conv1d"}, "enc.w", "the model"),
        ({**KINDS, "enc.x": "linear"}, "enc.x", "the plan"),
        ({**KINDS, "enc.w": "conv1d"}, "enc.w", "the model"),
        ({}, "enc.0", "the model"),
    ],
)
def test_mismatch_names_the_layer(kinds, name, where):
    with pytest.raises(ValueError) as error:
        check_fits(kinds)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(
        f"quantize.plan: old/plan.json: layer '{name}' is not in {where} "
    )
