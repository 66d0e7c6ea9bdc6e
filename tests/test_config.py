"""Tests of speechbrain_stablequant.config."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from speechbrain_stablequant.config import FLOAT_DTYPES, ConfigError
from speechbrain_stablequant.methods.registry import METHODS, QuantizeConfig

NAN, INF = float("nan"), float("inf")


def error_of(block) -> str:
    """The one line that a wrong block gives."""
    with pytest.raises(ConfigError) as error:
        QuantizeConfig.from_dict(block)
    text = str(error.value)
    assert "\n" not in text
    return text


def nested(key, value):
    """``nested("search.metric", 1)`` is ``{"search": {"metric": 1}}``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


# -- what is right -------------------------------------------------------------


def test_defaults():
    config = QuantizeConfig.from_dict({})
    assert config == QuantizeConfig()
    assert config.search.threshold == 0.25
    assert config.search.cutoffs[0] == 100.0
    assert config.needs_search
    assert config.variant_configs() == {"": config}


def test_the_block_of_the_design():
    config = QuantizeConfig.from_dict(
        {
            "target": ["wav2vec2", "enc", "ctc_lin"],
            "weight_bits": 6,
            "activation_bits": 4,
            "method": "stablequant",
            "calibration": {"num_utterances": 128, "batch_size": 2},
            "search": {
                "num_utterances": 256,
                "metric": "WER",
                "threshold": 1,
                "cutoffs": [100, 99.9],
            },
            "backend": "auto",
            "output_folder": Path("results") / "quantized",
        }
    )
    assert (config.weight_bits, config.activation_bits) == (6, 4)
    assert config.calibration.batch_size == 2
    assert config.calibration.num_bins == 4096  # not named: as by default
    assert config.search.threshold == 1.0
    assert isinstance(config.search.threshold, float)
    assert config.search.cutoffs == (100.0, 99.9)
    assert config.output_folder == str(Path("results") / "quantized")


def test_one_name_stands_for_a_list():
    config = QuantizeConfig.from_dict({"target": "enc", "exclude": "enc.*"})
    assert config.target == ("enc",)
    assert config.exclude == ("enc.*",)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("plan", [None, "plan.json"])
def test_needs_search(method, plan):
    config = QuantizeConfig.from_dict({"method": method, "plan": plan})
    searches = method in (
        "stablequant",
        "stablequant_plus",
        "qat",
    )
    assert config.needs_search == (searches and plan is None)


@pytest.mark.parametrize(
    "key, values",
    [
        ("weight_bits", [2, 8]),
        ("activation_bits", [2, 8]),
        ("float_dtype", FLOAT_DTYPES),
        ("weight_method", [None, "max", "mse"]),
        ("search.threshold", [0, 0.0, 3]),
        ("search.cutoffs", [[100], [1e-3, 50.5]]),
        ("search.cache_gb", [0, 0.5]),
        ("search.num_utterances", [None, 1]),
        ("calibration.num_bins", [128, 4096, 2**20]),
        ("calibration.percentile", [100, 0.1]),
    ],
)
def test_edges_of_what_is_allowed(key, values):
    for value in values:
        found = QuantizeConfig.from_dict(nested(key, value))
        for part in key.split("."):
            found = getattr(found, part)
        assert found == (tuple(value) if isinstance(value, list) else value)


# -- what is wrong -------------------------------------------------------------


@pytest.mark.parametrize(
    "key, known",
    [
        ("weight_bitz", "weight_bits"),
        ("weights_bits", "weight_bits"),
        ("calibrate", "calibration"),
        ("output_dir", "output_folder"),
        ("search.treshold", "threshold"),
        ("search.cutoff", "cutoffs"),
        ("calibration.num_utterance", "num_utterances"),
        ("threshold", "search.threshold"),
        ("learn_scales", "qat.learn_scales"),
    ],
)
def test_unknown_key_with_a_suggestion(key, known):
    expected = f"quantize.{key}: unknown key; did you mean '{known}'?"
    assert error_of(nested(key, 1)) == expected


@pytest.mark.parametrize("key", ["zzz", "search.zzz", "calibration.zzz"])
def test_unknown_key_without_a_suggestion(key):
    text = error_of(nested(key, 1))
    assert text.startswith(f"quantize.{key}: unknown key; known keys: ")
    named = text.rpartition(": ")[2].split(", ")
    assert ("threshold" in named) == (key == "search.zzz")
    assert ("num_bins" in named) == (key == "calibration.zzz")
    assert ("weight_bits" in named) == (key == "zzz")


