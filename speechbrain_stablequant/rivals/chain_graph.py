"""A chain of modules as an OpenVINO graph, float or quantized by NNCF."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..methods.session import Recognizer
from ..runtimes.cpu import cpu_class
from ..simulation.prefix_cache import StopForward

if TYPE_CHECKING:
    import openvino as ov

# Operations that quantization targets, and their number of factors.
PRODUCTS = {
    "MatMul": 2,
    "Convolution": 2,
    "GroupConvolution": 2,
    "ScaledDotProductAttention": 3,
}
_LAYOUT = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split")
_DECOMPRESSION = ("Multiply", "Subtract", "Convert")

# Largest difference after conversion, relative to the largest output.
TOLERANCE = 1e-2


def require_one(utterances: int) -> None:
    """Raises a ValueError unless a batch is one utterance, without padding."""
    if utterances != 1:
        raise ValueError(
            "quantize.method: nncf takes one utterance at a time, not a batch "
            f"of {utterances}; give test_loader_kwargs a batch_size of 1"
        )


class Chain(nn.Module):
    """Modules that are called one after the other, as one."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        for key, module in modules.items():
            self.add_module(key, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the last module."""
        for module in self.children():
            x = module(x)
        return x


@torch.no_grad()
def convert(
    chain: Mapping[str, nn.Module], wave: torch.Tensor, output: torch.Tensor
) -> "ov.Model":
    """The float model as a graph for one utterance of any length."""
    import openvino as ov

    from ..runtimes.openvino_.core import core

    require_one(len(wave))
    module = Chain(chain).eval()
    model = ov.convert_model(
        module, example_input=wave, input=[ov.PartialShape([1, -1])]
    )
    compiled = core().compile_model(model, "CPU", settings_of(precision="f32"))
    found = graph_forwards(chain, compiled)[next(iter(chain.values()))](wave)
    largest = output.abs().max()
    if found.shape != output.shape or not torch.allclose(
        found, output.float(), rtol=0, atol=TOLERANCE * float(largest)
    ):
        raise ValueError(
            f"quantize.method: OpenVINO's conversion of {', '.join(chain)} "
            "changes the output; leave out method nncf"
        )
    return model


def calibration_waves(
    recognizer: Recognizer, first: nn.Module
) -> list[np.ndarray]:
    """Inputs of the first module over the calibration set."""
    waves: list[np.ndarray] = []

    def keep(module: nn.Module, args: tuple) -> None:
        require_one(len(args[0]))
        waves.append(_array(args[0]))
        raise StopForward

    handle = first.register_forward_pre_hook(keep)
    try:
        recognizer.forward("calibration", lambda _: None)
    finally:
        handle.remove()
    return waves


def _array(wave: torch.Tensor) -> np.ndarray:
    return wave.detach().float().cpu().contiguous().numpy()


def settings_of(
    threads: int | None = None, precision: str = "auto", **_: Any
) -> dict[str, Any]:
    """Settings of OpenVINO for the options of ``backend: openvino``."""
    if precision == "auto":
        precision = "bf16" if cpu_class().bf16 else "f32"
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }


def graph_forwards(
    chain: Mapping[str, nn.Module], compiled: "ov.CompiledModel"
) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards that compute a chain of modules by a graph."""
    request = compiled.create_infer_request()

    def compute(wave: torch.Tensor, *lengths: Any) -> torch.Tensor:
        # A single utterance has no padding: lengths do not matter.
        require_one(len(wave))
        request.infer([_array(wave)], share_inputs=True)
        found = np.array(request.get_output_tensor(0).data)
        return torch.from_numpy(found).to(wave.device)

    first, *rest = chain.values()
    return {first: compute, **{module: _pass_on for module in rest}}


def _pass_on(x: torch.Tensor) -> torch.Tensor:
    return x


def products(model: "ov.Model") -> tuple[list[str], list[str]]:
    """Names of the integer and of the float matrix products of a graph."""
    integer, floating = [], []
    for node in model.get_ordered_ops():
        count = PRODUCTS.get(node.get_type_name())
        if count is not None:
            factors = [node.input_value(i).get_node() for i in range(count)]
            found = integer if all(map(_is_integer, factors)) else floating
            found.append(_name(node))
    return integer, floating


def _is_integer(node: Any) -> bool:
    """Whether a node gives integers times a scale."""
    while node.get_type_name() in _LAYOUT:
        node = node.input_value(0).get_node()
    if node.get_type_name() == "FakeQuantize":
        return True
    while node.get_type_name() in (*_LAYOUT, *_DECOMPRESSION):
        node = node.input_value(0).get_node()
    return (
        node.get_type_name() == "Constant"
        and node.get_element_type().is_integral()
    )


def _name(node: Any) -> str:
    """Name of the module that an operation comes from."""
    name = node.get_friendly_name().removeprefix("__module.")
    return name.partition("/")[0]
