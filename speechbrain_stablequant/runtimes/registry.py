"""The registry of runtimes.

A runtime is a module with ``make_executor(spec, **options)`` for a whole
encoder and ``make_layer(layer)`` for a layer outside of it (a head), and one
line in ``RUNTIMES``. Modules are imported on first use, so that no optional
package is needed before.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.files import code_identity


@dataclass(frozen=True)
class Runtime:
    """One row of the registry.

    Arguments
    ---------
    encoder : str or None
        ``"module:function"`` that makes an EncoderExecutor of an
        EncoderSpec, relative to this package; None: layer by layer.
    layer : str
        ``"module:function"`` that makes a LayerExecutor of an IntegerLayer.
    trial : str or None
        ``"module:function"`` that makes a LayerRunner of the executor's
        options, by which layers are compared with exact arithmetic; None for
        a runtime that is tried otherwise.
    layer_trial : str or None
        The same for layers outside of an encoder.
    device : str or None
        Type of the device that it runs on; None for any.
    needs : tuple of str
        Python packages that have to be there.
    install : str
        What to install if they are not.
    pair_sums : bool
        Whether it multiplies by CPU kernels that saturate sums of two
        products on a CPU without VNNI.
    streams : bool
        Whether it takes in layers whose weights are still in their file, and
        reads one after the other.
    fork_safe : bool
        Whether what was built in a process also computes in its forked
        children; otherwise a child builds its own.
    """

    encoder: str | None
    layer: str
    trial: str | None = None
    layer_trial: str | None = None
    device: str | None = None
    needs: tuple[str, ...] = ()
    install: str = ""
    pair_sums: bool = False
    streams: bool = False
    fork_safe: bool = False


_TORCH_INT8_LAYER = "torch_int8.layer:make_layer"

_TORCH_INT8_TRIAL = "torch_int8.trial:make_runner"

RUNTIMES: dict[str, Runtime] = {
    "torch": Runtime(None, "simulated:make_layer", fork_safe=True),
    "torch_int8": Runtime(
        "torch_int8.executor:make_executor",
        _TORCH_INT8_LAYER,
        _TORCH_INT8_TRIAL,
        _TORCH_INT8_TRIAL,
        "cpu",
        pair_sums=True,
        streams=True,
        fork_safe=True,
    ),
    "openvino": Runtime(
        "openvino_:make_executor",
        _TORCH_INT8_LAYER,
        "openvino_.trial:make_runner",
        _TORCH_INT8_TRIAL,
        "cpu",
        ("openvino",),
        "speechbrain_stablequant[cpu]",
        pair_sums=True,
        streams=True,
    ),
    "onnx": Runtime(
        "onnx_.executor:make_executor",
        _TORCH_INT8_LAYER,
        "onnx_.trial:make_runner",
        _TORCH_INT8_TRIAL,
        "cpu",
        ("onnx", "onnxruntime"),
        "speechbrain_stablequant[onnx]",
        pair_sums=True,
    ),
    "triton": Runtime(
        "triton:make_executor",
        "triton:make_layer",
        None,
        None,
        "cuda",
        ("triton",),
        "triton",
    ),
}


def load_function(reference: str) -> Callable[..., Any]:
    module, _, function = reference.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), function)


@functools.cache
def code_digest() -> str:
    """Digest of the code that executes plans, 32 hexadecimal digits."""
    return code_identity(Path(__file__).parent)