def test_key_that_is_no_string():
    assert error_of({8: 8}).startswith("quantize.8: unknown key")


@pytest.mark.parametrize("block", [None, 8, "w8a8", ["method"]])
def test_no_block(block):
    text = error_of(block)
    assert text == f"quantize: must be a block of keys, not {block!r}"
    text = error_of({"search": block})
    assert text == f"quantize.search: must be a block of keys, not {block!r}"


@pytest.mark.parametrize(
    "key, value, kind",
    [
        # A bool is an int to Python and not to a user.
        ("weight_bits", True, "int"),
        ("weight_bits", "8", "int"),
        ("weight_bits", 8.0, "int"),
        ("weight_bits", None, "int"),
        ("weight_bits", [8], "int"),
        ("seed", False, "int"),
        ("sample_rate", 16e3, "int"),
        ("calibration.batch_size", True, "int"),
        ("calibration.num_utterances", "all", "int"),
        ("calibration.num_utterances", True, "int"),
        ("search.threshold", True, "float"),
        ("search.threshold", "0.25", "float"),
        ("search.threshold", None, "float"),
        ("search.cache_gb", False, "float"),
        ("calibration.percentile", [99], "float"),
        ("method", 1, "str"),
        ("method", None, "str"),
        ("plan", 1, "str"),
        ("plan", ["plan.json"], "str"),
        ("weight_method", True, "str"),
        ("search.metric", ["WER"], "str"),
        ("require_checkpoint", 1, "bool"),
        ("require_checkpoint", "yes", "bool"),
        ("require_checkpoint", None, "bool"),
        ("target", None, "a list of str"),
        ("target", 1, "a list of str"),
        ("target", {"enc": 1}, "a list of str"),
        ("target", ["enc", 1], "str"),
        ("include", [["*"]], "str"),
        ("search.cutoffs", "99.9", "a list of float"),
        ("search.cutoffs", 99.9, "a list of float"),
        ("search.cutoffs", [100, "99"], "float"),
        ("search.cutoffs", [100, True], "float"),
        ("variants", "w6", "a list of dict"),
        ("variants", {"name": "w6"}, "a list of dict"),
        ("variants", ["w6"], "a block of keys"),
    ],
)
def test_wrong_type(key, value, kind):
    place, _, text = error_of(nested(key, value)).partition(": ")
    assert re.fullmatch(rf"quantize\.{key}(\[\d\])*", place)
    assert text.startswith(f"must be {kind}, not ")


@pytest.mark.parametrize(
    "key, values",
    [
        ("weight_bits", [1, 9, 0, -8, 16]),
        ("activation_bits", [1, 9, 32]),
        ("method", ["MAX", "", "stable_quant", "awq"]),
        ("float_dtype", ["float64", "half", ""]),
        ("weight_method", ["percentile", ""]),
        ("target", [[]]),
        ("sample_rate", [0, -16000]),
        ("search.metric", ["CER", "wer", ""]),
        ("search.threshold", [-0.25, NAN]),
        ("plus.cutoffs", ["unit", "layer"]),
        ("search.cutoffs", [[], [0], [100, 0.0], [101], [99, -1], [NAN]]),
        ("search.cache_gb", [-1, NAN]),
        ("search.num_utterances", [0, -1]),
        ("search.batch_size", [0, -1]),
        ("calibration.num_utterances", [0, -1]),
        ("calibration.batch_size", [0]),
        ("calibration.percentile", [0, 100.001, -5, NAN]),
        ("calibration.num_bins", [0, 1, 64, 127, 1000, 4095, 2**21, -4096]),
    ],
)
def test_wrong_value(key, values):
    for value in values:
        text = error_of(nested(key, value))
        assert re.match(rf"quantize\.{key}(\[\d\])?: ", text), value


@pytest.mark.parametrize("key", ["search.threshold", "search.cache_gb"])
def test_infinite(key):
    """Neither can be used later on: a plan is strict JSON, which has no
    infinity, and the memory is turned into whole bytes."""
    assert error_of(nested(key, INF)).startswith(f"quantize.{key}: ")


def test_wrong_choice_lists_the_right_ones():
    text = error_of({"method": "awq"})
    assert text == (
        "quantize.method: 'awq' is not one of stablequant, max, percentile, "
        "entropy, mse, adaround, stablequant_plus, qat"
    )
    text = error_of({"float_dtype": "int8"})
    assert text.endswith("'int8' is not one of float16, float32")
    for key in ("method", "preset"):
        text = error_of({key: "stablquant"})
        assert text.startswith(f"quantize.{key}: 'stablquant' is not one of ")
        assert text.endswith("; did you mean 'stablequant'?")


