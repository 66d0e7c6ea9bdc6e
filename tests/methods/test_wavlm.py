"""WavLM's attention reads the normalized stream twice, unlike HuBERT's."""

import pytest
import torch
from torch import nn
from transformers import WavLMConfig, WavLMModel

from speechbrain_stablequant.core.encoder_spec import check_encoders
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.methods.plus.quarot import can_rotate
from speechbrain_stablequant.methods.plus.smoothquant import (
    equalized,
    find_sites,
)
from speechbrain_stablequant.model.encoders import find_encoders
from speechbrain_stablequant.model.layers import find_layers, group_units
from speechbrain_stablequant.simulation.fake_quant import Simulator


@pytest.fixture
def modules():
    torch.manual_seed(0)
    config = WavLMConfig(
        conv_dim=(8,) * 7,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )
    return {"wav2vec2": nn.ModuleDict({"model": WavLMModel(config).eval()})}


def outputs(modules):
    torch.manual_seed(1)
    with torch.no_grad():
        x = torch.randn(2, 4000)
        return modules["wav2vec2"]["model"](x).last_hidden_state


def test_blocks_hold_the_projections(modules):
    units = group_units(find_layers(modules, ["wav2vec2"]))
    names = [layer.name.rpartition(".")[2] for layer in units["block.1"]]
    assert set(names) >= {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_every_projection_is_simulated(modules):
    layers = find_layers(modules, ["wav2vec2"])
    expected = outputs(modules)
    for layer in layers:
        with Simulator(layers).apply({layer.name: LayerQuant(2, 2, 0.5)}):
            changed = outputs(modules)
        assert not torch.equal(changed, expected), layer.name


def test_equalization_changes_nothing(modules):
    """The gate of the position bias reads what query, key and value read."""
    layers, encoders = (
        find_layers(modules, ["wav2vec2"]),
        find_encoders(modules),
    )
    sites = find_sites(encoders, layers)
    assert sites
    expected = outputs(modules)
    by_site = {
        site: torch.linspace(0.5, 2, site.consumers[0].module.in_features)
        for site in sites
    }
    with equalized(by_site):
        torch.testing.assert_close(
            outputs(modules), expected, atol=1e-4, rtol=1e-4
        )


def test_it_is_not_rotated(modules):
    (encoder,) = find_encoders(modules)
    assert not can_rotate(encoder)


def test_integer_runtimes_have_no_position_bias(modules):
    with pytest.raises(ValueError, match="WavLM's relative position"):
        check_encoders(modules)
