"""Resources of compiled kernels, found without a GPU.

`record_launches` records what a launch function would run, with tensors on the
``meta`` device; `compile_launch` compiles it for any GPU and reads the
resources from the assembler that comes with Triton.
"""

import inspect
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, type_canonicalisation_dict

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TENSOR_CORE = re.compile(r"(?:wgmma\.mma_async|mma\.sync)[\w.]*")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: arguments by name, and launch options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any] = field(repr=False)
    options: dict[str, int]

    @property
    def blocks(self) -> int:
        """Blocks of the whole grid."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses."""

    registers: int  # of a thread
    spill_bytes: int  # of registers stored to and loaded from local memory
    stack_bytes: int  # of a thread
    shared_bytes: int  # of a block
    warps: int  # of a block
    tensor_core: tuple[str, ...]  # distinct matrix instructions in the PTX
    instructions: int  # of a thread, outside of loops
    loop_instructions: int  # of a thread, one pass through each loop
    ptx: str = field(repr=False)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Context in which launches are recorded instead of run."""
    launches: list[Launch] = []
    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        options = {
            key: kwargs.pop(key)
            for key in ("num_warps", "num_stages")
            if key in kwargs
        }
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launches.append(Launch(self, tuple(grid), arguments, options))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def launches_of(function: Callable, *args: Any, **kwargs: Any) -> list[Launch]:
    """Launches of a launch function; its tensors may be on ``meta``."""
    with record_launches() as launches:
        function(*args, **kwargs)
    return launches


def specialize(launch: Launch) -> ASTSource:
    """What Triton would compile for a launch: types, constants, alignments.

    Triton derives them from values: divisibility by 16, and ones.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    aligned = [["tt.divisibility", 16]]
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        special = not parameter.do_not_specialize
        is_one = type(value) is int and value == 1
        if parameter.is_constexpr or (special and is_one):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            signature[name] = "*" + type_canonicalisation_dict[dtype]
            attributes[(index,)] = aligned
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(index,)] = aligned
    return ASTSource(launch.kernel, signature, constants, attributes)


def _tool(
    name: str, *arguments: str, suffix: str, content: bytes
) -> subprocess.CompletedProcess:
    """Runs one of the tools that come with Triton on a file."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / f"kernel.{suffix}"
        source.write_bytes(content)
        done = subprocess.run(
            [str(_BIN / name), *arguments, str(source)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[0]}")
    return done


def _assemble(ptx: str, arch: int) -> str:
    """The assembler's report on a kernel."""
    name = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
    # Triton comes with two assemblers. Which of them reads its code depends on
    # the architecture, and early versions ask without it.
    takes_arch = inspect.signature(get_ptxas).parameters
    path = get_ptxas(*([arch] if takes_arch else [])).path
    output = ("-o", os.devnull)
    return _tool(
        path, "-v", name, *output, suffix="ptx", content=ptx.encode()
    ).stderr


#: A label, or an instruction and its operands.
_LINE = re.compile(r"^\s*(?:(\.L_x_\d+):|/\*\w+\*/\s+(?:@\S+\s+)?(\S+)(.*))")


def count_instructions(listing: str) -> tuple[int, int]:
    """Instructions of a disassembled kernel that a thread executes once, and in
    one pass through each loop; no forward branch is taken."""
    labels: dict[str, int] = {}
    in_loop: list[bool] = []
    for line in listing.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        label, name, rest = found.groups()
        if label:
            labels[label] = len(in_loop)
            continue
        if name.startswith("NOP"):
            continue
        in_loop.append(False)
        target = re.search(r"\.L_x_\d+", rest)
        if name.startswith("BRA") and target and target[0] in labels:
            start = labels[target[0]]
            # the last instruction of a kernel jumps to itself
            if start < len(in_loop) - 1:
                in_loop[start:] = [True] * (len(in_loop) - start)
    return in_loop.count(False), in_loop.count(True)


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compiles a launch for an architecture, such as 80, 86 or 90."""
    compiled = triton.compile(
        specialize(launch),
        target=GPUTarget("cuda", arch, 32),
        options=launch.options,
    )
    ptx = compiled.asm["ptx"]
    report = _assemble(ptx, arch)
    listing = _tool(
        "nvdisasm", "-c", suffix="cubin", content=compiled.asm["cubin"]
    ).stdout
    once, loops = count_instructions(listing)

    def number(pattern: str) -> int:
        return sum(int(n) for n in re.findall(pattern, report))

    return Resources(
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        tensor_core=tuple(sorted(set(_TENSOR_CORE.findall(ptx)))),
        instructions=once,
        loop_instructions=loops,
        ptx=ptx,
    )
