"""Tests of speechbrain_stablequant.brain.block: a runtime's options."""

from pathlib import Path

import pytest

from speechbrain_stablequant.brain.block import read_block, variant_configs
from speechbrain_stablequant.config import ConfigError
from speechbrain_stablequant.runtimes.registry import RUNTIMES

BAD = {
    "typo": ("openvino", {"thread": 2}, ["thread: unknown", "'threads'"]),
    "of another runtime": (
        "torch_int8",
        {"precision": "f32"},
        ["precision: unknown key", "threads"],
    ),
    "of no runtime that auto takes": (
        "auto",
        {"provider": "cpu"},
        ["provider: unknown key", "threads", "max_graphs"],
    ),
    "text for a number": ("auto", {"threads": "2"}, ["threads", "int", "'2'"]),
    "true for a number": ("openvino", {"threads": True}, ["threads", "True"]),
    "number for a choice": ("triton", {"dtype": 16}, ["dtype", "bfloat16"]),
    "unknown choice": (
        "openvino",
        {"precision": "f16"},
        ["precision", "auto, bf16, f32", "'f16'"],
    ),
    "no thread": ("torch_int8", {"threads": 0}, ["threads", "at least 1"]),
    "number for a switch": ("triton", {"tune": 1}, ["tune", "bool"]),
    "any for the simulation": ("torch", {"threads": 1}, ["torch has no opt"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_line_of_the_block(name):
    backend, options, words = BAD[name]
    block = {"backend": backend, "backend_options": options}
    with pytest.raises(ConfigError) as caught:
        read_block(block)
    text = str(caught.value)
    assert text.startswith("quantize.backend_options.")
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_a_path_is_text_in_the_block():
    options = {"cache_folder": Path("graphs")}
    config = read_block({"backend_options": options})
    assert config.backend_options == {"cache_folder": "graphs"}


def test_a_variant_keeps_what_its_runtime_knows():
    block = {
        "backend": "openvino",
        "backend_options": {"threads": 2, "precision": "f32"},
        "variants": [
            {"name": "same"},
            {"name": "plain", "backend": "torch_int8"},
            {"name": "simulated", "backend": "torch"},
            {"name": "own", "backend": "onnx", "backend_options": {}},
        ],
    }
    configs = variant_configs(read_block(block))
    assert {n: c.backend_options for n, c in configs.items()} == {
        "same": {"threads": 2, "precision": "f32"},
        "plain": {"threads": 2},
        "simulated": {},
        "own": {},
    }
    wrong = {"name": "a", "backend": "torch", "backend_options": {"threads": 1}}
    with pytest.raises(ConfigError, match=r"variants\[0\].backend_options.thr"):
        read_block({"variants": [wrong]})


@pytest.mark.parametrize("backend", ["auto", *RUNTIMES])
def test_backends(backend):
    assert read_block({"backend": backend}).backend == backend


@pytest.mark.parametrize("backend", ["tensorrt", "TORCH", ""])
def test_unknown_backend(backend):
    words = f"backend: '{backend}' is not one of auto, torch, torch_int8"
    with pytest.raises(ConfigError, match=f"^quantize.{words}"):
        read_block({"backend": backend})
    variants = [{"name": "a"}, {"name": "b", "backend": backend}]
    with pytest.raises(ConfigError, match=rf"^quantize.variants\[1\].{words}"):
        read_block({"variants": variants})


def test_unknown_scores_of_a_variant():
    variant = {"name": "a", "plus": {"budget": {"scores": "wer"}}}
    with pytest.raises(ConfigError) as error:
        read_block({"variants": [variant]})
    assert str(error.value) == (
        "quantize.variants[0].plus.budget.scores: 'wer' is not one of "
        "divergence"
    )


def test_a_plan_is_read_with_the_block(tmp_path):
    """Not only when there is something to quantize."""
    missing = str(tmp_path / "missing.json")
    damaged = tmp_path / "plan.json"
    damaged.write_text("{}", encoding="utf-8")
    for where, block in (
        ("quantize.plan: ", {"plan": missing}),
        ("quantize.plan: ", {"plan": damaged}),
        (
            "quantize.variants[0].plan: ",
            {"variants": [{"name": "a", "plan": missing}]},
        ),
    ):
        with pytest.raises(ConfigError) as error:
            read_block(block)
        assert str(error.value).startswith(where)
        assert str(tmp_path) in str(error.value)
