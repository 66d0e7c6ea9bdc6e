"""The options of each runtime: known before any runtime is made."""

import importlib.util
import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

from speechbrain_stablequant.runtimes.registry import (
    AUTO,
    RUNTIMES,
    check_options,
    load_function,
    option_names,
    select_options,
)


def test_auto_chooses_from_the_registry():
    assert {n for names in AUTO.values() for n in names} <= RUNTIMES.keys()


@pytest.mark.parametrize("name", [n for n, r in RUNTIMES.items() if r.encoder])
def test_options_are_the_arguments_of_the_runtime(name):
    if any(importlib.util.find_spec(p) is None for p in RUNTIMES[name].needs):
        pytest.skip(f"needs {RUNTIMES[name].needs}")
    make = load_function(RUNTIMES[name].encoder)
    arguments = inspect.signature(make).parameters.values()
    named = {p.name: p.default for p in arguments if p.kind != p.VAR_KEYWORD}
    assert named.pop("spec") is inspect.Parameter.empty
    known = {f.name: f.default for f in fields(RUNTIMES[name].options)}
    if len(named) + 1 == len(arguments):
        assert known == named
        return
    # The others are read by the class, which refuses what it does not know.
    assert named.items() <= known.items()
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        make(None, wrong=1)


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
            for row in RUNTIMES.values()
            for f in fields(row.options)
            if f.name == name
        }
        assert len(kinds) == 1, name


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: 'tpu' is none of auto, to"):
        check_options("tpu", {})


def test_options_need_no_runtime_package():
    """Also where neither openvino nor triton is installed."""
    code = (
        "import sys; import speechbrain_stablequant.runtimes.registry; "
        "print({'openvino', 'triton', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
