"""Tests of speechbrain_stablequant.model.layers."""

import pytest
import torch
from speechbrain.nnet.linear import Linear as SpeechBrainLinear
from torch import nn

from speechbrain_stablequant.model.encoders import find_encoders
from speechbrain_stablequant.model.layer import HEAD
from speechbrain_stablequant.model.layers import find_layers, group_units

TARGET = ["wav2vec2", "enc", "ctc_lin"]
MODEL = "wav2vec2.model"
CONVS = [f"{MODEL}.feature_extractor.conv_layers.{i}.conv" for i in range(7)]
PROJECTION = f"{MODEL}.feature_projection.projection"
POS_CONV = f"{MODEL}.encoder.pos_conv_embed.conv"
IN_BLOCK = {
    "attention.k_proj",
    "attention.v_proj",
    "attention.q_proj",
    "attention.out_proj",
    "feed_forward.intermediate_dense",
    "feed_forward.output_dense",
}
HEADS = ["enc.linear.w", "enc.linear_0.w", "ctc_lin.w"]
UNITS = [
    *(f"conv.{i}" for i in range(7)),
    "projection",
    "pos_conv",
    "block.0",
    "block.1",
    HEAD,
]


def message(error) -> str:
    """An error's text, which has to be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


# -- the four kinds of model ---------------------------------------------------


def test_layers_and_units(tiny_modules):
    layers = find_layers(tiny_modules, TARGET)
    names = [layer.name for layer in layers]
    blocks = names[9:21]
    assert names[:7] == CONVS
    assert names[7:9] == [PROJECTION, POS_CONV]
    for i in range(2):
        prefix = f"{MODEL}.encoder.layers.{i}."
        assert set(blocks[6 * i : 6 * i + 6]) == {prefix + n for n in IN_BLOCK}
    assert names[21:] == HEADS
    assert [layer.kind for layer in layers] == (
        ["conv1d"] * 7 + ["linear", "conv1d"] + ["linear"] * 15
    )
    units = group_units(layers)
    assert list(units) == UNITS
    assert [len(group) for group in units.values()] == [1] * 9 + [6, 6, 3]


def test_names_lead_to_the_modules(tiny_modules):
    for layer in find_layers(tiny_modules, TARGET):
        assert tiny_modules.get_submodule(layer.name) is layer.module
        assert layer.numel == layer.module.weight.numel()


def test_number_of_layers_follows_the_depth(make_tiny_modules):
    modules = make_tiny_modules("hubert-large", num_hidden_layers=5)
    assert len(find_layers(modules, ["wav2vec2"])) == 7 + 1 + 1 + 6 * 5


def test_ten_blocks_are_in_order(make_tiny_modules):
    """By number and not by text: block 10 comes after block 9."""
    modules = make_tiny_modules("wav2vec2-base", num_hidden_layers=11)
    units = list(group_units(find_layers(modules, TARGET)))
    assert units[-12:] == [*(f"block.{i}" for i in range(11)), HEAD]


def test_pos_conv_is_found_behind_its_weight_norm(tiny_modules):
    conv = tiny_modules.get_submodule(POS_CONV)
    assert type(conv) is not nn.Conv1d  # or this test shows nothing
    layers = {layer.name: layer for layer in find_layers(tiny_modules, TARGET)}
    layer = layers[POS_CONV]
    assert layer.module is conv
    assert (layer.kind, layer.unit) == ("conv1d", "pos_conv")
    assert not any("parametrizations" in name for name in layers)


def test_order_of_target_does_not_change_the_units(tiny_modules):
    layers = find_layers(tiny_modules, TARGET[::-1])
    assert list(group_units(layers)) == UNITS


def test_target_narrows(tiny_modules):
    assert [x.name for x in find_layers(tiny_modules, ["enc"])] == HEADS[:2]


def test_conv_geometry(tiny_modules):
    (encoder,) = find_encoders(tiny_modules)
    assert encoder.key == "wav2vec2"
    assert encoder.path == MODEL
    assert encoder.conv_geometry() == [
        (10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2),
    ]  # fmt: skip


def test_cuts_are_units_in_order(tiny_modules):
    (encoder,) = find_encoders(tiny_modules)
    assert [cut.unit for cut in encoder.cuts()] == UNITS[1:]


def test_all_hidden_states_leave_one_cut(tiny_modules):
    tiny_modules["wav2vec2"].output_all_hiddens = True
    (encoder,) = find_encoders(tiny_modules)
    (cut,) = encoder.cuts()
    assert cut.unit == HEAD
    assert cut.module is tiny_modules["wav2vec2"]


def test_two_encoders_keep_their_units_apart(make_tiny_modules):
    one = make_tiny_modules("wav2vec2-base")["wav2vec2"]
    two = make_tiny_modules("hubert-large")["wav2vec2"]
    layers = find_layers({"a": one, "b": two}, ["a", "b"])
    assert len(layers) == 2 * 21
    expected = [f"{key}.{unit}" for key in "ab" for unit in UNITS[:-1]]
    units = group_units(layers)
    assert set(units) == set(expected)
    for unit, group in units.items():
        assert {layer.name[0] for layer in group} == {unit[0]}


# -- patterns ------------------------------------------------------------------


def test_include(make_tiny_modules):
    modules = make_tiny_modules("hubert-base")
    layers = find_layers(modules, TARGET, include=["*.conv_layers.[12].*"])
    assert [layer.name for layer in layers] == CONVS[1:3]


def test_exclude_wins_over_include(make_tiny_modules):
    modules = make_tiny_modules("hubert-base")
    layers = find_layers(
        modules,
        TARGET,
        include=["*.conv_layers.*", "ctc_lin*"],
        exclude=["*.conv_layers.0.*", "*.conv_layers.6.conv"],
    )
    assert [layer.name for layer in layers] == [*CONVS[1:6], "ctc_lin.w"]


def test_patterns_mind_case(make_tiny_modules):
    modules = make_tiny_modules("hubert-base")
    with pytest.raises(ValueError, match=r"'CTC_LIN\*' matches no layer"):
        find_layers(modules, TARGET, exclude=["CTC_LIN*"])


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_pattern_without_a_match(make_tiny_modules, key):
    modules = make_tiny_modules("hubert-base")
    with pytest.raises(ValueError) as error:
        find_layers(modules, TARGET, **{key: ["*.w", "*.query"]})
    assert message(error) == (
        f"quantize.{key}: pattern '*.query' matches no layer; layers are "
        f"named like '{CONVS[0]}'"
    )


def test_everything_excluded(make_tiny_modules):
    modules = make_tiny_modules("hubert-base")
    with pytest.raises(ValueError) as error:
        find_layers(modules, TARGET, exclude=["*"])
    assert message(error).startswith("quantize.exclude: ['*'] leaves no layer")


def test_nothing_included(make_tiny_modules):
    modules = make_tiny_modules("hubert-base")
    with pytest.raises(ValueError) as error:
        find_layers(modules, TARGET, include=[])
    assert message(error).startswith("quantize.include: ")


def test_unknown_key(make_tiny_modules):
    modules = make_tiny_modules("hubert-base")
    with pytest.raises(ValueError) as error:
        find_layers(modules, ["wav2vec2", "dec"])
    assert message(error) == (
        "quantize.target: 'dec' is not a key of the recipe's `modules`; "
        "they are wav2vec2, enc, ctc_lin"
    )


def test_no_layers():
    with pytest.raises(ValueError) as error:
        find_layers({"enc": nn.Sequential(nn.ReLU())}, ["enc"])
    assert message(error).startswith(
        "quantize.target: no layer to quantize below ['enc']; "
    )


# -- what is refused -----------------------------------------------------------


def test_attention_can_be_excluded():
    attention = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict({"mha": attention, "out": nn.Linear(8, 3)})
    layers = find_layers({"enc": model}, ["enc"], exclude=["enc.mha.*"])
    assert [layer.name for layer in layers] == ["enc.out"]


class Scaled(nn.Linear):
    """A Linear that is not one."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_forward_of_its_own_is_refused():
    model = nn.ModuleDict({"a": Scaled(2, 2), "b": nn.Linear(2, 2)})
    with pytest.raises(ValueError) as error:
        find_layers({"enc": model}, ["enc"])
    text = message(error)
    assert text.startswith("enc.a: Scaled has a forward of its own")
    assert "quantize.exclude" in text
    layers = find_layers({"enc": model}, ["enc"], exclude=["enc.a"])
    assert [layer.name for layer in layers] == ["enc.b"]


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"padding_mode": "reflect"}]
)
def test_a_padding_without_integer_form_is_refused(options):
    """Before the search, and by name."""
    model = nn.ModuleDict({"a": nn.Conv1d(2, 2, 3, **options)})
    model["b"] = nn.Linear(2, 2)
    with pytest.raises(ValueError) as error:
        find_layers({"enc": model}, ["enc"])
    text = message(error)
    assert text.startswith("enc.a: Conv1d with padding")
    assert "quantize.exclude" in text
    layers = find_layers({"enc": model}, ["enc"], exclude=["enc.a"])
    assert [layer.name for layer in layers] == ["enc.b"]


