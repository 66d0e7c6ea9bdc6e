"""Exports a quantized folder to the folder that an engine loads.

To add an engine, write a module with a function that takes a :class:`Model`
and a folder, and returns Markdown that shows its use, and a line in
``ENGINES``.
"""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..runtimes.cpu import cpu_class
from . import (
    onnxruntime_,
    openvino_,
    sherpa_onnx_,
    tensorrt_,
    transformers_js,
)
from .model import Model

logger = logging.getLogger(__name__)

#: What writes the folder of each engine.
ENGINES: dict[str, Callable[[Model, Path], str]] = {
    "onnxruntime": onnxruntime_.write,
    "openvino": openvino_.write,
    "sherpa-onnx": sherpa_onnx_.write,
    "tensorrt": tensorrt_.write,
    "transformers.js": transformers_js.write,
}

_README = """# {name}, for {target}

Weights of {bits} bits and activations of {activations}, quantized by
speechbrain_stablequant. {exact}

{use}
"""
_EXACT = {
    7: "With weights of 7 bits no sum of products saturates on any CPU; "
    "rounded from 8 bits, they may change a transcript. Exported with a weight "
    "range of 8 they stay as they are, which is exact on {where}.",
    8: "Weights of 8 bits are exact on {where}. On others, such as x86 CPUs "
    "without VNNI, sums of products saturate in silence: for these export "
    "again with a weight range of 7.",
}
_ON_GPU = (
    "GPUs add up products in 32 bits, so that weights of 8 bits are exact."
)
#: Where products of 8 bits are added up exactly.
_WHERE = "ARM and on x86 CPUs with VNNI"
_WHERE_ELSE = {
    "transformers.js": f"{_WHERE} in Node; for browsers keep 7",
}
_NARROWED = (
    "weights are rounded from 8 bits to 7, so that sums saturate on no CPU, "
    "which may change a transcript; --weight-range 8 keeps them, and is exact "
    "on {where}{here}"
)


def export_for(
    folder: str | Path,
    out: str | Path,
    target: str,
    weight_range: int | None = None,
) -> Path:
    """Write the folder that an engine loads, without torch or SpeechBrain.

    Arguments
    ---------
    folder : str or Path
        A folder that :func:`speechbrain_stablequant.load` loads.
    out : str or Path
        The folder to write, with a README.md that shows its use; there must be
        none yet.
    target : str
        One of ``ENGINES``.
    weight_range : int, optional
        Bits of weights, 7 or 8. Engines add up products of 8 bits in 16 on x86
        CPUs without VNNI, which saturates in silence. By default 7, which a
        line says, and 8 for tensorrt.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    ValueError
        An unknown target, a model that cannot be exported, or ``out`` exists.
    ImportError
        A package that writes the file is not installed.

    Example
    -------
    >>> export_for("quantized", "out", "phone")
    Traceback (most recent call last):
    ValueError: target: 'phone' is none of onnxruntime, openvino, sherpa-onnx, \
tensorrt, transformers.js
    """
    if target not in ENGINES:
        raise ValueError(f"target: '{target}' is none of {', '.join(ENGINES)}")
    on_gpu = target == "tensorrt"
    chosen = weight_range is not None
    if not chosen:
        weight_range = 8 if on_gpu else 7
    if weight_range not in _EXACT:
        raise ValueError(f"weight_range: {weight_range} is neither 7 nor 8")
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: exists; remove it, or give another folder")
    model = Model(Path(folder), weight_range == 7)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        made = Path(place) / out.name
        made.mkdir()
        use = ENGINES[target](model, made)
        text = _README.format(
            name=out.name,
            target=target,
            bits=min(weight_range, model.bits),
            activations=model.activation_bits,
            exact=_exact(target, weight_range, model.bits),
            use=use,
        )
        (made / "README.md").write_text(text, encoding="utf-8")
        made.rename(out)
    if not chosen and weight_range < model.bits:
        here = " (this CPU is one)" if cpu_class().exact else ""
        said = _NARROWED.format(where=_WHERE, here=here)
        logger.warning("%s: %s", out, said)
    return out


def _exact(target: str, weight_range: int, bits: int) -> str:
    """Where a target's products are exact; ``bits`` are those of the plan."""
    if bits < 8:
        return ""
    if target == "tensorrt":
        return _ON_GPU
    where = _WHERE_ELSE.get(target, _WHERE)
    return _EXACT[weight_range].format(where=where)
