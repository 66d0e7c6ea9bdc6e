"""CPU classes, and the integers that each executes.

Without VNNI the int8 kernels of oneDNN and OpenVINO multiply unsigned by signed
bytes and add pairs of products in int16, which saturates silently: 2 * 255 *
127 exceeds an int16. With 7-bit weights nothing saturates (2 * 255 * 63 =
32130), so there the weights of 8-bit layers are rounded to 7 bits. To measure
the cost, evaluate :func:`executed_integers` on the simulated runtime.
"""

import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..core.affine import qmax
from ..core.integer_layer import IntegerLayer
from ..utils.memory import transient

logger = logging.getLogger(__name__)

# Linux's flag of each class of x86 CPUs, in ascending order.
_CLASSES = {
    "avx2": "",
    "avx_vnni": "avx_vnni",
    "avx512_vnni": "avx512_vnni",
    "amx": "amx_int8",
}

#: Widest weights whose pair sums with unsigned bytes fit an int16.
PAIR_SUM_BITS = 7

#: Number of weights that are converted to float at a time.
_PART = 1 << 14

# Class that remains under each value of ONEDNN_MAX_CPU_ISA, and whether it
# multiplies bfloat16.
_CAPS = {
    "SSE41": ("avx2", False),
    "AVX": ("avx2", False),
    "AVX2": ("avx2", False),
    "AVX2_VNNI": ("avx_vnni", False),
    "AVX2_VNNI_2": ("avx_vnni", True),
    "AVX512_CORE": ("avx2", False),
    "AVX512_CORE_VNNI": ("avx512_vnni", False),
    "AVX512_CORE_BF16": ("avx512_vnni", True),
    "AVX512_CORE_FP16": ("avx512_vnni", True),
    "AVX10_1_512": ("avx512_vnni", True),
}


@dataclass(frozen=True)
class CpuClass:
    """A class of CPU."""

    name: str  # of _CLASSES, or "other"; avx2: also AVX-512 without VNNI
    bf16: bool = False  # whether it multiplies bfloat16

    @property
    def exact(self) -> bool:
        """Whether sums of products of 8-bit operands never saturate."""
        return self.name != "avx2"


def class_of_flags(flags: set[str], cap: str = "") -> CpuClass:
    """Class of an x86 CPU, from Linux's flags and ``ONEDNN_MAX_CPU_ISA``."""
    names, known = list(_CLASSES), {"", *flags}
    found = max(names.index(n) for n, flag in _CLASSES.items() if flag in known)
    most, bf16 = _CAPS.get(cap.upper(), ("amx", True))
    return CpuClass(
        names[min(found, names.index(most))],
        bf16 and bool(flags & {"avx512_bf16", "amx_bf16"}),
    )


#: Linux's description of the processors.
_CPUINFO = Path("/proc/cpuinfo")

# Flags that torch reports where there is no /proc/cpuinfo.
_TORCH_FLAGS = {
    "avx512_vnni": "_is_vnni_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "amx_int8": "_is_amx_tile_supported",
}

# Of an x86 and of an ARM CPU.
_FLAG_LINES = ("flags", "Features")
_ARM_LINES = ("implementer", "architecture", "variant", "part", "revision")
_NAME_LINES = ("model name", *(f"CPU {line}" for line in _ARM_LINES))

# Variables that change the kernels that libraries choose.
_KERNEL_VARIABLES = ("ONEDNN_", "DNNL_", "OV_", "OPENVINO_", "ATEN_CPU", "MKL_")


def _first_processor() -> dict[str, str]:
    """Linux's description of the first processor; empty elsewhere."""
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found


def _flags() -> set[str]:
    """Flags of the first processor, named as Linux does."""
    lines = _first_processor()
    for line in _FLAG_LINES:
        if line in lines:
            return set(lines[line].split())
    return {
        flag
        for flag, name in _TORCH_FLAGS.items()
        if getattr(torch.cpu, name, bool)()
    }


@lru_cache(maxsize=1)
def cpu_class() -> CpuClass:
    """The class of this CPU, as far as oneDNN may use it."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "x86"):
        return CpuClass("other")
    # By its current and its older name.
    names = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    cap = next(filter(None, map(os.environ.get, names)), "")
    return class_of_flags(_flags(), cap)


def in_half(precision: str) -> bool:
    """Whether a runtime of this precision, ``auto``, ``bf16`` or ``f32``,
    computes in bfloat16 between integer products."""
    return cpu_class().bf16 if precision == "auto" else precision == "bf16"


def cpu_name() -> str:
    """The name of this CPU's model, as far as the system tells."""
    name = _first_processor().get("model name")
    return name or platform.processor() or platform.machine()


def machine_identity() -> dict[str, Any]:
    """What determines the kernels that libraries choose here, as JSON."""
    lines = _first_processor()
    names = [lines[line] for line in _NAME_LINES if line in lines]
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": names or [platform.processor()],
        "flags": sorted(_flags()),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_KERNEL_VARIABLES)
        },
    }


def narrowed(layer: IntegerLayer) -> IntegerLayer:
    """A layer with weights of at most 7 bits where it sums up integers."""
    if layer.weight_only or layer.weight_bits <= PAIR_SUM_BITS:
        return layer
    ratio = qmax(PAIR_SUM_BITS) / qmax(layer.weight_bits)

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        out = transient(weight.shape, torch.int8)
        parts = (x.reshape(-1).split(_PART) for x in (out, weight))
        for rows, part in zip(*parts, strict=True):
            rows.copy_(part.float().mul_(ratio).round_())
        return out

    read = layer.read
    return replace(
        layer,
        weight=rounded(layer.weight) if read is None else layer.weight,
        weight_scale=layer.weight_scale / ratio,
        weight_bits=PAIR_SUM_BITS,
        read=None if read is None else lambda: rounded(read()),
    )


def executed_integers(
    integers: Mapping[str, IntegerLayer], cpu: CpuClass
) -> dict[str, IntegerLayer]:
    """The integers that a CPU executes: with 7-bit weights where sums are not
    exact. Warns if any is changed."""
    if cpu.exact:
        return dict(integers)
    out = {name: narrowed(layer) for name, layer in integers.items()}
    if any(out[name] is not layer for name, layer in integers.items()):
        _say_narrowed(cpu.name)
    return out


@lru_cache
def _say_narrowed(name: str) -> None:
    """Warn once in a process."""
    logger.warning(
        "this CPU (class %s) has no VNNI: int8 sums would saturate, so "
        "weights of 8 bits are executed with %d",
        name,
        PAIR_SUM_BITS,
    )
