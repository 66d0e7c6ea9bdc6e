"""The options of each runtime: known before any runtime is made."""

import importlib
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from speechbrain_stablequant import QuantizeConfig
from speechbrain_stablequant.config import ConfigError
from speechbrain_stablequant.runtimes import RUNTIMES
from speechbrain_stablequant.runtimes.options import (
    AUTO,
    OPTIONS,
    check_options,
    option_names,
    select_options,
)

# Where the arguments of each runtime stand; those of onnx in its class.
MAKERS = {
    "torch_int8": ("torch_int8.executor", "make_executor"),
    "openvino": ("openvino_.executor", "make_executor"),
    "onnx": ("onnx_.executor", "OnnxExecutor"),
    "triton": ("triton", "make_executor"),
}


def test_each_runtime_has_its_options():
    assert OPTIONS.keys() == RUNTIMES.keys()
    assert MAKERS.keys() == {n for n, r in RUNTIMES.items() if r.encoder}
    assert {n for names in AUTO.values() for n in names} <= RUNTIMES.keys()


@pytest.mark.parametrize("name", MAKERS)
def test_options_are_the_arguments_of_the_runtime(name):
    module, function = MAKERS[name]
    if any(importlib.util.find_spec(p) is None for p in RUNTIMES[name].needs):
        pytest.skip(f"needs {RUNTIMES[name].needs}")
    module = importlib.import_module(
        f"speechbrain_stablequant.runtimes.{module}"
    )
    arguments = inspect.signature(getattr(module, function)).parameters
    taken = {n: p.default for n, p in arguments.items() if n != "spec"}
    assert {f.name: f.default for f in fields(OPTIONS[name])} == taken


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
        QuantizeConfig.from_dict(block)
    text = str(caught.value)
    assert text.startswith("quantize.backend_options.")
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_auto_takes_what_any_of_its_runtimes_knows():
    options = {"threads": 2, "precision": "f32", "dtype": "bfloat16"}
    assert check_options("auto", options) == options
    assert select_options("openvino", options) == {
        "threads": 2,
        "precision": "f32",
    }
    assert select_options("triton", options) == {"dtype": "bfloat16"}
    assert select_options("torch", options) == {}
    # What auto passes on has one meaning.
    for name in option_names("auto"):
        kinds = {
            f.type
            for kind in OPTIONS.values()
            for f in fields(kind)
            if f.name == name
        }
        assert len(kinds) == 1, name


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: 'tpu' is none of auto, to"):
        check_options("tpu", {})


def test_a_path_is_text_in_the_block():
    options = {"cache_folder": Path("graphs")}
    config = QuantizeConfig.from_dict({"backend_options": options})
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
    configs = QuantizeConfig.from_dict(block).variant_configs()
    assert {n: c.backend_options for n, c in configs.items()} == {
        "same": {"threads": 2, "precision": "f32"},
        "plain": {"threads": 2},
        "simulated": {},
        "own": {},
    }
    wrong = {"name": "a", "backend": "torch", "backend_options": {"threads": 1}}
    with pytest.raises(ConfigError, match=r"variants\[0\].backend_options.thr"):
        QuantizeConfig.from_dict({"variants": [wrong]})


def test_options_need_no_runtime_package():
    """Also where neither openvino nor triton is installed."""
    code = (
        "import sys; import speechbrain_stablequant.runtimes.options; "
        "print({'openvino', 'triton', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
