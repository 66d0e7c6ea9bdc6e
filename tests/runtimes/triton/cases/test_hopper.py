"""The Gluon kernel, interpreted with its copies and products as late as may be.

Gluon has no interpreter. So its names are replaced by those of Triton, without
layouts, and by a model of what is asynchronous: in one mode a copy arrives only
when it is waited for, in the other a product reads its factors only then. Too
early a use, or too early a reuse, of a buffer is a wrong result.
"""

import os
from dataclasses import replace
from types import FunctionType, SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from speechbrain_stablequant.runtimes.triton.kernels import (
    device,
    matmul,
)
from speechbrain_stablequant.runtimes.triton.kernels.tiles import Config

hopper = matmul.hopper
if hopper is None:
    pytest.skip("this Triton has no Gluon", allow_module_level=True)

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="a compiled kernel is compared by its trial",
    ),
    pytest.mark.usefixtures("poisoned_outputs"),
]
#: What Gluon takes from Triton as it is.
SAME = ("constexpr", "int8", "int32", "int64", "float32")
TILE = Config(32, 32, 64, 4, 3, gluon=True)


class Buffers:
    """Of one factor, in shared memory."""

    def __init__(self, stages: int):
        self.held = [None] * stages

    def index(self, stage: int):
        buffer = SimpleNamespace(held=self.held, stage=stage)
        buffer.permute = lambda order: buffer
        return buffer


class Machine:
    """What a block has in flight; ``late_products`` says which of the two is
    late, ``slack`` is how many more are left in flight by each wait."""

    def __init__(self, late_products: bool, slack: int = 0):
        self.late_products, self.slack = late_products, slack

    def begin(self, axis: int):
        """The blocks of a grid run one after the other."""
        self.copies, self.groups, self.products = [], [], []
        self.fenced, self.acc = False, None
        return tl.program_id(axis)

    def copy(self, buffer, pointers):
        copied = (buffer, tl.load(pointers))
        self.copies.append(copied)
        if self.late_products:
            self.arrive([copied])

    def arrive(self, copies):
        for buffer, value in copies:
            buffer.held[buffer.stage] = value

    def commit_group(self):
        self.groups.append(self.copies)
        self.copies = []

    def wait_group(self, count: int):
        self.fenced = False
        while len(self.groups) > count + self.slack:
            group = self.groups.pop(0)
            if not self.late_products:
                self.arrive(group)

    def fence(self):
        self.fenced = True

    def multiply(self, a, b, acc, is_async: bool):
        assert is_async and self.fenced
        if self.acc is None:
            self.acc = acc
        self.products.append((a, b))
        if not self.late_products:
            self.finish(0)
        return self

    def finish(self, count: int):
        while len(self.products) > count:
            a, b = (x.held[x.stage] for x in self.products.pop(0))
            # else it has not arrived
            if a is not None:
                self.acc = tl.dot(a, b.T, self.acc, out_dtype=tl.int32)

    def wait(self, count: int, deps):
        self.finish(count and count + self.slack)
        return self if count else self.acc


def no_layout(*_):
    """In the place of every layout."""


def halves(*arguments):
    parts = device.halves(*arguments)
    for part in parts:
        part.type.layout = None
    return parts


def interpreted(machine: Machine):
    """The kernel for Triton's interpreter."""
    gl = SimpleNamespace(
        num_warps=lambda: 4,
        NVMMADistributedLayout=no_layout,
        NVMMASharedLayout=no_layout,
        BlockedLayout=no_layout,
        SliceLayout=no_layout,
        allocate_shared_memory=lambda kind, shape, layout: Buffers(shape[0]),
        # looked up late, as the interpreter replaces them
        arange=lambda start, end, layout: tl.arange(start, end),
        zeros=lambda shape, kind, layout: tl.zeros(shape, kind),
        load=lambda *a, **k: tl.load(*a, **k),
        store=lambda *a, **k: tl.store(*a, **k),
        minimum=lambda a, b: tl.minimum(a, b),
        cdiv=lambda a, b: tl.cdiv(a, b),
        convert_layout=lambda x, layout: x,
        program_id=machine.begin,
        static_range=range,
        **{name: getattr(tl, name) for name in SAME},
    )
    names = {
        "tl": tl,
        "gl": gl,
        "_copy": machine.copy,
        "async_copy": machine,
        "fence_async_shared": machine.fence,
        "warpgroup_mma": machine.multiply,
        "warpgroup_mma_wait": machine.wait,
        "_halves": halves,
        "_gelu_erf": device.gelu_erf,
        "_round_to_int8": device.round_to_int8,
        "_scale_and_bias": device.scale_and_bias,
    }

    def placed(function):
        moved = FunctionType(function.fn.__code__, names)
        moved.__annotations__ = function.fn.__annotations__
        return moved

    names["_copy_step"] = placed(hopper._copy_step)
    kernel = triton.jit(placed(hopper.hopper_kernel))
    # what is constant; the interpreter only knows the name in ``tl``
    kernel.rewrite().__annotations__ = kernel.fn.__annotations__
    return kernel


def _int8(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def layer(rows=70, depth=320, columns=40, residual=True):
    """Arguments of a linear layer, to 16 bit."""
    x = torch.randn(rows, columns).half() if residual else None
    scale, bias = torch.rand(columns) * 1e-4, torch.randn(columns)
    end = (x, not residual, torch.float16)
    return (_int8(rows, depth), _int8(columns, depth), scale, bias, *end)


LATE = pytest.mark.parametrize(
    "late_products", [False, True], ids=["late copies", "late products"]
)


@LATE
@pytest.mark.parametrize("stages", [3, 4])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_linear(late_products, steps, stages, equals_reference, monkeypatch):
    kernel = interpreted(Machine(late_products))
    monkeypatch.setattr(hopper, "hopper_kernel", kernel)
    tile = replace(TILE, num_stages=stages)
    arguments = layer(depth=64 * steps, residual=bool(steps % 2))
    equals_reference("linear", *arguments, config=tile)


def test_conv_to_integers(equals_reference, monkeypatch):
    kernel = interpreted(Machine(late_products=False))
    monkeypatch.setattr(hopper, "hopper_kernel", kernel)
    weight = matmul.pack_conv_weight(_int8(48, 64, 3))
    equals_reference(
        "conv1d", _int8(2, 51, 64), weight, torch.rand(48) * 1e-3, None, 3, 2,
        None, None, 0.0, True, torch.int8, 2.0, 127, -100, config=TILE,
    )  # fmt: skip


@LATE
def test_a_wait_that_is_too_short_is_found(
    late_products, launched, check_close, monkeypatch
):
    """The model tells right from wrong."""
    kernel = interpreted(Machine(late_products, slack=1))
    monkeypatch.setattr(hopper, "hopper_kernel", kernel)
    arguments = layer()
    found = launched("linear", *arguments, config=TILE)
    with pytest.raises(AssertionError, match="differs by up to"):
        check_close(found, matmul.linear_reference(*arguments))
