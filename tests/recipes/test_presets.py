"""Each preset is a valid block of the method that it is named after."""

from pathlib import Path

import pytest
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import TaggedScalar

from speechbrain_stablequant import QuantizeConfig
from speechbrain_stablequant.brain.block import read_block, variant_configs
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


@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (6, 6)])
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_precision_of_a_preset(path, bits, tmp_path):
    copy = tmp_path / path.name
    text = path.read_text(encoding="utf-8")
    for key, value in zip(("weight", "activation"), bits, strict=True):
        text = text.replace(f"{key}_bits: 8", f"{key}_bits: {value}")
    copy.write_text(text, encoding="utf-8")
    config = load(copy)["quantize"]
    assert (config.weight_bits, config.activation_bits) == bits


@pytest.mark.parametrize("path", PRESETS[:1], ids=lambda path: path.stem)
def test_preset_with_a_wrong_key_is_refused(path, tmp_path):
    copy = tmp_path / path.name
    text = path.read_text(encoding="utf-8")
    copy.write_text(text.rstrip() + "\n    weigth_bits: 8\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"quantize\.weigth_bits"):
        load(copy)


# -- blocks of the recipe's studies --------------------------------------------

STUDIES = ("compare", "compare_nncf", "study", "study_parts")


def plain(node):
    """A YAML node without its references."""
    if isinstance(node, dict):
        items = {key: plain(value) for key, value in node.items()}
        return {k: v for k, v in items.items() if v is not REFERENCE}
    if isinstance(node, list):
        return [plain(value) for value in node]
    return REFERENCE if isinstance(node, TaggedScalar) else node


REFERENCE = object()


@pytest.mark.parametrize("name", STUDIES)
def test_study(name):
    path = ROOT / f"recipes/LibriSpeech/ASR/CTC/hparams/{name}.yaml"
    with open(path, encoding="utf-8") as stream:
        block = plain(YAML().load(stream)["quantize"])
    configs = variant_configs(read_block(block))
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
