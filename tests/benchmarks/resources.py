"""Resources of compiled kernels, found without a GPU.

`record_launches` records what a launch function would run, with tensors on the
``meta`` device; `compile_launch` compiles it for any GPU and reads the
resources from the assembler that comes with Triton.
"""

import math
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
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, type_canonicalisation_dict

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TENSOR_CORE = re.compile(
    r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b[\w.:]*"
)
#: What orders shared memory between copies and asynchronous products.
_ORDER = re.compile(
    r"cp\.async\.(?:cg|wait_group)|st\.shared|fence\.proxy\.async|bar\.sync"
    r"|wgmma\.(?:mma_async|wait_group)|tcgen05\.mma\b"
)


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
    stack_bytes: int  # of a thread; spilled registers go there
    shared_bytes: int  # of a block
    warps: int  # of a block
    instructions: int  # of a thread, outside of loops
    loop_instructions: int  # of a thread, one pass through each loop
    ptx: str = field(repr=False)

    @property
    def tensor_core(self) -> tuple[str, ...]:
        """Distinct matrix instructions."""
        return tuple(sorted(set(_TENSOR_CORE.findall(self.ptx))))

    @property
    def waits(self) -> list[int]:
        """Copies that may be in flight behind each wait, in order."""
        return self._waits("cp.async.wait_group")

    @property
    def product_waits(self) -> list[int]:
        """Groups of wgmma that may still run behind each wait, in order."""
        return self._waits("wgmma.wait_group.sync.aligned")

    def _waits(self, name: str) -> list[int]:
        found = re.findall(rf"{re.escape(name)}\s+(\d+)", self.ptx)
        return [int(count) for count in found]


def is_fenced(ptx: str) -> bool:
    """Whether, in the order of the text, a barrier and a proxy fence stand
    between all writes to shared memory and the asynchronous products that read
    it, and a barrier between the wait for products and the next copies, if
    there are other groups of four warps."""
    missing: set[str] = set()  # before products
    read = False  # products of other groups may still read
    groups = int(re.search(r"\.reqntid (\d+)", ptx)[1]) // 128
    for found in _ORDER.finditer(ptx):
        match found[0]:
            case "cp.async.wait_group" | "st.shared":
                missing = {"barrier", "fence"}
            case "fence.proxy.async":
                missing.discard("fence")
            case "bar.sync":
                missing.discard("barrier")
                read = False
            case "wgmma.wait_group":
                read = groups > 1
            case "cp.async.cg":
                if read:
                    return False
            case _:
                if missing:
                    return False
    return True


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Context in which launches are recorded instead of run."""
    launches: list[Launch] = []
    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        options = {
            key: kwargs.pop(key)
            for key in ("num_warps", "num_stages", "enable_fp_fusion")
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
    source = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    return source(launch.kernel, signature, constants, attributes)


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


def compile_launch(launch: Launch, arch: int, count: bool = False) -> Resources:
    """Compiles a launch for an architecture, such as 80, 86 or 90; counts its
    instructions if asked."""
    compiled = triton.compile(
        specialize(launch),
        target=GPUTarget("cuda", arch, 32),
        options=launch.options,
    )
    binary = {"suffix": "cubin", "content": compiled.asm["cubin"]}
    usage = _tool("cuobjdump", "--dump-resource-usage", **binary).stdout
    once = loops = 0
    if count:
        once, loops = count_instructions(
            _tool("nvdisasm", "-c", **binary).stdout
        )

    def number(name: str) -> int:
        return int(re.search(rf"\b{name}:(\d+)", usage)[1])

    return Resources(
        registers=number("REG"),
        stack_bytes=number("STACK") + number("LOCAL"),
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        instructions=once,
        loop_instructions=loops,
        ptx=compiled.asm["ptx"],
    )