@pytest.mark.parametrize(
    "key, value, what",
    [
        ("search.selection", "median", "'median' is not one of threshold"),
        ("search.level", 0, "between 0 and 1"),
        ("search.level", 95, "between 0 and 1"),
    ],
)
def test_rules_of_the_search(key, value, what):
    assert what in error_of(nested(key, value))


# -- the parts of methods ------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, what",
    [
        ("adaround.iterations", 0, "at least 1"),
        ("adaround.lr", 0.0, "positive"),
        ("adaround.weight", INF, "finite"),
        ("adaround.warm_start", 1.5, "fraction"),
        ("adaround.calibrator", "median", "'median' is not one of max"),
        ("adaround.batch_size", 32, "unknown key"),
        ("plus.strengths", [], "fractions"),
        ("plus.strengths", [2.0], "fractions"),
        ("plus.damping", 0.0, "above 0"),
        ("plus.equalise", True, "did you mean 'equalize'"),
        ("plus.budget", 0.22, "must be a block"),
        ("plus.budget.size", 22.0, "fraction"),
        ("plus.budget.bits", [1], "from 2 to 8, or 16"),
        ("qat.epochs", 0, "at least 1"),
        ("qat.lr", 0.0, "positive"),
        ("qat.scale_lr", INF, "finite"),
        ("qat.distill", 1.5, "fraction"),
        ("qat.calibrator", "stablequant", "is not one of max"),
        ("qat.keep", "first", "'first' is not one of best, last"),
        ("qat.learn_scale", True, "did you mean 'learn_scales'"),
        ("qat.learn_scales", 1, "must be bool"),
    ],
)
def test_wrong_values_of_parts(key, value, what):
    text = error_of(nested(key, value))
    assert text.startswith(f"quantize.{key}")
    assert what in text


def test_a_variant_changes_one_key_of_a_part():
    block = {
        "method": "stablequant_plus",
        "plus": {"equalize": False, "budget": {"size": 0.2, "bits": [4, 8]}},
        "variants": [
            {"name": "a", "plus": {"compensate": False}},
            {"name": "b", "plus": {"budget": {"size": 0.3}}},
        ],
    }
    config, other = QuantizeConfig.from_dict(block).variant_configs().values()
    assert other.plus.budget.size == 0.3
    assert other.plus.budget.bits == (4, 8)
    assert not config.plus.equalize
    assert not config.plus.compensate
    assert config.plus.budget.size == 0.2


def test_what_training_needs():
    block = {"method": "qat", "variants": [{"name": "last"}, {"name": "mse"}]}
    block["variants"][0]["qat"] = {"keep": "last"}
    block["variants"][1]["method"] = "mse"
    best = QuantizeConfig.from_dict(block)
    last, other = best.variant_configs().values()
    assert best.needs_training and best.needs_search
    assert last.needs_training and not last.needs_search
    assert not other.needs_training and not other.needs_search
    given = QuantizeConfig.from_dict({"method": "qat", "plan": "plan.json"})
    assert not given.needs_training and not given.needs_search


# -- renamed keys --------------------------------------------------------------


def test_an_old_key_is_accepted_with_one_warning(caplog):
    block = {
        "plus": {"keep_wave": False},
        "variants": [
            {"name": "a", "plus": {"keep_wave": True}},
            {"name": "b", "plus": {"rotate": False}},
        ],
    }
    config = QuantizeConfig.from_dict(block)
    a, b = config.variant_configs().values()
    kept = [c.plus.keep_first_conv_float for c in (config, a, b)]
    assert kept == [False, True, False]
    (message,) = caplog.messages
    assert "plus.keep_wave" in message and "keep_first_conv_float" in message
    assert block["plus"] == {"keep_wave": False}


def test_an_old_key_beside_its_new_name():
    keys = {"keep_wave": False, "keep_first_conv_float": True}
    text = error_of({"plus": keys})
    assert text.startswith("quantize.plus.keep_wave: is the old name of keep_")


def test_a_key_that_was_removed(caplog):
    block = {"plus": {"weight_groups": 0}, "variants": [{"name": "a"}]}
    block["variants"][0]["plus"] = {"weight_groups": 0, "rotate": False}
    QuantizeConfig.from_dict(block)
    line = "quantize.plus.weight_groups: was removed; leave it out"
    assert caplog.messages == [line]
    block["variants"][0]["plus"] = {"weight_groups": 64}
    assert error_of(block) == line


# -- variants ------------------------------------------------------------------


