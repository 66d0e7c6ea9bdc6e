"""Where kernel tests run, and memory in which a stray access shows.

The tests in ``cases`` need kernels that run: on a CUDA device, or in Triton's
interpreter. The interpreter must be chosen before Triton is imported, so
without a device ``test_cases.py`` starts a process of its own for each file
of ``cases`` and this process does not collect them.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

from speechbrain_stablequant.runtimes.triton import build
from speechbrain_stablequant.runtimes.triton.kernels.library import OPERATORS
from speechbrain_stablequant.runtimes.triton.kernels.plain import difference

# For ``resources`` and others; appended, as some names there are common ones.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

HAS_DEVICE = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = [] if HAS_DEVICE or INTERPRETED else ["cases"]


if INTERPRETED:
    import triton_interpreter  # noqa: F401

#: Elements around a tensor that nobody may touch.
MARGIN = 256


@pytest.fixture
def device() -> str:
    """Where the kernels run."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def hopper():
    """The module of kernels in Gluon, where this Triton has what they need."""
    from speechbrain_stablequant.runtimes.triton.kernels import matmul

    if matmul.hopper is None:
        pytest.skip("this Triton has no Gluon of Hopper")
    return matmul.hopper


def _poison(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else 113


def _guarded(shape, dtype, device, buffers) -> torch.Tensor:
    """A tensor filled with poison, with poison around it."""
    numel = int(torch.Size(shape).numel())
    buffer = torch.full(
        (numel + 2 * MARGIN,), _poison(dtype), dtype=dtype, device=device
    )
    buffers.append(buffer)
    return buffer[MARGIN : MARGIN + numel].view(shape)


@pytest.fixture
def surrounded(device):
    """Puts a tensor into poisoned memory, optionally with gaps of poison
    after each row of its last axis."""

    def put(x: torch.Tensor, gap: int = 0) -> torch.Tensor:
        shape = (*x.shape[:-1], x.shape[-1] + gap)
        wide = _guarded(shape, x.dtype, device, [])
        view = wide[..., : x.shape[-1]]
        view.copy_(x)
        return view

    return put


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """``torch.empty`` gives poison with guarded margins; the margins must be
    intact at the end. What is left of the poison inside fails a comparison."""
    buffers: list[torch.Tensor] = []

    def empty(*shape, dtype=torch.float32, device="cpu"):
        if len(shape) == 1 and not isinstance(shape[0], int):
            shape = shape[0]
        return _guarded(shape, dtype, device, buffers)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    assert buffers, "no output was allocated: the test checks nothing"
    for buffer in buffers:
        for margin in (buffer[:MARGIN], buffer[-MARGIN:]):
            if buffer.dtype.is_floating_point:
                assert margin.isnan().all()
            else:
                assert (margin == _poison(buffer.dtype)).all()


@pytest.fixture
def launched(surrounded):
    """The result of an operator's kernel on tensors in poisoned memory; those
    with gaps are there already."""

    def run(name, *arguments, **options):
        placed = [
            surrounded(a)
            if isinstance(a, torch.Tensor) and a.is_contiguous()
            else a
            for a in arguments
        ]
        return OPERATORS[name].launch(*placed, **options)

    return run


def _check_close(found, expected, tolerance=1e-5):
    reason = difference(found, expected, tolerance)
    assert reason is None, reason


@pytest.fixture
def check_close():
    """Compares a kernel's result with another one."""
    return _check_close


@pytest.fixture
def equals_reference(launched):
    """Compares an operator's kernel with its reference; returns the latter's
    result."""

    def check(name, *arguments, **options):
        expected = OPERATORS[name].reference(
            *(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments)
        )
        found = launched(name, *arguments, **options)
        _check_close(found, expected)
        return expected

    return check


@pytest.fixture
def pretended_card(monkeypatch):
    """Makes torch say that there is a card of some name and capability."""

    def pretend(name: str, capability: tuple[int, int]) -> None:
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(cuda, "get_device_name", lambda _: name)
        # Whatever version is installed.
        monkeypatch.setattr(build, "MIN_TRITON", (3, 0))
        build.why_not.cache_clear()

    yield pretend
    build.why_not.cache_clear()
