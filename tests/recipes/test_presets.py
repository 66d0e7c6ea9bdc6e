"""Each preset is a valid block, and says what its name says."""

from pathlib import Path

import pytest
from hyperpyyaml import load_hyperpyyaml

from speechbrain_stablequant import QuantizeConfig

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "hparams").glob("*.yaml"))


def load(path: Path) -> dict:
    """The values of a YAML file."""
    with open(path, encoding="utf-8") as stream:
        return load_hyperpyyaml(stream)


def test_there_are_presets():
    names = [path.stem for path in PRESETS]
    for name in ("w8a8_stablequant", "w6a6_stablequant", "w8a8_max"):
        assert name in names


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset(path):
    values = load(path)
    assert list(values) == ["quantize"]
    config = values["quantize"]
    assert isinstance(config, QuantizeConfig)
    bits, _, method = path.stem.partition("_")
    assert f"w{config.weight_bits}a{config.activation_bits}" == bits
    assert config.method == method
    assert config.target == ("wav2vec2", "enc", "ctc_lin")


@pytest.mark.parametrize("path", PRESETS[:1], ids=lambda path: path.stem)
def test_preset_with_a_wrong_key_is_refused(path, tmp_path):
    copy = tmp_path / path.name
    text = path.read_text(encoding="utf-8")
    copy.write_text(text.rstrip() + "\n    weigth_bits: 8\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"quantize\.weigth_bits"):
        load(copy)