def with_variants(*variants, **block):
    return {**block, "variants": list(variants)}


def test_variants():
    block = with_variants(
        {"name": "w8"},
        {"name": "w6.max", "weight_bits": 6, "method": "max"},
        activation_bits=7,
    )
    configs = QuantizeConfig.from_dict(block).variant_configs()
    assert list(configs) == ["w8", "w6.max"]
    assert [c.weight_bits for c in configs.values()] == [8, 6]
    assert [c.activation_bits for c in configs.values()] == [7, 7]
    assert [c.method for c in configs.values()] == ["stablequant", "max"]
    assert all(config.variants == () for config in configs.values())


def test_nested_changes_are_merged():
    block = with_variants(
        {"name": "a", "search": {"threshold": 0.5}},
        {"name": "b", "calibration": {"percentile": 99}},
        search={"num_utterances": 10, "threshold": 1.0, "cutoffs": [100, 98]},
        calibration={"num_utterances": 20},
    )
    config = QuantizeConfig.from_dict(block)
    a, b = config.variant_configs().values()
    assert a.search.threshold == 0.5
    assert b.search.threshold == 1.0
    for variant in (a, b):
        assert variant.search.num_utterances == 10
        assert variant.search.cutoffs == (100.0, 98.0)
        assert variant.calibration.num_utterances == 20
    assert a.calibration.percentile == 99.99
    assert b.calibration.percentile == 99.0
    # The block itself is not touched.
    assert config.search.threshold == 1.0


def test_a_variant_without_changes_is_the_block():
    block = {"weight_bits": 5, "include": ["*conv*"], "seed": 3}
    plain = QuantizeConfig.from_dict(block)
    config = QuantizeConfig.from_dict(with_variants({"name": "same"}, **block))
    assert asdict(config.variant_configs()["same"]) == asdict(plain)


@pytest.mark.parametrize(
    "name",
    ["", "../x", "..", ".", ".hidden", "a/b", "a\\b", "/tmp/x", "a b", "a\n"],
)
def test_variant_name_is_one_folder(name):
    text = error_of(with_variants({"name": "good"}, {"name": name}))
    assert text.startswith("quantize.variants[1].name: must be letters")


@pytest.mark.parametrize("variant", [{}, {"name": None}, {"name": 6}])
def test_variant_without_a_name(variant):
    text = error_of(with_variants(variant))
    assert text.startswith("quantize.variants[0].name: must be letters")


def test_variant_twice():
    text = error_of(with_variants({"name": "a"}, {"name": "a"}))
    assert text == "quantize.variants[1].name: 'a' is used twice"


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"weight_bitz": 6}, "weight_bitz: unknown key; did you mean"),
        ({"search": {"treshold": 6}}, "search.treshold: unknown key"),
        ({"search": 6}, "search: must be a block of keys"),
        ({"weight_bits": True}, "weight_bits: must be int"),
        ({"variants": []}, "variants: belongs to the block"),
        ({"output_folder": "x"}, "output_folder: belongs to the block"),
    ],
)
def test_wrong_key_of_a_variant(changes, key):
    text = error_of(with_variants({"name": "a"}, {"name": "b", **changes}))
    assert text.startswith(f"quantize.variants[1].{key}")


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"weight_bits": 9}, "weight_bits"),
        ({"method": "awq"}, "method"),
        ({"search": {"cutoffs": []}}, "search.cutoffs"),
    ],
)
def test_wrong_value_of_a_variant(changes, key):
    """The block's own value is right: the error has to say which is not."""
    text = error_of(with_variants({"name": "a"}, {"name": "b", **changes}))
    assert text.startswith(f"quantize.variants[1].{key}: ")


@pytest.mark.parametrize(
    "block, expected",
    [
        ({"method": "mse"}, ()),
        ({"method": "adaround"}, ()),
        ({"method": "stablequant"}, ("search",)),
        ({"method": "stablequant_plus"}, ()),
        (
            {"method": "stablequant_plus", "plus": {"cutoffs": "units"}},
            ("search",),
        ),
        ({"method": "qat"}, ("train", "search")),
        ({"method": "qat", "qat": {"distill": 1, "keep": "last"}}, ()),
    ],
)
def test_whose_transcripts_decide(block, expected):
    assert QuantizeConfig.from_dict(block).transcribed == expected


def test_what_the_report_shows_decides_nothing():
    hidden = QuantizeConfig.from_dict({"report": {"utterances": False}})
    assert not hidden.report.utterances
    assert hidden.settings() == QuantizeConfig().settings()
