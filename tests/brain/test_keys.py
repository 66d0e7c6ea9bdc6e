"""The keys of the block as Markdown."""

import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
from hyperpyyaml import load_hyperpyyaml

from speechbrain_stablequant import QuantizeConfig
from speechbrain_stablequant.brain.keys import keys_text, sections
from speechbrain_stablequant.methods.registry import METHODS
from speechbrain_stablequant.runtimes.registry import RUNTIMES, check_options
from speechbrain_stablequant.utils.presets import PRESETS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "keys.md"
RUNTIME_KEYS = {
    heading.split("`")[3]: keys
    for heading, _, keys in sections()
    if heading.startswith("`backend_options` of ")
}
BLOCK_KEYS = {
    key.path: key
    for heading, _, keys in sections()
    if not heading.startswith("`backend_options` of ")
    for key in keys
}


def paths(config: object, prefix: str = "") -> set[str]:
    """Dotted names of all keys."""
    found = set()
    for row in fields(config):
        value = getattr(config, row.name)
        found.add(f"{prefix}{row.name}")
        if is_dataclass(value):
            found |= paths(value, f"{prefix}{row.name}.")
    return found


def of_yaml(keys) -> dict:
    """The defaults as a YAML gives them."""
    rows = [f"'{x.path}': {x.default}" for x in keys if x.default is not None]
    block: dict = {}
    for path, value in load_hyperpyyaml("\n".join(rows)).items():
        *places, name = path.split(".")
        part = block
        for place in places:
            part = part.setdefault(place, {})
        part[name] = value
    return block


def test_the_page_is_what_the_command_prints():
    assert PAGE.read_text(encoding="utf-8") == f"{keys_text()}\n", (
        "run: stablequant keys > docs/keys.md"
    )


def test_every_key_is_there():
    methods = {x.config.block for x in METHODS.values()} - {""}
    assert set(BLOCK_KEYS) == paths(QuantizeConfig()) - methods
    assert all(key.meaning for key in BLOCK_KEYS.values())
    known = {
        name: {x.name for x in fields(runtime.options)}
        for name, runtime in RUNTIMES.items()
    }
    found = {
        name: {x.path.removeprefix("backend_options.") for x in keys}
        for name, keys in RUNTIME_KEYS.items()
    }
    assert found == {name: keys for name, keys in known.items() if keys}


def test_defaults_are_those_of_the_block():
    block = of_yaml(BLOCK_KEYS.values())
    assert QuantizeConfig.from_dict(block) == QuantizeConfig()


@pytest.mark.parametrize("name", RUNTIME_KEYS)
def test_defaults_are_those_of_the_runtime(name):
    options = of_yaml(RUNTIME_KEYS[name])["backend_options"]
    kind = RUNTIMES[name].options
    assert kind(**check_options(name, options)) == kind()
    assert options == asdict(kind())


def test_meanings_name_all_choices():
    def check(config, prefix=""):
        for row in fields(config):
            path = f"{prefix}{row.name}"
            for choice in row.metadata.get("choices", ()):
                assert f"`{choice}`" in BLOCK_KEYS[path].meaning, path
            if is_dataclass(value := getattr(config, row.name)):
                check(value, f"{path}.")

    check(QuantizeConfig())


@pytest.mark.parametrize(
    "method, blocks, some",
    [
        ("stablequant", set(), {"cutoffs", "num_utterances", "cache_gb"}),
        ("max", set(), set()),
        ("percentile", set(), {"percentile"}),
        ("adaround", {"adaround"}, {"percentile", "cache_gb"}),
        ("qat", {"qat"}, {"percentile", "num_utterances"}),
        (
            "stablequant_plus",
            {"plus", "plus.budget", "adaround"},
            {"cutoffs", "num_utterances", "cache_gb"},
        ),
    ],
)
def test_a_method_has_the_keys_that_it_reads(method, blocks, some):
    text = keys_text(method)
    own = {"qat", "plus", "plus.budget", "adaround"}
    assert {x for x in own if f"\n## `{x}`\n" in text} == blocks
    every = {"cutoffs", "num_utterances", "cache_gb"}
    found = {x for x in every if f"`search.{x}`" in text}
    found |= {"percentile"} & set(re.findall(r"`calibration.(\w+)`", text))
    assert found == some
    # What every method reads.
    assert {"`target`", "`search.max_float_wer`"} <= set(text.split())


def test_what_the_page_of_a_method_leaves_out_exists():
    every = set(BLOCK_KEYS) | {x.config.block for x in METHODS.values()}
    for method in METHODS.values():
        assert set(method.config.also_reads) <= every


def test_a_key_a_block_a_preset():
    text = keys_text("search.threshold")
    assert "- `search.threshold` (float, default `0.25`;" in text
    assert "search.level" not in text
    assert text.endswith("Read by `stablequant`, `stablequant_plus`.")
    assert "Read by" not in keys_text("seed")
    assert keys_text("backend_options.threads").count("- `") == 3
    text = keys_text("plus")
    assert "`plus.rotate`" in text and "`plus.budget.size`" in text
    assert "`search" not in text
    text = keys_text("stablequant_plus_mixed")
    assert PRESETS["stablequant_plus_mixed"].read_text("utf-8") in text
    assert text.endswith(keys_text("stablequant_plus"))


@pytest.mark.parametrize(
    "name, close",
    [
        ("epochs", "'qat.epochs'"),
        ("batch_size", "'calibration.batch_size' or 'search.batch_size'"),
        ("stablquant", "'stablequant'"),
    ],
)
def test_what_is_no_key_is_refused_with_the_closest(name, close):
    line = f"keys: '{name}' is no method, preset, block or key .*; did you mean"
    with pytest.raises(ValueError, match=f"^{line} {close}\\?$"):
        keys_text(name)
