"""Each preset is a valid block of the method that it is named after."""

from dataclasses import replace
from pathlib import Path

import pytest
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import TaggedScalar

from speechbrain_stablequant import QuantizeConfig
from speechbrain_stablequant.brain.block import read_block, variant_configs
from speechbrain_stablequant.config import ConfigError
from speechbrain_stablequant.methods.plus.bits import HARMS
from speechbrain_stablequant.methods.registry import METHODS

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "hparams").glob("*.yaml"))


def load(path: Path) -> dict:
    """The values of a YAML file."""
    with open(path, encoding="utf-8") as stream:
        return load_hyperpyyaml(stream)


def test_each_method_has_a_preset():
    names = [path.stem for path in PRESETS]
    assert sorted(names) == sorted([*METHODS, "stablequant_plus_mixed"])


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset(path):
    values = load(path)
    assert list(values) == ["quantize"]
    config = values["quantize"]
    assert isinstance(config, QuantizeConfig)
    method = path.stem.removesuffix("_mixed")
    assert config.method == method
    assert (config.plus.budget.size is not None) == (method != path.stem)
    assert (config.weight_bits, config.activation_bits) == (8, 8)
    assert config.target == ("wav2vec2", "enc", "ctc_lin")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_precision_of_a_preset(path, tmp_path):
    """The keys are there to be changed."""
    copy = tmp_path / path.name
    text = path.read_text(encoding="utf-8")
    text = text.replace("weight_bits: 8", "weight_bits: 4")
    text = text.replace("activation_bits: 8", "activation_bits: 6")
    copy.write_text(text, encoding="utf-8")
    config = load(copy)["quantize"]
    assert (config.weight_bits, config.activation_bits) == (4, 6)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_as_a_key(path):
    """In the block and in its variants; the block's own keys come first."""
    block = {"target": ["model"], "preset": path.stem, "weight_bits": 4}
    block["variants"] = [{"name": "more", "preset": "qat", "weight_bits": 6}]
    found = variant_configs(read_block(block))["more"]
    assert (found.method, found.weight_bits) == ("qat", 6)
    whole = load(path)["quantize"]
    del block["variants"]
    found = read_block(block)
    assert found == replace(whole, target=("model",), weight_bits=4)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"preset": "fast"},
            "preset: 'fast' is not one of adaround,",
        ),
        ({"preset": "mse", "method": "max"}, "preset: mse is of method mse"),
    ],
)
def test_wrong_preset(block, message):
    with pytest.raises(ConfigError, match=message):
        read_block(block)


def test_preset_with_a_wrong_key_is_refused(tmp_path):
    copy = tmp_path / "preset.yaml"
    text = PRESETS[0].read_text(encoding="utf-8")
    copy.write_text(text.rstrip() + "\n    weigth_bits: 8\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"quantize\.weigth_bits"):
        load(copy)


# -- blocks of the recipe ------------------------------------------------------

RECIPE = ROOT / "recipes/LibriSpeech/ASR/CTC/hparams"
REFERENCE = object()


def plain(node):
    """A YAML node without its references."""
    if isinstance(node, dict):
        items = {key: plain(value) for key, value in node.items()}
        return {k: v for k, v in items.items() if v is not REFERENCE}
    if isinstance(node, list):
        return [plain(value) for value in node]
    return REFERENCE if isinstance(node, TaggedScalar) else node


def block_of(name):
    """The configs of a YAML file of the recipe by variant."""
    with open(RECIPE / f"{name}.yaml", encoding="utf-8") as stream:
        values = YAML().load(stream)
    return variant_configs(read_block(plain(values["quantize"])))


@pytest.mark.parametrize(
    "name", ["quant", "quant_hubert_large", "quant_wav2vec2_large", "qat"]
)
def test_block(name):
    (config,) = block_of(name).values()
    assert config.method == ("qat" if name == "qat" else "stablequant")


@pytest.mark.parametrize(
    "name", ["compare", "compare_nncf", "study", "study_parts"]
)
def test_study(name):
    configs = block_of(name)
    for variant, config in configs.items():
        bits = f"w{config.weight_bits}a{config.activation_bits}"
        first, _, method = variant.partition("-")
        if first == bits:
            method = method.partition("-")[0]
            names = {"plus": "stablequant_plus"}
            assert config.method == names.get(method, method)
        else:
            assert config.method == "stablequant_plus"
    if name == "study_parts":
        switches = [config.plus for config in configs.values()]
        assert len(set(switches)) == len(switches)


def test_block_of_another_score(monkeypatch):
    """Only compare_modelopt.py has it."""
    with pytest.raises(ConfigError, match="'modelopt' is not one of"):
        block_of("compare_modelopt")
    monkeypatch.setitem(HARMS, "modelopt", None)
    found = block_of("compare_modelopt").items()
    assert all(name == config.plus.budget.scores for name, config in found)