def test_a_forward_replaced_on_the_instance_is_refused():
    """A simulation would replace it once more, and change what it computes."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["a"].forward = torch.relu
    with pytest.raises(ValueError, match=r"^enc\.a: Linear has a forward of"):
        find_layers({"enc": model}, ["enc"])
    layers = find_layers({"enc": model}, ["enc"], exclude=["enc.a"])
    assert [layer.name for layer in layers] == ["enc.b"]


class Renamed(nn.Linear):
    """A Linear under another name."""


def test_subclass_with_the_forward_of_linear_is_fine():
    (layer,) = find_layers({"enc": Renamed(2, 2)}, ["enc"])
    assert (layer.name, layer.kind) == ("enc", "linear")


# -- other models --------------------------------------------------------------


def behind_two_keys(modules):
    """The modules of a recipe that also names the CTC model as a whole."""
    whole = {"wav2vec2": modules["wav2vec2"].model, "head": modules["ctc_lin"]}
    return {**modules, "hf_ctc": nn.ModuleDict(whole)}


def test_shared_module_is_counted_once(make_tiny_modules):
    modules = behind_two_keys(make_tiny_modules("wav2vec2-base"))
    layers = find_layers(modules, [*TARGET, "hf_ctc"])
    assert len(layers) == 24
    assert len({id(layer.module) for layer in layers}) == 24
    assert [x.name for x in layers if x.unit == HEAD] == HEADS


def test_shared_head_is_counted_once(make_tiny_modules):
    modules = behind_two_keys(make_tiny_modules("wav2vec2-base"))
    layers = find_layers(modules, ["hf_ctc", "ctc_lin"])
    assert [x.name for x in layers if x.unit == HEAD] == ["hf_ctc.head.w"]
    assert list(group_units(layers)) == UNITS


def test_shared_encoder_is_one_encoder(make_tiny_modules):
    modules = behind_two_keys(make_tiny_modules("wav2vec2-base"))
    target = [*TARGET, "hf_ctc"]
    assert len(find_encoders({key: modules[key] for key in target})) == 1
    assert list(group_units(find_layers(modules, target))) == UNITS


def test_without_an_encoder_each_layer_is_a_unit():
    model = nn.Sequential(
        nn.Conv1d(1, 2, 3),
        nn.ReLU(),
        nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1)),
        SpeechBrainLinear(input_size=2, n_neurons=3),
    )
    layers = find_layers({"enc": model}, ["enc"])
    names = ["enc.0", "enc.2.0", "enc.2.1", "enc.3.w"]
    assert [layer.name for layer in layers] == names
    assert [layer.unit for layer in layers] == names
    kinds = ["conv1d", "linear", "conv2d", "linear"]
    assert [layer.kind for layer in layers] == kinds
    assert find_encoders({"enc": model}) == []


def test_items_of_a_list_of_like_modules_are_blocks():
    def block():
        return nn.ModuleDict(
            {"mha": nn.MultiheadAttention(4, 2), "ffn": nn.Linear(4, 4)}
        )

    model = nn.ModuleDict(
        {
            "front": nn.ModuleList([nn.Conv1d(4, 4, 3), nn.Linear(4, 4)]),
            "layers": nn.ModuleList([block(), block()]),
            "out": nn.Linear(4, 2),
        }
    )
    layers = find_layers({"enc": model}, ["enc"])
    units = group_units(layers)
    assert list(units) == [
        "enc.front.0",
        "enc.front.1",
        "enc.layers.0",
        "enc.layers.1",
        "enc.out",
    ]
    assert [layer.name for layer in units["enc.layers.1"]] == [
        "enc.layers.1.mha.in_proj_q",
        "enc.layers.1.mha.in_proj_kv",
        "enc.layers.1.mha.out_proj",
        "enc.layers.1.ffn",
    ]


def test_a_decoder_behind_an_encoder_keeps_its_blocks(make_tiny_modules):
    modules = dict(make_tiny_modules("hubert-base"))
    decoder = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    modules["dec"] = nn.ModuleDict({"layers": decoder, "out": nn.Linear(4, 4)})
    layers = find_layers(modules, [*TARGET, "dec"])
    units = {layer.name: layer.unit for layer in layers}
    assert units["dec.layers.1"] == "dec.layers.1"
    assert units["dec.out"] == units["ctc_lin.w"] == HEAD
